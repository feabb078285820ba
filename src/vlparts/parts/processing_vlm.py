"""Text, images and videos to the inputs of the composed vision-language model."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.image_utils import make_flat_list_of_images

from .chat_placeholders import chat_template_of
from .chat_templates import DEFAULT_CHAT_TEMPLATE
from .image_arrays import read_images
from .image_transforms import flat_list_of_videos, images_by_sample, videos_by_sample
from .vlm_serving import ServedProcessor, VideoView

# What native image processors return beside the inputs of the model.
_NOT_FOR_THE_MODEL = (
    "image_merge_sizes",
    "image_position_ids",
    "image_sizes",
    "num_patches",
    "num_soft_tokens_per_image",
    "original_sizes",
    "reshaped_input_sizes",
)


class VisionLanguageProcessor(ServedProcessor):
    """Image processor and tokenizer of a [`VisionLanguageForConditionalGeneration`].

    Each image placeholder in the text is repeated once per feature of that image. Each video placeholder becomes one
    such group per frame, with `vision_end_token` and `vision_start_token` between two groups; the outermost ones are
    already in the text (openPangu-VL's layout).

    Batches are padded on the left, as generation needs it. `apply_chat_template` without `add_generation_prompt` and
    `continue_final_message`, which gives complete conversations for training, pads on the right. An explicit
    `padding_side` takes precedence.

    Videos are lists of frames or arrays with four axes; files are not decoded. They are given as `videos=...`, or in
    the conversation as `{"type": "video", "video": frames}`.

    Args:
        image_processor: Any image processor: ours (packed patches), Siglip2's (padded), or a square one (CLIP, ...).
            Videos need one with a method `preprocess_videos(videos, **options)` that returns `pixel_values_videos`
            and `video_grid_thw`.
        tokenizer: Any tokenizer that has `image_token`. Its `padding_side` is set to "left".
        chat_template: Jinja template; the default is the tokenizer's, extended by the placeholders if it is that of a
            text model. For a tokenizer without a template the default is ChatML, with its `eos_token` at the end of
            turns.
        spatial_merge_size: Side m of the block of patches that becomes one token.
        image_seq_length: Number of tokens per image, or per view of one, for square image processors.
        patch_size: Side of a patch in pixels, for image processors that return `image_sizes` (Pixtral's), from which
            `spatial_shapes` is computed.
        image_token: Placeholder of an image.
        video_token: Placeholder of a video; None for a model without videos.
        vision_start_token: Token before the placeholder of a video, and in a default template also of an image.
        vision_end_token: Token after it. Both or neither are given.
        token_reduction: How the model reduces the tokens of an image: fields of [`TokenReduction`]. `image_seq_length`
            counts the tokens that are left.

    Raises:
        ValueError: If the tokenizer lacks one of the tokens, the placeholders are the same, only one of
            `vision_start_token` and `vision_end_token` is given, there is no default for `chat_template`, or
            `token_reduction` is none.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        spatial_merge_size: int = 1,
        image_seq_length: int | None = None,
        image_token: str = "<image>",
        video_token: str | None = None,
        vision_start_token: str | None = None,
        vision_end_token: str | None = None,
        patch_size: int | None = None,
        token_reduction: dict[str, Any] | None = None,
    ) -> None:
        if (vision_start_token is None) != (vision_end_token is None):
            raise ValueError(
                "`vision_start_token` and `vision_end_token` must be given together, got "
                f"{vision_start_token!r} and {vision_end_token!r}."
            )
        if image_token == video_token:
            raise ValueError(f"`image_token` and `video_token` must differ, got {image_token!r} for both.")
        self.image_token, self.image_token_id = image_token, _token_id(tokenizer, image_token)
        self.video_token = video_token
        self.video_token_id = None if video_token is None else _token_id(tokenizer, video_token)
        self.vision_start_token, self.vision_end_token = vision_start_token, vision_end_token
        for token in (vision_start_token, vision_end_token):
            if token is not None:
                _token_id(tokenizer, token)
        self.spatial_merge_size = spatial_merge_size
        self.image_seq_length = image_seq_length
        self.patch_size = patch_size
        self.token_reduction = token_reduction
        _ = self.reduction  # raises a ValueError if there is no such reduction
        if chat_template is None:
            chat_template = chat_template_of(
                tokenizer, image_token, video_token, vision_start_token or "", vision_end_token or ""
            )
        # Also read by transformers' pipelines, which pad batches themselves.
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        *,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render conversations, as `ProcessorMixin.apply_chat_template` does.

        Batches of prompts are padded on the left, batches of complete conversations on the right, if neither
        `processor_kwargs` nor its `text_kwargs` have a `padding_side`.
        """
        templates = self.chat_template
        if chat_template is None and tools is not None and isinstance(templates, dict) and "tool_use" in templates:
            chat_template = "tool_use"  # as tokenizers do
        options = dict(processor_kwargs or {})
        if "padding_side" not in {**options, **options.get("text_kwargs", {}), **kwargs}:
            options["padding_side"] = "left" if add_generation_prompt or continue_final_message else "right"
        return super().apply_chat_template(
            conversation,
            chat_template,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            processor_kwargs=options,
            **kwargs,
        )

    @property
    def video_processor(self) -> Any:
        """The image processor as a video processor, if the model takes videos; used by transformers and servers."""
        if self.video_token is None:
            raise AttributeError("The processor has no `video_token`.")
        if not hasattr(self.image_processor, "preprocess_videos"):
            raise AttributeError(f"{type(self.image_processor).__name__} has no method `preprocess_videos`.")
        return VideoView(self.image_processor)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs of the model, with those of videos if it takes them."""
        return [*super().model_input_names, *(VideoView.model_input_names if hasattr(self, "video_processor") else ())]

    def prepare_inputs_layout(self, images: Any = None, **kwargs: Any) -> Any:
        """Read the images, so that each image processor gets the same pixels for one picture of any type.

        Images are Pillow images, arrays, tensors, paths or URLs. They become upright 8-bit RGB, see
        [`image_to_array`], unless the image processor has `do_convert_rgb=False` and takes them as they are.
        """
        if images is not None and getattr(self.image_processor, "do_convert_rgb", None) is not False:
            options = {**kwargs, **(kwargs.get("images_kwargs") or {})}
            images = read_images(images, options.get("input_data_format"))
        return super().prepare_inputs_layout(images=images, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> None:
        """Check that placeholders match images and videos, per sample if there is one list per sample.

        Raises:
            ValueError: If a sample has more or fewer placeholders than images or videos (names the sample), the totals
                differ, videos cannot be processed, or a video's placeholder is not enclosed in start and end tokens.
        """
        samples = [text] if isinstance(text, str) else text
        if videos is not None:
            self._check_videos(videos)
        if isinstance(samples, (list, tuple)) and all(isinstance(sample, str) for sample in samples):
            if not self._called_by_server(samples, kwargs):
                self._check_enclosed(samples)
            _check_samples(self.image_token, "images", samples, images_by_sample(images))
            if self.video_token is not None:
                _check_samples(self.video_token, "videos", samples, videos_by_sample(videos))
        super().validate_inputs(images=images, text=samples, videos=videos, **kwargs)

    def _check_videos(self, videos: Any) -> None:
        if self.video_token is None:
            raise ValueError("`videos` were given, but this processor has no `video_token`; expected None.")
        if not hasattr(self, "video_processor"):
            raise ValueError(
                f"`videos` were given, but the image processor {type(self.image_processor).__name__} has no method "
                "`preprocess_videos`."
            )
        if not flat_list_of_videos(videos):
            raise ValueError("`videos` is empty; expected None if there are no videos.")

    def _check_enclosed(self, samples: Sequence[str]) -> None:
        if self.video_token is None or self.vision_start_token is None or self.vision_end_token is None:
            return
        enclosed = self.vision_start_token + self.video_token + self.vision_end_token
        for index, sample in enumerate(samples):
            if sample.count(enclosed) != sample.count(self.video_token):
                raise ValueError(f"Sample {index} must have each {self.video_token} in `text` as {enclosed}.")

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        processed = self._to_model_inputs(self.image_processor(images, **kwargs))
        count = len(make_flat_list_of_images(images))
        return processed, [self.replace_image_token(processed, index, **kwargs) for index in range(count)]

    def process_image(self, image: Any) -> dict[str, Any]:
        """Return the inputs of the model for one image, as PyTorch tensors."""
        return dict(self._to_model_inputs(self.image_processor(image, return_tensors="pt")))

    def _to_model_inputs(self, processed: Any) -> Any:
        """Give the grids of Pixtral's and Gemma 4's images as `spatial_shapes`; drop what is not for the model."""
        shapes, given = None, None
        if self.patch_size is not None and "image_sizes" in processed:
            given = processed["image_sizes"]
            shapes = np.asarray(given) // self.patch_size
        if "image_position_ids" in processed:
            given = processed["image_position_ids"]  # column and row of each patch, -1 for padding
            shapes = np.asarray(given).max(1)[:, ::-1] + 1
        if shapes is not None:
            processed["spatial_shapes"] = torch.as_tensor(shapes.copy()) if torch.is_tensor(given) else shapes
        for name in _NOT_FOR_THE_MODEL:
            processed.pop(name, None)
        if "keep_index" in processed:
            processed["image_keep_index"] = processed.pop("keep_index")
        return processed

    def _process_videos(self, videos: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        videos = flat_list_of_videos(videos)
        processed = self.video_processor(videos, **kwargs)
        return processed, [self.replace_video_token(processed, index) for index in range(len(videos))]

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """Return the text that replaces the placeholder of video `video_idx`."""
        frames, rows, columns = (int(side) for side in video_inputs["video_grid_thw"][video_idx])
        frame = str(self.video_token) * self._count_frame(rows, columns)
        return f"{self.vision_end_token or ''}{self.vision_start_token or ''}".join([frame] * frames)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the text that replaces the placeholder of image `image_idx`."""
        return self.image_token * self.count_image_tokens(image_inputs, image_idx)

    def count_image_tokens(self, image_inputs: dict[str, Any], image_idx: int) -> int:
        """Return the number of tokens of one image in the output of the image processor."""
        if hasattr(self.image_processor, "count_tokens"):
            fewer = {} if self.reduction is None else {"reduction": self.reduction}
            return self.image_processor.count_tokens(image_inputs, image_idx, **fewer)
        if "image_keep_index" in image_inputs:
            patches = _count_kept(image_inputs["image_keep_index"], image_inputs["image_grid_thw"], image_idx)
            tokens = patches // self.spatial_merge_size**2
            return tokens if self.reduction is None else self.reduction.count_tokens(tokens)
        for name in ("image_grid_thw", "spatial_shapes"):
            if name in image_inputs:
                *frames, rows, columns = (int(side) for side in image_inputs[name][image_idx])
                return math.prod(frames) * self._count_frame(rows, columns)
        if self.image_seq_length is None:
            raise ValueError(
                "`image_seq_length` must be set for an image processor that returns neither `image_grid_thw` nor "
                "`spatial_shapes`, got None."
            )
        rows, columns = image_inputs["image_tile_grid"][image_idx] if "image_tile_grid" in image_inputs else (0, 0)
        return self.image_seq_length * (int(rows) * int(columns) + 1)


def _count_kept(keep_index: Any, grids: Any, image: int) -> int:
    """Number of patches of an image that were not dropped."""
    sizes = [math.prod(int(side) for side in grid) for grid in grids]
    start = sum(sizes[:image])
    kept = np.asarray(keep_index)
    return int(((kept >= start) & (kept < start + sizes[image])).sum())


def _token_id(tokenizer: Any, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise ValueError(
            f"`tokenizer` has no token {token!r}; add it with "
            f"tokenizer.add_special_tokens({{'extra_special_tokens': [{token!r}]}})."
        )
    return token_id


def _check_samples(token: str, name: str, samples: Sequence[str], groups: list[list[Any]] | None) -> None:
    """Compare the counts per sample if there is one list per sample."""
    if groups is None or len(groups) != len(samples):
        return
    for index, (sample, group) in enumerate(zip(samples, groups, strict=True)):
        if len(group) != sample.count(token):
            raise ValueError(
                f"Sample {index} has {sample.count(token)} {token} tokens in `text`, but {len(group)} {name}."
            )


__all__ = ["DEFAULT_CHAT_TEMPLATE", "VisionLanguageProcessor"]
