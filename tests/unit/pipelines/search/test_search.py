import gc
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.versions import open_current
from pipelines.config.settings import Config, IndexSettings, SearchSettings
from pipelines.errors import ConfigError, FingerprintMismatch, InputError
from pipelines.index.reader import IndexReader
from pipelines.index.update import remove_rows
from pipelines.report.pictures import thumbnail
from pipelines.search.search import SearchLimits, search
from pipelines.shards.shards import open_shards
from pipelines.storage import Store, scratch_folder
from tests.support.codes import Rows, codes_of_shards, random_codes, simple_rows, write_codes, write_shards
from tests.support.pictures import jpeg, picture, png

CONFIG = Config(index=IndexSettings(workers=1), search=SearchSettings(k=4))


def two_artifacts(root, bits=64):
    """Short codes make many ties; rows leave gaps."""
    first, second = simple_rows("one", 30, bits, flip=0.3), simple_rows("two", 25, bits, seed=7, flip=0.3)
    second.row = list(range(0, 50, 2))
    rows = {"one-000000.tar": first, "two-000000.tar": second}
    uris = [write_codes(root / name[:3], {name: r}, bits).uri for name, r in rows.items()]
    ids = np.concatenate([np.arange(30), (1 << 32) + np.arange(0, 50, 2)])
    return uris, np.concatenate([first.codes, second.codes]), ids, [*first.keys, *second.keys]


@pytest.mark.parametrize("bits", [8, 64])
@pytest.mark.parametrize("k", [1, 6, 100])
def test_results_are_exactly_a_stable_brute_force(tmp_path, build, bits, k):
    uris, codes, ids, keys = two_artifacts(tmp_path, bits)
    queries = random_codes(5, bits, seed=3)
    answer = search(build(*uris), CONFIG, hex_codes=[query.tobytes().hex() for query in queries], k=k).as_json()

    distances = np.unpackbits(queries[:, None] ^ codes[None], axis=2).sum(2)
    for result, row in zip(answer["results"], distances, strict=True):
        order = np.lexsort((ids, row))[:k]
        assert [entry["id"] for entry in result["neighbours"]] == ids[order].tolist()
        assert [entry["distance"] for entry in result["neighbours"]] == row[order].tolist()
        assert [entry["key"] for entry in result["neighbours"]] == [keys[place] for place in order]
        assert [entry["row"] for entry in result["neighbours"]] == (ids[order] & 0xFFFFFFFF).tolist()


def test_a_key_finds_itself_first_and_the_answer_is_plain_json(tmp_path, build):
    uris, *_ = two_artifacts(tmp_path)
    index = build(*uris)
    answer = search(index, CONFIG, keys=["two/00004"]).as_json()
    assert json.loads(json.dumps(answer)) == answer
    assert {"verb", "status", "uri", "digest"} <= set(answer) and answer["uri"] == index
    (result,) = answer["results"]
    assert (result["query"], result["by"], len(result["neighbours"])) == ("two/00004", "key", 4)
    assert result["neighbours"][0] == {
        "id": 1 << 32 | 8,
        "key": "two/00004",
        "path": "two/00004.png",
        "shard": "two-000000.tar",
        "row": 8,
        "distance": 0,
        "labels": ["dog"],
    }


def test_a_key_of_two_shards_is_searched_once_for_each(tmp_path, build):
    uris = [
        write_codes(tmp_path / name, {f"{name}-000000.tar": Rows(["same"], random_codes(1, seed=seed), [[0]])}).uri
        for seed, name in enumerate(("one", "two"))
    ]
    answer = search(build(*uris), CONFIG, keys=["same"], k=1).as_json()
    assert [result["neighbours"][0]["shard"] for result in answer["results"]] == ["one-000000.tar", "two-000000.tar"]


def test_a_sample_is_named_by_its_key_or_its_path(tmp_path, build):
    index = build(*two_artifacts(tmp_path)[0])
    by_key, by_path, both = (
        search(index, CONFIG, keys=keys).as_json()
        for keys in (["two/00004"], ["two/00004.png"], ["one/00001.png", "one/00001"])
    )
    assert by_path["results"] == by_key["results"] and by_path["results"][0]["query"] == "two/00004"
    assert len(both["results"]) == 2 and both["results"][0] == both["results"][1]
    with pytest.raises(InputError, match=r"'two/00004.jpg' is not in .*; near it are two/00004"):
        search(index, CONFIG, keys=["two/00004.jpg"])
    removed = remove_rows(index, CONFIG, ["two/00004.png", "two/00004", "one/00001.png"]).as_json()
    assert removed["removed"] == 2
    with pytest.raises(InputError, match=r"'two/00004\.png' was removed"):
        search(index, CONFIG, keys=["two/00004.png"])
    assert remove_rows(index, CONFIG, ["two/00004.png"]).status == "unchanged"


