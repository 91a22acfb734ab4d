"""An OrdMoE adapter as a LoRA adapter for an inference server.

Servers apply one alpha / r to all of an adapter, so every scaling is folded into its `lora_B`, ranks become one by
zeros, and patterns go. No live server has run with what is written: names and shapes are those that the servers'
sources read (`servers.py`, `formats.py`).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ...adapter.saved import SavedAdapter, opened
from ...adapter.targets import find_targets
from ...errors import OrdMoEConfigError, OrdMoEModelError
from ...experts.expert_lora import ExpertLora
from ...merging.in_memory import BaseWeight
from ...moe_model import MoELayer, MoEModel
from ...quantization.storage import logical_shape
from ..base_on_meta import base_name, base_on_meta
from ..lora_factors import Factors
from ..merge_on_disk.checkpoint import checkpoint_folder, open_checkpoint
from ..merge_on_disk.weightless_model import WeightlessModel
from ..stored_routers import StoredRouters
from .card import ServingExport, serving_card
from .folder import export_folder
from .formats import fused_keys, keys, per_expert_keys
from .plain_peft import subfolder_of
from .servers import FORMATS, Served, served


ROUTER_CHOICES = ("keep", "fold", "drop")
ROUTER_FILE = "router.safetensors"


@dataclass(frozen=True)
class ServingOptions:
    """What [`export_for_server`] writes.

    Args:
        to (`str`): `"vllm-3d"`, `"vllm-2d"` or `"sglang"`.
        router (`str`, *optional*): what becomes of LoRA on routers: `"keep"` writes it, `"fold"` adds it to the base's
            routers, which go into `router.safetensors`, `"drop"` leaves it out. By default it is kept where the server
            takes it, and a choice is asked for where it does not.
        adapter_name (`str`, *optional*): the adapter's name, where several were saved; `default` by default.
        base (`str`, *optional*): folder or hub id of the base; the one that the adapter names by default. `"fold"`
            reads its routers. Otherwise nothing is read of it where the adapter's record describes it.
        revision (`str`, defaults to `"main"`), trust_remote_code (`bool`, defaults to `False`): of the base.
        ignore_fingerprint (`bool`, defaults to `False`): take another base than the adapter's, with a warning.
    """

    to: str
    router: str | None = None
    adapter_name: str | None = None
    base: str | None = None
    revision: str = "main"
    trust_remote_code: bool = False
    ignore_fingerprint: bool = False

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise OrdMoEConfigError(f"to must be one of {FORMATS}, got {self.to!r}.")
        if self.router not in (None, *ROUTER_CHOICES):
            raise OrdMoEConfigError(f"router must be one of {ROUTER_CHOICES}, got {self.router!r}.")


def export_for_server(adapter: str | Path, output: str | Path, options: ServingOptions) -> ServingExport:
    """Write an adapter to folder `output` in the form that a server reads.

    Args:
        adapter (`str` or `Path`): folder or hub id of an OrdMoE adapter.
        output (`str` or `Path`): folder that is not there, or is empty, or holds an earlier export, which goes.
        options ([`ServingOptions`]): which form, and how.

    Raises:
        [`OrdMoEConfigError`]: `adapter` is no OrdMoE adapter, `output` is taken, or LoRA on routers needs a choice.
        [`OrdMoEModelError`]: the server takes no such adapter of such a base; the message says what does.
    """
    saved = SavedAdapter.read(adapter, subfolder_of(Path(adapter), options.adapter_name))
    bare = base_on_meta(saved, options.base, options.revision, options.trust_remote_code)
    row = served(type(bare).__name__, options.to)
    check_lora_alone(saved)
    stored = None
    if options.router == "fold":  # then the base's own weights say whether it is the adapter's
        name = options.base or base_name(saved)
        if not name:
            raise OrdMoEConfigError(
                f"{saved.folder} does not name its base, whose routers are read: give `base` (MODEL)."
            )
        folder = checkpoint_folder(name, options.revision)
        stored = StoredRouters(bare, open_checkpoint(folder))
    known = stored.weights() if stored else None
    # The adapter is attached to a base that changes; the files are read by one that does not.
    skeleton = base_on_meta(saved, options.base, options.revision, options.trust_remote_code) if stored else bare
    parts = AdapterParts.of(WeightlessModel(skeleton, saved.folder, known, options.ignore_fingerprint), row, options.to)
    choice = _router_choice(parts, row, options)
    patched = stored.folded(parts.routers) if stored else {}
    kept = parts.routers if choice == "keep" else {}
    rank, tensors = parts.tensors(options.to, kept)
    summary = ServingExport(
        rank, len(parts.experts), len(parts.linears), len(kept), len(patched), len(parts.routers) * (choice == "drop")
    )
    with export_folder(output, options.to, saved.folder) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        settings = _settings(saved, rank, tensors)
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        if patched:
            save_file(patched, folder / ROUTER_FILE, metadata={"format": "pt"})
        card = serving_card(settings["base_model_name_or_path"], options.to, row.source, summary)
        card.save(folder / "README.md")
    return summary


def check_lora_alone(saved: SavedAdapter) -> None:
    """Raise [`OrdMoEModelError`] for what servers have no place for: tensors beside LoRA's two factors."""
    with opened(saved.weights_file) as tensors:
        other = [name for name in tensors.keys() if not name.endswith((".lora_A.weight", ".lora_B.weight"))]  # noqa: SIM118
    if other:
        raise OrdMoEModelError(
            f"{saved.weights_file} has {other[0]}, which is none of LoRA's two factors, and servers read nothing else "
            "of an adapter. Use `ordmoe merge`."
        )


