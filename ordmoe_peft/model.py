"""The tuner: which layer class each target gets, and what attaching and detaching does to the model."""

from typing import Any

from peft.tuners.lora import LoraModel
from torch import nn
from transformers.utils import logging

from ._compat import experts_implementation
from .config import OrdMoEConfig
from .errors import OrdMoEConfigError, OrdMoEModelError
from .layers import param_wrapper, router_wrapper
from .moe_layers import EXPERTS_IMPLEMENTATION, find_moe_layers, is_fused_experts, unwrapped
from .quantization.storage import is_packed
from .targets import base_moe, coverage_report, resolve_targets
from .tiers.plan import make_plan
from .tiers.routing import check_router, check_weights, install_tier_hooks, remove_tier_hooks


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

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        layers = find_moe_layers(model)
        check_base(config, model)
        make_plan(layers, 1, config.num_tiers, config.grouping, config.layer_scope, config.tier_seed, step=0)
        targets = check_targets(config, model)
        if config.tier_weights == "match":
            for layer in layers:
                check_router(layer)
                check_weights(layer)
        install_tier_hooks(model)  # the last check, of the routers, and the first thing that touches the model
        config.base_moe = base_moe(model)
        config.target_modules, config.target_parameters = targets
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._use_ordmoe_experts()
        logger.info(f"OrdMoE adapter {adapter_name!r}:\n{coverage_report(model)}")

    def _use_ordmoe_experts(self) -> None:
        if not hasattr(self, "_experts_implementation_before"):
            self._experts_implementation_before = experts_implementation(self.model)
        self.model.set_experts_implementation(EXPERTS_IMPLEMENTATION)

    @staticmethod
    def _create_new_module(lora_config: OrdMoEConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if kwargs.get("parameter_name"):
            arguments = {name: kwargs[name] for name in ("parameter_name", "r", "lora_alpha")}
            layer = param_wrapper if is_fused_experts(unwrapped(target)) else router_wrapper
            return layer.ParamWrapper(target, adapter_name, config=lora_config, **arguments)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        packed = [name for name, parameter in self.model.named_parameters() if is_packed(parameter)]
        if packed:
            raise OrdMoEModelError(
                f"Cannot merge the adapter: {len(packed)} weights of the base are packed in 4 bits, such as "
                f"{packed[0]}. Load the base without a quantization_config, load the adapter on it, and merge there."
            )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_tier_hooks(model)
        model.set_experts_implementation(self._experts_implementation_before)
        return model


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


def check_targets(config: OrdMoEConfig, model: nn.Module) -> tuple[list[str], list[str]]:
    """The modules and the parameters that the roles in `config.targets` stand for, by explicit names.

    They are saved with the adapter, so that plain PEFT can load it.

    Raises:
        [`OrdMoEModelError`]: a role matches nothing or only part of the layers.
        [`OrdMoEConfigError`]: names were given that the roles do not stand for.
    """
    targets = resolve_targets(model, config.targets)
    modules = sorted(target.name for target in targets if not target.is_parameter)
    parameters = sorted(target.name for target in targets if target.is_parameter)
    for field, given, resolved in (
        ("target_modules", config.target_modules, modules),
        ("target_parameters", config.target_parameters, parameters),
    ):
        if given and set(given) != set(resolved):
            raise OrdMoEConfigError(
                f"{field}={sorted(given) if not isinstance(given, str) else given!r} is not what targets="
                f"{config.targets} stands for in {type(model).__name__}. Set `targets` alone and leave {field} unset."
            )
    return modules, parameters
