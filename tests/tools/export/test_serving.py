"""An adapter for an inference server: names, shapes and settings as its sources read them, and the same outputs."""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.adapter.saved import SavedAdapter
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEModelError
from ordmoe_peft.tools.base_on_meta import base_on_meta
from ordmoe_peft.tools.export.servers import served
from ordmoe_peft.tools.export.serving import AdapterParts, ServingOptions, export_for_server
from ordmoe_peft.tools.imports.convert import import_adapter
from ordmoe_peft.tools.merge_on_disk.weightless_model import WeightlessModel
from tests import models


E, H, F = models.NUM_EXPERTS, models.HIDDEN_SIZE, models.EXPERT_WIDTH
WITH_ATTENTION = ["router", "experts", "attention"]
# Family → its builder, the roles that its servers take, where its experts are, the name of its router.
FAMILIES = {
    "qwen3_moe": (models.qwen3_moe, WITH_ATTENTION, r"model\.layers\.\d+\.mlp", "gate"),
    "olmoe": (models.olmoe, WITH_ATTENTION, r"model\.layers\.\d+\.mlp", "gate"),
    "qwen3_vl_moe": (models.qwen3_vl_moe, WITH_ATTENTION, r"model\.language_model\.layers\.\d+\.mlp", "gate"),
    "gpt_oss": (models.gpt_oss, WITH_ATTENTION, r"model\.layers\.\d+\.mlp", "router"),
    "deepseek_v3": (models.deepseek_v3, ["router", "experts", "shared_experts"], r"model\.layers\.\d+\.mlp", "gate"),
}
EXPORTS = [
    ("qwen3_moe", "vllm-2d", "keep"),
    ("qwen3_moe", "sglang", "drop"),
    ("olmoe", "vllm-2d", None),
    ("qwen3_vl_moe", "vllm-3d", "keep"),
    ("gpt_oss", "vllm-3d", "drop"),
    ("gpt_oss", "sglang", "drop"),
    ("deepseek_v3", "vllm-2d", "keep"),
]


def saved(family, folder, **settings):
    """The adapted model, with its base in `folder / "base"` and its adapter in `folder / "adapter"`."""
    build, targets, *_ = FAMILIES[family]
    model = build()
    model.save_pretrained(folder / "base")
    default = {"r": 6, "lora_alpha": 4, "targets": targets}
    tuned = get_peft_model(model, OrdMoEConfig(**(default | settings))).eval()
    models.randomize_adapter(tuned)
    tuned.save_pretrained(folder / "adapter")
    return tuned


def export(folder, to, router=None):
    export_for_server(folder / "adapter", folder / "out", ServingOptions(to, router, base=str(folder / "base")))
    return load_file(folder / "out" / "adapter_model.safetensors")


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def schema(family, to, rank, keeps_router):
    """Regular expression of a name → shape, as the servers' sources have them."""
    _, targets, block, router = FAMILIES[family]
    block = rf"base_model\.model\.{block}"
    rows = {}
    if to == "vllm-3d":  # `_stack_moe_lora_weights`, vllm/lora/model_manager.py
        rows[rf"{block}\.experts\.base_layer\.lora_A"] = (E * rank, H)
        rows[rf"{block}\.experts\.base_layer\.lora_B"] = (2 * F, rank * E)
        rows[rf"{block}\.experts\.lora_A"] = (E * rank, F)
        rows[rf"{block}\.experts\.lora_B"] = (H, rank * E)
    else:  # vllm/lora/utils.py, process_packed_modules_mapping; sglang/srt/lora/mem_pool.py, `experts\.(\d+)\.`
        rows[rf"{block}\.experts\.\d\.(gate|up)_proj\.lora_A"] = (rank, H)
        rows[rf"{block}\.experts\.\d\.(gate|up)_proj\.lora_B"] = (F, rank)
        rows[rf"{block}\.experts\.\d\.down_proj\.lora_A"] = (rank, F)
        rows[rf"{block}\.experts\.\d\.down_proj\.lora_B"] = (H, rank)
    if keeps_router:
        rows[rf"{block}\.{router}\.lora_A"] = (rank, H)
        rows[rf"{block}\.{router}\.lora_B"] = (E, rank)
    if "attention" in targets:
        rows[r"base_model\.model\..*self_attn\.[qkvo]_proj\.lora_A"] = (rank, H)
        rows[r"base_model\.model\..*self_attn\.[qo]_proj\.lora_B"] = (64, rank)
        rows[r"base_model\.model\..*self_attn\.[kv]_proj\.lora_B"] = (32, rank)
    if "shared_experts" in targets:
        rows[rf"{block}\.shared_experts\.(gate|up)_proj\.lora_A"] = (rank, H)
        rows[rf"{block}\.shared_experts\.(gate|up)_proj\.lora_B"] = (F, rank)
        rows[rf"{block}\.shared_experts\.down_proj\.lora_A"] = (rank, F)
        rows[rf"{block}\.shared_experts\.down_proj\.lora_B"] = (H, rank)
    return {rf"{name}\.weight": shape for name, shape in rows.items()}


