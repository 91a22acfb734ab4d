"""What is made of an adapter's factors, kept between forwards without gradients: making it costs more than a decoding
step's use of it.

Whether the factors are what they were is looked up once in a forward of the text model, by the first layer that asks,
and not by each: between products that fill the caches, it would cost three times as much. Layers that run outside such
a forward keep nothing.
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


# Numbers of a tensor that are looked at.
SAMPLE = 16


class Source:
    """A parameter as it was when something was made of it."""

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name, self.parameter = module, name, getattr(module, name)
        self.version, self.address = self.parameter._version, self.parameter.data_ptr()
        # Writing through `.data` does not count as a version; a few numbers all over the tensor give that away. A view
        # that torch knows of, as one in numpy would keep FSDP from freeing the storage.
        step = max(1, len(self.parameter) // SAMPLE)
        self.sample_now = self.parameter.detach()[::step, 0]
        self.sample = self.sample_now.clone()

    def is_in_place(self) -> bool:
        """Whether the module has the same parameter at the same place, without a write that torch has counted."""
        return (
            getattr(self.module, self.name) is self.parameter
            and self.parameter._version == self.version
            and self.parameter.data_ptr() == self.address
        )


@dataclass(frozen=True)
class Kept:
    """Something, what it was made of, and what else it depends on."""

    value: Any
    sources: list[Source]
    settings: Hashable

    def is_in_place(self) -> bool:
        return all(source.is_in_place() for source in self.sources)

    def reads_the_same(self) -> bool:
        return all(torch.equal(source.sample_now, source.sample) for source in self.sources)


class Keepsakes:
    """What a model's layers keep. Copies are empty."""

    def __init__(self):
        self.kept: dict[Hashable, Kept] = {}
        self._lock = threading.Lock()
        self._samples: list[tuple[list[torch.Tensor], torch.Tensor]] | None = None

    def __reduce__(self) -> tuple:
        return Keepsakes, ()

    def __setitem__(self, key: Hashable, kept: Kept) -> None:
        with self._lock:
            self.kept[key], self._samples = kept, None

    def clear(self) -> None:
        with self._lock:
            self.kept, self._samples = {}, None

    def drop_outdated(self) -> None:
        """Drop what was made of parameters that are no longer what they were."""
        with self._lock:
            kept = {key: kept for key, kept in self.kept.items() if kept.is_in_place()}
            if len(kept) == len(self.kept) and self._samples is not None and self._are_samples_equal():
                return
            self.kept = {key: kept for key, kept in kept.items() if kept.reads_the_same()}
            self._samples = self._samples_by_dtype()

    def _samples_by_dtype(self) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        """Views of all samples, and what they read now: one comparison for all."""
        views: dict[torch.dtype, list[torch.Tensor]] = {}
        for kept in self.kept.values():
            for source in kept.sources:
                views.setdefault(source.sample_now.dtype, []).append(source.sample_now)
        return [(of_dtype, torch.cat(of_dtype)) for of_dtype in views.values()]

    def _are_samples_equal(self) -> bool:
        return all(torch.equal(torch.cat(views), sample) for views, sample in self._samples)


class _Running(threading.local):
    """What the layers of the forward that runs in this thread may keep, and whether that was looked up already."""

    keepsakes: Keepsakes | None = None
    is_checked: bool = False


_running = _Running()


def keep(key: Hashable, settings: Hashable, make: Callable[[], tuple[Any, list[tuple[nn.Module, str]]]]) -> Any:
    """What `make` gave in this forward or one before, or `None` where nothing may be kept.

    Args:
        key (`Hashable`): whose it is; each keeps one thing.
        settings (`Hashable`): what it depends on beside parameters.
        make (`Callable`): returns what to keep, and the modules and names of the parameters that it is made of.
    """
    keepsakes = _running.keepsakes
    if keepsakes is None or torch.compiler.is_compiling():
        return None
    if not _running.is_checked:
        keepsakes.drop_outdated()
        _running.is_checked = True
    kept = keepsakes.kept.get(key)
    if kept is None or kept.settings != settings:
        value, parameters = make()
        if not all(_may_be_looked_at(getattr(*parameter)) for parameter in parameters):
            return None
        kept = keepsakes[key] = Kept(value, [Source(*parameter) for parameter in parameters], settings)
    return kept.value


def _may_be_looked_at(parameter: torch.Tensor) -> bool:
    """Not on accelerators, which a comparison would hold up, and no tensor without a version or of a class of its own,
    as sharded ones are."""
    is_plain = type(parameter) in (nn.Parameter, torch.Tensor)
    return is_plain and parameter.device.type == "cpu" and not parameter.is_inference()


def install_keepsakes(decoder: nn.Module) -> None:
    """Let the layers of a text model keep things between its forwards, from now on."""
    if hasattr(decoder, "keepsakes"):
        return
    decoder.keepsakes = Keepsakes()
    decoder.keepsakes_hook_handles = [
        decoder.register_forward_pre_hook(_enter),
        decoder.register_forward_hook(_leave, always_call=True),
    ]


def remove_keepsakes(model: nn.Module) -> None:
    """Undo [`install_keepsakes`] in all modules of a model."""
    for module in model.modules():
        for handle in module.__dict__.pop("keepsakes_hook_handles", ()):
            handle.remove()
        module.__dict__.pop("keepsakes", None)


def _enter(decoder: nn.Module, args: tuple) -> None:
    _running.keepsakes = None
    # Not while a forward is traced, which would look at the parameters once and not again.
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        decoder.keepsakes.clear()
    else:
        _running.keepsakes, _running.is_checked = decoder.keepsakes, False


def _leave(decoder: nn.Module, args: tuple, output: Any) -> None:
    _running.keepsakes = None
