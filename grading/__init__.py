"""What decides whether an answer is right. verify.py is the way in; nothing here loads torch.

    latex           the box of a response; one spelling for LaTeX
    math_answers    structure: lists, equations, values, compared with the gold answer
    brackets        what stands inside which brackets
    regions         sets of real numbers
    matrices        tuples, vectors, matrices
    units           words behind a number
    scalars         numbers without sympy
    sympy_workers   scalars that need algebra, in processes with a deadline
    letters         multiple choice
    programs        a program's verdict on a problem's tests
    sandbox         where programs run
"""

from typing import NamedTuple

VERDICTS = 2               # version of the graders; raise it when any answer may be judged otherwise


class Verdict(NamedTuple):
    correct: bool
    answer: str | None     # what was taken for the answer; None if there is none
    reason: str            # one line for the logs


class Undecided(Exception):
    """What only another process can decide."""
