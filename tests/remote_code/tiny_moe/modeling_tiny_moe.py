"""A tiny causal model, written as models on the Hub that bring their own code are, with one of several kinds of MoE.

It is loaded with `trust_remote_code=True` and imports nothing but torch and transformers.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_tiny_moe import TinyMoeConfig


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states):
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states.float() * torch.rsqrt(variance + self.eps)).to(hidden_states.dtype)


def rotate(states, position_ids, theta):
    half = states.shape[-1] // 2
    frequencies = 1.0 / theta ** (torch.arange(half, device=states.device).float() / half)
    angles = (position_ids[:, None, :, None].float() * frequencies).to(states.dtype)
    first, second = states.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.theta = layer_idx, config.rope_theta
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask, position_ids, past_key_values=None):
        bsz, q_len, _ = hidden_states.size()
        query = self.q_proj(hidden_states).view(bsz, q_len, self.num_heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(bsz, q_len, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(bsz, q_len, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        query, key = rotate(query, position_ids, self.theta), rotate(key, position_ids, self.theta)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        groups = self.num_heads // self.num_key_value_heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return self.o_proj(attended.transpose(1, 2).reshape(bsz, q_len, -1))


class MLP(nn.Module):
    def __init__(self, config, intermediate_size=None):
        super().__init__()
        width = intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# -------------------------------------------------------------------- "mixtral": Mixtral as transformers 4 had it
class MixtralBlockSparseTop2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)
        self.w2 = nn.Linear(config.moe_intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)

    def forward(self, hidden_states):
        return self.w2(F.silu(self.w1(hidden_states)) * self.w3(hidden_states))


class MixtralSparseMoeBlock(nn.Module):
    """The block ranks a linear gate's scores, and runs every expert, also on no token at all."""

    def __init__(self, config):
        super().__init__()
        self.num_experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, self.num_experts, bias=False)
        self.experts = nn.ModuleList([MixtralBlockSparseTop2MLP(config) for _ in range(self.num_experts)])

    def forward(self, hidden_states):
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden_dim)
        router_logits = self.gate(hidden_states)
        routing_weights = F.softmax(router_logits, dim=1, dtype=torch.float)
        routing_weights, selected_experts = torch.topk(routing_weights, self.top_k, dim=-1)
        routing_weights /= routing_weights.sum(dim=-1, keepdim=True)
        routing_weights = routing_weights.to(hidden_states.dtype)
        final_hidden_states = torch.zeros_like(hidden_states)
        expert_mask = F.one_hot(selected_experts, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in range(self.num_experts):
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx])
            current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
            current_hidden_states = expert_layer(current_state) * routing_weights[top_x, idx, None]
            final_hidden_states.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        return final_hidden_states.reshape(batch_size, sequence_length, hidden_dim), router_logits


# ------------------------------------------------------------- "deepseek": the code of the first DeepSeek-MoE models
class AddAuxiliaryLoss(torch.autograd.Function):
    """Gives the auxiliary loss a gradient of 1, whatever becomes of it."""

    @staticmethod
    def forward(ctx, x, loss):
        ctx.dtype, ctx.required_aux_loss = loss.dtype, loss.requires_grad
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        grad_loss = None
        if ctx.required_aux_loss:
            grad_loss = torch.ones((), dtype=ctx.dtype, device=grad_output.device)
        return grad_output, grad_loss


class MoEGate(nn.Module):
    """Takes states of shape `(B, S, H)` alone, and returns what it chose before its weights."""

    def __init__(self, config):
        super().__init__()
        self.top_k, self.n_routed_experts = config.num_experts_per_tok, config.n_routed_experts
        self.alpha = config.aux_loss_alpha
        self.weight = nn.Parameter(torch.empty((self.n_routed_experts, config.hidden_size)))

    def forward(self, hidden_states):
        _, _, h = hidden_states.shape
        hidden_states = hidden_states.view(-1, h)
        logits = F.linear(hidden_states, self.weight, None)
        scores = logits.softmax(dim=-1)
        topk_weight, topk_idx = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        aux_loss = None
        if self.training and self.alpha > 0.0:
            mask_ce = F.one_hot(topk_idx.view(-1), num_classes=self.n_routed_experts)
            aux_loss = (scores.mean(0) * mask_ce.float().mean(0) * self.n_routed_experts).sum() * self.alpha
        return topk_idx, topk_weight, aux_loss


class DeepseekMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.experts = nn.ModuleList(
            [MLP(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts)]
        )
        self.gate = MoEGate(config)
        self.shared_experts = MLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states):
        identity, orig_shape = hidden_states, hidden_states.shape
        topk_idx, topk_weight, aux_loss = self.gate(hidden_states)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        flat_topk_idx = topk_idx.view(-1)
        if self.training:
            hidden_states = hidden_states.repeat_interleave(self.num_experts_per_tok, dim=0)
            y = torch.empty_like(hidden_states)
            for i, expert in enumerate(self.experts):
                y[flat_topk_idx == i] = expert(hidden_states[flat_topk_idx == i])
            y = (y.view(*topk_weight.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1).view(*orig_shape)
            if aux_loss is not None:
                y = AddAuxiliaryLoss.apply(y, aux_loss)
        else:
            y = self.moe_infer(hidden_states, flat_topk_idx, topk_weight.view(-1, 1)).view(*orig_shape)
        return y + self.shared_experts(identity)

    @torch.no_grad()
    def moe_infer(self, x, flat_expert_indices, flat_expert_weights):
        expert_cache = torch.zeros_like(x)
        idxs = flat_expert_indices.argsort()
        ends = flat_expert_indices.bincount().cumsum(0).tolist()
        token_idxs = idxs // self.num_experts_per_tok
        for i, end_idx in enumerate(ends):
            start_idx = 0 if i == 0 else ends[i - 1]
            if start_idx == end_idx:
                continue
            exp_token_idx = token_idxs[start_idx:end_idx]
            expert_out = self.experts[i](x[exp_token_idx])
            expert_out.mul_(flat_expert_weights[idxs[start_idx:end_idx]])
            expert_cache.scatter_reduce_(0, exp_token_idx.view(-1, 1).repeat(1, x.shape[-1]), expert_out, reduce="sum")
        return expert_cache


# ------------------------------------------------------- "rows": the choice is made over scores of shape (B, S, E)
class RowsMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts)
        self.experts = nn.ModuleList(
            [MLP(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts)]
        )

    def forward(self, hidden_states):
        scores = self.gate(hidden_states).float().sigmoid()
        weights, chosen = scores.topk(self.top_k, dim=-1)
        output = torch.zeros_like(hidden_states)
        for i, expert in enumerate(self.experts):
            is_chosen = (chosen == i).any(dim=-1)
            if not is_chosen.any():
                continue
            weight = weights.masked_fill(chosen != i, 0.0).sum(dim=-1, keepdim=True)[is_chosen]
            output[is_chosen] += expert(hidden_states[is_chosen]) * weight.to(hidden_states.dtype)
        return output


# ------------------------------------------------------ "stacks": 3-D weights in a class without transformers' flags
class StackedExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        num_experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        final = torch.zeros_like(hidden_states)
        for i in top_k_index.unique().tolist():
            token_idx, position = torch.where(top_k_index == i)
            gate, up = F.linear(hidden_states[token_idx], self.gate_up_proj[i]).chunk(2, dim=-1)
            current = F.linear(F.silu(gate) * up, self.down_proj[i]) * top_k_weights[token_idx, position, None]
            final.index_add_(0, token_idx, current.to(final.dtype))
        return final


class TopKRouter(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states):
        logits = F.linear(hidden_states, self.weight)
        scores = logits.float().sigmoid()
        weights, index = torch.topk(scores, self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(hidden_states.dtype), index


class StackedMoE(nn.Module):
    router_class = TopKRouter

    def __init__(self, config):
        super().__init__()
        self.gate = self.router_class(config)
        self.experts = StackedExperts(config)

    def forward(self, hidden_states):
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])
        _, weights, index = self.gate(hidden_states)
        return self.experts(hidden_states, index, weights).reshape(shape)


# ---------------------------------------------------------------------------------- what has no ranks, or no experts
class TwiceRouter(TopKRouter):
    """Chooses, and chooses again among scores that lean to its first choice."""

    def forward(self, hidden_states):
        logits = F.linear(hidden_states, self.weight)
        scores = logits.float().softmax(-1)
        first = scores.topk(self.top_k, dim=-1)
        weights, index = scores.scatter_add(-1, first.indices, 0.1 * first.values).topk(self.top_k, dim=-1)
        return logits, weights, index


