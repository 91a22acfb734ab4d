"""How far two training runs are apart."""

from typing import Any


# TRL counts tokens from where a run was resumed (1.16).
NOT_COMPARED = ("num_tokens",)


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of any logged figure and of any trained weight of two runs of as many steps.

    Figures without end-of-sequence tokens are left out: they are means over the rows of a micro-batch that have others,
    and logged as their mean over micro-batches, where the rows of all processes are one.
    """
    assert one["weights"].keys() == other["weights"].keys()
    differences = [(weight - other["weights"][name]).abs().max().item() for name, weight in one["weights"].items()]
    for logs, other_logs in zip(one["logs"], other["logs"], strict=True):
        assert logs.keys() == other_logs.keys()
        compared = [name for name in logs if name not in NOT_COMPARED and not name.endswith("_no_eos")]
        differences += [abs(logs[name] - other_logs[name]) for name in compared]
    return max(differences)
