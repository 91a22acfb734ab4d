"""Experts outside transformers' experts interface in 4 bits: the dequantised model's values and gradients."""

import copy
import gc
import io
import logging
import threading
import types
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from ordmoe_peft import MoeBitsAndBytesConfig, quantize_experts_, tier_routing
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.quantization import unpacked_forward
from ordmoe_peft.quantization.storage import dense_stack, is_packed, logical_shape, pack_experts
from ordmoe_peft.quantization.unpacked_forward import UnpackedForward
from tests import models
from tests.families.rows import installed_rows
from tests.families.subject import Subject, relative_error
from tests.quantization import families


# What reads the stacks, by class: their owner, one of two beside each other, the owner's parent.
CLASSES = ["Step3p7", "Llama4ForCausalLM", "LongcatFlash", "JetMoe", "Inkling", "Dbrx"]


@pytest.fixture(scope="module", params=CLASSES)
def subject(request) -> Subject:
    return Subject(next(row for row in installed_rows() if row.name.startswith(request.param)))


def readers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(vars(module).get("forward"), UnpackedForward)]


def values_and_gradients(subject: Subject, model: nn.Module, **checkpointing) -> list[torch.Tensor]:
    """Logits in training, and the gradients of all that is no matrix and of the embeddings."""
    model = copy.deepcopy(model).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    trained = [weight for weight in model.parameters() if weight.dim() == 1 and weight.is_floating_point()]
    trained.append(model.get_input_embeddings().weight)
    for weight in trained:
        weight.requires_grad_()
    logits = model(**subject.batch, use_cache=False).logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    gradients = [weight.grad for weight in trained if weight.grad is not None]
    assert len(gradients) > 3
    return [logits.detach(), *gradients]


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_values_and_gradients_are_the_dequantised_models(subject, checkpointing):
    model = quantize_experts_(subject.copy(), MoeBitsAndBytesConfig(bnb_4bit_use_double_quant=True))
    assert readers(model)
    dense = copy.deepcopy(model).dequantize()
    assert not readers(dense)
    assert all("forward" not in vars(module) for module in dense.modules())
    if checkpointing and not model.supports_gradient_checkpointing:
        pytest.skip("it has no gradient checkpointing")
    got, wanted = (values_and_gradients(subject, each, **checkpointing) for each in (model, dense))
    for of_packed, of_dense in zip(got, wanted, strict=True):
        assert relative_error(of_packed, of_dense) < 1e-4


def test_experts_that_stay_in_ram_compute_the_same(subject):
    in_ram = quantize_experts_(subject.copy(), MoeBitsAndBytesConfig(offload_experts=True))
    model = quantize_experts_(subject.copy())
    for got, wanted in zip(*(values_and_gradients(subject, each) for each in (in_ram, model)), strict=True):
        assert torch.equal(got, wanted)


@pytest.fixture
def model() -> nn.Module:
    return quantize_experts_(families.llama4())


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**models.text_batch()).logits


def state(model: nn.Module) -> list[tuple]:
    parameters = [(name, id(weight)) for name, weight in model.named_parameters(remove_duplicate=False)]
    return [*parameters, *((name, sorted(vars(module))) for name, module in model.named_modules())]


def experts_of(model: nn.Module, layer: int = 1) -> nn.Module:
    return model.model.layers[layer].feed_forward.experts


def test_it_says_once_that_such_experts_are_slower(caplog):
    unpacked_forward.logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="ordmoe_peft"):
        quantize_experts_(families.llama4())
        quantize_experts_(models.qwen3_moe())
    (message,) = [record.message for record in caplog.records if "slower" in record.message]
    assert message.startswith("The experts of Llama4TextExperts are outside transformers' experts interface.")


def test_dense_stacks_live_as_long_as_the_forward_and_backward_has_them_again(model, monkeypatch):
    made = []

    def recorded(*args) -> torch.Tensor:
        dense = dense_stack(*args)
        made.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(unpacked_forward, "dense_stack", recorded)
    experts = experts_of(model)
    x = torch.randn(models.NUM_EXPERTS * 2, models.HIDDEN_SIZE, requires_grad=True)
    out = experts(x)
    gc.collect()
    assert len(made) == 2
    assert not any(reference() is not None for reference in made)
    out.sum().backward()
    assert len(made) == 4
    assert x.grad.any()


