"""The dense language model of openPangu-Embedded and openPangu-VL, with and without its head.

It consists of transformers' Llama layers, with the same state dict keys; rotary positions may have three axes.
Shapes: B samples, S tokens per sample, E width, D channels of a head.
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
from .decoders import prepare_decoder_inputs
from .distributed import ShardableMixin
from .ops_rms_norm import RMSNorm
from .packed_samples import keep_samples_apart
from .rope_multimodal import AXES, MultiAxisGenerationMixin, multimodal_rotary, rotary_axes
from .utils import ForwardKwargs, add_auto_classes, slice_for_logits


class PanguEmbeddedRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary embedding for positions on three axes."""

    def __init__(self, config: PanguEmbeddedConfig) -> None:
        super().__init__(config)
        self.axes = nn.Buffer(self.compute_axes(), persistent=False)

    def compute_axes(self) -> Tensor:
        """Return the axis of each frequency, `(D/2,)` int64."""
        return torch.tensor(rotary_axes(self.config.rope_parameters, self.config.head_dim // 2), dtype=torch.int64)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `(B, S, D)` in the dtype of `x`.

        Args:
            x: Hidden states, for their dtype.
            position_ids: `(B, S)`, or `(3, B, S)` for T, H and W.
        """
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(AXES, -1, -1)
        cos, sin = multimodal_rotary(position_ids, self.inv_freq, self.axes)
        return (cos * self.attention_scaling).to(x.dtype), (sin * self.attention_scaling).to(x.dtype)


class PanguEmbeddedDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with the RMS norm of `vlparts`, which has a kernel per device."""

    def __init__(self, config: PanguEmbeddedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class PanguEmbeddedPreTrainedModel(ShardableMixin, PreTrainedModel):
    """Base class: weight initialisation and the attributes that transformers expects."""

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
    """openPangu-Embedded without its head: a decoder with grouped-query attention and biases in its projections."""

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

    @keep_samples_apart
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
        **kwargs: ForwardKwargs,
    ) -> BaseModelOutputWithPast:
        """Encode tokens with causal attention.

        Args:
            input_ids: `(B, S)` int64, or None with `inputs_embeds`.
            attention_mask: `(B, past + S)`, 0 at padding; or a prepared mask.
            position_ids: `(B, S)`; or `(3, B, S)` T, H and W; or `(4, B, S)` position in the text, then T, H and W, as
                in Qwen2-VL. A row in which the position in the text restarts at 0 holds several texts, each computed
                as if alone; `(3, B, S)` cannot express this. The positions after the cache if absent.
            past_key_values: Cache with the keys and values of previous tokens.
            inputs_embeds: `(B, S, E)` instead of `input_ids`.
            use_cache: Whether to return a cache; it must not be True for rows of several texts, which have none.
            **kwargs: `cu_seq_lens_q`, the boundaries `(n + 1,)` of the texts of one row; `output_hidden_states`,
                `output_attentions`, `return_dict`, and options of the attention function.

        Raises:
            ValueError: If not exactly one of `input_ids` and `inputs_embeds` is given, `position_ids` have another
                shape, or they have three axes and the configuration has no "mrope_section"; and as
                [`run_text_model`].
        """
        inputs_embeds, position_ids, past_key_values = prepare_decoder_inputs(
            self.embed_tokens,
            self.config,
            input_ids,
            inputs_embeds,
            position_ids,
            past_key_values,
            use_cache,
            attention_mask,
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
        """Split into rotary positions, `(B, S)` or `(3, B, S)`, and positions in the text `(B, S)` or None."""
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
                "`position_ids` must have shape (samples, tokens) if `rope_parameters` has no 'mrope_section', "
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
        """Save the model and its code; `AutoModel` loads the model without its head from the same folder."""
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
        **kwargs: ForwardKwargs,
    ) -> CausalLMOutputWithPast:
        """Compute logits and, with `labels`, the loss.

        Args:
            input_ids: `(B, S)` int64, or None with `inputs_embeds`.
            attention_mask: `(B, past + S)`, 0 at padding; or a prepared mask.
            position_ids: `(B, S)`, `(3, B, S)` or `(4, B, S)`; see [`PanguEmbeddedModel.forward`].
            past_key_values: Cache with the keys and values of previous tokens.
            inputs_embeds: `(B, S, E)` instead of `input_ids`.
            labels: `(B, S)` int64, -100 at tokens that the loss ignores; the loss shifts them.
            use_cache: Whether to return a cache.
            logits_to_keep: Number of positions at the end to compute logits for, 0 for all; or their indices.
            **kwargs: `num_items_in_batch`, the divisor of the summed cross-entropy instead of the number of labels;
                the rest as in [`PanguEmbeddedModel.forward`].

        Returns:
            `logits` `(B, S, vocabulary)`, and with `labels` the mean cross-entropy `loss`.
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
        logits = self.lm_head(slice_for_logits(outputs.last_hidden_state, logits_to_keep))
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
