"""Adapters and tiers on modules whose `forward` something else has replaced, before the adapter came or after."""

import types

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model

from ordmoe_peft import OrdMoEConfig, tier_routing
from ordmoe_peft.errors import OrdMoERuntimeError
from ordmoe_peft.moe_model import MoEModel
from tests import models


TARGETS = ["router", "experts", "attention"]


def dispatched(model):
    """What `device_map` over several devices does to every module."""
    device_map = {"model": "cpu", "lm_head": "cpu"}
    return accelerate.dispatch_model(model, device_map=device_map, main_device="cpu", force_hooks=True)


def patched(pick):
    def patch(model):
        for layer in MoEModel.of(model).layers:
            module = pick(model, layer)
            module.forward = types.MethodType(type(module).forward, module)

    return patch


def router(model, layer):
    return layer.router


def experts(model, layer):
    return layer.experts


def block(model, layer):
    return model.get_submodule(layer.block_name)


def compiled(pick):
    def compile_module(model):
        for layer in MoEModel.of(model).layers:
            pick(model, layer).compile(backend="eager")

    return compile_module


WAYS = {
    "accelerate's hooks": dispatched,
    "patched routers": patched(router),
    "patched experts": patched(experts),
    "patched blocks": patched(block),
    "compiled routers": compiled(router),
    "compiled experts": compiled(experts),
    "compiled blocks": compiled(block),
    "compiled model": lambda model: model.compile(backend="eager"),
}


def adapted(way=None, before=True, config=None):
    model = models.qwen3_moe()
    if way is not None and before:
        way(model)
    torch.manual_seed(1)
    tuned = get_peft_model(model, config or OrdMoEConfig(r=4, targets=TARGETS))
    models.randomize_adapter(tuned)
    if way is not None and not before:
        way(tuned.get_base_model())
    return tuned


def results(model) -> dict[str, torch.Tensor]:
    """Logits, logits under tiers, and all gradients."""
    batch = models.text_batch()
    with torch.no_grad():
        found = {"logits": model(**batch).logits}
        with tier_routing(model, [3, 1, 2]):
            found["tiers"] = model(**batch).logits
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return found | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def wanted():
    return results(adapted())


@pytest.fixture(autouse=True)
def _forget_compiled():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_nothing_changes(way, before, wanted):
    got = results(adapted(way, before))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("way", [None, dispatched], ids=["plain", "accelerate's hooks"])
def test_routers_and_attention_compute_what_peft_computes(way):
    gates = [f"model.layers.{index}.mlp.gate.weight" for index in range(models.NUM_LAYERS)]
    stock = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], target_parameters=gates)
    ours = OrdMoEConfig(r=4, targets=["router", "attention"])
    with torch.no_grad():
        got, true = (adapted(way, config=config)(**models.text_batch()).logits for config in (ours, stock))
    torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-6)


def test_experts_whose_patch_drops_the_adapter_are_refused():
    tuned = adapted()
    layer = MoEModel.of(tuned).layers[1]
    own = layer.experts.forward
    for patch, message in (
        (lambda x, index, weights: own(x, index, weights), "takes no `expert_lora`"),
        (lambda x, index, weights, **others: own(x, index, weights), "passed over the adapter"),
    ):
        layer.experts.forward = patch
        with pytest.raises(OrdMoERuntimeError, match=message):
            tuned(**models.text_batch())
        with torch.no_grad(), tuned.disable_adapter():
            tuned(**models.text_batch())


def test_experts_set_to_another_function_are_refused_with_the_way_back():
    tuned = adapted()
    wanted = tuned(**models.text_batch()).logits
    tuned.get_base_model().set_experts_implementation("eager")
    with pytest.raises(OrdMoERuntimeError, match=r"'eager'.*set_experts_implementation\('ordmoe'\)"):
        tuned(**models.text_batch())
    tuned.get_base_model().set_experts_implementation("ordmoe")
    assert torch.equal(tuned(**models.text_batch()).logits, wanted)


@pytest.mark.parametrize("pick", [router, block], ids=["routers", "blocks"])
def test_compiled_modules_hold_their_tiers_in_training_after_evaluation(pick):
    """What was compiled for one call knows nothing of the tiers of the next: within tiers nothing compiled runs."""

    def run(way):
        tuned, batch = adapted(way, config=OrdMoEConfig(r=4, targets=["experts"])), models.text_batch()
        with torch.no_grad(), tier_routing(tuned.eval(), 3):
            tuned(**batch)
        tuned.train()
        found = []
        for tier in (3, [1, 2, 3], 2, 1):
            with tier_routing(tuned, tier):
                found.append(tuned(**batch).logits.detach())
        return found

    for got, true in zip(run(compiled(pick)), run(None), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-6)
