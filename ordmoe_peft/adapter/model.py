"""The tuner: which layer class each target gets, and what attaching and detaching does to the model."""

import re
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraModel
from torch import nn
from transformers.utils import logging

from .._compat import keep_linear4bit_layout
from ..errors import OrdMoEConfigError, OrdMoEModelError
from ..experts.expert_lora import ExpertLora
from ..experts.weight_lora import WeightLora
from ..merging.in_memory import check_unshared, forget_quantization, has_packed_weights, merge_packed
from ..moe_model import (
    EXPERTS_IMPLEMENTATION,
    MoELayer,
    MoEModel,
    is_fused_experts,
    unwrapped,
)
from ..tiers.routing import install_tier_hooks, note_adapter_configs, ranked_layers, remove_tier_hooks
from .attachment import attached_or_unchanged, unchanged_on_error, weights_unchanged_on_error
from .base_record import base_record, check_base_record, without_embeddings
from .config import OrdMoEConfig
from .expert_selection import clear_, others_of
from .fitting import check_fits_model, fill_in_targets
from .lora_fields import changes_base_weights
from .offloading import bring_offloaded_routers
from .peft_model import give_class_to_owner
from .renaming import check_read_by_transformers
from .saved import SavedAdapter, check_fits
from .targets import Target, base_moe, base_quantization, coverage_report


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

    def __init__(self, model: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        # A `PeftModel` gives it in a dict. transformers' own `load_adapter` does not, and reads the weights itself.
        self.__dict__["read_by_transformers"] = isinstance(config, OrdMoEConfig) and config.base_moe is not None
        with unchanged_on_error(model):  # PEFT adds to the configurations of a model that has an adapter
            super().__init__(model, config, *args, **kwargs)
        self._awaits_owner = give_class_to_owner(self)

    def _cast_adapter_dtype(self, *args: Any, **kwargs: Any) -> None:
        # The first that a `PeftModel` calls of what it holds.
        self._awaits_owner.remove()
        super()._cast_adapter_dtype(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if ".lora" in f".{adapter_name}":
            raise OrdMoEConfigError(
                f"The adapter's name {adapter_name!r} begins with 'lora', by which PEFT finds LoRA's weights, so its "
                "own would be lost. Choose another name."
            )
        if "." in adapter_name or not adapter_name or hasattr(nn.ModuleDict, adapter_name):
            raise OrdMoEConfigError(
                f"The adapter's name {adapter_name!r} cannot be a module's: it is empty, has a dot, or is a method's. "
                "Choose another name."
            )
        # Of each adapter what is known of it, and what was checked before it was attached.
        self.__dict__.setdefault("records", {})
        self.__dict__.setdefault("checked", {})
        with attached_or_unchanged(self, adapter_name):
            self._attach(model, adapter_name, *args, **kwargs)

    def _attach(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        is_loaded, saved = config.base_moe is not None, config.saved
        shapes = saved.check_weights() if is_loaded and saved else None
        targets, plan = check_fits_model(config, model)
        # From here on the model changes. `_detach` undoes it, and `attached_or_unchanged` where something fails.
        bring_offloaded_routers(MoEModel.of(model).layers)
        self._know_base(model, adapter_name, saved if is_loaded else None)
        moe = install_tier_hooks(model, plan.layers)
        if config.num_tiers > 1:
            ranked_layers(moe, plan)
        keep_linear4bit_layout(model)  # of bases that others quantised, too: merging reads them
        _say_what_is_slow(moe.layers, targets)
        if not is_loaded:
            config.base_quantization = base_quantization(model)
        config.base_moe = base_moe(model)
        fill_in_targets(config, targets, moe.layers)
        rewritten = sorted(config.target_modules) if changes_base_weights(config) else []
        with weights_unchanged_on_error([model.get_submodule(name) for name in rewritten]), warnings.catch_warnings():
            # PEFT looks for patterns among modules alone; `fill_in_targets` has found all.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.expert_selection is not None:
            for module, experts in others_of(model, config, adapter_name):
                clear_(module, adapter_name, experts)
        if self.read_by_transformers:
            names = get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False)
            check_read_by_transformers((name.removeprefix("model.") for name in names), model)
            logger.warning(
                "transformers' own load_adapter says nothing of where the adapter is, so neither its weights nor its "
                "base are checked. Load it by `PeftModel.from_pretrained`, which checks both."
            )
        if shapes is not None:
            attached = get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False)
            check_fits(
                shapes, {f"base_model.{name}": tensor for name, tensor in attached.items()}, str(saved.weights_file)
            )
            saved.check_checksum()
            self.checked[adapter_name] = saved
        config.saved = None
        note_adapter_configs(model, self.peft_config)
        if not hasattr(self, "_experts_implementation_before"):
            self._experts_implementation_before = model.get_experts_implementation()
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        logger.info(f"OrdMoE adapter {adapter_name!r}:\n{coverage_report(model)}")

    def _know_base(self, model: nn.Module, adapter_name: str, saved: SavedAdapter | None) -> None:
        """Take a note of the base, and see that it is the one that a saved adapter was trained on.

        Raises:
            [`OrdMoEModelError`]: it is not.
        """
        if "base_record" not in vars(self):  # of the bare base: it is the same for all adapters
            self.base_record = base_record(model)
        record = None if saved is None else saved.record
        if saved is not None and record is not None:
            ignore = saved.ignore_fingerprint or vars(self).get("ignore_fingerprint", False)
            found = without_embeddings(self.base_record, model, self.peft_config[adapter_name])
            check_base_record(record["base"], found, str(saved.folder), ignore)
        self.records[adapter_name] = {"base": self.base_record, "training": None, "probes": None}

    def _detach(self, model: nn.Module) -> None:
        """Undo what [`_attach`] changed in `model`, from which PEFT has taken its wrappers."""
        remove_tier_hooks(model)
        before = self._experts_implementation_before
        if not has_packed_weights(model):  # its experts may have been packed before the adapter, and be dense now
            before = getattr(getattr(model, "hf_quantizer", None), "experts_implementation_before", before)
        model.set_experts_implementation(before)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: OrdMoEConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's; refuses weights that do not fit before the first is copied into an adapter, perhaps a trained one."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        saved = {name.removeprefix("base_model.model."): tensor.shape for name, tensor in remapped.items()}
        own = {
            name.removeprefix("base_model.model."): parameter
            for name, parameter in model.named_parameters()
            if re.search(rf"\.(lora_\w+|modules_to_save|trainable_tokens_\w+)\.{re.escape(adapter_name)}(\.|$)", name)
        }
        check_fits(saved, own, "What was loaded")
        return remapped

    @staticmethod
    def _create_new_module(lora_config: OrdMoEConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if kwargs.get("parameter_name"):
            arguments = {name: kwargs[name] for name in ("parameter_name", "r", "lora_alpha")}
            layer = ExpertLora if is_fused_experts(unwrapped(target)) else WeightLora
            return layer(target, adapter_name, config=lora_config, **arguments)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager:
        """PEFT's; refuses adapters by row where LoRA is on parameters, which PEFT does when its hooks are in place."""
        if kwargs.get("adapter_names") is not None and any(c.target_parameters for c in self.peft_config.values()):
            raise OrdMoEModelError(
                f"adapter_names={kwargs['adapter_names']} gives each row of a batch an adapter, which LoRA on routers "
                "and experts cannot have. Run the rows of each adapter by themselves, after `set_adapter`."
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)

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
        quantised; its logits are those of the adapter on the dequantised base. A model whose experts stay in RAM
        (`offload_experts`) is on the CPU then, with a warning where it was not.

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
        self._detach(model)
        if merge and is_packed_base and not requantize:
            forget_quantization(model)
        return model


def _say_what_is_slow(layers: list[MoELayer], targets: list[Target]) -> None:
    """Say once that LoRA on stacks outside transformers' experts interface costs more than within."""
    classes = sorted({type(layer.experts).__name__ for layer in layers if layer.kind == "stacks"})
    if classes and any(target.role == "experts" for target in targets):
        logger.warning_once(
            f"{', '.join(classes)}: not of transformers' experts interface, so LoRA adds its update to whole stacks in "
            "each forward, which takes time and as much memory as the stacks."
        )
