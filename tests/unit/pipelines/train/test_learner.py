"""The optimiser step: several workers do what one does, and a restored state goes on as if nothing had happened."""

import socket
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import hhnet.nn.losses
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.errors import ConfigError, DamagedArtifact, WorkFailed
from pipelines.train.batches import preprocess_of
from pipelines.train.learner import Batch, Learner
from pipelines.train.train import check_network
from tests.support.plugins import plugged_in

CLASSES = 3
STEPS = 4


def configure(*sets: str) -> Config:
    """A network without batch statistics, so that splitting a batch over workers must not change the step."""
    base = ("model.backbone=test_convnext", "model.bits=16", "model.head=ln", "data.image_size=32", "train.lr=0.01")
    return load_config(sets=[*base, *sets])


def global_batch(step: int, size: int = 7, side: int = 32, views: int = 1) -> Batch:
    random = np.random.default_rng(step)
    squares = random.integers(0, 256, (size * views, side, side, 3), dtype=np.uint8)
    labels = np.eye(CLASSES, dtype=np.bool_)[random.integers(0, CLASSES, size)].repeat(views, 0)
    return Batch(squares, labels, [f"{step}/{place}" for place in range(size) for _ in range(views)])


def part(batch: Batch, rank: int, views: int) -> Batch:
    """Three samples for the first of two workers, the rest for the second."""
    rows = slice(0, 3 * views) if rank == 0 else slice(3 * views, None)
    return Batch(batch.squares[rows], batch.labels[rows], batch.keys[rows])


def make(config: Config) -> Learner:
    return Learner(config, CLASSES, STEPS, preprocess_of(config))


LOSSES = ("hyp2", "dpsh", "dhd")
"""HyP2 learns proxies of its own; DPSH compares pairs across the two workers; DHD has two views of each sample."""


def taught(loss: str, folder: Path) -> list[str]:
    """The settings of a teacher, beside one of the losses."""
    weights = f"train.teacher_weights={folder}/teacher.safetensors"
    return ["train.teacher=test_resnet", weights] if loss == "dpsh" else []


