"""`ordmoe rollouts`: what each tier answers to each prompt, as a data set on disk or on the hub."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

from datasets import Dataset
from huggingface_hub import HfApi
from trl import TrlParser

from ..data.generation import sampling_arguments
from ..data.preference_pairs import to_preference_pairs
from ..data.rollouts import SETTINGS_FILE, rollout
from ..data.shards import without_inner_bars
from ..files import whole_file
from .arguments import ModelArguments, SampleArguments
from .loading import load_samples, load_subject
from .tables import percent, print_table


PAIRS_FOLDER = "preference_pairs"


@dataclass(kw_only=True)
class RolloutArguments(SampleArguments):
    """What to answer, how to sample, and where to write it."""

    output: str = field(metadata={"help": "Folder to write to, or to go on with after an interruption."})
    split: str = field(default="train", metadata={"help": "Its split."})
    keep_columns: list[str] = field(
        default_factory=list, metadata={"help": "Columns to keep beside prompt, images and completion."}
    )
    tiers: list[int] | None = field(default=None, metadata={"help": "Tiers that write, 1 is the top; all by default."})
    scored_by: str = field(
        default="tier", metadata={"help": "Score under the tier that wrote (tier) or under tier 1 (policy)."}
    )
    rows_per_call: int | None = field(
        default=None, metadata={"help": "Most rows, prompts times tiers, to generate at once; all by default."}
    )
    samples_per_shard: int = field(default=256, metadata={"help": "Prompts in a file, the most an interruption loses."})
    seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    max_completion_length: int = field(default=512, metadata={"help": "Longest response, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampling; 0 writes greedily."})
    top_p: float = field(default=1.0, metadata={"help": "Share of probability to sample from."})
    top_k: int = field(default=0, metadata={"help": "Most probable tokens to sample from; 0 is all."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Penalty on tokens that occurred; 1 is none."})
    preference_pairs: bool = field(
        default=False, metadata={"help": f"Also write tier 1 over the last tier, in TRL's format, to {PAIRS_FOLDER}/."}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Data set repository to push the rollouts to."})

    def generation(self) -> dict:
        """The arguments of `generate` that were asked for."""
        return sampling_arguments(
            self.max_completion_length, self.temperature, self.top_p, self.top_k, self.repetition_penalty
        )


def build_parser() -> TrlParser:
    return TrlParser(
        (ModelArguments, RolloutArguments),
        prog="ordmoe rollouts",
        description="Write what each tier answers. Options can also stand in a YAML file given as --config.",
    )


def main(arguments: Sequence[str]) -> None:
    model_options, options = build_parser().parse_args_and_config(arguments)
    dataset = load_samples(options)
    model, processing_class = load_subject(model_options, options)
    named = ("adapter", "dataset_name", "dataset_config", "split", "limit")
    rollouts = rollout(
        model,
        processing_class,
        dataset,
        options.output,
        num_tiers=options.num_tiers,
        grouping=options.grouping,
        tiers=options.tiers,
        scored_by=options.scored_by,
        batch_size=options.batch_size,
        rows_per_call=options.rows_per_call,
        samples_per_shard=options.samples_per_shard,
        seed=options.seed,
        keep_columns=options.keep_columns,
        sources=asdict(model_options) | {name: getattr(options, name) for name in named},
        **options.generation(),
    )
    print_tiers(rollouts, options.scored_by)
    print(f"{len(rollouts)} rollouts in {options.output}")
    if options.push_to_hub is not None:
        push(rollouts, Path(options.output), options.push_to_hub)
    if options.preference_pairs:
        write_pairs(rollouts, Path(options.output) / PAIRS_FOLDER)


def print_tiers(rollouts: Dataset, scored_by: str) -> None:
    """A row per tier: means over its responses, and how many say what the first tier says."""
    by_tier = {name: list(zip(*rollouts[name], strict=True)) for name in rollouts.column_names if name in _AVERAGED}
    responses = list(zip(*rollouts["responses"], strict=True))
    rows = [
        [
            str(tier),
            *(_mean(by_tier[name][place]) for name in _AVERAGED),
            percent(fmean(a == b for a, b in zip(responses[place], responses[0], strict=True))),
        ]
        for place, tier in enumerate(rollouts[0]["tiers"])
    ]
    scorer = "the tier that wrote it" if scored_by == "tier" else "tier 1"
    title = f"Responses by tier; mean log-likelihood per token (nats) under {scorer}"
    print_table(title, ["tier", *_AVERAGED.values(), f"same as tier {rollouts[0]['tiers'][0]}"], rows)


_AVERAGED = {
    "log_likelihood": "log-likelihood",
    "log_likelihood_no_eos": "without end tokens",
    "gate_mass": "gate mass",
    "response_token_counts": "tokens",
}


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.3f}" if known else "none"


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
    with without_inner_bars(), whole_file(folder / "data" / "train-00000-of-00001.parquet") as unfinished:
        pairs.to_parquet(unfinished)
    print(f"{len(pairs)} preference pairs in {folder} ({len(rollouts) - len(pairs)} left out: equal texts)")
