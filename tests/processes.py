"""Stages and tools as real processes that start in a tenth of a second: forked from a server that has
imported them.

They take the command line's path (argv, launch, exit status, stderr), can be killed, and can be many ranks.
"""

import importlib
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import time

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["pytest", "midtrain", "rl", "evaluate", "analyze", "data", "tyro",
                             "torch._dynamo", "matplotlib.backends.backend_agg", "matplotlib.pyplot"])


def _main(argv, env, folder, name):
    stage = importlib.import_module(name)
    os.environ.update(env)
    for fd, stream in (1, "stdout"), (2, "stderr"):
        file = f"{folder}/{stream}.{env.get('RANK', 0)}"
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    if "FILE_LIMIT" in env:                               # bytes a file may have
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(env["FILE_LIMIT"]),) * 2)
    sys.argv = [f"{name}.py", *argv]
    if name in ("data", "generate", "evaluate", "analyze"):   # they do more under __main__ than launch()
        runpy.run_path(stage.__file__, run_name="__main__")
    else:
        stage.launch(stage.main, stage.Config, stage.recipe)


class Process:
    """One run: `world` ranks of a stage with these flags, started at once."""

    def __init__(self, folder, *flags, world=1, stage="midtrain", **env):
        self.folder = folder
        os.makedirs(folder, exist_ok=True)
        ranks = [{}]
        if world > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            ranks = [dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port)) for r in range(world)]
        self.ranks = [FORK.Process(target=_main, args=(flags, env | rank, str(folder), stage), daemon=True)
                      for rank in ranks]
        for process in self.ranks:
            process.start()

    def running(self):
        return all(process.is_alive() for process in self.ranks)

    def kill(self):
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()

    def wait(self, timeout=60):
        """Exit status: the first rank's that failed, else 0. All end when one fails, as in torchrun."""
        end = time.monotonic() + timeout
        while any(process.exitcode is None for process in self.ranks):
            if any(process.exitcode for process in self.ranks):
                break
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"{timeout} s: {self.text('stdout')}{self.text('stderr')}")
            time.sleep(0.005)
        status = next((process.exitcode for process in self.ranks if process.exitcode), 0)
        self.kill()
        return status

    def text(self, name, rank=0):
        with open(os.path.join(self.folder, f"{name}.{rank}")) as f:
            return f.read()
