"""What `from_pretrained` packs: on-disk forms, layouts, settings, names to skip, and what never is."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import nn

from ordmoe_peft import MoeBitsAndBytesConfig, quantize_experts_
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.quantization.storage import expert_unpacker, is_packed, pack_experts
from tests import models
from tests.families.rows import installed_rows
from tests.families.subject import Subject, relative_error
from tests.quantization import families
from tests.quantization.test_quantizer import dense_twin


STACK_ENDINGS = (".experts.gate_up_proj", ".experts.up_proj", ".experts.down_proj")
STACK = "model.layers.1.mlp.experts.gate_up_proj"


def load(model, folder, dtype=None, **config):
    return type(model).from_pretrained(folder, dtype=dtype, quantization_config=MoeBitsAndBytesConfig(**config)).eval()


def save_fused(model, folder) -> None:
    """A checkpoint of two shards with the model's own names: experts are fused on disk."""
    model.config.save_pretrained(folder)
    state = model.state_dict()
    shards = {f"model-{half}.safetensors": list(state)[half::2] for half in range(2)}
    for file, names in shards.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("form", ["per expert", "fused"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_both_forms_on_disk_give_the_bytes_of_packing_in_memory(tmp_path, form, quant_type):
    model = models.qwen3_moe()
    if form == "fused":
        save_fused(model, tmp_path)
    else:
        model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    names = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert (STACK in names) == (form == "fused")
    packed = load(model, tmp_path, bnb_4bit_quant_type=quant_type).get_parameter(STACK)
    wanted = pack_experts(model.get_parameter(STACK).data, STACK, quant_type)
    assert torch.equal(packed.data, wanted.data)
    assert torch.equal(packed.quant_state.absmax, wanted.quant_state.absmax)
    assert packed.quant_state.code.equal(wanted.quant_state.code)


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("use_double_quant", [False, True])
def test_compute_dtype_and_double_quantisation_are_those_asked_for(tmp_path, compute_dtype, use_double_quant):
    model = models.qwen3_moe()
    model.save_pretrained(tmp_path)
    loaded = load(
        model,
        tmp_path,
        dtype=compute_dtype,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=use_double_quant,
    )
    packed = loaded.get_parameter(STACK)
    assert packed.quant_state.nested == use_double_quant
    assert expert_unpacker(packed)(0).dtype == compute_dtype
    with torch.no_grad():
        logits = loaded(**models.text_batch()).logits
    assert logits.dtype == compute_dtype
    assert logits.isfinite().all()


def test_block_size_is_that_of_stacks_and_for_linears_the_largest_that_divides_their_rows(tmp_path):
    model = models.qwen3_moe(hidden_size=192, head_dim=64, moe_intermediate_size=64)
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path, bnb_4bit_blocksize=256)
    assert loaded.get_parameter(STACK).quant_state.blocksize == 256
    attention = loaded.model.layers[0].self_attn
    assert attention.q_proj.weight.quant_state.blocksize == 64, "rows of 192"
    assert attention.o_proj.weight.quant_state.blocksize == 256, "rows of 256"
    with torch.no_grad():
        assert loaded(**models.text_batch()).logits.isfinite().all()


LAYOUTS = {
    "odd sizes": lambda: models.qwen3_moe(hidden_size=40, moe_intermediate_size=9),
    "transposed, biases, odd": lambda: models.gpt_oss(hidden_size=72, intermediate_size=9),
    "no gate": models.nemotron_h,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_packed_and_computes_with_what_it_unpacks_to(layout, tmp_path):
    model = LAYOUTS[layout]()
    stacks = {name: value.detach().clone() for name, value in model.named_parameters() if name.endswith(STACK_ENDINGS)}
    assert stacks
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path)
    model = dense_twin(model, loaded)
    model.set_experts_implementation("eager")  # odd sizes are beyond grouped_mm
    for name, stack in stacks.items():
        unpacked = model.get_parameter(name)
        assert loaded.get_parameter(name).quant_state.shape == unpacked.shape == stack.shape
        assert (unpacked - stack).abs().mean() < 0.15 * stack.abs().mean()
    batch = models.text_batch()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("skipped", "stays"),
    [
        (
            "model.layers.1.mlp.experts",
            {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"},
        ),
        ("model.layers.1", {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}),
        (STACK, {STACK}),
        ("experts.down_proj", {f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(models.NUM_LAYERS)}),
        (
            r"model\.layers\.[12]\.mlp\.experts\.down_proj",
            {f"model.layers.{layer}.mlp.experts.down_proj" for layer in (1, 2)},
        ),
    ],
)
def test_names_to_skip_follow_transformers_rules(tmp_path, skipped, stays):
    model = models.qwen3_moe()
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path, llm_int8_skip_modules=[skipped])
    stacks = {name: parameter for name, parameter in loaded.named_parameters() if ".experts." in name}
    assert {name for name, parameter in stacks.items() if not is_packed(parameter)} == stays
    for name in stays:
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    skips_attention = skipped == "model.layers.1"
    assert isinstance(loaded.model.layers[1].self_attn.q_proj, Linear4bit) != skips_attention
    with torch.no_grad():
        assert loaded(**models.text_batch()).logits.isfinite().all()


