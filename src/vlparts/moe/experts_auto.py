"""The experts implementation `vlparts_auto`: the fastest of all, by measured cost.

The first call with a new number of tokens (in steps of a fifth), type, shape or device times every implementation on
that call's own tokens and weights, and later calls of the kind take the fastest.

Shapes: T tokens, K experts of a token, E experts, H width, I inner width of an expert.
"""

import statistics
import time
from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface, batched_mm_experts_forward, grouped_mm_experts_forward

from .expert_weights import check_routing, get_expert_weights
from .experts_dense import MERGED_EXPERTS_NAME, merged_experts_forward
from .experts_sorted import SORTED_EXPERTS_NAME, sorted_experts_forward

AUTO_EXPERTS_NAME = "vlparts_auto"

ROUNDS = 5
# Each kind covers numbers of tokens up to this many times its smallest; below some 5 tokens, one number.
STEP = 1.2
# An implementation that takes so many times as long as the best so far is not timed again.
HOPELESS = 1.5
# Copies of weights that `batched_mm` makes, in bytes, and products of `vlparts_merged` for each one that is needed,
# beyond which they are not tried: they cannot win there, and take memory or minutes.
MOST_COPIES = 2**30
MOST_EXTRA_TOKENS = 8

Forward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
_chosen: dict[tuple[Any, ...], str] = {}
_costs: dict[tuple[Any, ...], dict[str, float]] = {}
_refused: dict[tuple[Any, ...], dict[str, str]] = {}


def auto_experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of the experts of each token, by the fastest implementation for such a call.

    Args:
        module: An experts module of transformers' layout.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)` int64; E marks an expert of another process.
        top_k_weights: `(T, K)`.

    Returns:
        `(T, H)` in the type of `hidden_states`.

    Raises:
        ValueError: If shapes do not fit, or (on CPU) an index is out of range.
    """
    if torch.compiler.is_compiling():
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    weights = get_expert_weights(module, AUTO_EXPERTS_NAME)
    check_routing(hidden_states, top_k_index, top_k_weights, len(weights.up))
    arguments = (module, hidden_states, top_k_index, top_k_weights)
    trains = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden_states, top_k_weights, *weights[:4])
    )
    key = _kind(*arguments, weights.up, trains)
    if key not in _chosen:
        _costs[key], _refused[key] = _measure(_candidates(*arguments, weights.up), arguments, trains)
        _chosen[key] = min(_costs[key], key=_costs[key].__getitem__)
    return _implementations(module)[_chosen[key]](*arguments)


def expert_costs() -> list[dict[str, Any]]:
    """What was measured so far.

    Returns:
        For each kind of call: "device", "dtype", "tokens" (the smallest number of the kind), "experts", "trains",
        "chosen", "seconds" of every implementation that was timed, and "refused", the errors of those that did not
        take the call.
    """
    return [
        {
            "device": key[0],
            "dtype": key[1],
            "tokens": _fewest(key[4]),
            "experts": key[3][0],
            "trains": key[-1],
            "chosen": _chosen[key],
            "seconds": dict(costs),
            "refused": dict(_refused[key]),
        }
        for key, costs in _costs.items()
    ]


def forget_expert_costs() -> None:
    """Measure anew from now on, as after a change of the number of threads."""
    for table in (_chosen, _costs, _refused):
        table.clear()


def _kind(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, up: Tensor, trains: bool
) -> tuple[Any, ...]:
    tokens, k = top_k_index.shape
    step = -1 if tokens == 0 else round(log(tokens) / log(STEP))
    layout = (type(module), getattr(module, "is_transposed", False), torch.get_num_threads())
    return hidden_states.device.type, up.dtype, layout, tuple(up.shape), step, k, trains


def _fewest(step: int) -> int:
    """The smallest number of tokens of a kind."""
    tokens = max(0, int(STEP ** (step - 0.5)))
    while step >= 0 and (tokens == 0 or round(log(tokens) / log(STEP)) < step):
        tokens += 1
    return tokens


def _implementations(module: Any) -> dict[str, Forward]:
    own = getattr(type(module).forward, "__wrapped__", None)
    found: dict[str, Forward] = {
        SORTED_EXPERTS_NAME: sorted_experts_forward,
        "grouped_mm": grouped_mm_experts_forward,
        MERGED_EXPERTS_NAME: merged_experts_forward,
        "batched_mm": batched_mm_experts_forward,
    }
    return found if own is None else {**found, "eager": own}


def _candidates(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, up: Tensor
) -> dict[str, Forward]:
    """The implementations that may win."""
    found = _implementations(module)
    pairs = top_k_index.numel()
    if pairs * up[0].numel() * up.element_size() > MOST_COPIES:
        del found["batched_mm"]
    if pairs > MOST_EXTRA_TOKENS * len(up):
        del found[MERGED_EXPERTS_NAME]
    return found


def _measure(
    candidates: dict[str, Forward], arguments: tuple[Any, ...], trains: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of each candidate, in turn; and the errors of those that refuse the call."""
    runs: dict[str, Callable[[], None]] = {}
    refused: dict[str, str] = {}
    for name, forward in candidates.items():
        run = _with_gradients(forward, arguments) if trains else _without(forward, arguments)
        try:
            run()
        except (RuntimeError, ValueError) as error:  # grouped_mm: widths, float64 on CPU, strides of gradients
            if name == SORTED_EXPERTS_NAME:  # which takes what any does
                raise
            refused[name] = f"{type(error).__name__}: {error}"
            continue
        runs[name] = run
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        best = min((min(times) for times in seconds.values() if times), default=float("inf"))
        for name, run in runs.items():
            if not seconds[name] or min(seconds[name]) < HOPELESS * best:
                seconds[name].append(_time(run, arguments[1].device))
    return {name: statistics.median(times) for name, times in seconds.items()}, refused


def _without(forward: Forward, arguments: tuple[Any, ...]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            forward(*arguments)

    return run


def _with_gradients(forward: Forward, arguments: tuple[Any, ...]) -> Callable[[], None]:
    """Forward and backward on copies of the inputs, which leaves no gradient anywhere."""
    module, hidden_states, top_k_index, top_k_weights = arguments
    inputs = [hidden_states.detach().requires_grad_(), top_k_weights.detach().requires_grad_()]
    wanted = [*inputs, *(parameter for parameter in module.parameters() if parameter.requires_grad)]

    def run() -> None:
        with torch.enable_grad():
            output = forward(module, inputs[0], top_k_index, inputs[1])
            torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)

    return run


def _time(run: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if AUTO_EXPERTS_NAME not in ExpertsInterface():
    ExpertsInterface.register(AUTO_EXPERTS_NAME, auto_experts_forward)
