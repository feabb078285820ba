"""transformers' `ImageProcessingTestMixin` and `ProcessorTesterMixin`; run by the nox session `upstream`."""

import unittest
from typing import Any

import vlparts
from tests.tiny import navit_config, text_config, tokenizer, windowfree_config
from tests.upstream.loading import load
from vlparts import (
    CattyImageProcessor,
    DeepEncoderImageProcessor,
    NaViTImageProcessor,
    VisionLanguageProcessor,
    WindowFreeViTImageProcessor,
)

VIDEO_TOKENS = {"video_token": "<video>", "vision_start_token": "<vision>", "vision_end_token": "</vision>"}

images = load("test_image_processing_common")
ProcessorTesterMixin = load("test_processing_common").ProcessorTesterMixin


class ImageTester(images.ImageProcessingTester):
    """Gives the image processor class and small images."""

    max_resolution = 60

    def _get_image_processing_classes(self) -> dict[str, type]:
        return {"pil": self.parent.tested}


class NaViTImages(images.ImageProcessingTestMixin, unittest.TestCase):
    tested = NaViTImageProcessor
    image_processor_tester_class = ImageTester


class WindowFreeViTImages(images.ImageProcessingTestMixin, unittest.TestCase):
    tested = WindowFreeViTImageProcessor
    image_processor_tester_class = ImageTester


class DeepEncoderImages(images.ImageProcessingTestMixin, unittest.TestCase):
    tested = DeepEncoderImageProcessor
    image_processor_tester_class = ImageTester


class CattyImages(images.ImageProcessingTestMixin, unittest.TestCase):
    tested = CattyImageProcessor
    image_processor_tester_class = ImageTester


class ProcessorTests(ProcessorTesterMixin):
    """Lengths that hold the placeholders of the images."""

    processor_class = VisionLanguageProcessor
    images_text_kwargs_max_length = 1117
    images_text_kwargs_override_max_length = 1112
    images_unstructured_max_length = 1076
    videos_text_kwargs_max_length = 1167
    videos_text_kwargs_override_max_length = 1162
    videos_unstructured_max_length = 1176
    chat_template_max_length = 1100


class VisionLanguageProcessorOfNaViT(ProcessorTests, unittest.TestCase):
    @classmethod
    def _setup_from_components(cls) -> Any:
        words = tokenizer()
        model = vlparts.compose(vision=navit_config(), text=text_config("qwen3", words))
        return vlparts.compose_processor(model, words)


class VisionLanguageProcessorOfWindowFreeViT(ProcessorTests, unittest.TestCase):
    @classmethod
    def _setup_from_components(cls) -> Any:
        words = tokenizer()
        model = vlparts.compose(vision=windowfree_config(patch_size=14), text=text_config("qwen3", words))
        return vlparts.compose_processor(model, words, **VIDEO_TOKENS)

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {"spatial_merge_size": 2, **VIDEO_TOKENS}

    @classmethod
    def _setup_test_attributes(cls, processor: Any) -> None:
        super()._setup_test_attributes(processor)
        cls.video_token = "<vision><video></vision>"
