"""Cards in folders: what an owner wrote stays, what we wrote is written anew."""

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel, get_peft_model

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.adapter.card import BEGIN, END, adapter_card
from ordmoe_peft.adapter.card_file import base_license, save_card, write_saved_card
from ordmoe_peft.adapter.record import write_record
from tests import models
from tests.adapter.test_card import RECORD, TRAINING


def card_of(base_id="Qwen/Qwen3-30B-A3B", **training) -> ModelCard:
    base = RECORD["base"] | {"id": base_id, "license": {"license": "apache-2.0"}}
    return adapter_card(OrdMoEConfig(), RECORD | {"base": base, "training": TRAINING | training})


def saved(card, folder) -> ModelCard:
    save_card(card, folder)
    return ModelCard.load(folder / "README.md")


def test_a_card_that_an_owner_wrote_stays(tmp_path):
    own = "# My adapter\r\n\r\nIt answers questions.\r\n"
    metadata = ModelCardData(license="mit", language="de", tags=["mine", "base_model:adapter:old/base"], datasets="d/e")
    (tmp_path / "README.md").write_text(f"---\n{metadata.to_yaml()}\n---\n{own}", newline="")
    card = saved(card_of(), tmp_path)
    assert card.text.startswith("# My adapter\n\nIt answers questions.\n\n" + BEGIN)
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", "de", "Qwen/Qwen3-30B-A3B")
    assert card.data.tags == ["mine", *card_of().data.tags]
    assert card.data.datasets == ["d/e", "me/questions"]
    assert card.data.library_name == "peft"
    save_card(card_of(), tmp_path / "new", earlier=tmp_path)
    assert ModelCard.load(tmp_path / "new" / "README.md").text == card.text


def test_what_we_wrote_is_written_anew_in_its_place(tmp_path):
    first = saved(card_of(), tmp_path)
    assert str(first) == str(card_of())
    (tmp_path / "README.md").write_text(str(first).replace(BEGIN, f"Before.\n\n{BEGIN}") + "\nAfter.\n")
    again = saved(card_of(base_id="other/base", evaluations=[], curves=[]), tmp_path)
    assert again.text.strip().startswith(f"Before.\n\n{BEGIN}")
    assert again.text.endswith(f"{END}\n\nAfter.\n")
    assert again.text.count(BEGIN) == 1
    assert "Qwen/" not in str(again)
    assert "91.8 %" not in again.text
    assert again.data.eval_results is None  # they were of the weights that are gone
    assert again.data.tags[-1] == "base_model:adapter:other/base"
    assert str(saved(card_of(base_id="other/base", evaluations=[], curves=[]), tmp_path)) == str(again)


def test_results_of_an_owner_stay(tmp_path):
    result = EvalResult("text-generation", "d/e", "E", "exact_match", 0.4)
    data = ModelCardData(model_name="mine", eval_results=[result], license_name="own", license="other")
    (tmp_path / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n")
    card = saved(card_of(), tmp_path)
    assert (card.data.model_name, card.data.eval_results) == ("mine", [result])
    assert "92.7 %" in card.text
    assert (card.data.license, card.data.license_name) == ("other", "own")


@pytest.mark.parametrize("content", ["---\n- a list\n---\n", "---\na: [1\n---\n", "---\n1: 2\n---\n", b"\xff\xfe"])
def test_a_card_that_is_none_is_left_as_it_is(tmp_path, content, caplog):
    path = tmp_path / "README.md"
    before = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(before)
    save_card(card_of(), tmp_path)
    assert path.read_bytes() == before
    (tmp_path / "new").mkdir()
    save_card(card_of(), tmp_path / "new", earlier=tmp_path)
    assert (tmp_path / "new" / "README.md").read_bytes() == before
    assert caplog.text.count("cannot be read as a model card") == 2


def test_text_without_metadata_is_text(tmp_path):
    (tmp_path / "README.md").write_text("Mine.\n")
    card = saved(card_of(), tmp_path)
    assert card.text.startswith(f"Mine.\n\n{BEGIN}")
    assert card.data.to_dict() == card_of().data.to_dict()


def test_from_the_files_of_an_adapter(tmp_path):
    write_saved_card(tmp_path)
    assert not list(tmp_path.iterdir())  # no adapter, no card
    OrdMoEConfig(r=5, targets=["experts"]).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    digest = {"routers": None, "embeddings": None}
    write_record(tmp_path, {"config": {}, "quantization": None, "digest": digest, **RECORD["base"]}, TRAINING, None)
    write_saved_card(tmp_path, ["trl"], {"id": "owner/data"})
    card = ModelCard.load(tmp_path / "README.md")
    assert "LoRA of rank 5 on experts" in card.text
    assert card.data.tags[-1] == "trl"
    assert card.data.datasets == ["owner/data"]


def test_the_licence_of_a_base(tmp_path):
    assert base_license("examples/easy_vqa/base") == {"license": "apache-2.0"}
    for nowhere in ("no/such-model", None, str(tmp_path), "/another/machine's folder"):
        assert base_license(nowhere) == {}
    ModelCard("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\ntags: [a]\n---\n").save(
        tmp_path / "README.md"
    )
    assert base_license(str(tmp_path)) == {"license": "other", "license_name": "own", "license_link": "LICENSE"}


def test_saving_over_an_adapter_keeps_what_its_owner_wrote(tmp_path):
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\nMine.\n")
    model.ordmoe_training = TRAINING
    model.save_pretrained(tmp_path)
    card = ModelCard.load(path)
    assert card.text.endswith(f"{END}\n\nMine.\n")
    assert "## Results" in card.text
    # Loaded and saved elsewhere, it is the same adapter of the same run.
    loaded = PeftModel.from_pretrained(models.qwen3_moe(), tmp_path)
    loaded.save_pretrained(tmp_path / "copy")
    assert BEGIN + ModelCard.load(tmp_path / "copy" / "README.md").text.split(BEGIN)[1] in card.text


def test_metadata_that_are_no_names_stay(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\ndatasets: [{name: mine}, owner/data]\n---\nMine.\n")
    get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4)).save_pretrained(tmp_path)
    assert ModelCard.load(path).data.datasets == [{"name": "mine"}, "owner/data"]
