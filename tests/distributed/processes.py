"""Run a function in several CPU processes that accelerate takes for a distributed run (gloo), with a time limit."""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch


# A server that has imported everything and started no thread: what is forked from it is ready at once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed.runs"])


def run_processes(
    function: Callable[..., Any],
    *arguments: Any,
    num_processes: int = 2,
    timeout: float = 120,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Call `function(*arguments)` once in each process, as ranks 0, 1, …, and return what the ranks return.

    Args:
        function (`Callable`): a module's function; what it returns is passed through `torch.save`.
        num_processes (`int`, defaults to 2): 1 is a run without any other process.
        timeout (`float`, defaults to 120): seconds after which the processes are killed, so that none waits for ever.
        environment (`dict`, *optional*): variables as `accelerate launch` sets them.

    Raises:
        `AssertionError`: a process failed or did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"rank-{rank}" for rank in range(num_processes)]
        port = _free_port()
        processes = [
            _context.Process(
                target=_run_rank, args=(rank, num_processes, port, path, environment or {}, function, arguments)
            )
            for rank, path in enumerate(paths)
        ]
        for process in processes:
            process.start()
        try:
            _wait_for(processes, timeout)
            results = [torch.load(path, weights_only=False) if path.exists() else "no result" for path in paths]
            codes = [process.exitcode for process in processes]
            assert codes == [0] * num_processes, f"exit codes {codes}:\n" + "\n".join(map(str, results))
        finally:
            for process in processes:
                process.kill()
                process.join()
    return results


def _wait_for(processes: list[Any], timeout: float) -> None:
    """Until all have ended, or one has failed: the others would wait for it."""
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        running = [process.sentinel for process in processes if process.is_alive()]
        wait(running, timeout=max(deadline - time.monotonic(), 0))
        if any(process.exitcode for process in processes):
            return
    assert not any(process.is_alive() for process in processes), f"still running after {timeout} seconds"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run_rank(
    rank: int,
    num_processes: int,
    port: int,
    path: Path,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple,
) -> None:
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
    if num_processes > 1:
        os.environ |= {name: str(value) for name, value in launched.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(silence, stream.fileno())
    try:
        torch.save(function(*arguments), path)
    except BaseException:
        torch.save(f"rank {rank}: {traceback.format_exc()}", path)
        os._exit(1)
    # Without the clean-up of libraries, which may wait for the other processes.
    os._exit(0)
