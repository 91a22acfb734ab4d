"""Which models share prompts between tiers, and the mask that they take."""

from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from ..._compat import attention_implementation
from ...data.generation import placeholder_ids
from ...data.images import row_positions
from ...tiers.routing import adapter_config
from .shared_prompt import SharedPromptRows, branch_mask, shared_prompt_rows


logger = logging.get_logger(__name__)

# Attention functions that take any mask, and kinds of layers that attend by one.
ATTENTION_WITH_MASK = ("sdpa", "eager")
FULL, SLIDING = "full_attention", "sliding_attention"
STATE_NAME = "OrdMoEPromptSharing"


class PromptSharing(TrainerCallback):
    """Joins tiers' rows so that each prompt is computed once, where that gives what separate rows give.

    What is known to break it is looked up when it is made: scope, attention function, kinds of layers. What is not
    known shows in the first batch, which is to be run both ways and given to `judge`. Where it cannot be used, a
    warning says why, once. As a callback it makes that verdict part of the trainer's state, so that a resumed run does
    as the first one did.

    All processes judge the same batch and come to the same verdict, as the two runs may wait for each other's parts of
    the weights. Later on a process may take separate rows for a batch alone: that is one forward in either way, over
    the same layers.

    Args:
        model (`nn.Module`): a MoE model with an adapter.
        pad_token_id (`int`): fills rows that are shorter than others.
        dtype (`torch.dtype`): that of the computation; how equal both ways must be depends on it.

    Attributes:
        is_possible (`bool`): whether prompts are shared.
        is_judged (`bool`): whether both ways were compared.
        state ([`~transformers.TrainerState`], *optional*): where the verdict is kept, once training has begun.
    """

    def __init__(self, model: nn.Module, pad_token_id: int, dtype: torch.dtype):
        self.model, self.pad_token_id, self.dtype = model, pad_token_id, dtype
        self.is_possible, self.is_judged = adapter_config(model).token_scope == "response", False
        self.state: Any = None
        self.placeholder_ids = torch.tensor(placeholder_ids(model), dtype=torch.long)
        if self.is_possible and (reason := reason_for_separate_rows(model)) is not None:
            self._give_up(reason)

    def on_train_begin(self, args, state, control, **kwargs):
        self.state = state
        if (kept := state.stateful_callbacks.get(STATE_NAME)) is not None:
            self.is_judged, self.is_possible = True, self.is_possible and kept["is_possible"]
        elif self.is_judged:  # by an evaluation before
            self._keep_verdict()

    def join(self, batches: list[dict[str, Any]], tiers: list[int]) -> SharedPromptRows | None:
        """Rows of several tiers as one row each, with their mask; `None` where they need rows of their own.

        Args:
            batches (list of `dict`): for each tier its rows, see
                [`~ordmoe_peft.training.row_layout.shared_prompt.shared_prompt_rows`].
            tiers (list of `int`): the tier of each batch.
        """
        if not self.is_possible or len(batches) < 2:
            return None
        shared = shared_prompt_rows(batches, tiers, row_positions(self.model, batches[0]), self.pad_token_id)
        ids_NS = shared.inputs["input_ids"]
        in_branch_NS = shared.segments_NS > 1
        if torch.isin(ids_NS[in_branch_NS], self.placeholder_ids.to(ids_NS.device)).any():
            logger.warning_once(
                "Images after the first response are not shared between tiers: batches with such samples take rows of "
                "their own for each tier."
            )
            return None
        shared.inputs["attention_mask"] = self._mask(shared)
        return shared

    @property
    def awaits_verdict(self) -> bool:
        """Whether the next batch is to be judged."""
        return self.is_possible and not self.is_judged

    def can_judge(self, is_shared: bool, device: torch.device) -> bool:
        """Whether prompts of this batch could be shared on all processes; each must ask."""
        return not reduce(torch.tensor(not is_shared, dtype=torch.long, device=device), reduction="sum").item()

    def judge(self, shared_log_probs: torch.Tensor, log_probs: torch.Tensor, mask: torch.Tensor) -> None:
        """Compare branches' log-probabilities on tier 1 with those of separate rows, and give up where they differ.

        Rounding alone sends some tokens to other experts, the more so in low tiers, whose scores lie close together,
        and in deep models in bf16. So it is tier 1's typical token, over all processes, that is held against the square
        root of the precision. Rows without responses, or not finite as they are, say nothing.
        """
        mask = mask & log_probs.isfinite()
        is_same = (shared_log_probs - log_probs)[mask].abs() <= torch.finfo(self.dtype).eps ** 0.5
        same, count = reduce(torch.stack([is_same.sum(), mask.sum()]), reduction="sum").tolist()
        if not count:
            return
        self.is_judged = True
        if same < count / 2:
            self._give_up(f"it changes the log-probabilities of {1 - same / count:.0%} of tokens in the first batch")
        self._keep_verdict()

    def _keep_verdict(self) -> None:
        if self.state is not None:
            self.state.stateful_callbacks[STATE_NAME] = {"is_possible": self.is_possible}

    def _mask(self, shared: SharedPromptRows) -> torch.Tensor | dict[str, torch.Tensor]:
        windows = attention_windows(self.model)
        masks = {kind: branch_mask(shared, window) for kind, window in windows.items()}
        if attention_implementation(self.model) == "eager":  # which adds its mask to the scores
            masks = {kind: self._as_bias(mask) for kind, mask in masks.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _as_bias(self, mask: torch.Tensor) -> torch.Tensor:
        least = torch.finfo(self.dtype).min
        return torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill(~mask, least)

    def _give_up(self, reason: str) -> None:
        self.is_possible = False
        logger.warning(
            f"Each tier computes prompts anew, in rows of its own, as sharing them is not possible: {reason}."
        )


def reason_for_separate_rows(model: nn.Module) -> str | None:
    """Why shared prompts would change a result, as far as configurations tell; `None` for no reason."""
    implementation = attention_implementation(model)
    if implementation not in ATTENTION_WITH_MASK:
        return (
            f"attn_implementation={implementation!r} takes no mask of branches ({' and '.join(ATTENTION_WITH_MASK)} do)"
        )
    others = sorted({*attention_windows(model)} - {FULL, SLIDING})
    if others:
        return f"layers of kind {', '.join(others)} do not attend by a mask"
    if len(attention_windows(model)) > 1 and model.config.get_text_config() is not model.config:
        return "full and sliding attention take masks of their own, which cannot be passed to a model with images"
    return None


def attention_windows(model: nn.Module) -> dict[str, int | None]:
    """Kind of the text model's layers → tokens that these see, their own included; `None` for all.

    The rule is transformers' own (`masking_utils.py`, `create_masks_for_generate`).
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [FULL if window is None else SLIDING]
        kinds = kinds if getattr(config, "attention_chunk_size", None) is None else ["chunked_attention"]
    return {kind: window if kind == SLIDING else None for kind in sorted(set(kinds))}
