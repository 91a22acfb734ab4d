import PIL.Image
import pytest
from datasets import Dataset, Image, List

from ordmoe_peft.data.image_paths import with_images, with_streamed_images, without_payloads
from ordmoe_peft.data.origin import Origin
from ordmoe_peft.errors import OrdMoEDataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name, color in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        PIL.Image.new("RGB", (4, 4), color).save(tmp_path / f"images/{name}.png")
    return tmp_path


def colors(images) -> list:
    return [image.getpixel((0, 0)) for image in images]


RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.mark.parametrize(
    ("column", "values", "becomes", "seen"),
    [
        ("image", ["images/a.png", "images/b.png"], "image", [[RED], [BLUE]]),
        ("image", ["images/a.png", None], "images", [[RED], []]),
        ("image", ["images/a.png", ""], "images", [[RED], []]),
        ("image", [["images/a.png"], ["images/b.png", "images/a.png"]], "images", [[RED], [BLUE, RED]]),
        ("images", [["images/a.png", "images/b.png"], []], "images", [[RED, BLUE], []]),
        ("images", ["images/a.png", "images/b.png"], "images", [[RED], [BLUE]]),
    ],
)
def test_paths_become_images(folder, column, values, becomes, seen):
    rows = with_images(Dataset.from_dict({"kind": ["x", "y"], column: values}), Origin("data", folder=folder))
    assert set(rows.column_names) == {"kind", becomes}
    assert rows.features[becomes] == (Image() if becomes == "image" else List(Image()))
    assert [colors([value] if becomes == "image" else value) for value in rows[becomes]] == seen


def test_absolute_paths_and_images_in_the_data_need_no_folder(folder):
    paths = Dataset.from_dict({"image": [str(folder / "images/a.png")]})
    assert colors(with_images(paths, Origin("me/data"))["image"]) == [RED]
    encoded = Dataset.from_dict({"image": [{"bytes": (folder / "images/b.png").read_bytes(), "path": None}]})
    assert colors(with_images(encoded, Origin("me/data"))["image"]) == [BLUE]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "images/z.png",
            "row 1 (counted from 0) has 'images/z.png' in `image`: there is no file {folder}/im",
        ),
        ("s3://bucket/a.png", "'s3://bucket/a.png' in `image`: give a path, or an address that begins with http://"),
        ("data:image/png;base64,AAAA", "give a path, or an address"),
    ],
)
def test_images_that_cannot_be_found(folder, value, message):
    for rows, read in (
        (Dataset.from_dict({"image": ["images/a.png", value]}), with_images),
        (Dataset.from_dict({"image": ["images/a.png", value]}).to_iterable_dataset(), with_streamed_images),
    ):
        with pytest.raises(OrdMoEDataError) as error:
            list(read(rows, Origin("data", folder=folder)))
        assert message.format(folder=folder) in str(error.value)


def test_numbers_are_no_images_and_paths_on_the_hub_have_no_folder():
    with pytest.raises(OrdMoEDataError, match="has 3 in `image`: it must be the path of an image"):
        with_images(Dataset.from_dict({"image": [3]}), Origin("data"))
    with pytest.raises(OrdMoEDataError, match="me/data, row 0 .*a folder that is not known here. Download the data"):
        with_images(Dataset.from_dict({"image": ["a.png"]}), Origin("me/data"))


def test_addresses_that_datasets_reads_itself(folder):
    rows = with_images(Dataset.from_dict({"image": ["https://example.org/a.png"]}), Origin("data", folder=folder))
    assert rows.cast_column("image", Image(decode=False))[0]["image"]["path"] == "https://example.org/a.png"


def test_streamed_images(folder):
    rows = Dataset.from_dict({"image": ["images/a.png"], "images": [["images/b.png"]]}).to_iterable_dataset()
    (row,) = with_streamed_images(rows, Origin("data", folder=folder))
    assert colors([row["image"], *row["images"]]) == [RED, BLUE]


def test_images_in_messages_are_not_streamed():
    message = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
    rows = Dataset.from_list([{"messages": [message]}]).to_iterable_dataset()
    with pytest.raises(OrdMoEDataError, match="data has images in `messages`, which cannot be streamed"):
        with_streamed_images(rows, Origin("data"))


def test_images_in_messages_are_told_from_their_places():
    parts = [{"type": "image", "image": "a.png", "text": None}, {"type": "text", "text": "why", "image": None}]
    parts += [{"type": "image_url", "image_url": {"url": "b.png"}}, {"type": "image", "image": None}]
    messages, images = without_payloads([{"role": "user", "content": parts}, {"role": "assistant", "content": "so"}])
    place = {"type": "image"}
    assert messages[0]["content"] == [place, {"type": "text", "text": "why"}, place, place]
    assert messages[1] == {"role": "assistant", "content": "so"}
    assert images == ["a.png", "b.png"]
