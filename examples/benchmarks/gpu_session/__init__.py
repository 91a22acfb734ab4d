"""What runs on a GPU, checked and measured by one script of at most ten minutes.

    python -m examples.benchmarks.gpu_session                      # real sizes on a card, toy sizes without one
    python -m examples.benchmarks.gpu_session --sections a d       # two of them

Each section is a process of its own with a limit in time, so that a crash or a hang costs one row. It needs neither a
network nor the tests; where these are at hand, those that want a GPU are run as well.
"""
