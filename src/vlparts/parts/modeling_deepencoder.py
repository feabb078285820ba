"""DeepSeek-OCR's vision encoder (arXiv 2510.18234, section 3.2): SAM, a convolutional compressor, CLIP.

Shapes: n views, L patches and T = L / 16 tokens of all views, D width of the output. For the views of one size: N
views, h rows and w columns, c channels of the current layer, H heads, d channels of a head.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_deepencoder import PATCHES_PER_TOKEN, DeepEncoderConfig
from .distributed import ShardableMixin
from .image_pixels import check_normalized
from .ops_activations import ExactGELU, get_activation
from .ops_attention import dense_attention_forward
from .ops_linear import apply_linear
from .packed_index import validate_grid
from .packed_segments import tokens_per_pass
from .pos_embed_tables import relative_positions, resample_whole_grid
from .utils import ForwardKwargs, activation_dtype, check_encoder_kwargs, check_shape
from .vlm_views import get_view_index, grid_on_host

# Scores of relative attention that are computed together where `vlparts::tokens_per_pass` sets no limit.
MAX_SCORES = 2**26


class DeepEncoderMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.width = inner
        self.fc1 = nn.Linear(width, inner)
        self.act_fn = activation
        self.fc2 = nn.Linear(inner, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(..., c)` to `(..., c)`."""
        return apply_linear(self.fc2, self.act_fn(apply_linear(self.fc1, hidden_states)))


