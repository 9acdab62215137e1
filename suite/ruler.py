"""RULER (arXiv 2404.06654): 13 long-context tasks by our own seeded generator, to an exact token budget.

The paper's section 8.1 reports its score (the mean of the tasks) by length, 8k to 128k. What is NVIDIA's:
the tasks, their sizes, the prompts (TEMPLATES) and the scores. What is ours:
- the draw: a pure function of (task, length, index, seed, tokenizer, texts), every key, value and word of
  an example distinct, so that nothing but the needle answers the question;
- the budget: bos + prompt + prefix + max_new_tokens + reserve <= length, and more than 99 % of it. Tokens
  grow nearly in proportion to text, so the rule of three finds the size in three to five prompts, each
  tokenized as a whole (tokens of pieces do not add up) and the last word cut to fit. NVIDIA's generator sizes
  one sample a task and shrinks the others by 500 words or 25 lines until they fit;
- the material: see read_texts(). NVIDIA takes Paul Graham's essays, the word lists of `wonderwords`, SQuAD
  and HotpotQA; without files of yours the essay is the standard library's prose (corpus/world.py), words are
  made of three syllables, and the two qa tasks are refused: there is no honest stand-in for them.

    texts = read_texts("data/ruler")                               # or read_texts(): no files
    e = example("niah_multikey_2", 8192, 0, tokenizer, texts)
    answer = generate(e.prompt + e.prefix, e.max_new_tokens)       # greedy; a chat model: see Example
    score("niah_multikey_2", answer, e.answers)                    # 0..1
"""

import functools
import itertools
import json
import math
import os
import random
import re
import string
import uuid
from collections.abc import Callable
from typing import NamedTuple

from cli import InputError, did_you_mean
from corpus import world

# prompt, prefix of the answer: data of github.com/NVIDIA/RULER at c3f5e3b (Apache-2.0), file
# scripts/data/synthetic/constants.py. They decide scores, slips of grammar and spacing included: keep them.
TEMPLATES = {
    "niah": (
        "Some special magic {what} are hidden within the following text. Make sure to memorize it. I "
        "will quiz you about the {what} afterwards.\n{context}\nWhat are all the special magic {what} for "
        "{query} mentioned in the provided text?",
        " The special magic {what} for {query} mentioned in the provided text are"),
    "vt": (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}"
        "\nQuestion: Find all variables that are assigned the value {query} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are "
        "assigned the value {query}, they are: "),
    "cwe": (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize "
        "the ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the "
        "above list?",
        " Answer: The top 10 words that appear most often in the list are:"),
    "fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three most "
        "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
        "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
        "text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:"),
    "qa": (
        "Answer the question based on the given documents. Only give me the answer and do not output any "
        "other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on "
        "the given documents. Only give me the answer and do not output any other words.\n\nQuestion: "
        "{query}",
        " Answer:"),
}
NEW = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}     # max_new_tokens, there too
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

