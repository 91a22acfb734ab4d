"""What is recorded of a run: its settings, data, figures and curves, and no number that JSON cannot hold."""

import json
import math

import pytest
from datasets import Dataset, load_dataset
from transformers import TrainerState

from ordmoe_peft import OrdMoETrainingArguments
from ordmoe_peft.training.run_summary import data_source, run_summary, thinned


def arguments(**changes) -> OrdMoETrainingArguments:
    settings = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    return OrdMoETrainingArguments("/home/me/run", **(settings | changes))


def state_of(history, steps=50) -> TrainerState:
    return TrainerState(epoch=0.5, global_step=steps, log_history=history)


def entry(step, loss=0.5, **more):
    return {"step": step, "epoch": step / 100, "loss": loss, "grad_norm": 1.0, "num_tokens": 100.0 * step, **more}


def test_a_whole_run():
    args = arguments(per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-3, erl_coef=0.02)
    history = [
        {"step": 0, "eval_loss": 2.0, "eval_tier_1/log_likelihood": -0.5, "eval_runtime": 1.0},
        *(entry(step, **{"tier_1/log_likelihood": -1 / step, "tier_1/log_likelihood_no_eos": -1}) for step in (10, 50)),
        {"step": 50, "eval_loss": 1.0, "eval_tier_1/log_likelihood": -0.25},
        {"step": 50, "train_runtime": 25.0, "train_loss": 0.123456789},
    ]
    data = {"name": "questions", "rows": 8}
    summary = run_summary(state_of(history), args, data, num_tiers=3)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["data"] == data
    assert summary["objective"]["objective"] == "erl"
    assert (summary["objective"]["erl_coef"], summary["objective"]["responses"]) == (0.02, "reference")
    assert "temperature" not in summary["objective"]
    assert (summary["settings"]["batch_size"], summary["settings"]["learning_rate"]) == (8, 1e-3)
    figures = summary["figures"]
    assert (figures["steps"], figures["tokens"], figures["mean_loss"]) == (50, 5000, 0.123457)
    assert (figures["seconds"], figures["seconds_per_step"]) == (25, 0.5)
    assert figures["peak_memory_bytes"] > 1e7
    assert summary["curves"][0] == {"step": 10, "loss": 0.5, "tier_1/log_likelihood": -0.1}
    assert summary["curves"][-1]["step"] == 50
    before, after = summary["evaluations"]
    assert before == {"of": "base", "step": 0, "metrics": {"loss": 2, "tier_1/log_likelihood": -0.5}}
    assert after == {"of": "adapter", "step": 50, "metrics": {"loss": 1, "tier_1/log_likelihood": -0.25}}
    assert "/home" not in json.dumps(summary)


def test_what_no_process_knows_and_what_has_no_effect_is_left_out():
    history = [entry(10, loss=math.nan), {"step": 50, "train_runtime": 5.0, "train_loss": math.inf}]
    summary = run_summary(state_of(history), arguments(), {}, num_tiers=1, is_resumed=True)
    assert summary["objective"] == {"ntp_coef": 1.0, "balance_coef": 0.001}
    assert "seconds" not in summary["figures"]
    assert summary["figures"]["mean_loss"] is summary["curves"][0]["loss"] is None
    empty = run_summary(TrainerState(), arguments(responses="generated", temperature=0.7), {}, num_tiers=3)
    assert (empty["curves"], empty["evaluations"], empty["figures"]["steps"]) == ([], [], 0)
    assert empty["objective"]["temperature"] == 0.7


@pytest.mark.parametrize("count", [0, 1, 10, 11, 12, 1000])
def test_curves_are_thinned_evenly(count):
    points = thinned(list(range(count)))
    assert len(points) == min(count, 11)
    assert points == sorted(set(points))
    assert not count or (points[0], points[-1]) == (0, count - 1)


def test_data_say_what_they_are(tmp_path):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"]})
    assert data_source(rows) == {"rows": 2, "columns": ["prompt", "completion"]}
    folder = tmp_path / "questions"
    rows.to_parquet(folder / "train.parquet")
    loaded = {"name": "questions", "split": "train", "rows": 2, "columns": ["prompt", "completion"]}
    assert data_source(load_dataset(str(folder), split="train")) == loaded
    stream = data_source(load_dataset(str(folder), split="train", streaming=True))
    assert (stream["name"], stream["split"]) == ("questions", "train")
    assert "rows" not in stream
    assert data_source(None) == {}
