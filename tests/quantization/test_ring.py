"""The ring alone, with stacks of a few numbers: which layers are copied when, and who waits for what."""

import copy
import gc
import pickle
import random
import threading
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ordmoe_peft.errors import OrdMoERuntimeError
from ordmoe_peft.quantization.ring import Place, Ring


CPU = torch.device("cpu")


class Numbers:
    """A stack of two tensors."""

    def __init__(self, seed: int, length: int = 5):
        generator = torch.Generator().manual_seed(seed)
        scales = torch.rand(3, generator=generator)
        self.tensors = [torch.randint(0, 256, (length, 1), dtype=torch.uint8, generator=generator), scales]
        self.on_device, self.writes = None, 0

    def version(self):
        return self.writes

    def in_ram(self):
        return self.tensors

    def with_copies(self, copies):
        return copies

    def is_right(self):
        return all(map(torch.equal, self.on_device, self.tensors))


def layers(count: int) -> list[list[Numbers]]:
    return [[Numbers(2 * index), Numbers(2 * index + 1)] for index in range(count)]


def poison_places(monkeypatch) -> list:
    """What was copied, a layer's stacks at a time, in order. A place is overwritten by other numbers before."""
    seen, fill = [], Place.fill

    def poisoned(place, stacks, device):
        if place.memory is not None:
            place.memory.random_(0, 256)
        seen.append(stacks)
        fill(place, stacks, device)

    monkeypatch.setattr(Place, "fill", poisoned)
    return seen


@pytest.fixture
def filled(monkeypatch) -> list[list[Numbers]]:
    return poison_places(monkeypatch)


def open_all(ring: Ring, order: list[list[Numbers]]) -> None:
    for layer in order:
        with ring.opened(layer, CPU):
            assert all(stack.is_right() for stack in layer)
        assert all(stack.on_device is None for stack in layer)


def numbers_of(seen, all_layers) -> list[int]:
    return [next(index for index, layer in enumerate(all_layers) if layer[0] is stacks[0]) for stacks in seen]


def test_training_with_checkpointing_takes_2l_minus_4_copies_a_step(filled):
    model, ring = layers(6), Ring()
    step = model + [layer for layer in reversed(model) for _ in range(2)]  # run again, and backward
    open_all(ring, step)
    for _ in range(3):
        filled.clear()
        open_all(ring, step)
        assert numbers_of(filled, model) == [2, 3, 4, 5, 3, 2, 1, 0]


def test_the_next_layer_is_on_its_way_while_one_is_open(filled):
    """From the second pass on, in generation as in training: no layer is copied when it is opened."""
    model, ring = layers(5), Ring()
    for passed, step in enumerate([model] * 4 + [model + model[::-1]] * 3):
        for layer in step:
            before = len(filled)
            with ring.opened(layer, CPU):
                ahead = filled[before:]
            if passed in (2, 3, 5, 6):
                assert all(stacks[0] is not layer[0] for stacks in ahead)
    filled.clear()
    open_all(Ring(), model * 2)
    assert len(filled) == 5 + 5 + 1, "one ahead of the pass after"


def test_a_ring_of_two_layers_copies_nothing_twice(filled):
    model, ring = layers(2), Ring()
    open_all(ring, (model + model[::-1]) * 4)
    assert len(filled) == 2


def test_any_order_is_served(filled):
    model, ring = layers(7), Ring()
    chance = random.Random(0)
    for _ in range(30):
        order = chance.sample(model, chance.randint(1, 7))  # others than before, some skipped
        open_all(ring, order + order[::-1] * chance.randint(0, 2))


def test_layers_of_other_sizes_and_other_numbers_of_stacks():
    ring = Ring()
    model = [[Numbers(1, 3)], [Numbers(2, 3000), Numbers(3)], [Numbers(4, 700)], [Numbers(5, 9000)]]
    open_all(ring, (model + model[::-1]) * 3)


def test_an_error_in_a_layer_leaves_the_ring_usable(filled):
    model, ring = layers(5), Ring()
    open_all(ring, model * 2)
    for at in range(5):
        open_all(ring, model[:at])
        with pytest.raises(ZeroDivisionError), ring.opened(model[at], CPU):
            raise ZeroDivisionError
        assert model[at][0].on_device is None
        open_all(ring, model)


