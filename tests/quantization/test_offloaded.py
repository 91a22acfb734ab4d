"""Experts in RAM compute what experts on the device do, to the bit, and live through all that happens to a model.

The places of the ring are overwritten by other bytes before each copy.
"""

import copy
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from bitsandbytes.nn import Params4bit
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import Qwen3MoeForCausalLM

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantization_census, quantize_experts_, tier_routing
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError, OrdMoERuntimeError
from ordmoe_peft.experts import forward
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.quantization import dequantization, offloaded
from ordmoe_peft.quantization.offloaded import OffloadedParams4bit, at_hand, device_of_use, is_in_ram, offload
from ordmoe_peft.quantization.ring import Ring
from ordmoe_peft.quantization.storage import is_packed
from tests import models
from tests.quantization.test_ring import poison_places


KINDS = {
    "nf4": {},
    "nf4, double": {"bnb_4bit_use_double_quant": True},
    "fp4, kept as bfloat16": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
}
FAMILIES = {
    "qwen3_moe": models.qwen3_moe,
    "transposed, biased": models.gpt_oss,
    "not gated": models.nemotron_h,
}
CHECKPOINTING = {"none": None, "reentrant": True, "not reentrant": False}


@pytest.fixture(autouse=True)
def copies(monkeypatch) -> list:
    """One entry for each copy of a layer, which is poisoned before. Experts that are run are never read from RAM."""

    def on_device(weight):
        found = at_hand(weight)
        assert not is_in_ram(found), "its layer is not opened"
        return found

    monkeypatch.setattr(forward, "at_hand", on_device)

    return poison_places(monkeypatch)


def packed(offloads: bool, build=models.qwen3_moe, **options) -> nn.Module:
    return quantize_experts_(build(), MoeBitsAndBytesConfig(offload_experts=offloads, **options))


def tuned(offloads: bool, build=models.qwen3_moe, **options) -> PeftModel:
    torch.manual_seed(6)
    model = get_peft_model(packed(offloads, build, **options), OrdMoEConfig(r=4, num_tiers=3))
    models.randomize_adapter(model)
    return model


def stacks_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if is_packed(parameter) and parameter.quant_state.shape[2:]]


def checkpoint(model: nn.Module, use_reentrant: bool | None) -> None:
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    model.train()


def trained(model: nn.Module, tiers=None) -> dict[str, torch.Tensor]:
    """Loss and all gradients of a step."""
    model.zero_grad()
    batch = models.text_batch()
    with tier_routing(model, tiers) if tiers else nullcontext():
        loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("experts" in name for name in gradients)
    return {"loss": loss.detach()} | gradients


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**models.text_batch()).logits


def written(model: nn.Module) -> torch.Tensor:
    return model.eval().generate(**models.text_batch(), max_new_tokens=5, do_sample=False)


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", KINDS)
def test_training_evaluation_and_generation_are_those_of_experts_on_the_device(kind, checkpointing, copies):
    """One after the other on one model, so that each finds in the ring what the one before left there."""
    on_device, in_ram = (tuned(offloads, **KINDS[kind]) for offloads in (False, True))
    for step in range(2):
        for model in (on_device, in_ram):
            checkpoint(model, CHECKPOINTING[checkpointing])
        for tiers in (None, [3, 1, 2], None):
            assert_same(trained(in_ram, tiers), trained(on_device, tiers))
        with torch.inference_mode() if step else nullcontext():
            assert torch.equal(logits(in_ram), logits(on_device))
        assert torch.equal(written(in_ram), written(on_device))
    assert copies, "or nothing was in RAM"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(dtype):
    on_device, in_ram = (tuned(offloads, lambda: models.qwen3_moe().to(dtype)) for offloads in (False, True))
    assert_same(trained(in_ram.train()), trained(on_device.train()))
    assert torch.equal(logits(in_ram), logits(on_device))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    on_device, in_ram = (tuned(offloads, FAMILIES[family]) for offloads in (False, True))
    for model in (on_device, in_ram):
        checkpoint(model, False)
    for _ in range(2):
        assert_same(trained(in_ram), trained(on_device))
    assert torch.equal(logits(in_ram), logits(on_device))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_step_copies_each_layer_twice_but_for_two_at_either_end(checkpointing, copies):
    model = tuned(True, lambda: models.qwen3_moe(num_hidden_layers=6))
    checkpoint(model, CHECKPOINTING[checkpointing])
    for _ in range(3):
        copies.clear()
        trained(model)
    assert len(copies) == 2 * 6 - 4


