"""Write adapters in forms that other tools load."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..errors import OrdMoEConfigError
from .config import OrdMoEConfig


def export_plain_lora(adapter: str | Path, output: str | Path) -> None:
    """Write the adapter in folder `adapter` to folder `output` as a plain LoRA adapter.

    The weights are the same file: OrdMoE trains PEFT's own parameters. Only the configuration changes: `peft_type`
    becomes `LORA` and the fields that [`LoraConfig`] does not have go.

    Raises:
        [`OrdMoEConfigError`]: `adapter` is not a folder with an OrdMoE adapter, or `output` is the same folder.
    """
    adapter, output = Path(adapter), Path(output)
    missing = [name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (adapter / name).is_file()]
    if missing:
        raise OrdMoEConfigError(f"{adapter} is not a saved adapter: it has no {' and no '.join(missing)}.")
    if adapter.resolve() == output.resolve():
        raise OrdMoEConfigError(f"output is the adapter's own folder, {adapter}; choose another.")
    config = json.loads((adapter / CONFIG_NAME).read_text())
    if config.get("peft_type") != "ORDMOE":
        raise OrdMoEConfigError(f"{adapter} holds a {config.get('peft_type')} adapter, not an OrdMoE one.")
    own_fields = {field.name for field in fields(OrdMoEConfig)} - {field.name for field in fields(LoraConfig)}
    plain = {name: value for name, value in config.items() if name not in own_fields} | {"peft_type": "LORA"}
    output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(adapter / SAFETENSORS_WEIGHTS_NAME, output / SAFETENSORS_WEIGHTS_NAME)
    (output / CONFIG_NAME).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
