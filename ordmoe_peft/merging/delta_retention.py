"""How much of what an adapter adds is left when the merged weights are rounded to 4 bits."""

from dataclasses import dataclass, field

import torch


# Below this share of a delta's norm, requantising is worth a warning.
ENOUGH = 0.9


@dataclass(frozen=True)
class Survival:
    """What became of the delta Δ of one weight W when W + Δ was rounded to 4 bits, Q(W + Δ) = W + R.

    W is the weight as the adapter saw it, dequantised; R is what the rounded merge really adds.

    Args:
        name (`str`): the weight.
        delta_norm (`float`): ‖Δ‖.
        survived (`float`): ⟨R, Δ⟩ / ‖Δ‖², the share of the delta's norm that R has in the delta's direction: 1 where
            R = Δ, 0 where every weight was rounded back to what it was, 1 for a delta of 0.
        noise (`float`): ‖R − Δ‖ / ‖Δ‖, all that R differs from Δ; 0 for a delta of 0.
    """

    name: str
    delta_norm: float
    survived: float
    noise: float


class SurvivalSum:
    """Adds up a [`Survival`] matrix by matrix, so that no stack of deltas need exist."""

    def __init__(self):
        self.product = self.delta_square = self.noise_square = 0.0

    def add(self, before: torch.Tensor, merged: torch.Tensor, after: torch.Tensor) -> None:
        """A matrix as it was (W), as it should be (W + Δ) and as it is (W + R)."""
        delta, real = merged.float() - before.float(), after.float() - before.float()
        self.product += (real * delta).sum(dtype=torch.float64).item()
        self.delta_square += delta.square().sum(dtype=torch.float64).item()
        self.noise_square += (real - delta).square().sum(dtype=torch.float64).item()

    def survival(self, name: str) -> Survival:
        if self.delta_square == 0:
            return Survival(name, 0.0, 1.0, 0.0)
        return Survival(
            name,
            delta_norm=self.delta_square**0.5,
            survived=self.product / self.delta_square,
            noise=(self.noise_square / self.delta_square) ** 0.5,
        )


@dataclass(frozen=True)
class RequantizationReport:
    """What requantising left of each delta; prints as a table.

    Args:
        weights (`list` of [`Survival`]): one for each packed weight that the adapter changes.
    """

    weights: list[Survival] = field(default_factory=list)

    @property
    def weak(self) -> list[Survival]:
        """The weights that kept less than 90 % of their delta, the weakest first."""
        return sorted((each for each in self.weights if each.survived < ENOUGH), key=lambda each: each.survived)

    def warning(self) -> str | None:
        """One sentence where deltas were lost, else `None`."""
        if not self.weak:
            return None
        return (
            f"Rounding the merged weights to 4 bits left less than {ENOUGH:.0%} of the delta in {len(self.weak)} of "
            f"{len(self.weights)} weights, the least in {self.weak[0].name}: {self.weak[0].survived:.1%}. The "
            "merged model is not the one that was trained: keep the adapter beside its 4-bit base, or merge into a "
            "dense model (without `requantize`)."
        )

    def __str__(self) -> str:
        width = max([len("weight"), *(len(each.name) for each in self.weights)])
        lines = [f"{'weight':<{width}}  {'norm of delta':>13}  {'survived':>8}  {'noise':>8}"]
        lines += [
            f"{each.name:<{width}}  {each.delta_norm:>13.4g}  {each.survived:>8.1%}  {each.noise:>8.1%}"
            for each in self.weights
        ]
        return "\n".join(lines)
