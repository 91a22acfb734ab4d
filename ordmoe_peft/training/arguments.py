"""Arguments of the trainer."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available, logging
from trl import SFTConfig

from ..adapter.config import OrdMoEConfig
from ..adapter.field_types import check_field_types
from ..data.generation import check_one_response, sampling_arguments
from ..errors import OrdMoEConfigError
from ..moe_model import MoELayer
from ..objectives.registry import OBJECTIVES
from ..tiers.router_check import check_router
from ._compat import JSON_ARGUMENTS
from .parallelism_checks import check_recomputed


logger = logging.get_logger(__name__)

CHOICES = {
    "objective": tuple(OBJECTIVES),
    "responses": ("reference", "generated"),
    "scored_by": ("tier", "policy"),
    "tier_passes": ("auto", "batched", "sequential"),
}
# (option, value) → options that have an effect only where it has that value.
ACT_ONLY_WITH = {
    ("objective", "simpo"): ("simpo_gamma",),
    ("responses", "generated"): (
        *("max_completion_length", "generation_batch_size", "generation_kwargs", "temperature", "top_p", "top_k"),
        *("min_p", "repetition_penalty"),
    ),
}
NOT_NEGATIVE = (
    *("ntp_coef", "erl_coef", "balance_coef", "log_tiers_every", "temperature", "top_k", "router_learning_rate"),
)
AT_LEAST_1 = ("max_completion_length", "generation_batch_size", "max_nonfinite_steps")
# What only bears on several tiers: of these arguments, on L_ERL alone, and of the adapter's configuration.
ACT_BETWEEN_TIERS = ("erl_coef", "objective_beta", "scored_by", "share_prompt", "tier_passes", "log_tiers_every")
ACT_ON_ERL = ("objective", "objective_beta", "lower_tier_floor", "responses", "scored_by")
CUT_TIERS = ("grouping", "layer_scope", "token_scope", "tier_weights", "rewards", "advantages", "tier_seed")


def _option(default: Any, help_text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass
class OrdMoETrainingArguments(SFTConfig):
    """[`~trl.SFTConfig`] and what OrdMoE adds: two further losses, and responses that tiers write themselves.

    The total is `ntp_coef · L_NTP + erl_coef · L_ERL + balance_coef · L_balance`. What each field is stands in its help
    text, here and in `ordmoe train --help`.

    Raises:
        [`OrdMoEConfigError`]: a value that cannot work.
    """

    erl_coef: float = _option(
        0.01,
        "λ_ERL, the weight of the expert-rank loss. The loss is unbounded below: 0.1 already lowered tier 1's accuracy "
        "in experiments with easy-VQA.",
    )
    balance_coef: float = _option(
        0.001,
        "λ_bal, the weight of the load-balancing loss, over tier-1 rows alone. It takes the place of TRL's "
        "router_aux_loss_coef, which must stay unset or 0.",
    )
    lower_tier_floor: float | str | None = _option(
        None,
        "Log-probability below which a token under a tier of negative advantage gives no gradient: a number, or "
        "'uniform' for that of a uniform guess, -ln V. Not set: the paper's loss.",
    )
    ntp_coef: float = _option(
        1.0,
        "Weight of the supervised loss. 0 trains from the routing alone, for which prompts without answers suffice; in "
        "experiments accuracy collapsed without it, so a warning says so.",
    )
    objective: str = _option(
        "erl",
        "What L_ERL is over the ordered responses; 'erl' is the paper's loss. 'dpo' and 'ipo' compare with the frozen "
        "base, the same model with its adapter off.",
        choices=CHOICES["objective"],
    )
    objective_beta: float | None = _option(
        None,
        "Beta of the objectives other than 'erl'; by default 1 for 'logistic' and 'plackett_luce', 0.1 for 'dpo' and "
        "'ipo', 2 for 'simpo'.",
    )
    simpo_gamma: float = _option(0.5, "Gamma, the margin of 'simpo'.")

    responses: str = _option(
        "reference",
        "'reference': all tiers score the reference response; 'generated': in each step every tier with a part in the "
        "objective writes its own.",
        choices=CHOICES["responses"],
    )
    scored_by: str = _option(
        "tier",
        "Whether the 'tier' that wrote a generated response or the 'policy', tier 1, scores it.",
        choices=CHOICES["scored_by"],
    )
    share_prompt: bool = _option(
        True, "With token_scope='response', compute each prompt once for all tiers where the model allows."
    )
    tier_passes: str = _option(
        "auto",
        "'batched': one forward for all tiers; 'sequential': a forward and backward for each, at the peak memory of "
        "supervised fine-tuning. Losses and gradients are the same but for rounding. Sequential, objectives other than "
        "'erl' take a further forward, without gradient, of each tier but the first, since the gradient of one depends "
        "on the likelihoods of all. 'auto': the first micro-batch is taken sequentially and measured; from then on "
        "batches run at once, which is faster, where they are expected to fit into four fifths of the memory that "
        "gradients and optimizer states leave free. It says up to how many tokens that is and why, and keeps to it "
        "when resumed. Batches that do not fit are measured again where they have more than twice the tokens.",
        choices=CHOICES["tier_passes"],
    )
    max_nonfinite_steps: int = _option(
        10,
        "A step in which a loss or gradient is not finite does not move the weights; so many in a row end training "
        "with an error.",
    )
    log_tiers_every: int = _option(
        10,
        "Steps between runs, without gradient, of tiers that the objective has no gradient for (of C = 3 evenly spaced "
        "tiers, the middle one), to log their likelihood; 0 for never.",
    )
    log_router_health: bool = _option(False, "Log statistics of the routers as router/…")

    max_completion_length: int = _option(256, "Longest response to generate, in tokens.")
    generation_batch_size: int | None = _option(
        None, "Most rows in one generate call, at least one tier's; those of all tiers by default."
    )
    temperature: float = _option(
        1.0,
        "Temperature of sampling; 0 is greedy. Draws depend on seed, step and process alone, so a resumed run repeats "
        "them.",
    )
    top_p: float = _option(1.0, "Nucleus of sampling.")
    top_k: int = _option(0, "Sample from this many tokens; 0 for all.")
    min_p: float | None = _option(None, "Least probability of a token, relative to the best.")
    repetition_penalty: float = _option(1.0, "Penalty on repeated tokens; 1 is none.")
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of generate, as JSON."}
    )

    router_learning_rate: float | None = _option(
        None, "Learning rate of LoRA on routers, under the same schedule; learning_rate where it is not set."
    )

    resume_from_checkpoint: str | None = _option(
        None,
        "Where to go on from: a checkpoint's folder; 'true', the last complete one of the run; 'auto', the same where "
        "there is one, else the start.",
    )
    overwrite_output_dir: bool = _option(
        False,
        "Start anew in a folder that holds checkpoints or an adapter of an earlier run, which are deleted; without it, "
        "such a run is refused.",
    )

    _VALID_DICT_FIELDS = [*JSON_ARGUMENTS, "generation_kwargs"]

    def __post_init__(self):
        # A string or a number; a string or a truth value.
        check_field_types(self, OrdMoETrainingArguments, skip=("lower_tier_floor", "resume_from_checkpoint"))
        self._check_generation_kwargs()
        if self.router_aux_loss_coef:
            raise OrdMoEConfigError(
                f"router_aux_loss_coef={self.router_aux_loss_coef} would add a second balance loss, over all tiers. "
                "Set balance_coef instead and leave router_aux_loss_coef unset."
            )
        self.router_aux_loss_coef = 0.0
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise OrdMoEConfigError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if self.responses == "reference" and self.scored_by == "policy":
            raise OrdMoEConfigError(
                "scored_by='policy' with responses='reference' would score the same response by the same tier C times. "
                "Set responses='generated', or leave scored_by at 'tier'."
            )
        self._check_objective()
        self._check_floor()
        for name in NOT_NEGATIVE:
            if (getattr(self, name) or 0) < 0:
                raise OrdMoEConfigError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not (self.ntp_coef or self.erl_coef or self.balance_coef):
            raise OrdMoEConfigError(
                "ntp_coef, erl_coef and balance_coef are all 0, which leaves nothing to learn from: set one higher."
            )
        for name in AT_LEAST_1:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise OrdMoEConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.enable_jit_checkpoint:
            logger.warning("enable_jit_checkpoint=True: no effect; SIGTERM leaves a checkpoint in any case.")
            self.enable_jit_checkpoint = False
        self.bf16 = self._chosen_bf16(self.bf16)
        for end in ("", "_kwargs"):  # transformers 5.24 warns of the names that TRL 1.16 gives these
            new = f"activation_checkpointing{end}"
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, f"gradient_checkpointing{end}"))
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # nothing to copy to, of which torch warns
        check_recomputed(self)
        check_one_response(self.generation_kwargs or {})
        if self.learning_rate == 0:
            logger.warning("learning_rate=0: training does not move the weights.")
        if self.router_learning_rate == 0:
            logger.warning("router_learning_rate=0: training does not move the routers.")
        self._warn_of_idle_options()

    def _chosen_bf16(self, asked: bool | None) -> bool:
        """TRL trains in bf16 where nothing is said, which transformers refuses where no accelerator has it."""
        is_cpu = self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")  # as `accelerate launch --cpu` sets it
        has_bf16 = not is_cpu and (is_torch_bf16_gpu_available() or is_torch_xla_available())
        if asked is None and not self.fp16 and not has_bf16:
            instead = "fp16=True" if torch.cuda.is_available() and not is_cpu else "bf16=True and use_cpu=True"
            logger.warning_once(
                f"No accelerator with bf16 is used, so training is not in mixed precision. Set {instead} for that."
            )
        return (has_bf16 and not self.fp16) if asked is None else asked

    def _check_generation_kwargs(self) -> None:
        if not isinstance(self.generation_kwargs, str):
            return
        try:
            read = json.loads(self.generation_kwargs)
        except json.JSONDecodeError:
            read = None
        if not isinstance(read, dict):
            raise OrdMoEConfigError(
                f'generation_kwargs must be a JSON object such as {{"num_beams": 2}}, got {self.generation_kwargs!r}.'
            )
        self.generation_kwargs = self.generation_kwargs.strip()  # transformers reads what starts with a brace

    def _warn_of_idle_options(self) -> None:
        for (name, value), dependents in ACT_ONLY_WITH.items():
            idle = _changed(self, dependents)
            if idle and getattr(self, name) != value:
                logger.warning(
                    f"{', '.join(idle)}: no effect with {name}={getattr(self, name)!r}, only with {value!r}."
                )
        sampling = _changed(self, ("top_p", "top_k", "min_p"))
        if sampling and self.temperature == 0 and self.responses == "generated":
            logger.warning(f"{', '.join(sampling)}: no effect with temperature=0, which is greedy.")

    def _check_objective(self) -> None:
        if self.objective_beta is not None and (self.objective == "erl" or self.objective_beta <= 0):
            raise OrdMoEConfigError(
                f"objective_beta={self.objective_beta} must be positive, and objective={self.objective!r} must have "
                "one: 'erl' is weighed by erl_coef alone."
            )

    def _check_floor(self) -> None:
        floor = self.lower_tier_floor
        if floor is not None and self.objective != "erl":
            raise OrdMoEConfigError(
                f"lower_tier_floor={floor!r} bounds objective='erl' alone; {self.objective!r} has no tiers of negative "
                "advantage. Leave it unset."
            )
        if floor is None or floor == "uniform":
            return
        try:
            self.lower_tier_floor = number = float(str(floor))
        except ValueError as error:
            raise OrdMoEConfigError(
                f"lower_tier_floor must be a log-probability or 'uniform', got {floor!r}."
            ) from error
        if not -math.inf < number <= 0:
            raise OrdMoEConfigError(f"lower_tier_floor is a finite log-probability, so at most 0, got {number}.")

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of `generate` for responses."""
        shared = sampling_arguments(
            self.max_completion_length, self.temperature, self.top_p, self.top_k, self.repetition_penalty
        )
        least = {"min_p": self.min_p} if self.temperature > 0 and self.min_p is not None else {}
        further = self.generation_kwargs or {}
        assert isinstance(further, dict)  # transformers has read a string
        return {"use_cache": True, **shared, **least, **further}


