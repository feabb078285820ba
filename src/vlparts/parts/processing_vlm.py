"""Text and images to the inputs of the composed vision-language model."""

from typing import Any

from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

# ChatML with the tokenizer's own end-of-sequence token, so that generation stops where training said it should.
DEFAULT_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for block in message['content'] -%}"
    "{%- if block['type'] == 'image' -%}{{ '<image>\\n' }}"
    "{%- elif block['type'] == 'text' -%}{{ block['text'] }}"
    "{%- else -%}{{ raise_exception('A content block must have the type image or text, got ' + block['type']) }}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ eos_token + '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


class VisionLanguageProcessor(ProcessorMixin):
    """Tokenizer and image processor of a [`VisionLanguageForConditionalGeneration`] in one.

    Each image token in the text is repeated as often as the model has features for that image.

    Args:
        image_processor: Any image processor: ours (packed patches), Siglip2's (padded), or a square one (CLIP, ...).
        tokenizer: Any tokenizer that has `image_token`.
        chat_template: Jinja template; the default is ChatML that ends turns with the tokenizer's `eos_token`.
        spatial_merge_size: Side m of the block of patches that becomes one token.
        image_seq_length: Tokens of an image where all images have the same number (square image processors).
        image_token: The placeholder in the text.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        spatial_merge_size: int = 1,
        image_seq_length: int | None = None,
        image_token: str = "<image>",
    ) -> None:
        token_id = tokenizer.convert_tokens_to_ids(image_token)
        if token_id is None or token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"`tokenizer` has no token {image_token!r}; add it with "
                f"tokenizer.add_special_tokens({{'extra_special_tokens': [{image_token!r}]}})."
            )
        self.image_token = image_token
        self.image_token_id = token_id
        self.spatial_merge_size = spatial_merge_size
        self.image_seq_length = image_seq_length
        template = chat_template or DEFAULT_CHAT_TEMPLATE.replace("<image>", image_token)
        super().__init__(image_processor, tokenizer, chat_template=template)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Check placeholders against images, sample by sample where images are given as one list for each sample.

        Raises:
            ValueError: If a sample has more or fewer placeholders than images (names the sample), or the totals
                differ.
        """
        samples = [text] if isinstance(text, str) else text
        nested = isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)
        if nested and samples is not None and len(images) == len(samples):
            for index, (sample, group) in enumerate(zip(samples, images, strict=True)):
                given, placeholders = (
                    len(make_flat_list_of_images(group) if group else []),
                    sample.count(self.image_token),
                )
                if given != placeholders:
                    raise ValueError(
                        f"Sample {index} has {placeholders} {self.image_token} tokens in `text`, but {given} images."
                    )
        super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that takes the place of the placeholder of image `image_idx`."""
        return self.image_token * self.count_image_tokens(image_inputs, image_idx)

    def count_image_tokens(self, image_inputs: dict[str, Any], image_idx: int) -> int:
        """Tokens of one image in the output of the image processor."""
        for name in ("image_grid_thw", "spatial_shapes"):
            if name in image_inputs:
                patches = 1
                for side in image_inputs[name][image_idx]:
                    patches *= int(side)
                return patches // self.spatial_merge_size**2
        if self.image_seq_length is None:
            raise ValueError(
                "`image_seq_length` must be set for an image processor that returns neither `image_grid_thw` nor "
                "`spatial_shapes`, got None."
            )
        return self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any) -> Any:
        """Tokens and patches of images of the given `(height, width)` sizes (the name that inference servers call)."""
        if image_sizes is None:
            return MultiModalData()
        if self.image_seq_length is not None:
            tokens = [self.image_seq_length] * len(image_sizes)
            return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(image_sizes))
        count = self.image_processor.get_number_of_image_patches
        patches = [count(height, width, kwargs) for height, width in image_sizes]
        tokens = [number // self.spatial_merge_size**2 for number in patches]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=patches)


__all__ = ["VisionLanguageProcessor"]
