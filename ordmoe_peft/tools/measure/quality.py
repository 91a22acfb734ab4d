"""Are tiers ordered by quality? Likelihood, answers, order, routing scores and expert diversity, tier by tier."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from ...data.formats import as_prompt_completion
from ...data.generation import evaluation_mode
from ...data.samples import ProcessingClass, answer_text, check_counts, sample_batches
from ...errors import OrdMoEConfigError
from ...moe_model import MoEModel
from ...tiers.plan import RandomDraw
from ..tables import Table, number, percent, signed
from .confidence import LIKELIHOODS, LikelihoodRecord, mean_over_samples
from .correlation import QualityCorrelation, RankCorrelation, quality_correlation, sample_ratings
from .diversity import expert_outputs, mean_pairwise_cosine
from .evaluation import TierMeans, TierResult, evaluate_tiers, score_answers, tier_table
from .observation import TierObservation, observe_tier, outer_experts, reason_not_to_watch


# Key in [`TierQuality`]'s `order` → which order of likelihoods it is.
ORDERS = {
    "full": "all tiers in order",
    "full_no_eos": "all in order, without end tokens",
    "ends": "first over last tier",
    "ends_no_eos": "first over last, without end tokens",
    "below": "below tier 1 in order",
    "below_confident": "below tier 1, confident tokens",
    "below_fragile": "below tier 1, fragile tokens",
}
# First part of a key → rows of the tiers that are compared, and the suffixes, see [`LIKELIHOODS`]. Tier 1 chooses the
# class of a token, so it is not among the tiers that are compared over a class.
COMPARED: dict[str, tuple[slice | list[int], tuple[str, ...]]] = {
    "full": (slice(None), ("", "_no_eos")),
    "ends": ([0, -1], ("", "_no_eos")),
    "below": (slice(1, None), ("", "_confident", "_fragile")),
}


@dataclass
class OrderShare:
    """How often an order of likelihoods holds. Samples without tokens of the class are left out.

    Args:
        share (`float`, *optional*): of samples; ties and what is not a number do not count as ordered. `None` without
            any sample.
        stderr (`float`, *optional*): its binomial standard error.
        chance (`float`): the share that tiers without any order would give.
        random (`float`, *optional*): the share of the same samples with `random` grouping. Its tier 1 is still the
            model's own top K, so it says what order *below* the top K is worth, and how often the top K beat any
            other K.
        random_stderr (`float`, *optional*): its standard error.
        num_samples (`int`): number of samples that have such tokens.
    """

    share: float | None
    stderr: float | None
    chance: float
    random: float | None = None
    random_stderr: float | None = None
    num_samples: int = field(kw_only=True)


@dataclass
class TierMeansByClass(TierMeans):
    """A tier's means, also over confident and over fragile tokens, see `confidence.py`.

    Args:
        log_likelihood_confident (`float`, *optional*), log_likelihood_fragile (`float`, *optional*): mean over the
            samples that have such tokens of the mean log-probability per such token, in nats; `None` where none has,
            NaN where the model gives NaN.
    """

    log_likelihood_confident: float | None = None
    log_likelihood_fragile: float | None = None


@dataclass
class TierTexts:
    """A sample's answers side by side, from tier 1 to tier C."""

    prompt: str
    reference: str
    answers: list[str]


