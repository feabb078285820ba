"""The loss of a linear head against the loss of its logits: values and gradients for all chunk sizes; bad input."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels.cpu.forms import prefer_forms
from tests.losses.loss_oracle import IGNORED, Case, assert_equal, drawn, gradients, make_case
from vlparts.losses import _vocab_chunks
from vlparts.losses.cross_entropy import weighted_cross_entropy, weighted_cross_entropy_with_parts
from vlparts.losses.linear_cross_entropy import linear_weighted_cross_entropy, linear_weighted_cross_entropy_with_parts
from vlparts.losses.weights import PRESETS

WIDTH, CLASSES, LENGTHS = 6, 13, [7, 1, 0, 9]


class Inputs(NamedTuple):
    """Inputs of a linear head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    case: Case


def inputs(lengths: list[int] = LENGTHS, bias: bool = True, dtype: torch.dtype = torch.float64) -> Inputs:
    """Logits of order one."""
    case = make_case(lengths, vocabulary=CLASSES)
    hidden, weight = drawn(sum(lengths), WIDTH, seed=1, dtype=dtype), drawn(CLASSES, WIDTH, seed=2, dtype=dtype)
    offsets = drawn(CLASSES, seed=3, dtype=dtype).requires_grad_() if bias else None
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), offsets, case)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def ours(given: Inputs, **options: Any) -> Tensor:
    hidden, weight, bias, case = given
    return linear_weighted_cross_entropy(hidden, weight, case.labels, bias=bias, **{**case.weighting, **options})


def expected_of(given: Inputs, softcap: float | None = None, **options: Any) -> Tensor:
    """The loss of all logits at once."""
    hidden, weight, bias, case = given
    logits = capped(F.linear(hidden, weight, bias), softcap)
    return weighted_cross_entropy(logits, case.labels, **{**case.weighting, **options})


def assert_same(given: Inputs, tolerance: float = 1e-10, **options: Any) -> None:
    """Compare values and all gradients, also those of the weights of samples and tokens."""
    candidates = (given.hidden, given.weight, given.bias, given.case.sample_weights, given.case.token_weights)
    leaves = [leaf for leaf in candidates if leaf is not None and leaf.requires_grad]
    loss, expected = ours(given, **options), expected_of(given, **options)
    assert_equal(loss, expected, tolerance)
    for got, wanted in zip(gradients(3 * loss, *leaves), gradients(3 * expected, *leaves), strict=True):
        assert got.dtype == wanted.dtype
        assert_equal(got, wanted, tolerance)


@pytest.fixture(params=[0, 400, 2**30])
def cache_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache no chunk, some chunks, all chunks."""
    monkeypatch.setattr(_vocab_chunks, "CACHE_BYTES", request.param)


@pytest.fixture(params=[4096, 5, 1, 13])
def chunk_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of a chunk: more than there are, an odd number, one, exactly the vocabulary."""
    monkeypatch.setattr(_vocab_chunks, "MAX_CHUNK_CLASSES", request.param)


every_way = pytest.mark.usefixtures("cache_bytes", "chunk_size", "poisoned_empty")
OPTIONS = [
    dict(),
    dict(softcap=1.5),
    dict(label_smoothing=0.1),
    dict(z_loss=0.3),
    dict(softcap=0.7, label_smoothing=0.2, z_loss=0.1, mix=0.2, length_exponent=0.5),
    *[dict(preset=preset, z_loss=0.1) for preset in PRESETS],
]


@every_way
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_loss_of_the_logits(options: dict[str, Any], bias: bool) -> None:
    given = inputs(bias=bias)
    assert_same(given, **options)
    given.case.sample_weights.requires_grad_()
    given.case.token_weights.requires_grad_()
    assert_same(given, **options)


@every_way
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_frozen_inputs_get_no_gradient(frozen: tuple[int, ...]) -> None:
    given = inputs()
    leaves = list(given[:3])
    for place in frozen:
        leaves[place].requires_grad_(False)
    assert_same(given, softcap=2.0)
    ours(given).backward()
    assert [leaf.grad is None for leaf in leaves] == [place in frozen for place in range(3)]


@every_way
def test_nothing_frozen_or_no_grad_makes_no_gradients() -> None:
    given = inputs()
    expected = expected_of(given).detach()
    with torch.no_grad():
        assert_equal(ours(given), expected)
    frozen = Inputs(*(leaf.detach() for leaf in given[:3]), given.case)
    assert not ours(frozen).requires_grad
    assert_equal(ours(frozen), expected)


