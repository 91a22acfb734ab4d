"""Whatever fails while an adapter is attached or loaded leaves the model and the configuration as they were."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from transformers import Qwen3MoeModel

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from tests import models


EVERYTHING = ["router", "experts", "attention"]


class State:
    """All that attaching may change in a model."""

    def __init__(self, model):
        self.model = model
        self.seen = self.look()
        self.numbers = deepcopy(dict(model.state_dict()))

    def look(self):
        modules = dict(self.model.named_modules())
        return {
            "modules": {name: id(module) for name, module in modules.items()},
            "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
            "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
            "parameters": {name: (id(p), p.requires_grad) for name, p in self.model.named_parameters()},
            "experts": self.model.get_experts_implementation(),
        }

    def check(self):
        assert self.look() == self.seen
        state = self.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in self.numbers.items())
        assert not hasattr(self.model, "peft_config")


def failing_at(count):
    """`_create_new_module` that fails at the module of this number."""
    create, calls = LoraModel._create_and_replace, []

    def fail(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            raise RuntimeError("no memory")
        return create(self, *args, **kwargs)

    return fail


@pytest.mark.parametrize("initialisation", [True, "pissa", "pissa_niter_2", "olora"])
def test_a_module_that_fails_midway(initialisation, monkeypatch):
    model = models.qwen3_moe()
    config = OrdMoEConfig(r=4, targets=["attention"], init_lora_weights=initialisation)
    before, fields = State(model), deepcopy(config.to_dict())
    monkeypatch.setattr(LoraModel, "_create_and_replace", failing_at(9))
    with pytest.raises(RuntimeError, match="no memory"):
        get_peft_model(model, config)
    before.check()
    assert config.to_dict() == fields
    monkeypatch.undo()
    get_peft_model(model, config)


def test_handles_of_hooks_that_were_there_still_work(monkeypatch):
    model, calls = models.qwen3_moe(), []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: calls.append(args))
    monkeypatch.setattr(LoraModel, "_create_and_replace", failing_at(3))
    with pytest.raises(RuntimeError, match="no memory"):
        get_peft_model(model, OrdMoEConfig(targets=EVERYTHING))
    handle.remove()
    model(**models.text_batch())
    assert not calls


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": {"no_such": [1]}}, "no_such"),
        ({"modules_to_save": ["no_such"]}, "modules_to_save has 'no_such', but no module"),
        ({"modules_to_save": ["mlp.gate"]}, "modules_to_save has 'mlp.gate', which stands for model.layers.0.mlp.gate"),
        ({"modules_to_save": ["mlp"]}, "not held to tiers"),
        ({"layer_replication": [(0, 2), (1, 3)]}, "layer_replication"),
        ({"rank_pattern": {"q_proj": 0}}, "positive integer"),
        ({"rank_pattern": {"no_such": 2}}, "rank_pattern has 'no_such'"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings, message):
    model = models.qwen3_moe()
    config = OrdMoEConfig(targets=EVERYTHING, **settings)
    before, fields = State(model), deepcopy(config.to_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    before.check()
    assert config.to_dict() == fields


def test_a_task_that_the_model_cannot_do():
    model = Qwen3MoeModel(models.qwen3_moe().config)
    before = State(model)
    with pytest.raises(OrdMoEModelError, match="task_type='CAUSAL_LM' needs a model that generates"):
        get_peft_model(model, OrdMoEConfig(task_type="CAUSAL_LM"))
    before.check()


def test_an_added_adapter_that_fails_leaves_the_first(monkeypatch):
    tuned, batch = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, targets=EVERYTHING)), models.text_batch()
    models.randomize_adapter(tuned)
    wanted, names = tuned(**batch).logits, dict(tuned.named_parameters()).keys()
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    for count in (2, 14):  # in a linear layer, in experts
        with monkeypatch.context() as patch:
            patch.setattr(LoraModel, "_create_and_replace", failing_at(count))
            with pytest.raises(RuntimeError, match="no memory"):
                tuned.add_adapter("second", OrdMoEConfig(r=3, targets=EVERYTHING))
        assert dict(tuned.named_parameters()).keys() == names
        assert {name for name, parameter in tuned.named_parameters() if parameter.requires_grad} == trained
        assert list(tuned.peft_config) == ["default"]
        assert torch.equal(tuned(**batch).logits, wanted)
    tuned.add_adapter("second", OrdMoEConfig(r=3, targets=EVERYTHING))
    assert torch.equal(tuned(**batch).logits, wanted)


def test_a_second_call_on_an_adapted_model_that_fails_leaves_its_configuration():
    tuned = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    config = tuned.peft_config["default"]
    with pytest.warns(UserWarning, match="second time"), pytest.raises(OrdMoEConfigError, match="rank_pattern"):
        get_peft_model(tuned.get_base_model(), OrdMoEConfig(r=4, rank_pattern={"no_such": 2}))
    assert tuned.peft_config == {"default": config}
    tuned(**models.text_batch())


def test_weighted_adapters_of_parameters_are_refused_and_change_nothing():
    tuned = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    tuned.add_adapter("second", OrdMoEConfig(r=4))
    names = dict(tuned.named_parameters()).keys()
    with pytest.raises(ValueError, match="does not support targeting nn.Parameter"):
        tuned.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mixed", combination_type="linear")
    assert list(tuned.peft_config) == ["default", "second"]
    assert dict(tuned.named_parameters()).keys() == names


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_weighted_adapters_of_attention_are_loras(kind):
    def mixed(config):
        tuned = get_peft_model(models.qwen3_moe(), config())
        tuned.add_adapter("second", config())
        for seed, name in enumerate(("default", "second")):
            tuned.set_adapter(name)
            models.randomize_adapter(tuned, seed)
        tuned.add_weighted_adapter(["default", "second"], [0.7, 0.3], "mixed", combination_type=kind)
        tuned.set_adapter("mixed")
        return tuned(**models.text_batch()).logits

    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    wanted = mixed(lambda: LoraConfig(r=4, target_modules=projections))
    torch.testing.assert_close(mixed(lambda: OrdMoEConfig(r=4, targets=["attention"])), wanted, rtol=1e-4, atol=1e-5)
