"""What tests of reports share: results of every kind, and pages as a reader gets them."""

import re
from html.parser import HTMLParser
from pathlib import Path

from matplotlib.figure import Figure

from ordmoe_peft.monitoring.health import LayerHealth
from ordmoe_peft.tools.measure.correlation import QualityCorrelation, RankCorrelation
from ordmoe_peft.tools.measure.inspection import HealthReport
from ordmoe_peft.tools.measure.quality import ORDERS, OrderShare, TierMeansByClass, TierQuality, TierTexts
from ordmoe_peft.tools.report import ablate_report, inspect_report, tiers_report, train_report


MINUS = "\u2212"
HOSTILE = "\"><script>alert('x')</script> <img src=http://evil.example/x> & $\\frac{"
VOID = {"meta", "img", "source", "wbr"}


class Page(HTMLParser):
    """What a browser sees: tags with their attributes, text without the style, and whether tags are balanced."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        if "style" not in self.open:
            self.words.append(words)

    @property
    def text(self) -> str:
        """Words in one line, minus signs as they are typed."""
        return re.sub(r"\s+", " ", " ".join(self.words)).replace(MINUS, "-")

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def log_history(steps: int = 20, num_tiers: int = 3) -> list[dict]:
    """As `trainer.state.log_history`: a line a step, an evaluation, the metrics of the whole run."""
    history = []
    for step in range(1, steps + 1):
        entry = {"loss": 1.0 / step, "ntp_loss": 0.9 / step, "erl_loss": -0.1 * step, "balance_loss": 1.2, "step": step}
        for tier in range(1, num_tiers + 1):
            entry[f"tier_{tier}/log_likelihood"] = -0.05 - (tier - 1) * step
            entry[f"tier_{tier}/log_likelihood_no_eos"] = -0.15 - (tier - 1) * step
        entry |= {"router/drift_overlap": 0.9, "router/drift_kl": 0.01 * step, "router/imbalance": 2.0}
        history.append(entry | {"router/dead_experts": step // 7})
    history.append({"eval_tier_1/log_likelihood": -0.08, "eval_loss": 0.1, "step": steps})
    history.append({"train_runtime": 50.0, "train_steps_per_second": 0.4, "total_flos": 3e12, "step": steps})
    return history


def health(num_layers: int = 4, num_experts: int = 8, num_tiers: int = 3, **changes) -> HealthReport:
    def layer(index: int) -> LayerHealth:
        experts = num_experts if index % 2 else num_experts // 2
        masses = [0.6 / tier for tier in range(1, num_tiers + 1)]
        return LayerHealth(
            layer=2 * index,
            name=f"model.layers.{2 * index}.mlp",
            num_experts=experts,
            top_k=2,
            num_tokens=12345,
            utilisation=[0.001, 2.0, *[1.0] * (experts - 2)],
            dead=1,
            imbalance=2.0,
            variation=0.5,
            marginal_entropy=1.9,
            token_entropy=0.8,
            score_std=0.4,
            gate_mass=masses,
            tier_probability=masses,
            drift_overlap=0.9,
            drift_kl=0.0123,
        )

    settings = {
        "model": "some/model",
        "num_tokens": 12345,
        "num_tiers": num_tiers,
        "grouping": "uniform",
        "is_fit": False,
        "reasons": ["Layer 2 has a dead expert."],
        "layers": [layer(index) for index in range(num_layers)],
    }
    return HealthReport(**(settings | changes))


def quality(num_layers: int = 4, num_tiers: int = 3, **changes) -> TierQuality:
    tiers = [
        TierMeansByClass(
            tier,
            accuracy={"color": 0.9, "overall": 0.917 / tier, "shape presence": 0.8},
            samples={"color": 500, "overall": 1000, "shape presence": 500},
            log_likelihood=-0.05 * tier,
            log_likelihood_no_eos=-0.15 * tier,
            log_likelihood_confident=-0.04 * tier,
            log_likelihood_fragile=-1.25 - tier,
        )
        for tier in range(1, num_tiers + 1)
    ]
    settings = {
        "model": "some/model",
        "num_samples": 1000,
        "num_tiers": num_tiers,
        "grouping": "uniform",
        "num_tokens": 4321,
        "confident_share": 0.75,
        "tiers": tiers,
        "order": dict.fromkeys(ORDERS, OrderShare(0.834, 0.012, 1 / 6, 0.171, 0.02, num_samples=987)),
        "spearman": QualityCorrelation(
            RankCorrelation(0.123, [0.1, None, *[0.3] * (num_layers - 2)], 0.03),
            RankCorrelation(None, [None] * num_layers, None),
            "exact match",
            "One layer had no variation.",
        ),
        "diversity": [[0.1 * tier for tier in range(num_tiers)]] * num_layers,
        "texts": [TierTexts("Which shape?", "circle", ["a circle", *[""] * (num_tiers - 1)])],
    }
    return TierQuality(**(settings | changes))


def results(num_cells: int = 4) -> dict:
    def cell(name: str, mean: float) -> dict:
        difference = {"mean": mean, "low": mean - 0.5, "high": mean + 0.5, "is_gain": mean > 0.5, "verdict": "so"}
        return {
            "name": name,
            "settings": {"erl_coef": 0.1},
            "chosen": {"max_steps": 120},
            "mean": 74.7 + mean,
            "stderr": 0.4,
            "per_seed": [74.1, 75.3],
            "difference": difference,
            "log_likelihood": {"mean": -0.25, "stderr": 0.01, "difference": difference},
            "tier_log_likelihood": [-0.05, -7.2],
            "seconds_per_step": 0.45,
        }

    long = "grouping=high_only,num_tiers=4,advantages=center,rewards=1-0.5-0.25-0,objective=plackett_luce,seed="
    cells = [cell(f"{long}{index}" if index % 3 else f"erl_coef={index}", index % 3 - 1) for index in range(num_cells)]
    first = cell("sft", 0) | {"difference": None, "log_likelihood": None, "tier_log_likelihood": None}
    notes = ["A sweep under zscore is blind."]
    return {"baseline": "sft", "metric": "exact match", "unit": "points", "cells": [first, *cells], "notes": notes}


# Name → (a function of a folder, names of its figures).
REPORTS = {
    "train": (
        lambda folder: train_report(log_history(), {"erl_coef": 0.01, "run_name": None}, folder),
        {"likelihood", "likelihood_no_eos", "tier_1", "losses", "routing"},
    ),
    "inspect": (
        lambda folder: inspect_report(health(), folder),
        {"utilisation", "entropy", "gate_mass", "tier_probability", "score_std", "drift"},
    ),
    "tiers": (
        lambda folder: tiers_report(quality(), folder),
        {"likelihood", "accuracy", "order", "spearman", "diversity"},
    ),
    "ablate": (lambda folder: ablate_report(results(), folder), {"difference", "log_likelihood", "cost"}),
}
LARGE = {
    "inspect": lambda folder: inspect_report(health(48, 256, 5), folder),
    "tiers": lambda folder: tiers_report(quality(48, 5), folder),
    "ablate": lambda folder: ablate_report(results(30), folder),
}


def visible_texts(figure: Figure) -> list:
    """Titles, labels, legends, values and those tick labels whose ticks are in view."""
    texts = list(figure.texts)
    for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())):
        texts += legend.get_texts()
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks()
            texts += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_visible()]
    return [label for label in texts if label.get_text() and label.get_visible()]