@every_way
@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_ignored_hidden_states_may_hold_anything(junk: float) -> None:
    given = inputs()
    given.case.token_weights[2] = 0
    out = (given.case.labels == IGNORED) | (torch.arange(17) == 2)
    poisoned = given._replace(hidden=given.hidden.detach().masked_fill(out[:, None], junk).requires_grad_())
    clean, loss = expected_of(given), ours(poisoned)
    assert_equal(loss, clean)
    found = gradients(loss, *poisoned[:3])
    for got, wanted in zip(found, gradients(clean, *given[:3]), strict=True):
        assert_equal(got, wanted)
    assert not found[0][out].any()


@every_way
@pytest.mark.parametrize("lengths", [[], [0, 0], [4, 3]])
def test_nothing_to_learn_is_zero_with_a_graph(lengths: list[int]) -> None:
    for name, value in (("labels", IGNORED), ("sample_weights", 0), ("token_weights", 0)):
        given = inputs(lengths)
        given = given._replace(case=given.case._replace(**{name: torch.full_like(getattr(given.case, name), value)}))
        for preset in PRESETS:
            loss = ours(given, preset=preset, z_loss=0.1, label_smoothing=0.1)
            assert loss.item() == 0
            for leaf, gradient in zip(given[:3], torch.autograd.grad(loss, given[:3]), strict=True):
                assert gradient.shape == leaf.shape
                assert not gradient.any()


@every_way
def test_a_second_backward_pass_gives_the_same() -> None:
    given = inputs()
    loss, expected = ours(given), expected_of(given)
    wanted = gradients(expected, *given[:3])
    for factor in (1.0, 2.0, 1.0):
        (factor * loss).backward(retain_graph=True)
    for leaf, once in zip(given[:3], wanted, strict=True):
        assert_equal(leaf.grad, 4 * once)


@every_way
def test_tied_to_the_embeddings_and_accumulated() -> None:
    places = torch.arange(17) % CLASSES
    found = []
    for function in (ours, expected_of):
        given = inputs()
        embeddings = nn.Embedding.from_pretrained(given.weight.detach(), freeze=False)
        for scale in (1.0, 0.5):
            hidden = embeddings(places).tanh() * given.hidden.detach()
            (scale * function(Inputs(hidden, embeddings.weight, given.bias, given.case))).backward()
        found.append((embeddings.weight.grad, given.bias.grad))
    assert_equal(*found)


@every_way
@pytest.mark.parametrize(
    "lay", [lambda x: x.t().contiguous().t(), lambda x: x.repeat(1, 2)[:, ::2], lambda x: x[:1].expand_as(x)]
)
def test_strides_do_not_matter(lay: Callable[[Tensor], Tensor]) -> None:
    given = inputs()
    assert_same(Inputs(*(lay(leaf.detach()).requires_grad_() for leaf in given[:2]), given.bias, given.case))


