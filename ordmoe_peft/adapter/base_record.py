"""What an adapter remembers of its base, so that another one is noticed when the adapter is loaded."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from .._compat import commit_of
from ..errors import OrdMoEModelError
from ..moe_model import MoEModel
from .targets import base_quantization


# Of a configuration: where it came from, how it is run, and what counts in training or generation alone. Nothing of it
# changes a forward.
NOT_OF_THE_FORWARD = {
    *("_name_or_path", "transformers_version", "architectures", "auto_map", "quantization_config", "dtype"),
    *("torch_dtype", "id2label", "label2id", "problem_type", "use_cache", "return_dict", "output_attentions"),
    *("output_hidden_states", "output_router_logits", "router_aux_loss_coef", "router_z_loss_coef"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp"),
    *("chunk_size_feed_forward", "router_jitter_noise"),
}
# What of a recipe decides which numbers the base computes with.
OF_THE_RECIPE = (
    *("quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    *("bnb_4bit_blocksize", "bits", "group_size"),
)
# Of a matrix with more, as embeddings have; routers have a row for each expert.
ROWS_HASHED = 1024
SNAPSHOT = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})")


def base_record(model: nn.Module) -> dict[str, Any]:
    """The part `base` of `ordmoe.json`, of a model without an adapter.

    Returns:
        `dict`: `id` and `revision` on the hub, where it has them; `class`; `config`, all values; `quantization`, its
        recipe; `digest` of its `routers` and of some rows of its `embeddings`, which no recipe quantises, once rounded
        to bfloat16 and once to float16, since a checkpoint may be loaded in either.
    """
    config = getattr(model, "config", None)
    name, revision = hub_id(getattr(model, "name_or_path", "") or "")
    to_json = getattr(config, "to_json_string", None)
    values = json.loads(to_json(use_diff=False), object_hook=_of_the_model) if to_json else {}
    return {
        "id": name,
        "revision": revision or commit_of(config),
        "class": type(model).__name__,
        "config": values,
        "quantization": base_quantization(model),
        "digest": {"routers": digest(_router_tensors(model)), "embeddings": digest(_embedding_tensors(model))},
    }


def _of_the_model(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, or one within it, without where it was loaded from and without its recipe."""
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "quantization_config")}


def hub_id(name_or_path: str) -> tuple[str | None, str | None]:
    """The id on the hub of what `from_pretrained` was given, and its commit; `None` where they cannot be told.

    A folder in the hub's cache has both in its path. Another folder has neither.
    """
    snapshot = SNAPSHOT.search(name_or_path)
    if snapshot:
        owner, name, commit = snapshot.groups()
        return f"{owner}/{name}", commit
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path) and not name_or_path.startswith(".")
    return (name_or_path if is_id and not Path(name_or_path).exists() else None), None


def without_embeddings(base: dict[str, Any], model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """What is recorded of a base: without its embeddings where an adapter brings its own, all or some of the rows."""
    saved = tuple(config.modules_to_save or ())
    names = [name.removesuffix(".weight") for name in _embedding_tensors(model)]
    is_brought = config.trainable_token_indices is not None or any(name.endswith(saved) for name in names)
    return {**base, "digest": {**base["digest"], "embeddings": None}} if is_brought else base


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, str] | None:
    """A hash of tensors, or of some of their rows, in each 16-bit dtype; `None` where they are not at hand (on the meta
    device, or sharded)."""
    if not all(map(_is_at_hand, tensors.values())):
        return None
    dtypes = (torch.bfloat16, torch.float16)
    return {str(dtype).removeprefix("torch."): _hash(list(tensors.values()), dtype) for dtype in dtypes}


def hashed_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights by which a model without an adapter is known, by name: all of its routers', and its embeddings."""
    return _router_tensors(model) | _embedding_tensors(model)


def _router_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    routers = {layer.router_name: layer.router for layer in MoEModel.of(model).layers if layer.router is not None}
    return {f"{name}.{key}": part for name in routers for key, part in sorted(routers[name].state_dict().items())}


def _embedding_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    embeddings = None
    with suppress(AttributeError, NotImplementedError):  # of a model of models, as Qwen3-Omni's
        embeddings = model.get_input_embeddings()
    weight = getattr(embeddings, "weight", None)
    names = [name for name, module in model.named_modules() if module is embeddings]
    return {f"{name}.weight": weight.detach() for name in names} if isinstance(weight, torch.Tensor) else {}


def _is_at_hand(tensor: torch.Tensor) -> bool:
    """Whether a tensor has numbers of its own: not on the meta device, not a shard, not one number for all."""
    is_whole = type(tensor) is torch.Tensor and tensor.numel() > 0 and not tensor.is_meta
    return is_whole and tensor.untyped_storage().nbytes() >= tensor.nbytes