def parts_open(folder: Path) -> int:
    """Count the distinct files below a folder that this process holds open."""
    gc.collect()
    held = {Path(os.path.realpath(file)) for file in Path("/proc/self/fd").iterdir()}
    return sum(file.is_relative_to(folder) for file in held)


@pytest.mark.parametrize("kept", [0, 2, 128])
def test_answers_do_not_depend_on_how_many_parts_stay_open(tmp_path, build, kept):
    contents = {f"x-{n:06d}.tar": simple_rows(f"x/{n}", 20, seed=n) for n in range(4)}
    index = build(write_codes(tmp_path / "codes", contents).uri)
    queries = random_codes(3, seed=8)
    with scratch_folder() as folder:
        reader = IndexReader(open_current(index), folder, parts_kept=kept)
        answers = [reader.search(queries, 9) for _ in range(3)]
        held = parts_open(tmp_path / "index")
    assert all((mine == one).all() for answer in answers[1:] for mine, one in zip(answer, answers[0], strict=True))
    assert held == min(kept, 4)


def test_an_unknown_key_is_refused_with_keys_near_it(tmp_path, build):
    uris, *_ = two_artifacts(tmp_path)
    index = build(*uris)
    with pytest.raises(InputError, match=r"'two/00O04' is not in .*; near it are .*two/00004"):
        search(index, CONFIG, keys=["one/00001", "two/00O04"])
    with pytest.raises(InputError, match="near it are one/00003, two/00003"):
        search(index, CONFIG, keys=["elsewhere/00003"])


def test_a_key_that_is_not_text_is_not_there(tmp_path, build):
    index = build(*two_artifacts(tmp_path)[0])
    with pytest.raises(InputError, match=r"'caf\\udce9/1' is not in"):
        search(index, CONFIG, keys=["one/00001", "caf\udce9/1"])
    with pytest.raises(InputError, match=r"'caf\\udce9/1' is not in"):
        remove_rows(index, CONFIG, ["one/00001", "caf\udce9/1"])
    assert remove_rows(index, CONFIG, ["one/00001", "caf\udce9/1"], ignore_missing=True).removed == 1


def test_more_neighbours_than_an_answer_holds_are_refused_at_once(tmp_path, build):
    uris, *_, keys = two_artifacts(tmp_path)
    index = build(*uris)
    limits = SearchLimits(answer=3 * len(keys))
    assert len(search(index, CONFIG, codes=uris, k=3, limits=limits).results) == len(keys)
    with pytest.raises(InputError, match=f"{len(keys) + 1} queries with 3 neighbours each are too many for one answer"):
        search(index, CONFIG, codes=uris, keys=keys[:1], k=3, limits=limits)


@pytest.mark.parametrize("batch", [7, 4096])
def test_all_rows_of_a_codes_artifact_are_queries(tmp_path, build, batch):
    uris, _, ids, keys = two_artifacts(tmp_path)
    answer = search(build(*uris), CONFIG, codes=uris, k=1, limits=SearchLimits(batch=batch)).as_json()
    assert [result["query"] for result in answer["results"]] == keys
    assert [result["neighbours"][0]["id"] for result in answer["results"]] == ids.tolist()


def test_codes_of_other_bits_or_of_another_model_are_refused_naming_both(tmp_path, build):
    index = build(write_codes(tmp_path / "codes", {"x-000000.tar": simple_rows("x", 9)}).uri)
    short = write_codes(tmp_path / "short", {"x-000000.tar": simple_rows("x", 9, 32)}, 32).uri
    alien = write_codes(tmp_path / "alien", {"x-000000.tar": simple_rows("x", 9)}, model="d" * 64).uri
    with pytest.raises(FingerprintMismatch, match=r"short holds codes of 32 bits, .*index of 64 bits"):
        search(index, CONFIG, codes=[short])
    with pytest.raises(FingerprintMismatch, match=r"alien was made by model dddddddddddd, .*index by aaaaaaaaaaaa"):
        search(index, CONFIG, codes=[alien])
    with pytest.raises(FingerprintMismatch, match="--code ff00 has 16 bits"):
        search(index, CONFIG, hex_codes=["ff00"])
    with pytest.raises(InputError, match="not hexadecimal"):
        search(index, CONFIG, hex_codes=["xyz"])
    with pytest.raises(InputError, match="nothing to search for"):
        search(index, CONFIG)
    for k in (0, -3):
        with pytest.raises(InputError, match=f"k = {k}: ask for at least one neighbour"):
            search(index, CONFIG, hex_codes=["00" * 8], k=k)


