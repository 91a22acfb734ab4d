"""Models that bring their own code, each in a folder of its own, as `trust_remote_code=True` loads them."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families.tiny import tiny_model


CODE = Path(__file__).parent / "tiny_moe"


@pytest.fixture(scope="session")
def folder_of(code_cache, tmp_path_factory):
    """The folder of a layout's model: its code, configuration and random weights, made once."""
    folders: dict[str, Path] = {}

    def folder(layout: str) -> Path:
        if layout not in folders:
            config = AutoConfig.from_pretrained(CODE, trust_remote_code=True, layout=layout)
            model = tiny_model(lambda config: AutoModelForCausalLM.from_config(config, trust_remote_code=True), config)
            folders[layout] = tmp_path_factory.mktemp("remote") / layout
            model.save_pretrained(folders[layout])  # with its code
        return folders[layout]

    return folder
