"""Adapters merged into 4-bit bases in memory: dense by default, in 4 bits on request."""

import copy
import warnings

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantize_experts_
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from ordmoe_peft.quantization.offloaded import is_in_ram
from ordmoe_peft.quantization.storage import expert_unpacker, is_packed
from tests import models, reference
from tests.families.rows import installed_rows
from tests.families.subject import Subject


EVERYTHING = ["router", "experts", "attention"]
FAMILIES = {**models.FAMILIES, "gpt_oss": models.gpt_oss, "qwen2_moe": models.qwen2_moe}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Also transposed, biased experts with gate and up interleaved, and shared experts."""
    return request.param


@pytest.fixture
def model(family):
    return FAMILIES[family]()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def packed_base(model, folder, **config):
    model.save_pretrained(folder)
    config = {"bnb_4bit_compute_dtype": torch.float32} | config
    return type(model).from_pretrained(folder, quantization_config=MoeBitsAndBytesConfig(**config)).eval()


def adapted(model, seed=3, **settings) -> PeftModel:
    """r = 6 and alpha = 4, so that no scaling is a power of two."""
    tuned = get_peft_model(model, OrdMoEConfig(**({"r": 6, "lora_alpha": 4, "targets": EVERYTHING} | settings)))
    models.randomize_adapter(tuned, seed)
    return tuned.eval()


def packed_names(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if is_packed(parameter)]


def scale_adapter(model, factor: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(factor)


def test_a_4_bit_base_becomes_a_dense_model(family, model, batch, tmp_path):
    roles = [*EVERYTHING, "shared_experts"] if family == "qwen2_moe" else EVERYTHING
    implementation, names = model.config._experts_implementation, {name for name, _ in model.named_parameters()}
    tuned = adapted(packed_base(model, tmp_path / "base", bnb_4bit_use_double_quant=True), targets=roles)
    wanted = logits(tuned, batch)
    merged = tuned.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged, batch), wanted, rtol=1e-4, atol=1e-4)

    assert packed_names(merged) == []
    assert {name for name, _ in merged.named_parameters()} == names
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    assert not any("4bit" in type(module).__name__ for module in merged.modules())
    assert not hasattr(merged.config, "quantization_config")
    assert not hasattr(merged, "hf_quantizer")
    assert merged.config._experts_implementation == implementation
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(loaded, batch), logits(merged, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"])
@pytest.mark.parametrize("build", [models.qwen3_moe, models.gpt_oss])
def test_the_merged_stack_is_the_dequantised_one_plus_the_deltas(build, name, tmp_path):
    tuned = adapted(packed_base(build(), tmp_path, bnb_4bit_quant_type="fp4"), use_rslora=True)
    layer = next(
        module
        for wrapped, module in tuned.named_modules()
        if getattr(module, "parameter_name", None) == name.rpartition(".")[2] and "layers.1." in wrapped
    )
    packed, experts = layer.get_param(), layer.get_base_layer()
    deltas = reference.expert_deltas(
        layer.lora_A["default"].weight, layer.lora_B["default"].weight, models.NUM_EXPERTS, scaling=4 / 6**0.5
    )
    wanted = torch.stack([expert_unpacker(packed)(expert) for expert in range(models.NUM_EXPERTS)])
    wanted = wanted + (deltas.transpose(1, 2) if experts.is_transposed else deltas)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged.get_parameter(name).detach(), wanted.detach(), rtol=1e-6, atol=1e-6)


def test_several_adapters_merge_as_their_sum(tmp_path):
    tuned, batch = adapted(packed_base(models.qwen3_moe(), tmp_path)), models.text_batch()
    tuned.add_adapter("second", OrdMoEConfig(r=3, lora_alpha=5, targets=EVERYTHING))
    models.randomize_adapter(tuned, seed=5)
    tuned.base_model.set_adapter(["default", "second"])
    wanted = logits(tuned, batch)
    merged = tuned.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(logits(merged, batch), wanted, rtol=1e-4, atol=1e-4)


def test_only_the_named_adapter_is_merged(tmp_path):
    tuned, batch = adapted(packed_base(models.qwen3_moe(), tmp_path)), models.text_batch()
    wanted = logits(tuned, batch)
    tuned.add_adapter("second", OrdMoEConfig(r=3, lora_alpha=5, targets=EVERYTHING))
    tuned.set_adapter("second")
    merged = tuned.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(logits(merged, batch), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
def test_what_attention_alone_allows(settings, tmp_path):
    tuned = adapted(packed_base(models.qwen3_moe(), tmp_path), targets=["attention"], **settings)
    batch = models.text_batch()
    wanted = logits(tuned, batch)
    merged = tuned.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged, batch), wanted, rtol=1e-4, atol=1e-4)
    assert packed_names(merged) == []


def test_biases_that_lora_trained_are_merged(tmp_path):
    tuned = adapted(packed_base(models.gpt_oss(), tmp_path), targets=["attention"], lora_bias=True)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B.default.bias" in name:
                parameter.normal_()
    batch = models.text_batch()
    wanted = logits(tuned, batch)
    torch.testing.assert_close(logits(tuned.merge_and_unload(), batch), wanted, rtol=1e-4, atol=1e-4)


def test_dense_weights_take_the_dtype_of_the_hidden_states(tmp_path):
    """Whatever dtype the packed ones are computed in: a dense linear layer of another could not run."""
    models.qwen3_moe().save_pretrained(tmp_path)
    for dtype, compute in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        config = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=compute)
        base = type(models.qwen3_moe()).from_pretrained(tmp_path, quantization_config=config, dtype=dtype).eval()
        tuned, batch = adapted(base), models.text_batch()
        wanted = logits(tuned, batch)
        merged = tuned.merge_and_unload()
        assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
        assert (logits(merged, batch) - wanted).norm() < 0.05 * wanted.norm()


def test_a_merged_model_takes_a_new_adapter(tmp_path):
    merged = adapted(packed_base(models.qwen3_moe(), tmp_path)).merge_and_unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again, batch = adapted(merged, seed=8), models.text_batch()
    wanted = logits(again, batch)
    torch.testing.assert_close(logits(again.merge_and_unload(), batch), wanted, rtol=1e-4, atol=1e-4)


class TestStockBases:
    """transformers' own 4-bit loading: linear layers are packed, experts are not."""

    @pytest.fixture
    def base(self, tmp_path):
        models.qwen3_moe().save_pretrained(tmp_path)
        config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"])
        return type(models.qwen3_moe()).from_pretrained(tmp_path, quantization_config=config).eval()

    def test_merge_after_an_evaluation(self, base):
        """At which bitsandbytes rearranges the bytes of linear layers, on some CPUs."""
        tuned, batch = adapted(base), models.text_batch()
        wanted = logits(tuned, batch)
        torch.testing.assert_close(logits(tuned.merge_and_unload(), batch), wanted, rtol=1e-4, atol=1e-4)

    def test_bytes_that_were_rearranged_before_are_refused(self, base):
        layer = base.model.layers[0].self_attn.q_proj
        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
        tuned = adapted(base)
        with pytest.raises(OrdMoEModelError, match=r"q_proj\.weight was evaluated on a CPU.*Load the model anew"):
            tuned.merge_and_unload()


