"""The Pangu Pro MoE decoder (arXiv 2505.21411), a mixture of grouped experts, with and without its head.

Attention and rotary positions are transformers' Llama layers. Shapes: B samples, S tokens per sample, T = B * S,
H width, E experts, K chosen.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_moge import MoGEConfig
from .decoders import GrowingCacheGenerationMixin, prepare_decoder_inputs
from .distributed import ShardableMixin
from .moe_experts import RoutedExperts, check_whole_groups
from .moe_losses import balance_loss
from .moe_router import GroupedTopKRouter
from .moe_routing import RoutingOptions, choose_experts, get_token_mask, router_scores
from .ops_activations import get_activation
from .ops_linear import apply_linear
from .ops_rms_norm import RMSNorm
from .packed_samples import keep_samples_apart, sequence_bounds
from .utils import ForwardKwargs, add_auto_classes, server_of, slice_for_logits


# The decorator must be in the file of the PreTrainedModel: see RoutedExperts.
@use_experts_implementation
class MoGEExperts(RoutedExperts):
    """The routed experts of a layer, computed by `experts_implementation`."""


class MoGEMLP(nn.Module):
    """A gated MLP without biases: the shared expert, or the MLP of a dense layer.

    Args:
        hidden_size: Width of inputs and outputs.
        intermediate_size: Inner width.
        hidden_act: Name of the activation.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = get_activation(hidden_act)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Map `(B, S, H)` to `(B, S, H)`; the mask is ignored."""
        gate = self.act_fn(apply_linear(self.gate_proj, hidden_states))
        return apply_linear(self.down_proj, gate * apply_linear(self.up_proj, hidden_states))


class MoGEBlock(nn.Module):
    """Router, routed experts, and the shared expert, whose output is added unweighted (equation 1)."""

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
        """Apply to each token its experts and the shared expert.

        Args:
            hidden_states: `(B, S, H)`.
            token_mask: `(T,)` bool, false at padding.

        Returns:
            `(B, S, H)`.
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(flat, token_mask)
        outputs = self.experts(flat, indices, weights).view_as(hidden_states)
        return outputs if self.shared_expert is None else outputs + self.shared_expert(hidden_states)


class MoGEDecoderLayer(GradientCheckpointingLayer):
    """A pre-norm decoder layer: attention, then experts or a dense MLP."""

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
        """Map `(B, S, H)` to `(B, S, H)`.

        Args:
            hidden_states: `(B, S, H)`.
            token_mask: `(T,)` bool, false at padding.
            **kwargs: Passed to attention.
        """
        attended, _ = apply_linear(self.self_attn, hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), token_mask)


