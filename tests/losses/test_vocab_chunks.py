"""The chunks of classes of the linear form: number types, ranges of logits, memory and recomputation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.losses.loss_oracle import IGNORED, assert_equal, drawn, gradients
from tests.losses.test_linear_cross_entropy import CLASSES, WIDTH, Inputs, assert_same, expected_of, inputs, ours
from vlparts.losses import _vocab_chunks
from vlparts.losses.linear_cross_entropy import linear_weighted_cross_entropy

every_cache = pytest.mark.parametrize("cache_bytes", [0, 300, 2**30])


def set_chunks(monkeypatch: pytest.MonkeyPatch, cache_bytes: int) -> None:
    """Use chunks of five classes and this many bytes of cache."""
    monkeypatch.setattr(_vocab_chunks, "CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(_vocab_chunks, "MAX_CHUNK_CLASSES", 5)


def wide_of(given: Inputs) -> Inputs:
    """The same inputs in float64."""
    leaves = (leaf.detach().double().requires_grad_() for leaf in given[:3])
    return Inputs(*leaves, given.case)


def relative(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return ((got.double() - wanted).abs().max() / wanted.abs().max()).item()


@every_cache
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float64(dtype: torch.dtype, cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunks(monkeypatch, cache_bytes)
    given = inputs(dtype=dtype)
    wide = wide_of(given)
    for options in (dict(), dict(softcap=2.0, label_smoothing=0.1, z_loss=0.1)):
        loss, expected = ours(given, **options), expected_of(wide, **options)
        assert loss.dtype == torch.float32
        assert relative(loss, expected) < 1e-2
        for got, wanted in zip(gradients(loss, *given[:3]), gradients(expected, *wide[:3]), strict=True):
            assert got.dtype == dtype
            assert relative(got, wanted) < 3e-2


def test_small_losses_are_not_rounded_to_half_precision() -> None:
    given = inputs([4000], dtype=torch.bfloat16)
    assert relative(ours(given), expected_of(wide_of(given))) < 1e-3


class HugeStep:
    """Denominators of a step much larger than this call."""

    samples = tokens = torch.tensor(1e6).double()


@every_cache
def test_float16_with_a_loss_scale(cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Neither the scale of 65536 nor a token weight of 1e-8 is representable in float16.
    set_chunks(monkeypatch, cache_bytes)
    given = inputs(dtype=torch.float16)
    wide = wide_of(given)
    loss, expected = (2.0**16 * ours(each, normalizer=HugeStep()) for each in (given, wide))
    wanted = gradients(expected, *wide[:3])
    for _ in range(2):
        for got, want in zip(gradients(loss, *given[:3], retain_graph=True), wanted, strict=True):
            assert relative(got, want) < 1e-2


@every_cache
def test_autocast_takes_its_own_type(cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunks(monkeypatch, cache_bytes)
    given = inputs(dtype=torch.float32)
    half = Inputs(*(leaf.detach().bfloat16().requires_grad_() for leaf in given[:3]), given.case)
    mixed = given._replace(hidden=half.hidden.detach().requires_grad_())
    for leaves in (given, mixed):
        with torch.autocast("cpu", torch.bfloat16):
            loss = ours(leaves)
        found, wanted = gradients(loss, *leaves[:3]), gradients(ours(half), *half[:3])
        assert_equal(loss, ours(half), 0)
        assert [gradient.dtype for gradient in found] == [leaf.dtype for leaf in leaves[:3]]
        assert_equal([gradient.float() for gradient in found], [gradient.float() for gradient in wanted], 0)


def test_autocast_leaves_float64_alone() -> None:
    given = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(given)
    assert_equal(loss, expected_of(given))


class Largest(TorchDispatchMode):
    """The largest number of elements of a floating-point tensor that anything returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else (found,):
            if isinstance(one, Tensor) and one.is_floating_point():
                self.elements = max(self.elements, one.numel())
        return found


