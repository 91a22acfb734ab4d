import json

import datasets
import pytest
from datasets import Dataset, load_dataset

from ordmoe_peft.data.shards import claim_folder, shards, without_inner_bars, write_shard
from ordmoe_peft.errors import OrdMoEConfigError


def rows(samples: range) -> Dataset:
    return Dataset.from_dict({"place": list(samples)})


def test_shards_share_the_samples_out(tmp_path):
    """Seven samples by three: 3 + 3 + 1."""
    samples_of = shards(tmp_path, num_samples=7, samples_per_shard=3)
    assert list(samples_of.values()) == [range(0, 3), range(3, 6), range(6, 7)]
    for path, samples in reversed(samples_of.items()):
        write_shard(path, rows(samples))
    assert load_dataset(str(tmp_path), split="train")["place"][:] == list(range(7))


def test_a_shard_is_complete_or_absent(tmp_path):
    """What dies while writing leaves a file that readers pass over, and that the next writer replaces."""
    first, second = shards(tmp_path, num_samples=2, samples_per_shard=1)
    write_shard(first, rows(range(0, 1)))

    class Killed(Dataset):
        def to_parquet(self, path, **kwargs):
            path.write_bytes(b"PAR1 and no more")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(second, Killed(rows(range(1, 2)).data))
    assert not second.exists()
    assert load_dataset(str(tmp_path), split="train")["place"][:] == [0]
    write_shard(second, rows(range(1, 2)))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_is_claimed_once_it_has_data(tmp_path):
    claim_folder(tmp_path, "settings.json", {"seed": 1, "generation": {"top_k": 5}})
    claim_folder(tmp_path, "settings.json", {"seed": 2, "generation": {}})
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 2, "generation": {}}
    write_shard(tmp_path / "data/train-00000-of-00001.parquet", rows(range(0, 1)))
    claim_folder(tmp_path, "settings.json", {"seed": 2, "generation": {}})
    with pytest.raises(OrdMoEConfigError, match=r"settings: generation.top_k \(None there, 5 now\), seed \(2 there"):
        claim_folder(tmp_path, "settings.json", {"seed": 1, "generation": {"top_k": 5}})


def test_bars_come_back():
    with without_inner_bars():
        assert datasets.are_progress_bars_disabled()
    assert not datasets.are_progress_bars_disabled()
