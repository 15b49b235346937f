"""One foreign WebDataset tar: the samples it holds, where their members lie, and what cannot be taken.

    entries of the tar -> runs of members with one key -> samples, or a loss with a reason from `TarReason`

The tar is streamed once, bounded by `TarLimits`; nothing is extracted, decoded or followed.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.shards import Member, key_end
from pipelines.tars import Hashed, Readable, TarBeyondLimits, TarDamaged, TarEntry, TarLimits, TarReason, read_tar

MAX_LABEL_BYTES = 1 << 20
MAX_LABEL_CHARS = 200


@dataclass(frozen=True)
class ForeignSample:
    """A sample that can be taken: `members[0]` is the image, the rest its `cls` and `json`; labels are names."""

    key: str
    members: tuple[Member, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Loss:
    """What cannot be taken: a sample by its key, a lone file by its name, or (no name) the rest of the tar."""

    name: str
    reason: TarReason


@dataclass(frozen=True)
class ForeignTar:
    """A scanned tar: samples in the order they lie, losses, and the digest of all its bytes."""

    samples: list[ForeignSample]
    losses: list[Loss]
    bytes: int
    sha256: str


def scan_foreign_tar(
    stream: Readable, images: Sequence[str], fields: Sequence[str] | None, limits: TarLimits | None = None
) -> ForeignTar:
    """Scan one tar. `images` are the suffixes of images, with their dot; `fields` the JSON fields that hold labels.

    Unset `fields` = the `cls` member, else `labels` or `label` of the JSON; none = no labels. Where the tar breaks,
    its last sample is given up with it, since members of it may be missing. TarBeyondLimits is raised as it comes: a
    tar that is not read to its end has no digest.
    """
    source = Hashed(stream)
    runs = _Runs(images, fields)
    losses = []
    try:
        for entry, content in read_tar(source, runs.wants, limits):
            runs.add(entry, content)
    except TarBeyondLimits:
        raise
    except TarDamaged as damage:
        losses.append(Loss("", damage.reason))
        if damage.reason is not TarReason.TRAILING_DATA:
            runs.break_off(damage.reason)
    runs.close()
    size, digest = source.finish()
    return ForeignTar(runs.samples(), [*runs.losses(), *losses], size, digest)


@dataclass
class _Run:
    """Members that stand together under one key."""

    key: str
    suffixes: set[str] = field(default_factory=set)
    images: list[Member] = field(default_factory=list)
    facts: dict[str, tuple[Member, bytes]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    problem: TarReason | None = None


class _Runs:
    """Groups the entries of one tar into samples, as the stock reader does: by what precedes the first dot."""

    def __init__(self, images: Sequence[str], fields: Sequence[str] | None) -> None:
        self._images, self._fields = frozenset(images), fields
        self._open: _Run | None = None
        self._closed: dict[str, _Run] = {}
        self._losses: list[Loss] = []

    def wants(self, entry: TarEntry) -> bool:
        """Whether the content is needed: of an image for its digest, of `cls` and `json` also for what they say."""
        suffix = _suffix(entry.name)
        limit = MAX_LABEL_BYTES if suffix in (".cls", ".json") else entry.size if suffix in self._images else -1
        return entry.refusal is None and entry.size <= limit

    def add(self, entry: TarEntry, content: bytes | None) -> None:
        if entry.kind == "folder":
            return
        key, suffix = _key(entry.name), _suffix(entry.name)
        if not key or not suffix:
            self._losses.append(Loss(entry.name, entry.refusal or TarReason.NO_KEY))
            return
        if self._open is None or self._open.key != key:
            self.close()
            self._open = _Run(key)
        run = self._open
        if suffix in run.suffixes:
            run.problem = run.problem or TarReason.DUPLICATE_KEY
        run.suffixes.add(suffix)
        if entry.refusal is not None:
            run.problem = run.problem or entry.refusal
        elif content is not None:
            member = Member(entry.name, entry.offset, entry.size, hashlib.sha256(content).digest())
            if suffix in self._images:
                run.images.append(member)
            else:
                run.facts[suffix] = member, content
        elif suffix in (".cls", ".json"):
            run.problem = run.problem or TarReason.BAD_METADATA
        elif suffix in self._images:
            run.problem = run.problem or TarReason.TOO_LARGE

    def break_off(self, reason: TarReason) -> None:
        """The tar ends here against its will."""
        if self._open is not None:
            self._open.problem = self._open.problem or reason

    def close(self) -> None:
        """The key that is open has no further member here."""
        run, self._open = self._open, None
        if run is None:
            return
        self._judge(run)
        earlier = self._closed.setdefault(run.key, run)
        if earlier is not run:
            if earlier.suffixes & run.suffixes:
                self._losses.append(Loss(run.key, TarReason.DUPLICATE_KEY))
            else:
                earlier.suffixes |= run.suffixes
                earlier.problem = TarReason.INTERLEAVED

    def _judge(self, run: _Run) -> None:
        if run.problem is None and len(run.images) != 1:
            run.problem = TarReason.SEVERAL_IMAGES if run.images else TarReason.NO_IMAGE
        try:
            run.labels = _labels({suffix: content for suffix, (_, content) in run.facts.items()}, self._fields)
        except (ValueError, RecursionError):
            run.problem = run.problem or TarReason.BAD_METADATA
        run.facts = {suffix: (member, b"") for suffix, (member, _) in run.facts.items()}

    def samples(self) -> list[ForeignSample]:
        return [
            ForeignSample(run.key, (run.images[0], *(run.facts[suffix][0] for suffix in sorted(run.facts))), run.labels)
            for run in self._closed.values()
            if run.problem is None
        ]

    def losses(self) -> list[Loss]:
        return [
            *(Loss(run.key, run.problem) for run in self._closed.values() if run.problem is not None),
            *self._losses,
        ]


def _key(name: str) -> str:
    """The key of a member, empty where it has none; `./a/b.jpg` and `a/b.jpg` have one key."""
    try:
        stem = name[: key_end(name)]
    except ValueError:
        return ""
    if stem.endswith("/") or not stem:
        return ""
    if stem.startswith("/"):  # refused, but not under the key of a file that is not
        return stem
    return "/".join(part for part in stem.split("/") if part not in ("", "."))


def _suffix(name: str) -> str:
    """What follows the key, with its dot, in lower case: `.jpg`, `.seg.png`; empty where there is no dot."""
    try:
        return name[key_end(name) :].lower()
    except ValueError:
        return ""


# ------------------------------------------------------------------------------------------------------------ labels


def _labels(facts: dict[str, bytes], fields: Sequence[str] | None) -> tuple[str, ...]:
    """The class names that `cls` or `json` states, each once. ValueError where it cannot be read."""
    value = json.loads(facts[".json"]) if ".json" in facts else {}
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if fields is None and ".cls" in facts:
        found: list[Any] = [facts[".cls"].decode().strip()]
    else:
        named = [name for name in (("labels", "label") if fields is None else fields) if value.get(name) is not None]
        found = [one for name in (named[:1] if fields is None else named) for one in _as_list(value[name])]
    return tuple(dict.fromkeys(_label(one) for one in found))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _label(value: Any) -> str:
    """A label as the name of a class: a text, or a whole number without leading zeros."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("a label is neither a text nor a whole number")
    text = str(value)
    if not text or len(text) > MAX_LABEL_CHARS or not text.isprintable():
        raise ValueError("a label is empty, too long or not printable")
    return str(int(text)) if text.isascii() and text.isdigit() else text
