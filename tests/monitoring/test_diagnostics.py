import json
import math
import random

import pytest

from ordmoe_peft.monitoring.diagnostics import (
    Finding,
    ablation_findings,
    health_findings,
    quality_findings,
    training_findings,
)


def names(findings) -> list[str]:
    return [finding.name for finding in findings]


def test_a_finding_is_plain_data():
    finding = Finding("tier_1_falling", "It fell.")
    assert json.loads(json.dumps(finding.to_dict())) == {
        "name": "tier_1_falling",
        "message": "It fell.",
        "severity": "warning",
    }


# ----------------------------------------------------------------------------------------------------- training log
STEADY = [-0.5] * 12


def tier_log(*tiers, every=10):
    """A log of each tier's likelihood, tier 1 first, with what else trainers log between and after."""
    rows = []
    for index, values in enumerate(zip(*tiers, strict=True)):
        step = every * (index + 1)
        rows.append({"step": step} | {f"tier_{j}/log_likelihood": value for j, value in enumerate(values, start=1)})
        rows.append({"step": step, "eval_loss": 1.0})
    return [*rows, {"step": step, "train_runtime": 3.0}]


def falling(start, end, count=12):
    return [start + (end - start) * index / (count - 1) for index in range(count)]


def test_tier_1_falls_on_the_references_not_on_its_own_responses():
    """With generated responses tier 1's logged likelihood is of what it wrote, which may fall as it is sampled."""
    written = tier_log([-0.5] * 10 + [-2.0] * 2, [-2.0] * 6 + [-9.0] * 6)
    assert names(training_findings([row | {"ntp_loss": 0.4} for row in written])) == []
    steady = tier_log([-0.5] * 12, [-2.0] * 12)
    falling = [row | {"ntp_loss": 0.5 if place < 10 else 2.0} for place, row in enumerate(steady)]
    assert names(training_findings(falling)) == ["tier_1_falling"]


def test_tier_1_falling_with_the_lowest_is_the_loss_pulling():
    """Medians of three: tier 1 is at −0.5 first at step 30, and at −2 in the end; tier 2 falls from −2 to −9."""
    log = tier_log([-0.5] * 10 + [-2.0] * 2, [-2.0] * 6 + [-9.0] * 6)
    (finding,) = training_findings(log, erl_coef=0.3)
    assert finding.name == "tier_1_falling"
    assert "from -0.500 (step 30) to -2.000 nats a token while tier 2's fell from -2.000 to -9.000" in finding.message
    assert "erl_coef (now 0.3)" in finding.message


def test_tier_1_falling_alone_is_not_blamed_on_the_loss():
    (finding,) = training_findings(tier_log([-0.5] * 10 + [-2.0] * 2, STEADY))
    assert finding.name == "tier_1_falling"
    assert "learning_rate" in finding.message
    assert "erl_coef" not in finding.message


@pytest.mark.parametrize(
    "top",
    [falling(-2.0, -0.5), [*STEADY[1:], -9.0], STEADY[:10] + [-0.59] * 2, [-0.5] + [-9.0] * 11],
    ids=["rises", "one odd batch", "falls by 0.09 nats", "one odd batch at the start"],
)
def test_tier_1_holding_is_silent(top):
    assert training_findings(tier_log(top, falling(-1.0, -9.0))) == []


@pytest.mark.parametrize("seed", range(4))
def test_noise_of_batches_is_no_fall(seed):
    """Batches of standard deviation 0.3 around a steady mean, looked at after each of 100 logs."""
    draw = random.Random(seed)
    top = [draw.gauss(-1.5, 0.3) for _ in range(100)]
    log = tier_log(top, [-2.0] * 100)
    assert all(training_findings(log[:rows]) == [] for rows in range(len(log)))
    (finding,) = training_findings(tier_log([*top, *(value - 3 for value in top[-10:])], [-2.0] * 110))
    assert finding.name == "tier_1_falling"


def test_low_tiers_running_away():
    """−ln 100 = −4.61. Tier 2 falls to −5 and tier 3 to −12; medians of three lag one value behind the last."""
    (finding,) = training_findings(tier_log(STEADY, falling(-1.0, -5.4), falling(-1.0, -12.0)), vocab_size=100)
    assert finding.name == "low_tiers_running_away"
    assert "tier 2 is at -5.00 (from -1.40) and tier 3 is at -11.00 (from -2.00)" in finding.message
    assert "100 tokens (-4.61)" in finding.message


