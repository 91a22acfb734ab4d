"""The folder of an export: written whole or not at all, and never over anything else."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from ...errors import OrdMoEConfigError
from ...files import whole_folder


EXPORT_NAME = "ordmoe_export.json"


def check_export_folder(output: str | Path) -> Path:
    """The folder itself; raises [`OrdMoEConfigError`] where it holds something else than an earlier export."""
    output = Path(output).resolve()  # a link stays, and the folder that it points to is written
    others = _no_export(output)
    if others:
        raise OrdMoEConfigError(
            f"{output} holds {others[0]}, which no earlier export wrote there. Choose a folder that is not there yet."
        )
    return output


@contextmanager
def export_folder(output: str | Path, form: str, adapter: Path) -> Iterator[Path]:
    """Within the block, write an export to the folder given; at its end it takes the name `output`, in one step.

    Args:
        output (`str` or `Path`): folder that is not there, or is empty, or holds an earlier export, which goes.
        form (`str`): what is exported to.
        adapter (`Path`): the adapter's folder.

    Raises:
        [`OrdMoEConfigError`]: `output` holds something else.
    """
    output = check_export_folder(output)
    with whole_folder(output, replace=True) as folder:
        yield folder
        files = sorted(path.name for path in folder.iterdir())
        record = {"form": form, "adapter": adapter.name, "ordmoe_peft": version("ordmoe-peft"), "files": files}
        (folder / EXPORT_NAME).write_text(json.dumps(record, indent=2) + "\n")


def _no_export(output: Path) -> list[str]:
    """What is in `output` beside an earlier export; the folder's own name where it is a file."""
    if not output.is_dir():
        return [output.name] if output.exists() else []
    names = sorted(path.name for path in output.iterdir())
    known: list[str] = []
    with suppress(OSError, ValueError, LookupError, TypeError):  # no such record, or one that no export wrote
        known = [str(name) for name in json.loads((output / EXPORT_NAME).read_text())["files"]] + [EXPORT_NAME]
    return [name for name in names if name not in known]
