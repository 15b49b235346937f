"""A prefix of tars that grows: what is made of it grows with it, and nothing that was made is made again."""

import shlex
from pathlib import Path

import pytest

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.manifest import open_artifact
from pipelines.artifacts.versions import open_current, read_all_manifests
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.encode.codes import open_codes
from pipelines.encode.encode import encode
from pipelines.encode.retry_rejects import retry_rejects
from pipelines.errors import FingerprintMismatch
from pipelines.index.build import build_index
from pipelines.index.diff import plan_changes
from pipelines.index.update import add_codes
from pipelines.ingest.adopt import adopt
from pipelines.shards.shards import write_tar
from pipelines.storage import Store
from pipelines.train.train import _plan_or_resume, plan_training
from pipelines.verify.verify import verify
from tests.support import pictures
from tests.support.inline import InlinePool
from tests.support.models import write_model

CONFIG = load_config(sets=["data.image_size=32", "encode.batch_size=4", "index.workers=1"])


def write_night(folder: Path, night: int, classes: int = 2) -> None:
    """A tar of five samples."""
    folder.mkdir(exist_ok=True)
    samples = [pictures.jpeg(pictures.picture(number % 3, 10 * night + number)) for number in range(5)]
    write_tar(
        folder / f"night-{night}.tar",
        (
            {"__key__": f"{night}-{number}", "jpg": image, "cls": b"%d" % (number % classes)}
            for number, image in enumerate(samples)
        ),
    )


@pytest.fixture
def pool() -> InlinePool:
    return InlinePool()


@pytest.fixture
def wds(tmp_path: Path) -> Path:
    for night in range(2):
        write_night(tmp_path / "wds", night)
    adopt(str(tmp_path / "wds"), str(tmp_path / "wds"))
    write_model(tmp_path / "model", str(tmp_path / "wds"))
    return tmp_path / "wds"


def made_of(wds: Path) -> tuple[str, str, str, str]:
    return str(wds), str(wds.parent / "model"), str(wds.parent / "codes"), str(wds.parent / "index")


@pytest.mark.parametrize("classes", [2, 3])
def test_codes_and_index_take_in_what_is_new(classes: int, wds: Path, pool: InlinePool) -> None:
    shards, model, codes, index = made_of(wds)
    first = encode(shards, model, codes, CONFIG, pool=pool).as_json()
    build_index([codes], index, CONFIG, pool=pool)
    assert plan_changes([shards], [codes], index).status == "unchanged"
    write_night(wds, 2, classes)
    adopt(shards, shards)
    pool.done.clear()

    before = plan_changes([shards], [codes], index).as_json()
    assert [(one["change"], one["shard"]) for one in before["changes"]] == [("encode", "night-2.tar")]
    assert [shlex.split(line)[1:] for line in before["commands"]] == [
        ["encode", "--shards", shards, "--model", model, "--out", codes, "--set", "encode.batch_size=4"],
        ["index", "add", "--index", index, "--codes", codes],
    ]
    second = encode(shards, model, codes, CONFIG, pool=pool).as_json()
    assert [task.shard for task in pool.done] == ["night-2.tar"]
    assert (second["status"], second["codes"], first["codes"]) == ("done", 15, 10)
    assert encode(shards, model, codes, CONFIG, pool=pool).status == "unchanged"
    assert {part.path for part in open_artifact(codes).manifest.parts} < {
        part.path for part in open_current(codes).manifest.parts
    }
    assert open_codes(codes).classes == tuple("012"[:classes])
    assert [(one["change"], one["shard"]) for one in plan_changes([shards], [codes], index).changes] == [
        ("add", "night-2.tar")
    ]
    assert add_codes(index, [codes], CONFIG, pool=pool).added == 5
    assert plan_changes([shards], [codes], index).status == "unchanged"
    for uri in (shards, codes, index):
        verify(uri)


def test_a_retry_and_a_lost_part_of_grown_codes(wds: Path, pool: InlinePool) -> None:
    shards, model, codes, _ = made_of(wds)
    tar = wds / "night-0.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2])
    encode(shards, model, codes, CONFIG, allow_degraded=True, pool=pool)
    tar.write_bytes(data)
    write_night(wds, 2)
    adopt(shards, shards)
    grown = encode(shards, model, codes, CONFIG, allow_degraded=True, pool=pool).as_json()
    assert 0 < grown["rejects"] < 5 and grown["samples"] == 15
    mended = retry_rejects(codes, CONFIG, pool=pool).as_json()
    assert (mended["codes"], mended["version"]) == (15, 3)
    part = next(path for path in Path(codes, "parts").glob("night-2-*"))
    lost = part.read_bytes()
    part.unlink()
    assert encode(shards, model, codes, CONFIG, pool=pool).digest == mended["digest"]
    assert part.read_bytes() == lost and verify(codes).orphans == []


def test_codes_of_what_was_there_before_are_not_mixed_up(wds: Path, pool: InlinePool, tmp_path: Path) -> None:
    shards, model, codes, _ = made_of(wds)
    encode(shards, model, codes, CONFIG, pool=pool)
    other = load_config(sets=["data.image_size=32", "encode.batch_size=5"])
    write_night(wds, 2)
    adopt(shards, shards)
    with pytest.raises(FingerprintMismatch):
        encode(shards, model, codes, other, pool=pool)
    anew = encode(shards, model, str(tmp_path / "anew"), CONFIG, pool=pool).as_json()
    assert anew["codes"] == 15 and list_versions(Store(anew["uri"])) == []
    encode(shards, model, codes, CONFIG, pool=pool)
    both = [{part.path for part in open_current(uri).manifest.parts} for uri in (codes, anew["uri"])]
    assert both[0] == both[1], "as if all of it had been encoded at once"


def test_a_training_goes_on_with_the_shards_it_was_begun_with(
    wds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config()
    begun = plan_training(open_current(str(wds), "shards"), None, str(tmp_path / "learnt"), config)
    begun.writer()
    write_night(wds, 2)
    adopt(str(wds), str(wds))
    job = _plan_or_resume(str(wds), None, str(tmp_path / "learnt"), config)
    assert job.fingerprint == begun.fingerprint and job.open_sets()[0].samples == 10
    assert "an earlier version of its shards" in capsys.readouterr().err
    assert _plan_or_resume(str(wds), None, str(tmp_path / "new"), config).open_sets()[0].samples == 15
    assert len(read_all_manifests(Store(str(wds)))) == 2


def test_animations_of_old_and_new_tars_are_counted(wds: Path, tmp_path: Path, pool: InlinePool) -> None:
    def write_moving(night: int, count: int) -> None:
        samples = ({"__key__": f"{night}-{n}", "gif": pictures.animated_gif(), "cls": b"0"} for n in range(count))
        write_tar(wds / f"night-{night}.tar", samples)

    codes = str(tmp_path / "moving")
    for night, count, expected in ((7, 2, 2), (8, 3, 5)):
        write_moving(night, count)
        adopt(str(wds), str(wds))
        assert encode(str(wds), str(tmp_path / "model"), codes, CONFIG, pool=pool).animated == expected
