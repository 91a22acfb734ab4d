"""The trainer of OrdMoE adapters."""

import math
import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers.utils import logging
from trl import SFTTrainer

from ..adapter.config import OrdMoEConfig
from ..data.generation import generate_by_tier, with_responses
from ..data.images import encode_images
from ..data.positions import check_fits, check_room, num_positions
from ..data.responses import IGNORED_LABEL, content_mask, end_of_sequence_ids
from ..data.samples import check_processing_class
from ..errors import OrdMoEConfigError, OrdMoEDataError
from ..moe_model import find_moe_layers
from ..objectives.advantages import tier_advantages
from ..objectives.balance import balance_loss
from ..objectives.expert_rank import floor_lower_tiers, log_floor, mean_log_likelihood
from ..objectives.registry import OBJECTIVES, ObjectiveInputs
from ..quantization.fsdp import keep_packed_when_sharded
from ..tiers.plan import RandomDraw
from ._compat import WholeCheckpoints
from .arguments import OrdMoETrainingArguments, warn_of_idle_settings
from .callbacks import FailureWatch
from .data_checks import check_prepared, check_room_to_write, check_trainable, checked_data
from .parallelism_checks import check_placement, check_precision
from .pass_schedule import PassSchedule
from .router_health import RouterHealth
from .row_layout.prompt_sharing import PromptSharing
from .row_layout.separate import left_padded_prompts
from .run_record import RunDescription, RunFolder, describe_data, describe_run, goal_of, on_first_process
from .step_guard import StepGuard
from .tier_passes import TierPasses, TierScores


logger = logging.get_logger(__name__)

# Any of these sets of columns holds answers to learn from, in TRL's data set formats.
ANSWER_COLUMNS = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {"text"}, {"input_ids"})
EMPTY_ANSWER = [{"role": "assistant", "content": ""}]


