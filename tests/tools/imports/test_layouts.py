"""The layout of a file, where it can be told."""

import pytest
import torch

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.tools.imports.layouts import FusedLayout, told_layout
from ordmoe_peft.tools.imports.places import Place


E, R, O, I = 3, 2, 8, 5  # noqa: E741 - the sides of a matrix


def pairs(*sides, shape=(E, O, I), rank=R, **place):
    """One stack for each (side of A, side of B)."""
    where = Place("experts.gate_up_proj", "experts", shape, **place)
    return {f"layer {n}": (torch.zeros(E * rank, a), torch.zeros(b, rank * E), where) for n, (a, b) in enumerate(sides)}


def told(files, asked="auto", hints="", **settings):
    layout = told_layout(files, settings, asked, hints)
    return layout.is_reversed, layout.is_expert_slowest


def test_sides_tell_which_way_round():
    assert told(pairs((I, O))) == (False, False)
    assert told(pairs((O, I))) == (True, False)
    square = {**pairs((4, 4), shape=(E, 4, 4)), "layer 1": pairs((O, I))["layer 0"]}
    assert told(square) == (True, False), "one that is not square decides for the file"
    with pytest.raises(OrdMoEConfigError, match="one way round alone, and some the other"):
        told(pairs((I, O), (O, I)))
    with pytest.raises(OrdMoEConfigError, match="layer 0: lora_A"):
        told(pairs((I + 1, O)))


@pytest.mark.parametrize(
    ("version", "is_transposed", "is_reversed"),
    [
        ("0.18.0", False, True),
        ("0.18.0", True, False),
        ("0.19.0", False, True),
        ("0.19.0", True, True),
        ("0.19.1", False, False),
        ("0.21.2.dev0@abc", True, False),
    ],
)
def test_the_version_tells_where_sides_do_not(version, is_transposed, is_reversed):
    files = pairs((4, 4), shape=(E, 4, 4), is_transposed=is_transposed)
    assert told(files, peft_version=version) == (is_reversed, False)
    for unknown in (None, "UNKNOWN", "0.18.2.dev0", "0.19.1.dev0@abc"):
        with pytest.raises(OrdMoEConfigError, match="both ways round"):
            told(files, peft_version=unknown)
    assert told(files, "peft") == (False, False)
    assert told(files, "peft-0.18") == (not is_transposed, False)


def test_the_order_of_columns_is_told_by_the_tag_or_by_who_asks():
    assert told(pairs((I, O)), lora_B_layout="rank_major") == (False, False)
    assert told(pairs((I, O)), lora_B_layout="grouped_by_expert") == (False, True)
    assert told(pairs((O, I)), "unsloth") == (True, True)
    assert told(pairs((I, O), rank=1), hints="trained with Unsloth") == (False, False), "one order with rank 1"
    with pytest.raises(OrdMoEConfigError, match="seems to be Unsloth's"):
        told(pairs((I, O)), hints="trained with Unsloth")
    assert told(pairs((I, O)), "peft", hints="trained with Unsloth") == (False, False)
    for asked, tag in (("unsloth", "rank_major"), ("peft", "grouped_by_expert")):
        with pytest.raises(OrdMoEConfigError, match=f"source_layout='{asked}', but lora_B_layout"):
            told(pairs((I, O)), asked, lora_B_layout=tag)


def test_a_layouts_factors():
    place = Place("experts.gate_up_proj", "experts", (E, O, I))
    A, B = torch.randn(E * R, O), torch.randn(I, E * R)
    delta = FusedLayout(is_reversed=True, is_expert_slowest=True).factors(A, B, place, 0.5).delta()
    for expert in range(E):
        columns = slice(expert * R, (expert + 1) * R)
        torch.testing.assert_close(delta[expert], 0.5 * (B[:, columns] @ A[columns]).T)
