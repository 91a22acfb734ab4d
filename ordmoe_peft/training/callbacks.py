"""What is watched while an adapter trains."""

from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)


class LikelihoodWatch(TrainerCallback):
    """Warns once when tier 1's likelihood falls while the lowest tier's does: the expert-rank loss is too strong.

    The loss rewards any fall of the low tiers, without bound; they share weights with tier 1 and can drag it along.

    Args:
        num_tiers (`int`): C.
        margin (`float`, defaults to 0.1): nats per token by which tier 1 must have fallen from its best logged value,
            and the lowest tier from its first.
    """

    def __init__(self, num_tiers: int, margin: float = 0.1):
        self.top, self.bottom = "tier_1/log_likelihood", f"tier_{num_tiers}/log_likelihood"
        self.num_tiers, self.margin = num_tiers, margin
        self.best_top: float | None = None
        self.first_bottom: float | None = None
        self.has_warned = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.num_tiers == 1 or self.has_warned or self.top not in (logs or {}):
            return
        top, bottom = logs[self.top], logs[self.bottom]
        if self.best_top is None:
            self.best_top, self.first_bottom = top, bottom
        self.best_top = max(self.best_top, top)
        if top < self.best_top - self.margin and bottom < self.first_bottom - self.margin:
            self.has_warned = True
            logger.warning(
                f"Step {state.global_step}: the likelihood of tier 1 fell from {self.best_top:.3f} to {top:.3f} nats a "
                f"token while tier {self.num_tiers} fell from {self.first_bottom:.3f} to {bottom:.3f}. The expert-rank "
                f"loss pushes low tiers down without bound and drags tier 1 along: lower erl_coef (now "
                f"{args.erl_coef}), or bound it with lower_tier_floor='uniform'."
            )
