"""What a training step holds beside weights, gradients and optimizer: what backward needs, and what layers work with.

A step is traced on fake tensors ([`MemoryTrace`]) with as many decoder layers as it takes to see each kind of them;
the others are added by kind.
"""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from torch import nn
from transformers import PretrainedConfig
from trl.trainer.utils import add_fused_lm_head

from ..._compat import FakeTensorMode
from ...data.images import encode_images
from ...errors import OrdMoEConfigError
from ...experts.forward import LoraHandover, frozen_step, grouped_forward, take_updates
from ...experts.frozen import run_frozen_experts
from ...experts.layout import ExpertChunk
from ...experts.tuning import WorkSizes
from ...moe_model import MoEModel
from ...quantization.storage import is_packed, stored_tensors
from ...training.row_layout.separate import stack_rows
from .lm_head import log_probs_as_on_cuda
from .settings import PlanSettings
from .trace import MemoryTrace, fake_of
from .weights import replace_tensor


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


def estimate_activations(model: nn.Module, settings: PlanSettings, sizes: WorkSizes) -> Activations:
    """Trace a training step of `model`, which is used up: its layers are cut and its weights made fake.

    Args:
        model (`nn.Module`): a [`~peft.PeftModel`] on the meta device.
        settings ([`PlanSettings`]): the rows of the largest forward, and how it is run.
        sizes ([`~ordmoe_peft.experts.tuning.WorkSizes`]): how much of a layer's experts one operation takes.

    Raises:
        [`OrdMoEConfigError`]: the images do not fit the sequence, or the model's vision tower is of an unknown kind.
    """
    base = model.get_base_model()
    inputs, tiers = step_inputs(base.config, settings), settings.tiers_at_once
    for layer in MoEModel.of(model).layers:
        layer.experts.forward = partial(_run_experts, layer.experts, settings, sizes)
    if settings.device != "cuda":
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))  # what TRL's SFTTrainer asks for
    representatives = _cut_layers(model, _num_atypical_layers(base.config, settings))
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    at_hand = _make_fake(model, fakes)
    model.train()
    if settings.gradient_checkpointing:  # as the trainers do
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trace = MemoryTrace(fakes, at_hand)
    watch = _LayerWatch(model, trace)
    with fakes, trace:
        inputs |= {name: make() for name, make in inputs.items() if callable(make)}
        with nullcontext() if settings.autocast_used is None else torch.autocast("cpu", settings.autocast_used):
            if settings.num_tiers > 1:  # the trainer encodes each image once for all tiers
                inputs = encode_images(model, inputs)
            loss = _loss(model, stack_rows([inputs] * tiers, pad_token_id=0), settings.device)
        kept = trace.live
        loss.backward()
    steps = [after - before for before, after in itertools.pairwise(watch.live)]
    kept, peak = (size + sum(steps[layer] for layer in representatives) for size in (kept, trace.peak))
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
def step_inputs(config: PretrainedConfig, settings: PlanSettings) -> dict[str, Any]:
    """A batch of full rows, one for each sample; what has no numbers is a function that makes it."""
    ids = torch.ones(settings.batch_size, settings.sequence_length, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    return inputs | _images(config, settings, ids) if settings.images_per_sample else inputs


def _images(config: PretrainedConfig, settings: PlanSettings, ids: torch.Tensor) -> dict[str, Any]:
    """Inputs of Qwen-VL's kind. Writes each image into `ids`, as a start token, its image tokens and an end token."""
    vision: Any = getattr(config, "vision_config", None)
    if not all(hasattr(vision, name) for name in ("patch_size", "temporal_patch_size", "spatial_merge_size")):
        raise OrdMoEConfigError(
            f"images_per_sample={settings.images_per_sample} needs a vision tower of Qwen-VL's kind, which "
            f"{config.model_type!r} does not have. Leave it at 0 to plan for text."
        )
    tokens, width = settings.image_tokens, settings.image_tokens + 2
    if tokens < 1 or settings.images_per_sample * width > settings.sequence_length:
        raise OrdMoEConfigError(
            f"{settings.images_per_sample} images of image_tokens={tokens}, with a token before and after each, take "
            f"{settings.images_per_sample * width} tokens of a sequence of {settings.sequence_length}. Give at least "
            "one token an image, and a sequence that they fit in."
        )
    for start in range(0, settings.images_per_sample * width, width):
        ids[:, start], ids[:, start + width - 1] = config.vision_start_token_id, config.vision_end_token_id
        ids[:, start + 1 : start + width - 1] = config.image_token_id
    images, merge = settings.batch_size * settings.images_per_sample, vision.spatial_merge_size
    height = next(side for side in range(int(tokens**0.5), 0, -1) if tokens % side == 0)
    patch_width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "image_grid_thw": torch.tensor([[1, height * merge, tokens // height * merge]] * images),
        "pixel_values": lambda: torch.empty(images * tokens * merge**2, patch_width),
    }


# -------------------------------------------------------------------------------------------------------------- model
def _num_atypical_layers(config: PretrainedConfig, settings: PlanSettings) -> int:
    """Number of leading layers whose memory is atypical.

    Backward ends at the first adapter, so without checkpointing the layer that has it keeps less. Qwen3-VL adds
    features of the vision tower to what its first layers give; when the layer behind them begins, what the last of them
    gave without features is still held, too.
    """
    deepstack = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", ())
    return max(0 if settings.gradient_checkpointing else 1, len(deepstack) + 1 if settings.images_per_sample else 0)


def _cut_layers(model: nn.Module, num_atypical: int) -> list[int]:
    """Drop the decoder layers that only repeat earlier ones. Returns a representative's index for each.

    It is the first of their kind behind the first `num_atypical` of that kind. A layer stays behind the last
    representative, so that the memory between two layers' beginnings is seen:

        kinds            A  B  A  A  A  B  A  …      num_atypical 1
        representatives           A        B
        kept             A  B  A  A  A  B  A
    """
    owner_name, _, list_name = MoEModel.of(model).layers[0].decoder_layers_name.rpartition(".")
    owner = model.get_submodule(owner_name)
    kinds = [_kind(layer) for layer in getattr(owner, list_name)]
    indices = {kind: [index for index, other in enumerate(kinds) if other == kind] for kind in kinds}
    representative = {kind: of_kind[min(num_atypical, len(of_kind) - 1)] for kind, of_kind in indices.items()}
    num_kept = max(representative.values()) + 2
    setattr(owner, list_name, getattr(owner, list_name)[:num_kept])
    return [representative[kind] for kind in kinds[num_kept:]]


def _kind(layer: nn.Module) -> tuple:
    """What tells layers apart: parameters and settings of their modules, but not their indices."""
    settings = tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None))) and not key.endswith(("idx", "index"))
    )
    return tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters()), settings


