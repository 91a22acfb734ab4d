"""`ordmoe plan MODEL --gpu_memory_gb 24`: whether training fits a card, from the model's configuration alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ..errors import OrdMoEConfigError
from ..files import write_whole
from ..tools.plan.card import GIB, Card, fit_to_card
from ..tools.plan.fits import find_fits, fits_table
from ..tools.plan.known_models import KNOWN_MODELS, load_config, stored_quantization
from ..tools.plan.lm_head import TILE_TOKENS, TILE_VOCABULARY
from ..tools.plan.plan import ExpertsInRam, MemoryPlan, plan_memory
from ..tools.plan.settings import CHOICES_OF, PlanSettings
from ..training import OrdMoETrainingArguments
from ..training.optimizer_states import OPTIMIZERS
from .arguments import AdapterSizeArguments, ModelArguments, help_of, weights_dtype
from .parser import CommandParser
from .tables import print_table, print_tables, write_json
from .train import OPTIONS as TRAIN_OPTIONS


# Options of training → what the plan calls them.
NAMES = {
    "lora_r": "r",
    "per_device_train_batch_size": "batch_size",
    "max_length": "sequence_length",
    "optim": "optimizer",
}


@dataclass
class PlannedModelArguments(ModelArguments):
    """Which base to plan; all that are known where none is given."""

    model_name_or_path: str = field(
        default="",
        metadata={
            "help": "Folder or hub id of the base model; by default each of the known models.",
            "aliases": ["--base"],
        },
    )


@dataclass
class CardArguments:
    """The card, and where the plan goes."""

    gpu_memory_gb: list[float] = field(
        default_factory=lambda: [24.0],
        metadata={
            "help": "Size of the card as it is sold; programs can have a little less. Several give a table of what "
            "fits which."
        },
    )
    usable_gb: float | None = field(default=None, metadata=help_of(Card, "usable_gb"))
    reserve_gb: float = field(default=Card.reserve_gb, metadata=help_of(Card, "reserve_gb"))
    copy_gb_per_s: float = field(default=Card.copy_gb_per_s, metadata=help_of(Card, "copy_gb_per_s"))
    output_file: str | None = field(
        default=None,
        metadata={"help": "File to write the results to, as JSON; a table goes beside it, as Markdown (.md)."},
    )

    def cards(self) -> list[Card]:
        """The cards that are asked for."""
        sizes = self.gpu_memory_gb if isinstance(self.gpu_memory_gb, list) else [self.gpu_memory_gb]
        if self.usable_gb is not None and len(sizes) > 1:
            raise OrdMoEConfigError(
                f"usable_gb={self.usable_gb} is what one card has, but gpu_memory_gb has {len(sizes)} sizes: {sizes}. "
                "Give one of the two."
            )
        return [Card(size, self.usable_gb, self.reserve_gb, self.copy_gb_per_s) for size in sizes]


@dataclass
class PlanArguments(AdapterSizeArguments):
    """The options of `ordmoe train` that decide what training takes, under their names there; its images; the card's
    kernels."""

    objective: str = field(
        default=OrdMoETrainingArguments.objective, metadata=help_of(OrdMoETrainingArguments, "objective")
    )
    tier_passes: str = field(
        default="auto",
        metadata={
            "help": "How tiers are run. 'auto' is planned as 'sequential', one "
            "after another, which is how training begins and the least that it takes.",
            "choices": list(CHOICES_OF["tier_passes"]),
        },
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Samples at a time on the card."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Tokens of a sample, image tokens included; all are taken to be this long."}
    )
    images_per_sample: int = field(default=0, metadata={"help": "Images of a sample."})
    image_tokens: int = field(default=0, metadata={"help": "Tokens that the language model sees of an image."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Run layers again in backward."})
    bf16: bool = field(default=True, metadata={"help": "Mixed precision in bf16."})
    fp16: bool = field(default=False, metadata={"help": "Mixed precision in fp16, in place of bf16."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimizer.", "choices": list(OPTIMIZERS)})
    compute_capability: float = field(
        default=PlanSettings.compute_capability,
        metadata={"help": "Compute capability of the card: on 9 and 10 (H100, B200), dense experts keep more in bf16."},
    )


def build_parser() -> CommandParser:
    return CommandParser(
        "plan",
        (PlannedModelArguments, CardArguments, PlanArguments),
        {"model_name_or_path": "[MODEL]"},
        passed_over=TRAIN_OPTIONS,
        description="Say what training takes of a card's memory, whether it fits, and what would make it fit: "
        "`ordmoe plan MODEL --gpu_memory_gb 24 --load_in_4bit`. Of MODEL only config.json is read; "
        f"{', '.join(KNOWN_MODELS)} are known without. Several sizes, or no MODEL, give a table of what makes each "
        "model fit each card. A recipe of `ordmoe train` can be given as --config; what has no bearing on memory is "
        "passed over. Planned are reference responses, and rows of its own for each tier that runs at once: prompts "
        "that tiers share (token_scope='response') take less.",
    )


def main(arguments: Sequence[str]) -> None:
    model_options, card_options, options = build_parser().parse_args_and_config(arguments)
    name, cards = model_options.model_name_or_path, card_options.cards()
    if not name or len(cards) > 1:
        show_fits([name] if name else list(KNOWN_MODELS), model_options, options, cards, card_options.output_file)
        return
    (card,) = cards
    config = load_config(name, model_options.model_revision)
    settings = replace(plan_settings(config, model_options, options), usable=card.usable)
    plan = plan_memory(config, settings)
    print_plan(name, plan, settings, card)
    fit = fit_to_card(config, settings, plan, card)
    print_fit(fit, card)
    if plan.in_ram is not None:
        print_copies(plan.in_ram, card)
    if fit["tokens_at_once"] is not None:
        print_choice(fit["tokens_at_once"], settings)
    if card_options.output_file is not None:
        write_json(card_options.output_file, {"model": name, **fit})


def show_fits(
    names: Sequence[str],
    model_options: ModelArguments,
    options: PlanArguments,
    cards: Sequence[Card],
    output: str | None,
) -> None:
    """Print what makes each model fit each card, and write it where it is asked for."""
    if output is not None and Path(output).suffix == ".md":
        raise OrdMoEConfigError(
            f"output_file={output!r} is for JSON; the table in Markdown goes beside it. End it in .json."
        )
    fits = []
    for name in names:
        config = load_config(name, model_options.model_revision)
        settings = plan_settings(config, model_options, options)
        fits.append(find_fits(name, config, settings, cards))
    table = fits_table(fits, _step(settings))
    print_tables([table])
    if output is not None:
        write_whole(Path(output).with_suffix(".md"), table.markdown())
        write_json(output, [model.to_dict() for model in fits])


def plan_settings(config: PretrainedConfig, model: ModelArguments, options: PlanArguments) -> PlanSettings:
    """The options as settings."""
    if options.max_length is None:
        raise OrdMoEConfigError("max_length is not set: give --max_length, the tokens of the longest sample.")
    asked, stored = model.quantization_config(config), stored_quantization(config)
    if stored is not None:
        stored.offload_experts = model.offload_experts
    settings = {NAMES.get(name, name): value for name, value in vars(options).items()}
    bf16, fp16 = settings.pop("bf16"), settings.pop("fp16")
    return PlanSettings(
        dtype=weights_dtype(config, model.dtype),
        quantization=asked if stored is None else stored,
        is_stored_packed=stored is not None,
        autocast=torch.float16 if fp16 else torch.bfloat16 if bf16 else None,
        **settings,
    )


# ----------------------------------------------------------------------------------------------------------- printing
def print_plan(name: str, plan: MemoryPlan, settings: PlanSettings, card: Card) -> None:
    """A row for each thing that takes memory."""
    rows = [
        [f"weights: {row.role.replace('_', ' ')}", row.dtype, f"{row.bits:.2f}", _gib(row.bytes)]
        for row in plan.weights
    ]
    if plan.in_ram is not None:
        rows.append(["  of which in RAM", "pinned", "", f"-{_gib(plan.in_ram.host)}"])
        rows.append(["slots for experts in RAM", "one layer each", "", _gib(plan.in_ram.slots)])
    of_experts = "" if settings.expert_rank is None else f", of experts {settings.expert_rank}"
    for what, form, size in (
        (f"adapter, r {settings.r}{of_experts}", f"{plan.trainable / 1e6:,.1f} M weights", plan.adapter),
        ("its gradients", "", plan.gradients),
        ("optimizer", settings.optimizer, plan.optimizer),
        ("activations kept for backward", _step(settings), plan.activations.kept),
        ("working memory", _largest_moment(plan), plan.activations.working),
        ("  of which logits, at most", f"in tiles of {TILE_TOKENS} x {TILE_VOCABULARY}", settings.logits_bytes),
        ("optimizer's step, beyond activations", _temporaries(plan), plan.beyond_activations),
        ("reserve", "CUDA context and libraries (some 0.5), fragments: a guess", card.reserve),
        ("total", "", plan.total + card.reserve),
    ):
        rows.append([what, form, "", _gib(size)])
    weights = sum(row.weights for row in plan.weights)
    sizes = f"{plan.moe['moe_layers']} MoE layers, E {plan.moe['num_experts']}, K {plan.moe['top_k']}"
    print_table(f"{name}: {weights / 1e9:.2f} B weights, {sizes}", ["", "", "bits", "GiB"], rows)
    if settings.autocast_used != settings.autocast:
        given, dtype = (str(dtype).removeprefix("torch.") for dtype in (settings.autocast, settings.dtype))
        print(
            f"Planned without mixed precision: autocast in {given} refuses {dtype} weights in 4 bits, and training "
            f"would end with that. Train with --{'bf16' if given == 'bfloat16' else 'fp16'} false, or with --dtype "
            f"{given}."
        )


def print_fit(fit: dict[str, Any], card: Card) -> None:
    """Whether it fits, how sure that is, and what would make it fit, of the results of [`fit_to_card`]."""
    needed = fit["total"] + card.reserve
    rest = f"{_gib(card.usable - needed)} are left" if fit["fits"] else f"{_gib(needed - card.usable)} are missing"
    print(
        f"{card.verdict(fit['total']).capitalize()}: {_gib(needed)} GiB are needed, a reserve of {_gib(card.reserve)} "
        f"among them, of the {_gib(card.usable)} that programs can have of a card sold as {card.sold_gb:g} GB; {rest}."
    )
    if fit["is_close"]:
        print(
            "That is less than a plan can be wrong by: run a few steps with the longest samples before you rely on it."
        )
    elif fit["fits"]:
        return
    ways = fit["suggestions"]
    if not ways:
        print("None of the options that this command knows would take less.")
        return
    rows = [[way["options"], _gib(way["total"] + card.reserve), card.verdict(way["total"])] for way in ways]
    print_table("With these, each on top of those above it:", ["option", "total GiB", ""], rows)
    if fit["fewest"] is not None and len(ways) > 1:
        print(
            f"The fewest that suffice: {fit['fewest']['options']} ({_gib(fit['fewest']['total'] + card.reserve)} GiB)."
        )
    if not ways[-1]["fits"]:
        print(f"Even with all of them it does not fit a card of {card.sold_gb:g} GB.")


def print_copies(in_ram: ExpertsInRam, card: Card) -> None:
    """What experts in RAM need of the host, and what time."""
    print(
        f"Packed experts take {_gib(in_ram.pinned)} GiB of pinned RAM, since torch rounds each tensor up to a power of "
        f"two; {_gib(in_ram.host)} GiB with PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:1. A forward and its "
        f"backward copy {in_ram.copied / 1e9:.1f} GB to the card: {card.copy_seconds(in_ram.copied):.1f} s at an "
        f"assumed {card.copy_gb_per_s:g} GB/s, in part while the card computes."
    )


def print_choice(tokens: int, settings: PlanSettings) -> None:
    """What `tier_passes="auto"` makes of what the first batch leaves free."""
    batch = settings.batch_size * settings.sequence_length
    print(f"With tier_passes auto, tiers of the first batch run one after another, {batch:,} tokens at a time.")
    if tokens >= batch:
        print("After it there is room to run all tiers of a batch in one forward, which is faster.")
    elif tokens:
        print(f"After it, a batch of up to {tokens:,} tokens runs all its tiers in one forward, which is faster.")
    else:
        print("So do those of later batches: there is no room to run all tiers in one forward.")


def _step(settings: PlanSettings) -> str:
    """The rows of a forward, and the tiers that it runs."""
    tiers = settings.tiers_run()
    step = f"{settings.rows} rows of {settings.sequence_length} tokens; "
    step += f"tier{'s' * (len(tiers) > 1)} {', '.join(map(str, tiers))}"
    if len(tiers) > 1:
        step += " one after another" if settings.tiers_at_once == 1 else " in one forward"
    return step


def _largest_moment(plan: MemoryPlan) -> str:
    """When working memory is at its most, and how much of it packed experts may take."""
    is_packed = any(row.role == "experts" and row.dtype in ("nf4", "fp4") for row in plan.weights)
    unpacked = f"; {plan.matrices >> 20} MiB of experts unpacked at a time" if is_packed and plan.matrices else ""
    return f"largest moment{unpacked}"


def _temporaries(plan: MemoryPlan) -> str:
    """What is held for a moment when activations are gone."""
    return f"{_gib(plan.temporaries)} when these are gone" if plan.temporaries else "none"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
