"""Failure signatures: how training and tiers go wrong, recognised in plain data and named.

Each public function reads what another part of the package writes as JSON (the trainer's log, tier quality, router
health, ablation results) and returns a [`Finding`] for each signature that shows in it. [`CHECKS`] lists them all.

| name | what it means |
| --- | --- |
| `tier_1_falling` | the model as it will be used gets worse at the reference responses |
| `low_tiers_running_away` | low tiers are pushed below a uniform guess and on, where nothing is left to learn |
| `order_from_end_of_sequence` | a tier is above the next one by its end-of-sequence tokens, not by what it says |
| `experts_collapsing` | experts are no longer routed to, so low tiers are made of what the router dropped |
| `random_level_order` | tiers are in order no more often than random groups: routing says nothing about quality |
| `order_on_confident_tokens` | below tier 1, ranks carry more of a signal on tokens that the model is sure of |
| `means_against_order` | below tier 1, a lower tier is likelier on average than a higher one |
| `top_tier_not_best` | tier 1 is no better than the lowest tier: there is nothing to learn from |
| `random_level_results` | training on ranked tiers gives what training on random ones gives |
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from statistics import median
from typing import Any, TypeGuard

from .health import DEAD_SHARE


LIKELIHOOD_KEY = re.compile(r"tier_(\d+)/log_likelihood")

# Batches differ, so a logged value is the median of this many: one odd batch cannot move it.
WINDOW = 3
# Nats per token, a tenth of the probability: less is not worth a warning, however sure.
FALL = 0.1
# A fall from the best value of a noisy log must also be this many standard deviations of a logged value: steady
# values of 200 logs, looked at after each, then pass for falling in 2 % of simulated runs (19 % with 4).
NOISE = 5
# "Still falling" looks at the last quarter of the log, so that it means the same whatever the logging interval.
RECENT = 4
# Nats per token by which a tier must lead the next one before it is asked where the lead comes from.
LEAD = 0.05
# The mean lead without end-of-sequence tokens, over that with them, below which the tokens carried over 90 % of it.
CONTENT_SHARE = 0.1
# Mean number of dead experts a layer by which it must have risen: one more in every other layer.
DEAD_RISE = 0.5
# Dead experts of a layer, of all its experts, from which low tiers are short of experts that were trained.
COLLAPSED_SHARE = 0.1
# Two-sided 95 %, as in the tables.
STANDARD_ERRORS = 2
# Samples of each class of tokens from which their shares are compared.
LEAST_SAMPLES = 30


@dataclass(frozen=True)
class Finding:
    """A failure signature that shows. `to_dict()` gives plain data for JSON.

    Args:
        name (`str`): which; see the head of this file.
        message (`str`): what shows, with its numbers, and what to do.
        severity (`str`): `"warning"` where results suffer or mean something else than they seem to, `"note"` where
            a number needs to be read with care.
    """

    name: str
    message: str
    severity: str = "warning"

    to_dict = asdict


def training_findings(
    log_history: Sequence[Mapping[str, Any]], *, vocab_size: int | None = None, erl_coef: float | None = None
) -> list[Finding]:
    """What shows at the end of a training log.

    Args:
        log_history (sequence of mappings): `trainer.state.log_history`, or its beginning.
        vocab_size (`int`, *optional*): V, which a uniform guess depends on; without it, `low_tiers_running_away` is
            not looked for.
        erl_coef (`float`, *optional*): the weight in use, to name in the advice.
    """
    return _findings("log", _TrainingLog(log_history, vocab_size, erl_coef))


def health_findings(health: Mapping[str, Any]) -> list[Finding]:
    """What shows in router health: `layers`, each with `utilisation`, a number for each expert relative to K/E."""
    return _findings("health", health.get("layers") or [])


def quality_findings(quality: Mapping[str, Any]) -> list[Finding]:
    """What shows in [`~ordmoe_peft.tools.measure.quality.TierQuality`], as plain data.

    Args:
        quality (mapping): `tiers`, with each tier's likelihoods and accuracy, and `order`, with the shares of samples
            whose tiers are in order.
    """
    return _findings("quality", quality)


def ablation_findings(results: Mapping[str, Any]) -> list[Finding]:
    """What shows in ablation results.

    A cell of ranked tiers is compared with the one of random groups whose other settings are the same. Their
    differences from the baseline are taken for independent; they share it, so the real interval is narrower.

    Args:
        results (mapping): `cells`, each with `name`, `settings` and `difference` (`mean`, `low` and `high` of a 95 %
            interval; higher is better; `None` for the baseline), and `unit`.
    """
    return _findings("ablation", results)


def _findings(source: str, data: Any) -> list[Finding]:
    found = [(name, message) for name, check in CHECKS[source].items() for message in check(data)]
    return [Finding(name, message, "note" if name in NOTES else "warning") for name, message in found]


# ----------------------------------------------------------------------------------------------------- training log
Series = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class _TrainingLog:
    """What [`training_findings`] is given."""

    rows: Sequence[Mapping[str, Any]]
    vocab_size: int | None
    erl_coef: float | None

    @property
    def num_tiers(self) -> int:
        """C: the lowest tier that was logged. Tiers between may have been skipped throughout."""
        tiers = (LIKELIHOOD_KEY.fullmatch(key) for row in self.rows for key in row)
        return max((int(match[1]) for match in tiers if match), default=0)

    def series(self, key: str) -> Series:
        """What was logged under `key`; skipped passes and other kinds of rows leave gaps."""
        return [(row.get("step", index), row[key]) for index, row in enumerate(self.rows) if _is_number(row.get(key))]

    def likelihoods(self, tier: int) -> list[float]:
        return [value for _, value in _medians(self.series(f"tier_{tier}/log_likelihood"))]


def _medians(series: Series) -> Series:
    """The median of each [`WINDOW`] neighbours, at the step of the last of them."""
    windows = (series[end - WINDOW : end] for end in range(WINDOW, len(series) + 1))
    return [(window[-1][0], median(value for _, value in window)) for window in windows]


def _noise(series: Series) -> float:
    """The standard deviation of one value, from neighbours' differences: slow trends and lone outliers hardly move it.

    For normal noise σ, the median of |x − y| is 0.954 σ.
    """
    return median(abs(after - before) for (_, before), (_, after) in pairwise(series)) / 0.954


def _experts_dropped(log: _TrainingLog) -> Iterator[str]:
    logged = log.series("router/dead_experts")
    dead = [value for _, value in _medians(logged)]
    if dead and dead[-1] - dead[0] >= max(DEAD_RISE, NOISE * _noise(logged)):
        yield (
            f"Dead experts (below {DEAD_SHARE:.0%} of an even share) rose from {dead[0]:.2f} to {dead[-1]:.2f} a "
            "layer. The router drops experts, and low tiers are made of those: raise balance_coef, lower erl_coef, or "
            "leave the router out of `targets`."
        )


def _tier_1_falls(log: _TrainingLog) -> Iterator[str]:
    # Where tiers write their own responses, tier 1's likelihood is of what it wrote; L_NTP is always of the references.
    losses = log.series("ntp_loss")
    logged = [(step, -loss) for step, loss in losses] or log.series("tier_1/log_likelihood")
    top, bottom = _medians(logged), log.likelihoods(log.num_tiers)
    if log.num_tiers < 2 or not top:
        return
    (step, best), (_, last) = max(top, key=lambda point: point[1]), top[-1]
    if best - last <= max(FALL, NOISE * _noise(logged)):
        return
    shows = f"Tier 1's likelihood fell from {best:.3f} (step {step}) to {last:.3f} nats a token"
    if not bottom or bottom[0] - bottom[-1] <= FALL:
        yield (
            f"{shows}, and tier {log.num_tiers}'s did not fall with it, so it is not dragged down by low tiers. Lower "
            "learning_rate, and look at the data."
        )
        return
    current = "" if log.erl_coef is None else f" (now {log.erl_coef})"
    yield (
        f"{shows} while tier {log.num_tiers}'s fell from {bottom[0]:.3f} to {bottom[-1]:.3f}. Low tiers are pushed "
        f"down and drag tier 1 along, whose weights they share: lower erl_coef{current}, bound the push with "
        "lower_tier_floor='uniform', or use an objective that stops once tiers are in order."
    )


def _low_tiers_run_away(log: _TrainingLog) -> Iterator[str]:
    if log.vocab_size is None:
        return
    uniform = -math.log(log.vocab_size)
    away = []
    for tier in range(2, log.num_tiers + 1):
        values = log.likelihoods(tier)
        before = values[: -max(WINDOW, len(values) // RECENT)]
        if before and values[-1] < uniform and before[-1] - values[-1] > FALL:
            away.append(f"tier {tier} is at {values[-1]:.2f} (from {values[0]:.2f})")
    if away:
        yield (
            f"In nats a token, {' and '.join(away)}, below a uniform guess over {log.vocab_size} tokens "
            f"({uniform:.2f}) and still falling. Nothing more is learnt from that, and tier 1 may be dragged along: "
            "set lower_tier_floor='uniform', lower erl_coef, or use an objective that stops once tiers are in order."
        )


def _logged_order_is_of_ends(log: _TrainingLog) -> Iterator[str]:
    leads = []
    for tier in range(1, log.num_tiers):
        keys = [f"tier_{j}/log_likelihood{suffix}" for suffix in ("", "_no_eos") for j in (tier, tier + 1)]
        # Tiers are compared on the same batch, whose ups and downs they share.
        rows = [[row[key] for key in keys] for row in log.rows if _are_numbers([row.get(key) for key in keys])]
        if len(rows) >= WINDOW:
            lead, content_lead = (median(row[i] - row[i + 1] for row in rows[-WINDOW:]) for i in (0, 2))
            leads.append((tier, lead, content_lead))
    return _order_is_of_ends(leads)


def _order_is_of_ends(leads: Sequence[tuple[int, float, float]]) -> Iterator[str]:
    """From (tier, its lead over the next one, the same without end-of-sequence tokens)."""
    shown = [
        f"tier {tier} leads tier {tier + 1} by {lead:.3f} nats a token, but by {content_lead:.3f} without them"
        for tier, lead, content_lead in leads
        if lead > LEAD and content_lead < CONTENT_SHARE * lead
    ]
    if shown:
        yield (
            f"Order by end-of-sequence tokens alone: {'; '.join(shown)}. These tiers differ in when they stop, not in "
            "what they say. Read log_likelihood_no_eos beside log_likelihood, and do not take this order for one of "
            "quality."
        )


# ------------------------------------------------------------------------------------------------------ router health
def _experts_are_dead(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    collapsed = []
    for index, layer in enumerate(layers):
        utilisation = [value for value in layer.get("utilisation") or [] if _is_number(value)]
        dead = sum(value < DEAD_SHARE for value in utilisation)
        if dead and dead >= COLLAPSED_SHARE * len(utilisation):
            collapsed.append(f"{dead} of {len(utilisation)} in layer {layer.get('layer', index)}")
    if collapsed:
        yield (
            f"Dead experts (below {DEAD_SHARE:.0%} of an even share): {', '.join(collapsed)}. Low tiers are made "
            "of experts that see no tokens, so what they say is noise: use fewer tiers, grouping='high_only', or a "
            "layer_scope without these layers; if training did it, raise balance_coef."
        )


# ------------------------------------------------------------------------------------------------------- tier quality
def _order_is_random(quality: Mapping[str, Any]) -> Iterator[str]:
    full = (quality.get("order") or {}).get("full") or {}
    share, level, error, what = full.get("share"), full.get("random"), full.get("random_stderr") or 0, "random groups'"
    if not _is_number(level):
        # Tier 1 leads random groups, too, since it stays the top K: only the tiers below it can come in any order.
        num_tiers = quality.get("num_tiers")
        level, error, what = 1 / math.factorial(num_tiers - 1) if num_tiers else None, 0, "chance's"
    if not _is_number(share) or not _is_number(level):
        return
    margin = STANDARD_ERRORS * math.hypot(full.get("stderr") or 0, error)
    # Where random groups are in order on nearly all samples, too, no order could stand out.
    if share <= level + margin < 1:
        yield (
            f"The likelihoods of all tiers are in order on {share:.1%} of samples, and {what} level is {level:.1%} "
            f"(within {STANDARD_ERRORS} standard errors, {margin:.1%}): below the top experts, the router's ranking "
            "says nothing about quality on this data. OrdMoE has no signal here; expect what grouping='random' gives."
        )


def _order_is_of_confident_tokens(quality: Mapping[str, Any]) -> Iterator[str]:
    classes = ("confident", "fragile")
    shares = [(quality.get("order") or {}).get(f"below_{name}") or {} for name in classes]
    if not all(_are_numbers([one.get(name) for name in ("share", "random", "num_samples")]) for one in shares):
        return
    # Where the order of all tiers is that of random groups, `random_level_order` says that ranks carry no signal.
    if min(one["num_samples"] for one in shares) < LEAST_SAMPLES or any(_order_is_random(quality)):
        return
    lead, other = (one["share"] - one["random"] for one in shares)
    errors = [_standard_error(one[name], one["num_samples"]) for one in shares for name in ("share", "random")]
    own, margin = (STANDARD_ERRORS * math.hypot(*part) for part in (errors[:2], errors))
    if lead > own and lead - other > margin:
        found = [
            f"on {name} tokens on {one['share']:.1%} of {one['num_samples']} samples against random groups' "
            f"{one['random']:.1%}"
            for name, one in zip(classes, shares, strict=True)
        ]
        yield (
            f"Below tier 1, tiers are in order {', and '.join(found)}: the first lead is {lead - other:.1%} larger "
            f"({STANDARD_ERRORS} standard errors: {margin:.1%}). The router's ranking says more on tokens that the "
            "model is sure of than on the others, or these are fewer a sample, so that noise hides more of it."
        )


def _standard_error(share: float, count: int) -> float:
    """Of a share of `count` samples, after Agresti and Coull: as if four more were half in order; so it is never 0."""
    share = (share * count + 2) / (count + 4)
    return math.sqrt(share * (1 - share) / (count + 4))


def _top_tier_is_not_best(quality: Mapping[str, Any]) -> Iterator[str]:
    tiers = quality.get("tiers") or []
    if len(tiers) < 2:
        return
    ends, worse = (tiers[0], tiers[-1]), []
    top, bottom = (tier.get("log_likelihood") for tier in ends)
    if _is_number(top) and _is_number(bottom) and top <= bottom:
        worse.append(f"likelihood {top:.3f} against {bottom:.3f} nats a token")
    top, bottom = ((tier.get("accuracy") or {}).get("overall") for tier in ends)
    # Where neither is ever right, exact match cannot tell them apart.
    if _is_number(top) and _is_number(bottom) and top <= bottom > 0:
        worse.append(f"exact match {top:.1%} against {bottom:.1%}")
    if worse:
        yield (
            f"Tier 1 is not better than tier {tiers[-1].get('tier', 'C')}: {', '.join(worse)}. The premise of OrdMoE "
            "does not hold for this model and data: check prompt format and data first, then use supervised "
            "fine-tuning."
        )


def _means_run_against_order(quality: Mapping[str, Any]) -> Iterator[str]:
    names = {"log_likelihood": "", "log_likelihood_no_eos": " without end-of-sequence tokens"}
    shown = [
        f"tier {lower['tier']} is above tier {higher['tier']}{name} ({lower[key]:.3f} against {higher[key]:.3f})"
        for key, name in names.items()
        for higher, lower in pairwise((quality.get("tiers") or [])[1:])
        if _are_numbers((higher.get(key), lower.get(key))) and lower[key] > higher[key]
    ]
    if shown:
        yield (
            f"Mean likelihoods run against the order: {'; '.join(shown)}, in nats a token. Between these tiers the "
            "router's ranking is no order of quality; fewer tiers, or an objective over the ends alone, do not rest on "
            "it."
        )


def _measured_order_is_of_ends(quality: Mapping[str, Any]) -> Iterator[str]:
    leads = []
    for higher, lower in pairwise(quality.get("tiers") or []):
        values = [tier.get(key) for key in ("log_likelihood", "log_likelihood_no_eos") for tier in (higher, lower)]
        if _are_numbers(values):
            leads.append((higher["tier"], values[0] - values[1], values[2] - values[3]))
    return _order_is_of_ends(leads)


# ----------------------------------------------------------------------------------------------------------- ablation
def _results_are_random(results: Mapping[str, Any]) -> Iterator[str]:
    cells: list[tuple[str, bool, dict[str, Any], list[Any]]] = []
    for cell in results.get("cells") or []:
        difference, settings = cell.get("difference") or {}, dict(cell["settings"])
        interval: list[Any] = [difference.get(name) for name in ("mean", "low", "high")]
        if cell["name"] != "base" and _are_numbers(interval):  # the base as it is has no tiers
            # Cells may name only the settings that differ from the defaults.
            is_random = settings.pop("grouping", None) == "random"
            cells.append((cell["name"], is_random, settings, interval))
    unit = f" {results['unit']}" if results.get("unit") else ""
    for (ranked, is_random, settings, own), (random, is_control, same, control) in product(cells, cells):
        lead, margin = own[0] - control[0], math.hypot(*((high - low) / 2 for _, low, high in (own, control)))
        if not is_random and is_control and settings == same and lead <= margin:
            yield (
                "{} differs from the baseline by {:+.3g} [{:+.3g}, {:+.3g}]".format(ranked, *own)
                + f"{unit}, and {random}, random groups with the same settings, by "
                + "{:+.3g} [{:+.3g}, {:+.3g}]".format(*control)
                + f"{unit}. The lead of {lead:+.3g} is not above its margin, {margin:.3g}, so nothing can be credited "
                "to the router's ranking: do not claim it for OrdMoE, or run more seeds."
            )


# ---------------------------------------------------------------------------------------------------------- all checks
def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(map(_is_number, values))


# What is read → the checks of it, by the name of the signature that each gives the messages of.
CHECKS: dict[str, dict[str, Callable[[Any], Iterator[str]]]] = {
    "log": {
        "experts_collapsing": _experts_dropped,
        "tier_1_falling": _tier_1_falls,
        "low_tiers_running_away": _low_tiers_run_away,
        "order_from_end_of_sequence": _logged_order_is_of_ends,
    },
    "health": {"experts_collapsing": _experts_are_dead},
    "quality": {
        "random_level_order": _order_is_random,
        "order_on_confident_tokens": _order_is_of_confident_tokens,
        "top_tier_not_best": _top_tier_is_not_best,
        "means_against_order": _means_run_against_order,
        "order_from_end_of_sequence": _measured_order_is_of_ends,
    },
    "ablation": {"random_level_results": _results_are_random},
}
# Signatures that are numbers to be read with care; all others are warnings.
NOTES = ("order_from_end_of_sequence", "means_against_order", "order_on_confident_tokens")
