import json

import pytest
import torch
from safetensors.torch import save_file

from ordmoe_peft.errors import OrdMoEModelError
from ordmoe_peft.tools.merge_on_disk.checkpoint import ShardWriter, checkpoint_folder, files_beside, open_checkpoint


def written(folder, max_shard_size, *parts):
    writer = ShardWriter(folder, max_shard_size)
    for part in parts:
        writer.add(part)
    writer.close()
    (folder / "config.json").write_text("{}")
    return writer


def test_what_fits_is_one_file_without_an_index(tmp_path):
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    writer = written(tmp_path, 100, tensors)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert writer.total_size == 3 * 8 + 4 * 2
    checkpoint = open_checkpoint(tmp_path)
    assert {name: (each.shape, each.dtype) for name, each in checkpoint.tensors.items()} == {
        name: (each.shape, each.dtype) for name, each in tensors.items()
    }
    assert all(torch.equal(checkpoint.read(["a", "b"])[name], tensors[name]) for name in tensors)


def test_what_is_added_at_once_is_in_one_shard_even_above_the_size(tmp_path):
    """Sizes 8, 8, 24 and 8 with 16 in a shard: the first two together, then one each."""
    parts = [{name: torch.full((size,), size)} for name, size in (("a", 1), ("b", 1), ("d", 1))]
    written(tmp_path, 16, *parts[:2], {"c": torch.zeros(2), "c2": torch.zeros(4)}, parts[2])
    checkpoint = open_checkpoint(tmp_path)
    shards = {"a": 1, "b": 1, "c": 2, "c2": 2, "d": 3}
    assert checkpoint.files == {name: f"model-{shard:05d}-of-00003.safetensors" for name, shard in shards.items()}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 48}, "weight_map": checkpoint.files}
    assert checkpoint.read(["d", "a"]).keys() == {"a", "d"}


def test_folders_that_hold_nothing_to_read(tmp_path):
    with pytest.raises(OrdMoEModelError, match=r"holds no model: it has no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OrdMoEModelError, match=r"lacks model\.safetensors.*Weights that are there: none"):
        open_checkpoint(tmp_path)


def test_dtypes_that_have_no_arithmetic(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"scales": torch.zeros(2, dtype=torch.uint8).view(torch.float8_e8m0fnu)}, tmp_path / "model.safetensors")
    with pytest.raises(OrdMoEModelError, match="scales is of dtype F8_E8M0.*dequantise the base first"):
        open_checkpoint(tmp_path)


def test_a_folder_is_itself_and_all_beside_weights_is_found(tmp_path):
    assert checkpoint_folder(str(tmp_path)) == tmp_path
    for name in ("config.json", "tokenizer.json", "modeling_own.py", "chat_template.jinja"):
        (tmp_path / name).touch()
    for name in ("model.safetensors", "pytorch_model.bin", "README.md", "model.safetensors.index.json", ".cache"):
        (tmp_path / name).touch()
    names = [path.name for path in files_beside(tmp_path)]
    assert names == ["chat_template.jinja", "config.json", "modeling_own.py", "tokenizer.json"]
