import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import cosine_similarity

from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.quantization.storage import expert_unpacker, is_packed
from ordmoe_peft.tools.measure.diversity import expert_outputs, mean_pairwise_cosine
from ordmoe_peft.tools.measure.observation import outer_experts
from tests import models, reference


FAMILIES = {"qwen3_moe": models.qwen3_moe, "gpt_oss": models.gpt_oss, "qwen3_vl_moe": models.qwen3_vl_moe}
INDEX = torch.tensor([[0, 3, 5], [7, 1, 0], [2, 6, 4], [3, 0, 5]])


def test_cosines_by_hand():
    """Unit vectors at 0°, 60° and 90°, whatever their length: cosines ½, 0 and √3/2."""
    directions = torch.tensor([[[1.0, 0], [0.5, 3**0.5 / 2], [0, 1]]])
    lengths = torch.tensor([[[2.0], [0.1], [30]]])
    assert mean_pairwise_cosine(directions * lengths) == pytest.approx((0.5 + 0 + 3**0.5 / 2) / 3)


def test_cosines_are_averaged_over_tokens():
    """A token whose two experts agree and one whose experts are opposed."""
    agreed, opposed = torch.tensor([[1.0, 2], [2, 4]]), torch.tensor([[1.0, 2], [-1, -2]])
    assert mean_pairwise_cosine(torch.stack([agreed, opposed, agreed, agreed])) == pytest.approx(0.5)


def test_one_expert_has_no_pair():
    assert mean_pairwise_cosine(torch.randn(3, 1, 4)) is None


def dense_weights(outer, layer) -> dict[str, torch.Tensor]:
    """The stacks that the experts stand for: unpacked, and with what PEFT says their adapter adds."""
    weights = {}
    for name in layer.projections:
        weight = getattr(layer.experts, name)
        unpack = expert_unpacker(weight) if is_packed(weight) else weight.__getitem__
        weights[name] = torch.stack([unpack(expert) for expert in range(layer.num_experts)])
    while outer is not layer.experts:
        weights[outer.parameter_name] = weights[outer.parameter_name] + outer.get_delta_weight("default")
        outer = outer.base_layer
    return weights


@pytest.mark.parametrize("has_lora", [False, True], ids=["base", "LoRA"])
@pytest.mark.parametrize("is_4bit", [False, True], ids=["dense", "4-bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_a_loop_over_experts(family, is_4bit, has_lora, tmp_path):
    model = FAMILIES[family]()
    if is_4bit:
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path, quantization_config=MoeBitsAndBytesConfig()).eval()
    if has_lora:
        model = get_peft_model(model, OrdMoEConfig(r=6, lora_alpha=4)).eval()
        models.randomize_adapter(model)
    layer = MoEModel.of(model).layers[1]
    outer = outer_experts(model, layer)
    tokens = torch.randn(len(INDEX), models.HIDDEN_SIZE)
    with torch.no_grad():
        got = expert_outputs(outer, tokens, INDEX)
        weights = dense_weights(outer, layer)
        for place in range(INDEX.shape[1]):
            alone = reference.experts(layer.experts, tokens, INDEX[:, place : place + 1], torch.ones(4, 1), weights)
            torch.testing.assert_close(got[:, place], alone, rtol=1e-3, atol=1e-4)
    pairs = [(0, 1), (0, 2), (1, 2)]
    slow = [cosine_similarity(token[a], token[b], dim=0).item() for token in got for a, b in pairs]
    assert mean_pairwise_cosine(got) == pytest.approx(sum(slow) / len(slow), abs=1e-5)


def test_identical_experts_are_alike():
    model = models.qwen3_moe()
    experts = MoEModel.of(model).layers[0].experts
    tokens = torch.randn(len(INDEX), models.HIDDEN_SIZE)
    with torch.no_grad():
        assert mean_pairwise_cosine(expert_outputs(experts, tokens, INDEX)) < 0.5
        for stack in (experts.gate_up_proj, experts.down_proj):
            stack[:] = stack[:1].clone()
        assert mean_pairwise_cosine(expert_outputs(experts, tokens, INDEX)) == pytest.approx(1)
