"""What a training step holds beside weights, gradients and optimizer: what backward needs, and what layers work with.

A step is traced on fake tensors ([`MemoryTrace`]) with as many decoder layers as it takes to see each kind of them;
the others are added by kind.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig
from trl.trainer.utils import add_fused_lm_head

from ...data.images import encode_images
from ...errors import OrdMoEConfigError
from ...experts.forward import LoraHandover, frozen_step, grouped_forward, take_updates
from ...experts.frozen import run_frozen_experts
from ...experts.layout import ExpertChunk
from ...moe_model import find_moe_layers
from ...quantization.storage import is_packed, stored_tensors
from ...training.row_layout.separate import stack_rows
from .lm_head import log_probs_as_on_cuda
from .trace import MemoryTrace, fake_of
from .weights import replace_tensor


@dataclass(frozen=True)
class StepShape:
    """The rows of one forward and how it is run.

    Args:
        samples (`int`): samples of a batch.
        sequence_length (`int`): tokens in each row, all of them used, image tokens included.
        tiers (`int`, defaults to 1): tiers that run in the forward, with a row for each sample.
        images_per_row (`int`, defaults to 0), image_tokens (`int`, defaults to 0): images in a row, and the tokens that
            the language model sees of each.
        encodes_first (`bool`, defaults to `False`): encode each image once, ahead, as the trainer does where there are
            tiers.
        gradient_checkpointing (`bool`, defaults to `True`): run layers again in backward.
        autocast (`torch.dtype`, *optional*): dtype of mixed precision (`bf16=True` of the training arguments).
        device (`str`, defaults to `"cuda"`): whose LM head and dense experts are traced: on CPU, TRL's head makes
            several more copies, and experts run one after another.
    """

    samples: int
    sequence_length: int
    tiers: int = 1
    images_per_row: int = 0
    image_tokens: int = 0
    encodes_first: bool = False
    gradient_checkpointing: bool = True
    autocast: torch.dtype | None = torch.bfloat16
    device: str = "cuda"


@dataclass(frozen=True)
class Activations:
    """What a step holds, in bytes.

    Args:
        kept (`int`): at the end of the forward, for backward.
        working (`int`): the most that is held beside it.
    """

    kept: int
    working: int

    @property
    def peak(self) -> int:
        return self.kept + self.working


def estimate_activations(model: nn.Module, shape: StepShape) -> Activations:
    """Trace a training step of `model`, which is used up: its layers are cut and its weights made fake.

    Args:
        model (`nn.Module`): a [`~peft.PeftModel`] on the meta device.
        shape ([`StepShape`]): the rows of the step.

    Raises:
        [`OrdMoEConfigError`]: the images do not fit the sequence, or the model's vision tower is of an unknown kind.
    """
    base = model.get_base_model()
    inputs = step_inputs(base.config, shape)
    _stand_in_for_experts(model, shape.device)
    if shape.device != "cuda":
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))  # what TRL's SFTTrainer asks for
    missing = _cut_layers(model, _unlike_the_rest(base.config, shape))
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    at_hand = _make_fake(model, fakes)
    model.train()
    if shape.gradient_checkpointing:  # as the trainers do
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    trace = MemoryTrace(fakes, at_hand)
    with fakes, trace, _watched_layers(model, trace) as watch:
        inputs |= {name: make() for name, make in inputs.items() if callable(make)}
        with nullcontext() if shape.autocast is None else torch.autocast("cpu", shape.autocast):
            if shape.encodes_first:
                inputs = encode_images(model, inputs)
            loss = _loss(model, stack_rows([inputs] * shape.tiers, pad_token_id=0), shape.device)
        kept = trace.live
        loss.backward()
    steps = [after - before for before, after in itertools.pairwise(watch.live)]
    kept, peak = (size + sum(steps[place] for place in missing) for size in (kept, trace.peak))
    return Activations(kept, max(peak, watch.peak_before) - kept)


def _loss(model: nn.Module, inputs: dict[str, Any], device: str) -> torch.Tensor:
    if device != "cuda":
        return model(**inputs, fused_lm_head=True).loss
    labels = inputs.pop("labels")
    base = model.get_base_model()
    hidden_BSH = base.base_model(**inputs, use_cache=False).last_hidden_state
    hidden_NH = hidden_BSH[:, :-1].reshape(-1, hidden_BSH.shape[-1])
    return log_probs_as_on_cuda(hidden_NH, base.get_output_embeddings().weight).view_as(labels[:, 1:]).sum()


# ------------------------------------------------------------------------------------------------------------- inputs
def step_inputs(config: PretrainedConfig, shape: StepShape) -> dict[str, Any]:
    """A batch of full rows, one for each sample; what has no numbers is a function that makes it."""
    ids = torch.ones(shape.samples, shape.sequence_length, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    return inputs | _images(config, shape, ids) if shape.images_per_row else inputs


def _images(config: PretrainedConfig, shape: StepShape, ids: torch.Tensor) -> dict[str, Any]:
    vision = getattr(config, "vision_config", None)
    if not all(hasattr(vision, name) for name in ("patch_size", "temporal_patch_size", "spatial_merge_size")):
        raise OrdMoEConfigError(
            f"images_per_sample={shape.images_per_row} needs a vision tower of Qwen-VL's kind, which "
            f"{config.model_type!r} does not have. Leave it at 0 to plan for text."
        )
    taken = shape.images_per_row * (shape.image_tokens + 2)
    if shape.image_tokens < 1 or taken > shape.sequence_length:
        raise OrdMoEConfigError(
            f"{shape.images_per_row} images of image_tokens={shape.image_tokens}, with a token before and after each, "
            f"take {taken} tokens of a sequence of {shape.sequence_length}. Give at least one token an image, and a "
            "sequence that they fit in."
        )
    for image in range(shape.images_per_row):
        start = image * (shape.image_tokens + 2)
        ids[:, start], ids[:, start + shape.image_tokens + 1] = config.vision_start_token_id, config.vision_end_token_id
        ids[:, start + 1 : start + shape.image_tokens + 1] = config.image_token_id
    images, merge = shape.samples * shape.images_per_row, vision.spatial_merge_size
    height = next(side for side in range(int(shape.image_tokens**0.5), 0, -1) if shape.image_tokens % side == 0)
    patch_width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "image_grid_thw": torch.tensor([[1, height * merge, shape.image_tokens // height * merge]] * images),
        "pixel_values": lambda: torch.empty(images * shape.image_tokens * merge**2, patch_width),
    }


# -------------------------------------------------------------------------------------------------------------- model
def _unlike_the_rest(config: PretrainedConfig, shape: StepShape) -> int:
    """How many of the first layers hold something else than others of their kind.

    Backward ends at the first adapter, so without checkpointing the layer that has it keeps less; and Qwen3-VL adds
    features of the vision tower to what its first layers give; when the layer behind them begins, what the last of them
    gave without features is still held, too.
    """
    deepstack = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", ())
    return max(0 if shape.gradient_checkpointing else 1, len(deepstack) + 1 if shape.images_per_row else 0)


def _cut_layers(model: nn.Module, unlike: int) -> list[int]:
    """Drop the decoder layers that only repeat earlier ones. Returns, for each, the place of a kept one of its kind.

    The one after the first `unlike` of a kind speaks for it. Behind it a layer stays, so that the memory between two
    layers' beginnings is seen.
    """
    owner_name, _, list_name = find_moe_layers(model)[0].decoder_layers_name.rpartition(".")
    owner = model.get_submodule(owner_name)
    kinds = [_kind(layer) for layer in getattr(owner, list_name)]
    places = {kind: [place for place, other in enumerate(kinds) if other == kind] for kind in kinds}
    spokesman = {kind: at[min(unlike, len(at) - 1)] for kind, at in places.items()}
    kept = max(spokesman.values()) + 2
    setattr(owner, list_name, getattr(owner, list_name)[:kept])
    return [spokesman[kind] for kind in kinds[kept:]]


def _kind(layer: nn.Module) -> tuple:
    """What tells layers apart: parameters and settings of their modules, but not their places."""
    settings = tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None))) and not key.endswith(("idx", "index"))
    )
    return tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters()), settings


def _stand_in_for_experts(model: nn.Module, device: str) -> None:
    """Have experts run with the memory that they take on `device`, in few operations.

    Dense ones run grouped on CUDA, and expert by expert on the CPU, where fake tensors are.
    """
    for layer in find_moe_layers(model):
        is_grouped = device == "cuda" and not is_packed(layer.experts.down_proj)
        layer.experts.forward = functools.partial(_forward_grouped if is_grouped else _forward_at_once, layer.experts)


class _OneBlock(ExpertChunk):
    """A chunk of which all slots are multiplied with the first expert's matrix, at once.

    Products are written in place and one matrix is unpacked at a time, so this takes what going through the experts
    one after another takes.
    """

    def blocks(self, *tensors_MI: torch.Tensor) -> Iterable[tuple]:
        return [(self.experts[0], *tensors_MI)]


def _forward_grouped(
    experts: nn.Module,
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    expert_lora: LoraHandover | None = None,
) -> torch.Tensor:
    return grouped_forward(experts, x_TH, index_TK, weights_TK, take_updates(expert_lora))


def _forward_at_once(
    experts: nn.Module,
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    expert_lora: LoraHandover | None = None,
) -> torch.Tensor:
    frozen, layout = frozen_step(experts, index_TK, take_updates(expert_lora))
    at_once = replace(layout, chunks=[_OneBlock(**vars(chunk)) for chunk in layout.chunks])
    return run_frozen_experts(x_TH, weights_TK, frozen, at_once)


def _make_fake(model: nn.Module, fakes: FakeTensorMode) -> list[torch.Tensor]:
    """Make all meta tensors of `model` fake, but packed weights, which have a class of their own; gradients exist.

    Returns the tensors that weights and gradients are stored in.
    """
    tensors = [part for parameter in model.parameters() for part in stored_tensors(parameter)]
    for name, parameter in list(model.named_parameters()):
        if isinstance(parameter, Params4bit):
            continue
        fake = nn.Parameter(fake_of(parameter, fakes), requires_grad=parameter.requires_grad)
        if parameter.requires_grad:
            fake.grad = fake_of(torch.empty_like(parameter), fakes)
            tensors.append(fake.grad)
        replace_tensor(model, name, fake)
    for name, buffer in list(model.named_buffers()):
        replace_tensor(model, name, fake_of(buffer, fakes))
        tensors.append(buffer)
    return tensors


@dataclass
class _Watch:
    """What is held when each decoder layer begins in the first forward, and the most that was held before them.

    Apart, since what runs before the decoder, such as a vision tower, runs while its layers keep nothing yet.
    """

    live: list[int] = field(default_factory=list)
    peak_before: int = 0


@contextmanager
def _watched_layers(model: nn.Module, trace: MemoryTrace) -> Iterator[_Watch]:
    """Within the block, fills a [`_Watch`]; the trace's peak starts anew at the first decoder layer."""
    layers, watch = find_moe_layers(model), _Watch()
    stack = model.get_submodule(layers[0].decoder_layers_name)

    def note(module: nn.Module, args: tuple) -> None:
        if not watch.live:
            watch.peak_before, trace.peak = trace.peak, trace.live
        if len(watch.live) < len(stack):
            watch.live.append(trace.live)

    handles = [layer.register_forward_pre_hook(note) for layer in stack]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
