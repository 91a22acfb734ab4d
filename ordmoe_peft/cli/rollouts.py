"""`ordmoe rollouts`: what each tier answers to each prompt, as a data set on disk or on the hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import isnan
from pathlib import Path
from typing import ClassVar

from datasets import Dataset
from huggingface_hub import HfApi

from ..data.generation import sampling_arguments
from ..data.preference_pairs import to_preference_pairs
from ..data.rollouts import SETTINGS_FILE, RolloutOptions, rollout
from ..data.samples import check_counts
from ..data.shards import shards, write_shard
from ..errors import OrdMoEConfigError
from .arguments import TRAIN_SPLIT, ModelArguments, SampleArguments
from .loading import load_samples, load_subject
from .parser import CommandParser
from .tables import percent, print_table


PAIRS_FOLDER = "preference_pairs"
SOURCES = ("adapter", "dataset_name", "dataset_config", "limit")
SAMPLING = ("max_completion_length", "temperature", "top_p", "top_k", "repetition_penalty")
# Columns of the rollouts that are averaged over a tier's responses → what they are called.
AVERAGED = {
    "log_likelihood": "log-likelihood",
    "log_likelihood_no_eos": "without end tokens",
    "gate_mass": "gate mass",
    "response_token_counts": "tokens",
}


@dataclass(kw_only=True)
class RolloutArguments(RolloutOptions, SampleArguments):
    """What to answer, how to sample, and where to write it."""

    likely_splits: ClassVar[tuple[str, ...]] = ("train",)

    output_dir: str = field(metadata={"help": "Folder to write to, or to go on with after an interruption."})
    dataset_split: str | None = field(default=None, metadata={"help": TRAIN_SPLIT})
    batch_size: int = field(default=32, init=False)  # given as per_device_eval_batch_size
    max_completion_length: int = field(default=512, metadata={"help": "Longest response, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampling; 0 writes greedily."})
    top_p: float = field(default=1.0, metadata={"help": "Share of probability to sample from."})
    top_k: int = field(default=0, metadata={"help": "Most probable tokens to sample from; 0 is all."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Penalty on tokens that occurred; 1 is none."})
    preference_pairs: bool = field(
        default=False, metadata={"help": f"Also write tier 1 over the last tier, in TRL's format, to {PAIRS_FOLDER}/."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Push the rollouts to the hub, as repo_id."})
    repo_id: str | None = field(default=None, metadata={"help": "Data set repository to push to, such as me/rollouts."})

    def __post_init__(self):
        self.batch_size = self.per_device_eval_batch_size
        check_counts(per_device_eval_batch_size=self.batch_size)
        super().__post_init__()
        if self.push_to_hub and not self.repo_id:
            raise OrdMoEConfigError("push_to_hub=True needs a data set repository: give repo_id, such as me/rollouts.")


def build_parser() -> CommandParser:
    return CommandParser(
        "rollouts",
        (ModelArguments, RolloutArguments),
        needed="--dataset_name DATA --output_dir DIR",
        description="Write what each tier answers, as a data set.",
    )


def main(arguments: Sequence[str]) -> None:
    model_options, options = build_parser().parse_args_and_config(arguments)
    dataset = load_samples(options)
    model, processing_class = load_subject(model_options, options)
    sources = {name: getattr(options, name) for name in SOURCES} | {"split": str(dataset.split)}
    rollouts = rollout(
        model,
        processing_class,
        dataset,
        options.output_dir,
        sources=model_options.that_decide() | sources,
        **{item.name: getattr(options, item.name) for item in fields(RolloutOptions)},
        **sampling_arguments(**{name: getattr(options, name) for name in SAMPLING}),
    )
    print_tiers(rollouts, options.scored_by)
    print(f"{len(rollouts)} rollouts in {options.output_dir}")
    if options.push_to_hub:
        push(rollouts, Path(options.output_dir), options.repo_id)
    if options.preference_pairs:
        write_pairs(rollouts, Path(options.output_dir) / PAIRS_FOLDER)


def print_tiers(rollouts: Dataset, scored_by: str) -> None:
    """A row per tier: means over its responses, and how many say what the first tier says."""
    columns = ["tiers", "responses", *AVERAGED]
    frame = rollouts.select_columns(columns).to_pandas()
    frame["first"] = [responses[0] for responses in frame["responses"]]
    frame = frame.explode(columns)
    frame["is_same"] = frame["responses"] == frame["first"]
    means = frame[["tiers", "is_same", *AVERAGED]].astype(float).groupby("tiers").mean()
    rows = [
        [str(int(tier)), *(_number(mean[name]) for name in AVERAGED), percent(mean["is_same"])]
        for tier, mean in means.iterrows()
    ]
    scorer = "the tier that wrote it" if scored_by == "tier" else "tier 1"
    title = f"Responses by tier; mean log-likelihood per token (nats) under {scorer}"
    print_table(title, ["tier", *AVERAGED.values(), f"same as tier {rows[0][0]}"], rows)


def _number(mean: float) -> str:
    return "none" if isnan(mean) else f"{mean:.3f}"


def push(rollouts: Dataset, folder: Path, repository: str) -> None:
    """Push the rollouts, and the settings that made them beside them."""
    rollouts.push_to_hub(repository)
    HfApi().upload_file(
        path_or_fileobj=folder / SETTINGS_FILE,
        path_in_repo=SETTINGS_FILE,
        repo_id=repository,
        repo_type="dataset",
    )
    print(f"Pushed to {repository}")


def write_pairs(rollouts: Dataset, folder: Path) -> None:
    """Write the preference pairs of `rollouts` as a data set of their own."""
    pairs = to_preference_pairs(rollouts)
    (path,) = shards(folder, len(pairs), len(pairs))
    write_shard(path, pairs)
    print(f"{len(pairs)} preference pairs in {folder} ({len(rollouts) - len(pairs)} left out: equal texts)")
