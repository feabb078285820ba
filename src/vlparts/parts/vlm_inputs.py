"""Images and videos of the composed model: features, placeholders, and the positions that follow from them.

Shapes: B samples, S tokens of a sample, n images or videos of the batch, T tokens of all of them, E width of the text
model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .vlm_features import encode_images, grids_of_images, require_inputs, tower_kind
from .vlm_positions import multimodal_positions
from .vlm_projectors import Projector


class MultimodalInputsMixin:
    """What a model with a `vision_tower`, a `projector` and token embeddings does with images and videos."""

    config: PreTrainedConfig
    vision_tower: PreTrainedModel
    projector: Projector
    get_input_embeddings: Callable[[], nn.Module]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode and project images.

        Args:
            pixel_values: What the vision tower takes: packed `(L, C*P*P)`, padded `(n, patches, C*P*P)`, or square
                `(n, C, H, W)`.
            image_grid_thw: `(n, 3)` int64 for packed towers.
            pixel_attention_mask: `(n, patches)` for padded towers (Siglip2).
            spatial_shapes: `(n, 2)` rows and columns for padded towers (Siglip2).
            **kwargs: Precomputed inputs of packed towers, with the prefix "image_" (`image_cu_seqlens`,
                `image_max_seqlen`, `image_position_ids`).

        Returns:
            The tower's output with `pooler_output` replaced by a tuple of n tensors `(tokens, E)`. While compiling it
            holds one tensor `(T, E)`, since the lengths of the images are not known to the compiler.
        """
        precomputed = _without_prefix(kwargs, "image")
        return self._encode(pixel_values, image_grid_thw, pixel_attention_mask, spatial_shapes, **precomputed)

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode and project videos, frame by frame.

        Args:
            pixel_values_videos: `(L, C*P*P)` packed patches, frame after frame.
            video_grid_thw: `(n, 3)` int64 frames, rows and columns.
            **kwargs: Precomputed inputs, as for images, with the prefix "video_".

        Returns:
            As for images: `pooler_output` holds one tensor `(tokens, E)` for each video.

        Raises:
            ValueError: If the vision tower does not take packed frames, or grids are missing.
        """
        if tower_kind(self.vision_tower) != "packed":
            raise ValueError(
                f"`pixel_values_videos` were given, but the vision tower {type(self.vision_tower).__name__} takes "
                "single images; expected one that takes `image_grid_thw`."
            )
        require_inputs(video_grid_thw=video_grid_thw)
        return self._encode(pixel_values_videos, video_grid_thw, **_without_prefix(kwargs, "video"))

    def _encode(
        self,
        pixel_values: Tensor,
        grid_thw: Tensor | None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **precomputed: Any,
    ) -> BaseModelOutputWithPooling:
        outputs, taps, patches = encode_images(
            self.vision_tower,
            pixel_values,
            grid_thw,
            pixel_attention_mask,
            spatial_shapes,
            layer=self.config.vision_feature_layer,
            merge_size=self.config.merge_size,
            **precomputed,
        )
        tokens = self.projector(*taps)
        if torch.compiler.is_compiling():
            outputs.pooler_output = (tokens,)
        else:
            outputs.pooler_output = tokens.split((patches // self.config.merge_size**2).tolist())
        return outputs

    def get_placeholder_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, kind: str = "image"
    ) -> Tensor:
        """Find the placeholders `(B, S)` of "image" or "video", in the ids if given, otherwise by embeddings."""
        token_id = getattr(self.config, f"{kind}_token_id")
        if token_id is None:
            raise ValueError(f"`config.{kind}_token_id` must be set for inputs with {kind}s, got None.")
        if input_ids is not None:
            return input_ids == token_id
        placeholder = torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)

    def get_multimodal_position_ids(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        pixel_values: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> Tensor:
        """Positions of whole texts for a text model with multimodal rotary positions.

        Generation and `forward` compute them where they are absent. To go on from a cache, `forward` needs the columns
        of the new tokens, and generation all of them where new images come in. Works on the host.

        Args:
            input_ids: `(B, S)` int64.
            inputs_embeds: `(B, S, E)` in place of `input_ids`.
            attention_mask: `(B, S)`, 0 at padding.
            position_ids: `(B, S)` places in the text; where they start anew in a row, another text begins.
            image_grid_thw: `(n, 3)` grids of all images of the texts.
            video_grid_thw: `(n, 3)` grids of all videos.
            pixel_values: Where the tower takes images of one size, `(n, C, H, W)`, in place of grids.
            spatial_shapes: Where the tower takes padded rows of patches, `(n, 2)`, in place of grids.

        Returns:
            `(4, B, S)` int64: place in the text, time, row, column.

        Raises:
            ValueError: If both or neither of ids and embeddings are given, or if placeholders and grids do not match.
        """
        grids = {
            "image": grids_of_images(self.vision_tower, pixel_values, image_grid_thw, spatial_shapes),
            "video": video_grid_thw,
        }
        given = [tensor for tensor in (input_ids, inputs_embeds) if tensor is not None]
        if len(given) != 1:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        masks = [
            torch.zeros(given[0].shape[:2], dtype=torch.bool, device=given[0].device)
            if grid is None and getattr(self.config, f"{kind}_token_id") is None
            else self.get_placeholder_mask(input_ids, inputs_embeds, kind)
            for kind, grid in grids.items()
        ]
        return multimodal_positions(
            *masks,
            image_grid_thw=grids["image"],
            video_grid_thw=grids["video"],
            merge_size=self.config.merge_size,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )


def _without_prefix(inputs: dict[str, Any], kind: str) -> dict[str, Any]:
    return {name.removeprefix(f"{kind}_"): one for name, one in inputs.items() if name.startswith(f"{kind}_")}
