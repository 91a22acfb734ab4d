"""LoRA's two factors for a matrix or for the matrices of all experts, and how layouts of files hold them.

PEFT writes those of E experts side by side in two matrices: `lora_A` (E·r, I) has the expert as the slow index of its
rows, `lora_B` (O, r·E) as the fast index of its columns (`ParamWrapper.get_delta_weight`, `peft/tuners/lora/layer.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Factors:
    """The update `scaling · B A` of E matrices; a router or a linear layer has one.

    Args:
        A_ERI (`torch.Tensor` of shape `(E, R, I)`), B_EOR (`torch.Tensor` of shape `(E, O, R)`): the factors; I and O
            are what the forward takes and gives, however the base stores its matrices.
        scaling (`float`, defaults to 1): alpha / r, or alpha / √r.
    """

    A_ERI: torch.Tensor
    B_EOR: torch.Tensor
    scaling: float = 1.0

    @classmethod
    def zeros(cls, num_experts: int, in_features: int, out_features: int, rank: int = 1) -> "Factors":
        """An update that changes nothing."""
        A_ERI = torch.zeros(num_experts, rank, in_features)
        return cls(A_ERI, torch.zeros(num_experts, out_features, rank))

    @classmethod
    def from_peft(cls, A: torch.Tensor, B: torch.Tensor, num_experts: int = 1, scaling: float = 1.0) -> "Factors":
        """From PEFT's matrices `A` (E·R, I) and `B` (O, R·E)."""
        B_EOR = B.reshape(B.shape[0], -1, num_experts).permute(2, 0, 1)
        return cls(A.reshape(num_experts, -1, A.shape[1]), B_EOR, scaling)

    @property
    def rank(self) -> int:
        return self.A_ERI.shape[1]

    def to_peft(self) -> tuple[torch.Tensor, torch.Tensor]:
        """PEFT's matrices (E·R, I) and (O, R·E), without the scaling."""
        A = self.A_ERI.reshape(-1, self.A_ERI.shape[2])
        return A.contiguous(), self.B_EOR.permute(1, 2, 0).flatten(1).contiguous()

    def folded(self) -> "Factors":
        """The same with the scaling in B, in float32: 16 bits would lose some of the product, or overflow."""
        return replace(self, A_ERI=self.A_ERI.float(), B_EOR=self.B_EOR.float() * self.scaling, scaling=1.0)

    def padded(self, rank: int) -> "Factors":
        """The same with rank `rank`, by rows and columns of zeros."""
        more = rank - self.rank
        return replace(self, A_ERI=F.pad(self.A_ERI, (0, 0, 0, more)), B_EOR=F.pad(self.B_EOR, (0, more)))

    def transposed(self) -> "Factors":
        """That of the transposed matrices: `(B A)ᵀ = Aᵀ Bᵀ`."""
        return replace(self, A_ERI=self.B_EOR.transpose(1, 2), B_EOR=self.A_ERI.transpose(1, 2))

    def delta(self) -> torch.Tensor:
        """The update (`torch.Tensor` of shape `(E, O, I)`), in float32."""
        return self.scaling * (self.B_EOR.float() @ self.A_ERI.float())

    def gate_and_up(self, is_concatenated: bool) -> tuple["Factors", "Factors"]:
        """Those of the gate and of the up-projection, whose rows stand one after the other, or take turns."""
        halves = self.B_EOR.chunk(2, dim=1) if is_concatenated else (self.B_EOR[:, ::2], self.B_EOR[:, 1::2])
        gate, up = (replace(self, B_EOR=half) for half in halves)
        return gate, up

    def by_expert(self) -> list["Factors"]:
        """That of each expert."""
        return [
            replace(self, A_ERI=A_RI.unsqueeze(0), B_EOR=B_OR.unsqueeze(0))
            for A_RI, B_OR in zip(self.A_ERI, self.B_EOR, strict=True)
        ]


def stacked(experts: Iterable[Factors]) -> Factors:
    """The updates of single experts, of perhaps different ranks and scalings, as one."""
    experts = list(experts)
    if len({factors.scaling for factors in experts}) > 1:
        experts = [factors.folded() for factors in experts]
    rank = max(factors.rank for factors in experts)
    experts = [factors.padded(rank) for factors in experts]
    A_ERI = torch.cat([factors.A_ERI for factors in experts])
    return Factors(A_ERI, torch.cat([factors.B_EOR for factors in experts]), experts[0].scaling)


def joined(gate: Factors, up: Factors, is_concatenated: bool) -> Factors:
    """Gate and up as one update, the converse of [`Factors.gate_and_up`].

    Where both have the same A, they share it; else the rank is the sum of theirs, each with zeros in the other's rows.
    """
    if gate.scaling != up.scaling:
        gate, up = gate.folded(), up.folded()
    A_ERI, B_gate_EFR, B_up_EFR = gate.A_ERI, gate.B_EOR, up.B_EOR
    if not torch.equal(gate.A_ERI, up.A_ERI):
        A_ERI = torch.cat([gate.A_ERI, up.A_ERI], dim=1)
        B_gate_EFR, B_up_EFR = F.pad(B_gate_EFR, (0, up.rank)), F.pad(B_up_EFR, (gate.rank, 0))
    if is_concatenated:
        return Factors(A_ERI, torch.cat([B_gate_EFR, B_up_EFR], dim=1), gate.scaling)
    return Factors(A_ERI, torch.stack([B_gate_EFR, B_up_EFR], dim=2).flatten(1, 2), gate.scaling)


def with_one_scaling(factors: dict[str, Factors]) -> tuple[dict[str, Factors], int, float]:
    """The same updates with a common rank, that rank, and the common scaling.

    Scalings that are equal stay; else each is folded into its B.
    """
    if len({each.scaling for each in factors.values()}) > 1:
        factors = {name: each.folded() for name, each in factors.items()}
    rank = max(each.rank for each in factors.values())
    scaling = next(iter(factors.values())).scaling
    return {name: each.padded(rank) for name, each in factors.items()}, rank, scaling
