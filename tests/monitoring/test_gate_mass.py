from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ordmoe_peft import tier_routing
from ordmoe_peft.moe_model import find_moe_layers
from ordmoe_peft.monitoring.gate_mass import recorded_gate_mass
from tests import models


def test_routers_that_renormalise_give_every_token_one():
    model = models.qwen3_moe()
    with recorded_gate_mass(find_moe_layers(model)) as masses, torch.no_grad():
        model(**models.text_batch(rows=3, length=7))
    assert len(masses) == models.NUM_LAYERS
    for mass_T in masses:
        assert torch.allclose(mass_T, torch.ones(21))


def test_the_mass_is_the_sum_of_the_weights_that_the_router_returned():
    class Router(nn.Module):
        def forward(self, logits_TE):
            weights_TK, index_TK = logits_TE.topk(2)
            return logits_TE, weights_TK, index_TK

    layer = SimpleNamespace(num_experts=8, router=Router(), top_k=2)
    with recorded_gate_mass([layer]) as masses:
        layer.router(torch.tensor([[0.5, 0.25, 0.125], [0.0, 2.0, 3.0]]))
    assert masses[0].tolist() == [0.75, 5.0]
    layer.router(torch.ones(1, 3))
    assert len(masses) == 1


@pytest.mark.parametrize(
    "router", [nn.Linear(4, 8), nn.LSTM(4, 8)], ids=["logits alone", "a second output that is no weights"]
)
def test_other_outputs_have_no_mass(router):
    with recorded_gate_mass([SimpleNamespace(num_experts=8, router=router, top_k=2)]) as masses:
        router(torch.zeros(3, 4))
    assert masses == [None]


def test_weights_that_are_scaled_to_match_are_recorded_as_the_router_gave_them():
    model, masses = models.olmoe(), {}
    for tier_weights in ("router", "match"):
        with (
            tier_routing(model, 3, tier_weights=tier_weights, layer_scope=[0]),
            recorded_gate_mass(find_moe_layers(model)[:1]) as masses[tier_weights],
            torch.no_grad(),
        ):
            model(**models.text_batch())
    assert torch.equal(masses["match"][0], masses["router"][0])
    assert (masses["match"][0] < 0.5).all()
