"""Which tokens of a response are its content, and which only end it."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase


def end_of_sequence_ids(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> torch.Tensor:
    """The token ids that end a response, of the tokenizer and of the model's generation config together."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = set(ids if isinstance(ids, list) else [ids]) | {tokenizer.eos_token_id}
    return torch.tensor(sorted(ids - {None}), dtype=torch.long)


def content_mask(labels_BS: torch.Tensor, mask_BS: torch.Tensor, end_ids: torch.Tensor) -> torch.Tensor:
    """`mask_BS` without end-of-sequence tokens and what a chat template puts after the last of them.

    Args:
        labels_BS (`torch.Tensor` of shape `(B, S)`): label of each predicted position.
        mask_BS (`torch.Tensor` of shape `(B, S)`): positions that have a label.
        end_ids (`torch.Tensor` of shape `(n,)`): token ids that end a sequence.
    """
    is_end_BS = torch.isin(labels_BS, end_ids.to(labels_BS.device)) & mask_BS
    ends_from_here_BS = is_end_BS.flip(1).cumsum(1).flip(1)
    is_after_last_end_BS = (ends_from_here_BS == 0) & is_end_BS.any(1, keepdim=True)
    return mask_BS & ~is_end_BS & ~is_after_last_end_BS
