"""`ordmoe plan MODEL --gpu_memory_gb 24`: whether training fits a card, from the model's configuration alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, PretrainedConfig
from trl import TrlParser

from ..errors import OrdMoEConfigError, OrdMoEModelError
from ..objectives.registry import OBJECTIVES
from ..quantization.config import QUANT_METHOD, MoeBitsAndBytesConfig
from ..tools.plan.card import GIB, Card
from ..tools.plan.known_models import KNOWN_MODELS, known_config
from ..tools.plan.lm_head import TILE_TOKENS, TILE_VOCABULARY, tile_bytes
from ..tools.plan.optimizers import OPTIMIZERS
from ..tools.plan.plan import (
    TIER_PASSES,
    MemoryPlan,
    PlanSettings,
    Suggestion,
    plan_memory,
    suggest,
    tokens_at_once,
)
from .arguments import ModelArguments, weights_dtype, with_model_first
from .tables import print_table, write_json


@dataclass(kw_only=True)
class PlanArguments:
    """The card, and the options of `ordmoe train` that decide what training takes, under their names there."""

    gpu_memory_gb: float = field(
        default=24.0, metadata={"help": "Size of the card as it is sold; programs can have a little less."}
    )
    reserve_gb: float = field(
        default=1.0,
        metadata={
            "help": "GiB to leave free: CUDA's context and libraries take some 0.5, fragments and what kernels "
            "allocate inside the rest."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    targets: list[str] = field(
        default_factory=lambda: ["router", "experts"],
        metadata={"help": "Roles to adapt: router, experts, shared_experts, attention."},
    )
    num_tiers: int = field(default=3, metadata={"help": "Tiers C; 1 is supervised fine-tuning."})
    objective: str = field(default="erl", metadata={"help": f"What L_ERL is: one of {tuple(OBJECTIVES)}."})
    rewards: list[float] | None = field(
        default=None, metadata={"help": "One reward per tier, descending; evenly spaced from 1 to 0 by default."}
    )
    advantages: str = field(default="zscore", metadata={"help": "What rewards become: zscore, center or none."})
    tier_passes: str = field(
        default="auto",
        metadata={
            "help": f"How tiers are run: one of {TIER_PASSES}. 'auto' is planned as 'sequential', one after another, "
            "which is how training begins and the least that it takes."
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
    optim: str = field(default="adamw_torch_fused", metadata={"help": f"Optimizer: one of {tuple(OPTIMIZERS)}."})
    output: str | None = field(default=None, metadata={"help": "File to write the results to, as JSON."})


def build_parser() -> TrlParser:
    return TrlParser(
        (ModelArguments, PlanArguments),
        prog="ordmoe plan",
        description="Say what training takes of a card's memory, whether it fits, and what would make it fit: "
        "`ordmoe plan MODEL --gpu_memory_gb 24 --load_in_4bit`. MODEL, or --model_name_or_path, is a folder or a hub "
        f"id, of which only config.json is read; {', '.join(KNOWN_MODELS)} are known without. A recipe of `ordmoe "
        "train` can be given as --config; what has no bearing on memory is passed over. Planned are reference "
        "responses, and rows of its own for each tier that runs at once: prompts that tiers share "
        "(token_scope='response') take less.",
    )


def main(arguments: Sequence[str]) -> None:
    # A recipe holds options of `ordmoe train` that have no part here.
    model_options, options = build_parser().parse_args_and_config(
        with_model_first(arguments), fail_with_unknown_args=False
    )
    card = Card(options.gpu_memory_gb, options.reserve_gb)
    config = load_config(model_options.model_name_or_path, model_options.model_revision)
    settings = plan_settings(config, model_options, options)
    plan = plan_memory(config, settings)
    print_plan(model_options.model_name_or_path, plan, settings, card)
    suggestions = list(suggest(config, settings, plan, card.safe_room))
    print_verdict(plan, suggestions, card)
    at_once = tokens_at_once(plan, settings, card.room) if plan.total <= card.room else None
    if at_once is not None:
        print_choice(at_once, settings)
    if options.output is not None:
        ways = [{"options": w.options, **w.plan.to_dict(), **card.answer(w.plan.total)} for w in suggestions]
        results = {"model": model_options.model_name_or_path, **plan.to_dict(), **card.answer(plan.total)}
        results |= {"usable": card.usable, "reserve": card.reserve, "room": card.room}
        write_json(options.output, results | {"tokens_at_once": at_once, "suggestions": ways})


def load_config(name: str, revision: str = "main") -> PretrainedConfig:
    """The configuration of a folder, of a model that ships, or of a hub id, in this order.

    Raises:
        [`OrdMoEModelError`]: there is none, or its weights are quantised by something else.
    """
    known = None if os.path.isdir(name) else known_config(name)
    if known is not None:
        facts = dict(known)
        return AutoConfig.for_model(facts.pop("model_type"), **facts)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise OrdMoEModelError(
            f"No configuration of {name!r}: it is no folder with a config.json, not among the models that are known "
            f"without the hub ({', '.join(KNOWN_MODELS)}), and the hub did not give one: {_first_line(error)}"
        ) from error
    quantization = _quantisation_of(config)
    if quantization is not None and quantization.get("quant_method") != QUANT_METHOD:
        raise OrdMoEModelError(
            f"{name!r} is quantised by {quantization.get('quant_method')!r}, whose weights this does not plan. Give an "
            "unquantised checkpoint of it."
        )
    return config


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _quantisation_of(config: PretrainedConfig) -> dict | None:
    quantization = getattr(config, "quantization_config", None)
    return quantization if quantization is None or isinstance(quantization, dict) else quantization.to_dict()


def plan_settings(config: PretrainedConfig, model: ModelArguments, options: PlanArguments) -> PlanSettings:
    """The options as settings."""
    if options.max_length is None:
        raise OrdMoEConfigError("max_length is not set: give --max_length, the tokens of the longest sample.")
    stored = _quantisation_of(config)
    if stored is not None:
        ours = ("bnb_4bit", "llm_int8_skip_modules")
        quantization = MoeBitsAndBytesConfig(**{name: stored[name] for name in stored if name.startswith(ours)})
    else:
        quantization = model.quantization_config(config)
    return PlanSettings(
        dtype=weights_dtype(config, model.dtype),
        quantization=quantization,
        is_stored_packed=stored is not None,
        r=options.lora_r,
        targets=tuple(options.targets),
        num_tiers=options.num_tiers,
        objective=options.objective,
        rewards=None if options.rewards is None else tuple(options.rewards),
        advantages=options.advantages,
        tier_passes=options.tier_passes,
        batch_size=options.per_device_train_batch_size,
        sequence_length=options.max_length,
        images_per_sample=options.images_per_sample,
        image_tokens=options.image_tokens,
        gradient_checkpointing=options.gradient_checkpointing,
        optimizer=options.optim,
        autocast=torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else None,
    )


# ----------------------------------------------------------------------------------------------------------- printing
def print_plan(name: str, plan: MemoryPlan, settings: PlanSettings, card: Card) -> None:
    """A row for each thing that takes memory."""
    rows = [
        [f"weights: {row.role.replace('_', ' ')}", row.dtype, f"{row.bits:.2f}", _gib(row.bytes)]
        for row in plan.weights
    ]
    states = [
        (f"adapter, r {settings.r}", f"{plan.trainable / 1e6:,.1f} M weights", plan.adapter),
        ("its gradients", "", plan.gradients),
        ("optimizer", settings.optimizer, plan.optimizer),
        ("activations kept for backward", _step(settings), plan.activations.kept),
        ("working memory", "largest moment of forward and backward", plan.activations.working),
        ("  of which logits, at most", f"in tiles of {TILE_TOKENS} x {TILE_VOCABULARY}", _logits(settings)),
        ("reserve", "CUDA context and libraries (some 0.5), fragments: a guess", card.reserve),
        ("total", "", plan.total + card.reserve),
    ]
    rows += [[what, form, "", _gib(size)] for what, form, size in states]
    weights = sum(row.weights for row in plan.weights)
    sizes = f"{plan.moe['moe_layers']} MoE layers, E {plan.moe['num_experts']}, K {plan.moe['top_k']}"
    print_table(f"{name}: {weights / 1e9:.2f} B weights, {sizes}", ["", "", "bits", "GiB"], rows)
    if settings.autocast_used != settings.autocast:
        given, weights = (str(dtype).removeprefix("torch.") for dtype in (settings.autocast, settings.dtype))
        print(
            f"Planned without mixed precision: autocast in {given} refuses {weights} weights in 4 bits, and training "
            f"would end with that. Train with --{'bf16' if given == 'bfloat16' else 'fp16'} false, or with --dtype "
            f"{given}."
        )


def _logits(settings: PlanSettings) -> int:
    return tile_bytes(settings.rows * settings.sequence_length, settings.autocast_used or settings.dtype)


def _step(settings: PlanSettings) -> str:
    tiers = settings.tiers_run()
    how = f"tier{'s' * (len(tiers) > 1)} {', '.join(map(str, tiers))}"
    if len(tiers) > 1:
        how += " one after another" if settings.tiers_at_once == 1 else " in one forward"
    return f"{settings.rows} rows of {settings.sequence_length} tokens; {how}"


def print_verdict(plan: MemoryPlan, suggestions: Sequence[Suggestion], card: Card) -> None:
    """Whether it fits, how sure that is, and what would make it fit."""
    needed, answer = plan.total + card.reserve, card.answer(plan.total)
    print(
        f"{card.verdict(plan.total).capitalize()}: {_gib(needed)} GiB are needed, a reserve of {_gib(card.reserve)} "
        f"among them, of the {_gib(card.usable)} that programs can have of a card sold as {card.sold_gb:g} GB; "
        + (
            f"{_gib(card.usable - needed)} are left."
            if answer["fits"]
            else f"{_gib(needed - card.usable)} are missing."
        )
    )
    if answer["is_close"]:
        print(
            "That is less than a plan can be wrong by: run a few steps with the longest samples before you rely on it."
        )
    if answer["fits"] and not answer["is_close"]:
        return
    if not suggestions:
        print("None of the options that this command knows would take less.")
        return
    rows = [[w.options, _gib(w.plan.total + card.reserve), card.verdict(w.plan.total)] for w in suggestions]
    print_table("With these, each on top of those above it:", ["option", "total GiB", ""], rows)
    if not card.answer(suggestions[-1].plan.total)["fits"]:
        print(f"Even with all of them it does not fit a card of {card.sold_gb:g} GB.")


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


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