class _OneBlock(ExpertChunk):
    """A chunk of which all slots are multiplied with the first expert's matrix, at once.

    Products are written in place and one matrix is unpacked at a time, so this takes what going through the experts
    one after another takes, in a third of the operations.
    """

    def by_block(self, *tensors_MI: torch.Tensor) -> Iterator[tuple]:
        yield slice(0, 1), *(x_MI.unsqueeze(0) for x_MI in tensors_MI)


def _run_experts(
    experts: nn.Module,
    settings: PlanSettings,
    sizes: WorkSizes,
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    expert_lora: LoraHandover | None = None,
) -> torch.Tensor:
    """The experts' forward by the way that it takes on the device of `settings`, where fake tensors are not.

    One expert at a time is as in [`_OneBlock`].
    """
    lora = take_updates(expert_lora)
    if settings.has_grouped_kernel and not is_packed(experts.down_proj):
        return grouped_forward(experts, x_TH, index_TK, weights_TK, lora)
    frozen, layout = frozen_step(experts, index_TK, lora, sizes)
    if sizes.matrices is not None:
        return run_frozen_experts(x_TH, weights_TK, frozen, layout)
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


class _LayerWatch:
    """What is held when each decoder layer begins in the first forward, and the most that was held before them.

    These are apart, since what runs before the decoder, such as a vision tower, runs while its layers keep nothing yet:
    the trace's peak starts anew at the first decoder layer.
    """

    def __init__(self, model: nn.Module, trace: MemoryTrace):
        self.trace, self.peak_before = trace, 0
        self.live: list[int] = []
        self.layers = model.get_submodule(MoEModel.of(model).layers[0].decoder_layers_name)
        for layer in self.layers:
            layer.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, args: tuple) -> None:
        if not self.live:
            self.peak_before, self.trace.peak = self.trace.peak, self.trace.live
        if len(self.live) < len(self.layers):  # layers run again in backward
            self.live.append(self.trace.live)
