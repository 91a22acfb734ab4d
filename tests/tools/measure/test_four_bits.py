"""The comparison of a base with itself in 4 bits, against a reference that goes token by token."""

import json
import math
import weakref

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from transformers import AutoModelForCausalLM, JetMoeConfig, JetMoeForCausalLM

from ordmoe_peft import MoeBitsAndBytesConfig, quantize_experts_
from ordmoe_peft.data.samples import scoring_inputs
from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.moe_model import MoEModel
from ordmoe_peft.tools.measure.evaluation import evaluate_tiers
from ordmoe_peft.tools.measure.four_bits import FourBits, measure_four_bits
from tests import models, text


TOKENIZER, DATA = text.tokenizer(), text.conversations()


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A function that loads the same tiny base dense or in 4 bits; scores far apart make 4 bits change some choices."""
    folder = tmp_path_factory.mktemp("base")
    model = models.qwen3_moe()
    model.save_pretrained(folder)

    def load(in_4_bits: bool):
        return type(model).from_pretrained(folder, quantization_config=MoeBitsAndBytesConfig() if in_4_bits else None)

    return load


@pytest.fixture(scope="module")
def measured(load) -> FourBits:
    return measure_four_bits(load, TOKENIZER, DATA, batch_size=3)


def observed(model, sample) -> tuple[list, list, torch.Tensor, torch.Tensor]:
    """Router outputs and experts' arguments of each layer, logits and labels of one sample, without padding."""
    routed, given, hooks = [], [], []
    for layer in MoEModel.of(model).layers:
        hooks.append(layer.router.register_forward_hook(lambda _, __, output: routed.append(output)))
        hooks.append(layer.experts.register_forward_hook(lambda _, args, __: given.append(args)))
    inputs = scoring_inputs([sample], TOKENIZER)
    labels = inputs.pop("labels")[0]
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0]
    for hook in hooks:
        hook.remove()
    return routed, given, logits, labels


def test_routing_losses_and_next_tokens_are_those_of_a_slow_reference(load, measured):
    dense, packed = load(False), load(True)
    shared, equal, kl, losses, same = [[], [], []], [[], [], []], [[], [], []], [], []
    for sample in DATA:
        (routed, _, logits, labels), (other_routed, _, other_logits, _) = (
            observed(dense, sample),
            observed(packed, sample),
        )
        for layer, ((scores, _, chosen), (other_scores, _, other_chosen)) in enumerate(
            zip(routed, other_routed, strict=True)
        ):
            for token in range(len(scores)):
                both = set(chosen[token].tolist()) & set(other_chosen[token].tolist())
                shared[layer].append(len(both) / models.TOP_K)
                equal[layer].append(len(both) == models.TOP_K)
                p, q = scores[token].softmax(0).tolist(), other_scores[token].softmax(0).tolist()
                kl[layer].append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        places = [place for place in range(1, len(labels)) if labels[place] >= 0]
        of_sample = [
            [-row[place - 1].log_softmax(0)[labels[place]].item() for place in places] for row in (logits, other_logits)
        ]
        losses.append([sum(one) / len(one) for one in of_sample])
        same += [logits[place - 1].argmax() == other_logits[place - 1].argmax() for place in places]
    differences = [other - own for own, other in losses]
    mean = sum(differences) / len(DATA)
    variance = sum((one - mean) ** 2 for one in differences) / (len(DATA) - 1)

    assert 0 < sum(map(sum, equal)) < sum(map(len, equal)), "4 bits change some choices and keep others"
    for layer, found in enumerate(measured.layers):
        assert found.overlap == pytest.approx(sum(shared[layer]) / len(shared[layer]))
        assert found.all_shared == pytest.approx(sum(equal[layer]) / len(equal[layer]))
        assert found.kl == pytest.approx(sum(kl[layer]) / len(kl[layer]), rel=1e-3)
    assert measured.num_tokens == len(shared[0])
    assert (measured.num_samples, measured.num_answer_tokens) == (len(DATA), len(same))
    assert measured.dense_loss == pytest.approx(sum(own for own, _ in losses) / len(DATA), abs=1e-5)
    assert measured.difference == pytest.approx(mean, abs=1e-5)
    assert measured.loss == pytest.approx(measured.dense_loss + measured.difference, abs=1e-5)
    assert measured.stderr == pytest.approx(math.sqrt(variance / len(DATA)), abs=1e-5)
    assert measured.same_next_token == pytest.approx(sum(same).item() / len(same))
    (top,) = evaluate_tiers(dense, TOKENIZER, DATA, max_new_tokens=1)
    assert measured.dense_loss == pytest.approx(-top.log_likelihood, abs=1e-5), "scored as `evaluate` scores"


