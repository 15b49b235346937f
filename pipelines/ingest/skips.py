"""Reasons to skip a file of a source: a closed list, so that readers can switch on it and add up counts."""

from enum import StrEnum


class SkipReason(StrEnum):
    """A reason for `ingest` to skip a file. A reason that `--adopt` has too has the same name there (`TarReason`)."""

    TOO_LARGE = "too_large"
    """The file is larger than a reader of shards accepts."""
    LINK = "link"
    """A link that leads nowhere, back to a folder that holds it, or out of its archive."""
    SPECIAL = "special"
    """A device, a FIFO, a socket or a sparse file of a tar."""
    UNSAFE_NAME = "unsafe_name"
    """The name is absolute, leads out of its source, is too long or holds a NUL."""
    HIDDEN = "hidden"
    """The file or a folder above it is hidden, or belongs to the system."""
    UNREADABLE = "unreadable"
    """The file, or a folder with all that it holds, cannot be read."""
    MISSING = "missing"
    """A table or list names the file, and it is not there."""
    WRONG_SUFFIX = "wrong_suffix"
    """The suffix is not one of an image."""
    EMPTY = "empty"
    """The file has no bytes."""
    STRAY = "stray"
    """A picture that lies beside the class folders."""
    REPLACED = "replaced"
    """A later entry of the archive has the same name."""
    NO_LABEL = "no_label"
    """The data set has no label for the picture, and the protocol leaves such pictures out."""

    UNREACHABLE = "unreachable"
    """The server of a URL does not answer, is too busy or too slow, or cuts its answer short."""
    REFUSED = "refused"
    """The server refuses the URL, and will refuse it again."""
    REDIRECTED = "redirected"
    """The URL redirects too often, or to what is no plain http or https URL."""
    PRIVATE = "private"
    """The URL leads to a private address."""
    NOT_AN_IMAGE = "not_an_image"
    """What a URL holds is no image, by its type or its first bytes."""


RETRYABLE = frozenset({SkipReason.UNREADABLE, SkipReason.UNREACHABLE})
"""Reasons that may go away: a run that lost too many pictures is given again, and then these are read again."""
NO_LOSS = frozenset(
    {SkipReason.HIDDEN, SkipReason.WRONG_SUFFIX, SkipReason.STRAY, SkipReason.REPLACED, SkipReason.NO_LABEL}
)
"""Reasons by which no picture is lost, so they do not count for `ingest.skip_budget`."""
