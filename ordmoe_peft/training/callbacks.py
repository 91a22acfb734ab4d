"""What is watched while an adapter trains."""

from transformers import TrainerCallback
from transformers.utils import logging

from ..monitoring.diagnostics import training_findings


logger = logging.get_logger(__name__)


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
