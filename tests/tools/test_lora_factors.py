"""LoRA's factors: what they add to the base's matrices in each form."""

import pytest
import torch

from ordmoe_peft.tools.lora_factors import Factors, joined, stacked, with_one_scaling


E, R, H, F = 3, 2, 5, 4  # no two sizes are equal, so that no order is confused unseen


def factors(out=2 * F, into=H, rank=R, experts=E, scaling=0.75, seed=0) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(experts, rank, into, generator=draw)
    return Factors(A, torch.randn(experts, out, rank, generator=draw), scaling)


def test_pefts_matrices_mean_what_peft_adds():
    before = factors()
    A, B = before.to_peft()
    assert A.shape == (E * R, H) and B.shape == (2 * F, R * E)
    # The formula of PEFT's ParamWrapper.
    expected = 0.75 * torch.einsum("o r e, e r i -> e o i", B.reshape(2 * F, R, E), A.reshape(E, R, H))
    torch.testing.assert_close(before.delta(), expected)
    torch.testing.assert_close(Factors.from_peft(A, B, E, 0.75).delta(), expected)


def test_folding_and_padding_change_no_update():
    before = factors()
    after = before.folded().padded(6)
    assert (after.scaling, after.rank) == (1.0, 6)
    torch.testing.assert_close(after.delta(), before.delta())
    torch.testing.assert_close(before.transposed().delta(), before.delta().transpose(1, 2))


@pytest.mark.parametrize("is_concatenated", [True, False])
def test_gate_and_up_apart_and_together(is_concatenated):
    before = factors()
    gate, up = before.gate_and_up(is_concatenated)
    rows = before.delta().split(F, dim=1) if is_concatenated else (before.delta()[:, ::2], before.delta()[:, 1::2])
    torch.testing.assert_close((gate.delta(), up.delta()), tuple(rows))
    again = joined(gate, up, is_concatenated)
    assert again.rank == R and torch.equal(again.delta(), before.delta())
    other = factors(out=F, rank=1, scaling=2.0, seed=1)  # another A, rank and scaling
    apart = joined(gate, other, is_concatenated)
    assert apart.rank == R + 1
    torch.testing.assert_close(
        [each.delta() for each in apart.gate_and_up(is_concatenated)], [gate.delta(), other.delta()]
    )


def test_experts_of_different_ranks_and_scalings_are_stacked():
    experts = [factors(experts=1, rank=rank, scaling=scaling, seed=rank) for rank, scaling in ((1, 1.0), (3, 0.5))]
    torch.testing.assert_close(stacked(experts).delta(), torch.cat([each.delta() for each in experts]))
    torch.testing.assert_close(stacked(factors().by_expert()).delta(), factors().delta())


def test_one_scaling_for_all():
    same, rank, scaling = with_one_scaling({"a": factors(), "b": factors(rank=3)})
    assert (rank, scaling) == (3, 0.75) and torch.equal(same["a"].B_EOR[..., :R], factors().B_EOR)
    folded, rank, scaling = with_one_scaling({"a": factors(), "b": factors(scaling=3.0)})
    assert (rank, scaling) == (R, 1.0)
    torch.testing.assert_close(folded["b"].delta(), factors(scaling=3.0).delta())
    assert not Factors.zeros(E, H, F).delta().any()