# ---------------------------------------------------------------------------------------------------------- images


def test_an_image_is_encoded_by_the_model_that_made_the_codes(tmp_path, with_model, caplog):
    index, model = with_model
    (tmp_path / "query.jpg").write_bytes(jpeg(picture(1, 77)))
    (result,) = search(index, CONFIG, images=[str(tmp_path / "query.jpg")]).results
    assert (result["query"], result["by"]) == (str(tmp_path / "query.jpg"), "image")
    assert [entry["labels"] for entry in result["neighbours"]] == [["dog"]] * 4
    assert f"search: loading the model {model.uri}" in caplog.messages


def test_another_model_is_refused_naming_both(tmp_path, with_model):
    index, model = with_model
    (tmp_path / "query.jpg").write_bytes(jpeg(picture(1, 77)))
    other = ArtifactWriter(Store(tmp_path / "other"), "model", "f" * 64, (), {}).commit([], {}, {})
    with pytest.raises(
        FingerprintMismatch, match=f"from model {model.digest[:12]}, but .*other is {other.digest[:12]}"
    ):
        search(index, CONFIG, images=[str(tmp_path / "query.jpg")], model=other.uri)


def test_an_image_that_cannot_be_used_is_named_with_the_reason(tmp_path, with_model):
    index, _ = with_model
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "cut.jpg").write_bytes(jpeg(picture(1, 77, size=128))[:900])
    for name, reason in (("text.jpg", "not_an_image"), ("cut.jpg", "truncated"), ("absent.jpg", "does not exist")):
        with pytest.raises(InputError, match=f"{name} .*{reason}"):
            search(index, CONFIG, images=[str(tmp_path / name)])
    with pytest.raises(InputError, match=r"none of the 2 images can be used, the first is .*cut\.jpg: truncated"):
        search(index, CONFIG, images=[str(tmp_path)])


# ------------------------------------------------------------------------------------------------------------ page


def pictures_in(page):
    return re.findall(r'<img[^>]* src="(data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=]+)"', page)


def test_the_page_shows_the_query_and_its_neighbours(tmp_path, build):
    shards = write_shards(tmp_path, "shard")
    index = build(codes_of_shards(tmp_path / "codes", shards).uri)
    page_file = tmp_path / "found.html"
    page_file.write_text("an older page")
    answer = search(index, CONFIG, keys=["class_01/0001"], html=str(page_file)).as_json()
    page = page_file.read_text()
    assert answer["html"] == str(page_file)
    assert len(pictures_in(page)) == 5 and "no picture" not in page
    assert "class_01/0001" in page and "distance 0" in page and "http" not in page.replace("http-equiv", "")
    head = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert head == {"Index": f"{index} (flat, 24 codes)", "Version": "1", "Bits": "64", "k": "4"}
    # Key and path are shown by their last component; the whole stands in a tooltip.
    assert 'title="class_01/0001"' in page and '<span class="soft">0001</span>' in page
    for found in answer["results"][0]["neighbours"]:
        assert f'title="{found["path"]}"' in page and f'<span class="soft">{Path(found["path"]).name}</span>' in page
    shares = [bool({"class_01"} & set(found["labels"])) for found in answer["results"][0]["neighbours"]]
    marks = re.findall(r'<b class="mark" aria-hidden="true">(.)</b>', page)
    assert marks == ["✓" if right else "✗" for right in shares]


def test_without_shards_the_page_says_so(tmp_path, build):
    shards = write_shards(tmp_path, "shard")
    index = build(codes_of_shards(tmp_path / "codes", shards).uri)
    (tmp_path / "shard").rename(tmp_path / "moved")
    search(index, CONFIG, keys=["class_01/0001"], html=str(tmp_path / "found.html"))
    page = (tmp_path / "found.html").read_text()
    assert not pictures_in(page) and "holds no committed shards" in page and page.count("no picture<") == 5

    moved = str(tmp_path / "moved")
    search(index, CONFIG, keys=["class_01/0001"], shards=[moved], html=str(tmp_path / "found.html"))
    assert len(pictures_in((tmp_path / "found.html").read_text())) == 5


