"""What manifests and receipts say of their kind: read as it was written, refused where a fact is not there."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import PairsReceipt, PartReceipt, QuantizerReceipt, Receipt
from pipelines.artifacts.manifest import Facts
from pipelines.errors import DamagedArtifact
from pipelines.storage import Store, canonical_json

PART = {"path": "parts/a.bin", "bytes": 3, "sha256": "0" * 64, "rows": 1}
TAR = {"shard": "a.tar", "shard_sha256": "1" * 64}
RECEIPTS: dict[type[Facts], list[dict[str, Any]]] = {
    Receipt: [
        {**TAR, "samples": 2, "part": PART, "rejects": None},
        {**TAR, "samples": 2, "part": PART, "more": [PART], "rejects": PART, "animated": 1},
    ],
    QuantizerReceipt: [{"part": PART}],
    PartReceipt: [
        {**TAR, "ordinal": 0, "rows": 1, "quantizer_sha256": None, "part": PART, "keys": PART},
        {
            **{**TAR, "ordinal": 0, "rows": 1, "quantizer_sha256": "2" * 64, "part": PART, "keys": PART},
            **{"compacted": 2, "left_out": "3" * 64},
        },
    ],
    PairsReceipt: [{"unit": 0, "pairs": 1, "parts": [PART]}],
}
EVERY = [(model, fields) for model, forms in RECEIPTS.items() for fields in forms]


@pytest.mark.parametrize(("model", "fields"), EVERY)
def test_what_is_read_is_written_again_byte_for_byte(model: type[Facts], fields: dict[str, Any]) -> None:
    found = model.parse(canonical_json(fields), "a receipt", "do it again")
    assert canonical_json(found) == canonical_json(fields)
    assert list(found.as_json()) == sorted(fields)


def damages(model: type[Facts], fields: dict[str, Any]) -> dict[str, bytes]:
    """Message -> bytes that give it: each fact left out and of another type, one that is unknown, and no object."""
    found = {}
    for name in fields:
        left = {key: value for key, value in fields.items() if key != name}
        if model.model_fields[name].is_required():
            found[f"{name} is missing)"] = canonical_json(left)
        found[f"{name} is wrong: "] = canonical_json({**left, name: True})
    found["novel is unknown)"] = canonical_json({**fields, "novel": 1})
    found["is wrong: Invalid JSON"] = canonical_json(fields)[:-3]
    return found


@pytest.mark.parametrize(("model", "fields"), EVERY)
def test_a_damaged_receipt_is_refused_by_its_place_and_its_facts(
    tmp_path: Path, model: type[Facts], fields: dict[str, Any]
) -> None:
    store = Store(tmp_path)
    writer = ArtifactWriter(store, "novel", "f" * 64, (), {})
    for number, (message, data) in enumerate(damages(model, fields).items()):
        store.put(f"receipts/{number}.json", data)
        with pytest.raises(DamagedArtifact) as caught:
            writer.receipts(model, {str(number)})
        assert str(caught.value).startswith(f"{store.uri}/receipts/{number}.json cannot be used ({message}")
        assert str(caught.value).endswith(": delete it to have its shard done again")
