"""Why a file of a source is no sample: a closed list, so that readers may switch on it and counts can be added up."""

from enum import StrEnum


class SkipReason(StrEnum):
    """Why `ingest` passes over a file. Where a tar that is adopted has the same reason, it has the same name."""

    TOO_LARGE = "too_large"
    """The file is larger than a reader of shards takes."""
    LINK = "link"
    """A link that leads nowhere, back to a folder that holds it, or out of its archive."""
    SPECIAL = "special"
    """A device, a FIFO, a socket or a sparse file of a tar."""
    UNSAFE_NAME = "unsafe_name"
    """The name is absolute, leads out of its source, is too long or holds a NUL."""
    HIDDEN = "hidden"
    """The file or a folder that holds it is hidden, or is what a system keeps for itself."""
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
    """The data set gives the picture no label, and the protocol leaves such out."""


NO_LOSS = frozenset(
    {SkipReason.HIDDEN, SkipReason.WRONG_SUFFIX, SkipReason.STRAY, SkipReason.REPLACED, SkipReason.NO_LABEL}
)
"""Reasons that cost nobody a picture, so they do not count for `ingest.skip_budget`."""
