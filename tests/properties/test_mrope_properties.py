"""Properties for every number of frequencies and every order of texts, images and videos."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.parts.mrope_oracle import IMAGE_ID, VIDEO_ID, Item, Layout, batch_of
from torch import Tensor

from vlparts.parts.rope_multimodal import get_multimodal_position_ids, interleave_axes, multimodal_rotary

SECTIONS = st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40))
SIDES = st.integers(1, 4)


@given(SECTIONS, st.booleans())
def test_each_axis_has_its_frequencies(sections: tuple[int, int, int], force_last: bool) -> None:
    axes = interleave_axes(sections, force_last)
    assert [axes.count(axis) for axis in range(3)] == list(sections)
    assert axes[-1] == 0 or not force_last


@given(SECTIONS)
def test_axes_alternate_while_they_can(sections: tuple[int, int, int]) -> None:
    """An axis is repeated only where no other has frequencies left."""
    axes = interleave_axes(sections, force_last=False)
    for place, (before, axis) in enumerate(zip(axes, axes[1:], strict=False), start=1):
        assert before != axis or set(axes[place:]) == {axis}


@st.composite
def layouts(draw: st.DrawFn) -> list[Item]:
    text = st.tuples(st.just("text"), st.tuples(st.integers(1, 5)))
    image = st.tuples(st.just("image"), st.tuples(st.integers(1, 2), SIDES, SIDES))
    video = st.tuples(st.just("video"), st.tuples(st.integers(1, 3), SIDES, SIDES, st.integers(0, 2)))
    return draw(st.lists(st.one_of(text, image, video), min_size=1, max_size=6))


samples = st.lists(st.tuples(layouts(), st.tuples(st.integers(0, 3), st.integers(0, 3))), min_size=1, max_size=3)


def positions_of(inputs: dict, merge_size: int) -> tuple[Tensor, Tensor]:
    return get_multimodal_position_ids(
        **inputs, image_token_id=IMAGE_ID, video_token_id=VIDEO_ID, spatial_merge_size=merge_size
    )


@given(samples, st.integers(1, 3))
def test_a_batch_equals_token_by_token(batch: list, merge_size: int) -> None:
    written = [Layout(items, merge_size) for items, _ in batch]
    inputs, expected = batch_of(written, [padding for _, padding in batch])
    positions, deltas = positions_of(inputs, merge_size)
    assert torch.equal(positions, expected)
    assert deltas.tolist() == [[one.following() - len(one.ids)] for one in written]


@given(layouts(), st.integers(1, 5))
def test_the_delta_continues_the_text(items: list[Item], further: int) -> None:
    """The position of a later text token follows from the delta."""
    prompt, whole = Layout(items), Layout([*items, ("text", (further,))])
    _, deltas = positions_of(batch_of([prompt], [(0, 0)])[0], 1)
    positions, _ = positions_of(batch_of([whole], [(0, 0)])[0], 1)
    places = torch.arange(len(prompt.ids), len(whole.ids)) + deltas
    assert torch.equal(positions[:, :, len(prompt.ids) :], places.expand(3, -1, -1))


@given(SECTIONS, st.integers(0, 2**31))
def test_scores_depend_on_distances_only(sections: tuple[int, int, int], seed: int) -> None:
    """Shifting all positions by one number per axis does not change the scores."""
    generator, axes = torch.Generator().manual_seed(seed), interleave_axes(sections)
    positions = torch.randint(0, 20, (3, 1, 6), generator=generator)
    frequencies = 1.0 / 100.0 ** (torch.arange(len(axes)) / len(axes))
    query, key = torch.randn(2, 6, len(axes), dtype=torch.complex128, generator=generator).unbind()
    scores = []
    for moved in (positions, positions + torch.tensor([3, 11, 7]).view(3, 1, 1)):
        cos, sin = (one[0, :, : len(axes)].double() for one in multimodal_rotary(moved, frequencies, axes))
        turn = torch.complex(cos, sin)
        scores.append(((query * turn) @ (key * turn).conj().T).real)
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5 * len(axes), rtol=0)