def run_worker(rank: int, port: int, out: str) -> None:
    """The first of the two takes its three images at once, the second its four in two parts."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for loss in LOSSES:
        parts = f"train.accumulate={2 if loss == 'dpsh' else 1}"
        learner = make(configure(f"train.loss={loss}", parts, *taught(loss, Path(out))))
        views = learner.loss.views
        losses = [learner.step(part(global_batch(step, views=views), rank, views)).value() for step in range(STEPS)]
        state = {**learner.state(), "losses": torch.tensor(losses)}
        safetensors.torch.save_file(state, f"{out}/{loss}-{rank}")
    idle = make(configure("train.loss=hyp2"))
    idle.loss.register_parameter("idle", torch.nn.Parameter(torch.ones(1)))
    idle.step(part(global_batch(0), rank, 1))
    safetensors.torch.save_file({"idle": idle.loss.idle.detach()}, f"{out}/idle-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("workers")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.manual_seed(1)  # the rounding of steps that divide by tiny moments depends on what is learnt
    teacher = timm.create_model("test_resnet", pretrained=False)
    safetensors.torch.save_file(teacher.state_dict(), out / "teacher.safetensors")
    mp.spawn(run_worker, (port, str(out)), nprocs=2)
    return out


@pytest.mark.parametrize("loss", LOSSES)
def test_two_workers_take_the_steps_of_one(loss: str, two_workers: Path) -> None:
    alone = make(configure(f"train.loss={loss}", *taught(loss, two_workers)))
    losses = [alone.step(global_batch(step, views=alone.loss.views)).value() for step in range(STEPS)]
    states = [safetensors.torch.load_file(two_workers / f"{loss}-{rank}") for rank in range(2)]
    for state in states:
        assert state["losses"].tolist() == pytest.approx(losses, rel=1e-4)
    for name, expected in alone.state().items():
        if name.startswith(("model.", "loss.")):
            for state in states:
                torch.testing.assert_close(
                    state[name], expected, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
    for name, tensor in states[0].items():
        if name.startswith(("model.", "loss.", "optimizer.")):
            assert torch.equal(tensor, states[1][name]), name


def test_a_parameter_that_has_no_part_in_a_step_stays_as_it_is(two_workers: Path) -> None:
    for rank in range(2):
        assert safetensors.torch.load_file(two_workers / f"idle-{rank}")["idle"].item() == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_in_parts_is_the_step_of_the_whole_batch(loss: str) -> None:
    whole, parted = (make(configure(f"train.loss={loss}", f"train.accumulate={n}")) for n in (1, 3))
    for step in range(STEPS):
        batch = global_batch(step, views=whole.loss.views)
        assert parted.step(batch).value() == pytest.approx(whole.step(batch).value(), rel=1e-4)
    for name, expected in whole.state().items():
        torch.testing.assert_close(
            parted.state()[name], expected, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_part_goes_twice_through_the_same_dropout_and_counts_once() -> None:
    """And no part has fewer than two images."""
    alexnet = make(load_config(sets=["model.backbone=alexnet", "data.image_size=64", "train.accumulate=9"]))
    seen: list[torch.Tensor] = []
    alexnet.model.register_forward_hook(lambda module, inputs, codes: seen.append(codes.detach()))
    alexnet.step(global_batch(0, side=64))
    assert [len(codes) for codes in seen] == [3, 2, 2] * 2
    assert all(torch.equal(first, second) for first, second in zip(seen[:3], seen[3:], strict=True))
    batch, mean = global_batch(0), torch.zeros(16)
    normed = make(configure("model.head=bn", "train.accumulate=3"))
    normed.model.head[0].register_forward_hook(lambda module, inputs, codes: seen.append(codes.detach()))
    normed.step(batch)
    for codes in seen[-3:]:
        mean = 0.9 * mean + 0.1 * codes.mean(0)
    torch.testing.assert_close(normed.model.head[1].running_mean, mean)
    assert normed.model.head[1].num_batches_tracked == 3


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "rmsprop", "sgd"])
def test_a_restored_state_goes_on_bit_for_bit(optimizer: str) -> None:
    config = configure("train.loss=hashnet", "train.ema_decay=0.9", f"train.optimizer={optimizer}")
    unbroken = make(config)
    for step in range(STEPS):
        if step == 2:
            saved = {name: tensor.clone() for name, tensor in unbroken.state().items()}
        unbroken.step(global_batch(step))
    resumed = make(config)
    resumed.step(global_batch(99))
    resumed.load_state(safetensors.torch.load(safetensors.torch.save(saved)), 2)
    for step in (2, 3):
        resumed.step(global_batch(step))
    expected = unbroken.state()
    assert resumed.state().keys() == expected.keys()
    for name, tensor in resumed.state().items():
        assert torch.equal(tensor, expected[name]), name


def test_dropout_depends_on_the_step_alone() -> None:
    config = load_config(sets=["model.backbone=alexnet", "model.bits=16", "data.image_size=64"])
    first, second = make(config), make(config)
    torch.rand(5)
    assert first.step(global_batch(0, side=64)).value() == second.step(global_batch(0, side=64)).value()


def test_state_of_another_network_is_refused() -> None:
    state = make(configure()).state()
    with pytest.raises(DamagedArtifact, match="does not fit"):
        make(configure("model.bits=32")).load_state(state, 1)


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    learner = make(configure("train.lr=1e30"))
    with pytest.raises(
        WorkFailed, match=r"at step \d, where the learning rate was .*e\+.*: lower train\.lr.*\d/0, \d/1"
    ):
        for step in range(STEPS):
            learner.step(global_batch(step)).value()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.backbone=hrnet_w81", "unknown backbone 'hrnet_w81': did you mean hrnet_w"),
        ("train.loss=hyp3", "unknown loss 'hyp3': did you mean hyp2"),
        ("train.loss_options.warp=1", "no option warp"),
        ("train.loss_options.margin=-1", "train.loss: margin must be a number of at least 0: got -1"),
        ("model.weights=nowhere.safetensors", "does not exist"),
    ],
)
def test_names_that_do_not_exist_are_said(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(configure(setting))


def test_too_few_bits_for_the_classes_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for loss in ("orthohash", "cel"):
        check_network(configure("model.bits=8", f"train.loss={loss}"), 300)
        assert capsys.readouterr().err == (
            "hhnet: warning: 8 bits tell at most 256 classes apart: some of 300 must share a code; use more bits\n"
        )
    check_network(configure("model.bits=8"), 256)
    assert capsys.readouterr().err == ""


TOY_LOSS = """
from hhnet.nn.losses.base import HashLoss, at_least


class Toy(HashLoss):
    default_head = "bn"

    def __init__(self, bits, classes, *, weight=1.0):
        super().__init__(bits, classes)
        at_least(0, weight=weight)
        self.weight = weight

    def compute(self, z_BK, labels_BC, keys):
        return self.weight * z_BK.square().mean()
"""


def test_a_loss_is_one_module(tmp_path: Path) -> None:
    with plugged_in(hhnet.nn.losses, tmp_path, "toy", TOY_LOSS):
        learner = make(configure("train.loss=toy", "train.loss_options.weight=2", "model.head=auto"))
        values = [learner.step(global_batch(0)).value() for _ in range(STEPS)]
        assert learner.model.head_name == "bn" and 0 < values[-1] < values[0]
        with pytest.raises(ConfigError, match="unknown loss 'tooy': did you mean toy"):
            make(configure("train.loss=tooy"))
        with pytest.raises(ConfigError, match="loss toy has no option lam: known are weight"):
            make(configure("train.loss=toy", "train.loss_options.lam=2"))
    with pytest.raises(ConfigError, match="unknown loss 'toy'"):
        make(configure("train.loss=toy"))
