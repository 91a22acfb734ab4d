"""Accuracy and likelihood on held-out samples, tier by tier."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...data.generation import evaluation_mode
from ...data.responses import IGNORED_LABEL, content_mask, end_of_sequence_ids
from ...data.rows import check_fits, check_samples
from ...data.samples import (
    ProcessingClass,
    answer_text,
    check_counts,
    prompt_inputs,
    sample_batches,
    scoring_inputs,
)
from ...objectives.expert_rank import label_log_probs, mean_log_likelihood
from ...tiers.routing import adapter_config, tier_routing
from ...tiers.scope import tiers_of_labels, tiers_of_prompts


OVERALL = "overall"


@dataclass
class TierItems:
    """What one tier does with each sample, in the data set's order.

    Args:
        answers (`list[str]`): generated answers.
        is_right (`list[bool]`): whether they match the reference exactly.
        log_likelihood (`list[float]`), log_likelihood_no_eos (`list[float]`): mean log-probability per token of the
            reference answer, in nats, with and without end-of-sequence tokens.
    """

    answers: list[str] = field(default_factory=list)
    is_right: list[bool] = field(default_factory=list)
    log_likelihood: list[float] = field(default_factory=list)
    log_likelihood_no_eos: list[float] = field(default_factory=list)


@dataclass
class TierResult:
    """What one tier does on a data set.

    Args:
        tier (`int`): the tier, from 1.
        accuracy (`dict[str, float]`): share of generated answers that match exactly, overall and per group.
        samples (`dict[str, int]`): number of samples, likewise.
        log_likelihood (`float`): mean over samples of the mean log-probability per answer token, in nats.
        log_likelihood_no_eos (`float`): the same without end-of-sequence tokens.
        items (`TierItems`): what the means are of, sample by sample.
    """

    tier: int
    accuracy: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    log_likelihood: float = float("nan")
    log_likelihood_no_eos: float = float("nan")
    items: TierItems = field(default_factory=TierItems)

    to_dict = asdict


def evaluate_tiers(
    model: nn.Module,
    processing_class: ProcessingClass,
    dataset: Any,
    tiers: Sequence[int] = (1,),
    *,
    group_by: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    **routing: Any,
) -> list[TierResult]:
    """Answer and score every sample of `dataset` under each of `tiers`.

    Args:
        model (`nn.Module`): a MoE model, wrapped by PEFT or not.
        processing_class: its tokenizer or processor.
        dataset ([`~datasets.Dataset`]): samples in TRL's prompt-completion format.
        tiers (sequence of `int`, defaults to `(1,)`): tiers to evaluate; 1 is the model as it is.
        group_by (`str`, *optional*): a column whose values get an accuracy of their own.
        batch_size (`int`, defaults to 32): samples at a time.
        max_new_tokens (`int`, defaults to 32): longest answer to generate, greedily.
        routing: settings for [`~ordmoe_peft.tier_routing`], e.g. `num_tiers`.

    Raises:
        [`OrdMoEConfigError`]: `batch_size` or `max_new_tokens` below 1, or tiers that do not fit the model.
        [`OrdMoEDataError`]: the data set has no samples, prompts, answers or `group_by` column; a row has no text; all
            answers are empty; a sample has more tokens than the model has positions.
    """
    check_samples(dataset, group_by)
    check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens)
    results = [_TierTally(tier) for tier in tiers]
    total = len(dataset) * len(tiers)
    with evaluation_mode(model), tqdm(total=total, desc="Evaluating", unit="sample") as bar:
        for samples in sample_batches(dataset, batch_size):
            groups = [str(sample[group_by]) for sample in samples] if group_by else None
            for result in results:
                answers = generate_answers(
                    model, processing_class, samples, max_new_tokens, tier=result.tier, **routing
                )
                likelihood, no_eos = score_answers(model, processing_class, samples, tier=result.tier, **routing)
                result.add(samples, answers, groups, likelihood, no_eos)
                bar.update(len(samples))
    return [result.finish() for result in results]


def generate_answers(
    model: nn.Module,
    processing_class: ProcessingClass,
    samples: list[dict[str, Any]],
    max_new_tokens: int,
    tier: int = 1,
    **routing: Any,
) -> list[str]:
    """A tier's greedy answers to the samples' prompts, as plain text."""
    inputs = prompt_inputs(samples, processing_class).to(model.device)
    check_fits(model, inputs)
    prompt_length = inputs["input_ids"].shape[1]
    end_ids = end_of_sequence_ids(getattr(processing_class, "tokenizer", processing_class), model)
    tiers = torch.full((len(samples),), tier)
    with tier_routing(model, tiers_of_prompts(tiers, prompt_length, adapter_config(model).token_scope), **routing):
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end_ids.tolist() or None
        )
    answers = processing_class.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def score_answers(
    model: nn.Module,
    processing_class: ProcessingClass,
    samples: list[dict[str, Any]],
    tier: int = 1,
    **routing: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tier's mean log-probability per token of each reference answer, with and without end tokens (`(B,)`)."""
    inputs = scoring_inputs(samples, processing_class).to(model.device)
    check_fits(model, inputs)
    tiers = torch.full((len(samples),), tier)
    tiers = tiers_of_labels(tiers, inputs["labels"], adapter_config(model).token_scope)
    labels_BS = inputs.pop("labels")[:, 1:]
    with tier_routing(model, tiers, **routing):
        log_probs_BS = label_log_probs(model(**inputs).logits[:, :-1], labels_BS)
    mask_BS = labels_BS != IGNORED_LABEL
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    content_BS = content_mask(labels_BS, mask_BS, end_of_sequence_ids(tokenizer, model))
    return mean_log_likelihood(log_probs_BS, mask_BS), mean_log_likelihood(log_probs_BS, content_BS)


class _TierTally:
    """One tier's results as they come in."""

    def __init__(self, tier: int):
        self.tier = tier
        self.right, self.asked = Counter(), Counter()
        self.items = TierItems()

    def add(self, samples, answers, groups, likelihood_B, no_eos_B) -> None:
        for index, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
            is_right = answer == answer_text(sample)
            self.items.is_right.append(is_right)
            for key in (OVERALL, *([groups[index]] if groups else [])):
                self.asked[key] += 1
                self.right[key] += is_right
        self.items.answers += answers
        self.items.log_likelihood += likelihood_B.tolist()
        self.items.log_likelihood_no_eos += no_eos_B.tolist()

    def finish(self) -> TierResult:
        count = self.asked[OVERALL]
        return TierResult(
            self.tier,
            accuracy={key: self.right[key] / self.asked[key] for key in sorted(self.asked)},
            samples=dict(sorted(self.asked.items())),
            log_likelihood=sum(self.items.log_likelihood) / count,
            log_likelihood_no_eos=sum(self.items.log_likelihood_no_eos) / count,
            items=self.items,
        )