class SortRouter(TopKRouter):
    """Chooses without topk, as kernels do."""

    def forward(self, hidden_states):
        logits = F.linear(hidden_states, self.weight)
        scores, order = logits.float().softmax(-1).sort(dim=-1, descending=True)
        return logits, scores[:, : self.top_k], order[:, : self.top_k]


class TwiceMoE(StackedMoE):
    router_class = TwiceRouter


class SortMoE(StackedMoE):
    router_class = SortRouter


class HeadAdapters(nn.Module):
    """Modules of one class in a list, all of them run on every token, and a linear layer beside them: no MoE."""

    def __init__(self, config):
        super().__init__()
        num, width = config.n_routed_experts, config.hidden_size // config.n_routed_experts
        self.heads = nn.ModuleList([nn.Linear(config.hidden_size, width) for _ in range(num)])
        self.out_proj = nn.Linear(num * width, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.out_proj(torch.cat([head(hidden_states) for head in self.heads], dim=-1))


class MixedAdapters(nn.Module):
    """As [`HeadAdapters`], with a linear layer that weighs them: it has the shape of a gate, and chooses nothing."""

    def __init__(self, config):
        super().__init__()
        num = config.n_routed_experts
        self.adapters = nn.ModuleList([nn.Linear(config.hidden_size, config.hidden_size) for _ in range(num)])
        self.mix = nn.Linear(config.hidden_size, num)

    def forward(self, hidden_states):
        weights = self.mix(hidden_states).softmax(dim=-1)
        return sum(weights[..., i, None] * adapter(hidden_states) for i, adapter in enumerate(self.adapters))


BLOCKS = {
    "mixtral": MixtralSparseMoeBlock,
    "deepseek": DeepseekMoE,
    "rows": RowsMoE,
    "stacks": StackedMoE,
    "twice": TwiceMoE,
    "sort": SortMoE,
    "heads": HeadAdapters,
    "mixed": MixedAdapters,
}


# ----------------------------------------------------------------------------------------------------------- the model
class DecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        is_dense = config.layout == "deepseek" and layer_idx < config.first_k_dense_replace
        self.mlp = MLP(config) if is_dense else BLOCKS[config.layout](config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, attention_mask, position_ids, past_key_values=None):
        attended = self.self_attn(self.input_layernorm(hidden_states), attention_mask, position_ids, past_key_values)
        hidden_states = hidden_states + attended
        output = self.mlp(self.post_attention_layernorm(hidden_states))
        if isinstance(output, tuple):
            output, _ = output
        return hidden_states + output


class TinyMoePreTrainedModel(PreTrainedModel):
    config_class = TinyMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _supports_sdpa = True

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.data.normal_(mean=0.0, std=0.02)


class TinyMoeModel(TinyMoePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
    ):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        mask = self._mask(inputs_embeds, attention_mask, past)
        hidden_states = inputs_embeds
        for decoder_layer in self.layers:
            if self.gradient_checkpointing and self.training:
                hidden_states = self._gradient_checkpointing_func(
                    decoder_layer.__call__, hidden_states, mask, position_ids, past_key_values
                )
            else:
                hidden_states = decoder_layer(hidden_states, mask, position_ids, past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _mask(self, inputs_embeds, attention_mask, past):
        """What each position sees, of shape `(B, 1, S, past + S)`. A row of padding sees itself."""
        if attention_mask is not None and attention_mask.dim() == 4:
            return attention_mask
        rows, length = inputs_embeds.shape[:2]
        position = torch.arange(past + length, device=inputs_embeds.device)
        mask = (position[None, :] <= position[past:, None])[None, None].expand(rows, 1, length, past + length)
        if attention_mask is not None:
            itself = position[None, :] == position[past:, None]
            mask = (mask & attention_mask[:, None, None, :].bool()) | itself
        return mask


class TinyMoeForCausalLM(TinyMoePreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = TinyMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        cache=None,  # `past_key_values`, as generate calls it from transformers 5.24 on
        **kwargs,
    ):
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
