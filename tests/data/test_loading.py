"""Files and folders of each kind are read, and what is wrong with a row is said with file, line, column and value."""

import json

import PIL.Image
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from ordmoe_peft.data.loading import load_data
from ordmoe_peft.errors import OrdMoEDataError


ROW = {"prompt": "w1", "completion": "w2"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files(tmp_path, ending, streaming):
    path = tmp_path / f"mine.{ending}"
    rows = Dataset.from_list([ROW, {"prompt": "007", "completion": "None"}])
    {
        "jsonl": rows.to_json,
        "json": lambda path: path.write_text(json.dumps(list(rows))),
        "csv": rows.to_csv,
        "tsv": lambda path: rows.to_csv(path, sep="\t"),
        "parquet": rows.to_parquet,
    }[ending](path)
    read = load_data(path, streaming=streaming)
    assert isinstance(read, IterableDataset) == streaming
    assert list(read) == list(rows)
    assert str(read.split) == "train"


def test_folders(tmp_path):
    rows = Dataset.from_list([ROW])
    write(tmp_path / "files/train.jsonl", ROW)
    write(tmp_path / "files/test.jsonl", ROW, ROW)
    DatasetDict(train=rows, other=rows).save_to_disk(tmp_path / "saved")
    rows.save_to_disk(tmp_path / "saved one")
    (tmp_path / "images/cat").mkdir(parents=True)
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "images/cat/a.png")
    assert len(load_data(tmp_path / "files", defaults=("test",))) == 2
    assert len(load_data(tmp_path / "files", "train+test")) == 3
    assert load_data(tmp_path / "files").info.dataset_name == "files"
    assert load_data(tmp_path / "saved", "other")[0] == ROW == load_data(tmp_path / "saved one")[0]
    assert next(iter(load_data(tmp_path / "saved", streaming=True))) == ROW
    assert load_data(tmp_path / "images")[0]["image"].size == (4, 4)
    with pytest.raises(OrdMoEDataError, match="files has no split 'dev'; it has 'train', 'test'. Give --split"):
        load_data(tmp_path / "files", "dev", option="--split")
    (tmp_path / "files/test.jsonl").write_text("{bad\n")
    assert len(load_data(tmp_path / "files")) == 1, "a split that is not read is not looked at"
    with pytest.raises(OrdMoEDataError, match=r"test.jsonl, line 1 \(row 0, counted from 0\) is not JSON"):
        load_data(tmp_path / "files", "test")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_with_rows_and_their_images_is_no_folder_of_images(streaming):
    rows = load_data("examples/quickstart", "test", streaming=streaming)
    first = next(iter(rows))
    assert first["image"].size == (64, 64)
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]
    if not streaming:
        assert (len(rows), str(rows.split), rows.info.dataset_name) == (64, "test", "quickstart")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, {"prompt": "x"}], "line 2 (row 1, counted from 0) has None in `completion`: it must be text"),
        ([ROW, {"prompt": "x", "completion": 3}], "has 3 in `completion`: it must be text"),
        ([ROW, {"prompt": None, "completion": "x"}], "has None in `prompt`"),
        ([ROW, {"prompt": [user("x")], "completion": [assistant("y")]}], "line 2 (row 1, counted from 0) has messages"),
        ([{"messages": [user("x"), assistant("y")]}, {"messages": []}], "line 2 (row 1, counted from 0) has [] in"),
        ([{"messages": "x"}], "`messages` must be a list of messages"),
        ([{"messages": [user("x"), {"role": "bot", "content": "y"}]}], "message 1 (counted from 0) has the role 'bot'"),
        ([{"messages": [user("x"), {"role": "assistant"}]}], "message 1 (counted from 0) has no text"),
        ([{"messages": [user("x"), assistant(3)]}], "message 1 (counted from 0) has no text"),
        (
            [{"messages": [user([{"text": "x"}, {"image": "a.png"}])]}],
            "message 0 (counted from 0) has a part of the type",
        ),
        ([{"messages": [user([{"type": "video", "video": "a.mp4"}])]}], "has a part of the type 'video'; known are"),
        ([{"messages": [user([{"type": "image"}])]}], "of the type 'image' in `messages` that names no image"),
        (
            [{"prompt": "x", "completion": [assistant("y")]}],
            "has text in one of `prompt` and `completion`, and messages",
        ),
        (
            [{"messages": [user("<image>\nx"), assistant("y")], "image": "a.png"}],
            "has <image> in the text of `messages`",
        ),
        ([{"prompt": "\ud83d", "completion": "x"}], "in `prompt`: it holds half of a character"),
        ([{"messages": [{"from": "human", "value": "x"}]}], "message 0 (counted from 0) has the role None"),
        ([{"text": "x"}, {"text": None}], "has None in `text`"),
        ([{"image": "a.png", **ROW}], "has 'a.png' in `image`: there is no file"),
        ([{"messages": [user([{"type": "image", "image": "a.png"}])]}], "has 'a.png' in `messages`: there is no file"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, rows, message):
    path = write(tmp_path / "mine.jsonl", *rows)
    with pytest.raises(OrdMoEDataError) as error:
        load_data(path)
    assert str(error.value).startswith(f"{path}, line ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "There is no file or folder gone.jsonl."),
        ("/no/such/folder", "There is no file or folder /no/such/folder."),
        ("deep/er/folder", "There is no file or folder deep/er/folder."),
        ("", "The name of the data set is empty"),
    ],
)
def test_data_that_is_not_there(name, message):
    with pytest.raises(OrdMoEDataError, match=message):
        load_data(name)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_cannot_be_read(tmp_path, streaming):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OrdMoEDataError, match="folder has no data that can be read"):
        load_data(tmp_path / "folder", streaming=streaming)
    (tmp_path / "folder/train.jsonl").touch()
    with pytest.raises(OrdMoEDataError, match=r"train.jsonl has no samples: the file is empty"):
        load_data(tmp_path / "folder", streaming=streaming)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1" + b"0" * 40)
    with pytest.raises(OrdMoEDataError, match="cut.parquet cannot be read: Parquet magic bytes not found in footer"):
        load_data(tmp_path / "cut.parquet", streaming=streaming)
    (tmp_path / "old.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1"))
    if not streaming:
        with pytest.raises(OrdMoEDataError, match=r"old.jsonl, line 1 \(row 0, counted from 0\) is not text in UTF-8"):
            load_data(tmp_path / "old.jsonl")


