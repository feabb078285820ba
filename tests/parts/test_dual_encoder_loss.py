"""The losses in blocks against the losses of the whole matrix."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlparts.parts.dual_encoder_loss import sigmoid_contrastive_loss, softmax_contrastive_loss

LOSSES = ("softmax", "sigmoid")
each_loss = pytest.mark.parametrize("kind", LOSSES)


def plain(kind: str, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The papers' formulas on the whole matrix of logits."""
    logits = scale * images @ texts.T
    if kind == "softmax":
        right = torch.arange(len(logits))
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * (logits + bias)).sum() / len(logits)


def chunked(kind: str, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
    """Ours."""
    if kind == "softmax":
        return softmax_contrastive_loss(images, texts, scale, **options)
    return sigmoid_contrastive_loss(images, texts, scale, bias, **options)


def inputs(pairs: int, width: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Images, texts, scale and bias of order one, all with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((pairs, width), (pairs, width), (), ())
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[2] += 2
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(tensors, found, strict=True)]


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 16, 17, 1000])
@each_loss
def test_equals_the_whole_matrix(kind: str, chunk_size: int) -> None:
    tensors = inputs(17)
    loss, expected = chunked(kind, *tensors, chunk_size=chunk_size), plain(kind, *tensors)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    for got, wanted in zip(gradients(loss, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


@each_loss
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    mask = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda *tensors: chunked(kind, *tensors, chunk_size=2, pair_mask=mask), inputs(4, 3)
    )


def test_equals_the_loss_of_transformers() -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    images, texts, scale, _ = inputs(9)
    expected = image_text_contrastive_loss(scale * texts @ images.T)
    torch.testing.assert_close(softmax_contrastive_loss(images, texts, scale, chunk_size=4), expected)


def test_equals_the_loss_of_native_siglip() -> None:
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 20, "max_position_embeddings": 4, "projection_size": 16}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    native = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).double()
    outputs = native(torch.randint(20, (7, 4)), torch.randn(7, 3, 8, 8).double(), return_loss=True)
    features = outputs.image_embeds, outputs.text_embeds
    loss = sigmoid_contrastive_loss(*features, native.logit_scale.exp(), native.logit_bias, chunk_size=3)
    torch.testing.assert_close(loss, outputs.loss)
    parameters = list(native.parameters())
    wanted = torch.autograd.grad(outputs.loss, parameters, retain_graph=True)
    for got, there in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(got, there)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e300])
@each_loss
def test_padding_is_inert(kind: str, junk: float) -> None:
    mask = torch.tensor([True, False, True, True, False, True, False])
    whole, real = inputs(7), inputs(7)
    real[:2] = [tensor.detach()[mask].requires_grad_() for tensor in real[:2]]
    with torch.no_grad():
        whole[0][1], whole[1][4], whole[1][6] = junk, junk, -junk
    loss, expected = chunked(kind, *whole, chunk_size=3, pair_mask=mask), plain(kind, *real)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    found, wanted = gradients(loss, whole), gradients(expected, real)
    for got, there in zip(found[:2], wanted[:2], strict=True):
        assert torch.equal(got[~mask], torch.zeros_like(got[~mask]))
        torch.testing.assert_close(got[mask], there, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found[2:], wanted[2:], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("pairs", [0, 3])
@each_loss
def test_without_a_real_pair_all_is_zero_and_in_the_graph(kind: str, pairs: int) -> None:
    tensors = inputs(pairs)
    loss = chunked(kind, *tensors, pair_mask=torch.zeros(pairs, dtype=torch.bool))
    assert loss.item() == 0
    assert loss.requires_grad
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(loss, tensors))


