"""Manifests: the contents of an artifact, and artifacts opened through them, each byte checked against its digest.

A manifest names parts and receipts itself, or where they are many in lists (see `lists`), which are read when they are
needed.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PrivateAttr, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import ErrorDetails, PydanticSerializationError, to_jsonable_python

from pipelines.artifacts.lists import INLINE_ENTRIES, Holds, ListRef, pack_lists, parse_list
from pipelines.artifacts.nearby import explain_absence
from pipelines.errors import ConfigError, DamagedArtifact, InputError
from pipelines.storage import Store, canonical_json, map_in_order, sha256_of

_log = logging.getLogger(__name__)

MANIFEST_FORMAT = 2
PART_NAME = r"[A-Za-z0-9_(\[][A-Za-z0-9 ._+=,@()\[\]-]*"
"""Pattern of the names that a part may have.

Spaces and brackets are allowed, since browsers and people put them into the names of copied tars.
"""


PART_DIGEST_CHARS = 16


_Bytes = bytes
"""The type, in classes that have a field `bytes`."""


def fingerprint(kind: str, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the hex sha256 that names the result of `kind` made from `inputs` (digests) under `settings`."""
    return sha256_of(canonical_json({"format": MANIFEST_FORMAT, "kind": kind, "inputs": inputs, "settings": settings}))


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Facts(_Record):
    """Facts about its kind that a manifest or a receipt holds. A fact with its default value is not written."""

    model_config = ConfigDict(strict=True)

    @classmethod
    def parse(cls, data: bytes, where: str, advice: str) -> Self:
        """Parse JSON; raises DamagedArtifact, ending with `advice`, where a fact is missing, wrong or unknown."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, entry['loc']))} {_wrong(entry)}".strip() for entry in error.errors()]
            raise DamagedArtifact(f"{where} cannot be used ({', '.join(wrong[:MAX_WRONG_NAMED])}): {advice}") from None

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Self:
        """Build from JSON values that this program made; the inverse of `as_json`."""
        return cls.model_validate_json(canonical_json(values))

    def as_json(self) -> dict[str, Any]:
        """Return the written facts as JSON values, in the order of the fields."""
        return self.model_dump(mode="json", exclude_defaults=True)


def _wrong(entry: ErrorDetails) -> str:
    words = {"missing": "is missing", "extra_forbidden": "is unknown"}
    return words.get(entry["type"], f"is wrong: {entry['msg'].removeprefix('Value error, ')}")


F = TypeVar("F", bound=Facts)


def _receipt_bytes(value: object) -> bytes:
    """Return a receipt as canonical JSON, from its values in a manifest or its bytes in a list."""
    if isinstance(value, dict):
        return canonical_json(value)
    if not isinstance(value, bytes):
        raise ValueError("a receipt is a JSON object")
    return value


def _receipt_json(data: bytes) -> object:
    return json.loads(data)


@checked_dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Part:
    """One immutable object of an artifact: its path below the root, size, digest and number of rows.

    A process may hold a million of them, so they have slots.
    """

    path: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: str
    rows: Annotated[int, Field(ge=0)]

    @property
    def name(self) -> str:
        """Logical name, without digest: `shard-000000.tar`."""
        path = PurePosixPath(self.path)
        return path.stem[: -PART_DIGEST_CHARS - 1] + path.suffix


class ArtifactInput(_Record):
    """An upstream artifact by role, kind and digest. Its place is left out, so that a moved input is the same input."""

    role: str
    kind: str
    digest: str


class ReceiptRef(_Record):
    """A shard's receipt, as the manifest holds it. Its object was put when the shard was done."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    shard: str
    path: str
    data: Annotated[_Bytes, Field(alias="receipt"), BeforeValidator(_receipt_bytes), PlainSerializer(_receipt_json)]
    """Canonical JSON of the receipt."""

    @classmethod
    def of(cls, shard: str, receipt: Facts, name: str | None = None) -> Self:
        """Refer to a shard's receipt, which was put as `name`, by default under the name of the shard."""
        return cls(shard=shard, path=f"receipts/{name or shard}.json", data=canonical_json(receipt))

    @property
    def bytes(self) -> int:
        """Size of the object."""
        return len(self.data)

    @property
    def sha256(self) -> str:
        """Digest of the object."""
        return sha256_of(self.data)

    def parse(self, model: type[F], where: str, advice: str) -> F:
        """Return the receipt; raises DamagedArtifact, ending with `advice`, where it does not fit the model."""
        return model.parse(self.data, f"{where}/{self.path}", advice)


