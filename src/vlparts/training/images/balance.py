"""Packs shared among processes: equally many for each, and similar work in the same step."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def encoder_work(lengths: Sequence[int], hidden_size: int) -> int:
    """Work of an encoder layer on packed images, in floating-point operations of its forward pass.

    An image of s patches costs `24 d^2 s` in the linear layers (with an MLP of width 4 d) and `4 d s^2` in attention,
    which stays inside the image.

    Args:
        lengths: Patches of each image.
        hidden_size: Width d of the encoder.
    """
    return 4 * hidden_size * sum(length * (6 * hidden_size + length) for length in lengths)


def balanced_steps(works: Sequence[float], world_size: int) -> list[list[int]]:
    """Group packs of similar work, since a step takes as long as the slowest of its packs.

    Packs next to each other in the order of work share a step. That is the best grouping of these packs: no other has
    a smaller sum of the largest work of each step.

    Args:
        works: Work of each pack; their number is a multiple of `world_size`.
        world_size: Packs of a step.

    Returns:
        The packs of each step in ascending order; steps in the order of their first pack.

    Raises:
        ValueError: If the packs cannot be shared out evenly.
    """
    if world_size < 1 or len(works) % world_size:
        raise ValueError(f"`works` must be of a multiple of world_size={world_size} packs, got {len(works)}.")
    order = sorted(range(len(works)), key=works.__getitem__)
    return sorted(sorted(order[start : start + world_size]) for start in range(0, len(order), world_size))


def divided(packs: list[list[Item]], multiple: int) -> list[list[Item]]:
    """Halve the packs with the most items until the number of packs is a multiple of something.

    Args:
        packs: Packs of items; the list is changed.
        multiple: What the number of packs shall be a multiple of, such as the number of processes.

    Returns:
        The packs. Their number is no multiple where no pack of more than one item is left.
    """
    while len(packs) % multiple:
        index = max(range(len(packs)), key=lambda one: len(packs[one]))
        half = len(packs[index]) // 2
        if half == 0:
            break
        packs[index : index + 1] = [packs[index][:half], packs[index][half:]]
    return packs
