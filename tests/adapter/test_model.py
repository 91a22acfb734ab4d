"""What PEFT's users know of an adapter's life, for each family."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ordmoe_peft import OrdMoEConfig
from tests import models


EVERYTHING = ["router", "experts", "attention"]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def adapted(model, seed=3, **settings) -> PeftModel:
    """r = 6 and alpha = 4, so that no scaling is a power of two."""
    tuned = get_peft_model(model, OrdMoEConfig(**({"r": 6, "lora_alpha": 4, "targets": EVERYTHING} | settings)))
    models.randomize_adapter(tuned, seed)
    return tuned.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_initialisation_logits_are_the_bases(model, batch, dtype):
    base = logits(model.to(dtype), batch)
    got = logits(get_peft_model(model, OrdMoEConfig(targets=EVERYTHING)), batch)
    if dtype == torch.bfloat16:
        assert torch.equal(got, base)
    else:  # few rows take another product than the base's
        torch.testing.assert_close(got, base, rtol=1e-4, atol=1e-5)


def test_adapter_computes_what_plain_peft_computes(family, model, batch):
    """PEFT's own wrapper adds the delta to the weights; ours applies the factors to activations."""
    mine = adapted(model)
    config = mine.peft_config["default"]
    plain = get_peft_model(
        models.FAMILIES[family](),
        LoraConfig(r=6, lora_alpha=4, target_modules=config.target_modules, target_parameters=config.target_parameters),
    ).eval()
    models.randomize_adapter(plain)
    state = {name: value for name, value in mine.state_dict().items() if "lora_" in name}
    missing = plain.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    torch.testing.assert_close(logits(mine, batch), logits(plain, batch), rtol=1e-4, atol=1e-5)

    for tuned in (mine, plain):
        tuned.train()
        tuned(**batch).logits.pow(2).mean().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert gradients.keys() == {name for name, p in mine.named_parameters() if p.requires_grad}
    for name, parameter in mine.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6, msg=name)


def test_save_and_load_give_the_same_bits(family, model, batch, tmp_path):
    tuned = adapted(model, num_tiers=4, grouping="high_only", layer_scope=[0, 2])
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.FAMILIES[family](), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(tuned, batch))
    config = loaded.peft_config["default"]
    assert isinstance(config, OrdMoEConfig)
    assert (config.num_tiers, config.grouping, config.layer_scope) == (4, "high_only", [0, 2])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = PeftModel.from_pretrained(models.FAMILIES[family](), tmp_path, is_trainable=True)
    assert all(parameter.requires_grad for name, parameter in again.named_parameters() if "lora_" in name)


def test_an_adapter_of_so_many_modules_that_peft_shortens_their_names(tmp_path):
    build, batch = lambda: models.qwen3_moe(num_hidden_layers=6), models.text_batch()
    tuned = adapted(build())
    tuned.save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == 4
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(tuned, batch))


def test_disable_adapter(model, batch):
    base = logits(model, batch)
    tuned = adapted(model)
    assert not torch.allclose(logits(tuned, batch), base, atol=1e-3)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned, batch), base)


def test_several_adapters(model, batch):
    base = logits(model, batch)
    tuned = adapted(model)
    first = logits(tuned, batch)
    tuned.add_adapter("second", OrdMoEConfig(r=3, lora_alpha=4, targets=EVERYTHING))
    assert torch.equal(logits(tuned, batch), first), "an added adapter is not active"
    tuned.set_adapter("second")
    torch.testing.assert_close(logits(tuned, batch), base, rtol=1e-4, atol=1e-5, msg="and begins at nothing")
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B.second" in name:
                parameter.normal_(std=0.1)
    assert not torch.allclose(logits(tuned, batch), first, atol=1e-3)
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned, batch), first)
    tuned.delete_adapter("second")
    assert list(tuned.peft_config) == ["default"]
    assert not any(".second." in name for name, _ in tuned.named_parameters())
    assert torch.equal(logits(tuned, batch), first)


def test_unload_gives_the_base_back(model, batch):
    base, implementation = logits(model, batch), model.config._experts_implementation
    names = [name for name, _ in model.named_modules()]
    unloaded = adapted(model).unload()
    assert torch.equal(logits(unloaded, batch), base)
    assert [name for name, _ in unloaded.named_modules()] == names
    assert unloaded.config._experts_implementation == implementation
    assert not any(hasattr(module, "tier_hook_handles") for module in unloaded.modules())


def test_merge_and_unload(model, batch):
    tuned = adapted(model)
    wanted = logits(tuned, batch)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), wanted, rtol=1e-4, atol=1e-5)
    assert not any("lora_" in name for name, _ in merged.named_parameters())


def test_merge_and_unmerge_adapter(model, batch):
    tuned = adapted(model)
    wanted = logits(tuned, batch)
    tuned.merge_adapter()
    torch.testing.assert_close(logits(tuned, batch), wanted, rtol=1e-4, atol=1e-5)
    tuned.unmerge_adapter()
    torch.testing.assert_close(logits(tuned, batch), wanted, rtol=1e-4, atol=1e-5)
