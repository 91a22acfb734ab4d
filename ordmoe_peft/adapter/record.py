"""`ordmoe.json`: what a saved adapter says of itself beside its weights and PEFT's configuration."""

import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..errors import OrdMoEConfigError


RECORD_NAME = "ordmoe.json"
FORMAT = 1
# The order within factors: PEFT's since 0.19. `lora_A` has an expert's rows together, `lora_B` a rank's columns.
LAYOUT = "peft-fused-1"
PACKAGES = ("ordmoe-peft", "peft", "transformers", "torch")
# Fields that one may edit by hand: they say where the base is and how PEFT wraps it, not what the adapter computes.
EDITABLE = {"base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version"}
# What is read of a record, and its types.
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("base", "base.config", "base.digest", "weights", "settings", "versions"), (dict,)),
    **dict.fromkeys(("base.id", "base.revision"), (str, NoneType)),
    **dict.fromkeys(("base.quantization", "training", "probes"), (dict, NoneType)),
    **dict.fromkeys(("base.digest.routers", "base.digest.embeddings"), (dict, NoneType)),
    **dict.fromkeys(("base.digest.routers.bfloat16", "base.digest.embeddings.bfloat16"), (str, NoneType)),
    **dict.fromkeys(("weights.sha256", "settings.sha256"), (str,)),
    "probes.token_ids": (list, NoneType),
    "probes.log_probs": (dict, NoneType),
}
SETTINGS = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "targets", "num_tiers", "grouping"),
    *("layer_scope", "token_scope", "tier_weights", "rewards", "advantages", "tier_seed"),
)


def write_record(
    folder: Path, base: dict[str, Any], training: dict[str, Any] | None, probes: dict[str, Any] | None
) -> dict[str, Any]:
    """Write `ordmoe.json` beside an adapter's weights and configuration in `folder`, and return it.

    Args:
        folder (`Path`): with both files.
        base (`dict`): [`~ordmoe_peft.adapter.base_record.base_record`].
        training (`dict`, *optional*): objective, data, figures and curves of the run.
        probes (`dict`, *optional*): [`~ordmoe_peft.adapter.probes.make_probes`].
    """
    config = json.loads((folder / CONFIG_NAME).read_text())
    record = {
        "format": FORMAT,
        "layout": LAYOUT,
        "versions": {package: version(package) for package in PACKAGES},
        "base": base,
        "weights": {"sha256": file_hash(folder / SAFETENSORS_WEIGHTS_NAME)},
        "settings": {name: config[name] for name in SETTINGS} | {"sha256": settings_hash(config)},
        "training": training,
        "probes": probes,
    }
    (folder / RECORD_NAME).write_text(_as_text(record))
    return record


def _as_text(record: dict[str, Any]) -> str:
    """JSON, with a list of numbers on one line."""
    text = json.dumps(record, indent=2) + "\n"
    return re.sub(r"\[([-+.\deE,\s]+)\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text)


def file_hash(file: Path) -> str:
    """The SHA-256 of a file's bytes."""
    sha = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def settings_hash(config: dict[str, Any]) -> str:
    """A hash of all settings in `adapter_config.json` but those that one may edit."""
    settings = {name: value for name, value in config.items() if name not in EDITABLE}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_record(record: Any, config: dict[str, Any], file: Path) -> None:
    """See that `ordmoe.json` is of a kind that is known, and of the configuration beside it.

    Raises:
        [`OrdMoEConfigError`]: it is not.
    """
    parts = ("format", "layout", "versions", "base", "weights", "settings", "training", "probes")
    missing = [part for part in parts if not isinstance(record, dict) or part not in record]
    if missing:
        raise OrdMoEConfigError(f"{file} has no {missing[0]!r}: it was not written by ordmoe_peft. Restore it.")
    for path, kinds in KINDS.items():
        part = record
        for name in path.split("."):
            part = None if part is None else part.get(name, Ellipsis)
        if not isinstance(part, kinds):
            found = "no value" if part is Ellipsis else repr(part)
            raise OrdMoEConfigError(f"{file} has {found} as {path}: it was edited or damaged. Restore it.")
    for name, known in (("format", FORMAT), ("layout", LAYOUT)):
        if record[name] != known:
            raise OrdMoEConfigError(
                f"{file} has {name} {record[name]!r}; this version of ordmoe_peft knows {known!r}. Load the adapter "
                f"with the version that wrote it ({record['versions']})."
            )
    settings = record["settings"]
    if settings_hash(config) != settings["sha256"]:
        edited = [
            f"{name} is {config.get(name)!r} there and {settings[name]!r} here"
            for name in SETTINGS
            if config.get(name) != settings[name]
        ]
        raise OrdMoEConfigError(
            f"{file} is of another {CONFIG_NAME}: {edited[0] if edited else 'a setting was changed or removed'}. "
            "Restore the one that was saved. To use other settings, load the adapter and save it again."
        )
