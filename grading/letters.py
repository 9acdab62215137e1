r"""Multiple choice: which letter a response chooses.

Policy, as somebody who reads the response would have it:
  - A box outranks what is stated ("Answer: C", "the answer must be C", "I choose C", "C is correct",
    <answer>C</answer>, {"answer": "C"}), and that outranks what is marked only: a letter in bold, a letter or
    an "Option C" that is all of a line, a last line like "(C) 12 N", "Therefore C". Within a rank the last
    one wins. Where nothing of the kind is there, a last line that is an option's text chooses that option.
  - A box that holds neither a letter nor an option's text, \boxed{x = 3}, says nothing. An unclosed last box,
    two letters in one place ("A or C"), and a letter beyond the options are no answer.
  - What is denied is not chosen: "not A", "A is wrong", "if the answer is A". "not A but C" is C.
  - A small letter counts where nothing follows it, in parentheses, or in a box; a capital A or I in front of
    a word is an article or a pronoun. C = 5, C_2, C-14 and 25 °C hold no letter.
  - A marked letter behind the name of something ("Vitamin **C**", "Confidence: **A**") is no choice, nor are
    the headings of a list that goes through the options.
  - What follows a letter ("C) 12 N") is not compared with the option. The text of an option is compared
    without fonts and spaces; capitals count where it holds a digit (5 mV is not 5 MV).
"""

import functools
import re
import unicodedata

from grading import Verdict
from grading.latex import boxes_of

LONGEST = 400              # characters of a line that may be the text of an option
LONGEST_BOX = 4000         # characters of one that may hold a letter
READ = 100_000             # characters at a text's end in which a letter without a box is looked for

# -- one spelling --------------------------------------------------------------------------------------------

_COLOR = re.compile(r"\\(?:text)?color\s?\{[^{}]*\}")
_FONT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|sc|sl|up|md|normal)?|math(?:bf|it|rm|sf|tt|normal)|boldsymbol"
                   r"|bm|bold|pmb|emph|underline|mbox|hbox|operatorname)\s?\{([^{}]*)\}")
_SWITCH = re.compile(r"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge|displaystyle|textstyle|bf|rm|it"
                     r"|sf|tt|bfseries|itshape|sffamily|ttfamily|rmfamily|left|right|[bB]igg?[lr]?|checkmark"
                     r"|(?:text|math)(?:bf|it|rm|sf|tt)(?=\s[A-Za-z]))(?![A-Za-z])")
_SPELLING = [
    (re.compile(r"(?<!\\)\\\\(?=[A-Za-z(),;!])"), r"\\"),      # as JSON escapes it
    (_COLOR, ""),
    (_SWITCH, ""),
    *[(_FONT, r"\1")] * 4,                                # fonts in fonts
    (re.compile(r"\\q?quad(?![A-Za-z])"), "\t"),
    (re.compile(r"\\[,;:! ]|~"), " "),
    (re.compile(r"\\(?:to|[rR]ightarrow|implies)(?![A-Za-z])"), "→"),
    (re.compile(r"\\?\$|\\[()\[\]]|[✓✔✅]"), ""),
    (re.compile(r"[\"'“‘`]([A-Za-z])[\"'”’`]"), r"\1"),
    (re.compile(r"(?<![A-Za-z_^}])\{([A-Za-z])\}"), r" \1 "),
    (re.compile(r"(?i)\bcan['’]t\b|\bcannot\b"), "can not"),
    (re.compile(r"(?i)\b(is|was|do|does|did|would|should|could)n['’]t\b"), r"\1 not")]


def _plain(text):
    """A text without the fonts, sizes and dollars of TeX."""
    for pattern, to in _SPELLING:
        text = pattern.sub(to, text)
    return text