@pytest.mark.usefixtures("cache_bytes", "chunk_size")
def test_gradcheck() -> None:
    given = inputs([3, 2])
    a, b = given.case.sample_weights.requires_grad_(), given.case.token_weights.requires_grad_()

    def function(hidden: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        changed = given.case._replace(sample_weights=a, token_weights=b)
        return ours(Inputs(hidden, weight, bias, changed), softcap=2.0, label_smoothing=0.1, z_loss=0.1)

    assert torch.autograd.gradcheck(function, (*given[:3], a, b), fast_mode=True)


@every_way
def test_parts_are_those_of_the_logits() -> None:
    hidden, weight, bias, case = inputs()
    options = dict(case.weighting, preset="square", label_smoothing=0.1)
    found = linear_weighted_cross_entropy_with_parts(hidden, weight, case.labels, bias=bias, **options)
    for got, wanted in zip(
        found, weighted_cross_entropy_with_parts(F.linear(hidden, weight, bias), case.labels, **options), strict=True
    ):
        assert_equal(got, wanted)
    assert not any(part.requires_grad for part in found[1:])


@pytest.mark.usefixtures("cache_bytes")
@pytest.mark.parametrize("onednn", [True, False])
def test_float32_of_many_tokens(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_forms(monkeypatch, "onednn" if onednn else "pytorch")
    monkeypatch.setattr(_vocab_chunks, "MAX_CHUNK_CLASSES", 9)
    wide, narrow = inputs([70, 1, 130]), inputs([70, 1, 130], dtype=torch.float32)
    expected, loss = expected_of(wide), ours(narrow)
    assert loss.dtype == torch.float32
    assert_equal(loss.double(), expected, 1e-5)
    for got, wanted in zip(gradients(loss, *narrow[:3]), gradients(expected, *wide[:3]), strict=True):
        assert_equal(got.double(), wanted, 1e-5)


def test_a_second_derivative_is_refused() -> None:
    given = inputs()
    with pytest.raises(RuntimeError, match="differentiable once; got `create_graph=True`"):
        torch.autograd.grad(ours(given), given.hidden, create_graph=True)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_compiles(softcap: float | None) -> None:
    given = inputs([sum(LENGTHS)])
    options: dict[str, Any] = dict(
        bias=given.bias, softcap=softcap, token_weights=given.case.token_weights, z_loss=0.1
    )
    hidden = given.hidden.detach().masked_fill((given.case.labels == IGNORED)[:, None], torch.nan).requires_grad_()
    compiled = torch.compile(linear_weighted_cross_entropy, backend="aot_eager", fullgraph=True)
    loss = compiled(hidden, given.weight, given.case.labels, **options)
    expected = linear_weighted_cross_entropy(hidden, given.weight, given.case.labels, **options)
    assert_equal(loss, expected)
    leaves = hidden, given.weight, given.bias
    assert_equal(gradients(loss, *leaves), gradients(expected, *leaves))


def test_the_batch_dimension_and_a_module_of_torch() -> None:
    head = torch.nn.Linear(WIDTH, CLASSES)
    hidden, labels = torch.randn(2, 5, WIDTH), torch.arange(10).view(2, 5)
    loss = linear_weighted_cross_entropy(hidden, head.weight, labels, bias=head.bias, preset="sample")
    assert_equal(loss, weighted_cross_entropy(head(hidden), labels, preset="sample"), 1e-6)
    assert_equal(loss, F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten()), 1e-6)


HIDDEN, WEIGHT, LABELS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(hidden=HIDDEN.long()), "`hidden` must be floating-point .* got torch.int64"),
        (dict(hidden=HIDDEN[0]), r"`hidden` must be .* of shape \(2, 3, 'H'\), .* \(3, 4\)"),
        (dict(lm_head_weight=WEIGHT.t()), r"`lm_head_weight` must be \(V, 4\) and not empty, got \(4, 5\)"),
        (dict(lm_head_weight=WEIGHT[0]), r"`lm_head_weight` must be \(V, 4\) .* \(4,\)"),
        (dict(lm_head_weight=WEIGHT[:0]), r"`lm_head_weight` must be \(V, 4\) and not empty, got \(0, 4\)"),
        (dict(lm_head_weight=WEIGHT.double()), "`lm_head_weight` must have the type of `hidden`, torch.float32, got"),
        (dict(bias=torch.zeros(4)), r"`bias` must be \(5,\), got \(4,\)"),
        (dict(bias=torch.zeros(5).bfloat16()), "`bias` must have the type of `hidden`, torch.float32, got torch.bfl"),
        (dict(softcap=0.0), "`softcap` must be a finite number above 0, got 0.0"),
        (dict(softcap=float("nan")), "`softcap` must be a finite number above 0, got nan"),
        (dict(softcap=True), "`softcap` must be a finite number above 0, got True"),
        (dict(label_smoothing=-0.1), "`label_smoothing` must be between 0 and 1, got -0.1"),
        (dict(z_loss=float("inf")), "`z_loss` must be a finite number"),
        (dict(labels=LABELS + 5), "`labels` must be between 0 and 4, or -100, got 5"),
        (dict(labels=LABELS.double()), "`labels` must be integers, got torch.float64"),
        (dict(preset="sample", mix=1.0), "`mix` is fixed by `preset='sample'`"),
        (dict(sample_weights=torch.tensor([1, torch.nan])), "`sample_weights` must be finite"),
        (dict(token_weights=-torch.ones(2, 3)), "`token_weights` must be finite and at least 0"),
        (dict(cu_seqlens=torch.tensor([0, 7])), "`cu_seqlens` must rise from 0"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_weighted_cross_entropy(**{"hidden": HIDDEN, "lm_head_weight": WEIGHT, "labels": LABELS, **options})