@pytest.mark.parametrize(
    ("bottom", "vocab_size"),
    [(falling(-1.0, -4.0), 100), (falling(-1.0, -8.0)[:6] + [-8.0] * 6, 100), (falling(-1.0, -12.0), None)],
    ids=["better than a uniform guess", "come to rest", "vocabulary unknown"],
)
def test_low_tiers_within_bounds_are_silent(bottom, vocab_size):
    assert training_findings(tier_log(STEADY, bottom), vocab_size=vocab_size) == []


def test_passes_that_were_skipped_leave_gaps():
    """Tier 2 is logged every other time, once as NaN; its order of values is what counts."""
    log = tier_log(STEADY + STEADY, falling(-1.0, -9.0, 24), falling(-1.0, -2.0, 24))
    for row in log[2::4]:
        row.pop("tier_2/log_likelihood", None)
    log[8]["tier_2/log_likelihood"] = math.nan
    assert names(training_findings(log, vocab_size=100)) == ["low_tiers_running_away"]


def test_a_middle_tier_that_is_never_logged_hides_nothing():
    log = [
        row | {"tier_3/log_likelihood": row.pop("tier_2/log_likelihood", None)}
        for row in tier_log(STEADY, falling(-1, -9))
    ]
    (finding,) = training_findings(log, vocab_size=100)
    assert finding.message.startswith("In nats a token, tier 3 is at -8.27")


def eos_log(full, content):
    row = {f"tier_{j}/log_likelihood": value for j, value in enumerate(full, start=1)}
    row |= {f"tier_{j}/log_likelihood_no_eos": value for j, value in enumerate(content, start=1)}
    return [row] * 3


def test_order_by_end_of_sequence_alone():
    """Tier 2 leads tier 3 by 0.2 with those tokens and trails by 0.1 without; tier 1 leads tier 2 in both."""
    (finding,) = training_findings(eos_log([-0.1, -0.5, -0.7], [-0.2, -1.2, -1.1]))
    assert (finding.name, finding.severity) == ("order_from_end_of_sequence", "note")
    assert "tier 2 leads tier 3 by 0.200 nats a token, but by -0.100 without them" in finding.message
    assert "tier 1" not in finding.message


@pytest.mark.parametrize(
    ("full", "content"),
    [([-0.1, -0.5, -0.7], [-0.2, -1.0, -1.1]), ([-0.1, -0.5, -0.54], [-0.2, -1.2, -1.1])],
    ids=["the answer leads, too", "no lead to explain"],
)
def test_order_by_content_is_silent(full, content):
    assert training_findings(eos_log(full, content)) == []


def test_order_is_judged_on_the_same_batches():
    """Batches differ by far more than tiers do: a median of each tier by itself would see −1 against −5."""
    rows = [eos_log([-0.1, full, full - 0.3], [-0.1, full, full - 0.3])[0] for full in (-5.0, -1.0, -9.0)]
    assert training_findings(rows) == []
    for row in rows:
        row["tier_3/log_likelihood_no_eos"] = row["tier_2/log_likelihood_no_eos"]
    assert names(training_findings(rows)) == ["order_from_end_of_sequence"]


def test_experts_collapsing_while_training():
    log = [{"step": step, "router/dead_experts": dead} for step, dead in enumerate([0.25, 0.25, 0.25, 0.5, 2, 2.5, 3])]
    (finding,) = training_findings(log)
    assert finding.name == "experts_collapsing"
    assert "rose from 0.25 to 2.50 a layer" in finding.message


@pytest.mark.parametrize(
    "dead",
    [[2.0, 2.0, 2.0, 2.0, 2.25, 2.25], [1, 3, 0, 2, 0, 3, 1, 2, 1, 3, 2]],
    ids=["dead before, one more in four layers", "few tokens a log"],
)
def test_experts_that_stay_as_they_were_are_silent(dead):
    assert training_findings([{"step": 1, "router/dead_experts": value} for value in dead]) == []


@pytest.mark.parametrize("log", [[], [{"step": 1, "loss": 0.5}], tier_log([-0.5] * 8 + [-9.0] * 4)])
def test_logs_without_tiers_to_compare_are_silent(log):
    """Supervised fine-tuning has tier 1 alone: what goes wrong there is not this method's."""
    assert training_findings(log, vocab_size=10) == []


# ------------------------------------------------------------------------------------------------------ router health
def test_layers_with_dead_experts():
    """Of 16 experts, 2 are dead in layer 3 (12 %) and 1 in layer 1 (6 %), which may be chance."""
    layers = [
        {"layer": 1, "utilisation": [0.005] + [1.0] * 15},
        {"layer": 3, "utilisation": [0.0, 0.009, 0.02] + [1.2] * 13},
    ]
    (finding,) = health_findings({"layers": layers})
    assert finding.name == "experts_collapsing"
    assert "2 of 16 in layer 3" in finding.message
    assert "layer 1" not in finding.message
    assert health_findings({"layers": layers[:1]}) == []


