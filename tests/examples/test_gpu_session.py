"""The session on a card, on the CPU at toy size: every section says what it found, and what fails costs one row."""

import json
import sys
import threading
import time
import warnings
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from examples.benchmarks.gpu_session import __main__ as session
from examples.benchmarks.gpu_session import equality, one_layer, training, waits
from examples.benchmarks.gpu_session.rows import SIZES, Row, tried
from ordmoe_peft.experts import layout
from ordmoe_peft.experts.tuning import work_sizes
from ordmoe_peft.quantization import storage
from tests.training.test_precision import Scaled


TOY = SIZES["toy"]


def rows_of(letter: str) -> dict[str, Row]:
    module, function, _ = session.SECTIONS[letter]
    rows = list(getattr(import_module(f".{module}", session.__package__), function)(TOY, "cpu"))
    assert all(json.loads(json.dumps(row.to_dict())) for row in rows)
    return {row.case: row for row in rows}


def verdicts(rows: dict[str, Row], *words: str) -> set[str]:
    """Of the rows whose case has one of these words, or of all."""
    return {row.verdict.split(":")[0] for case, row in rows.items() if not words or any(word in case for word in words)}


class TestSections:
    def test_a_holds_the_device_against_the_cpu(self, monkeypatch):
        monkeypatch.setattr(equality, "LAYOUTS", {name: equality.LAYOUTS[name] for name in ("not gated", "padded")})
        rows = rows_of("a")
        assert verdicts(rows, "versions", "device") == {"-"}
        assert f"torch {torch.__version__}" in rows["versions"].figure
        ways = ("row by row", "blocks of 1", "blocks of 3", "all experts at once", "expert by expert")
        for packing in equality.PACKINGS:
            assert all(rows[f"{way}, {packing}, bf16"].verdict == "ok" for way in ways)
        assert verdicts(rows, "packed and unpacked", "grouped_mm") == {"ok"}

    def test_b_times_and_counts_a_layer(self):
        rows = rows_of("b")
        assert len(rows) == 2 * 2 * len(TOY.tokens)
        assert verdicts(rows) == {"ok"}
        assert all(row.numbers["host"] > 0 for row in rows.values())

    def test_c_compares_sizes(self):
        rows = rows_of("c")
        assert {"64 MiB at a time, Zipf 1", "expert by expert, Zipf 1", "dense, grouped_mm, bf16, Zipf 1"} <= set(rows)
        assert verdicts(rows) == {"-"}
        assert all(row.numbers["peak"] > 0 for row in rows.values())

    def test_d_names_the_lines(self):
        rows = rows_of("d")
        assert [rows[f"a layer's {part}"].numbers["waits"] for part in ("forward", "backward")] == [1, 0]
        assert "ordmoe_peft/experts/layout.py:" in rows["a layer's recompute and backward"].figure
        assert verdicts(rows, "layer") == {"ok"}
        assert rows["a training step"].numbers["ours"] >= 4

    def test_e_trains_by_the_plan(self):
        rows = rows_of("e")
        assert list(rows) == ["batched", "sequential", "losses of both"]
        assert verdicts(rows) == {"ok"}
        assert rows["batched"].numbers["peak"] > rows["sequential"].numbers["peak"]

    def test_f_compares_experts_in_ram(self):
        rows = rows_of("f")
        if list(rows) == ["experts in RAM"]:
            pytest.skip(rows["experts in RAM"].verdict)
        assert rows["loss and gradients"].verdict == "ok"
        assert not any(rows["loss and gradients"].numbers.values()), "CPUs repeat themselves"
        assert verdicts(rows) == {"ok", "-"}

    def test_g_generates(self):
        rows = rows_of("g")
        assert verdicts(rows, "fp16", "pytest") == {"not available"}
        assert rows["generation held to tier 1"].verdict == "ok"
        assert all(row.numbers["tokens_per_second"] > 0 for case, row in rows.items() if "generation" in case)


