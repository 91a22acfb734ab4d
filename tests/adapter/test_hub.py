"""What goes to the hub, seen where `huggingface_hub` would send it."""

import shutil
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel, get_peft_model

from ordmoe_peft import OrdMoEConfig
from tests import models


FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "ordmoe.json"]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> SimpleNamespace:
    """A hub with one repository: its files in a folder, and repository, branch and options of each upload."""
    hub = SimpleNamespace(folder=tmp_path / "hub", uploads=[], branches=[])

    def create(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload(self, *, repo_id, folder_path, revision=None, run_as_future=False, ignore_patterns=(), **options):
        hub.uploads.append((repo_id, revision, options))
        shutil.copytree(folder_path, hub.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*ignore_patterns))
        done = Future()
        done.set_result("commit")
        return done if run_as_future else "commit"

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "file_exists", lambda self, repo, name, revision=None: (hub.folder / name).is_file())
    monkeypatch.setattr(HfApi, "hf_hub_download", lambda self, repo, name, revision=None: str(hub.folder / name))
    monkeypatch.setattr(HfApi, "create_branch", lambda self, repo, *, branch, exist_ok: hub.branches.append(branch))
    return hub


def test_all_files_of_an_adapter_go_up_and_no_other(hub):
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    assert model.push_to_hub("adapter", commit_message="First", tags=["mine"]) == "commit"
    assert hub.uploads == [("me/adapter", None, {"commit_message": "First"})]
    assert sorted(path.name for path in hub.folder.iterdir()) == FILES
    card = ModelCard.load(hub.folder / "README.md")
    assert card.data.tags[-1] == "mine"
    assert "OrdMoE adapter of" in card.text
    assert "More Information Needed" not in card.text
    # What was pushed is an adapter.
    PeftModel.from_pretrained(models.qwen3_moe(), hub.folder)


def test_the_text_of_the_card_on_the_hub_stays(hub):
    hub.folder.mkdir()
    (hub.folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    model.push_to_hub("me/adapter", revision="second", max_shard_size="5GB")
    card = ModelCard.load(hub.folder / "README.md")
    assert card.text.startswith("# Mine")
    assert "OrdMoE adapter of" in card.text
    assert card.data.license == "mit"
    assert hub.uploads == [("me/adapter", "second", {})]
    assert hub.branches == ["second"]
