"""One run of an ablation: attach an adapter to a fresh base, train it, evaluate it on held-out samples."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PrinterCallback, set_seed

from ...adapter.config import OrdMoEConfig
from ...data.generation import evaluation_mode
from ...data.samples import sample_batches
from ...moe_model import MoEModel
from ...tiers.routing import adapter_config
from ...training import OrdMoETrainer, OrdMoETrainingArguments
from ..measure.evaluation import evaluate_tiers, score_answers


# Of a run's training, its record is kept and nothing else.
QUIET: dict[str, Any] = {"save_strategy": "no", "eval_strategy": "no", "report_to": "none", "disable_tqdm": True}
HISTORY_ENTRIES = 5
TIERS_TO_SCORE = 3
SAMPLES_TO_SCORE = 256


def train_run(
    load_base: Callable[[], nn.Module],
    config: OrdMoEConfig,
    args: OrdMoETrainingArguments,
    seed: int,
    train_dataset: Any,
    processing_class: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train an adapter from `seed` and return the model and a record of its training.

    The base is loaded anew, because TRL patches the model that it trains; nothing of an earlier run is left then. Runs
    of one seed see the same samples in the same order, whatever their settings.

    Args:
        load_base (`Callable`): loads the base.
        config ([`OrdMoEConfig`]): the adapter.
        args ([`OrdMoETrainingArguments`]): training arguments; seeds, saving and reporting are set here.
        seed (`int`): decides LoRA's first factors, and the data order unless `args.data_seed` does.
        train_dataset ([`~datasets.Dataset`]), processing_class: as the trainer takes them.
    """
    gc.collect()  # a trainer refers to itself, so the last run's base would still be there
    started = time.perf_counter()
    base = load_base()
    load_seconds = time.perf_counter() - started
    own = {"output_dir": str(Path(args.output_dir, "last_run")), "seed": seed, "data_seed": data_seed(args, seed)}
    own |= {"resume_from_checkpoint": None, "overwrite_output_dir": True}  # SIGTERM may have left a checkpoint
    set_seed(seed)
    trainer = OrdMoETrainer(
        get_peft_model(base, config),
        args=replace(args, **QUIET | own),
        train_dataset=train_dataset,
        processing_class=processing_class,
    )
    trainer.remove_callback(PrinterCallback)
    metrics = trainer.train().metrics
    steps = trainer.state.global_step
    return trainer.model, {
        "steps": steps,
        "load_seconds": load_seconds,
        "train_seconds": metrics["train_runtime"],
        "seconds_per_step": metrics["train_runtime"] / max(steps, 1),
        "train_loss": metrics["train_loss"],
        "history": [entry for entry in trainer.state.log_history if "loss" in entry][-HISTORY_ENTRIES:],
    }


def data_seed(args: OrdMoETrainingArguments, seed: int) -> int:
    """What the choice and order of training samples follow: the run's seed, or `data_seed` where it is set."""
    return seed if args.data_seed is None else args.data_seed


def evaluate_run(
    model: nn.Module, processing_class: Any, dataset: Any, *, scores_tiers: bool, batch_size: int, **evaluation: Any
) -> dict[str, Any]:
    """What tier 1 does with each sample and, on request, the likelihood of the answers under every tier.

    Args:
        evaluation: further arguments of [`~ordmoe_peft.tools.measure.evaluation.evaluate_tiers`].
    """
    started = time.perf_counter()
    (result,) = evaluate_tiers(model, processing_class, dataset, batch_size=batch_size, **evaluation)
    likelihood = result.items.log_likelihood
    return {
        "accuracy": result.accuracy,
        "is_right": [int(is_right) for is_right in result.items.is_right],
        "log_likelihood": likelihood,
        "tier_log_likelihood": tier_likelihoods(model, processing_class, dataset, batch_size, likelihood)
        if scores_tiers
        else None,
        "evaluate_seconds": time.perf_counter() - started,
    }


def tier_likelihoods(
    model: nn.Module, processing_class: Any, dataset: Any, batch_size: int, top: list[float]
) -> list[float]:
    """Mean log-likelihood per answer token of each tier, on the first samples; tier 1's is known as `top`.

    A model of one tier, or without an adapter, is cut into three tiers, or as many as fit.
    """
    num_tiers = adapter_config(model).num_tiers
    if num_tiers == 1 or not isinstance(model, PeftModel):
        fits = min(layer.num_experts // layer.top_k for layer in MoEModel.of(model).layers)
        num_tiers = min(TIERS_TO_SCORE, fits)
    count = min(len(dataset), SAMPLES_TO_SCORE)
    totals = [sum(top[:count])] + [0.0] * (num_tiers - 1)
    with evaluation_mode(model):
        for samples in sample_batches(dataset.select(range(count)), batch_size):
            for tier in range(2, num_tiers + 1):
                likelihood_B, _ = score_answers(model, processing_class, samples, tier, num_tiers=num_tiers).means()
                totals[tier - 1] += likelihood_B.sum().item()
    return [total / count for total in totals]
