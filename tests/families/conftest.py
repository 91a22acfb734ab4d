"""`pytest tests/families --table docs/FAMILIES.md` writes the table of families from what the run found."""

from pathlib import Path

import pytest

from tests.families.subject import Subject
from tests.families.table import Results


def pytest_addoption(parser):
    parser.addoption("--table", metavar="FILE", type=Path, help="write the table of families, as Markdown, to FILE")


def pytest_configure(config):
    if config.getoption("--table", None) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(config.getoption("--table")))


@pytest.fixture(scope="module")
def subject(request) -> Subject:
    """A row's tiny model, its inputs and its logits; built once for the tests that follow one another."""
    return Subject(request.param)


@pytest.fixture(autouse=True)
def _row_in_report(request, record_property):
    if "subject" in request.fixturenames:
        record_property("row", request.getfixturevalue("subject").row.id)
