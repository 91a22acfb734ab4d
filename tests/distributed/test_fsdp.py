"""FSDP2 over two CPU processes gives what one process gives."""

import pytest
import torch

from tests.distributed import runs
from tests.distributed.comparison import largest_difference
from tests.distributed.processes import run_processes


# What `accelerate launch` makes of examples/accelerate/fsdp2.yaml, without mixed precision.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
TWICE = {"gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("settings", "quant_storage", "stack", "activation_checkpointing"),
    [
        (
            {"tier_passes": "batched", "adapter": {"grouping": "random"}, "router_learning_rate": 1e-1},
            *(None, ("DTensor", torch.float32), "true"),
        ),
        ({"tier_passes": "sequential"}, "bfloat16", ("DTensor", torch.bfloat16), "false"),
        ({"tier_passes": "batched", "objective": "dpo"}, "uint8", ("Tensor", torch.uint8), "false"),
        ({"tier_passes": "auto", "optim": "sgd"}, None, ("DTensor", torch.float32), "true"),
    ],
    ids=["dense", "packed", "packed and whole", "measured"],
)
def test_sharded_is_whole(tmp_path, settings, quant_storage, stack, activation_checkpointing):
    environment = FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": activation_checkpointing}
    arguments = (str(tmp_path / "two"), settings, quant_storage)
    first, second = run_processes(runs.train_sharded, *arguments, environment=environment)
    assert first["stack"] == stack
    (alone,) = run_processes(
        runs.train_sharded, str(tmp_path / "one"), settings | TWICE, quant_storage, num_processes=1
    )
    assert largest_difference(first, second) == 0
    assert largest_difference(first, alone) < 1e-5


def test_a_sharded_run_is_resumed(tmp_path):
    """And processes that differ do not hang: each forward waits for parts of the weights from all of them."""
    settings = {"adapter": {"token_scope": "response"}, "tier_passes": "batched"}
    (whole, resumed), second = run_processes(
        runs.sharded_and_resumed, str(tmp_path), settings, environment=FSDP2, timeout=60
    )
    assert all(result["verdict"] == (True, True) for result in (whole, resumed, *second))
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert [entry["loss"] for entry in resumed["logs"]] == [entry["loss"] for entry in whole["logs"]]
    assert largest_difference(resumed, whole) < 1e-6


def test_generated_responses_are_refused(tmp_path):
    said = run_processes(
        runs.refusal, str(tmp_path), {"responses": "generated", "max_completion_length": 4}, environment=FSDP2
    )
    assert all("responses='generated' does not work with FSDP2" in message for message in said)
