"""The script that kills runs finds a resumed one to be the same bits."""

from examples.benchmarks import kill_and_resume
from examples.benchmarks.kill_and_resume import run


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    results = run(tmp_path, kills=1)
    assert len(results) == 1
    assert all(kill.compared >= kill_and_resume.STEPS and kill.differing == 0 and kill.same_weights for kill in results)
