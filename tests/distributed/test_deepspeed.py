"""DeepSpeed ZeRO-2 and ZeRO-3 over two CPU processes give what DDP gives, and what they cannot do is refused.

Needs `pip install deepspeed`, and a C++ compiler and ninja: DeepSpeed builds its exchange between CPU processes when it
first runs, which takes a minute.
"""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests import models
from tests.distributed import runs
from tests.distributed.comparison import largest_difference
from tests.distributed.processes import run_processes


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed"
)
# What `accelerate launch` makes of examples/accelerate/deepspeed_zero2.yaml, without mixed precision. accelerate does
# not use DeepSpeed where it is told that a run is on CPU, so the backend alone says so.
ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
    "ACCELERATE_GRADIENT_CLIPPING": "auto",
    "ACCELERATE_USE_CPU": "false",
    "DS_ACCELERATOR": "cpu",
}
ON_CPU = {"use_cpu": False, "ddp_backend": "gloo"}
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


@pytest.fixture
def zero3(tmp_path):
    """The environment of ZeRO-3 that shares out every weight, however small, and frees it at once."""
    stage3 = {"param_persistence_threshold": 0, "max_live_parameters": 0, "max_reuse_distance": 0}
    stage3 |= {"prefetch_bucket_size": 0, "gather_16bit_weights_on_model_save": True}
    zero = {"stage": 3} | {f"stage3_{name}": value for name, value in stage3.items()}
    configuration = {"zero_optimization": zero, "bf16": {"enabled": "auto"}} | dict.fromkeys(AUTO, "auto")
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(configuration))
    return ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


def with_deepspeed(function, folder, settings, *arguments, environment=ZERO2):
    """What `function` returns on both processes alike."""
    arguments = (str(folder), settings | ON_CPU, *arguments)
    first, second = run_processes(function, *arguments, environment=environment, timeout=300)
    assert largest_difference(first, second) == 0
    return first


@pytest.mark.parametrize(
    ("settings", "is_packed"),
    [
        (
            {"adapter": {"grouping": "random"}, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
            | {"router_learning_rate": 1e-1},
            False,
        ),
        ({"objective": "dpo", "max_grad_norm": 0.5}, True),
        ({"responses": "generated", "max_completion_length": 5}, False),
    ],
    ids=["dense", "packed", "generated"],
)
def test_zero2_is_ddp(tmp_path, settings, is_packed):
    zero2 = with_deepspeed(runs.train_in_full_precision, tmp_path / "zero2", settings, is_packed)
    batched = settings | {"tier_passes": "batched"}
    ddp, _ = run_processes(runs.train_in_full_precision, str(tmp_path / "ddp"), batched, is_packed)
    assert (zero2["kind"], ddp["kind"]) == ("DEEPSPEED", "MULTI_CPU")
    assert largest_difference(zero2, ddp) < 1e-5
    assert len({entry["loss"] for entry in zero2["logs"]}) == 4


@pytest.mark.parametrize(
    "settings",
    [{"adapter": {"grouping": "random"}, "router_learning_rate": 1e-1}, {"objective": "dpo"}],
    ids=["erl", "dpo"],
)
def test_zero3_is_ddp(tmp_path, zero3, settings):
    settings = settings | {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "balance_coef": 0.01}
    shared = with_deepspeed(runs.train_in_full_precision, tmp_path / "zero3", settings, True, environment=zero3)
    batched = settings | {"tier_passes": "batched"}
    ddp, _ = run_processes(runs.train_in_full_precision, str(tmp_path / "ddp"), batched, True)
    assert (shared["kind"], ddp["kind"]) == ("DEEPSPEED", "MULTI_CPU")
    assert largest_difference(shared, ddp) < 1e-4  # of the gradients' norm


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_is_resumed(tmp_path, zero3, stage):
    settings = {"adapter": {"grouping": "random"}, "gradient_checkpointing": True}
    environment = zero3 if stage == 3 else ZERO2
    whole = with_deepspeed(runs.train_and_save, tmp_path, settings, True, environment=environment)
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert len(saved) == len(whole["weights"])
    for name, weight in whole["weights"].items():
        assert torch.equal(saved[name.replace(".default", "")], weight)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = with_deepspeed(runs.resume, tmp_path, settings, environment=environment)
    assert [entry["loss"] for entry in resumed["logs"]] == [entry["loss"] for entry in whole["logs"]]
    assert largest_difference(resumed, whole) == 0


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_steps_that_are_not_finite_are_dropped(tmp_path, zero3, stage, bf16):
    settings = {"bf16": bf16, "gradient_checkpointing": True}
    environment = zero3 if stage == 3 else ZERO2
    result = with_deepspeed(runs.train_poisoned, tmp_path, settings, True, environment=environment)
    first, second, third, fourth = result["after"]
    assert torch.equal(first, second) and torch.equal(second, third)
    assert not torch.equal(third, fourth) and fourth.isfinite().all()
    assert result["counts"]["nonfinite_steps"] == 2
    assert ["loss" in entry for entry in result["logs"]] == [True, False, False, True]
    assert [entry["learning_rate"] for entry in result["logs"]] == [1e-2, 7.5e-3, 7.5e-3, 7.5e-3], "the schedule waits"


def test_a_step_without_responses_ends_training(tmp_path):
    """Adam's momentum moves the weights in it. Before it, processes that differ do not hang."""
    settings = {"adapter": {"token_scope": "response"}} | ON_CPU
    for said in run_processes(runs.end_of_uneven_training, str(tmp_path), settings, environment=ZERO2):
        assert "Training ends at step 2: no process had a response" in said
        assert "DeepSpeed has updated the weights all the same" in said


def test_what_zero3_cannot_do_is_refused(tmp_path, zero3):
    models.qwen3_moe().save_pretrained(tmp_path)
    settings = {"gradient_checkpointing": True} | ON_CPU
    for once, model in run_processes(runs.refusals_of_zero3, str(tmp_path), settings, environment=zero3):
        assert "gradient_checkpointing=False does not work with DeepSpeed ZeRO-3" in once
        assert "Qwen3MoeForCausalLM were shared out by DeepSpeed ZeRO-3 as it was loaded" in model