@pytest.mark.parametrize("family", families.LINEAR_ROUTERS)
def test_routers_that_are_linear_layers_stay_as_they_are(family, tmp_path):
    model = families.LINEAR_ROUTERS[family]()
    routers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == models.NUM_EXPERTS
    ]
    assert routers
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path)
    for name in routers:
        assert torch.equal(loaded.get_submodule(name).weight, model.get_submodule(name).weight)
    assert any(isinstance(module, Linear4bit) for module in loaded.modules())
    with torch.no_grad():
        assert loaded(**models.text_batch()).logits.isfinite().all()


@pytest.mark.parametrize("name", ["Llama4ForCausalLM", "Dbrx", "Inkling", "Switch"])
def test_experts_outside_transformers_interface(name, tmp_path):
    subject = Subject(next(row for row in installed_rows() if row.name.startswith(name)))
    subject.model.save_pretrained(tmp_path / "dense")
    model = load(subject.model, tmp_path / "dense").eval()
    in_memory = quantize_experts_(subject.copy())
    packed = {name for name, weight in in_memory.named_parameters() if is_packed(weight)}
    assert packed
    for name in packed:
        loaded, wanted = (each.get_parameter(name).data.view(torch.uint8) for each in (model, in_memory))
        assert torch.equal(loaded, wanted), name
    wanted = subject.logits(model)
    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(subject.logits(again), wanted)
    assert relative_error(subject.logits(again.dequantize()), wanted) < 1e-4


class ExpertsWithoutRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 64, 64))


class ExpertLinear(nn.Linear):
    """A linear layer that transformers does not replace, since what it computes is unknown."""


@pytest.mark.parametrize("kind", [ExpertsWithoutRouter, lambda: ExpertLinear(64, 64)], ids=["stack", "linear layer"])
def test_experts_that_are_not_understood_are_refused_by_name(kind):
    model = models.qwen3_moe()
    model.model.layers[1].more = kind()
    before = [id(weight) for weight in model.parameters()]
    with pytest.raises(OrdMoEModelError, match=r"layers\.1\.more \(Expert\w+\) cannot be packed"):
        quantize_experts_(model)
    assert [id(weight) for weight in model.parameters()] == before
    quantize_experts_(model, MoeBitsAndBytesConfig(llm_int8_skip_modules=["model.layers.1.more"]))


def test_a_checkpoint_without_a_stack_is_an_error_that_names_it(tmp_path):
    model = models.qwen3_moe()
    save_fused(model, tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        save_file({name: value for name, value in load_file(file).items() if name != STACK}, file, {"format": "pt"})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"][STACK]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OrdMoEModelError, match=rf"{STACK} was to be loaded in 4 bits.*missing"):
        load(model, tmp_path)


def test_a_dtype_that_bitsandbytes_does_not_pack_is_refused_before_loading(tmp_path):
    model = models.qwen3_moe().double()
    model.save_pretrained(tmp_path)
    with pytest.raises(OrdMoEModelError, match=r"down_proj is torch\.float64.*load the model in bfloat16"):
        load(model, tmp_path)
    assert is_packed(load(model, tmp_path, dtype=torch.float32).get_parameter(STACK))
