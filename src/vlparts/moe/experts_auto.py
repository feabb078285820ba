"""The experts implementation `vlparts_auto`: the fastest implementation, by measurement.

The first call with a new device, dtype, shape or number of tokens (in steps of 20 %) times every implementation on
that call's own tokens and weights. Later calls with the same key use the fastest.

Shapes: T tokens, K experts per token, E experts, H width, I intermediate size of an expert.
"""

import statistics
import time
from collections.abc import Callable
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from ..parts.moe_experts import check_routing
from .expert_weights import get_expert_weights
from .experts_dense import MERGED_EXPERTS_NAME, merged_experts_forward
from .experts_sorted import SORTED_EXPERTS_NAME, sorted_experts_forward

AUTO_EXPERTS_NAME = "vlparts_auto"

# Timed runs per implementation, of which the median counts.
ROUNDS = 5
# Largest ratio of token counts that share a measurement. Below about 5 tokens each count has its own.
TOKEN_STEP = 1.2
# An implementation this many times slower than the fastest so far is not timed again.
DROP_RATIO = 1.5
# Limits beyond which an implementation is not tried, since it cannot win and would take much memory or minutes: bytes
# of weights that `batched_mm` copies, and token-expert pairs per expert for `vlparts_merged`.
MAX_COPIED_BYTES = 2**30
MAX_PAIRS_PER_EXPERT = 8

Forward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class _Measurement(NamedTuple):
    """Result for one kind of call.

    Attributes:
        chosen: Name of the fastest implementation.
        seconds: Median time of each implementation that accepts the call.
        refused: Error message of each implementation that does not.
    """

    chosen: str
    seconds: dict[str, float]
    refused: dict[str, str]


class _Key(NamedTuple):
    """What a measurement depends on."""

    device: str
    dtype: torch.dtype
    layout: tuple[Any, ...]
    shape: tuple[int, ...]
    token_step: int
    experts_per_token: int
    trains: bool


_measurements: dict[_Key, _Measurement] = {}


def auto_experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the weighted sum of each token's experts with the fastest implementation.

    Args:
        module: An experts module in transformers' layout.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)` int64; under expert parallelism E marks an expert of another process.
        top_k_weights: `(T, K)`.

    Returns:
        `(T, H)` in the type of `hidden_states`.

    Raises:
        ValueError: If shapes do not fit, or (on CPU) an index is out of range.
    """
    if torch.compiler.is_compiling():
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    weights = get_expert_weights(module, AUTO_EXPERTS_NAME)
    check_routing(module, hidden_states, top_k_index, top_k_weights)
    arguments = (module, hidden_states, top_k_index, top_k_weights)
    trains = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden_states, top_k_weights, *weights[:4])
    )
    key = _key(*arguments, weights.up, trains)
    if key not in _measurements:
        _measurements[key] = _measure(_candidates(module, top_k_index, weights.up), arguments, trains)
    return _implementations(module)[_measurements[key].chosen](*arguments)


def expert_costs() -> list[dict[str, Any]]:
    """Return the measurements so far.

    Returns:
        Per kind of call: "device", "dtype", "tokens" (the smallest number of tokens of the kind), "experts",
        "trains", "chosen", "seconds" of each implementation that was timed, and "refused", the errors of those that do
        not accept the call.
    """
    return [
        {
            "device": key.device,
            "dtype": key.dtype,
            "tokens": _smallest_count(key.token_step),
            "experts": key.shape[0],
            "trains": key.trains,
            "chosen": found.chosen,
            "seconds": dict(found.seconds),
            "refused": dict(found.refused),
        }
        for key, found in _measurements.items()
    ]


def forget_expert_costs() -> None:
    """Discard all measurements, so that later calls measure again."""
    _measurements.clear()


def _key(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, up: Tensor, trains: bool
) -> _Key:
    tokens, experts_per_token = top_k_index.shape
    layout = (type(module), getattr(module, "is_transposed", False), torch.get_num_threads())
    return _Key(
        hidden_states.device.type, up.dtype, layout, tuple(up.shape), _token_step(tokens), experts_per_token, trains
    )


def _token_step(tokens: int) -> int:
    """Return the number of tokens on a logarithmic scale, -1 for no token."""
    return -1 if tokens == 0 else round(log(tokens) / log(TOKEN_STEP))


def _smallest_count(step: int) -> int:
    """Return the smallest number of tokens of a step."""
    tokens = max(0, int(TOKEN_STEP ** (step - 0.5)))
    while _token_step(tokens) < step:
        tokens += 1
    return tokens


def _implementations(module: Any) -> dict[str, Forward]:
    eager = getattr(type(module).forward, "__wrapped__", None)
    found: dict[str, Forward] = {
        SORTED_EXPERTS_NAME: sorted_experts_forward,
        "grouped_mm": grouped_mm_experts_forward,
        MERGED_EXPERTS_NAME: merged_experts_forward,
        "batched_mm": batched_mm_experts_forward,
    }
    return found if eager is None else {**found, "eager": eager}


def _candidates(module: Any, top_k_index: Tensor, up: Tensor) -> dict[str, Forward]:
    """Return the implementations worth timing."""
    found = _implementations(module)
    pairs = top_k_index.numel()
    if pairs * up[0].numel() * up.element_size() > MAX_COPIED_BYTES:
        del found["batched_mm"]
    if pairs > MAX_PAIRS_PER_EXPERT * len(up):
        del found[MERGED_EXPERTS_NAME]
    return found


def _measure(candidates: dict[str, Forward], arguments: tuple[Any, ...], trains: bool) -> _Measurement:
    """Time the candidates in turn, round by round."""
    runs: dict[str, Callable[[], None]] = {}
    refused: dict[str, str] = {}
    for name, forward in candidates.items():
        run = _training_run(forward, arguments) if trains else _inference_run(forward, arguments)
        try:
            run()
        except (RuntimeError, ValueError) as error:  # grouped_mm: widths, float64 on CPU, strides of gradients
            if name == SORTED_EXPERTS_NAME:  # which accepts whatever another accepts
                raise
            refused[name] = f"{type(error).__name__}: {error}"
            continue
        runs[name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        best = min((min(found) for found in times.values() if found), default=float("inf"))
        for name, run in runs.items():
            if not times[name] or min(times[name]) < DROP_RATIO * best:
                times[name].append(_time(run, arguments[1].device))
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return _Measurement(min(seconds, key=seconds.__getitem__), seconds, refused)


def _inference_run(forward: Forward, arguments: tuple[Any, ...]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            forward(*arguments)

    return run


def _training_run(forward: Forward, arguments: tuple[Any, ...]) -> Callable[[], None]:
    """Return a forward and backward pass that accumulates no gradient."""
    module, hidden_states, top_k_index, top_k_weights = arguments
    inputs = [hidden_states.detach().requires_grad_(), top_k_weights.detach().requires_grad_()]
    leaves = [*inputs, *(parameter for parameter in module.parameters() if parameter.requires_grad)]

    def run() -> None:
        # The hooks shield this pass from those of gradient checkpointing, which count what is saved.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            output = forward(module, inputs[0], top_k_index, inputs[1])
            torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

    return run


def _time(run: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
