"""What a running forward of a text model knows: its rows, its mask, its place in the cache, and its tiers.

A model has one text model, or several (Qwen3-Omni: thinker and talker). Each has one pair of hooks, which keeps the
[`RunningForward`] of this thread while the text model runs; tiers and observers of routers read it there.

    with tiers_requested(...)          what the forwards of this thread are to be held to, by text model
      text model's forward             hooks: RunningForward(rows, mask, past length, tiers)
        decoder layer → router, experts            read it with `running_forward`
      backward → layer again           gradient checkpointing: the checkpoint function carries it along
"""

import inspect
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.utils import logging

from ._compat import wrap_checkpointing
from .errors import OrdMoERuntimeError
from .tiers.plan import TierPlan


logger = logging.get_logger(__name__)

# The cache's name up to transformers 5.23, from 5.24 on, and in models with a recurrent state.
CACHE_NAMES = ("past_key_values", "cache", "cache_params")
# Which positions are of images, as models with other experts for these than for text are given it (ERNIE-4.5-VL).
KINDS, OF_IMAGES = "moe_mm_token_type_ids", re.compile(r"\bvision_")


@dataclass(frozen=True)
class RunningForward:
    """A forward of a text model.

    Args:
        model (`nn.Module`): the text model.
        given (`dict`): its arguments by name.
        plan ([`~ordmoe_peft.tiers.plan.TierPlan`], *optional*): the tiers that it is held to; `None` where all tokens
            are on tier 1, which is the model as it is.
        past_length (`int`): positions in the cache before this forward; read only where `plan` depends on it.
        is_training (`bool`): whether the text model is in training mode and gradients are asked for.
        is_recomputed (`bool`): whether gradient checkpointing runs a layer of it again.
        routed (`set` of `int`): ids of the routers that ran.
        outer ([`RunningForward`], *optional*): the forward of another text model that this one runs inside.
    """

    model: nn.Module = field(repr=False)
    given: dict[str, Any] = field(repr=False)
    plan: TierPlan | None = None
    past_length: int = 0
    is_training: bool = False
    is_recomputed: bool = False
    routed: set[int] = field(default_factory=set, repr=False)
    outer: "RunningForward | None" = field(default=None, repr=False)
    cache: dict[tuple, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and positions of each.

        Raises:
            [`OrdMoERuntimeError`]: the inputs are no rows of positions.
        """
        for name, dimensions in (("inputs_embeds", 3), ("input_ids", 2), ("decoder_input_ids", 2)):
            inputs = self.given.get(name)
            if isinstance(inputs, torch.Tensor) and inputs.dim() == dimensions:
                return inputs.shape[0], inputs.shape[1]
        raise OrdMoERuntimeError(
            f"{type(self.model).__name__} was called with {sorted(self.given)}, and neither with input_ids of shape "
            "(batch, sequence) nor with inputs_embeds of shape (batch, sequence, hidden): which token is in which row "
            "is unknown."
        )

    @property
    def attention_mask(self) -> Any:
        return self.given.get("attention_mask")

    def tokens_of(self, router_name: str, values: torch.Tensor, remedy: str) -> slice | torch.Tensor:
        """Which of all rows' positions, one row after the other, a router's tokens are: all of them, or in models with
        other experts for images than for text those of its kind (`torch.Tensor` of shape `(T,)`).

        Args:
            router_name (`str`): the router.
            values (`torch.Tensor` of shape `(T, ·)`): what it makes of its tokens.
            remedy (`str`): what to do where it is unknown.

        Raises:
            [`OrdMoERuntimeError`]: it is unknown.
        """
        rows, length = self.shape
        if len(values) == rows * length:
            return slice(None)
        kinds, is_of_images = self.given.get(KINDS), OF_IMAGES.search(router_name) is not None
        if isinstance(kinds, torch.Tensor) and kinds.shape == (rows, length):
            is_kind_T = kinds.reshape(-1).bool() == is_of_images
            tokens_T = self.once_here(
                ("tokens", values.device, is_of_images), lambda: is_kind_T.nonzero()[:, 0].to(values.device)
            )
            if len(tokens_T) == len(values):
                return tokens_T
        raise OrdMoERuntimeError(
            f"{router_name} got {len(values)} tokens in a forward of {rows} rows of {length} positions, so it is "
            f"unknown which token is in which row. {remedy}"
        )

    def tier_of_token(self, device: torch.device) -> torch.Tensor:
        """The tier of each token (`torch.Tensor` of shape `(T,)`), brought to a device once, not by each layer."""
        assert self.plan is not None, "asked for the tiers of a forward that is held to none"
        plan = self.plan
        return self.once(("tiers", device), lambda: plan.tier_of_token(*self.shape, self.past_length).to(device))

    def once(self, key: tuple, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives of the plan, made by the first layer that asks. Where each row has one tier, it does not
        depend on the length of the cache, and serves all forwards of the plan; else it serves this one."""
        assert self.plan is not None
        if self.plan.tiers.dim() > 1:
            return self.once_here(key, make)
        return _once(self.plan.cache, (*key, *self.shape), make)

    def once_here(self, key: tuple, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives of this forward, made by the first layer that asks."""
        return _once(self.cache, key, make)


def _once(cache: dict[tuple, torch.Tensor], key: tuple, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    if key not in cache:
        cache[key] = make()
    return cache[key]


class _Running(threading.local):
    forward: RunningForward | None = None


class _Uncompiled:
    """A context within which compiled modules run uncompiled, in any number of threads at a time.

    torch's compile stance is the whole process's, and whoever sets it sets it back to what it was then: of two threads
    that overlap, the second would set back what the first had set.
    """

    def __init__(self) -> None:
        self._lock, self._num_open, self._stance = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_open:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._num_open += 1

    def __exit__(self, *exception: Any) -> None:
        with self._lock:
            self._num_open -= 1
            if not self._num_open:
                self._stance.close()


_running, _uncompiled = _Running(), _Uncompiled()
# Plans that the `with` blocks of this thread ask for: id of the text model → plan.
_requested: ContextVar[dict[int, TierPlan]] = ContextVar("requested_tiers", default={})  # noqa: B039 (never mutated)
# How many `with` blocks of any thread ask for tiers: id of the handles of a text model's hooks, which replicas share.
_open_blocks: Counter[int] = Counter()
_open_blocks_lock = threading.Lock()


def running_forward() -> RunningForward | None:
    """The forward of a text model that runs in this thread."""
    return _running.forward


def requested_plans() -> Iterable[TierPlan]:
    """What the `with` blocks of this thread hold text models to."""
    return _requested.get().values()


@contextmanager
def tiers_requested(plans: dict[nn.Module, TierPlan]) -> Iterator[None]:
    """Within the block, hold the forwards of text models in this thread to plans.

    Compiled modules run uncompiled there: what they were compiled from does not know of tiers that change from call to
    call, and a compiled router does not know of the selection that answers it.

    Args:
        plans (`dict`): text model, which has its hooks on → plan.
    """
    keys = [id(model.forward_hook_handles) for model in plans]
    running = _running.forward
    token = _requested.set({**_requested.get(), **{id(model): plan for model, plan in plans.items()}})
    with _open_blocks_lock:
        _open_blocks.update(keys)
    is_plain = all(plan.is_top for plan in plans.values())
    try:
        with nullcontext() if is_plain else _uncompiled:
            yield
    finally:
        with _open_blocks_lock:
            _open_blocks.subtract(keys)
        _requested.reset(token)
        _running.forward = running  # a forward that was interrupted within the block left its own


def install_forward_hooks(text_model: nn.Module) -> None:
    """Put the pair of hooks on a text model, where it is not yet."""
    if not hasattr(text_model, "forward_hook_handles"):
        text_model.forward_hook_handles = [
            text_model.register_forward_pre_hook(_enter, with_kwargs=True),
            text_model.register_forward_hook(_leave, always_call=True),
        ]


def remove_forward_hooks(model: nn.Module) -> None:
    """Undo [`install_forward_hooks`] in all modules of a model."""
    for module in model.modules():
        for handle in module.__dict__.pop("forward_hook_handles", ()):
            handle.remove()


@torch.compiler.disable(reason="OrdMoE keeps what a forward says of its tokens on the host")
def _enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    outer = _running.forward
    while outer is not None and outer.model is module:  # left by a forward that was interrupted: no hook closed it
        outer = outer.outer
    _running.forward = outer
    plan = _plan_for(module)
    given = dict(zip(_parameter_names(_function(module.forward)), args, strict=False)) | kwargs
    past_length = _past_length(module, given) if plan is not None and plan.needs_positions else 0
    is_training = module.training and torch.is_grad_enabled()
    _running.forward = RunningForward(module, given, plan, past_length, is_training, outer=outer)
    if plan is not None and is_training:
        wrap_checkpointing(module, _carry_forward)


@torch.compiler.disable(reason="OrdMoE keeps what a forward says of its tokens on the host")
def _leave(module: nn.Module, args: tuple, output: Any) -> None:
    forward = _running.forward
    if forward is None or forward.model is not module:  # its opening hook raised an error
        return
    _running.forward = forward.outer
    if forward.plan is not None and output is not None:
        forward.plan.check_all_ran(forward.routed)


def _plan_for(module: nn.Module) -> TierPlan | None:
    """What this thread asked for; `None` where all is on tier 1.

    Raises:
        [`OrdMoERuntimeError`]: a replica does not know what was asked for.
    """
    plan = _requested.get().get(id(module))
    if plan is not None:
        return None if plan.is_top else plan
    if not _open_blocks[id(module.forward_hook_handles)]:
        return None
    if getattr(module, "_is_replica", False):
        raise OrdMoERuntimeError(
            f"A replica of {type(module).__name__}, as nn.DataParallel makes them, runs within tier_routing, whose "
            "tiers it does not know. Use one process for each device (`accelerate launch`), or one device."
        )
    logger.warning_once(
        f"A forward of {type(module).__name__} runs on tier 1 in thread {threading.current_thread().name!r}, while "
        "another thread is within tier_routing: tiers are those of the thread that asks. To pass them on, as for a "
        "streamer, start the thread with target=contextvars.copy_context().run, args=(model.generate, ...)."
    )
    return None


def _function(forward: Callable) -> Callable:
    """What a bound method is made of: one for all modules of a class."""
    return getattr(forward, "__func__", forward)


@lru_cache(maxsize=128)
def _parameter_names(function: Callable) -> tuple[str, ...]:
    """Names of what a forward can be given by position."""
    names = tuple(inspect.signature(function).parameters)
    return names[1:] if names[:1] == ("self",) else names


def _past_length(module: nn.Module, given: dict[str, Any]) -> int:
    """Positions in the cache before this forward.

    Raises:
        [`OrdMoERuntimeError`]: there is a cache that does not say.
    """
    found = {id(value): (name, value) for name, value in given.items() if _is_cache(name, value)}
    if not found:
        return 0
    (_, cache), *more = found.values()
    if more or not hasattr(cache, "get_seq_length"):
        raise OrdMoERuntimeError(
            f"{type(module).__name__} was given {', '.join(name for name, _ in found.values())} "
            f"({type(cache).__name__}), from which the number of cached positions cannot be read. A tier for each "
            "position, and random groups, depend on it: use a cache of transformers, or use_cache=False."
        )
    return int(cache.get_seq_length())


def _is_cache(name: str, value: Any) -> bool:
    return isinstance(value, Cache) or (name in CACHE_NAMES and value is not None)


def _carry_forward(checkpoint: Callable) -> Callable:
    """A checkpoint function whose recomputation sees the forward of its first run."""

    def checkpoint_with_forward(function: Callable, *args: Any, **kwargs: Any) -> Any:
        forward, runs = _running.forward, 0

        def run(*run_args: Any, **run_kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            before = _running.forward
            _running.forward = forward if forward is None or runs == 1 else replace(forward, is_recomputed=True)
            is_plain = forward is None or forward.plan is None
            try:
                # The block of the tiers may have closed by now.
                with nullcontext() if is_plain else _uncompiled:
                    return function(*run_args, **run_kwargs)
            finally:
                _running.forward = before

        return checkpoint(run, *args, **kwargs)

    return checkpoint_with_forward