class MoGEPreTrainedModel(ShardableMixin, PreTrainedModel):
    """Base class: weight initialisation and the attributes that transformers expects."""

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
        """Return the experts chosen for each token, `(T, K)` int64, group by group.

        Args:
            router_logits: `(T, E)` of one layer, from `router_logits` of the outputs.
        """
        config = self.config
        options = RoutingOptions(config.num_experts, config.num_experts_per_tok, **config.get_router_options())
        return choose_experts(router_scores(router_logits.detach(), options.scoring), options)

    def get_balance_loss(
        self,
        router_logits: tuple[Tensor, ...],
        batch_size: int,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean balance loss (equation 8) of the layers with experts; 0 without such layers.

        Args:
            router_logits: `(T, E)` of each layer, from the outputs.
            batch_size: B.
            attention_mask: The mask given to `forward`: `(B, past + S)`, 0 at padding, which is not counted.
            position_ids: As given to `forward`, for the form "sequence": each sample of a row is a sequence.
            cu_seq_lens_q: As given to `forward`, for the same.

        Raises:
            ValueError: If the logits were not recorded; or as [`sequence_bounds`].
        """
        if router_logits is None:
            raise ValueError("`router_logits` must be a tuple, got None: the forward pass did not record them.")
        if not router_logits:
            return torch.zeros((), device=self.device)
        tokens = len(router_logits[0]) // batch_size
        form, bounds = self.config.router_aux_loss_form, None
        if form == "sequence":
            bounds = sequence_bounds((batch_size, tokens), attention_mask, position_ids, cu_seq_lens_q)
        elif not self.training:
            form = "batch"  # processes may evaluate different numbers of batches, so they are joined in training only
        mask, losses = get_token_mask(attention_mask, tokens), []
        for logits in router_logits:
            parts = {"token_mask": mask, "cu_seqlens": bounds}
            parts = {name: None if one is None else one.to(logits.device) for name, one in parts.items()}
            indices = self.get_chosen_experts(logits)
            losses.append(balance_loss(logits, indices, scoring=self.config.scoring, form=form, **parts))
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    @classmethod
    def maybe_distribute_model(
        cls, model: "MoGEPreTrainedModel", distributed_config: Any, mesh_manager: Any
    ) -> "MoGEPreTrainedModel":
        """Distribute a model over processes when it is loaded, without dividing a group of experts."""
        check_whole_groups(model.config, distributed_config)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def num_activated_parameters(self) -> int:
        """Return the number of parameters that are active for a token: all but the experts that it does not choose.

        Counted as in table 1 of arXiv 2505.21411: with embeddings, head, biases and routers. Works on the meta device.
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
        if server_of(config) == "SGLang":
            # SGLang loads experts by the names of single ones, and skips others with a warning.
            raise ValueError("`attn_implementation` must not be 'sglang', which would skip the stacked weights.")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MoGEDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
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
    ) -> MoeModelOutputWithPast:
        """Encode tokens with causal attention.

        Args:
            input_ids: `(B, S)` int64, or None with `inputs_embeds`.
            attention_mask: `(B, past + S)`, 0 at padding; or a prepared mask.
            position_ids: `(B, S)`. A row in which positions restart at 0 holds several texts, each computed as if
                alone. The positions after the cache if absent.
            past_key_values: Cache with the keys and values of previous tokens.
            inputs_embeds: `(B, S, H)` instead of `input_ids`.
            use_cache: Whether to return a cache; it must not be True for rows of several texts, which have none.
            **kwargs: `cu_seq_lens_q`, the boundaries `(n + 1,)` of the texts of one row; `output_hidden_states`,
                `output_attentions`, `output_router_logits`, `return_dict`, and options of the attention function.

        Returns:
            `last_hidden_state` `(B, S, H)`, `past_key_values`, and with `output_router_logits` `router_logits`,
            `(T, E)` of each layer with experts.

        Raises:
            ValueError: If not exactly one of `input_ids` and `inputs_embeds` is given, or an input has another shape
                or range; and as [`run_text_model`].
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


class MoGEForCausalLM(MoGEPreTrainedModel, GrowingCacheGenerationMixin):
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
        """Save the model and its code; `AutoModel` loads the model without its head from the same folder."""
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
        **kwargs: ForwardKwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Compute logits and, with `labels`, the loss.

        Args:
            input_ids: `(B, S)` int64, or None with `inputs_embeds`.
            attention_mask: `(B, past + S)`, 0 at padding; or a prepared mask.
            position_ids: `(B, S)`; see [`MoGEModel.forward`].
            past_key_values: Cache with the keys and values of previous tokens.
            inputs_embeds: `(B, S, H)` instead of `input_ids`.
            labels: `(B, S)` int64, -100 at tokens that the loss ignores; the loss shifts them.
            use_cache: Whether to return a cache.
            output_router_logits: Whether to return `router_logits` and `aux_loss`.
            logits_to_keep: Number of positions at the end to compute logits for, 0 for all; or their indices.
            **kwargs: `num_items_in_batch`, the divisor of the summed cross-entropy instead of the number of labels;
                the rest as in [`MoGEModel.forward`].

        Returns:
            `logits` `(B, S, vocabulary)`. With `labels`, `loss`: the mean cross-entropy plus `router_aux_loss_coef`
            times the balance loss. `aux_loss`: the balance loss alone, the mean over the layers with experts, without
            padding; 1 if all experts are used equally.
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
        logits = apply_linear(self.lm_head, slice_for_logits(outputs.last_hidden_state, logits_to_keep))
        aux_loss = None
        if balanced:
            aux_loss = self.get_balance_loss(
                outputs.router_logits,
                len(outputs.last_hidden_state),
                attention_mask,
                position_ids,
                kwargs.get("cu_seq_lens_q"),
            ).to(logits.device)
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
