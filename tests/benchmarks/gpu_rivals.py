"""What `bench_gpu.py` compares: whole models of one shape, losses of other libraries, attention by its errors."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_encoders import wrapped
from bench_experts import LAYERS, moved_bytes, run_of
from bench_losses import RIVALS as LOSSES
from bench_losses import Loss, check_results, step, supervised_rows, weighted_logits, weighting
from encoder_rivals import OURS as PACKED
from encoder_rivals import Setting, image_by_image, ours, plain_vit, qwen2, qwen25, siglip2
from gpu_measure import Run, attempt
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vlparts import NaViTConfig, compose
from vlparts.kernels.cuda import varlen_applies
from vlparts.losses.linear_cross_entropy import linear_weighted_cross_entropy
from vlparts.parts.ops_attention_reference import packed_attention_reference
from vlparts.training.scaling.flops import Flops, count_flops
from vlparts.training.scaling.packs import Pack, tokens_of_image
from vlparts.training.scaling.units import get_units

PATCH, MERGE, IMAGE_TOKEN = 16, 2, 5
MOST_CHECKED = 896 * 32_000  # numbers of a head that is checked in float64
ROUNDING = 0.03  # largest relative error in bfloat16, after 24 layers


def missing(package: str) -> bool:
    """Whether a package is not installed, which is printed."""
    absent = importlib.util.find_spec(package) is None
    if absent:
        print(f"{package} is not installed: its columns are left out.\n")
    return absent


def check_close(found: Tensor, expected: Tensor) -> None:
    """Check that results in bfloat16 agree to rounding, in the mean: among millions some are off by more."""
    error = relative_error(found.detach(), expected.double())
    if not error <= ROUNDING:  # not a number is an error too
        raise RuntimeError(f"off by {error:.1e}")


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the error relative to that of the exact values, in float64."""
    return float((found.double() - exact).norm() / exact.norm())


# Encoders


def encoders() -> dict[str, Callable[[Setting], tuple[nn.Module, Run]]]:
    """Ours and the native encoders."""
    found = {PACKED: checked_navit, "native Qwen2-VL tower": qwen2, "native Qwen2.5-VL tower (windows)": qwen25}
    if not missing("flash_attn"):
        names = {"native Qwen2-VL tower, flash": qwen2, "native Qwen2.5-VL tower (windows), flash": qwen25}
        found |= {name: partial(make, attention="flash_attention_2") for name, make in names.items()}
    return found | {"native ViT, image by image": plain_vit, "native Siglip2, padded": siglip2}


def checked_navit(one: Setting) -> tuple[nn.Module, Run]:
    """NaViT, once every image has come out as it does alone."""
    model, run = ours(one)
    with torch.no_grad():
        check_close(run(), image_by_image(model, one)())
    return model, run


def encoder_run(make: Callable[[Setting], tuple[nn.Module, Run]], one: Setting, training: bool) -> Run:
    """A call of an encoder, without gradients or with a loss and the backward pass."""
    return wrapped({"": make(one)[1]}, training)[""]


def encoder_flops(one: Setting, training: bool) -> float:
    """Operations of the products of an encoder with ungated MLPs; backward takes twice those of forward."""
    width, mlp, layers = one.config.hidden_size, one.config.intermediate_size, one.config.num_hidden_layers
    weights = layers * (4 * width**2 + 2 * width * mlp) + one.pixels.shape[1] * width
    pairs = sum(length**2 for length in one.lengths)
    return (2 * len(one.pixels) * weights + 4 * layers * width * pairs) * (3 if training else 1)


# Experts


def checked_experts(name: str, modules: list[nn.Module], inputs: list[tuple[Tensor, ...]], training: bool) -> Run:
    """Calls of layers by an implementation, once its last output has been that of "eager"."""
    last = (modules[-1:], inputs[-1:])
    check_close(run_of(last[0], name, last[1], training)(), run_of(last[0], "eager", last[1], False)())
    return run_of(modules, name, inputs, training)


def experts_costs(
    name: str, modules: list[nn.Module], inputs: list[tuple[Tensor, ...]], training: bool
) -> tuple[float, float]:
    """Operations of the products of all layers, and the bytes of weights and their gradients that they move."""
    width, _, _, inner, _ = LAYERS[name]
    flops = sum(6 * index.numel() * width * inner * (3 if training else 1) for _, index, _ in inputs)
    hits = (len(index.unique()) for _, index, _ in inputs)
    return flops, sum(moved_bytes(module, hit, training) for module, hit in zip(modules, hits, strict=True))


# Losses


def losses() -> dict[str, Loss | None]:
    """The losses that compute the plain mean; None for ours, whose weights depend on the labels."""
    found: dict[str, Loss | None] = {
        "linear_weighted_cross_entropy": None,
        "torch linear_cross_entropy": torch_default,
        "torch, chunks of 512": LOSSES["torch linear_cross_entropy"],
        **{name: LOSSES[name] for name in ("transformers", "transformers, labelled rows only")},
    }
    if not missing("liger_kernel"):
        found["Liger-Kernel"] = liger
    return found