L = TypeVar("L", Part, ReceiptRef)

Entry = Part | ReceiptRef | ListRef
"""An object that a manifest names."""


class Manifest(_Record):
    """The published description of an artifact. `meta` holds the kind's own facts (classes, bits, card, settings)."""

    model_config = ConfigDict(serialize_by_alias=True)

    format: int
    kind: str
    fingerprint: str
    inputs: tuple[ArtifactInput, ...]
    named_parts: tuple[Part, ...] = Field(alias="parts")
    """Parts that the manifest names itself; `parts` has them all."""
    named_receipts: tuple[ReceiptRef, ...] = Field(alias="receipts")
    lists: tuple[ListRef, ...]
    totals: dict[str, int]
    meta: dict[str, Any]
    digest: str

    _store: Store | None = PrivateAttr(None)
    _unput: dict[str, _Bytes] = PrivateAttr(default_factory=dict)
    """Lists that are not put yet, by path."""

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """All parts, sorted by path."""
        return self.named_parts or tuple(sorted(self._listed("parts", Part), key=lambda part: part.path))

    @cached_property
    def receipts(self) -> tuple[ReceiptRef, ...]:
        """All receipts, sorted by shard."""
        return tuple(sorted(self.each_receipt(), key=lambda ref: ref.shard))

    def each_receipt(self) -> Iterator[ReceiptRef]:
        """Yield all receipts, in no order; those of lists are read again each time, since all are much to hold."""
        held = self.__dict__.get("receipts") or self.named_receipts
        yield from held or self._listed("receipts", ReceiptRef)

    def part(self, name: str) -> Part:
        """Return the part with this logical name; raises DamagedArtifact where there is none."""
        for part in self._parts_near(PurePosixPath(name)):
            if part.name == name:
                return part
        raise DamagedArtifact(f"the {self.kind} manifest lists no part {name}")

    def _parts_near(self, name: PurePosixPath) -> Iterable[Part]:
        """Return the parts among which one of this name is: of a manifest with lists, those of the lists around it."""
        if "parts" in self.__dict__ or not self.lists:
            return self.parts
        return self._listed("parts", Part, f"parts/{name.stem}-")

    def held_in_lists(self, holds: Holds, model: type[L]) -> list[tuple[ListRef, tuple[L, ...]]]:
        """Return the lists that hold this kind of entry, with their entries."""
        refs = [ref for ref in self.lists if ref.holds == holds]
        return list(zip(refs, map_in_order(lambda ref: self._read_list(ref, model), refs), strict=True))

    def input(self, role: str) -> ArtifactInput:
        """Return the input with this role; raises DamagedArtifact where there is none."""
        for entry in self.inputs:
            if entry.role == role:
                return entry
        raise DamagedArtifact(f"the {self.kind} manifest names no input {role}")

    def to_bytes(self) -> _Bytes:
        """Return the canonical JSON, digest included."""
        return canonical_json(self.model_dump(mode="json"))

    def put_lists(self, store: Store) -> None:
        """Put the lists that are not put yet."""
        for path, data in self._unput.items():
            store.put_same(path, data, "list.put")

    def _listed(self, holds: Holds, model: type[L], prefix: str = "") -> Iterator[L]:
        refs = [ref for ref in self.lists if ref.holds == holds and ref.may_hold(prefix)]
        return chain.from_iterable(map_in_order(lambda ref: self._read_list(ref, model), refs, LISTS_AT_ONCE))

    def _read_list(self, ref: ListRef, model: type[L]) -> tuple[L, ...]:
        assert self._store is not None, "a manifest with lists knows its store"
        where = f"{self._store.uri}/{ref.path}"
        data = self._unput.get(ref.path) or read_part(self._store, ref)
        entries = parse_list(data, ref, model, where)
        _require_inside(where, entries)
        return entries


