"""Accuracy and likelihood on held-out samples, tier by tier."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from ...data.formats import as_prompt_completion, has_prompts
from ...data.generation import evaluation_mode
from ...data.responses import content_mask, end_of_sequence_ids
from ...data.rows import check_fits, check_samples
from ...data.samples import (
    ProcessingClass,
    answer_text,
    check_counts,
    prompt_inputs,
    sample_batches,
    scoring_inputs,
    tokenizer_of,
)
from ...errors import OrdMoEConfigError
from ...objectives.expert_rank import label_log_probs
from ...tiers.routing import adapter_config, tier_routing
from ...tiers.scope import IGNORED_LABEL, tiers_of_labels, tiers_of_prompts
from ..tables import Table, number, percent, plain
from .confidence import AnswerScores, is_confident


OVERALL = "overall"


@dataclass
class TierItems:
    """What one tier does with each sample, in the data set's order.

    Args:
        answers (`list[str]`): generated answers; none for data without prompts.
        is_right (`list[bool]`): whether they match the reference exactly.
        log_likelihood (`list[float]`), log_likelihood_no_eos (`list[float]`): mean log-probability per token of the
            reference answer, in nats, with and without end-of-sequence tokens.
    """

    answers: list[str] = field(default_factory=list)
    is_right: list[bool] = field(default_factory=list)
    log_likelihood: list[float] = field(default_factory=list)
    log_likelihood_no_eos: list[float] = field(default_factory=list)


@dataclass
class TierMeans:
    """A tier's means over a data set.

    Args:
        tier (`int`): the tier, from 1.
        accuracy (`dict[str, float]`): share of generated answers that match exactly, overall and per group; empty
            where nothing was generated.
        samples (`dict[str, int]`): number of samples, likewise.
        log_likelihood (`float`): mean over samples of the mean log-probability per answer token, in nats.
        log_likelihood_no_eos (`float`): the same without end-of-sequence tokens.
    """

    tier: int
    accuracy: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    log_likelihood: float = float("nan")
    log_likelihood_no_eos: float = float("nan")

    to_dict = asdict


@dataclass
class TierResult(TierMeans):
    """A tier's means, and in `items` ([`TierItems`]) what they are of."""

    items: TierItems = field(default_factory=TierItems)


def tier_table(tiers: Sequence[TierMeans]) -> Table:
    """A row per tier: accuracy per group and overall, mean log-likelihoods."""
    groups = sorted(tiers[0].accuracy, key=lambda name: name == OVERALL)
    rows = [[one.tier, *map(one.accuracy.get, groups), one.log_likelihood, one.log_likelihood_no_eos] for one in tiers]
    title = "Exact match, and mean log-likelihood per answer token (nats)"
    if not groups:
        title = "Mean log-likelihood per token of the text (nats); without prompts, nothing is answered"
    return Table(
        title,
        pd.DataFrame(rows, columns=["tier", *groups, "log-likelihood", "without end tokens"]),
        [plain, *[percent] * len(groups), number, number],  # a group may be called as another column is
    )


