"""What a tier gives each token of an answer, and the tokens that the model is sure of apart from the others.

An answer token is *confident* if, at the position that predicts it, tier 1 (the model as it is) gives the likeliest
next token more than all others together; else it is *fragile*, also where what tier 1 gives is not a number. The answer
may have another token than the likeliest. Since tier 1 chooses the class, a comparison of tier 1 with another tier over
a class favours tier 1 on confident tokens and the other on fragile ones: only tiers below it are compared. arXiv
2605.07260 found that the choice of top-k routers goes with what a route is worth on confident tokens, and says nothing
on fragile ones; the words are that paper's, the cut at one half is ours.

Shape suffixes as in `experts/__init__.py`; n counts samples, 4 are the likelihoods of [`LIKELIHOODS`].
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

from ...errors import OrdMoEConfigError
from ...objectives.expert_rank import mean_log_likelihood


# Suffix of a likelihood's name → the tokens that it is the mean over.
LIKELIHOODS = {
    "": "all tokens of the answer",
    "_no_eos": "those that do not end it",
    "_confident": "confident ones",
    "_fragile": "fragile ones",
}
# The probability that a token must have more than to have more than all others together.
CONFIDENT = 0.5


def is_confident(logits_BSV: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
    """Where `mask_BS` holds and the likeliest next token is likelier than all others together (`(B, S)`, `bool`).

    Row by row in float32, as [`~ordmoe_peft.objectives.expert_rank.label_log_probs`] does.
    """
    confident_BS = torch.zeros_like(mask_BS)
    for confident_S, logits_SV, mask_S in zip(confident_BS, logits_BSV, mask_BS, strict=True):
        confident_S[mask_S] = logits_SV[mask_S].float().softmax(-1).amax(-1) > CONFIDENT
    return confident_BS


@dataclass
class AnswerScores:
    """What a tier gives each token of a batch's reference answers.

    Args:
        log_probs_BS (`torch.Tensor` of shape `(B, S)`): log-probability of the token that comes next, in nats.
        mask_BS (`torch.Tensor` of shape `(B, S)`): where the next token is one of the answer.
        content_BS (`torch.Tensor` of shape `(B, S)`): the same without end-of-sequence tokens.
        confident_BS (`torch.Tensor` of shape `(B, S)`, *optional*): [`is_confident`] of tier 1, where it is asked for.
    """

    log_probs_BS: torch.Tensor
    mask_BS: torch.Tensor
    content_BS: torch.Tensor
    confident_BS: torch.Tensor | None = None

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each answer's mean log-probability per token, with and without end-of-sequence tokens (`(B,)`)."""
        masks = (self.mask_BS, self.content_BS)
        whole_B, no_eos_B = (mean_log_likelihood(self.log_probs_BS, mask_BS) for mask_BS in masks)
        return whole_B, no_eos_B

    def classes(self, confident_BS: torch.Tensor) -> torch.Tensor:
        """Which tokens of the answers are confident, and which are fragile (`(2, B, S)`, `bool`)."""
        confident_BS = confident_BS.to(self.mask_BS.device)
        return torch.stack([self.mask_BS & confident_BS, self.mask_BS & ~confident_BS])

    def likelihoods(self, confident_BS: torch.Tensor) -> torch.Tensor:
        """Each answer's mean log-probability per token over the tokens of [`LIKELIHOODS`] (`(4, B)`).

        Args:
            confident_BS (`torch.Tensor` of shape `(B, S)`): [`is_confident`] of tier 1. A class that an answer has no
                token of is 0, and NaN is a token that the model gives NaN.
        """
        classes_2BS = self.classes(confident_BS)
        # Products with a mask would carry NaN from one class to the other.
        means_2B = mean_log_likelihood(torch.where(classes_2BS, self.log_probs_BS, 0), classes_2BS)
        return torch.stack([*self.means(), *means_2B])


class LikelihoodRecord:
    """Keeps the likelihoods of all samples under all tiers, and which tokens are confident.

    `add` takes the scores of each batch under each tier, tier 1 first, which says what is confident.
    """

    def __init__(self) -> None:
        self.confident: list[torch.Tensor] = []  # (B, S) of each batch
        self.num_tokens = 0
        self._likelihoods: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._has_tokens: list[torch.Tensor] = []  # (2, B) of each batch

    @property
    def confident_share(self) -> float:
        """The share of answer tokens that are confident."""
        return sum(int(confident_BS.sum()) for confident_BS in self.confident) / self.num_tokens

    def add(self, tier: int, scores: AnswerScores) -> None:
        """Keep what `tier` gives its next batch.

        Raises:
            [`OrdMoEConfigError`]: tier 1 has not said yet what is confident in that batch.
        """
        if scores.confident_BS is not None:
            self.confident.append(scores.confident_BS.cpu())
            self.num_tokens += int(scores.mask_BS.sum())
            self._has_tokens.append(scores.classes(scores.confident_BS).any(-1).cpu())
        batch = len(self._likelihoods[tier])
        if batch == len(self.confident):
            raise OrdMoEConfigError(
                f"Tier {tier}'s scores of batch {batch + 1} came before tier 1 said which of its tokens are confident: "
                "evaluate tier 1 before the others."
            )
        self._likelihoods[tier].append(scores.likelihoods(self.confident[batch]).cpu())

    def likelihoods(self) -> torch.Tensor:
        """Of all samples under all tiers, from the highest (`(4, C, n)`); 0 where a class has no token."""
        return torch.stack([torch.cat(self._likelihoods[tier], dim=1) for tier in sorted(self._likelihoods)], dim=1)

    def has_tokens(self) -> torch.Tensor:
        """Whether each sample counts for each of [`LIKELIHOODS`], i.e. has tokens of the class (`(4, n)`, `bool`)."""
        classes_2n = torch.cat(self._has_tokens, dim=1)
        return torch.cat([torch.ones_like(classes_2n), classes_2n])


def mean_over_samples(values_n: torch.Tensor) -> float | None:
    """The mean; `None` without samples."""
    return values_n.double().mean().item() if len(values_n) else None
