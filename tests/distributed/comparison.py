"""How far two training runs are apart."""

from typing import Any


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of any logged figure and of any trained weight of two runs of as many steps."""
    assert one["weights"].keys() == other["weights"].keys()
    differences = [(weight - other["weights"][name]).abs().max().item() for name, weight in one["weights"].items()]
    for logs, other_logs in zip(one["logs"], other["logs"], strict=True):
        assert logs.keys() == other_logs.keys()
        differences += [abs(value - other_logs[name]) for name, value in logs.items()]
    return max(differences)
