"""The script that kills saves and exports finds the older or the newer adapter, whole."""

from examples.benchmarks.kill_while_saving import run


def test_what_is_left_is_one_of_them(tmp_path):
    for counts in run(tmp_path, kills=12).values():
        assert counts["older"] + counts["newer"] == 12
        assert counts["neither"] == 0
