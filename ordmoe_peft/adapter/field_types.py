"""See that the fields of a dataclass hold what their annotations say, before anything is done with them."""

import sys
import types
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin

from ..errors import OrdMoEConfigError


WORDS = {int: "a whole number", float: "a finite number", str: "a string", bool: "true or false", dict: "a mapping"}


def check_field_types(settings: Any, owner: type, skip: Collection[str] = ()) -> None:
    """Check the fields that the dataclass `owner` itself declares but those in `skip`; its bases check theirs.

    Raises:
        [`OrdMoEConfigError`]: a value is of another type than its annotation.
    """
    for name, hint in owner.__annotations__.items():
        if name not in skip and not _matches(value := getattr(settings, name), hint):
            raise OrdMoEConfigError(f"{name} must be {_in_words(hint)}, got {value!r}.")


def _matches(value: Any, hint: Any) -> bool:
    kind = get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        return any(_matches(value, option) for option in get_args(hint))
    if kind is list:
        is_list = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
        return is_list and all(_matches(item, *get_args(hint)) for item in value)
    if kind in (int, float):  # True is an int to Python, but no number here
        if not isinstance(value, Integral if kind is int else Real) or isinstance(value, bool):
            return False
        if kind is float:  # not isfinite, which overflows at larger whole numbers
            return -sys.float_info.max <= value <= sys.float_info.max  # type: ignore[operator] # numbers.Real has both
        return True
    return isinstance(value, kind)


def _in_words(hint: Any) -> str:
    kind = get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    if kind is list:
        return f"a list, each {_in_words(*get_args(hint))}"
    return WORDS.get(kind, "None")
