"""The plugin for vLLM: folders of our models get vLLM's class for transformers models, without a trust flag.

Imported by vLLM in each of its processes, through the entry-point group `vllm.general_plugins`.

vLLM looks a model's class up by `architectures` in its configuration: in its registry, then in transformers, then in
the code of the folder, for which it needs the flag. Its registry has one class for a name, but the class for a model
with experts is another than for one without; and it has classes of its own with names of ours. So the plugin does what
vLLM does for such families: by `model_type`, which is ours alone, it replaces `architectures` in the loaded
configuration by the name of vLLM's class.
"""

from typing import Any

from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from ..registration import PARTS

# Text models whose experts compute something else than `hidden_act` says; vLLM knows them by `architectures` alone.
_OTHER_EXPERTS = ("gpt_oss",)

ARCHITECTURES: dict[str, str] = {
    part.config.model_type: part.models[name].__name__
    for part in PARTS
    for name in ("AutoModelForCausalLM", "AutoModelForMultimodalLM")
    if name in part.models
}
"""Class name of each model that can be served, by `model_type`."""


def register() -> None:
    """Let vLLM find its class for our models; a second call changes nothing."""
    for model_type in ARCHITECTURES:
        MODEL_ARCH_CONFIG_CONVERTORS[model_type] = BackendConvertor


class BackendConvertor(ModelArchConfigConvertorBase):
    """Replaces the architecture of one of our configurations by vLLM's class for transformers models.

    Other architectures, such as those that the option `hf_overrides` sets, are kept.
    """

    def __init__(self, hf_config: Any, hf_text_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, hf_text_config, *args, **kwargs)
        if hf_config.architectures == [ARCHITECTURES[hf_config.model_type]]:
            # In the configuration itself, since vLLM resolves the class from there.
            hf_config.architectures = [self.backend_name()]

    def backend_name(self) -> str:
        """Return the name of vLLM's class."""
        kind = "MultiModal" if self.hf_config is not self.hf_text_config else ""
        experts = "MoE" if self.get_num_experts() > 0 and fits_fused_experts(self.hf_text_config) else ""
        return f"Transformers{kind}{experts}ForCausalLM"


def fits_fused_experts(text_config: Any) -> bool:
    """Whether vLLM's experts compute what those of the text model do.

    They replace the experts, not the router, and always apply SiLU. Where they do not fit, vLLM's class for models
    without experts runs the modules of the text model as they are, also if the configuration asks for one of our
    experts implementations. It refuses weights that transformers would have to stack while loading.
    """
    activation = getattr(text_config, "hidden_act", None) or getattr(text_config, "hidden_activation", None)
    implementation = getattr(text_config, "_experts_implementation", None)
    return (
        activation in (None, "silu", "swish")
        and text_config.model_type not in _OTHER_EXPERTS
        and not str(implementation).startswith("vlparts_")
    )