def test_stacks_that_are_not_packed_stay_on_the_device():
    options = {"llm_int8_skip_modules": ["model.layers.1.mlp.experts.down_proj", "model.layers.2"]}
    on_device, in_ram = (tuned(offloads, **options) for offloads in (False, True))
    kinds = [[type(getattr(layer.experts, name)) for name in layer.projections] for layer in MoEModel.of(in_ram).layers]
    assert kinds == [[OffloadedParams4bit] * 2, [OffloadedParams4bit, nn.Parameter], [nn.Parameter] * 2]
    assert_same(trained(in_ram), trained(on_device))


@pytest.mark.parametrize("at", ["before", "after", "within forward", "within backward"])
def test_an_error_in_a_layer_leaves_the_next_step_right(at):
    model = tuned(True)
    wanted = trained(model)
    experts = model.base_model.model.model.layers[1].mlp.experts.get_base_layer()
    calls = []

    def fail(*args):
        calls.append(at)
        if at != "within backward" or len(calls) > 1:  # the activation is called in forward first
            raise ZeroDivisionError

    hooks = {"before": experts.register_forward_pre_hook, "after": experts.register_forward_hook}
    hook = hooks.get(at, experts.act_fn.register_forward_hook)(fail)
    with pytest.raises(ZeroDivisionError):
        trained(model)
    hook.remove()
    assert_same(trained(model), wanted)


def test_layers_in_another_order_and_layers_left_out():
    on_device, in_ram = tuned(False), tuned(True)
    for order in ([2, 0, 1], [1], [0, 2], [2, 1, 0, 1, 2]):
        for model in (on_device, in_ram):
            inner = model.base_model.model.model
            inner.all_layers = getattr(inner, "all_layers", inner.layers)
            inner.layers = nn.ModuleList(inner.all_layers[index] for index in order)
            inner.config.num_hidden_layers = len(order)
        assert_same(trained(in_ram), trained(on_device))


