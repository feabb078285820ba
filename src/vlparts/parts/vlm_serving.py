"""What inference servers ask of a composed model and its processor, and the methods that only they call.

The transformers backends of vLLM and SGLang serve a saved folder without `vlparts`, by this contract:

- Layers: a server replaces linear, normalisation, embedding and experts layers. Model code calls such a layer and
  reads none of its attributes, like `in_features`.
- Keys: weights that match `_keys_to_ignore_on_load_unexpected` are dropped. The patterns name only modules that are
  never built; the head is not among them.
- Logits: a server computes them itself, with a bias, `logit_scale` and `final_logit_softcapping`, and embeds tokens
  without a factor. Text models with other factors are refused when they are built, see [`check_servable`].
- Features: `get_image_features(pixel_values, return_dict=True, **fields).pooler_output` has one tensor per image,
  `get_video_features` the same for videos.
- Samples: the tokens of several requests are one row, whose positions restart. The server's attention keeps them
  apart, see [`server_of`]; the model must not.
- Positions: [`ServedModelMixin.get_rope_index`] gives those of a text model with multimodal rotary positions.
- Processor: it is called with a text of nothing but placeholders and `return_text_replacement_offsets=True`. The
  result for an image or video may depend on nothing else in the call, since a server keeps it. A field has as many
  rows per image as `image_grid_thw` or [`ServedProcessor._get_num_multimodal_tokens`] says, or is a list with
  one tensor per image.
- Videos: a processor without a placeholder of videos has no `video_processor`, by which a server knows.
- Names: the `model_input_names` of `image_processor` and `video_processor` are disjoint.
- Configurations are pickled by value with all that their modules reach: they import no model and no operation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .redundant_patches import count_within_budget
from .rope_multimodal import get_multimodal_position_ids
from .token_reduction import VisionTokenReducer
from .token_reduction_types import TokenReduction
from .utils import server_of
from .vlm_features import get_square_grid, pixel_layout
from .vlm_reduction import find_places

_SERVED_FIELDS = {"multiplier": "logit_scale", "softcap": "final_logit_softcapping"}


def check_servable(config: PreTrainedConfig) -> None:
    """Check, if a server builds the model, that it computes the logits of the text model.

    Args:
        config: Configuration of a composed model. The server is recognised by the attention of `text_config`.

    Raises:
        ValueError: If the text model has a factor that the server leaves out; names it.
    """
    if server_of(config.text_config) is None:
        return
    for name, field in config.head_rule._asdict().items():
        if name == "bias" or not field or _SERVED_FIELDS.get(name) == field:
            continue
        value = getattr(config.text_config, field, None)
        if value not in (None, 1):
            raise ValueError(
                f"`text_config.{field}` must be 1 for a text model of type {config.text_config.model_type!r} on a "
                f"server, whose transformers backend leaves out this factor, got {value}. Serve it by `generate`."
            )
    if config.reduction is not None and config.reduction.kind.chooses and config.has_multimodal_positions:
        raise ValueError(
            "`token_reduction` must be one that leaves a grid, such as 'average_pool', on a server of a text model "
            "with an 'mrope_section', since the server asks for positions before images are encoded, got "
            f"{config.token_reduction!r}."
        )


class ServedModelMixin:
    """Methods of the model without a head that only servers call."""

    config: PreTrainedConfig
    vision_tower: PreTrainedModel
    token_reducer: VisionTokenReducer | None

    def get_rope_index(
        self,
        input_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute multimodal positions of whole prompts, see [`get_multimodal_position_ids`].

        Args:
            input_ids: `(B, S)` int64, with one placeholder per feature.
            image_grid_thw: `(n, 3)` grids of the images; not needed for encoders of images of one size.
            video_grid_thw: `(n, 3)` grids of the videos.
            attention_mask: `(B, S)`, 0 at padding.

        Returns:
            `(3, B, S)` int64 time, row and column of each token; `(B, 1)` int64, the position of the next token minus
            the number of tokens.

        Raises:
            ValueError: If the grids of the images are unknown, or do not match the placeholders.
        """
        places = None if self.config.image_token_id is None else input_ids == self.config.image_token_id
        if image_grid_thw is None and places is not None and places.any():
            image_grid_thw = self._grids_of_one_size(int(places.sum()))
        return get_multimodal_position_ids(
            input_ids,
            image_token_id=self.config.image_token_id,
            image_grid_thw=image_grid_thw,
            video_token_id=self.config.video_token_id,
            video_grid_thw=video_grid_thw,
            spatial_merge_size=self.config.merge_size,
            attention_mask=attention_mask,
            image_places=find_places(self, image_grid_thw),
            video_places=find_places(self, video_grid_thw),
        )

    def _grids_of_one_size(self, num_tokens: int) -> Tensor:
        layout = pixel_layout(self.vision_tower)
        if layout != "square":
            raise ValueError(
                f"`image_grid_thw` must be given for images of a vision encoder of type "
                f"{self.config.vision_config.model_type!r} and a text model with an 'mrope_section', got None."
            )
        size = self.config.vision_config.image_size
        rows, columns = get_square_grid(self.vision_tower, *((size, size) if isinstance(size, int) else size))
        tokens = rows * columns // self.config.merge_size**2
        if self.config.reduction is not None:
            tokens = self.config.reduction.count_tokens(*(side // self.config.merge_size for side in (rows, columns)))
        return torch.tensor([[1, rows, columns]]).expand(num_tokens // tokens, -1)


class VideoView:
    """The image processor of a processor as its video processor: what it returns for videos has names of its own."""

    model_input_names = ["pixel_values_videos", "video_grid_thw"]

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __getattr__(self, name: str) -> Any:
        if name == "image_processor":  # while it is copied
            raise AttributeError(name)
        return getattr(self.image_processor, name)

    def __call__(self, videos: Any, **kwargs: Any) -> Any:
        """Process videos, see `preprocess_videos` of the image processor."""
        return self.image_processor.preprocess_videos(videos, **kwargs)


class ServedProcessor(ProcessorMixin):
    """Base class of a processor, with what it does for servers alone."""

    image_processor: Any
    image_token: str
    video_token: str | None
    spatial_merge_size: int
    image_seq_length: int | None
    patch_size: int | None
    token_reduction: dict[str, Any] | None
    count_image_tokens: Callable[[Any, int], int]
    _to_model_inputs: Callable[[Any], Any]

    @property
    def reduction(self) -> TokenReduction | None:
        """How the model reduces the tokens of an image; None if it does not."""
        return None if self.token_reduction is None else TokenReduction(**self.token_reduction)

    def _called_by_server(self, text: Any, options: dict[str, Any]) -> bool:
        """Whether the text is nothing but placeholders, and the offsets of their replacements are asked for."""
        if not text or not options.get("return_text_replacement_offsets"):
            return False
        for sample in [text] if isinstance(text, str) else text:
            for token in (self.image_token, self.video_token):
                sample = sample.replace(token, "") if token else sample
            if sample.strip():
                return False
        return True

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        """Process images, videos and text.

        For a server, each video has its own budget of pixels, and some fields are lists with one tensor per image:
        `pixel_values` `(C, H, W)` of padded images, without the padding; of views `image_tile_grid` `(2,)`, and
        `image_view_grid` `(views, 3)` instead of `image_grid_thw`.
        """
        process = super().__call__
        if not self._called_by_server(text, kwargs):
            return process(images=images, text=text, videos=videos, **kwargs)
        if videos is not None and hasattr(self.image_processor, "video_shared_budget"):
            kwargs["videos_kwargs"] = {**kwargs.get("videos_kwargs", {}), "video_shared_budget": False}
        if getattr(self.image_processor, "drop_redundant_patches", False):
            raise ValueError(
                "`drop_redundant_patches` must be False on a server, which counts the tokens of an image by its size."
            )
        data = process(images=images, text=text, videos=videos, **kwargs)
        if "image_tile_grid" in data:
            tiles = torch.as_tensor(data["image_tile_grid"])
            data["image_tile_grid"] = list(tiles)
            if "image_grid_thw" in data:
                views = (tiles.prod(-1) + 1).tolist()
                data["image_view_grid"] = list(torch.as_tensor(data.pop("image_grid_thw")).split(views))
        if self.patch_size is not None and "pixel_values" in data:  # images are padded to the largest in the call
            sides = (torch.as_tensor(data["spatial_shapes"]) * self.patch_size).tolist()
            images = zip(torch.as_tensor(data["pixel_values"]), sides, strict=True)
            data["pixel_values"] = [image[:, :height, :width].contiguous() for image, (height, width) in images]
        return data

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        video_sizes: Sequence[tuple[int, int, int]] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Count the tokens of images and videos, and the rows of `pixel_values` of images.

        Args:
            image_sizes: Height and width of each image.
            video_sizes: Number of frames, height and width of each video.
            **kwargs: Options of the image processor that replace its own.
        """
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            counts["num_image_tokens"], counts["num_image_patches"] = self._count_images(image_sizes, kwargs)
        can_count = self.video_token is not None and hasattr(self.image_processor, "get_video_grid_thw")
        if video_sizes is not None and can_count:
            grids = [self.image_processor.get_video_grid_thw(*size, **kwargs) for size in video_sizes]
            counts["num_video_tokens"] = [frames * self._count_frame(*sides) for frames, *sides in grids]
        return MultiModalData(**counts)

    def _count_images(self, sizes: Sequence[tuple[int, int]], options: dict[str, Any]) -> tuple[list[int], list[int]]:
        processor = self.image_processor
        count = getattr(processor, "get_number_of_image_patches", None)
        if self.image_seq_length is not None:
            tiled = hasattr(processor, "get_tile_grid")
            views = [count(height, width, options) if tiled and count else 1 for height, width in sizes]
            return [self.image_seq_length * number for number in views], views
        if count is None:  # a native processor of padded images, one row each
            blank = [
                Image.new("RGB", (width, height)) for height, width in sizes
            ]  # axes of small arrays are ambiguous
            processed = self._to_model_inputs(processor(blank, **options))
            return [self.count_image_tokens(processed, index) for index in range(len(blank))], [1] * len(blank)
        patches = [count(height, width, options) for height, width in sizes]
        if hasattr(processor, "get_number_of_image_tokens"):
            fewer = {} if self.reduction is None else {"reduction": self.reduction}
            return [processor.get_number_of_image_tokens(*size, options, **fewer) for size in sizes], patches
        if getattr(processor, "drop_redundant_patches", False):
            patches = [self._count_kept(number) for number in patches]
        elif self.reduction is not None and hasattr(processor, "get_grid_thw"):
            grids = [processor.get_grid_thw(*size, **options) for size in sizes]
            return [frames * self._count_frame(*sides) for frames, *sides in grids], patches
        tokens = [number // self.spatial_merge_size**2 for number in patches]
        return [one if self.reduction is None else self.reduction.count_tokens(one) for one in tokens], patches

    def _count_kept(self, patches: int) -> int:
        """Number of patches of an image that are kept of `patches`, within the budget of the image processor."""
        area = self.spatial_merge_size**2
        return area * count_within_budget(patches // area, self.image_processor.token_budget)

    def _count_frame(self, rows: int, columns: int) -> int:
        """Number of tokens of a frame of `rows` x `columns` patches."""
        if self.reduction is None:
            return rows * columns // self.spatial_merge_size**2
        return self.reduction.count_tokens(rows // self.spatial_merge_size, columns // self.spatial_merge_size)
