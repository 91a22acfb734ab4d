"""The tuner: which layer class each target gets, and what attaching and detaching does to the model."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraModel
from torch import nn
from transformers.utils import logging

from .._compat import keep_linear4bit_layout
from ..errors import OrdMoEConfigError, OrdMoEModelError
from ..experts.expert_lora import ExpertLora
from ..experts.router_lora import RouterLora
from ..merging.in_memory import check_unshared, forget_quantization, has_packed_weights, merge_packed
from ..moe_model import (
    EXPERTS_IMPLEMENTATION,
    find_moe_layers,
    is_fused_experts,
    unwrapped,
    without_wrappers,
)
from ..quantization.other_quantizers import check_expert_storage
from ..tiers.plan import make_plan
from ..tiers.routing import check_router, check_weights, install_tier_hooks, note_adapter_configs, remove_tier_hooks
from .attachment import attached_or_unchanged, unchanged_on_error, weights_unchanged_on_error
from .config import OrdMoEConfig
from .lora_fields import changes_base_weights, check_modules_to_save, check_whole_model, resolve_patterns
from .offloading import bring_offloaded_routers, check_offloading
from .saved_weights import check_fits, saved_shapes
from .targets import Target, base_moe, base_quantization, coverage_report, resolve_targets
from .unserved_blocks import check_scope_is_served


logger = logging.get_logger(__name__)


class OrdMoEModel(LoraModel):
    """[`~peft.LoraModel`] whose targets are roles and whose expert factors meet activations, not weights.

    Args:
        model (`nn.Module`): a MoE model of transformers.
        config ([`OrdMoEConfig`]): the adapter's configuration.
        adapter_name (`str`): its name.

    Raises:
        [`OrdMoEModelError`], [`OrdMoEConfigError`]: the configuration does not fit the model, which is left as it was.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with unchanged_on_error(model):  # PEFT adds to the configurations of a model that has an adapter
            super().__init__(model, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with attached_or_unchanged(self, adapter_name):
            self._attach(model, adapter_name, *args, **kwargs)

    def _attach(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        is_loaded, file = config.base_moe is not None, config.weights_file
        saved = saved_shapes(file) if is_loaded and file else None
        check_whole_model(config, model)
        check_expert_storage(model)
        layers = find_moe_layers(model)
        check_base(config, model)
        if config.num_tiers > 1:
            check_scope_is_served(model, config.layer_scope)
        make_plan(layers, 1, config.num_tiers, config.grouping, config.layer_scope, config.tier_seed, step=0)
        targets = check_targets(config, model)
        check_offloading(model, targets)
        check_modules_to_save(config, model, [layer.block_name for layer in layers])
        if config.tier_weights == "match":
            for layer in layers:
                check_router(layer)
                check_weights(layer)
        bring_offloaded_routers(layers)
        install_tier_hooks(model)
        keep_linear4bit_layout(model)  # of bases that others quantised, too: merging reads them
        if not is_loaded:
            config.base_quantization = base_quantization(model)
        config.base_moe = base_moe(model)
        fill_in_targets(config, targets)
        rewritten = sorted(config.target_modules) if changes_base_weights(config) else []
        with weights_unchanged_on_error([model.get_submodule(name) for name in rewritten]), warnings.catch_warnings():
            # PEFT looks for patterns among modules alone; `fill_in_targets` has found all.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        if saved is not None:
            attached = get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False)
            check_fits(saved, {f"base_model.{name}": tensor for name, tensor in attached.items()}, str(file))
        config.weights_file = None
        note_adapter_configs(model, self.peft_config)
        self._use_ordmoe_experts()
        logger.info(f"OrdMoE adapter {adapter_name!r}:\n{coverage_report(model)}")

    def _use_ordmoe_experts(self) -> None:
        if not hasattr(self, "_experts_implementation_before"):
            self._experts_implementation_before = self.model.get_experts_implementation()
        self.model.set_experts_implementation(EXPERTS_IMPLEMENTATION)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: OrdMoEConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's; refuses weights that do not fit before the first is copied into an adapter, perhaps a trained one."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        saved = {name.removeprefix("base_model.model."): tensor.shape for name, tensor in remapped.items()}
        factors = {
            name.removeprefix("base_model.model."): parameter
            for name, parameter in model.named_parameters()
            if ".lora_" in name and f".{adapter_name}." in name
        }
        check_fits(saved, factors, "What was loaded")
        return remapped

    @staticmethod
    def _create_new_module(lora_config: OrdMoEConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if kwargs.get("parameter_name"):
            arguments = {name: kwargs[name] for name in ("parameter_name", "r", "lora_alpha")}
            layer = ExpertLora if is_fused_experts(unwrapped(target)) else RouterLora
            return layer(target, adapter_name, config=lora_config, **arguments)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's; refused where the base is packed in 4 bits, since no unmerging gives rounded weights back."""
        if has_packed_weights(self.model):
            raise OrdMoEModelError(
                "Cannot merge the adapter in place: the base is packed in 4 bits, and what is rounded cannot be "
                "unmerged. Use `merge_and_unload`, which gives a dense model."
            )
        check_unshared(self.model)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """Make the adapter part of the base, and return the base.

        A base that is packed in 4 bits becomes dense, all of it, in the dtype of its input embeddings, and is no longer
        quantised; its logits are those of the adapter on the dequantised base.

        Args:
            progressbar (`bool`, defaults to `False`): show a progress bar.
            safe_merge (`bool`, defaults to `False`): look for NaN and infinity first; on a packed base, before anything
                changes.
            adapter_names (`list[str]`, *optional*): the active adapters by default.
            requantize (`bool`, defaults to `False`): keep a packed base packed: its merged weights are rounded to 4
                bits again. What that left of each delta is logged, and is `model.requantization_report`, a
                [`~ordmoe_peft.merging.delta_retention.RequantizationReport`]. Below 90 % there is a warning.

        Raises:
            [`OrdMoEConfigError`]: `requantize` on a base that is not packed, or a name that is no adapter's.
            [`OrdMoEModelError`]: `safe_merge` found NaN or infinity.
        """
        return self._unload_and_optionally_merge(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names, requantize=requantize
        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        is_packed_base = has_packed_weights(self.model)
        unknown = [name for name in adapter_names or [] if name not in self.peft_config]
        if unknown:
            raise OrdMoEConfigError(
                f"Cannot merge {unknown}: the model has no such adapter, only {list(self.peft_config)}."
            )
        if requantize and not is_packed_base:
            raise OrdMoEConfigError(
                "requantize=True, but no weight of the base is packed in 4 bits. Load the base with a "
                "`MoeBitsAndBytesConfig`, or merge without `requantize` and quantise the merged model."
            )
        if merge:
            check_unshared(self.model)
        options = {"progressbar": progressbar, "safe_merge": safe_merge, "adapter_names": adapter_names}
        if merge and is_packed_base:
            self._check_merge_allowed()
            report = merge_packed(self.model, **options, requantize=requantize)
            model = super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
            if report is not None:
                model.requantization_report = report
                logger.info(f"Requantised:\n{report}")
                if report.warning():
                    warnings.warn(report.warning(), stacklevel=3)
        else:
            model = super()._unload_and_optionally_merge(merge=merge, **options)
        remove_tier_hooks(model)
        model.set_experts_implementation(self._experts_implementation_after(model))
        if merge and is_packed_base and not requantize:
            forget_quantization(model)
        return model

    def _experts_implementation_after(self, model: nn.Module) -> dict[str, str]:
        """What the model had before the adapter; before its experts were packed, where they are dense now."""
        before = self._experts_implementation_before
        if has_packed_weights(model):
            return before
        return getattr(getattr(model, "hf_quantizer", None), "experts_implementation_before", before)


def check_base(config: OrdMoEConfig, model: nn.Module) -> None:
    """See that the base has the sizes that `config` recorded, if it did.

    Raises:
        [`OrdMoEModelError`]: the adapter was made for a base of other sizes.
    """
    sizes = base_moe(model)
    if config.base_moe is not None and config.base_moe != sizes:
        differences = ", ".join(
            f"{name} {config.base_moe.get(name)} (this model: {size})"
            for name, size in sizes.items()
            if config.base_moe.get(name) != size
        )
        raise OrdMoEModelError(
            f"The adapter was made for another base, {config.base_model_name_or_path!r}, with {differences}. Load it "
            "on that base."
        )


def check_targets(config: OrdMoEConfig, model: nn.Module) -> list[Target]:
    """The modules and the parameters that the roles in `config.targets` stand for.

    Raises:
        [`OrdMoEModelError`]: a role matches nothing or only part of the layers.
        [`OrdMoEConfigError`]: names were given that the roles do not stand for.
    """
    targets = resolve_targets(model, config.targets)
    for field, given, is_parameter in (
        ("target_modules", config.target_modules, False),
        ("target_parameters", config.target_parameters, True),
    ):
        resolved = {target.name for target in targets if target.is_parameter == is_parameter}
        if given and set(given) != resolved and _names_meant(model, given) != resolved:
            raise OrdMoEConfigError(
                f"{field}={sorted(given) if not isinstance(given, str) else given!r} is not what targets="
                f"{config.targets} stands for in {type(model).__name__}. Set `targets` alone and leave {field} unset."
            )
    return targets


def fill_in_targets(config: OrdMoEConfig, targets: list[Target]) -> None:
    """Write explicit names into `config`. They are saved with the adapter, so that plain PEFT can load it.

    Raises:
        [`OrdMoEConfigError`]: a pattern of `config` stands for none of `targets`.
    """
    config.target_modules = {target.name for target in targets if not target.is_parameter}
    config.target_parameters = sorted(target.name for target in targets if target.is_parameter)
    for field in ("rank_pattern", "alpha_pattern"):
        setattr(config, field, resolve_patterns(field, getattr(config, field) or {}, targets))


def _names_meant(model: nn.Module, endings: str | Iterable[str]) -> set[str]:
    """The modules whose names end so.

    PEFT shortens 20 and more names to endings that no other module shares (`_find_minimal_target_modules`,
    `peft/tuners/tuners_utils.py`), and saves these.
    """
    if isinstance(endings, str):
        return set()  # a regular expression
    names = [without_wrappers(name) for name, _ in model.named_modules()]
    return {name for name in names if any(f".{name}".endswith(f".{ending}") for ending in endings)}
