"""Two-dimensional axial rotary position embedding (RoPE) of packed images, as in Qwen2-VL's vision tower.

The rotation is the torch operation `vlparts::rotary`, that of queries with keys `vlparts::rotary_pair`, whose kernels
PyTorch's dispatcher picks. Another package gives a device its own by registering one at the device's key and at its
Autograd key.

Shapes: `L` patches of all images, `H` heads, `D` channels of a head.
"""

import torch
from torch import Tensor

from .ops_library import define_operation


def axial_rotary(position_ids: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Angles by which the channels of a head are rotated, from the row and the column of each patch.

    Frequency i of D/4 is theta^(-2i / (D/2)). The first D/4 angles are those of the row, the next D/4 those of the
    column, and the second half of the head repeats the first: channel c is rotated together with channel c + D/2.
    The layout is that of Qwen2-VL and Qwen2.5-VL (arXiv 2409.12191, section 2.1), whose weights therefore fit.

    Args:
        position_ids: `(L, 2)` integers, row and column of each patch in its own image.
        head_dim: Channels D of a head, a multiple of 4.
        theta: Base of the frequencies, above 0.

    Returns:
        Cosines and sines, each `(L, D)` float32.

    Raises:
        ValueError: If `head_dim` is not a positive multiple of 4, `theta` not positive, or `position_ids` of another
            shape.
    """
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"`head_dim` must be a positive multiple of 4, got {head_dim}.")
    if theta <= 0:
        raise ValueError(f"`theta` must be positive, got {theta}.")
    if position_ids.ndim != 2 or position_ids.shape[1] != 2:
        raise ValueError(f"`position_ids` must have shape (patches, 2), got {tuple(position_ids.shape)}.")
    axis_dim = head_dim // 2
    exponents = torch.arange(0, axis_dim, 2, dtype=torch.float32, device=position_ids.device) / axis_dim
    angles = (position_ids.float().unsqueeze(-1) * (1.0 / theta**exponents)).flatten(1)
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def apply_rotary(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (c, c + D/2) of queries or keys.

    Queries and keys of one projection may be rotated together, as `2 * H` heads.

    Args:
        tensor: `(L, H, D)`.
        cos: `(L, D)` from [`axial_rotary`], so that its halves are equal.
        sin: `(L, D)`.

    Returns:
        `(L, H, D)` in the dtype of `tensor`; computed in float32 at least.

    Raises:
        ValueError: If the shapes do not belong together.
    """
    _check_shapes("tensor", tensor, cos, sin)
    if torch.compiler.is_compiling():
        return rotary_reference(tensor, cos, sin)
    return torch.ops.vlparts.rotary(tensor, cos, sin)


def apply_rotary_pair(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the same angles, each as [`apply_rotary`] does.

    A device may rotate both at once, where they stand side by side in the result of one projection. On CPU that would
    be slower.

    Args:
        query: `(L, H, D)`.
        key: `(L, K, D)` with K heads.
        cos: `(L, D)` from [`axial_rotary`], so that its halves are equal.
        sin: `(L, D)`.

    Returns:
        `(L, H, D)` and `(L, K, D)` in their own dtypes; computed in float32 at least.

    Raises:
        ValueError: If the shapes do not belong together.
    """
    for name, tensor in (("query", query), ("key", key)):
        _check_shapes(name, tensor, cos, sin)
    if torch.compiler.is_compiling():
        return rotary_reference(query, cos, sin), rotary_reference(key, cos, sin)
    return torch.ops.vlparts.rotary_pair(query, key, cos, sin)


def _check_shapes(name: str, tensor: Tensor, cos: Tensor, sin: Tensor) -> None:
    if tensor.ndim != 3 or cos.shape != sin.shape or cos.shape != (tensor.shape[0], tensor.shape[2]):
        raise ValueError(
            f"`{name}`, `cos` and `sin` must have shapes (patches, heads, channels), (patches, channels) and "
            f"(patches, channels), got {tuple(tensor.shape)}, {tuple(cos.shape)} and {tuple(sin.shape)}."
        )


def rotary_reference(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation on every device; arguments and result are those of [`apply_rotary`], which checks them."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    half = tensor.shape[-1] // 2
    cos, sin = cos[:, None, None, :half].to(dtype), sin[:, :half].to(dtype)
    signed = torch.stack((-sin, sin), dim=1).unsqueeze(1)
    pairs = tensor.to(dtype).unflatten(-1, (2, half))
    # (a, b) -> (a cos, b cos) + (b, a) * (-sin, sin): fewer passes over memory than halves put together again.
    return torch.addcmul(pairs * cos, pairs.flip(-2), signed).flatten(-2).to(tensor.dtype)


def rotary_pair_reference(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """One rotation after the other; arguments and result are those of [`apply_rotary_pair`], which checks them."""
    rotary = torch.ops.vlparts.rotary
    return rotary(query, cos, sin), rotary(key, cos, sin)


define_operation("rotary(Tensor input, Tensor cos, Tensor sin) -> Tensor", rotary_reference)
define_operation(
    "rotary_pair(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)", rotary_pair_reference
)
