r"""Is this answer right? Math, code, science; the reward of RL and the score of every benchmark.

    grade("math", r"<think> 2 + 3 </think> \boxed{5}", "5")    # Verdict(correct=True, answer='5', reason=...)
    run_code("print(input())", {"kind": "stdio", "tests": [{"input": "7", "output": "7"}]}).verdict    # 'AC'

Only what follows the last </think> counts. A response that opened <think> and did not close it, or that did
not end by itself (finish_reason other than "stop"), has no answer; one without tags counts as a whole. No
response, however hostile, makes grade() raise or take longer than its limits. It raises for a broken
installation only: ModuleNotFoundError without math-verify, SandboxMissing without bubblewrap.

Math: the last \boxed or \fbox; no box, no answer. What a mathematician who reads the box would say decides,
and numbers are exact; the policies stand on top of grading/math_answers.py and, for what stands behind a
number, of grading/units.py. The structure of an answer (lists, sets, tuples, intervals, matrices,
equations, units) is compared there, and what is left, scalar expressions, by sympy through math-verify in
worker processes with a deadline.
Science: a letter from a box, else from what is stated ("Answer: C", "the answer is (C)", <answer>C</answer>),
else one in bold or in a line of its own, else an option's text where the options are given; the last of the
first kind there is. What is denied and two letters in one place choose nothing (grading/letters.py has the
rules). truth is the letter, or {"letter": "C", "options": [...]}; with the letter alone A to J are options.
Code: the last fenced block that is said to be Python, else the last that says nothing (code_of() in
grading/programs.py); every test must pass. See run_code(). Policies:
  - a program has what LiveCodeBench's runner gives it, functions and programs alike: its imports, the
    builtins last, recursion to 50,000; also numpy and sortedcontainers where the machine has them
  - an expected number with digits behind the point is a rounded one: 1e-6, absolutely or relatively, is near
    enough (1e-5 where 5 digits are shown, and for functions), but never a hundredth, nor half a unit of the
    last of up to 4 digits. Integers and the number of tokens are exact

grade() and grade_batch() may be called from any thread.
"""

import concurrent.futures
import re

import numpy as np

from grading import Undecided, Verdict, sympy_workers
from grading.cores import CORES, usable_cores
from grading.letters import grade_science, letter_of
from grading.math_answers import grade_math
from grading.programs import Run, gradable, grade_code, run_code
from grading.sandbox import SandboxMissing, check_sandbox

__all__ = ["Run", "SandboxMissing", "Verdict", "check_sandbox", "gradable", "grade", "grade_batch",
           "letter_of", "repetition", "run_code", "stop_penalty", "think_format", "timed_out", "transient",
           "usable_cores"]


def grade(domain, response, truth, finish_reason="stop", unsafe_sandbox=False) -> Verdict:
    """The verdict on one response.

    domain: "math" | "code" | "science"; truth: LaTeX without a box | see run_code() | see above
    unsafe_sandbox: as in run_code()
    Whatever response and truth hold, it returns, with a reason; SandboxMissing and ModuleNotFoundError apart.
    """
    return _grade(domain, response, truth, finish_reason, lambda kind, *question: (
        sympy_workers.ask(*question) if kind == "math" else run_code(*question, unsafe_sandbox)))


def grade_batch(items, workers=None, progress=None, unsafe_sandbox=False, again=0) -> list[Verdict]:
    """grade() of many, in their order: items are (domain, response, truth) or (..., finish_reason).

    workers: how many at a time (None: one a core, of the cores that usable_cores() finds for this rank);
        progress(done, total) is called after each, in the caller's thread.
    again: how often those whose verdict is transient() are asked again, half as many at a time. What then
        still is transient has no verdict: the caller masks it, counts it or comes back.
    """
    def later(*_):
        raise Undecided

    items, verdicts, done = list(items), {}, 0
    sympy_workers.workers.cores = max(CORES, workers or 0)
    threads = concurrent.futures.ThreadPoolExecutor(workers or CORES)
    try:
        for i, (domain, response, truth, *reason) in enumerate(items):
            try:                                          # what needs no other process, without threads
                verdicts[i] = _grade(domain, response, truth, *(reason or ["stop"]), later)
            except Undecided:
                verdicts[i] = threads.submit(grade, *items[i], unsafe_sandbox=unsafe_sandbox)
                continue
            done += 1
            if progress:
                progress(done, len(items))
        waiting = [v for v in verdicts.values() if isinstance(v, concurrent.futures.Future)]
        for _ in concurrent.futures.as_completed(waiting):
            done += 1
            if progress:
                progress(done, len(items))
    finally:
        threads.shutdown(cancel_futures=True)
    verdicts = [v.result() if isinstance(v, concurrent.futures.Future) else v for v in verdicts.values()]
    undecided = [i for i, verdict in enumerate(verdicts) if transient(verdict.reason)]
    if again and undecided:
        fewer = max(1, (workers or CORES) // 2)
        retried = grade_batch([items[i] for i in undecided], fewer, None, unsafe_sandbox, again - 1)
        for i, verdict in zip(undecided, retried, strict=True):
            verdicts[i] = verdict
    return verdicts


def _grade(domain, response, truth, finish_reason, ask):
    """grade(), with another process asked by ask("math", gold, answers) and ask("code", code, truth)."""
    if not isinstance(domain, str) or domain not in _GRADERS:
        return Verdict(False, None, f"unknown domain {domain!r:.40}, known are: {', '.join(_GRADERS)}")
    text, problem = final_text(response, finish_reason)
    if text is None:
        return Verdict(False, None, problem)
    try:
        return _GRADERS[domain](text, truth, ask)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RecursionError, TypeError,
            ValueError) as e:
        return Verdict(False, None, f"cannot be graded: {type(e).__name__}: {e!s:.200}")


