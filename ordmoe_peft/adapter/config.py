"""The adapter's configuration, saved with it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils.peft_types import PeftType

from ..errors import OrdMoEConfigError
from ..objectives.advantages import ADVANTAGES, tier_rewards
from ..tiers.plan import LAYER_SCOPES, TIER_WEIGHTS
from ..tiers.ranking import GROUPINGS
from ..tiers.scope import TOKEN_SCOPES
from .base_record import hub_id
from .expert_selection import checked_selection
from .field_types import check_field_types
from .lora_fields import RANK_OVER_K, check_any_target, check_expert_rank, check_parameter_targets
from .record import RECORD_NAME
from .saved import SavedAdapter


PEFT_METHOD = "ordmoe"
ROLES = ("router", "experts", "shared_experts", "attention")
# Experts in part: what reads hidden states, with a gate or without, and what writes them.
PROJECTIONS = ("experts.gate_up", "experts.up", "experts.down")
# More than any MoE layer has experts; what a model has room for is checked when the adapter is attached.
MOST_TIERS = 4096


@dataclass
class OrdMoEConfig(LoraConfig):
    """Configuration of an OrdMoE adapter: LoRA on a MoE model's routers and experts, and how its tiers are cut.

    All fields of [`~peft.LoraConfig`] apply, or are refused by name: where experts or routers are adapted, those that
    PEFT cannot apply to parameters (`lora_dropout`, biases, variants such as DoRA, initialisations from the weights
    such as PiSSA); everywhere, `layer_replication` and what selects among `target_modules` and `target_parameters`,
    which are filled in from `targets`. `rank_pattern` and `alpha_pattern` may name modules (`mlp.experts`) and
    parameters.

    Args:
        targets (`list[str]`, defaults to `["router", "experts"]`): roles to adapt, out of `"router"`, `"experts"`,
            `"shared_experts"` and `"attention"`. `"experts.gate_up"` and `"experts.down"` are one projection of the
            experts alone, whatever a model calls it: what reads hidden states, the gate and the up-projection, in one
            matrix or in two, and what writes them. `"experts.up"` is the former where there is no gate.
        expert_rank (`int` or `"r/K"`, *optional*): the LoRA rank on experts; `r` by default. With `"r/K"` the ranks of
            a token's K experts come to r: it is r / K, rounded up, and becomes that number when the adapter is
            attached. It fills `rank_pattern`, under whose rule each place is scaled by alpha over its own rank
            (`use_rslora`: over the root of that), so `lora_alpha` weighs K times as much on experts of rank r / K.
            For the same scaling give them `alpha_pattern`.
        expert_selection (`dict[int, list[int]]`, *optional*): the experts that LoRA is trained on, by MoE layer from
            0; all by default. [`~ordmoe_peft.adapter.expert_selection.most_used_experts`] makes it of what `ordmoe
            inspect` wrote. The factors of the others are and stay zero. They do not move, and they are there: memory,
            time and file are those of LoRA on all experts.
        num_tiers (`int`, defaults to 3): C, the number of tiers; 1 is plain supervised fine-tuning.
        grouping (`str`, defaults to `"uniform"`): how tiers are cut from the ranked experts: `"uniform"`,
            `"high_only"` or `"random"`.
        layer_scope (`str` or `list[int]`, defaults to `"all"`): MoE layers held to tiers: `"all"`, `"shallow"`,
            `"deep"`, or indices.
        token_scope (`str`, defaults to `"sequence"`): positions of a row that follow its tier: `"sequence"`, all, or
            `"response"`, those that predict a token of the response, so that the prompt is common to all tiers.
        tier_weights (`str`, defaults to `"router"`): weights of a tier's experts: `"router"`, the router's own rule on
            their scores, or `"match"`, the same scaled so that a token's weights sum to what tier 1's would. Routers
            that do not renormalise (OLMoE, DeepSeek-V2) give low tiers almost none otherwise.
        rewards (`list[float]`, *optional*): one per tier, descending; evenly spaced from 1 to 0 by default.
        advantages (`str`, defaults to `"zscore"`): what rewards become: `"zscore"`, `"center"` or `"none"`.
        tier_seed (`int`, defaults to 0): seed of `"random"` grouping.
        base_moe (`dict`, *optional*): sizes of the base's MoE layers, filled in when the adapter is attached, so that
            loading it on another base can say which one was expected.
        base_quantization (`dict`, *optional*): the base's quantisation in training, as its `config.json` would have
            it, filled in when the adapter is attached; merging says when it does not follow it.

    Raises:
        [`OrdMoEConfigError`]: a field has a value that cannot work.
    """

    targets: list[str] = field(
        default_factory=lambda: ["router", "experts"],
        metadata={
            "help": "What to adapt: roles, or one projection of the experts.",
            "choices": [*ROLES, *PROJECTIONS],
        },
    )
    expert_rank: int | str | None = field(
        default=None, metadata={"help": f"LoRA rank on experts: a number, or {RANK_OVER_K}, rounded up; r by default."}
    )
    expert_selection: dict | None = field(
        default=None, metadata={"help": "Experts that LoRA is trained on, as lists by MoE layer; all by default."}
    )
    num_tiers: int = field(default=3, metadata={"help": "Number of tiers C; 1 is plain supervised fine-tuning."})
    grouping: str = field(default="uniform", metadata={"help": "How tiers are cut.", "choices": list(GROUPINGS)})
    layer_scope: str | list[int] = field(
        default="all", metadata={"help": f"MoE layers held to tiers: one of {LAYER_SCOPES}, or a list of indices."}
    )
    token_scope: str = field(
        default="sequence", metadata={"help": "Positions of a row that follow its tier.", "choices": list(TOKEN_SCOPES)}
    )
    tier_weights: str = field(
        default="router", metadata={"help": "Weights of a tier's experts.", "choices": list(TIER_WEIGHTS)}
    )
    rewards: list[float] | None = field(
        default=None, metadata={"help": "One reward per tier, descending; evenly spaced from 1 to 0 by default."}
    )
    advantages: str = field(default="zscore", metadata={"help": "What rewards become.", "choices": list(ADVANTAGES)})
    tier_seed: int = field(default=0, metadata={"help": "Seed of random grouping."})
    base_moe: dict | None = field(default=None, metadata={"help": "Sizes of the base's MoE layers; filled in."})
    base_quantization: dict | None = field(
        default=None, metadata={"help": "The base's quantisation in training; filled in."}
    )

    # The files of the adapter that this is the configuration of, until it is loaded.
    saved = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        subfolder: str | None = None,
        ignore_fingerprint: bool = False,
        **kwargs: Any,
    ) -> PeftConfig:
        """PEFT's; takes a note of the adapter's files, which are checked before anything is attached to a model.

        Args:
            pretrained_model_name_or_path (`str`): a folder or hub id.
            subfolder (`str`, *optional*): where in it.
            ignore_fingerprint (`bool`, defaults to `False`): let the adapter be loaded on another base than its own,
                with a warning.
            kwargs: as for `huggingface_hub.hf_hub_download`; others have no effect, as in PEFT.
        """
        lookup, _, _ = cls._split_kwargs(kwargs)
        saved = SavedAdapter.read(pretrained_model_name_or_path, subfolder, **lookup)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        saved.ignore_fingerprint = ignore_fingerprint
        config.saved = saved
        return config

    @property
    def rank_in_words(self) -> str:
        """The rank, and that of experts where it is another."""
        return str(self.r) if self.expert_rank is None else f"{self.r} ({self.expert_rank} on experts)"

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's; names a base from the hub by its id, not by the folder that it was loaded from."""
        written = copy.copy(self)
        name, revision = hub_id(self.base_model_name_or_path or "")
        if name is not None:
            written.base_model_name_or_path, written.revision = name, self.revision or revision
        super(OrdMoEConfig, written).save_pretrained(save_directory, **kwargs)
        # Of an earlier save. The model's own `save_pretrained` writes another.
        Path(save_directory, RECORD_NAME).unlink(missing_ok=True)

    def __post_init__(self):
        self.targets = [self.targets] if isinstance(self.targets, str) else self.targets
        _check_fields(self)
        self.targets = list(self.targets)
        check_parameter_targets(self)
        super().__post_init__()
        self.peft_type = PeftType[PEFT_METHOD.upper()]
        _check_choice("grouping", self.grouping, GROUPINGS)
        _check_choice("tier_weights", self.tier_weights, TIER_WEIGHTS)
        _check_choice("token_scope", self.token_scope, TOKEN_SCOPES)
        _check_choice("advantages", self.advantages, tuple(ADVANTAGES))
        if isinstance(self.layer_scope, str):
            _check_choice("layer_scope", self.layer_scope, LAYER_SCOPES)
        unknown = [target for target in self.targets if target not in (*ROLES, *PROJECTIONS)]
        if unknown or not self.targets:
            raise OrdMoEConfigError(f"targets must be one or more of {(*ROLES, *PROJECTIONS)}, got {self.targets}.")
        if "experts" in self.targets and set(PROJECTIONS) & set(self.targets):
            raise OrdMoEConfigError(
                f"targets={self.targets} has 'experts', which is all of their projections, and one of these. Leave one "
                "of the two out."
            )
        tier_rewards(self.rewards, self.num_tiers)
        check_any_target(self)
        check_expert_rank(self)
        self.expert_selection = checked_selection(self)


def _check_fields(config: OrdMoEConfig) -> None:
    """The types of our own fields, and numbers that a model and a generator can have."""
    check_field_types(config, OrdMoEConfig)
    if not 1 <= config.num_tiers <= MOST_TIERS:
        limit = "at least 1" if config.num_tiers < 1 else f"at most {MOST_TIERS}"
        raise OrdMoEConfigError(f"num_tiers must be {limit}, got {config.num_tiers}.")
    if not -(2**63) <= config.tier_seed < 2**63:
        raise OrdMoEConfigError(f"tier_seed must be a whole number of 64 bits, got {config.tier_seed}.")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise OrdMoEConfigError(f"{name} must be one of {tuple(choices)}, got {value!r}.")
