"""NaViT (arXiv 2307.06304), a vision transformer over packed images, and its classification head.

Shapes: `L` patches of all images, `n` images, `S` attention segments, `K` prefix tokens per segment, `D` width, `H`
heads, `C` channels, `P` side of a patch.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_navit import NaViTConfig
from .distributed import ShardableMixin
from .image_pixels import check_normalized
from .ops_linear import apply_linear
from .ops_rotary import axial_rotary
from .packed_index import (
    PatchLayout,
    get_cu_seqlens,
    get_kept_cu_seqlens,
    get_patch_layout,
    resolve_seqlens,
    segment_ids,
    validate_grid,
)
from .packed_layers import (
    PackedLayer,
    PackedSelfAttention,
    PrefixTokens,
    TwoLayerMLP,
    get_prefix_layout,
    insert_unrotated,
    plan_passes,
)
from .packed_merging import build_merger
from .packed_pooling import MaskedAttentionPooling, max_pooling, mean_pooling
from .packed_segments import Segments, precompute_inputs
from .pos_embed import PositionEmbedding
from .utils import IGNORE_INDEX, ForwardKwargs, activation_dtype, add_auto_classes, check_encoder_kwargs

__all__ = ["NaViTForImageClassification", "NaViTModel", "NaViTPreTrainedModel"]


class NaViTEmbeddings(nn.Module):
    """Patch embedding: a linear layer on the flattened pixels, plus position embeddings."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = None
        if config.position_kind != "none":
            self.position_embedding = PositionEmbedding(
                config.hidden_size,
                config.max_grid_size,
                kind=config.position_kind,
                coordinates=config.position_coordinates,
                combination=config.position_combination,
                interpolation=config.position_interpolation,
                overflow=config.position_overflow,
            )
        self.frame_embedding = nn.Embedding(config.max_frames, config.hidden_size) if config.max_frames else None

    def forward(self, pixel_values: Tensor, layout: PatchLayout) -> Tensor:
        """Embed `(L, C*P*P)` patches as `(L, D)`.

        Raises:
            ValueError: If a video has more frames than `max_frames`.
        """
        dtype = activation_dtype(self, pixel_values.dtype)
        hidden_states = apply_linear(self.patch_embedding, pixel_values.to(dtype))
        if self.position_embedding is not None:
            hidden_states = hidden_states + self.position_embedding(
                layout.position_ids, layout.grid_sizes, hidden_states.dtype
            )
        if self.frame_embedding is not None:
            limit, frames = self.frame_embedding.num_embeddings, layout.frame_ids
            if not torch.compiler.is_compiling() and frames.numel() and int(frames.max()) >= limit:
                raise ValueError(
                    f"`image_grid_thw` must not hold videos of more than `max_frames`={limit} frames, got one of at "
                    f"least {int(frames.max()) + 1} frames."
                )
            hidden_states = hidden_states + self.frame_embedding(frames)
        return hidden_states


class NaViTAttention(PackedSelfAttention):
    """Self-attention within each segment, with normalized queries and keys."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.use_qk_norm:
            self.q_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)
            self.k_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize queries and keys `(L, H, D / H)` per head."""
        return self.q_norm(query), self.k_norm(key)


class NaViTLayer(PackedLayer):
    """Pre-norm transformer block with layer normalizations."""

    def __init__(self, config: PreTrainedConfig) -> None:
        norms = [
            nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=config.layer_norm_bias) for _ in range(2)
        ]
        super().__init__(NaViTAttention(config), TwoLayerMLP(config), *norms)


@dataclass
class NaViTOutput(BaseModelOutputWithPooling):
    """Output of [`NaViTModel`].

    Attributes:
        last_hidden_state: `(L, D)`, one vector per row of `pixel_values`.
        pooler_output: `(n, D)`, one vector per image; None if `pooling` is "none".
        hidden_states: With `output_hidden_states`, the input of each layer and the output of the last, prefix tokens
            included; see `patch_index`.
        attentions: With `output_attentions` ("eager" only), `(1, H, L + S*K, L + S*K)` per layer.
        prefix_hidden_state: `(S, K, D)`, class token and registers of each segment; None if there are none.
        patch_index: `(L,)` int64 indices of the patches in each of `hidden_states`; None without prefix tokens.
        keep_index: `(L,)` int64, the argument: index of each row in the sequence of all patches. A map over all
            patches is `torch.zeros(total, D).index_copy(0, keep_index, last_hidden_state)` (without padding rows).
        merge_assignments: After each of `merge_layers`, `(L,)` int64: the token that holds each patch; None without.
    """

    prefix_hidden_state: Tensor | None = None
    patch_index: Tensor | None = None
    keep_index: Tensor | None = None
    merge_assignments: tuple[Tensor, ...] | None = None


class NaViTPreTrainedModel(ShardableMixin, PreTrainedModel):
    """Base class: weight initialization and the attributes that transformers expects."""

    config: NaViTConfig
    base_model_prefix = "navit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["NaViTLayer", "NaViTEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": NaViTLayer, "attentions": NaViTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PositionEmbedding):
            module.reset_parameters(self.config.position_initializer_range, self.config.position_fourier_std)
        elif isinstance(module, MaskedAttentionPooling):
            init.normal_(module.probe, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, PrefixTokens):
            init.normal_(module.tokens, mean=0.0, std=self.config.initializer_range)