def warn_of_idle_settings(config: OrdMoEConfig, args: OrdMoETrainingArguments, layers: Sequence[MoELayer]) -> None:
    """Warn of settings that the user changed and that have no effect beside the others."""
    for idle, reason in _idle_settings(config, args, layers):
        if idle:
            logger.warning(f"{', '.join(idle)}: no effect with {reason}.")


def _idle_settings(
    config: OrdMoEConfig, args: OrdMoETrainingArguments, layers: Sequence[MoELayer]
) -> Iterator[tuple[list[str], str]]:
    if config.num_tiers == 1:
        given = _changed(args, ACT_BETWEEN_TIERS) + _changed(config, CUT_TIERS)
        yield given, "num_tiers=1, which is supervised fine-tuning"
        return
    if args.erl_coef == 0:
        yield _changed(args, ACT_ON_ERL) + _changed(config, ("rewards", "advantages")), "erl_coef=0"
    if config.grouping != "random":
        yield _changed(config, ("tier_seed",)), f"grouping={config.grouping!r}, only with 'random'"
    if config.tier_weights == "match" and all(map(_renormalises, layers)):
        yield _changed(config, ("tier_weights",)), "routers whose weights sum to the same for any experts"
    if config.token_scope != "response":
        yield _changed(args, ("share_prompt",)), f"token_scope={config.token_scope!r}, only with 'response'"
    if args.responses == "generated" and args.log_tiers_every:
        yield _changed(args, ("log_tiers_every",)), "responses='generated', where each tier that is run is logged"


def _renormalises(layer: MoELayer) -> bool:
    """Whether the weights of a token's experts sum to the same for different tokens."""
    # Nothing to run: no router, or a weight that is sharded over processes or has no numbers.
    if layer.router is None or layer.router_weight.dim() != 2 or layer.router_weight.device.type == "meta":
        return False
    return check_router(layer).renormalises


def _changed(settings: Any, names: Iterable[str]) -> list[str]:
    """Those of `names` that are not at their defaults, with their values."""
    defaults = {item.name: item.default for item in fields(settings) if item.default is not MISSING}
    return [f"{name}={getattr(settings, name)!r}" for name in names if getattr(settings, name) != defaults[name]]
