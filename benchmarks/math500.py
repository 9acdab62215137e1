r"""Real golds against the grader: each against itself and its worked solution, respelled, and pair by pair.

    python benchmarks/math500.py math500.jsonl     # two CPU cores: about a minute
    python benchmarks/math500.py amc23.json        # any file of rows with "answer" or "expected_answer"

MATH-500 is a .jsonl of rows {"problem", "solution", "answer"}; evalchemy, for one, holds a copy (github
mlfoundations/evalchemy, eval/chat_benchmarks/MATH500/data/math500.jsonl). Counted are golds refused against
themselves, boxes of solutions refused, each of SPELLINGS where it applies to a gold (a spelling in which a
mathematician reads the same answer), and golds with a digit or the sign changed, which are wrong. Then every
ordered pair of distinct golds (PAIRS of them, drawn, where there are more): those said to be equal are
printed, for a reader to judge. A refused answer is printed with the grader's reason; the exit status is 1 if
there is one, or if a changed one is accepted.
"""

import json
import logging
import os
import random
import re
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from math_verify import parse  # noqa: E402

from verify import grade_batch  # noqa: E402

PAIRS = 100_000
NUMBER = re.compile(r"-?\d+(\.\d+)?|-?\\frac\{-?\d+\}\{\d+\}")
LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")       # a variable or a word, not a command


def scalar(gold):
    """Whether a gold is one number, with roots and constants perhaps: no list, no relation, no words."""
    return not LETTER.search(gold) and not re.search(r"[,=<>]|\\(in|cup|pm|begin|text|mbox)\b", gold)


def replaced(*changes):
    """A spelling that puts the second of each pair for the first; None where nothing changes."""
    def spelling(gold):
        new = gold
        for old, other in changes:
            new = re.sub(old, other, new)
        return None if new == gold else new
    return spelling


def approximated(gold):
    """The gold with its decimal behind it, where it is a number but no integer."""
    parsed = scalar(gold) and parse(f"${gold}$", parsing_timeout=None)
    if not parsed or isinstance(parsed[0], str):
        return None
    value = parsed[0]
    if not (value.is_number and value.is_real) or value.is_integer:
        return None
    return rf"{gold} \approx {float(value):.3f}"


def with_bars(gold):
    r"""Brackets with \left and \right."""
    if r"\left" in gold or not re.match(r"[(\[]", gold) or not re.search(r"[)\]]$", gold):
        return None
    return rf"\left{gold[:-1]}\right{gold[-1]}"


def with_thin_space(gold):
    """An integer of four digits or more, its thousands told apart, behind a thin space."""
    return rf"\,{int(gold):,}" if re.fullmatch(r"[1-9]\d{3,}", gold) else None


def reversed_list(gold):
    """The parts of a list in the other order."""
    parts = gold.split(",")
    numbers = all(NUMBER.fullmatch(part.strip()) for part in parts)
    if len(parts) < 2 or not numbers or re.fullmatch(r"\d{1,3}(,\d{3})+", gold):
        return None
    return ", ".join(part.strip() for part in reversed(parts))


def where(condition, spelling):
    return lambda gold: spelling(gold) if condition(gold) else None


def around(before, after=""):
    return lambda gold: before + gold + after


def is_number(gold):
    return bool(NUMBER.fullmatch(gold))


UNICODE = [(r"\\pi\b", "π"), (r"\\infty\b", "∞"), (r"\\cup\b", "∪"), (r"\\pm\b", "±"), (r"\^\\circ", "°"),
           (r"\\sqrt\{(\d+)\}", r"√\1"), ("-", "−"), (r"\\in\b", "∈")]
SPELLINGS = {                     # name: gold -> the inside of a box, or None where it does not apply
    r"\dfrac": replaced((r"\\[dt]?frac", r"\\dfrac")),
    r"\tfrac": replaced((r"\\[dt]?frac", r"\\tfrac")),
    "blanks in a fraction": replaced((r"\\[dt]?frac\{(\d)\}\{(\d)\}", r"\\frac \1 \2")),
    "a/b": replaced((r"^(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3")),
    r"\displaystyle": around(r"\displaystyle "),
    "full stop": around("", "."),
    "dollars": around("$", "$"),
    r"\left, \right off": replaced((r"\\(left|right) ?", "")),
    r"\left, \right on": with_bars,
    r"\boldsymbol": around(r"\boldsymbol{", "}"),
    r"\bm": around(r"\bm{", "}"),
    r"\mathbf": around(r"\mathbf{", "}"),
    r"\mathrm": where(is_number, around(r"\mathrm{", "}")),
    r"\text": where(is_number, around(r"\text{", "}")),
    r"\textbf": where(is_number, around(r"\textbf{", "}")),
    r"\bf": around(r"{\bf ", "}"),
    r"\underline": around(r"\underline{", "}"),
    r"\large": around(r"\large "),
    r"\Large{}": around(r"\Large{", "}"),
    "aligned": around(r"\begin{aligned} ", r" \end{aligned}"),
    "braces": around("{", "}"),
    "double braces": around("{{", "}}"),
    "box in a box": around(r"\boxed{", "}"),
    "blanks": around(r"\ ", r"\ "),
    "thin spaces": around(r"\,", r"\,"),
    "x =": where(scalar, around("x = ")),
    "=": where(scalar, around("= ")),
    "a + b =": where(scalar, around("a + b = ")),
    "P(X = 3) =": where(scalar, around("P(X = 3) = ")),
    "gold = x": where(scalar, around("", " = x")),
    r"\approx": approximated,
    "bmatrix": replaced((r"\{pmatrix\}", "{bmatrix}")),
    "[matrix]": replaced((r"\\begin\{pmatrix\}", r"\\left[\\begin{matrix}"),
                         (r"\\end\{pmatrix\}", r"\\end{matrix}\\right]")),
    "[array]": replaced((r"\\begin\{pmatrix\}", r"\\left[\\begin{array}{cc}"),
                        (r"\\end\{pmatrix\}", r"\\end{array}\\right]")),
    "rows with [4pt]": replaced((r"\\\\ ", r"\\\\[4pt] ")),
    "thousands behind a thin space": with_thin_space,
    "1{,}000": where(lambda gold: re.fullmatch(r"[1-9]\d{3,}", gold),
                     lambda gold: f"{int(gold):,}".replace(",", "{,}")),
    "unicode": replaced(*UNICODE),
    "words": around(r"\text{The answer is } "),
    "Answer:": around(r"\text{Answer: }"),
    "unit": where(is_number, around("", r"\text{ cm}")),
    "unit, thin space": where(is_number, around("", r"\,\mathrm{cm}")),
    "counted": where(re.compile(r"\d+").fullmatch, around("", r"\text{ different ways}")),
    "degree in braces": replaced((r"\^\\circ", r"^{\\circ}")),
    "trailing .0": where(re.compile(r"-?\d+").fullmatch, around("", ".0")),
    "AMC letter": where(is_number, around(r"\textbf{(B)}\ ")),
    "list reversed": reversed_list,
    "list in braces": where(reversed_list, around(r"\{", r"\}")),
    "list with and": where(reversed_list, replaced((r",(?=[^,]*$)", r"\\text{ and }"))),
    "powers with (": replaced((r"\^(\d)", r"^(\1)")),
    "powers with **": replaced((r"\^(\d)", r"**\1")),
}


