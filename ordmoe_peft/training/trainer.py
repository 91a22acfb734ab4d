"""The trainer of OrdMoE adapters.

TRL computes the supervised loss and its metrics in `SFTTrainer.compute_loss`, from a forward that it takes there, and
has no method for that forward alone. So `compute_loss` gives it a function for a model, which runs the micro-batch's
rows under all tiers and answers with the batch's own rows, on tier 1:

    training_step          each tier pass, as a value in `inputs`      or an evaluation: the whole batch
      SFTTrainer.training_step
        compute_loss       takes the pass out of `inputs`
          SFTTrainer.compute_loss(answer, ...)                         supervised loss, entropy, token accuracy, counts
            answer(**inputs, fused_lm_head=True)
              TierPass.run                                             rows of all tiers of the pass -> its scores
          TierLoss.added(scores, previous)                             L_ERL
        backward
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from trl import SFTTrainer

from ..adapter.card_file import write_saved_card
from ..adapter.config import OrdMoEConfig
from ..data.images import encode_images
from ..data.responses import end_of_sequence_ids
from ..data.rows import check_fits, num_positions
from ..data.samples import check_processing_class, tokenizer_of
from ..errors import OrdMoEConfigError
from ..moe_model import MoEModel
from ..objectives.advantages import tier_advantages
from ..objectives.registry import OBJECTIVES
from ..quantization.fsdp import keep_packed_when_sharded
from ..tiers.plan import RandomDraw
from ..tiers.scope import IGNORED_LABEL
from ._compat import WholeCheckpoints, logged_metrics
from .answers import with_answers
from .arguments import OrdMoETrainingArguments
from .callbacks import FailureWatch, OthersStayZero
from .data_checks import check_prepared, check_room_to_write, check_trainable, checked_data
from .losses import Sum, TierLoss, means_over_processes, tier_metrics
from .micro_batch import MICRO_BATCH, TIER_PASS, MicroBatch, NumberedBatches, model_inputs, numbered
from .parallelism_checks import check_experts_in_ram, check_placement, check_precision, check_selected_experts
from .pass_schedule import PassSchedule
from .precision import prepare_for_scaler_
from .router_health import RouterHealth
from .router_rate import RouterRate, check_router_rate
from .row_groups import generated_rows, row_groups
from .row_layout.prompt_sharing import PromptSharing
from .run_files import MetricsFile, environment, write_run_files
from .run_record import RunDescription, RunFolder, describe_data, describe_run, goal_of, on_first_process
from .run_summary import data_source, run_summary
from .settings_checks import check_causal, check_settings
from .step_guard import StepGuard
from .stopping import StopOnSignal
from .tier_passes import TierForward, TierPass
from .tier_scores import TierScores


class OrdMoETrainer(WholeCheckpoints, SFTTrainer):
    """Trains an OrdMoE adapter: supervised fine-tuning on tier 1, the expert-rank loss over all tiers, and balance.

    It takes what [`~trl.SFTTrainer`] takes, data sets included, and overrides `training_step`, which takes upstream's
    once for each tier pass, `compute_loss`, and `get_batch_samples` and `evaluation_loop`, which number micro-batches.
    With `num_tiers=1` and `balance_coef=0` it is [`~trl.SFTTrainer`] to the bit.

    L_NTP is a mean over the tokens of an optimizer step, as TRL has it, and L_ERL a mean over its rows that have a
    response, whatever micro-batch and process they are in: eight micro-batches of one row are one of eight. L_balance
    is a mean over micro-batches.

    In `output_dir` stand `environment.json`, where the run took place, and `metrics.jsonl`, what it logged; with
    `run_options`, those of `ordmoe train`, also `run_config.yaml`. SIGTERM leaves a checkpoint of the step.

    Logged beside TRL's metrics: `ntp_loss`, `erl_loss`, `balance_loss`, and for each tier j its mean log-likelihood
    per response token, `tier_<j>/log_likelihood`, and the same without end-of-sequence tokens,
    `tier_<j>/log_likelihood_no_eos`. Tiers that the objective has no gradient for are run and logged every
    `log_tiers_every` steps. Steps with a loss or gradient that is not finite, and batches without responses, do not
    move the weights, and are counted: see [`~ordmoe_peft.training.step_guard.StepGuard`].

    On a base in 4 bits the adapter and AdamW's states are in bf16, as TRL has them, which is what makes Qwen3-30B-A3B
    fit into 24 GB. Under `fp16=True` they are in fp32 and take 4.7 GiB more (r 16): see
    [`~ordmoe_peft.training.precision.prepare_for_scaler_`].

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
        train_dataset = with_answers(train_dataset, args)
        super().__init__(model, args=args, train_dataset=train_dataset, **kwargs)
        self._data, self.data_source = describe_data(train_dataset), data_source(train_dataset)
        self._is_resumed = False
        self.run_options: dict[str, Any] | None = None
        check_processing_class(self.processing_class, "The model")
        num_given = len(train_dataset) if isinstance(train_dataset, Dataset) else None
        check_prepared(self.train_dataset, args, num_given, num_positions(self.model.config))
        config = self._adapter_config()
        self.num_tiers, self.objective = config.num_tiers, OBJECTIVES[args.objective]
        self.advantages = tier_advantages(config.rewards, config.num_tiers, config.advantages)
        has_loss_func = self.compute_loss_func is not None
        check_causal(self.model)
        layers = MoEModel.of(self.model).layers
        check_settings(config, args, layers, self.advantages, self.padding_free, has_loss_func)
        check_router_rate(args, config.targets, has_optimizer=self.optimizer is not None)
        if self._is_generated:
            new_tokens = args.sampling.get("max_new_tokens") or 0
            check_room_to_write(self.train_dataset, new_tokens, num_positions(self.model.config))
        tokenizer = tokenizer_of(self.processing_class)
        self.end_of_sequence_ids = end_of_sequence_ids(tokenizer, self.model)
        self._pad_token_id = tokenizer.pad_token_id
        # We compute the loss, so set this: Qwen3-VL reports that it ignores `num_items_in_batch`, and Trainer would
        # average over micro-batches.
        self.model_accepts_loss_kwargs |= not self._is_plain_sft
        check_placement(self.accelerator, args.n_gpu, self._is_generated)
        check_experts_in_ram(self.model, self.accelerator)
        check_selected_experts(config, args, self.accelerator)
        check_precision(self.model, args)
        prepare_for_scaler_(self.model, self.accelerator)
        if self.is_fsdp_enabled:
            keep_packed_when_sharded(self.model)
        vocab_size = self.model.config.get_text_config().vocab_size
        self._sharing = self._prompt_sharing() if args.share_prompt and self.num_tiers > 1 else None
        self._schedule = PassSchedule(
            args.tier_passes, self._num_passes(), self.accelerator, saves_memory=args.activation_offloading
        )
        self._guard = StepGuard(args.max_nonfinite_steps, logged_metrics(self, "train"))
        others = None if config.expert_selection is None else OthersStayZero(self.model, config)
        self._router_rate = None if args.router_learning_rate is None else RouterRate(args.router_learning_rate)
        self._metrics_file, self._stop = MetricsFile(args.output_dir), StopOnSignal()
        watching = (FailureWatch(vocab_size), self._router_rate, self._metrics_file)
        # The guard has the last word on what is saved.
        for callback in (others, self._schedule, self._stop, self._guard, self._sharing, *watching):
            if callback is not None:
                self.add_callback(callback)
        if args.log_router_health:
            RouterHealth.add_to(self)

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
            [`OrdMoEInterrupted`]: a process received SIGTERM; a checkpoint of the step is saved.
        """
        check_trainable(self.model)
        checkpoint = on_first_process(lambda: self._begin(resume_from_checkpoint))
        self._is_resumed = checkpoint is not None
        try:
            output = super().train(checkpoint, *args, **kwargs)
        finally:
            self._stop.restore()
        self._stop.check(self.state.global_step, "no step had moved the weights, so no checkpoint was saved.")
        trained = ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)
        self._guard.check_run(self.state.global_step, trained)
        return output._replace(training_loss=output.metrics.get("train_loss", math.nan))

    def _begin(self, wish: str | bool | None) -> str | None:
        """See that the run may begin, and record it: the checkpoint that it starts from."""
        run, folder = self._describe(), self.run_folder
        checkpoint = folder.begin(run, wish, self.args.overwrite_output_dir)
        self._metrics_file.is_kept = not folder.is_finished(run.goal)
        if self._metrics_file.is_kept:
            data_path = (self.run_options or {}).get("dataset_name")
            now = environment(self._data, self.args.world_size, data_path)
            write_run_files(folder.folder, now, self.run_options, is_new=checkpoint is None)
        return checkpoint

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

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """[`~transformers.Trainer`]'s; what the run was up to now is saved with the adapter."""
        self.model.ordmoe_training = run_summary(
            self.state, self.args, self.data_source, self.num_tiers, self._is_resumed
        )
        super().save_model(*args, **kwargs)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Adds tags and the data's id to the card of the adapter that is saved in `output_dir`.

        The card itself is written whenever the adapter is saved, in place of TRL's draft, for which TRL calls this
        before each checkpoint.

        Args:
            model_name (`str`, *optional*): not used; the card is named by the base.
            dataset_name (`str`, *optional*): id of the training data on the hub.
            tags (`str` or `list[str]`, *optional*): further tags.
        """
        if (tags or dataset_name) and self.is_world_process_zero():
            data = {"id": dataset_name} if dataset_name else {}
            write_saved_card(self.args.output_dir, [tags] if isinstance(tags, str) else tags or [], data)

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

    @property
    def _tier_loss(self) -> TierLoss:
        """By the arguments of now: callbacks may change them while the run goes on."""
        return TierLoss.of(self.args, self.advantages, self.model.config.get_text_config().vocab_size)

    def _num_passes(self) -> int:
        return 1 + sum(self._is_generated or tier != 1 for tier in self._active_tiers)

    # ---------------------------------------------------------------------------------------------------- micro-batches
    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """[`~transformers.Trainer`]'s; adds to each micro-batch where it stands in its step."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in () if self.padding_free else batches:
            check_fits(self.model, batch)
        rows = [self._rows_with_response(batch) for batch in batches]
        self._guard.begin_step(rows)
        shares: list[Any] = [1.0] * len(rows)
        if num_items is not None:
            rows_in_step, processes = torch.tensor(sum(rows), device=device), 1
            if self.args.average_tokens_across_devices:
                # As for TRL's token count: of every process, whose gradients are then averaged.
                rows_in_step, processes = self.accelerator.gather(rows_in_step).sum(), self.accelerator.num_processes
            shares = [own * processes / rows_in_step.clamp(min=1) for own in rows]
        return list(numbered(batches, self.accelerator, shares)), num_items

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """[`~transformers.Trainer`]'s; adds to each micro-batch where it stands in the evaluation."""
        return super().evaluation_loop(NumberedBatches(dataloader, self.accelerator), *args, **kwargs)

    def _rows_with_response(self, inputs: dict[str, Any]) -> int:
        if self._is_generated or "labels" not in inputs:
            return len(inputs["input_ids"])
        return int((inputs["labels"][:, 1:] != IGNORED_LABEL).any(1).sum())

    # ----------------------------------------------------------------------------------------------------------- steps
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """[`~transformers.Trainer`]'s, with `router_learning_rate` for factors on routers."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if self._router_rate is not None and is_new:
            self._router_rate.split_groups_(optimizer, self.model)
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of a micro-batch: for all tiers at once, or for one tier after another.

        Gradients of both are the same. One after another, the peak memory is that of one pass, and tier 1's takes
        L_NTP and L_balance along. Objectives other than `erl` are not a sum over tiers, so the likelihoods of the
        others are needed first: a further forward, without gradient, of each tier but the first.
        """
        if self._is_plain_sft:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._guard.check_pass([1], None, loss, self._gradients())
            return loss
        model.train()
        if callable(set_training := getattr(self.optimizer, "train", None)):
            set_training()  # as upstream's training_step does, but before the forwards without gradient
        inputs, losses = self._prepare_inputs(inputs), []
        with self._schedule.of_training(inputs) as is_sequential:
            micro_batch = inputs.get(MICRO_BATCH, MicroBatch())
            passes = self._make_passes(model, model_inputs(inputs), micro_batch, is_sequential)
            previous = passes[0].previous
            for planned in passes:
                tier_pass = replace(planned, previous=previous)
                with nullcontext() if tier_pass.is_last else self.accelerator.no_sync(model):
                    loss = super().training_step(model, {**inputs, TIER_PASS: tier_pass}, num_items_in_batch)
                self._check_pass_ran(tier_pass)
                self._guard.check_pass(tier_pass.routed_by, tier_pass.scores, loss, self._gradients())
                losses.append(loss)
                previous = tier_pass.scores.detached()
        return torch.stack(losses).sum()

    def _check_pass_ran(self, tier_pass: TierPass) -> None:
        if not hasattr(tier_pass, "scores"):
            raise OrdMoEConfigError(
                f"compute_loss of {type(self).__name__} did not give inputs[{TIER_PASS!r}] to that of OrdMoETrainer, "
                f"so its tier pass did not run. Pass all inputs on, {MICRO_BATCH!r} and {TIER_PASS!r} among them."
            )

    def _gradients(self) -> list[torch.Tensor]:
        """The accumulated gradients; none where a scaler looks after them."""
        gradients = [] if self.accelerator.scaler is not None else [p.grad for p in self.model.parameters()]
        return [gradient for gradient in gradients if gradient is not None]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss of tier 1, and the two further losses; in a later tier pass what that adds to them."""
        tier_pass, micro_batch = inputs.get(TIER_PASS), inputs.get(MICRO_BATCH, MicroBatch())
        inputs = model_inputs(inputs)
        if self._is_plain_sft:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        running = tier_pass or self._only_pass(model, inputs, micro_batch)
        if running.index > 0:
            running.run()
            return self._erl_of_step(running, inputs, micro_batch)

        def answer(**given: Any) -> Any:  # in place of the model: see the top of this file
            return running.run() if given.get("fused_lm_head") else model(**given)

        result = super().compute_loss(answer, inputs, return_outputs, num_items_in_batch)
        ntp, outputs = result if return_outputs else (result, None)
        loss = self.args.ntp_coef * ntp + (
            self._erl_of_step(running, inputs, micro_batch)
            + self._balance_coef(inputs, num_items_in_batch) * running.scores.balance_loss
        )
        return (loss, outputs) if return_outputs else loss

    def _erl_of_step(self, tier_pass: TierPass, inputs: dict[str, Any], micro_batch: MicroBatch) -> torch.Tensor:
        """What a pass adds to the step's weighted L_ERL."""
        if tier_pass.is_last:
            self._log_losses(tier_pass.scores, self._rows_with_response(inputs))
        erl = self._tier_loss.added(tier_pass.scores, tier_pass.previous if tier_pass.index > 0 else None)
        return self.args.erl_coef * micro_batch.share_of_rows * erl

    def _balance_coef(self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None) -> float:
        """A mean over the micro-batch, it is averaged over the accumulation steps, as TRL's aux loss is."""
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return self.args.balance_coef / steps if self._rows_with_response(inputs) else 0.0

    # ---------------------------------------------------------------------------------------------------------- passes
    def _only_pass(self, model: nn.Module, inputs: dict[str, Any], micro_batch: MicroBatch) -> TierPass:
        """A batch in one pass; in evaluation the other tiers may have run before it, without a graph."""
        is_sequential = not self.model.training and self._schedule.is_tier_by_tier(inputs)
        return replace(self._make_passes(model, inputs, micro_batch, is_sequential)[0], is_last=True)

    def _make_passes(
        self, model: nn.Module, inputs: dict[str, Any], micro_batch: MicroBatch, is_sequential: bool
    ) -> list[TierPass]:
        """The passes of a micro-batch, after generation and all else that is run without gradient."""
        if self.num_tiers > 1:
            with self.accelerator.autocast():  # as around the model's forward
                inputs = encode_images(self.model, inputs)
        active, is_training = self._active_tiers, self.model.training
        step, every = self.state.global_step, self.args.log_tiers_every
        is_logged = not self._is_generated and (not is_training or (every and step % every == 0))
        draw = RandomDraw(step, first_sample=micro_batch.index * self.args.per_device_train_batch_size)
        generated = None
        if self._is_generated:
            ids = {"end_ids": self.end_of_sequence_ids, "pad_token_id": self._pad_token_id}
            generated = generated_rows(self.model, inputs, active, self.args, **ids, draw=draw, index=micro_batch.index)
        forward = TierForward(
            model,
            self.model,
            self._pad_token_id,
            self._sharing,
            draw,
            needs_balance=self.args.balance_coef > 0,
        )
        return forward.passes(
            row_groups(inputs, active, generated, self.args.scored_by),
            self.num_tiers,
            logged_tiers=[tier for tier in range(2, self.num_tiers + 1) if tier not in active] if is_logged else [],
            needs_reference=self.objective.needs_reference and self.num_tiers > 1,
            is_sequential=is_sequential,
            precompute_scores=not (is_training and self.objective.is_sum_over_tiers),
        )

    # --------------------------------------------------------------------------------------------------------- logging
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's; losses are means over the steps that moved the weights."""
        self._guard.correct_means(logs)
        if self._router_rate is not None and "learning_rate" in logs:
            logs["router_learning_rate"] = self._router_rate.last
        super().log(logs, start_time)

    @torch.no_grad()
    def _log_losses(self, scores: TierScores, rows: int) -> None:
        """Append a batch's losses and tier likelihoods, over all processes, to TRL's metrics."""
        sums: dict[str, Sum] = {
            "ntp_loss": (scores.ntp_loss, 1),
            "erl_loss": (self._tier_loss(scores) * rows, rows),
            "balance_loss": (scores.balance_loss, 1),
            **tier_metrics(scores, self.end_of_sequence_ids, with_lengths=self._is_generated),
        }
        metrics = logged_metrics(self, "train" if self.model.training else "eval")
        for name, mean in means_over_processes(sums, self.accelerator).items():
            metrics[name].append(mean)
