"""A row of a data set to the text that is trained on: one function a data set."""

from cli import InputError

# Stands in the key of every prepared source, beside the code that reads it (see rules.py). Raise it when
# texts change though that code does not, as with another version of a library: every source is then tokenized
# again.
READERS = 1


class Drop(Exception):
    """A row that is left out, and why."""


class NoUtf8(dict):
    """A row whose text is no UTF-8: whoever takes a column of it drops the row."""

    def __getitem__(self, column, default=None):
        raise Drop("text is no UTF-8")

    get = __contains__ = __getitem__


def read_row(read, row, *lookups):
    """read(row, *lookups), a text. Drop, too, for a row that is no object (None), or whose values have
    another form than the data set's."""
    if row is None:
        raise Drop("no JSON object")
    try:
        return read(row, *lookups)
    except InputError:
        raise
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as e:
        raise Drop(f"row of another form ({type(e).__name__})") from None


# -- columns -----------------------------------------------------------------------------------------------

def text_of(row, column="text"):
    """The column as it is. Drop where it is null, not a string, or empty."""
    value = row.get(column)
    if not isinstance(value, str):
        raise Drop(f"{column} is null" if value is None else f"{column} is not text")
    if not value.strip():
        raise Drop(f"{column} is empty")
    return value


def number_of(row, column):
    """The column as a float, also where it was published as a string. Drop where it is none (or nan)."""
    try:
        value = float(row.get(column))
    except (TypeError, ValueError):
        value = float("nan")
    if value != value:
        raise Drop(f"{column} is no number")
    return value


def turns_of(row, column="messages"):
    """[(role, content)] of a conversation, {role, content} or {from, value}, system prompts left out. Drop
    where it is none, or where an utterance is missing."""
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        raise Drop(f"{column} is no conversation")
    turns, other_names = [], {"human": "user", "gpt": "assistant"}
    for message in messages:
        if not isinstance(message, dict):
            raise Drop(f"{column} is no conversation")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if role != "system":
            turns.append((other_names.get(role, role), content))
    if not turns or not all(isinstance(content, str) and content.strip() for _, content in turns):
        raise Drop(f"{column} lacks an utterance")
    roles = {role for role, _ in turns}
    if "assistant" not in roles or not roles <= {"user", "assistant"}:
        raise Drop(f"{column} is not of user and assistant")
    return turns


# -- formats -----------------------------------------------------------------------------------------------

def question_and_answer(row, column="messages"):
    """Reasoning data: question and answer joined by one line break (paper, section 3)."""
    return "\n".join(content for _, content in turns_of(row, column))


def chat(row, column="messages"):
    """Each utterance behind its role, joined by one line break (paper, section 3)."""
    return "\n".join(f"{role.capitalize()}: {content}" for role, content in turns_of(row, column))


def dclm_edu(row):
    """Documents of quality score >= 3 (paper, section 3); ours: the rounded score, as in the card's recipe.
    `edu_score`, before rounding, would keep about a third of these."""
    if number_of(row, "edu_int_score") < 3:
        raise Drop("score below 3")
    return text_of(row)


def ocr2_kept(row, questions):
    """The question of a row that is judged right by the QwQ evaluator and has tests: pass_rate != -1 (paper,
    section 3). The data set leaves questions out ("-"); they are looked up where they were taken from."""
    if row.get("judgement") != "right":
        raise Drop("not judged right")
    if number_of(row, "pass_rate") == -1:
        raise Drop("no tests")
    question = row.get("question")
    if isinstance(question, str) and question.strip() not in ("", "-"):
        return question
    return questions(row)


def ocr2(row, questions):
    return ocr2_kept(row, questions) + "\n" + text_of(row, "r1_generation")


def wildchat(row):
    """GPT-4 conversations only (paper, section 3). Ours: none that the data set marks as toxic."""
    if not text_of(row, "model").startswith("gpt-4"):
        raise Drop("not GPT-4")
    if row.get("toxic"):
        raise Drop("toxic")
    return chat(row, "conversation")


def openthoughts_science(row):
    if row.get("domain") != "science":
        raise Drop("not science")
    return question_and_answer(row, "conversations")


def codex(row):
    """Code with long chains of thought; a chain that was cut off before its answer is left out (ours)."""
    answer = text_of(row, "output")
    if "<think>" in answer and "</think>" not in answer:
        raise Drop("thought without end")
    return text_of(row, "input") + "\n" + answer


def codeforces(row):
    """A problem of open-r1/codeforces as OpenCodeReasoning-2 put it to its model: sections and examples."""
    sections = [text_of(row, "description")]
    for title, column in (("Input", "input_format"), ("Output", "output_format")):
        if row.get(column):
            sections.append(f"{title}\n\n{row[column]}")
    if row.get("examples"):
        sections.append("Examples")
        for example in row["examples"]:
            for title, key in (("Input", "input"), ("Output", "output")):
                if example.get(key):
                    sections.append(f"{title}\n\n{example[key]}")
    if row.get("note"):
        sections.append("Note\n\n" + row["note"])
    return "\n\n".join(sections)


# -- your own files ----------------------------------------------------------------------------------------

LOCAL_FORMS = (("text",), ("content",), ("messages",), ("conversations",), ("conversation",),
               ("question", "answer"), ("problem", "solution"), ("prompt", "response"),
               ("prompt", "completion"), ("instruction", "input", "output"), ("instruction", "output"),
               ("input", "output"))


def local_text(row):
    """The text of a row of your own files: the first of LOCAL_FORMS, its columns joined by a line break.
    Conversations are formatted as chat; an empty input of an instruction is left out."""
    for form in LOCAL_FORMS:
        if not all(column in row for column in form):
            continue
        if form[0].startswith(("messages", "conversation")):
            return chat(row, form[0])
        texts = []
        for column in form:
            is_optional = column == "input" and form[0] == "instruction"
            if row[column] or not is_optional:
                texts.append(text_of(row, column))
        return "\n".join(texts)
    raise Drop("no column of text")