class TestWhatIsWrongIsSaid:
    def test_other_numbers(self, monkeypatch):
        monkeypatch.setattr(equality, "LAYOUTS", {"gated": equality.PLAIN})
        run = equality.run_row_by_row
        monkeypatch.setattr(equality, "run_row_by_row", lambda *args: 1.1 * run(*args))
        row = equality.compare("row by row", "row by row", torch.bfloat16, "dense", TOY, "cpu")
        assert row.verdict.startswith("failed: 3 are wrong, first gated, skewed")
        monkeypatch.setattr(equality, "run_row_by_row", lambda *args: torch.nan * run(*args))
        assert equality.compare("", "row by row", torch.bfloat16, "dense", TOY, "cpu").has_failed
        monkeypatch.setattr(equality, "run_row_by_row", lambda *args: torch.zeros(2) @ torch.zeros(3))
        row = equality.compare("", "row by row", torch.bfloat16, "dense", TOY, "cpu")
        assert row.verdict.startswith("failed: 3 are wrong, first gated, skewed, absent experts: ")
        assert "size" in row.verdict

    def test_a_device_that_packs_other_bytes(self, monkeypatch):
        devices = iter([0.0, 0.3])
        pack = storage.pack_experts
        monkeypatch.setattr(
            equality, "pack_experts", lambda weight, *args, **kw: pack(weight + next(devices), *args, **kw)
        )
        assert equality.compare_packing("", torch.float32, {"quant_type": "nf4"}, "cpu").has_failed

    def test_one_more_wait(self, monkeypatch):
        group = layout.group_by_expert
        monkeypatch.setattr(
            layout, "group_by_expert", lambda index, *args: (index.max().item(), group(index, *args))[1]
        )
        forward, backward, again = waits.in_a_layer(TOY, "cpu")
        assert forward.verdict == "failed: 1 expected"
        assert "test_gpu_session.py" not in forward.figure, "the frame of the package is named"
        assert backward.verdict == "ok"
        assert again.has_failed

    def test_calls_of_cuda(self):
        times = {"events": 1.0, "host": 2.0}
        calls = one_layer.Calls(launches=140, waits=2, copies_down=1, milliseconds=0.5)
        row = one_layer.described("forward", one_layer.FORWARD, times, calls)
        assert row.verdict == "failed: 1 expected"
        assert "1.00 ms by events, 2.00 on the host, 0.50 of kernels; launches 140, waits 2" in row.figure

    def test_memory_beside_the_plan(self, monkeypatch):
        class Plan:
            total = 3 * 2**30

            class activations:
                peak = 2**30

        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 4 * 2**30)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 5 * 2**30)
        said, off, numbers = training.memory_by_plan(2**30, Plan, "cuda")
        assert said.startswith("allocated 4.00 GiB, reserved 5.00, planned 3.00 (-25%)")
        assert off == -0.25
        assert numbers["planned"] == Plan.total

    def test_fp16_with_a_scaler(self, monkeypatch):
        """As accelerate sets it up on a card, here on a CPU."""
        on, packed = training.trainer_on, training.packed_model

        def trainer_on(model, batch, settings, folder, **changes):
            return on(model, batch, replace(settings, device="cpu"), folder, Scaled, **changes)

        monkeypatch.setattr(training, "trainer_on", trainer_on)
        monkeypatch.setattr(training, "packed_model", lambda size, _, *args, **kw: packed(size, "cpu", *args, **kw))
        row = training.train_in_fp16(TOY, "cuda")
        assert row.verdict == "ok", row
        assert row.figure.endswith("; 12 of 12 weights moved; scale 65536")

    def test_an_operation_that_fails_costs_its_row(self):
        row = tried("one", lambda: torch.zeros(2) @ torch.zeros(3))
        assert row.case == "one"
        assert row.verdict.startswith("failed: ")


class TestOnACard:
    """The lines that a card alone runs, with what CUDA answers."""

    @pytest.fixture(autouse=True)
    def card(self, monkeypatch):
        self.modes: list[str] = []
        answers = {
            "synchronize": lambda: None,
            "set_sync_debug_mode": self.modes.append,
            "mem_get_info": lambda *_: (20 * 2**30, 24 * 2**30),
            "get_device_capability": lambda *_: (8, 9),
            "get_device_name": lambda: "A card",
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        work_sizes.cache_clear()
        yield
        work_sizes.cache_clear()

    def test_what_is_there(self):
        _, device = equality.describe("cuda")
        assert device.figure.startswith("A card, compute capability 8.9, CUDA ")
        assert device.figure.endswith("20.0 of 24.0 GiB free; 128 MiB at a time, grouped_mm is a loop in bf16")

    def test_waits_that_torch_tells_in_any_thread(self):
        def warn():
            warnings.warn(waits.MESSAGE, stacklevel=1)

        with waits.waits("cuda") as found:
            assert self.modes == ["warn"]
            thread = threading.Thread(target=warn)
            thread.start()
            thread.join()
            warn()
            warnings.warn("another", stacklevel=1)
        assert self.modes == ["warn", "default"]
        ((place, times),) = found.items()
        assert times == 2
        assert place.startswith("tests/examples/test_gpu_session.py:")

    def test_times_by_events(self, monkeypatch):
        class Event:
            def __init__(self, enable_timing):
                self.at = None

            def record(self):
                self.at = time.perf_counter()

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        times = one_layer.timed(lambda: 0.02, time.sleep, 2, "cuda")
        assert times["host"] >= times["events"] >= 20


def child(code: str, limit: float) -> list[Row]:
    began = time.monotonic()
    rows = list(session.run_apart([sys.executable, "-c", code], limit))
    assert time.monotonic() - began < limit + 5
    return rows


SAYS_ONE = f"print('noise'); print({session.MARK + json.dumps(Row('one', '1 ms').to_dict())!r}, flush=True); "


class TestProcesses:
    def test_a_crash_costs_one_row(self):
        one, last = child(SAYS_ONE + "raise SystemExit('it broke')", 60)
        assert (one.case, one.verdict) == ("one", "-")
        assert last.verdict == "failed: it broke"

    def test_a_crash_without_a_word(self):
        (last,) = child("import os; os.abort()", 60)
        assert last.has_failed

    def test_a_hang_costs_one_row_and_what_it_started_ends(self):
        start = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
        one, last = child(SAYS_ONE + start, 2)
        assert one.verdict == "-"
        assert last.verdict == "failed: it ran past its 2 s"

    def test_without_time_nothing_starts(self):
        (row,) = child(SAYS_ONE, 0)
        assert row.verdict == "failed: no time was left"

    def test_all_in_one_table(self, monkeypatch, tmp_path, capsys):
        path = tmp_path / "figures.json"
        options = ["--sections", "b", "--size", "toy", "--output_file", str(path)]
        monkeypatch.setattr(sys, "argv", ["gpu_session", *options])
        assert session.main() == 0
        written = json.loads(path.read_text())
        assert written["size"] == "toy"
        assert {row["section"] for row in written["rows"]} == {"b"}
        assert len(written["rows"]) == 2 * 2 * len(TOY.tokens) + 1
        said = capsys.readouterr().out
        assert said.count("b: forward, 24 tokens, even") == 2, "when it is known, and in the table"

    def test_a_failed_row_is_the_exit_status(self, monkeypatch):
        monkeypatch.setattr(session, "run_apart", lambda command, limit: iter([Row("one", "", "failed: why")]))
        monkeypatch.setattr(sys, "argv", ["gpu_session", "--sections", "a", "--size", "toy"])
        assert session.main() == 1