_SIGNS = [(re.compile(pattern), to) for pattern, to in (
    (r"\\(?:times|cdot)(?![A-Za-z])|·", "×"), (r"\\[dt]frac", r"\\frac"), (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
    (r"\\mu(?![A-Za-z])", "μ"), (r"\\Omega(?![A-Za-z])", "Ω"), (r"\\pi(?![A-Za-z])", "π"), (r"\\%", "%"),
    (r"[−–]", "-"), (r"\{(\w)\}", r"\1"), (r"[\s*`]+", ""), (r"^\{(.*)\}$|^[(\"]([^()\"]*)[)\"]$", r"\1\2"),
    (r"^[.:]+|[.]+$", ""))]


@functools.lru_cache(1024)
def _same(text):
    """What two spellings of an option's text have in common."""
    text = _plain(unicodedata.normalize("NFKC", text))
    for pattern, to in _SIGNS:
        text = pattern.sub(to, text)
    return text if re.search("[0-9]", text) else text.casefold()


def _option(text, options):
    """The letter of the one option that has this text, or None."""
    if not options or len(text) > LONGEST or not _same(text):
        return None
    places = [i for i, option in enumerate(options) if _same(str(option)) == _same(text)]
    return chr(65 + places[0]) if len(places) == 1 else None


def _last(options):
    """The letter of the last option; J where they are not known."""
    return chr(64 + len(options)) if options else "J"


# -- a letter, and what stands around it ---------------------------------------------------------------------

_OPENING = r"[\s*_`\"'“({\[<>]{0,9}"
_NAME = r"(?![A-Za-z0-9'’^°]|_[A-Za-z0-9{]|[-–]\w|\s?=)"       # behind a letter that is not part of a name
_LETTER = re.compile(_OPENING + rf"([A-Za-z]){_NAME}")
_CLOSING = r"[\s*_.)\]}\"'”`]{0,9}"
_IS_NOT = (r"(?:is|was|seems|looks|would\sbe|must\sbe)\s(?:\w+ly\s)?(?:not|wrong|incorrect|false|too|out|no"
           r"|impossible|excluded|eliminated|ruled\sout)|can\snot|does\snot|fails")
_DENIED = re.compile(rf"{_CLOSING}(?i:{_IS_NOT})\b")
_REJECTED = re.compile(                                   # **A)** too small
    rf"{_CLOSING}[:–—-]{{0,2}}[\s*_]{{0,4}}(?:(?:wrong|incorrect|too|not\s(?:correct|right|possible))\b|[✗✘❌])")
_ANOTHER = re.compile(                                    # behind A: or (C); and C, but not: and C is wrong
    _CLOSING + r"(?:(?i:,?\s?(?:and/)?or|\s?vs)\b|((?i:,?\s?and)\b|[,/&+;|]))[\s*_$(\[\"'`.]{0,9}"
    r"(?i:maybe\s|perhaps\s|possibly\s|even\s)?(?i:option\s|choice\s)?"
    rf"(?:([A-J]){_NAME}(?<![AI](?=\s(?!are\b|is\b|both\b)[a-z]))|([a-j])[)\]}}.]?\s*$)")
_TWO = re.compile(r"[)\]*_.,:]{0,4}[ \t]{0,3}[(\[]?[A-Ja-j][)\].]{0,2}[ \t]*(?:\n|$)"                # A: C
                  r"|[)\]*_]{0,4}[ \t]{0,3}[(\[][A-J][)\]](?!\s[a-z])")                             # (A) (C)
_BEFORE = re.compile(r"\b[A-J][)*_]{0,4}\s?(?:or|and|nor|/|&)\s?[*_(\[]{0,4}(?:option\s)?$")
_GOES_ON = frozenset("""
    because since as is was which with for due and but by based where given in from when at rather not or so
    while if according""".split())                        # behind the letter A, where "A sum" has none


def _behind(text, at, options):
    """The letter of the option whose text is the rest of a line."""
    line = text[at : at + LONGEST].partition("\n")[0].partition("</")[0]
    return _option(line.lstrip(" )].:=→*_–—-"), options) if options else None


def _choice(text, match, options):
    """The capital that a match chooses by its last group; "" where there are two letters; None where it is
    denied or no letter."""
    place = match.lastindex
    start, end, letter = match.start(place), match.end(place), match[place]
    after = text[end : end + 80]
    if _behind(text, end, options) == letter.upper():
        return letter.upper()
    if _DENIED.match(after):
        return None
    closed = re.match(r"[)\]]", after)
    if letter.islower() and not closed and not re.match(_CLOSING + r"(?:\n|$|<)", after):
        return None
    word = re.match(r"\s([a-z]+)", after)
    if letter in "AI" and word and word[1] not in _GOES_ON:
        return None
    another = _ANOTHER.match(after)
    wrong = another and another[1] and _DENIED.match(after[another.end():])
    if another and not wrong or _TWO.match(after) or _BEFORE.search(text[max(0, start - 20) : start]):
        return ""
    return letter.upper()


# -- rank one: boxes -----------------------------------------------------------------------------------------

_BOXED = re.compile(
    r"[\s*_`\"{]*(?:(?i:the\s|final\s|correct\s){0,3}(?i:option|choice|answer)\s?(?:is\b|[:=])?\s?)?"
    r"[(\[]?\s?([A-Za-z])(?![A-Za-z0-9])")
_AFTER_BOXED = re.compile(                                # nothing; ) . : - and a text; 3.2; (3.2 eV)
    r"[\s})\]*_`\".]*$|\s*[)\]:]|\s*\.\s|\s*\.(?=[^\s0-9])|\s{1,3}[-–—→]\s{1,3}(?!\s|[A-Za-z]\b|[^=]*=)|\s*—|\s?\t|\s+[0-9]"
    r"|\s+\((?![A-Za-z]\))[^()]*\)\s*$|\s*,\s|\s(?:because|since|only)\b")
_LABELS = re.compile(r"(?:[,/&;]|\b(?:or|and)\b)\s?[(\[]?[A-J][)\]:]")


def _boxed(inside, options):
    """The letter in a box like C, (C), \\text{C}, C. 5 N, or in one with the text of an option; "" where
    there are two; None where there is none."""
    if len(inside) > LONGEST_BOX:
        return None
    text = _plain(inside).strip(" \n*")
    match = _BOXED.match(text)
    if not match:
        return _option(inside, options) or _stated(text, options)
    letter, after = match[1].upper(), text[match.end():]
    if _behind(after, 0, options) == letter:
        return letter
    if not _AFTER_BOXED.match(after):
        another = _ANOTHER.match(after) or _TWO.match(after)
        return "" if another else _option(inside, options) or _stated(text, options)
    if _DENIED.match(after):
        return None
    return "" if _ANOTHER.match(after) or _TWO.match(after) or _LABELS.search(after) else letter


def _of_boxes(text, options):
    """(what the boxes of a text choose, as _boxed() has it, the text with its boxes emptied)."""
    boxes, emptied, at = boxes_of(text), [], 0
    chosen, end = None, 0                                 # of the last box that chooses
    for start, inside in boxes:
        if inside is None:                                # never closed, so it is the last
            return "", text
        opening = text.index("{", start) + 1
        emptied.append(text[at:opening])
        at = opening + len(inside)
        letter = _boxed(inside, options)
        symbol = letter and letter > _last(options) and inside.strip().islower()       # \boxed{v}
        if letter is None or symbol:
            continue
        joined = end and re.fullmatch(r"[}\s$.]*(?:or|and|,|/|&)[\s$]*", text[end:start])
        chosen = "" if joined and letter != chosen else letter
        end = at
    return chosen, "".join(emptied) + text[at:]


# -- rank two: what is stated --------------------------------------------------------------------------------

_SO = (r"(?:[\s,]{1,2}(?i:(?!hardly|unlikely|scarcely|barely|rarely)[a-z]{2,12}ly|therefore|thus|hence|then"
       r"|so|indeed|of\scourse|most|just|still|now)\b,?){0,3}")
_MODAL = r"(?:must|should|would|will|can\sonly|(?:has|have|ought|seems|appears|turns\sout)\sto)"
_BE = rf"{_SO}[\s,*_]{{1,4}}(?i:is|was|becomes|{_MODAL}{_SO}\sbe)\b{_SO}"
_NOUN = (r"(?:(?i:(?<![/a-z])(?:final_?)?answer|\bans|\b(?:option|choice|letter|pick|selection)"
         r"|\b(?:correct|right|best)\s(?:one|statement|response|alternative)|\bcorrect(?=\s?:))\b"
         r"(?:[\s_](?i:option|choice|letter)\b)?)")
_SIGN = r"[\s*_\"'`)\]]{0,9}[:=>→⇒⟹➜➔–—-]{1,3}"
_OF = r"(?:[\s,]{1,2}(?i:here|to|for|of|in|from|among|given|with|that|which)\b[^.:;\n]{0,60}?)?"
_WORDS = (r"(?:[\s*_]{0,4}(?i:the|correct|option|choice|letter|answer|given\sby|I\s(?:think|believe)|it\sis"
          r"|it['’]s)\b){0,4}")
_NOT_BUT = (r"(?:\s?(?i:not\s(?:option\s)?)[(\[]?[A-Z][)\]]?[\s,;.]{1,2}"
            r"(?i:but|rather|instead|it\sis|it['’]s)\b(?:\s(?i:rather|instead|is|option|choice))?)?")
_STATEMENT = re.compile(                                  # up to where the letter stands
    rf"{_NOUN}(?:{_SIGN}|{_OF}{_BE}[\s*_]{{0,4}}:?|(?<=[Aa]ns)\.){_WORDS}{_NOT_BUT}{_WORDS}")
_ANSWER_LINE = re.compile(rf"^[\s#>*_-]{{0,9}}(?i:(?:final|correct|my)\s)?(?i:answer){_OPENING}([A-Z])"
                          rf"{_NAME}(?!{_CLOSING}\s?[a-z])", re.M)
_I_CHOOSE = re.compile(
    r"\b(?:I|[Ww]e)(?:['’](?:d|ll|m|re|ve)|\s(?:would|will|shall|must|should|can|am|are|have|to|therefore"
    r"|thus|hence|then|so|rather|now|[a-z]{2,12}ly)){0,4}\s(?:choos(?:e|ing)|chose|(?:pick|select)(?:ed|ing)?"
    r"|go\swith|going\swith|went\swith|opt\sfor|say|answer(?:\swith)?)[:\s]"
    rf"(?:the\s)?(?i:option\s|choice\s|answer\s|letter\s)?{_OPENING}([A-Z]){_NAME}"
    rf"(?={_CLOSING}(?:$|[,;!]|because|since|over|and\snot))", re.M)
_IS_CORRECT = re.compile(
    rf"(?<![-–'’\w])(?<![0-9]\s)[(\[*_]{{0,4}}([A-J])[)\]*_]{{0,4}}{_BE}"
    r"(?:\s(?:the|our|my|only|single|one|final)){0,3}[\s*_]{1,4}"
    r"(?i:(?:correct|right)(?:\s(?:one|answer|option|choice|letter|response))?"
    r"|best\s(?:one|answer|option|choice)|answer|choice)\b"
    r"(?![\s-]{1,2}(?!because|since|as\b|for\b|here|by\b|and\b|but\b|while|given|due|among)[A-Za-z])")
_NAMES = "|".join("""
    vitamin hepatitis type group point part step figure table section plan grade confidence score note rating
    compound molecule sample block object particle solution element curve region charge mass atom isotope gene
    allele reaction process level class phase symbol unit""".split())
_DOUBT = re.compile(
    r"(?i)\b(?:(?:if|whether|unless|supposing|suppose|assuming|assume|doubt|why|neither|nor)\s(?:that\s)?"
    r"|not\s(?:think|believe|say|mean|agree|true|clear|certain|sure|know|conclude)\s(?:that\s)?"
    rf"|(?:{_NAMES})s?\s)(?:(?:the|my|option|choice|answer|correct|final|right|best)\s)*[(*_\[]*$")


def _doubted(text, start):
    return _DOUBT.search(text[max(0, start - 60) : start])


def _stated(text, options):
    """What the last statement in a text chooses, as _choice() has it."""
    found = []                                            # (where, the function that reads it, its start)
    for match in _STATEMENT.finditer(text):
        found.append((match.end(), functools.partial(_tail, text, match.end(), options), match.start()))
    for pattern in (_ANSWER_LINE, _I_CHOOSE, _IS_CORRECT):
        for match in pattern.finditer(text):
            found.append((match.start(1), functools.partial(_choice, text, match, options), match.start()))
    for _, read, start in sorted(found, key=lambda place: place[0], reverse=True):
        if not _doubted(text, start) and (letter := read()) is not None:
            return letter
    return None


def _tail(text, at, options):
    """What stands behind "Answer:" chooses: a letter, or the text of an option."""
    line = text[at : at + LONGEST + 20].lstrip().partition("\n")[0].partition("</")[0]
    if line.startswith('"'):                              # of {"answer": "12 N"}
        line = line.split('"')[1]
    match = _LETTER.match(text, at)
    named = _option(line, options) if not match or re.match(r"\s\w", text[match.end():]) else None
    return named or (_choice(text, match, options) if match else None)


# -- rank three: what is marked ------------------------------------------------------------------------------

_START = r"^[ \t>#*_`•\"(\[{-]{0,9}"
_LONE = re.compile(_START + r"(?:(?i:option|choice)[ \t:]{1,3})?[(\[]?([A-Z])[)\]}*_`\". \t!]{0,9}$", re.M)
_BOLD = re.compile(r"(?:\*\*|__)[ ({\[]{0,3}(?:(?i:answer|option|choice)[ :]{1,3})?[(\[]?([A-Z])"
                   r"(?=[)\]} ]{0,3}(?:\*|__|[.:)]|[ ][-–—][ ]))")
_IT_IS = r"(?i:it|this|that)(?:['’]s|\sis|\smust\sbe)\s"
_THEREFORE = re.compile(
    rf"(?:\b(?i:so|thus|hence|therefore|then)[\s,:]{{1,2}}(?:{_IT_IS})?|^{_IT_IS})"
    r"(?i:option\s|choice\s)?[(\[*_]{0,4}([A-Z])[)\]*_]{0,4}[ .!]{0,3}$", re.M)
_MATCHES = re.compile(r"\b(?<!not\s)(?i:(?:corresponds?\sto|match(?:es)?|agrees\swith)\s"
                      r"(?:option|choice|answer))\s[(\[*_]{0,4}([A-Z])[)\]*_]{0,4}[ .!]{0,3}$", re.M)
_HEADING = re.compile(_START + r"(?:(?i:option|choice)[ \t])?[(\[]?([A-Z])(?:[)\]*_]{0,4}[.:)\]*_]|[ ][-–—]"
                      r"|,(?=[ ](?:because|since)))"
                      r"[*_]{0,3}[ \t]{1,9}(?=[^ \t\n])(?![(\[]?[A-Za-z]\b[ \t.)]*[=+*/\n(\[])", re.M)
_THING = re.compile(rf"(?i)\b(?:{_NAMES})s?[\s:=]{{0,3}}[*_(]{{0,3}}$")


def _marked(text, options):
    """What the last letter in bold, or in a line of its own, chooses, as _choice() has it."""
    headings = list(_HEADING.finditer(text))
    listed = {match.start(1) for match in headings} if len({match[1] for match in headings}) > 1 else set()
    lone = list(_LONE.finditer(text))
    if len({match[1] for match in lone}) > 2:             # the options, one by one
        lone = []
    ending = [match for match in headings[-1:] if "\n" not in text[match.end():].strip()]
    found = [*lone, *_BOLD.finditer(text), *_THEREFORE.finditer(text), *_MATCHES.finditer(text), *ending]
    beyond = None
    for match in sorted(found, key=lambda match: match.start(1), reverse=True):
        start = match.start(1)
        if start in listed or _THING.search(text[max(0, start - 30) : start]):
            continue
        behind = _behind(text, match.end(1), options)
        if match in ending and behind not in (None, match[1]):
            return ""
        rejected = _REJECTED.match(text[match.end(1) : match.end(1) + 40]) and not behind
        letter = None if rejected else _choice(text, match, options)
        if letter and letter > _last(options):            # Vitamin K
            beyond = beyond or letter
        elif letter is not None:
            return letter
    return beyond


# -- the letter ----------------------------------------------------------------------------------------------

def letter_of(text, options=None):
    """(the letter that a text chooses, or None; a reason). options: their texts where known."""
    text = re.sub(r"[^\S\n]+", " ", unicodedata.normalize("NFKC", text))
    text = re.sub(r"(?<!\\)\\\\(?=fbox|boxed)", r"\\", text)
    letter, text = _of_boxes(text, options)
    if letter is None:
        text = _plain(text[-READ:])
        letter = _stated(text, options)
    if letter is None:
        letter = _marked(text, options)
    if letter is None:
        line = text.strip().rpartition("\n")[2]
        small = re.fullmatch(                             # nothing but "c"
            r"[\s*_`(]{0,9}(?i:(?:option|choice|answer)\s)?([a-z])[\s*_`).]{0,9}", text)
        letter = small[1].upper() if small else _option(line, options)
    last = _last(options)
    if not letter:
        return None, "no letter" if letter is None else "the last answer is not one letter"
    return (None, f"letter {letter} is beyond {last}") if letter > last else (letter, f"letter {letter}")


def grade_science(text, truth, _):
    options = None
    if isinstance(truth, dict):
        truth, options = truth["letter"], truth.get("options")
    gold = _boxed(str(truth), None)
    if not gold:
        return Verdict(False, None, f"the truth is not a letter: {truth!r:.60}")
    letter, reason = letter_of(text, options)
    return Verdict(letter == gold, letter, reason)
