"""The plan of a training run: whether it fits into memory, how it is best divided, and how long it takes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ...checkpoints.points15 import points15_config, points15_presets
from ...composition import compose
from ...parts.modeling_vlm import VisionLanguageForConditionalGeneration
from ..building import choose_trained, config_errors, load_model, make_tower
from ..config import COMPOSITION_FIELDS, REDUCTION_FIELDS, TrainConfig
from ..preparation import prepare
from .activations import Precision, count_kept
from .flops import Flops, count_flops
from .memory import Memory, Strategy, count_memory, count_parameters
from .packs import Pack, make_pack
from .units import experts_share, get_units, is_experts

COMPOSED_PRESETS: dict[str, dict[str, Any]] = {
    "openpangu_vl_7b": {
        "vision": "windowfree:openpangu_vl_vit",
        "text": "pangu_embedded:openpangu_vl_7b",
        "projector": "multi_tap_merger",
        "projector_options": {"hidden_size": 3584},
    },
    "deepseek_ocr": {"vision": "deepencoder:deepseek_ocr", "text": "moge:deepseek_ocr", "projector": "deepseek_ocr"},
}
"""Published composed models by name, as settings of a training run; further ones are `points15_presets`."""


SAMPLED_IMAGES = 256
"""Number of samples, evenly over the file, whose images are measured."""


@dataclass(frozen=True)
class Run:
    """What is planned, beside the model.

    Args:
        devices: Number of devices.
        memory: Bytes of a device.
        capacity: Tokens of a pack.
        samples: Samples of an epoch.
        sample_tokens: Mean tokens of a sample, image tokens included.
        images_per_sample: Mean number of images of a sample.
        image_size: Mean width and height of an image in pixels.
        gradient_accumulation_steps: Packs of an optimizer step on each device.
        precision: "float32", "mixed" (Trainer's `bf16=True` with float32 parameters), or "bfloat16" (parameters too).
        optimizer: "adamw" or "muon".
        flops: Peak operations per second of a device.
        mfu: Share of them that training reaches.
        margin: Share of the memory that is left free for what is not counted.
    """

    devices: int
    memory: float
    capacity: int
    samples: float
    sample_tokens: float
    images_per_sample: float = 1.0
    image_size: tuple[int, int] = (640, 480)
    gradient_accumulation_steps: int = 1
    precision: Precision = "mixed"
    optimizer: str = "adamw"
    flops: float = 400e12
    mfu: float = 0.4
    margin: float = 0.1

    @property
    def usable(self) -> float:
        """Bytes of a device without the margin."""
        return self.memory * (1 - self.margin)


@dataclass(frozen=True)
class Estimate:
    """A strategy at a capacity.

    Args:
        strategy: The strategy.
        pack: A full pack.
        memory: Memory of a device.
        flops: Operations of a pack.
        fits: Whether the peak is within the memory of a device without the margin.
        seconds_per_step: Time of an optimizer step by operations alone, without communication.
        steps_per_epoch: Optimizer steps of an epoch, with full packs.
        flops_per_epoch: Operations of an epoch on all devices.
        hours_per_epoch: Time of an epoch.
    """

    strategy: Strategy
    pack: Pack
    memory: Memory
    flops: Flops
    fits: bool
    seconds_per_step: float
    steps_per_epoch: int
    flops_per_epoch: float
    hours_per_epoch: float


@dataclass(frozen=True)
class Plan:
    """A plan.

    Args:
        parameters: Numbers of parameters by part, see [`count_parameters`].
        estimates: The strategies that were tried, in order; the last is the first that fits, or the smallest.
        chosen: The first that fits; None if none does.
        reason: A sentence that says why.
    """

    parameters: dict[str, dict[str, float]]
    estimates: list[Estimate]
    chosen: Estimate | None
    reason: str


def build_model(settings: dict[str, Any]) -> VisionLanguageForConditionalGeneration:
    """Build a composed model on the meta device, with gradients for what is trained.

    Args:
        settings: `vision`, `text`, `model`, `projector`, `projector_options`, `train`, `freeze` and
            `trust_remote_code` of [`TrainConfig`][vlparts.training.config.TrainConfig]. `model` may also be one of
            [`COMPOSED_PRESETS`] or of `points15_presets`. Folders need no weights, and texts of new models have the
            vocabulary of their configuration.

    Raises:
        ValueError: If a setting is invalid.
    """
    name = str(settings.get("model", ""))
    if name in (*COMPOSED_PRESETS, *points15_presets()):
        given = [f"`{one}`" for one in COMPOSITION_FIELDS if one in settings]
        if given:
            raise ValueError(f"`model` replaces {', '.join(given)}; expected only one of the two.")
        settings = {**{key: one for key, one in settings.items() if key != "model"}, **COMPOSED_PRESETS.get(name, {})}
    config = TrainConfig(data="-", output=Path("-"), **settings)  # neither is read
    with torch.device("meta"):
        if name in points15_presets():
            model = VisionLanguageForConditionalGeneration(points15_config(name))
        elif config.model is not None:
            if not config.model.is_dir():
                known = ", ".join((*COMPOSED_PRESETS, *points15_presets()))
                raise ValueError(f"`model` must be one of {known}, or a folder, got {config.model}.")
            model = load_model(VisionLanguageForConditionalGeneration, config.model, "model", weights=False)
        else:
            vision = make_tower(config, "vision", config.vision, weights=False)
            text = make_tower(config, "text", config.text, weights=False, loader=AutoModelForCausalLM)
            with config_errors("projector"):
                reduction = {name: getattr(config, name) for name in REDUCTION_FIELDS}
                options = config.projector_options
                model = compose(vision, text, config.projector, projector_options=options, **reduction)
    choose_trained(model, config)
    return model


def estimate(model: Any, run: Run, strategy: Strategy) -> Estimate:
    """Estimate memory and time of a strategy.

    A step takes the operations of its packs on one device, divided by `flops * mfu`; devices work on packs of their
    own at the same time. Operations of checkpointing count, so that `mfu` is the share of the peak that the hardware
    runs at.

    Raises:
        ValueError: If samples do not fit into packs, or images into samples.
    """
    pack = make_pack(model, run.capacity, run.sample_tokens, run.images_per_sample, run.image_size)
    units = get_units(model, pack)
    flops = count_flops(units, strategy.checkpointing)
    kept = count_kept(units, run.precision, strategy.checkpointing)
    accumulates = run.gradient_accumulation_steps > 1
    memory = count_memory(model, kept, strategy, run.precision, run.optimizer, accumulates)
    seconds = run.gradient_accumulation_steps * flops.total / (run.flops * run.mfu)
    packs = run.samples / pack.samples
    steps = math.ceil(packs / (run.devices * run.gradient_accumulation_steps))
    return Estimate(
        strategy=strategy,
        pack=pack,
        memory=memory,
        flops=flops,
        fits=memory.peak <= run.usable,
        seconds_per_step=seconds,
        steps_per_epoch=steps,
        flops_per_epoch=packs * flops.total,
        hours_per_epoch=steps * seconds / 3600,
    )


def plan(model: Any, run: Run) -> Plan:
    """Find the first strategy that fits into memory.

    In order: DDP, FSDP2, FSDP2 with checkpointing, the same with the capacity halved as long as a sample fits, and for
    models with experts the same with expert parallelism, at full capacity first. On one device: plain, checkpointing,
    smaller capacities.

    Args:
        model: From [`build_model`].
        run: What is planned.

    Raises:
        ValueError: As [`estimate`], or if a number is not positive.
    """
    _check_run(run)
    tried: list[Estimate] = []
    for strategy, capacity in _ladder(model, run):
        tried.append(estimate(model, replace(run, capacity=capacity), strategy))
        if tried[-1].fits:
            break
    parameters = count_parameters(model, experts_share(model.config.text_config))
    chosen = tried[-1] if tried[-1].fits else None
    return Plan(parameters, tried, chosen, _reason(tried, run))


def _check_run(run: Run) -> None:
    for name in ("devices", "memory", "capacity", "samples", "sample_tokens", "gradient_accumulation_steps", "flops"):
        if not getattr(run, name) > 0:
            raise ValueError(f"`{name}` must be positive, got {getattr(run, name):g}.")
    if not 0 < run.mfu <= 1:
        raise ValueError(f"`mfu` must be above 0 and at most 1, got {run.mfu:g}.")
    if not 0 <= run.margin < 1:
        raise ValueError(f"`margin` must be at least 0 and below 1, got {run.margin:g}.")
    if run.images_per_sample < 0 or min(run.image_size) < 1:
        raise ValueError(
            "`images_per_sample` must be at least 0 and `image_size` positive, got "
            f"{run.images_per_sample:g} and {run.image_size[0]}x{run.image_size[1]}."
        )


def _ladder(model: Any, run: Run) -> Iterator[tuple[Strategy, int]]:
    plain = Strategy("ddp" if run.devices > 1 else "none", run.devices)
    yield plain, run.capacity
    if run.devices > 1:
        plain = replace(plain, sharding="fsdp2")
        yield plain, run.capacity
    rungs = [replace(plain, checkpointing=True)]
    ways = math.gcd(run.devices, _groups(model))
    if ways > 1:
        rungs.append(replace(rungs[0], expert_parallel=ways))
    for strategy in rungs:
        capacity = run.capacity
        while capacity >= run.sample_tokens:
            yield strategy, capacity
            capacity //= 2


def _groups(model: Any) -> int:
    """Largest number of devices that can share the experts of a layer: their groups if there are any; 1 without."""
    experts = [one.num_experts for one in model.modules() if is_experts(one)]
    if not experts:
        return 1
    return int(getattr(model.config.text_config, "num_expert_groups", None) or experts[0])


def _reason(tried: list[Estimate], run: Run) -> str:
    last, limit = tried[-1], f"{run.usable / 1e9:.0f} GB ({run.memory / 1e9:g} GB less {run.margin:.0%})"
    if last.fits:
        peak = f"its peak of {last.memory.peak / 1e9:.1f} GB is within {limit}"
        found = f"{_named(last, run)} is the first that fits: {peak}"
        if len(tried) == 1:
            return f"{found}."
        before = tried[-2]
        return f"{found}, that of {_named(before, run)}, {before.memory.peak / 1e9:.1f} GB, is not."
    best = min(tried, key=lambda one: one.memory.peak)
    missing = best.memory.peak - run.usable
    state = best.memory.parameters + best.memory.optimizer + best.memory.gradients
    share = (
        "most of it parameters, gradients and optimizer states, which more devices divide"
        if state > best.memory.peak / 2 and best.strategy.sharding == "fsdp2"
        else "which only larger devices, shorter samples, or training fewer parameters reduce"
    )
    if best.strategy.sharding != "fsdp2":
        share = "which more devices with FSDP2 divide"
    return (
        f"Nothing fits: the smallest, {_named(best, run)}, has a peak of {best.memory.peak / 1e9:.1f} GB, {share}; "
        f"{missing / 1e9:.1f} GB are missing beyond {limit}."
    )


def _named(one: Estimate, run: Run) -> str:
    return str(one.strategy) + (
        "" if one.pack.tokens == run.capacity else f" with packs of {one.pack.tokens:,} tokens"
    )


def measure_records(data: Path, model: Path) -> tuple[float, float, float, tuple[int, int]]:
    """Encode all records as training does, and measure them.

    Args:
        data: JSON Lines file of training records.
        model: Folder of a composed model with its processor; needs no weights.

    Returns:
        Mean tokens of a sample, the number of samples, mean number of images of a sample, and the width and height in
        pixels of the mean image after resizing: a square root of the mean number of patches in its mean proportion.

    Raises:
        RecordError: If a record is invalid.
        ValueError: If the images have no grids, as of encoders of images of one size.
    """
    config = TrainConfig(data=data, output=Path("-"), model=model, capacity=2**31 - 1, trainer={"use_cpu": True})
    prepared = prepare(config, weights=False)
    data_set: Any = prepared.data
    lengths = data_set.lengths
    total = len(lengths)
    step = max(1, total // SAMPLED_IMAGES)
    chosen = [sample.images or {} for sample in data_set[[*range(0, total, step)]]]
    grids = [one["image_grid_thw"].numpy() for one in chosen if "image_grid_thw" in one]
    if not grids and any(chosen):
        raise ValueError("`--data` requires an encoder whose images have grids; give --image-size instead.")
    mean = sum(lengths) / total
    if not grids:
        return mean, float(total), 0.0, (1, 1)
    sides = np.concatenate(grids)[:, 1:]
    area, (rows, columns) = sides.prod(1).mean(), sides.mean(0)
    vision: Any = prepared.model.config.vision_config
    scale = vision.patch_size * (area / (rows * columns)) ** 0.5
    return mean, float(total), len(sides) / len(chosen), (round(columns * scale), round(rows * scale))