@each_loss
def test_no_tensor_of_all_pairs_is_made(kind: str) -> None:
    pairs, width, chunk_size = 96, 8, 16
    tensors = inputs(pairs, width)
    mask = torch.ones(pairs, dtype=torch.bool)
    with LargestTensor() as ours:
        gradients(chunked(kind, *tensors, chunk_size=chunk_size, pair_mask=mask), tensors)
    with LargestTensor() as whole:
        gradients(plain(kind, *tensors), tensors)
    assert whole.elements == pairs**2
    assert ours.elements == max(pairs * width, chunk_size**2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_loss
def test_half_precision_features_lose_nothing_more(kind: str, dtype: torch.dtype) -> None:
    """Sums and logits are float32: the loss is that of the rounded features, and so are the gradients, rounded."""
    tensors = inputs(40, 16, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    loss, expected = chunked(kind, *tensors, chunk_size=16), plain(kind, *exact)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(gradients(loss, tensors), gradients(expected, exact), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=2 * torch.finfo(dtype).eps)


@each_loss
def test_autocast_changes_nothing(kind: str) -> None:
    tensors = inputs(20, dtype=torch.float32)
    expected = chunked(kind, *tensors, chunk_size=8)
    wanted = gradients(expected, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert (tensors[0] @ tensors[1].T).dtype == torch.bfloat16
        loss = chunked(kind, *tensors, chunk_size=8)
        found = gradients(loss, tensors)
    assert torch.equal(loss, expected)
    assert all(torch.equal(got, there) for got, there in zip(found, wanted, strict=True))


@each_loss
def test_compiled_it_is_the_same(kind: str) -> None:
    tensors = inputs(9)
    expected = chunked(kind, *tensors, chunk_size=4)
    torch.compiler.reset()
    loss = torch.compile(chunked, backend="aot_eager")(kind, *tensors, chunk_size=4)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    for got, wanted in zip(gradients(loss, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


@each_loss
def test_logits_beyond_the_range_of_exp(kind: str) -> None:
    images, texts, _, bias = inputs(12)
    tensors = [images, texts, torch.tensor(1e5, dtype=torch.float64, requires_grad=True), bias]
    loss, expected = chunked(kind, *tensors, chunk_size=5), plain(kind, *tensors)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(gradients(loss, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, wanted)


@each_loss
def test_numbers_and_tensors_with_one_element(kind: str) -> None:
    images, texts, _, _ = inputs(6)
    expected = plain(kind, images, texts, torch.tensor(0.1).double() * 0 + 0.1, torch.tensor(-0.3).double() * 0 - 0.3)
    torch.testing.assert_close(chunked(kind, images, texts, 0.1, -0.3), expected, atol=1e-12, rtol=1e-12)
    scale, bias = (torch.full((1,), value, dtype=torch.float64, requires_grad=True) for value in (0.1, -0.3))
    loss = chunked(kind, images, texts, scale, bias)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    assert loss.shape == ()
    loss.backward()
    assert scale.grad.shape == (1,)


@pytest.mark.parametrize("learned", range(4))
@each_loss
def test_what_is_frozen_gets_no_gradient(kind: str, learned: int) -> None:
    """And what is learned gets the same."""
    tensors = inputs(8)
    wanted = gradients(plain(kind, *tensors), tensors)[learned]
    if kind == "softmax" and learned == 3:
        assert not wanted.any()
        return
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index == learned)
    chunked(kind, *tensors, chunk_size=3).backward()
    torch.testing.assert_close(tensors[learned].grad, wanted, atol=1e-12, rtol=1e-12)
    assert [tensor.grad is not None for tensor in tensors] == [index == learned for index in range(4)]


@each_loss
def test_a_second_derivative_is_refused(kind: str) -> None:
    tensors = inputs(4)
    with pytest.raises(RuntimeError, match="differentiable once; got `create_graph=True`"):
        torch.autograd.grad(chunked(kind, *tensors), tensors[0], create_graph=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(3, 4)}, r"same shape.*\(3, 4\) and \(4, 4\)"),
        ({"images": torch.zeros(4, 4, 1)}, r"same shape.*\(4, 4, 1\)"),
        ({"texts": torch.zeros(4, 5)}, r"same shape.*\(4, 5\)"),
        ({"pair_mask": torch.ones(4)}, r"`pair_mask` must be bool.*float32"),
        ({"pair_mask": torch.ones(3, dtype=torch.bool)}, r"`pair_mask` must be bool with shape \(4,\).*\(3,\)"),
        ({"chunk_size": 0}, "`chunk_size` must be an integer of at least 1, got 0"),
        ({"chunk_size": 2.0}, r"`chunk_size` must be an integer of at least 1, got 2\.0"),
        ({"group": "remote"}, "`group` must be a process group, None or 'local', got 'remote'"),
        ({"scale": torch.ones(2)}, r"`logit_scale` must have one element, got shape \(2,\)"),
        ({"bias": torch.ones(2)}, r"`logit_bias` must have one element, got shape \(2,\)"),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    given = {"images": torch.zeros(4, 4), "texts": torch.zeros(4, 4), "scale": 1.0, "bias": 0.0, **changes}
    for kind in ("sigmoid",) if "bias" in changes else LOSSES:
        with pytest.raises(ValueError, match=message):
            chunked(kind, **given)
