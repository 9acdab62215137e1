"""The embedded world: truths checked by other means, splits that never meet, the same in every process."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from corpus import world

ROOT = Path(world.__file__).parents[1]
N = 1500                             # draws a domain and split


@pytest.fixture(scope="module")
def problems():
    """N problems by domain and split; two seeds, since the sources and RL use different ones."""
    return {(domain, split): [world.problem(domain, split, i, seed) for seed in (0, 7) for i in range(N // 2)]
            for domain in world.DOMAINS for split in world.SPLITS}


@pytest.fixture(scope="module")
def texts():
    return {(source, split): list(world.documents(source, split))
            for source in world.SOURCES for split in ("train", "heldout")}


def of(problems, domain):
    return [p for split in world.SPLITS for p in problems[domain, split]]


def answer(response):
    """What follows the chain; asserts the one shape that all responses have."""
    chain, rest = re.fullmatch(r"<think> (.+?) </think>\n(.+)", response, re.DOTALL).groups()
    assert "\\boxed" not in chain and "```" not in chain
    return rest


def boxed(response):
    return re.fullmatch(r"\\boxed\{(.+)\}", answer(response)).group(1)


def passes(response, truth):
    """Runs the answer of a response against the tests; our own generated code, so without a sandbox."""
    code = re.fullmatch(r"```python\n(.+)\n```", answer(response), re.DOTALL).group(1)
    names = {}
    exec(code, names)
    return all(names[truth["fn_name"]](*t["input"]) == t["output"] for t in truth["tests"])


def right(p, response):
    return passes(response, p.truth) if p.domain == "code" else boxed(response) == p.truth


# -- problems ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("domain", world.DOMAINS)
def test_splits_are_disjoint_and_rich(problems, domain):
    def bare(p):                     # without what varies freely: function name, options, order of summands
        line = re.sub(r"function \w+\(", "function (", p.prompt.split("\n")[0])
        sum_ = re.fullmatch(r"What is (\d+) \+ (\d+)\?", line)
        return tuple(sorted(sum_.groups())) if sum_ else line

    train, rl, heldout = ({bare(p) for p in problems[domain, split]} for split in world.SPLITS)
    assert not train & rl and not train & heldout and not rl & heldout
    assert min(len(train) / N, len(rl) / N, len(heldout) / N) > 0.5      # few repetitions, even in a tenth
    assert all(p.domain == domain and not p.prompt.endswith("\n") for p in of(problems, domain))


def test_math_truths(problems):
    kinds = Counter()
    for p in of(problems, "math"):
        if m := re.fullmatch(r"What is (\d+) ([-+*]) (\d+)\?", p.prompt):
            a, b = int(m[1]), int(m[3])
            want = {"+": a + b, "-": a - b, "*": a * b}[m[2]]
            kinds[m[2]] += 1
        else:
            sign, b, c = re.fullmatch(r"Solve x ([-+]) (\d+) = (\d+)\.", p.prompt).groups()
            want = int(c) - int(sign + b)
            kinds["x"] += 1
        assert p.truth == str(want)
    assert min(kinds.values()) > 200 and set(kinds) == set("+-*x")


@pytest.mark.parametrize("domain", ["math", "science"])
def test_every_step_of_a_careful_chain_is_true(problems, domain):
    """Every clause 'a+b = c+d = e' of a chain holds, in exact arithmetic."""
    checked = 0
    for p in of(problems, domain):
        clauses = re.split(r"[.:] ", p.careful.removeprefix("<think> "))
        for clause in clauses:
            *left, last = clause.split("=")
            left = [part for part in left if re.fullmatch(r"[-\d+*/ ]+", part)]
            if left:
                want = int(re.match(r" ?(-?\d+)\b", last)[1])
                assert all(eval(part) == want for part in left), p
                checked += 1
    assert checked > 3 * N


def test_code_truths_are_plain(problems):
    for p in of(problems, "code"):
        assert set(p.truth) == {"kind", "fn_name", "tests", "checker", "time_limit_s", "memory_limit_mb"}
        assert json.loads(json.dumps(p.truth)) == p.truth
        assert 4 <= len(p.truth["tests"]) <= 6
        assert f"function {p.truth['fn_name']}(" in p.prompt


def test_science_truths(problems):
    """The formula with its quantities put in gives a number in the range that stands at the right letter."""
    letters = Counter()
    for p in of(problems, "science"):
        question, *options = p.prompt.split("\n")
        formula, *given = re.fullmatch(r".+? = (\S+) in \S.*?, (\w+) = (\d+) .+, (\w+) = (\d+) .+\.",
                                       question).groups()
        want = eval(formula, {given[0]: int(given[1]), given[2]: int(given[3])})
        ranges = [re.fullmatch(rf"{letter}\) (\d+)-(\d+)", option).groups()
                  for letter, option in zip("ABCD", options, strict=True)]
        assert all(int(a[1]) + 1 == int(b[0]) for a, b in zip(ranges, ranges[1:], strict=False))
        low, high = ranges["ABCD".index(p.truth)]
        assert int(low) <= want <= int(high), p
        assert f"{want:.0f} is {p.truth}. </think>" in p.careful
        letters[p.truth] += 1
    total = sum(letters.values())
    assert set(letters) == set("ABCD") and all(abs(n / total - 0.25) < 0.03 for n in letters.values())


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_careful_is_right_and_careless_seldom(problems, domain):
    ps = of(problems, domain)
    assert all(right(p, p.careful) for p in ps)
    assert 0.2 < sum(right(p, p.careless) for p in ps) / len(ps) < 0.3
    assert sum(len(p.careless) for p in ps) < sum(len(p.careful) for p in ps)


# -- documents -----------------------------------------------------------------------------------------------

def test_sources_are_the_papers(texts):
    assert len(world.SOURCES) == 11 == len(set(world.SOURCES))
    for (source, split), documents in texts.items():
        if source in world.GENERATED:
            _, train, heldout = world.GENERATED[source]
            assert len(documents) == {"train": train, "heldout": heldout}[split]
            assert len(set(documents)) > 0.85 * len(documents)
        else:
            assert documents and sum(map(len, documents)) <= world.CAPS[split]
            assert len(set(documents)) == len(documents)


def test_no_heldout_text_is_in_any_train(texts):
    train = {text for (_, split), documents in texts.items() if split == "train" for text in documents}
    heldout = {text for (_, split), documents in texts.items() if split == "heldout" for text in documents}
    assert not train & heldout


def test_sources_of_the_library_share_nothing(texts):
    every = [text for key, documents in texts.items() if key[0] in world.LIBRARY for text in documents]
    assert len(every) == len(set(every))


def test_training_on_code_shows_no_heldout_prose(texts):
    """A module is held out as a whole: its docstrings are not in the code, nor its code in the docstrings."""
    def lines(sources, split):
        found = {line.strip() for source in sources for text in texts[source, split]
                 for line in text.split("\n")}
        return {line for line in found if len(line) > 50}

    prose, code = ("dclm-edu", "chat"), ("refinecode", "starcoder2")
    for a, b in ((prose, code), (code, prose)):
        heldout, train = lines(a, "heldout"), lines(b, "train")
        assert len(heldout & train) < 0.05 * len(heldout), (a, len(heldout & train), len(heldout))


def test_sources_of_a_domain_differ(texts):
    """They draw from the same problems, of which math has 22 thousand: a few texts are equal."""
    for a, b in (("mot-math", "nemotron-math"), ("mot-code", "ocr2"),
                 ("mot-science", "openthoughts3-science")):
        assert len(set(texts[a, "train"]) & set(texts[b, "train"])) < 0.15 * len(texts[a, "train"]), a


def test_sizes(texts):
    for (source, _), documents in texts.items():
        longest, shortest = (450, 40) if source in world.GENERATED else (world.LONGEST + 200, 40)
        assert all(shortest <= len(text) <= longest for text in documents), source
    for source in ("refinecode", "starcoder2", "dclm-edu"):
        assert sum(map(len, texts[source, "train"])) > 400_000, source


def test_forms(texts):
    for source in world.GENERATED:
        documents = texts[source, "train"]
        if source == "megamath-web-pro":
            assert not any("<think>" in text or "boxed" in text for text in documents)
            tables = sum(text.startswith(("Adding", "Taking", "Multiplying")) for text in documents)
            assert 0.1 < tables / len(documents) < 0.3
        else:                        # the prompt, one line break, the response
            assert all(text.count("\n<think> ") == 1 and text.count(" </think>\n") == 1 for text in documents)
            guesses = sum("<think> about " in text or "<think> maybe " in text for text in documents)
            assert 0.45 < guesses / len(documents) < 0.55
    assert all(text.startswith("User: ") and "\nAssistant: " in text for text in texts["chat", "train"])


GOLDEN = {                           # source: of its training texts
    "megamath-web-pro": "58eaeed55b742e04", "nemotron-math": "66713bf138fa07c7",
    "mot-math": "a1763fc7c8584e78", "mot-code": "6969e815c595d99c", "ocr2": "8cd5a35b79f6a8b0",
    "openthoughts3-science": "b673698150c7fca8", "mot-science": "dcb1fa82aea56116"}


def test_generated_texts_are_golden(texts):
    """Every result on the toy world depends on these texts: change them knowingly."""
    found = {source: hashlib.sha256("\0".join(texts[source, "train"]).encode()).hexdigest()[:16]
             for source in world.GENERATED}
    assert found == GOLDEN


# -- the same everywhere -------------------------------------------------------------------------------------

DIGEST = """
import hashlib
from corpus import world
h = hashlib.sha256()
for source in world.SOURCES:
    for text in world.documents(source, "heldout"):
        h.update(text.encode())