def make_manifest(
    store: Store,
    fields: Mapping[str, Any],
    parts: Iterable[Part],
    receipts: Iterable[ReceiptRef],
    before: Manifest | None = None,
) -> Manifest:
    """Return the manifest of these parts and receipts at `store`; `fields` are all others but `format` and `digest`.

    Many go into lists, among them those of `before` that can stay; `put_lists` has to put the new ones. Raises
    DamagedArtifact for a part or receipt that is there twice: its samples would count twice.
    """
    parts = sorted(parts, key=lambda part: part.path)
    receipts = sorted(receipts, key=lambda ref: ref.shard)
    for names in ([part.path for part in parts], [ref.shard for ref in receipts]):
        for one in (one for one, other in pairwise(names) if one == other):
            raise DamagedArtifact(f"{store.uri}: {one} would stand twice in the manifest: report this, it is a bug")
    lists, unput = list[ListRef](), dict[str, bytes]()
    if len(parts) + len(receipts) > INLINE_ENTRIES:
        old_parts = before.held_in_lists("parts", Part) if before else []
        old_receipts = before.held_in_lists("receipts", ReceiptRef) if before else []
        for refs, new in (pack_lists("parts", parts, old_parts), pack_lists("receipts", receipts, old_receipts)):
            lists += refs
            unput |= new
    named: dict[str, Any] = {"parts": parts, "receipts": receipts, "lists": ()}
    if lists:
        named = {"parts": (), "receipts": (), "lists": lists}
    whole = {**json.loads(canonical_json(fields)), "format": MANIFEST_FORMAT, **to_jsonable_python(named)}
    manifest = Manifest.model_validate({**whole, "digest": manifest_digest(whole)})
    manifest._store, manifest._unput = store, unput
    manifest.__dict__.update(parts=tuple(parts), receipts=tuple(receipts))
    return manifest


def manifest_digest(fields: Mapping[str, Any]) -> str:
    """Return the sha256 of the canonical manifest without its own digest."""
    return sha256_of(canonical_json({key: value for key, value in fields.items() if key != "digest"}))


def parse_manifest(data: bytes, store: Store, name: str) -> Manifest:
    """Check and parse the bytes of the manifest `name`; raises DamagedArtifact, or ConfigError for another format."""
    where = f"{store.uri}/{name}"
    try:
        fields = json.loads(data)
        if isinstance(fields, dict) and isinstance(found := fields.get("format"), int) and found != MANIFEST_FORMAT:
            if fields.get("digest") != manifest_digest(fields):  # a flipped bit is no other format
                raise DamagedArtifact(f"{where} does not match its own digest")
            newer = f"newer than {MANIFEST_FORMAT}: upgrade hhnet"
            older = f"and this hhnet reads {MANIFEST_FORMAT} only: make the artifact again"
            raise ConfigError(f"{where} has format {found}, {newer if found > MANIFEST_FORMAT else older}")
        manifest = Manifest.model_validate(fields)
        digest = manifest_digest(manifest.model_dump(mode="json"))
    except (ValueError, PydanticSerializationError, RecursionError) as error:
        raise DamagedArtifact(f"{where} is not a manifest: {str(error).splitlines()[0]}") from None
    if manifest.digest != digest:
        raise DamagedArtifact(f"{where} does not match its own digest")
    _require_inside(where, [*manifest.named_parts, *manifest.named_receipts, *manifest.lists])
    manifest._store = store
    return manifest


