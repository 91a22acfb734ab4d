"""What hooks read of a text model's forward: its cache, its rows, its place among other models and threads."""

import contextvars
import inspect
import threading

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache

from ordmoe_peft import OrdMoEConfig, forward, tier_routing
from ordmoe_peft.errors import OrdMoERuntimeError
from ordmoe_peft.forward import running_forward
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.tiers.routing import install_tier_hooks, remove_tier_hooks
from tests import models


TIERS = torch.tensor([[1] * 5 + [3] * 5] * 2)


def logits(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture
def model():
    return models.qwen3_moe()


@pytest.fixture
def ids():
    return torch.randint(3, 90, (2, 10))


def cache_name(model) -> str:
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("as_keyword", [True, False], ids=["by name", "by position"])
def test_the_past_counts_whatever_the_cache_is_called(model, ids, name, as_keyword):
    """transformers 5.24 renamed the argument; the old name still comes through."""
    if name not in (cache_name(model), "past_key_values"):
        pytest.skip("this transformers does not know the name")
    with tier_routing(model, TIERS):
        whole = logits(model, input_ids=ids)
        cache, parts = DynamicCache(config=model.config), []
        for step in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
            if as_keyword:
                parts.append(logits(model, input_ids=step, use_cache=True, **{name: cache}))
            else:
                with torch.no_grad():
                    parts.append(model.lm_head(model.model(step, None, None, cache).last_hidden_state))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


class SilentCache:
    """Has no length to read."""


@pytest.mark.parametrize("settings", [{"tier": TIERS}, {"tier": 2, "grouping": "random"}], ids=["positions", "random"])
def test_a_cache_that_does_not_say_its_length_is_refused(model, ids, settings):
    model.model.forward = lambda input_ids, **kwargs: pytest.fail("must not run")
    with tier_routing(model, **settings), pytest.raises(OrdMoERuntimeError, match=r"cache_params \(SilentCache\)"):
        model.model(ids, cache_params=SilentCache())


def test_it_is_not_asked_where_the_tiers_do_not_depend_on_positions(model, ids):
    install_tier_hooks(model)
    seen = []
    model.model.forward = lambda input_ids, **kwargs: [seen.append(running_forward())]
    with tier_routing(model, 3, layer_scope=[0]), pytest.raises(OrdMoERuntimeError, match="did not run"):
        model.model(ids, cache_params=SilentCache())
    assert seen[0].past_length == 0 and seen[0].shape == (2, 10)


def test_inputs_that_are_no_rows_of_positions_are_refused(model):
    class Flat(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.layers = model.model.layers

        def forward(self, tokens_TH):
            return self.layers[0].mlp.gate(tokens_TH)

    flat = Flat(model)
    with (
        tier_routing(flat, [1, 3], layer_scope=[0]),
        pytest.raises(OrdMoERuntimeError, match="neither with input_ids of shape"),
    ):
        flat(torch.randn(8, models.HIDDEN_SIZE))


def test_a_router_that_sees_some_tokens_alone_takes_one_tier_but_no_tier_per_row(model, ids):
    """As ERNIE-4.5-VL's text router, which sees text tokens: their number may divide by the rows by chance."""
    gate = model.model.layers[1].mlp.gate
    whole = gate.forward

    def some(hidden_states):
        logits, weights, index = whole(hidden_states[::2])
        return tuple(part.repeat_interleave(2, 0) for part in (logits, weights, index))

    gate.forward = some
    with tier_routing(model, 3):
        logits(model, input_ids=ids)
    for settings in ({"tier": [1, 3]}, {"tier": TIERS}, {"tier": 2, "grouping": "random"}):
        with (
            tier_routing(model, **settings),
            pytest.raises(OrdMoERuntimeError, match=r"layers\.1\.mlp\.gate got 10 tokens .* 2 rows of 10 positions"),
        ):
            logits(model, input_ids=ids)


def test_a_block_whose_forward_passes_its_router_over_is_refused(model, ids):
    """As a fused kernel of the whole block does."""
    block = model.model.layers[1].mlp
    block.forward = lambda hidden_states: hidden_states
    with (
        tier_routing(model, 3),
        pytest.raises(OrdMoERuntimeError, match=r"routers of the MoE layers \[1\] did not run"),
    ):
        logits(model, input_ids=ids)
    with tier_routing(model, 3, layer_scope=[0, 2]):
        logits(model, input_ids=ids)


class TwoStacks(nn.Module):
    """As the full Qwen3-Omni, with a thinker and a talker."""

    def __init__(self):
        super().__init__()
        self.thinker, self.talker = models.qwen3_moe(), models.olmoe(norm_topk_prob=True)


class TestSeveralTextModels:
    def chosen(self, model, ids, watched):
        index, handles = [], []
        for layer in MoEModel.of(watched).layers:
            handles.append(layer.router.register_forward_hook(lambda m, args, output: index.append(output[2])))
        logits(watched, input_ids=ids)
        for handle in handles:
            handle.remove()
        return index

    @pytest.mark.parametrize("first", ["whole", "thinker", "talker"])
    def test_each_is_held_by_the_whole_and_by_itself_in_any_order(self, ids, first):
        model = TwoStacks()
        install_tier_hooks(model if first == "whole" else getattr(model, first))
        for name in ("talker", "thinker"):
            part = getattr(model, name)
            plain = logits(part, input_ids=ids)
            with tier_routing(model, 3):
                whole = logits(part, input_ids=ids)
            with tier_routing(part, 3):
                alone = logits(part, input_ids=ids)
            assert torch.equal(whole, alone) and not torch.allclose(whole, plain, atol=1e-3)
            assert torch.equal(logits(part, input_ids=ids), plain)

    def test_one_held_leaves_the_other_alone(self, ids):
        model = TwoStacks()
        plain = logits(model.thinker, input_ids=ids)
        with tier_routing(model.talker, 3):
            assert torch.equal(logits(model.thinker, input_ids=ids), plain)

    def test_layers_are_counted_in_the_model_that_was_asked(self, ids):
        """Layer 3 of the whole is the talker's first."""
        model = TwoStacks()
        plain = self.chosen(model, ids, model.talker)
        for asked, index in ((model, models.NUM_LAYERS), (model.talker, 0)):
            with tier_routing(asked, 3, layer_scope=[index]):
                held = self.chosen(model, ids, model.talker)
            assert not torch.equal(held[0], plain[0])
            own_choice = self.chosen(model, ids, model.talker)
            assert torch.equal(own_choice[0], plain[0])

    def test_one_that_runs_inside_another_leaves_its_tiers_in_place(self, ids):
        model, other = models.qwen3_moe(), models.olmoe()
        with tier_routing(model, 3):
            wanted = logits(model, input_ids=ids)
        install_tier_hooks(other)

        def run_other(*_):
            logits(other, input_ids=ids)

        model.model.layers[0].register_forward_hook(run_other)
        with tier_routing(model, 3):
            assert torch.equal(logits(model, input_ids=ids), wanted)


class TestReplicasAndThreads:
    def replica_of(self, module: nn.Module) -> nn.Module:
        """As nn.DataParallel makes it, on the CPU: no parameters, but tensors as attributes."""
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else self.replica_of(child)
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
        return replica

    @pytest.fixture
    def tuned(self, model):
        tuned = get_peft_model(model, OrdMoEConfig(r=4, targets=["router", "experts", "attention"]))
        models.randomize_adapter(tuned)
        return tuned

    def test_replicas_have_the_adapter_and_its_gradients(self, tuned, ids):
        assert torch.equal(logits(self.replica_of(tuned), input_ids=ids), logits(tuned, input_ids=ids))
        tuned.train()
        gradients = []
        for model in (self.replica_of(tuned), tuned):
            model(input_ids=ids, labels=ids).loss.backward()
            gradients.append({name: p.grad for name, p in tuned.named_parameters() if p.requires_grad})
            tuned.zero_grad()
        assert len(gradients[0]) and all(torch.equal(gradients[0][name], value) for name, value in gradients[1].items())

    def test_replicas_within_tiers_are_refused(self, tuned, ids):
        errors = []

        def run(replica):
            try:
                logits(replica, input_ids=ids)
            except OrdMoERuntimeError as error:
                errors.append(str(error))

        replica = self.replica_of(tuned)
        with tier_routing(tuned, 3):
            thread = threading.Thread(target=run, args=(replica,))
            thread.start()
            thread.join()
        assert len(errors) == 1 and "nn.DataParallel" in errors[0]
        run(replica)
        assert len(errors) == 1, "without tiers it runs"

    def test_a_thread_without_tiers_beside_one_with_them_says_so(self, model, ids, monkeypatch):
        told = []
        monkeypatch.setattr(forward.logger, "warning_once", told.append)
        with tier_routing(model, 3):
            wanted = logits(model, input_ids=ids)
            results = {}
            for name, run in (("own", contextvars.Context().run), ("passed on", contextvars.copy_context().run)):
                work = lambda name=name: results.update({name: logits(model, input_ids=ids)})  # noqa: E731
                thread = threading.Thread(target=run, args=(work,))
                thread.start()
                thread.join()
        assert torch.equal(results["passed on"], wanted)
        assert not torch.equal(results["own"], wanted)
        assert len(told) == 1 and "contextvars.copy_context().run" in told[0]


def test_hooks_come_off(model):
    install_tier_hooks(model)
    remove_tier_hooks(model)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not hasattr(module, "tier_hook_handles") and not hasattr(module, "forward_hook_handles")


def test_blocks_of_two_threads_that_overlap_leave_compilation_on():
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=2))
    first_is_open, second_is_open, first_is_closed = (threading.Event() for _ in range(3))

    def first():
        with tier_routing(model, 2):
            first_is_open.set()
            second_is_open.wait(timeout=10)
        first_is_closed.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_is_open.wait(timeout=10)
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x * 2 + 1, backend=count)
    with tier_routing(model, 3):
        second_is_open.set()
        first_is_closed.wait(timeout=10)
        function(torch.ones(2))
        assert not compiled, "the second block is open"
    thread.join()
    function(torch.ones(3))
    assert compiled
    torch.compiler.reset()