def test_errors_of_experts_are_those_of_a_slow_reference(load, measured):
    """Weights by the table of NF4 and the scale of each block; outputs by the packed experts' own forward."""
    dense, packed = load(False), load(True)
    code = get_4bit_type("nf4", device="cpu").data
    pairs = list(zip(MoEModel.of(dense).layers, MoEModel.of(packed).layers, strict=True))
    for found, (layer, _) in zip(measured.layers, pairs, strict=True):
        change, whole = 0.0, 0.0
        for stack in layer.stacks.values():
            for matrix in stack.detach():
                for block in matrix.reshape(-1, 64):
                    scale = block.abs().max()
                    nearest = code[(block[:, None] / scale - code).abs().argmin(1)] * scale
                    change, whole = change + (block - nearest).square().sum(), whole + block.square().sum()
        assert found.weight_error == pytest.approx(math.sqrt(change / whole), rel=1e-3)
        assert 0.05 < found.weight_error < 0.12, "NF4's error for normal numbers is about 9 %"
    changes, wholes = [0.0] * len(pairs), [0.0] * len(pairs)
    for sample in DATA.select(range(3)):  # the first batch
        _, given, _, _ = observed(dense, sample)
        for index, (arguments, (layer, other)) in enumerate(zip(given, pairs, strict=True)):
            with torch.no_grad():
                own, changed = (experts(*arguments) for experts in (layer.experts, other.experts))
            changes[index] += (own - changed).square().sum().item()
            wholes[index] += own.square().sum().item()
    expected = [math.sqrt(change / whole) for change, whole in zip(changes, wholes, strict=True)]
    assert [layer.output_error for layer in measured.layers] == pytest.approx(expected, rel=1e-3)
    assert (measured.dense_bits, measured.bits) == (32, pytest.approx(4.5, abs=0.05))


def test_one_model_is_in_memory_at_a_time_and_stays_as_it_was(load):
    first, dense = [], []

    def watched(in_4_bits):
        assert [one() for one in first] == [None] * len(first)
        model = load(in_4_bits)
        first.append(weakref.ref(model))
        if not in_4_bits:
            dense.append(model)
        return model

    measure_four_bits(watched, TOKENIZER, DATA.select(range(2)))
    fresh = load(False).state_dict()
    assert len(first) == 2
    assert all(torch.equal(value, fresh[name]) for name, value in dense[0].state_dict().items())


def test_the_result_is_plain_json_and_prints_as_two_tables(measured):
    result = measured.to_dict()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    whole, layers = measured.tables()
    assert list(whole.frame.columns) == ["", "float32", "4 bits", "difference ± s.e."]
    assert f"{measured.difference:+.4f} ± {measured.stderr:.4f}" in whole.texts().to_numpy()
    assert layers.texts()["layer"].tolist() == ["0", "1", "2", "mean"]
    assert layers.texts()["error of weights"].iloc[-1] == "9.2 %"
    assert "not compared" not in layers.note


def test_what_cannot_be_read_is_missing_and_named(tmp_path):
    """JetMoE's router gives its scores in no form that is known; its experts can be compared all the same."""
    config = JetMoeConfig(
        **models.TEXT,
        num_local_experts=models.NUM_EXPERTS,
        kv_channels=16,
        intermediate_size=models.EXPERT_WIDTH,
    )
    model = JetMoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    recipes = {True: MoeBitsAndBytesConfig(), False: None}
    result = measure_four_bits(
        lambda in_4_bits: type(model).from_pretrained(tmp_path, quantization_config=recipes[in_4_bits]), TOKENIZER, DATA
    )
    layer = result.layers[0]
    assert layer.weight_error > 0.05 < layer.output_error
    assert (layer.overlap, layer.all_shared, layer.kl) == (None, None, None)
    table = result.tables()[1]
    assert table.texts()["experts shared"].tolist() == ["—"] * len(table.frame)
    assert f"not compared in {len(result.layers)} layers; the first: model.layers.0.mlp.router (JetMoeTop" in table.note


@pytest.mark.parametrize(
    ("difference", "stderr", "words"),
    [
        (0.01, 0.004, "In 4 bits the loss is higher: +0.0100 ± 0.0040 nats per answer token."),
        (-0.01, 0.004, "In 4 bits the loss is lower: -0.0100 ± 0.0040"),
        (0.007, 0.004, "No difference in loss shown: +0.0070 ± 0.0040"),
        (0.007, None, "One sample says nothing"),
    ],
)
def test_a_verdict_claims_what_its_error_allows(measured, difference, stderr, words):
    settings = vars(measured) | {"difference": difference, "stderr": stderr}
    assert words in FourBits(**settings).verdict
    assert FourBits(**settings).tables()


def test_a_base_without_packed_experts_is_refused(load):
    with pytest.raises(OrdMoEModelError, match="No experts of Qwen3MoeForCausalLM are in 4 bits"):
        measure_four_bits(lambda in_4_bits: load(False), TOKENIZER, DATA)


def test_a_base_that_is_stored_in_4_bits_has_nothing_to_be_compared_with(tmp_path):
    quantize_experts_(models.qwen3_moe()).save_pretrained(tmp_path)
    with pytest.raises(OrdMoEModelError, match="is stored in 4 bits, so it has no dense form"):
        measure_four_bits(lambda _: AutoModelForCausalLM.from_pretrained(tmp_path), TOKENIZER, DATA)


def test_losses_that_are_not_finite_and_outputs_that_are_zero(tmp_path):
    model = models.qwen3_moe()
    model.model.layers[0].mlp.experts.down_proj.data.zero_()
    recipes = {True: MoeBitsAndBytesConfig(), False: None}

    def measure() -> FourBits:
        model.save_pretrained(tmp_path)
        return measure_four_bits(
            lambda in_4_bits: type(model).from_pretrained(tmp_path, quantization_config=recipes[in_4_bits]),
            TOKENIZER,
            DATA,
        )

    assert measure().layers[0].output_error == 0
    model.model.norm.weight.data[:] = torch.nan
    with pytest.raises(OrdMoEModelError, match="is nan dense and nan in 4 bits"):
        measure()