def test_backward_unpacks_an_expert_that_was_read_by_itself_by_itself(monkeypatch):
    row = next(row for row in installed_rows() if row.name.startswith("Dbrx"))
    subject = Subject(row)
    model = quantize_experts_(subject.copy())
    rows = []
    monkeypatch.setattr(
        unpacked_forward,
        "dense_stack",
        lambda packed, dtype, experts: rows.append(experts) or dense_stack(packed, dtype, experts),
    )
    model.get_input_embeddings().requires_grad_()
    loss = model(**subject.batch, use_cache=False).logits.sum()
    assert set(map(str, rows)) == {"slice(None, None, None)"}
    rows.clear()
    loss.backward()
    assert {part.stop - part.start for part in rows} == {model.config.ffn_config.ffn_hidden_size}


def test_hooks_of_others_see_what_autograd_saves_but_for_dense_stacks(model):
    seen = []

    def outside(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor.detach() * 2

    experts = experts_of(model)
    x = torch.randn(models.NUM_EXPERTS * 2, models.HIDDEN_SIZE, requires_grad=True)
    experts(x).sum().backward()
    wanted, x.grad = x.grad, None
    with saved_tensors_hooks(outside, lambda saved: saved / 2):
        out = experts(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, wanted)
    assert seen
    assert not any(tensor.shape[-2:] == logical_shape(experts.down_proj)[-2:] for tensor in seen)


def test_nothing_is_left_of_a_forward_that_fails(model):
    wanted, before = logits(model), state(model)

    def fail(activation: nn.Module, args: tuple) -> None:
        raise KeyboardInterrupt

    handle = experts_of(model).act_fn.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    assert state(model) == before
    assert torch.equal(logits(model), wanted)


def test_threads_do_not_meet(model):
    wanted, before = logits(model), state(model)
    together, got = threading.Barrier(2, timeout=30), []

    def meet(activation: nn.Module, args: tuple) -> None:
        together.wait()

    handle = experts_of(model).act_fn.register_forward_pre_hook(meet)
    threads = [threading.Thread(target=lambda: got.append(logits(model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert len(got) == 2
    assert all(torch.equal(each, wanted) for each in got)
    assert state(model) == before


def test_a_weight_that_was_swapped_in_is_read_as_it_is(model):
    experts = experts_of(model)
    packed = experts.down_proj
    adapted = (dense_stack(packed, torch.float32) * 1.5).requires_grad_()
    x = torch.randn(models.NUM_EXPERTS * 2, models.HIDDEN_SIZE)
    out = functional_call(experts, {"down_proj": adapted}, (x,), tie_weights=False)
    torch.testing.assert_close(out, experts(x) * 1.5)
    out.sum().backward()
    assert adapted.grad.any()
    assert experts.down_proj is packed


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_read_their_own_stacks(model, how):
    wanted = logits(model)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    for module in readers(copied):
        assert module.forward.module is module
    assert len(readers(copied)) == len(readers(model)) == models.NUM_LAYERS
    for module in readers(model):
        module.down_proj.data.zero_()
    assert torch.equal(logits(copied), wanted)
    assert not torch.equal(logits(model), wanted)


class Counting(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("first", [True, False], ids=["before packing", "after packing"])
def test_accelerates_hooks_stay(first):
    dense, hook = families.llama4(), Counting()
    wanted = logits(quantize_experts_(copy.deepcopy(dense)))
    model = dense if first else quantize_experts_(dense)
    add_hook_to_module(experts_of(model), hook)
    if first:
        quantize_experts_(model)
    assert torch.equal(logits(model), wanted)
    assert hook.calls == 1
    model.dequantize()
    assert torch.equal(logits(model), wanted)
    assert hook.calls == 2
    remove_hook_from_module(experts_of(model))
    assert not isinstance(experts_of(model).forward, UnpackedForward)
    assert torch.equal(logits(model), wanted)


def test_a_forward_that_was_replaced_is_refused_and_the_model_left_as_it_was():
    model = families.llama4()
    experts = experts_of(model)
    experts.forward = types.MethodType(type(experts).forward, experts)
    before = state(model)
    with pytest.raises(OrdMoEModelError, match=r"forward of model\.layers\.1\.feed_forward\.experts .*was replaced"):
        quantize_experts_(model)
    assert state(model) == before
    quantize_experts_(model, MoeBitsAndBytesConfig(llm_int8_skip_modules=["model.layers.1.feed_forward"]))
    assert len(readers(model)) == models.NUM_LAYERS - 1


def test_stacks_of_modules_within_are_dense_and_linear_layers_as_they_are():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = pack_experts(torch.randn(6, 64), "flat")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.stack = Inner(), pack_experts(torch.randn(2, 3, 5), "stack")

        def forward(self, x):
            return self.inner.flat, self.stack, self.stack

    outer = Outer()
    flat, stack, again = UnpackedForward(outer)(torch.zeros(1, dtype=torch.bfloat16))
    assert flat.shape == (6, 64)
    assert again is stack
    assert flat.dtype == stack.dtype == torch.bfloat16
    assert torch.equal(stack, dense_stack(outer.stack, torch.bfloat16))
    assert is_packed(outer.inner.flat)
    assert is_packed(outer.stack)


class KeepsALoss(nn.Module):
    """A block that holds its experts and keeps a loss, as remote code does."""

    def __init__(self):
        super().__init__()
        self.gate, self.top_k, self.aux_loss = nn.Linear(models.HIDDEN_SIZE, models.NUM_EXPERTS), 2, None
        shape = (models.NUM_EXPERTS, models.HIDDEN_SIZE, models.HIDDEN_SIZE)
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(shape) * 0.1), nn.Parameter(torch.randn(shape) * 0.1)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, models.HIDDEN_SIZE)
        scores = self.gate(x).softmax(-1)
        self.aux_loss = scores.square().sum()
        weights, index = scores.topk(self.top_k, dim=-1)
        rows = torch.einsum("eij,ejk,tk->tei", self.down_proj, self.up_proj, x)
        chosen = rows.gather(1, index.unsqueeze(-1).expand(-1, -1, models.HIDDEN_SIZE))
        return (weights.unsqueeze(-1) * chosen).sum(1).view_as(hidden_states)


def test_a_loss_that_a_block_keeps_is_kept():
    model = models.qwen3_moe()
    block = model.model.layers[1].mlp = KeepsALoss()
    quantize_experts_(model)
    assert is_packed(block.up_proj)
    model(**models.text_batch())
    block.aux_loss.backward()
    assert block.gate.weight.grad.any()
    assert is_packed(block.up_proj) and "up_proj" not in vars(block)
    with tier_routing(model, 2):
        model(**models.text_batch())


def test_stacks_are_packed_also_where_a_dense_layer_has_a_linear_of_their_name():
    model = models.qwen3_moe()
    model.model.layers[0].mlp = nn.Sequential()
    model.model.layers[0].mlp.down_proj = nn.Linear(models.HIDDEN_SIZE, models.HIDDEN_SIZE)
    block = model.model.layers[1].mlp = KeepsALoss()
    quantize_experts_(model)
    assert is_packed(block.down_proj) and is_packed(block.up_proj)


def test_autocast_decides_what_stacks_are_unpacked_to():
    subject = Subject(next(row for row in installed_rows() if row.name.startswith("Step3p7")))
    model, seen = quantize_experts_(subject.copy()), []
    owner = readers(model)[0]
    act = owner.act_fn
    owner.act_fn = type("Seen", (nn.Module,), {"forward": lambda self, x: seen.append(x.dtype) or act(x)})()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        subject.logits(model)
    assert set(seen) == {torch.bfloat16}
