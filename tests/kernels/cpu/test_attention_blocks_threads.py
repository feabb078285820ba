"""Pieces of work side by side: every piece once, one thread in each, and the settings of the calling thread kept."""

import os
import threading

import pytest
import torch

from vlparts.kernels.cpu import attention_blocks as cpu_threads
from vlparts.kernels.cpu.attention_blocks import run_side_by_side


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)
    return request.param


@pytest.mark.parametrize("pieces", [0, 1, 2, 7])
def test_every_piece_is_done_once(threads: int, pieces: int) -> None:
    done = torch.zeros(pieces, dtype=torch.int64)

    def work(piece: int) -> None:
        done[piece] += piece + 1

    run_side_by_side(work, pieces)
    assert done.tolist() == list(range(1, pieces + 1))


def test_a_piece_has_one_thread_and_the_caller_keeps_its_own(threads: int) -> None:
    inside: list[int] = []
    run_side_by_side(lambda _: inside.append(torch.get_num_threads()), 5)
    assert inside == [1] * 5
    assert torch.get_num_threads() == threads


def test_threads_that_begin_later_have_the_callers_number(threads: int) -> None:
    run_side_by_side(lambda _: None, 5)
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [threads]


def test_pieces_run_at_the_same_time() -> None:
    torch.set_num_threads(2)
    meeting = threading.Barrier(2)
    run_side_by_side(lambda _: meeting.wait(timeout=60), 2)  # alone, one would wait in vain


def test_no_gradients_are_recorded(threads: int) -> None:
    weight, results = torch.ones(3, requires_grad=True), {}
    run_side_by_side(lambda piece: results.update({piece: weight * piece}), 4)
    assert not any(result.requires_grad for result in results.values())
    assert torch.is_grad_enabled()


def test_inference_tensors_may_be_written(threads: int) -> None:
    with torch.inference_mode():
        rows = torch.zeros(4, 2)
        run_side_by_side(lambda piece: rows[piece].fill_(piece), 4)
    assert rows[:, 0].tolist() == [0, 1, 2, 3]


def test_an_error_in_a_piece_reaches_the_caller(threads: int) -> None:
    def work(piece: int) -> None:
        if piece == 3:
            raise KeyError("piece 3")

    with pytest.raises(KeyError, match="piece 3"):
        run_side_by_side(work, 5)
    run_side_by_side(lambda _: None, 5)  # and the threads live on


def test_calls_from_several_threads(threads: int) -> None:
    counts = torch.zeros(4, 100, dtype=torch.int64)

    def call(row: int) -> None:
        torch.set_num_threads(threads)
        run_side_by_side(lambda piece: counts[row, piece].add_(1), 100)

    callers = [threading.Thread(target=call, args=(row,)) for row in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert bool((counts == 1).all())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_makes_its_own_threads() -> None:
    torch.set_num_threads(2)
    run_side_by_side(lambda _: None, 2)
    assert cpu_threads._pools
    child = os.fork()
    if child == 0:  # operations of PyTorch's own threads would hang here, so the pieces are without any
        done: list[int] = []
        run_side_by_side(done.append, 6)
        os._exit(0 if sorted(done) == list(range(6)) else 1)
    assert os.waitpid(child, 0)[1] == 0
