"""Adapters on the hub: the files that `save_pretrained` writes, in one commit, and the card's own text kept."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.constants import REPOCARD_NAME
from peft import PeftModel

from .card_file import save_card


def push_adapter(
    model: PeftModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    tags: Sequence[str] | None = None,
    max_shard_size: Any = None,
    **commit: Any,
) -> CommitInfo:
    """Upload the adapter of `model` to the repository `repo_id` of the hub, which is made where it is not there.

    transformers' method of this purpose writes the hub's card, or a draft, over the one that was saved with the model
    (5.24, `transformers/utils/hub.py`). Here the hub's card is updated as one in a folder is: what its owner wrote
    stays.

    Args:
        model ([`~peft.PeftModel`]): what is saved by its `save_pretrained`.
        repo_id (`str`): `owner/name`, or a name among one's own.
        private (`bool`, *optional*): whether a new repository is.
        token (`str` or `bool`, *optional*): by default that of the login.
        revision (`str`, *optional*): branch, made where it is not there; by default the main one.
        tags (sequence of `str`, *optional*): further tags of the card.
        max_shard_size: not used: the weights are one file.
        commit: `commit_message`, `commit_description` and `create_pr`, as for `huggingface_hub.HfApi.upload_folder`.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = Path(folder, REPOCARD_NAME)
        card = ModelCard.load(path)
        card.data.tags = list(dict.fromkeys([*card.data.tags, *(tags or ())]))
        path.unlink()
        if api.file_exists(repo_id, REPOCARD_NAME, revision=revision):
            shutil.copyfile(api.hf_hub_download(repo_id, REPOCARD_NAME, revision=revision), path)
        save_card(card, folder)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, **commit)
