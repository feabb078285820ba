"""Two-dimensional rotary positions against complex numbers and against transformers' Qwen2-VL."""

import cmath

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from vlparts.parts.ops_rotary import apply_rotary, apply_rotary_pair, axial_rotary
from vlparts.parts.packed_index import get_position_ids

POSITIONS = get_position_ids(torch.tensor([[1, 3, 5], [2, 4, 2], [1, 1, 70]]))


def rotate_in_loops(tensor: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate each pair of channels as a complex number times e^(i angle)."""
    rotated, half = torch.empty_like(tensor), tensor.shape[-1] // 2
    for patch, place in enumerate(positions.tolist()):
        for head in range(tensor.shape[1]):
            for channel in range(half):
                axis, step = divmod(channel, half // 2)
                turn = cmath.exp(1j * place[axis] * theta ** (-2 * step / half))
                pair = turn * complex(tensor[patch, head, channel], tensor[patch, head, channel + half])
                rotated[patch, head, channel], rotated[patch, head, channel + half] = pair.real, pair.imag
    return rotated


@pytest.mark.parametrize(("head_dim", "theta"), [(4, 10000.0), (12, 100.0)])
def test_equals_complex_numbers(head_dim: int, theta: float) -> None:
    tensor = torch.randn(len(POSITIONS), 2, head_dim, dtype=torch.float64)
    rotated = apply_rotary(tensor, *axial_rotary(POSITIONS, head_dim, theta))
    # The angles are float32: at 69 patches off by about 4e-6.
    torch.testing.assert_close(rotated, rotate_in_loops(tensor, POSITIONS, theta), atol=2e-5, rtol=0)


def their_angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of transformers' Qwen2-VL, whose interface depends on the version."""
    if hasattr(modeling_qwen2_vl, "Qwen2VLVisionRotaryEmbedding"):
        config = Qwen2VLVisionConfig(embed_dim=4 * head_dim, num_heads=4)
        return modeling_qwen2_vl.Qwen2VLVisionRotaryEmbedding(config)(torch.empty(0), positions)
    angles = modeling_qwen2_vl.VisionRotaryEmbedding(head_dim // 2)(positions)
    return angles.repeat(1, 2).cos(), angles.repeat(1, 2).sin()


@pytest.mark.parametrize("head_dim", [16, 80])
def test_angles_equal_qwen2_vl(head_dim: int) -> None:
    torch.testing.assert_close(axial_rotary(POSITIONS, head_dim), their_angles(POSITIONS, head_dim), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_qwen2_vl(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, len(POSITIONS), 3, 16).to(dtype).unbind()
    cos, sin = axial_rotary(POSITIONS, 16)
    expected = modeling_qwen2_vl.apply_rotary_pos_emb_vision(query, key, cos, sin)
    for ours, theirs in zip((query, key), expected, strict=True):
        rotated = apply_rotary(ours, cos, sin)
        assert rotated.dtype == dtype
        torch.testing.assert_close(rotated, theirs)


def test_gradients_equal_rotate_half() -> None:
    """Formula of Qwen2-VL in float64; its own function rounds to float32."""
    tensor = torch.randn(len(POSITIONS), 3, 16, dtype=torch.float64, requires_grad=True)
    cos, sin = axial_rotary(POSITIONS, 16)
    expected = tensor * cos[:, None] + modeling_qwen2_vl.rotate_half(tensor) * sin[:, None]
    rotated = apply_rotary(tensor, cos, sin)
    torch.testing.assert_close(rotated, expected, atol=1e-14, rtol=1e-14)
    grad = torch.randn_like(tensor)
    ours, theirs = (torch.autograd.grad(output, tensor, grad) for output in (rotated, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-14)


def test_queries_and_keys_may_be_rotated_together() -> None:
    """Slices of a fused projection are not contiguous."""
    qkv = torch.randn(len(POSITIONS), 3, 2, 8)
    cos, sin = axial_rotary(POSITIONS, 8)
    together = apply_rotary(qkv[:, :2].flatten(1, 2), cos, sin)
    apart = torch.cat([apply_rotary(qkv[:, index], cos, sin) for index in (0, 1)], dim=1)
    torch.testing.assert_close(together, apart, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_is_one_rotation_after_the_other(dtype: torch.dtype) -> None:
    """To the bit, with gradients and another number of key heads."""
    angles = axial_rotary(POSITIONS, 8)
    query, key = (torch.randn(len(POSITIONS), heads, 8).to(dtype).requires_grad_() for heads in (4, 2))
    found = []
    for outputs in (
        apply_rotary_pair(query, key, *angles),
        (apply_rotary(query, *angles), apply_rotary(key, *angles)),
    ):
        assert [x.dtype for x in outputs] == [dtype, dtype]
        found.append([*outputs, *torch.autograd.grad(outputs, (query, key), [x.detach().cos() for x in outputs])])
    torch.testing.assert_close(*found, atol=0, rtol=0)


def test_types_and_no_patches() -> None:
    cos, sin = axial_rotary(POSITIONS[:0], 8)
    assert cos.shape == sin.shape == (0, 8)
    assert cos.dtype == sin.dtype == torch.float32
    assert apply_rotary(torch.empty(0, 3, 8), cos, sin).shape == (0, 3, 8)


@pytest.mark.parametrize("pair", [False, True])
def test_compiles_in_one_graph_for_all_sizes(pair: bool) -> None:
    def rotate(tensor: Tensor, positions: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        angles = axial_rotary(positions, tensor.shape[-1])
        return apply_rotary_pair(tensor, tensor[:, :1], *angles) if pair else apply_rotary(tensor, *angles)

    torch.compiler.reset()
    compiled = torch.compile(rotate, backend="eager", fullgraph=True, dynamic=True)
    for length in (7, 12, 30):
        with torch.compiler.set_stance("default" if length == 7 else "fail_on_recompile"):
            tensor = torch.randn(length, 2, 8)
            torch.testing.assert_close(compiled(tensor, POSITIONS[:length]), rotate(tensor, POSITIONS[:length]))


@pytest.mark.parametrize("head_dim", [-4, 0, 2, 6, 81])
def test_head_dims_without_four_equal_parts_are_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"`head_dim` must be a positive multiple of 4, got {head_dim}"):
        axial_rotary(POSITIONS, head_dim)


@pytest.mark.parametrize("theta", [0.0, -1.0])
def test_thetas_that_are_no_base_are_refused(theta: float) -> None:
    with pytest.raises(ValueError, match=f"`theta` must be positive, got {theta}"):
        axial_rotary(POSITIONS, 8, theta)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (1, 5, 2)])
def test_positions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`position_ids` must have shape"):
        axial_rotary(torch.zeros(shape, dtype=torch.int64), 8)


@pytest.mark.parametrize("shape", [(5, 8), (4, 2, 8), (5, 2, 12), (1, 5, 2, 8)])
def test_tensors_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    cos, sin = axial_rotary(POSITIONS[:5], 8)
    with pytest.raises(ValueError, match="`tensor`, `cos` and `sin` must have shapes"):
        apply_rotary(torch.zeros(shape), cos, sin)
    with pytest.raises(ValueError, match="`tensor`, `cos` and `sin` must have shapes"):
        apply_rotary(torch.zeros(5, 2, 8), cos, sin[:, :4])


@pytest.mark.parametrize("name", ["query", "key"])
def test_pairs_of_another_shape_are_refused(name: str) -> None:
    cos, sin = axial_rotary(POSITIONS[:5], 8)
    pair = {"query": torch.zeros(5, 2, 8), "key": torch.zeros(5, 1, 8), name: torch.zeros(4, 2, 8)}
    with pytest.raises(ValueError, match=rf"`{name}`, `cos` and `sin` must have shapes .* got \(4, 2, 8\)"):
        apply_rotary_pair(**pair, cos=cos, sin=sin)