def torch_default(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's own loss of a linear head with its default options."""
    return F.linear_cross_entropy(hidden, weight, labels)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger-Kernel's fused loss of a linear head."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def checked_loss(loss: Loss | None, inputs: tuple[Tensor, Tensor, Tensor]) -> Run:
    """Forward and backward of a loss, or of ours, once a small head has had the results of float64."""
    hidden, weight, labels = inputs
    oracle: Loss = supervised_rows
    if loss is None:
        oracle, loss = weighted_logits, partial(linear_weighted_cross_entropy, **weighting(labels))
    run = step(loss, inputs)
    if weight.numel() <= MOST_CHECKED:
        exact = [one.detach().double().requires_grad_() for one in (hidden, weight)]
        check_results("the loss", run(), step(oracle, (*exact, labels))())
    return run


# Whole models


class Shape(NamedTuple):
    """Sizes of a vision encoder and a text model, in the names of their configurations."""

    vision: dict[str, Any]
    text: dict[str, Any]


def composed(shape: Shape) -> Any:
    """NaViT with a Qwen2 text model."""
    vision = NaViTConfig(**shape.vision, patch_size=PATCH, spatial_merge_size=MERGE)
    text = Qwen2Config(**shape.text, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return compose(vision, text, "patch_merger", image_token_id=IMAGE_TOKEN).to(torch.bfloat16)


def native(shape: Shape) -> Any:
    """Qwen2-VL of the same shape."""
    vision, text = shape
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    axes = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]  # [16, 24, 24] in the published models
    config = Qwen2VLConfig(
        vision_config={
            "depth": vision["num_hidden_layers"],
            "embed_dim": vision["hidden_size"],
            "mlp_ratio": vision["intermediate_size"] // vision["hidden_size"],
            "num_heads": vision["num_attention_heads"],
            "hidden_size": text["hidden_size"],
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 1,
        },
        text_config={
            **text,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": axes},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        tie_word_embeddings=True,
        image_token_id=IMAGE_TOKEN,
    )
    return Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)


MODELS: dict[str, Callable[[Shape], Any]] = {"NaViT and Qwen2, composed": composed, "native Qwen2-VL": native}


def batch_of(shape: Shape, samples: int, length: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Samples of one length, which begin with an image, as the processors of both models give them."""
    rows, columns = grid
    ids = torch.randint(IMAGE_TOKEN + 1, shape.text["vocab_size"], (samples, length))
    ids[:, 1 : 1 + rows * columns // MERGE**2] = IMAGE_TOKEN
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(samples * rows * columns, 3 * PATCH**2).to(torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * samples),
    }


def inputs_for(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch, with the kinds of tokens that the native model asks for."""
    if isinstance(model, Qwen2VLForConditionalGeneration):
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).int()}
    return batch


def training_run(make: Callable[[Shape], Any], shape: Shape, batch: dict[str, Tensor]) -> Run:
    """Forward, backward and AdamW, once the loss has been finite."""
    model = make(shape).train()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)
    inputs = {**inputs_for(model, batch), "labels": labels, "use_cache": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> Tensor:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    if not run().isfinite():
        raise RuntimeError("the loss is not finite")
    return run


def generating_run(make: Callable[[Shape], Any], shape: Shape, batch: dict[str, Tensor], tokens: int) -> Run:
    """Greedy decoding of so many tokens, by `generate`."""
    model = make(shape).eval()
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    return partial(model.generate, **inputs_for(model, batch), **options)


def model_flops(shape: Shape, samples: int, length: int, grid: tuple[int, int], head: bool = True) -> Flops:
    """Operations of the composed model for a batch; without the head those of a first token."""
    with torch.device("meta"):
        model = composed(shape)
    pack = Pack(samples * length, length, samples, grid, tokens_of_image(model, grid))
    return count_flops([unit for unit in get_units(model, pack) if head or unit.name != "lm_head"])


def text_bytes(shape: Shape) -> int:
    """Bytes of the text model, which every step of decoding reads; the head is that of the embeddings."""
    with torch.device("meta"):
        return sum(one.nbytes for one in composed(shape).model.language_model.parameters())


# Attention


ATTENTION: dict[str, Callable[..., Tensor]] = {
    "vlparts::varlen_attention": torch.ops.vlparts.varlen_attention,
    "SDPA, segment by segment": packed_attention_reference,
}


def attention_errors(
    lengths: Sequence[int], heads: int, width: int, dtype: torch.dtype, causal: bool, device: torch.device
) -> tuple[dict[str, list[float] | str], str]:
    """Errors of packed attention and its gradients against float64, and the kernel of ours.

    Args:
        lengths: tokens of each segment.
        heads: number of heads.
        width: channels of a head.
        dtype: of the inputs, which float64 gets too.
        causal: whether queries attend only to keys up to their own position.
        device: where all of it runs.

    Returns:
        For the operation and for SDPA segment by segment, the root mean square of the error of the output and of the
        gradients of query, key and value, relative to that of the exact values; or the reason why there are none.
    """
    with device:
        *qkv, direction = torch.randn(4, sum(lengths), heads, width).to(dtype)
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    arguments = (bounds, bounds, max(lengths), max(lengths), None, causal)

    def results(attention: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        inputs = [one.to(kind).requires_grad_() for one in qkv]
        output = attention(*inputs, *arguments)
        return [output.detach(), *torch.autograd.grad(output, inputs, direction.to(kind))]

    exact = results(packed_attention_reference, torch.float64)

    def errors(attention: Callable[..., Tensor]) -> list[float]:
        found = zip(results(attention, dtype), exact, strict=True)
        return [relative_error(one, right) for one, right in found]

    flash = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and varlen_applies(*qkv)
    found = {name: attempt(partial(errors, attention)) for name, attention in ATTENTION.items()}
    return found, "flash attention" if flash else "other"
