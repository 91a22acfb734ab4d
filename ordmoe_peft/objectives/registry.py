"""The objectives that the trainer knows by name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .expert_rank import expert_rank_loss
from .preference import dpo_loss, ipo_loss, logistic_loss, plackett_luce_loss, simpo_loss


@dataclass
class ObjectiveInputs:
    """What an objective may look at.

    Args:
        mean_BC (`torch.Tensor` of shape `(B, C)`): mean log-probability per response token; 0 for tiers not run.
        sum_BC (`torch.Tensor` of shape `(B, C)`): summed log-probability of the response, likewise.
        reference_mean_BC, reference_sum_BC (`torch.Tensor` of shape `(B, C)`): the same of the frozen base, where the
            objective asks for it.
        advantages_C (`torch.Tensor` of shape `(C,)`): one advantage per tier.
        beta (`float`), gamma (`float`): `objective_beta` and `simpo_gamma`.
    """

    mean_BC: torch.Tensor
    sum_BC: torch.Tensor
    reference_mean_BC: torch.Tensor | None
    reference_sum_BC: torch.Tensor | None
    advantages_C: torch.Tensor
    beta: float
    gamma: float


@dataclass(frozen=True)
class Objective:
    """A preference objective over a batch's tiers.

    Args:
        loss (`Callable`): from [`ObjectiveInputs`] to a scalar.
        beta (`float`): default of `objective_beta`.
        tiers (`str`): which tiers it looks at: those with an `"advantage"`, both `"ends"`, or `"all"`.
        needs_reference (`bool`): whether it compares with the frozen base.
        is_sum_over_tiers (`bool`): whether each tier has a term of its own, so that the gradient of one needs no other.
    """

    loss: Callable[[ObjectiveInputs], torch.Tensor]
    beta: float = 1.0
    tiers: str = "all"
    needs_reference: bool = False
    is_sum_over_tiers: bool = False

    def active_tiers(self, advantages_C: torch.Tensor) -> list[int]:
        """The tiers, from 1, that the loss has a gradient for."""
        num_tiers = len(advantages_C)
        if self.tiers == "advantage":
            return [tier for tier in range(1, num_tiers + 1) if advantages_C[tier - 1] != 0]
        return [1, num_tiers] if self.tiers == "ends" else list(range(1, num_tiers + 1))


OBJECTIVES = {
    "erl": Objective(lambda x: expert_rank_loss(x.mean_BC, x.advantages_C), tiers="advantage", is_sum_over_tiers=True),
    "logistic": Objective(lambda x: logistic_loss(x.mean_BC, x.beta), tiers="ends"),
    "plackett_luce": Objective(lambda x: plackett_luce_loss(x.mean_BC, x.beta)),
    "dpo": Objective(lambda x: dpo_loss(x.sum_BC, x.reference_sum_BC, x.beta), beta=0.1, needs_reference=True),
    "ipo": Objective(lambda x: ipo_loss(x.mean_BC, x.reference_mean_BC, x.beta), beta=0.1, needs_reference=True),
    "simpo": Objective(lambda x: simpo_loss(x.mean_BC, x.beta, x.gamma), beta=2.0),
}