def _require_inside(where: str, entries: Iterable[Entry]) -> None:
    for path in (entry.path for entry in entries):
        if path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise DamagedArtifact(f"{where} names a path outside its artifact: {path!r}")


def read_part(store: Store, part: Part | ListRef) -> bytes:
    """Read all bytes of a part in one request, and check size and sha256 before they are returned."""
    try:
        # The limit lets one more byte through, so an object that is too long shows without being fetched whole.
        data = store.read(part.path, limit=part.bytes)
    except FileNotFoundError:
        raise DamagedArtifact(f"{store.uri}/{part.path} is missing") from None
    if len(data) != part.bytes or sha256_of(data) != part.sha256:
        raise DamagedArtifact(f"{store.uri}/{part.path} does not match the digest in its manifest")
    return data


@dataclass(frozen=True)
class Artifact:
    """A committed artifact, opened at its manifest."""

    store: Store
    manifest: Manifest

    @property
    def uri(self) -> str:
        """URI of the artifact's root."""
        return self.store.uri

    @property
    def digest(self) -> str:
        """The manifest's digest, which names the artifact at any place."""
        return self.manifest.digest

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        """The parts by logical name, for repeated look-ups."""
        return {part.name: part for part in self.manifest.parts}

    @cached_property
    def receipts(self) -> Mapping[str, ReceiptRef]:
        """The receipts by shard."""
        return {reference.shard: reference for reference in self.manifest.receipts}

    def facts(self, model: type[F]) -> F:
        """Parse the facts of the manifest's kind, once per model; raises DamagedArtifact where one is missing."""
        if model not in self._parsed:
            where = f"{self.uri}: the {self.manifest.kind} manifest"
            self._parsed[model] = model.parse(
                canonical_json(self.manifest.meta), where, "make it again with this hhnet"
            )
        return cast(F, self._parsed[model])

    @cached_property
    def _parsed(self) -> dict[type[Facts], Facts]:
        return {}

    def read(self, part: Part) -> bytes:
        """Read all bytes of a part; size and sha256 are checked before they are returned."""
        return read_part(self.store, part)

    def fetch(self, part: Part, folder: Path) -> Path:
        """Return a local file with the part's checked bytes: the stored file on a local store, else a copy.

        The part may be larger than memory. A copy with a wrong digest is made again, because the bytes may have changed
        on the way; a second copy with the same wrong digest means that the store holds these bytes.
        """
        where = f"{self.uri}/{part.path}"
        if self.store.is_local:
            size, path = self.store.size(part.path), Path(self.store.path(part.path))
            if size is None:
                raise DamagedArtifact(f"{where} is missing")
            if size == part.bytes and sha256_of(path) == part.sha256:
                return path
            raise DamagedArtifact(f"{where} does not match the digest in its manifest")
        path, wrong = folder / PurePosixPath(part.path).name, set[str]()
        while len(wrong) < COPIES_AT_ONCE:
            digest = self._copy(part, path)
            if digest == part.sha256:
                return path
            if digest in wrong:
                break
            wrong.add(digest)
            fields = {"part": where, "tries": len(wrong)}
            _log.info("the copy of %(part)s has a wrong digest; trying again", fields, extra=fields)
        raise DamagedArtifact(f"{where} does not match the digest in its manifest")

    def _copy(self, part: Part, path: Path) -> str:
        """Copy a part, of one that is too long its size and a byte more; return the sha256 of the copy."""
        digest, left = hashlib.sha256(), part.bytes + 1
        try:
            stream = self.store.open(part.path)
        except FileNotFoundError:
            raise DamagedArtifact(f"{self.uri}/{part.path} is missing") from None
        with stream, path.open("wb") as sink:
            while data := stream.read(min(COPY_BYTES, left)):
                digest.update(data)
                sink.write(data)
                left -= len(data)
        return digest.hexdigest()

    def origin(self, role: str) -> str | None:
        """Return the URI that the input of `role` had when this artifact was made, or None if it is not known.

        Inputs that a later version added are remembered by their digest, since origin.json is put only once.
        """
        added = [_origin_name(entry.digest) for entry in self.manifest.inputs if entry.role == role]
        for name, field in [*((name, "uri") for name in added), ("origin.json", role)]:
            try:
                if (where := json.loads(self.store.read(name)).get(field)) is not None:
                    return str(where)
            except (FileNotFoundError, ValueError, AttributeError):  # lost or damaged: the place is not known
                continue
        return None