NIAH = {                   # haystack, keys, values, number of keys, of values a key, of keys asked for
    "niah_single_1":   ("noise",  "words", "numbers", 1, 1, 1),
    "niah_single_2":   ("essay",  "words", "numbers", 1, 1, 1),
    "niah_single_3":   ("essay",  "words", "uuids",   1, 1, 1),
    "niah_multikey_1": ("essay",  "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),    # all other lines are needles too
    "niah_multikey_3": ("needle", "uuids", "uuids",   1, 1, 1),
    "niah_multivalue": ("essay",  "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay",  "words", "numbers", 4, 1, 4),
}
QA = {                     # file in the folder of texts, data set of the hub whose columns its rows have
    "qa_1": ("squad.jsonl", "rajpurkar/squad_v2, validation"),
    "qa_2": ("hotpotqa.jsonl", "hotpotqa/hotpot_qa, distractor, validation"),
}
TASKS = (*NIAH, "vt", "cwe", "fwe", *QA)
HOPS = 4                   # of vt's one chain
ALPHA = 2.0                # fwe: the word of rank k appears in proportion to k^-ALPHA

ICL_NOISE = 14             # ours: lines of noise in vt's solved example, about NVIDIA's 500 tokens
LEAST = 500                # ours: characters, the shortest haystack
CLOSE = 256                # ours: the search ends within 1/256 of the budget, or at the next word


class Example(NamedTuple):
    prompt: str
    prefix: str            # begins the answer: after the prompt (base), after the assistant's header (chat)
    answers: list[str]     # what score() looks for
    max_new_tokens: int    # NVIDIA's, by task; greedy


def score(task: str, response: str, answers: list[str]) -> float:
    """0..1, NVIDIA's per sample: a reference counts if it is in the response, case aside. Its
    string_match_all, the share of the references found, for all tasks but qa_1 and qa_2; string_match_part,
    1 if any is found, for these. Its figure of a task is 100 times the mean over samples."""
    _known(task)
    response = re.sub(r"[\x00-\x1f]", "\n", response.strip()).strip().lower()      # as NVIDIA's evaluate.py
    found = [answer.lower() in response for answer in answers]
    return float(any(found)) if task in QA else sum(found) / len(found)


def family(task: str) -> str:
    """The key of a task in TEMPLATES and NEW."""
    return "niah" if task in NIAH else "qa" if task in QA else task


def _known(task):
    if task not in TASKS:
        raise InputError(f"{task!r} is no RULER task{did_you_mean(task, TASKS)} (known: {', '.join(TASKS)})")


# -- texts -------------------------------------------------------------------------------------------------

class Question(NamedTuple):
    query: str
    answers: list[str]
    gold: list[int]        # documents that are always there
    near: list[int]        # documents of the same article: the first distractors


class Texts(NamedTuple):
    where: str             # for messages
    essay: str             # one line
    words: tuple[str, ...]                                         # none: syllables
    qa: dict[str, tuple[list[Question], list[str]]]                # task: questions, documents


@functools.cache
def read_texts(path: str | None = None) -> Texts:
    """The material. path: a text file (the essay), or a folder: its *.txt, in the order of their names, are
    the essay; words.txt (words apart by white space), squad.jsonl and hotpotqa.jsonl (rows with the columns
    of the data sets named at QA) may be there. None: the standard library's prose, 1.3 million characters.
    Read once a process. InputError names the file that is amiss."""
    if path is None:
        return Texts("(none)", _line(world.documents("dclm-edu", "train")), (), {})
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    files = {name: os.path.join(path, name) for name in names}
    essays = [file for name, file in files.items() if name.endswith(".txt") and name != "words.txt"]
    essay = _line(map(_read, essays if os.path.isdir(path) else [path]))
    if len(essay) < LEAST:
        raise InputError(f"--texts={path}: {len(essay)} characters of essay; give *.txt of {LEAST} or more "
                         f"(the more the better: a short text is repeated)")
    words, qa = (), {}
    if "words.txt" in files:
        words = tuple(sorted(set(_read(files["words.txt"]).split())))
        if len(words) < 1000:                                      # their pairs are needles' keys
            raise InputError(f"{files['words.txt']}: {len(words)} words; give 1000 or more, or remove it")
    for (task, (name, hub)), parse in zip(QA.items(), (_squad, _hotpotqa), strict=True):
        if name in files:
            try:
                rows = [json.loads(line) for line in _read(files[name]).split("\n") if line.strip()]
                qa[task] = parse(rows)
            except (ValueError, KeyError, TypeError) as e:
                raise InputError(f"{files[name]}: not one JSON row of {hub} a line ({e!r})") from None
            if not qa[task][0]:
                raise InputError(f"{files[name]}: no question has an answer; give rows of {hub}")
    return Texts(path, essay, words, qa)


def _read(file):
    try:
        with open(file, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"--texts: {file} cannot be read ({e}); give UTF-8 text") from None


def _line(texts):
    return " ".join(" ".join(texts).split())


def _squad(rows):
    documents = sorted({row["context"] for row in rows})
    number, article = {text: i for i, text in enumerate(documents)}, {}
    for row in rows:
        article.setdefault(row["title"], {})[number[row["context"]]] = None
    return [Question(row["question"], row["answers"]["text"], [number[row["context"]]],
                     [i for i in article[row["title"]] if i != number[row["context"]]])
            for row in rows if row["answers"]["text"]], documents  # SQuAD 2 has questions without an answer


def _hotpotqa(rows):
    own = [[f"{title}\n{''.join(sentences)}" for title, sentences in
            zip(row["context"]["title"], row["context"]["sentences"], strict=True)] for row in rows]
    documents = sorted({text for texts in own for text in texts})
    number = {text: i for i, text in enumerate(documents)}
    return [Question(row["question"], [row["answer"]], [number[text] for text in dict.fromkeys(texts)], [])
            for row, texts in zip(rows, own, strict=True)], documents


# -- one example -------------------------------------------------------------------------------------------

class Draft(NamedTuple):
    """An example but for its size: context(n) grows with n, which is a number of characters or of words."""
    context: Callable[[int], str]
    answers: list[str]
    fields: dict           # of the template, besides the context
    least: int             # the smallest n that is still the task
    most: float = math.inf                                         # the largest that there is material for
    solved: str = ""       # an example with its answers, in front
    template: tuple | None = None                                  # where it is not the family's


def example(task: str, length: int, index: int, tokenizer, texts: Texts | None = None, seed: int = 0,
            reserve: int = 0) -> Example:
    """The index-th example of a task at a length in tokens, 4096 to 131072 (and beyond).

    tokenizer: a tokenizer.Tokenizer. texts: of read_texts(), None for read_texts(None). reserve: tokens that
    a chat template will add. bos + prompt + prefix + max_new_tokens + reserve take 99 to 100 % of the length
    (less if one word of the text is more than that: uuids below 4096). Any index will do; qa_1 and qa_2 ask
    each question once before they start again, the same ones at every length. A fraction of a second.
    InputError on an unknown task, a length too short for it, or material that is missing or too little.
    """
    _known(task)
    texts = texts or read_texts()
    kind = family(task)
    draw = {"niah": _niah, "vt": _vt, "cwe": _cwe, "fwe": _fwe, "qa": _qa}[kind]
    draft = draw(random.Random(f"ruler/{seed}/{task}/{length}/{index}"), texts, task, length, index, seed)
    template, prefix = draft.template or TEMPLATES[kind]
    new, prefix = NEW[kind], prefix.format(**draft.fields)

    def prompt(n):
        return draft.solved + template.format(context=draft.context(n), **draft.fields)

    room = length - new - reserve - len(tokenizer.before)
    n, size, needed = _fit(lambda n: len(tokenizer.encode(prompt(n) + prefix)), room, draft.least, draft.most)
    if n is None:
        raise InputError(f"length {length} is too short for {task}: with this tokenizer its smallest prompt "
                         f"and {new} new tokens take about {needed + length - room}; give a greater length")
    if n == draft.most and length - room + size < 0.99 * length:
        raise InputError(f"length {length} is too long for {task} with --texts={texts.where}: all of it "
                         f"makes {length - room + size} tokens; give more, or a smaller length")
    return Example(prompt(n), prefix, draft.answers, new)


def _fit(tokens, room, least, most):
    """(n, tokens(n), tokens(least)): the largest n, but for room / CLOSE or one unit, with tokens(n) <= room;
    n is None if not even `least` is such. By the rule of three, or by halves where that is slow."""
    first = tokens(least)
    if first > room or least > most:
        return None, None, first
    low, high, n = (least, first), None, max(room // 16, least + 1)
    for step in itertools.count():
        if room - low[1] <= room // CLOSE or low[0] == most or high and high[0] - low[0] == 1:
            return *low, first
        n = min(max(n, low[0] + 1), high[0] - 1 if high else most)
        size = tokens(n)
        if size <= room:
            low = n, size
        else:
            high = n, size
        if high and step > 5:
            n = (low[0] + high[0]) // 2
        else:                                                      # aims at the middle of what is accepted
            left = room - room // CLOSE / 2 - size
            n = min(n + round(left * (n - least) / max(size - first, 1)), 99 * n)


# -- needles -----------------------------------------------------------------------------------------------

def _word(rng, texts):
    """Three syllables (of 512,000), or one of words.txt. Words of one length are never parts of another."""
    return rng.choice(texts.words) if texts.words else "".join(
        rng.choice("bdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(3))


def _fresh(rng, kind, texts, seen, text):
    """A key or value that is neither in the text nor in `seen`, where it is put."""
    while True:
        name = (f"{_word(rng, texts)}-{_word(rng, texts)}" if kind == "words" else
                str(rng.randint(10**6, 10**7 - 1)) if kind == "numbers" else
                str(uuid.UUID(int=rng.getrandbits(128), version=4)))
        if name not in seen and name not in text:
            seen.add(name)
            return name


def _cut(text, n):
    """The words that lie in the first n characters, or else the beginning of the first word."""
    return text if n >= len(text) else (text[:n + 1].rsplit(None, 1) or [""])[0]


def _noise(n):
    return _cut((NOISE + "\n") * (n // len(NOISE) + 1), n).split("\n")


def _insert(pieces, needles, depths):
    """The pieces with each needle at its depth, 0..1, between two of them; depths ascend."""
    pieces, slots = list(pieces), len(pieces) + 1
    for needle, depth in zip(needles[::-1], depths[::-1], strict=True):
        pieces.insert(int(depth * slots), needle)
    return pieces


def _niah(rng, texts, task, length, index, seed):
    haystack, of_keys, of_values, n_keys, n_values, n_asked = NIAH[task]
    essay, lines, start = "", [], rng.randrange(len(texts.essay))
    if haystack == "essay":                                        # from some sentence on, around to it
        start = texts.essay.find(". ", start) + 1
        essay = f"{texts.essay[start:]} {texts.essay[:start]}".strip() + " "
    new_key, new_value = (functools.partial(_fresh, rng, kind, texts, set(), essay)
                          for kind in (of_keys, of_values))

    def needle(key, value):
        return f"One of the special magic {of_values} for {key} is: {value}."

    values = {new_key(): [new_value() for _ in range(n_values)] for _ in range(n_keys)}
    asked = rng.sample(list(values), n_asked)
    needles = [needle(key, value) for key in values for value in values[key]]
    rng.shuffle(needles)
    depths = sorted(rng.random() for _ in needles)

    def context(n):
        if haystack == "essay":
            text = _cut(essay * (n // len(essay) + 1), n)
            return " ".join(_insert(re.split(r"(?<=[.!?]) ", text), needles, depths))
        while haystack == "needle" and len(lines) * 40 < n:        # a line has more than 40 characters
            lines.append(needle(new_key(), new_value()))
        pieces = _cut("\n".join(lines), n).split("\n") if lines else _noise(n)
        return "\n".join(_insert(pieces, needles, depths))

    template, what = TEMPLATES["niah"], of_values
    if n_asked * n_values == 1:                                    # NVIDIA's way to the singular
        template = [text.replace("Some", "A").replace("are all", "is").replace("are", "is")
                    for text in template]
        what = of_values.removesuffix("s")
    query = asked[0] if n_asked == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    answers = [value for key in asked for value in values[key]]
    return Draft(context, answers, dict(what=what, query=query), LEAST, template=template)


# -- chains, counts, documents -----------------------------------------------------------------------------

def _vt(rng, texts, task, length, index, seed):
    values = rng.sample(range(10000, 99999), 2)

    def chain(value, letters):
        names = []
        while len(names) <= HOPS:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            names += [] if name in names else [name]
        lines = [f"VAR {names[0]} = {value}"]                      # NVIDIA's lines end with a space, but one
        lines += [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names)]
        return names, lines, sorted(rng.random() for _ in lines)

    names, lines, depths = chain(values[0], 3)
    template, prefix = TEMPLATES["vt"]
    noise = "\n".join(_insert([NOISE] * ICL_NOISE, lines, depths))
    solved = (template + prefix).format(context=noise, query=values[0], num_v=HOPS + 1)
    solved += f" {' '.join(names)}\n\n"
    names, lines, depths = chain(values[1], 5)
    return Draft(lambda n: "\n".join(_insert(_noise(n), lines, depths)), names,
                 dict(query=values[1], num_v=HOPS + 1), LEAST, solved=solved)


def _cwe(rng, texts, task, length, index, seed):
    # repeats of common words and of others; in the solved example its words, and repeats of both
    often, seldom, icl, icl_often, icl_seldom = (30, 3, 40, 10, 3) if length >= 4096 else (6, 1, 20, 3, 1)
    pool = rng.sample(texts.words, len(texts.words))               # no word is in both lists
    seen, order, most = set(pool), rng.random(), len(pool) - icl - 10 if pool else math.inf

    def words(start, stop):
        while len(pool) < stop:
            word = _word(rng, texts)
            pool.extend({word} - seen)
            seen.add(word)
        return pool[start:stop]

    def listed(common, others, often, seldom):
        entries = common * often + others * seldom
        random.Random(order).shuffle(entries)
        return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))

    shown, common = words(0, icl), words(icl, icl + 10)
    template, prefix = TEMPLATES["cwe"]
    solved = template.format(context=listed(shown[:10], shown[10:], icl_often, icl_seldom)) + prefix + " "
    solved += " ".join(f"{i}. {word}" for i, word in enumerate(shown[:10], 1)) + "\n"
    return Draft(lambda n: listed(common, words(icl + 10, icl + 10 + n), often, seldom), common, {}, 10, most,
                 solved)


def _fwe(rng, texts, task, length, index, seed):
    size = max((length - NEW["fwe"]) // 50, 10)                    # as NVIDIA
    coded, order = {"...": None}, rng.random()                     # the dots have rank 1
    while len(coded) < size:
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    coded = list(coded)
    zeta = math.pi**2 / 6                                          # of ALPHA

    def context(n):
        entries = [word for k, word in enumerate(coded, 1) for _ in range(int(n * k**-ALPHA / zeta))]
        random.Random(order).shuffle(entries)
        return " ".join(entries)

    return Draft(context, coded[1:4], {}, 100)                     # from 100 on, ranks 4 and 5 differ


def _qa(rng, texts, task, length, index, seed):
    if task not in texts.qa:
        file, hub = QA[task]
        raise InputError(f"{task} needs questions, and --texts={texts.where} has none: put {file}, rows of "
                         f"{hub} (one JSON object a line), into the folder --texts=..., or leave {task} out")
    questions, documents = texts.qa[task]
    turn, place = divmod(index, len(questions))
    q = random.Random(f"ruler/{seed}/{task}/{turn}").sample(questions, len(questions))[place]
    near = rng.sample(q.near, len(q.near))
    taken = {*near, *q.gold}
    others = near + [i for i in rng.sample(range(len(documents)), len(documents)) if i not in taken]
    order = rng.random()

    def context(n):
        chosen = [documents[i] for i in q.gold]
        for i in others:
            if n <= 0:
                break
            chosen.append(_cut(documents[i], n))                   # the last one is cut to fill the budget
            n -= len(documents[i])
        random.Random(order).shuffle(chosen)
        return "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(chosen, 1))

    return Draft(context, q.answers, dict(query=q.query), 0, sum(len(documents[i]) for i in others))