# ------------------------------------------------------------------------------------------------------- tier quality
def quality(full=None, likelihood=(-0.1, -0.5, -0.9), content=(-0.2, -1.0, -1.8), accuracy=(0.9, 0.5, 0.4)):
    """Tiers in order on 60 % of samples, random groups on 45 %, unless told otherwise."""
    tiers = [
        {"tier": tier, "log_likelihood": whole, "log_likelihood_no_eos": part, "accuracy": {"overall": right}}
        for tier, (whole, part, right) in enumerate(zip(likelihood, content, accuracy, strict=True), start=1)
    ]
    order = {"share": 0.6, "stderr": 0.02, "chance": 1 / 6, "random": 0.45, "random_stderr": 0.02} | (full or {})
    return {"num_tiers": len(tiers), "tiers": tiers, "order": {"full": order}}


def test_tiers_in_order_are_silent():
    assert quality_findings(quality()) == []


@pytest.mark.parametrize(
    ("full", "shown"),
    [
        ({"share": 0.5}, ["random_level_order"]),
        ({"share": 0.51}, []),
        ({"share": 0.51, "stderr": 0.03}, ["random_level_order"]),
        ({"share": 0.3}, ["random_level_order"]),
        ({"share": 0.53, "random": None, "random_stderr": None}, ["random_level_order"]),
        ({"share": 0.55, "random": None, "random_stderr": None}, []),
        ({"share": 0.99, "random": 0.99}, []),
        ({"share": None}, []),
    ],
)
def test_order_at_the_level_of_random_groups(full, shown):
    """2√(0.02² + 0.02²) = 0.057 above 0.45 is 0.507; with 0.03, 0.522. Without them, tier 1 leads anyway and
    tiers 2 and 3 come in either order: 1/2 + 2 · 0.02 = 0.54."""
    assert names(quality_findings(quality(full))) == shown


def test_means_against_the_order_below_tier_1():
    """With end tokens tiers 2 and 3 are in order, without them tier 3 leads."""
    findings = quality_findings(quality(content=(-0.2, -1.3, -1.1)))
    assert names(findings) == ["means_against_order", "order_from_end_of_sequence"]
    finding = findings[0]
    assert "tier 3 is above tier 2 without end-of-sequence tokens (-1.100 against -1.300)" in finding.message
    assert "tier 3 is above tier 2 (" not in finding.message


def test_order_at_the_level_of_random_groups_names_the_shares():
    (finding,) = quality_findings(quality({"share": 0.48}))
    assert "48.0% of samples, and random groups' level is 45.0% (within 2 standard errors, 5.7%)" in finding.message


def by_class(confident, fragile, full=None):
    """Shares of tiers below tier 1 that are in order: (share, random groups' share, number of samples) by class."""
    data = quality(full)
    for name, values in {"confident": confident, "fragile": fragile}.items():
        share = dict(zip(("share", "random", "num_samples"), values, strict=True))
        data["order"][f"below_{name}"] = share | {"stderr": 0.0, "random_stderr": 0.0}
    return data


@pytest.mark.parametrize(
    ("confident", "fragile", "is_shown"),
    [
        ((0.62, 0.5, 600), (0.5, 0.5, 600), True),
        ((0.62, 0.5, 600), (0.4, 0.5, 600), True),
        ((0.57, 0.5, 600), (0.55, 0.5, 600), False),
        ((0.57, 0.5, 600), (0.45, 0.5, 600), True),
        ((0.55, 0.5, 600), (0.4, 0.5, 600), False),
        ((0.5, 0.5, 600), (0.62, 0.5, 600), False),
        ((1.0, 0.0, 29), (0.5, 0.5, 600), False),
        ((1.0, 0.0, 600), (0.5, 0.5, 29), False),
        ((1.0, 0.0, 30), (0.5, 0.5, 30), True),
        ((0.07, 0.0, 100), (0.0, 0.0, 100), False),
        ((1.0, 0.93, 100), (1.0, 1.0, 100), False),
        ((0.62, None, 600), (0.5, None, 600), False),
        ((0.62, 0.5, 600), (None, None, 0), False),
    ],
)
def test_order_on_confident_tokens_beyond_that_on_fragile_ones(confident, fragile, is_shown):
    """With 600 samples a share near one half has a standard error of 0.0204: 0.058 for a lead over random groups, and
    0.081 for the difference of two. A lead of 0.07 that stands out beside one of 0.05 that does not is no difference.
    Shares of 0 or 1 are not free of error: of 100 samples, 0.07 is 0.051 above 0 by its own standard error alone, and
    0.072 by those of all four shares.
    """
    findings = quality_findings(by_class(confident, fragile))
    assert names(findings) == ["order_on_confident_tokens"] * is_shown
    if is_shown:
        assert findings[0].severity == "note"


