"""The load-balancing loss that keeps a router from sending all tokens to few experts."""

import torch


def balance_loss(router_logits_TE: torch.Tensor, top_k_index_TK: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """`E · Σ_i f_i · P_i` over the tokens where `mask_T` holds (Switch Transformer, arXiv 2101.03961, eq. 4).

    f_i is the share of the T·K routed rows that go to expert i, P_i the mean router probability of expert i; the loss
    is 1 when both are uniform. f_i is counted from the experts that the router chose: a selection bias or a limit on
    groups makes these others than the K largest probabilities. transformers' `load_balancing_loss_func` counts rows per
    token, of the largest probabilities, so it is K times as large where both choices agree.

    Args:
        router_logits_TE (`torch.Tensor` of shape `(T, E)`): logits, before softmax.
        top_k_index_TK (`torch.Tensor` of shape `(T, K)`): the experts that the router chose.
        mask_T (`torch.Tensor` of shape `(T,)`): `False` or 0 for padding.
    """
    num_experts = router_logits_TE.shape[-1]
    probabilities_TE = router_logits_TE.float().softmax(-1)
    mask_T1 = mask_T.to(probabilities_TE.dtype).unsqueeze(1)
    num_tokens = mask_T1.sum().clamp(min=1)
    routed_E = torch.zeros_like(probabilities_TE).scatter(1, top_k_index_TK, 1.0).mul(mask_T1).sum(0)
    mean_E = (probabilities_TE * mask_T1).sum(0) / num_tokens
    return num_experts * (routed_E / (num_tokens * top_k_index_TK.shape[1]) * mean_E).sum()
