"""Confident and fragile tokens, against each token alone in float64."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from ordmoe_peft import OrdMoEConfig, load_data, tier_routing
from ordmoe_peft.data.formats import as_prompt_completion
from ordmoe_peft.data.samples import scoring_inputs
from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.tools.measure import evaluation
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
    has_tokens_4n = record.has_tokens()
    assert has_tokens_4n[:2].all()
    found_2Cn = likelihoods_4Cn[2:].masked_fill(~has_tokens_4n[2:, None], NAN)
    torch.testing.assert_close(found_2Cn, expected_2Cn, rtol=0, atol=1e-4, equal_nan=True)
    assert likelihoods_4Cn[0].tolist() == [result.items.log_likelihood for result in results]
    assert likelihoods_4Cn[1].tolist() == [result.items.log_likelihood_no_eos for result in results]


def test_every_token_of_a_text_without_prompts_is_in_a_class():
    """The first of five, two and three words has nothing before it; `</s>` comes last, and counts."""
    model, processing_class, dataset = (make() for make in CASES["no prompts"])
    samples = list(as_prompt_completion(dataset, needs_answers=True))
    scores = score_answers(model, processing_class, samples, finds_confident=True)
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


def test_tier_1_decides_for_all_tiers_and_which_classes_have_tokens():
    """Three answers of two tokens: one of each class, fragile alone, confident alone."""
    mask_BS = torch.tensor([[False, True, True]] * 3)
    confident_BS = torch.tensor([[False, True, False], [False, False, False], [True, True, True]])
    record = LikelihoodRecord()
    for tier in (1, 2):
        log_probs_BS = tier * torch.tensor([[-9.0, -1, -3], [-9, -1, -3], [-9, -1, -3]])
        record.add(tier, AnswerScores(log_probs_BS, mask_BS, mask_BS, (confident_BS & mask_BS) if tier == 1 else None))
    confident_Cn, fragile_Cn = record.likelihoods()[2:]
    assert confident_Cn.tolist() == [[-1, 0, -2], [-2, 0, -4]]
    assert fragile_Cn.tolist() == [[-3, -2, 0], [-6, -4, 0]]
    assert record.has_tokens().tolist() == [[True] * 3, [True] * 3, [True, False, True], [True, True, False]]
    assert (record.num_tokens, record.confident_share) == (6, 0.5)


def test_a_token_that_is_not_a_number_stays_in_its_class():
    """Of three answers with a confident and a fragile token each, one has NaN in the first and one in the second."""
    log_probs_BS, mask_BS = torch.tensor([[NAN, -2.0], [-1, NAN], [-1, -2]]), torch.ones(3, 2, dtype=torch.bool)
    confident_BS = torch.tensor([[True, False]] * 3)
    record = LikelihoodRecord()
    record.add(1, AnswerScores(log_probs_BS, mask_BS, mask_BS, confident_BS))
    expected_21n = torch.tensor([[[NAN, -1, -1]], [[-2, NAN, -2]]])
    torch.testing.assert_close(record.likelihoods()[2:], expected_21n, equal_nan=True)
    assert record.has_tokens().all()
    assert not is_confident(torch.tensor([[[NAN, 9.0, 0]]]), mask_BS[:1, :1]).any()


def test_a_batch_of_a_lower_tier_needs_the_one_of_tier_1():
    """Before any batch of tier 1, before the same batch of it, and where tier 1's scores do not say what is sure."""
    mask_BS = torch.ones(1, 2, dtype=torch.bool)
    silent, sure = (AnswerScores(-mask_BS.float(), mask_BS, mask_BS, confident_BS) for confident_BS in (None, mask_BS))
    record = LikelihoodRecord()
    for batch in (1, 2):
        for tier in (2, 1):
            with pytest.raises(OrdMoEConfigError, match=f"Tier {tier}'s scores of batch {batch} came before tier 1"):
                record.add(tier, silent)
        record.add(1, sure)
        record.add(2, silent)
    assert record.likelihoods().shape == (4, 2, 2)


def test_what_is_confident_costs_only_those_who_read_it(monkeypatch):
    calls = []
    monkeypatch.setattr(evaluation, "is_confident", lambda *args: calls.append(1) or is_confident(*args))
    settings = {"batch_size": 2, "max_new_tokens": 1}
    evaluated = (models.qwen3_moe(), text.tokenizer(), text.conversations(4), (1, 2))
    evaluate_tiers(*evaluated, **settings)
    score_answers(*evaluated[:2], list(evaluated[2]))
    assert not calls
    evaluate_tiers(*evaluated, on_scores=lambda tier, scores: None, **settings)
    assert len(calls) == 2, "once for each batch under tier 1"


def test_means_over_samples():
    assert mean_over_samples(torch.tensor([-1.0, -4.0])) == -2.5
    assert mean_over_samples(torch.tensor([])) is None