def test_an_error_in_a_copy_leaves_the_ring_usable(monkeypatch):
    model, ring = layers(4), Ring()
    open_all(ring, model * 2)
    monkeypatch.setattr(model[2][1], "in_ram", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_all(ring, model)
    monkeypatch.undo()
    open_all(ring, model * 2)


def test_threads_wait_for_each_other(filled):
    model, ring, wrong = layers(5), Ring(), []

    def run(seed: int) -> None:
        try:
            chance = random.Random(seed)
            for _ in range(60):
                open_all(ring, chance.sample(model, 4))
        except AssertionError as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_stack_that_was_written_to_is_copied_again():
    model, ring = layers(2), Ring()
    open_all(ring, model)
    model[0][0].tensors[0].zero_()
    model[0][0].writes += 1
    open_all(ring, model)


def test_inference_first_and_training_after_it(filled):
    """torch refuses to write to tensors of inference outside of it."""
    model, ring = layers(4), Ring()
    with torch.inference_mode():
        open_all(ring, model * 2)
    open_all(ring, model * 2)


def test_a_device_without_streams_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(current_stream=None))
    with (
        pytest.raises(OrdMoERuntimeError, match="mps has no streams"),
        Ring().opened([Numbers(0)], torch.device("mps")),
    ):
        pass


def test_no_stack_is_kept_alive(filled):
    model, ring = layers(4), Ring()
    open_all(ring, (model + model[::-1]) * 2)
    gone = [weakref.ref(stack) for layer in model for stack in layer]
    filled.clear()
    del model
    gc.collect()
    assert not any(stack() for stack in gone)
    open_all(ring, layers(4) * 2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda rings: pickle.loads(pickle.dumps(rings))])
def test_copies_of_a_ring_are_empty_and_one_where_it_was_one(copied):
    model, ring = layers(3), Ring()
    open_all(ring, model)
    one, two = copied([ring, ring])
    assert one is two
    assert one is not ring
    open_all(one, layers(3))


class Clock:
    """Stands for `torch.cuda`: a stream that computes and one that copies, both late.

    A copy is done when the stream that reads it has waited for its event; a reading, when the stream that copies has
    waited for the other.
    """

    def __init__(self):
        self.computing, self.now = _Stream(self), None
        self.now = self.computing
        self.reads, self.reads_awaited, self.copies, self.copies_awaited = 0, 0, 0, 0

    def Stream(self, device):
        return _Stream(self)

    def current_stream(self, device):
        return self.now

    @contextmanager
    def stream(self, stream):
        self.now, before = stream, self.now
        yield
        self.now = before


class _Stream:
    def __init__(self, clock: Clock):
        self.clock = clock

    def wait_stream(self, other):
        assert (self is not self.clock.computing, other is self.clock.computing) == (True, True)
        self.clock.reads_awaited = self.clock.reads

    def record_event(self):
        return self.clock.copies

    def wait_event(self, event):
        assert self is self.clock.computing
        self.clock.copies_awaited = max(self.clock.copies_awaited, event)


def test_copies_wait_for_readers_and_readers_for_copies(monkeypatch):
    clock, fill, last_read, copied = Clock(), Place.fill, {}, {}
    monkeypatch.setattr(torch, "get_device_module", lambda device: clock)

    def watched(place, stacks, device):
        assert clock.now is not clock.computing, "the copy is in a stream of its own"
        assert last_read.get(place, 0) <= clock.reads_awaited, "the place is read yet"
        fill(place, stacks, CPU)
        clock.copies += 1
        copied[id(stacks[0])] = place, clock.copies

    monkeypatch.setattr(Place, "fill", watched)
    model, ring = layers(5), Ring()
    for layer in (model + model[::-1]) * 3 + model * 2:
        with ring.opened(layer, SimpleNamespace(type="late")):
            place, number = copied[id(layer[0])]
            assert number <= clock.copies_awaited, "the copy is not there yet"
            clock.reads += 1
            last_read[place] = clock.reads


@pytest.mark.gpu
def test_layers_are_whole_on_a_device_whose_kernels_are_late(filled):
    """Copies of 64 MB beside products that take longer than a copy or not at all, from pinned memory."""
    device = torch.device("cuda", torch.cuda.current_device())
    model, ring = layers(5), Ring()
    for index, layer in enumerate(model):
        for stack in layer:
            stack.tensors = [torch.full((2**26,), index, dtype=torch.uint8).pin_memory(), stack.tensors[1].pin_memory()]
    matrix = torch.randn(4096, 4096, device=device)
    wrong = torch.zeros((), device=device, dtype=torch.long)
    for step in range(6):
        for layer in model + model[::-1]:
            with ring.opened(layer, device):
                if step % 2:
                    for _ in range(20):
                        matrix = (matrix @ matrix).clamp(-1, 1)
                for stack in layer:
                    wrong += (stack.on_device[0] != stack.tensors[0][0].item()).sum()
    assert wrong.item() == 0
    assert ring._stream != torch.cuda.current_stream(device)
