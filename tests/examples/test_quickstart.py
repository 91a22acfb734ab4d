import json
from pathlib import Path

from examples.quickstart.make import KINDS, make


SHIPPED = Path("examples/quickstart")


def test_the_shipped_sample_is_what_the_script_writes(tmp_path):
    make(tmp_path)
    data = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    assert len(data) == 2 + 64 + 16
    assert all((SHIPPED / path).read_bytes() == (tmp_path / path).read_bytes() for path in data)
    sizes = {"train": 256, "test": 64}
    for part, size in sizes.items():
        rows = [json.loads(line) for line in (SHIPPED / f"{part}.jsonl").read_text().splitlines()]
        assert [row["kind"] for row in rows] == list(KINDS) * (size // 4)
        assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*.*")) < 300_000
    row = next(line for line in (SHIPPED / "README.md").read_text().splitlines() if line.startswith("{"))
    assert row in (SHIPPED / "train.jsonl").read_text().splitlines()
