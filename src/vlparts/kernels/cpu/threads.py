"""Pieces of work side by side on CPU, each on one thread.

PyTorch divides every operation among its threads, and lets them wait for each other after it. For many short
operations in a row that costs more than it gains, most of all where other programs hold a core: a thread that is
waited for may not be running. Here each thread works through pieces of its own, and they wait once.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def run_side_by_side(work: Callable[[int], None], pieces: int) -> None:
    """Call `work(0)`, `work(1)`, ... `work(pieces - 1)` on as many threads as PyTorch uses, in any order.

    Inside a piece PyTorch runs one thread, and no gradients are recorded.

    Args:
        work: A piece of work; pieces must not write to the same memory.
        pieces: How many there are.
    """
    threads = torch.get_num_threads()
    if threads == 1 or pieces == 1:
        with torch.no_grad():
            for piece in range(pieces):
                work(piece)
        return
    is_inference = torch.is_inference_mode_enabled()

    def in_thread(piece: int) -> None:
        with torch.inference_mode(is_inference), torch.no_grad():  # these belong to a thread
            work(piece)

    for _ in _pool(threads).map(in_thread, range(pieces)):
        pass


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            _pools[threads] = _new_pool(threads)
        return _pools[threads]


def _new_pool(threads: int) -> ThreadPoolExecutor:
    """A pool in whose threads PyTorch runs one thread each."""
    pool, all_set = ThreadPoolExecutor(threads, "vlparts"), threading.Barrier(threads)

    def set_one_thread() -> None:
        torch.get_num_threads()  # The first question in a thread sets its number to everybody's.
        torch.set_num_threads(1)
        all_set.wait()

    for started in [pool.submit(set_one_thread) for _ in range(threads)]:
        started.result()
    torch.set_num_threads(threads)  # It is also what new threads begin with.
    return pool


def _forget_pools() -> None:
    """A forked process has none of its parent's threads."""
    global _lock
    _pools.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
