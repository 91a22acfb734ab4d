"""What the roles stand for, and how much of a model an adapter covers."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model

from ordmoe_peft import OrdMoEConfig, coverage_report
from ordmoe_peft.adapter.targets import _projections_of_stacks, find_targets, resolve_targets
from ordmoe_peft.errors import OrdMoEModelError
from tests import models
from tests.families import tiny
from tests.families.rows import installed_rows


def test_trainable_parameters_and_coverage(model, capsys):
    tuned = get_peft_model(model, OrdMoEConfig(r=4, targets=["router", "experts"]))
    E, H, F, L = models.NUM_EXPERTS, models.HIDDEN_SIZE, models.EXPERT_WIDTH, models.NUM_LAYERS
    router, gate_up, down = 4 * (H + E) * L, E * 4 * (H + 2 * F) * L, E * 4 * (F + H) * L
    assert coverage_report(tuned).rows == [
        ("router", L, L, router),
        ("gate_up", L, L, gate_up),
        ("down", L, L, down),
        ("attention", 4 * L, 0, 0),
    ]
    assert tuned.get_nb_trainable_parameters()[0] == router + gate_up + down
    tuned.print_trainable_parameters()
    assert f"trainable params: {router + gate_up + down:,}" in capsys.readouterr().out
    assert "gate_up" in str(coverage_report(tuned))


def test_shared_experts_are_a_role_of_their_own():
    tuned = get_peft_model(models.qwen2_moe(), OrdMoEConfig(r=4, targets=["shared_experts"]))
    rows = {kind: (found, adapted) for kind, found, adapted, _ in coverage_report(tuned).rows}
    assert rows["shared_experts"] == (3 * models.NUM_LAYERS, 3 * models.NUM_LAYERS)
    assert rows["router"] == (models.NUM_LAYERS, 0)


def test_a_role_that_matches_nothing(model):
    with pytest.raises(OrdMoEModelError, match=r"'shared_experts', but .* has nothing of that role.*attention"):
        get_peft_model(model, OrdMoEConfig(targets=["experts", "shared_experts"]))
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_a_role_that_matches_part_of_the_layers():
    model = models.qwen3_moe()
    model.model.layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(OrdMoEModelError, match=r"'attention'.*in 2 layers only.*\[1\]"):
        get_peft_model(model, OrdMoEConfig(targets=["attention"]))


@pytest.mark.parametrize(("wish", "name"), [("experts.down", "down"), ("experts.gate_up", "gate_up")])
def test_one_projection_of_the_experts(wish, name, tmp_path):
    tuned = get_peft_model(models.gpt_oss(), OrdMoEConfig(r=4, targets=["router", wish])).eval()
    models.randomize_adapter(tuned)
    adapted = {kind: (number, trained > 0) for kind, _, number, trained in coverage_report(tuned).rows}
    others = {"gate_up": (0, False), "down": (0, False), "attention": (0, False)}
    of_all = models.NUM_LAYERS, True
    assert adapted == others | {"router": of_all, name: of_all}
    assert all(f".{name}_proj" in key for key in tuned.peft_config["default"].target_parameters if "experts" in key)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.gpt_oss(), tmp_path).eval()
    wanted = tuned(**models.text_batch()).logits
    assert torch.equal(loaded(**models.text_batch()).logits, wanted)
    merged = tuned.merge_and_unload()(**models.text_batch()).logits
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-5)


# Class → changes of its tiny configuration, and the projections of its experts by their own names.
PROJECTIONS = {
    "Qwen3MoeForCausalLM": ({}, {"gate_up": "gate_up", "down": "down"}),
    "NemotronHForCausalLM": ({}, {"up": "up", "down": "down"}),
    "Llama4ForCausalLM": ({}, {"gate_up": "gate_up", "down": "down"}),
    "SwitchTransformersForConditionalGeneration": ({"d_ff": 40}, {"wi": "up", "wo": "down"}),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_are_told_by_what_they_do(name):
    row = next(row for row in installed_rows() if row.name == name)
    changes, wanted = PROJECTIONS[name]
    with torch.device("meta"):
        model = row.model_class(tiny.tiny_config(row.config_class, row.changes | changes))
    experts = [target for target in find_targets(model) if target.role == "experts"]
    assert {target.kind: target.projection for target in experts} == wanted
    half = resolve_targets(model, ["experts.down"])
    assert len(half) == len(experts) / 2 and {target.projection for target in half} == {"down"}
    other = "up" if "gate_up" in wanted.values() else "gate_up"
    with pytest.raises(
        OrdMoEModelError, match=rf"'experts.{other}', but the experts of {name} have \['experts.down', "
    ):
        resolve_targets(model, [f"experts.{other}"])


def test_projections_that_shapes_do_not_tell():
    row = next(row for row in installed_rows() if row.name == "SwitchTransformersForConditionalGeneration")
    with torch.device("meta"):
        model = row.model_class(tiny.tiny_config(row.config_class, row.changes | {"d_ff": tiny.HIDDEN}))
    with pytest.raises(OrdMoEModelError, match="which projection is which, the shapes of the experts"):
        resolve_targets(model, ["experts.down"])
    assert resolve_targets(model, ["experts"])


@pytest.mark.parametrize(
    ("shapes", "wanted"),
    [
        ({"w1": (6, 4), "w2": (4, 6), "w3": (6, 4)}, {"w1": "gate_up", "w2": "down", "w3": "gate_up"}),
        ({"output": (6, 4), "input": (4, 12)}, {"output": "down", "input": "gate_up"}),
        ({"one": (4, 4), "two": (4, 4), "three": (4, 4)}, dict.fromkeys(("one", "two", "three"), "")),
        ({"alone": (4, 6)}, {"alone": ""}),
    ],
)
def test_projections_of_stacks_outside_the_interface(shapes, wanted):
    stacks = {name: torch.empty(8, *shape) for name, shape in shapes.items()}
    assert _projections_of_stacks(SimpleNamespace(kind="stacks", stacks=stacks)) == wanted
