"""Inputs and logits of the composed model: images, videos, placeholders, multimodal positions, its head's scales.

Shapes: B samples, S tokens per sample, n images or videos of the batch, T tokens of all of them, E width of the text
model.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .ops_linear import apply_linear
from .packed_samples import run_text_model
from .token_reduction import VisionTokenReducer
from .utils import ForwardKwargs, server_of
from .vlm_distributed import blank_image, must_run
from .vlm_features import (
    encode_images,
    get_encoder_options,
    get_image_grids,
    pixel_layout,
    require_inputs,
)
from .vlm_positions import MultimodalPositionsMixin
from .vlm_projectors import Projector
from .vlm_reduction import reduce_and_project, reduce_views
from .vlm_views import sum_views

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class MultimodalInputsMixin(MultimodalPositionsMixin):
    """Inputs of a model with a `vision_tower`, a `projector` and a `language_model`."""

    config: PreTrainedConfig
    vision_tower: PreTrainedModel
    projector: Projector
    token_reducer: VisionTokenReducer | None
    language_model: PreTrainedModel
    get_input_embeddings: Callable[[], nn.Module]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_tile_grid: Tensor | None = None,
        image_keep_index: Tensor | None = None,
        **kwargs: ForwardKwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode and project images.

        Args:
            pixel_values: In the layout of the vision encoder: packed `(L, C*P*P)` (times the frames of a patch), rows
                of patches `(n, patches, C*P*P)`, or images `(n, C, H, W)`, padded (Pixtral) or of one size.
            image_grid_thw: `(n, 3)` int64 frames, rows and columns in patches, for packed encoders.
            pixel_attention_mask: `(n, patches)` for Siglip2.
            spatial_shapes: `(n, 2)` rows and columns in patches, for encoders of padded images or rows (Siglip2,
                Gemma 4, Pixtral).
            image_tile_grid: `(n, 2)` rows and columns of tiles, for images of several views: of DeepEncoder, or tiles
                and whole image as rows of `pixel_values` for encoders of images of one size.
            image_keep_index: `(L,)` int64 patches that are there, if redundant ones were dropped, for packed encoders
                of ours; whole blocks of m x m patches.
            **kwargs: `output_hidden_states`, `output_attentions`, and precomputed inputs of packed encoders, with the
                prefix "image_" (`image_cu_seqlens`, `image_max_seqlen`, `image_position_ids`). From servers also
                `image_view_grid`, instead of `image_grid_thw`: `(views, 3)` for each image.

        Returns:
            The encoder's output with `pooler_output` replaced by a tuple of n tensors `(tokens, E)`. While compiling
            it holds one tensor `(T, E)`, since the lengths of the images are unknown to the compiler. Where tokens are
            fewer than the grids say, `token_reduction` holds the [`ReducedTokens`] of all frames, and for text models
            with multimodal positions `token_places` where they are.

        Raises:
            ValueError: If the encoder needs another input, does not take a keyword argument, or an input does not fit.
        """
        views = kwargs.pop("image_view_grid", None)
        if views is not None:
            image_grid_thw = torch.cat(list(views))
        tiles = image_tile_grid if pixel_layout(self.vision_tower) == "square" else None
        if image_tile_grid is not None and tiles is None:
            kwargs["image_tile_grid"] = image_tile_grid
        if image_keep_index is not None:
            kwargs["image_keep_index"] = image_keep_index
        options = get_encoder_options(self.vision_tower, kwargs, "image")
        return self._encode(pixel_values, image_grid_thw, pixel_attention_mask, spatial_shapes, tiles, **options)

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None, **kwargs: ForwardKwargs
    ) -> BaseModelOutputWithPooling:
        """Encode and project videos, frame by frame.

        Args:
            pixel_values_videos: `(L, C*P*P)` packed patches, frame after frame.
            video_grid_thw: `(n, 3)` int64 frames, rows and columns.
            **kwargs: As there, with the prefix "video_"; see [`get_image_features`].

        Returns:
            The encoder's output, whose `pooler_output` holds one tensor `(tokens, E)` per video.

        Raises:
            ValueError: If the vision encoder does not take packed frames or a keyword argument, or `video_grid_thw` is
                missing.
        """
        if pixel_layout(self.vision_tower) != "packed":
            raise ValueError(
                f"`pixel_values_videos` were given, but the vision encoder {type(self.vision_tower).__name__} takes "
                "single images; expected one that takes `image_grid_thw`."
            )
        require_inputs(video_grid_thw=video_grid_thw)
        options = get_encoder_options(self.vision_tower, kwargs, "video")
        return self._encode(pixel_values_videos, video_grid_thw, **options)

    def encode_media(
        self,
        given: dict[str, BaseModelOutputWithPooling] | None,
        pixels: dict[str, Tensor | None],
        options: dict[str, Any],
        *,
        image_grid_thw: Tensor | None,
        video_grid_thw: Tensor | None,
        **inputs: Tensor | None,
    ) -> tuple[dict[str, BaseModelOutputWithPooling], dict[str, Tensor | None]]:
        """Encode images and videos, of which some may be encoded already.

        Args:
            given: Outputs by "image" and "video".
            pixels: Pixels by "image" and "video".
            options: Keyword arguments of `forward`; those with the prefixes "image_" and "video_" are taken out.
            image_grid_thw: `(n, 3)` grids of the images.
            video_grid_thw: `(n, 3)` grids of the videos.
            **inputs: Further inputs of [`get_image_features`].

        Returns:
            The outputs, and `(n, 3)` grids where these have rows that are images.

        Raises:
            ValueError: If images or videos are given twice.
        """
        media = {kind: outputs for kind, outputs in (given or {}).items() if outputs is not None}
        extra = {
            kind: {name: options.pop(name) for name in list(options) if name.startswith(f"{kind}_")}
            for kind in _PIXELS
        }
        for kind, values in pixels.items():
            if values is not None and kind in media:
                raise ValueError(f"You cannot specify both `{_PIXELS[kind]}` and `mm_encoder_outputs['{kind}']`.")
        grids: dict[str, Tensor | None] = {}
        if pixels["image"] is not None:
            grids["image"] = None  # rows of views
            if inputs["image_tile_grid"] is None:
                shapes = inputs["spatial_shapes"]
                grids["image"] = get_image_grids(self.vision_tower, pixels["image"], image_grid_thw, shapes)
            media["image"] = self.get_image_features(
                pixels["image"], image_grid_thw, **inputs, **extra["image"], return_dict=True
            )
        if pixels["video"] is not None:
            grids["video"] = video_grid_thw
            media["video"] = self.get_video_features(
                pixels["video"], video_grid_thw, **extra["video"], return_dict=True
            )
        return {kind: media[kind] for kind in _PIXELS if kind in media}, grids

    def _encode(
        self,
        pixel_values: Tensor,
        grid_thw: Tensor | None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        square_tiles: Tensor | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPooling:
        outputs, features, patches = encode_images(
            self.vision_tower,
            pixel_values,
            grid_thw,
            pixel_attention_mask,
            spatial_shapes,
            layer=self.config.vision_feature_layer,
            merge_size=self.config.merge_size,
            **options,
        )
        view_index = getattr(outputs, "view_index", None)
        if view_index is None and (self.token_reducer is not None or options.get("keep_index") is not None):
            grids = get_image_grids(self.vision_tower, pixel_values, grid_thw, spatial_shapes)
            keep_index = options.get("keep_index")
            return reduce_and_project(self, outputs, features, grids, keep_index, square_tiles)
        tokens = self.projector(*features, **({} if view_index is None else {"view_index": view_index}))
        if view_index is not None and self.token_reducer is not None:
            reduced = reduce_views(self.token_reducer, tokens, view_index, outputs.tokens_per_image.tolist())
            outputs.pooler_output, outputs.token_reduction = reduced.tokens.split(reduced.lengths), reduced
        elif torch.compiler.is_compiling():
            outputs.pooler_output = (tokens,)
        else:
            lengths = patches // self.config.merge_size**2 if view_index is None else outputs.tokens_per_image
            if square_tiles is not None:
                lengths = sum_views(lengths, square_tiles)
            outputs.pooler_output = tokens.split(lengths.tolist())
        return outputs

    def encode_blank_image(self, device: torch.device) -> Tensor | None:
        """Encode and project a blank image, `(tokens, E)`, if other processes wait for it; see [`must_run`]."""
        if server_of(self.config.text_config) is not None or not must_run(*self._vision_modules()):
            return None
        blank = blank_image(self.vision_tower, self.config.merge_size, device)
        return torch.cat(tuple(self.get_image_features(**blank, return_dict=True).pooler_output))

    def _vision_modules(self) -> list[nn.Module]:
        modules = (self.vision_tower, self.projector, self.token_reducer)
        return [module for module in modules if module is not None]

    def embed_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Embed tokens, int64 of any shape to `(..., E)`, as the text model does; or return given embeddings."""
        if inputs_embeds is not None:
            return inputs_embeds
        embeddings = self.get_input_embeddings()(input_ids)
        multiplier = _text_number(self.config, self.config.head_rule.embedding_multiplier)
        return embeddings if multiplier is None else embeddings * multiplier

    def run_language_model(self, **inputs: Any) -> BaseModelOutputWithPast:
        """Run the text model on `inputs_embeds`; each of several samples in a row as if alone."""
        if inputs["position_ids"] is None and "cu_seq_lens_q" not in inputs:
            return self.language_model(**inputs)
        return run_text_model(self.language_model, self.language_model, **inputs)

    def get_placeholder_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, kind: str = "image"
    ) -> Tensor:
        """Return the mask `(B, S)` of the placeholders of "image" or "video".

        Placeholders are found in `input_ids` if given, otherwise by comparing `inputs_embeds` with their embedding.
        """
        token_id = getattr(self.config, f"{kind}_token_id")
        if token_id is None:
            raise ValueError(f"`config.{kind}_token_id` must be set for inputs with {kind}s, got None.")
        if input_ids is not None:
            return input_ids == token_id
        placeholder = torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.embed_tokens(placeholder)).all(-1)


def _text_number(config: PreTrainedConfig, name: str) -> float | None:
    """A number of the text model's configuration; None if it is unset or the name empty."""
    return getattr(config.text_config, name, None) if name else None


def build_head(config: PreTrainedConfig) -> nn.Linear:
    """Build the language head of a composed model, with a bias if its text model's own head has one."""
    return nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=config.head_rule.bias)