def responses(rows):
    """(what is asked, row's place, response, gold) of every question asked of one gold."""
    for place, (gold, solution) in enumerate(rows):
        yield "itself", place, rf"\boxed{{{gold}}}", gold
        if "boxed" in solution:
            yield "solution", place, solution, gold
            box = solution[solution.rindex(r"\boxed"):]
            yield "solution's box", place, box, gold
        yield "doubled backslash", place, rf"\\boxed{{{gold}}}", gold
        for name, spelling in SPELLINGS.items():
            answer = spelling(gold)
            if answer is not None:
                yield name, place, rf"The answer is $\boxed{{{answer}}}$.", gold


def read(path):
    """(gold, solution) of each row: a .jsonl, or a .json that holds a list."""
    text = open(path, encoding="utf-8").read()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    golds = [row.get("expected_answer", row.get("answer")) for row in rows]
    return [(str(gold), str(row.get("solution", ""))) for gold, row in zip(golds, rows, strict=True)]


def check_spellings(rows):
    """Prints a line for each spelling and one for each refused answer; returns the number refused."""
    asked = list(responses(rows))
    verdicts = grade_batch([("math", response, gold) for _, _, response, gold in asked])
    refused = {}
    count = {}
    for (name, place, response, gold), verdict in zip(asked, verdicts, strict=True):
        count[name] = count.get(name, 0) + 1
        if not verdict.correct:
            refused.setdefault(name, []).append((place, gold, response, verdict.reason))
    for name, total in count.items():
        print(f"{name:30} {total - len(refused.get(name, [])):5} of {total}")
    for name, cases in refused.items():
        for place, gold, response, reason in cases:
            print(f"refused: {name}, row {place}: {gold} | {response[-100:]} [{reason}]")
    return sum(map(len, refused.values()))


def changed(gold):
    """Golds with one digit another, or the sign turned: wrong answers, each near a right one."""
    for digit in re.finditer(r"\d", gold):
        other = str((int(digit[0]) + 1) % 10)
        yield gold[:digit.start()] + other + gold[digit.end():]
    if scalar(gold) and gold not in ("0", "0.0"):
        yield gold[1:] if gold.startswith("-") else f"-({gold})"


def check_changes(rows):
    """Prints the changed golds that are said to be right; returns their number. Golds with words are left
    out: a digit of theirs may be a unit's."""
    asked = []
    for gold in sorted({gold for gold, _ in rows}):
        if not re.search(r"\\(text|mbox)", gold):
            asked += [(gold, answer) for answer in changed(gold)]
    verdicts = grade_batch([("math", rf"\boxed{{{answer}}}", gold) for gold, answer in asked])
    accepted = [pair for pair, verdict in zip(asked, verdicts, strict=True) if verdict.correct]
    print(f"{len(asked)} golds with a digit or the sign changed: {len(accepted)} accepted")
    for gold, answer in accepted:
        print(f"accepted: {gold} | {answer}")
    return len(accepted)


def check_pairs(rows):
    """Prints the pairs of distinct golds, in either order, that are said to be equal."""
    golds = sorted({gold for gold, _ in rows})
    pairs = [(gold, other) for gold in golds for other in golds if other != gold]
    if len(pairs) > PAIRS:
        pairs = random.Random(0).sample(pairs, PAIRS)
    verdicts = grade_batch([("math", rf"\boxed{{{other}}}", gold) for gold, other in pairs])
    joined = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.correct]
    print(f"{len(golds)} distinct golds, {len(pairs)} ordered pairs: {len(joined)} said to be equal")
    for gold, other in joined:
        print(f"equal: {gold} | {other}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    logging.disable(logging.WARNING)          # math-verify's, of parse() without an alarm
    missed = 0
    for path in sys.argv[1:]:
        start = time.perf_counter()
        rows = read(path)
        print(f"{path}: {len(rows)} rows")
        missed += check_spellings(rows)
        missed += check_changes(rows)
        check_pairs(rows)
        print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(missed > 0)