def thumbnails_of(uri):
    """Return the thumbnails of all samples of shards."""
    shards = open_shards(uri)
    return {thumbnail(sample.image) for shard in shards.shards for sample in shards.read(shard)}


def test_the_page_shows_queries_from_codes_through_their_own_shards(tmp_path, build):
    database, queries = write_shards(tmp_path, "database"), write_shards(tmp_path, "query", seed=3)
    index = build(codes_of_shards(tmp_path / "codes-database", database).uri)
    asked = codes_of_shards(tmp_path / "codes-query", queries, seed=3).uri
    page_file = tmp_path / "found.html"
    search(index, CONFIG, codes=[asked], k=2, html=str(page_file))
    page = page_file.read_text()
    assert len(pictures_in(page)) == 3 * 24 and "no picture" not in page
    assert page.count('<b class="mark"') == 2 * 24  # the labels of the queries are known
    assert thumbnails_of(queries) <= set(pictures_in(page)) <= thumbnails_of(queries) | thumbnails_of(database)

    # Given shards add to what is known, and what is not needed is not missed.
    (tmp_path / "query").rename(tmp_path / "moved")
    search(index, CONFIG, codes=[asked], k=2, html=str(page_file))
    page = page_file.read_text()
    assert len(pictures_in(page)) == 2 * 24 and "query holds no committed shards" in page
    search(index, CONFIG, codes=[asked], k=2, shards=[str(tmp_path / "moved")], html=str(page_file))
    page = page_file.read_text()
    assert len(pictures_in(page)) == 3 * 24 and "No pictures" not in page and "no picture" not in page


def test_shards_of_other_images_are_refused(tmp_path, build):
    index = build(codes_of_shards(tmp_path / "codes", write_shards(tmp_path, "shard")).uri)
    other = write_shards(tmp_path, "other", seed=3)
    with pytest.raises(FingerprintMismatch, match="none of these shards is in"):
        search(index, CONFIG, keys=["class_01/0001"], shards=[other], html=str(tmp_path / "found.html"))


def test_names_from_data_are_escaped_in_the_page(tmp_path, build):
    evil = '<script>alert("x")</script>'
    rows = Rows([evil, "b"], random_codes(2), [[0], [0]])
    index = build(write_codes(tmp_path / "codes", {"x-000000.tar": rows}, classes=("<img src=x onerror=y>",)).uri)
    search(index, CONFIG, keys=[evil], html=str(tmp_path / "found.html"))
    page = (tmp_path / "found.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;" in page


def test_a_query_without_labels_has_neither_marks_nor_their_legend(tmp_path, with_model):
    index, _ = with_model
    (tmp_path / "photo.png").write_bytes(png(picture(1, 0)))
    search(index, CONFIG, images=[str(tmp_path / "photo.png")], html=str(tmp_path / "found.html"))
    page = (tmp_path / "found.html").read_text()
    assert page.count('class="tile"') == 1 + 4 and "solid blue frame" not in page and 'class="mark"' not in page
    search(index, CONFIG, keys=["x/00001"], html=str(tmp_path / "found.html"))
    page = (tmp_path / "found.html").read_text()
    assert "solid blue frame" in page and page.count('class="mark"') == 4


def test_neighbours_that_are_all_equally_near_are_said_to_be(tmp_path, build):
    """Beside them the query's own picture may be missing, and the reader wants to know why."""
    rows = simple_rows("one", 9)
    rows.codes[:] = rows.codes[0]
    answer = search(
        build(write_codes(tmp_path / "codes", {"one-000000.tar": rows}).uri),
        CONFIG,
        keys=[rows.keys[8]],
        html=str(tmp_path / "found.html"),
    )
    words = "all equally near, so in the order of ids; others may be as near"
    assert words in answer.as_text()
    assert f"query by key; {words}" in (tmp_path / "found.html").read_text()
    assert rows.keys[8] not in [found["key"] for found in answer.results[0]["neighbours"]]


def test_a_gpu_that_is_not_there(tmp_path, build, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    index = build(two_artifacts(tmp_path)[0][0])
    for workers, problem in ((None, "torch sees no GPU here"), (2, "search.workers and search.device = cuda exclude")):
        config = Config(search=SearchSettings(device="cuda", workers=workers))
        with pytest.raises(ConfigError, match=problem):
            search(index, config, hex_codes=["00" * 8])
