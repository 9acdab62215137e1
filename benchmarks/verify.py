"""Grading: pairs a second beside plain math-verify, what the sandbox adds to a run, programs a second.

    python benchmarks/verify.py                    # two CPU cores: about 15 seconds

The batch is one RL step's: 64 golds (integers, fractions, roots, expressions, lists, tuples, intervals) with
16 responses each, half of them wrong, spelled in several ways. Plain math-verify parses gold and response and
verifies, in process, its alarms off. Ours is grade_batch() with nothing cached; its workers' start is told
apart. Pairs whose two verdicts differ are listed: ours should be the better one.
"""

import os
import random
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from grading.programs import run_code  # noqa: E402
from grading.sandbox import bubblewrap  # noqa: E402
from verify import grade, grade_batch  # noqa: E402

GOLDS = r"""
3 | 17 | 42 | 70 | 113 | 204 | 315 | 468 | 512 | 699 | 735 | 809 | 902 | 25 | 60 | 1000
\frac{1}{2} | \frac{3}{4} | \frac{22}{7} | -\frac{5}{6} | \frac{7}{12} | \frac{9}{16} | 0.25 | 3.5
1.2 | -7 | 10^{6} | 45^\circ | 50\% | 12\text{ cm} | 2^{10} | \frac{10}{3}
2\sqrt{3} | \sqrt{2} | \frac{\sqrt{3}}{2} | 3+\sqrt{5} | \frac{1+\sqrt{5}}{2} | \pi | 4\pi | \frac{\pi}{6}
12\pi\sqrt{3} | \frac{2\sqrt{6}}{5} | e^2 | \ln 2 | \sqrt[3]{2} | 3+4i | 5\sqrt{7} | \frac{\pi^2}{6}
x^2+2x+1 | (x-1)(x+1) | 2x+3 | \frac{x+1}{x-1} | n(n+1) | a^2+b^2 | y=2x+3 | \frac{1}{x}
1, 2 | -1, \frac{1}{2} | \pm 3 | \{1,2,3\} | (1,2) | (3,\frac{\pi}{2}) | [0,1) | (-\infty,2)\cup(3,\infty)"""
GOLDS = [gold.strip() for line in GOLDS.split("\n") for gold in line.split(" | ") if gold]


def respelled(gold, rng):
    """A right answer, differently spelled, or a wrong one."""
    right = [gold, f" {gold} ", gold.replace(r"\frac", r"\dfrac"), gold.replace("+", " + "), f"{gold}."]
    if "," not in gold and "=" not in gold:
        right.append(f"f(x) = {gold}" if "x" in gold else f"x = {gold}")
    wrong = [str(rng.randrange(1, 999)), rf"\frac{{{rng.randrange(1, 9)}}}{{11}}", f"7{gold}", f"{gold}, 99",
             rf"{rng.randrange(2, 9)}\sqrt{{13}}", "x^3"]
    return rng.choice(right if rng.random() < 0.5 else wrong)


def batch(seed=0):
    rng = random.Random(seed)
    return [("math", rf"<think> so </think> The answer is $\boxed{{{respelled(gold, rng)}}}$.", gold)
            for gold in GOLDS for _ in range(16)]


def plain(items):
    """math-verify as its README shows it."""
    import logging

    from math_verify import parse, verify
    logging.disable(logging.CRITICAL)
    return [verify(parse(f"${gold}$", parsing_timeout=None), parse(response, parsing_timeout=None),
                   timeout_seconds=None) for _, response, gold in items]


def clock(f, *args):
    start = time.perf_counter()
    value = f(*args)
    return time.perf_counter() - start, value


def seconds_each(f, n=30):
    return statistics.median(clock(f)[0] for _ in range(n))


if __name__ == "__main__":
    assert len(GOLDS) == 64
    items = batch()
    start, _ = clock(grade, "math", r"\boxed{x+y}", "y+x")
    print(f"{len(items)} pairs, {len(set(items))} distinct, {os.cpu_count()} cores; "
          f"workers start in {start:.2f} s")
    ours, verdicts = clock(grade_batch, items)
    plain(items[::64])                                    # imports and first use
    theirs, found = clock(plain, items)
    print(f"grade_batch   {len(items) / ours:7.0f} pairs/s")
    print(f"math-verify   {len(items) / theirs:7.0f} pairs/s   ratio {theirs / ours:.1f}")
    differ = sorted({(v.correct, gold, v.answer) for (_, _, gold), v, f in
                     zip(items, verdicts, found, strict=True) if v.correct != f})
    for correct, gold, answer in differ:
        print(f"    ours {correct!s:5}, theirs {not correct!s:5}: {gold:24} {answer}")

    truth = {"kind": "stdio", "tests": [{"input": "1 2\n", "output": "3\n"}], "time_limit_s": 2}
    program = "print(sum(map(int, input().split())))"
    run_code(program, truth)
    bare_command = [bubblewrap()[0][1], "-I", "-S", "-c", program]
    bare = seconds_each(lambda: subprocess.run(bare_command, input=b"1 2\n", capture_output=True))
    inside = seconds_each(lambda: run_code(program, truth))
    print(f"sandbox       {inside * 1e3:7.1f} ms a run, bare interpreter {bare * 1e3:.1f} ms, "
          f"difference {(inside - bare) * 1e3:.1f} ms")
    took, verdicts = clock(grade_batch, [("code", f"```python\n{program}\n```", truth)] * 256)
    assert all(v.correct for v in verdicts)
    print(f"256 programs  {took:7.1f} s")
