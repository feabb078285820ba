"""Balancing of packs over processes: equal counts, and packs of similar cost in the same step."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def encoder_work(lengths: Sequence[int], hidden_size: int) -> int:
    """Cost of an encoder layer on packed images, in floating-point operations of the forward pass.

    An image of s patches costs `24 d^2 s` in the linear layers (with an MLP of width 4 d) and `4 d s^2` in attention
    within the image.

    Args:
        lengths: Patches of each image.
        hidden_size: Width d of the encoder.
    """
    return 4 * hidden_size * sum(length * (6 * hidden_size + length) for length in lengths)


def balanced_steps(works: Sequence[float], world_size: int) -> list[list[int]]:
    """Group packs of similar cost into steps, since a step takes as long as its most expensive pack.

    Packs adjacent in the order of cost share a step. This grouping is optimal: it minimizes the sum over steps of the
    largest cost.

    Args:
        works: Cost of each pack; their number is a multiple of `world_size`.
        world_size: Packs per step.

    Returns:
        Pack indices per step, in ascending order; steps in the order of their first pack.

    Raises:
        ValueError: If the number of packs is not a multiple of `world_size`.
    """
    if world_size < 1 or len(works) % world_size:
        raise ValueError(f"`works` must have a multiple of world_size={world_size} entries, got {len(works)}.")
    order = sorted(range(len(works)), key=works.__getitem__)
    return sorted(sorted(order[start : start + world_size]) for start in range(0, len(order), world_size))


def split_packs(packs: list[list[Item]], multiple: int) -> list[list[Item]]:
    """Halve the packs with the most items until the number of packs is a multiple of `multiple`.

    Args:
        packs: Packs of items; the list is modified in place.
        multiple: Such as the number of processes.

    Returns:
        The packs. Their number is not a multiple if every pack is down to one item.
    """
    while len(packs) % multiple:
        index = max(range(len(packs)), key=lambda i: len(packs[i]))
        half = len(packs[index]) // 2
        if half == 0:
            break
        packs[index : index + 1] = [packs[index][:half], packs[index][half:]]
    return packs
