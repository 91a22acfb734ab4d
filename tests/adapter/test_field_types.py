"""Annotations are kept."""

from dataclasses import dataclass
from typing import Any

import pytest

from ordmoe_peft.adapter.field_types import check_field_types
from ordmoe_peft.errors import OrdMoEConfigError


@dataclass
class Base:
    others: int = 1


@dataclass
class Settings(Base):
    count: int = 1
    share: float = 0.5
    is_on: bool = True
    names: str | list[int] = "all"
    extras: dict[str, Any] | None = None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share": 1},
        {"count": 10**400},
        {"names": [1, 2]},
        {"names": (1,)},
        {"names": range(2)},
        {"extras": {}},
        {"others": "not ours"},
    ],
)
def test_what_fits(changes):
    check_field_types(Settings(**changes), Settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": "1"}, "count must be a whole number, got '1'"),
        ({"count": True}, "count must be a whole number, got True"),
        ({"count": 1.0}, "count must be a whole number, got 1.0"),
        ({"share": float("nan")}, "share must be a finite number, got nan"),
        ({"share": -float("inf")}, "share must be a finite number, got -inf"),
        ({"share": 10**400}, "share must be a finite number, got 1000"),
        ({"share": None}, "share must be a finite number, got None"),
        ({"is_on": 1}, "is_on must be true or false, got 1"),
        ({"names": [1.5]}, r"names must be a string or a list, each a whole number, got \[1.5\]"),
        ({"names": {"a": 1}}, "names must be a string or a list"),
        ({"extras": []}, r"extras must be a mapping or None, got \[\]"),
    ],
)
def test_what_does_not(changes, message):
    with pytest.raises(OrdMoEConfigError, match=message):
        check_field_types(Settings(**changes), Settings)
    check_field_types(Settings(**changes), Settings, skip=changes)
