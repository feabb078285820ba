"""CPU kernels for the operations of `vlparts.parts`."""

import torch
from torch import Tensor

from ...parts import ops_activations, ops_attention, ops_linear, ops_rotary, packed_segments  # noqa: F401 (define the operations)
from ...parts.ops_rms_norm import rms_norm_reference
from .attention import packed_attention_cpu
from .linear import linear_cpu, linear_cpu_autograd, linear_out_cpu

# Largest activation of a pass, in bytes. Beyond about 32 MiB the C library returns memory to the system after every
# use, and allocating it again costs more than the arithmetic: with 2,000 to 8,000 tokens per pass, a ViT-S takes 0.8
# of its time with 14,000 (2 cores of a Zen 5, float32 and bfloat16, inference). On an Intel Xeon 16 MiB take 0.9 of
# the time of 24 in bfloat16 and as long in float32; 2 MiB take 1.7 and 1.3 times as long.
ACTIVATION_BYTES = 16 * 2**20

# Rows per chunk of RMS normalization, so that their float32 copies stay in the cache and in reused memory: 4,784 rows
# of 1,280 channels take a seventh (float32) and a fifth (bfloat16) of the reference's time (2 cores of a Zen 5).
# Chunks of 64 to 1,024 rows differ by a fifth.
RMS_NORM_CHUNK_SIZE = 1024

# Up to this many elements, which fit in the cache, the reference is as fast or faster.
RMS_NORM_REFERENCE_UP_TO = 2**18


def register() -> None:
    """Register the kernels with PyTorch's dispatcher.

    A kernel at the CPU key alone would hide the reference's autograd, so each is registered at both keys.
    """
    both, impl = ("CPU", "AutogradCPU"), torch.library.impl
    impl("vlparts::varlen_attention", both, packed_attention_cpu)
    impl("vlparts::linear", "CPU", linear_cpu)
    impl("vlparts::linear", "AutogradCPU", linear_cpu_autograd)
    impl("vlparts::linear", "AutocastCPU", torch.nn.functional.linear)  # casts the inputs to one dtype
    impl("vlparts::linear_out", both, linear_out_cpu)
    impl("vlparts::rms_norm", both, rms_norm_cpu)
    impl("vlparts::tokens_per_pass", both, tokens_per_pass_cpu)


def tokens_per_pass_cpu(hidden_states: Tensor, width: int) -> int:
    """Number of tokens whose activations of `width` channels take [`ACTIVATION_BYTES`]."""
    return max(1, ACTIVATION_BYTES // (width * hidden_states.element_size()))


def rms_norm_cpu(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS normalization in chunks of rows; arguments and result are those of [`rms_norm_reference`]."""
    needs_grad = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
    plain = hidden_states.dtype == weight.dtype and hidden_states.dtype in (torch.float32, torch.bfloat16)
    few = hidden_states.numel() <= RMS_NORM_REFERENCE_UP_TO
    if few or needs_grad or not plain or not hidden_states.is_contiguous():
        return rms_norm_reference(hidden_states, weight, eps)
    output = torch.empty_like(hidden_states)
    norms = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=torch.float32)
    factors = norms.square_().div_(hidden_states.shape[-1]).add_(eps).rsqrt_()
    chunks = (x.flatten(0, -2).split(RMS_NORM_CHUNK_SIZE) for x in (hidden_states, factors, output))
    for rows, factor, target in zip(*chunks, strict=True):
        target.copy_(rows * factor).mul_(weight)
    return output
