"""`ordmoe verify ADAPTER MODEL`: whether an adapter does on a base what it did when it was saved."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PretrainedConfig

from ..adapter.saved import SavedAdapter
from ..errors import OrdMoEConfigError
from ..quantization.config import QUANT_METHOD, MoeBitsAndBytesConfig
from ..tools.model_config import read_config
from ..tools.verify import TOLERANCE, check_probes, deviation_table, replay_probes
from .arguments import IGNORE_FINGERPRINT, ModelArguments
from .loading import load_base
from .model_checks import check_is_somewhere
from .parser import ADAPTER, CommandParser
from .tables import print_tables, write_json


@dataclass(kw_only=True)
class VerifyArguments(ModelArguments):
    """Which adapter, on which base, and how far apart is too far."""

    model_name_or_path: str = field(
        default="",
        metadata={"aliases": ["--base"], "help": "Folder or hub id of the base; the adapter's own by default."},
    )
    load_in_4bit: bool | None = field(  # type: ignore[assignment] # None is for what was used in training
        default=None,
        metadata={"help": "Load experts and decoder linears in 4 bits; as in training by default."},
    )
    adapter: str = field(metadata={"help": "Folder or hub id of the adapter."})
    tolerance: float = field(
        default=TOLERANCE,
        metadata={"help": "Largest difference of a tier's median token, in nats, at which the exit status is 0."},
    )
    ignore_fingerprint: bool = field(default=False, metadata={"help": IGNORE_FINGERPRINT})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the base."})
    output_file: str | None = field(default=None, metadata={"help": "File to write the differences to, as JSON."})
    recipe: MoeBitsAndBytesConfig | None = field(default=None, init=False)

    def quantization_config(self, config: PretrainedConfig | None = None) -> MoeBitsAndBytesConfig | None:
        """The quantisation that was asked for, else that of training."""
        return self.recipe if self.load_in_4bit is None else super().quantization_config(config)


def build_parser() -> CommandParser:
    return CommandParser(
        "verify",
        (VerifyArguments,),
        ADAPTER,
        description="Replay the probes of an adapter on a base. The exit status is 1 where they are not what they were "
        "when the adapter was saved.",
    )


def main(arguments: Sequence[str]) -> int:
    (options,) = build_parser().parse_args_and_config(arguments)
    saved = SavedAdapter.read(options.adapter)
    if saved.record is None:
        raise OrdMoEConfigError(f"{options.adapter} has no ordmoe.json, and so no probes. Load it and save it again.")
    check_probes(saved.record, options.adapter)
    saved.check_weights()
    base = options.model_name_or_path or saved.settings.get("base_model_name_or_path")
    if not base:
        raise OrdMoEConfigError(f"{options.adapter} does not name its base: give `ordmoe verify ADAPTER MODEL`.")
    check_is_somewhere(base, options.adapter)
    options.model_name_or_path = base
    if options.dtype == "auto":
        options.dtype = saved.record["base"]["config"].get("dtype") or "auto"
    config = read_config(base, options.model_revision, options.trust_remote_code)
    options.recipe = _recipe_of_training(saved.record, getattr(config, "quantization_config", None) is not None)
    device_map = {"": torch.accelerator.current_accelerator()} if torch.accelerator.is_available() else None
    model = load_base(options, options.trust_remote_code, device_map)
    tuned = PeftModel.from_pretrained(model, options.adapter, ignore_fingerprint=options.ignore_fingerprint)
    deviations = replay_probes(tuned, saved.record, options.adapter)
    print_tables([deviation_table(deviations, options.adapter)])
    if options.output_file is not None:
        write_json(options.output_file, [asdict(deviation) for deviation in deviations])
    worst = max(deviation.median for deviation in deviations)
    is_same = worst <= options.tolerance
    verdict = "verified" if is_same else "NOT what was saved"
    print(
        f"{options.adapter} on {base}: {verdict}; the largest median difference of a tier is {worst:.4f} nats, "
        f"the tolerance {options.tolerance}."
    )
    return 0 if is_same else 1


def _recipe_of_training(record: dict[str, Any], is_quantised: bool) -> MoeBitsAndBytesConfig | None:
    """How the base was quantised in training, where it is stored dense."""
    recipe = record["base"]["quantization"]
    is_ours = recipe is not None and recipe.get("quant_method") == QUANT_METHOD
    return MoeBitsAndBytesConfig.from_dict(recipe) if is_ours and not is_quantised else None
