"""The same code on a CUDA device: `pytest -m gpu`. Deselected by `make test`."""

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, tier_routing
from ordmoe_peft.quantization.storage import is_packed
from tests import models
from tests.training.test_precision import packed
from tests.training.test_trainer import trained, trainer_for


pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4-bit"])
def test_tiers_losses_and_gradients_are_those_of_the_cpu(tmp_path, quantized):
    models.qwen3_moe().save_pretrained(tmp_path)
    results = {}
    for device in ("cpu", "cuda"):
        config = MoeBitsAndBytesConfig() if quantized else None
        model = type(models.qwen3_moe()).from_pretrained(tmp_path, quantization_config=config, device_map=device)
        assert any(is_packed(parameter) for parameter in model.parameters()) == quantized
        model = get_peft_model(model, OrdMoEConfig(r=8, targets=["router", "experts", "attention"]))
        models.randomize_adapter(model)
        batch = {name: value.to(device) for name, value in models.text_batch().items()}
        with tier_routing(model, [3, 1, 2]):
            logits = model(**batch).logits
        logits.pow(2).mean().backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}
        results[device] = (logits.detach().cpu(), gradients)
    torch.testing.assert_close(results["cuda"][0], results["cpu"][0], rtol=1e-3, atol=1e-3)
    for name, gradient in results["cpu"][1].items():
        torch.testing.assert_close(results["cuda"][1][name], gradient, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("tier_passes", ["auto", "sequential"])
def test_fp16_trains_with_the_scaler_that_accelerate_makes(tmp_path, tier_passes, optim):
    model = get_peft_model(packed(tmp_path, device_map="cuda"), OrdMoEConfig(r=4, targets=["router", "experts"]))
    trainer = trainer_for(tmp_path, model, fp16=True, max_steps=8, tier_passes=tier_passes, optim=optim)
    assert trainer.accelerator.scaler is not None
    losses, weights = trained(trainer)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert trainer._guard.num_dropped == trainer._guard.counts["overflowed_steps"] <= 3
    assert losses[-1] < losses[0]
    # The peak of a pass was measured, and there was room.
    assert tier_passes == "sequential" or trainer._schedule.max_tokens > 0
