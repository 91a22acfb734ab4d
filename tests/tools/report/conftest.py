import pytest
from matplotlib.figure import Figure

from ordmoe_peft.tools.report import page


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without their pictures, which take longer than all the rest."""
    monkeypatch.setattr(page, "render", lambda plot, directory, is_for_phones=False: "data:image/svg+xml;base64,")


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that reports draw, as they are saved."""
    figures = []
    save = Figure.savefig

    def record(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self not in figures:
            figures.append(self)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures
