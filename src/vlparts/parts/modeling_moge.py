"""The Pangu Pro MoE decoder (arXiv 2505.21411), with and without its head: a mixture of grouped experts.

Attention and rotary positions are transformers' Llama layers. Shapes: B samples, S tokens of each,
T = B * S, H width, E experts.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_moge import MoGEConfig
from .decoder_inputs import kept_states, prepare_decoder_inputs
from .moe_experts import RoutedExperts, check_whole_groups
from .moe_losses import balance_loss
from .moe_router import GroupedTopKRouter
from .moe_routing import RoutingOptions, choose_experts, router_scores
from .ops_activations import get_activation
from .ops_rms_norm import RMSNorm
from .utils import add_auto_classes


# The decorator has to stand in the file of the PreTrainedModel: see RoutedExperts.
@use_experts_implementation
class MoGEExperts(RoutedExperts):
    """The routed experts of a layer, computed as `experts_implementation` says."""


class MoGEMLP(nn.Module):
    """A gated MLP without biases: the shared expert, or a layer without experts.

    Args:
        hidden_size: Width outside.
        intermediate_size: Width inside.
        hidden_act: Name of the activation.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = get_activation(hidden_act)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """`(B, S, H)` to `(B, S, H)`; the mask changes nothing here."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MoGEBlock(nn.Module):
    """Router, routed experts, and the shared expert, whose output is added as it is (equation 1)."""

    def __init__(self, config: MoGEConfig) -> None:
        super().__init__()
        self.gate = GroupedTopKRouter(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            router_scale=config.router_scale,
            jitter=config.router_jitter,
            **config.get_router_options(),
        )
        self.experts = MoGEExperts(config)
        width = config.shared_expert_intermediate_size
        self.shared_expert = MoGEMLP(config.hidden_size, width, config.hidden_act) if width else None

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Pass every token through its experts.

        Args:
            hidden_states: `(B, S, H)`.
            token_mask: `(T,)` bool, False at padding.

        Returns:
            `(B, S, H)`.
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(flat, token_mask)
        outputs = self.experts(flat, indices, weights).view_as(hidden_states)
        return outputs if self.shared_expert is None else outputs + self.shared_expert(hidden_states)


class MoGEDecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts or a dense MLP, each normalised before and added to its input."""

    def __init__(self, config: MoGEConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp: nn.Module
        if layer_idx in (config.mlp_only_layers or ()):
            self.mlp = MoGEMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        else:
            self.mlp = MoGEBlock(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """`(B, S, H)` to `(B, S, H)`.

        Args:
            hidden_states: `(B, S, H)`.
            token_mask: `(T,)` bool, False at padding.
            **kwargs: What attention takes.
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), token_mask)


class MoGEPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the abilities that transformers asks a model for."""

    config: MoGEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoGEDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(GroupedTopKRouter, index=0),
        "hidden_states": MoGEDecoderLayer,
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MoGEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, GroupedTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.router_scale is not None:
                init.ones_(module.router_scale)

    def get_chosen_experts(self, router_logits: Tensor) -> Tensor:
        """The experts that tokens went to, `(T, K)` int64, group by group.

        Args:
            router_logits: `(T, E)` of one layer, from `router_logits` of the outputs.
        """
        config = self.config
        options = RoutingOptions(config.num_experts, config.num_experts_per_tok, **config.get_router_options())
        return choose_experts(router_scores(router_logits.detach(), options.scoring), options)

    def get_balance_loss(self, router_logits: tuple[Tensor, ...], attention_mask: Any = None) -> Tensor:
        """The balance loss of a pass (equation 8), the mean over its layers with experts; 0 without such layers.

        Args:
            router_logits: `(T, E)` of each layer, from the outputs.
            attention_mask: What the pass got: `(B, past + S)`, 0 at padding, which counts nowhere.

        Raises:
            ValueError: If the logits were not recorded.
        """
        if router_logits is None:
            raise ValueError("`router_logits` must be a tuple, got None: the pass did not record them.")
        if not router_logits:
            return torch.zeros((), device=self.device)
        mask = None
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            mask = get_token_mask(attention_mask, len(router_logits[0]) // len(attention_mask))
        losses = []
        for logits in router_logits:
            here = None if mask is None else mask.to(logits.device)
            indices = self.get_chosen_experts(logits)
            losses.append(balance_loss(logits, indices, scoring=self.config.scoring, token_mask=here))
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    @classmethod
    def maybe_distribute_model(
        cls, model: "MoGEPreTrainedModel", distributed_config: Any, mesh_manager: Any
    ) -> "MoGEPreTrainedModel":
        """Spread a model over processes, as transformers does when it loads one, but no group of experts."""
        check_whole_groups(model.config, distributed_config)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def num_activated_parameters(self) -> int:
        """Number of parameters that a token passes: all but the experts that it does not choose.

        Counted as in table 1 of arXiv 2505.21411: with the embeddings and the head, all biases and the router. A model
        on the meta device will do.
        """
        total = sum(parameter.numel() for parameter in self.parameters())
        for module in self.modules():
            if isinstance(module, MoGEExperts):
                experts = sum(parameter.numel() for parameter in module.parameters())
                total -= experts - experts // self.config.num_experts * self.config.num_experts_per_tok
        return total


class MoGEModel(MoGEPreTrainedModel):
    """Pangu Pro MoE without its head."""

    def __init__(self, config: MoGEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MoGEDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
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
    ) -> MoeModelOutputWithPast:
        """Encode tokens, each of which sees those before it.

        Args:
            input_ids: `(B, S)` int64, or None with `inputs_embeds`.
            attention_mask: `(B, past + S)`, 0 at padding; or a mask that is already prepared.
            position_ids: `(B, S)`. Several texts in one row are told apart by positions that start anew, without a
                cache and a mask only. The places after the cache if absent.
            past_key_values: Keys and values of the tokens before.
            inputs_embeds: `(B, S, H)` in place of `input_ids`.
            use_cache: Whether to return keys and values.
            **kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, `return_dict`, and what
                attention takes.

        Returns:
            Also `router_logits` if asked for: `(T, E)` of each layer with experts.

        Raises:
            ValueError: If not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        inputs_embeds, position_ids, past_key_values = prepare_decoder_inputs(
            self.embed_tokens, self.config, input_ids, inputs_embeds, position_ids, past_key_values, use_cache
        )
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(inputs_embeds, position_ids)
        token_mask = get_token_mask(attention_mask, inputs_embeds.shape[1])
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                token_mask=token_mask,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def get_token_mask(attention_mask: Any, tokens: int) -> Tensor | None:
    """Which of the present tokens are no padding.

    Args:
        attention_mask: `(B, past + S)`, 0 at padding. None, or a mask that is already prepared, says nothing.
        tokens: S.

    Returns:
        `(T,)` bool, or None for all.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -tokens:].reshape(-1).bool()


class MoGEForCausalLM(MoGEPreTrainedModel, GenerationMixin):
    """Pangu Pro MoE with its language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MoGEConfig) -> None:
        super().__init__(config)
        self.model = MoGEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the model and its code, such that `AutoModel` finds the model without its head there too."""
        add_auto_classes(self, AutoModel=MoGEModel)
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
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Predict the next tokens.

        Args:
            input_ids: As for [`MoGEModel`], like the next four.
            attention_mask: `(B, past + S)`.
            position_ids: `(B, S)`.
            past_key_values: Keys and values of the tokens before.
            inputs_embeds: `(B, S, H)`.
            labels: `(B, S)` int64, the tokens themselves (they are shifted here); -100 counts nowhere.
            use_cache: Whether to return keys and values.
            output_router_logits: Whether to return `router_logits` and `aux_loss`.
            logits_to_keep: Logits of the last so many positions only, or of the positions in a tensor; 0 for all.
            **kwargs: Also `num_items_in_batch`, which the cross-entropy is divided by in place of the number of
                labels.

        Returns:
            `logits` `(B, S, vocabulary)`. With `labels`, `loss`: the mean cross-entropy, plus
            `router_aux_loss_coef` times the balance loss. `aux_loss`: the balance loss alone, the mean over the
            layers with experts, without padding; 1 where all experts are used alike.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        balanced = output_router_logits or (labels is not None and self.config.router_aux_loss_coef > 0)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=balanced,
            **kwargs,
        )
        logits = self.lm_head(kept_states(outputs.last_hidden_state, logits_to_keep))
        aux_loss = None
        if balanced:
            aux_loss = self.get_balance_loss(outputs.router_logits, attention_mask).to(logits.device)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if aux_loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


__all__ = ["MoGEForCausalLM", "MoGEModel", "MoGEPreTrainedModel"]
