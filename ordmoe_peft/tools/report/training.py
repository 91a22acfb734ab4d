"""The report of a training run, from what its trainer logged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import page
from .drawing import Plot, Series, draw, line_plot, prepare, stacked_plot


# What a reader asks for first, out of some 200 settings.
HEADLINES = (
    "model_name_or_path",
    "dataset_name",
    "load_in_4bit",
    "num_tiers",
    "grouping",
    "objective",
    "erl_coef",
    "balance_coef",
    "lora_r",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)
NATS = "nats per token"
LOSSES = (
    ("loss", "total loss\n(nats per token)"),
    ("ntp_loss", "next-token loss\n(nats per token)"),
    ("erl_loss", "expert-rank loss\n(weighted nats)"),
    ("balance_loss", "balance loss\n(1 = even)"),
)
ROUTING = (
    ("router/drift_overlap", "top-k shared\nwith the base (share)"),
    ("router/drift_kl", "KL from the base\n(nats per token)"),
    ("router/imbalance", "imbalance\n(ratio)"),
    ("router/dead_experts", "dead experts\n(count)"),
)


def train_report(
    log_history: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    directory: "str | Path",
    findings: Sequence[Mapping[str, str]] | None = None,
) -> Path:
    """Write the report of a training run: tier likelihoods, losses, routing and cost.

    Args:
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`; more entries may follow, such as the metrics
            that `trainer.train()` returned.
        settings (`Mapping`): names and values that describe the run.
        directory (`str` or `Path`): folder for `report.html` and a PNG of each figure.
        findings (`Sequence[Mapping]`, *optional*): failure signatures, each with `name`, `message` and `severity`
            ("warning" or "info"). An empty sequence says that none showed, None that nobody looked.

    Returns:
        `Path`: the page.

    Raises:
        [`OrdMoEConfigError`]: matplotlib is not installed.
    """
    directory = prepare(directory)
    tiers = range(1, _num_tiers(log_history) + 1)
    likelihoods = [
        _likelihoods(log_history, tiers, "log_likelihood", "likelihood", "Likelihood of each tier"),
        _likelihoods(
            log_history, tiers, "log_likelihood_no_eos", "likelihood_no_eos", "Without end-of-sequence tokens"
        ),
        _top_tier(log_history),
    ]
    steps = max((entry.get("step", 0) for entry in log_history), default=0)
    html = page.page(
        "Training report",
        f"{settings.get('model_name_or_path', 'A model')}, {steps} steps.",
        page.findings(findings),
        page.section("Tiers", draw(likelihoods, directory), _tier_table(log_history, tiers)),
        page.section("Losses and routing", draw([_losses(log_history), _routing(log_history)], directory)),
        page.section("Cost", _cost(log_history)),
        page.section("Settings", *_settings(settings)),
    )
    return page.write_page(directory, html)


def _points(log_history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[Any]]:
    entries = [entry for entry in log_history if key in entry and "step" in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def _series(log_history: Sequence[Mapping[str, Any]], key: str, label: str, style: int = 0) -> list[Series]:
    """A metric in training, and the same on held-out data."""
    return [
        Series(label, *_points(log_history, key), style),
        Series(f"{label}, held out", *_points(log_history, f"eval_{key}"), style, is_hollow=True),
    ]


def _num_tiers(log_history: Sequence[Mapping[str, Any]]) -> int:
    keys = {key for entry in log_history for key in entry}
    tier = 0
    while f"tier_{tier + 1}/log_likelihood" in keys:
        tier += 1
    return tier


def _likelihoods(
    log_history: Sequence[Mapping[str, Any]], tiers: range, metric: str, name: str, title: str
) -> Plot | None:
    series = [
        one for tier in tiers for one in _series(log_history, f"tier_{tier}/{metric}", f"tier {tier}", style=tier - 1)
    ]
    caption = "Mean log-likelihood of the responses when every MoE layer is held to one tier of experts."
    if metric.endswith("no_eos"):
        caption = "The same over the words of the response alone: an order that shows only above is about its end."
    return line_plot(name, title, series, f"log-likelihood ({NATS})", "step", caption)


def _top_tier(log_history: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Tier 1 again on its own scale: what low tiers do by the tens would flatten it."""
    series = _series(log_history, "tier_1/log_likelihood", "tier 1")
    series += _series(log_history, "tier_1/log_likelihood_no_eos", "without end tokens", style=2)
    caption = "The model as it will be used, on a scale of its own. If it falls, the expert-rank loss is too strong."
    return line_plot("tier_1", "Tier 1 alone", series, f"log-likelihood ({NATS})", "step", caption)


def _stack(log_history: Sequence[Mapping[str, Any]], metrics: Sequence[tuple[str, str]]) -> list:
    return [(label, [Series(label, *_points(log_history, key))]) for key, label in metrics]


def _losses(log_history: Sequence[Mapping[str, Any]]) -> Plot | None:
    caption = "The expert-rank loss is negative and falls without bound as low tiers lose likelihood."
    return stacked_plot("losses", "Losses", _stack(log_history, LOSSES), "step", caption)


def _routing(log_history: Sequence[Mapping[str, Any]]) -> Plot | None:
    caption = "Means over the MoE layers. Drift compares the adapted routers with the base's."
    return stacked_plot("routing", "Routing", _stack(log_history, ROUTING), "step", caption)


def _tier_table(log_history: Sequence[Mapping[str, Any]], tiers: range) -> str:
    """First and last values, to the digits that a plot does not show."""
    columns = ("log-likelihood (nats per token)", "first", "last", "held out, last")
    rows = []
    for tier in tiers:
        for metric, suffix in (("log_likelihood", ""), ("log_likelihood_no_eos", ", without end tokens")):
            values = _points(log_history, f"tier_{tier}/{metric}")[1] or [None]
            held_out = _points(log_history, f"eval_tier_{tier}/{metric}")[1] or [None]
            rows.append((f"tier {tier}{suffix}", *map(page.number, (values[0], values[-1], held_out[-1]))))
    return page.table(columns, rows)


def _cost(log_history: Sequence[Mapping[str, Any]]) -> str:
    """What a step took, from the metrics at the end of the run."""
    metrics: dict[str, Any] = {}
    for entry in log_history:
        metrics.update({key: value for key, value in entry.items() if page.is_number(value)})
    seconds = metrics.get("train_seconds_per_step")
    if seconds is None and metrics.get("train_steps_per_second"):
        seconds = 1 / metrics["train_steps_per_second"]
    scaled = {name: metrics.get(key, float("nan")) / unit for name, key, unit in COSTS}
    rows = [("seconds per step", page.number(seconds)), *((name, page.number(scaled[name])) for name in scaled)]
    return page.table(("cost", "value"), [row for row in rows if row[1] != page.MISSING])


# Name with unit, metric, how many of the metric's units make one.
COSTS = (
    ("samples per second", "train_samples_per_second", 1),
    ("wall-clock (minutes)", "train_runtime", 60),
    ("peak memory (GB)", "peak_memory_bytes", 1e9),
    ("tokens seen (millions)", "num_tokens", 1e6),
    ("floating-point operations, estimated (10¹²)", "total_flos", 1e12),
)


def _settings(settings: Mapping[str, Any]) -> tuple[str, str]:
    headlines = {name: settings[name] for name in HEADLINES if name in settings}
    rest = {name: settings[name] for name in sorted(settings) if name not in headlines}
    return page.pairs(headlines), page.folded(f"All other settings ({len(rest)})", page.pairs(rest))