@dataclass
class TierQuality:
    """What the tiers of a model are worth on a data set. `to_dict()` gives plain data for JSON.

    Args:
        model (`str`): which model.
        num_samples (`int`), num_tiers (`int`), grouping (`str`): over what.
        num_tokens (`int`), confident_share (`float`): number of answer tokens, and the share that is confident.
        tiers (`list[TierMeansByClass]`): likelihood and exact match per tier.
        order (`dict[str, OrderShare]`): `"full"` (L̄_1 > … > L̄_C) and `"ends"` (L̄_1 > L̄_C), and both without
            end-of-sequence tokens (`"full_no_eos"`, `"ends_no_eos"`); where C is over 2, also `"below"`
            (L̄_2 > … > L̄_C), and that over confident and fragile tokens alone (`"below_confident"`,
            `"below_fragile"`).
        spearman (`QualityCorrelation`): routing scores against quality; of no layers, with a note that says why, where
            routers or experts cannot be read.
        diversity (list of list of `float` or `None`): per MoE layer and tier, the mean pairwise cosine between the
            outputs of the tier's experts for the same token; `None` where K = 1. Empty where they cannot be read.
        texts (`list[TierTexts]`): the first samples' answers.
    """

    model: str
    num_samples: int
    num_tiers: int
    grouping: str
    num_tokens: int
    confident_share: float
    tiers: list[TierMeansByClass]
    order: dict[str, OrderShare]
    spearman: QualityCorrelation
    diversity: list[list[float | None]]
    texts: list[TierTexts]

    to_dict = asdict

    def tables(self) -> list[Table]:
        """Likelihood and accuracy by tier, order, correlation and diversity by layer, and the texts, if there are."""
        tables = [self._tier_table(), self._order_table(), self._layer_table()]
        return [*tables, self._text_table()] if self.texts else tables

    def _tier_table(self) -> Table:
        table = tier_table(self.tiers)
        rows = [(tier.log_likelihood_confident, tier.log_likelihood_fragile) for tier in self.tiers]
        classes = pd.DataFrame(rows, columns=["confident tokens", "fragile tokens"])
        note = (
            f"{percent(self.confident_share)} of {self.num_tokens:,} tokens are confident: tier 1 gives one token more "
            "than all others together. The others are fragile. The last two columns are means, over the samples that "
            "have such tokens, of the sample's own mean over them. Tier 1 chose the tokens of each, so compare the "
            "tiers below it."
        )
        frame = pd.concat([table.frame, classes], axis=1)
        return replace(table, frame=frame, formats=[*table.formats, number, number], note=note)

    def _order_table(self) -> Table:
        shares = {label: self.order[key] for key, label in ORDERS.items() if key in self.order}
        frame = pd.DataFrame(list(shares.values()))[["share", "stderr", "random", "random_stderr", "chance"]]
        frame.columns = ["samples", "s.e.", "random groups", "s.e. of random", "chance"]
        formats = dict.fromkeys(frame.columns, percent)
        frame.insert(0, "likelihood falls from", list(shares))
        frame["number of samples"] = [share.num_samples for share in shares.values()]
        return Table("Share of samples in order", frame, formats)

    def _layer_table(self) -> Table:
        within, pooled = self.spearman.within_top, self.spearman.pooled
        columns = zip(within.layers, pooled.layers, self.diversity, strict=True)
        rows = [[str(layer), rho, rho_pooled, *cosines] for layer, (rho, rho_pooled, cosines) in enumerate(columns)]
        rows.append(["overall", within.overall, pooled.overall, *[None] * self.num_tiers])
        rhos = ["rho within tier 1", "rho over tiers"]
        cosines = [f"cosine tier {tier.tier}" for tier in self.tiers]
        notes = [self.spearman.note] if self.spearman.note else []
        if within.stderr is not None:
            notes.insert(0, f"Standard error of rho within tier 1, where it is 0: {within.stderr:.3f}.")
        return Table(
            f"Spearman's rho of routing scores with {self.spearman.quality}; cosine between the outputs of a tier's "
            "experts",
            pd.DataFrame(rows, columns=["MoE layer", *rhos, *cosines]),
            {**dict.fromkeys(rhos, signed), **dict.fromkeys(cosines, number)},
            "\n".join(notes),
        )

    def _text_table(self) -> Table:
        rows = [(text.prompt, text.reference, *text.answers) for text in self.texts]
        columns = ["prompt", "reference", *(f"tier {tier.tier}" for tier in self.tiers)]
        return Table("Answers side by side", pd.DataFrame(rows, columns=columns))


