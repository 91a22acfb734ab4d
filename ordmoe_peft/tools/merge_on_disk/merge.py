"""Merging an adapter into a checkpoint, on disk: a shard and a stack are all that is in memory.

The adapter is attached to a model without weights. Then, stack by stack, the tensors of the checkpoint become the
parameter that they make, PEFT's layers merge into it, and it goes back to the names and layout that it was read under.
Tensors that the adapter does not change are copied, even those that transformers does not know. A base that this
package saved in 4 bits becomes dense as a whole, under the names of the model's parameters.

By default the deltas are added to the weights as they are stored. An adapter that was trained on a base in 4 bits saw
other weights; `quantization_config` rounds the base through the recipe that it was trained with first, so that the
merged model computes what was trained. `requantize` packs the merged weights again, and then the output is what
`save_pretrained` of such a model writes.
"""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.utils import CONFIG_NAME, logging
from transformers.utils.hub import convert_file_size_to_int

from ...adapter.base_record import hashed_tensors
from ...adapter.config import OrdMoEConfig
from ...errors import OrdMoEConfigError, OrdMoEModelError
from ...files import whole_folder
from ...merging.delta_retention import RequantizationReport
from ...quantization.config import QUANT_METHOD, MoeBitsAndBytesConfig
from ...quantization.quantizer import MoeBnb4BitHfQuantizer
from .card import model_card
from .checkpoint import Checkpoint, ShardWriter, checkpoint_folder, files_beside, open_checkpoint
from .parameter_sources import find_sources, read_parameters
from .units import UnitMerger, plan_units
from .weightless_model import WeightlessModel, meta_model


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class MergeSummary:
    """What merging on disk did.

    Args:
        base (`str`): the base.
        merged (`int`), rounded (`int`): parameters that the adapter changed, that were rounded to 4 bits first.
        copied (`int`): tensors that were copied.
        shards (`int`), num_bytes (`int`): what was written.
        report ([`RequantizationReport`], *optional*): with `requantize`, what that left of each delta.
    """

    base: str
    merged: int
    rounded: int
    copied: int
    shards: int
    num_bytes: int
    report: RequantizationReport | None


@dataclass(frozen=True)
class MergeOptions:
    """How [`merge_checkpoint`] merges.

    Args:
        base (`str` or `Path`, *optional*): folder or hub id of the base, dense or saved in 4 bits by this package; the
            one that the adapter names, by default.
        revision (`str`, *optional*): branch, tag or commit of the base on the hub.
        quantization_config ([`MoeBitsAndBytesConfig`], *optional*): round the base's weights through this recipe before
            the deltas are added, as loading with it would; the output is dense unless `requantize` is set. The weights
            as they are stored, by default.
        requantize (`bool`, defaults to `False`): pack the merged weights again, by `quantization_config` or as the base
            is stored. `from_pretrained` loads the output where this package is imported.
        dtype (`torch.dtype`, *optional*): of the floating-point tensors that are written; each one's own by default, or
            that of the base's configuration where it is stored in 4 bits.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): bytes in a shard, unless a single stack has more.
        trust_remote_code (`bool`, defaults to `False`): run model code that comes with the base.
        ignore_fingerprint (`bool`, defaults to `False`): merge into another base than the adapter's, with a warning.
        progressbar (`bool`, defaults to `False`): show one bar for the tensors.
    """

    base: str | Path | None = None
    revision: str | None = None
    quantization_config: MoeBitsAndBytesConfig | None = None
    requantize: bool = False
    dtype: torch.dtype | None = None
    max_shard_size: int | str = "5GB"
    trust_remote_code: bool = False
    ignore_fingerprint: bool = False
    progressbar: bool = False


def merge_checkpoint(adapter: str | Path, output: str | Path, options: MergeOptions | None = None) -> MergeSummary:
    """Write the base with the adapter merged into it to `output`, which `from_pretrained` loads.

    Memory holds one shard of the output and one fused stack at a time, in the dtype that is written, beside pages of
    the files that are read. Deltas of experts are added an expert at a time, in float32; all merged weights are checked
    for NaN and infinity. The base is only read, and `output` appears when it is complete.

    Args:
        adapter (`str` or `Path`): folder or hub id of an OrdMoE adapter.
        output (`str` or `Path`): folder to write to; must not exist, or be empty.
        options ([`MergeOptions`], *optional*): into which base, and how.

    Raises:
        [`OrdMoEConfigError`]: `adapter` is no OrdMoE adapter, `output` is taken, or `requantize` has no recipe.
        [`OrdMoEModelError`]: the base is another one than the adapter's, is quantised by others, or is
            stored in a form that cannot be written back; or a merged weight is not finite.
    """
    output, options = Path(output), options or MergeOptions()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OrdMoEConfigError(f"output {output} exists already, and is left as it is. Choose another folder.")
    shard_size = _shard_size(options.max_shard_size)
    config = _adapter_config(adapter)
    base = options.base or config.base_model_name_or_path
    if not base:
        raise OrdMoEConfigError(f"{adapter} does not name its base: give `base` (`--model_name_or_path`).")
    checkpoint = open_checkpoint(checkpoint_folder(base, options.revision))
    stored = stored_recipe(checkpoint.folder)
    _check_recipes(str(adapter), config, str(base), stored, options)
    merger = _prepared(checkpoint, adapter, stored, options)
    with whole_folder(output) as unfinished:
        writer = ShardWriter(unfinished, shard_size)
        for unit in tqdm(merger.units, disable=not options.progressbar, desc="Merging"):
            writer.add(merger.merged(unit))
        writer.close()
        quantizer = merger.quantizer if options.requantize else None
        _copy_files_beside(checkpoint.folder, unfinished, options.dtype, quantizer)
        card = model_card(str(base), str(adapter), config, options.quantization_config, merger.report)
        card.save(unfinished / "README.md")
    return MergeSummary(
        base=str(base),
        merged=len(merger.model.adapted),
        rounded=len(merger.rounded),
        copied=sum(len(unit.names) for unit in merger.units if not unit.sources),
        shards=len(writer.shards),
        num_bytes=writer.total_size,
        report=merger.report,
    )