for domain in world.DOMAINS:
    for i in range(100):
        h.update(repr(world.problem(domain, "rl", i)).encode())
print(h.hexdigest())
"""


def test_same_in_every_process(tmp_path):
    """Neither the hash seed, nor the locale, nor the folder it is called from matters."""
    def digest(**env):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **env}
        command = [sys.executable, "-c", DIGEST]
        run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
        return run.stdout

    assert digest(PYTHONHASHSEED="1") == digest(PYTHONHASHSEED="2", LC_ALL="C", PYTHONUTF8="0")


def test_pure_function_of_its_arguments():
    again = [world.problem("code", "rl", i) for i in (3, 2, 1)]
    assert again[::-1] == [world.problem("code", "rl", i) for i in (1, 2, 3)]
    assert world.problem("math", "train", 5, seed=1) != world.problem("math", "train", 5, seed=2)


def test_needs_only_the_standard_library():
    """-I -S leave nothing on the path but the standard library."""
    code = ("import sys; sys.path.append(sys.argv[1]); from corpus import world; "
            "print(world.problem('math', 'rl', 0))")
    command = [sys.executable, "-B", "-I", "-S", "-c", code, str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == repr(world.problem("math", "rl", 0))


def test_unknown_names_list_the_known():
    for call, known in ((lambda: world.problem("maths", "train", 0), world.DOMAINS),
                        (lambda: world.problem("math", "test", 0), world.SPLITS),
                        (lambda: world.documents("dclm", "train"), world.SOURCES),
                        (lambda: world.documents("dclm-edu", "rl"), ("train", "heldout"))):
        with pytest.raises(ValueError) as error:
            call()
        assert all(name in str(error.value) for name in known)
