"""What a tier gives each token of an answer, and the tokens that the model is sure of apart from the others.

An answer token is *confident* if, at the position that predicts it, tier 1 (the model as it is) gives the likeliest
next token more than all others together; else it is *fragile*. The answer may have another token than the likeliest.
arXiv 2605.07260 found that the choice of top-k routers goes with what a route is worth on confident tokens, and says
nothing on fragile ones; the words are that paper's, the cut at one half is ours.

Shape suffixes as in `experts/__init__.py`; n counts samples, 4 are the likelihoods of [`LIKELIHOODS`].
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

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
        confident_BS (`torch.Tensor` of shape `(B, S)`, *optional*): [`is_confident`] of tier 1; `None` of others.
    """

    log_probs_BS: torch.Tensor
    mask_BS: torch.Tensor
    content_BS: torch.Tensor
    confident_BS: torch.Tensor | None

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each answer's mean log-probability per token, with and without end-of-sequence tokens (`(B,)`)."""
        masks = (self.mask_BS, self.content_BS)
        whole_B, no_eos_B = (mean_log_likelihood(self.log_probs_BS, mask_BS) for mask_BS in masks)
        return whole_B, no_eos_B

    def likelihoods(self, confident_BS: torch.Tensor) -> torch.Tensor:
        """Each answer's mean log-probability per token over the tokens of [`LIKELIHOODS`] (`(4, B)`).

        Args:
            confident_BS (`torch.Tensor` of shape `(B, S)`): [`is_confident`] of tier 1. A class that an answer has no
                token of is NaN.
        """
        confident_BS = confident_BS.to(self.mask_BS.device)
        classes_2BS = torch.stack([self.mask_BS & confident_BS, self.mask_BS & ~confident_BS])
        means_2B = mean_log_likelihood(self.log_probs_BS, classes_2BS)
        return torch.stack([*self.means(), *means_2B.masked_fill(~classes_2BS.any(-1), float("nan"))])


class LikelihoodRecord:
    """Keeps the likelihoods of all samples under all tiers, and which tokens are confident.

    `add` takes the scores of a batch under each tier in turn, tier 1 first, which says what is confident.
    """

    def __init__(self) -> None:
        self.confident: list[torch.Tensor] = []  # (B, S) of each batch
        self.num_tokens = 0
        self._likelihoods: dict[int, list[torch.Tensor]] = defaultdict(list)

    @property
    def confident_share(self) -> float:
        """The share of answer tokens that are confident."""
        return sum(int(confident_BS.sum()) for confident_BS in self.confident) / self.num_tokens

    def add(self, tier: int, scores: AnswerScores) -> None:
        """Keep what `tier` gives the next batch."""
        if scores.confident_BS is not None:
            self.confident.append(scores.confident_BS.cpu())
            self.num_tokens += int(scores.mask_BS.sum())
        self._likelihoods[tier].append(scores.likelihoods(self.confident[-1]).cpu())

    def likelihoods(self) -> torch.Tensor:
        """Of all samples under all tiers, from the highest (`(4, C, n)`); NaN where a class has no token."""
        return torch.stack([torch.cat(self._likelihoods[tier], dim=1) for tier in sorted(self._likelihoods)], dim=1)


def mean_over_samples(values_n: torch.Tensor) -> float | None:
    """The mean over the samples that have a value, i.e. are not NaN; `None` where none has one."""
    values_n = values_n[~values_n.isnan()]
    return values_n.double().mean().item() if len(values_n) else None
