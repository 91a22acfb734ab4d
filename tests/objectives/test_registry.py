"""What the trainer knows of an objective by its name."""

import pytest
import torch

from ordmoe_peft.objectives.registry import OBJECTIVES


@pytest.mark.parametrize(
    ("objective", "advantages", "tiers"),
    [
        ("erl", [1.2, 0.0, -1.2], [1, 3]),
        ("erl", [0.5, 0.1, -0.6], [1, 2, 3]),
        ("logistic", [1.0, 0.0, -1.0], [1, 3]),
        ("dpo", [1.0, 0.0, -1.0], [1, 2, 3]),
    ],
)
def test_tiers_with_a_gradient(objective, advantages, tiers):
    assert OBJECTIVES[objective].active_tiers(torch.tensor(advantages)) == tiers


def test_only_a_sum_over_tiers_does_without_the_others_and_only_two_need_the_base():
    assert [name for name, objective in OBJECTIVES.items() if objective.is_sum_over_tiers] == ["erl"]
    assert [name for name, objective in OBJECTIVES.items() if objective.needs_reference] == ["dpo", "ipo"]
