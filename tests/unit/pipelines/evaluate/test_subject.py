"""The head of a page: what was measured, as the artifacts of real codes and models tell it."""

import re
from pathlib import Path

import pytest

from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
from pipelines.evaluate.agreement import report_agreement
from pipelines.evaluate.evaluate import evaluate
from pipelines.ingest.ingest import ingest
from tests.support.evaluations import page_of
from tests.support.inline import InlinePool
from tests.support.models import write_model
from tests.support.pictures import write_folder

CONFIG = load_config(sets=["evaluate.gallery=0", "encode.batch_size=8"])


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return codes of 16 and of 32 bits of the same images, by two models that stay in reach."""
    root = tmp_path_factory.mktemp("subject")
    write_folder(root / "photos", classes=3, per_class=4)
    ingest(str(root / "photos"), str(root / "shards"), CONFIG)
    made = []
    for bits in (16, 32):
        write_model(root / f"model-{bits}", str(root / "shards"), bits=bits, backbone="test_resnet")
        made.append(str(root / f"codes-{bits}"))
        encode(str(root / "shards"), str(root / f"model-{bits}"), made[-1], CONFIG, pool=InlinePool())
    return made[0], made[1]


def head_of(page: str) -> dict[str, str]:
    """Return the names and values in the head of a page."""
    (head,) = re.findall(r'<dl class="subject">(.*?)</dl>', page, re.S)
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", head, re.S))


def listed_epochs(page: str) -> dict[str, str]:
    """Return the remarks on the epochs in the table beside the learning curve."""
    section = page.split('<section id="learning-curve">')[1].split("</section>")[0]
    return dict(re.findall(r"<tr><td>(\d+)</td><td>[\d.]+</td><td>[\d.]+</td><td>(\w*)</td></tr>", section))


def test_a_report_says_what_it_measured_and_no_date(codes: tuple[str, str], tmp_path: Path) -> None:
    page = page_of(evaluate(codes[0], [codes[0]], str(tmp_path / "report"), CONFIG).as_json())
    head = head_of(page)
    version = head.pop("Version")
    assert version.startswith("hhnet ")
    assert head.pop("Data").startswith("12 queries in 12 database images, 3 classes: ")
    assert head.pop("Epochs").endswith(", the weights are those of epoch 1")
    assert head == {"Model": "test_resnet, 16 bits", "Loss": "csq", "Input": "32 × 32 pixels"}
    assert "Learning curve</h2>" in page and not re.search(r"\b20\d\d-\d\d-\d\d\b", page)
    assert listed_epochs(page) == {"1": "kept"} and "learning_curve.csv" not in page


def test_of_a_long_training_some_epochs_are_listed_with_the_last_and_the_one_kept(
    codes: tuple[str, str], tmp_path: Path
) -> None:
    shards = str(Path(codes[0]).parent / "shards")
    write_model(tmp_path / "model", shards, backbone="test_resnet", epochs=25)
    encode(shards, str(tmp_path / "model"), str(tmp_path / "codes"), CONFIG, pool=InlinePool())
    page = page_of(
        evaluate(*(str(tmp_path / "codes"), [str(tmp_path / "codes")]), str(tmp_path / "r"), CONFIG).as_json()
    )
    assert listed_epochs(page) == {"1": "kept"} | {str(n): "" for n in (3, 6, 9, 12, 15, 18, 21, 24, 25)}
    assert "All 25 epochs are in the model&#39;s learning_curve.csv." in page.replace("'", "&#39;")


def test_an_agreement_names_the_models_and_what_differs_between_them(codes: tuple[str, str], tmp_path: Path) -> None:
    page = page_of(report_agreement(*codes, str(tmp_path / "report"), CONFIG).as_json())
    photos = Path(codes[0]).parent / "photos"
    files = set(re.findall('title="(class_[^"]+)"', page))
    assert files and all((photos / name).is_file() for name in files)
    head = head_of(page)
    assert head["Old"].startswith("test_resnet, 16 bits, csq, ") and head["New"].startswith("test_resnet, 32 bits, csq")
    assert head["Changed"] == "model.bits 16 → 32"
