"""What is watched while an adapter trains."""

from peft import PeftModel
from transformers import TrainerCallback
from transformers.utils import logging

from ..adapter.config import OrdMoEConfig
from ..adapter.expert_selection import clear_, others_of
from ..monitoring.diagnostics import training_findings


logger = logging.get_logger(__name__)


class OthersStayZero(TrainerCallback):
    """Clears, after each step, the factors of experts that `expert_selection` leaves out, which optimizers with states
    in 8 bits move ([`expert_selection`](../adapter/expert_selection.py)).

    Args:
        model ([`~peft.PeftModel`]): with the adapter that is trained.
        config ([`OrdMoEConfig`]): its configuration.
    """

    def __init__(self, model: PeftModel, config: OrdMoEConfig):
        self.adapter_name = model.active_adapter
        self.others = others_of(model, config, self.adapter_name)

    def on_optimizer_step(self, args, state, control, **kwargs):
        for module, experts in self.others:
            clear_(module, self.adapter_name, experts)


class FailureWatch(TrainerCallback):
    """Names each failure signature of [`~ordmoe_peft.monitoring.diagnostics`] when it first shows in the trainer's log.

    Each is warned about once, by the main process alone.

    Args:
        vocab_size (`int`): V, which a uniform guess depends on.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.named: set[str] = set()

    def on_log(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        for finding in training_findings(state.log_history, vocab_size=self.vocab_size, erl_coef=args.erl_coef):
            if finding.name not in self.named:
                self.named.add(finding.name)
                logger.warning(f"Step {state.global_step}, {finding.name}: {finding.message}")
