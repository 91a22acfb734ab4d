"""What speaks against a layer, from its figures alone; on models, see test_inspection.py."""

from types import SimpleNamespace

import pytest

from ordmoe_peft.monitoring.health import LayerHealth
from ordmoe_peft.tools.measure.verdict import reasons_against


MOE_LAYERS = [SimpleNamespace(index=index, block_name=f"block {index}") for index in range(3)]


def layer(**changes) -> LayerHealth:
    figures = {
        **{"layer": 0, "name": "block 0", "num_experts": 8, "top_k": 2, "num_tokens": 1000},
        **{"utilisation": [1.0] * 8, "dead": 0, "imbalance": 1.0, "variation": 0.0},
        **{"marginal_entropy": 1.0, "token_entropy": 1.0, "score_std": 1.0},
        **{"gate_mass": [1.0, 1.0], "tier_probability": [0.5, 0.3], "drift_overlap": None, "drift_kl": None},
    }
    return LayerHealth(**(figures | changes))


def reasons(num_tiers=2, tier_weights="router", **changes) -> list[str]:
    found = reasons_against([layer(**changes)], MOE_LAYERS[:1], {}, num_tiers, tier_weights)
    assert all(reason.startswith("Layer 0 (block 0): ") for reason in found)
    return [reason.removeprefix("Layer 0 (block 0): ") for reason in found]


def test_nothing_speaks_against_an_even_layer():
    assert reasons() == []


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"num_tiers": 5}, "5 tiers of 2 experts need 10"),
        ({"utilisation": [3.7, 0.3, *[0.0] * 6], "dead": 6}, "its router has collapsed onto experts that nearly"),
        (
            {"marginal_entropy": 0.4, "dead": 6},
            "its router has collapsed: the entropy of its mean distribution is 0.40",
        ),
        ({"dead": 1}, "1 of its 8 experts are dead"),
        ({"score_std": 0.01}, "its scores are flat"),
        ({"gate_mass": [1.0, 0.1]}, "its router gives low tiers almost no weight (tier 2 0.100; tier 1 1.000)"),
        ({"score_std": float("nan"), "dead": 6}, "its router logits are not finite"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_each_sickness_has_one_reason(changes, beginning):
    """Dead experts follow from a collapse, and nothing is known of a layer whose logits are no numbers."""
    (reason,) = reasons(**changes)
    assert reason.startswith(beginning)


def test_what_does_not_count():
    """Few tokens miss an expert by chance; matched weights have no low gate mass."""
    assert reasons(dead=1, num_tokens=79) == []
    assert len(reasons(dead=1, num_tokens=80)) == 1
    assert reasons(gate_mass=[1.0, 0.1], tier_weights="match") == []


def test_layers_that_were_not_measured_are_named():
    found = reasons_against([layer()], MOE_LAYERS, {"block 1": "it cannot be held to tiers."}, 2)
    assert found == [
        "Layer 1: it cannot be held to tiers.",
        "Layer 2 (block 2): no token reached its router.",
    ]
