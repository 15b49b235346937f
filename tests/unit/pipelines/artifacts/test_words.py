"""Figures and tables as people read them: units, separators, numbers on the right, never a Python repr."""

from pathlib import Path

import pytest

from pipelines.artifacts.words import format_float, format_seconds, format_table, format_value, short_place


@pytest.mark.parametrize(
    ("value", "name", "words"),
    [
        (60000, "samples", "60,000"),
        (0.335212, "map", "0.3352"),
        (0.5, "val_map", "0.5000"),
        (1087.4, "images_per_second", "1,087"),
        (2048, "bytes_read", "2.0 KiB"),
        ({"bytes_per_code": 13.259}, "card", "bytes per code 13.26"),
        (200.4, "seconds", "3 min 20 s"),
        (True, "dry_run", "yes"),
        (None, "", "-"),
        ({"read": 0.25, "forward": 0.75}, "shares", "read 25%, forward 75%"),
        ({"train": {"uri": "out/train", "samples": 7000}}, "", "train (uri out/train, samples 7,000)"),
        ([{"a": 1}, [2, 3], "x"], "", "(a 1), (2, 3), x"),
        ("two\nlines", "", "two\\nlines"),
    ],
)
def test_a_value_is_plain_words(value: object, name: str, words: str) -> None:
    assert format_value(value, name) == words


def test_numbers_keep_what_matters() -> None:
    assert [format_float(one) for one in (0.99997, 1.0, 1234567.8, 3e-5, float("nan"))] == [
        *("0.99997", "1", "1,234,568", "3e-05", "nan")
    ]
    assert [format_seconds(one) for one in (0.025, 4.62, 13.98, 7500)] == ["0.025 s", "4.6 s", "14 s", "2 h 5 min"]


def test_a_table_has_text_left_numbers_right_and_no_empty_columns() -> None:
    rows = [
        {"stage": "train model", "codes": None, "samples": 7000, "note": "", "digest": "ab" * 32},
        {"stage": "encode", "codes": 12, "samples": 30, "note": "", "digest": None},
    ]
    assert format_table(rows) == [
        "  stage        codes  samples  digest",
        "  train model      -    7,000  abababababab",
        "  encode          12       30  -",
    ]


def test_a_table_says_how_many_rows_it_leaves_out() -> None:
    rows = [{"n": number} for number in range(10_000)]
    lines = format_table(rows, most=10)
    assert len(lines) == 12 and lines[-1] == "  and 9,990 more: --json has all"


def test_a_place_below_this_folder_is_shown_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_place(f"{tmp_path}/out/model") == "out/model"
    assert short_place("/elsewhere/model") == "/elsewhere/model"
    assert short_place("s3://bucket/model") == "s3://bucket/model"
