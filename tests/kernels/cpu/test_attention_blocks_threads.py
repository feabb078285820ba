"""`parallel_for`: each index once, one PyTorch thread per task, and the settings of the caller kept."""

import os
import threading

import pytest
import torch

from vlparts.kernels.cpu import attention_blocks
from vlparts.kernels.cpu.attention_blocks import parallel_for


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)
    return request.param


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_each_index_is_processed_once(threads: int, count: int) -> None:
    done = torch.zeros(count, dtype=torch.int64)

    def task(index: int) -> None:
        done[index] += index + 1

    parallel_for(count, task)
    assert done.tolist() == list(range(1, count + 1))


def test_a_task_has_one_thread_and_the_caller_keeps_its_own(threads: int) -> None:
    inside: list[int] = []
    parallel_for(5, lambda _: inside.append(torch.get_num_threads()))
    assert inside == [1] * 5
    assert torch.get_num_threads() == threads


def test_new_threads_have_the_callers_number(threads: int) -> None:
    parallel_for(5, lambda _: None)
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [threads]


def test_tasks_run_concurrently() -> None:
    torch.set_num_threads(2)
    meeting = threading.Barrier(2)
    parallel_for(2, lambda _: meeting.wait(timeout=60))  # one at a time would time out


def test_no_gradients_are_recorded(threads: int) -> None:
    weight, results = torch.ones(3, requires_grad=True), {}
    parallel_for(4, lambda index: results.update({index: weight * index}))
    assert not any(result.requires_grad for result in results.values())
    assert torch.is_grad_enabled()


def test_inference_tensors_may_be_written(threads: int) -> None:
    with torch.inference_mode():
        rows = torch.zeros(4, 2)
        parallel_for(4, lambda index: rows[index].fill_(index))
    assert rows[:, 0].tolist() == [0, 1, 2, 3]


def test_an_error_in_a_task_reaches_the_caller(threads: int) -> None:
    def task(index: int) -> None:
        if index == 3:
            raise KeyError("index 3")

    with pytest.raises(KeyError, match="index 3"):
        parallel_for(5, task)
    parallel_for(5, lambda _: None)  # the threads are still alive


def test_calls_from_several_threads(threads: int) -> None:
    counts = torch.zeros(4, 100, dtype=torch.int64)

    def call(row: int) -> None:
        torch.set_num_threads(threads)
        parallel_for(100, lambda index: counts[row, index].add_(1))

    callers = [threading.Thread(target=call, args=(row,)) for row in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert bool((counts == 1).all())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_starts_its_own_threads() -> None:
    torch.set_num_threads(2)
    parallel_for(2, lambda _: None)
    assert attention_blocks._pools
    child = os.fork()
    if child == 0:  # operations of PyTorch's own threads would hang here, so the tasks have none
        done: list[int] = []
        parallel_for(6, done.append)
        os._exit(0 if sorted(done) == list(range(6)) else 1)
    assert os.waitpid(child, 0)[1] == 0
