"""The losses beside the supervised one, as functions of what the tier passes score."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from ..data.responses import content_mask
from ..errors import OrdMoEConfigError
from ..objectives.balance import balance_loss
from ..objectives.expert_rank import floor_lower_tiers, log_floor, mean_log_likelihood
from ..objectives.registry import OBJECTIVES, Objective, ObjectiveInputs
from ..router_output import RouterOutput
from .arguments import OrdMoETrainingArguments
from .tier_scores import TierScores


# A metric's sum over this process's samples, and how many these are.
Sum = tuple[torch.Tensor | float, torch.Tensor | float]


@dataclass(frozen=True)
class TierLoss:
    """L_ERL, the objective over a batch's tiers.

    Args:
        objective ([`Objective`]): what it is.
        advantages_C (`torch.Tensor` of shape `(C,)`): one advantage per tier.
        beta (`float`), gamma (`float`): `objective_beta` and `simpo_gamma`.
        floor (`float`, *optional*): log-probability below which tokens of low tiers give no gradient.
    """

    objective: Objective
    advantages_C: torch.Tensor
    beta: float
    gamma: float
    floor: float | None = None

    @classmethod
    def of(cls, args: OrdMoETrainingArguments, advantages_C: torch.Tensor, vocab_size: int) -> "TierLoss":
        """The loss that training's arguments ask for."""
        objective = OBJECTIVES[args.objective]
        floor = None if args.lower_tier_floor is None else log_floor(args.lower_tier_floor, vocab_size)
        return cls(objective, advantages_C, args.objective_beta or objective.beta, args.simpo_gamma, floor)

    def __call__(self, scores: TierScores) -> torch.Tensor:
        """The mean over the batch's rows that have a response; tiers that were not run have a likelihood of 0."""
        log_probs_CBS, mask_CBS, reference_CBS = scores.log_probs_CBS, scores.mask_CBS, scores.reference_CBS
        has_response_B = mask_CBS.any(-1).any(0)
        if scores.num_tiers == 1 or not has_response_B.any():
            return 0 * log_probs_CBS.sum()
        log_probs_CBS, mask_CBS = log_probs_CBS[:, has_response_B], mask_CBS[:, has_response_B]
        advantages_C = self.advantages_C.to(log_probs_CBS.device)
        if self.floor is not None:
            log_probs_CBS = floor_lower_tiers(log_probs_CBS, advantages_C, self.floor)
        if reference_CBS is not None:
            reference_CBS = reference_CBS[:, has_response_B]
        return self.objective.loss(
            ObjectiveInputs(
                mean_BC=mean_log_likelihood(log_probs_CBS, mask_CBS).T,
                sum_BC=(log_probs_CBS * mask_CBS).sum(-1).T,
                reference_mean_BC=None if reference_CBS is None else mean_log_likelihood(reference_CBS, mask_CBS).T,
                reference_sum_BC=None if reference_CBS is None else (reference_CBS * mask_CBS).sum(-1).T,
                advantages_C=advantages_C,
                beta=self.beta,
                gamma=self.gamma,
            )
        )

    def added(self, scores: TierScores, previous: TierScores | None) -> torch.Tensor:
        """What a pass adds to the loss, so that the passes of a micro-batch add up to it.

        The scores that the pass ran have a graph, all others are numbers. So the gradient is that of the whole loss
        with respect to these scores, and the gradients of all passes add up to the gradient of the loss.

            pass 0    L(l_1, -, l_3*)                          gradient with respect to l_1
            pass 1    L(l_1*, -, l_3) - L(l_1*, -, l_3*)       gradient with respect to l_3

        l_j is the likelihood of tier j, l_j* its number: 0 before the pass of tier j, or what was precomputed.

        Args:
            scores ([`TierScores`]): what is known after the pass.
            previous ([`TierScores`], *optional*): what was known before it, without a graph; `None` for the first.
        """
        return self(scores) if previous is None else self(scores) - self(previous)


def mean_balance_loss(routing: Sequence[RouterOutput], mask_BS: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The balance loss averaged over MoE layers, on the device of `like`; 0 without any layer.

    Args:
        routing (sequence of [`RouterOutput`]): each layer's, of the same tokens.
        mask_BS (`torch.Tensor` of shape `(B, S)`): which of them are no padding.

    Raises:
        [`OrdMoEConfigError`]: routers got other tokens than the rows have.
    """
    if not routing:
        return like.new_zeros(())
    mask_T = mask_BS.reshape(-1)
    counts = {len(logits_TE) for logits_TE, _, _ in routing if logits_TE is not None}
    if counts != {len(mask_T)}:
        raise OrdMoEConfigError(
            f"Routers got {sorted(counts)} tokens of rows with {len(mask_T)} positions, so the balance loss does not "
            "know which are padding: set balance_coef=0."
        )
    losses = []
    for logits_TE, _, index_TK in routing:
        assert logits_TE is not None and index_TK is not None, "recording refuses routers without them"
        losses.append(balance_loss(logits_TE, index_TK, mask_T.to(logits_TE.device)).to(like.device))
    return torch.stack(losses).mean()


def tier_metrics(scores: TierScores, end_ids: torch.Tensor, with_lengths: bool) -> dict[str, Sum]:
    """For each tier that was run its mean log-likelihoods, and with generated responses their lengths.

    A row without tokens has no likelihood, and does not count as one of 0.
    """
    sums: dict[str, Sum] = {}
    log_probs_CBS, labels_CBS, mask_CBS = scores.log_probs_CBS, scores.labels_CBS, scores.mask_CBS
    for tier in scores.tiers:
        log_probs_BS, labels_BS, mask_BS = (part_CBS[tier - 1] for part_CBS in (log_probs_CBS, labels_CBS, mask_CBS))
        content_BS = content_mask(labels_BS, mask_BS, end_ids)
        for name, counted_BS in (("log_likelihood", mask_BS), ("log_likelihood_no_eos", content_BS)):
            means_B = mean_log_likelihood(log_probs_BS, counted_BS)
            sums[f"tier_{tier}/{name}"] = (means_B.sum(), counted_BS.any(-1).sum())
        if with_lengths:
            sums[f"tier_{tier}/response_length"] = (mask_BS.sum(), len(mask_BS))
    return sums


def means_over_processes(sums: dict[str, Sum], accelerator: Accelerator) -> dict[str, float]:
    """The means over all processes; left out where there is nothing to average."""
    parts = [torch.as_tensor(part, dtype=torch.float32) for pair in sums.values() for part in pair]
    local_n2 = torch.stack([part.to(accelerator.device) for part in parts]).view(-1, 2)
    # Not `gather_for_metrics`, which drops processes where the last batch has fewer samples than there are.
    summed_n2 = accelerator.reduce(local_n2, reduction="sum").tolist()
    return {name: total / count for name, (total, count) in zip(sums, summed_n2, strict=True) if count}
