"""Scans one foreign WebDataset tar: its samples, the places of their members, and its losses.

    entries of the tar -> runs of members with one key -> samples, or a loss with a reason from `TarReason`

The tar is streamed once, bounded by `TarLimits`. Nothing is extracted, decoded or followed.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.shards.shards import Member, key_end
from pipelines.shards.tar import Hashed, Readable, TarBeyondLimits, TarDamaged, TarEntry, TarLimits, TarReason, read_tar

MAX_LABEL_BYTES = 1 << 20
"""Largest member in bytes that is read for labels."""
MAX_LABEL_CHARS = 200
"""Longest label in characters."""

_LABEL_SUFFIXES = (".cls", ".json")
"""Suffixes of members with labels and metadata."""
_LABEL_CHARS_SHOWN = 60
"""Characters of a bad label that an error shows."""
_COMPRESSED = re.compile(
    rb"(?P<gzip>\x1f\x8b\x08)|(?P<xz>\xfd7zXZ\0)|(?P<bzip2>BZh[1-9]1AY&SY)|(?P<zstd>\x28\xb5\x2f\xfd)|(?P<zip>PK\3\4)"
)
"""First bytes of compressed files, which may still be called .tar."""

# Characters that would spoil a terminal or a line of text: control characters, line separators, marks that change the
# direction of writing, lone surrogates. All others may be in class names, also the joiners inside letters and emoji.
_NO_LABEL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class ForeignSample:
    """A sample that can be taken: `members[0]` is the image, the rest its `cls` and `json`. Labels are class names."""

    key: str
    members: tuple[Member, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Loss:
    """A part of a tar that cannot be taken: a sample by its key, a lone file by its name, or (no name) the tar's rest.

    `detail` adds to the reason, if there is more to say. `sample` tells whether a sample is lost.
    """

    name: str
    reason: TarReason
    detail: str = ""
    sample: bool = True


@dataclass(frozen=True)
class ForeignTar:
    """A scanned tar: samples in the order of the tar, losses, and the size and digest of the whole tar."""

    samples: list[ForeignSample]
    losses: list[Loss]
    bytes: int
    sha256: str


def scan_foreign_tar(
    stream: Readable, images: Sequence[str], fields: Sequence[str] | None, limits: TarLimits | None = None
) -> ForeignTar:
    """Scan one tar. `images` are the suffixes of images, with their dot; `fields` are the JSON fields with labels.

    Unset `fields` means the `cls` member, else `labels` or `label` of the JSON; empty means no labels. JSON is parsed
    only for labels. If the tar is damaged, the sample at the damage is lost too, since it may lack members. Raises
    TarBeyondLimits unchanged: a tar that is not read to its end has no digest.
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
        losses.append(Loss("", damage.reason, _compression(source.head)))
        if damage.reason is not TarReason.TRAILING_DATA:
            runs.break_off(damage.reason)
    runs.close()
    size, digest = source.finish()
    return ForeignTar(runs.samples(), [*runs.losses(), *losses], size, digest)


def _compression(head: bytes) -> str:
    """Return advice if the first bytes show that a tar is compressed, else ""."""
    found = _COMPRESSED.match(head)
    return f"it is compressed by {found.lastgroup}: unpack it, for samples are read by their place" if found else ""


@dataclass
class _Run:
    """Consecutive members with one key."""

    key: str
    suffixes: set[str] = field(default_factory=set)
    images: list[Member] = field(default_factory=list)
    facts: dict[str, tuple[Member, bytes | None]] = field(default_factory=dict)
    beside: list[Loss] = field(default_factory=list)
    labels: tuple[str, ...] = ()
    problem: TarReason | None = None
    detail: str = ""

    def refuse(self, reason: TarReason, detail: str = "") -> None:
        """Mark the sample as lost. The first reason stays."""
        if self.problem is None:
            self.problem, self.detail = reason, detail


