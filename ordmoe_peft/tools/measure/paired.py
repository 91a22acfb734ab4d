"""Paired differences between two ways of training, with bootstrap intervals over seeds and items.

Arrays carry S seeds and N items: `values_SN[s, n]` is what the run of seed s does with item n. Runs are paired: both
ways have the same seeds, so the same data order, and the same items.
"""

from dataclasses import asdict, dataclass
from math import isnan, sqrt
from statistics import NormalDist

import torch


CONFIDENCE = 0.95
# The 97.5 % quantile of the standard normal distribution.
NORMAL = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
# 97.5 % quantiles of Student's t with 1, 2, … degrees of freedom; from there on the expansion in `student_t` has
# three digits.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
RESAMPLES_AT_ONCE = 250


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference and its interval.

    Args:
        mean (`float`): the mean over seeds and items.
        low (`float`), high (`float`): ends of the 95 % interval.
    """

    mean: float
    low: float
    high: float

    @property
    def is_gain(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    @property
    def verdict(self) -> str:
        """`"gain"` or `"loss"` only where 0 is outside the interval; `"undefined"` where a run gave no number."""
        if isnan(self.mean):
            return "undefined"
        if self.is_gain:
            return "gain"
        return "loss" if self.high < 0 else "no difference shown"

    def to_dict(self) -> dict[str, float | bool | str]:
        return {**asdict(self), "is_gain": self.is_gain, "verdict": self.verdict}


def paired_difference(
    values_SN: torch.Tensor, baseline_SN: torch.Tensor, resamples: int = 4000, seed: int = 0
) -> PairedDifference:
    """The mean of `values − baseline` and its 95 % interval, by resampling seeds and items with replacement.

    Items are drawn once per resample for all seeds, because every seed answers the same items. A bootstrap over a
    handful of seeds is too narrow (five seeds: 95 % becomes about 83 %), so each resample's deviation over seeds is
    widened by one factor, such that seed noise alone gives the interval of Student's t. With one seed the interval
    covers items alone.

    Args:
        values_SN (`torch.Tensor` of shape `(S, N)`): values of one way of training.
        baseline_SN (`torch.Tensor` of shape `(S, N)` or `(1, N)`): those of the other.
        resamples (`int`, defaults to 4000): number of resamples.
        seed (`int`, defaults to 0): seed of the resampling.

    Raises:
        `ValueError`: the two differ in shape.

    Source: percentile bootstrap; on its narrowness for small samples and corrections by t see Hesterberg, "What
    Teachers Should Know About the Bootstrap", 2015 (arXiv 1411.5279).
    """
    if values_SN.shape[1] != baseline_SN.shape[1] or baseline_SN.shape[0] not in (1, values_SN.shape[0]):
        raise ValueError(
            f"Runs are not paired: {tuple(values_SN.shape)} seeds and items against {tuple(baseline_SN.shape)}."
        )
    difference_SN = values_SN.double() - baseline_SN.double()
    generator = torch.Generator().manual_seed(seed)
    counts = [min(RESAMPLES_AT_ONCE, resamples - start) for start in range(0, resamples, RESAMPLES_AT_ONCE)]
    means = torch.cat([_resampled_means(difference_SN, count, generator) for count in counts])
    tail = (1 - CONFIDENCE) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return PairedDifference(difference_SN.mean().item(), low, high)


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error (std with S − 1, over √S); no error from a single value."""
    values_S = torch.tensor(values, dtype=torch.float64)
    error = (values_S.std() / sqrt(len(values))).item() if len(values) > 1 else None
    return values_S.mean().item(), error


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun, 26.7.5, beyond the table)."""
    if degrees <= len(STUDENT_T):
        return STUDENT_T[degrees - 1]
    z = NORMAL
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def _resampled_means(difference_SN: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    seeds, items = difference_SN.shape
    seed_weights = _weights(count, seeds, generator)
    if seeds > 1:
        widening = student_t(seeds - 1) / NORMAL * sqrt(seeds / (seeds - 1))
        seed_weights = 1 / seeds + widening * (seed_weights - 1 / seeds)
    return ((seed_weights @ difference_SN) * _weights(count, items, generator)).sum(1)


def _weights(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """How often each of `size` things was drawn in `size` draws, as shares: `(count, size)`."""
    drawn = torch.randint(size, (count, size), generator=generator)
    counts = torch.zeros(count, size, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts)) / size
