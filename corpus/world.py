"""The embedded world: a small stand-in for the paper's data that needs nothing but an installed Python.

A fresh machine has no weights and may have no network, so the default world is made of what is already there:
- problems in math, code and science, drawn from seeded generators. Each has a prompt, a truth that verify.py
  can check, a careful response (short steps, always right) and a careless one (a guess, mostly wrong);
- documents under the names of the paper's eleven sources (section 3, table 1): prose and code are read in
  place from the standard library of this Python, the rest is generated.

Why careless responses: RL can only select among behaviours that mid-training taught. After perfect chains
only, RL gained next to nothing in our trial; with half of them careless there was much to gain.

Everything is a pure function of its arguments and of this Python: no global random state, no hash().
"""

import ast
import functools
import hashlib
import os
import random
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

DOMAINS = ("math", "code", "science")
SPLITS = ("train", "rl", "heldout")          # of problems: 80, 10 and 10 percent. Documents have no "rl"
LETTERS = "ABCD"

LIBRARY = ("dclm-edu", "chat", "refinecode", "starcoder2")       # read from the standard library


class Generated(NamedTuple):
    """A source that is generated."""
    domain: str
    train: int             # documents (ours)
    heldout: int


GENERATED = {
    "megamath-web-pro":      Generated("math",    6000, 300),
    "nemotron-math":         Generated("math",    6000, 300),
    "mot-math":              Generated("math",    2500, 300),
    "mot-code":              Generated("code",    2500, 300),
    "ocr2":                  Generated("code",    2500, 300),
    "openthoughts3-science": Generated("science", 2500, 300),
    "mot-science":           Generated("science", 2500, 300),
}
SOURCES = (*LIBRARY, *GENERATED)             # the paper's eleven

# all ours
CARELESS = 0.5             # share of careless responses in the reasoning sources
LUCKY = 0.25               # share of careless responses that are right all the same
CAPS = {"train": 1_500_000, "heldout": 150_000}            # characters of a library source
LONGEST, SHORTEST = 2000, 80                 # characters of a library text: cut above, dropped below


class Problem(NamedTuple):
    domain: str            # "math" | "code" | "science"
    prompt: str            # the question, without a line break at its end
    truth: object          # what verify.grade takes: LaTeX without a box | the dict of tests | a letter
    careful: str           # "<think> steps </think>\n" + answer, always right
    careless: str          # the same shape around a guess, right about one time in four


