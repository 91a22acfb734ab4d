"""Failure signatures: how training and tiers go wrong, recognised in plain data and named.

Each function reads what another part of the package writes as JSON (the trainer's log, tier quality, router health,
ablation results) and returns a [`Finding`] for each signature that shows in it:

| name | what it means |
| --- | --- |
| `tier_1_falling` | the model as it will be used gets worse at the reference responses |
| `low_tiers_running_away` | low tiers are pushed below a uniform guess and on, where nothing is left to learn |
| `order_from_end_of_sequence` | a tier is above the next one by its end-of-sequence tokens, not by what it says |
| `experts_collapsing` | experts are no longer routed to, so low tiers are made of what the router dropped |
| `random_level_order` | tiers are in order no more often than random groups: routing says nothing about quality |
| `means_against_order` | below tier 1, a lower tier is likelier on average than a higher one |
| `top_tier_not_best` | tier 1 is no better than the lowest tier: there is nothing to learn from |
| `random_level_results` | training on ranked tiers gives what training on random ones gives |
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from .health import DEAD_SHARE


Log = Sequence[Mapping[str, Any]]

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


# ----------------------------------------------------------------------------------------------------- training log
def training_findings(
    log_history: Log, *, vocab_size: int | None = None, erl_coef: float | None = None
) -> list[Finding]:
    """What shows at the end of a training log.

    Args:
        log_history (sequence of mappings): `trainer.state.log_history`, or its beginning.
        vocab_size (`int`, *optional*): V, which a uniform guess depends on; without it, `low_tiers_running_away` is
            not looked for.
        erl_coef (`float`, *optional*): the weight in use, to name in the advice.
    """
    num_tiers = _count_tiers(log_history)
    found = [_experts_collapsing(log_history)]
    if num_tiers > 1:
        found += [
            _tier_1_falling(log_history, num_tiers, erl_coef),
            _low_tiers_running_away(log_history, num_tiers, vocab_size),
            _logged_order_from_end_of_sequence(log_history, num_tiers),
        ]
    return [finding for finding in found if finding is not None]


def _tier_1_falling(log: Log, num_tiers: int, erl_coef: float | None) -> Finding | None:
    # Where tiers write their own responses, tier 1's likelihood is of what it wrote; L_NTP is always of the references.
    top = [(step, -loss) for step, loss in _series(log, "ntp_loss")] or _series(log, _likelihood_key(1))
    steps, values = _smooth(top)
    if not values:
        return None
    best = max(range(len(values)), key=values.__getitem__)
    if values[best] - values[-1] <= max(FALL, NOISE * _noise(top)):
        return None
    shows = f"Tier 1's likelihood fell from {values[best]:.3f} (step {steps[best]}) to {values[-1]:.3f} nats a token"
    _, bottom = _smooth(_series(log, _likelihood_key(num_tiers)))
    if not bottom or bottom[0] - bottom[-1] <= FALL:
        return Finding(
            "tier_1_falling",
            f"{shows}, and tier {num_tiers}'s did not fall with it, so it is not dragged down by low tiers. Lower "
            "learning_rate, and look at the data.",
        )
    current = "" if erl_coef is None else f" (now {erl_coef})"
    return Finding(
        "tier_1_falling",
        f"{shows} while tier {num_tiers}'s fell from {bottom[0]:.3f} to {bottom[-1]:.3f}. Low tiers are pushed down "
        f"and drag tier 1 along, whose weights they share: lower erl_coef{current}, bound the push with "
        "lower_tier_floor='uniform', or use an objective that stops once tiers are in order.",
    )


def _low_tiers_running_away(log: Log, num_tiers: int, vocab_size: int | None) -> Finding | None:
    if vocab_size is None:
        return None
    uniform = -math.log(vocab_size)
    away = []
    for tier in range(2, num_tiers + 1):
        _, values = _smooth(_series(log, _likelihood_key(tier)))
        before = values[: -max(WINDOW, len(values) // RECENT)]
        if before and values[-1] < uniform and before[-1] - values[-1] > FALL:
            away.append(f"tier {tier} is at {values[-1]:.2f} (from {values[0]:.2f})")
    if not away:
        return None
    return Finding(
        "low_tiers_running_away",
        f"In nats a token, {' and '.join(away)}, below a uniform guess over {vocab_size} tokens ({uniform:.2f}) and "
        "still falling. Nothing more is learnt from that, and tier 1 may be dragged along: set "
        "lower_tier_floor='uniform', lower erl_coef, or use an objective that stops once tiers are in order.",
    )


def _logged_order_from_end_of_sequence(log: Log, num_tiers: int) -> Finding | None:
    pairs = []
    for tier in range(1, num_tiers):
        keys = [_likelihood_key(t, suffix) for suffix in ("", "_no_eos") for t in (tier, tier + 1)]
        # Tiers are compared on the same batch, whose ups and downs they share.
        rows = [[row[key] for key in keys] for row in log if all(_is_number(row.get(key)) for key in keys)][-WINDOW:]
        if len(rows) == WINDOW:
            pairs.append((tier, median(row[0] - row[1] for row in rows), median(row[2] - row[3] for row in rows)))
    return _order_from_end_of_sequence(pairs)


def _order_from_end_of_sequence(pairs: list[tuple[int, float, float]]) -> Finding | None:
    """From (tier, its lead over the next one, the same without end-of-sequence tokens)."""
    shown = [
        f"tier {tier} leads tier {tier + 1} by {lead:.3f} nats a token, but by {content_lead:.3f} without them"
        for tier, lead, content_lead in pairs
        if lead > LEAD and content_lead < CONTENT_SHARE * lead
    ]
    if not shown:
        return None
    return Finding(
        "order_from_end_of_sequence",
        f"Order by end-of-sequence tokens alone: {'; '.join(shown)}. These tiers differ in when they stop, not in what "
        "they say. Read log_likelihood_no_eos beside log_likelihood, and do not take this order for one of quality.",
        severity="note",
    )


def _experts_collapsing(log: Log) -> Finding | None:
    dead = _series(log, "router/dead_experts")
    _, values = _smooth(dead)
    if not values or values[-1] - values[0] < max(DEAD_RISE, NOISE * _noise(dead)):
        return None
    return Finding(
        "experts_collapsing",
        f"Dead experts (below {DEAD_SHARE:.0%} of an even share) rose from {values[0]:.2f} to {values[-1]:.2f} a "
        "layer. The router drops experts, and low tiers are made of those: raise balance_coef, lower erl_coef, or "
        "leave the router out of `targets`.",
    )


# ------------------------------------------------------------------------------------------------------ router health
def health_findings(health: Mapping[str, Any]) -> list[Finding]:
    """What shows in router health.

    Args:
        health (mapping): with `layers`, each with `utilisation`: a number for each expert, relative to K/E.
    """
    collapsed = []
    for index, layer in enumerate(health.get("layers") or []):
        utilisation = [value for value in layer.get("utilisation") or [] if _is_number(value)]
        dead = sum(value < DEAD_SHARE for value in utilisation)
        if dead and dead >= COLLAPSED_SHARE * len(utilisation):
            collapsed.append(f"{dead} of {len(utilisation)} in layer {layer.get('layer', index)}")
    if not collapsed:
        return []
    return [
        Finding(
            "experts_collapsing",
            f"Dead experts (below {DEAD_SHARE:.0%} of an even share): {', '.join(collapsed)}. Low tiers are made "
            "of experts that see no tokens, so what they say is noise: use fewer tiers, grouping='high_only', or a "
            "layer_scope without these layers; if training did it, raise balance_coef.",
        )
    ]


# ------------------------------------------------------------------------------------------------------- tier quality
def quality_findings(quality: Mapping[str, Any]) -> list[Finding]:
    """What shows in [`~ordmoe_peft.tools.measure.quality.TierQuality`], as plain data.

    Args:
        quality (mapping): `tiers`, with each tier's likelihoods and accuracy, and `order`, with the shares of samples
            whose tiers are in order.
    """
    tiers = quality.get("tiers") or []
    found = [_random_level_order(quality)]
    if len(tiers) > 1:
        found += [
            _top_tier_not_best(tiers[0], tiers[-1]),
            _means_against_order(tiers),
            _measured_order_from_end_of_sequence(tiers),
        ]
    return [finding for finding in found if finding is not None]


def _random_level_order(quality: Mapping[str, Any]) -> Finding | None:
    full = (quality.get("order") or {}).get("full") or {}
    share, level, error, what = full.get("share"), full.get("random"), full.get("random_stderr") or 0, "random groups'"
    if not _is_number(level):
        # Tier 1 leads random groups, too, since it stays the top K: only the tiers below it can come in any order.
        num_tiers = quality.get("num_tiers")
        level, error, what = 1 / math.factorial(num_tiers - 1) if num_tiers else None, 0, "chance's"
    if not _are_numbers((share, level)):
        return None
    margin = STANDARD_ERRORS * math.hypot(full.get("stderr") or 0, error)
    # Where random groups are in order on nearly all samples, too, no order could stand out.
    if share > level + margin or level + margin >= 1:
        return None
    return Finding(
        "random_level_order",
        f"The likelihoods of all tiers are in order on {share:.1%} of samples, and {what} level is {level:.1%} (within "
        f"{STANDARD_ERRORS} standard errors, {margin:.1%}): below the top experts, the router's ranking says nothing "
        "about quality on this data. OrdMoE has no signal here; expect what grouping='random' gives.",
    )


def _top_tier_not_best(top: Mapping[str, Any], bottom: Mapping[str, Any]) -> Finding | None:
    worse = []
    if _are_numbers(pair := (top.get("log_likelihood"), bottom.get("log_likelihood"))) and pair[0] <= pair[1]:
        worse.append("likelihood {:.3f} against {:.3f} nats a token".format(*pair))
    pair = tuple((tier.get("accuracy") or {}).get("overall") for tier in (top, bottom))
    # Where neither is ever right, exact match cannot tell them apart.
    if _are_numbers(pair) and pair[0] <= pair[1] > 0:
        worse.append("exact match {:.1%} against {:.1%}".format(*pair))
    if not worse:
        return None
    return Finding(
        "top_tier_not_best",
        f"Tier 1 is not better than tier {bottom.get('tier', 'C')}: {', '.join(worse)}. The premise of OrdMoE does not "
        "hold for this model and data: check prompt format and data first, then use supervised fine-tuning.",
    )


def _means_against_order(tiers: Sequence[Mapping[str, Any]]) -> Finding | None:
    names = {"log_likelihood": "", "log_likelihood_no_eos": " without end-of-sequence tokens"}
    shown = [
        f"tier {lower['tier']} is above tier {higher['tier']}{name} ({lower[key]:.3f} against {higher[key]:.3f})"
        for key, name in names.items()
        for higher, lower in pairwise(tiers[1:])
        if _are_numbers((higher.get(key), lower.get(key))) and lower[key] > higher[key]
    ]
    if not shown:
        return None
    return Finding(
        "means_against_order",
        f"Mean likelihoods run against the order: {'; '.join(shown)}, in nats a token. Between these tiers the "
        "router's ranking is no order of quality; fewer tiers, or an objective over the ends alone, do not rest on it.",
        severity="note",
    )


def _measured_order_from_end_of_sequence(tiers: Sequence[Mapping[str, Any]]) -> Finding | None:
    pairs = []
    for higher, lower in pairwise(tiers):
        values = [tier.get(key) for key in ("log_likelihood", "log_likelihood_no_eos") for tier in (higher, lower)]
        if _are_numbers(values):
            pairs.append((higher["tier"], values[0] - values[1], values[2] - values[3]))
    return _order_from_end_of_sequence(pairs)


# ----------------------------------------------------------------------------------------------------------- ablation
def ablation_findings(results: Mapping[str, Any]) -> list[Finding]:
    """What shows in ablation results.

    A cell of ranked tiers is compared with the one of random groups whose other settings are the same. Their
    differences from the baseline are taken for independent; they share it, so the real interval is narrower.

    Args:
        results (mapping): `cells`, each with `name`, `settings` and `difference` (`mean`, `low` and `high` of a 95 %
            interval; higher is better; `None` for the baseline), and `unit`.
    """
    # The base as it is has no tiers; a cell without `grouping` has the default's, uniform.
    cells = [cell for cell in results.get("cells") or [] if cell["name"] != "base" and _are_numbers(_interval(cell))]
    pairs = [
        (ranked, random)
        for ranked in cells
        for random in cells
        if _grouping(ranked) != "random" == _grouping(random) and _other_settings(ranked) == _other_settings(random)
    ]
    unit = f" {results['unit']}" if results.get("unit") else ""
    found = [_random_level_results(ranked, random, unit) for ranked, random in pairs]
    return [finding for finding in found if finding is not None]


def _random_level_results(ranked: Mapping[str, Any], random: Mapping[str, Any], unit: str) -> Finding | None:
    (mean, low, high), (random_mean, random_low, random_high) = _interval(ranked), _interval(random)
    lead, half_width = mean - random_mean, math.hypot((high - low) / 2, (random_high - random_low) / 2)
    if lead > half_width:
        return None
    return Finding(
        "random_level_results",
        f"{ranked['name']} differs from the baseline by {mean:+.3g} [{low:+.3g}, {high:+.3g}]{unit}, and "
        f"{random['name']}, random groups with the same settings, by {random_mean:+.3g} [{random_low:+.3g}, "
        f"{random_high:+.3g}]{unit}. The lead of {lead:+.3g} is not above its margin, {half_width:.3g}, so nothing can "
        "be credited to the router's ranking: do not claim it for OrdMoE, or run more seeds.",
    )


def _interval(cell: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    difference = cell.get("difference") or {}
    return difference.get("mean"), difference.get("low"), difference.get("high")


def _grouping(cell: Mapping[str, Any]) -> str:
    """How the cell's tiers are cut; cells may name only the settings that differ from the default, `uniform`."""
    return cell["settings"].get("grouping") or "uniform"


