"""Scalars compared by sympy, in worker processes with a deadline."""

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

from grading.cores import CORES
from grading.math_answers import equal
from grading.scalars import readable


@functools.lru_cache(2048)
def _expression(s):
    """The sympy expression of a tidy scalar. latex2sympy takes 2(3) for a mixed number, R for r, decimals for
    floats and i for a name: so these are spelled otherwise, or replaced."""
    import sympy
    from latex2sympy2_extended import latex2sympy
    s = re.sub(r"([0-9.]+)\^\\circ", r"(\1\\cdot\\frac{\\pi}{180})", s)
    s = re.sub(r"([0-9]+)\.([0-9]+)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", s)
    s = re.sub(r"(?<![0-9}])([0-9]+)(\\frac\{[0-9]+\}\{[0-9]+\})", r"(\1+\2)", s)
    s = re.sub(r"(?<![\^_0-9])([0-9]+)(?=\()", r"\1\\cdot ", s)
    s = re.sub(r"(\\[A-Za-z]+)|([A-Z])(?:_\{?([A-Za-z0-9]+)\}?)?",
               lambda m: m[1] or f"{m[2].lower()}_{{9{m[3] or ''}}}", s)
    expression = latex2sympy(s, is_real=True, convert_degrees=False, normalization_config=None)
    return expression.xreplace({x: sympy.I for x in expression.free_symbols if x.name == "i"})


def _equal_scalars(gold, answer):
    """Whether two readable scalars are equal: numbers to 45 digits; expressions at points where the gold is
    defined (no root or logarithm of a negative number, unless it is about i), equations as multiples of each
    other there, identities only if they say the same; what has no values (relations) as math-verify says. For
    the workers: it may take for ever."""
    import math_verify
    import sympy
    from sympy.logic.boolalg import BooleanAtom
    a, b = _expression(gold), _expression(answer)
    if isinstance(a, BooleanAtom) or isinstance(b, BooleanAtom):       # 1 = 1 is no answer
        return False
    if a == b:
        return not a.has(sympy.nan, sympy.zoo)
    equations = {isinstance(x, sympy.Eq) for x in (a, b)}
    if equations == {True}:
        if sorted(map(str, (a.lhs.doit(), a.rhs.doit()))) == sorted(map(str, (b.lhs.doit(), b.rhs.doit()))):
            return True
        a, b = a.lhs - a.rhs, b.lhs - b.rhs
    if len(equations) > 1 or a.is_Rational and b.is_Rational:
        return False
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return math_verify.verify(a, b, timeout_seconds=None)
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    points, agreed, ratio = 7 if names else 1, 0, None if equations == {True} else 1
    tiny, positive = sympy.Float("1e-45", 60), () if a.has(sympy.I) else [
        e for e in (*(p.base for p in a.atoms(sympy.Pow) if not p.exp.is_integer),
                    *(log.args[0] for log in a.atoms(sympy.log))) if e.free_symbols]
    stepped = a.has(sympy.floor, sympy.ceiling) or b.has(sympy.floor, sympy.ceiling)
    for point in range(points):                           # of either sign, about 0.1 to 2, nothing special
        wide = 3 ** point if stepped else 1               # or up to 1,000, where steps are told apart
        at = {x: (-1) ** (point * (i + 1) // 2) * wide * sympy.Rational(
            104729 * (i + 1) * (point + 2) % 7907 + 401, 3571) for i, x in enumerate(names)}
        x, y = (sympy.N(e.subs(at), 60) for e in (a, b))
        if not (x.is_number and y.is_number and x.is_finite) or any(e.subs(at).is_negative for e in positive):
            continue
        if ratio is None:
            if (abs(x) <= tiny) != (abs(y) <= tiny):
                return False
            ratio = x / y if abs(x) > tiny else None
        elif not y.is_finite or abs(x - y * ratio) > tiny * (1 + abs(x)):
            return False
        else:
            agreed += 1
    if equations == {True} and agreed == 0:               # two identities: whatever holds everywhere
        return False
    return agreed >= min(points, 2) or agreed == 0 and math_verify.verify(a, b, timeout_seconds=None)


# -- the worker processes --------------------------------------------------------------------------------

SYMPY_SECONDS = 4.0        # that sympy may take for an answer
ANSWER_SECONDS = 5.5       # that an answer may take, with the wait for a worker
PATIENCE_SECONDS = 0.2     # that all workers may be busy before one more than the cores need is started
MOST_WORKERS = 32
WORKER_BYTES = 2 << 30     # of a worker's address space

# What the server is started with: this module by its name, wherever the caller stands.
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SERVER = f"import sys; sys.path[0] = {_ROOT!r}; from grading import sympy_workers; sympy_workers.serve()"


class Worker(NamedTuple):
    pid: int
    pipe: Connection
    golds: set             # the gold answers that it has parsed


