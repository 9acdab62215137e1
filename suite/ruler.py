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

EXAMPLES = 1               # version of example(); raise it when any example changes: they are sampled again
SCORES = 1                 # version of score(); raise it when any response may count otherwise


class Template(NamedTuple):
    prompt: str
    prefix: str            # of the answer


# Data of github.com/NVIDIA/RULER at c3f5e3b (Apache-2.0), file scripts/data/synthetic/constants.py. They
# decide scores, slips of grammar and spacing included: keep them.
TEMPLATES = {
    "niah": Template(
        "Some special magic {what} are hidden within the following text. Make sure to memorize it. I "
        "will quiz you about the {what} afterwards.\n{context}\nWhat are all the special magic {what} for "
        "{query} mentioned in the provided text?",
        " The special magic {what} for {query} mentioned in the provided text are"),
    "vt": Template(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}"
        "\nQuestion: Find all variables that are assigned the value {query} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are "
        "assigned the value {query}, they are: "),
    "cwe": Template(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize "
        "the ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the "
        "above list?",
        " Answer: The top 10 words that appear most often in the list are:"),
    "fwe": Template(
        "Read the following coded text and track the frequency of each coded word. Find the three most "
        "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
        "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
        "text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:"),
    "qa": Template(
        "Answer the question based on the given documents. Only give me the answer and do not output any "
        "other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on "
        "the given documents. Only give me the answer and do not output any other words.\n\nQuestion: "
        "{query}",
        " Answer:"),
}
NEW = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}     # max_new_tokens, there too
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Needles(NamedTuple):
    haystack: str          # noise, essay, or needle: all other lines are needles too
    keys: str              # words, uuids
    values: str            # numbers, uuids
    n_keys: int = 1
    values_per_key: int = 1
    n_queries: int = 1     # keys that are asked for


NIAH = {
    "niah_single_1": Needles("noise", "words", "numbers"),
    "niah_single_2": Needles("essay", "words", "numbers"),
    "niah_single_3": Needles("essay", "words", "uuids"),
    "niah_multikey_1": Needles("essay", "words", "numbers", n_keys=4),
    "niah_multikey_2": Needles("needle", "words", "numbers"),
    "niah_multikey_3": Needles("needle", "uuids", "uuids"),
    "niah_multivalue": Needles("essay", "words", "numbers", values_per_key=4),
    "niah_multiquery": Needles("essay", "words", "numbers", n_keys=4, n_queries=4),
}


class Rows(NamedTuple):
    file: str              # in the folder of texts
    dataset: str           # of the hub, whose columns its rows have


