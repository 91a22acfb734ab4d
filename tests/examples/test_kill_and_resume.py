"""The script that kills runs finds resumed ones to be the same bits, and would find others not to be."""

from examples.benchmarks import kill_and_resume
from examples.benchmarks.kill_and_resume import run


def test_killed_runs_go_on_to_the_same_bits(tmp_path):
    results = run(tmp_path, kills=2)
    assert [kill.responses for kill in results] == ["reference", "generated"]
    assert all(kill.compared >= kill_and_resume.STEPS and kill.differing == 0 and kill.same_weights for kill in results)
