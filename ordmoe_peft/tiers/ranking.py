"""From routing scores to ranks to tiers. Pure functions; tiers and ranks count from 1.

Shape suffixes as in `experts/__init__.py`.
"""

import torch

from ..errors import OrdMoEConfigError


GROUPINGS = ("uniform", "high_only", "random")


def check_tiers_fit(num_tiers: int, num_experts: int, top_k: int, layer_name: str) -> None:
    """Raise [`OrdMoEConfigError`] unless `num_tiers` disjoint tiers of `top_k` experts fit into `num_experts`."""
    if num_tiers * top_k > num_experts:
        raise OrdMoEConfigError(
            f"num_tiers={num_tiers} does not fit {layer_name}: {num_tiers} tiers of K={top_k} experts need "
            f"{num_tiers * top_k}, but E={num_experts}. The largest num_tiers that fits is {num_experts // top_k}."
        )


def first_rank(tier: int, num_tiers: int, num_experts: int, top_k: int, grouping: str) -> int:
    """The best rank of `tier`; the tier is that rank and the K − 1 that follow.

    `uniform` spreads the tiers from the first K ranks to the last K; `high_only` stacks them from the top. `random`
    has no ranks of its own: its tiers are stacked blocks of an order that [`random_order`] shuffles below the top K.
    """
    if grouping == "uniform" and num_tiers > 1:
        return 1 + round((tier - 1) * (num_experts - top_k) / (num_tiers - 1))
    return (tier - 1) * top_k + 1


def rank_experts(
    scores_TE: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    left_out_TE: torch.Tensor | None = None,
    num_needed: int = 0,
) -> torch.Tensor:
    """Experts of each token from rank 1 to rank E (`torch.Tensor` of shape `(T, E)`).

    The first K are those that the router chose, whatever it did with ties, so that no lower tier shares an expert with
    tier 1, in no particular order; the others follow by score, ties by index. Where a group-limited router left experts
    out, the ranks end with those that it kept, if these are enough for the tiers; else its groups are ignored.

    Args:
        scores_TE (`torch.Tensor` of shape `(T, E)`): routing scores of all experts.
        top_k_index_TK (`torch.Tensor` of shape `(T, K)`): the router's choice.
        left_out_TE (`torch.Tensor` of shape `(T, E)`, *optional*): experts that were not to choose from.
        num_needed (`int`): C·K.
    """
    num_ranked = scores_TE.shape[1]
    if left_out_TE is not None and (num_kept := int((~left_out_TE).sum(1).min())) >= num_needed:
        scores_TE, num_ranked = scores_TE.masked_fill(left_out_TE, float("-inf")), num_kept
    chosen_first_TE = scores_TE.scatter(1, top_k_index_TK, float("inf"))
    return torch.sort(chosen_first_TE, dim=1, descending=True, stable=True).indices[:, :num_ranked]


def random_order(
    ranked_TE: torch.Tensor,
    top_k: int,
    row_T: torch.Tensor,
    position_T: torch.Tensor,
    seed: int,
    step: int,
    layer: int,
) -> torch.Tensor:
    """`ranked_TE` with the experts below the top K in an order drawn for each token (`torch.Tensor`, `(T, E)`).

    The draw is a hash of (seed, step, layer, row, position, expert) rather than a generator's state, so a repeated
    forward, a cached decoding step and another device draw the same.
    """
    key_T = _mix(_mix(_mix(_mix(_mix(row_T.new_tensor(seed)) + step) + layer) + row_T) + position_T)
    key_TE = _mix(key_T.unsqueeze(1) + torch.arange(ranked_TE.shape[1], device=row_T.device))
    drawn_TE = torch.sort(key_TE[:, top_k:], dim=1, stable=True).indices
    return torch.cat([ranked_TE[:, :top_k], ranked_TE[:, top_k:].gather(1, drawn_TE)], dim=1)


def _mix(key: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64 (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195).

    Right shifts of int64 keep the sign, so the shifted-in bits are masked off; products wrap around, as intended.
    """
    key = key + _signed(0x9E3779B97F4A7C15)
    key = (key ^ ((key >> 30) & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9)
    key = (key ^ ((key >> 27) & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB)
    return key ^ ((key >> 31) & 0x1FFFFFFFF)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def ranks_of_tiers(tier_T: torch.Tensor, num_tiers: int, num_ranked: int, top_k: int, grouping: str) -> torch.Tensor:
    """The ranks of each token's tier, counted from 0 as columns are (`torch.Tensor` of shape `(T, K)`).

    Args:
        tier_T (`torch.Tensor` of shape `(T,)`): each token's tier, from 1.
        num_ranked (`int`): how many experts have a rank.
    """
    starts = [first_rank(tier, num_tiers, num_ranked, top_k, grouping) - 1 for tier in range(1, num_tiers + 1)]
    start_T = torch.tensor(starts, device=tier_T.device)[tier_T - 1]
    return start_T.unsqueeze(1) + torch.arange(top_k, device=tier_T.device)
