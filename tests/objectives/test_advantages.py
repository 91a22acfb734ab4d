import pytest
import torch

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.objectives.advantages import tier_advantages, tier_rewards


def test_rewards_are_evenly_spaced_by_default():
    assert tier_rewards(None, 3).tolist() == [1.0, 0.5, 0.0]
    assert tier_rewards(None, 1).tolist() == [1.0]


@pytest.mark.parametrize("rewards", [[1, 0.5, 0], [2, 1, 0], [0.5, 0.25, 0]])
def test_zscore_is_blind_to_scale(rewards):
    """[1, ½, 0] has mean ½ and population variance (¼ + 0 + ¼) / 3 = 1/6, so 0.5 / √(1/6) = √1.5 = 1.2247."""
    torch.testing.assert_close(
        tier_advantages(rewards, 3, "zscore"), torch.tensor([1.2247, 0.0, -1.2247]), atol=1e-4, rtol=0
    )


def test_center_and_none():
    """[2, 1, 0] has mean 1."""
    assert tier_advantages([2, 1, 0], 3, "center").tolist() == [1.0, 0.0, -1.0]
    assert tier_advantages([2, 1, 0], 3, "none").tolist() == [2.0, 1.0, 0.0]


def test_one_tier_has_no_advantage():
    assert tier_advantages(None, 1, "zscore").tolist() == [0.0]


@pytest.mark.parametrize("rewards", [[1, 0], [1, 0.5, 0, 0], [0, 1, 2], [1, float("nan"), 0]])
def test_rewards_of_wrong_length_or_order_are_refused(rewards):
    with pytest.raises(OrdMoEConfigError, match="rewards"):
        tier_rewards(rewards, 3)
