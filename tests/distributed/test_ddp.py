"""Two processes give the trajectory of one with twice the accumulation; none waits for another."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests import text
from tests.distributed import runs
from tests.distributed.comparison import largest_difference
from tests.distributed.processes import run_processes
from tests.models import qwen3_moe
from tests.test_ordmoe import save_base, save_data, train_arguments


# Random groups and responses are drawn by micro-batch of the step, whichever process has it.
REFERENCE = {"adapter": {"grouping": "random"}, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
REFERENCE |= {"router_learning_rate": 1e-1}
GENERATED = {"responses": "generated", "max_completion_length": 5, "objective": "dpo"}


@pytest.mark.parametrize(
    ("settings", "modes"),
    [(REFERENCE, ["sequential", "batched", "auto"]), (GENERATED, ["sequential"])],
    ids=["reference", "generated"],
)
def test_two_processes_are_one_that_accumulates(tmp_path, settings, modes):
    twice = {"gradient_accumulation_steps": 2 * settings.get("gradient_accumulation_steps", 1)}
    alone_settings = settings | twice | {"tier_passes": "sequential"}
    (alone,) = run_processes(runs.train, str(tmp_path), alone_settings, num_processes=1)
    for mode in modes:
        first, second = run_processes(runs.train, str(tmp_path), settings | {"tier_passes": mode})
        assert largest_difference(first, second) == 0
        assert largest_difference(first, alone) < 1e-5
        assert {"tier_1/log_likelihood", "tier_3/log_likelihood", "balance_loss"} <= first["logs"][0].keys()
        assert len({entry["loss"] for entry in first["logs"]}) == 4


@pytest.mark.parametrize("tier_passes", ["sequential", "batched"])
def test_processes_that_differ_do_not_hang(tmp_path, tier_passes):
    """13 samples, 2 a process: for the last step is one. The second process has nothing to learn from.

    Whether prompts are shared is judged at once, and not before the third step: there the first process can share them
    and has a response. In the fourth the second process alone shares them.
    """
    settings = {"max_steps": -1, "num_train_epochs": 1, "dataset": text.conversations(13), "tier_passes": tier_passes}
    settings |= {"adapter": {"token_scope": "response"}}
    first, second = run_processes(runs.train_unevenly, str(tmp_path), settings, timeout=60)
    assert first["verdict"] == second["verdict"] == (tier_passes == "batched", True)
    assert largest_difference(first, second) == 0
    assert len(first["logs"]) == 4
    assert all(math.isfinite(entry["grad_norm"]) for entry in first["logs"])
    assert ["loss" in entry for entry in first["logs"]] == [True, False, True, True]
    assert [entry["grad_norm"] > 0 for entry in first["logs"]] == [True, False, True, True]


def test_checkpoints_are_written_once_and_resumed_from(tmp_path):
    settings = {"adapter": {"grouping": "random"}}
    first, second = run_processes(runs.train_and_save, str(tmp_path), settings)
    assert first["saves"] == second["saves"] == 2
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= names
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed, _ = run_processes(runs.train_from_the_last, str(tmp_path), settings)
    assert [entry["loss"] for entry in resumed["logs"]] == [entry["loss"] for entry in first["logs"]]
    assert all(torch.equal(weight, first["weights"][name]) for name, weight in resumed["weights"].items())


def test_sigterm_to_one_process_ends_all_after_the_same_step(tmp_path):
    first, second = run_processes(runs.terminated, str(tmp_path), timeout=60)
    assert first == second == f"SIGTERM: ended after step 2; checkpoint-2 in {tmp_path} is complete."
    assert {path.name for path in (tmp_path / "checkpoint-2").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


def test_the_command_trains_on_two_processes(tmp_path):
    """What `accelerate launch -m ordmoe train` starts on each process."""
    base, data = save_base(qwen3_moe(), tmp_path / "base"), save_data(text.conversations(), tmp_path / "data")
    arguments = train_arguments(
        base, data, tmp_path / "out", resume_from_checkpoint="auto", per_device_train_batch_size=2
    )
    assert run_processes(runs.command, arguments) == [0, 0]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert json.loads(Path(tmp_path, "out", "train_results.json").read_text())["train_steps"] == 2
    # The first process alone looks into the folder, and all do what it finds.
    assert run_processes(runs.command, arguments) == [0, 0]
    assert run_processes(runs.command, [*arguments, "--seed", "3"]) == [2, 2]