class _Runs:
    """Groups the entries of one tar into samples like the stock webdataset reader: by the name up to its first dot."""

    def __init__(self, images: Sequence[str], fields: Sequence[str] | None) -> None:
        self._images, self._fields = frozenset(images), fields
        self._compound = any(suffix.count(".") > 1 for suffix in images)
        self._open: _Run | None = None
        self._closed: dict[str, _Run] = {}
        self._losses: list[Loss] = []

    def wants(self, entry: TarEntry) -> bool:
        """Tell whether a member must be read: an image for its digest, `cls` and `json` also for their labels."""
        suffix = _suffix(entry.name)
        limit = entry.size if suffix in self._images else MAX_LABEL_BYTES if self._states(suffix) else -1
        return entry.refusal is None and entry.size <= limit

    def add(self, entry: TarEntry, content: bytes | None) -> None:
        if entry.kind == "folder":
            return
        key, suffix = _key(entry.name), _suffix(entry.name)
        if not key or not suffix:
            self._losses.append(Loss(entry.name, entry.refusal or TarReason.NO_KEY, sample=False))
            return
        if self._open is None or self._open.key != key:
            self.close()
            self._open = _Run(key)
        run = self._open
        if suffix in run.suffixes:
            run.refuse(TarReason.DUPLICATE_KEY, f"the tar has two members {key}{suffix}")
        run.suffixes.add(suffix)
        if suffix in self._images or suffix in _LABEL_SUFFIXES or (content is not None and self._states(suffix)):
            self._take(run, entry, suffix, content)
        elif entry.refusal not in (None, TarReason.TOO_LARGE):  # nobody reads it, so its size costs nothing
            run.beside.append(Loss(entry.name, entry.refusal, sample=False))

    def _states(self, suffix: str) -> bool:
        """Tell whether a member may hold labels. With images such as `.input.jpg`, that can be `.output.cls`."""
        return suffix in _LABEL_SUFFIXES or (self._compound and suffix.endswith(".cls"))

    def _take(self, run: _Run, entry: TarEntry, suffix: str, content: bytes | None) -> None:
        """Keep an image or a member that may hold labels. A member that is too large comes without content."""
        if entry.refusal is not None:
            run.refuse(entry.refusal, entry.name)
            return
        digest = hashlib.sha256(content).digest() if content is not None else b""
        member = Member(entry.name, entry.offset, entry.size, digest)
        if suffix not in self._images:
            run.facts[suffix] = member, content
        elif content is None:
            run.refuse(TarReason.TOO_LARGE, entry.name)
        else:
            run.images.append(member)

    def break_off(self, reason: TarReason) -> None:
        """Mark the open sample as lost, since the tar is damaged here."""
        if self._open is not None:
            self._open.refuse(reason)

    def close(self) -> None:
        """Close the open run of members, and judge its sample."""
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
        if not run.images and run.beside:
            run.refuse(run.beside[0].reason, run.beside[0].name)
        if len(run.images) != 1:
            members = ", ".join(suffix.removeprefix(".") for suffix in sorted(run.suffixes))
            run.refuse(TarReason.SEVERAL_IMAGES if run.images else TarReason.NO_IMAGE, f"its members: {members}")
        others = [suffix for suffix in run.facts if suffix not in _LABEL_SUFFIXES]
        named = {".cls": run.facts[others[0]]} if len(others) == 1 and ".cls" not in run.facts else {}
        run.facts = {suffix: run.facts[suffix] for suffix in _LABEL_SUFFIXES if suffix in run.facts} | named
        try:
            run.labels = _labels({suffix: content for suffix, (_, content) in run.facts.items()}, self._fields)
        except ValueError as error:
            run.refuse(TarReason.BAD_METADATA, str(error))
        # A member that was too large to be read is no metadata either. The other contents are not needed any more.
        run.facts = {name: (member, b"") for name, (member, content) in run.facts.items() if content is not None}

    def samples(self) -> list[ForeignSample]:
        return [
            ForeignSample(run.key, (run.images[0], *(run.facts[suffix][0] for suffix in sorted(run.facts))), run.labels)
            for run in self._closed.values()
            if run.problem is None
        ]

    def losses(self) -> list[Loss]:
        return [
            *(Loss(run.key, run.problem, run.detail) for run in self._closed.values() if run.problem is not None),
            *(loss for run in self._closed.values() if run.problem is None for loss in run.beside),
            *self._losses,
        ]


def _key(name: str) -> str:
    """Return the key of a member, or "" if it has none; `./a/b.jpg` and `a/b.jpg` have the same key."""
    try:
        stem = name[: key_end(name)]
    except ValueError:
        return ""
    if stem.endswith("/") or not stem:
        return ""
    if stem.startswith("/"):  # refused later, and must not share the key of a file without the slash
        return stem
    return "/".join(part for part in stem.split("/") if part not in ("", "."))


def _suffix(name: str) -> str:
    """Return the name behind the key, with its dot, in lower case (`.jpg`, `.seg.png`), or "" if it has no dot."""
    try:
        return name[key_end(name) :].lower()
    except ValueError:
        return ""


# ------------------------------------------------------------------------------------------------------------ labels


def _labels(facts: dict[str, bytes | None], fields: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names in `cls` or `json`, each once. Raises ValueError, with the value, for a bad label."""
    if fields is None and ".cls" in facts:
        found: list[Any] = [_decode_member(facts[".cls"], "cls").strip()]
    elif fields == () or ".json" not in facts:
        return ()
    else:
        value = _parsed(_decode_member(facts[".json"], "json"))
        names = ("labels", "label") if fields is None else fields
        stated = [name for name in names if value.get(name) is not None]
        held = [value[name] for name in (stated[:1] if fields is None else stated)]
        found = [one for entry in held for one in (entry if isinstance(entry, list) else [entry])]
    return tuple(dict.fromkeys(_label(one) for one in found if one is not None and one != ""))


def _decode_member(content: bytes | None, member: str) -> str:
    if content is None:
        raise ValueError(f"its {member} has more than {MAX_LABEL_BYTES} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"its {member} is not UTF-8") from None


def _parsed(text: str) -> dict[str, Any]:
    """Parse a JSON object; any other JSON value, such as a list of boxes, counts as an empty one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its json is not JSON") from None
    return value if isinstance(value, dict) else {}


def _label(value: Any) -> str:
    """Return a JSON label as a class name: a text, `true` or `false`, or a whole number (3.0 is 3). Else ValueError."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        shown = json.dumps(value)
        raise ValueError(
            f"the label {shown[:_LABEL_CHARS_SHOWN]} is neither a text nor true or false nor a whole number"
        )
    text = str(value)
    if len(text) > MAX_LABEL_CHARS:
        raise ValueError(f"the label {text[:_LABEL_CHARS_SHOWN]!r}... has more than {MAX_LABEL_CHARS} characters")
    if refused := _NO_LABEL.search(text):
        raise ValueError(f"the label {text[:_LABEL_CHARS_SHOWN]!a} holds the character U+{ord(refused[0]):04X}")
    return text
