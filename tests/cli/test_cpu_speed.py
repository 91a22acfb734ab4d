"""What a CPU without 16-bit instructions is told."""

from types import SimpleNamespace

import pytest
import torch

from ordmoe_peft.cli import cpu_speed, loading
from ordmoe_peft.cli.arguments import ModelArguments
from ordmoe_peft.cli.loading import warn_if_slow


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("options", "dtype", "mixed", "instead"),
    [
        ({}, FP32, {"bf16": True, "fp16": False}, "--bf16 false."),
        ({}, BF16, {"bf16": True, "fp16": False}, "--bf16 false --dtype float32."),
        ({}, BF16, {"bf16": False, "fp16": False}, "--dtype float32."),
        ({}, torch.float16, None, "--dtype float32."),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
            FP32,
            {"bf16": False, "fp16": False},
            "--bnb_4bit_compute_dtype float32.",
        ),
        ({}, FP32, {"bf16": False, "fp16": False}, None),
        ({}, FP32, None, None),
    ],
)
@pytest.mark.parametrize("times", [30.0, 0.4])
def test_what_decides_is_named(monkeypatch, options, dtype, mixed, instead, times):
    said = []
    monkeypatch.setattr(loading.logger, "warning_once", said.append)
    monkeypatch.setattr(loading, "slowdown", lambda dtype: times)
    warn_if_slow(ModelArguments("base", **options), dtype, None if mixed is None else SimpleNamespace(**mixed))
    if instead is None or times < 1:
        assert said == []
    else:
        (message,) = said
        assert "30 times" in message and message.endswith(f"Give {instead}")


def test_slowdown_is_a_ratio_of_times(monkeypatch):
    cpu_speed.slowdown.cache_clear()
    monkeypatch.setattr(cpu_speed, "_seconds", {BF16: 3.0, FP32: 0.5}.__getitem__)
    assert cpu_speed.slowdown(BF16) == 6
    assert "a product in bf16 takes 6.0 times" in cpu_speed.describe_cpu()
    cpu_speed.slowdown.cache_clear()
