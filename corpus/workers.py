"""Worker processes: each sets itself up once, and none outlives the call that started it."""

import contextlib
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

from cli import InputError

_state = None                            # in a worker process: what its start(*args) returned


class Workers:
    """Processes to hand work to. A function is called with the process's state in front of its arguments."""

    def __init__(self, executor):
        self.executor = executor

    def submit(self, function, *args):
        """The Future of function(state, *args)."""
        return self.executor.submit(_call, function, *args)

    def map(self, function, items):
        """function(state, item) of each item, in their order."""
        futures = [self.submit(function, item) for item in items]
        return (future.result() for future in futures)


@contextlib.contextmanager
def workers(count, start, args, hint="run the command again with fewer"):
    """`count` Workers. Each process calls start(*args) once; what that returns is its state. They are forked
    from a server that has loaded start's module. Work that has not begun when the block ends is dropped.
    InputError with the hint where the system killed a process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([start.__module__])
    executor = ProcessPoolExecutor(count, context, _begin, (start, args))
    try:
        yield Workers(executor)
    except BrokenProcessPool:
        raise InputError(f"--workers={count}: a worker was killed, most likely for memory; {hint}") from None
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(start, args):
    global _state
    end_with_parent()
    _state = start(*args)


def _call(function, *args):
    return function(_state, *args)


def end_with_parent():
    """In a worker: it does not outlive a killed call."""
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True).start()
