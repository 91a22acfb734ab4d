"""`save_pretrained` of a model in 4 bits and `from_pretrained` of that folder: the same bytes, the same logits."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.quantizers.auto import AutoQuantizationConfig

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantize_experts_
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.quantization import quantizer, storage
from ordmoe_peft.quantization.storage import is_packed
from tests import models


FAMILIES = models.FAMILIES | {
    "gpt_oss": models.gpt_oss,
    "nemotron_h": models.nemotron_h,
    "openai_privacy_filter": models.openai_privacy_filter,
    "qwen2_moe": models.qwen2_moe,
}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    return FAMILIES[family]()


def quantised(model, folder, **config):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=MoeBitsAndBytesConfig(**config))


def reloaded(model, folder, **arguments):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, **arguments)


def tensors(model) -> dict[str, torch.Tensor]:
    """All that a saved model consists of."""
    return model.hf_quantizer.get_state_dict_and_metadata(model)[0]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_same(one, other, batch):
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        # By byte: some bytes, seen as numbers, are no number.
        assert torch.equal(as_bytes(tensor), as_bytes(theirs[name])), name
    # Not to the bit: products differ in the last one by where in memory a file's tensors happen to lie.
    with torch.no_grad():
        torch.testing.assert_close(one(**batch).logits, other(**batch).logits)


@pytest.fixture
def no_packing(monkeypatch):
    """Fail where something is quantised."""

    def refuse(*args, **kwargs):
        raise AssertionError("quantised anew")

    def start():
        monkeypatch.setattr(quantizer, "pack_experts", refuse)
        monkeypatch.setattr(storage.bnb_functional, "quantize_4bit", refuse)

    return start


@pytest.mark.parametrize(
    "config", [{}, {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "fp4"}], ids=["nf4", "fp4, double"]
)
def test_reloads_to_the_byte_in_every_layout(model, batch, tmp_path, no_packing, config):
    packed = quantised(model, tmp_path / "dense", **config)
    no_packing()
    again = reloaded(packed, tmp_path / "packed")
    assert sum(is_packed(parameter) for parameter in again.parameters()) > 2 * models.NUM_LAYERS
    assert_same(packed, again, batch)
    # And what was reloaded is saved like what was quantised.
    assert_same(packed, reloaded(again, tmp_path / "again"), batch)


@pytest.mark.parametrize("family", ["qwen3_moe"])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("storage_dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reloads_to_the_byte_in_every_dtype(batch, tmp_path, dtype, storage_dtype, blocksize):
    # Experts of 40 x 48 and 40 x 24 weights are not whole blocks.
    model = models.qwen3_moe(hidden_size=40, moe_intermediate_size=24).to(dtype)
    packed = quantised(
        model,
        tmp_path / "dense",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage_dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_blocksize=blocksize,
    )
    again = reloaded(packed, tmp_path / "packed")
    assert again.model.layers[0].mlp.experts.down_proj.dtype == storage_dtype
    assert again.model.layers[0].mlp.experts.down_proj.quant_state.blocksize == blocksize
    assert_same(packed, again, batch)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gpt_oss"])
def test_experts_quantised_in_place_reload_to_the_byte(model, batch, tmp_path, caplog):
    quantize_experts_(model)
    assert_same(model, reloaded(model, tmp_path), batch)
    assert "no linear modules were found" not in caplog.text


def test_shards_are_respected(tmp_path):
    packed = quantised(models.qwen3_moe(), tmp_path / "dense")
    packed.save_pretrained(tmp_path / "packed", max_shard_size="30KB")
    shards = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= 30_000 for shard in shards)
    index = json.loads((tmp_path / "packed" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(packed).keys()
    assert_same(packed, type(packed).from_pretrained(tmp_path / "packed"), models.text_batch())


def test_the_saved_config_says_what_the_model_is(tmp_path):
    packed = quantised(models.qwen3_moe(), tmp_path / "dense", bnb_4bit_compute_dtype=torch.bfloat16)
    again = reloaded(packed, tmp_path / "packed")
    said = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "ordmoe_peft"
    assert said["bnb_4bit_quant_type"] == "nf4"
    assert said["bnb_4bit_compute_dtype"] == "bfloat16"
    assert said["llm_int8_skip_modules"] == ["lm_head"]
    assert isinstance(again.config.quantization_config, MoeBitsAndBytesConfig)
    assert again.config.quantization_config.to_dict() == said
    assert again.is_quantized


def test_a_config_survives_both_spellings():
    config = MoeBitsAndBytesConfig(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
    said = config.to_dict()
    assert "load_in_4bit" not in said
    for spelling in (said, said | {"load_in_4bit": True, "load_in_8bit": False}):
        assert MoeBitsAndBytesConfig.from_dict(spelling).to_dict() == said
    assert type(AutoQuantizationConfig.from_dict(said)) is MoeBitsAndBytesConfig
    assert "fp4" in repr(config)
    assert json.loads(config.to_json_string())["bnb_4bit_quant_type"] == "fp4"


def test_a_reloaded_base_takes_the_adapter_of_the_first(tmp_path):
    packed = quantised(models.qwen3_moe(), tmp_path / "dense", bnb_4bit_use_double_quant=True)
    packed.save_pretrained(tmp_path / "packed")
    tuned = get_peft_model(packed, OrdMoEConfig(r=4))
    models.randomize_adapter(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    base = type(models.qwen3_moe()).from_pretrained(tmp_path / "packed")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    batch = models.text_batch()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, tuned(**batch).logits)
        with again.disable_adapter():
            assert not torch.allclose(again(**batch).logits, tuned(**batch).logits, atol=0.01)


def test_what_is_not_packed_takes_the_dtype_asked_for(tmp_path):
    packed = quantised(models.qwen3_moe(), tmp_path / "dense")
    again = reloaded(packed, tmp_path / "packed", dtype=torch.bfloat16)
    for name, parameter in again.named_parameters():
        expected = packed.get_parameter(name)
        if is_packed(expected):
            assert torch.equal(parameter, expected)
        else:
            assert torch.equal(parameter, expected.to(torch.bfloat16)), name


@pytest.mark.parametrize("in_place", [False, True], ids=["loaded", "in place"])
def test_a_model_without_its_head_reloads_too(tmp_path, in_place):
    skip = ["model.layers.1.mlp.experts"]
    if in_place:
        packed = quantize_experts_(models.qwen3_moe(), MoeBitsAndBytesConfig(llm_int8_skip_modules=skip))
    else:
        packed = quantised(models.qwen3_moe(), tmp_path / "dense", llm_int8_skip_modules=skip)
    packed.save_pretrained(tmp_path / "packed")
    body = AutoModel.from_pretrained(tmp_path / "packed")
    batch = models.text_batch()
    with torch.no_grad():
        torch.testing.assert_close(body(**batch).last_hidden_state, packed.model(**batch).last_hidden_state)


@pytest.mark.parametrize("lost", ["mlp.experts.down_proj", "mlp.experts.down_proj.", "self_attn.q_proj.weight."])
def test_a_checkpoint_with_a_hole_is_refused_by_name(tmp_path, lost):
    quantised(models.qwen3_moe(), tmp_path / "dense").save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    with safe_open(file, "pt") as saved:
        kept = {key: saved.get_tensor(key) for key in saved.keys() if f"layers.1.{lost}" not in key}  # noqa: SIM118
    save_file(kept, file, metadata={"format": "pt"})
    name = f"model.layers.1.{lost}".removesuffix(".")
    with pytest.raises(OrdMoEModelError, match=rf"{name} was to be loaded in 4 bits but is"):
        type(models.qwen3_moe()).from_pretrained(tmp_path / "packed")


PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, batch, logits = sys.argv[1], torch.load(sys.argv[2]), torch.load(sys.argv[3])
try:
    AutoModelForCausalLM.from_pretrained(folder)
except RuntimeError as error:
    print("without:", error)
import ordmoe_peft
with torch.no_grad():
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    print("with:", (reloaded(**batch).logits - logits).abs().max().item())
"""


def test_a_new_process_needs_the_package_and_says_so(tmp_path):
    packed = quantised(models.qwen3_moe(), tmp_path / "dense", bnb_4bit_use_double_quant=True)
    packed.save_pretrained(tmp_path / "packed")
    batch = models.text_batch()
    with torch.no_grad():
        torch.save(packed(**batch).logits, tmp_path / "logits.pt")
    torch.save(batch, tmp_path / "batch.pt")
    arguments = [tmp_path / "packed", tmp_path / "batch.pt", tmp_path / "logits.pt"]
    result = subprocess.run([sys.executable, "-c", PROCESS, *arguments], capture_output=True, text=True)
    assert "Unknown quantization type, got ordmoe_peft" in result.stderr, result.stderr
    without, with_package = result.stdout.splitlines()
    assert without.startswith("without: ")
    # The bytes are the same; where they lie in memory decides on the last bits of products.
    assert float(with_package.removeprefix("with: ")) < 1e-5
