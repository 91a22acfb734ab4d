"""Load what options name: models, processors, adapters, data sets."""

from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoProcessor, PreTrainedModel, TrainingArguments
from transformers.utils import logging

from ..data.loading import load_data
from ..data.samples import check_processing_class, subsample
from ..errors import OrdMoEDataError, OrdMoEModelError
from ..quantization.other_quantizers import check_unquantised
from ..tiers.routing import adapter_config
from ..tools.model_config import read_config
from .arguments import DTYPES, ModelArguments, SampleArguments
from .cpu_speed import WORTH_A_WORD, slowdown
from .model_checks import check_subject


logger = logging.get_logger(__name__)


def load_base(options: ModelArguments, trust_remote_code: bool, device_map: Any = None) -> PreTrainedModel:
    """The base model, of the class that its checkpoint names; on the CPU, unless `device_map` says otherwise."""
    name = options.model_name_or_path
    config = read_config(name, options.model_revision, trust_remote_code)
    if options.load_in_4bit:
        check_unquantised(config, name)
    architecture = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
    try:
        return architecture.from_pretrained(
            name,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
            quantization_config=options.quantization_config(config),
            device_map=device_map,
            revision=options.model_revision,
            trust_remote_code=trust_remote_code,
        )
    except (SafetensorError, UnpicklingError, EOFError) as error:
        reason = str(error).partition(". ")[0] or type(error).__name__
        raise OrdMoEModelError(
            f"The weights of {name} cannot be read ({reason}): they were not written or copied to their end, or the "
            "file is a pointer of Git LFS, or a pickle with code. Get them again."
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise OrdMoEModelError(
            f"The weights of {name} have other shapes than its config.json says; the report above lists them. Get the "
            "two from the same place."
        ) from error


def warn_if_slow(options: ModelArguments, dtype: torch.dtype, args: TrainingArguments | None = None) -> None:
    """Say once that this CPU is slow in 16 bits, where a model that is computed in them is on it.

    Args:
        options ([`ModelArguments`]): how it was loaded.
        dtype (`torch.dtype`): that of its weights.
        args ([`~transformers.TrainingArguments`], *optional*): of its training, which may be in mixed precision.
    """
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
    # What to give instead → the 16-bit dtype that is used now.
    used = {f"--{name} false": half for name, half in mixed.items() if args is not None and getattr(args, name)}
    if dtype in mixed.values():
        used["--dtype float32"] = dtype
    if options.load_in_4bit and options.bnb_4bit_compute_dtype in ("bfloat16", "float16"):
        used["--bnb_4bit_compute_dtype float32"] = DTYPES[options.bnb_4bit_compute_dtype]
    slow = max(map(slowdown, used.values()), default=0)
    if slow > WORTH_A_WORD:
        names = " and ".join(sorted({str(half).removeprefix("torch.") for half in used.values()}))
        logger.warning_once(
            f"This CPU has no fast products in {names}: they take {slow:.0f} times what they take in float32. Give "
            f"{' '.join(used)}."
        )


def load_processing_class(options: ModelArguments, trust_remote_code: bool) -> Any:
    """The base's processor, or its tokenizer where it has no other modality."""
    name = options.model_name_or_path
    try:
        processing_class = AutoProcessor.from_pretrained(
            name, revision=options.model_revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OrdMoEModelError(f"No tokenizer or processor can be loaded from {name}: {reason}") from error
    check_processing_class(processing_class, name)
    return processing_class


def load_split(
    name: str | None,
    config: str | None,
    split: str | None,
    streaming: bool = False,
    defaults: Sequence[str] = ("train",),
    option: str = "--dataset_split",
) -> Any:
    """A split of the data set that options name: see [`~ordmoe_peft.data.loading.load_data`]."""
    if name is None:
        raise OrdMoEDataError("No data set: give --dataset_name, a file, a folder or a hub id.")
    return load_data(name, split, config, streaming, defaults=defaults, option=option)


def load_samples(options: SampleArguments) -> Any:
    """The samples that a command is asked to run on."""
    data = (options.dataset_name, options.dataset_config, options.dataset_split)
    dataset = load_split(*data, defaults=options.likely_splits)
    for option in ("group_by", "rating_column"):
        column = getattr(options, option, None)
        if column is not None and column not in dataset.column_names:
            raise OrdMoEDataError(f"{option}={column!r} is not a column; there are {sorted(dataset.column_names)}.")
    return subsample(dataset, options.limit)


def load_subject(model_options: ModelArguments, options: SampleArguments) -> tuple[Any, Any]:
    """The model that a command runs, with its adapter if there is one, and its processing class.

    On the accelerator, if there is one: trainers move their model there, other commands have no trainer.
    """
    check_subject(model_options, options)
    processing_class = load_processing_class(model_options, options.trust_remote_code)
    device_map = {"": torch.accelerator.current_accelerator()} if torch.accelerator.is_available() else None
    model = load_base(model_options, options.trust_remote_code, device_map)
    if device_map is None:
        warn_if_slow(model_options, model.dtype)
    if options.adapter is not None:
        model = PeftModel.from_pretrained(model, options.adapter, ignore_fingerprint=options.ignore_fingerprint)
    return model, processing_class


def tier_cut(model: Any, options: SampleArguments) -> dict[str, Any]:
    """`num_tiers` and `grouping` as asked for, else the adapter's."""
    config = adapter_config(model)
    asked = {"num_tiers": options.num_tiers, "grouping": options.grouping}
    return {name: getattr(config, name) if value is None else value for name, value in asked.items()}
