"""The class of a [`~peft.PeftModel`] with OrdMoE adapters: saved whole or not at all, loaded after a look at all files.

PEFT chooses the class of a model by its task and has no place for a method's own. It stores the method's tuner in the
model as a module, which torch tells hooks of; there the model gets a subclass of the class that PEFT chose.
"""

import weakref
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel, get_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.utils import CONFIG_NAME
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from ..errors import OrdMoEConfigError
from ..files import whole_files
from .base_record import check_base_record, is_same_base, without_embeddings
from .card import adapter_card
from .card_file import base_license, save_card, write_saved_card
from .hub import push_adapter
from .probes import make_probes
from .record import write_record
from .saved import SavedAdapter, check_fits


# What decides the numbers that an adapter's weights stand for.
OF_THE_SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


class OrdMoEAdapters(PeftModel):
    """What a [`~peft.PeftModel`] with OrdMoE adapters does in its own way.

    Attributes:
        ordmoe_training (`dict`, *optional*): what is known of the run that trains the active adapter, for `ordmoe.json`
            and the model card; a trainer sets it.
        makes_probes (`bool`): run the model when it is saved, for the probes in `ordmoe.json`; a trainer's checkpoints
            have none.
    """

    ordmoe_training: dict[str, Any] | None = None
    makes_probes: bool = True

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """PEFT's; an adapter's files take the place of an earlier one's all or none, and `ordmoe.json` is one of them.

        Args:
            save_directory (`str` or `Path`): folder of the adapter `default`; others get folders of their names in it.
            safe_serialization (`bool`, defaults to `True`): nothing else is possible: pickles are not written.
            selected_adapters (`list[str]`, *optional*): all by default.
            save_embedding_layers (`bool` or `"auto"`, defaults to `"auto"`): embeddings are the base's, so `True` is
                refused, and `"auto"` means no; `modules_to_save` is for embeddings that are trained.
            is_main_process (`bool`, defaults to `True`): write files.
            kwargs: as for PEFT's. With a `state_dict`, whose weights the model may not have, no probes are made.

        Raises:
            [`OrdMoEConfigError`]: pickles or embeddings were asked for, or an adapter that there is not.
        """
        if not safe_serialization:
            raise OrdMoEConfigError(
                "safe_serialization=False would write a pickle, which is not read. Leave it at True."
            )
        if save_embedding_layers is True:
            raise OrdMoEConfigError(
                "save_embedding_layers=True would put weights of the base into the adapter's file. Train embeddings by "
                "`modules_to_save`."
            )
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise OrdMoEConfigError(f"There is no adapter {unknown[0]!r} to save, only {list(self.peft_config)}.")
        options = {"save_embedding_layers": False, "is_main_process": is_main_process, **kwargs}
        for name in names:
            if not is_main_process:
                super().save_pretrained(str(save_directory), selected_adapters=[name], **options)
                continue
            target = Path(save_directory) if name == "default" else Path(save_directory, name)
            if target.is_file():
                raise OrdMoEConfigError(f"{target} is a file; give a folder to save the adapter in.")
            with whole_files(target) as folder:
                super().save_pretrained(str(folder), selected_adapters=[name], **options)
                record = self._complete(folder, name, kwargs.get("state_dict") is None)
                save_card(adapter_card(self.peft_config[name], record), folder, earlier=target)

    def _complete(self, folder: Path, name: str, are_own_weights: bool) -> dict[str, Any]:
        """Add what PEFT does not write to the files of adapter `name` in `folder`, but the card; return the record."""
        if name != "default":  # PEFT has put them into a folder of this name
            for file in (folder / name).iterdir():
                file.replace(folder / file.name)
            (folder / name).rmdir()
        known = self.base_model.records[name]
        is_trained_here = name in self.active_adapters and self.ordmoe_training is not None
        # What was loaded to be trained on may have been, of which nobody told.
        earlier = known["training"] if self.peft_config[name].inference_mode else None
        training = self.ordmoe_training if is_trained_here else earlier
        config = self.peft_config[name]
        base = without_embeddings(known["base"], self.base_model.model, config)
        if not is_same_base(base, self.base_model.base_record):  # the model's answers are those of another
            probes = known["probes"]
        else:
            probes = make_probes(self, name) if are_own_weights and self.makes_probes else None
        named = base["id"] or config.base_model_name_or_path
        return write_record(folder, {"license": base_license(named, base["revision"]), **base}, training, probes)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write the card of the adapter that is saved in `output_dir` from its files; none where none is.

        What an owner wrote in it stays: see [`~ordmoe_peft.adapter.card_file.updated`].
        """
        write_saved_card(output_dir)

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Upload the adapter; `options` are those of [`~ordmoe_peft.adapter.hub.push_adapter`]."""
        return push_adapter(self, repo_id, **options)

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, *args: Any, ignore_fingerprint: bool = False, **kwargs: Any
    ) -> Any:
        """PEFT's; all files are checked before the model changes.

        Args:
            model_id (`str` or `Path`), adapter_name (`str`), args, kwargs: as for PEFT's.
            ignore_fingerprint (`bool`, defaults to `False`): let the adapter be loaded on another base than its own,
                with a warning.

        Raises:
            [`OrdMoEConfigError`], [`OrdMoEModelError`]: the adapter does not fit; the model is as it was.
        """
        tuner = self.base_model
        lookup, options = self._split_kwargs(kwargs)
        saved = tuner.checked.get(adapter_name)
        if saved is None:
            saved = SavedAdapter.read(model_id, **lookup)
            if adapter_name in self.peft_config:
                self._check_replacement(saved, adapter_name, ignore_fingerprint)
                tuner.checked[adapter_name] = saved
            elif saved.settings.get("base_moe") is None:  # by which the tuner knows one with weights
                raise OrdMoEConfigError(
                    f"{saved.folder / CONFIG_NAME} has no base_moe, as one without weights. Restore what was saved."
                )
        tuner.ignore_fingerprint = ignore_fingerprint
        try:
            # What was checked, not what the hub has by now.
            result = super().load_adapter(str(saved.folder), adapter_name, *args, **options)
            self._take_record(adapter_name, saved.record)
            return result
        finally:
            tuner.ignore_fingerprint = False
            tuner.checked.pop(adapter_name, None)

    def _take_record(self, adapter_name: str, record: dict[str, Any] | None) -> None:
        """Know of an adapter what was saved with the weights that it has now. If it is there to be trained on, on
        another base than before, that one is its base from now on."""
        tuner, config = self.base_model, self.peft_config[adapter_name]
        if record is None:
            return
        if config.inference_mode or is_same_base(record["base"], tuner.base_record):
            tuner.records[adapter_name] = record
        else:
            config.base_model_name_or_path, config.revision = tuner.model.name_or_path, tuner.base_record["revision"]
            config.base_quantization = tuner.base_record["quantization"]

    def _check_replacement(self, saved: SavedAdapter, adapter_name: str, ignore_fingerprint: bool) -> None:
        """See that saved weights can take the place of those of the adapter that is there.

        Raises:
            [`OrdMoEConfigError`], [`OrdMoEModelError`]: they cannot.
        """
        config = self.peft_config[adapter_name]
        shapes = saved.check_weights()
        earlier = {name: getattr(config, name) for name in OF_THE_SCALE} | {"expert_selection": None}
        for name, default in earlier.items():  # files of an older version may not have one
            if saved.settings.get(name, default) != getattr(config, name):
                raise OrdMoEConfigError(
                    f"{saved.folder} was saved with {name}={saved.settings.get(name)!r}; the adapter "
                    f"{adapter_name!r} of this model has {getattr(config, name)!r}. Load it under another name."
                )
        attached = get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False)
        check_fits(shapes, attached, str(saved.weights_file))
        saved.check_checksum()
        if saved.record is not None:
            found = without_embeddings(self.base_model.base_record, self.base_model.model, config)
            check_base_record(saved.record["base"], found, str(saved.folder), ignore_fingerprint)


# By the class that PEFT chooses.
CLASSES = {
    base: type(f"OrdMoE{base.__name__}", (OrdMoEAdapters, base), {"__module__": __name__, "__doc__": base.__doc__})
    for base in {PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}
}
globals().update({derived.__name__: derived for derived in CLASSES.values()})  # where pickles of whole models look


def give_class_to_owner(tuner: nn.Module) -> RemovableHandle:
    """Give the [`~peft.PeftModel`] that will hold `tuner` its class, when it does. The handle ends the waiting."""
    awaited = weakref.ref(tuner)

    def look(owner: nn.Module, name: str, module: nn.Module) -> None:
        if module is awaited() and type(owner) in CLASSES:
            owner.__class__ = CLASSES[type(owner)]

    handle = register_module_module_registration_hook(look)
    weakref.finalize(tuner, handle.remove)
    return handle
