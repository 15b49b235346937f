"""What manifests and receipts say of their kind: read as it was written, refused where a fact is not there."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import (
    AgreementMeta,
    AliasMeta,
    CheckpointMeta,
    CodesMeta,
    DuplicatesMeta,
    IndexMeta,
    ModelCard,
    ModelMeta,
    PairsReceipt,
    PartReceipt,
    QuantizerReceipt,
    Receipt,
    ReportMeta,
    ShardsMeta,
    StudyMeta,
)
from pipelines.artifacts.manifest import Facts, open_artifact
from pipelines.artifacts.tables import REAL_CODES
from pipelines.config.settings import Config
from pipelines.errors import DamagedArtifact
from pipelines.storage import Store, canonical_json, sha256_of

PART = {"path": "parts/a.bin", "bytes": 3, "sha256": "0" * 64, "rows": 1}
TAR = {"shard": "a.tar", "shard_sha256": "1" * 64}
RECEIPTS: dict[type[Facts], list[dict[str, Any]]] = {
    Receipt: [
        {**TAR, "samples": 2, "part": PART, "rejects": None},
        {**TAR, "samples": 2, "part": PART, "more": [PART], "rejects": PART, "animated": 1},
    ],
    QuantizerReceipt: [{"part": PART}],
    PartReceipt: [
        {"number": 0, "rows": 1, "quantizer_sha256": None, "part": PART, "keys": PART},
        {"number": 1, "rows": 1, "quantizer_sha256": "2" * 64, "part": PART, "keys": PART},
    ],
    PairsReceipt: [{"unit": 0, "pairs": 1, "parts": [PART]}],
}
METRICS = {"epoch": 1, "map": 0.5, "skipped": 0, "steps": 4}
SPLIT = {"name": "drawn", "digest": "4" * 64, "part": "query", "database": ["database"]}
PROOF = {"samples": 1, "keys": "5" * 64, "images": "6" * 64}
PROTOCOL = {
    **{"name": "drawn", "version": 1, "digest": "4" * 64, "database": ["database"], "leaks": {}},
    **{"parts": {"query": PROOF}, "files": {"list.txt": "7" * 64}},
}
CODED = {"bits": 16, "classes": ["cat"]}
CODES = {**CODED, "carried": {}, "settings": {"encode.carry": ["sku"]}}
CARD = {"count": 3, "bytes_per_code": 2.0}
INDEX = {**CODED, "kind": "flat", "parameters": {"nlist": 2}, "part_codes": 9, "quantizer_sha256": None, "card": CARD}
GATED = {**CARD, "recall": 1.0, "recall_at": 10, "self_recall": 1.0, "recall_within": 0.5, "radius": 2}
REPORT = {"map": 0.5, "chance": 0.1, "convention": "all", "precision_at": {"1": 0.5}, "bits": 16}
METAS: dict[type[Facts], list[dict[str, Any]]] = {
    ShardsMeta: [
        {"classes": ["cat"], "source": "0" * 64, "split": None},
        {
            **{"classes": [], "source": "", "split": {"by": "protocol", "spec": "drawn@1", "part": "query"}},
            **{"protocol": PROTOCOL, "columns": {"sku": "int64"}, "adopted": True},
            **{"version": 2, "grown_from": "8" * 64},
        },
    ],
    ModelMeta: [
        {**CODED, "metrics": METRICS},
        {
            **{**CODED, "metrics": METRICS, "protocol": SPLIT},
            "rotation": {"bits": 16, "error": 0.5, "images": 3, "map": 0.5, "map_before": 0.25, "rotated": "pca"},
        },
    ],
    CheckpointMeta: [{"step": 3}],
    CodesMeta: [CODES, {**CODES, "real_codes": REAL_CODES, "animated": 1, "protocol": SPLIT, "trained_on": SPLIT}],
    IndexMeta: [
        INDEX,
        {**INDEX, "real_codes": REAL_CODES, "version": 2, "card": {**GATED, "trained_on": 3, "note": "grown"}},
    ],
    AliasMeta: [{"version": 1, "index": "../index", "fingerprint": "9" * 64, "bits": 16, "model": "a" * 64}],
    ReportMeta: [REPORT, {**REPORT, "reranked": {"first": 9, "map": 0.6}, "protocol": "drawn", "split": "4" * 64}],
    AgreementMeta: [{"overlap": 0.5, "chance": 0.1, "k": 9, "correlation": None, "bits_old": 16, "bits_new": 8}],
    DuplicatesMeta: [{"radius": 2, "bits": 16}, {"radius": 0, "bits": 8, "same_code": True}],
    StudyMeta: [{"title": "Bits", "axes": ["model.bits"]}],
}


NETWORK = {
    **{"format": 1, "backbone": "resnet18", "bits": 16, "head": "linear", "stem_stride": 4},
    "preprocess": {"size": 32, "resize": 32, "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1], "decode": "exact"},
}
TRAINED = {
    **{"classes": ["cat"], "precision": "fp32", "loss": "csq", "metrics": METRICS},
    "history": [{"epoch": 1, "step": 2, "loss": 0.1}, {"epoch": 2, "step": 4, "loss": 0.1, "map": 0.5}],
    "settings": {"model.bits": 16, "model.branches": None, "train.lr": 0.1},
}
CARDS: dict[type[Facts], list[dict[str, Any]]] = {
    ModelCard: [{**NETWORK, **TRAINED}, {**NETWORK, **TRAINED, "branches": [1, 2], "class_count": 3}],
}


def each(table: dict[type[Facts], list[dict[str, Any]]]) -> list[Any]:
    return [
        pytest.param(model, fields, id=f"{model.__name__}-{number}")
        for model, forms in table.items()
        for number, fields in enumerate(forms)
    ]


@pytest.mark.parametrize(("model", "fields"), each(RECEIPTS | METAS | CARDS))
def test_what_is_read_is_written_again_byte_for_byte(model: type[Facts], fields: dict[str, Any]) -> None:
    found = model.parse(canonical_json(fields), "a receipt", "do it again")
    assert canonical_json(found) == canonical_json(fields)
    assert found.as_json() == fields


def damages(model: type[Facts], fields: dict[str, Any]) -> dict[str, bytes]:
    """Message -> bytes that give it: each fact left out and of another type, one that is unknown, and no object."""
    found = {}
    for name in fields:
        odd = 7 if isinstance(fields[name], bool) else True
        left = {key: value for key, value in fields.items() if key != name}
        if model.model_fields[name].is_required():
            found[f"{name} is missing)"] = canonical_json(left)
        found[f"{name} is wrong: "] = canonical_json({**left, name: odd})
    found["novel is unknown)"] = canonical_json({**fields, "novel": 1})
    return found


@pytest.mark.parametrize(("model", "fields"), each(RECEIPTS))
def test_a_damaged_receipt_is_refused_by_its_place_and_its_facts(
    tmp_path: Path, model: type[Facts], fields: dict[str, Any]
) -> None:
    store = Store(tmp_path)
    writer = ArtifactWriter(store, "novel", "f" * 64, (), {})
    broken = {"is wrong: Invalid JSON": canonical_json(fields)[:-3]}
    for number, (message, data) in enumerate((damages(model, fields) | broken).items()):
        store.put(f"receipts/{number}.json", data)
        with pytest.raises(DamagedArtifact) as caught:
            writer.receipts(model, {str(number)})
        assert str(caught.value).startswith(f"{store.uri}/receipts/{number}.json cannot be used ({message}")
        assert str(caught.value).endswith(": delete it to have its shard done again")


@pytest.mark.parametrize(("model", "fields"), each(METAS))
def test_a_manifest_with_damaged_facts_is_refused_by_its_place_and_its_facts(
    tmp_path: Path, model: type[Facts], fields: dict[str, Any]
) -> None:
    for message, data in damages(model, fields).items():
        store = Store(tmp_path / sha256_of(data)[:12])
        ArtifactWriter(store, "novel", "f" * 64, (), {}).commit([], {}, json.loads(data))
        with pytest.raises(DamagedArtifact) as caught:
            open_artifact(store).facts(model)
        assert str(caught.value).startswith(f"{store.uri}: the novel manifest cannot be used ({message}")
        assert str(caught.value).endswith(": make it again with this hhnet")


@pytest.mark.parametrize(("model", "fields"), each(CARDS))
def test_a_damaged_model_card_is_refused_by_its_place_and_its_facts(
    tmp_path: Path, model: type[Facts], fields: dict[str, Any]
) -> None:
    broken = {
        "is wrong: Invalid JSON": b'{"format": 1',
        "is wrong: Input should be an object": b"[]",
        "settings is wrong: unknown setting train.speed": canonical_json({**fields, "settings": {"train.speed": 1}}),
        "settings is wrong: model.bits = 7": canonical_json({**fields, "settings": {"model.bits": 7}}),
        "history.0.loss is missing": canonical_json({**fields, "history": [{"epoch": 1, "step": 2}]}),
    }
    for message, data in (damages(model, fields) | broken).items():
        writer = ArtifactWriter(Store(tmp_path / sha256_of(data)[:12]), "model", "f" * 64, (), {})
        found = writer.commit([writer.put_part("model.json", data, 1)], {}, {})
        with pytest.raises(DamagedArtifact) as caught:
            ModelCard.of(found)
        assert str(caught.value).startswith(f"{found.uri}: model.json cannot be used ({message}")
        assert str(caught.value).endswith(": train the model again to another --out")


def test_settings_are_read_by_their_types() -> None:
    codes = CodesMeta.parse(canonical_json(CODES), "codes", "encode again")
    assert (codes.config.encode.carry, codes.config.encode.real_codes) == (("sku",), False)
    card = ModelCard.parse(canonical_json({**NETWORK, **TRAINED}), "model.json", "train again")
    assert (card.config.model.bits, card.config.train.lr, card.config.train.epochs) == (16, 0.1, Config().train.epochs)
