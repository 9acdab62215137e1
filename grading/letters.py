"""Multiple choice: which letter a response chooses."""

import re

from grading import Verdict
from grading.math_answers import TEXT, boxes_of

# -- science ------------------------------------------------------------------------------------------------

_LETTER = r"\(?(?:\\(?:text|textbf|mathrm|mathbf)\{)?[(\[]?([A-Za-z])(?![A-Za-z0-9'])[)\]}]*"
_CHOSEN = re.compile("|".join((                            # the answer is (C); C is correct; **C) 5 N**; C
    r"(?:(?i:answer)|(?i:correct)\s+(?i:option|choice|letter))[\s*_]*(?:(?i:is)\b|[:=])[\s*_:$]*"
    r"(?:(?i:option|choice)\s+)?" + _LETTER,
    r"\b([A-Z])\)?\**\s+is\s+(?:the\s+)?(?i:correct|right)\b",
    r"\*\*[\s$]*(?:(?i:answer|option|choice)\s*:?\s*)?" + _LETTER + r"(?=[\s$]*[*.:)])",
    r"^[ \t]*\(?([A-Z])\)?[ \t.]*$")), re.M)


_ANOTHER = re.compile(r"[\s*.$)]*(?:\b(?:or|and)\b|[,/&+])[\s*$(]*(?:\\text\{)?[(]?[A-HJ]\b")


def letter_of(text, options=None):
    """(the letter that a text chooses, or None; a reason). options: their texts where known."""
    chosen, skip = [], 0                                  # (position, letter or None where it is not one)
    boxes = boxes_of(text)
    if boxes:
        start, inside = boxes[-1]
        chosen.append((start, _boxed_letter(inside or "", options)))
        text = text[:start] + text[start:].replace(inside or "", " " * len(inside or ""), 1)
    for match in _CHOSEN.finditer(text):
        letter, rest = next(g for g in match.groups() if g), text[match.end() : match.end() + 40]
        if match.start() >= skip and (letter.isupper() or re.match(r"[\s.*)\]}$]*(?:\n|$)", rest)):
            another = _ANOTHER.match(rest)                # "A or C"; "the answer is a sum" has no A
            skip = match.end() + another.end() if another else 0
            chosen.append((match.start(), None if another else letter.upper()))
    whole = re.fullmatch(r"\s*\(?([A-Za-z])\)?[\s.]*", text)                   # nothing but "c"
    if not chosen and whole:
        chosen.append((0, whole[1].upper()))
    if not chosen and options:
        line = text.strip().rpartition("\n")[2]
        chosen.append((0, _option(re.split(r"(?i:answer)[\s*_]*(?:is\b|[:=])", line)[-1], options)))
    if not chosen:
        return None, "no letter"
    letter = max(chosen, key=lambda c: c[0])[1]
    last = chr(64 + len(options)) if options else "J"
    if letter is None or letter > last:
        return None, f"letter {letter} is beyond {last}" if letter else "the last answer is not one letter"
    return letter, f"letter {letter}"


def _boxed_letter(inside, options):
    """The letter of a box like C, (C), \\text{C}, C. 5 N, or of one with the text of an option."""
    bare = TEXT.sub(r"\1", inside).replace("$", "").replace("\\", " ").strip(" .*")
    match = re.match(r"(?i:(?:option|choice|answer)\s*:?\s*)?[(\[]?\s*([A-Za-z])\s*(?:[)\].:]|$)", bare)
    if not match:
        return _option(inside, options)
    another = re.match(r"[,/&(]|(?:or|and)\b|[A-Za-z][).\]]?$", bare[match.end() :].strip())
    return None if another else match[1].upper()


def _option(text, options):
    def plain(s):
        return re.sub(r"[\s$*.]+", "", TEXT.sub(r"\1", str(s))).casefold()
    same = [i for i, option in enumerate(options or ()) if plain(option) == plain(text) != ""]
    return chr(65 + same[0]) if len(same) == 1 else None


def grade_science(text, truth, _):
    options = None
    if isinstance(truth, dict):
        truth, options = truth["letter"], truth.get("options")
    gold = _boxed_letter(str(truth), None)
    if gold is None:
        return Verdict(False, None, f"the truth is not a letter: {truth!r:.60}")
    letter, reason = letter_of(text, options)
    return Verdict(letter == gold, letter, reason)