def compute_logits(head: nn.Module, hidden_states: Tensor, config: PreTrainedConfig) -> Tensor:
    """Compute logits as the text model's own class does.

    Args:
        head: Language head, any module from E to V channels.
        hidden_states: `(..., E)`, the last hidden states.
        config: Configuration of the composed model, whose `head_rule` names the scales and the soft cap.

    Returns:
        `(..., V)`.
    """
    rule = config.head_rule
    numbers = (
        _text_number(config, name) for name in (rule.hidden_divisor, rule.multiplier, rule.divisor, rule.softcap)
    )
    hidden_divisor, multiplier, divisor, softcap = numbers
    logits = apply_linear(head, hidden_states if hidden_divisor is None else hidden_states / hidden_divisor)
    if multiplier is not None:
        logits = logits * multiplier
    if divisor is not None:
        logits = logits / divisor
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def check_placeholders(
    mask: Tensor, tokens: Sequence[int], kind: str = "image", frames: Sequence[int] | None = None
) -> None:
    """Check that placeholders and features match, sample by sample and run by run.

    A run is a row of placeholders without text in between. Consecutive images, or frames of videos, fill it exactly.

    Args:
        mask: `(B, S)` bool, true at the placeholders.
        tokens: Tokens of each image (or video) of the batch, in order.
        kind: "image" or "video", for the error message.
        frames: Frames of each image (or video), which divide its tokens equally. If None, they are unknown, and a run
            may also be any part of one image (or video).

    Raises:
        ValueError: If the images of a sample do not have as many tokens as the sample has placeholders, even if the
            totals of the batch agree, or do not fill its runs of placeholders; names the sample, the placeholders and
            the features.
    """
    mismatch = f"{kind.capitalize()} features and {kind} tokens do not match"
    article = "an" if kind == "image" else "a"
    parts = [1] * len(tokens) if frames is None else frames
    remaining = iter(zip(tokens, parts, strict=True))
    for sample, runs in enumerate(_lengths_of_runs(mask)):
        placeholders, features = sum(runs), list[int]()
        pieces: list[int] = []
        while sum(features) < placeholders:
            following = next(remaining, None)
            if following is None:
                break
            features.append(following[0])
            pieces += [following[0] // following[1]] * following[1]
        written = " + ".join(map(str, features)) or "0"
        if sum(features) != placeholders:
            raise ValueError(
                f"{mismatch}: sample {sample} has {placeholders} {kind} tokens, but its {kind}s have {written} "
                f"features. Was it truncated inside {article} {kind}?"
            )
        if not _fill_runs(runs, pieces, divisible=frames is None):
            raise ValueError(
                f"{mismatch}: sample {sample} has {kind} tokens in runs of {', '.join(map(str, runs))}, but its "
                f"{kind}s have {written} features in this order. Expected {kind}s in the order of the text."
            )
    unused = [count for count, _ in remaining]
    if unused:
        raise ValueError(
            f"{mismatch}: {len(unused)} {kind}s with {sum(unused)} features have no {kind} tokens in any of the "
            f"{len(mask)} samples."
        )


def _lengths_of_runs(mask: Tensor) -> list[list[int]]:
    """Lengths of the runs of true values in each row of a mask `(B, S)`."""
    edges = torch.nn.functional.pad(mask.cpu().int(), (1, 1)).diff()
    rows, starts = (edges == 1).nonzero(as_tuple=True)
    lengths = (edges == -1).nonzero()[:, 1] - starts
    runs: list[list[int]] = [[] for _ in mask]
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        runs[row].append(length)
    return runs


def _fill_runs(runs: list[int], pieces: list[int], divisible: bool) -> bool:
    """Whether consecutive pieces fill each run exactly; if they are divisible, a run may also be part of one piece."""
    ends = set(accumulate(pieces, initial=0))
    for start, end in pairwise(accumulate(runs, initial=0)):
        exact = start in ends and end in ends
        if not exact and not (divisible and not any(start < place < end for place in ends)):
            return False
    return True


def fill_placeholders(
    inputs_embeds: Tensor, mask: Tensor, features: Sequence[Tensor], kind: str, grid_thw: Tensor | None = None
) -> Tensor:
    """Replace the embeddings of placeholders by features.

    Args:
        inputs_embeds: `(B, S, E)`.
        mask: `(B, S)` bool, true at the placeholders.
        features: `(tokens, E)` of each image (or video) of the batch, in order.
        kind: "image" or "video", for the error message.
        grid_thw: `(n, 3)` grids of the images (or videos), whose frames the check then knows.

    Returns:
        `(B, S, E)`.

    Raises:
        ValueError: If placeholders and features do not match (not checked while compiling).
    """
    if not torch.compiler.is_compiling():
        frames = None if grid_thw is None else grid_thw[:, 0].tolist()
        check_placeholders(mask, [len(tokens) for tokens in features], kind, frames)
    tokens = torch.cat(tuple(features)).to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(mask.unsqueeze(-1), tokens)
