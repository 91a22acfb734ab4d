"""An ablation's results as rows of text."""

from ordmoe_peft.tools.ablate.tables import COLUMNS, result_rows


LIKELIHOOD = {"mean": -4.5678, "stderr": None, "difference": None}
BASE = {
    **{"name": "base", "chosen": {}, "mean": 80.0, "stderr": None, "seconds_per_step": None},
    "difference": {"mean": -0.5, "low": -1.0, "high": 0.004, "verdict": "no difference shown"},
    "log_likelihood": LIKELIHOOD,
}
CELL = {
    **{"name": "a|b", "chosen": {"erl_coef": 0.1}, "mean": 81.234, "stderr": 0.567, "seconds_per_step": 0.25},
    **{"difference": None, "log_likelihood": LIKELIHOOD | {"stderr": 0.001}},
}


def test_a_row_has_means_with_errors_and_differences_with_intervals():
    rows = result_rows({"metric": "accuracy", "cells": [BASE, CELL]})
    assert rows == [
        ["base", "", "80.00", "-0.50 [-1.00, +0.00]", "no difference shown", "-4.568", "", "", ""],
        ["a|b", "erl_coef 0.1", "81.23 ± 0.57", "", "", "-4.568 ± 0.001", "", "", "0.25"],
    ]
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert result_rows({"metric": "log_likelihood", "cells": [CELL]})[0][2] == "81.234 ± 0.567"