def _other_settings(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cell["settings"].items() if key != "grouping"}


# ------------------------------------------------------------------------------------------------------------ numbers
def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(map(_is_number, values))


def _likelihood_key(tier: int, suffix: str = "") -> str:
    return f"tier_{tier}/log_likelihood{suffix}"


def _count_tiers(log: Log) -> int:
    """C: the lowest tier that was logged. Tiers between may have been skipped throughout."""
    tiers = (LIKELIHOOD_KEY.fullmatch(key) for row in log for key in row)
    return max((int(match[1]) for match in tiers if match), default=0)


def _series(log: Log, key: str) -> list[tuple[int, float]]:
    """The steps and values at which `key` was logged; skipped passes and other kinds of rows leave gaps."""
    return [(row.get("step", index), row[key]) for index, row in enumerate(log) if _is_number(row.get(key))]


def _smooth(series: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """The median of each [`WINDOW`] neighbours, at the step of the last of them."""
    ends = range(WINDOW, len(series) + 1)
    return (
        [series[end - 1][0] for end in ends],
        [median(value for _, value in series[end - WINDOW : end]) for end in ends],
    )


def _noise(series: list[tuple[int, float]]) -> float:
    """The standard deviation of one value, from neighbours' differences: slow trends and lone outliers hardly move it.

    For normal noise σ, the median of |x − y| is 0.954 σ.
    """
    return median(abs(after - before) for (_, before), (_, after) in pairwise(series)) / 0.954
