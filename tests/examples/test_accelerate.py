"""The accelerate configurations say what accelerate reads."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from tests.distributed.test_deepspeed import ZERO2
from tests.distributed.test_fsdp import FSDP2


FOLDER = Path("examples/accelerate")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero2", "DEEPSPEED"), ("deepspeed_zero3", "DEEPSPEED")],
)
def test_accelerate_reads_each(name, kind):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == DistributedType(kind)
    assert config.num_processes == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_the_tests_of_deepspeed_run_its_settings(stage):
    settings = yaml.safe_load((FOLDER / f"deepspeed_zero{stage}.yaml").read_text())["deepspeed_config"]
    assert settings["zero_stage"] == stage
    for name in ("gradient_accumulation_steps", "gradient_clipping"):
        assert settings[name] == ZERO2[f"ACCELERATE_{name.upper()}"]


def test_the_tests_of_fsdp_run_its_settings():
    settings = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())["fsdp_config"]
    for name, value in FSDP2.items():
        if name.startswith("FSDP_"):
            assert str(settings[name.lower()]).lower() == value.lower()
