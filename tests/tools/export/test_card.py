"""The card of an adapter for a server."""

import pytest
from huggingface_hub import ModelCard

from ordmoe_peft.tools.export.card import ServingExport, plain_card, serving_card
from ordmoe_peft.tools.export.servers import FORMATS


@pytest.mark.parametrize("to", FORMATS)
def test_it_says_how_to_start_and_what_was_not_tried(to):
    card = serving_card("Qwen/Qwen3-30B-A3B", to, "a source", ServingExport(6, 48, 192, 0, 0, 48))
    assert ModelCard(card.content).data.base_model == "Qwen/Qwen3-30B-A3B"
    for words in (
        "compare what it answers",
        "Qwen/Qwen3-30B-A3B --enable-lora --max-lora-rank 6",
        "No server has run",
        "left out",
        "a source",
    ):
        assert words in card.content
    folded = serving_card(None, to, "a source", ServingExport(6, 48, 192, 0, 48, 0)).content
    assert "`router.safetensors` holds" in folded and "left out" not in folded


@pytest.mark.parametrize(
    ("base", "shown"), [("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B"), ("/home/me/qwen", "qwen"), (None, None)]
)
@pytest.mark.parametrize("is_for_dense", [False, True])
def test_a_plain_adapters_says_what_it_has_not(base, shown, is_for_dense):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}
    card = plain_card(base, settings, is_for_dense)
    assert (card.data.base_model, card.data.library_name) == (shown, "peft")
    assert "rank 4, alpha 6, on 2 weights, such as `mlp.gate.weight`" in card.text
    assert "It has no tiers" in card.text
    assert ("has to be dense" in card.text) == is_for_dense
    assert "/home" not in str(card)