class TestRefusals:
    """Each leaves the model as it was."""

    @pytest.fixture
    def tuned(self, tmp_path):
        return adapted(packed_base(models.qwen3_moe(), tmp_path))

    @pytest.fixture
    def wanted(self, tuned):
        return logits(tuned, models.text_batch())

    @pytest.mark.parametrize("factor", ["experts.lora_B", "q_proj.lora_B", "gate.lora_B"])
    @pytest.mark.parametrize("requantize", [False, True])
    def test_an_adapter_that_is_not_finite(self, tuned, factor, requantize):
        broken = next(p for name, p in reversed([*tuned.named_parameters()]) if factor in name)
        before = {name: parameter.clone() for name, parameter in tuned.named_parameters()}
        value = broken.data[0, 0].item()
        broken.data[0, 0] = float("nan")
        with pytest.raises(OrdMoEModelError, match="NaN or infinity"):
            tuned.merge_and_unload(safe_merge=True, requantize=requantize)
        broken.data[0, 0] = value
        assert all(torch.equal(parameter, before[name]) for name, parameter in tuned.named_parameters())
        assert len(packed_names(tuned)) == 6 * models.NUM_LAYERS

    def test_merging_in_place(self, tuned, wanted):
        with pytest.raises(OrdMoEModelError, match="cannot be unmerged"):
            tuned.merge_adapter()
        assert torch.equal(logits(tuned, models.text_batch()), wanted)

    @pytest.mark.parametrize("packed", [False, True])
    def test_an_adapter_that_is_not_there(self, packed, tmp_path):
        tuned = adapted(packed_base(models.qwen3_moe(), tmp_path) if packed else models.qwen3_moe())
        wanted = logits(tuned, models.text_batch())
        with pytest.raises(OrdMoEConfigError, match=r"no such adapter, only \['default'\]"):
            tuned.merge_and_unload(adapter_names=["defualt"])
        assert torch.equal(logits(tuned, models.text_batch()), wanted)

    def test_requantising_what_is_not_packed(self):
        tuned, batch = adapted(models.qwen3_moe()), models.text_batch()
        wanted = logits(tuned, batch)
        with pytest.raises(OrdMoEConfigError, match="no weight of the base is packed"):
            tuned.merge_and_unload(requantize=True)
        assert torch.equal(logits(tuned, batch), wanted)

    def test_a_dense_stack_with_a_broken_adapter(self):
        tuned = adapted(models.qwen3_moe(), targets=["experts"])
        layer = tuned.get_submodule("base_model.model.model.layers.0.mlp.experts")
        before = layer.get_param().clone()
        layer.lora_B["default"].weight.data[0, -1] = float("inf")
        with pytest.raises(OrdMoEModelError, match="down_proj of expert 7"):
            layer.merge(safe_merge=True)
        assert torch.equal(layer.get_param(), before)
        assert not layer.merged


