"""Which positions of a row follow its tier: `token_scope`.

Under `sequence` all do. Under `response` a position does when the token that it predicts belongs to the response: from
the last prompt token to the last response token but one. The others are on tier 1, so that a prompt is common to all
tiers.
"""

import torch


TOKEN_SCOPES = ("sequence", "response")
# What labels hold where a token belongs to no response, as everywhere in transformers.
IGNORED_LABEL = -100


def tiers_of_labels(tiers_B: torch.Tensor, labels_BS: torch.Tensor, token_scope: str) -> torch.Tensor:
    """The tier of each row, or of each position (`torch.Tensor` of shape `(B,)` or `(B, S)`), of rows to score.

    Args:
        tiers_B (`torch.Tensor` of shape `(B,)`): the tier of each row's response.
        labels_BS (`torch.Tensor` of shape `(B, S)`): the row's tokens where they belong to the response, else `-100`.
        token_scope (`str`): one of [`TOKEN_SCOPES`].
    """
    if token_scope == "sequence":
        return tiers_B
    predicts_response_BS = torch.nn.functional.pad(labels_BS[:, 1:] != IGNORED_LABEL, (0, 1)).cpu()
    return torch.where(predicts_response_BS, tiers_B.cpu().unsqueeze(1), 1)


def tiers_of_prompts(tiers_B: torch.Tensor, prompt_length: int, token_scope: str) -> torch.Tensor:
    """The same of left-padded prompts whose responses are yet to be generated; decoding stays on the last column's."""
    if token_scope == "sequence":
        return tiers_B
    tiers_BS = torch.ones(len(tiers_B), prompt_length, dtype=torch.long)
    tiers_BS[:, -1] = tiers_B
    return tiers_BS
