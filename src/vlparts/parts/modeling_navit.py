"""The packed-sequence NaViT encoder (arXiv 2307.06304) and its classification head.

Shapes: L patches of all images of a batch, n images, S attention segments, K prefix tokens of a segment, D width,
H heads, C channels, P side of a patch.

Embeddings and blocks of the NaViT encoder (arXiv 2307.06304). Their `config` is a [`NaViTConfig`].

Shapes: L tokens of all segments, D width, H heads, C channels, P side of a patch.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_navit import NaViTConfig
from .ops_activations import get_activation
from .ops_attention import PACKED_ATTENTION_FUNCTIONS as ALL_ATTENTION_FUNCTIONS
from .ops_attention import dense_attention_forward
from .ops_linear import Linear
from .ops_rotary import axial_rotary
from .packed_index import (
    PatchLayout,
    get_cu_seqlens,
    get_kept_cu_seqlens,
    get_patch_layout,
    resolve_seqlens,
    validate_grid,
)
from .packed_layers import PackedLayer, PackedSelfAttention, PrefixTokens, get_prefix_places, insert_unrotated
from .packed_pooling import MaskedAttentionPooling, max_pooling, mean_pooling
from .packed_segments import Pass, Segments, split_passes
from .pos_embed import PositionEmbedding
from .utils import IGNORE_INDEX, add_auto_classes

__all__ = ["NaViTForImageClassification", "NaViTModel", "NaViTPreTrainedModel"]


class NaViTEmbeddings(nn.Module):
    """Patches to vectors: a linear layer on the flattened pixels, plus the position of each patch."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.patch_embedding = Linear(config.num_channels * config.patch_size**2, config.hidden_size)
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
        hidden_states = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        if self.position_embedding is not None:
            hidden_states = hidden_states + self.position_embedding(
                layout.position_ids, layout.grid_sizes, hidden_states.dtype
            )
        if self.frame_embedding is not None:
            limit, frames = self.frame_embedding.num_embeddings, layout.frame_ids
            if not torch.compiler.is_compiling() and frames.numel() and int(frames.max()) >= limit:
                raise ValueError(
                    f"`image_grid_thw` holds a video of {int(frames.max()) + 1} frames or more, "
                    f"but `max_frames` is {limit}."
                )
            hidden_states = hidden_states + self.frame_embedding(frames)
        return hidden_states


class NaViTAttention(PackedSelfAttention):
    """Self-attention inside each segment, with normalised queries and keys."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.use_qk_norm:
            self.q_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)
            self.k_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise queries and keys `(L, H, D / H)` head by head."""
        return self.q_norm(query), self.k_norm(key)


class NaViTMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.act_fn = get_activation(config.hidden_act)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(L, D)` to `(L, D)`."""
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


class NaViTLayer(PackedLayer):
    """A pre-norm transformer block with layer normalisations."""

    def __init__(self, config: PreTrainedConfig) -> None:
        norms = [
            nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=config.layer_norm_bias) for _ in range(2)
        ]
        super().__init__(NaViTAttention(config), NaViTMLP(config), *norms)


@dataclass
class NaViTOutput(BaseModelOutputWithPooling):
    """What [`NaViTModel`] returns.

    Attributes:
        last_hidden_state: `(L, D)`, one vector for each row of `pixel_values`.
        pooler_output: `(n, D)`, one vector for each image; None if `pooling` is "none".
        hidden_states: With `output_hidden_states`, the input of each layer and the output of the last; with prefix
            tokens in front of the patches of each segment; see `patch_index`.
        attentions: With `output_attentions` ("eager" only), `(1, H, L + S*K, L + S*K)` for each layer.
        prefix_hidden_state: `(S, K, D)`, class token and registers of each segment, where there are any.
        patch_index: `(L,)` int64 places of the patches in each of `hidden_states`, where there are prefix tokens.
        keep_index: `(L,)` int64 as it was given: where the rows stand in the sequence of all patches. A map over all
            patches is `torch.zeros(total, D).index_copy(0, keep_index, last_hidden_state)` (without padding rows).
    """

    prefix_hidden_state: Tensor | None = None
    patch_index: Tensor | None = None
    keep_index: Tensor | None = None


class NaViTPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the abilities that transformers asks a model for."""

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

    An image's output does not depend on the images that it is packed with: attention and pooling stay inside an image,
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
        **kwargs: Any,
    ) -> NaViTOutput:
        """Encode packed images.

        Args:
            pixel_values: `(L, C*P*P)` flattened patches of all images, image after image, channels first inside a
                patch; the order of patches inside an image is that of [`get_position_ids`].
            image_grid_thw: `(n, 3)` int64, frames, rows and columns of each image in patches, before any were dropped.
                With `keep_index`, a row of zeros is a padding example; its `pooler_output` means nothing.
            cu_seqlens: `(segments + 1,)` int32 cumulative patch counts, one segment for each frame (or each image
                where `video_attention` is "clip"); computed if absent. Padding rows are a segment of their own, at
                the end; padding examples are empty segments.
            max_seqlen: Longest segment, or a bound on it; computed if absent.
            position_ids: `(L, 2)` int64, row and column of each patch; computed if absent.
            keep_index: `(L,)` int64, where patches were dropped or padding rows added: the index of each row in the
                sequence of all patches, rising, then -1 for each padding row. None if the rows are all patches.
            cu_seqlens_cpu: `cu_seqlens` as host integers, which spares kernels that need them a copy from the device.
            **kwargs: `output_hidden_states`, `output_attentions` ("eager" only), `return_dict`.

        Raises:
            ValueError: If the patches do not have C*P*P values, if the grids are malformed, if they do not add up
                to L patches, or if `keep_index` does not fit to them.
        """
        features, patches = self.embeddings.patch_embedding.in_features, pixel_values.shape[0]
        if pixel_values.ndim != 2 or pixel_values.shape[1] != features:
            raise ValueError(f"`pixel_values` must have shape (patches, {features}), got {tuple(pixel_values.shape)}.")
        if cu_seqlens is None or max_seqlen is None or position_ids is None:
            validate_grid(image_grid_thw, patches, self.config.spatial_merge_size, keep_index)
        layout = get_patch_layout(image_grid_thw, patches, self.config.spatial_merge_size, keep_index, position_ids)
        if cu_seqlens is None:
            is_clip = self.config.video_attention == "clip"
            cu_seqlens = (
                get_cu_seqlens(image_grid_thw, is_clip)
                if keep_index is None
                else get_kept_cu_seqlens(image_grid_thw, layout, patches, is_clip)
            )
        max_seqlen, cu_seqlens_cpu = resolve_seqlens(cu_seqlens, max_seqlen, cu_seqlens_cpu)
        segments = Segments(cu_seqlens, max_seqlen, cu_seqlens_cpu)

        hidden_states, prefix, patch_index = self._encode(
            self.embeddings(pixel_values, layout), layout, segments, kwargs
        )
        return NaViTOutput(
            last_hidden_state=hidden_states,
            pooler_output=self._pool(hidden_states, prefix, layout, image_grid_thw[:, 0], segments),
            prefix_hidden_state=prefix,
            patch_index=patch_index,
            keep_index=keep_index,
        )

    def _encode(
        self, hidden_states: Tensor, layout: PatchLayout, segments: Segments, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the layers over `(L, D)`.

        Returns:
            Normalised patches `(L, D)`; prefix tokens `(S, K, D)` and the places `(L,)` of patches among them, if any.
        """
        config, rotary, places = self.config, None, None
        if config.rotary_theta is not None:
            head_dim = config.hidden_size // config.num_attention_heads
            rotary = axial_rotary(layout.position_ids, head_dim, config.rotary_theta)
        if self.prefix is not None:
            count = self.prefix.count
            places = get_prefix_places(segments.cu_seqlens, hidden_states.shape[0], count, segments.cu_seqlens_cpu)
            hidden_states = self.prefix(hidden_states, places)
            rotary = None if rotary is None else insert_unrotated(rotary, places)
            segments = Segments(places.cu_seqlens, segments.max_seqlen + count, places.cu_seqlens_cpu)
        segments = segments._replace(rotary=rotary)
        # Dense weights are those of all pairs of tokens, so they are made in one go.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, dense_attention_forward)
        is_dense = attend is dense_attention_forward
        passes = [Pass(segments)] if is_dense else split_passes(segments, hidden_states, config.intermediate_size)
        for layer in self.layers:
            hidden_states = layer(hidden_states, passes, **options)
        hidden_states = self.norm(hidden_states)
        if places is None:
            return hidden_states, None, None
        return hidden_states[places.patches], hidden_states[places.prefix], places.patches

    def _pool(
        self, hidden_states: Tensor, prefix: Tensor | None, layout: PatchLayout, frames: Tensor, segments: Segments
    ) -> Tensor | None:
        """One vector for each image, `(n, D)`; those of padding examples mean nothing."""
        images, kind = frames.shape[0], self.config.pooling
        if self.pooling is not None:
            one_segment_each = layout.cu_images.shape == segments.cu_seqlens.shape
            cu_images_cpu = segments.cu_seqlens_cpu if one_segment_each else None
            return self.pooling(hidden_states, layout.cu_images, hidden_states.shape[0], cu_images_cpu)[:images]
        if kind == "mean":
            return mean_pooling(hidden_states, layout.image_ids, images)
        if kind == "max":
            return max_pooling(hidden_states, layout.image_ids, images)
        if kind == "none" or prefix is None:
            return None
        if self.config.video_attention == "clip":
            return prefix[:images, 0]
        # The mean over the frames of a video, but for those of which no patch was kept.
        lengths = segments.cu_seqlens.diff()
        owners = frames.clamp(min=1).cumsum(0)
        owners = torch.searchsorted(owners, torch.arange(lengths.shape[0], device=owners.device), right=True)
        return mean_pooling(prefix[:, 0], torch.where(lengths > 0, owners, images), images)


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
        """Save the model and its code, such that `AutoModel` finds the encoder there too."""
        add_auto_classes(self, AutoModel=NaViTModel)
        super().save_pretrained(save_directory, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Classify packed images.

        Args:
            pixel_values: `(L, C*P*P)` patches, as for [`NaViTModel`].
            image_grid_thw: `(n, 3)` int64.
            labels: `(n,)` int64 classes; or `(n, num_labels)` float, for several classes at once (sigmoid
                cross-entropy, as the paper trains) or for regression, by `config.problem_type` as everywhere in
                transformers. An image with the label -100 (everywhere in its row) counts nowhere: padding examples
                have it.
            num_items_in_batch: Number of images that the loss of classes is divided by, in place of those in this
                batch; the Trainer gives it where it accumulates gradients.
            **kwargs: Everything else that [`NaViTModel`] takes.

        Returns:
            `logits` `(n, num_labels)`, and the mean `loss` over the images with labels.

        Raises:
            ValueError: If the number of labels is not that of the images.
        """
        outputs = self.navit(pixel_values, image_grid_thw, **kwargs)
        logits, loss = self.classifier(outputs.pooler_output), None
        if labels is not None:
            if labels.shape[:1] != logits.shape[:1]:
                raise ValueError(
                    f"`labels` must hold one entry for each of the {logits.shape[0]} images, "
                    f"got {tuple(labels.shape)}."
                )
            rows = logits
            if labels.is_floating_point():
                counted = (labels != IGNORE_INDEX).flatten(1).any(-1) if labels.ndim > 1 else labels != IGNORE_INDEX
                rows, labels = logits[counted], labels[counted]
            loss = self.loss_function(labels, rows, self.config, num_items_in_batch=num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
