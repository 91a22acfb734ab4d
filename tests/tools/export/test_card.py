"""The card of an adapter for a server."""

import pytest
from huggingface_hub import ModelCard

from ordmoe_peft.tools.export.card import ServingExport, serving_card
from ordmoe_peft.tools.export.servers import FORMATS


@pytest.mark.parametrize("to", FORMATS)
def test_it_says_how_to_start_and_what_was_not_tried(to):
    card = serving_card("Qwen/Qwen3-30B-A3B", to, "a source", ServingExport(6, 48, 192, 0, 0, 48))
    assert ModelCard(card.content).data.base_model == "Qwen/Qwen3-30B-A3B"
    for words in ("Qwen/Qwen3-30B-A3B --enable-lora --max-lora-rank 6", "No server has run", "left out", "a source"):
        assert words in card.content
    folded = serving_card(None, to, "a source", ServingExport(6, 48, 192, 0, 48, 0)).content
    assert "`router.safetensors` holds" in folded and "left out" not in folded
