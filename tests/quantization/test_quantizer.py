"""Loading in 4 bits through `from_pretrained`: what is packed, what is not, and what it computes."""

import hashlib

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.quantization.storage import expert_unpacker, is_packed, stack_unpacker
from tests import models


@pytest.fixture(params=[*models.FAMILIES, "gpt_oss"])
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    return {**models.FAMILIES, "gpt_oss": models.gpt_oss}[family]()


def load(model, folder, **config):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=MoeBitsAndBytesConfig(**config)).eval()


def dense_twin(model, packed):
    """`model` with the numbers that `packed` stands for."""
    for name, parameter in packed.named_parameters():
        if is_packed(parameter):
            dense = model.get_parameter(name)
            if dense.dim() == 3:
                unpack = expert_unpacker(parameter)
                dense.data = torch.stack([unpack(expert) for expert in range(len(dense))])
            else:
                dense.data = dequantize_4bit(parameter.data, parameter.quant_state)
    return model


@pytest.mark.parametrize("use_double_quant", [False, True])
def test_packs_experts_and_attention_alone_and_computes_with_them(model, batch, tmp_path, use_double_quant):
    packed = load(model, tmp_path, bnb_4bit_use_double_quant=use_double_quant)
    packed_names = {name for name, parameter in packed.named_parameters() if is_packed(parameter)}
    experts = {name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "experts" in name}
    attention = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".self_attn." in name
    }
    assert len(experts) == 2 * models.NUM_LAYERS
    assert len(attention) == 4 * models.NUM_LAYERS
    assert packed_names == experts | attention
    for name, parameter in packed.named_parameters():
        if name not in packed_names:
            assert torch.equal(parameter, model.get_parameter(name)), name
    with torch.no_grad():
        got, wanted = packed(**batch).logits, dense_twin(model, packed)(**batch).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_llm_int8_skip_modules_is_honoured(tmp_path):
    packed = load(models.qwen3_moe(), tmp_path, llm_int8_skip_modules=["model.layers.1.mlp.experts"])
    assert not is_packed(packed.get_parameter("model.layers.1.mlp.experts.down_proj"))
    assert is_packed(packed.get_parameter("model.layers.0.mlp.experts.down_proj"))


def test_the_callers_config_is_left_as_it_was(tmp_path):
    config = MoeBitsAndBytesConfig()
    before = config.to_dict()
    model = models.qwen3_moe()
    model.save_pretrained(tmp_path)
    type(model).from_pretrained(tmp_path, quantization_config=config)
    assert config.to_dict() == before


def test_only_experts_that_tokens_hit_are_unpacked(tmp_path, monkeypatch):
    from ordmoe_peft.experts import forward as experts_forward

    unpacked = []

    def counting(*args):
        unpack = stack_unpacker(*args)
        return lambda experts: unpacked.append(experts) or unpack(experts)

    monkeypatch.setattr(experts_forward, "stack_unpacker", counting)
    packed = load(models.qwen3_moe(), tmp_path)
    with torch.no_grad():
        packed(input_ids=torch.tensor([[5]]))
    # One token hits K experts; each layer has two projections.
    assert len(unpacked) == models.TOP_K * 2 * models.NUM_LAYERS


def test_training_and_evaluating_leaves_the_packed_bytes_alone(model, batch, tmp_path):
    packed = load(model, tmp_path)
    tuned = get_peft_model(packed, OrdMoEConfig(r=4, targets=["router", "experts", "attention"]))

    def digest() -> dict[str, str]:
        return {
            name: hashlib.sha256(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, parameter in tuned.named_parameters()
            if "lora_" not in name
        }

    before = digest()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        tuned.train()
        tuned(**batch).logits.square().mean().backward()
        optimizer.step()
        tuned.eval()
        with torch.no_grad():
            tuned(**batch)
    assert digest() == before
    assert any(is_packed(parameter) for parameter in tuned.parameters())


def test_linears_whose_rows_are_not_whole_blocks_stay_as_they_are(tmp_path):
    packed = load(models.qwen3_moe(hidden_size=96, head_dim=16), tmp_path)
    attention = packed.model.layers[0].self_attn
    assert not isinstance(attention.q_proj, Linear4bit), "rows of 96"
    assert isinstance(attention.o_proj, Linear4bit), "rows of 4 heads x 16 = 64"


def test_a_model_without_experts_is_refused(tmp_path):
    with pytest.raises(OrdMoEModelError, match="no MoE layers"):
        load(models.qwen3_dense(), tmp_path)


def test_linear4bit_layers_serve_a_shared_expert_gate_with_one_output(tmp_path):
    packed = load(models.qwen2_moe(), tmp_path)
    gates = [name for name, module in packed.named_modules() if name.endswith("shared_expert_gate")]
    assert gates
    assert not any(isinstance(packed.get_submodule(name), Linear4bit) for name in gates)
    with torch.no_grad():
        assert packed(**models.text_batch()).logits.isfinite().all()
