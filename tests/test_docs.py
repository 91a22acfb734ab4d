"""Every code block of README.md, docs/ and examples/real_weights runs, from the root, as a reader would run it.

A block is run as it stands; in `python` blocks hub ids are replaced by the shipped base. `bash gpu` marks what needs a
GPU, the hub, an environment of its own or many minutes: there each command's options are parsed, and its files looked
for.
"""

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import ordmoe


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [ROOT / "examples/real_weights/README.md", ROOT / "examples/real_weights/RESULTS.md"]
BLOCK = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What blocks write goes into a folder of the test's own, beside what they read.
READ = ("adapters", "docs", "examples", "tests", "README.md", "Makefile", "pyproject.toml")
BASE = "examples/easy_vqa/base"
HUB_IDS = {"Qwen/Qwen3-VL-30B-A3B-Instruct": BASE}


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Language, mark and text of each code block."""
    yield from ((language, mark or "", text) for language, mark, text in BLOCK.findall(page.read_text()))


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


@pytest.fixture
def working_copy(tmp_path, monkeypatch):
    for name in READ:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks(page, working_copy):
    namespace: dict = {}
    for language, mark, text in blocks(page):
        if language == "python":
            for name, stand_in in HUB_IDS.items():
                text = text.replace(name, stand_in)
            exec(compile(text, page.name, "exec"), namespace)
        elif language == "bash":
            for words in commands(text):
                (look_at if mark == "gpu" else run)(words)
        elif language in PARSERS:
            PARSERS[language](text)
        else:
            assert language == "text", f"a block in {language}: teach this test to read it"


def test_notebook(working_copy):
    """Its code cells, one after another; `examples/quickstart` and the base are all that it reads."""
    cells = json.loads((ROOT / "docs/quickstart.ipynb").read_text())["cells"]
    namespace: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    before, after = ([tier.log_likelihood for tier in namespace[name]] for name in ("before", "after"))
    assert after[2] < before[2] - 0.3 and after[0] > before[0] - 0.1, "the text of the notebook says so"


def run(words: list[str]) -> None:
    """Run `ordmoe`; of other commands, see that what they name is there."""
    if words[0] == "ordmoe":
        assert ordmoe.main(words[1:]) == 0, words
    else:
        look_at(words)


def look_at(words: list[str]) -> None:
    """See that a command's options, files and modules exist."""
    words = [word for word in words if not re.fullmatch(r"\w+=\S+", word)]  # variables that are set
    program, *rest = words or [""]
    program = Path(program).name
    if program == "ordmoe":
        parse(rest)
    elif program == "python" and rest[0] == "-m":
        assert rest[1] in ("venv", "pip", "build") or importlib.util.find_spec(rest[1]), words
    elif program == "python":
        assert Path(rest[0]).is_file() or rest[0] == "convert_hf_to_gguf.py", words
    elif program == "accelerate":
        options = dict(zip(rest[1::2], rest[2::2], strict=False))
        assert Path(options["--config_file"]).is_file()
        assert options["-m"] == "ordmoe"
        parse(rest[rest.index("ordmoe") + 1 :])
    elif program == "make":
        assert re.search(rf"^(?:\.PHONY:.*\b)?{rest[0]}\b", Path("Makefile").read_text(), re.MULTILINE), words
    elif program == "pip":
        extras = {name for found in re.findall(r"\[([\w,]+)\]", " ".join(rest)) for name in found.split(",")}
        assert all(re.search(rf"^{name} = \[", Path("pyproject.toml").read_text(), re.MULTILINE) for name in extras)
    else:
        assert program in ("", "export", "unset", "git", "cd", "source", "eval", "kill"), words


def parse(words: list[str]) -> None:
    """Parse the options of an `ordmoe` command, as it does, without running it."""
    command, *rest = words
    if "--help" not in rest:
        ordmoe.module_of(command).build_parser().parse_args_and_config(rest)


def rows(text: str) -> None:
    for line in text.splitlines():
        json.loads(line)


PARSERS = {"json": json.loads, "jsonl": rows, "yaml": yaml.safe_load}


def test_pages_link_to_what_is_there():
    for page in [*PAGES, *EXAMPLES, ROOT / "CONTRIBUTING.md", ROOT / "llms.txt"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_page_is_listed():
    index, for_machines = (ROOT / "docs/README.md").read_text(), (ROOT / "llms.txt").read_text()
    for page in PAGES[1:]:
        if page.name != "README.md":
            assert f"({page.name})" in index and f"(docs/{page.name})" in for_machines, page.name
