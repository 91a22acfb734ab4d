"""The rules of the house that a reader of one file cannot see: who imports whom, and where each module is tested."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "ordmoe_peft"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# The core, in the paper's order. Tools and commands stand on top of it.
CORE = {
    *("errors", "files", "registration", "_compat", "layer_search", "moe_model", "router_output", "forward"),
    *("adapter", "tiers", "experts", "quantization", "objectives", "data", "training", "merging", "monitoring"),
}
# Each row imports itself and the rows before it. What is in none serves all.
ROWS = (
    ("objectives", "tiers.ranking", "experts.layout", "experts.grouped", "experts.frozen", "experts.tuning"),
    ("layer_search", "moe_model", "router_output", "quantization"),
    ("forward", "tiers", "experts", "adapter", "monitoring", "merging"),
    ("data", "training"),
)
# Package or module → the libraries that only it and what is named with it may import.
LIBRARIES = {
    "trl": {"data", "training", "tools", "cli"},
    "datasets": {"data", "training", "tools", "cli"},
    "peft": {
        "_compat",
        "registration",
        "adapter",
        "tiers",
        "experts",
        "monitoring",
        "merging",
        "training",
        "tools",
        "cli",
    },
    "matplotlib": {"tools.report"},
    "pandas": {"tools", "cli"},
    "jinja2": {"tools", "cli"},
    "rich": {"cli"},
}
# What knows tensors alone.
TENSORS_ALONE = ("objectives", "tiers.ranking", "experts.layout", "experts.grouped", "experts.frozen", "experts.tuning")
# Tests of a promise that several modules keep together.
WHOLE_STORIES = {
    "adapter/test_lora_users.py",
    "adapter/test_mutations.py",
    "cli/test_bad_inputs.py",
    "experts/test_replaced_forwards.py",
    "quantization/test_equality.py",
    "quantization/test_loading.py",
    "quantization/test_tied_stacks.py",
    "experts/test_as_on_gpus.py",
    "training/test_images.py",
    "training/test_sequential_passes.py",
}
# Tested where their promises are: contracts with upstream, and every error where it is raised.
TESTED_ELSEWHERE = {"_compat", "training._compat", "errors"}


def trees() -> Iterator[tuple[str, ast.Module]]:
    for name, path in MODULES.items():
        yield name, ast.parse(path.read_text())


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Full names of the modules that a module imports, anywhere in it; ours without the package's name."""
    is_package = MODULES[name].name == "__init__.py"
    own = name.split(".") if is_package and name != "__init__" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = own[: len(own) - node.level + 1] + ([node.module] if node.module else [])
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield full if full in MODULES else ".".join(base)


def imported_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def is_within(name: str, parents: set[str] | tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def test_every_module_is_core_or_workshop():
    unknown = {name.split(".")[0] for name in MODULES} - CORE - {"tools", "cli", "__init__"}
    assert not unknown, "name it in CORE, or put it in tools or cli"


def test_the_command_imports_the_standard_library_until_it_runs():
    tree = ast.parse((PACKAGE.parent / "ordmoe.py").read_text())
    assert {name.split(".")[0] for node in tree.body for name in imported_by(node)} <= sys.stdlib_module_names


def test_the_core_imports_no_tool():
    wrong = [
        (name, imported)
        for name, tree in trees()
        if is_within(name, tuple(CORE))
        for imported in imports(name, tree)
        if is_within(imported, ("tools", "cli"))
    ]
    assert not wrong


def test_rows_of_the_core_import_none_after_them():
    def row_of(name: str) -> int | None:
        return next((index for index, row in enumerate(ROWS) if is_within(name, row)), None)

    wrong = [
        (name, imported)
        for name, tree in trees()
        for imported in imports(name, tree)
        if None not in (row_of(name), row_of(imported)) and row_of(imported) > row_of(name)
    ]
    assert not wrong


def test_no_tool_imports_a_command():
    wrong = [
        (n, i) for n, tree in trees() if is_within(n, ("tools",)) for i in imports(n, tree) if is_within(i, ("cli",))
    ]
    assert not wrong


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_stay_where_they_belong(library):
    wrong = [
        name
        for name, tree in trees()
        if not is_within(name, tuple(LIBRARIES[library]))
        and any(is_within(imported, (library,)) for imported in imports(name, tree))
    ]
    assert not wrong


def test_tensor_code_knows_tensors_alone():
    known = {"torch", "errors", *TENSORS_ALONE, *sys.stdlib_module_names}
    wrong = [
        (name, imported)
        for name, tree in trees()
        if is_within(name, TENSORS_ALONE)
        for imported in imports(name, tree)
        if imported and not is_within(imported, tuple(known))
    ]
    assert not wrong


def private_uses(tree: ast.Module) -> Iterator[str]:
    """Names with one underscore that are taken from another object or module than the file's own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield from (alias.name for alias in node.names if is_private(alias.name))
            yield from (part for part in (node.module or "").split(".") if is_private(part))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            is_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if not is_own and not is_super:
                yield node.attr


def is_private(name: str) -> bool:
    is_public = name in ("_", "_replace")  # the latter is a named tuple's
    return name.startswith("_") and not name.startswith("__") and not is_public


def names_of_ours(tree: ast.Module) -> Iterator[str]:
    """Names that a module gives to functions, classes, constants, fields and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def test_private_names_of_others_stay_in_compat():
    ours = {name for _, tree in trees() for name in names_of_ours(tree)}
    wrong = [
        (name, use)
        for name, tree in trees()
        if name.rpartition(".")[2] != "_compat"
        for use in private_uses(tree)
        if use not in ours
    ]
    assert not wrong


def test_every_module_has_a_test_file_on_its_path():
    tests = PACKAGE.parent / "tests"
    missing = [
        name
        for name, path in MODULES.items()
        if path.name != "__init__.py" and name not in TESTED_ELSEWHERE
        if not (tests / path.relative_to(PACKAGE).parent / f"test_{path.stem}.py").exists()
    ]
    assert not missing


def test_there_is_no_test_file_of_a_module_that_is_gone():
    tests = PACKAGE.parent / "tests"
    files = {path.relative_to(PACKAGE).with_name(f"test_{path.stem}.py") for path in MODULES.values()}
    folders = {path.relative_to(PACKAGE).parent for path in MODULES.values()} - {Path()}
    found = {file.relative_to(tests) for folder in folders for file in (tests / folder).glob("test_*.py")}
    assert {str(file) for file in found - files} == WHOLE_STORIES


def test_files_beside_the_code_are_shipped():
    listed = re.search(r"^ordmoe_peft = (\[.*\])$", (PACKAGE.parent / "pyproject.toml").read_text(), re.MULTILINE)
    patterns = ast.literal_eval(listed[1])
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == {path for pattern in patterns for path in PACKAGE.glob(pattern)}
