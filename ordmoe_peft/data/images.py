"""Run the vision encoder once for a batch's images, however many rows show them.

transformers' models take what their encoder made of images in place of pixel values, as `mm_encoder_outputs`, and
`generate` prepares it in the same way (`generation/utils.py`).
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput, logging

from ..moe_model import MoEModel


logger = logging.get_logger(__name__)

ENCODED = "mm_encoder_outputs"
MODALITIES = ("image", "video")
# What transformers' encoders are given pixels as.
PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches")
# What models are given sounds as; none of these with experts takes them encoded (transformers 5.24).
SOUNDS = ("input_features", "input_values")
# What models read of encoded images: lists of tensors, one per image, or tensors whose first dimension is images.
POOLED, DEEPSTACK = "pooler_output", "deepstack_features"


def encode_images(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Model inputs with their images encoded, without gradient: `mm_encoder_outputs` in place of pixel values.

    Inputs without pixel values come back as they are. So do those of models that take no encoded images, whose
    encoder is trained, or whose weights are split over processes, and sounds; a warning says so once.
    """
    if any(name in inputs for name in SOUNDS):
        logger.warning_once(
            "The audio encoder runs once for each tier, not once for each sound: no model takes these encoded."
        )
    if not any(name in inputs for name in PIXELS):
        return inputs
    model = _base_of(model)
    reason = _reason_for_pixels(model)
    if reason is None:
        encoded, read = _encoded(model.base_model, inputs)
        if encoded and all(getattr(output, POOLED, None) is not None for output in encoded.values()):
            read -= {*_position_inputs(model)}
            return {name: value for name, value in inputs.items() if name not in read} | {ENCODED: encoded}
        reason = f"{type(model).__name__} does not say what it makes of them"
    logger.warning_once(f"The vision encoder runs once for each tier, not once for each image: {reason}.")
    return inputs


def _encoded(model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, ModelOutput], set[str]]:
    """What the model's encoders make of the inputs, by modality, and the inputs that they read."""
    encoded: dict[str, ModelOutput] = {}
    read: set[str] = set()
    for modality in MODALITIES:
        encoder = getattr(model, f"get_{modality}_features", None)
        taken = {name: inputs[name] for name in _parameters(encoder) if name in inputs}
        if encoder is not None and any(name in PIXELS for name in taken):
            with torch.no_grad():
                encoded[modality] = encoder(**taken, return_dict=True)
            read |= taken.keys()
    return encoded, read


def concatenated_images(encoded: list[dict[str, ModelOutput]]) -> dict[str, ModelOutput]:
    """The encoded images of several batches of rows after one another."""
    return {modality: _concatenated_outputs([one[modality] for one in encoded]) for modality in encoded[0]}


def row_positions(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The positions that `model` gives the tokens of whole rows: `(B, S)`, or `(3, B, S)` for images (mRoPE)."""
    model = _base_of(model)
    names = _position_inputs(model)
    position_ids = model.base_model.compute_3d_position_ids(**{n: inputs.get(n) for n in names}) if names else None
    if position_ids is None:
        ids = inputs["input_ids"]
        return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return position_ids


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _parameters(function: Callable | None) -> list[str]:
    return list(inspect.signature(function).parameters) if function else []


def _position_inputs(model: nn.Module) -> list[str]:
    """What the model computes the positions of image tokens from; nothing where they are counted like text."""
    return _parameters(getattr(model.base_model, "compute_3d_position_ids", None))


def _reason_for_pixels(model: nn.Module) -> str | None:
    name = type(model).__name__
    if ENCODED not in _parameters(model.forward):
        return f"{name} takes no encoded images"
    decoder = {parameter for part in MoEModel.of(model).text_models for parameter in part.parameters()}
    around = [parameter for parameter in model.base_model.parameters() if parameter not in decoder]
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in around):
        return f"weights of {name} outside its text model are trained"
    if any(isinstance(parameter, DTensor) or parameter.numel() == 0 for parameter in around):
        return f"the weights of {name} are split over processes"
    return None


def _concatenated_outputs(outputs: list[ModelOutput]) -> ModelOutput:
    parts = {POOLED: _concatenated([output[POOLED] for output in outputs])}
    if outputs[0].get(DEEPSTACK) is not None:
        layers = zip(*(output[DEEPSTACK] for output in outputs), strict=True)
        parts[DEEPSTACK] = [_concatenated(features) for features in layers]
    return type(outputs[0])(**parts)


def _concatenated(features: Sequence[Any]) -> Any:
    if isinstance(features[0], torch.Tensor):
        return torch.cat(features)
    return [image for images in features for image in images]
