"""Each sickness is found in a model that has it, and named."""

import json

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEDataError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.tools.measure.inspection import inspect_model
from ordmoe_peft.tools.measure.verdict import NEXT_STEP
from tests import models, text


TOKENIZER = text.tokenizer()


def inspected(model, dataset=None, **settings):
    return inspect_model(model, TOKENIZER, text.conversations() if dataset is None else dataset, **settings)


def rendered_tokens(dataset) -> int:
    texts = [TOKENIZER.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in dataset]
    return sum(len(TOKENIZER(rendered).input_ids) for rendered in texts)


def test_a_healthy_model_is_fit():
    model, dataset = models.qwen3_moe().train(), text.conversations()
    report = inspected(model, dataset, batch_size=3)
    assert report.is_fit
    assert report.reasons == []
    assert report.num_tokens == rendered_tokens(dataset)
    assert [layer.name for layer in report.layers] == [f"model.layers.{index}.mlp" for index in range(3)]
    assert model.training


def test_a_verdict_claims_what_it_measured():
    """A random router spreads its tokens, so tiers can be cut; what its ranks are worth nobody has measured."""
    model = models.qwen3_moe()
    for layer in MoEModel.of(model).layers:
        layer.router.weight.data.mul_(0.1)
    report = inspected(model)
    assert report.layers[0].token_entropy > 0.97
    assert report.is_fit
    assert "run `ordmoe tiers`" in NEXT_STEP


def test_the_report_is_plain_json_with_the_promised_keys():
    report = inspected(models.olmoe()).to_dict()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report) == {"model", "num_tokens", "num_tiers", "grouping", "is_fit", "reasons", "layers", "unread"}
    layer = report["layers"][1]
    lists = {"utilisation": models.NUM_EXPERTS, "gate_mass": 3, "tier_probability": 3}
    assert {name: len(layer[name]) for name in lists} == lists
    assert (layer["layer"], layer["num_experts"], layer["top_k"]) == (1, models.NUM_EXPERTS, models.TOP_K)
    assert layer["drift_overlap"] is None


def test_adapted_models_show_drift_under_the_same_names():
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    models.randomize_adapter(model)
    report = inspected(model)
    assert report.layers[0].name == "model.layers.0.mlp"
    assert report.layers[0].drift_kl > 0


def test_the_table_has_a_row_per_layer_and_drift_where_there_is_an_adapter():
    (table,) = inspected(models.qwen3_moe()).tables()
    assert list(table.frame["layer"]) == [0, 1, 2]
    assert table.texts()["gate mass"][0] == "1.000 / 1.000 / 1.000"
    assert "KL" not in table.frame and "overlap, KL" not in table.note
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    models.randomize_adapter(model)
    (table,) = inspected(model).tables()
    assert (table.frame["KL"] > 0).all() and "overlap, KL" in table.note


def test_a_router_that_has_collapsed_onto_one_expert_is_named():
    model = models.gpt_oss()
    with torch.no_grad():
        MoEModel.of(model).layers[1].router.bias[5] = 100.0
    report = inspected(model)
    assert not report.is_fit
    always, entropy = report.reasons
    assert "Layer 1 (model.layers.1.mlp): its router has collapsed" in always
    assert "expert 5 100%" in always
    assert "the entropy of its mean distribution is 0.00 of ln 8, below 0.5" in entropy
    assert report.layers[1].utilisation[5] == pytest.approx(models.NUM_EXPERTS / models.TOP_K)


def test_dead_experts_are_never_fit_and_may_be_too_many_for_the_tiers():
    """Three of eight experts never chosen leave five: enough for two tiers of two, not for three."""
    model = models.gpt_oss()
    with torch.no_grad():
        MoEModel.of(model).layers[0].router.bias[:3] = -100.0
    assert inspected(model, num_tiers=2).layers[0].dead == 3
    (reason,) = [reason for reason in inspected(model, num_tiers=2).reasons if "dead" in reason]
    assert "3 of its 8 experts are dead" in reason and "low tiers may consist of them" in reason
    (reason,) = [reason for reason in inspected(model, num_tiers=3).reasons if "dead" in reason]
    assert "3 of its 8 experts are dead" in reason
    assert "leaves 5 for the 6 places of 3 tiers" in reason


def test_flat_scores_are_named():
    model = models.qwen3_moe()
    with torch.no_grad():
        MoEModel.of(model).layers[2].router.weight.zero_()
    report = inspected(model)
    assert report.layers[2].score_std == 0
    assert any("Layer 2 (model.layers.2.mlp): its scores are flat" in reason for reason in report.reasons)
    assert not any("flat" in reason for reason in report.reasons if "Layer 2" not in reason)


def test_low_tiers_without_weight_are_named():
    report = inspected(models.olmoe())
    assert not report.is_fit
    matched = get_peft_model(models.olmoe(), OrdMoEConfig(r=4, tier_weights="match"))
    assert not any("weight" in reason for reason in inspected(matched).reasons)
    named = [reason for reason in report.reasons if "gives low tiers almost no weight (tier 2" in reason]
    assert len(named) == models.NUM_LAYERS
    assert not any("weight" in reason for reason in inspected(models.olmoe(norm_topk_prob=True)).reasons)


def test_too_many_tiers_are_named_with_the_largest_that_fits():
    report = inspected(models.qwen3_moe(), num_tiers=5)
    assert "5 tiers of 2 experts need 10, but it has 8; the largest num_tiers that fits is 4." in report.reasons[0]
    assert len(report.layers[0].gate_mass) == 4
    assert inspected(models.qwen3_moe(), num_tiers=4).is_fit


def test_a_router_that_cannot_be_intercepted_is_named_and_the_others_are_measured(monkeypatch):
    model = models.qwen3_moe()
    router = MoEModel.of(model).layers[1].router

    def sorting(hidden_states):
        logits = hidden_states @ router.weight.T
        chosen = logits.sort(descending=True).indices[:, : models.TOP_K]
        return logits, logits.softmax(-1).gather(1, chosen), chosen

    monkeypatch.setattr(router, "forward", sorting)
    report = inspected(model)
    (reason,) = report.reasons
    assert reason.startswith("Layer 1: model.layers.1.mlp.gate (Qwen3MoeTopKRouter) chose experts by 0 calls")
    assert [layer.layer for layer in report.layers] == [0, 2]


def test_scores_that_are_not_numbers_are_named():
    model = models.qwen3_moe()
    with torch.no_grad():
        MoEModel.of(model).layers[0].router.weight[0, 0] = float("nan")
    assert "its router logits are not finite" in inspected(model).reasons[0]


def test_prompts_alone_will_do():
    dataset = text.conversations().remove_columns("completion")
    prompts = [
        TOKENIZER.apply_chat_template(row, add_generation_prompt=True, tokenize=False) for row in dataset["prompt"]
    ]
    tokens = sum(len(TOKENIZER(prompt).input_ids) for prompt in prompts)
    assert inspected(models.qwen3_moe(), dataset, batch_size=3).num_tokens == tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grouping": "best"}, "'best'"),
        ({"num_tiers": 0}, "num_tiers must be at least 1"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(OrdMoEConfigError, match=message):
        inspected(models.qwen3_moe(), **settings)


def test_data_without_prompts():
    with pytest.raises(OrdMoEDataError, match="samples with a `prompt`"):
        inspected(models.qwen3_moe(), text.conversations().remove_columns("prompt"))
