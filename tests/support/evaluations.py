"""Codes to evaluate, and what their report says."""

import json
from pathlib import Path

from pipelines.config.settings import Config, EvaluateSettings
from tests.support.codes import (
    simple_rows,
    write_codes,
)

PLAIN = Config(evaluate=EvaluateSettings(gallery=3))


def config(**settings):
    return Config(evaluate=EvaluateSettings(gallery=0, **settings))


def sets(root, bits=64, flip=0.3, queries=30, database=90):
    """Queries in one artifact, the database in two."""
    q = write_codes(root / "q", {"q-000000.tar": simple_rows("q", queries, bits, flip=flip)}, bits).uri
    half = database // 2
    first = write_codes(root / "d1", {"d-000000.tar": simple_rows("d1", half, bits, seed=1, flip=flip)}, bits).uri
    second = {"d-000000.tar": simple_rows("d2", half, bits, seed=2, flip=flip)}
    return q, [first, write_codes(root / "d2", second, bits).uri]


def metrics_of(result):
    return json.loads(Path(result["metrics"]).read_text())


def page_of(result):
    return Path(result["report"]).read_text()


def range_keys(count):
    return [f"k{number}" for number in range(count)]


def labels_of(count):
    return [[number % 3] for number in range(count)]
