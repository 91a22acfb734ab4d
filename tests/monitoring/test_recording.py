"""What observers of routers and experts are told, and in which order."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from ordmoe_peft import OrdMoEConfig, tier_routing
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.monitoring.recording import record, recorded_router_outputs, recorded_routing_weight_sums
from tests import models


class TestRecord:
    def test_each_call_is_told_in_order(self):
        model, told = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4)).eval(), []
        models.randomize_adapter(model)
        names = ("experts", "wrapped_router", "router", "unscaled_router")
        listeners = {name: lambda call, name=name: told.append((call, name)) for name in names}
        with torch.no_grad(), record(model, **listeners):
            model(**models.text_batch())
        with torch.no_grad():
            model(**models.text_batch())
        order = ("unscaled_router", "router", "wrapped_router", "experts")
        assert [(call.layer.index, name) for call, name in told] == [
            (index, name) for index in range(models.NUM_LAYERS) for name in order
        ]
        call = told[0][0]
        hidden_states_TH, index_TK = (
            told[3][0].argument(*place) for place in ((0, "hidden_states"), (1, "top_k_index"))
        )
        assert torch.equal(call.argument(0, "hidden_states"), hidden_states_TH)
        assert torch.equal(call.routing.index_TK, index_TK)
        adapted, base = call.routing.logits_TE, call.layer.router.forward(hidden_states_TH)[0]
        assert not torch.allclose(adapted, base)

    def test_some_layers_alone(self):
        model, told = models.qwen3_moe(), []
        with torch.no_grad(), record(model, router=told.append, layers=MoEModel.of(model).layers[1:2]):
            model(**models.text_batch())
        assert [call.layer.index for call in told] == [1]

    def test_hooks_are_gone_after_an_error(self):
        model = models.qwen3_moe()
        with pytest.raises(KeyboardInterrupt), record(model, router=print, experts=print):
            raise KeyboardInterrupt
        assert not any(module._forward_hooks for module in model.modules())


class TestRouterOutputs:
    def test_each_layers_logits_and_choice_are_recorded(self, model, batch):
        with torch.no_grad(), recorded_router_outputs(model) as outputs:
            model(**batch)
        assert len(outputs) == models.NUM_LAYERS
        for output in outputs:
            assert output.logits_TE.shape == (batch["input_ids"].numel(), models.NUM_EXPERTS)
            assert torch.equal(output.index_TK.sort().values, output.logits_TE.topk(models.TOP_K).indices.sort().values)
            assert torch.equal(output.of_tokens(lambda values: values[:2]).index_TK, output.index_TK[:2])

    def test_nothing_is_recorded_unless_enabled(self, model, batch):
        with torch.no_grad(), recorded_router_outputs(model, enabled=False) as outputs:
            model(**batch)
        assert outputs == []

    def test_routers_that_are_not_known_are_refused_by_name(self):
        model = models.qwen3_moe()
        model.model.layers[1].mlp.gate = nn.Identity()
        with pytest.raises(OrdMoEModelError, match=r"model\.layers\.1\.mlp: no router"), recorded_router_outputs(model):
            pass

    def test_routers_without_indices_are_refused_by_name(self):
        model = models.qwen3_moe()
        gate = model.model.layers[1].mlp.gate
        own = gate.forward
        gate.forward = lambda x: (*own(x)[:2], own(x)[2].float())
        with (
            pytest.raises(OrdMoEModelError, match=r"layers\.1\.mlp\.gate .*set balance_coef=0"),
            recorded_router_outputs(model),
        ):
            model(**models.text_batch())


class TestRoutingWeightSums:
    def test_routers_that_renormalise_give_every_token_one(self):
        model = models.qwen3_moe()
        with recorded_routing_weight_sums(model) as sums, torch.no_grad():
            model(**models.text_batch(rows=3, length=7))
        assert len(sums) == models.NUM_LAYERS
        for sum_T in sums:
            assert torch.allclose(sum_T, torch.ones(21))

    def test_the_sum_is_that_of_the_weights_that_the_router_returned(self):
        model = models.qwen3_moe()
        layer = MoEModel.of(model).layers[0]
        weights_TK = torch.tensor([[0.5, 0.25], [2.0, 3.0]])
        layer.router.forward = lambda x: (torch.zeros(2, models.NUM_EXPERTS), weights_TK, torch.tensor([[0, 1]] * 2))
        with recorded_routing_weight_sums(model) as sums:
            layer.router(None)
        assert sums[0].tolist() == [0.75, 5.0]
        layer.router(None)
        assert len(sums) == 1

    @pytest.mark.parametrize(
        "output",
        [torch.zeros(3, models.NUM_EXPERTS), (torch.zeros(3, models.NUM_EXPERTS), (torch.zeros(1), torch.zeros(1)))],
        ids=["logits alone", "a second output that is no weights"],
    )
    def test_other_outputs_have_no_sum(self, output):
        model = models.qwen3_moe()
        router = MoEModel.of(model).layers[0].router
        router.forward = lambda x: output
        with recorded_routing_weight_sums(model) as sums:
            router(None)
        assert sums == [None]

    def test_weights_that_are_scaled_to_match_are_recorded_as_the_router_gave_them(self):
        model, sums = models.olmoe(), {}
        for tier_weights in ("router", "match"):
            with (
                tier_routing(model, 3, tier_weights=tier_weights, layer_scope=[0]),
                recorded_routing_weight_sums(model, MoEModel.of(model).layers[:1]) as sums[tier_weights],
                torch.no_grad(),
            ):
                model(**models.text_batch())
        assert torch.equal(sums["match"][0], sums["router"][0])
        assert (sums["match"][0] < 0.5).all()