def _prepared(
    checkpoint: Checkpoint, adapter: str | Path, stored: MoeBitsAndBytesConfig | None, options: MergeOptions
) -> UnitMerger:
    """All that is settled from names and shapes alone, before the first weight is read."""
    bare = meta_model(checkpoint.folder, options.trust_remote_code)
    skeleton = meta_model(checkpoint.folder, options.trust_remote_code)
    recipe, quantizer = stored or options.quantization_config, None
    if recipe is not None:
        quantizer = MoeBnb4BitHfQuantizer(recipe, pre_quantized=stored is not None)
        quantizer.preprocess_model(model=skeleton, device_map=None)
    in_4_bits = set() if quantizer is None else set(quantizer.packed_names(skeleton))
    sources = find_sources(skeleton, checkpoint.tensors, quantizer if stored else None)
    known = read_parameters(checkpoint, [sources[name] for name in hashed_tensors(bare) if name in sources])
    bare.config.quantization_config = recipe
    with warnings.catch_warnings():  # of dense against 4 bits; `_check_recipes` has said which option helps
        warnings.filterwarnings("ignore", message="The adapter in .* was trained on a base that was")
        model = WeightlessModel(bare, adapter, known, options.ignore_fingerprint)
    # A model in 4 bits is stored under its own names; a dense base that becomes one changes the names of all tensors.
    renamed = set() if stored or not options.requantize else set(sources)
    unpacked = set() if options.requantize else in_4_bits
    return UnitMerger(
        checkpoint,
        model,
        plan_units(checkpoint, model, sources, renamed | unpacked),
        quantizer,
        rounded=set() if stored else in_4_bits,
        stored_packed={name for source in sources.values() if source.is_packed for name in source.names},
        dtype=options.dtype,
        report=RequantizationReport() if options.requantize else None,
    )


def _check_recipes(
    adapter: str, config: OrdMoEConfig, base: str, stored: MoeBitsAndBytesConfig | None, options: MergeOptions
) -> None:
    """See that at most one recipe is given, and one where it is needed; warn where only training had one."""
    if stored is not None and options.quantization_config is not None:
        raise OrdMoEConfigError(
            f"{base} is stored in 4 bits already: leave `quantization_config` (`load_in_4bit`) out."
        )
    if stored is not None or options.quantization_config is not None:
        return
    if options.requantize:
        raise OrdMoEConfigError(
            f"requantize needs the recipe: {base} is stored dense, so give `quantization_config` (`load_in_4bit`)."
        )
    if config.base_quantization is not None:
        kinds = (config.base_quantization.get(name) for name in ("quant_method", "bnb_4bit_quant_type"))
        in_short = ", ".join(str(kind) for kind in kinds if kind is not None)
        logger.warning(
            f"{adapter} was trained on its base quantised by {in_short}, and is now merged into the weights as they "
            "are stored. Give the recipe (`load_in_4bit` and its fields) to merge into what training saw."
        )


def _shard_size(size: int | str) -> int:
    try:
        return convert_file_size_to_int(size)
    except ValueError as error:
        raise OrdMoEConfigError(f"max_shard_size={size!r} is not a size: give bytes, or such as '5GB'.") from error


def _adapter_config(adapter: str | Path) -> OrdMoEConfig:
    config = OrdMoEConfig.from_pretrained(str(adapter))
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name):
            raise OrdMoEConfigError(
                f"{adapter} was trained with {name}={getattr(config, name)!r}, which merging on disk does not carry "
                "over. Load the base and the adapter, and use `merge_and_unload`."
            )
    return config


def stored_recipe(folder: Path) -> MoeBitsAndBytesConfig | None:
    """How the base is stored in 4 bits, or `None` where it is dense.

    Raises:
        [`OrdMoEModelError`]: it is quantised by something else.
    """
    recipe = json.loads((folder / CONFIG_NAME).read_text()).get("quantization_config")
    if recipe is None:
        return None
    if recipe.get("quant_method") != QUANT_METHOD:
        raise OrdMoEModelError(
            f"{folder} is quantised by {recipe.get('quant_method')!r}, which merging on disk does not read. Dequantise "
            "it first: load it with transformers, `model.dequantize()`, and save it."
        )
    return MoeBitsAndBytesConfig.from_dict(recipe)


def _copy_files_beside(
    folder: Path, output: Path, dtype: torch.dtype | None, quantizer: MoeBnb4BitHfQuantizer | None
) -> None:
    """Copy all but weights; the configuration says that the merged model is dense, or packed by `quantizer`."""
    for path in files_beside(folder):
        shutil.copyfile(path, output / path.name)

    def with_dtype(part: dict) -> dict:
        return part | dict.fromkeys(part.keys() & {"dtype", "torch_dtype"}, str(dtype).removeprefix("torch."))

    text = (output / CONFIG_NAME).read_text()
    # The hook sees the configurations inside this one, too.
    config = json.loads(text, object_hook=None if dtype is None else with_dtype)
    config.pop("quantization_config", None)
    if quantizer is not None:
        config["quantization_config"] = quantizer.quantization_config.to_dict()
    if config != json.loads(text):
        (output / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
