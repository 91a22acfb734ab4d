"""What is known of a micro-batch's tiers: the value that passes hand on, and losses are functions of."""

from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import pad

from ..tiers.scope import IGNORED_LABEL


# In place of a tier: the batch's own rows where tiers have responses of their own.
SFT_ROWS = 0

# Tier → log-probabilities and labels of its rows, each (B, S).
Scored = dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class TierScores:
    """What is known of a batch's tiers; a tier that was not run has zeros and no labels.

    Args:
        num_tiers (`int`): C.
        width (`int`): S, predicted positions of the widest rows.
        by_tier (`dict`): log-probabilities and labels of the tiers that were run.
        reference (`dict`): the same under the frozen base, where the objective compares with it.
        ntp_loss (`torch.Tensor`, scalar): mean negative log-probability per token of the batch's own rows on tier 1.
        balance_loss (`torch.Tensor`, scalar): of the same rows.
    """

    num_tiers: int
    width: int
    by_tier: Scored = field(default_factory=dict)
    reference: Scored = field(default_factory=dict)
    ntp_loss: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    balance_loss: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def tiers(self) -> list[int]:
        """The tiers that were run, from 1."""
        return sorted(tier for tier in self.by_tier if tier != SFT_ROWS)

    @property
    def log_probs_CBS(self) -> torch.Tensor:
        """Log-probability of each label of each tier's response, 0 where there is none."""
        return self._stacked(self.by_tier, 0)

    @property
    def labels_CBS(self) -> torch.Tensor:
        """Those labels; `-100` where there is none."""
        return self._stacked(self.by_tier, 1)

    @property
    def mask_CBS(self) -> torch.Tensor:
        """Where there is a label."""
        return self.labels_CBS != IGNORED_LABEL

    @property
    def reference_CBS(self) -> torch.Tensor | None:
        """The frozen base's log-probabilities, where it was run."""
        return self._stacked(self.reference, 0) if self.reference else None

    def detached(self) -> "TierScores":
        """The numbers alone. References to a graph keep part of its memory after backward."""
        return replace(
            self,
            by_tier={tier: (log_probs.detach(), labels) for tier, (log_probs, labels) in self.by_tier.items()},
            ntp_loss=self.ntp_loss.detach(),
            balance_loss=self.balance_loss.detach(),
        )

    def _stacked(self, scored: Scored, part: int) -> torch.Tensor:
        fill = (0, IGNORED_LABEL)[part]
        example = next(iter(scored.values()))[part]
        absent = example.new_full((len(example), self.width), fill)
        parts = [scored[tier][part] if tier in scored else absent for tier in range(1, self.num_tiers + 1)]
        return torch.stack([pad(part, (0, self.width - part.shape[1]), value=fill) for part in parts])