def final_text(response, finish_reason="stop"):
    """(what counts of a response, "") or (None, why there is no answer)."""
    if not isinstance(response, str):
        return None, f"the response is a {type(response).__name__}, not a text"
    if finish_reason != "stop":
        return None, f"no answer: ended by {finish_reason!r:.40}, not by itself"
    end = len(response)
    while (end := response.rfind("</think>", 0, end)) >= 0 and _spoken_of(response, end, "</think>"):
        pass
    text = response if end < 0 else response[end + len("</think>") :]
    start = text.find("<think>")
    while start >= 0 and _spoken_of(text, start, "<think>"):
        start = text.find("<think>", start + 1)
    return (text, "") if start < 0 else (None, "no answer: <think> was not closed")


_NAMED = re.compile(r"[`\"'(]$|\b(?:the|an?|no|any|my|in|use|used|using|with|without|of|outside|inside|after"
                    r"|before|see|tag|token|called|named|word) $")
_DESCRIBED = re.compile(r"[`\"',)]| (?:tags?|tokens?|blocks?|sections?|elements?|above|below|was|were|is|are)"
                        r"\b")


def _spoken_of(text, start, tag):
    """Whether a text speaks of the tag that stands there, as in "I used no <think> tags" or `</think>`."""
    line = text[max(0, start - 12) : start].rpartition("\n")[2]
    after = text[start + len(tag) : start + len(tag) + 12]
    if tag == "</think>":                                 # thoughts may end with any word
        return line.endswith(("`", '"', "'")) or re.match(r"[`\"']| (?:tags?|tokens?)\b", after) is not None
    return bool(line.strip()) and bool(_NAMED.search(line) or _DESCRIBED.match(after))


def timed_out(reason) -> bool:
    """Whether a verdict's reason says that there was no time to grade, or that a program took too much. Such
    words stand first (what follows them may be a program's output, and hold any word)."""
    return reason.startswith(("TLE", "not decided in time", "not decided: all workers are busy"))


def transient(reason) -> bool:
    """Whether a verdict's reason says that the machine, not the answer, was at fault: no memory, no time, no
    place to run a program. Asked again, it may be another."""
    return reason.startswith(("not decided", "cannot be graded: OSError", "cannot be graded: MemoryError"))


# -- shaping: terms of the reward beside correctness --------------------------------------------------------

def think_format(response, opened=False) -> bool:
    """Whether a response has the form <think> thoughts </think> response: it begins with the tag, there is
    one pair, and what follows is not blank. opened: the prompt ended with <think>, the response starts behind
    it."""
    text = ("<think>" if opened else "") + response
    return (text.count("<think>") == text.count("</think>") == 1 and text.lstrip().startswith("<think>")
            and bool(text.partition("</think>")[2].strip()))


def stop_penalty(finish_reason, size=1.0) -> float:
    """0.0 for a response that ended by itself, else -size."""
    return 0.0 if finish_reason == "stop" else -size


def repetition(ids, n=4) -> float:
    """1 - distinct n-grams / n-grams, of token ids: 0 where nothing recurs, near 1 in a loop; 0 if shorter
    than n. The penalty is a negative multiple of it."""
    ids = np.asarray(ids, dtype=np.int64)
    if len(ids) < n:
        return 0.0
    grams = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(ids, n))
    return 1.0 - len(np.unique(grams.view(f"V{8 * n}"))) / len(grams)


_GRADERS = {"math": grade_math, "code": grade_code, "science": grade_science}