@dataclass(kw_only=True)
class QualityOptions:
    """What [`tier_quality`] measures beside the tiers' likelihood and answers."""

    group_by: str | None = field(default=None, metadata={"help": "Column whose values get an accuracy of their own."})
    rating_column: str | None = field(
        default=None, metadata={"help": "Column of numbers to correlate routing with; exact match by default."}
    )
    random_control: bool = field(default=True, metadata={"help": "Measure the order of random groups, too."})
    diversity_tokens: int = field(default=256, metadata={"help": "Tokens that expert outputs are compared on."})
    show: int = field(default=5, metadata={"help": "Samples whose answers are shown tier by tier."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer to generate, greedily."})
    seed: int = field(default=0, metadata={"help": "What random groups are drawn from."})


def tier_quality(
    model: nn.Module,
    processing_class: ProcessingClass,
    dataset: Any,
    *,
    num_tiers: int = 3,
    grouping: str = "uniform",
    batch_size: int = 32,
    name: str | None = None,
    **options: Any,
) -> TierQuality:
    """Measure what the tiers of `model` are worth on held-out samples.

    Args:
        model, processing_class, dataset, batch_size: as [`evaluate_tiers`] takes them.
        num_tiers (`int`, defaults to 3): C, at least 2.
        grouping (`str`, defaults to `"uniform"`): how tiers are cut.
        name (`str`, *optional*): what to call the model; its checkpoint's name by default.
        options: see [`QualityOptions`]. Ratings of each sample's response, where there are such, are the quality that
            routing scores are compared with; else it is exact match, or the mean log-likelihood where all or none of
            tier 1's answers match.

    Raises:
        [`OrdMoEConfigError`]: `num_tiers` below 2 or too many for the model, or a size that is not positive.
        [`OrdMoEDataError`]: no samples, a missing column, or ratings that are not numbers.
    """
    chosen = QualityOptions(**options)
    if num_tiers < 2:
        raise OrdMoEConfigError(f"num_tiers must be at least 2 to compare tiers, got {num_tiers}.")
    check_counts(diversity_tokens=chosen.diversity_tokens)
    ratings_n = None if chosen.rating_column is None else sample_ratings(dataset, chosen.rating_column)
    routing: dict[str, Any] = {"num_tiers": num_tiers, "grouping": grouping, "seed": chosen.seed}
    dataset = as_prompt_completion(dataset, needs_answers=True)
    subject = (model, processing_class, dataset)
    tiers = range(1, num_tiers + 1)
    record = LikelihoodRecord()
    asked: dict[str, Any] = {"group_by": chosen.group_by, "max_new_tokens": chosen.max_new_tokens}
    asked["on_scores"] = record.add
    results = evaluate_tiers(model, processing_class, dataset, tiers, batch_size=batch_size, **asked, **routing)
    random = None
    if chosen.random_control:
        random = _random_likelihoods(*subject, record, num_tiers, batch_size, chosen.seed)
    routing_scores, cosines_CL, reason = [], [], reason_not_to_watch(model)
    for tier in tiers if reason is None else ():
        watched = observe_tier(*subject, tier, batch_size=batch_size, num_tokens=chosen.diversity_tokens, **routing)
        routing_scores.append(watched.routing_scores_nL)
        cosines_CL.append(_cosines(model, watched))
    return TierQuality(
        model=name or model.config.name_or_path or type(model).__name__,
        num_samples=len(dataset),
        num_tiers=num_tiers,
        grouping=grouping,
        num_tokens=record.num_tokens,
        confident_share=record.confident_share,
        tiers=_means_by_class(results, record),
        order=_order_shares(record, random),
        spearman=quality_correlation(results, routing_scores, ratings_n) if reason is None else _unwatched(reason),
        diversity=[list(layer) for layer in zip(*cosines_CL, strict=True)],
        texts=_texts(dataset, results, chosen.show),
    )


def order_share(log_likelihood_Cn: torch.Tensor, random_Cn: torch.Tensor | None = None) -> OrderShare:
    """How often the likelihoods of a sample fall strictly from the first row to the last.

    Args:
        log_likelihood_Cn (`torch.Tensor` of shape `(C, n)`): of each sample under each tier; NaN is in no order.
        random_Cn (`torch.Tensor` of shape `(C, n)`, *optional*): the same under random groups.
    """
    share, stderr, count = _share_in_order(log_likelihood_Cn)
    random, random_stderr = (None, None) if random_Cn is None else _share_in_order(random_Cn)[:2]
    chance = 1 / math.factorial(len(log_likelihood_Cn))
    return OrderShare(share, stderr, chance, random, random_stderr, num_samples=count)


def _share_in_order(log_likelihood_Cn: torch.Tensor) -> tuple[float | None, float | None, int]:
    """The share, its standard error, and of how many samples."""
    falls_n = (log_likelihood_Cn[:-1] > log_likelihood_Cn[1:]).all(0)
    if not len(falls_n):
        return None, None, 0
    share = falls_n.double().mean().item()
    return share, math.sqrt(share * (1 - share) / len(falls_n)), len(falls_n)


def _order_shares(record: LikelihoodRecord, random_4Cn: torch.Tensor | None) -> dict[str, OrderShare]:
    """Shares by key of [`ORDERS`], from the likelihoods of tiers and of random groups."""
    likelihoods_4Cn, has_tokens_4n = record.likelihoods(), record.has_tokens()
    shares = {}
    for key, (rows, suffixes) in COMPARED.items():
        for suffix in suffixes:
            kind = list(LIKELIHOODS).index(suffix)
            of_tiers, *of_random = (
                values_4Cn[kind][rows][:, has_tokens_4n[kind]]
                for values_4Cn in (likelihoods_4Cn, random_4Cn)
                if values_4Cn is not None
            )
            if len(of_tiers) > 1:
                shares[f"{key}{suffix}"] = order_share(of_tiers, *of_random)
    return shares


def _means_by_class(results: list[TierResult], record: LikelihoodRecord) -> list[TierMeansByClass]:
    likelihoods_C4n, has_tokens_4n = record.likelihoods().transpose(0, 1), record.has_tokens()
    return [
        TierMeansByClass(
            *(r.tier, r.accuracy, r.samples, r.log_likelihood, r.log_likelihood_no_eos),
            *(mean_over_samples(likelihoods_4n[kind][has_tokens_4n[kind]]) for kind in (2, 3)),
        )
        for r, likelihoods_4n in zip(results, likelihoods_C4n, strict=True)
    ]


def _random_likelihoods(
    model: nn.Module,
    processing_class: ProcessingClass,
    dataset: Any,
    record: LikelihoodRecord,
    num_tiers: int,
    batch_size: int,
    seed: int,
) -> torch.Tensor:
    """The likelihoods of `record` under random groups. Their tier 1 is the model as it is, so `record` has it."""
    parts = []
    groups: dict[str, Any] = {"num_tiers": num_tiers, "grouping": "random", "seed": seed}
    with evaluation_mode(model), tqdm(total=len(dataset), desc="Random groups", unit="sample") as bar:
        batches = zip(sample_batches(dataset, batch_size), record.confident, strict=True)
        for step, (samples, confident_BS) in enumerate(batches):
            # Another step for each batch: rows at the same position would share their draws.
            of_tiers = [
                score_answers(model, processing_class, samples, tier, draw=RandomDraw(step=step), **groups)
                .likelihoods(confident_BS)
                .cpu()
                for tier in range(2, num_tiers + 1)
            ]
            parts.append(torch.stack(of_tiers, dim=1))
            bar.update(len(samples))
    return torch.cat([record.likelihoods()[:, :1], torch.cat(parts, dim=2)], dim=1)


def _cosines(model: nn.Module, watched: TierObservation) -> list[float | None]:
    """Per MoE layer, how alike the outputs of the tier's experts are."""
    layers = MoEModel.of(model).layers
    with evaluation_mode(model):
        return [
            mean_pairwise_cosine(
                expert_outputs(outer_experts(model, layer), tokens.hidden_states_NH, tokens.top_k_index_NK)
            )
            for layer, tokens in zip(layers, watched.expert_tokens, strict=True)
        ]


def _unwatched(reason: str) -> QualityCorrelation:
    nothing = RankCorrelation(None, [], None)
    return QualityCorrelation(nothing, nothing, "quality", f"Routing scores and cosines are not measured: {reason}.")


def _texts(dataset: Any, results: list[TierResult], show: int) -> list[TierTexts]:
    return [
        TierTexts(prompt_text(dataset[row]), answer_text(dataset[row]), [r.items.answers[row] for r in results])
        for row in range(min(show, len(results[0].items.answers)))
    ]


def prompt_text(sample: dict[str, Any]) -> str:
    """The text of a sample's prompt, without roles, template and images."""
    if isinstance(sample["prompt"], str):
        return sample["prompt"].strip()
    contents = [message["content"] for message in sample["prompt"]]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return "\n".join(text for message in parts for part in message if (text := part.get("text")))
