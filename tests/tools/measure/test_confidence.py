"""Confident and fragile tokens, against each token alone in float64."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from ordmoe_peft import OrdMoEConfig, load_data, tier_routing
from ordmoe_peft.data.formats import as_prompt_completion
from ordmoe_peft.data.samples import scoring_inputs
from ordmoe_peft.tools.measure.confidence import AnswerScores, LikelihoodRecord, is_confident, mean_over_samples
from ordmoe_peft.tools.measure.evaluation import evaluate_tiers, score_answers
from tests import models, reference, text


BASE = "examples/easy_vqa/base"
NAN = float("nan")


def scaled(model, factor: float):
    """The model with logits that make it sure of some tokens of the data below, not of all."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model


# Name → model, tokenizer or processor, samples of unequal lengths.
CASES = {
    "text": (lambda: scaled(models.qwen3_moe(), 4), text.tokenizer, lambda: text.conversations(7)),
    "no prompts": (
        lambda: scaled(models.qwen3_moe(), 4),
        text.tokenizer,
        lambda: Dataset.from_dict({"text": ["w10 w20 w30 w40 w50", "w60 w70", "w80 w11 w21"]}),
    ),
    "images": (
        lambda: scaled(AutoModelForImageTextToText.from_pretrained(BASE), 0.5),
        lambda: AutoProcessor.from_pretrained(BASE),
        lambda: load_data("examples/quickstart/test.jsonl").select(range(0, 20, 4)),
    ),
}


def each_token_alone(model, processing_class, dataset, tiers):
    """Means over confident and over fragile tokens by tier and sample (`(2, C, n)`), and the number of confident."""
    means_nC2, count = [], 0
    for sample in as_prompt_completion(dataset, needs_answers=True):
        inputs = scoring_inputs([sample], processing_class)
        label_S = inputs.pop("labels")[0, 1:].tolist()
        logits = {}
        for tier in tiers:
            with torch.no_grad(), tier_routing(model, tier):
                logits[tier] = model(**inputs).logits[0, :-1]
        classes = [reference.likelihood_by_class(logits[tier], logits[1], label_S) for tier in tiers]
        means_nC2.append([[sum(part) / len(part) if part else NAN for part in of_tier] for of_tier in classes])
        count += len(classes[0][0])
    return torch.tensor(means_nC2).permute(2, 1, 0), count


@pytest.mark.parametrize("has_adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("case", CASES)
def test_likelihoods_are_those_of_each_token_alone(case, has_adapter):
    model, processing_class, dataset = (make() for make in CASES[case])
    if has_adapter:
        model = get_peft_model(model, OrdMoEConfig(r=4)).eval()
        models.randomize_adapter(model)
    record, tiers = LikelihoodRecord(), (1, 2, 3)
    evaluated = (model, processing_class, dataset, tiers)
    results = evaluate_tiers(*evaluated, batch_size=3, max_new_tokens=1, on_scores=record.add)
    expected_2Cn, confident = each_token_alone(*evaluated)
    assert 0 < confident < record.num_tokens
    assert record.confident_share == confident / record.num_tokens
    likelihoods_4Cn = record.likelihoods()
    torch.testing.assert_close(likelihoods_4Cn[2:], expected_2Cn, rtol=0, atol=1e-4, equal_nan=True)
    assert likelihoods_4Cn[0].tolist() == [result.items.log_likelihood for result in results]
    assert likelihoods_4Cn[1].tolist() == [result.items.log_likelihood_no_eos for result in results]


def test_every_token_of_a_text_without_prompts_is_in_a_class():
    """The first of five, two and three words has nothing before it; `</s>` comes last, and counts."""
    model, processing_class, dataset = (make() for make in CASES["no prompts"])
    scores = score_answers(model, processing_class, list(as_prompt_completion(dataset, needs_answers=True)))
    record = LikelihoodRecord()
    record.add(1, scores)
    assert record.num_tokens == sum(len(row.split()) for row in dataset["text"])
    assert not (record.confident[0] & ~scores.mask_BS).any()


def test_half_of_the_probability_is_not_more_than_all_others():
    """Half and half; a bit more than half; a third each; more than half at a position that predicts no answer."""
    logits_SV = torch.tensor([[0.0, 0, -200], [0, 0.01, -200], [0, 0, 0], [5, 0, 0]])
    mask_BS = torch.tensor([[True, True, True, False]])
    for dtype in (torch.float32, torch.bfloat16):
        assert is_confident(logits_SV[None].to(dtype), mask_BS).tolist() == [[False, True, False, False]]


def test_tier_1_decides_for_all_tiers_and_classes_without_tokens_are_nan():
    """Three answers of two tokens: one of each class, fragile alone, confident alone."""
    mask_BS = torch.tensor([[False, True, True]] * 3)
    confident_BS = torch.tensor([[False, True, False], [False, False, False], [True, True, True]])
    record = LikelihoodRecord()
    for tier in (1, 2):
        log_probs_BS = tier * torch.tensor([[-9.0, -1, -3], [-9, -1, -3], [-9, -1, -3]])
        record.add(tier, AnswerScores(log_probs_BS, mask_BS, mask_BS, (confident_BS & mask_BS) if tier == 1 else None))
    confident_Cn, fragile_Cn = record.likelihoods()[2:]
    torch.testing.assert_close(confident_Cn, torch.tensor([[-1, NAN, -2], [-2, NAN, -4]]), equal_nan=True)
    torch.testing.assert_close(fragile_Cn, torch.tensor([[-3, -2, NAN], [-6, -4, NAN]]), equal_nan=True)
    assert (record.num_tokens, record.confident_share) == (6, 0.5)


def test_means_are_over_the_samples_that_have_a_value():
    assert mean_over_samples(torch.tensor([-1.0, NAN, -4.0])) == pytest.approx(-2.5)
    assert mean_over_samples(torch.tensor([NAN, NAN])) is None
