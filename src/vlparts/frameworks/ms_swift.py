"""The plugin for ms-swift: composed models as the model type `vlparts_vlm`, with the template `vlparts`.

Given to ms-swift as the file of `--external_plugins`, which is run outside of its package, so that its imports are
absolute. Samples are encoded by [`SampleEncoder`], as in `vlparts train`: by the processor and the chat template of
the folder, not by formats of ms-swift.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from swift.model import ModelLoader, ModelMeta, MultiModelKeys, register_model, register_model_arch
from swift.template import StdTemplateInputs, Template, TemplateMeta, load_file, register_template
from torch import Tensor
from transformers import AutoModelForImageTextToText

from vlparts.frameworks import MODULES
from vlparts.parts.chat_placeholders import end_of_turn_id
from vlparts.parts.configuration_vlm import VisionLanguageConfig
from vlparts.parts.image_files import open_image, read_image
from vlparts.parts.modeling_vlm import VisionLanguageForConditionalGeneration
from vlparts.training.encoding import SampleEncoder, join_images

MODEL_TYPE = VisionLanguageConfig.model_type
TEMPLATE = "vlparts"
# Image inputs of the model, in batches and in packed rows joined along the first dimension.
IMAGE_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_tile_grid",
    "image_keep_index",
)

# Options of ms-swift's templates that have no counterpart in a chat template, and their values when not set.
_OPTIONS = {
    "use_chat_template": True,
    "enable_thinking": False,
    "preserve_thinking": None,
    "response_prefix": None,
    "sequence_parallel_size": 1,
}
_ROLES = ("system", "user", "assistant")


class ComposedModelTemplate(Template):
    """Encodes conversations with images by the processor of a composed model.

    `<image>` in a text is the place of the next image; images without a place are put before the first turn.

    Raises:
        ValueError: If an option or a field of a record has no counterpart here, such as `tools`, `videos` and
            `objects`, or tags do not match images. ms-swift leaves such records out, unless `--strict true` is given.
    """

    support_padding_free = True

    def init_processor(self, processor: Any) -> None:
        """Set the processor and check the options."""
        if processor is None or self._processor_inited:
            return
        for name, value in _OPTIONS.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"`{name}` must be {value!r} for composed models, which have the chat template of their folder, "
                    f"got {getattr(self, name)!r}."
                )
        self.placeholder_tokens: list[int] = []  # not the list that all templates share
        super().init_processor(processor)
        self.encoder = SampleEncoder(processor, Path())
        end = end_of_turn_id(processor.tokenizer, processor.chat_template)
        if end is not None:
            self.template_meta.stop_words.append(processor.tokenizer.convert_ids_to_tokens(end))

    @staticmethod
    def _load_image(image: Any, load_images: bool) -> Image.Image:
        """Open an image upright, also if ms-swift would pass its path on."""
        if isinstance(image, dict):
            image = image.get("bytes") or image["path"]
        source = load_file(image)
        return read_image(source) if isinstance(source, Image.Image) else open_image(source)

    def _preprocess_inputs(self, inputs: StdTemplateInputs) -> None:
        """Open the images and put tags in the place of those without one."""
        for name in ("tools", "videos", "audios", "objects", "chat_template_kwargs"):
            if getattr(inputs, name):
                raise ValueError(f"`{name}` must be empty for the template {TEMPLATE!r}, got {getattr(inputs, name)}.")
        super()._preprocess_inputs(inputs)

    def _encode(self, inputs: StdTemplateInputs) -> dict[str, Any]:
        """Encode a conversation, in training with labels, otherwise with the prompt of an answer."""
        messages = self._to_messages(inputs)
        if not self.is_training:
            batch = self.processor.apply_chat_template(
                [messages], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
            )
            images = {name: batch[name] for name in IMAGE_INPUTS if name in batch}
            return {"input_ids": batch["input_ids"][0].tolist(), "labels": None, **images}
        answers = sum(message["role"] == "assistant" for message in messages)
        if self._loss_scale not in _loss_scales(answers):
            raise ValueError(
                f"`loss_scale` must be one of {', '.join(_loss_scales(answers))} for a conversation with {answers} "
                f"turns of the assistant, got {self._loss_scale!r}: the loss is over all of them."
            )
        sample = self.encoder.encode(messages, [self.encoder.process(image) for image in inputs.images])
        return {"input_ids": sample.input_ids.tolist(), "labels": sample.labels.tolist(), **sample.images}

    def _swift_encode(self, inputs: StdTemplateInputs) -> Any:
        raise ValueError(f"`infer_backend` must be 'transformers' for the template {TEMPLATE!r}, got {self.mode!r}.")

    def _to_messages(self, inputs: StdTemplateInputs) -> list[dict[str, Any]]:
        """Messages with lists of blocks, and the images in their places."""
        messages = list(inputs.messages)
        if messages and messages[-1]["role"] == "assistant" and messages[-1]["content"] is None:
            messages.pop()  # the answer to generate
        system = self.template_meta.default_system if inputs.system is None else inputs.system
        if system:
            messages.insert(0, {"role": "system", "content": system})
        for message in messages:
            _check_message(message)
        tags = sum(message["content"].count("<image>") for message in messages)
        if tags != len(inputs.images):
            raise ValueError(f"`messages` have {tags} <image> tags for {len(inputs.images)} images.")
        images = iter(inputs.images)
        return [{"role": one["role"], "content": _blocks(one["content"], images)} for one in messages]

    def _data_collator_mm_data(self, batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Join the image inputs of the samples of a batch or of a packed row."""
        images = [{name: row[name] for name in IMAGE_INPUTS if row.get(name) is not None} for row in batch]
        return join_images([one for one in images if one])


