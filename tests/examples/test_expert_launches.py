"""How many operations a layer of Qwen3-30B-A3B may take on a GPU."""

from dataclasses import replace

import pytest
import torch

from examples.benchmarks.expert_launches import DECODING, LAYERS, count_decoding, count_step
from ordmoe_peft.experts.tuning import ON_CPU, on_gpu


@pytest.mark.parametrize(
    ("name", "most_forward", "most_backward"),
    [
        ("Qwen3-30B-A3B, even", 150, 210),
        ("Qwen3-30B-A3B, Zipf 0.5", 420, 600),
        ("Qwen3-30B-A3B, Zipf 1", 420, 600),
        ("gpt-oss-20b, even", 180, 220),
    ],
)
def test_packed_experts_take_few_operations_and_the_host_waits_once(name, most_forward, most_backward):
    forward, backward, *_ = count_step(LAYERS[name], on_gpu())
    assert (forward.waits, forward.uploads, backward.waits, backward.uploads) == (1, 1, 0, 0)
    assert forward.launches <= most_forward
    assert backward.launches <= most_backward
    assert forward.by_name["dequantize_4bit"] * 128 * 2**20 >= unpacked_bytes(LAYERS[name])


def test_one_expert_at_a_time_takes_more_and_keeps_as_much():
    (blocks, _, kept, *_), (by_expert, _, kept_by_expert, *_) = (
        count_step(LAYERS["Qwen3-30B-A3B, even"], sizes) for sizes in (on_gpu(), ON_CPU)
    )
    assert by_expert.launches > 4 * blocks.launches
    assert kept < 1.1 * kept_by_expert, "gaps are few"


def unpacked_bytes(layer) -> int:
    return layer.experts * 3 * layer.width * layer.hidden * 2


def test_dense_experts_take_as_few():
    forward, backward, *_ = count_step(LAYERS["Qwen3-30B-A3B, even"], on_gpu(), packed=False)
    assert (forward.waits, backward.waits) == (1, 0)
    assert forward.launches <= 150
    assert backward.launches <= 210


@pytest.mark.parametrize("budget", [32, 128])
@pytest.mark.parametrize("name", DECODING)
def test_a_token_takes_few_operations_and_the_host_never_waits(name, budget):
    counts = count_decoding(DECODING[name], on_gpu(budget))
    assert (counts.waits, counts.uploads) == (0, 0)
    assert counts.launches <= 60
    assert counts.by_name["dequantize_4bit"] == 2, "one for each projection"


@pytest.mark.parametrize("reading", [lambda x: x.tolist(), lambda x: x.max().item(), lambda x: bool(x.any())])
def test_a_wait_would_be_counted(reading, monkeypatch):
    from ordmoe_peft.experts import layout

    group = layout.group_by_expert
    monkeypatch.setattr(layout, "group_by_expert", lambda index, *args: (reading(index), group(index, *args))[1])
    forward, *_ = count_step(LAYERS["Qwen3-30B-A3B, even"], on_gpu())
    assert forward.waits == 2


@pytest.mark.parametrize("name", DECODING)
def test_more_tokens_take_one_wait(name):
    counts = count_decoding(replace(DECODING[name], tokens=8), on_gpu(32))
    assert (counts.waits, counts.uploads) == (1, 1)
    assert counts.launches <= 60 * 8


def test_fp32_counts_as_well():
    forward, *_ = count_step(LAYERS["Qwen3-30B-A3B, even"], on_gpu(), dtype=torch.float32)
    assert forward.launches <= 200
