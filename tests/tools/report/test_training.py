import re
import sys

from ordmoe_peft.tools.report import train_report
from tests import models, text
from tests.test_ordmoe import error_of, main, save_base, save_data, train_arguments
from tests.tools.report.pages import Page, log_history


def test_training_page_says_where_the_run_went(tmp_path, undrawn):
    findings = [
        {"name": "end_order", "message": "Only by the end.", "severity": "note"},
        {"name": "runaway_tier", "message": "Tier 3 fell.", "severity": "warning"},
    ]
    settings = {"erl_coef": 0.01, "run_name": None, "targets": ["router", "experts"]}
    history = [*log_history(), {"train_seconds_per_step": 2.5, "peak_memory_bytes": 3e9}]
    words = Page(train_report(history, settings, tmp_path, findings)).text
    assert words.index("Warning: runaway tier. Tier 3 fell.") < words.index("Note: end order. Only by the end.")
    # First and last in training, last on held-out data.
    assert re.search(
        r"tier 1 -0\.050 -0\.050 1 to 20 -0\.080 tier 1, without end tokens -0\.150 -0\.150 1 to 20 — ", words
    )
    assert re.search(r"tier 3 -2\.050 -40\.050 1 to 20 — ", words)
    assert re.search(r"seconds per step 2\.500 .*peak memory \(GB\) 3\.000", words)
    assert re.search(r"erl_coef 0\.01 All other settings \(2\) .*run_name — .*targets router, experts", words)


def test_what_was_measured_once_has_one_value(tmp_path, undrawn):
    """Tiers in one step of the run, or tier 1 in all and the others in one."""
    once = {"tier_1/log_likelihood": -0.5, "tier_2/log_likelihood": -5.708, "step": 9}
    words = Page(train_report([once], {}, tmp_path)).text
    assert "measured once in step held out, last" in words
    assert "tier 2 -5.708 9 — " in words
    assert "9 steps." in words
    words = Page(train_report([{"tier_1/log_likelihood": -0.9, "step": 1}, once], {}, tmp_path)).text
    assert "first last in steps held out, last tier 1 -0.900 -0.500 1 to 9 — " in words
    assert "tier 2 — -5.708 9 — " in words


def test_a_tier_that_is_not_logged_hides_no_other(tmp_path, undrawn):
    """As with `log_tiers_every=0`; and the tenth comes after the second."""
    entry = {f"tier_{tier}/log_likelihood": -float(tier) for tier in (10, 1, 3)} | {"step": 1}
    words = Page(train_report([entry], {}, tmp_path)).text
    assert words.index("tier 1 -1.000") < words.index("tier 3 -3.000") < words.index("tier 10 -10.000")


def test_what_is_missing_is_left_out(tmp_path):
    """One step, one tier, a loss that is no number; and no step at all."""
    history = [{"loss": float("nan"), "tier_1/log_likelihood": -1.0, "step": 1}]
    path = train_report(history, {}, tmp_path / "train")
    assert {file.stem for file in path.parent.glob("*.png")} == {"likelihood", "tier_1"}
    Page(train_report([], {}, tmp_path / "nothing"))


def test_train_writes_a_report_when_asked(tmp_path, capsys, monkeypatch):
    base = save_base(models.qwen3_moe(), tmp_path / "base")
    data = save_data(text.conversations(), tmp_path / "data")
    folder = tmp_path / "report"
    arguments = train_arguments(base, data, tmp_path / "out", report=folder, logging_steps=1, hub_token="hf_secret")
    assert main(arguments) == 0
    assert f"Report: {folder / 'report.html'}" in capsys.readouterr().out
    page = Page(folder / "report.html")
    assert "2 steps" in page.text
    assert "tier 3, without end tokens" in page.text
    assert "seconds per step" in page.text
    assert "hf_secret" not in page.source
    assert (folder / "likelihood.png").is_file()

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    untrained = train_arguments(base, data, tmp_path / "untrained", report=folder)
    assert "pip install 'ordmoe-peft[report]'" in error_of(capsys, untrained)
    assert not (tmp_path / "untrained").exists()