class ComposedModelLoader(ModelLoader):
    """Loads the composed model of a folder."""

    auto_model_cls: Any

    def get_model(self, *args: Any, **kwargs: Any) -> Any:
        """Load the model by transformers' class for models with images."""
        self.auto_model_cls = self.auto_model_cls or AutoModelForImageTextToText
        return super().get_model(*args, **kwargs)


def _loss_scales(answers: int) -> tuple[str, ...]:
    """Values of `loss_scale` by which all turns of the assistant are in the loss."""
    return ("default", "last_round") if answers < 2 else ("default",)


def _check_message(message: dict[str, Any]) -> None:
    if message["role"] not in _ROLES:
        raise ValueError(f"`messages` must have the roles {', '.join(_ROLES)}, got {message['role']!r}.")
    if not isinstance(message["content"], str):
        raise ValueError(f"`messages` must have texts as contents, got {type(message['content']).__name__}.")
    weighted = [name for name in ("loss", "loss_scale") if message.get(name) is not None]
    if weighted:
        raise ValueError(f"`messages` must have no field {weighted[0]}: the loss is over all turns of the assistant.")


def _blocks(text: str, images: Any) -> list[dict[str, Any]]:
    first, *rest = text.split("<image>")
    blocks = [{"type": "text", "text": first}] if first or not rest else []
    for part in rest:
        blocks.append({"type": "image", "image": next(images)})
        if part:
            blocks.append({"type": "text", "text": part})
    return blocks


def register() -> None:
    """Register the model type and the template; a second call changes nothing."""
    keys = MultiModelKeys(
        MODEL_TYPE,
        language_model=MODULES["text"],
        aligner=MODULES["projector"],
        vision_tower=MODULES["vision"],
    )
    meta = ModelMeta(
        MODEL_TYPE,
        [],
        ComposedModelLoader,
        template=TEMPLATE,
        model_arch=MODEL_TYPE,
        architectures=[VisionLanguageForConditionalGeneration.__name__],
        is_multimodal=True,
    )
    # Formats of ms-swift are not used; a place of the system's text says that there may be one.
    template = TemplateMeta(
        TEMPLATE,
        prefix=[],
        prompt=["{{QUERY}}"],
        chat_sep=[],
        system_prefix=["{{SYSTEM}}"],
        template_cls=ComposedModelTemplate,
    )
    register_model_arch(keys, exist_ok=True)
    register_model(meta, exist_ok=True)
    register_template(template, exist_ok=True)


register()
