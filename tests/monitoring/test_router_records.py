import pytest
import torch
from torch import nn

from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.monitoring.router_records import recorded_router_outputs
from tests import models


def test_each_layers_logits_and_choice_are_recorded(model, batch):
    with torch.no_grad(), recorded_router_outputs(model) as outputs:
        model(**batch)
    assert len(outputs) == models.NUM_LAYERS
    for output in outputs:
        assert output.logits_TE.shape == (batch["input_ids"].numel(), models.NUM_EXPERTS)
        assert torch.equal(output.index_TK.sort().values, output.logits_TE.topk(models.TOP_K).indices.sort().values)
        assert torch.equal(output.of_tokens(lambda values: values[:2]).index_TK, output.index_TK[:2])


def test_routers_that_are_not_known_are_refused_by_name():
    model = models.qwen3_moe()
    model.model.layers[1].mlp.gate = nn.Identity()
    with pytest.raises(OrdMoEModelError, match=r"model\.layers\.1\.mlp: no router"), recorded_router_outputs(model):
        pass


def test_routers_without_indices_are_refused_by_name():
    model = models.qwen3_moe()
    gate = model.model.layers[1].mlp.gate
    own = gate.forward
    gate.forward = lambda x: (*own(x)[:2], own(x)[2].float())
    with (
        pytest.raises(OrdMoEModelError, match=r"layers\.1\.mlp\.gate .*set balance_coef=0"),
        recorded_router_outputs(model),
    ):
        model(**models.text_batch())
