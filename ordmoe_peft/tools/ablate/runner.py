"""Run what an ablation asks for, and keep a file for each finished run.

A killed ablation goes on where it stopped, and ablations that share a folder share runs: a run's file is named after
all that decides its result.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ...data.formats import as_prompt_completion, has_prompts
from ...data.rows import check_samples
from ...data.samples import subsample
from ...errors import OrdMoEDataError
from ...files import write_whole
from ...training.data_checks import checked_data
from .grid import BASE, AblateArguments, Run, describe
from .run import data_seed, evaluate_run, train_run
from .settings import Settings


class AblationRunner:
    """Executes runs on the base and data that the arguments name.

    Args:
        arguments ([`AblateArguments`]): splits, limits and evaluation.
        settings ([`Settings`]): the settings common to all runs.
        load_base (`Callable`), load_processing_class (`Callable`): load the base, and its tokenizer or processor.
        load_split (`Callable`): name of a split → the split.
    """

    def __init__(
        self,
        arguments: AblateArguments,
        settings: Settings,
        load_base: Callable[[], nn.Module],
        load_processing_class: Callable[[], Any],
        load_split: Callable[[str], Any],
    ):
        self.arguments, self.settings, self.load_base = arguments, settings, load_base
        self.processing_class, self.split = cache(load_processing_class), cache(load_split)
        self.folder = Path(settings.training.output_dir) / "runs"
        self.bar = tqdm(disable=True)

    def check_data(self) -> None:
        """See that all splits are there, with answers to learn from or to judge by, before anything runs."""
        checked_data(self.split(self.arguments.dataset_train_split), self.settings.training, "training")
        for name in (self.arguments.dataset_validation_split, self.arguments.dataset_test_split):
            samples = as_prompt_completion(self.split(name), needs_answers=True)
            check_samples(samples, self.arguments.group_by)
            if not has_prompts(samples):
                raise OrdMoEDataError(
                    f"The split {name} has no prompts, and answers are what settings are compared by."
                )

    def key(self, run: Run) -> dict[str, Any]:
        """All that tells a run from others, as JSON."""
        given, training = self.arguments, self.settings.training
        evaluation = {
            "split": given.dataset_validation_split if run.phase == "tune" else given.dataset_test_split,
            "limit": given.validation_limit if run.phase == "tune" else given.test_limit,
            "group_by": given.group_by,
            "max_new_tokens": given.max_new_tokens,
            "batch_size": training.per_device_eval_batch_size,
        }
        trained = self.settings.fixed if run.changes is None else self.settings.key(run.changes)
        own = {"evaluation": evaluation, "phase": run.phase, "seed": run.seed, "data_seed": training.data_seed}
        return {**trained, **own}

    def path(self, run: Run) -> Path:
        """The file of a run's record."""
        key = self.key(run)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        kind = BASE if run.changes is None else f"c{key['adapter']['num_tiers']}_seed{run.seed}"
        return self.folder / f"{run.phase}_{kind}_{digest}.json"

    def is_done(self, run: Run) -> bool:
        return self.path(run).is_file()

    def record(self, run: Run) -> dict[str, Any]:
        """The run's record: read if it is there, else by running it."""
        path, key = self.path(run), self.key(run)
        if not path.is_file():
            write_whole(path, json.dumps({"key": key, **self.execute(run)}, indent=1) + "\n")
            self.bar.update()
        record = json.loads(path.read_text())
        split = key["evaluation"]["split"]
        assert record["evaluation"]["split"] == split, f"a {run.phase} run was evaluated on another split than {split}"
        return record

    def execute(self, run: Run) -> dict[str, Any]:
        """Train, unless it is the base, and evaluate."""
        record: dict[str, Any] = {"phase": run.phase, "seed": run.seed}
        if run.changes is None:
            model = self.load_base()
        else:
            assert run.seed is not None, "a training run has a seed"
            config, args = self.settings.build(run.changes)
            samples = self.split(self.arguments.dataset_train_split)
            samples = subsample(samples, self.arguments.train_limit, data_seed(args, run.seed))
            model, trained = train_run(self.load_base, config, args, run.seed, samples, self.processing_class())
            record |= trained
        evaluation = self.key(run)["evaluation"]
        split = evaluation.pop("split")
        samples = subsample(self.split(split), evaluation.pop("limit"))
        results = evaluate_run(model, self.processing_class(), samples, scores_tiers=run.phase == "final", **evaluation)
        record["evaluation"] = {"split": split, **results}
        tqdm.write(_summary(run, record))
        return record


def _summary(run: Run, record: dict[str, Any]) -> str:
    """A line on a finished run."""
    evaluation = record["evaluation"]
    count = len(evaluation["is_right"])
    name = BASE
    if run.changes is not None:
        name = f"{describe(run.changes)}, seed {run.seed} ({record['train_seconds']:.1f} s)"
    return (
        f"{run.phase} {name}: accuracy {sum(evaluation['is_right']) / count:.1%}, log-likelihood "
        f"{sum(evaluation['log_likelihood']) / count:.3f} on {count} of {evaluation['split']} "
        f"({evaluation['evaluate_seconds']:.1f} s)"
    )