class TestRequantising:
    def test_keeps_the_base_packed_by_its_own_recipe_and_says_what_is_left(self, tmp_path):
        recipe = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}
        tuned, batch = adapted(packed_base(models.qwen3_moe(), tmp_path, **recipe)), models.text_batch()
        scale_adapter(tuned, 100)
        names = {name.replace("base_model.model.", "").replace(".base_layer", "") for name in packed_names(tuned)}
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # deltas larger than the weights survive
            merged = tuned.merge_and_unload(requantize=True)
        report = merged.requantization_report
        assert set(packed_names(merged)) == names == {weight.name for weight in report.weights}
        for name in names:
            state = merged.get_parameter(name).quant_state
            assert (state.quant_type, state.nested, state.dtype) == ("fp4", True, torch.float32)
        assert merged.config._experts_implementation == "ordmoe"
        assert merged.config.quantization_config is not None
        assert all(0.9 < weight.survived < 1.1 and 0 < weight.noise < 0.5 for weight in report.weights)
        got = logits(merged, batch)
        dense = get_peft_model(merged, OrdMoEConfig()).merge_and_unload()  # an adapter that adds nothing
        torch.testing.assert_close(logits(dense, batch), got, rtol=1e-4, atol=1e-4)

    def test_small_deltas_are_lost_with_a_warning(self, tmp_path):
        tuned = adapted(packed_base(models.qwen3_moe(), tmp_path), targets=["experts"])
        scale_adapter(tuned, 1e-3)
        with pytest.warns(UserWarning, match=r"less than 90% of the delta in 6 of 6 weights.*keep the adapter beside"):
            merged = tuned.merge_and_unload(requantize=True)
        assert max(weight.survived for weight in merged.requantization_report.weights) < 0.5
        assert "norm of delta" in str(merged.requantization_report)


@pytest.mark.parametrize("name", ["Llama4ForCausalLM", "JetMoe", "LongcatFlash", "Step3p7"])
def test_stacks_outside_transformers_experts_interface(name):
    """Against the dequantised model with the same two adapters, merged by PEFT."""
    subject = Subject(next(row for row in installed_rows() if row.name.startswith(name)))
    packed = quantize_experts_(subject.copy())
    dense = copy.deepcopy(packed).dequantize()
    merged = []
    for model in (packed, dense):
        torch.manual_seed(2)
        tuned = adapted(model, targets=["experts"])
        tuned.add_adapter("second", OrdMoEConfig(r=2, targets=["experts"]))
        models.randomize_adapter(tuned)
        merged.append(tuned.merge_and_unload(adapter_names=["default", "second"]))
    assert {name for name, _ in merged[0].named_parameters()} == {name for name, _ in subject.model.named_parameters()}
    for name, weight in merged[0].named_parameters():
        assert not is_packed(weight)
        torch.testing.assert_close(weight, merged[1].get_parameter(name), rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(module) for module in merged[0].modules())
    assert subject.logits(merged[0]).isfinite().all()


@pytest.mark.parametrize("offload_experts", [False, True])
@pytest.mark.parametrize("name", ["Llama4ForCausalLM", "Dbrx"])
def test_stacks_outside_the_interface_are_packed_again(name, offload_experts):
    subject = Subject(next(row for row in installed_rows() if row.name.startswith(name)))
    model = quantize_experts_(subject.copy(), MoeBitsAndBytesConfig(offload_experts=offload_experts))
    names, before = packed_names(model), {name: weight.clone() for name, weight in model.named_parameters()}
    targets = ["attention"] if name == "Dbrx" else ["experts"]
    tuned = adapted(model, targets=targets)
    wanted = subject.logits(tuned)
    merged = tuned.merge_and_unload(requantize=True)
    assert packed_names(merged) == names
    changed = {name for name in names if not torch.equal(merged.get_parameter(name), before[name])}
    assert changed == (set() if name == "Dbrx" else set(names))
    assert all(is_in_ram(merged.get_parameter(name)) == offload_experts for name in names)
    assert (subject.logits(merged) - wanted).norm() < 0.5 * wanted.norm()