def _hash(*key) -> int:
    """64 bits that depend on the key alone; hash() would change with PYTHONHASHSEED."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8, key=b"prism world").digest()
    return int.from_bytes(digest, "big")


def _check(kind: str, name: str, known) -> None:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}, known are: {', '.join(known)}")


# -- problems ------------------------------------------------------------------------------------------

def problem(domain: str, split: str, index: int, seed: int = 0) -> Problem:
    """The index-th problem of a split. Any integer is an index; in the long run problems return.

    Candidates are drawn until one belongs to the split, which a hash of the problem itself decides; so no
    prompt is in two splits, whatever the seeds. Distinct problems, not counting function names, which vary
    freely: about 21k in math, 32k in code, 28k in science.
    Raises ValueError, listing the known names, on an unknown domain or split.
    """
    _check("domain", domain, DOMAINS)
    _check("split", split, SPLITS)
    draw = {"math": _math, "code": _code, "science": _science}[domain]
    rng = random.Random(_hash(seed, domain, split, index))
    while True:
        draft = draw(rng)
        if _split(draft.key) == split:
            return Problem(domain, draft.prompt, draft.truth, draft.careful.text(), draft.careless.text())


def _split(key: str) -> str:
    return {0: "heldout", 1: "rl"}.get(_hash("split", key) % 10, "train")


class Response(NamedTuple):
    thought: str           # the steps, or a guess
    answer: str

    def text(self):
        return f"<think> {self.thought} </think>\n{self.answer}"


class Draft(NamedTuple):
    """What each generator below draws."""
    key: str               # the problem without its accidents (a function's name, the order of summands and
                           # factors): decides the split
    prompt: str
    truth: object
    careful: Response
    careless: Response


# -- math: arithmetic on numbers of two digits, digit by digit ------------------------------------------

def _math(rng) -> Draft:
    kind = rng.choices("+-*x", weights=(4, 3, 1, 2))[0]          # ours; x: an equation
    a = rng.randrange(10, 100)
    b = rng.randrange(2, 10) if kind == "*" else rng.randrange(10, 100)
    op = rng.choice("+-") if kind == "x" else kind
    if op == "-":
        a, b = max(a, b), min(a, b)                              # no negative results
    steps, result = _columns(a, op, b)
    if kind == "x":
        inverse = "-" if op == "+" else "+"
        prompt = f"Solve x {inverse} {b} = {a}."
        key = prompt
        steps = f"x = {a} {op} {b}. {steps}"
    else:
        prompt = f"What is {a} {op} {b}?"
        key = f"{max(a, b)} {op} {min(a, b)}"
    slips = [slip for slip in (1, 2, 10, 20, -1, -2, -10, -20) if result + slip >= 0]
    slip = rng.choice(slips)                                     # a lost carry, a digit misread
    guess = result if rng.random() < LUCKY else result + slip
    return Draft(key, prompt, str(result), Response(steps, f"\\boxed{{{result}}}"),
                 Response(f"about {guess}", f"\\boxed{{{guess}}}"))


def _columns(a: int, op: str, b: int) -> tuple[str, int]:
    """(steps, result): units, then tens, the result growing: '7+5=12: 2 carry 1. 4+8+1=13: 132.' A difference
    borrows first: '13-5=8: 8 carry 1. 4-3-1=0: 8.'"""
    tens_a, units_a = divmod(a, 10)
    tens_b, units_b = (b, b) if op == "*" else divmod(b, 10)     # a factor has no tens: it takes both
    borrows = op == "-" and units_a < units_b
    if borrows:
        units_a += 10
    units = {"+": units_a + units_b, "-": units_a - units_b, "*": units_a * units_b}[op]
    carry = int(borrows) if op == "-" else units // 10
    tens = {"+": tens_a + tens_b + carry, "-": tens_a - tens_b - carry, "*": tens_a * tens_b + carry}[op]
    result = 10 * tens + units % 10
    carry_sign = "-" if op == "-" else "+"
    carry_text, carried = (f" carry {carry}", f"{carry_sign}{carry}") if carry else ("", "")
    first = f"{units_a}{op}{units_b}={units}: {units % 10}{carry_text}."
    second = f"{tens_a}{op}{tens_b}{carried}={tens}: {result}."
    return f"{first} {second}", result


# -- code: functions of one line, told in words --------------------------------------------------------

WORDS = tuple("ant bee cat cow dog elk fox gnu hen jay owl pig ram rat yak ash bay elm fir fig ivy oak pea "
              "rye tea bus cab jet van car ice fog sun sea sky rim pot pan cup jar".split())
NAMES = "calc solve compute apply f g run get make build find pick work change result answer value".split()


class Function(NamedTuple):
    """A function of one argument that a problem asks for, with its two constants a and b."""
    argument: str          # its name says its kind, see _arguments
    wanted: str
    plan: str
    body: str
    run: Callable          # the same as body, written otherwise, for the tests: (argument, a, b)
    of_a: Sequence         # values of a
    of_b: Sequence


FUNCTIONS = (
    Function("x", "{a} * x + {b}", "x times {a}, add {b}", "{a} * x + {b}",
             lambda x, a, b: x * a + b, range(2, 100), range(1, 100)),
    Function("x", "the remainder of x + {a} divided by {b}", "add {a}, remainder by {b}", "(x + {a}) % {b}",
             lambda x, a, b: (x + a) % b, range(1, 100), range(3, 100)),
    Function("x", "x limited to the range from {a} to {b}", "at least {a}, at most {b}",
             "min(max(x, {a}), {b})",
             lambda x, a, b: a if x < a else b if x > b else x, range(2, 40), range(40, 80)),
    Function("xs", "each element of xs times {a}, plus {b}", "each times {a}, add {b}",
             "[{a} * x + {b} for x in xs]",
             lambda xs, a, b: [x * a + b for x in xs], range(2, 60), range(1, 100)),
    Function("xs", "how many of xs are above {a} and below {b}", "count {a} to {b}",
             "sum({a} < x < {b} for x in xs)",
             lambda xs, a, b: len([x for x in xs if x > a and x < b]), range(2, 40), range(50, 90)),
    Function("xs", "{a} times the sum of xs, minus {b}", "sum, times {a}, subtract {b}",
             "{a} * sum(xs) - {b}",
             lambda xs, a, b: sum(x * a for x in xs) - b, range(2, 60), range(1, 60)),
    Function("xs", "the element number {a} from the end of xs, plus {b}", "index -{a}, add {b}",
             "xs[-{a}] + {b}",
             lambda xs, a, b: xs[len(xs) - a] + b, range(1, 5), range(1, 100)),
    Function("ws", 'the words ws joined by "{a}", then "{b}"', 'join by "{a}", add "{b}"',
             '"{a}".join(ws) + "{b}"',
             lambda ws, a, b: a.join([*ws[:-1], ws[-1] + b]), tuple("-+/:_;|, "), WORDS),
    Function("s", 's repeated {a} times, then "{b}"', '{a} times s, add "{b}"', 's * {a} + "{b}"',
             lambda s, a, b: "".join([s] * a) + b, range(2, 10), WORDS),
)


def _code(rng) -> Draft:
    function = rng.choice(FUNCTIONS)
    a, b = rng.choice(function.of_a), rng.choice(function.of_b)
    name = rng.choice(NAMES)
    while True:                                      # until the tests tell the slip from the truth
        slip_a, slip_b = a, b                        # one of the two misread
        if rng.random() < 0.5:
            slip_a = rng.choice(function.of_a)
        else:
            slip_b = rng.choice(function.of_b)
        arguments = _arguments(rng, function.argument, a, b)
        outputs = [function.run(argument, a, b) for argument in arguments]
        if any(function.run(argument, slip_a, slip_b) != output
               for argument, output in zip(arguments, outputs, strict=True)):
            break
    tests = [{"input": [argument], "output": output}
             for argument, output in zip(arguments, outputs, strict=True)]
    truth = {"kind": "function", "fn_name": name, "tests": tests, "checker": "json", "time_limit_s": 2.0,
             "memory_limit_mb": 256}
    wanted = function.wanted.format(a=a, b=b)
    plan = function.plan.format(a=a, b=b)
    body = function.body.format(a=a, b=b)
    guess = body if rng.random() < LUCKY else function.body.format(a=slip_a, b=slip_b)
    program = f"```python\ndef {name}({function.argument}):\n    return {{}}\n```".format
    return Draft(f"{function.argument}: {wanted}",
                 f"Write a Python function {name}({function.argument}) that returns {wanted}.", truth,
                 Response(f"{plan}: {body}", program(body)), Response(f"maybe {guess}", program(guess)))


def _arguments(rng, arg: str, a, b) -> list:
    """Five arguments of the kind the name stands for; a and b are among the numbers: limits matter."""
    def number():
        return rng.randrange(-30, 100)

    if arg == "x":
        return [a, b, number(), number(), number()]
    if arg == "xs":
        return [[rng.choice((a, b, number())) for _ in range(n)] for n in (4, 5, 6, 7, 8)]
    if arg == "ws":
        return [rng.sample(WORDS, n) for n in (1, 2, 3, 4, 5)]
    return [rng.choice(WORDS) for _ in range(5)]


# -- science: multiple choice on formulas, the answer a range ------------------------------------------

FORMULAS = {               # by operation: what is asked about the quantities x and y
    "*": ("Force F = m*a in N, m = {x} kg, a = {y} m/s^2.", "Work W = F*d in J, F = {x} N, d = {y} m.",
          "Momentum p = m*v in kg m/s, m = {x} kg, v = {y} m/s.", "Way d = v*t in m, v = {x} m/s, t = {y} s.",
          "Voltage V = I*R in V, I = {x} A, R = {y} ohm.", "Power P = V*I in W, V = {x} V, I = {y} A.",
          "Force F = p*A in N, p = {x} Pa, A = {y} m^2.", "Mass m = D*V in kg, D = {x} kg/m^3, V = {y} m^3."),
    "/": ("Speed v = d/t in km/h, d = {x} km, t = {y} h.", "Current I = V/R in A, V = {x} V, R = {y} ohm.",
          "Density D = m/V in kg/m^3, m = {x} kg, V = {y} m^3."),
    "+": ("Net force F = F1+F2 in N, F1 = {x} N, F2 = {y} N.",
          "Speed v = v1+v2 in m/s, v1 = {x} m/s, v2 = {y} m/s.",
          "In series R = R1+R2 in ohm, R1 = {x} ohm, R2 = {y} ohm."),
    "-": ("Net force F = F1-F2 in N, F1 = {x} N, F2 = {y} N.",
          "Energy left E = E1-E2 in J, E1 = {x} J, E2 = {y} J."),
}
RANGES = {"*": (20, 40, 60), "/": (4, 6, 8), "+": (70, 110, 150), "-": (20, 40, 60)}   # where B, C, D begin


def _science(rng) -> Draft:
    op = rng.choices("*/+-", weights=(4, 2, 6, 4))[0]            # ours
    question = rng.choice(FORMULAS[op])
    letter = rng.choice(LETTERS)
    b, c, d = RANGES[op]
    while True:                                      # until the answer is the letter: each is as likely
        x, y = (rng.randrange(2, 10) if op in "*/" else rng.randrange(10, 100) for _ in range(2))
        if op == "-":
            x, y = max(x, y), min(x, y)
        if op == "*":
            result = x * y
            chain = f"{x}*{y}={result}"
        elif op == "/":
            result = x                               # x becomes the dividend
            x *= y
            chain = f"{x}/{y}={result}"
        else:
            chain, result = _columns(x, op, y)
        if LETTERS[(result >= b) + (result >= c) + (result >= d)] == letter:
            break
    commutes = op in "*+"
    key_x, key_y = sorted((x, y)) if commutes else (x, y)
    key = question.format(x=key_x, y=key_y)
    question = question.format(x=x, y=y)
    highest = 199 if op == "+" else 99
    prompt = f"{question}\nA) 0-{b - 1}\nB) {b}-{c - 1}\nC) {c}-{d - 1}\nD) {d}-{highest}"
    guess = letter if rng.random() < LUCKY else rng.choice(LETTERS.replace(letter, ""))
    return Draft(key, prompt, letter,
                 Response(f"{chain.rstrip('.')} is {letter}.", f"\\boxed{{{letter}}}"),
                 Response(f"maybe {guess}", f"\\boxed{{{guess}}}"))


# -- documents -----------------------------------------------------------------------------------------

def documents(source: str, split: str) -> Iterator[str]:
    """The texts of a source in a fixed order, without end tokens. No text of a heldout split is in any train.

    Generated sources have as many documents as GENERATED says, of 50-230 characters (some are equal). Those
    of the library have what the installation holds, at most CAPS characters.
    Raises ValueError, listing the known names, on an unknown source or split (at the call, not at the first
    text) and FileNotFoundError where this Python has no standard library to read.
    """
    _check("source", source, SOURCES)
    _check("split", split, ("train", "heldout"))
    return iter(_library()[source, split]) if source in LIBRARY else _generated(source, split)


def _generated(source: str, split: str) -> Iterator[str]:
    """Problems of one domain with their responses; a seed per source, so that sources differ."""
    spec = GENERATED[source]
    for index in range(spec.train if split == "train" else spec.heldout):
        p = problem(spec.domain, split, index, seed=_hash(source))
        rng = random.Random(_hash(source, split, index))
        if source == "megamath-web-pro":
            yield _table(rng, split) if rng.random() < 0.2 else _worked(rng, p)
        else:                                                    # paper, section 3: joined by one line break
            response = p.careless if rng.random() < CARELESS else p.careful
            yield f"{p.prompt}\n{response}"


def _worked(rng, p: Problem) -> str:
    """A worked example as web pages tell it: no think tags, no box, and not opening like a prompt."""
    steps = p.careful.removeprefix("<think> ").split(" </think>")[0]
    return rng.choice((f"Worked example. {p.prompt} We go step by step. {steps} The answer is {p.truth}.",
                       f"Exercise: {p.prompt}\nSolution: {steps} Therefore the answer is {p.truth}.",
                       f"How to do it on paper. {p.prompt} Line by line: {steps} We find {p.truth}."))


def _table(rng, split: str) -> str:
    """Sums, differences or products with one digit: the single steps of the chains above."""
    titles = {"+": "Adding", "-": "Taking away", "*": "Multiplying by"}
    facts = {"+": "{n}+{d}={sum}", "-": "{sum}-{d}={n}", "*": "{n}*{d}={product}"}
    while True:
        op = rng.choice("+-*")
        digit = rng.randrange(2, 10)
        lines = [facts[op].format(n=n, d=digit, sum=n + digit, product=n * digit)
                 for n in rng.sample(range(10), 6)]
        text = f"{titles[op]} {digit}: {', '.join(lines)}."
        if (_split(text) == "heldout") == (split == "heldout"):
            return text


# -- the standard library as text ----------------------------------------------------------------------

SKIP = "test tests idlelib lib2to3 turtledemo encodings pydoc_data ensurepip".split()      # folders
QUESTIONS = ("What does {} do?", "Explain {} to me.", "What is {} for?", "Please describe {} in a few words.")


class _Shelf:
    """The texts of the library sources, each once, up to the CAPS of its source and split."""

    def __init__(self):
        self.texts = {(source, split): [] for source in LIBRARY for split in CAPS}
        self.sizes = dict.fromkeys(self.texts, 0)    # characters
        self.seen = set()

    def add(self, source, module, text):
        """One in twenty modules is held out."""
        split = "train" if _hash("heldout", module) % 20 else "heldout"
        place = source, split
        if text not in self.seen and self.sizes[place] + len(text) <= CAPS[split]:
            self.texts[place].append(text)
            self.sizes[place] += len(text)
        self.seen.add(text)


@functools.cache
def _library() -> dict[tuple[str, str], list[str]]:
    """The texts of the four library sources by (source, split); takes 1-3 s, once a process.

    A module is held out as a whole, docstrings and code, so that training on code never shows held-out prose.
    Every text is used once: the second of two equal ones is dropped, whatever its source and split.
    """
    shelf = _Shelf()
    root = sysconfig.get_path("stdlib")
    for module, code, tree in _modules(root):
        for qualified, doc in _docstrings(module, tree):
            if doc in shelf.seen or len(doc) < SHORTEST:
                continue
            if _hash("chat", qualified) % 3 == 0:
                shelf.add("chat", module, _dialogue(qualified, doc))
                shelf.seen.add(doc)
            else:
                for piece in _pieces(doc):
                    shelf.add("dclm-edu", module, piece)
        source = "refinecode" if _hash("code", module) % 2 else "starcoder2"
        for piece in _pieces(code):
            shelf.add(source, module, piece)
    if not shelf.seen:
        raise FileNotFoundError(f"no Python source under {root}: this Python has no standard library to read")
    try:                                             # the texts behind help("...")
        from pydoc_data.topics import topics
    except ImportError:                              # Debian's minimal Python leaves them out
        topics = {}
    for name, text in sorted(topics.items()):
        for piece in _pieces(text):
            shelf.add("dclm-edu", name, piece)
    return shelf.texts


def _modules(root: str) -> Iterator[tuple[str, str, ast.Module]]:
    """Name, source and syntax tree of each module, in the order of a hash: a cap takes a fair sample."""
    paths = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIP and f.isidentifier()]      # not site-packages
        for file in files:
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = os.path.join(folder, file)
                name = os.path.relpath(path, root).removesuffix(".py").replace(os.sep, ".")
                paths[name.removesuffix(".__init__")] = path
    for name in sorted(paths, key=lambda name: _hash("order", name)):
        try:
            with tokenize.open(paths[name]) as file:             # honours the file's own encoding
                code = file.read()
            tree = ast.parse(code)
        except (SyntaxError, ValueError, OSError):               # templates, odd encodings, dangling links
            continue
        yield name, code, tree


def _docstrings(name: str, node) -> Iterator[tuple[str, str]]:
    """Qualified names and cleaned docstrings of a module, class or function and of those directly inside."""
    doc = ast.get_docstring(node)
    if doc:
        yield name, doc.strip()
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(f"{name}.{child.name}", child)


def _dialogue(name: str, doc: str) -> str:
    """A paragraph a turn, one turn or two; roles as in the paper (section 3)."""
    paragraphs = [paragraph[:LONGEST // 2] for paragraph in re.split(r"\n\s*\n", doc)[:2]]
    h = _hash("question", name)
    question = QUESTIONS[h % len(QUESTIONS)].format(name)
    text = f"User: {question}\nAssistant: {paragraphs[0]}"
    if len(paragraphs) > 1 and h // 4 % 2:
        text += f"\nUser: Tell me more.\nAssistant: {paragraphs[1]}"
    return text


def _pieces(text: str, cuts: tuple[str, ...] = ("\n\n\n", "\n\n", "\n")) -> list[str]:
    """The text in pieces of SHORTEST to LONGEST characters, cut at two blank lines, else one, else lines."""
    if len(text) <= LONGEST or not cuts:
        text = text.strip("\n").rstrip()
        return [text] if SHORTEST <= len(text) <= LONGEST else []
    cut, *finer = cuts
    first, *parts = text.split(cut)
    pieces, piece = [], first                        # piece grows part by part while it is short enough
    for part in parts:
        longer = piece + cut + part
        if len(longer) > LONGEST:
            pieces += _pieces(piece, finer)
            piece = part
        else:
            piece = longer
    return pieces + _pieces(piece, finer)
