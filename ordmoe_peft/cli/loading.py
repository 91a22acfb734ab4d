"""Load what options name: models, processors, adapters, data sets."""

from typing import Any

import transformers
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from ..errors import OrdMoEDataError
from .arguments import ModelArguments


def load_base(options: ModelArguments, trust_remote_code: bool) -> PreTrainedModel:
    """The base model, of the class that its checkpoint names."""
    shared = {"revision": options.model_revision, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(options.model_name_or_path, **shared)
    architecture = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
    return architecture.from_pretrained(
        options.model_name_or_path,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        quantization_config=options.quantization_config(),
        **shared,
    )


def load_processing_class(options: ModelArguments, trust_remote_code: bool) -> Any:
    """The base's processor, or its tokenizer where it has no other modality."""
    return AutoProcessor.from_pretrained(
        options.model_name_or_path, revision=options.model_revision, trust_remote_code=trust_remote_code
    )


def load_adapter(model: PreTrainedModel, adapter: str) -> PeftModel:
    """`model` with the adapter at `adapter` (folder or hub id) on it."""
    return PeftModel.from_pretrained(model, adapter)


def load_split(name: str | None, config: str | None, split: str, streaming: bool = False) -> Any:
    """A split of a data set (folder or hub id)."""
    if name is None:
        raise OrdMoEDataError("No data set: give --dataset_name, a folder or a hub id.")
    return load_dataset(name, config, split=split, streaming=streaming)