def inputs_of(named: Mapping[str, Artifact]) -> tuple[ArtifactInput, ...]:
    """Return the inputs of what is made from `named` artifacts, by role."""
    return tuple(ArtifactInput(role=role, kind=one.manifest.kind, digest=one.digest) for role, one in named.items())


def _origin_name(digest: str) -> str:
    return f"origins/{digest[:PART_DIGEST_CHARS]}.json"


def remember_origin(store: Store, digest: str, uri: str) -> None:
    """Remember the place of an input that a later version of the artifact at `store` adds; the first place is kept."""
    store.put(_origin_name(digest), canonical_json({"uri": uri}))


def open_artifact(uri: str | Path | Store, kind: str | None = None) -> Artifact:
    """Open the artifact that was committed at `uri`; raise InputError where there is none of this kind."""
    store = uri if isinstance(uri, Store) else Store(uri)
    try:
        data = store.read("manifest.json")
    except FileNotFoundError:
        store.require_bucket()
        name = kind or "artifact"
        why = explain_absence(store)
        raise InputError(f"{store.uri} holds no committed {name} (no manifest.json): {why}") from None
    manifest = parse_manifest(data, store, "manifest.json")
    require_kind(store, manifest, kind)
    return Artifact(store, manifest)


def require_kind(store: Store, manifest: Manifest, kind: str | None) -> None:
    """Raise InputError where an artifact is of another kind than `kind`; None allows all."""
    if kind is not None and manifest.kind != kind:
        article = "an" if manifest.kind[0] in "aeiou" else "a"
        hint = _MAKES.get((manifest.kind, kind), "").format(uri=store.uri)
        if manifest.kind == "alias":
            hint = f"`hhnet alias --alias {store.uri}` shows what it names"
        elif not hint and manifest.kind in ("shards", "model", "codes", "index"):
            hint = f"give it with --{manifest.kind}"
        raise InputError(f"{store.uri} is {article} {manifest.kind} artifact, not {kind}{f': {hint}' if hint else ''}")


_MAKES = {
    ("codes", "index"): "`hhnet index build --codes {uri} --out INDEX` makes one",
    ("shards", "codes"): "`hhnet encode --shards {uri} --model MODEL --out CODES` makes them",
    ("shards", "model"): "`hhnet train --shards {uri} --out MODEL` makes one",
}
"""The command that makes the wanted kind of the one that was found."""


def read_identity(store: Store) -> tuple[str, str]:
    """Return kind and fingerprint that the root was begun with; raise FileNotFoundError where it was not begun."""
    try:
        found = json.loads(store.read("identity.json"))
        return str(found["kind"]), str(found["fingerprint"])
    except (ValueError, KeyError, TypeError):
        raise DamagedArtifact(f"{store.uri}/identity.json is not readable") from None


LISTS_AT_ONCE = 2
"""Lists read at a time; twice as many are in memory, with their entries."""
COPY_BYTES = 1 << 20
"""Bytes of a part that are copied at a time."""
COPIES_AT_ONCE = 4
"""Largest number of copies of a part, each with another wrong digest, before it counts as damaged."""
MAX_WRONG_NAMED = 3
"""Number of wrong facts that an error names."""
