"""Image processors of composed models: those of folders, those of new encoders, and what they show of an image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    IJepaConfig,
    PreTrainedModel,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import vlparts
from tests.tiny import SIZES, navit, order_one, picture, text_config, tokenizer, vision_config
from tests.training.making import about_image
from vlparts.coordinates import Region, as_seen, encode
from vlparts.training.building import build
from vlparts.training.config import TrainConfig
from vlparts.training.encoding import SampleEncoder

SQUARE = {**SIZES, "image_size": 16, "patch_size": 4}
STATISTICS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
CROPPED = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
RESIZED = {"size": {"height": 16, "width": 16}}


def pairs() -> dict[str, tuple[PreTrainedModel, Any]]:
    """A vision encoder and the image processor in its folder, by family."""
    return {
        "clip": (CLIPVisionModel(CLIPVisionConfig(**SQUARE)), CLIPImageProcessorPil(**CROPPED, **STATISTICS)),
        "siglip": (SiglipVisionModel(SiglipVisionConfig(**SQUARE)), SiglipImageProcessorPil(**RESIZED, **STATISTICS)),
        "vit": (ViTModel(ViTConfig(**SQUARE)), ViTImageProcessorPil(**RESIZED, **STATISTICS)),
        # Positions of DINOv2 are made for 32 pixels, and its images have 16.
        "dinov2": (
            Dinov2Model(Dinov2Config(**{**SQUARE, "image_size": 32})),
            BitImageProcessorPil(**CROPPED, **STATISTICS),
        ),
        "siglip2": (
            Siglip2VisionModel(vision_config("siglip2")),
            Siglip2ImageProcessorPil(patch_size=4, max_num_patches=12, **STATISTICS),
        ),
        "navit": (
            navit(pooling="none"),
            vlparts.NaViTImageProcessor(patch_size=4, max_aspect_ratio=9.0, **STATISTICS),
        ),
    }


KINDS = list(pairs())


def saved(folder: Path, kind: str) -> tuple[Path, Any]:
    """The folder of an encoder with its image processor, and the image processor."""
    encoder, image_processor = pairs()[kind]
    order_one(encoder).save_pretrained(folder / kind)
    image_processor.save_pretrained(folder / kind)
    return folder / kind, image_processor


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_processor_of_a_folder_is_used(tmp_path: Path, kind: str) -> None:
    folder, own = saved(tmp_path, kind)
    words = tokenizer()
    model = vlparts.compose(vision=folder, text=text_config("qwen3", words))
    processor = vlparts.compose_processor(model, words)
    found = processor.image_processor
    assert type(found) is type(own)
    assert [list(found.image_mean), list(found.image_std)] == list(STATISTICS.values())
    image = picture(24, 40)
    inputs = processor(images=[image], text="<image>", return_tensors="pt")
    options = {"do_center_crop": False, **RESIZED} if kind in ("clip", "dinov2") else {}
    expected = own(image, return_tensors="pt", **options)["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected)
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] > 8  # placeholders fit the features


@pytest.mark.parametrize("kind", KINDS)
def test_no_edge_of_an_image_is_cut(tmp_path: Path, kind: str) -> None:
    folder, _ = saved(tmp_path, kind)
    words = tokenizer()
    processor = vlparts.compose_processor(vlparts.compose(folder, text_config("qwen3", words)), words)
    black = np.zeros((80, 48, 3), np.uint8)

    def pixels(image: np.ndarray) -> torch.Tensor:
        return processor.image_processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]

    for edge in (np.s_[:8], np.s_[-8:], np.s_[:, :8], np.s_[:, -8:]):
        bright = black.copy()
        bright[edge] = 255
        assert not torch.equal(pixels(bright), pixels(black))


@pytest.mark.parametrize("kind", ["clip", "navit"])
def test_it_is_known_after_saving_the_model(tmp_path: Path, kind: str) -> None:
    folder, own = saved(tmp_path, kind)
    words = tokenizer()
    model = vlparts.compose(vision=AutoModel.from_pretrained(folder), text=text_config("qwen3", words))
    model.save_pretrained(tmp_path / "model")
    for path in folder.iterdir():
        path.unlink()
    again = vlparts.VisionLanguageForConditionalGeneration.from_pretrained(tmp_path / "model")
    processor = vlparts.compose_processor(again, words)
    assert type(processor.image_processor) is type(own)
    processor.save_pretrained(tmp_path / "model")
    loaded = vlparts.VisionLanguageProcessor.from_pretrained(tmp_path / "model")
    image = picture(24, 40)
    first, second = (one.image_processor(image, return_tensors="pt") for one in (processor, loaded))
    assert torch.equal(first["pixel_values"], second["pixel_values"])


def test_the_folder_of_a_dual_encoder_has_its_image_processor(tmp_path: Path) -> None:
    config = CLIPConfig(vision_config=SQUARE, text_config={**SIZES, "vocab_size": 20, "eos_token_id": 1})
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPImageProcessorPil(**CROPPED, **STATISTICS).save_pretrained(tmp_path)
    words = tokenizer()
    for vision in (tmp_path, AutoModel.from_pretrained(tmp_path)):
        processor = vlparts.compose_processor(vlparts.compose(vision, text_config("qwen3", words)), words)
        assert list(processor.image_processor.image_mean) == STATISTICS["image_mean"]


def test_settings_may_be_those_of_a_processor(tmp_path: Path) -> None:
    """As newer folders have them: inside processor_config.json."""
    folder, own = saved(tmp_path, "siglip")
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": own.to_dict()}), encoding="utf-8")
    words = tokenizer()
    processor = vlparts.compose_processor(vlparts.compose(folder, text_config("qwen3", words)), words)
    assert list(processor.image_processor.image_mean) == STATISTICS["image_mean"]


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        (CLIPVisionConfig(**SQUARE), [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        (SiglipVisionConfig(**SQUARE), [0.5] * 3, [0.5] * 3),
        (ViTConfig(**SQUARE), [0.5] * 3, [0.5] * 3),
        (Dinov2Config(**SQUARE), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        (vision_config("siglip2"), [0.5] * 3, [0.5] * 3),
    ],
)
def test_new_encoders_get_the_statistics_of_their_family(config: Any, mean: list[float], std: list[float]) -> None:
    words = tokenizer()
    processor = vlparts.compose_processor(vlparts.compose(config, text_config("qwen3", words)), words)
    found = processor.image_processor
    assert [list(found.image_mean), list(found.image_std)] == [mean, std]
    assert not getattr(found, "do_center_crop", False)


def test_a_family_without_known_statistics_needs_an_image_processor() -> None:
    words = tokenizer()
    model = vlparts.compose(IJepaConfig(**SQUARE), text_config("qwen3", words))
    with pytest.raises(ValueError, match="`image_processor` must be given for a vision encoder of type 'ijepa'"):
        vlparts.compose_processor(model, words)
    own = ViTImageProcessorPil(**RESIZED)
    assert vlparts.compose_processor(model, words, own).image_processor is own


def test_an_image_processor_may_be_a_folder_and_is_used_as_it_is(tmp_path: Path) -> None:
    own = CLIPImageProcessorPil(**CROPPED, **STATISTICS)
    own.save_pretrained(tmp_path)
    words = tokenizer()
    model = vlparts.compose(CLIPVisionConfig(**SQUARE), text_config("qwen3", words))
    processor = vlparts.compose_processor(model, words, tmp_path)
    assert processor.image_processor.to_dict() == own.to_dict()
    with pytest.raises(ValueError, match=r"The image processor .*none of the vision encoder cannot be loaded: "):
        vlparts.compose_processor(model, words, tmp_path / "none")


@pytest.mark.parametrize(("name", "value"), [("patch_size", 8), ("merge_size", 2)])
def test_an_image_processor_that_does_not_fit_is_refused(name: str, value: int) -> None:
    words = tokenizer()
    model = vlparts.compose(navit(pooling="none"), text_config("qwen3", words))
    options = {"patch_size": 4, name: value}
    message = f"`image_processor` has {name}={value}, but the model has {4 if name == 'patch_size' else 1}"
    with pytest.raises(ValueError, match=message):
        vlparts.compose_processor(model, words, vlparts.NaViTImageProcessor(**options), image_token="<picture>")
    assert "<picture>" not in words.get_vocab()  # nothing is changed before


def test_a_kept_crop_is_carried_to_the_regions_of_training(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "clip")
    words = tokenizer()
    model = vlparts.compose(folder, text_config("qwen3", words))
    processor = vlparts.compose_processor(model, words, center_crop=True)
    assert processor.image_processor.do_center_crop
    picture(60, 30).save(tmp_path / "a.png")
    region = Region.box(20, 6, 40, 21, "cat")
    whole, cropped = (
        SampleEncoder(one, tmp_path)(about_image("a.png", region)).input_ids
        for one in (vlparts.compose_processor(model, words), processor)
    )
    for ids, fmt in ((whole, "openpangu"), (cropped, as_seen("openpangu", processor))):
        assert encode([region], (60, 30), fmt) in words.decode(ids)
    assert words.decode(whole) != words.decode(cropped)
    with pytest.raises(ValueError, match="outside the frame of format"):
        SampleEncoder(processor, tmp_path)(about_image("a.png", Region.box(0, 6, 40, 21, "cat")))


def test_training_uses_the_image_processor_of_the_folder(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "clip")
    config = TrainConfig(data="a", output="b", vision=str(folder))
    _, processor = build(config, ["Where is the cat?"])
    assert list(processor.image_processor.image_mean) == STATISTICS["image_mean"]
    assert not processor.image_processor.do_center_crop


CODE = """
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


class OwnImageProcessor(CLIPImageProcessorPil):
    pass
"""


def test_code_of_a_folder_needs_trust(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "vit")
    (folder / "image_processing_own.py").write_text(CODE, encoding="utf-8")
    fields = {**RESIZED, **STATISTICS, "do_center_crop": False, "image_processor_type": "OwnImageProcessor"}
    fields["auto_map"] = {"AutoImageProcessor": "image_processing_own.OwnImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields), encoding="utf-8")
    words = tokenizer()
    model = vlparts.compose(folder, text_config("qwen3", words))
    with pytest.raises(ValueError, match="(?s)image processor OwnImageProcessor .*trust_remote_code=True"):
        vlparts.compose_processor(model, words)
    processor = vlparts.compose_processor(model, words, trust_remote_code=True)
    assert type(processor.image_processor).__name__ == "OwnImageProcessor"
    assert list(processor.image_processor.image_mean) == STATISTICS["image_mean"]
    processor.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "image_processing_own.py").is_file()
