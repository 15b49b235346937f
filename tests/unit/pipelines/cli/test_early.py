"""Mistakes are refused at once: before torch, Ray or Prefect is imported or started."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import pytest
import timm

from hhnet.nn.backbone_rules import is_hrnet, timm_names
from pipelines.config.loading import load_config
from pipelines.errors import ConfigError
from pipelines.ingest.ingest import ingest
from pipelines.train.preconditions import check_training
from tests.support.pictures import write_folder

# Each case runs in a fork of one process that has imported the command line and nothing else.
RUN_EACH = """
import json, os, runpy, sys
import pipelines.cli.main, flows.verbs

HEAVY = ("torch", "timm", "ray", "prefect")
started = []
sys.addaudithook(lambda event, told: started.append(str(told[1])) if event == "subprocess.Popen" else None)
for number, (words, env) in enumerate(json.load(sys.stdin)):
    if os.fork() == 0:
        os.environ.update(env)
        out = os.open(f"{sys.argv[1]}/{number}.err", os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        module, *sys.argv[1:] = words
        answer = os.path.dirname(os.readlink("/proc/self/fd/2"))
        code = 0
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        heavy = [name for name in HEAVY if name in sys.modules]
        with open(f"{answer}/{number}.json", "w") as file:
            json.dump({"code": code, "started": started, "heavy": heavy}, file)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    os.wait()
"""

TRAIN = "pipelines train --shards {root}/shards/train --out {root}/new"
EVALUATE = "pipelines evaluate --out {root}/new"
SEARCH = "pipelines search --index {root}/index"
INGEST = "pipelines ingest {root}/photos --out {root}/new"
RUN = "pipelines run --config {root}/run.toml"
STUDY = "pipelines study --out {root}/new"
SHARES = "--train {root}/shards/train --query {root}/shards/query --database {root}/shards/train"
DEPLOY = "flows.deploy --config {root}/run.toml"
SERVER = {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
CLUSTER = {"RAY_ADDRESS": "ray.example.org:6379"}

REFUSED: list[tuple[str, str]] = [
    (f"{TRAIN} --loss hashnett", "train.loss: unknown loss 'hashnett': did you mean hashnet?"),
    (f"{TRAIN} --backbone resnet19x", "model.backbone: unknown backbone 'resnet19x': did you mean resnet18, "),
    (f"{TRAIN} --set model.weights=timm", "name one of hrnet_w18.ms_aug_in1k, hrnet_w18.ms_in1k"),
    (f"{TRAIN} --set model.weights=/no.safetensors", "model.weights=/no.safetensors cannot be read on"),
    (f"{TRAIN} --set train.teacher=hrnet_w81", "train.teacher: unknown backbone 'hrnet_w81': did you mean"),
    (f"{TRAIN} --set data.image_size=33", "data.image_size: hrnet_w18 with stem_stride=4 needs image sides that are"),
    (f"{TRAIN} --backbone vgg16 --set data.image_size=16", "data.image_size: vgg16 needs images of at least 32 pixels"),
    (f"{TRAIN} --bits 12", "model.bits = 12: must be a multiple of 8"),
    (f"{TRAIN} --val {{root}}/nowhere", "{root}/nowhere holds no committed shards"),
    ("pipelines train --shards {root}/nowhere --out {root}/new", "{root}/nowhere holds no committed shards"),
    ("pipelines train --shards {root}/photos --out {root}/new", "these are pictures: `hhnet ingest {root}/photos"),
    ("pipelines train --out {root}/new", "nothing to train on: give --shards"),
    ("pipelines encode --shards {root}/nowhere --model {root}/m --out {root}/new", "nowhere holds no committed shards"),
    ("pipelines encode --shards {root}/shards/train --model {root}/m --out {root}/new", "m holds no committed model"),
    (f"{EVALUATE} --queries q --database d --convention hashnett", "--convention 'hashnett' is not known: choose from"),
    (f"{EVALUATE} --queries {{root}}/q --database d", "{root}/q holds no committed codes"),
    ("pipelines index build --codes {root}/q --out {root}/new --kind ivff", "index kind 'ivff' is unknown: did you"),
    ("pipelines index build --codes {root}/q --out {root}/new", "{root}/q holds no committed codes"),
    ("pipelines index build --codes q --out o --memory 1GiB", "are for the planner: add --kind auto"),
    (f"{SEARCH} --key cat/1", "{root}/index holds no committed index"),
    (f"{SEARCH} --image {{root}}/no.jpg", "{root}/no.jpg does not exist: name an image file"),
    (SEARCH, "nothing to search for: give --image"),
    ("pipelines ingest {root}/nowhere --out {root}/new", "{root}/nowhere does not exist: SOURCE is a folder"),
    (f"{INGEST} --split train=.8,query=.3", "the shares sum to 1.1, not 1"),
    (f"{INGEST} --split train:.8", "write train=.8,query=.1,database=.1, or folder, or column:NAME"),
    ("pipelines ingest --protocol cifar11 --root {root} --out {root}/new", "protocol 'cifar11' is unknown: choose one"),
    ("pipelines run --config {root}/no.toml", "configuration {root}/no.toml does not exist"),
    (f"{RUN} --set train.loss=hashnett", "train.loss: unknown loss 'hashnett'"),
    (f"{RUN} --set model.backbone=resnet19x", "model.backbone: unknown backbone 'resnet19x'"),
    (f"{RUN} --set data.image_size=33", "data.image_size: hrnet_w18 with"),
    (f"{RUN} --set model.weights=/no.safetensors", "model.weights: weights file /no.safetensors does not exist: give"),
    (f"{RUN} --set index.kind=ivff", "index kind 'ivff' is unknown: did you mean ivf?"),
    (f"{RUN} --set run.source={{root}}/nowhere", "run.source {root}/nowhere does not exist: name a folder"),
    (f"{RUN} --set run.split=train=.8,query=.3", "the shares sum to 1.1, not 1"),
    (f"{RUN} --set run.split=train=.8,test=.2", "run.query is not set: name the shards for it; the splits are test, "),
    (f"{RUN} --set run.query={{root}}/nowhere", "{root}/nowhere holds no committed shards"),
    ("pipelines run --config {root}/sourced.toml", "run.source needs run.split, such as train=.8"),
    (f"{STUDY} smal", "study 'smal' is unknown: choose one of small, "),
    (f"{STUDY} small", "the study has no data: give --train, --query and --database, or --root"),
    (f"{STUDY} small {SHARES} --set model.weights=timm", "name one of "),
    (f"{STUDY} {{root}}/grid.toml {SHARES}", "train.loss: unknown loss 'hashnett'"),
    ("pipelines demo --data {root}/nowhere --out {root}/new", "{root}/nowhere does not exist"),
    ("pipelines demo {root}/nowhere --out {root}/new", "{root}/nowhere does not exist"),
    ("pipelines demo --data {root}/photos --out {root}/new --set train.loss=hashnett", "unknown loss 'hashnett'"),
    (f"{DEPLOY} --set train.loss=hashnett", "train.loss: unknown loss 'hashnett'"),
    (f"{DEPLOY} --set run.split=train=.8,query=.3", "the shares sum to 1.1, not 1"),
    (f"{DEPLOY} --timezone Europe/Nowhere", "--timezone 'Europe/Nowhere' is not a time zone"),
    (DEPLOY, "PREFECT_API_URL is not set"),
    (f"{RUN} --set model.weights=s3://key:secret@bucket/w", "must not carry credentials in a URL: give them by files"),
]
WITHOUT_SECRETS: list[tuple[str, Mapping[str, str], int, str]] = [
    (TRAIN, CLUSTER, 2, "would be joined without a token: set RAY_AUTH_MODE=token"),
    (RUN, CLUSTER, 2, "would be joined without a token: set RAY_AUTH_MODE=token"),
    (RUN, {"PREFECT_API_URL": "http://prefect:4200/api"}, 2, "without a password: set PREFECT_API_AUTH_STRING"),
    (DEPLOY, SERVER | CLUSTER, 2, "would be joined without a token: set RAY_AUTH_MODE=token"),
    (f"{RUN} --out s3://bucket/out", {}, 3, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or store.unsigned"),
    ("pipelines train --shards s3://bucket/x --out o", {}, 3, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
]
CASES = [*((words, {}, 2, said) for words, said in REFUSED), *WITHOUT_SECRETS]


class Answer(TypedDict):
    """What a case came to."""

    code: int
    started: list[str]
    heavy: list[str]
    lines: list[str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("early")
    write_folder(folder / "photos", classes=2, per_class=5)
    ingest(str(folder / "photos"), str(folder / "shards"), load_config(), split="train=.6,query=.4")
    source = f'[run]\nout = "{folder}/new"\nsource = "{folder}/photos"\n'
    (folder / "sourced.toml").write_text(source)
    (folder / "run.toml").write_text(f'{source}split = "train=.6,query=.2,database=.2"\n')
    (folder / "grid.toml").write_text('title = "t"\n[axes]\ntrain.loss = ["hashnet", "hashnett"]\n')
    return folder


@pytest.fixture(scope="module")
def answers(root: Path) -> list[Answer]:
    cases = [(words.format(root=root).split(), env) for words, env, _, _ in CASES]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_", "AWS_"))}
    nowhere = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    env = clean | nowhere | {"HOME": str(root), "PREFECT_HOME": str(root)}
    (root / "answers").mkdir()
    command = [sys.executable, "-c", RUN_EACH, str(root / "answers")]
    subprocess.run(command, input=json.dumps(cases), text=True, env=env, check=True)
    found: list[Answer] = []
    for number in range(len(cases)):
        lines = (root / "answers" / f"{number}.err").read_text().splitlines()
        found.append(json.loads((root / "answers" / f"{number}.json").read_text()) | {"lines": lines})
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: CASES[n][0].replace("{root}/", ""))
def test_a_mistake_is_refused_before_torch_ray_or_prefect(number: int, answers: list[Answer], root: Path) -> None:
    words, _, code, said = CASES[number]
    answer = answers[number]
    (line,) = answer["lines"]
    begun = [one for one in answer["started"] if "prefect" in one or "ray" in one]
    assert (answer["code"], answer["heavy"], begun) == (code, [], [])
    assert line.startswith(f"{'flows.deploy' if words.startswith('flows') else 'hhnet'}: ")
    assert said.format(root=root) in line
    assert not (root / "new").exists()


def test_the_names_read_from_timms_source_are_those_of_timm() -> None:
    known = timm_names()
    plain = {name for name in known if "." not in name}
    assert plain == set(timm.list_models(include_tags=False))
    assert {name for name in plain if is_hrnet(name)} == set(timm.list_models(module="hrnet", include_tags=False))


def test_tags_that_the_source_does_not_spell_out_are_looked_up_in_timm() -> None:
    made_by_code = min({name for name in timm.list_pretrained() if "." in name} - timm_names())
    check_training(load_config(sets=[f"model.backbone={made_by_code}", "model.weights=timm"]))
    with pytest.raises(
        ConfigError, match=r"model\.backbone: unknown weight tag 'resnet18\.tv': known are resnet18\.a1"
    ):
        check_training(load_config(sets=["model.backbone=resnet18.tv"]))
