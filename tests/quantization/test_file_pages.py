import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ordmoe_peft.quantization.file_pages import release_file_pages


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are given back on Linux alone")


def resident_file_pages() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.fixture
def checkpoint(tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_file({"stack": torch.arange(8_000_000, dtype=torch.float32), "norm": torch.ones(7)}, path)
    return path


def test_pages_of_a_checkpoint_go_and_come_back(checkpoint):
    with safe_open(checkpoint, "pt") as file:
        stack, norm = file.get_tensor("stack"), file.get_tensor("norm")
        total = stack.sum()
        before = resident_file_pages()
        release_file_pages([stack, norm], [checkpoint])
        assert before - resident_file_pages() > 0.9 * stack.nbytes
        assert stack.sum() == total
        assert norm.equal(torch.ones(7))


def test_memory_that_is_not_of_the_named_files_is_left_alone(checkpoint):
    own = torch.arange(8_000_000, dtype=torch.float32)
    release_file_pages([own], [checkpoint])
    assert own[-1] == len(own) - 1
    with safe_open(checkpoint, "pt") as file:
        changed = file.get_tensor("stack")
        changed.zero_()  # a private copy: no file holds these zeros
        release_file_pages([changed], ["another.safetensors"])
        assert changed.eq(0).all()
