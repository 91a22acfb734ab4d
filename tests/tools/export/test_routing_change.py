"""What leaving out LoRA on routers changes."""

import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.monitoring.recording import record
from ordmoe_peft.tools.export.routing_change import measure_routing_change
from tests import models


IDS = [[5, 6, 7, 8], [9, 10]]


def adapted(targets):
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4, targets=targets))
    models.randomize_adapter(model)
    return model


def test_overlap_and_kl_are_those_of_the_routers_with_and_without():
    model = adapted(["router", "experts"])
    change = measure_routing_change(model, IDS)
    assert [name for name, *_ in change.layers] == [f"model.layers.{i}.mlp" for i in range(models.NUM_LAYERS)]
    assert change.num_tokens == 6 and not change.unmeasured
    # By hand, on the hidden states that each router of the adapted model is given.
    seen = {}
    base = model.base_model.model
    with torch.no_grad(), record(base, router=lambda call: seen.setdefault(call.layer.index, []).append(call)):
        for ids in IDS:
            model(input_ids=torch.tensor([ids]))
    for index, calls in seen.items():
        layer = calls[0].layer
        delta = model.base_model.model.get_submodule(layer.router_name).get_delta_weight("default")
        x_TH = torch.cat([call.argument(0, "hidden_states").reshape(-1, models.HIDDEN_SIZE) for call in calls])
        base_TE = x_TH @ layer.router_weight.T
        with_TE = x_TH @ (layer.router_weight + delta).T
        chosen, base_chosen = (scores.topk(models.TOP_K).indices for scores in (with_TE, base_TE))
        overlap = (base_chosen.unsqueeze(2) == chosen.unsqueeze(1)).any(2).float().mean()
        kl = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=base_TE), torch.distributions.Categorical(logits=with_TE)
        ).mean()
        assert change.layers[index][1:] == pytest.approx((overlap.item(), kl.item()), rel=1e-4)
    assert change.mean[1] == pytest.approx(sum(kl for *_, kl in change.layers) / models.NUM_LAYERS)
    assert 0 < change.mean[0] < 1


def test_without_lora_on_routers_there_is_nothing_to_measure():
    with pytest.raises(OrdMoEModelError, match="none has LoRA"):
        measure_routing_change(adapted(["experts"]), IDS)