class OrdMoETrainer(WholeCheckpoints, SFTTrainer):
    """Trains an OrdMoE adapter: supervised fine-tuning on tier 1, the expert-rank loss over all tiers, and balance.

    It takes what [`~trl.SFTTrainer`] takes, data sets included, and overrides `compute_loss`, `training_step`, which
    may take one step for each tier pass, and `get_batch_samples`, which counts rows. With `num_tiers=1` and
    `balance_coef=0` it is [`~trl.SFTTrainer`] to the bit.

    L_NTP is a mean over the tokens of an optimizer step, as TRL has it, and L_ERL a mean over its rows that have a
    response, whatever micro-batch and process they are in: eight micro-batches of one row are one of eight. L_balance
    is a mean over micro-batches.

    Logged beside TRL's metrics: `ntp_loss`, `erl_loss`, `balance_loss`, and for each tier j its mean log-likelihood
    per response token, `tier_<j>/log_likelihood`, and the same without end-of-sequence tokens,
    `tier_<j>/log_likelihood_no_eos`. Tiers that the objective has no gradient for are run and logged every
    `log_tiers_every` steps. Steps with a loss or gradient that is not finite, and batches without responses, do not
    move the weights, and are counted: see [`~ordmoe_peft.training.step_guard.StepGuard`].

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
        self.run_folder = RunFolder(args.output_dir)
        if kwargs.get("processing_class") is not None:
            check_processing_class(kwargs["processing_class"], "The given processing_class")
        if kwargs.get("formatting_func") is None:
            train_dataset = checked_data(train_dataset, args, "training")
            kwargs["eval_dataset"] = checked_data(kwargs.get("eval_dataset"), args, "evaluation")
        train_dataset = _with_answers(train_dataset, args)
        super().__init__(model, args=args, train_dataset=train_dataset, **kwargs)
        self._data = describe_data(train_dataset)
        check_processing_class(self.processing_class, "The model")
        num_given = len(train_dataset) if isinstance(train_dataset, Dataset) else None
        check_prepared(self.train_dataset, args, num_given, num_positions(self.model.config))
        if {"messages", "conversations"} & _columns(train_dataset) and not args.assistant_only_loss:
            logger.warning(
                "The data set has whole conversations and assistant_only_loss is off, so prompts count as part of the "
                "responses that tiers are ranked on. Set assistant_only_loss=True, or give `prompt` and `completion`."
            )
        config = self._adapter_config()
        self.num_tiers, self.objective = config.num_tiers, OBJECTIVES[args.objective]
        self.advantages = tier_advantages(config.rewards, config.num_tiers, config.advantages)
        self._check_settings(config)
        self._new_tokens = args.sampling.get("max_new_tokens") or 0
        if self._is_generated:
            check_room_to_write(self.train_dataset, self._new_tokens, num_positions(self.model.config))
        self.end_of_sequence_ids = end_of_sequence_ids(self._tokenizer, self.model)
        self._pad_token_id = self._tokenizer.pad_token_id
        # The losses are made here, so what the model's own forward does with token counts does not matter: models with
        # images (Qwen3-VL) say that they take none, and transformers would then average over micro-batches.
        self.model_accepts_loss_kwargs |= not self._is_plain_sft
        self._sharing = self._prompt_sharing() if args.share_prompt and self.num_tiers > 1 else None
        # Place in training of the last micro-batch, and how many were before it there, of this process.
        self._seen: tuple[Any, int] = (None, 0)
        check_placement(self.accelerator, args.n_gpu, self._is_generated)
        check_precision(self.model, args)
        if self.is_fsdp_enabled:
            keep_packed_when_sharded(self.model)
        # The passes of the micro-batch that runs, the place of the running one where they have a step each, and what
        # the passes before it gave: L_ERL so far and L_balance.
        self._passes: TierPasses | None = None
        self._place: int | None = None
        self._so_far: tuple[torch.Tensor, torch.Tensor] | None = None
        self._rows_in_step: torch.Tensor | None = None
        self._schedule = PassSchedule(
            args.tier_passes, self._num_passes(), self.accelerator, saves_memory=args.activation_offloading
        )
        self._guard = StepGuard(args.max_nonfinite_steps, self._metrics["train"])
        for callback in filter(None, (self._schedule, self._guard, self._sharing)):
            self.add_callback(callback)
        self.add_callback(FailureWatch(self.model.config.get_text_config().vocab_size))
        if args.log_router_health:
            RouterHealth.add_to(self)

    def _check_settings(self, config: OrdMoEConfig) -> None:
        args = self.args
        warn_of_idle_settings(config, args, find_moe_layers(self.model))
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
        """TRL's. `resume_from_checkpoint` may be `"auto"`: from the last complete checkpoint, or from the start.

        Raises:
            [`OrdMoEConfigError`]: nothing of the adapter is trainable, or `output_dir` holds results of another run.
            [`OrdMoERuntimeError`]: no step was taken, most were dropped, or the trained weights are not finite.
        """
        self._seen = (None, 0)
        check_trainable(self.model)
        checkpoint = on_first_process(
            lambda: self.run_folder.begin(self._describe(), resume_from_checkpoint, self.args.overwrite_output_dir)
        )
        output = super().train(checkpoint, *args, **kwargs)
        trained = ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)
        self._guard.check_run(self.state.global_step, trained)
        return output._replace(training_loss=output.metrics.get("train_loss", math.nan))

    def is_finished(self, resume_from_checkpoint: str | bool | None) -> bool:
        """Whether `resume_from_checkpoint` would go on with a run that [`finish`] was called for.

        Raises:
            [`OrdMoEConfigError`]: `output_dir` holds results of another run.
        """
        return on_first_process(
            lambda: self.run_folder.holds(self._describe(), resume_from_checkpoint, self.args.overwrite_output_dir)
        )

    def finish(self) -> None:
        """Record that the run's results are all saved, so that the same run, started again, has nothing to do."""
        on_first_process(lambda: self.run_folder.finish(goal_of(self.args)))

    def _describe(self) -> RunDescription:
        return describe_run(self.model, self._adapter_config(), self.args, self._data)

    def _prompt_sharing(self) -> PromptSharing:
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        return PromptSharing(self.model, self._pad_token_id, dtype)

    @property
    def _is_plain_sft(self) -> bool:
        return self.num_tiers == 1 and self.args.balance_coef == 0 and self.args.ntp_coef == 1

    @property
    def _is_generated(self) -> bool:
        return self.args.responses == "generated" and self.num_tiers > 1

    @property
    def _active_tiers(self) -> list[int]:
        return self.objective.active_tiers(self.advantages) if self.num_tiers > 1 else []

    def _num_passes(self) -> int:
        return 1 + sum(self._is_generated or tier != 1 for tier in self._active_tiers)

    # -------------------------------------------------------------------------------------------------- rows of a step
    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """[`~transformers.Trainer`]'s; counts the step's rows that have a response, over all processes."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in () if self.padding_free else batches:
            check_fits(self.model, batch)
        rows = [self._rows_with_response(batch) for batch in batches]
        self._guard.expect(rows)
        self._rows_in_step = torch.tensor(sum(rows), device=device)
        if num_items is not None and self.args.average_tokens_across_devices:
            self._rows_in_step = self.accelerator.gather(self._rows_in_step).sum()
        return batches, num_items

    def _rows_with_response(self, inputs: dict[str, Any]) -> int:
        if self._is_generated or "labels" not in inputs:
            return len(inputs["input_ids"])
        return int((inputs["labels"][:, 1:] != IGNORED_LABEL).any(1).sum())

    def _share_of_step(self, rows: int, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | float:
        """Weight of a mean over this micro-batch's rows, so that micro-batches add up to a mean over the step's."""
        if num_items_in_batch is None or self._rows_in_step is None:
            return 1.0
        # As for TRL's token count: of every process, whose gradients are then averaged.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return rows * processes / self._rows_in_step.clamp(min=1)

    # ----------------------------------------------------------------------------------------------------------- steps
    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of a micro-batch: for all tiers at once, or for one tier after another.

        Gradients of both are the same. One after another, the peak memory is that of one pass, and tier 1's takes
        L_NTP and L_balance along. Objectives other than `erl` are not a sum over tiers, so the likelihoods of the
        others are needed first: a further forward, without gradient, of each tier but the first.
        """
        inputs = self._prepare_inputs(inputs)
        with self._schedule.of_training(inputs) as is_tier_by_tier:
            losses = []
            places = range(self._schedule.num_passes) if is_tier_by_tier else [None]
            try:
                for self._place in places:
                    is_last = self._place in (None, places[-1])
                    with nullcontext() if is_last else self.accelerator.no_sync(model):
                        losses.append(self._checked_step(model, inputs, num_items_in_batch))
            finally:
                self._passes, self._place = None, None
        loss = torch.stack(losses).sum()
        self._guard.add_loss(loss)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's; losses are means over the steps that moved the weights."""
        self._guard.correct_means(logs)
        super().log(logs, start_time)

    def _checked_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        gradients = [] if self.accelerator.scaler is not None else [p.grad for p in self.model.parameters()]
        self._guard.check_pass(
            [1] if self._passes is None else self._passes.tiers_of_pass(self._place or 0),
            None if self._passes is None else self._passes.scores,
            loss,
            [gradient for gradient in gradients if gradient is not None],
        )
        if self._passes is not None:
            self._passes.drop_graph()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss of tier 1, and the two further losses; in a later tier pass what that adds to them."""
        if self._is_plain_sft:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._place:
            return self._later_loss(inputs, num_items_in_batch)
        if self.num_tiers > 1:
            with self.accelerator.autocast():  # as around the model's forward
                inputs = encode_images(self.model, inputs)
        self._passes = self._tier_passes(model, inputs)
        result = super().compute_loss(self._passes, inputs, return_outputs, num_items_in_batch)
        ntp, outputs = result if return_outputs else (result, None)
        loss = self.args.ntp_coef * ntp + self._further_losses(inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _tier_passes(self, model: nn.Module, inputs: dict[str, Any]) -> TierPasses:
        step, every = self.state.global_step, self.args.log_tiers_every
        micro_batch = self._next_micro_batch()
        draw = {"step": step, "first_sample": micro_batch * self.args.per_device_train_batch_size}
        active, is_training = self._active_tiers, self.model.training
        is_watched = not self._is_generated and (not is_training or (every and step % every == 0))
        return TierPasses(
            model,
            self.model,
            num_tiers=self.num_tiers,
            active=active,
            pad_token_id=self._pad_token_id,
            watched=[tier for tier in range(2, self.num_tiers + 1) if tier not in active] if is_watched else [],
            written=self._written_rows(inputs, active, micro_batch, draw) if self._is_generated else None,
            scored_by=self.args.scored_by,
            needs_reference=self.objective.needs_reference and self.num_tiers > 1,
            records_routing=self.args.balance_coef > 0,
            sharing=self._sharing,
            **draw,
            tier_by_tier=self._place is not None if is_training else self._schedule.is_tier_by_tier(inputs),
            looks_ahead=not (is_training and self.objective.is_sum_over_tiers),
        )

    def _written_rows(
        self, inputs: dict[str, Any], tiers: list[int], micro_batch: int, draw: dict[str, int]
    ) -> list[dict[str, Any]]:
        """The batch's prompts with what each of `tiers` writes to them."""
        prompts = left_padded_prompts(inputs, self._pad_token_id)
        check_room(prompts["input_ids"].shape[1], self._new_tokens, num_positions(self.model.config))
        written = generate_by_tier(
            self.model,
            prompts,
            tiers,
            seed=self._draw_seed(micro_batch),
            end_ids=self.end_of_sequence_ids,
            pad_token_id=self._pad_token_id,
            rows_per_call=self.args.generation_batch_size,
            routing={"draw": RandomDraw(**draw)},
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

    # ---------------------------------------------------------------------------------------------------------- losses
    def _further_losses(self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        scores, rows = self._passes.scores, self._rows_with_response(inputs)
        erl, balance = self._objective_loss(scores), self._balance(scores)
        self._so_far = (erl.detach(), balance.detach())
        self._log_losses(scores, erl, balance, rows)
        # Balance is a mean over the micro-batch, so it is averaged over the accumulation steps, as TRL's aux loss is.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        balance_coef = self.args.balance_coef / steps if rows else 0.0
        return self.args.erl_coef * self._share_of_step(rows, num_items_in_batch) * erl + balance_coef * balance

    def _later_loss(self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """What pass `_place` adds to L_ERL; its gradient is that of the whole L_ERL with respect to its likelihoods."""
        self._passes.run_pass(self._place)
        rows = self._rows_with_response(inputs)
        erl, (erl_before, balance) = self._objective_loss(self._passes.scores), self._so_far
        self._so_far = (erl.detach(), balance)
        self._log_losses(self._passes.scores, erl, balance, rows)
        return self.args.erl_coef * self._share_of_step(rows, num_items_in_batch) * (erl - erl_before)

    def _objective_loss(self, scores: TierScores) -> torch.Tensor:
        # Rows without a response have no likelihood. Tiers that were not run have no labels.
        has_response_B = scores.mask_CBS.any(-1).any(0)
        if self.num_tiers == 1 or not has_response_B.any():
            return 0 * scores.log_probs_CBS.sum()
        log_probs_CBS, mask_CBS = scores.log_probs_CBS[:, has_response_B], scores.mask_CBS[:, has_response_B]
        advantages_C = self.advantages.to(log_probs_CBS.device)
        if self.args.lower_tier_floor is not None:
            vocab_size = self.model.config.get_text_config().vocab_size
            floor = log_floor(self.args.lower_tier_floor, vocab_size)
            log_probs_CBS = floor_lower_tiers(log_probs_CBS, advantages_C, floor)
        reference_CBS = None if scores.reference_CBS is None else scores.reference_CBS[:, has_response_B]
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
        if not scores.routing:
            return scores.log_probs_CBS.new_zeros(())
        mask_T = scores.attention_mask_BS.reshape(-1)
        if any(len(output.logits_TE) != len(mask_T) for output in scores.routing):
            raise OrdMoEConfigError(
                f"Routers got {sorted({len(output.logits_TE) for output in scores.routing})} tokens of rows with "
                f"{len(mask_T)} positions, so the balance loss does not know which are padding: set balance_coef=0."
            )
        losses = [
            balance_loss(output.logits_TE, output.index_TK, mask_T.to(output.logits_TE.device))
            for output in scores.routing
        ]
        return torch.stack([loss.to(scores.log_probs_CBS.device) for loss in losses]).mean()

    @torch.no_grad()
    def _log_losses(self, scores: TierScores, erl: torch.Tensor, balance: torch.Tensor, rows: int) -> None:
        """Append this batch's losses and tier likelihoods, over all processes, to TRL's metrics after its last pass."""
        if self._place is not None and self._place < self._schedule.num_passes - 1:
            return
        # Each a sum and how many it is over: a row without tokens has no likelihood, and must not count as one of 0.
        sums = {"ntp_loss": (scores.ntp_loss, 1), "erl_loss": (erl * rows, rows), "balance_loss": (balance, 1)}
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
