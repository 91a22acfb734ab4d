"""Settings of the adapter and of training that cannot work together, or have no effect beside one another."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import logging

from ..adapter.config import OrdMoEConfig
from ..errors import OrdMoEConfigError, OrdMoEModelError
from ..moe_model import MoELayer
from .arguments import OrdMoETrainingArguments, warn_of_idle_settings


logger = logging.get_logger(__name__)


def check_settings(
    config: OrdMoEConfig,
    args: OrdMoETrainingArguments,
    layers: Sequence[MoELayer],
    advantages_C: torch.Tensor,
    is_padding_free: bool,
    has_loss_func: bool,
) -> None:
    """Warn of settings that have no effect. The last two say what the trainer does and was given.

    Raises:
        [`OrdMoEConfigError`]: settings that cannot work together.
    """
    warn_of_idle_settings(config, args, layers)
    if config.num_tiers == 1:
        _check_one_tier(args, has_loss_func)
        return
    if is_padding_free:
        raise OrdMoEConfigError(
            f"Padding-free batches and packing put several samples into one row, which num_tiers={config.num_tiers} "
            "would repeat as one. Set padding_free=False and packing=False."
        )
    _check_loss_is_ours(args, has_loss_func, "num_tiers=1")
    if args.objective == "erl":
        _check_advantages(config, args, advantages_C)
    elif config.rewards is not None or config.advantages != "zscore":
        raise OrdMoEConfigError(
            f"rewards={config.rewards} and advantages={config.advantages!r} have no effect on "
            f"objective={args.objective!r}, which takes the order of the tiers alone. Leave both unset, or set "
            "objective='erl'."
        )
    if args.ntp_coef == 0:
        logger.warning(
            "ntp_coef=0: no supervised loss holds tier 1 in place. In experiments with easy-VQA accuracy collapsed "
            "to 0-10 % without it."
        )


def check_causal(model: nn.Module) -> None:
    """Raise [`OrdMoEModelError`] for a model that does not predict each token from those before it alone, or whose part
    below the head TRL does not find."""
    config, base = model.config, model.get_base_model() if isinstance(model, PeftModel) else model
    if config.is_encoder_decoder or getattr(config, "canvas_length", None):
        raise OrdMoEModelError(
            f"{type(base).__name__} is no causal language model (model_type={config.model_type!r}), so a "
            "response has no likelihood of its tokens one after another. Its adapter works with tier_routing, and with "
            "a training loop of yours."
        )
    if base.base_model is base:
        raise OrdMoEModelError(
            f"{type(base).__name__} names {base.base_model_prefix!r} as its part below the head, which it has not, and "
            "TRL's SFTTrainer needs that (trl 1.16). Its adapter works with tier_routing, and with a training loop of "
            "yours."
        )


def _check_one_tier(args: OrdMoETrainingArguments, has_loss_func: bool) -> None:
    if args.ntp_coef == 0:
        raise OrdMoEConfigError("ntp_coef=0 with num_tiers=1 leaves nothing to learn from: set one of them higher.")
    if args.balance_coef > 0 or args.ntp_coef != 1:
        _check_loss_is_ours(args, has_loss_func, "balance_coef=0 and ntp_coef=1")
    if args.responses == "generated" or args.objective != "erl" or args.lower_tier_floor is not None:
        logger.warning(
            f"responses={args.responses!r}, objective={args.objective!r} and "
            f"lower_tier_floor={args.lower_tier_floor!r} have no effect with num_tiers=1, which is supervised "
            "fine-tuning."
        )


def _check_loss_is_ours(args: OrdMoETrainingArguments, has_loss_func: bool, instead: str) -> None:
    if args.label_smoothing_factor or has_loss_func:
        raise OrdMoEConfigError(
            f"label_smoothing_factor={args.label_smoothing_factor} and compute_loss_func make TRL take the "
            f"loss from another forward, which OrdMoE's further losses have no part in. Leave them unset, or set "
            f"{instead}."
        )


def _check_advantages(config: OrdMoEConfig, args: OrdMoETrainingArguments, advantages_C: torch.Tensor) -> None:
    if not advantages_C.any():
        raise OrdMoEConfigError(
            f"rewards={config.rewards} under advantages={config.advantages!r} are all 0, so L_ERL has no gradient. "
            "Give rewards that fall from tier to tier."
        )
    if args.lower_tier_floor is not None and not (advantages_C < 0).any():
        logger.warning(
            f"lower_tier_floor={args.lower_tier_floor!r} has no effect: the advantages {advantages_C.tolist()} push "
            "no tier down."
        )
