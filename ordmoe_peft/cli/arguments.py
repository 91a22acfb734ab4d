"""Options that commands share, under TRL's names where TRL has them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig
from trl import ScriptArguments

from ..adapter.config import OrdMoEConfig
from ..adapter.expert_selection import most_used_experts
from ..errors import OrdMoEConfigError
from ..quantization.config import MoeBitsAndBytesConfig
from ..tiers.plan import TIER_WEIGHTS
from ..tiers.ranking import GROUPINGS


DATASET = "The data set: a file (.jsonl, .json, .csv, .tsv, .parquet), folder or hub id."
IGNORE_FINGERPRINT = "Load the adapter on another base than the one that it was trained on, with a warning."
TRAIN_SPLIT = "Its split; train by default, else the only one."
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def help_of(owner: type, name: str) -> Mapping[str, Any]:
    """The help text, and the choices if there are such, of the field `name` of the dataclass `owner`."""
    return next(item.metadata for item in fields(owner) if item.name == name)


@dataclass
class ModelArguments:
    """Which base to load, and how."""

    model_name_or_path: str = field(metadata={"help": "Folder or hub id of the base model.", "aliases": ["--base"]})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    dtype: str = field(
        default="auto",
        metadata={"help": "dtype of unquantised weights; auto is the checkpoint's.", "choices": ["auto", *DTYPES]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation, e.g. sdpa."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load experts and decoder linears in 4 bits."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Values of 4-bit weights.", "choices": ["nf4", "fp4"]}
    )
    bnb_4bit_compute_dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype that 4-bit weights are computed in; that of `dtype` by default.",
            "choices": [*DTYPES],
        },
    )
    bnb_4bit_quant_storage: str = field(
        default="uint8",
        metadata={
            "help": "dtype that 4-bit bytes are presented in; FSDP2 shards those of bfloat16.",
            "choices": ["uint8", "int8", *DTYPES, "float64"],
        },
    )
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Store the scales in 8 bits, too."})
    offload_experts: bool = field(
        default=False, metadata={"help": "Keep 4-bit experts in RAM; the device holds two layers' at a time."}
    )

    def that_decide(self) -> dict[str, Any]:
        """The options that results depend on: all but where experts are kept."""
        return {name: value for name, value in vars(self).items() if name != "offload_experts"}

    def quantization_config(self, config: PretrainedConfig | None = None) -> MoeBitsAndBytesConfig | None:
        """The quantisation that was asked for; `config` is the model's, which `dtype="auto"` is read from."""
        if not self.load_in_4bit:
            if self.offload_experts:
                raise OrdMoEConfigError(
                    "offload_experts=True keeps experts in RAM that are in 4 bits: set load_in_4bit=True, also for a "
                    "base that is stored in 4 bits."
                )
            return None
        compute_dtype = self.bnb_4bit_compute_dtype or (None if self.dtype == "auto" else self.dtype)
        if compute_dtype is not None and compute_dtype not in DTYPES:
            raise OrdMoEConfigError(f"bnb_4bit_compute_dtype must be one of {tuple(DTYPES)}, got {compute_dtype!r}.")
        if compute_dtype is None and config is not None:
            compute_dtype = weights_dtype(config, self.dtype)
        return MoeBitsAndBytesConfig(
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=self.bnb_4bit_quant_storage,
            offload_experts=self.offload_experts,
        )


def weights_dtype(config: PretrainedConfig, name: str) -> torch.dtype:
    """The dtype called `name`; for `auto` the configuration's, or bf16 where it says none."""
    if name == "auto":
        return config.dtype or config.get_text_config().dtype or torch.bfloat16
    if name not in DTYPES:
        raise OrdMoEConfigError(f"dtype must be 'auto' or one of {tuple(DTYPES)}, got {name!r}.")
    return DTYPES[name]


