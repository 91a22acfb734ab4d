"""The trainer of OrdMoE adapters."""

import random
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import logging
from trl import SFTTrainer

from .._compat import WholeCheckpoints
from ..checkpoints import checkpoint_to_resume
from ..config import OrdMoEConfig
from ..errors import OrdMoEConfigError, OrdMoEDataError
from ..generation import generate_by_tier, with_responses
from ..moe_layers import find_moe_layers
from ..objectives.advantages import tier_advantages
from ..objectives.balance import balance_loss
from ..objectives.expert_rank import floor_lower_tiers, log_floor, mean_log_likelihood
from ..quantization.sharding import keep_packed_when_sharded
from ..responses import content_mask, end_of_sequence_ids
from .arguments import OrdMoETrainingArguments
from .callbacks import FailureWatch
from .objectives import OBJECTIVES, ObjectiveInputs
from .router_health import RouterHealth
from .rows import left_padded_prompts
from .tier_passes import TierPasses, TierScores


logger = logging.get_logger(__name__)

# Any of these sets of columns holds answers to learn from, in TRL's data set formats.
ANSWER_COLUMNS = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {"text"}, {"input_ids"})
EMPTY_ANSWER = [{"role": "assistant", "content": ""}]


class OrdMoETrainer(WholeCheckpoints, SFTTrainer):
    """Trains an OrdMoE adapter: supervised fine-tuning on tier 1, the expert-rank loss over all tiers, and balance.

    It takes what [`~trl.SFTTrainer`] takes, data sets included, and overrides `compute_loss` alone. With
    `num_tiers=1` and `balance_coef=0` it is [`~trl.SFTTrainer`] to the bit.

    Logged beside TRL's metrics: `ntp_loss`, `erl_loss`, `balance_loss`, and for each tier j its mean log-likelihood
    per response token, `tier_<j>/log_likelihood`, and the same without end-of-sequence tokens,
    `tier_<j>/log_likelihood_no_eos`. Tiers that the objective has no gradient for are run and logged every
    `log_tiers_every` steps.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): a model with an active
            [`OrdMoEConfig`] adapter, or a base, with the adapter's configuration as `peft_config`.
        args ([`OrdMoETrainingArguments`], *optional*): training arguments.
        train_dataset ([`~datasets.Dataset`]): see [`~trl.SFTTrainer`].
        kwargs: all other arguments of [`~trl.SFTTrainer`].

    Raises:
        [`OrdMoEConfigError`]: no OrdMoE adapter is active, or settings that have no effect or cannot work together.
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
        train_dataset = _with_answers(train_dataset, args)
        super().__init__(model, args=args, train_dataset=train_dataset, **kwargs)
        if {"messages", "conversations"} & _columns(train_dataset) and not args.assistant_only_loss:
            logger.warning(
                "The data set has whole conversations and assistant_only_loss is off, so prompts count as part of the "
                "responses that tiers are ranked on. Set assistant_only_loss=True, or give `prompt` and `completion`."
            )
        config = self._adapter_config()
        self.num_tiers, self.objective = config.num_tiers, OBJECTIVES[args.objective]
        self.advantages = tier_advantages(config.rewards, config.num_tiers, config.advantages)
        self._check_settings(config)
        self.top_k = find_moe_layers(self.model)[0].top_k
        self.end_of_sequence_ids = end_of_sequence_ids(self._tokenizer, self.model)
        self._pad_token_id = self._tokenizer.pad_token_id
        # Place in training of the last micro-batch, and how many were before it there, of this process.
        self._seen: tuple[Any, int] = (None, 0)
        if self.is_fsdp_enabled:
            keep_packed_when_sharded(self.model)
        self.add_callback(FailureWatch(self.model.config.get_text_config().vocab_size))
        if args.log_router_health:
            RouterHealth.add_to(self)

    def _check_settings(self, config: OrdMoEConfig) -> None:
        args = self.args
        if self.num_tiers == 1:
            self._check_one_tier()
            return
        if self.padding_free:
            raise OrdMoEConfigError(
                f"Padding-free batches and packing put several samples into one row, which num_tiers={self.num_tiers} "
                "would repeat as one. Set padding_free=False and packing=False."
            )
        self._check_loss_is_ours("num_tiers=1")
        if args.objective == "erl":
            self._check_advantages(config)
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

    def _check_one_tier(self) -> None:
        args = self.args
        if args.ntp_coef == 0:
            raise OrdMoEConfigError("ntp_coef=0 with num_tiers=1 leaves nothing to learn from: set one of them higher.")
        if args.balance_coef > 0 or args.ntp_coef != 1:
            self._check_loss_is_ours("balance_coef=0 and ntp_coef=1")
        if args.responses == "generated" or args.objective != "erl" or args.lower_tier_floor is not None:
            logger.warning(
                f"responses={args.responses!r}, objective={args.objective!r} and "
                f"lower_tier_floor={args.lower_tier_floor!r} have no effect with num_tiers=1, which is supervised "
                "fine-tuning."
            )

    def _check_loss_is_ours(self, instead: str) -> None:
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise OrdMoEConfigError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} and compute_loss_func make TRL take the "
                f"loss from another forward, which OrdMoE's further losses have no part in. Leave them unset, or set "
                f"{instead}."
            )

    def _check_advantages(self, config: OrdMoEConfig) -> None:
        if not self.advantages.any():
            raise OrdMoEConfigError(
                f"rewards={config.rewards} under advantages={config.advantages!r} are all 0, so L_ERL has no gradient. "
                "Give rewards that fall from tier to tier."
            )
        if self.args.lower_tier_floor is not None and not (self.advantages < 0).any():
            logger.warning(
                f"lower_tier_floor={self.args.lower_tier_floor!r} has no effect: the advantages "
                f"{self.advantages.tolist()} push no tier down."
            )

    def _adapter_config(self) -> OrdMoEConfig:
        configs = self.model.peft_config if isinstance(self.model, PeftModel) else {}
        config = configs.get(getattr(self.model, "active_adapter", None))
        if not isinstance(config, OrdMoEConfig):
            raise OrdMoEConfigError(
                "OrdMoETrainer needs a model with an active OrdMoE adapter: call get_peft_model(model, OrdMoEConfig()) "
                "first, or pass peft_config=OrdMoEConfig()."
            )
        return config

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's, from the last complete checkpoint on request; see [`~ordmoe_peft.checkpoints.checkpoint_to_resume`]."""
        self._seen = (None, 0)
        return super().train(checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir), *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss of tier 1, and the two further losses from the same forward."""
        if self.num_tiers == 1 and self.args.balance_coef == 0 and self.args.ntp_coef == 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        passes = self._tier_passes(model, inputs)
        result = super().compute_loss(passes, inputs, return_outputs, num_items_in_batch)
        ntp, outputs = result if return_outputs else (result, None)
        # Means over the micro-batch, so they are averaged over the accumulation steps, as TRL does with its aux loss.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        loss = self.args.ntp_coef * ntp + self._further_losses(passes.scores) / steps
        return (loss, outputs) if return_outputs else loss

    def _tier_passes(self, model: nn.Module, inputs: dict[str, Any]) -> TierPasses:
        step, every = self.state.global_step, self.args.log_tiers_every
        micro_batch = self._next_micro_batch()
        draw = {"step": step, "first_sample": micro_batch * self.args.per_device_train_batch_size}
        active = self.objective.active_tiers(self.advantages) if self.num_tiers > 1 else []
        is_generated = self.args.responses == "generated" and self.num_tiers > 1
        is_watched = not is_generated and (not self.model.training or (every and step % every == 0))
        return TierPasses(
            model,
            self.model,
            num_tiers=self.num_tiers,
            active=active,
            pad_token_id=self._pad_token_id,
            watched=[tier for tier in range(2, self.num_tiers + 1) if tier not in active] if is_watched else [],
            written=self._written_rows(inputs, active, micro_batch, draw) if is_generated else None,
            scored_by=self.args.scored_by,
            needs_reference=self.objective.needs_reference and self.num_tiers > 1,
            records_routing=self.args.balance_coef > 0,
            **draw,
        )

    def _written_rows(
        self, inputs: dict[str, Any], tiers: list[int], micro_batch: int, draw: dict[str, int]
    ) -> list[dict[str, Any]]:
        """The batch's prompts with what each of `tiers` writes to them."""
        prompts = left_padded_prompts(inputs, self._pad_token_id)
        written = generate_by_tier(
            self.model,
            prompts,
            tiers,
            seed=self._draw_seed(micro_batch),
            end_ids=self.end_of_sequence_ids,
            pad_token_id=self._pad_token_id,
            rows_per_call=self.args.generation_batch_size,
            routing=draw,
            **self.args.sampling,
        )
        return [with_responses(prompts, *response) for response in zip(written.ids_CBS, written.mask_CBS, strict=True)]

    def _next_micro_batch(self) -> int:
        """The place of the micro-batch in its step, over all processes, as if one process ran them in turn.

        Draws depend on it, so two processes draw what one does that accumulates, and no two micro-batches the same.
        """
        place = (self.model.training, self.state.global_step)
        self._seen = (place, self._seen[1] + 1 if self._seen[0] == place else 0)
        return self._seen[1] * self.accelerator.num_processes + self.accelerator.process_index

    def _draw_seed(self, micro_batch: int) -> int:
        """A seed for this micro-batch of this step, the same when the step is run again."""
        name = (self.args.seed, self.model.training, self.state.global_step, micro_batch)
        return random.Random(str(name)).getrandbits(63)

    def _further_losses(self, scores: TierScores) -> torch.Tensor:
        erl = self._objective_loss(scores) if self.num_tiers > 1 else scores.log_probs_CBS.new_zeros(())
        balance = self._balance(scores)
        self._log_losses(scores, erl, balance)
        return self.args.erl_coef * erl + self.args.balance_coef * balance

    def _objective_loss(self, scores: TierScores) -> torch.Tensor:
        log_probs_CBS, mask_CBS = scores.log_probs_CBS, scores.mask_CBS
        advantages_C = self.advantages.to(log_probs_CBS.device)
        if self.args.lower_tier_floor is not None:
            vocab_size = self.model.config.get_text_config().vocab_size
            floor = log_floor(self.args.lower_tier_floor, vocab_size)
            log_probs_CBS = floor_lower_tiers(log_probs_CBS, advantages_C, floor)
        reference_CBS = scores.reference_CBS
        return self.objective.loss(
            ObjectiveInputs(
                mean_BC=mean_log_likelihood(log_probs_CBS, mask_CBS).T,
                sum_BC=(log_probs_CBS * mask_CBS).sum(-1).T,
                reference_mean_BC=None if reference_CBS is None else mean_log_likelihood(reference_CBS, mask_CBS).T,
                reference_sum_BC=None if reference_CBS is None else (reference_CBS * mask_CBS).sum(-1).T,
                advantages_C=advantages_C,
                beta=self.args.objective_beta or self.objective.beta,
                gamma=self.args.simpo_gamma,
            )
        )

    def _balance(self, scores: TierScores) -> torch.Tensor:
        if not scores.router_logits:
            return scores.log_probs_CBS.new_zeros(())
        mask_T = scores.attention_mask_BS.reshape(-1)
        losses = [
            balance_loss(logits_TE, self.top_k, mask_T.to(logits_TE.device)) for logits_TE in scores.router_logits
        ]
        return torch.stack([loss.to(scores.log_probs_CBS.device) for loss in losses]).mean()

    @torch.no_grad()
    def _log_losses(self, scores: TierScores, erl: torch.Tensor, balance: torch.Tensor) -> None:
        """Append this batch's losses and tier likelihoods, over all processes, to TRL's metrics."""
        # Each a sum and how many it is over: a row without tokens has no likelihood, and must not count as one of 0.
        sums = {"ntp_loss": (scores.ntp_loss, 1), "erl_loss": (erl, 1), "balance_loss": (balance, 1)}
        for tier in scores.tiers:
            log_probs_BS, labels_BS, mask_BS = (
                part_CBS[tier - 1] for part_CBS in (scores.log_probs_CBS, scores.labels_CBS, scores.mask_CBS)
            )
            content_BS = content_mask(labels_BS, mask_BS, self.end_of_sequence_ids)
            for name, counted_BS in (("log_likelihood", mask_BS), ("log_likelihood_no_eos", content_BS)):
                means_B = mean_log_likelihood(log_probs_BS, counted_BS)
                sums[f"tier_{tier}/{name}"] = (means_B.sum(), counted_BS.any(-1).sum())
            if self.args.responses == "generated" and self.num_tiers > 1:
                sums[f"tier_{tier}/response_length"] = (mask_BS.sum(), len(mask_BS))
        device = scores.log_probs_CBS.device
        parts = [torch.as_tensor(part, dtype=torch.float32, device=device) for pair in sums.values() for part in pair]
        local_n2 = torch.stack(parts).view(-1, 2)
        # Not `gather_for_metrics`, which drops processes where the last batch has fewer samples than there are.
        summed_n2 = self.accelerator.reduce(local_n2, reduction="sum")
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, (total, count) in zip(sums, summed_n2.tolist(), strict=True):
            if count:
                metrics[name].append(total / count)


def _columns(dataset: Any) -> set[str]:
    return set(getattr(dataset, "column_names", None) or [])


def _with_answers(dataset: Any, args: OrdMoETrainingArguments) -> Any:
    """The data set as TRL takes it: prompts alone, where they suffice, get empty answers.

    Raises:
        [`OrdMoEDataError`]: there are no answers to learn from, and some are needed.
    """
    columns = _columns(dataset)
    if not columns or any(needed <= columns for needed in ANSWER_COLUMNS):
        return dataset
    if "prompt" not in columns or args.ntp_coef > 0 or args.responses == "reference":
        raise OrdMoEDataError(
            f"The data set has the columns {sorted(columns)}, none of which holds an answer to learn from. It needs "
            "`prompt` and `completion`, or `messages`, or `text` (TRL's data set formats). Prompts alone suffice with "
            "responses='generated' and ntp_coef=0, which is not advised."
        )
    return dataset.map(lambda row: {"completion": "" if isinstance(row["prompt"], str) else EMPTY_ANSWER})
