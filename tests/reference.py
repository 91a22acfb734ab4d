"""Slow, obvious versions of what the package computes, one token at a time."""

import torch
from torch import nn


def experts(
    module: nn.Module,
    hidden_states_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    weights: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Every token through its experts, one expert and one token at a time.

    `weights` replaces the module's stacks by name, e.g. by dequantised ones or by ones with a LoRA delta added.
    """
    weights = weights or {}

    def project(name: str, x_I: torch.Tensor, expert: int) -> torch.Tensor:
        matrix = weights.get(name, getattr(module, name, None))[expert]
        y_O = x_I @ matrix if module.is_transposed else matrix @ x_I
        return y_O + getattr(module, f"{name}_bias")[expert] if module.has_bias else y_O

    outputs = []
    for x_H, experts_K, weights_K in zip(hidden_states_TH, index_TK, weights_TK, strict=True):
        total_H = torch.zeros_like(x_H)
        for expert, weight in zip(experts_K.tolist(), weights_K, strict=True):
            up = project("gate_up_proj" if module.has_gate else "up_proj", x_H, expert)
            inner_F = module._apply_gate(up.unsqueeze(0)).squeeze(0) if module.has_gate else module.act_fn(up)
            output_H = project("down_proj", inner_F, expert)
            total_H = total_H + weight * (
                module.post_expert_norm(output_H) if module.has_post_expert_norm else output_H
            )
        outputs.append(total_H)
    return torch.stack(outputs)


def expert_deltas(lora_A: torch.Tensor, lora_B: torch.Tensor, num_experts: int, scaling: float) -> torch.Tensor:
    """The delta of each expert, `(E, O, I)`, from PEFT's layout: row e·r + k of A, column k·E + e of B."""
    r = len(lora_A) // num_experts
    deltas = []
    for expert in range(num_experts):
        A = torch.stack([lora_A[expert * r + k] for k in range(r)])
        B = torch.stack([lora_B[:, k * num_experts + expert] for k in range(r)], dim=1)
        deltas.append(scaling * B @ A)
    return torch.stack(deltas)


def tier_ranks(tier: int, num_tiers: int, num_experts: int, top_k: int, grouping: str) -> list[int]:
    """The ranks of a tier, from 1, as METHOD says them."""
    if grouping == "high_only":
        return [(tier - 1) * top_k + k for k in range(1, top_k + 1)]
    first = 1 if num_tiers == 1 else 1 + round((tier - 1) * (num_experts - top_k) / (num_tiers - 1))
    return [first + k for k in range(top_k)]


def experts_at_ranks(scores_TE: torch.Tensor, ranks: list[int]) -> list[set[int]]:
    """For each token, the experts whose scores have these ranks."""
    chosen = []
    for scores_E in scores_TE.tolist():
        ordered = sorted(range(len(scores_E)), key=lambda expert: -scores_E[expert])
        chosen.append({ordered[rank - 1] for rank in ranks})
    return chosen


def balance_loss(router_logits_TE: torch.Tensor, top_k_index_TK: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """E · Σ f_i · P_i by counting."""
    num_experts = router_logits_TE.shape[1]
    routed, probability, tokens = torch.zeros(num_experts), torch.zeros(num_experts), 0
    for logits_E, index_K, is_token in zip(router_logits_TE, top_k_index_TK, mask_T, strict=True):
        if is_token:
            tokens += 1
            for expert in index_K:
                routed[expert] += 1
            probability = probability + logits_E.softmax(0)
    return num_experts * (routed / (tokens * top_k_index_TK.shape[1]) * probability / tokens).sum()


def likelihood_by_class(
    logits_SV: torch.Tensor, top_logits_SV: torch.Tensor, label_S: list[int]
) -> tuple[list[float], list[float]]:
    """Log-probabilities of a row's labelled tokens, in float64: where tier 1 is confident, and where it is fragile.

    `label_S` is shifted to the positions that predict, `top_logits_SV` are tier 1's.
    """
    confident, fragile = [], []
    for logits_V, top_V, label in zip(logits_SV.double(), top_logits_SV.double(), label_S, strict=True):
        if label != -100:
            is_sure = torch.exp(top_V.max() - torch.logsumexp(top_V, 0)).item() > 0.5
            (confident if is_sure else fragile).append((logits_V[label] - torch.logsumexp(logits_V, 0)).item())
    return confident, fragile
