"""How a router leaves experts out of its choice: recognised by what it does to the scores, not by how it is written.

Group-limited routers (DeepSeek-V3) give the experts outside the groups that they keep one low value (−inf or 0), and
choose among what they then have. That may be written as `masked_fill`, `where`, an assignment or a product with a mask.
So each operation within the router is noted with the scores that it was made from, and the last one whose result is
those scores, but for one value in some places, is the limit.

    scores (T, E)     0.9  0.2 | 0.4  0.3          four experts in two groups, of which the first is kept
    limited           0.9  0.2 | -inf -inf         same numbers, but for one value
    left out            0    0 |   1    1

Any other step between a router's first scores and its choice keeps each token's ranks, or adds a bias to each expert. A
step that does neither, such as a large number taken from the scores of the other groups, hides ranks: it is refused.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .._compat import tree_leaves


# Roundings of scores that do not count, in units of their dtype's last place.
ROUNDINGS = 8


class Limit(NamedTuple):
    """Scores of all experts before the limit, and which it leaves out (`torch.Tensor` of shape `(T, E)`, both)."""

    scores_TE: torch.Tensor
    left_out_TE: torch.Tensor


class ScoreHistory:
    """What each tensor of floats within a router was made from."""

    def __init__(self) -> None:
        self._made_from: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def call(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """`func(*args, **kwargs)`, noted."""
        given = [value for value in tree_leaves((args, kwargs)) if _is_floating(value)]
        written = kwargs.get("out") if "out" in kwargs else args[0] if _writes_in_place(func) and args else None
        if _is_floating(written):
            self._keep_before_write(written)
        result = func(*args, **kwargs)
        if _is_floating(result) and all(result is not value for value in given):
            sources = [value for value in given if value.numel() == result.numel()]
            self._made_from[id(result)] = result, sources
        return result

    def begin_at(self, scores: Any) -> None:
        """Forget what `scores` were made from."""
        self._made_from.pop(id(scores), None)

    def _keep_before_write(self, written: torch.Tensor) -> None:
        """Copy what a write changes: the tensor, and others that share its memory, as one that it is a view of."""
        address = written.untyped_storage().data_ptr()
        known = {id(tensor): tensor for made, sources in self._made_from.values() for tensor in (made, *sources)}
        known[id(written)] = written
        for tensor in [tensor for tensor in known.values() if tensor.untyped_storage().data_ptr() == address]:
            before = tensor.clone()
            if id(tensor) in self._made_from:
                self._made_from[id(before)] = before, self._made_from[id(tensor)][1]
            self._made_from[id(tensor)] = tensor, [before]

    def limit_on(self, scores: torch.Tensor) -> Limit | None:
        """The limit that `scores` (`torch.Tensor` of shape `(T, E)` or `(B, S, E)`) were put under, if any."""
        for both in self._steps_to(scores, lambda *step: _left_out(*step) is not None):
            source_TE, made_TE = (tensor.reshape(-1, scores.shape[-1]) for tensor in both)
            left_out_TE = _left_out(source_TE, made_TE)
            if left_out_TE is not None and left_out_TE.any():
                return Limit(source_TE.to(scores.dtype), left_out_TE)
        return None

    def hides_ranks(self, scores: torch.Tensor) -> bool:
        """Whether a step from the first scores to `scores` (`torch.Tensor` of shape `(T, E)` or `(B, S, E)`) neither
        keeps a token's ranks nor adds a bias to each expert."""
        if scores.isnan().any():  # of a broken base, whose ranks mean nothing in any case
            return False
        first = scores
        for source, _ in self._steps_to(scores, _keeps_ranks):
            first = source
        return bool(self._sources(first))

    def _steps_to(
        self, scores: torch.Tensor, explains: Callable[[torch.Tensor, torch.Tensor], bool]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Backwards from `scores`: what it was made from and what was made of that, as far as `explains` holds."""
        made, shape = scores, (-1, scores.shape[-1])
        for _ in range(len(self._made_from)):
            explained = (x for x in self._sources(made) if explains(x.reshape(shape), made.reshape(shape)))
            source = next(explained, None)
            if source is None:
                return
            yield source, made
            made = source

    def _sources(self, made: torch.Tensor) -> list[torch.Tensor]:
        return self._made_from.get(id(made), (made, []))[1]


def hides_experts(scores_TE: torch.Tensor) -> bool:
    """Whether scores (`torch.Tensor` of shape `(T, E)`) look like those of a router that left experts out: some are
    −inf or the least number, several of a token are exactly 0 where the others are far from it, or several of each
    token are the same least score."""
    scores_TE = scores_TE.detach().float()
    if (scores_TE <= torch.finfo(torch.bfloat16).min / 2).any():
        return True
    least_T1 = scores_TE.amin(1, keepdim=True)
    is_least_TE = (scores_TE == least_T1) & (least_T1 != 0)
    if ((is_least_TE.sum(1) > 1) & ~is_least_TE.all(1)).all():
        return True
    is_zero_TE = scores_TE == 0
    least_T = scores_TE.abs().masked_fill(is_zero_TE, torch.inf).amin(1)
    return bool(((is_zero_TE.sum(1) > 1) & (least_T > 1e-20) & least_T.isfinite()).any())


def _left_out(before_TE: torch.Tensor, after_TE: torch.Tensor) -> torch.Tensor | None:
    """Where `after` has one value in place of what was there before; `None` where it differs in another way.

    All of it may be equal, as of a copy; not all of a token's scores may differ.
    """
    differs_TE = before_TE != after_TE
    values = after_TE[differs_TE]
    is_one_value = not values.numel() or bool((values == values[0]).all())
    if differs_TE.all(1).any() or not is_one_value or before_TE.isnan().any():
        return None
    return differs_TE


def _keeps_ranks(before_TE: torch.Tensor, after_TE: torch.Tensor) -> bool:
    """Whether `after` grows with `before` for each token, or is `before` and the same bias for all tokens."""
    tolerance = ROUNDINGS * max(torch.finfo(scores.dtype).eps for scores in (before_TE, after_TE))
    before_TE, after_TE = before_TE.detach().float(), after_TE.detach().float()
    if not (before_TE.isfinite().all() and after_TE.isfinite().all()):
        return False
    bias_TE = after_TE - before_TE
    largest_E = (before_TE.abs() + after_TE.abs()).amax(0)
    if ((bias_TE - bias_TE[:1]).abs() <= tolerance * largest_E).all():
        return True
    order_TE = before_TE.argsort(1)
    step_TE = after_TE.gather(1, order_TE).diff(dim=1)
    rounding_T1 = tolerance * (after_TE.amax(1) - after_TE.amin(1)).unsqueeze(1)
    is_tie_TE = before_TE.gather(1, order_TE).diff(dim=1) == 0
    return bool(((step_TE >= -rounding_T1) & (~is_tie_TE | (step_TE <= rounding_T1))).all())


def _writes_in_place(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
