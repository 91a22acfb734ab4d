from pathlib import Path

import pytest

from ordmoe_peft.data.splits import chosen_split, files_by_split, split_names
from ordmoe_peft.errors import OrdMoEDataError


@pytest.mark.parametrize(
    ("splits", "asked", "chosen"),
    [
        (["train", "test", "validation"], None, "test"),
        (["train", "validation"], None, "validation"),
        (["train"], None, "train"),
        (["train", "test"], "train", "train"),
        (["train", "test"], "train[:10%]+test", "train[:10%]+test"),
    ],
)
def test_the_split_that_is_read(splits, asked, chosen):
    assert chosen_split("data", splits, asked, ("test", "validation"), "--split") == chosen


@pytest.mark.parametrize(
    ("splits", "asked", "is_file", "message"),
    [
        (["a", "b"], None, False, "data has the splits 'a', 'b', and none is called 'test' or 'val'. Give --split."),
        (["a", "b"], "test", False, "data has no split 'test'; it has 'a', 'b'. Give --split, one of these."),
        (["a", "b"], "a+c[:3]", False, "data has no split 'c'"),
        (["train"], "test", True, "no split 'test': it is one file, which is one split, 'train'. Leave --split out"),
    ],
)
def test_splits_that_are_not_there(splits, asked, is_file, message):
    with pytest.raises(OrdMoEDataError) as error:
        chosen_split("data", splits, asked, ("test", "val"), "--split", is_file)
    assert message in str(error.value)


def test_names_in_sums_and_slices():
    assert split_names("train[:10%] + test") == ["train", "test"]


def test_files_of_splits():
    folder = Path("/data/training")
    found = files_by_split(folder, [folder / name for name in ("b-train.csv", "a-train.csv", "dev/x.csv", "notes.csv")])
    assert found == {"train": [folder / "a-train.csv", folder / "b-train.csv"], "validation": [folder / "dev/x.csv"]}
    assert files_by_split(folder, [folder / "x.csv", folder / "latest.csv"]) == {
        "train": [folder / "latest.csv", folder / "x.csv"]
    }