class Pool:
    """Workers that are forked from one process which has imported sympy (and nothing else: no torch, no
    threads). So a new one takes milliseconds and a killed one is no loss.
    Each keeps the golds it has parsed, and a gold goes to a worker that had it, if idle.

    The parent keeps the deadlines and kills; the workers' own alarm is for the case that the parent is gone.
    All end when the parent does, however it ends: their sockets close.
    """

    def __init__(self):
        self.free = threading.Condition()                 # held to change what follows
        self.cores = CORES                                # workers that are kept
        self.idle = []                                    # Workers without a question
        self.count = 0                                    # of all workers, busy ones too
        self.server = None                                # (process, our end of its socket)
        self.known = {}                                   # {(gold, *answers): what was found}

    def ask(self, gold, answers):
        """True, False, or a text if there was no time or no memory."""
        key = gold, *answers
        if key in self.known:
            return self.known[key]
        self.start()
        end = time.monotonic() + ANSWER_SECONDS
        worker = self.take(gold, end)
        if worker is None:
            return "not decided: all workers are busy"
        try:
            worker.pipe.send_bytes(json.dumps(key).encode())
            if worker.pipe.poll(max(0.0, min(SYMPY_SECONDS, end - time.monotonic()))):
                equal = json.loads(worker.pipe.recv_bytes())
                worker.golds.add(gold)
                with self.free:
                    if len(self.known) > 20_000:
                        self.known.clear()
                    self.known[key] = equal
                    if self.count <= self.cores:
                        self.idle.append(worker)
                        self.free.notify()
                        return equal
            else:
                equal = "not decided in time"
        except (OSError, EOFError):
            equal = "not decided: the worker ran out of memory"
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)           # stuck, or one more than the cores need
        worker.pipe.close()
        self.gone()
        return equal

    def gone(self):
        with self.free:
            self.count -= 1
            self.free.notify()

    def take(self, gold, end):
        """An idle worker, by preference one that knows the gold, or a new one; None if there is no time."""
        with self.free:
            patience = min(end, time.monotonic() + PATIENCE_SECONDS)
            while not self.idle and self.count >= self.cores:
                now = time.monotonic()
                if now >= end:
                    return None
                if now >= patience and self.count < MOST_WORKERS:
                    break
                self.free.wait((patience if now < patience else end) - now)
            if self.idle:
                worker = next((w for w in self.idle if gold in w.golds), self.idle[-1])
                self.idle.remove(worker)
                return worker
            self.count += 1
        try:
            ours, theirs = socket.socketpair()
            pipe = Connection(ours.detach())
            with theirs:
                socket.send_fds(self.server[1], [b"w"], [theirs.fileno()])
            if pipe.poll(max(0.0, end - time.monotonic())):
                return Worker(int(pipe.recv_bytes()), pipe, set())
            pipe.close()
        except (OSError, EOFError, TypeError):            # the server is gone: the next call starts another
            self.close()
        self.gone()
        return None

    def start(self):
        """Starts the server, once; waits for its imports (not part of any answer's time)."""
        with self.free:
            if self.server is not None and self.server[0].poll() is None:
                return
            if importlib.util.find_spec("math_verify") is None:
                raise ModuleNotFoundError("math needs a package: pip install math-verify==0.9.0")
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=theirs,
                                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.server, self.idle, self.count = (process, ours), [], 0
            if ours.recv(1) != b"r":
                raise ModuleNotFoundError("the process that imports sympy and math-verify ended at once; see "
                                          f"{sys.executable} -c 'import math_verify'")

    def close(self):
        with self.free:
            if self.server is not None:
                process, pipe = self.server
                for connection in (pipe, *(worker.pipe for worker in self.idle)):
                    connection.close()
                self.server, self.idle, self.count = None, [], 0
                process.kill()
                process.wait()


def serve():
    """The server: forks a worker for each socket it is sent; ends when the parent's end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)         # nobody waits for the workers
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for scalar in (r"\frac{x^2-1}{x+1}-\sqrt[3]{2}", r"\frac{10}{3}", r"e^{i\pi}", "y=2x_{1}+3", "(x-1)(x+1)",
                   r"\ln(2)+\sin\frac{\pi}{3}", r"2^{10}\cdot 5!", r"\log_2 8+|x|"):
        _compare(f"{scalar}+a", f"a+{scalar}")            # imports, and tables that all workers will share
    parent = socket.socket(fileno=0)
    parent.send(b"r")
    while sockets := socket.recv_fds(parent, 1, 1)[1]:
        if os.fork() == 0:
            parent.close()
            _work(Connection(sockets[0]))
        os.close(sockets[0])


def _work(pipe):
    try:
        pipe.send_bytes(str(os.getpid()).encode())
        while True:
            gold, *answers = json.loads(pipe.recv_bytes())
            signal.setitimer(signal.ITIMER_REAL, ANSWER_SECONDS)     # not caught: it ends the process
            pipe.send_bytes(json.dumps(any(equal(gold, answer, _compare) for answer in answers)).encode())
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        os._exit(0)


def _compare(gold, answer):
    try:
        return readable(gold, answer) and bool(_equal_scalars(gold, answer))
    except (MemoryError, ImportError):
        raise
    except Exception:                                     # sympy and its parser raise anything, bare ones too
        return False


def _forget():
    """After a fork: the workers are the parent's."""
    global workers
    old, workers = workers, Pool()
    for pipe in [worker.pipe for worker in old.idle] + ([old.server[1]] if old.server else []):
        pipe.close()


workers = Pool()


def ask(gold, answers):
    """Whether one of the answers equals the gold, by sympy: True, False, or a text if there was no time."""
    return workers.ask(gold, answers)


atexit.register(lambda: workers.close())
os.register_at_fork(after_in_child=_forget)