@dataclass
class AdapterSizeArguments:
    """The fields of [`OrdMoEConfig`] that also decide what training takes of memory."""

    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    targets: list[str] = field(default_factory=lambda: ["router", "experts"], metadata=help_of(OrdMoEConfig, "targets"))
    expert_rank: str | None = field(
        default=OrdMoEConfig.expert_rank,  # type: ignore[assignment]
        metadata=help_of(OrdMoEConfig, "expert_rank"),
    )
    num_tiers: int = field(default=OrdMoEConfig.num_tiers, metadata=help_of(OrdMoEConfig, "num_tiers"))
    rewards: list[float] | None = field(default=OrdMoEConfig.rewards, metadata=help_of(OrdMoEConfig, "rewards"))
    advantages: str = field(default=OrdMoEConfig.advantages, metadata=help_of(OrdMoEConfig, "advantages"))

    def __post_init__(self):
        if isinstance(self.expert_rank, str) and self.expert_rank.isdecimal():
            self.expert_rank = int(self.expert_rank)


@dataclass
class AdapterArguments(AdapterSizeArguments):
    """The adapter's configuration: the fields of [`OrdMoEConfig`] that are set per run."""

    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    grouping: str = field(default=OrdMoEConfig.grouping, metadata=help_of(OrdMoEConfig, "grouping"))
    layer_scope: list[str] = field(default_factory=lambda: ["all"], metadata=help_of(OrdMoEConfig, "layer_scope"))
    token_scope: str = field(default=OrdMoEConfig.token_scope, metadata=help_of(OrdMoEConfig, "token_scope"))
    tier_weights: str = field(
        default="router",
        metadata={
            "help": "Weights of a tier's experts: the router's, or those scaled to tier 1's sum.",
            "choices": list(TIER_WEIGHTS),
        },
    )
    tier_seed: int = field(default=OrdMoEConfig.tier_seed, metadata=help_of(OrdMoEConfig, "tier_seed"))
    expert_selection: str | None = field(
        default=None,
        metadata={
            "help": "JSON file of `ordmoe inspect`: train LoRA on the most-used experts of each layer alone, the "
            "fewest that get expert_share of its tokens. A recipe may have lists of experts by layer instead."
        },
    )
    expert_share: float | None = field(
        default=None, metadata={"help": "Share of a layer's tokens that the chosen experts get, above 0, at most 1."}
    )

    def adapter_config(self, model: str | None = None) -> OrdMoEConfig:
        """The configuration that was asked for, for the base `model`."""
        settings = dict(vars(self))
        share = settings.pop("expert_share")
        if (share is not None) != isinstance(self.expert_selection, str):
            raise OrdMoEConfigError(
                f"expert_selection={self.expert_selection!r} and expert_share={share!r}: a file of `ordmoe inspect` "
                "needs a share of tokens, and a share such a file. Give both, or none."
            )
        if isinstance(self.expert_selection, str):
            settings["expert_selection"] = most_used_experts(self.expert_selection, share, model)
        # A recipe may give one name or index instead of a list.
        given = self.layer_scope if isinstance(self.layer_scope, list) else [self.layer_scope]
        scope = [str(part) for part in given]
        is_indices = all(part.isdecimal() for part in scope)
        settings["layer_scope"] = [int(part) for part in scope] if is_indices else " ".join(scope)
        return OrdMoEConfig(r=settings.pop("lora_r"), **settings)


@dataclass
class DataArguments(ScriptArguments):
    """TRL's options of data, in our words where ours reads more."""

    dataset_name: str | None = field(default=None, metadata={"help": DATASET})


@dataclass(kw_only=True)
class SampleArguments:
    """Which samples a base or an adapter is run on."""

    # Splits to take, in this order, where none is asked for.
    likely_splits: ClassVar[tuple[str, ...]] = ("test", "validation")
    # Whether tiers that do not fit the model are an error.
    needs_tiers: ClassVar[bool] = True

    adapter: str | None = field(default=None, metadata={"help": "Folder or hub id of an adapter; the base without."})
    ignore_fingerprint: bool = field(default=False, metadata={"help": IGNORE_FINGERPRINT})
    dataset_name: str | None = field(default=None, metadata={"help": DATASET})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Its split; test by default, else validation, else the only one."}
    )
    limit: int | None = field(default=None, metadata={"help": "Use at most this many samples, drawn by seed 0."})
    num_tiers: int | None = field(default=None, metadata={"help": "Tiers C; the adapter's by default, else 3."})
    grouping: str | None = field(
        default=None,
        metadata={"help": "How tiers are cut; the adapter's by default, else uniform.", "choices": list(GROUPINGS)},
    )
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Samples at a time."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the checkpoint."})
