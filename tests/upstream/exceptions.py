"""Tests of transformers that cannot hold for a model of `vlparts`, and why.

The rows are reasons, each with patterns of "class::test". A listed test that passes, or is skipped, fails the session.
"""

_REASONS: dict[str, tuple[str, ...]] = {
    "Packed patches of all images are one tensor, without an axis of images.": ("*Images::test_call_*",),
    "Images are processed with Pillow alone.": ("*Images::test_new_models_require_torchvision_backend",),
    "The test gives videos to a processor without videos.": (
        "VisionLanguageProcessorOfNaViT::test_model_input_names",
        "VisionLanguageProcessorOfNaViT::test_flat_kwarg_applied_when_modality_dict_lacks_it",
    ),
    "Saving adds the place of the code, `auto_map`.": (
        "VisionLanguageProcessorOf*::test_processor_from_and_save_pretrained*",
    ),
    "The test rescales without normalizing, which is refused.": (
        "VisionLanguageProcessorOfWindowFreeViT::test_kwargs_overrides_default_subprocessor_kwargs_0_images",
        "VisionLanguageProcessorOfWindowFreeViT::test_structured_kwargs_nested_from_dict_0_images",
        "VisionLanguageProcessorOfWindowFreeViT::test_subprocessor_defaults_preserved_by_kwargs_0_images",
        "VisionLanguageProcessorOfWindowFreeViT::test_unstructured_kwargs_0_images",
        "VisionLanguageProcessorOfWindowFreeViT::test_unstructured_kwargs_batched_0_images",
    ),
    "The image processor also takes videos; the test looks for a video processor and gives none.": (
        "VisionLanguageProcessorOfWindowFreeViT::test_processor_with_multiple_inputs",
        "VisionLanguageProcessorOfWindowFreeViT::test_replacement_offsets",
    ),
    "The input embedding of an image encoder is a linear layer or a convolution.": (
        "FusedVision::test_model_get_set_embeddings",
        "NaViT*::test_model_get_set_embeddings",
        "DeepEncoder::test_model_get_set_embeddings",
        "WindowFreeViT*::test_model_get_set_embeddings",
    ),
    "Attentions and hidden states include the prefix tokens of each image.": (
        "FusedVision::test_attention_outputs",
        "NaViTWithPrefixTokens::test_attention_outputs",
        "NaViTWithPrefixTokens::test_hidden_states_output",
    ),
    "DeepSeek-OCR's encoder makes one token of 16 patches; the test expects as many tokens as patches.": (
        "DeepEncoder::test_attention_outputs",
        "DeepEncoder::test_hidden_states_output",
        "VisionLanguageHeadOfDeepEncoder::test_get_image_features_output_[02]",
        "VisionLanguageHeadOfDeepEncoder::test_get_video_features_output_[02]",
    ),
    "The hidden states of DeepSeek-OCR's encoder are put together from those of its views, apart from the output.": (
        "DeepEncoder::test_retain_grad_hidden_states_attentions",
    ),
    "The hidden states are those of two encoders, one after the other; the output has the features of both.": (
        "FusedVision::test_hidden_states_output",
        "VisionLanguageHeadOfFusedVision::test_get_image_features_hidden_states",
        "VisionLanguageHeadOfFusedVision::test_get_image_features_output_[02]",
    ),
    "Attentions and hidden states are in the outputs of the two towers.": (
        "DualEncoder*::test_attention_outputs",
        "DualEncoder*::test_hidden_states_output",
        "DualEncoder*::test_retain_grad_hidden_states_attentions",
    ),
    "Encoders of images of one size take no videos.": (
        "VisionLanguageHeadOf[CF]*::test_get_video_features_output_*",
        "VisionLanguageHeadOf[CF]*::test_get_video_features_hidden_states",
        "VisionLanguageHeadOf[CF]*::test_get_video_features_attentions",
    ),
    "The test cuts each input to as many rows as texts, but the rows of packed images are patches.": (
        "NaViT*::test_eager_matches_sdpa_inference_*",
        "WindowFreeViT*::test_eager_matches_sdpa_inference_*",
        "DeepEncoder::test_eager_matches_sdpa_inference_*",
        "DualEncoderOfNaViT::test_eager_matches_sdpa_inference_*",
        "VisionLanguage::test_eager_matches_sdpa_inference_*",
        "VisionLanguageHead::test_eager_matches_sdpa_inference_*",
        "VisionLanguageHeadOfMoGE::test_eager_matches_sdpa_inference_*",
        "VisionLanguageHeadOfDeepEncoder::test_eager_matches_sdpa_inference_*",
    ),
    "The test sets each field that ends in std to one number, and `image_std` holds three.": (
        "WindowFreeViT*::test_can_load_ignoring_mismatched_shapes",
    ),
}

EXCEPTIONS: dict[str, str] = {pattern: reason for reason, patterns in _REASONS.items() for pattern in patterns}
