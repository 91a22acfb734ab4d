import pytest

from ordmoe_peft.errors import OrdMoEConfigError, OrdMoERuntimeError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.tiers.plan import RandomDraw, TierPlan, TierSettings, layers_in_scope, make_plan
from tests import models


def plan(tier, draw=None, **changes):
    settings = TierSettings(**({"num_tiers": 3} | changes))
    return make_plan(MoEModel.of(models.qwen3_moe()).layers, tier, settings, RandomDraw(**(draw or {})))


def test_layer_scopes():
    assert layers_in_scope("all", 5) == {0, 1, 2, 3, 4}
    assert layers_in_scope("shallow", 5) == {0, 1}
    assert layers_in_scope("deep", 5) == {2, 3, 4}
    assert layers_in_scope([0, 3], 5) == {0, 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tier": 0}, r"from 1 .* to num_tiers=3, got \[0\]"),
        ({"tier": [1, 4]}, r"got \[1, 4\]"),
        ({"tier": []}, "got"),
        ({"tier": 1, "num_tiers": 5}, r"K=2 .*E=8.*largest num_tiers that fits is 4"),
        ({"tier": 1, "grouping": "best"}, "grouping must be one of"),
        ({"tier": 1, "layer_scope": "middle"}, "layer_scope must be one of"),
        ({"tier": 1, "layer_scope": [0, 3]}, r"\[3\], but the model has 3"),
        ({"tier": "top"}, "whole number.*'top'"),
        ({"tier": 2.5}, "whole number.*float32"),
        ({"tier": [1, True, None]}, "whole number.*None"),
        ({"tier": [[[1]]]}, r"shape \(1, 1, 1\)"),
        ({"tier": 1, "num_tiers": "3"}, "num_tiers must be a whole number, got '3'"),
        ({"tier": 1, "seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"tier": 1, "tier_weights": "even"}, "tier_weights must be one of"),
        ({"tier": 1, "draw": {"step": 0.5}}, "step must be a whole number, got 0.5"),
        ({"tier": 1, "draw": {"num_samples": 0}}, "num_samples must be at least 1, got 0"),
        ({"tier": 1, "layer_scope": 1.5}, "layer_scope must be one of .* or a list of .* got 1.5"),
        ({"tier": 1, "layer_scope": ["0"]}, r"got \['0'\]"),
        ({"tier": 1, "layer_scope": []}, "names no MoE layer, but the model has 3"),
    ],
)
def test_bad_requests_are_refused(arguments, message):
    with pytest.raises(OrdMoEConfigError, match=message):
        plan(**arguments)


def test_a_tier_per_row_covers_the_rows_tokens_in_order():
    per_row = plan([1, 3])
    assert per_row.tier_of_token(2, 3).tolist() == [1, 1, 1, 3, 3, 3]
    with pytest.raises(OrdMoERuntimeError, match="2 tiers.*came with 1 rows"):
        per_row.tier_of_token(1, 7)


@pytest.mark.parametrize("tiers", [[1, 2, 3, 1], [[1] * 8] * 4], ids=["per row", "per position"])
def test_more_tiers_than_rows_are_refused_where_tokens_could_be_shared_out(tiers):
    """Two rows of eight tokens would give each of four tiers half a row."""
    with pytest.raises(OrdMoERuntimeError, match="4 tiers.*came with 2 rows"):
        plan(tiers).tier_of_token(2, 8)


def test_a_half_without_layers_is_refused():
    with pytest.raises(OrdMoEConfigError, match="layer_scope='shallow' names no MoE layer, but the model has 1"):
        layers_in_scope("shallow", 1)


def test_only_tier_1_is_the_top():
    assert plan(1).is_top
    assert plan([1, 1]).is_top
    assert not plan([1, 2]).is_top
    assert isinstance(plan(2), TierPlan)
