"""The settings of an ablation: which can be varied, which have an effect, and what identifies a run."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields, replace
from importlib.metadata import version
from typing import Any

from peft import LoraConfig
from transformers import HfArgumentParser
from trl import SFTConfig

from ...adapter.config import OrdMoEConfig
from ...errors import OrdMoEConfigError
from ...objectives.advantages import tier_advantages
from ...training import OrdMoETrainingArguments
from ...training.arguments import ACT_ONLY_WITH


# Varied by the ablation itself, or without a place in it.
NOT_VARIED = {"seed", "data_seed", "output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict"}
# Do not change what a run gives, so they do not tell runs apart.
WITHOUT_EFFECT = NOT_VARIED | {
    *("report_to", "run_name", "project", "disable_tqdm", "logging_dir", "log_level", "log_level_replica"),
    *("save_strategy", "save_steps", "save_total_limit", "eval_strategy", "logging_steps", "logging_strategy"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "local_rank"),
}
# The fields of OrdMoE's own that also work without lower tiers. All others are about tiers.
FIELDS_FOR_ONE_TIER = {
    *("targets", "expert_rank", "expert_selection", "num_tiers", "base_moe", "base_quantization"),
    *("balance_coef", "ntp_coef", "router_learning_rate", "max_nonfinite_steps"),
}
# Field → what another field must be for it to have an effect: what the trainer warns of, and what it refuses.
ACTS_ONLY_WITH = {
    **{option: (name, (value,)) for (name, value), options in ACT_ONLY_WITH.items() for option in options},
    **dict.fromkeys(("rewards", "advantages", "lower_tier_floor"), ("objective", ("erl",))),
    "objective_beta": ("objective", ("logistic", "plackett_luce", "dpo", "ipo", "simpo")),
    "tier_seed": ("grouping", ("random",)),
    "scored_by": ("responses", ("generated",)),
}
LIBRARIES = ("ordmoe-peft", "torch", "transformers", "peft", "trl")


def _names(kind: type) -> set[str]:
    return {item.name for item in fields(kind) if item.init}


def fields_about_tiers() -> set[str]:
    """Names of fields that have no effect with `num_tiers=1`."""
    own = (_names(OrdMoEConfig) - _names(LoraConfig)) | (_names(OrdMoETrainingArguments) - _names(SFTConfig))
    return own - FIELDS_FOR_ONE_TIER


class Settings:
    """The settings common to all runs, and what a cell's changes make of them.

    Args:
        adapter (dataclass): the adapter's options; has `adapter_config()`.
        training ([`OrdMoETrainingArguments`]): the training arguments.
        fixed (`dict`): everything else that decides what training gives, as JSON: base and data.
    """

    def __init__(self, adapter: Any, training: OrdMoETrainingArguments, fixed: dict[str, Any]):
        self.adapter, self.training, self.fixed = adapter, training, fixed
        self.axes = (_names(type(adapter)) | _names(type(training))) - NOT_VARIED
        self._parser = HfArgumentParser((type(adapter), type(training)), add_help=False, exit_on_error=False)

    def check_names(self, names: Iterable[str], where: str) -> None:
        """Raise [`OrdMoEConfigError`] unless each of `names` can be varied."""
        unknown = sorted(set(names) - self.axes)
        if unknown:
            raise OrdMoEConfigError(
                f"{where} names {', '.join(unknown)}, which an ablation cannot vary. It varies options of the adapter "
                "and of training (`ordmoe train --help`), such as grouping, num_tiers, rewards or erl_coef; "
                "seeds are given as `seeds`."
            )

    def typed(self, name: str, value: Any) -> Any:
        """`value` in the type that the option `name` has on the command line.

        YAML reads 1e-3 as text and a lone layer_scope as no list; training takes them only as their type.
        """
        if value is None:
            return None
        if isinstance(value, list):
            arguments = [f"--{name}", *map(str, value)]
        else:
            arguments = [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
        try:
            parsed, rest = self._parser.parse_known_args(arguments)
        except argparse.ArgumentError as error:
            raise OrdMoEConfigError(f"{name}={value!r} cannot work: {error.message}.") from error
        if rest:
            raise OrdMoEConfigError(f"{name}={value!r} has {len(rest) + 1} values where the option takes one.")
        return getattr(parsed, name)

    def have_effect(self, changes: dict[str, Any], names: Iterable[str]) -> list[str]:
        """Those of `names` that change anything in a cell with `changes`."""
        adapter, training = self._options(changes)
        if adapter.num_tiers == 1:
            return [name for name in names if name not in fields_about_tiers()]
        values = {**vars(training), **vars(adapter)}
        needs = {name: ACTS_ONLY_WITH.get(name) for name in names}
        return [name for name, need in needs.items() if need is None or values[need[0]] in need[1]]

    def build(self, changes: dict[str, Any]) -> tuple[OrdMoEConfig, OrdMoETrainingArguments]:
        """The adapter's configuration and the training arguments of a run with `changes`.

        Raises:
            [`OrdMoEConfigError`]: they cannot work.
        """
        adapter, training = self._options(changes)
        return adapter.adapter_config(), training

    def key(self, changes: dict[str, Any]) -> dict[str, Any]:
        """What tells runs with `changes` from others, as JSON: of two runs with the same key one is enough.

        Rewards count as the advantages that they become, which is all that training sees of them.
        """
        config, training = self.build(changes)
        advantages_C = tier_advantages(config.rewards, config.num_tiers, config.advantages)
        adapter = {name: value for name, value in _non_default(config).items() if name != "rewards"}
        key = {
            **self.fixed,
            "adapter": adapter
            | {"num_tiers": config.num_tiers, "advantages": [round(value, 6) for value in advantages_C.tolist()]},
            "training": _non_default(training),
            "versions": {library: version(library) for library in LIBRARIES},
        }
        return json.loads(json.dumps(key, default=str, sort_keys=True))

    def _options(self, changes: dict[str, Any]) -> tuple[Any, OrdMoETrainingArguments]:
        """The adapter's and the training options with `changes`; with one tier, what is about tiers is the default."""
        adapter, training = (
            replace(options, **{name: value for name, value in changes.items() if name in _names(type(options))})
            for options in (self.adapter, self.training)
        )
        if adapter.num_tiers == 1:
            adapter, training = (_with_defaults(options, fields_about_tiers()) for options in (adapter, training))
        return adapter, training


def _default(item: Any) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _with_defaults(options: Any, names: set[str]) -> Any:
    return replace(options, **{item.name: _default(item) for item in fields(options) if item.name in names})


def _non_default(options: Any) -> dict[str, Any]:
    """Fields that differ from their defaults, so that a field added upstream does not make every run another one."""
    values = options.to_dict() if hasattr(options, "to_dict") else asdict(options)
    return {
        item.name: values[item.name]
        for item in fields(options)
        if item.init and item.name in values and item.name not in WITHOUT_EFFECT and values[item.name] != _default(item)
    }
