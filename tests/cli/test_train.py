# ruff: noqa: F811 (fixtures)
"""`ordmoe train`: what decides the adapter, and what becomes of runs and recipes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from subprocess import PIPE

import pytest
import torch
from safetensors.torch import load_file

from ordmoe import main
from ordmoe_peft import OrdMoETrainer
from ordmoe_peft.training.run_files import METRICS_NAME
from ordmoe_peft.training.run_record import RECORD_NAME, RunFolder
from tests import models
from tests.test_ordmoe import base, data, error_of, save_base, train_arguments  # noqa: F401 (fixtures)
from tests.training.test_run_files import metrics


def test_the_seed_decides_the_adapter(base, data, tmp_path):
    """Its first factors, too, whatever state the process was in."""
    states = []
    for run, seed in enumerate((7, 7, 8)):
        torch.manual_seed(100 + run)
        assert main(train_arguments(base, data, tmp_path / str(run), seed=seed)) == 0
        states.append(load_file(tmp_path / str(run) / "adapter_model.safetensors"))
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first[min(first)], other[min(first)])


def test_the_experts_that_are_asked_for(base, data, tmp_path):
    """One projection of the most-used ones, with a rank of their own."""
    layers = [{"layer": layer, "utilisation": [0.0, 1.0, 3.0] + [0.8] * 5} for layer in range(models.NUM_LAYERS)]
    (tmp_path / "inspect.json").write_text(json.dumps({"layers": layers}))
    options = {"expert_selection": tmp_path / "inspect.json", "expert_share": 0.5, "expert_rank": "r/K"}
    arguments = train_arguments(base, data, tmp_path / "out", **options)
    assert main([*arguments, "--targets", "router", "experts.down"]) == 0
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["targets"] == ["router", "experts.down"]
    assert saved["expert_rank"] == 4 // models.TOP_K
    assert saved["expert_selection"] == {layer: [1, 2] for layer in "012"}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    of_experts = [tensor for name, tensor in tensors.items() if ".experts.lora_A" in name]
    for A in of_experts:
        assert A.view(models.NUM_EXPERTS, -1).any(1).tolist() == [expert in (1, 2) for expert in range(8)]
    assert len(of_experts) == models.NUM_LAYERS and not any("base_layer" in name for name in tensors)


class TestRuns:
    """A run that ends in nothing says so; one that is there is gone on with, or left alone."""

    def test_weights_that_are_not_finite(self, data, tmp_path, capsys):
        model = models.qwen3_moe()
        model.model.norm.weight.data[:] = torch.nan
        folder = save_base(model, tmp_path / "broken")
        out = tmp_path / "out"
        error = error_of(capsys, train_arguments(folder, data, out, save_strategy="steps", save_steps=1))
        assert "2 of 2 steps did not move the weights: 2 with a loss or gradient that was not finite" in error
        assert not RunFolder(out).results

    def test_a_learning_rate_that_wrecks_the_adapter(self, base, data, tmp_path, capsys):
        changes = {"learning_rate": 1e30, "max_steps": 6, "lr_scheduler_type": "constant"}
        assert "of 6 steps did not move the weights" in error_of(
            capsys, train_arguments(base, data, tmp_path / "out", **changes)
        )
        assert not (tmp_path / "out" / "adapter_model.safetensors").exists()

    @pytest.mark.parametrize("saves", ["steps", "no"])
    def test_a_finished_run_is_left_alone(self, base, data, tmp_path, capsys, saves):
        out = tmp_path / "out"
        again = train_arguments(base, data, out, save_strategy=saves, resume_from_checkpoint="auto")
        assert main(again) == 0
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert main(again) == 0
        assert f"The run in {out} is already finished." in capsys.readouterr().out
        assert "learning_rate" in error_of(capsys, [*again, "--learning_rate", "0.3"])
        assert "has results of an earlier run" in error_of(capsys, train_arguments(base, data, out))
        after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
        assert after == before
        assert main(train_arguments(base, data, out, overwrite_output_dir=True, learning_rate=0.3)) == 0
        assert json.loads((out / RECORD_NAME).read_text())["settings"]["learning_rate"] == 0.3

    def test_a_run_killed_before_it_saved_its_adapter_is_ended(self, base, data, tmp_path, capsys):
        out = tmp_path / "out"
        again = train_arguments(base, data, out, save_strategy="steps", resume_from_checkpoint="auto")
        assert main(again) == 0
        adapter = (out / "adapter_model.safetensors").read_bytes()
        record = json.loads((out / RECORD_NAME).read_text())
        del record["finished"]
        (out / RECORD_NAME).write_text(json.dumps(record))
        (out / "adapter_model.safetensors").unlink()
        assert main(again) == 0
        assert "already finished" not in capsys.readouterr().out
        assert (out / "adapter_model.safetensors").read_bytes() == adapter
        assert "train_loss" not in json.loads((out / "train_results.json").read_text())  # no step was taken

    def test_a_finished_run_may_be_made_longer(self, base, data, tmp_path):
        again = train_arguments(base, data, tmp_path, save_strategy="steps", resume_from_checkpoint="auto")
        assert main(again) == 0
        assert main([*again, "--max_steps", "3"]) == 0
        assert json.loads((tmp_path / "train_results.json").read_text())["train_steps"] == 3


def test_no_token_in_the_report(base, data, tmp_path, capsys):
    arguments = train_arguments(base, data, tmp_path / "out", report=tmp_path / "report", max_steps=1)
    assert main([*arguments, "--model_init_kwargs", '{"token": "hf_abcdefghijklmnopqrstuvwx"}']) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "model_init_kwargs" in page and "hf_abc" not in page + capsys.readouterr().out


def test_experts_in_ram(base, data, tmp_path, capsys):
    """The same adapter, evaluation and states as with experts on the device; a run may change from one to the other."""
    options = {"load_in_4bit": True, "gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 1}
    adapters = []
    for begins, ends in ((False, False), (True, True), (False, True)):
        folder = tmp_path / f"{begins}-{ends}"
        assert main(train_arguments(base, data, folder, offload_experts=begins, **options)) == 0
        options_now = options | {"max_steps": 4, "resume_from_checkpoint": "auto"}
        assert main(train_arguments(base, data, folder, offload_experts=ends, **options_now)) == 0
        adapters.append([path.read_bytes() for path in sorted(folder.rglob("adapter_model.safetensors"))])
    assert len(adapters[0]) == 5
    assert adapters[0] == adapters[1] == adapters[2]

    results = {}
    for in_ram in (False, True):
        output = tmp_path / f"{in_ram}.json"
        arguments = ["evaluate", "--model_name_or_path", base, "--dataset_name", data, "--max_new_tokens", 1]
        arguments += ["--adapter", tmp_path / "True-True", "--load_in_4bit", True, "--offload_experts", in_ram]
        assert main([*map(str, arguments), "--output_file", str(output)]) == 0
        results[in_ram] = output.read_text()
    assert results[True] == results[False]
    assert "set --load_in_4bit true" in error_of(
        capsys, train_arguments(base, data, tmp_path / "dense", offload_experts=True)
    )


def test_rewards_that_rise(base, data, tmp_path, capsys):
    arguments = [*train_arguments(base, data, tmp_path / "out"), "--rewards", "0", "0.5", "1"]
    assert "rewards must be finite and not rise" in error_of(capsys, arguments)


def test_unknown_options_in_a_recipe(base, data, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_teirs: 3\n")
    error = error_of(capsys, [*train_arguments(base, data, tmp_path / "out"), "--config", str(recipe)])
    assert "num_teirs" in error


class TestInterruptions:
    def test_sigterm_to_a_process(self, base, data, tmp_path, capsys):
        """A checkpoint, the exit status that shells have for it, and the command that goes on; to the same losses."""
        out = tmp_path / "out"
        options = {"logging_steps": 1, "lr_scheduler_type": "constant", "save_strategy": "no"}
        words = train_arguments(base, data, out, **options, max_steps=10**6)
        as_here = {**os.environ, "OMP_NUM_THREADS": "1"}  # the number of threads decides the last bits
        command = [sys.executable, "-m", "ordmoe", *words]
        process = subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=as_here)
        while process.poll() is None and not ((out / METRICS_NAME).is_file() and metrics(out)):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
        assert process.returncode == 143, said
        line = said.splitlines()[-1]
        (step,) = {int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*")}
        assert f"SIGTERM: ended after step {step}; checkpoint-{step} in {out} is complete. To go on: " in line
        assert "Traceback" not in said
        command = shlex.split(line.partition("To go on: ")[2])
        last = ["--max_steps", str(step + 2)]
        assert main([*command[1:], *last]) == 0
        assert f"ordmoe verify {out}\n" in capsys.readouterr().out
        assert main([*train_arguments(base, data, tmp_path / "whole", **options), *last]) == 0
        ended, whole = ([entry.get("loss") for entry in metrics(folder)] for folder in (out, tmp_path / "whole"))
        assert ended == whole and len(whole) == step + 3

    def test_sigterm_waits_until_the_results_are_saved(self, base, data, tmp_path, monkeypatch):
        save = OrdMoETrainer.save_model

        def interrupted_save(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return save(*args, **kwargs)

        monkeypatch.setattr(OrdMoETrainer, "save_model", interrupted_save)
        out = tmp_path / "out"
        with pytest.raises(SystemExit) as end:
            main(train_arguments(base, data, out, save_strategy="no"))
        assert end.value.code == 143
        assert RunFolder(out).is_finished(("steps", 2)) and (out / "train_results.json").is_file()

    @pytest.mark.parametrize(
        ("saves", "saved"),
        [({}, "nothing is saved yet"), ({"save_steps": 1}, "the last checkpoint is {}/checkpoint-1")],
    )
    def test_ctrl_c(self, base, data, tmp_path, capsys, monkeypatch, saves, saved):
        def interrupt(trainer, logs, start_time=None):
            raise KeyboardInterrupt if trainer.state.global_step == 2 else None

        out = tmp_path / "my run"
        words = train_arguments(base, data, out, max_steps=3, logging_steps=2, save_strategy="steps", **saves)
        with monkeypatch.context() as patched:
            patched.setattr(OrdMoETrainer, "log", interrupt)
            assert main(words) == 130
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"Interrupted after step 2; {saved.format(out)}." in line
        assert main(shlex.split(line.partition("To go on: ")[2])[1:]) == 0