def test_order_on_confident_tokens_names_the_shares():
    (finding,) = quality_findings(by_class((0.62, 0.5, 600), (0.51, 0.5, 590)))
    shown = "on confident tokens on 62.0% of 600 samples against random groups' 50.0%, and on fragile tokens on 51.0%"
    assert f"Below tier 1, tiers are in order {shown} of 590 samples against random groups' 50.0%" in finding.message
    assert "the first lead is 11.0% larger (2 standard errors: 8.1%)" in finding.message


def test_ranks_without_a_signal_have_none_on_confident_tokens():
    """They would contradict each other."""
    findings = quality_findings(by_class((0.62, 0.5, 600), (0.5, 0.5, 600), full={"share": 0.5}))
    assert names(findings) == ["random_level_order"]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"likelihood": (-0.9, -0.3, -0.4), "content": (-0.9, -0.3, -0.4)}, "likelihood -0.900 against -0.400"),
        ({"accuracy": (0.4, 0.5, 0.4)}, "exact match 40.0% against 40.0%"),
    ],
)
def test_top_tier_not_best(changes, shown):
    (finding,) = quality_findings(quality(**changes))
    assert finding.name == "top_tier_not_best"
    assert f"Tier 1 is not better than tier 3: {shown}" in finding.message


def test_exact_match_that_nothing_reaches_says_nothing():
    assert quality_findings(quality(accuracy=(0.0, 0.0, 0.0))) == []


def test_measured_order_by_end_of_sequence_alone():
    """The one lead of C = 2, 0.4, is 0.03 without those tokens, under a tenth."""
    (finding,) = quality_findings(quality(likelihood=(-0.1, -0.5), content=(-1.0, -1.03), accuracy=(0.9, 0.5)))
    assert finding.name == "order_from_end_of_sequence"
    assert "tier 1 leads tier 2 by 0.400 nats a token, but by 0.030" in finding.message


def test_quality_that_was_not_measured_is_silent():
    nothing = {"tier": 1, "log_likelihood": math.nan, "log_likelihood_no_eos": None, "accuracy": {}}
    assert quality_findings({}) == []
    assert quality_findings({"tiers": [nothing, nothing], "order": {}}) == []


# ----------------------------------------------------------------------------------------------------------- ablation
def cell(name, mean, half_width, **settings):
    difference = None if mean is None else {"mean": mean, "low": mean - half_width, "high": mean + half_width}
    return {"name": name, "settings": settings, "mean": 90.0, "difference": difference}


BASELINE = cell("SFT", None, None, num_tiers=1)


@pytest.mark.parametrize(
    ("mean", "shown"), [(0.9, ["random_level_results"]), (1.1, []), (-0.5, ["random_level_results"])]
)
def test_results_at_the_level_of_random_groups(mean, shown):
    """Half-widths 0.6 and 0.8 make √(0.36 + 0.64) = 1 for the difference."""
    cells = [BASELINE, cell("uniform", mean, 0.6, grouping="uniform"), cell("random", 0.0, 0.8, grouping="random")]
    assert names(ablation_findings({"cells": cells})) == shown


def test_results_name_cells_and_numbers():
    cells = [cell("C = 3", 0.5, 0.25), cell("control", 0.25, 0.5, grouping="random")]
    (finding,) = ablation_findings({"cells": cells, "unit": "points"})
    assert "C = 3 differs from the baseline by +0.5 [+0.25, +0.75] points" in finding.message
    assert "control, random groups with the same settings, by +0.25 [-0.25, +0.75] points" in finding.message
    assert "The lead of +0.25 is not above its margin, 0.559" in finding.message


def test_the_base_is_no_cell_of_tiers():
    cells = [cell("base", -9.0, 1.0), BASELINE, cell("random", 0.0, 0.8, grouping="random")]
    assert ablation_findings({"cells": cells}) == []


def test_only_cells_with_the_same_other_settings_are_compared():
    cells = [
        cell("uniform, λ 0.1", 0.1, 0.5, grouping="uniform", erl_coef=0.1),
        cell("uniform, λ 0.01", 0.1, 0.5, grouping="uniform", erl_coef=0.01),
        cell("random, λ 0.01", 0.1, 0.5, grouping="random", erl_coef=0.01),
    ]
    (finding,) = ablation_findings({"cells": cells})
    assert finding.message.startswith("uniform, λ 0.01 differs")
