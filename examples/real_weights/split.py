"""Split the feed-forward networks of a dense Llama into experts, without training: a Qwen2-MoE of the same weights.

After CMoE (arXiv 2502.04416): neurons that most tokens use make the shared expert, which is always on; the others are
clustered by the tokens that use them into experts of equal size, and the router is computed from activations in closed
form. CMoE scores an expert by one neuron that represents it; Qwen2-MoE's router is linear, so ours is the ridge
regression of what experts put out on what goes in. Where all experts are active (`top_k = num_experts`) at equal
weights, the model is the dense one.

Shape suffixes: N tokens, H hidden size, F neurons of a feed-forward network, E experts, M neurons of an expert.
"""

from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM


# Of a token's neurons, the share with the largest contributions counts as used by it.
USED = 0.1
# Tokens that neurons are shared and clustered by; the router is fitted on all.
CLUSTERED_ON = 4096
# Rounds of k-means, which change little after that.
ROUNDS = 8
# Of the inputs' mean square: what ridge regression adds.
RIDGE = 1e-3
# The sizes of router logits that are tried.
LOGIT_SIZES = (0.25, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Split:
    """How a feed-forward network of F neurons is cut.

    Args:
        num_experts (`int`): E, routed.
        top_k (`int`): K, of them active.
        expert_size (`int`): M, neurons of each. The other F − E·M are the shared expert.
    """

    num_experts: int
    top_k: int
    expert_size: int


def moe_config(dense: LlamaForCausalLM, split: Split) -> Qwen2MoeConfig:
    """The configuration of the dense model's MoE."""
    llama = dense.config
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same += ("hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    same += ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    return Qwen2MoeConfig(
        **{name: getattr(llama, name) for name in same},
        intermediate_size=llama.intermediate_size,
        moe_intermediate_size=split.expert_size,
        shared_expert_intermediate_size=llama.intermediate_size - split.num_experts * split.expert_size,
        num_experts=split.num_experts,
        num_experts_per_tok=split.top_k,
        norm_topk_prob=True,
        qkv_bias=False,
        dtype=llama.dtype,
    )


@torch.no_grad()
def split_model(dense: LlamaForCausalLM, inputs: list[torch.Tensor], split: Split) -> Qwen2MoeForCausalLM:
    """A MoE whose experts are the dense model's neurons.

    Args:
        dense ([`~transformers.LlamaForCausalLM`]): the model.
        inputs (list of `torch.Tensor` of shape `(N, H)`): what goes into each layer's feed-forward network, see
            [`ffn_inputs`].
        split ([`Split`]): how to cut.
    """
    moe = Qwen2MoeForCausalLM(moe_config(dense, split)).eval()
    state = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    missing, unexpected = moe.load_state_dict(state, strict=False)
    assert not unexpected and all(".mlp." in name for name in missing), (missing, unexpected)
    pairs = zip(dense.model.layers, moe.model.layers, inputs, strict=True)
    for of_dense, of_moe, hidden_NH in tqdm(pairs, desc="Splitting", total=len(inputs), unit="layer"):
        split_ffn(of_dense.mlp, of_moe.mlp, hidden_NH, split)
    return moe


@torch.no_grad()
def ffn_inputs(dense: LlamaForCausalLM, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """What goes into the feed-forward network of each layer, `(N, H)`, when the model reads token sequences `(S,)`."""
    found: list[list[torch.Tensor]] = [[] for _ in dense.model.layers]

    def keep(inputs_NH: list[torch.Tensor]):
        return lambda module, arguments: inputs_NH.append(arguments[0][0])

    handles = [
        layer.mlp.register_forward_pre_hook(keep(of_layer))
        for layer, of_layer in zip(dense.model.layers, found, strict=True)
    ]
    for token_S in tqdm(texts, desc="Reading", unit="text"):
        dense.model(input_ids=token_S[None])
    for handle in handles:
        handle.remove()
    return [torch.cat(of_layer) for of_layer in found]


def split_ffn(ffn: nn.Module, block: nn.Module, hidden_NH: torch.Tensor, split: Split) -> None:
    """Fill a Qwen2-MoE block with a Llama FFN's neurons and a router for them."""
    activation_NF = ffn.act_fn(ffn.gate_proj(hidden_NH)) * ffn.up_proj(hidden_NH)
    size_NF = activation_NF.abs() * ffn.down_proj.weight.norm(dim=0)
    shared, expert_EM = cut_neurons(size_NF[:CLUSTERED_ON], split)
    gate_FH, up_FH, down_FH = ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight.T
    block.shared_expert.gate_proj.weight.copy_(gate_FH[shared])
    block.shared_expert.up_proj.weight.copy_(up_FH[shared])
    # Its gate is σ(0) = ½ for every token, and experts weigh 1/K each where their scores are equal.
    block.shared_expert.down_proj.weight.copy_(2 * down_FH[shared].T)
    block.shared_expert_gate.weight.zero_()
    block.experts.gate_up_proj.copy_(torch.cat([gate_FH[expert_EM], up_FH[expert_EM]], dim=1))
    block.experts.down_proj.copy_(split.top_k * down_FH[expert_EM].transpose(1, 2))
    output_ENH = torch.einsum("nem,emh->enh", activation_NF[:, expert_EM], down_FH[expert_EM])
    router_EH = fit_router(hidden_NH, output_ENH.norm(dim=2).T)
    block.gate.weight.copy_(router_EH * best_logit_size(hidden_NH @ router_EH.T, output_ENH, split.top_k))


def cut_neurons(size_NF: torch.Tensor, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """The shared expert's neurons `(F − E·M,)`, those that most tokens use, and the experts' `(E, M)`."""
    num_used = max(1, int(USED * size_NF.shape[1]))
    used_NF = torch.zeros_like(size_NF).scatter_(1, size_NF.topk(num_used).indices, 1.0)
    by_use_F = used_NF.mean(0).argsort(descending=True, stable=True)
    num_shared = size_NF.shape[1] - split.num_experts * split.expert_size
    routed = by_use_F[num_shared:]
    return by_use_F[:num_shared], routed[balanced_clusters(used_NF[:, routed].T, split.num_experts)]


def balanced_clusters(points_FN: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Balanced k-means: indices `(E, F / E)` of the points of each cluster.

    Points are given out in the order of how much they prefer their best cluster to their second best.
    """
    size = len(points_FN) // num_clusters
    # Evenly spaced, since neurons come sorted by how many tokens use them.
    centre_EN = points_FN[torch.arange(num_clusters) * size + size // 2]
    for _ in range(ROUNDS):
        distance_FE = torch.cdist(points_FN, centre_EN)
        cluster_F = _balanced(distance_FE, size)
        centre_EN = torch.stack([points_FN[cluster_F == cluster].mean(0) for cluster in range(num_clusters)])
    return torch.stack([(cluster_F == cluster).nonzero()[:, 0] for cluster in range(num_clusters)])


def _balanced(distance_FE: torch.Tensor, size: int) -> torch.Tensor:
    """A cluster for each point, `size` points each: the clearest case first, to the nearest one with room."""
    cluster_F = torch.empty(len(distance_FE), dtype=torch.long)
    room = [size] * distance_FE.shape[1]
    nearest_FE = distance_FE.argsort(dim=1).tolist()
    two_F2 = distance_FE.topk(2, largest=False).values
    for point in (two_F2[:, 0] - two_F2[:, 1]).argsort().tolist():
        cluster = next(cluster for cluster in nearest_FE[point] if room[cluster])
        cluster_F[point] = cluster
        room[cluster] -= 1
    return cluster_F


def fit_router(hidden_NH: torch.Tensor, size_NE: torch.Tensor) -> torch.Tensor:
    """Router weights `(E, H)`: ridge regression of the sizes of experts' outputs on what goes in.

    Sizes are taken against the token's mean over experts, which changes no ranking, and have a standard deviation
    of 1.
    """
    target_NE = size_NE - size_NE.mean(1, keepdim=True)
    target_NE = target_NE / target_NE.std()
    gram_HH = hidden_NH.T @ hidden_NH
    ridge = RIDGE * gram_HH.diagonal().mean()
    gram_HH.diagonal().add_(ridge)
    return torch.linalg.solve(gram_HH, hidden_NH.T @ target_NE).T


def best_logit_size(logits_NE: torch.Tensor, output_ENH: torch.Tensor, top_k: int) -> float:
    """The factor for logits with which the chosen experts come nearest to the sum of all experts' outputs."""
    whole_NH = output_ENH.sum(0)
    top = logits_NE.topk(top_k)
    chosen_KNH = torch.stack(
        [
            output_ENH.gather(0, index_N[None, :, None].expand(1, -1, output_ENH.shape[2]))[0]
            for index_N in top.indices.T
        ]
    )

    def error(factor: float) -> float:
        weight_KN1 = top_k * (factor * top.values).softmax(1).T[..., None]
        return (whole_NH - (weight_KN1 * chosen_KNH).sum(0)).square().sum().item()

    return min(LOGIT_SIZES, key=error)