class NaViTModel(NaViTPreTrainedModel):
    """NaViT: a vision transformer over images of any size, packed into one sequence.

    The output of an image does not depend on the images packed with it: attention and pooling stay within an image,
    and no gradient crosses between images.
    """

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__(config)
        self.embeddings = NaViTEmbeddings(config)
        prefix = config.num_register_tokens + (config.pooling == "class_token")
        self.prefix = PrefixTokens(prefix, config.hidden_size) if prefix else None
        self.layers = nn.ModuleList([NaViTLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.layer_norm_bias)
        self.pooling = MaskedAttentionPooling(config) if config.pooling == "map" else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.embeddings.patch_embedding

    def precompute(self, image_grid_thw: Tensor, keep_index: Tensor | None = None) -> dict[str, Any]:
        """Compute the arguments of `forward` that follow from grids, so that it compiles to one graph.

        Args:
            image_grid_thw: `(n, 3)` int64, as for `forward`.
            keep_index: `(L,)` int64, as for `forward`.

        Returns:
            `cu_seqlens`, `max_seqlen` and `position_ids`; see [`precompute_inputs`].
        """
        config = self.config
        is_clip = config.video_attention == "clip"
        return precompute_inputs(image_grid_thw, config.spatial_merge_size, is_clip, keep_index)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        position_ids: Tensor | None = None,
        keep_index: Tensor | None = None,
        cu_seqlens_cpu: Sequence[int] | None = None,
        **kwargs: ForwardKwargs,
    ) -> NaViTOutput:
        """Encode packed images.

        Args:
            pixel_values: `(L, C*P*P)` flattened patches of all images, image after image, channels first within a
                patch; the patches of an image in the order of [`get_position_ids`].
            image_grid_thw: `(n, 3)` int64, frames, rows and columns of each image in patches, before patches were
                dropped. With `keep_index`, a row of zeros is a padding example; its `pooler_output` is undefined.
            cu_seqlens: `(segments + 1,)` int32 cumulative patch counts, one segment per frame (per image if
                `video_attention` is "clip"); computed if absent. Padding rows are a last segment of their own; padding
                examples are empty segments.
            max_seqlen: Longest segment, or an upper bound; computed if absent.
            position_ids: `(L, 2)` int64, row and column of each patch; computed if absent.
            keep_index: `(L,)` int64 index of each row in the sequence of all patches, increasing, then -1 for each
                padding row; None if no patches were dropped and no padding rows added.
            cu_seqlens_cpu: `cu_seqlens` as host integers, so that kernels that need them do not copy from the device.
            **kwargs: `output_hidden_states`, `output_attentions` ("eager" only), `return_dict`. Others that
                transformers passes to every model have no effect, nor have `image_mask`, `indices` and `labels` of a
                batch.

        Raises:
            ValueError: If patches do not have C*P*P values, grids are malformed or do not sum to L patches, or
                `keep_index` does not match them, pixels are not in the range of normalized ones (checked with the
                grids), or a further keyword argument is unknown.
        """
        check_encoder_kwargs(kwargs)
        # Not from the layer: servers replace linear layers by classes without `in_features`.
        features, patches = self.config.num_channels * self.config.patch_size**2, pixel_values.shape[0]
        if pixel_values.ndim != 2 or pixel_values.shape[1] != features:
            raise ValueError(f"`pixel_values` must have shape (patches, {features}), got {tuple(pixel_values.shape)}.")
        if cu_seqlens is None or max_seqlen is None or position_ids is None:
            validate_grid(image_grid_thw, patches, self.config.spatial_merge_size, keep_index)
            check_normalized(pixel_values if keep_index is None else pixel_values[keep_index >= 0], raw=False)
        layout = get_patch_layout(image_grid_thw, patches, self.config.spatial_merge_size, keep_index, position_ids)
        if cu_seqlens is None:
            is_clip = self.config.video_attention == "clip"
            cu_seqlens = (
                get_cu_seqlens(image_grid_thw, is_clip)
                if keep_index is None
                else get_kept_cu_seqlens(image_grid_thw, layout, patches, is_clip)
            )
        max_seqlen, cu_seqlens_cpu = resolve_seqlens(cu_seqlens, max_seqlen, cu_seqlens_cpu, patches)
        segments = Segments(cu_seqlens, max_seqlen, cu_seqlens_cpu)

        hidden_states, prefix, patch_index, merged = self._encode(
            self.embeddings(pixel_values, layout), layout, segments, kwargs
        )
        return NaViTOutput(
            last_hidden_state=hidden_states,
            pooler_output=self._pool(hidden_states, prefix, layout, image_grid_thw[:, 0], segments),
            prefix_hidden_state=prefix,
            patch_index=patch_index,
            keep_index=keep_index,
            merge_assignments=merged,
        )

    def _encode(
        self, hidden_states: Tensor, layout: PatchLayout, segments: Segments, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...] | None]:
        """Run the layers over `(L, D)`.

        Returns:
            Normalized patches `(L, D)`; prefix tokens `(S, K, D)` and `patch_index` `(L,)`, or None twice;
            `merge_assignments`.
        """
        config, rotary, prefix, count = self.config, None, None, 0
        if config.rotary_theta is not None:
            head_dim = config.hidden_size // config.num_attention_heads
            rotary = axial_rotary(layout.position_ids, head_dim, config.rotary_theta)
        if self.prefix is not None:
            count = self.prefix.count
            prefix = get_prefix_layout(segments.cu_seqlens, hidden_states.shape[0], count, segments.cu_seqlens_cpu)
            hidden_states = self.prefix(hidden_states, prefix)
            rotary = None if rotary is None else insert_unrotated(rotary, prefix)
            segments = Segments(prefix.cu_seqlens, segments.max_seqlen + count, prefix.cu_seqlens_cpu)
        segments = segments._replace(rotary=rotary)
        passes = plan_passes(segments, hidden_states, config)
        merger = build_merger(config, segments, options, count) if config.merge_layers else None
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, passes, **options)
            if merger is not None and index in merger.layers:
                hidden_states = merger.merge(hidden_states)
                segments = merger.shrink(segments)
                passes = plan_passes(segments, hidden_states, config)
        hidden_states, merged = self.norm(hidden_states), None
        if merger is not None:
            hidden_states, merged = merger.restore(hidden_states), tuple(merger.assignments)
        if prefix is None:
            return hidden_states, None, None, merged
        if merged is not None:
            merged = tuple(held[prefix.patches] for held in merged)
        return hidden_states[prefix.patches], hidden_states[prefix.prefix], prefix.patches, merged

    def _pool(
        self, hidden_states: Tensor, prefix: Tensor | None, layout: PatchLayout, frames: Tensor, segments: Segments
    ) -> Tensor | None:
        """Pool to one vector per image, `(n, D)`; those of padding examples are undefined."""
        images, kind = frames.shape[0], self.config.pooling
        if self.pooling is not None:
            cu_images_cpu = segments.cu_seqlens_cpu
            if cu_images_cpu is not None and len(cu_images_cpu) != layout.cu_images.shape[0]:
                cu_images_cpu = None  # several frames per image
            return self.pooling(hidden_states, layout.cu_images, hidden_states.shape[0], cu_images_cpu)[:images]
        if kind == "mean":
            return mean_pooling(hidden_states, layout.image_ids, images)
        if kind == "max":
            return max_pooling(hidden_states, layout.image_ids, images)
        if kind == "none" or prefix is None:
            return None
        if self.config.video_attention == "clip":
            return prefix[:images, 0]
        # The mean over the frames of a video of which patches were kept.
        lengths = segments.cu_seqlens.diff()
        image_ids = segment_ids(pad(frames.clamp(min=1).cumsum(0), (1, 0)), lengths.shape[0])
        return mean_pooling(prefix[:, 0], torch.where(lengths > 0, image_ids, images), images)


