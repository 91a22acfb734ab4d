"""The trainer of OrdMoE adapters."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import logging
from trl import SFTTrainer

from ..config import OrdMoEConfig
from ..errors import OrdMoEConfigError, OrdMoEDataError
from ..moe_layers import find_moe_layers
from ..objectives.advantages import tier_advantages
from ..objectives.balance import balance_loss
from ..objectives.expert_rank import expert_rank_loss, floor_lower_tiers, log_floor, mean_log_likelihood
from ..responses import content_mask, end_of_sequence_ids
from .arguments import OrdMoETrainingArguments
from .callbacks import FailureWatch
from .tier_passes import TierPasses, TierScores


logger = logging.get_logger(__name__)

# Any of these sets of columns holds answers to learn from, in TRL's data set formats.
ANSWER_COLUMNS = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {"text"}, {"input_ids"})


class OrdMoETrainer(SFTTrainer):
    """Trains an OrdMoE adapter: supervised fine-tuning on tier 1, the expert-rank loss over all tiers, and balance.

    It takes what [`~trl.SFTTrainer`] takes, data sets included, and overrides `compute_loss` alone. With
    `num_tiers=1` and `balance_coef=0` it is [`~trl.SFTTrainer`] to the bit.

    Logged beside TRL's metrics: `ntp_loss`, `erl_loss`, `balance_loss`, and for each tier j its mean log-likelihood
    per response token, `tier_<j>/log_likelihood`, and the same without end-of-sequence tokens,
    `tier_<j>/log_likelihood_no_eos`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a model with an active
            [`OrdMoEConfig`] adapter, or a base, with the adapter's configuration as `peft_config`.
        args ([`OrdMoETrainingArguments`], *optional*): training arguments.
        train_dataset ([`~datasets.Dataset`]): see [`~trl.SFTTrainer`].
        kwargs: all other arguments of [`~trl.SFTTrainer`].

    Raises:
        [`OrdMoEConfigError`]: no OrdMoE adapter is active, or batches are padding-free with more than one tier.
        [`OrdMoEDataError`]: the data set has no answers.
    """

    _tag_names = ["trl", "ordmoe"]
    _name = "OrdMoE"
    _paper = {
        "title": "OrdMoE: Preference Alignment via Hierarchical Expert Group Ranking in Multimodal "
        "Mixture-of-Experts LLMs",
        "id": "2511.19023",
    }

    def __init__(
        self,
        model: "str | nn.Module",
        args: OrdMoETrainingArguments | None = None,
        train_dataset: Any = None,
        **kwargs: Any,
    ):
        args = args or OrdMoETrainingArguments("ordmoe-adapter")
        _check_answers(train_dataset)
        super().__init__(model, args=args, train_dataset=train_dataset, **kwargs)
        if {"messages", "conversations"} & _columns(train_dataset) and not args.assistant_only_loss:
            logger.warning(
                "The data set has whole conversations and assistant_only_loss is off, so prompts count as part of the "
                "responses that tiers are ranked on. Set assistant_only_loss=True, or give `prompt` and `completion`."
            )
        config = self._adapter_config()
        self.num_tiers = config.num_tiers
        if self.num_tiers > 1 and self.padding_free:
            raise OrdMoEConfigError(
                f"Padding-free batches and packing put several samples into one row, which num_tiers={self.num_tiers} "
                "would repeat as one. Set padding_free=False and packing=False."
            )
        self.advantages = tier_advantages(config.rewards, config.num_tiers, config.advantages)
        self.top_k = find_moe_layers(self.model)[0].top_k
        self.end_of_sequence_ids = end_of_sequence_ids(self._tokenizer, self.model)
        self.add_callback(FailureWatch(self.model.config.get_text_config().vocab_size))

    def _adapter_config(self) -> OrdMoEConfig:
        configs = self.model.peft_config if isinstance(self.model, PeftModel) else {}
        config = configs.get(getattr(self.model, "active_adapter", None))
        if not isinstance(config, OrdMoEConfig):
            raise OrdMoEConfigError(
                "OrdMoETrainer needs a model with an active OrdMoE adapter: call get_peft_model(model, OrdMoEConfig()) "
                "first, or pass peft_config=OrdMoEConfig()."
            )
        return config

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss of tier 1, and the two further losses from the same forward."""
        if self.num_tiers == 1 and self.args.balance_coef == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        passes = TierPasses(
            model, self.model, self.num_tiers, self.state.global_step, records_routing=self.args.balance_coef > 0
        )
        result = super().compute_loss(passes, inputs, return_outputs, num_items_in_batch)
        ntp, outputs = result if return_outputs else (result, None)
        # Means over the micro-batch, so they are averaged over the accumulation steps, as TRL does with its aux loss.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        loss = ntp + self._further_losses(passes.scores, inputs) / steps
        return (loss, outputs) if return_outputs else loss

    def _further_losses(self, scores: TierScores, inputs: dict[str, Any]) -> torch.Tensor:
        log_probs_CBS, advantages_C = scores.log_probs_CBS, self.advantages.to(scores.log_probs_CBS.device)
        if self.args.lower_tier_floor is not None:
            vocab_size = self.model.config.get_text_config().vocab_size
            floor = log_floor(self.args.lower_tier_floor, vocab_size)
            log_probs_CBS = floor_lower_tiers(log_probs_CBS, advantages_C, floor)
        erl = expert_rank_loss(mean_log_likelihood(log_probs_CBS, scores.mask_BS).T, advantages_C)
        balance = self._balance(scores, inputs)
        self._log_losses(scores, inputs["labels"], erl, balance)
        return self.args.erl_coef * erl + self.args.balance_coef * balance

    def _balance(self, scores: TierScores, inputs: dict[str, Any]) -> torch.Tensor:
        if not scores.router_logits:
            return scores.log_probs_CBS.new_zeros(())
        mask = inputs.get("attention_mask")
        losses = [
            balance_loss(
                logits_TE,
                self.top_k,
                logits_TE.new_ones(len(logits_TE)) if mask is None else mask.reshape(-1).to(logits_TE.device),
            )
            for logits_TE in scores.router_logits
        ]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    @torch.no_grad()
    def _log_losses(self, scores: TierScores, labels: torch.Tensor, erl: torch.Tensor, balance: torch.Tensor) -> None:
        """Append this batch's losses and tier likelihoods, averaged over processes, to TRL's metrics."""
        log_probs_CBS, mask_BS = scores.log_probs_CBS.detach(), scores.mask_BS
        content_BS = content_mask(labels[:, 1:].to(mask_BS.device), mask_BS, self.end_of_sequence_ids)
        ntp = -(log_probs_CBS[0] * mask_BS).sum() / mask_BS.sum().clamp(min=1)
        likelihood_C = mean_log_likelihood(log_probs_CBS, mask_BS).mean(-1)
        content_likelihood_C = mean_log_likelihood(log_probs_CBS, content_BS).mean(-1)
        names = ["ntp_loss", "erl_loss", "balance_loss"]
        names += [f"tier_{tier}/log_likelihood" for tier in range(1, self.num_tiers + 1)]
        names += [f"tier_{tier}/log_likelihood_no_eos" for tier in range(1, self.num_tiers + 1)]
        values = torch.cat([torch.stack([ntp, erl, balance.to(ntp.device)]), likelihood_C, content_likelihood_C])
        values = self.accelerator.gather_for_metrics(values.unsqueeze(0)).mean(0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in zip(names, values, strict=True):
            metrics[name].append(value)


def _columns(dataset: Any) -> set[str]:
    return set(getattr(dataset, "column_names", None) or [])


def _check_answers(dataset: Any) -> None:
    columns = _columns(dataset)
    if columns and not any(needed <= columns for needed in ANSWER_COLUMNS):
        raise OrdMoEDataError(
            f"The data set has the columns {sorted(columns)}, none of which holds an answer to learn from. It needs "
            "`prompt` and `completion`, or `messages`, or `text` (TRL's data set formats)."
        )