@pytest.mark.parametrize("cache_bytes", [0, 40 * 5 * 8])
def test_logits_are_never_held_together(cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunks(monkeypatch, cache_bytes)
    given = inputs([40, 60])
    with Largest() as seen:
        gradients(ours(given), *given[:3])
    with Largest() as plain:
        gradients(expected_of(given), *given[:3])
    assert plain.elements >= 50 * CLASSES
    assert seen.elements <= 100 * WIDTH


class Products(TorchDispatchMode):
    """Counts the multiplications of all products, as classes times tokens."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1] // WIDTH
        return function(*args, **(kwargs or {}))


def test_cached_chunks_save_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs([100], bias=False)
    given.case.labels.clamp_(min=0)
    for cached_chunks, classes in ((0, 4 * CLASSES), (1, 4 * CLASSES - 5), (2, 4 * CLASSES - 10), (3, 3 * CLASSES)):
        set_chunks(monkeypatch, cached_chunks * 5 * 100 * 8)
        with Products() as seen:
            gradients(ours(given), *given[:2])
        assert seen.count == classes * 100
    with torch.no_grad(), Products() as seen:
        ours(given)
    assert seen.count == CLASSES * 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [30, 32, 41])
def test_groups_of_tokens_that_fit_in_the_cache_repeat_no_product(
    dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_vocab_chunks, "MIN_GROUP_TOKENS", 8)
    monkeypatch.setattr(_vocab_chunks, "GROUP_MULTIPLE", 4)
    set_chunks(monkeypatch, CLASSES * dtype.itemsize * 11)  # 11 tokens fit, 8 are taken
    given = inputs([tokens - 9, 9], dtype=dtype)
    given.case.labels.clamp_(min=0)
    with Products() as seen:
        gradients(ours(given), *given[:2])
    assert seen.count == 3 * CLASSES * tokens
    for options in (dict(), dict(softcap=2.0), dict(label_smoothing=0.1, z_loss=0.1)):
        assert_same(given, 1e-10 if dtype == torch.float64 else 1e-4, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_one_group_so_that_its_gradient_is_rounded_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_vocab_chunks, "MIN_GROUP_TOKENS", 1)
    monkeypatch.setattr(_vocab_chunks, "GROUP_MULTIPLE", 1)
    set_chunks(monkeypatch, CLASSES * 4 * 8)
    given = inputs([3000], dtype=dtype)
    wide = wide_of(given)
    (found,), (wanted,) = (gradients(ours(each), each.weight) for each in (given, wide))
    rounded = wanted.to(dtype).double()
    assert (found.double() - wanted).norm() < 3 * (rounded - wanted).norm()


def test_chunks_shrink_for_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vocab_chunks, "MIN_CHUNK_CLASSES", 2)
    monkeypatch.setattr(_vocab_chunks, "MAX_CHUNK_CLASSES", 8)
    monkeypatch.setattr(_vocab_chunks, "CACHE_BYTES", 0)
    given = inputs([100], bias=False)
    given.case.labels.clamp_(min=0)
    expected = expected_of(given)
    for chunk_bytes, elements in ((8 * 100 * 8, 800), (8 * 100 * 8 - 1, 600), (1, 600)):  # hidden states have 600
        monkeypatch.setattr(_vocab_chunks, "CHUNK_BYTES", chunk_bytes)
        with Largest() as seen:
            assert_equal(ours(given), expected)
        assert seen.elements == elements


def test_ignored_tokens_are_left_out_before_the_first_product() -> None:
    given = inputs([40])
    given.case.labels[3:] = IGNORED
    with Largest() as seen:
        ours(given)
    assert seen.elements <= 40 * WIDTH  # the scattered gradient, and no logits of 40 tokens
    assert seen.elements < 40 * CLASSES


@every_cache
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rising", [1, -1])
def test_chunks_may_differ_by_more_than_the_range_of_exponentials(
    dtype: torch.dtype, cache_bytes: int, rising: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The bias of the last classes is 400 above or below that of the first ones: e^400 overflows float32.
    set_chunks(monkeypatch, cache_bytes)
    given = inputs(dtype=dtype)
    steps = (torch.arange(CLASSES) // 5 * 200 * rising).to(dtype)
    given = given._replace(bias=(given.bias.detach() + steps).requires_grad_())
    wide = wide_of(given)
    for options in (dict(), dict(label_smoothing=0.1, z_loss=0.01)):
        loss, expected = ours(given, **options), expected_of(wide, **options)
        limit = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 5e-2)
        assert relative(loss, expected) < limit
        for got, wanted in zip(gradients(loss, *given[:3]), gradients(expected, *wide[:3]), strict=True):
            assert relative(got, wanted) < limit


@every_cache
def test_classes_may_be_excluded(cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunks(monkeypatch, cache_bytes)
    given = inputs()
    allowed = torch.arange(CLASSES) >= 10  # excludes the first two chunks
    given.case.labels[given.case.labels != IGNORED] = 11
    given = given._replace(bias=torch.where(allowed, given.bias.detach(), -torch.inf).requires_grad_())
    loss, expected = ours(given), expected_of(given)
    assert_equal(loss, expected)
    assert_equal(gradients(loss, *given[:3]), gradients(expected, *given[:3]))


@every_cache
@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_nonfinite_logits_give_nan(cache_bytes: int, junk: float, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunks(monkeypatch, cache_bytes)
    given = inputs()
    given = given._replace(bias=given.bias.detach().index_fill(0, torch.tensor([7]), junk).requires_grad_())
    assert ours(given).isnan()


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_half_precision_is_nearer_than_rounded_logits(cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The largest logits are near 30. bfloat16 rounds them; the linear form rounds logits minus a shift.
    monkeypatch.setattr(_vocab_chunks, "CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(_vocab_chunks, "MAX_CHUNK_CLASSES", 128)
    leaves = [x.bfloat16().requires_grad_() for x in (drawn(64, 32, seed=1), 1.5 * drawn(1024, 32, seed=2))]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    likely = F.linear(*exact).argmax(1)
    labels = torch.where(torch.arange(64) % 2 == 0, likely, likely.roll(1))
    wanted = gradients(F.cross_entropy(F.linear(*exact), labels), *exact)
    mine = gradients(linear_weighted_cross_entropy(*leaves, labels), *leaves)
    rounded = gradients(F.cross_entropy(F.linear(*leaves).float(), labels), *leaves)
    for got, plain, want in zip(mine, rounded, wanted, strict=True):
        assert (got - want).norm() < 0.7 * (plain - want).norm()


def test_gradients_are_computed_only_if_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = _vocab_chunks._ChunkedHead.backward

    def noted(self: Any, *arguments: Any) -> None:
        seen.append(arguments)
        original(self, *arguments)

    monkeypatch.setattr(_vocab_chunks._ChunkedHead, "backward", noted)
    given = inputs()
    with torch.no_grad():
        ours(given)
    ours(Inputs(*(leaf.detach() for leaf in given[:3]), given.case))
    assert not seen
    ours(given)
    assert len(seen) == 1


def test_the_factor_of_the_loss_is_not_rounded_to_half_precision() -> None:
    given = inputs(dtype=torch.bfloat16)
    (once,) = gradients(ours(given), given.weight)
    (third,) = gradients(ours(given) / 3, given.weight)
    assert_equal(third.double(), (once.float() / 3).bfloat16().double(), 0)