def test_threads_run_one_model():
    """Forwards and backward passes of three threads, each on its own tokens."""
    model = tuned(True).eval()
    batches = [models.text_batch(rows=rows) for rows in (1, 2, 3)]

    def gradient(batch: dict) -> torch.Tensor:
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits.pow(2).sum().backward(
            inputs=embedded
        )
        return embedded.grad

    wanted = [gradient(batch) for batch in batches]
    got: list[list[torch.Tensor]] = [[], [], []]
    threads = [
        threading.Thread(target=lambda place=place: got[place].extend(gradient(batches[place]) for _ in range(5)))
        for place in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, result in zip(got, wanted, strict=True):
        assert len(results) == 5
        assert all(torch.equal(each, result) for each in results)


def test_nothing_moves_or_casts_the_bytes():
    model = tuned(True, bnb_4bit_quant_storage=torch.bfloat16, bnb_4bit_use_double_quant=True)
    wanted, before = logits(model), {name: (p, p.data_ptr()) for name, p in model.named_parameters() if is_packed(p)}
    model.to("cpu").to(torch.float32).cpu()
    assert before == {name: (p, p.data_ptr()) for name, p in model.named_parameters() if is_packed(p)}
    assert torch.equal(logits(model), wanted)
    with pytest.raises(OrdMoERuntimeError, match="Packed experts were cast from torch.bfloat16 to torch.float32"):
        logits(model.float())


def test_small_tensors_say_where_the_model_runs():
    """On the meta device, for want of another: bytes and block scales stay, and an adapter would go there."""
    stack = stacks_of(packed(True, bnb_4bit_use_double_quant=True))[0]
    assert stack.to("meta") is stack
    state = stack.quant_state
    assert [state.code.device.type, state.offset.device.type, state.state2.absmax.device.type] == ["meta"] * 3
    assert [stack.device.type, state.absmax.device.type] == ["cpu", "cpu"]
    assert device_of_use(stack).type == "meta"
    assert device_of_use(nn.Parameter(torch.ones(1))).type == "cpu"


def test_an_adapter_is_put_where_the_model_runs():
    model = packed(True)
    for stack in stacks_of(model):
        stack.to("meta")
    model = get_peft_model(model, OrdMoEConfig(r=4, targets=["experts"]))
    assert {p.device.type for name, p in model.named_parameters() if "lora_" in name} == {"meta"}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_model_have_a_ring_of_their_own(copied):
    model = tuned(True)
    wanted = trained(model)
    other = copied(model)
    ring, its_ring = ({stack.ring for stack in stacks_of(each)} for each in (model, other))
    assert len(ring) == len(its_ring) == 1
    assert ring != its_ring
    assert all(map(is_in_ram, stacks_of(other)))
    for stack in stacks_of(model):
        stack.data.random_(0, 256)
    assert_same(trained(other.train()), wanted)


def test_peft_takes_them_for_packed_parameters():
    options = {"bnb_4bit_quant_storage": torch.bfloat16}
    on_device, in_ram = (packed(offloads, **options) for offloads in (False, True))
    wanted = logits(in_ram)
    assert torch.equal(logits(prepare_model_for_kbit_training(in_ram)), wanted)
    counted = [get_peft_model(model, OrdMoEConfig(r=4)).get_nb_trainable_parameters() for model in (on_device, in_ram)]
    assert counted[0] == counted[1]


def test_compiled_blocks_compute_the_same():
    blocks = [layer.mlp for layer in tuned(True).base_model.model.model.layers]
    x = torch.randn(1, 5, models.HIDDEN_SIZE)

    def run(functions) -> torch.Tensor:
        y = x.requires_grad_()
        for function in functions:
            y = function(y)
        return torch.cat([y, *torch.autograd.grad(y.pow(2).sum(), x)])

    wanted = run(blocks)
    compiled = [torch.compile(block, backend="eager") for block in blocks]
    for _ in range(3):
        assert torch.equal(run(compiled), wanted)
    torch.compiler.reset()


def test_bytes_that_are_loaded_into_a_model_are_those_that_it_runs():
    model, other = tuned(True), tuned(True)
    wanted = logits(model)
    with torch.no_grad():
        for stack in stacks_of(other):
            stack.zero_()
    assert not torch.equal(logits(other), wanted)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), wanted)


def write_bytes(stack: nn.Parameter) -> None:
    stack.data = torch.flip(stack.data, (0,))


def write_scales(stack: nn.Parameter) -> None:
    stack.quant_state.absmax.mul_(2)


@pytest.mark.parametrize("write", [write_bytes, write_scales])
def test_stacks_that_are_written_to_are_copied_again(write):
    in_ram, resident = (packed(offloads).eval() for offloads in (True, False))
    for _ in range(2):  # from the second forward on, layers are copied ahead
        assert torch.equal(logits(in_ram), logits(resident))
    before = logits(resident)
    for model in (in_ram, resident):
        for stack in stacks_of(model):
            write(stack)
    assert torch.equal(logits(in_ram), logits(resident))
    assert not torch.equal(logits(resident), before)