class DeepEncoderAttention(nn.Module):
    """Multi-head attention over all positions of a sequence.

    Args:
        config: The configuration, for `attn_implementation`.
        width: Channels c.
        heads: Number H of heads.
    """

    def __init__(self, config: DeepEncoderConfig, width: int, heads: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = heads
        self.scaling = (width // heads) ** -0.5
        self.is_causal = False
        self.qkv = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Attend with `(N, H, S, d)` tensors and a bias on the scores; returns `(N, S, c)` and weights, if any."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, dense_attention_forward)
        output = attention(self, query, key, value, attention_mask=bias, scaling=self.scaling, is_causal=False)
        return output[0].flatten(-2), output[1]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map `(N, S, c)` to `(N, S, c)`; also returns the weights `(N, H, S, S)`, None unless "eager"."""
        qkv = rearrange(apply_linear(self.qkv, hidden_states), "n s (t h d) -> t n h s d", t=3, h=self.num_heads)
        attended, weights = self.attend(qkv[0], qkv[1], qkv[2], None)
        return apply_linear(self.o_proj, attended), weights


class DeepEncoderSAMAttention(DeepEncoderAttention):
    """Attention with decomposed relative positions (arXiv 2112.01526, section 4.1), in windows or over the whole view.

    The score of query (y, x) and key (y', x') is `q . k / sqrt(d) + q . R_h[y - y'] + q . R_w[x - x']`.

    Args:
        config: The configuration.
        window_size: Side of a window in patches, or None for the whole view.
    """

    def __init__(self, config: DeepEncoderConfig, window_size: int | None) -> None:
        super().__init__(config, config.sam_hidden_size, config.sam_num_attention_heads)
        self.window_size = window_size
        rows = 2 * (window_size or config.sam_position_size) - 1
        head_dim = config.sam_hidden_size // config.sam_num_attention_heads
        self.rel_pos_h = nn.Parameter(torch.zeros(rows, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(rows, head_dim))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """Map `(N, h, w, c)` to `(N, h, w, c)`; the weights are made in parts and not kept."""
        height, width = hidden_states.shape[1:3]
        side, heads = self.window_size, self.num_heads
        if side is None:
            qkv = rearrange(apply_linear(self.qkv, hidden_states), "n y x (t h d) -> t (n h) y x d", t=3, h=heads)
            attended = rearrange(self._attend_relatively(qkv), "(n h) y x d -> n y x (h d)", h=heads)
            return apply_linear(self.o_proj, attended), None
        layout = {"r": -(-height // side), "q": -(-width // side), "h": heads}
        attended = self._attend_relatively(self._get_windows(hidden_states, side, layout))
        attended = rearrange(attended, "(n r q h) y x d -> n (r y) (q x) (h d)", **layout)
        return apply_linear(self.o_proj, attended[:, :height, :width]), None

    def _get_windows(self, hidden_states: Tensor, side: int, layout: dict[str, int]) -> Tensor:
        """Queries, keys and values `(3, G, side, side, d)` of G heads in r rows of q windows."""
        height, width = hidden_states.shape[1:3]
        # The published model pads its input with zeros, and attends to the padding.
        padding = apply_linear(self.qkv, hidden_states.new_zeros(1, hidden_states.shape[-1]))
        padded = padding.expand(len(hidden_states), layout["r"] * side, layout["q"] * side, -1).clone()
        padded[:, :height, :width] = apply_linear(self.qkv, hidden_states)
        return rearrange(padded, "n (r y) (q x) (t h d) -> t (n r q h) y x d", t=3, **layout)

    def _attend_relatively(self, qkv: Tensor) -> Tensor:
        """Attend within maps of G heads, of views or windows; `(3, G, h, w, d)` to `(G, h, w, d)`.

        The relative positions are a bias on the scores. It is made for some maps or some queries at a time, and made
        again in the backward pass, so that it is not quadratic in the size of a view.
        """
        height, width = qkv.shape[2:4]
        rows = torch.einsum("gyxd,ykd->gyxk", qkv[0], relative_positions(self.rel_pos_h, height)).flatten(1, 2)
        columns = torch.einsum("gyxd,xkd->gyxk", qkv[0], relative_positions(self.rel_pos_w, width)).flatten(1, 2)
        keys, inputs = height * width, (*qkv.flatten(2, 3), rows, columns)
        queries = tokens_per_pass(qkv, keys) or max(1, MAX_SCORES // keys)
        attended = []
        for q, k, v, r, c in zip(*(x.split(max(1, queries // keys)) for x in inputs), strict=True):
            chunks = zip(*(x.split(queries, dim=1) for x in (q, r, c)), strict=True)
            parts = [checkpoint(self._attend_with_bias, *x, k, v, use_reentrant=False) for x in chunks]
            attended.append(torch.cat(parts, dim=1))
        return torch.cat(attended).unflatten(1, (height, width))

    def _attend_with_bias(self, query: Tensor, rows: Tensor, columns: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with `(G, S, d)` queries and their products `(G, S, h)`, `(G, S, w)` with the relative positions."""
        bias = rearrange(rows, "g s y -> g 1 s y 1") + rearrange(columns, "g s x -> g 1 s 1 x")
        return self.attend(query[:, None], key[:, None], value[:, None], bias.flatten(-2))[0]


class DeepEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block of the given attention, MLP, width and epsilon of its normalizations."""

    def __init__(self, self_attn: DeepEncoderAttention, mlp: DeepEncoderMLP, width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = self_attn
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(N, h, w, c)` or `(N, S, c)` to the same shape."""
        hidden_states = hidden_states + self.self_attn(self.norm1(hidden_states))[0]
        rows = hidden_states.flatten(0, -2)
        chunks = rows.split(tokens_per_pass(rows, self.mlp.width) or len(rows))
        outputs = [chunk + self.mlp(self.norm2(chunk)) for chunk in chunks]
        return torch.cat(outputs).view_as(hidden_states)


class DeepEncoderSAMLayer(DeepEncoderLayer):
    """Block of the SAM encoder."""

    def __init__(self, config: DeepEncoderConfig, window_size: int | None) -> None:
        width, attention = config.sam_hidden_size, DeepEncoderSAMAttention(config, window_size)
        mlp = DeepEncoderMLP(width, config.sam_intermediate_size, ExactGELU())
        super().__init__(attention, mlp, width, config.sam_layer_norm_eps)


class DeepEncoderCLIPLayer(DeepEncoderLayer):
    """Block of the CLIP encoder."""

    def __init__(self, config: DeepEncoderConfig) -> None:
        width = config.clip_hidden_size
        attention = DeepEncoderAttention(config, width, config.clip_num_attention_heads)
        mlp = DeepEncoderMLP(width, config.clip_intermediate_size, get_activation("quick_gelu"))
        super().__init__(attention, mlp, width, config.clip_layer_norm_eps)


class DeepEncoderSAM(nn.Module):
    """The SAM encoder, its neck, and the compressor to a sixteenth of the patches."""

    def __init__(self, config: DeepEncoderConfig) -> None:
        super().__init__()
        width, channels, side = config.sam_hidden_size, config.neck_channels, config.sam_position_size
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, width)
        self.position_embedding = nn.Parameter(torch.zeros(side, side, width))
        window, whole = config.sam_window_size, config.sam_global_layers
        windows = [None if index in whole else window for index in range(config.sam_num_hidden_layers)]
        self.layers = nn.ModuleList([DeepEncoderSAMLayer(config, size) for size in windows])
        self.conv1 = nn.Conv2d(width, channels, 1, bias=False)
        self.norm1 = nn.LayerNorm(channels, eps=config.sam_layer_norm_eps)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(channels, eps=config.sam_layer_norm_eps)
        middle, last = config.compressor_channels
        self.compress1 = nn.Conv2d(channels, middle, 3, stride=2, padding=1, bias=False)
        self.compress2 = nn.Conv2d(middle, last, 3, stride=2, padding=1, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Map the pixels of patches `(N, h, w, C*P*P)` to `(N, h / 4, w / 4, c)`."""
        hidden_states = apply_linear(self.patch_embedding, patches)
        hidden_states = hidden_states + resample_whole_grid(self.position_embedding, *hidden_states.shape[1:3])
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        hidden_states = self.norm1(_convolve(self.conv1, hidden_states))
        hidden_states = self.norm2(_convolve(self.conv2, hidden_states))
        return _convolve(self.compress2, _convolve(self.compress1, hidden_states))


def _convolve(convolution: nn.Conv2d, hidden_states: Tensor) -> Tensor:
    """Apply a convolution to `(N, h, w, c)`, channels last."""
    return convolution(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DeepEncoderCLIP(nn.Module):
    """The body of a CLIP encoder on features in place of patch embeddings, without its last normalization."""

    def __init__(self, config: DeepEncoderConfig) -> None:
        super().__init__()
        width, side = config.clip_hidden_size, config.clip_position_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Parameter(torch.zeros(1 + side**2, width))
        self.norm = nn.LayerNorm(width, eps=config.clip_layer_norm_eps)
        self.layers = nn.ModuleList([DeepEncoderCLIPLayer(config) for _ in range(config.clip_num_hidden_layers)])
        if config.clip_patch_embedding is not None:
            shape = (width, config.num_channels, config.clip_patch_embedding, config.clip_patch_embedding)
            self.unused_patch_embedding = nn.Buffer(torch.zeros(shape))

    def forward(self, features: Tensor, wanted: Collection[int]) -> list[Tensor]:
        """Encode `(N, h, w, c)`; returns the `wanted` states, `(N, h * w, c)` each: 0 is the input of layer 0."""
        views, height, width = features.shape[:3]
        positions = self.position_embedding
        side = int((len(positions) - 1) ** 0.5)
        grid = resample_whole_grid(positions[1:].unflatten(0, (side, side)), height, width).flatten(0, 1)
        class_token = (self.class_embedding + positions[0]).expand(views, 1, -1)
        hidden_states = self.norm(torch.cat((class_token, features.flatten(1, 2) + grid), dim=1))
        states = {0: hidden_states}
        for index, layer in enumerate(self.layers, start=1):
            hidden_states = layer(hidden_states)
            states[index] = hidden_states
            states = {known: state for known, state in states.items() if known in wanted}
        return [states[index][:, 1:] for index in wanted]


@dataclass
class DeepEncoderOutput(BaseModelOutputWithPooling):
    """Output of [`DeepEncoderModel`].

    Attributes:
        last_hidden_state: `(T, D)`, the tokens of all views, view after view and row after row: the output of the CLIP
            encoder, then that of the compressor.
        hidden_states: With `output_hidden_states`, the same with the input of each layer of the CLIP encoder, and with
            the output of the last.
        attentions: With `output_attentions` ("eager" only), `(N, H, 1 + T, 1 + T)` of each layer of the CLIP encoder:
            the N views of one size with their class tokens, all layers of the first size before those of the next.
        feature_maps: The same with the output of each of `config.feature_layers`.
        view_index: `(L,)` int64, the tokens of each image in the order of [`get_view_index`].
        tokens_per_image: `(images,)` int64, lengths of the images in `view_index`.
    """

    feature_maps: tuple[Tensor, ...] | None = None
    view_index: Tensor | None = None
    tokens_per_image: Tensor | None = None


class DeepEncoderPreTrainedModel(ShardableMixin, PreTrainedModel):
    """Base class: weight initialisation and the attributes that transformers expects."""

    config: DeepEncoderConfig
    base_model_prefix = "deepencoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepEncoderSAMLayer", "DeepEncoderCLIPLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"attentions": OutputRecorder(DeepEncoderAttention, index=1, layer_name="clip")}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepEncoderSAM | DeepEncoderSAMAttention):
            for table in module.parameters(recurse=False):
                init.zeros_(table)
        elif isinstance(module, DeepEncoderCLIP):
            for table in module.parameters(recurse=False):
                init.normal_(table, mean=0.0, std=self.config.initializer_range)
            for unused in module.buffers(recurse=False):
                init.zeros_(unused)


class DeepEncoderModel(DeepEncoderPreTrainedModel):
    """DeepSeek-OCR's vision encoder, over views of any size: a page, or a tile of it.

    The output of a view does not depend on the others of a call. Views of one size are computed together.
    """

    def __init__(self, config: DeepEncoderConfig) -> None:
        super().__init__(config)
        self.sam = DeepEncoderSAM(config)
        self.clip = DeepEncoderCLIP(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.sam.patch_embedding

    def precompute(self, image_grid_thw: Tensor, tile_grid: Tensor | None = None) -> dict[str, Any]:
        """Copy sizes to the host, so that `forward` compiles to one graph, which is one for views of these sizes.

        Args:
            image_grid_thw: `(n, 3)` int64, as for `forward`.
            tile_grid: `(n, 2)` int64, as for `forward`.

        Returns:
            `grid_cpu`; with `tile_grid` also `tile_grid_cpu`.

        Raises:
            ValueError: If a grid is malformed, or its rows or columns are no multiples of 4.
        """
        validate_grid(image_grid_thw, int(image_grid_thw.prod(-1).sum()), PATCHES_PER_TOKEN)
        tiles = {} if tile_grid is None else {"tile_grid_cpu": grid_on_host(tile_grid)}
        return {"grid_cpu": grid_on_host(image_grid_thw), **tiles}

    @capture_outputs
    def forward(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        tile_grid: Tensor | None = None,
        grid_cpu: Sequence[Sequence[int]] | None = None,
        tile_grid_cpu: Sequence[Sequence[int]] | None = None,
        **kwargs: ForwardKwargs,
    ) -> DeepEncoderOutput:
        """Encode views.

        Args:
            pixel_values: `(L, C*P*P)` normalized patches of all views, view after view and row after row, channels
                first within a patch.
            image_grid_thw: `(n, 3)` int64, 1, and the rows and columns of each view in patches, multiples of 4.
            tile_grid: `(n, 2)` int64, rows and columns of tiles of each image, 0 and 0 for none; the views of an image
                are its tiles and then the whole image. None if each view is an image.
            grid_cpu: `image_grid_thw` as host integers, so that they are not copied from the device; see `precompute`.
            tile_grid_cpu: `tile_grid` as host integers.
            **kwargs: `output_hidden_states`, `output_attentions` ("eager" only), `return_dict`.

        Raises:
            ValueError: If patches have the wrong size, or a grid is malformed, has several frames or other sides, or
                does not sum to L patches; or pixels are out of the range of normalized ones.
        """
        check_encoder_kwargs(kwargs)
        if grid_cpu is None:
            validate_grid(image_grid_thw, pixel_values.shape[0], PATCHES_PER_TOKEN)
            check_normalized(pixel_values)
            grid_cpu = grid_on_host(image_grid_thw)
        check_shape("pixel_values", pixel_values, None, self.config.num_channels * self.config.patch_size**2)
        if not pixel_values.is_floating_point():
            raise ValueError(f"`pixel_values` must be normalized floating-point pixels, got {pixel_values.dtype}.")
        if any(frames != 1 for frames, _, _ in grid_cpu):
            raise ValueError(f"`image_grid_thw` must have 1 frame in each row, got {list(grid_cpu)}.")
        if tile_grid_cpu is None and tile_grid is not None:
            tile_grid_cpu = grid_on_host(tile_grid)
        sizes = [(height // PATCHES_PER_TOKEN, width // PATCHES_PER_TOKEN) for _, height, width in grid_cpu]
        index, lengths = get_view_index(tile_grid_cpu or [(0, 0)] * len(sizes), sizes)
        layers = len(self.clip.layers)
        feature_layers = [layer + 1 if layer >= 0 else layers + 1 + layer for layer in self.config.feature_layers]
        output_hidden_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        wanted = range(layers + 1) if output_hidden_states else sorted({*feature_layers, layers})
        pixel_values = pixel_values.to(activation_dtype(self, pixel_values.dtype))
        states = dict(zip(wanted, self._encode(pixel_values, grid_cpu, wanted), strict=True))
        return DeepEncoderOutput(
            last_hidden_state=states[layers],
            hidden_states=tuple(states.values()) if output_hidden_states else None,
            feature_maps=tuple(states[layer] for layer in feature_layers),
            view_index=index.to(pixel_values.device),
            tokens_per_image=torch.tensor(lengths, device=pixel_values.device),
        )

    def _encode(self, pixel_values: Tensor, grid: Sequence[Sequence[int]], wanted: Collection[int]) -> list[Tensor]:
        """Encode the views of each size together; returns the `wanted` states of all views, `(T, D)` each."""
        sizes = [(height, width) for _, height, width in grid]
        views = pixel_values.split([height * width for height, width in sizes])
        encoded: list[tuple[Tensor, ...]] = [()] * len(views)
        for size in dict.fromkeys(sizes):
            chosen = [index for index, other in enumerate(sizes) if other == size]
            compressed = self.sam(torch.stack([views[index] for index in chosen]).unflatten(1, size))
            tokens = compressed.flatten(1, 2)
            states = [torch.cat((state, tokens), dim=-1) for state in self.clip(compressed, wanted)]
            for index, *view in zip(chosen, *states, strict=True):
                encoded[index] = tuple(view)
        return [torch.cat(views) for views in zip(*encoded, strict=True)]


__all__ = ["DeepEncoderModel", "DeepEncoderPreTrainedModel"]
