"""The same code on a CUDA device: `pytest -m gpu`. Deselected by `make test`."""

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, tier_routing
from ordmoe_peft.quantization.storage import is_packed
from tests import models


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
