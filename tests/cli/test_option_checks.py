from argparse import ArgumentParser
from types import SimpleNamespace

import pytest

from ordmoe_peft.cli.option_checks import check_options, check_recipe, recipe_value
from ordmoe_peft.errors import OrdMoEConfigError


def test_places_that_are_free_pass_and_nothing_is_made(tmp_path):
    (tmp_path / "old.json").touch()
    (tmp_path / "old").mkdir()
    free = (("output_file", "a/b.json"), ("output_file", "old.json"), ("output_dir", "old"), ("report", "c"))
    for name, value in free:
        check_options(SimpleNamespace(**{name: str(tmp_path / value)}), SimpleNamespace(limit=1, num_tiers=None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "old.json"]


def test_an_option_of_any_group_is_checked(tmp_path):
    with pytest.raises(OrdMoEConfigError, match="--output_dir .* is a file"):
        check_options(SimpleNamespace(limit=3), SimpleNamespace(output_dir=__file__))
    with pytest.raises(OrdMoEConfigError, match="--max_new_tokens must be at least 1, got 0"):
        check_options(SimpleNamespace(limit=3), SimpleNamespace(max_new_tokens=0))


def test_a_recipe_is_a_mapping(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lora_r: 4\n")
    check_recipe(str(recipe))
    recipe.write_text("7")
    with pytest.raises(OrdMoEConfigError, match="recipe.yaml holds a value of type int"):
        check_recipe(str(recipe))
    recipe.write_text("3: 4")
    with pytest.raises(OrdMoEConfigError, match="recipe.yaml has 3 for the name of an option"):
        check_recipe(str(recipe))
    with pytest.raises(OrdMoEConfigError, match="cannot be read: Is a directory"):
        check_recipe(str(tmp_path))


def test_no_in_a_recipe_is_a_choice():
    action = ArgumentParser().add_argument("--save_strategy", choices=["no", "steps"])
    assert recipe_value(action, False) == (None, "no")  # as YAML reads it
    assert recipe_value(action, True)[0].startswith("invalid choice: True")
