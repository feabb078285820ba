"""The fields of openPangu-VL's config.json, by the names of ours: what reading and writing share."""

from typing import Any

MODEL_TYPE = "openpangu_vl"
# The second is the name in openPangu's own files, the first vLLM's, which the published config.json names.
ARCHITECTURES = ("OpenPanguVLForConditionalGeneration", "OpenPanguVL")
PROJECTOR = "multi_tap_merger"
# What our mergers have without options; the published ones have the encoder's.
MERGER_EPS = 1e-6

VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_act": "hidden_act",
    "rms_norm_eps": "rms_norm_eps",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "spatial_merge_size",
}
TEXT_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_act": "hidden_act",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "bias": "attention_bias",
}
OPTIONAL_TEXT_FIELDS = (
    "attention_dropout",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "head_dim",
)
# The last two are no fields of our configuration, which keeps them as further attributes.
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# What the published code has for a config.json without "mm_unit_vision_select_layer", as the published one is.
DEFAULT_TAPS = [-1, -3]
# A fact of the published code.
ROTARY_THETA = 10000.0
# The activation that gives the published MLP a gate.
GATED = "silu"


def check_taps(taps: Any, argument: str) -> None:
    """Check the layers whose features the mergers take.

    The published code counts them from the end, and gives its first merger the deepest whatever their order.

    Args:
        taps: Indices of layers.
        argument: The argument that they come from, for the error message.

    Raises:
        ValueError: Unless they are negative and the deepest comes first.
    """
    good = isinstance(taps, list) and all(type(tap) is int and tap < 0 for tap in taps)
    if not good or taps != sorted(set(taps), reverse=True):
        raise ValueError(
            f"`{argument}` must have layers for its mergers that are negative, each once and the last one first, got "
            f"{taps}."
        )
