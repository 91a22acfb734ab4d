"""Which models fit which cards."""

import json

import pytest
import torch

from ordmoe_peft import MoeBitsAndBytesConfig
from ordmoe_peft.tools.plan.card import GIB, Card
from ordmoe_peft.tools.plan.fits import find_fits, fits_table
from ordmoe_peft.tools.plan.plan import plan_memory
from ordmoe_peft.tools.plan.settings import PlanSettings
from tests import models


NF4 = MoeBitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True)
SETTINGS = PlanSettings(quantization=NF4, r=4, batch_size=1, sequence_length=512)


def card_with(room: int) -> Card:
    """A card on which `room` bytes fit, with what is to spare."""
    return Card(1, usable_gb=(room + 1) / GIB / 0.97, reserve_gb=0)


@pytest.fixture(scope="module")
def fits():
    """Of a small model on cards from one that it does not fit to one with room for twice what it takes."""
    config = models.qwen3_moe(num_hidden_layers=6, moe_intermediate_size=256).config
    total = plan_memory(config, SETTINGS).total
    return find_fits("small", config, SETTINGS, [card_with(int(share * total)) for share in (0.1, 0.6, 0.9, 1, 2)])


def test_cells(fits):
    nothing, *_, little, fits_as_it_is, with_room = fits.cells()
    assert nothing == "no"
    assert little.startswith("--")
    assert fits_as_it_is == with_room == "fits"


def test_a_larger_card_needs_no_more_options(fits):
    lengths = [99 if way is None else len(way.options.split()) for way in fits.ways]
    assert lengths == sorted(lengths, reverse=True)
    for card, way in zip(fits.cards, fits.ways, strict=True):
        assert way is None or way.plan.total <= card.safe_room


def test_a_plan_with_the_options_of_a_cell_is_the_cells(fits):
    config = models.qwen3_moe(num_hidden_layers=6, moe_intermediate_size=256).config
    way = fits.ways[1]
    assert plan_memory(config, way.settings).total == way.plan.total < fits.total


def test_the_table(fits):
    table = fits_table([fits], "1 row")
    assert table.title == "What makes training fit a card: 1 row"
    *_, ram, copies = table.frame.columns
    assert list(table.frame.columns[:2]) == ["model", "needs, GiB"]
    (row,) = table.frame.to_dict("records")
    assert row[ram] == fits.in_ram.pinned
    assert row[copies] == fits.in_ram.copied / 25e9
    assert "an assumed 25 GB/s" in table.note
    assert table.markdown().splitlines()[2].startswith("| model | needs, GiB | 1 GB |")


def test_as_plain_data(fits):
    results = json.loads(json.dumps(fits.to_dict()))
    assert [card["fits"] for card in results["cards"]] == [way is not None for way in fits.ways]
    assert results["cards"][-1]["options"] == ""
    assert results["cards"][-1]["total"] == results["total"]


def test_a_model_that_is_not_packed_has_nothing_in_ram():
    settings = PlanSettings(r=4, batch_size=1, sequence_length=16)
    fits = find_fits("dense", models.qwen3_moe().config, settings, [Card(24)])
    assert fits.in_ram is None
    assert fits.to_dict()["experts_in_ram"] is None
    assert fits_table([fits], "").texts().iloc[0, -1] == "—"
