"""The table of constants says what the constants are, and each device gets its sizes."""

import re

import pytest
import torch

from ordmoe_peft.experts import tuning


def number(text: str) -> int:
    return (
        1 << int(text[1:].translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")))
        if text[1:].isdigit() and (text[1] in "⁰¹²³⁴⁵⁶⁷⁸⁹")
        else int(text.replace(",", ""))
    )


def test_each_constant_has_a_row_with_its_value():
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \| [^|]+ \| [^|]+ \|$", tuning.__doc__, re.MULTILINE)
    table = {}
    for names, values in rows:
        table |= dict(zip(re.findall(r"`(\w+)`", names), map(number, values.strip().split(", ")), strict=True))
    assert table == {
        name: value for name, value in vars(tuning).items() if name.isupper() and name not in ("MIB", "ON_CPU")
    }


@pytest.mark.parametrize(("free_gib", "matrices_mib"), [(0, 32), (1, 32), (3, 32), (4, 64), (9, 128), (70, 128)])
def test_matrices_at_a_time_follow_free_memory(free_gib, matrices_mib, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gib * 2**30, 80 * 2**30))
    tuning.work_sizes.cache_clear()
    assert tuning.work_sizes(torch.device("cuda", 0)) == tuning.on_gpu(matrices_mib)
    tuning.work_sizes.cache_clear()
    assert tuning.work_sizes(torch.device("cpu")) is tuning.ON_CPU
    assert tuning.work_sizes(torch.device("xpu")) == tuning.on_gpu(128)


@pytest.mark.parametrize(
    ("capability", "dtype", "has_kernel"),
    [
        ((9, 0), torch.bfloat16, True),
        ((10, 0), torch.bfloat16, True),
        ((9, 0), torch.float16, False),
        ((8, 9), torch.bfloat16, False),
        ((12, 0), torch.bfloat16, False),
    ],
)
def test_grouped_mm_is_one_kernel_on_data_centre_cards_in_bf16(capability, dtype, has_kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tuning.has_grouped_kernel(torch.device("cuda"), dtype) == has_kernel
    assert not tuning.has_grouped_kernel(torch.device("cpu"), dtype)
