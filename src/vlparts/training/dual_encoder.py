"""Training of a vision encoder by the captions of images: the stage of a recipe before there is a language model.

A `NaViTDualEncoder` is trained on pairs of an image and its caption. Its vision tower is saved too, as the vision
encoder that the next stage composes.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, Trainer, VisionTextDualEncoderProcessor
from transformers.modeling_utils import PreTrainedModel

from ..image_processors import default_image_processor, load_image_processor, read_image_processor_config
from ..parts.configuration_navit_dual_encoder import NaViTDualEncoderConfig
from ..parts.modeling_navit_dual_encoder import NaViTDualEncoder
from ..parts.vlm_features import pixel_layout
from .building import choose_trained, config_errors, make_text, make_tower, with_options
from .config import TrainConfig
from .dataset import PaddedCollator
from .encoding import Measured, Sample
from .packed_trainer import PackTrainer
from .record_images import RecordImage, open_record_image, record_image_size, shown_image
from .records import PageRecord, Record, TextBlock

__all__ = ["VISION", "ContrastiveTrainer", "PairCollator", "PairEncoder", "build_dual_encoder", "save_vision_tower"]

VISION = "vision"
"""Folder of the vision tower in the folder of a trained dual encoder."""
_OPTIONS = NaViTDualEncoderConfig.__annotations__.keys() - {"vision_config", "text_config"}


def build_dual_encoder(
    config: TrainConfig, texts: Iterable[str], weights: bool = True
) -> tuple[NaViTDualEncoder, VisionTextDualEncoderProcessor]:
    """Build the dual encoder and processor that the settings describe.

    Args:
        config: The settings.
        texts: Texts to train a tokenizer on, if one is needed.
        weights: False for a model on the meta device: folders need no weights.

    Raises:
        ValueError: If a setting names something that does not exist or cannot be loaded, or the towers do not fit.
    """
    unknown = config.dual_encoder.keys() - _OPTIONS
    if unknown:
        raise ValueError(
            f"`dual_encoder` must have options among {', '.join(sorted(_OPTIONS))}, got {', '.join(sorted(unknown))}."
        )
    with nullcontext() if weights else torch.device("meta"):
        vision = make_tower(config, "vision", config.vision, weights)
        text, tokenizer = make_text(config, texts, AutoModel, weights)
        with config_errors("dual_encoder"):
            model = NaViTDualEncoder.from_towers(vision, text, **config.dual_encoder)
    tower = model.vision_model
    settings = read_image_processor_config(vision.name_or_path) if isinstance(vision, PreTrainedModel) else None
    image_processor = (
        default_image_processor(pixel_layout(tower), tower.config, getattr(tower.config, "spatial_merge_size", 1))
        if settings is None
        else load_image_processor(settings, config.trust_remote_code)
    )
    if config.image_processor:
        image_processor = with_options(image_processor, config.image_processor)
    choose_trained(model, config)
    return model, VisionTextDualEncoderProcessor(image_processor, tokenizer)


class Pair(Sample):
    """An image and the ids of its caption; its length is the number of patches and of ids."""

    def __len__(self) -> int:
        return len(self.input_ids) + len(self.images["pixel_values"])


class PairEncoder:
    """Encode records of one image to pairs of the image and its caption, the text of the assistant.

    Turns of the user and the system are not used.

    Args:
        processor: Processor of the dual encoder.
        root: Folder that relative image paths are resolved against.
        max_length: Maximum number of patches and ids of a pair.
        max_text_length: Maximum number of ids of a caption; None for no limit.
        max_image_pixels: Largest number of pixels of an image file; None for Pillow's limit.
    """

    def __init__(
        self,
        processor: VisionTextDualEncoderProcessor,
        root: Path,
        max_length: int,
        max_text_length: int | None = None,
        max_image_pixels: int | None = None,
    ) -> None:
        self.processor = processor
        self.root = root
        self.max_length = max_length
        self.max_text_length = max_text_length
        self.max_image_pixels = max_image_pixels

    def __call__(self, record: Record | PageRecord, number: int = 0) -> Pair:
        """Encode one record.

        Raises:
            ValueError: If it has not one image and one text as its answer, the image cannot be read, or it is too
                long.
        """
        given, caption = _pair(record)
        image = open_record_image(given, self.root, self.max_image_pixels)
        images = dict(self.processor.image_processor(image, return_tensors="pt"))
        ids = self.processor.tokenizer(caption)["input_ids"]
        measured = self._measured(ids, len(images["pixel_values"]))
        if isinstance(measured, ValueError):
            raise measured
        if measured.length > self.max_length:
            raise self.too_long(measured.length, measured.image_tokens)
        return Pair(torch.tensor(ids), torch.tensor(ids), images, image_count=1)

    def measure(self, records: Sequence[tuple[Record | PageRecord, int]]) -> list[Measured | ValueError]:
        """The lengths of encoded records, see [`SampleEncoder.measure`]."""
        found: list[int | ValueError] = []
        captions: list[str] = []
        for record, _ in records:
            try:
                given, caption = _pair(record)
                width, height = record_image_size(given, self.root, self.max_image_pixels)
                found.append(self._count_patches(given, height, width))
                captions.append(caption)
            except ValueError as error:
                found.append(error)
        ids = iter(self.processor.tokenizer(captions)["input_ids"] if captions else [])
        return [one if isinstance(one, ValueError) else self._measured(next(ids), one) for one in found]

    def too_long(self, length: int, image_tokens: int) -> ValueError:
        """The error of a pair that is longer than `max_length`."""
        return ValueError(
            f"The pair has {length} patches and tokens; expected at most {self.max_length}. Raise `capacity` or use "
            "smaller images."
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What lengths depend on beside the processor and the records, as JSON data."""
        names = ("max_text_length", "max_image_pixels")
        return {name: getattr(self, name) for name in names} | {"pillow_limit": Image.MAX_IMAGE_PIXELS, "pairs": True}

    def _count_patches(self, given: RecordImage, height: int, width: int) -> int:
        """Rows of `pixel_values` of an image of this size."""
        processor = self.processor.image_processor
        try:
            if hasattr(processor, "get_number_of_image_patches"):
                return int(processor.get_number_of_image_patches(height, width, {}))
            return len(processor(Image.new("RGB", (width, height)), return_tensors="pt")["pixel_values"])
        except ValueError as error:
            raise ValueError(f"Image {shown_image(given, self.root)} cannot be processed: {error}") from None

    def _measured(self, ids: list[int], patches: int) -> Measured | ValueError:
        if self.max_text_length is not None and len(ids) > self.max_text_length:
            return ValueError(f"The caption has {len(ids)} tokens; the text tower takes {self.max_text_length}.")
        return Measured(len(ids) + patches, patches, len(ids) - 1)


