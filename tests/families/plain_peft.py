"""What PEFT makes of an exported adapter, in a process that knows nothing of the package."""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from peft import PeftModel

from tests.families import tiny
from tests.families.rows import installed_rows


def reader() -> ProcessPoolExecutor:
    """A process for calls of [`error_of_export`], which takes seconds to start and then serves many."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))


def error_of_export(row_id: str, folder: Path) -> float:
    """The largest difference of logits from `wanted.pt`, over the largest of these, with the adapter in `plain`."""
    (row,) = [row for row in installed_rows() if row.id == row_id]
    model = tiny.tiny_model(row.model_class, tiny.tiny_config(row.config_class, row.changes))
    if row.mend is not None:
        row.mend(model)
    batch = tiny.tiny_batch(model, row.media)
    loaded = PeftModel.from_pretrained(model, folder / "plain").eval()
    with torch.no_grad():
        logits = loaded(**batch).logits
    assert not any(name.startswith("ordmoe_peft") for name in sys.modules)
    wanted = torch.load(folder / "wanted.pt")
    return ((logits - wanted).abs().max() / wanted.abs().max()).item()
