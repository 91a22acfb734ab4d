"""An ablation's results as rows of text."""

from ordmoe_peft.tools.ablate.tables import columns, result_rows


LIKELIHOOD = {"mean": -4.5678, "stderr": None, "difference": None}
ACCURACY = {"mean": 34.2, "stderr": 1.5, "difference": None}
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
    results = {"metric": "accuracy", "cells": [BASE, CELL]}
    rows = result_rows(results)
    assert rows == [
        ["base", "", "80.00", "-0.50 [-1.00, +0.00]", "no difference shown", "-4.568", "", "", ""],
        ["a|b", "erl_coef 0.1", "81.23 ± 0.57", "", "", "-4.568 ± 0.001", "", "", "0.25"],
    ]
    assert {len(row) for row in rows} == {len(columns(results))}
    assert columns(results)[5] == "log-likelihood"


def test_what_validation_did_not_choose_by_stands_beside_it():
    results = {"metric": "log_likelihood", "cells": [CELL | {"mean": -0.9694, "accuracy": ACCURACY}]}
    (row,) = result_rows(results)
    assert (row[2], row[5]) == ("-0.969 ± 0.567", "34.20 ± 1.50")
    assert columns(results)[5] == "accuracy"
