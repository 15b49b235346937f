"""S4: nothing that is read is run. Specimens that run a program when loaded carelessly pass through every verb that
reads foreign bytes, in all the places such bytes can lie, and leave no trace."""

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.artifacts.manifest import manifest_digest, open_artifact
from pipelines.config.settings import Config
from pipelines.errors import HHNetError
from pipelines.index.reader import open_index
from pipelines.ingest.adopt import adopt
from pipelines.ingest.ingest import ingest
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_image
from pipelines.shards.shards import open_shards
from pipelines.storage import canonical_json, sha256_of
from pipelines.verify.verify import verify
from tests.fuzz.canaries import made, mark_of
from tests.fuzz.guards import watched
from tests.support import pictures
from tests.support.codes import codes_of_shards, write_shards
from tests.support.report import report

RUNS = ("subprocess", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle")
ROOT = Path(__file__).parents[2]
IMAGE = pictures.jpeg(pictures.picture(0, 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canaries")


@pytest.fixture(scope="module")
def specimens(folder: Path) -> dict[str, bytes]:
    found = made(folder)
    assert len(found) >= 12
    return found


@pytest.fixture(autouse=True)
def nothing_runs(folder: Path, specimens: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Around every test here: no canary fires, and no program is started and no class unpickled in this process."""
    monkeypatch.setenv("GOPEN_REWRITE", specimens["rewrite"].decode())
    before = fired(folder)
    with watched() as events:
        yield
    assert fired(folder) == before
    assert [event for event in events if event.startswith(RUNS)] == []


def fired(folder: Path) -> set[str]:
    return {path.name.removeprefix("fired-") for path in folder.glob("fired-*")}


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def members_of(specimens: dict[str, bytes]) -> dict[str, bytes]:
    """A sample for each specimen: beside an image, as the image, as its class, and as its metadata."""
    members: dict[str, bytes] = {}
    for name, data in specimens.items():
        members |= {f"beside/{name}.jpg": IMAGE, f"beside/{name}.{name}": data}
        members |= {f"image/{name}.jpg": data}
        members |= {f"class/{name}.jpg": IMAGE, f"class/{name}.cls": data}
        members |= {f"facts/{name}.jpg": IMAGE, f"facts/{name}.json": data}
    return members


def test_shards_of_strangers(specimens: dict[str, bytes], tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", members_of(specimens))
    (tmp_path / ".metadata").write_bytes(specimens["metadata"])
    result = adopt(str(tmp_path), str(tmp_path), allow_degraded=True).as_json()
    assert result["found"] == 4 * len(specimens)
    decoded = Counter[str]()
    opened = open_shards(str(tmp_path))
    for sample in opened.read(opened.shards[0], metadata=True):
        try:
            decode_image(sample.image)
            decoded[sample.record.key.split("/")[0]] += 1
        except ImageReject as reject:
            decoded[reject.reason] += 1
    assert decoded["beside"] == decoded["not_an_image"] == len(specimens)
    verify(str(tmp_path))
    report("S4 adopt", canaries=len(specimens), fired=0)


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_sources_of_strangers(form: str, specimens: dict[str, bytes], tmp_path: Path) -> None:
    members = members_of(specimens)
    if form == "tar":
        write_tar(tmp_path / "source.tar", members)
    for name, data in members.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(data)
    source = tmp_path / ("source.tar" if form == "tar" else "source")
    result = ingest(str(source), str(tmp_path / "out"), Config()).as_json()
    assert result["samples"] == sum(name.endswith(".jpg") for name in members)
    verify(result["uri"])


def test_a_table_with_a_column_that_ray_would_unpickle(
    specimens: dict[str, bytes], folder: Path, tmp_path: Path
) -> None:
    import ray.data  # noqa: F401 - whose types are then known to Arrow in this process

    (tmp_path / "a.jpg").write_bytes(IMAGE)
    (tmp_path / "table.parquet").write_bytes(specimens["parquet"])
    with pytest.raises(HHNetError):
        ingest(str(tmp_path / "table.parquet"), str(tmp_path / "out"), Config())


URLS = ["pipe:{command}", "pipe://{command}", "file:pipe:{command}", "{folder}/pipe:{command}"]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "words",
    [
        ["ingest", "{url}", "--out", "{tmp}/out"],
        ["ingest", "--adopt", "{url}", "--out", "{tmp}/out"],
        ["verify", "{url}"],
        ["encode", "--shards", "{url}", "--model", "{url}", "--out", "{tmp}/out"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_command_in_the_place_of_a_uri(words: list[str], url: str, folder: Path, tmp_path: Path) -> None:
    named = url.format(command=f"touch '{mark_of(folder, 'url')}'", folder=tmp_path)
    with pytest.raises(SystemExit) as caught:
        run_here([word.format(url=named, tmp=tmp_path) for word in words])
    assert caught.value.code == 2
    assert not mark_of(folder, "url").exists()


def run_here(words: list[str]) -> None:
    """The command line in this process, so that what it starts is seen."""
    from pipelines.cli.main import build_app

    build_app()(words)


def test_a_shard_whose_name_is_a_command(folder: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "pipe:touch fired;.tar", {"a.jpg": IMAGE})
    with pytest.raises(HHNetError, match="cannot name a shard"):
        adopt(str(tmp_path), str(tmp_path))


# ------------------------------------------------------------------------------------ in the place of published parts


def forge(root: Path, name: str, data: bytes) -> None:
    """Put other bytes under a part, as someone who may write to the store could: every digest fits."""
    path = root / "manifest.json"
    fields = json.loads(path.read_bytes())
    for part in fields["parts"]:
        if Path(part["path"]).name.startswith(name):
            (root / part["path"]).write_bytes(data)
            part.update(bytes=len(data), sha256=sha256_of(data))
    fields["digest"] = manifest_digest(fields)
    path.write_bytes(canonical_json(fields))


def make_parts(root: Path) -> dict[str, Path]:
    """One artifact of each kind whose parts are parsed."""
    import numpy as np
    import safetensors.numpy

    from pipelines.artifacts.commit import ArtifactWriter
    from pipelines.config.settings import IndexSettings
    from pipelines.index.build import build_index
    from pipelines.storage import Store
    from tests.support.inline import InlinePool

    shards = write_shards(root, "shards")
    codes = codes_of_shards(root / "codes", shards)
    for kind in ("flat", "ivf"):
        settings = Config(index=IndexSettings(kind=kind, nlist=2, nprobe=2, workers=1))
        build_index([codes.uri], str(root / kind), settings, pool=InlinePool())
    weights = safetensors.numpy.save({"w": np.ones(3, np.float32)})
    for kind, files in {
        "model": {"model.safetensors": weights, "model.json": b"{}"},
        "checkpoint": {"state.safetensors": weights, "progress.json": b"{}"},
        "report": {"metrics.json": b"{}", "report.html": b"<html></html>"},
    }.items():
        writer = ArtifactWriter(Store(root / kind), kind, "f" * 64, (), {})
        writer.commit([writer.put_part(name, data, 1) for name, data in files.items()], {"tensors": 1}, {})
    return {path.name: path for path in root.iterdir() if (path / "manifest.json").exists()}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_parts(tmp_path_factory.mktemp("published"))


READERS: dict[str, Callable[[Path], object]] = {
    "shards": lambda root: [list(open_shards(str(root)).read(shard)) for shard in open_shards(str(root)).shards],
    "flat": lambda root: search(root),
    "ivf": lambda root: search(root),
}


def search(root: Path) -> None:
    import numpy as np

    with open_index(str(root)) as reader:
        reader.search(np.zeros((1, 8), np.uint8), 3)


def test_published_parts_replaced_by_specimens(specimens: dict[str, bytes], published: dict[str, Path]) -> None:
    tried = Counter[str]()
    for kind, root in published.items():
        originals = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for part in open_artifact(str(root)).manifest.parts:
            for data in specimens.values():
                forge(root, Path(part.path).name, data)
                for read in (lambda root: verify(str(root)).as_json(), READERS.get(kind, lambda root: None)):
                    try:
                        read(root)
                    except HHNetError:
                        tried["refused"] += 1
                    tried["tried"] += 1
                for path, original in originals.items():
                    path.write_bytes(original)
    report("S4 parts", canaries=len(specimens), fired=0, **tried)
    assert tried["refused"] > tried["tried"] / 3


def test_the_canaries_do_fire_when_they_are_loaded_carelessly(tmp_path: Path) -> None:
    """A test of the tests above: each specimen is live."""
    words = [sys.executable, "-m", "tests.fuzz.canaries", str(tmp_path)]
    with watched():
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert fired(tmp_path) == set(made(tmp_path)), done.stderr


def test_watching_notices_a_program_that_is_started() -> None:
    """And the watch notices one."""
    import pickle

    with watched() as events:
        pickle.loads(pickle.dumps(io.BytesIO))
        subprocess.run(["true"], check=True)
    assert {event.split(" ")[0] for event in events} >= {"pickle.find_class", "subprocess.Popen"}