def _pair(record: Record | PageRecord) -> tuple[RecordImage, str]:
    if isinstance(record, PageRecord):
        raise ValueError("A record of a page is no pair of an image and a caption.")
    blocks = [block for message in record.messages if message.role == "assistant" for block in message.content]
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    if len(record.all_images) != 1 or len(blocks) != 1 or not "".join(texts).strip():
        raise ValueError(
            f"A pair must have one image and one text of the assistant, got {len(record.all_images)} images and "
            f"{len(texts)} texts in {len(blocks)} blocks."
        )
    return record.all_images[0], texts[0]


class PairCollator:
    """Collates packs of pairs to the batch of a dual encoder.

    Args:
        pad_token_id: Id of padding tokens.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._padded = PaddedCollator(pad_token_id)

    def __call__(self, batch: list[list[Sample]]) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask` `(n, longest)`, the image tensors, and `return_loss`."""
        row = self._padded(batch)
        del row["labels"]
        return {**row, "return_loss": True}


class ContrastiveTrainer(PackTrainer):
    """transformers' Trainer over packs of pairs. Each pack has its own negatives, also with gradient accumulation."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute Trainer's loss; the towers take no `use_cache`."""
        return Trainer.compute_loss(self, model, inputs, *args, **kwargs)


def save_vision_tower(
    model: NaViTDualEncoder,
    processor: VisionTextDualEncoderProcessor,
    folder: Path,
    weights: bool = True,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Save the vision tower, without attention pooling, and its image processor as a vision encoder for `compose`.

    Args:
        model: The dual encoder.
        processor: Its processor.
        folder: The folder.
        weights: False to save the configuration only.
        state: The whole weights of the dual encoder; needed if its parameters are sharded.
    """
    tower, prefix = model.vision_model, "vision_model."
    own = tower.state_dict()
    if state is not None:
        own = {name: state[prefix + name] for name in own}
    if getattr(tower.config, "pooling", None) == "map":
        config = type(tower.config)(**{**tower.config.to_dict(), "pooling": "none"})
        with torch.device("meta"):
            tower = type(tower)._from_config(config, dtype=tower.dtype)
        own = {name: own[name] for name in tower.state_dict()}
    if weights:
        tower.save_pretrained(folder, state_dict=own)
    else:
        tower.config.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