class TestCheckpoints:
    @pytest.fixture
    def dense(self, tmp_path):
        models.qwen3_moe().save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    @staticmethod
    def load(folder, offloads: bool | None, **options):
        config = None if offloads is None else MoeBitsAndBytesConfig(offload_experts=offloads, **KINDS["nf4, double"])
        return Qwen3MoeForCausalLM.from_pretrained(folder, quantization_config=config, **options)

    @pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}, torch.device("cpu")], ids=str)
    def test_loaded_from_dense_and_from_packed_weights(self, dense, tmp_path, device_map):
        on_device, in_ram = (self.load(dense, offloads, device_map=device_map) for offloads in (False, True))
        wanted = logits(on_device)
        assert torch.equal(logits(in_ram), wanted)
        for name, model in (("device", on_device), ("ram", in_ram)):
            model.save_pretrained(tmp_path / name)
            assert not list((tmp_path / name).glob("*offload*"))
            for offloads in (None, False, True):
                again = self.load(tmp_path / name, offloads, device_map=device_map)
                assert {is_in_ram(stack) for stack in stacks_of(again)} == {bool(offloads)}
                assert {is_in_ram(p) for p in again.parameters() if is_packed(p)} >= {False}, "linear layers are not"
                assert torch.equal(logits(again), wanted)
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("device", "ram")]
        configs = [(tmp_path / name / "config.json").read_text() for name in ("device", "ram")]
        assert files[0] == files[1]
        assert configs[0] == configs[1]

    @pytest.mark.parametrize("device_map", ["auto", "balanced", {"model": "cpu", "lm_head": "disk"}], ids=str)
    def test_several_devices_are_refused(self, dense, device_map):
        with pytest.raises(OrdMoEConfigError, match=r"offload_experts=True serves one device, but device_map="):
            self.load(dense, True, device_map=device_map)

    def test_loading_reserves_nothing_for_them_on_a_device(self, dense):
        model = self.load(dense, True)
        name = "model.layers.0.mlp.experts.down_proj"
        size = {offloads: self.load(dense, offloads).hf_quantizer.param_element_size for offloads in (False, True)}
        weight = model.get_parameter(name)
        assert (size[True](model, name, weight), size[False](model, name, weight)) == (0, 0.5)
        assert size[True](model, "lm_head.weight", model.lm_head.weight) == 4

    def test_a_packed_checkpoint_is_read_to_ram(self, dense, tmp_path, monkeypatch):
        """transformers reads tensors to the device ahead of their conversion."""
        self.load(dense, False).save_pretrained(tmp_path)
        quantizer = self.load(tmp_path, True).hf_quantizer
        model = self.load(dense, False)
        for offloads in (False, True):
            quantizer.quantization_config.offload_experts = offloads
            conversions = quantizer.update_weight_conversions([], model)
            to_ram = {
                conversion.source_patterns[0].split(".")[-1] for conversion in conversions if conversion.force_cpu
            }
            assert to_ram == ({"gate_up_proj", "down_proj"} if offloads else set())

    def test_an_adapter_is_the_same_file(self, dense, tmp_path):
        for offloads in (False, True):
            torch.manual_seed(1)
            model = get_peft_model(self.load(dense, offloads), OrdMoEConfig(r=4))
            models.randomize_adapter(model)
            model.save_pretrained(tmp_path / str(offloads))
        files = {path.name: path.read_bytes() for path in (tmp_path / "False").iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "True").iterdir()}
        loaded = PeftModel.from_pretrained(self.load(dense, True), tmp_path / "True")
        assert torch.equal(logits(loaded), logits(model))


class TestDense:
    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_merging_gives_what_it_gives_for_experts_on_the_device(self, safe_merge):
        merged = [tuned(offloads).merge_and_unload(safe_merge=safe_merge) for offloads in (False, True)]
        assert not any(map(is_packed, merged[1].parameters()))
        assert_same(dict(merged[1].state_dict()), dict(merged[0].state_dict()))

    def test_requantised_stacks_are_in_ram_again(self):
        merged = [tuned(offloads).merge_and_unload(requantize=True) for offloads in (False, True)]
        assert all(map(is_in_ram, stacks_of(merged[1])))
        assert len({stack.ring for stack in stacks_of(merged[1])}) == 1
        assert torch.equal(logits(merged[1]), logits(merged[0]))

    def test_dequantising(self):
        dense = [packed(offloads).dequantize() for offloads in (False, True)]
        assert not any(map(is_packed, dense[1].parameters()))
        assert torch.equal(logits(dense[1]), logits(dense[0]))

    def test_the_ring_keeps_no_packed_bytes(self, copies):
        model = tuned(True)
        trained(model)  # the ring knows all layers
        ring = stacks_of(model)[0].ring
        copies.clear()
        merged = model.merge_and_unload()
        assert not any(map(is_packed, merged.parameters()))
        assert not any(stack() is not None for place in (ring._here, ring._other) for stack, _ in place.stacks)

    def test_the_whole_model_goes_to_the_cpu_with_a_warning(self, monkeypatch, caplog):
        model, moved = packed(True), []
        monkeypatch.setattr(dequantization.logger, "warning", lambda message: moved.append(message))
        monkeypatch.setattr(Qwen3MoeForCausalLM, "device", torch.device("cuda", 0))
        monkeypatch.setattr(model, "to", moved.append)
        dequantization.join_experts_in_ram_(model)
        assert "are in RAM (offload_experts=True)" in moved[0]
        assert "cuda:0: the whole model is on the CPU from now on" in moved[0]
        assert moved[1:] == ["cpu"]
        on_device = packed(False)
        monkeypatch.setattr(on_device, "to", moved.append)
        dequantization.join_experts_in_ram_(on_device)
        assert moved[2:] == []


