"""What an ablation compares: its arguments and the cells that they name."""

import pytest

from ordmoe_peft.errors import OrdMoEConfigError
from ordmoe_peft.tools.ablate.grid import AblateArguments, Cell, baseline_name, make_cell, make_cells


def test_cells_are_the_grid_and_the_list():
    cells = make_cells({"grouping": ["uniform", "random"], "num_tiers": [2, 3]}, [{"name": "mine", "erl_coef": 1.0}])
    assert [cell.name for cell in cells] == [
        *("grouping uniform, num_tiers 2", "grouping uniform, num_tiers 3"),
        *("grouping random, num_tiers 2", "grouping random, num_tiers 3", "mine"),
    ]
    assert cells[2].settings == {"grouping": "random", "num_tiers": 2}
    assert cells[4].settings == {"erl_coef": 1.0}
    assert make_cells({}, []) == [Cell("OrdMoE")]


def test_the_baseline_is_called_after_what_it_is():
    assert make_cell({"num_tiers": 1}, baseline_name).name == "SFT (C = 1)"
    assert make_cell({"erl_coef": 0}, baseline_name).name == "baseline: erl_coef 0"
    assert make_cell({}, baseline_name).name == "baseline: common settings"
    assert make_cell({"name": "mine", "num_tiers": 1}, baseline_name) == Cell("mine", {"num_tiers": 1})


def test_structured_arguments_are_read_from_json():
    arguments = AblateArguments(grid='{"num_tiers": [2, 3]}', cells="[]", baseline=None)
    assert arguments.grid == {"num_tiers": [2, 3]}
    assert (arguments.cells, arguments.baseline, arguments.tune) == ([], {}, {})
    assert AblateArguments().baseline == {"num_tiers": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "f1"}, "metric must be one of .* got 'f1'"),
        ({"seeds": [1, 1]}, r"seeds must be one or more different numbers, got \[1, 1\]"),
        ({"tune_seeds": [1, 1]}, r"tune_seeds must be one or more different numbers, got \[1, 1\]"),
        ({"train_limit": 0}, "train_limit must be at least 1, got 0"),
        ({"cells": "[{]"}, "cells is not JSON"),
        ({"cells": {}}, "cells must be a list, got {}"),
        ({"cells": '["random"]'}, r"cells must be mappings of options to values, got \['random'\]"),
        ({"grid": "3"}, "grid must be a mapping, got 3"),
    ],
    ids=str,
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(OrdMoEConfigError, match=message):
        AblateArguments(**arguments)


def test_an_axis_without_values():
    with pytest.raises(OrdMoEConfigError, match=r"num_tiers needs a list of values to try, got \[\]"):
        make_cells({"num_tiers": []}, [])
