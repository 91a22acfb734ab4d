"""From one reward per tier to one advantage per tier."""

from collections.abc import Callable, Sequence

import torch

from ..errors import OrdMoEConfigError


def tier_rewards(rewards: Sequence[float] | None, num_tiers: int) -> torch.Tensor:
    """The rewards of tiers 1…C (`torch.Tensor` of shape `(C,)`, float64): as given, or evenly spaced from 1 to 0.

    Raises:
        [`OrdMoEConfigError`]: not one reward per tier, or they rise from a tier to the next.
    """
    if rewards is None:
        return torch.linspace(1, 0, num_tiers, dtype=torch.float64)
    if len(rewards) != num_tiers:
        raise OrdMoEConfigError(f"rewards needs one value for each of the {num_tiers} tiers, got {list(rewards)}.")
    values = torch.tensor(rewards, dtype=torch.float64)
    if (values.diff() > 0).any() or not values.isfinite().all():
        raise OrdMoEConfigError(f"rewards must be finite and not rise from the top tier down, got {list(rewards)}.")
    return values


def zscore(rewards_C: torch.Tensor) -> torch.Tensor:
    """`(r − mean r) / (population std of r + 1e-8)`: blind to the scale of the rewards (OrdMoE, arXiv 2511.19023)."""
    return center(rewards_C) / (rewards_C.std(correction=0) + 1e-8)


def center(rewards_C: torch.Tensor) -> torch.Tensor:
    """`r − mean r`."""
    return rewards_C - rewards_C.mean()


def none(rewards_C: torch.Tensor) -> torch.Tensor:
    """`r`, unchanged."""
    return rewards_C


ADVANTAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"zscore": zscore, "center": center, "none": none}


def tier_advantages(rewards: Sequence[float] | None, num_tiers: int, kind: str) -> torch.Tensor:
    """The advantages of tiers 1…C (`torch.Tensor` of shape `(C,)`, float32) by the rule `kind` of [`ADVANTAGES`].

    What differs from 0 by rounding alone is 0, so that tiers without a gradient are known as such.
    """
    advantages_C = ADVANTAGES[kind](tier_rewards(rewards, num_tiers))
    is_rounding_C = advantages_C.abs() < 1e-9 * advantages_C.abs().max()
    return advantages_C.masked_fill(is_rounding_C, 0).float()