def test_the_census_says_where_they_are():
    in_ram, on_device = (quantization_census(packed(offloads)) for offloads in (True, False))
    assert in_ram.of("experts") == {"nf4 in RAM": on_device.of("experts")["nf4"]}
    assert in_ram.bytes == on_device.bytes
    assert "of experts in nf4 in RAM" in in_ram.summary()


def test_memory_that_cannot_be_pinned(monkeypatch):
    """As where CUDA exists: torch's refusal is passed on with the size that was asked for."""
    stack = stacks_of(packed(False))[0]
    empty = torch.empty

    def refuse(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", refuse)
    size = f"{stack.quant_state.absmax.nbytes / 2**30:.2f} GiB of RAM cannot be pinned .CUDA error: out of memory"
    with pytest.raises(OrdMoEModelError, match=size):
        offload(stack, Ring())


def test_memory_is_pinned_where_cuda_exists(monkeypatch):
    stack, pinned, empty = stacks_of(packed(False))[0], [], torch.empty

    def noted(*args, pin_memory=False, **kwargs):
        pinned.append(pin_memory)
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(offloaded.torch, "empty", noted)
    before = stack.data.clone()
    assert torch.equal(offload(stack, Ring()).data, before)
    assert pinned == [True, True]


@pytest.mark.parametrize("value", ["true", 1, None])
def test_values_that_are_no_truth_values(value):
    with pytest.raises(OrdMoEConfigError, match=f"offload_experts must be True or False, got {value!r}"):
        MoeBitsAndBytesConfig(offload_experts=value)


def test_experts_on_the_device_are_ordinary():
    assert {type(stack) for stack in stacks_of(packed(False))} == {Params4bit}


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_on_cuda(checkpointing, tmp_path):
    """Loaded to the device, where nothing but two layers' experts ever is."""
    models.qwen3_moe(num_hidden_layers=6, hidden_size=512, moe_intermediate_size=512).save_pretrained(tmp_path)
    results = {}
    for offloads in (False, True):
        config = MoeBitsAndBytesConfig(offload_experts=offloads)
        model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cuda")
        torch.manual_seed(6)
        model = get_peft_model(model, OrdMoEConfig(r=4, num_tiers=3))
        models.randomize_adapter(model)
        assert {p.device.type for name, p in model.named_parameters() if "lora_" in name} == {"cuda"}
        if offloads:
            assert all(stack.data.is_pinned() for stack in stacks_of(model))
        checkpoint(model, CHECKPOINTING[checkpointing])
        batch = {name: value.cuda() for name, value in models.text_batch().items()}
        steps = []
        for tiers in (None, [3, 1, 2], None, None):
            model.zero_grad()
            with tier_routing(model, tiers) if tiers else nullcontext():
                loss = model(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        results[offloads] = steps
    for got, wanted in zip(results[True], results[False], strict=True):
        for name, gradient in wanted.items():  # sums by atomic addition are not the same twice
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    merged = model.merge_and_unload()
    assert {p.device.type for p in merged.parameters()} == {"cpu"}