@pytest.mark.parametrize(("family", "to", "router"), EXPORTS)
def test_what_is_written_has_the_servers_form_and_the_models_outputs(family, to, router, tmp_path):
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"mlp.experts": 9}}
    tuned = saved(family, tmp_path, use_rslora=True, **patterns)
    if router == "drop":
        for name, weight in tuned.named_parameters():
            if re.search(rf"\.{FAMILIES[family][3]}\.lora_B", name):
                weight.data.zero_()
    tensors = export(tmp_path, to, router)
    rows = schema(family, to, 6, keeps_router=router != "drop")
    for name, tensor in tensors.items():
        shapes = [shape for pattern, shape in rows.items() if re.fullmatch(pattern, name)]
        assert shapes == [tuple(tensor.shape)], name
        assert tensor.dtype == torch.float32
    assert all(any(re.fullmatch(pattern, name) for name in tensors) for pattern in rows)

    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["r"] == settings["lora_alpha"] == 6
    none = {"use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
    assert settings.items() >= none.items() and settings["bias"] == "none" and not settings["target_parameters"]
    assert set(settings["target_modules"]) == {
        name.rpartition(".lora_")[0].removesuffix(".base_layer").rpartition(".")[2] for name in tensors
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No server has run" in card and ("left out" in card) == (router == "drop")

    import_adapter(tmp_path / "out", tmp_path / "again", str(tmp_path / "base"))
    again = PeftModel.from_pretrained(FAMILIES[family][0](), tmp_path / "again").eval()
    batch = models.text_batch()
    assert not torch.allclose(logits(tuned, batch), logits(FAMILIES[family][0]().eval(), batch), atol=1e-2)
    torch.testing.assert_close(logits(again, batch), logits(tuned, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "to"), [("qwen3_moe", "vllm-2d"), ("gpt_oss", "vllm-3d")])
def test_a_projection_without_lora_gets_zeros(family, to, tmp_path):
    """Servers read all of an expert's projections."""
    tuned = saved(family, tmp_path, targets=["experts.down"], expert_rank="r/K")
    tensors = export(tmp_path, to)
    zeros = {name for name, tensor in tensors.items() if ".lora_B." in name and not tensor.any()}
    is_up = r"\.base_layer\." if to == "vllm-3d" else r"\.(gate|up)_proj\."
    assert zeros == {name for name in tensors if ".lora_B." in name and re.search(is_up, name)} and zeros
    import_adapter(tmp_path / "out", tmp_path / "again", str(tmp_path / "base"))
    again = PeftModel.from_pretrained(FAMILIES[family][0](), tmp_path / "again").eval()
    torch.testing.assert_close(
        logits(again, models.text_batch()), logits(tuned, models.text_batch()), rtol=1e-4, atol=1e-5
    )


def test_gpt_oss_gate_and_up_come_apart_by_turns(tmp_path):
    saved("gpt_oss", tmp_path)
    fused = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.experts"
    B_ORE = fused[f"{prefix}.base_layer.lora_B.weight"].reshape(2 * F, 6, E) * 4 / 6
    tensors = export(tmp_path, "sglang", "drop")
    for expert in range(E):
        torch.testing.assert_close(tensors[f"{prefix}.{expert}.gate_proj.lora_B.weight"], B_ORE[::2, :, expert])
        torch.testing.assert_close(tensors[f"{prefix}.{expert}.up_proj.lora_B.weight"], B_ORE[1::2, :, expert])


def test_a_projection_without_lora_is_zeros(tmp_path):
    saved("gpt_oss", tmp_path, targets=["experts"])
    skeleton = base_on_meta(SavedAdapter.read(tmp_path / "adapter"), str(tmp_path / "base"))
    model = WeightlessModel(skeleton, tmp_path / "adapter")
    model.weights = {name: weight for name, weight in model.weights.items() if not name.endswith("down_proj")}
    parts = AdapterParts.of(model, served("GptOssForCausalLM", "vllm-3d"), "vllm-3d")
    _, tensors = parts.tensors("vllm-3d", {})
    prefix = "base_model.model.model.layers.0.mlp.experts"
    assert tuple(tensors[f"{prefix}.lora_A.weight"].shape) == (E * 6, F)
    assert tuple(tensors[f"{prefix}.lora_B.weight"].shape) == (H, 6 * E)
    assert not tensors[f"{prefix}.lora_B.weight"].any() and tensors[f"{prefix}.base_layer.lora_B.weight"].any()


def test_the_record_describes_the_base(tmp_path):
    """Then no checkpoint is looked for."""
    saved("qwen3_moe", tmp_path)
    shutil.rmtree(tmp_path / "base")
    export_for_server(tmp_path / "adapter", tmp_path / "out", ServingOptions("vllm-2d"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    (tmp_path / "out" / "README.md").write_text("an earlier export, which goes")
    export_for_server(tmp_path / "adapter", tmp_path / "out", ServingOptions("vllm-2d"))
    assert "vllm serve" in (tmp_path / "out" / "README.md").read_text()
    skeleton = base_on_meta(SavedAdapter.read(tmp_path / "adapter"))
    assert type(skeleton).__name__ == "Qwen3MoeForCausalLM" and skeleton.device.type == "meta"


def test_folding_writes_the_bases_routers_with_the_update(tmp_path):
    tuned = saved("qwen3_moe", tmp_path)
    tensors = export(tmp_path, "sglang", "fold")
    assert not any(".gate." in name for name in tensors)
    patched = load_file(tmp_path / "out" / "router.safetensors")
    merged = tuned.merge_and_unload()
    assert patched.keys() == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(models.NUM_LAYERS)}
    for name, weight in patched.items():
        torch.testing.assert_close(weight, merged.get_parameter(name).data, rtol=1e-6, atol=1e-7)
    assert "model.safetensors.index.json" in (tmp_path / "out" / "README.md").read_text()


def test_routers_of_another_base_are_not_folded(tmp_path):
    saved("qwen3_moe", tmp_path)
    other = models.qwen3_moe()
    other.model.layers[0].mlp.gate.weight.data.add_(1)
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(OrdMoEModelError, match="trained on another base .*its (routers|embeddings) have other weights"):
        export(tmp_path, "sglang", "fold")


def test_folding_into_16_bits_rounds_the_sum_alone(tmp_path):
    saved("qwen3_moe", tmp_path)
    models.qwen3_moe().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    export(tmp_path, "sglang", "fold")
    base = load_file(tmp_path / "base" / "model.safetensors")
    lora = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "out" / "router.safetensors").items():
        A, B = (lora[f"base_model.model.{name}".replace("weight", f"lora_{part}.weight")].double() for part in "AB")
        assert torch.equal(weight, (base[name].double() + B @ A * 4 / 6).to(torch.bfloat16))


def test_without_a_base_no_routers_are_folded(tmp_path, monkeypatch):
    """The current folder, which holds a model, is not taken for it."""
    saved("qwen3_moe", tmp_path)
    monkeypatch.chdir(tmp_path / "base")
    with pytest.raises(OrdMoEConfigError, match="does not name its base, whose routers are read"):
        export_for_server(tmp_path / "adapter", tmp_path / "out", ServingOptions("sglang", "fold"))


def test_what_a_server_does_not_take_is_refused_by_name(tmp_path):
    saved("qwen3_moe", tmp_path)
    with pytest.raises(OrdMoEModelError, match="mix them without a word, by its version. Pass --to vllm-2d"):
        export(tmp_path, "vllm-3d")
    with pytest.raises(OrdMoEConfigError, match="LoRA on 3 routers, which sglang does not take.*--router fold"):
        export(tmp_path, "sglang")
    with pytest.raises(OrdMoEConfigError, match="LoRA on 3 routers"):
        export(tmp_path, "sglang", "keep")
    assert not (tmp_path / "out").exists()
    for wrong in ({"to": "tgi"}, {"to": "sglang", "router": "merge"}):
        with pytest.raises(OrdMoEConfigError, match="must be one of"):
            ServingOptions(**wrong)
    saved("qwen3_moe", tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(OrdMoEModelError, match="has base_model.model.lm_head.weight, which is none of LoRA's"):
        export(tmp_path, "vllm-2d")


def test_roles_without_a_place_are_refused(tmp_path):
    saved("deepseek_v3", tmp_path, targets=["experts", "attention"])
    with pytest.raises(OrdMoEModelError, match="self_attn.* has LoRA, for which vllm-2d has no place"):
        export(tmp_path, "vllm-2d")
    (tmp_path / "routers").mkdir()
    saved("qwen3_moe", tmp_path / "routers", targets=["router"])
    with pytest.raises(OrdMoEModelError, match="nothing of the adapter is left to write"):
        export(tmp_path / "routers", "sglang", "drop")
