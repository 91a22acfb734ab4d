"""Two stacks of layers that share their weights: an encoder and a decoder of DiffusionGemma, or two layers by hand."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantization_census, quantize_experts_
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.quantization.offloaded import is_in_ram
from ordmoe_peft.quantization.storage import is_packed
from tests import models


def diffusion_gemma():
    text = {
        **{name: value for name, value in models.TEXT.items() if name not in ("num_experts_per_tok", "eos_token_id")},
        **{"num_experts": models.NUM_EXPERTS, "top_k_experts": models.TOP_K},
        **{"moe_intermediate_size": models.EXPERT_WIDTH, "intermediate_size": 64, "head_dim": 16},
        **{"global_head_dim": 16, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "sliding_window": 16},
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16}
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=4)
    return models._build(DiffusionGemmaForBlockDiffusion, config)


@torch.no_grad()
def logits(model):
    torch.manual_seed(0)  # of the canvas
    return model.eval()(**models.text_batch()).logits


def shared(model):
    """Names of the same parameter, for all that are shared within the layers."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".layers." in name:
            names.setdefault(id(parameter), []).append(name)
    return sorted(tuple(group) for group in names.values() if len(group) > 1)


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = diffusion_gemma()
    assert shared(model)
    model.save_pretrained(folder / "dense")
    load = DiffusionGemmaForBlockDiffusion.from_pretrained
    load(folder / "dense", quantization_config=MoeBitsAndBytesConfig()).save_pretrained(folder / "packed")
    return folder


def test_dequantising_leaves_nothing_packed_and_the_stacks_tied(packed_folder, tmp_path):
    load = DiffusionGemmaForBlockDiffusion.from_pretrained
    dense_bytes = quantization_census(load(packed_folder / "dense")).bytes
    packed = load(packed_folder / "dense", quantization_config=MoeBitsAndBytesConfig())
    wanted, tied = logits(packed), shared(packed)
    dense = packed.dequantize()
    assert not any(is_packed(parameter) for parameter in dense.parameters())
    assert not any(isinstance(module, Linear4bit) for module in dense.modules())
    assert shared(dense) == tied == shared(diffusion_gemma())
    assert quantization_census(dense).bytes == dense_bytes
    torch.testing.assert_close(logits(dense), wanted, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path)), wanted, rtol=1e-4, atol=1e-4)


def test_a_packed_model_is_saved_once_and_loads_to_the_same_bits(packed_folder):
    load = DiffusionGemmaForBlockDiffusion.from_pretrained
    packed = load(packed_folder / "dense", quantization_config=MoeBitsAndBytesConfig())
    again = load(packed_folder / "packed")
    assert torch.equal(logits(again), logits(packed))
    assert shared(again) == shared(packed)
    assert quantization_census(again).bytes == quantization_census(packed).bytes
    file = packed_folder / "packed" / "model.safetensors"
    assert file.stat().st_size < 1.3 * quantization_census(packed).bytes


@pytest.mark.parametrize("folder", ["dense", "packed"])
def test_shared_stacks_that_stay_in_ram(packed_folder, folder):
    load = DiffusionGemmaForBlockDiffusion.from_pretrained
    in_ram = load(packed_folder / folder, quantization_config=MoeBitsAndBytesConfig(offload_experts=True))
    on_device = load(packed_folder / "packed")
    assert any(map(is_in_ram, in_ram.parameters()))
    assert shared(in_ram) == shared(on_device)
    for _ in range(2):
        assert torch.equal(logits(in_ram), logits(on_device))


def test_a_shared_stack_is_packed_once_in_memory_and_stays_shared(tmp_path):
    model = diffusion_gemma()
    tied = shared(model)
    quantize_experts_(model)
    wanted = logits(model)
    assert shared(model) == tied
    assert is_packed(model.model.encoder.language_model.layers[0].experts.down_proj)
    model.save_pretrained(tmp_path)
    again = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path)
    copied = copy.deepcopy(model)
    for each in (again, copied):
        assert shared(each) == tied
        assert torch.equal(logits(each), wanted)
        assert quantization_census(each).bytes == quantization_census(model).bytes
    dense = copied.dequantize()
    assert shared(dense) == tied
    torch.testing.assert_close(logits(dense), wanted, rtol=1e-4, atol=1e-4)


def test_packing_one_of_the_owners_of_a_shared_stack_is_refused():
    model = diffusion_gemma()
    before = {name: id(weight) for name, weight in model.named_parameters(remove_duplicate=False)}
    config = MoeBitsAndBytesConfig(llm_int8_skip_modules=["model.decoder.layers.1"])
    match = r"encoder.*layers\.1\.experts\.\w+_proj and model\.decoder\.layers\.1\.experts\.\w+ are one and the same"
    with pytest.raises(OrdMoEModelError, match=match):
        quantize_experts_(model, config)
    assert {name: id(weight) for name, weight in model.named_parameters(remove_duplicate=False)} == before


def tied_by_hand(of_attention=True):
    model = models.qwen3_moe()
    first, second = model.model.layers[0], model.model.layers[1]
    if of_attention:
        second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    else:
        second.mlp.experts.down_proj = first.mlp.experts.down_proj
    return model


@pytest.mark.parametrize("of_attention", [True, False])
def test_merging_into_a_shared_weight_is_refused(of_attention):
    tuned = get_peft_model(tied_by_hand(of_attention), OrdMoEConfig(r=4, targets=["experts", "attention"]))
    models.randomize_adapter(tuned)
    wanted = logits(tuned)
    for merge in (tuned.merge_adapter, tuned.merge_and_unload):
        with pytest.raises(
            OrdMoEModelError, match=r"layers.0\.(self_attn|mlp).* and .*layers.1.* are one and the same"
        ):
            merge()
    assert torch.equal(logits(tuned), wanted)
    tuned.unload()


def test_merging_beside_shared_weights_leaves_them_shared():
    skip = [f"model.layers.{layer}.mlp.experts" for layer in (1, 2)]
    model = models.qwen3_moe()
    quantize_experts_(model, MoeBitsAndBytesConfig(llm_int8_skip_modules=skip))
    model.model.layers[1].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj
    tuned = get_peft_model(model, OrdMoEConfig(r=4, targets=["attention"]))
    models.randomize_adapter(tuned)
    wanted = logits(tuned)
    merged = tuned.merge_and_unload()
    assert not any(is_packed(parameter) for parameter in merged.parameters())
    assert shared(merged) == [("model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj")]
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
