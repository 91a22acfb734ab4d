"""What a model's configuration and an adapter's files tell, before the model is loaded, which may take minutes."""

from pathlib import Path

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME
from transformers import PreTrainedModel

from ..adapter.base_record import hub_id
from ..adapter.config import PEFT_METHOD, OrdMoEConfig
from ..adapter.fitting import check_base, check_targets
from ..adapter.saved import SavedAdapter, download_config, read_json
from ..errors import OrdMoEConfigError, OrdMoEModelError
from ..moe_model import MoEModel
from ..tiers.plan import TierSettings, make_plan
from ..tiers.routing import settings_of
from ..tools.families import build_model
from ..tools.model_config import read_config
from .arguments import ModelArguments, SampleArguments


def check_is_somewhere(base: str, adapter: str) -> None:
    """Raise [`OrdMoEModelError`] for the name of an adapter's base that is no folder here and no id on the hub."""
    if not Path(base).is_dir() and hub_id(base)[0] is None:
        raise OrdMoEModelError(
            f"The base of {adapter}, {base!r}, is no folder here and no id on the hub. Give its folder or id "
            "after the adapter."
        )


def read_adapter(adapter: str) -> OrdMoEConfig | None:
    """The configuration of an OrdMoE adapter whose files can be read; `None` for one of PEFT's, which PEFT reads.

    Raises:
        [`OrdMoEConfigError`]: they cannot.
    """
    folder = Path(adapter) if Path(adapter).is_dir() else download_config(adapter)
    settings = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != PEFT_METHOD.upper() and kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        return None
    saved = SavedAdapter.read(adapter)
    saved.check_weights()
    return OrdMoEConfig.from_pretrained(adapter)


def check_subject(model_options: ModelArguments, options: SampleArguments) -> None:
    """See that there are a base, and an adapter of it where one is named, and that the tiers that are asked for fit,
    where the command runs them.

    Raises:
        [`OrdMoEModelError`], [`OrdMoEConfigError`]: there is none, or they do not fit.
    """
    adapter = None if options.adapter is None else read_adapter(options.adapter)
    if options.adapter is not None and adapter is None and model_options.load_in_4bit:
        raise OrdMoEConfigError(
            f"{options.adapter} holds a plain adapter of PEFT's, which goes on dense experts: leave load_in_4bit out, "
            "or make it one of ours by `ordmoe import`."
        )
    config = adapter or OrdMoEConfig()
    model = model_without_weights(model_options, options.trust_remote_code)
    check_base(config, model)
    if not options.needs_tiers:
        return
    cut = TierSettings(options.num_tiers or config.num_tiers, options.grouping or config.grouping)
    tiers = getattr(options, "tiers", None) or range(1, cut.num_tiers + 1)
    make_plan(MoEModel.of(model).layers, list(tiers), cut)


def check_adapter_fits(model_options: ModelArguments, config: OrdMoEConfig, trust_remote_code: bool) -> None:
    """See that a base has what an adapter of `config` is put on, and room for its tiers.

    Raises:
        [`OrdMoEModelError`], [`OrdMoEConfigError`]: it does not.
    """
    model = model_without_weights(model_options, trust_remote_code)
    make_plan(MoEModel.of(model).layers, 1, settings_of(config))
    check_targets(config, model)


def model_without_weights(options: ModelArguments, trust_remote_code: bool) -> PreTrainedModel:
    """The base on the meta device, of its configuration alone."""
    config = read_config(options.model_name_or_path, options.model_revision, trust_remote_code)
    return build_model(config, trust_remote_code)