QA = {
    "qa_1": Rows("squad.jsonl", "rajpurkar/squad_v2, validation"),
    "qa_2": Rows("hotpotqa.jsonl", "hotpotqa/hotpot_qa, distractor, validation"),
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
    check_task(task)
    response = re.sub(r"[\x00-\x1f]", "\n", response.strip()).strip().lower()      # as NVIDIA's evaluate.py
    hits = [answer.lower() in response for answer in answers]
    return float(any(hits)) if task in QA else sum(hits) / len(hits)


def family(task: str) -> str:
    """The key of a task in TEMPLATES and NEW."""
    if task in NIAH:
        return "niah"
    return "qa" if task in QA else task


def check_task(task):
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
        return Texts("(none)", one_line(world.documents("dclm-edu", "train")), (), {})
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    files = {name: os.path.join(path, name) for name in names}
    essays = [path]
    if os.path.isdir(path):
        essays = [files[name] for name in names if name.endswith(".txt") and name != "words.txt"]
    essay = one_line(map(read_text, essays))
    if len(essay) < LEAST:
        raise InputError(f"--texts={path}: {len(essay)} characters of essay; give *.txt of {LEAST} or more "
                         f"(the more the better: a short text is repeated)")
    words = ()
    if "words.txt" in files:
        words = tuple(sorted(set(read_text(files["words.txt"]).split())))
        if len(words) < 1000:                                      # their pairs are needles' keys
            raise InputError(f"{files['words.txt']}: {len(words)} words; give 1000 or more, or remove it")
    parsers = {"qa_1": parse_squad, "qa_2": parse_hotpotqa}
    qa = {task: read_questions(files[file], parsers[task], dataset) for task, (file, dataset) in QA.items()
          if file in files}
    return Texts(path, essay, words, qa)


def read_questions(file, parse, dataset):
    """(questions, documents) of a file of rows, one JSON object a line."""
    lines = read_text(file).split("\n")
    try:
        questions, documents = parse([json.loads(line) for line in lines if line.strip()])
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{file}: not one JSON row of {dataset} a line ({e!r})") from None
    if not questions:
        raise InputError(f"{file}: no question has an answer; give rows of {dataset}")
    return questions, documents


def read_text(file):
    try:
        with open(file, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"--texts: {file} cannot be read ({e}); give UTF-8 text") from None


def one_line(texts):
    return " ".join(" ".join(texts).split())


def parse_squad(rows):
    """(questions, documents): the paragraphs are the documents. Questions without an answer, which SQuAD 2
    has, are left out."""
    documents = sorted({row["context"] for row in rows})
    number = {text: i for i, text in enumerate(documents)}
    articles = {}                                                  # {title: {document: None}}, in order
    for row in rows:
        articles.setdefault(row["title"], {})[number[row["context"]]] = None
    questions = []
    for row in rows:
        if row["answers"]["text"]:
            gold = number[row["context"]]
            near = [document for document in articles[row["title"]] if document != gold]
            questions.append(Question(row["question"], row["answers"]["text"], [gold], near))
    return questions, documents


def parse_hotpotqa(rows):
    """(questions, documents): each row has ten documents, which are all there whenever it is asked."""
    texts_of_row = []
    for row in rows:
        pages = zip(row["context"]["title"], row["context"]["sentences"], strict=True)
        texts_of_row.append([f"{title}\n{''.join(sentences)}" for title, sentences in pages])
    documents = sorted(set(itertools.chain.from_iterable(texts_of_row)))
    number = {text: i for i, text in enumerate(documents)}
    questions = []
    for row, texts in zip(rows, texts_of_row, strict=True):
        gold = [number[text] for text in dict.fromkeys(texts)]
        questions.append(Question(row["question"], [row["answer"]], gold, []))
    return questions, documents


# -- one example -------------------------------------------------------------------------------------------

class Draw(NamedTuple):
    """Which example is drawn, and from what."""
    rng: random.Random
    texts: Texts
    task: str
    length: int
    index: int
    seed: int


class Draft(NamedTuple):
    """An example but for its size: context(n) grows with n, which is a number of characters or of words."""
    context: Callable[[int], str]
    answers: list[str]
    fields: dict           # of the template, besides the context
    least: int             # the smallest n that is still the task
    most: float = math.inf                                         # the largest that there is material for
    solved: str = ""       # an example with its answers, in front
    template: Template | None = None                               # where it is not the family's


class Fit(NamedTuple):
    n: int
    tokens: int            # of the prompt and prefix with context(n)


def example(task: str, length: int, index: int, tokenizer, texts: Texts | None = None, seed: int = 0,
            reserve: int = 0) -> Example:
    """The index-th example of a task at a length in tokens, 4096 to 131072 (and beyond).

    tokenizer: a tokenizer.Tokenizer. texts: of read_texts(), None for read_texts(None). reserve: tokens that
    a chat template will add. bos + prompt + prefix + max_new_tokens + reserve take 99 to 100 % of the length
    (less if one word of the text is more than that: uuids below 4096). Any index will do; qa_1 and qa_2 ask
    each question once before they start again, the same ones at every length. A fraction of a second.
    InputError on an unknown task, a length too short for it, or material that is missing or too little.
    """
    check_task(task)
    texts = texts or read_texts()
    kind = family(task)
    rng = random.Random(f"ruler/{seed}/{task}/{length}/{index}")
    draft = DRAFTS[kind](Draw(rng, texts, task, length, index, seed))
    template = draft.template or TEMPLATES[kind]
    prefix = template.prefix.format(**draft.fields)

    def prompt(n):
        return draft.solved + template.prompt.format(context=draft.context(n), **draft.fields)

    def tokens(n):
        return len(tokenizer.encode(prompt(n) + prefix))

    besides = NEW[kind] + reserve + len(tokenizer.bos_ids)          # tokens
    smallest = Fit(draft.least, tokens(draft.least))
    if draft.least > draft.most or smallest.tokens > length - besides:
        raise InputError(f"length {length} is too short for {task}: with this tokenizer its smallest prompt "
                         f"and {NEW[kind]} new tokens take about {smallest.tokens + besides}; give a greater "
                         f"length")
    fit = largest_fit(tokens, length - besides, smallest, draft.most)
    total = fit.tokens + besides
    if fit.n == draft.most and total < 0.99 * length:
        raise InputError(f"length {length} is too long for {task} with --texts={texts.where}: all of it "
                         f"makes {total} tokens; give more, or a smaller length")
    return Example(prompt(fit.n), prefix, draft.answers, NEW[kind])


def largest_fit(tokens, room, smallest, most):
    """The Fit of the largest n <= most, but for room / CLOSE or one unit, with tokens(n) <= room: by the rule
    of three, or by halves where that is slow. smallest: a Fit that is within the room."""
    low, high = smallest, None                                     # what fits, what does not
    n = max(room // 16, smallest.n + 1)
    for step in itertools.count():
        if room - low.tokens <= room // CLOSE or low.n == most or high and high.n - low.n == 1:
            return low
        n = max(n, low.n + 1)
        n = min(n, high.n - 1 if high else most)
        tried = Fit(n, tokens(n))
        if tried.tokens <= room:
            low = tried
        else:
            high = tried
        if high and step > 5:
            n = (low.n + high.n) // 2
        else:
            target = room - room // CLOSE / 2                      # the middle of what is accepted
            grown = max(tried.tokens - smallest.tokens, 1)
            step_up = round((target - tried.tokens) * (n - smallest.n) / grown)
            n = min(n + step_up, 99 * n)


# -- needles -----------------------------------------------------------------------------------------------

def new_word(rng, texts):
    """One of words.txt, or three syllables (of 512,000). Words of one length are never parts of another."""
    if texts.words:
        return rng.choice(texts.words)
    return "".join(rng.choice("bdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(3))


def fresh_name(rng, kind, texts, seen, text):
    """A key or value that is neither in the text nor in `seen`, where it is put."""
    while True:
        if kind == "words":
            name = f"{new_word(rng, texts)}-{new_word(rng, texts)}"
        elif kind == "numbers":
            name = str(rng.randint(10**6, 10**7 - 1))
        else:
            name = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if name not in seen and name not in text:
            seen.add(name)
            return name


def cut_words(text, n):
    """The words that lie in the first n characters, or else the beginning of the first word."""
    if n >= len(text):
        return text
    whole_words = text[:n + 1].rsplit(None, 1)
    return whole_words[0] if whole_words else ""


def noise_lines(n):
    """Lines of noise of n characters."""
    return cut_words((NOISE + "\n") * (n // len(NOISE) + 1), n).split("\n")


def insert_needles(pieces, needles, depths):
    """The pieces with each needle at its depth, 0..1, between two of them; depths ascend."""
    pieces = list(pieces)
    slots = len(pieces) + 1
    for needle, depth in zip(needles[::-1], depths[::-1], strict=True):
        pieces.insert(int(depth * slots), needle)
    return pieces


def draft_niah(draw):
    spec, rng, texts = NIAH[draw.task], draw.rng, draw.texts
    start = rng.randrange(len(texts.essay))
    essay = ""
    if spec.haystack == "essay":                                   # from some sentence on, around to it
        start = texts.essay.find(". ", start) + 1
        essay = f"{texts.essay[start:]} {texts.essay[:start]}".strip() + " "
    new_key = functools.partial(fresh_name, rng, spec.keys, texts, set(), essay)
    new_value = functools.partial(fresh_name, rng, spec.values, texts, set(), essay)

    def needle(key, value):
        return f"One of the special magic {spec.values} for {key} is: {value}."

    values = {}                                                    # {key: its values}
    for _ in range(spec.n_keys):
        key = new_key()
        values[key] = [new_value() for _ in range(spec.values_per_key)]
    queries = rng.sample(list(values), spec.n_queries)
    needles = [needle(key, value) for key in values for value in values[key]]
    rng.shuffle(needles)
    depths = sorted(rng.random() for _ in needles)
    distractors = []                                               # needles nobody asks for

    def context(n):
        if spec.haystack == "essay":
            text = cut_words(essay * (n // len(essay) + 1), n)
            return " ".join(insert_needles(re.split(r"(?<=[.!?]) ", text), needles, depths))
        if spec.haystack == "noise":
            return "\n".join(insert_needles(noise_lines(n), needles, depths))
        while len(distractors) * 40 < n:                           # a line has more than 40 characters
            distractors.append(needle(new_key(), new_value()))
        pieces = cut_words("\n".join(distractors), n).split("\n")
        return "\n".join(insert_needles(pieces, needles, depths))

    template, what = TEMPLATES["niah"], spec.values
    if spec.n_queries * spec.values_per_key == 1:                  # NVIDIA's way to the singular
        template = Template(*(text.replace("Some", "A").replace("are all", "is").replace("are", "is")
                              for text in template))
        what = spec.values.removesuffix("s")
    query = queries[0]
    if spec.n_queries > 1:
        query = ", ".join(queries[:-1]) + ", and " + queries[-1]
    answers = [value for key in queries for value in values[key]]
    return Draft(context, answers, dict(what=what, query=query), LEAST, template=template)


# -- chains, counts, documents -----------------------------------------------------------------------------

class Chain(NamedTuple):
    """Variables that are assigned to each other."""
    names: list[str]
    lines: list[str]
    depths: list[float]    # of the lines in the text


def draw_chain(rng, value, letters):
    names = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    lines = [f"VAR {names[0]} = {value}"]                          # NVIDIA's lines end with a space, but one
    lines += [f"VAR {name} = VAR {source} " for source, name in itertools.pairwise(names)]
    return Chain(names, lines, sorted(rng.random() for _ in lines))


def draft_vt(draw):
    solved_value, value = draw.rng.sample(range(10000, 99999), 2)
    solved_chain = draw_chain(draw.rng, solved_value, letters=3)
    template = TEMPLATES["vt"]
    lines = insert_needles([NOISE] * ICL_NOISE, solved_chain.lines, solved_chain.depths)
    solved = (template.prompt + template.prefix).format(
        context="\n".join(lines), query=solved_value, num_v=HOPS + 1)
    solved += f" {' '.join(solved_chain.names)}\n\n"
    chain = draw_chain(draw.rng, value, letters=5)

    def context(n):
        return "\n".join(insert_needles(noise_lines(n), chain.lines, chain.depths))

    return Draft(context, chain.names, dict(query=value, num_v=HOPS + 1), LEAST, solved=solved)


class Repeats(NamedTuple):
    """How often words are in a list of cwe: common ones and others; solved_: those of the solved example."""
    common: int
    others: int
    solved_words: int
    solved_common: int
    solved_others: int


LONG_LISTS = Repeats(common=30, others=3, solved_words=40, solved_common=10, solved_others=3)
SHORT_LISTS = Repeats(common=6, others=1, solved_words=20, solved_common=3, solved_others=1)


def numbered(words):
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def draft_cwe(draw):
    repeats = LONG_LISTS if draw.length >= 4096 else SHORT_LISTS
    rng, texts = draw.rng, draw.texts
    pool = rng.sample(texts.words, len(texts.words))               # no word is in both lists
    seen = set(pool)
    order = rng.random()                                           # of the lists' words
    first_other = repeats.solved_words + 10                        # in the pool
    most = len(pool) - first_other if pool else math.inf

    def words(start, stop):
        while len(pool) < stop:
            new = new_word(rng, texts)
            if new not in seen:
                pool.append(new)
                seen.add(new)
        return pool[start:stop]

    def shuffled(common, n_common, others, n_others):
        entries = common * n_common + others * n_others
        random.Random(order).shuffle(entries)
        return numbered(entries)

    shown = words(0, repeats.solved_words)
    common = words(repeats.solved_words, first_other)
    template = TEMPLATES["cwe"]
    solved = template.prompt.format(
        context=shuffled(shown[:10], repeats.solved_common, shown[10:], repeats.solved_others))
    solved += template.prefix + " " + numbered(shown[:10]) + "\n"

    def context(n):
        return shuffled(common, repeats.common, words(first_other, first_other + n), repeats.others)

    return Draft(context, common, {}, 10, most, solved)


def draft_fwe(draw):
    n_words = max((draw.length - NEW["fwe"]) // 50, 10)            # as NVIDIA
    coded = {"...": None}                                          # in order; the dots have rank 1
    order = draw.rng.random()
    while len(coded) < n_words:
        coded["".join(draw.rng.choices(string.ascii_lowercase, k=6))] = None
    coded = list(coded)
    zeta = math.pi**2 / 6                                          # of ALPHA

    def context(n):
        entries = []
        for rank, name in enumerate(coded, 1):
            entries += [name] * int(n * rank**-ALPHA / zeta)
        random.Random(order).shuffle(entries)
        return " ".join(entries)

    return Draft(context, coded[1:4], {}, 100)                     # from 100 on, ranks 4 and 5 differ


def draft_qa(draw):
    task, texts = draw.task, draw.texts
    if task not in texts.qa:
        raise InputError(f"{task} needs questions, and --texts={texts.where} has none: put {QA[task].file}, "
                         f"rows of {QA[task].dataset} (one JSON object a line), into the folder --texts=..., "
                         f"or leave {task} out")
    questions, documents = texts.qa[task]
    turn, place = divmod(draw.index, len(questions))
    order_of_turn = random.Random(f"ruler/{draw.seed}/{task}/{turn}")
    question = order_of_turn.sample(questions, len(questions))[place]
    near = draw.rng.sample(question.near, len(question.near))
    first = {*near, *question.gold}
    anywhere = draw.rng.sample(range(len(documents)), len(documents))
    distractors = near + [i for i in anywhere if i not in first]
    order = draw.rng.random()

    def context(n):
        chosen = [documents[i] for i in question.gold]
        for i in distractors:
            if n <= 0:
                break
            chosen.append(cut_words(documents[i], n))              # the last one is cut to fill the budget
            n -= len(documents[i])
        random.Random(order).shuffle(chosen)
        return "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(chosen, 1))

    most = sum(len(documents[i]) for i in distractors)
    return Draft(context, question.answers, dict(query=question.query), 0, most)


DRAFTS = {"niah": draft_niah, "vt": draft_vt, "cwe": draft_cwe, "fwe": draft_fwe, "qa": draft_qa}
