"""A failed training is one line: the last one of the first traceback, or the remedy of a known cause."""

import pytest

from pipelines.cluster.failures import training_failure
from pipelines.errors import ClusterUnavailable, WorkFailed

# As Ray Train 2.60 puts them together; the second from two network namespaces whose host names lead to 127.0.0.1.
TRACEBACK = """Training failed due to worker errors:
[Rank 0 Error Snippet]:
Traceback (most recent call last):
  File "/x/train.py", line 3, in loop
    step()
ValueError: no such thing
[Rank 1 Error Snippet]:
Traceback (most recent call last):
  File "/x/train.py", line 3, in loop
RuntimeError: the other one is gone
"""
GLOO = """Training failed due to controller error:
Traceback (most recent call last):
  File "/x/config.py", line 9, in _setup_torch_process_group
RuntimeError: Gloo connectFullMesh failed with [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:152] timed out \
connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:1952$0
"""
INTERFACE = "RuntimeError: [enforce fail at device.cc:84] ifa != nullptr. Unable to find address for: nosuch"
NCCL = "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77, remote process exited, ncclRemoteError: x"


def test_an_error_in_a_worker_is_its_last_line() -> None:
    failure = training_failure(TRACEBACK)
    assert isinstance(failure, WorkFailed)
    assert str(failure) == "training failed: ValueError: no such thing"


@pytest.mark.parametrize(
    "last",
    [
        "RuntimeError: [enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 8388608000 bytes. Error code 12 (Cannot allocate memory)",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB",
        "MemoryError",
    ],
)
def test_a_training_that_does_not_fit_is_told_what_to_lower(last: str) -> None:
    failure = training_failure(TRACEBACK.replace("ValueError: no such thing", last))
    assert "lower data.batch_size, or set train.accumulate=2" in str(failure) and len(str(failure)) <= 300


def test_a_training_whose_worker_was_killed_is_told_of_memory() -> None:
    # As Ray 2.60 has it after SIGKILL, with train.max_failures=0.
    killed = (
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
        "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the "
        "process was killed by the OOM killer due to high memory usage"
    )
    failure = training_failure(killed)
    assert str(failure).startswith("a training worker was killed") and len(str(failure)) <= 330
    assert "lower data.batch_size, or set train.accumulate=2" in str(failure)


@pytest.mark.parametrize("said", [GLOO, INTERFACE, NCCL])
def test_workers_that_do_not_find_each_other_are_told_what_to_set(said: str) -> None:
    failure = training_failure(said)
    assert isinstance(failure, ClusterUnavailable) and failure.exit_code == 3
    assert "set GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME" in str(failure) and len(str(failure)) <= 300
    assert ("127.0.0.1" in str(failure)) == (said == GLOO)