@dataclass(frozen=True)
class AdapterParts:
    """An adapter's updates by what they are of, with the scaling folded in.

    Args:
        experts (`dict`): name of the experts' module → its layer, and the updates of up- and down-projection, zeros for
            one that is not adapted.
        routers (`dict`), linears (`dict`): name of the weight → its update.
    """

    experts: dict[str, tuple[MoELayer, Factors, Factors]] = field(default_factory=dict)
    routers: dict[str, Factors] = field(default_factory=dict)
    linears: dict[str, Factors] = field(default_factory=dict)

    @classmethod
    def of(cls, model: WeightlessModel, row: Served, to: str) -> "AdapterParts":
        """Those of the adapter on `model`.

        Raises:
            [`OrdMoEModelError`]: one has no place in the form `to`.
        """
        parts = cls()
        roles = {target.name.removesuffix(".weight"): target.role for target in find_targets(model.model)}
        layers = {layer.experts_name: layer for layer in MoEModel.of(model.model).layers}
        stacks: dict[str, dict[str, Factors]] = {}
        for weight in model.adapted:
            role, factors = roles[weight.name.removesuffix(".weight")], factors_of(weight)
            if role == "router":
                parts.routers[weight.name] = factors
            elif role == "experts" and isinstance(weight.layer, ExpertLora):
                owner, _, projection = weight.name.rpartition(".")
                stacks.setdefault(owner, {})[projection] = factors
            elif role != "experts" and weight.name.split(".")[-2] in row.linears:
                parts.linears[weight.name] = factors
            else:
                raise OrdMoEModelError(
                    f"{weight.name} has LoRA, for which {to} has no place on {type(model.model).__name__}: beside "
                    f"routed experts it takes {', '.join(sorted(row.linears))}. Use `ordmoe merge`."
                )
        for owner, updates in stacks.items():
            layer = layers[owner]
            rank = next(iter(updates.values())).rank
            for name, stack in layer.stacks.items():
                updates.setdefault(name, _zeros(layer, logical_shape(stack), rank))
            up, down = (updates[name] for name in layer.projections)
            parts.experts[owner] = (layer, up, down)
        return parts

    def tensors(self, to: str, routers: dict[str, Factors]) -> tuple[int, dict[str, torch.Tensor]]:
        """The common rank, and the tensors of the form `to`, with LoRA on `routers`."""
        modules = {name.removesuffix(".weight"): each for name, each in (self.linears | routers).items()}
        every = [*modules.values(), *(each for _, up, down in self.experts.values() for each in (up, down))]
        if not every:
            raise OrdMoEModelError("Without LoRA on routers nothing of the adapter is left to write.")
        rank = max(each.rank for each in every)
        tensors: dict[str, torch.Tensor] = {}
        for name, (layer, up, down) in self.experts.items():
            up, down = up.padded(rank), down.padded(rank)
            if to == "vllm-3d":
                tensors |= fused_keys(name, up, down)
            else:
                tensors |= per_expert_keys(name, up, down, layer.experts.is_concatenated)
        for name, each in modules.items():
            tensors |= keys(name, each.padded(rank))
        return rank, tensors


def factors_of(weight: BaseWeight) -> Factors:
    """The update of an adapted weight, folded."""
    layer, (name,) = weight.layer, weight.adapters
    assert layer is not None, "only adapted weights are asked for"
    A, B = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
    num_experts = layer.num_experts if isinstance(layer, ExpertLora) else 1
    return Factors.from_peft(A, B, num_experts, layer.scaling[name]).folded()


def _zeros(layer: MoELayer, shape: torch.Size, rank: int) -> Factors:
    num_experts, rows, columns = shape
    out_features, in_features = (columns, rows) if layer.experts.is_transposed else (rows, columns)
    return Factors.zeros(num_experts, in_features, out_features, rank)


def _router_choice(parts: AdapterParts, row: Served, options: ServingOptions) -> str:
    """What becomes of LoRA on routers.

    Raises:
        [`OrdMoEConfigError`]: the server takes none, and nothing else was asked for.
    """
    if not parts.routers:
        return "keep"
    if options.router in ("fold", "drop") or row.router:
        return options.router or "keep"
    raise OrdMoEConfigError(
        f"The adapter has LoRA on {len(parts.routers)} routers, which {options.to} does not take for this base. Pass "
        "--router fold, to have the base's routers written with it added, or --router drop, to leave it out and see "
        "what that changes in routing."
    )


def _settings(saved: SavedAdapter, rank: int, tensors: dict[str, torch.Tensor]) -> dict:
    """The `adapter_config.json` of an export: plain LoRA, alpha = r, and the last parts of its modules' names."""
    modules = {name.rpartition(".lora_")[0].removesuffix(".base_layer").rpartition(".")[2] for name in tensors}
    base = base_name(saved) or None
    config = LoraConfig(
        r=rank, lora_alpha=rank, base_model_name_or_path=base, task_type=saved.settings.get("task_type")
    )
    config.inference_mode = True
    return config.to_dict() | {"peft_type": "LORA", "target_modules": sorted(modules)}
