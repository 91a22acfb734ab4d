"""The card in an adapter's folder: what its owner wrote in it stays, what the adapter's files say is written anew."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HFValidationError
from peft.utils import CONFIG_NAME
from transformers.utils import logging

from ..files import write_whole
from .card import ADAPTER_OF, BEGIN, END, LICENSE, TITLE, adapter_card
from .config import OrdMoEConfig
from .record import RECORD_NAME


logger = logging.get_logger(__name__)

OURS = re.compile(rf"^{re.escape(BEGIN)}$.*^{re.escape(END)}$", re.MULTILINE | re.DOTALL)


def base_license(name_or_path: str | None, revision: str | None = None) -> dict[str, str]:
    """The licence that a model's card names, with the name and the link of one that is not common.

    Empty where there is no card here, or it names none. The hub is not asked.

    Args:
        name_or_path (`str`, *optional*): the model's folder, or its id, whose card may be in the cache.
        revision (`str`, *optional*): of the id.
    """
    if not name_or_path:
        return {}
    path: Any = Path(name_or_path, REPOCARD_NAME)
    if not Path(name_or_path).is_dir():
        try:
            path = try_to_load_from_cache(name_or_path, REPOCARD_NAME, revision=revision)
        except HFValidationError:  # a folder of another machine
            return {}
    is_there = isinstance(path, (str, Path)) and Path(path).is_file()
    card = read_card(Path(path)) if is_there else None
    named = {name: card.data.get(name) for name in LICENSE} if card is not None else {}
    return {name: value for name, value in named.items() if isinstance(value, str) and value}


def save_card(card: ModelCard, folder: str | Path, earlier: str | Path | None = None) -> None:
    """Write `card` to `folder`, into the card that is there; see [`updated`].

    One that cannot be read is left as it is, with a warning.

    Args:
        card ([`~huggingface_hub.ModelCard`]): what [`adapter_card`] returned.
        folder (`str` or `Path`): the adapter's.
        earlier (`str` or `Path`, *optional*): the folder with the card that is there, where `folder` will replace it.
    """
    there, path = Path(earlier or folder, REPOCARD_NAME), Path(folder, REPOCARD_NAME)
    if not there.is_file():
        write_whole(path, str(card))
    elif (found := read_card(there)) is not None:
        write_whole(path, str(updated(found, card)))
    elif there != path:
        shutil.copyfile(there, path)


def write_saved_card(folder: str | Path, tags: Sequence[str] = (), data: Mapping[str, Any] | None = None) -> None:
    """Write the card of the adapter that is saved in `folder` from its files; nothing where none is.

    Args:
        folder (`str` or `Path`): the adapter's.
        tags (sequence of `str`): further tags.
        data (`dict`, *optional*): what the record does not say of the training data, such as their `id`.
    """
    if not all(Path(folder, name).is_file() for name in (CONFIG_NAME, RECORD_NAME)):
        return
    config = OrdMoEConfig.from_pretrained(str(folder))
    record = config.saved.record
    training = record["training"]
    if data and isinstance(training, dict):
        known = training.get("data")
        training["data"] = {**(known if isinstance(known, dict) else {}), **data}
    card = adapter_card(config, record)
    card.data.tags = list(dict.fromkeys([*card.data.tags, *tags]))
    save_card(card, folder)


def read_card(path: Path) -> ModelCard | None:
    """The card at `path`, or `None`, with a warning, where it is none."""
    try:
        return ModelCard.load(path)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        logger.warning(f"{path} cannot be read as a model card ({' '.join(str(error).split())}) and is left as it is.")
        return None


def updated(earlier: ModelCard, card: ModelCard) -> ModelCard:
    """The card `earlier` with what `card` says of the adapter.

    All text stays but what is between the two comments of [`adapter_card`], which is written anew, at the end where
    there was none. Of the metadata the base, the library and the results are those of `card`, tags and data sets are
    those of both, and whatever else `earlier` has stays, such as a licence. Results that it has under a name that
    [`adapter_card`] does not give stay, and `card` has its own in the text alone.
    """
    text, ours = earlier.text.replace("\r\n", "\n"), OURS.search(card.text)
    assert ours is not None  # adapter_card wrote it
    found = OURS.search(text)
    text = f"{text.rstrip()}\n\n{ours[0]}\n" if found is None else text[: found.start()] + ours[0] + text[found.end() :]
    old, new = earlier.data.to_dict(), card.data.to_dict()
    if "base_model" in new:  # of a base on no hub the owner may have named one
        old.pop("base_model", None)
        old["tags"] = [tag for tag in _as_list(old.get("tags")) if not str(tag).startswith(ADAPTER_OF)]
    if not str(earlier.data.get("model_name", TITLE)).startswith(TITLE):
        new.pop("model-index", None)
    else:
        old.pop("model-index", None)
    if "license" in old:  # name and link of another would not be its own
        new = {name: value for name, value in new.items() if name not in LICENSE}
    both = {}
    for name in ("tags", "datasets"):
        if name in old or name in new:
            had = _as_list(old.get(name))
            both[name] = had + [value for value in _as_list(new.get(name)) if value not in had]
    result = ModelCard(f"---\n{{}}\n---\n{text}")
    result.data = ModelCardData(**{**new, **old, **both, "library_name": "peft"})
    return result


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