class NaViTForImageClassification(NaViTPreTrainedModel):
    """NaViT with a linear classifier on the pooled vector of each image."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__(config)
        if config.pooling == "none":
            raise ValueError("`pooling` must not be 'none' for a classifier, got 'none'.")
        self.navit = NaViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the model and its code, such that `AutoModel` loads the encoder from the folder."""
        add_auto_classes(self, AutoModel=NaViTModel)
        super().save_pretrained(save_directory, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: ForwardKwargs,
    ) -> ImageClassifierOutput:
        """Classify packed images.

        Args:
            pixel_values: `(L, C*P*P)` patches, as for [`NaViTModel`].
            image_grid_thw: `(n, 3)` int64.
            labels: `(n,)` int64 classes; or `(n, num_labels)` float, for multi-label classification (sigmoid
                cross-entropy, as in the paper) or regression, by `config.problem_type` as in transformers. Images with
                the label -100 (in the whole row), such as padding examples, are ignored.
            num_items_in_batch: Number of images that the loss of classes is divided by instead of the number in this
                batch; passed by the Trainer when it accumulates gradients.
            **kwargs: Other arguments of [`NaViTModel`].

        Returns:
            `logits` `(n, num_labels)`, and the mean `loss` over the labelled images.

        Raises:
            ValueError: If there is not one label per image.
        """
        outputs = self.navit(pixel_values, image_grid_thw, **kwargs)
        logits, loss = self.classifier(outputs.pooler_output), None
        if labels is not None:
            if labels.shape[:1] != logits.shape[:1]:
                raise ValueError(
                    f"`labels` must hold one entry per image, {logits.shape[0]}, got shape {tuple(labels.shape)}."
                )
            rows = logits
            if labels.is_floating_point():
                labelled = (labels != IGNORE_INDEX).flatten(1).any(-1) if labels.ndim > 1 else labels != IGNORE_INDEX
                rows, labels = logits[labelled], labels[labelled]
            loss = self.loss_function(labels, rows, self.config, num_items_in_batch=num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
