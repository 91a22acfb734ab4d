"""`ordmoe train --config recipe.yaml`: train an adapter and leave it in `output_dir`.

On several processes: `accelerate launch --config_file FILE -m ordmoe train --config recipe.yaml`, with a
file of `examples/accelerate`. With `--resume_from_checkpoint auto` the same command starts a run and goes on with one
that was killed.
"""

import math
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import ProgressCallback, set_seed

from ..adapter.targets import coverage_report
from ..errors import OrdMoEInterrupted
from ..monitoring.diagnostics import training_findings
from ..tools.report import train_report
from ..training import OrdMoETrainer, OrdMoETrainingArguments
from ..training.answers import check_answers
from ..training.checkpoints import checkpoint_to_resume, last_checkpoint
from ..training.data_checks import checked_data
from ..training.run_files import without_hub_tokens
from ..training.run_record import RunFolder
from ..training.run_summary import peak_memory
from ..training.stopping import sigterm_waits
from .arguments import AdapterArguments, DataArguments, ModelArguments
from .loading import load_base, load_processing_class, load_split, warn_if_slow
from .model_checks import check_adapter_fits
from .parser import CommandParser
from .run_options import given_options, next_commands, resume_advice, settings_block
from .tables import print_table


@dataclass
class ReportArguments:
    """What is left for people to look at."""

    report: str | None = field(
        default=None, metadata={"help": "Folder to write a report of the run to (needs the extra `report`)."}
    )


OPTIONS = (ModelArguments, AdapterArguments, DataArguments, OrdMoETrainingArguments, ReportArguments)


def build_parser() -> CommandParser:
    return CommandParser(
        "train",
        OPTIONS,
        needed="--dataset_name DATA --output_dir DIR",
        description="Train an OrdMoE adapter. All of it can stand in a YAML file: `ordmoe train --config recipe.yaml`.",
    )


def main(arguments: Sequence[str]) -> None:
    parser = build_parser()
    options = parser.parse_args_and_config(arguments)
    model_options, adapter_options, script_options, training_args, report_options = options
    given = given_options(parser, arguments, OPTIONS)
    if training_args.process_index == 0:
        print(settings_block(given))
    adapter_config = adapter_options.adapter_config(model_options.model_name_or_path)
    resume, overwrite = training_args.resume_from_checkpoint, training_args.overwrite_output_dir
    RunFolder(training_args.output_dir).check_free(resume, overwrite)
    checkpoint_to_resume(resume, training_args.output_dir)
    datasets = load_data(script_options, training_args)
    check_adapter_fits(model_options, adapter_config, training_args.trust_remote_code)
    processing_class = load_processing_class(model_options, training_args.trust_remote_code)
    # LoRA's first factors are drawn when the adapter is attached, before the trainer sets its seed.
    set_seed(training_args.seed)
    model = get_peft_model(load_base(model_options, training_args.trust_remote_code), adapter_config)
    if training_args.process_index == 0:
        print(coverage_report(model))
        if training_args.device.type == "cpu":
            warn_if_slow(model_options, model.dtype, training_args)
    trainer = OrdMoETrainer(model, args=training_args, processing_class=processing_class, **datasets)
    if not Path(script_options.dataset_name).exists():
        trainer.data_source["id"] = script_options.dataset_name  # of the hub; a data set knows its name alone
    trainer.run_options = {**given, "bf16": training_args.bf16}
    if trainer.is_finished(resume):
        if trainer.is_world_process_zero():
            print(f"The run in {training_args.output_dir} is already finished.")
        return
    metrics = train_or_advise(trainer, resume)
    if not trainer.is_world_process_zero():
        return
    print_metrics(metrics)
    print(f"Adapter in {training_args.output_dir}")
    if report_options.report is not None:
        # The trainer's own dictionary hides tokens.
        settings = asdict(model_options) | asdict(adapter_options) | asdict(script_options) | training_args.to_dict()
        print(f"Report: {write_report(report_options.report, trainer, metrics, settings)}")
    print("\n  ".join(["Next:", *next_commands(model_options, script_options, training_args)]))


def load_data(options: DataArguments, training_args: OrdMoETrainingArguments) -> dict[str, Any]:
    """The trainer's data sets, with answers to learn from; that of evaluation is `None` where there is none."""
    data = (options.dataset_name, options.dataset_config)
    streaming = options.dataset_streaming
    train_dataset = load_split(*data, options.dataset_train_split, streaming, option="--dataset_train_split")
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = load_split(*data, options.dataset_test_split, streaming, option="--dataset_test_split")
    for name, dataset in (("training", train_dataset), ("evaluation", eval_dataset)):
        checked_data(dataset, training_args, name)
    check_answers(train_dataset, training_args)
    return {"train_dataset": train_dataset, "eval_dataset": eval_dataset}


def train_or_advise(trainer: OrdMoETrainer, resume: str | bool | None) -> dict[str, Any]:
    """[`train`]; where it is interrupted, the error says how to go on.

    Raises:
        [`OrdMoEInterrupted`]: Ctrl-C or SIGTERM.
    """
    try:
        return train(trainer, resume)
    except KeyboardInterrupt:
        checkpoint = last_checkpoint(trainer.args.output_dir)
        saved = "nothing is saved yet" if checkpoint is None else f"the last checkpoint is {checkpoint}"
        message, status = f"Interrupted after step {trainer.state.global_step}; {saved}.", 128 + signal.SIGINT
    except OrdMoEInterrupted as end:
        message, status = str(end), end.status
    bar = trainer.pop_callback(ProgressCallback)
    if bar is not None:
        bar.on_train_end(trainer.args, trainer.state, trainer.control)  # else it is drawn once more, after the error
    raise OrdMoEInterrupted(f"{message} {resume_advice(trainer.args)}", status)


def train(trainer: OrdMoETrainer, resume: str | bool | None) -> dict[str, Any]:
    """Train, save adapter, metrics and state, and return the metrics."""
    peak_before = peak_memory()  # tier_passes="auto" sets the count back
    result = trainer.train(resume_from_checkpoint=resume)
    with sigterm_waits():  # all that was trained would be lost where there is no checkpoint
        trainer.save_model()
        steps = trainer.state.global_step
        metrics = {
            **result.metrics,
            "train_steps": steps,
            "train_seconds_per_step": result.metrics["train_runtime"] / max(steps, 1),
            "peak_memory_bytes": max(peak_before, peak_memory()),
        }
        trainer.save_metrics("train", metrics)
        trainer.save_state()
        trainer.finish()
    return metrics


def print_metrics(metrics: dict[str, Any]) -> None:
    """A table of one row: how long it took, to what loss and with how much memory."""
    row = (
        str(metrics["train_steps"]),
        f"{metrics.get('train_loss', math.nan):.4f}",
        f"{metrics['train_seconds_per_step']:.2f}",
        f"{metrics['peak_memory_bytes'] / 1e9:.2f} GB",
    )
    print_table("Trained", ("steps", "loss", "seconds per step", "peak memory"), [row])


def write_report(folder: str, trainer: OrdMoETrainer, metrics: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Write the report of a run, and return the page's path."""
    history = trainer.state.log_history
    vocab_size = trainer.model.config.get_text_config().vocab_size
    findings = training_findings(history, vocab_size=vocab_size, erl_coef=trainer.args.erl_coef)
    settings = {
        name: without_hub_tokens(str(value)) if isinstance(value, (str, dict)) else value
        for name, value in settings.items()
    }
    return train_report([*history, metrics], settings, folder, [finding.to_dict() for finding in findings])
