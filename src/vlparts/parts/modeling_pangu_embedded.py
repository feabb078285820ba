"""The dense language model of openPangu-Embedded and openPangu-VL, with and without its head.

It is made of transformers' Llama layers, whose weights fit unchanged; what differs are the rotary positions, which may
have three axes. Shapes: B samples, S tokens, E width, D channels of a head.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_pangu_embedded import PanguEmbeddedConfig
from .decoder_inputs import kept_states, prepare_decoder_inputs
from .ops_rms_norm import RMSNorm
from .rope_multimodal import AXES, MultiAxisGenerationMixin, multimodal_rotary, rotary_axes
from .utils import add_auto_classes


class PanguEmbeddedRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary positions on three axes."""

    def __init__(self, config: PanguEmbeddedConfig) -> None:
        super().__init__(config)
        self.axes = nn.Buffer(self.compute_axes(), persistent=False)

    def compute_axes(self) -> Tensor:
        """The axis of each frequency, `(D/2,)` int64."""
        return torch.tensor(rotary_axes(self.config.rope_parameters, self.config.head_dim // 2), dtype=torch.int64)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(B, S, D)` in the dtype of `x`.

        Args:
            x: The hidden states, for their dtype.
            position_ids: `(B, S)`, or `(3, B, S)` for T, H and W.
        """
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(AXES, -1, -1)
        cos, sin = multimodal_rotary(position_ids, self.inv_freq, self.axes)
        return (cos * self.attention_scaling).to(x.dtype), (sin * self.attention_scaling).to(x.dtype)


class PanguEmbeddedDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with the normalisation whose kernel PyTorch's dispatcher picks."""

    def __init__(self, config: PanguEmbeddedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class PanguEmbeddedPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the abilities that transformers asks a model for."""

    config: PanguEmbeddedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PanguEmbeddedDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PanguEmbeddedDecoderLayer, "attentions": LlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PanguEmbeddedRotaryEmbedding):
            init.copy_(module.axes, module.compute_axes())


class PanguEmbeddedModel(PanguEmbeddedPreTrainedModel):
    """openPangu-Embedded without its head: a decoder with grouped queries and biases in attention."""

    def __init__(self, config: PanguEmbeddedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [PanguEmbeddedDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = PanguEmbeddedRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Encode tokens, each of which sees those before it.

        Args:
            input_ids: `(B, S)` int64, or None with `inputs_embeds`.
            attention_mask: `(B, past + S)`, 0 at padding; or a mask that is already prepared.
            position_ids: `(B, S)`; or `(3, B, S)` T, H and W; or `(4, B, S)` the place in the text, then T, H and W,
                as in Qwen2-VL. Several texts in one row are told apart by the place in the text, which starts anew
                (without a cache and a mask only), so never with `(3, B, S)`. The places after the cache if absent.
            past_key_values: Keys and values of the tokens before.
            inputs_embeds: `(B, S, E)` in place of `input_ids`.
            use_cache: Whether to return keys and values.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and what attention takes.

        Raises:
            ValueError: If not exactly one of `input_ids` and `inputs_embeds` is given, or if `position_ids` have
                another shape, or three axes where the configuration has no "mrope_section".
        """
        inputs_embeds, position_ids, past_key_values = prepare_decoder_inputs(
            self.embed_tokens, self.config, input_ids, inputs_embeds, position_ids, past_key_values, use_cache
        )
        rotary_positions, text_positions = self._split_positions(position_ids, inputs_embeds.shape[1])

        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=text_positions,
        )
        rotary = self.rotary_emb(inputs_embeds, rotary_positions)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=text_positions,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _split_positions(self, position_ids: Tensor, tokens: int) -> tuple[Tensor, Tensor | None]:
        """Positions for rotation, `(B, S)` or `(3, B, S)`, and places in the text `(B, S)` for the mask, if known."""
        axes = position_ids.shape[0] if position_ids.ndim == 3 else 0
        if position_ids.ndim not in (2, 3) or axes not in (0, AXES, AXES + 1) or position_ids.shape[-1] != tokens:
            raise ValueError(
                f"`position_ids` must have shape (samples, {tokens}), (3, samples, {tokens}) or "
                f"(4, samples, {tokens}), got {tuple(position_ids.shape)}."
            )
        if not axes:
            return position_ids, position_ids
        if not self.config.rope_parameters.get("mrope_section"):
            raise ValueError(
                "`position_ids` must have shape (samples, tokens) where `rope_parameters` has no 'mrope_section', "
                f"got {tuple(position_ids.shape)}."
            )
        return position_ids[-AXES:], position_ids[0] if axes > AXES else None


class PanguEmbeddedForCausalLM(PanguEmbeddedPreTrainedModel, MultiAxisGenerationMixin, GenerationMixin):
    """openPangu-Embedded with its language modelling head.

    State dict keys are those of transformers' `LlamaForCausalLM`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: PanguEmbeddedConfig) -> None:
        super().__init__(config)
        self.model = PanguEmbeddedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the model and its code, such that `AutoModel` finds the model without its head there too."""
        add_auto_classes(self, AutoModel=PanguEmbeddedModel)
        super().save_pretrained(save_directory, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens.

        Args:
            input_ids: As for [`PanguEmbeddedModel`], like the next four.
            attention_mask: `(B, past + S)`.
            position_ids: `(B, S)`, `(3, B, S)` or `(4, B, S)`.
            past_key_values: Keys and values of the tokens before.
            inputs_embeds: `(B, S, E)`.
            labels: `(B, S)` int64, the tokens themselves (they are shifted here); -100 counts nowhere.
            use_cache: Whether to return keys and values.
            logits_to_keep: Logits of the last so many positions only, or of the positions in a tensor; 0 for all.
            **kwargs: Also `num_items_in_batch`, which the loss is divided by in place of the number of labels.

        Returns:
            `logits` `(B, S, vocabulary)`, and the mean cross-entropy `loss` with `labels`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(kept_states(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["PanguEmbeddedForCausalLM", "PanguEmbeddedModel", "PanguEmbeddedPreTrainedModel"]
