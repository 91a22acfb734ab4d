"""The report of a training run, from what its trainer logged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ...monitoring.diagnostics import LIKELIHOOD_KEY
from ..tables import Table, is_number, number
from .drawing import HELD_OUT, Plot, line_plot
from .page import Findings, Section, write_page


Log = Sequence[Mapping[str, Any]]

# What a reader asks for first, out of some 200 settings.
HEADLINES = (
    *("model_name_or_path", "dataset_name", "load_in_4bit", "num_tiers", "grouping", "objective", "erl_coef"),
    *("balance_coef", "lora_r", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
)
NATS = "log-likelihood (nats per token)"
# Metric → label of its panel.
LOSSES = {
    "loss": "total loss\n(nats per token)",
    "ntp_loss": "next-token loss\n(nats per token)",
    "erl_loss": "expert-rank loss\n(weighted nats)",
    "balance_loss": "balance loss\n(1 = even)",
}
ROUTING = {
    "router/drift_overlap": "top-k shared\nwith the base (share)",
    "router/drift_kl": "KL from the base\n(nats per token)",
    "router/imbalance": "imbalance\n(ratio)",
    "router/dead_experts": "dead experts\n(count)",
}
# Name with unit, metric, how many of the metric's units make one.
COSTS = (
    ("seconds per step", "train_seconds_per_step", 1),
    ("samples per second", "train_samples_per_second", 1),
    ("wall-clock (minutes)", "train_runtime", 60),
    ("peak memory (GB)", "peak_memory_bytes", 1e9),
    ("tokens seen (millions)", "num_tokens", 1e6),
    ("floating-point operations, estimated (10¹²)", "total_flos", 1e12),
)
# How to read each figure.
LIKELIHOOD = "Mean log-likelihood of the responses when every MoE layer is held to one tier of experts."
NO_EOS = "The same over the words of the response alone: an order that shows only above is about its end."
TIER_1 = "The model as it will be used, on a scale of its own. If it falls, the expert-rank loss is too strong."
LOSS = "The expert-rank loss is negative and falls without bound as low tiers lose likelihood."
ROUTER = "Means over the MoE layers. Drift compares the adapted routers with the base's."


def train_report(
    log_history: Log, settings: Mapping[str, Any], directory: str | Path, findings: Findings = None
) -> Path:
    """Write the report of a training run: tier likelihoods, losses, routing and cost.

    Args:
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`; more entries may follow, such as the metrics
            that `trainer.train()` returned.
        settings (`Mapping`): names and values that describe the run.
        directory, findings: as [`write_page`] takes them.
    """
    whole, no_eos = (_tiers(log_history, metric) for metric in ("log_likelihood", "log_likelihood_no_eos"))
    losses, routing = (_panels(log_history, metrics) for metrics in (LOSSES, ROUTING))
    steps = max((entry.get("step", 0) for entry in log_history), default=0)
    return write_page(
        directory,
        "Training report",
        f"{settings.get('model_name_or_path', 'A model')}, {steps} step{'s' * (steps != 1)}.",
        [
            Section("Tiers", _likelihoods(whole, no_eos), [_tier_table(whole, no_eos)]),
            Section(
                "Losses and routing",
                [
                    line_plot("losses", "Losses", losses, "step", LOSS),
                    line_plot("routing", "Routing", routing, "step", ROUTER),
                ],
            ),
            Section("Cost", tables=[_cost_table(log_history)]),
            _settings(settings),
        ],
        findings=findings,
    )


def _line(log_history: Log, key: str) -> pd.Series:
    """The values of a metric by step."""
    values = {entry["step"]: entry[key] for entry in log_history if key in entry and "step" in entry}
    return pd.Series(values, dtype=float)


def _panels(log_history: Log, metrics: Mapping[str, str]) -> dict[str, dict[str, pd.Series]]:
    return {label: {label: _line(log_history, key)} for key, label in metrics.items()}


def _tiers(log_history: Log, metric: str) -> dict[str, pd.Series]:
    """A metric of each tier in training, and the same on held-out data."""
    keys = {key for entry in log_history for key in entry}
    lines: dict[str, pd.Series] = {}
    # Those without gradient may not be logged (`log_tiers_every=0`).
    for tier in sorted(int(found[1]) for found in map(LIKELIHOOD_KEY.fullmatch, keys) if found):
        lines[f"tier {tier}"] = _line(log_history, f"tier_{tier}/{metric}")
        lines[f"tier {tier}{HELD_OUT}"] = _line(log_history, f"eval_tier_{tier}/{metric}")
    return lines


def _likelihoods(whole: dict[str, pd.Series], no_eos: dict[str, pd.Series]) -> list[Plot | None]:
    # Tier 1 again: what low tiers do by the tens would flatten it.
    tier_1 = {label: line for label, line in whole.items() if label.removesuffix(HELD_OUT) == "tier 1"}
    tier_1 |= {label.replace("tier 1", "without end tokens"): no_eos[label] for label in tier_1}
    return [
        line_plot("likelihood", "Likelihood of each tier", {NATS: whole}, "step", LIKELIHOOD),
        line_plot("likelihood_no_eos", "Without end-of-sequence tokens", {NATS: no_eos}, "step", NO_EOS),
        line_plot("tier_1", "Tier 1 alone", {NATS: tier_1}, "step", TIER_1),
    ]


def _tier_table(whole: dict[str, pd.Series], no_eos: dict[str, pd.Series]) -> Table:
    """First and last values, to the digits that a plot does not show; one value where there is one, and its step."""

    def first(line: pd.Series) -> float | None:
        return line.iloc[0] if len(line) > 1 else None

    def last(line: pd.Series) -> float | None:
        return line.iloc[-1] if len(line) else None

    def steps(line: pd.Series) -> str | None:
        return " to ".join(map(str, dict.fromkeys((line.index[0], line.index[-1])))) if len(line) else None

    rows = [
        (f"{tier}{suffix}", first(line), last(line), steps(line), last(lines[f"{tier}{HELD_OUT}"]))
        for tier in whole
        if not tier.endswith(HELD_OUT)
        for lines, suffix in ((whole, ""), (no_eos, ", without end tokens"))
        for line in (lines[tier],)
    ]
    frame = pd.DataFrame(rows, columns=[NATS, "first", "last", "in steps", "held out, last"])
    if frame["first"].isna().all():
        frame = frame.drop(columns="first").rename(columns={"last": "measured once", "in steps": "in step"})
    return Table("", frame, dict.fromkeys(["first", "last", "measured once", "held out, last"], number))


def _cost_table(log_history: Log) -> Table:
    """What a step took, from the metrics at the end of the run."""
    metrics = {key: value for entry in log_history for key, value in entry.items() if is_number(value)}
    if metrics.get("train_steps_per_second"):
        metrics.setdefault("train_seconds_per_step", 1 / metrics["train_steps_per_second"])
    rows = [(name, metrics[key] / unit) for name, key, unit in COSTS if key in metrics]
    return Table("", pd.DataFrame(rows, columns=["cost", "value"]), {"value": number})


def _settings(settings: Mapping[str, Any]) -> Section:
    headlines = [name for name in HEADLINES if name in settings]
    rest = sorted(settings.keys() - set(headlines))

    def pairs(title: str, names: list[str]) -> Table:
        # One column would take numbers and texts for one type.
        values = pd.Series([settings[name] for name in names], dtype=object)
        return Table(title, pd.DataFrame({"setting": names, "value": values}))

    return Section("Settings", tables=[pairs("", headlines)], folded=[pairs(f"All other settings ({len(rest)})", rest)])