def evaluate_tiers(
    model: nn.Module,
    processing_class: ProcessingClass,
    dataset: Any,
    tiers: Sequence[int] = (1,),
    *,
    group_by: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    on_scores: Callable[[int, AnswerScores], None] | None = None,
    **routing: Any,
) -> list[TierResult]:
    """Answer and score every sample of `dataset` under each of `tiers`.

    Args:
        model (`nn.Module`): a MoE model, wrapped by PEFT or not.
        processing_class: its tokenizer or processor.
        dataset ([`~datasets.Dataset`]): samples in TRL's prompt-completion format, or whole conversations, of which
            the last message is the answer; or texts, which are scored whole, and nothing is generated.
        tiers (sequence of `int`, defaults to `(1,)`): tiers to evaluate; 1 is the model as it is.
        group_by (`str`, *optional*): a column whose values get an accuracy of their own.
        batch_size (`int`, defaults to 32): samples at a time.
        max_new_tokens (`int`, defaults to 32): longest answer to generate, greedily.
        on_scores (`Callable`, *optional*): is given each batch's tier and token scores, tier after tier. Those of tier
            1 say where it is confident, which costs another softmax over the vocabulary.
        routing: settings for [`~ordmoe_peft.tier_routing`], e.g. `num_tiers`.

    Raises:
        [`OrdMoEConfigError`]: `batch_size` or `max_new_tokens` below 1, or tiers that do not fit the model.
        [`OrdMoEDataError`]: the data set has no samples, prompts, answers or `group_by` column; a row has no text; all
            answers are empty; a sample has more tokens than the model has positions.
    """
    dataset = as_prompt_completion(dataset, needs_answers=True)
    check_samples(dataset, group_by)
    is_answered = has_prompts(dataset)
    if group_by is not None and not is_answered:
        raise OrdMoEConfigError(f"group_by={group_by!r} groups answers, and this data has no prompts to answer.")
    check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens)
    items = [TierItems() for _ in tiers]
    total = len(dataset) * len(tiers)
    with evaluation_mode(model), tqdm(total=total, desc="Evaluating", unit="sample") as bar:
        for samples in sample_batches(dataset, batch_size):
            for tier, of_tier in zip(tiers, items, strict=True):
                if is_answered:
                    answers = generate_answers(model, processing_class, samples, max_new_tokens, tier=tier, **routing)
                    of_tier.answers += answers
                    of_tier.is_right += [
                        answer == answer_text(sample) for answer, sample in zip(answers, samples, strict=True)
                    ]
                finds_confident = tier == 1 and on_scores is not None
                scores = score_answers(
                    model, processing_class, samples, tier, finds_confident=finds_confident, **routing
                )
                if on_scores is not None:
                    on_scores(tier, scores)
                likelihood_B, no_eos_B = scores.means()
                of_tier.log_likelihood += likelihood_B.tolist()
                of_tier.log_likelihood_no_eos += no_eos_B.tolist()
                bar.update(len(samples))
    groups = None if group_by is None else list(map(str, dataset[group_by]))
    return [_result(tier, of_tier, groups) for tier, of_tier in zip(tiers, items, strict=True)]


def _result(tier: int, items: TierItems, groups: list[str] | None) -> TierResult:
    right: dict[str, list[bool]] = defaultdict(list)
    if items.is_right:
        right[OVERALL] += items.is_right
    if groups is not None:
        for group, is_right in zip(groups, items.is_right, strict=True):
            right[group].append(is_right)
    count = len(items.log_likelihood)
    return TierResult(
        tier,
        accuracy={name: sum(right[name]) / len(right[name]) for name in sorted(right)},
        samples={OVERALL: count} | {name: len(right[name]) for name in sorted(right)},
        log_likelihood=sum(items.log_likelihood) / count,
        log_likelihood_no_eos=sum(items.log_likelihood_no_eos) / count,
        items=items,
    )


def model_inputs(
    make: Callable[..., Any], samples: list[dict[str, Any]], processing_class: ProcessingClass, model: nn.Module
) -> Any:
    """What `make` makes of the samples, on the model's device.

    Raises:
        [`OrdMoEDataError`]: a sample has more tokens than the model has positions.
    """
    inputs = make(samples, processing_class).to(model.device)
    check_fits(model, inputs)
    return inputs


def generate_answers(
    model: nn.Module,
    processing_class: ProcessingClass,
    samples: list[dict[str, Any]],
    max_new_tokens: int,
    tier: int = 1,
    **routing: Any,
) -> list[str]:
    """A tier's greedy answers to the samples' prompts, as plain text."""
    inputs = model_inputs(prompt_inputs, samples, processing_class, model)
    prompt_length = inputs["input_ids"].shape[1]
    end_ids = end_of_sequence_ids(tokenizer_of(processing_class), model)
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
    finds_confident: bool = False,
    **routing: Any,
) -> AnswerScores:
    """A tier's log-probability of each token of the reference answers; on request, also where it is confident."""
    inputs = model_inputs(scoring_inputs, samples, processing_class, model)
    labels_BS = inputs.pop("labels")
    tiers = tiers_of_labels(torch.full((len(samples),), tier), labels_BS, adapter_config(model).token_scope)
    labels_BS = labels_BS[:, 1:]
    with tier_routing(model, tiers, **routing):
        logits_BSV = model(**inputs).logits[:, :-1]
    mask_BS = labels_BS != IGNORED_LABEL
    return AnswerScores(
        log_probs_BS=label_log_probs(logits_BSV, labels_BS),
        mask_BS=mask_BS,
        content_BS=content_mask(labels_BS, mask_BS, end_of_sequence_ids(tokenizer_of(processing_class), model)),
        confident_BS=is_confident(logits_BSV, mask_BS) if finds_confident else None,
    )
