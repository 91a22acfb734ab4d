"""How much of what an adapter adds is left when the merged weights are rounded to 4 bits."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch


# Below this share of a delta's norm, requantising is worth a warning.
ENOUGH = 0.9


@dataclass(frozen=True)
class DeltaRetention:
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

    @classmethod
    def measure(
        cls, name: str, matrices: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ) -> "DeltaRetention":
        """Sum over a weight's matrices, each given as W, W + Δ and W + R, so that no stack of deltas need exist."""
        product = delta_square = noise_square = 0.0
        for before, merged, after in matrices:
            delta, real = merged.float() - before.float(), after.float() - before.float()
            product += (real * delta).sum(dtype=torch.float64).item()
            delta_square += delta.square().sum(dtype=torch.float64).item()
            noise_square += (real - delta).square().sum(dtype=torch.float64).item()
        if delta_square == 0:
            return cls(name, delta_norm=0.0, survived=1.0, noise=0.0)
        return cls(name, delta_square**0.5, product / delta_square, (noise_square / delta_square) ** 0.5)


@dataclass(frozen=True)
class RequantizationReport:
    """What requantising left of each delta; prints as a table.

    Args:
        weights (`list` of [`DeltaRetention`]): one for each packed weight that the adapter changes.
    """

    weights: list[DeltaRetention] = field(default_factory=list)

    def warning(self) -> str | None:
        """One sentence where less than 90 % of a delta is left, else `None`."""
        weak = [weight for weight in self.weights if weight.survived < ENOUGH]
        if not weak:
            return None
        weakest = min(weak, key=lambda weight: weight.survived)
        return (
            f"Rounding the merged weights to 4 bits left less than {ENOUGH:.0%} of the delta in {len(weak)} of "
            f"{len(self.weights)} weights, the least in {weakest.name}: {weakest.survived:.1%}. The "
            "merged model is not the one that was trained: keep the adapter beside its 4-bit base, or merge into a "
            "dense model (without `requantize`)."
        )

    def __str__(self) -> str:
        width = max([len("weight"), *(len(weight.name) for weight in self.weights)])
        lines = [f"{'weight':<{width}}  {'norm of delta':>13}  {'survived':>8}  {'noise':>8}"]
        lines += [
            f"{weight.name:<{width}}  {weight.delta_norm:>13.4g}  {weight.survived:>8.1%}  {weight.noise:>8.1%}"
            for weight in self.weights
        ]
        return "\n".join(lines)