def _hash(tensors: list[torch.Tensor], dtype: torch.dtype) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        values = tensor[:: max(1, len(tensor) // ROWS_HASHED)] if tensor.ndim else tensor
        values = values.to("cpu")
        values = values.to(dtype).view(torch.int16) if values.is_floating_point() else values
        sha.update(values.contiguous().numpy().tobytes())
    return sha.hexdigest()


def check_base_record(expected: dict[str, Any], found: dict[str, Any], adapter: str, ignore: bool) -> None:
    """See that a model is the base that an adapter was trained on.

    Args:
        expected (`dict`), found (`dict`): [`base_record`] of the one in training, and of the model.
        adapter (`str`): where the adapter is, for messages.
        ignore (`bool`): warn where there would be an error.

    Raises:
        [`OrdMoEModelError`]: other values in the configuration, other weights of the routers or embeddings, or another
            recipe of quantisation. One of them dense and the other quantised is a warning, as is another commit of
            weights that cannot be told apart.
    """
    differences = list(_differences(expected, found))
    name = expected["id"] or expected.get("name") or f"a {expected['class']}"
    if differences:
        at = f", revision {expected['revision']}" if expected["revision"] else ""
        message = (
            f"The adapter in {adapter} was trained on another base ({name}{at}): "
            f"{'; '.join(differences[:5])}{f'; and {len(differences) - 5} more' if len(differences) > 5 else ''}."
        )
        if not ignore:
            raise OrdMoEModelError(
                f"{message} Load it on its own base, or give ignore_fingerprint=True (--ignore_fingerprint true), "
                "which makes this a warning."
            )
        warnings.warn(message, stacklevel=2)
    trained, now = recipe(expected["quantization"]), recipe(found["quantization"])
    if (trained is None) != (now is None):
        was, is_now = ("dense", _in_short(now)) if trained is None else (_in_short(trained), "dense")
        warnings.warn(
            f"The adapter in {adapter} was trained on a base that was {was}; this one is {is_now}. Likelihoods are "
            "somewhat other, which `ordmoe verify` measures.",
            stacklevel=2,
        )
        return
    revisions = {expected["revision"], found["revision"]}
    if not differences and None not in revisions and len(revisions) > 1:
        warnings.warn(
            f"The adapter in {adapter} was trained on revision {expected['revision']} of {name}; this is "
            f"{found['revision']}. Configuration, routers and embeddings are the same; the experts were not compared.",
            stacklevel=2,
        )


def _differences(expected: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    """What makes two bases two, in words."""
    of_model = dict(_values(found["config"]))
    for key, value in _values(expected["config"]):
        if key in of_model and of_model[key] != value:  # a key that one of them lacks is of another version
            yield f"its {key} is {value!r} (this model: {of_model[key]!r})"
    for part, digests_here in found["digest"].items():
        digests = expected["digest"][part]
        if digests and digests_here and not digests.items() & digests_here.items():
            yield (
                f"its {part} have other weights (SHA-256 in bfloat16 {digests['bfloat16'][:12]}…, this model: "
                f"{digests_here['bfloat16'][:12]}…{_of_dtypes(expected['config'], found['config'])})"
            )
    trained, now = recipe(expected["quantization"]), recipe(found["quantization"])
    if None not in (trained, now) and trained != now:
        yield f"it was {_in_short(trained)} (this model: {_in_short(now)})"


def _of_dtypes(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """Why the same checkpoint may have other weights, where that may be."""
    was, now = expected.get("dtype"), found.get("dtype")
    if {was, now} != {"bfloat16", "float16"}:
        return ""
    return f"; a checkpoint in float32 has others in {now} than in {was}, in which the adapter's base was: load it so"


def is_same_base(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two [`base_record`]s tell of no difference, in quantisation neither."""
    return not any(_differences(one, other)) and recipe(one["quantization"]) == recipe(other["quantization"])


def _values(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What of a configuration decides a forward: dotted name and value."""
    for key, value in config.items():
        if key in NOT_OF_THE_FORWARD or "dropout" in key:
            continue
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def recipe(quantization: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of a quantisation, what decides which numbers the base computes with."""
    known = {key: (quantization or {}).get(key) for key in OF_THE_RECIPE}
    return quantization and {key: getattr(value, "value", value) for key, value in known.items() if value is not None}


def _in_short(recipe: dict[str, Any] | None) -> str:
    """A recipe in a few words: the values that it has."""
    values = recipe or {}
    return "quantised (" + ", ".join(f"{key}={value}" for key, value in values.items()) + ")"
