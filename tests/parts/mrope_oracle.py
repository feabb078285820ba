"""Three-axis positions token by token, and a decoder of the openPangu kind with loops over heads and tokens."""

import cmath

import torch
from torch import Tensor

from vlparts import PanguEmbeddedForCausalLM

TEXT_ID, GAP_ID, IMAGE_ID, VIDEO_ID, PAD_ID = 5, 6, 8, 9, 0
Item = tuple[str, tuple[int, ...]]


class Layout:
    """A text with images and videos, written token by token: the tokens, their positions and the grids.

    Items are ("text", (tokens,)), ("image", (frames, rows, columns)) and ("video", (frames, rows, columns, gap)), in
    tokens, `gap` text tokens between two frames.
    """

    def __init__(self, items: list[Item], merge_size: int = 1) -> None:
        self.ids: list[int] = []
        self.positions: list[tuple[int, int, int]] = []
        self.grids: dict[str, list[list[int]]] = {"image": [], "video": []}
        for kind, sizes in items:
            if kind == "text":
                self.write_text(TEXT_ID, sizes[0])
                continue
            frames, rows, columns = sizes[:3]
            self.grids[kind].append([frames, rows * merge_size, columns * merge_size])
            for frame in range(frames):
                self.write_text(GAP_ID, sizes[3] if frame and kind == "video" else 0)
                self.write_frame(IMAGE_ID if kind == "image" else VIDEO_ID, rows, columns)

    def following(self) -> int:
        return 1 + max((max(places) for places in self.positions), default=-1)

    def write_text(self, token: int, count: int) -> None:
        for _ in range(count):
            self.positions.append((self.following(),) * 3)
            self.ids.append(token)

    def write_frame(self, token: int, rows: int, columns: int) -> None:
        start = self.following()
        for row in range(rows):
            for column in range(columns):
                self.positions.append((start, start + row, start + column))
                self.ids.append(token)


def batch_of(layouts: list[Layout], padding: list[tuple[int, int]]) -> tuple[dict[str, Tensor | None], Tensor]:
    """Arguments for the layouts as one batch, padded to a common length.

    Args:
        layouts: One for each sample.
        padding: For each sample, how much more padding it has than it needs on the left, and on the right.

    Returns:
        The tensors, and the expected positions `(3, B, S)` with 0 at padding.
    """
    longest = max(left + len(one.ids) + right for one, (left, right) in zip(layouts, padding, strict=True))
    input_ids = torch.full((len(layouts), longest), PAD_ID)
    mask, expected = torch.zeros_like(input_ids), torch.zeros(3, *input_ids.shape, dtype=torch.int64)
    for sample, (layout, (left, _)) in enumerate(zip(layouts, padding, strict=True)):
        for place, (token, positions) in enumerate(zip(layout.ids, layout.positions, strict=True), start=left):
            input_ids[sample, place], mask[sample, place] = token, 1
            expected[:, sample, place] = torch.tensor(positions)
    inputs: dict[str, Tensor | None] = {"input_ids": input_ids, "attention_mask": mask}
    for kind in ("image", "video"):
        rows = [row for one in layouts for row in one.grids[kind]]
        inputs[f"{kind}_grid_thw"] = torch.tensor(rows) if rows else None
    return inputs, expected


def rotate(heads: Tensor, positions: Tensor, theta: float, axes: list[int]) -> Tensor:
    """Rotate `(S, H, D)` as complex numbers: channel c with c + D/2, by the position on the frequency's axis."""
    half = heads.shape[-1] // 2
    turns = torch.tensor(
        [
            [cmath.exp(1j * places[axis] * theta ** (-slot / half)) for slot, axis in enumerate(axes)]
            for places in positions.T.tolist()
        ],
        dtype=torch.complex128,
    )
    turned = torch.complex(heads[..., :half], heads[..., half:]) * turns[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def logits_in_loops(model: PanguEmbeddedForCausalLM, input_ids: Tensor, positions: Tensor, axes: list[int]) -> Tensor:
    """The logits `(S, vocabulary)` of one text, in float64.

    Args:
        model: With float64 weights, which are read only.
        input_ids: `(S,)`.
        positions: `(3, S)`.
        axes: The axis of each frequency.
    """
    config, weights = model.config, dict(model.named_parameters())
    theta, groups = config.rope_parameters["rope_theta"], config.num_attention_heads // config.num_key_value_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))

    hidden = weights["model.embed_tokens.weight"][input_ids]
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        normed = norm(hidden, f"{layer}.input_layernorm")
        query, key, value = (
            linear(normed, f"{layer}.self_attn.{name}_proj").unflatten(-1, (-1, config.head_dim)) for name in "qkv"
        )
        query, key = rotate(query, positions, theta, axes), rotate(key, positions, theta, axes)
        rows = []
        for token in range(len(input_ids)):
            heads = []
            for head in range(config.num_attention_heads):
                seen = slice(0, token + 1)
                scores = key[seen, head // groups] @ query[token, head] / config.head_dim**0.5
                heads.append(scores.softmax(0) @ value[seen, head // groups])
            rows.append(torch.cat(heads))
        hidden = hidden + linear(torch.stack(rows), f"{layer}.self_attn.o_proj")
        normed = norm(hidden, f"{layer}.post_attention_layernorm")
        gate = linear(normed, f"{layer}.mlp.gate_proj")
        hidden = hidden + linear(
            gate * torch.sigmoid(gate) * linear(normed, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj"
        )
    return linear(norm(hidden, "model.norm"), "lm_head")
