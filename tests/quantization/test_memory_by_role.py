import pytest
import torch
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantization_census, quantize_experts_
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.quantization.memory_by_role import role_finder
from ordmoe_peft.quantization.storage import is_packed
from tests import models
from tests.families.rows import installed_rows
from tests.families.subject import Subject
from tests.quantization import families


def load(model, folder, **config):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=MoeBitsAndBytesConfig(**config))


@pytest.mark.parametrize("family", [*models.FAMILIES.values(), models.gpt_oss, models.qwen2_moe, models.nemotron_h])
def test_a_dense_model_is_counted_whole(family):
    model = family()
    census = quantization_census(model)
    tensors = [*model.parameters(), *model.buffers()]
    assert census.bytes == sum(tensor.nbytes for tensor in tensors)
    assert sum(row.weights for row in census.rows) == sum(tensor.numel() for tensor in tensors)
    experts = {name: value.nbytes for name, value in model.named_parameters() if ".experts." in name}
    biases = sum(size for name, size in experts.items() if name.endswith("_bias"))
    assert census.of("experts") == {"float32": sum(experts.values()) - biases}
    assert sum(census.of("expert_biases").values()) == biases


def test_a_storage_counts_whole_and_once():
    """Two views of 10 of one storage of 30 numbers, and the same parameter under another name."""
    model, numbers = torch.nn.Linear(2, 5, bias=False), torch.zeros(30)
    model.weight.data = numbers[:10].view(5, 2)
    model.register_buffer("also", numbers[10:20])
    model.register_parameter("again", model.weight)
    (row,) = quantization_census(model).rows
    assert (row.tensors, row.weights, row.bytes) == (2, 20, 30 * 4)


def test_biases_of_experts_are_not_experts(tmp_path):
    """So that nobody reads of experts in 32 bits where all their matrices are in 4."""
    census = quantization_census(load(models.gpt_oss(), tmp_path))
    assert set(census.of("experts")) == {"nf4"}
    assert set(census.of("expert_biases")) == {"float32"}
    assert "float32" not in census.summary()


@pytest.mark.parametrize("use_double_quant", [False, True])
def test_4_bit_tensors_count_with_their_scales(tmp_path, use_double_quant):
    # gate_up: 8 experts of 48 x 64 in blocks of 64, down: of 64 x 24; 3 layers. 8 experts x 4,608 weights / 2 bytes;
    # 72 blocks an expert, 576 a layer: 4 bytes each; or 1 each, with 4 bytes for every 256 of a stack (384 and 192
    # blocks: 2 and 1 groups) and 4 for the mean of each of its two stacks. A stack's table of 16 values, and of 256 for
    # its scales in 8 bits, of 4 bytes each.
    model = load(models.qwen3_moe(), tmp_path, bnb_4bit_use_double_quant=use_double_quant)
    scales = 576 + 4 * (2 + 1) + 4 * 2 + 2 * 4 * 256 if use_double_quant else 4 * 576
    tables = 2 * 4 * 16
    census = quantization_census(model)
    assert census.of("experts") == {"nf4": 3 * (8 * 4608 // 2 + scales + tables)}
    (row,) = [row for row in census.rows if row.role == "experts"]
    assert (row.tensors, row.weights) == (6, 3 * 8 * 4608)
    assert census.of("router") == {"float32": 3 * 8 * 64 * 4}
    assert set(census.of("attention")) == {"nf4"}


@pytest.mark.parametrize("name", ["Dbrx", "JetMoe", "Switch", "Nllb", "InklingForCausalLM"])
def test_experts_outside_transformers_interface(name):
    subject = Subject(next(row for row in installed_rows() if row.name.startswith(name)))
    model = quantize_experts_(subject.copy(), MoeBitsAndBytesConfig())
    packed = {name for name, weight in model.named_parameters() if is_packed(weight)}
    role_of = role_finder(model)
    roles = {name: role_of(name) for name, _ in model.named_parameters()}
    assert {name for name, role in roles.items() if role in ("experts", "shared_experts")} == packed
    assert {role for name, role in roles.items() if "shared" in name and name in packed} <= {"shared_experts"}
    routers = {name for name, role in roles.items() if role == "router"}
    assert len(routers) >= len(MoEModel.of(model).all_layers)
    assert set(quantization_census(model).of("experts")) == {"nf4"}


def test_every_role_of_a_vision_language_model_has_a_row(tmp_path):
    model = load(models.qwen3_vl_moe(), tmp_path)
    census = quantization_census(model)
    dtypes = {role: set(census.of(role)) for role in ("experts", "attention", "router", "embeddings", "head", "vision")}
    dense = {"float32"}
    quantised = {"nf4"}
    assert dtypes == {
        "experts": quantised,
        "attention": quantised,
        "router": dense,
        "embeddings": dense,
        "head": dense,
        "vision": dense,
    }
    vision = sum(value.nbytes for name, value in model.named_parameters() if ".visual." in name)
    buffers = sum(value.nbytes for name, value in model.named_buffers() if ".visual." in name)
    assert census.of("vision")["float32"] == vision + buffers


@pytest.mark.parametrize("family", families.LINEAR_ROUTERS)
def test_linear_routers_are_routers(family):
    model = families.LINEAR_ROUTERS[family]()
    linears = [
        module.weight.nbytes
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == models.NUM_EXPERTS
    ]
    assert quantization_census(model).of("router")["float32"] >= sum(linears) > 0


def test_shared_experts_and_their_gates_are_told_apart_from_routed_ones(tmp_path):
    census = quantization_census(load(models.qwen2_moe(), tmp_path))
    assert set(census.of("shared_experts")) == {"float32", "nf4"}, "the gate, and rows that are not whole blocks"
    assert set(census.of("experts")) == {"nf4"}


def test_an_adapter_is_a_role_of_its_own(tmp_path):
    model = load(models.qwen3_moe(), tmp_path)
    before = quantization_census(model)
    tuned = quantization_census(get_peft_model(model, OrdMoEConfig(r=4)))
    assert [row for row in tuned.rows if row.role != "adapter"] == before.rows
    assert [row.role for row in tuned.rows].count("adapter") == 1


def test_a_model_without_experts_is_counted_too():
    model = models.qwen3_dense()
    assert quantization_census(model).of("experts") == {}
    assert quantization_census(model).bytes == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def test_it_prints_as_a_table_and_as_a_line(tmp_path):
    census = quantization_census(load(models.qwen3_moe(), tmp_path))
    lines = str(census).splitlines()
    assert lines[0].split() == ["role", "dtype", "tensors", "weights", "bytes", "bits", "a", "weight"]
    assert lines[1].split() == ["experts", "nf4", "6", "110,592", "62,592", "4.53"]
    assert lines[-1].split()[0] == "all"
    assert "0.06 MB of experts in nf4" in census.summary()
    assert "\n" not in census.summary()