def test_answers_that_are_json_stay_text_beside_contents_in_parts(tmp_path):
    """`datasets` takes a text in a column of mixed types for the number or the object that it spells."""
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "how many?"}]
    answers = ["3", '{"a": 1}', "null", "some"]
    conversations = [{"messages": [user(parts), assistant(answer)]} for answer in answers]
    rows = load_data(write(tmp_path / "mine.jsonl", *conversations))
    assert [row["messages"][1]["content"] for row in rows] == answers
    assert rows[0]["messages"][0]["content"] == [{"type": "image"}, parts[1]]
    assert [len(row["images"]) for row in rows] == [1] * 4


def test_calls_of_tools_are_kept(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}
    messages = [user("4"), call, {"role": "tool", "name": "f", "content": "4"}, assistant("4")]
    rows = load_data(write(tmp_path / "mine.jsonl", {"messages": messages}))
    assert rows[0]["messages"] == messages


def test_a_name_is_no_pattern(tmp_path, monkeypatch):
    right, wrong = {"prompt": "x", "completion": "right"}, {"prompt": "x", "completion": "wrong"}
    write(tmp_path / "run1.jsonl", wrong), write(tmp_path / "folder1/train.jsonl", wrong)
    assert load_data(write(tmp_path / "run[1].jsonl", right))["completion"] == ["right"]
    monkeypatch.chdir(write(tmp_path / "folder[1]/train.jsonl", right).parent)
    assert load_data("train.jsonl")["completion"] == ["right"]
    with pytest.raises(OrdMoEDataError, match="which make it a pattern of names"):
        load_data(".")


def test_the_folder_that_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "train.jsonl", ROW).parent)
    assert list(load_data(".")) == [ROW]


def test_texts_that_are_dates_stay_as_they_were_written(tmp_path):
    """Arrow's reader of JSON makes times of them, and in a later file texts again, in another form."""
    dates = ["2020-01-01", "2020-05-06T10:00:00Z"]
    write(tmp_path / "b.jsonl", *({"prompt": "x", "completion": date} for date in dates))
    assert load_data(tmp_path / "b.jsonl")["completion"] == dates
    write(tmp_path / "a.jsonl", ROW)
    assert load_data(tmp_path)["completion"] == ["w2", *dates]
    messages = [user("2020-01-01"), assistant("2020-01-02")]
    assert list(load_data(write(tmp_path / "c.jsonl", {"messages": messages}))) == [{"messages": messages}]


def test_columns_that_look_like_a_trace_of_an_agent(tmp_path):
    row = {"id": "1", "source": "s", "model": "m", "system_prompt": "p", "messages": [user("x"), assistant("y")]}
    assert list(load_data(write(tmp_path / "a.jsonl", row))) == [row]


def test_long_fields_of_csv_files(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\nx," + "y" * 200_000)
    assert len(load_data(tmp_path / "a.csv")[0]["completion"]) == 200_000


def test_folders_that_are_no_data_set(tmp_path):
    write(tmp_path / "kinds/train.jsonl", ROW)
    (tmp_path / "kinds/test.csv").write_text("prompt,completion\na,b\n")
    with pytest.raises(OrdMoEDataError, match="kinds cannot be read as a data set: Couldn't infer the same"):
        load_data(tmp_path / "kinds")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").write_text("{}")
    with pytest.raises(OrdMoEDataError, match="was saved in .*saved cannot be read"):
        load_data(tmp_path / "saved")


def test_images_by_path_of_files_in_several_folders(tmp_path):
    for folder in "ab":
        write(tmp_path / folder / "train.jsonl", {"image": "x.png", **ROW})
    with pytest.raises(OrdMoEDataError, match="a/train.jsonl, line 1 .* files of this split are in several"):
        load_data(tmp_path)
