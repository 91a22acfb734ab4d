"""The table of constants says what the constants are."""

import re

from ordmoe_peft.experts import tuning


def number(text: str) -> int:
    return (
        1 << int(text[1:].translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")))
        if text[1:].isdigit() and (text[1] in "⁰¹²³⁴⁵⁶⁷⁸⁹")
        else int(text.replace(",", ""))
    )


def test_each_constant_has_a_row_with_its_value():
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \| [^|]+ \| [^|]+ \|$", tuning.__doc__, re.MULTILINE)
    table = {}
    for names, values in rows:
        table |= dict(zip(re.findall(r"`(\w+)`", names), map(number, values.strip().split(", ")), strict=True))
    assert table == {name: value for name, value in vars(tuning).items() if name.isupper()}
