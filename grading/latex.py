r"""From a response to its box, and from LaTeX to one spelling.

    boxes_of(text)      what stands in \boxed and \fbox
    tidy(latex)         one spelling for what is written in many

tidy() leaves no spaces, sizes, colours nor fonts: what a font holds is \text{..} where it is words, and bare
where it is mathematics. Unicode is LaTeX, braces stand where TeX implies them and nowhere else, and thousands
are joined.
"""

import functools
import re
import unicodedata

from grading.brackets import cut, half_open, unparenthesised
from grading.units import as_unit, is_unit

END = "(?![A-Za-z])"       # behind a command's name: it ends there
_BOX = r"\\{1,4}(?:boxed|fbox)\s*\{"
_TEX = re.compile(rf"{_BOX}|\\.|[{{}}]", re.S)


def boxes_of(text):
    r"""[(start, inside)] of the outermost \boxed and \fbox, in order; inside is None where one is not closed.
    A box written \\boxed{\\frac..}, as in JSON, is read as that JSON would be. Linear in the text."""
    spans, open_ = [], []
    for match in _TEX.finditer(text):
        if match[0] == "}":
            if open_ and (box := open_.pop()):
                spans.append((*box, match.start()))
        elif match[0][-1] == "{" and match[0] != r"\{":
            open_.append((match.start(), match.end()) if match[0] != "{" else None)
    boxes, end = [], 0
    for start, inside, stop in sorted(spans + [(*box, None) for box in open_ if box]):
        if start < end:                                   # it lies within the one before
            continue
        content = None if stop is None else text[inside:stop]
        doubled = text.startswith("\\\\", start) and text[start + 2] != "\\"
        if doubled and content and not re.search(r"(?<!\\)\\[A-Za-z]", content):
            content = content.replace("\\\\", "\\")
        boxes.append((start, content))
        end = stop or 0                                   # one never closed holds nothing
    return boxes


def unboxed(latex):
    r"""latex without the commands of boxes in it: \boxed{5} as {5}."""
    return re.sub(rf"{_BOX}", "{", latex)


def _rules(*pairs):
    """Substitutions, one after the other: [(compiled pattern, what stands in its place)]."""
    return [(re.compile(pattern, re.S), to) for pattern, to in pairs]


def _apply(rules, s):
    for pattern, to in rules:
        s = pattern.sub(to, s)
    return s


# -- characters, commands that show nothing, environments ---------------------------------------------------

_SYMBOLS = str.maketrans(
    dict(zip("−–—÷⁄∕′’″”£€¥¢₹₩₽\xa0\0", [*"---///''", "''", "''", *[""] * 7, " ", "?"], strict=True))
    | {symbol: rf"\{name} " for symbol, name in zip(
        "×·⋅∗π∞±∓≤≥⩽⩾≠∪∩∈∅∨∧∖⟨⟩≈∼≡→αβγδεθλμµσφψωΩΩ",
        """times cdot cdot cdot pi infty pm mp le ge le ge ne cup cap in emptyset lor land setminus
        langle rangle approx sim equiv to alpha beta gamma delta epsilon theta lambda mu mu sigma phi psi
        omega Omega Omega""".split(), strict=True)}
    | {"°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ", "ℝ": r"\mathbb{R}", "\u2009": r"\,",
       "\u202f": r"\,", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
       "¾": r"\frac{3}{4}", "…": r"\ldots "})
_RAISED = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)|([₀₁₂₃₄₅₆₇₈₉]+)|√ *([0-9]*)")

_VECTOR = r"\\(?:hat|vec|mathbf|boldsymbol|bm)"
_SHOWN_AS = _rules(
    (r"\\\$|\\(?:textcent|cents?|pounds|euro|rupee|yen)" + END, ""),
    (r"\\%", "%"),
    (r"^\s*\*\*(.+)\*\*\s*$", r"\1"),                    # Markdown's bold
    (r"\*\*", "^"),
    (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
    (r"\\(?:tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge)" + END, ""),
    (r"\\(?:bf|rm|it|tt|sf|cal|bfseries|itshape|boldmath)" + END, ""),
    (r"\\checkmark" + END + "|[✓✔✅]", ""),
    (r"\\(?:display|text|script)style" + END + r"|\\(?:no)?limits" + END, ""),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)" + END + r"\s*\.?", ""),
    (r"\\[dtc]frac" + END, r"\\frac"),
    (r"\\[dt]binom" + END, r"\\binom"),
    (r"(\\\\|\\cr(?![A-Za-z]))\s*\[\s*-?[0-9.]+\s*(?:pt|em|ex|mm|cm|in)\s*\]", r"\\\\"),     # \\[4pt]
    (r"\\(?:cr|newline|tabularnewline)" + END, r"\\\\"),
    (r"\\hline" + END, ""),
    (r"\\[pb]?small(?=matrix)", ""),
    (r"(begin|end)\s*\{([pb]?)smallmatrix\}", r"\1{\2matrix}"),
    (r"\\vec(?=\s*\{?\s*\\?[ijk]math)|\\[ij]math" + END,
     lambda m: m[0][1] if m[0].endswith("math") else r"\vec"),
    (rf"{_VECTOR}\s*\{{\s*(?:{_VECTOR}\s*)?\{{?([ijk])\}}?\s*\}}|{_VECTOR}\s+([ijk])(?![A-Za-z])",
     lambda m: m[1] or m[2]),
    (r"\\(?:mathbf|mathds|Bbb)\s*\{?([NQRZ])(?![A-Za-z])\}?", r"\\mathbb{\1}"),
    (r"\\(?:R|Reals|reals)" + END, r"\\mathbb{R}"),
    (r"\\mathbb\s*([A-Z])(?![A-Za-z])", r"\\mathbb{\1}"),
    (r"\\operatorname\*?\s*\{\s*(cis|arc(?:sin|cos|tan)|det|gcd|lcm|sgn|max|min)\s*\}", r"\\\1 "))

_LINES = re.compile(r"\\begin\s*\{(aligned|align\*?|alignedat|gathered|gather\*?|split|equation\*?"
                    r"|multline\*?)\}(?:\{[0-9]*\})?(.*?)\\end\s*\{\1\}", re.S)
_SYSTEM = re.compile(r"\\begin\s*\{cases\}([^&]*?)\\end\s*\{cases\}", re.S)
_ENTRY = re.compile(r"\s*\\begin\s*\{array\}\s*\{[^{}]*\}([^&]*)\\end\s*\{array\}\s*")


def _listed(match):
    """A system of equations as the list of them; a function given by cases as it is."""
    lines = [line.strip(" ,;.") for line in match[1].split("\\\\") if line.strip()]
    if not all(re.fullmatch(r"[^,]*[=<>][^,]*", line) and r"\text" not in line for line in lines):
        return match[0]
    return ", ".join(lines)


def _joined_lines(match):
    """The lines of an aligned block: one that goes on with a relation continues the one before."""
    lines = [line.strip() if r"\begin" in line else line.replace("&", "").strip()
             for line in cut(match[2], r"\\\\")[::2]]
    joined = ""
    for line in filter(None, lines):
        goes_on = not joined or re.match(r"[=<>,;]|\\(?:[lg]e|approx|text)", line)
        joined += line if goes_on else f", {line}"
    return joined


# -- fonts and braces ----------------------------------------------------------------------------------------

_WORDS = re.compile(r"\\(?:text(?:[a-z]{2,6})?|math(?:rm|bf|it|sf|tt|normal)|[mh]box|operatorname)\*?\s*\{")
_LETTERS = re.compile(r"\\(?:boldsymbol|bm|pmb|math(?:cal|scr|frak)|underline|uline|emph|ensuremath)\s*\{")
_TOKEN = re.compile(r"(\\[A-Za-z]+\*?\s*\{|\\.|[{}])", re.S)


def _groups(s):
    r"""Fonts and braces: \text{..} about words, nothing about mathematics in another font, and no braces but
    those of arguments and exponents."""
    out, open_ = [], []                                   # open_: (kind, where in out its inside begins)
    for piece in _TOKEN.split(s):
        if piece == "}" and open_:
            kind, start = open_.pop()
            inside = "".join(out[start:])
            out[start - 1 :] = [_group(kind, out[start - 1], inside)]
        elif piece == "{":
            before = "".join(out[-2:]).rstrip()
            argument = before.endswith(("^", "_", "}", "]")) or re.search(r"\\(?:mathbb|frac|sqrt)$", before)
            open_.append(("argument" if argument else "group", len(out) + 1))
            out.append(piece)
        elif piece.endswith("{") and piece != r"\{":
            kind = ("words" if _WORDS.fullmatch(piece) else "letters" if _LETTERS.fullmatch(piece)
                    else "argument")
            open_.append((kind, len(out) + 1))
            out.append(piece)
        elif piece:
            out.append(piece)
    return _over("".join(out))


def _group(kind, opening, inside):
    inside = _over(inside)
    if kind == "argument":
        return f"{opening}{inside}}}"
    if kind == "words":
        plain = re.sub(r"\\[,;:! ]|~|\\q?quad" + END, " ", inside)
        if unit := as_unit(plain):
            return rf"\text{{{unit}}}"
        mathematics = r"[\\{}0-9]" if opening.startswith((r"\text", r"\mbox")) else r"[\\{}0-9,;=<>+]"
        wordy = not re.search(mathematics, plain) and re.search("[A-Za-z,;:]", plain)
        return rf"\text{{{plain}}}" if wordy or not plain.strip() else inside
    return "{,}" if inside == "," else inside


def _over(s):
    r"""a \over b and n \choose k as commands with arguments."""
    for command, name in ((r"\over", "frac"), (r"\choose", "binom")):
        above, found, below = s.partition(command)
        if found and not below[:1].isalpha() and above.count("{") == above.count("}"):
            s = rf"\{name}{{{above.strip()}}}{{{below.strip()}}}"
    return s


_TAKES = re.compile(r"\\(frac|binom|sqrt|overline)" + END + r"|\^(?=\s*\()")
_DEGREE, _SPACES = re.compile(r"\s*\[[^\[\]]*\]"), re.compile(r"\s*")
_ARGUMENT = re.compile(r"\\(?!frac|sqrt|text|binom)[A-Za-z]+|[0-9A-Za-z?]")


def _arguments(s):
    r"""Braces about every argument of \frac, \binom and \sqrt, and about exponents in parentheses: \frac 5 8
    as \frac{5}{8}, 2^(1/3) as 2^{1/3}."""
    closes, stack = {}, []
    for match in re.finditer(r"\\.|[{}()]", s, re.S):
        if match[0] in ("{", "("):
            stack.append(match.start())
        elif match[0] == "}":
            while stack and s[stack[-1]] == "(":          # a parenthesis left open inside
                stack.pop()
            if stack:
                closes[stack.pop()] = match.start()
        elif match[0] == ")" and stack and s[stack[-1]] == "(":
            closes[stack.pop()] = match.start()
    edits = []                                            # (start, stop, what to put there)
    for command in _TAKES.finditer(s):
        at = command.end()
        if command[0] == "^":
            at = s.index("(", at)
            if at in closes:
                edits += [(at, at + 1, "{"), (closes[at], closes[at] + 1, "}")]
            continue
        if command[1] == "sqrt" and (degree := _DEGREE.match(s, at)):
            at = degree.end()
        for _ in range(2 if command[1] in ("frac", "binom") else 1):
            start, at = at, _SPACES.match(s, at).end()
            if at in closes and (s[at] == "{" or command[1] == "sqrt"):
                edits += [(start, at + 1, "{"), (closes[at], closes[at] + 1, "}")]
                at = closes[at] + 1
            elif token := _ARGUMENT.match(s, at):
                edits += [(start, token.end(), f"{{{token[0]}}}")]
                at = token.end()
            else:
                break
    pieces, done = [], 0
    for start, stop, put in sorted(edits):
        if start >= done:
            pieces += [s[done:start], put]
            done = stop
    return "".join([*pieces, s[done:]])


# -- one spelling --------------------------------------------------------------------------------------------

_DIGITS_OF = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
              "nine": "9", "ten": "10", "twelve": "12", "sixteen": "16"}
_SPELLING = _rules(
    (r"(\\\\)|\$|\\[()\[\]]|\\q?quad" + END + r"|\\[hv]space\s*\{[^{}]*\}", lambda m: m[1] or " "),
    (r"\\l(?:eq|e|eqslant)" + END + r"|<=", r"\\le "),
    (r"\\g(?:eq|e|eqslant)" + END + r"|>=", r"\\ge "),
    (r"\\neq" + END + r"|\\not\s*=|(?<![0-9)}])!=|/=", r"\\ne "),
    (r"\\lt" + END, "<"),
    (r"\\gt" + END, ">"),
    (r"\\lbrace" + END, r"\\{"),
    (r"\\rbrace" + END, r"\\}"),
    (r"\\lbrack" + END, "["),
    (r"\\rbrack" + END, "]"),
    (r"\\colon" + END + r"|\\text\{\s*:\s*\}", ":"),
    (r"\\[lr]?vert" + END + r"|\\mid" + END, "|"),
    (r"\\[lr]?Vert" + END + r"|\|\|", r"\\|"),
    (r"\\(?:lor|vee)" + END, r"\\text{or}"),
    (r"\\wedge" + END, r"\\land "),
    (r"\\neg" + END, r"\\lnot "),
    (r"\\l?dots[bcim]?" + END + r"|\\cdots" + END + r"|\.\.\.", r"\\ldots "),
    (r"\\varnothing" + END + r"|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\var(?=epsilon|phi|theta|rho|sigma)", r"\\"),
    (r"\\(?:backslash|smallsetminus)" + END, r"\\setminus "),
    (r"\\(?:approxeq|simeq|thickapprox)" + END, r"\\approx "),
    (r"\\sim" + END + r"(?=\s*-?[0-9.])", r"\\approx "),
    (r"\\rightarrow" + END, r"\\to "),
    (r"(?<=[0-9])\s*\\deg" + END, r"^\\circ "),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
    (r"\\degree" + END + r"|\^\s*\{?\s*\\circ\s*\}?(?:\s*(?:\\text\{)?[CF]\}?(?![A-Za-z]))?", r"^\\circ "),
    (r"\^\s*(?:\{\s*((?:\\prime\s*)+)\}|\\prime" + END + ")",
     lambda m: "'" * max(1, (m[1] or "").count("p"))),
    (r"\*", r"\\cdot "),
    (r"\\bar\s*\{", r"\\overline{"),
    # 0.1\dot{6}, 0.\dot{1}42\dot{7}
    (r"(\.[0-9]*)\\dot\s*\{?([0-9])\}?([0-9]*)\\dot\s*\{?([0-9])\}?", r"\1\\overline{\2\3\4}"),
    (r"(\.[0-9]*)\\(?:dot|bar)\s*\{?([0-9])\}?", r"\1\\overline{\2}"),
    (r"\\log[_]\{?e\}?(?![a-z])", r"\\ln "),
    (r"\(?\s*\\(?:pmod|bmod|mod|text\{\s*\(?\s*mod\s*\})" + END + r"\s*\{?\s*([0-9A-Za-z]+)\s*\}?\s*\)?",
     r"\\pmod{\1}"),
    (r"\(\s*mod\s+([0-9A-Za-z]+)\s*\)", r"\\pmod{\1}"),
    # (1011)_{\text{two}}
    (r"\(([0-9]+[0-9A-F]*)\)\s*(?=_)", r"\1"),
    (r"_\s*(?:\{\s*(?:\\text\{)?|\\text\{)\s*\(?\s*(?:base\s*)?([0-9]+|[a-z]{3,7})\s*\)?\s*\}{1,2}",
     lambda m: f"_{{{_DIGITS_OF.get(m[1], m[1])}}}" if m[1].isdigit() or m[1] in _DIGITS_OF else m[0]),
    # m/s
    (r"\\frac\s*\{\s*\\text\{([^{}]*)\}\s*\}\s*\{\s*\\text\{([^{}]*)\}[\^{}0-9]*\}", r"\\text{\1/\2}"),
    (r"\\text\{\s*([,;])\s*(and|or)?\s*\}", r"\1 \\text{\2}"),
    (r"\\text\{\s*\}", " "),
    (r"\\text\{\s*(?:Rs|USD?|INR|EUR|GBP|CAD)\.?\s*\}(?=\s*[0-9])", " "),
    (r"\\text\{\s*(?:the )?(?:set of )?(?:all )?integers\s*\}", r"\\mathbb{Z}"),
    (r"\\text\{\s*(?:the )?(?:set of )?all real (?:numbers|values)(?: [a-z])? (?:except|but|other than)"
     r"(?: for)?\s*\}\s*(?:[a-z]\s*=)?(.+)", r"\\mathbb{R}\\setminus\\{\1\\}"),
    (r"\\text\{\s*cis\s*\}", r"\\cis "),
    (r"\\text\{([^{}]*)\}", lambda m: m[0] if _prose(m[1]) else f" {m[1]} " if m[1][:1] == " " else m[1]),
    # a space beside what is no digit is no part of a number
    (r"(?<![0-9,])(?<!\\)(?:\\[,;:! ]|~)|(?<!\\)(?:\\[,;:! ]|~)(?![\s0-9,])", " "),
    # 10\,000
    (r"(?<![0-9.])[0-9]{1,3}(?:(?:\{,\}|\\[,;:! ]\s*|~|\s)[0-9]{3})+(?![0-9])",
     lambda m: re.sub("[^0-9]", "", m[0])),
    (r"(?<![0-9.,])[0-9]{1,3}(?:(?:\\[,;:!])*,(?:\\[,;:!]\s*)*[0-9]{3})+(?![0-9]|,[0-9])",
     lambda m: _thousands(m)),
    (r"\{,\}", ","),
    (r"(\\\\)|\\[,;:! ]|~", lambda m: m[1] or " "),
    (r"(?<=[0-9])E(?=[-+]?[0-9])", "e"),
    (r"(?<=:[0-9]{2})\s*(?:\\text\{\s*)?([aApP])\.?\s?[mM]\.?\s*\}?(?![A-Za-z])",        # 3:00 p.m.
     lambda m: rf"\text{{{m[1].lower()}m}}"),
    (r"\\text\{\s*(negative |minus |-)?\s*(?:positive |plus |\+)?[Ii]nfinity\s*\}",
     lambda m: r"-\infty " if m[1] else r"\infty "),
    (r"(?<=[0-9}])\s*(?:\\text\{\s*[kM]?\s*\})?\s*[kM]?\\Omega\s*$", r"\\text{ohm}"),
    (r"(?<=[0-9}])\s*\\mu\s*\\text\{\s*([A-Za-z])\s*\}", r"\\text{u\1}"),
    (r"(?<=[0-9}])\s*(?:\\text\{\s*)?(?:percent|per cent|pct\.?)(?:\s*\}|(?![A-Za-z]))", "%"),
    # 1 1/2
    (r"(?<![0-9.])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)", r"\1\\frac{\2}{\3}"),
    (r"([_^])\s*([0-9])\s+(?=[0-9])", r"\1{\2}"),
    # "1 2" is not 12
    (r"(?<=[0-9])\s+(?=[0-9])", "?"))

_BARE = re.compile(r"[a-z]{3}|(?:cm|mm|km|kg|ft|in|lb|hr)(?![a-z])|m/s")    # without \text, mg is m times g
_OUTSIDE_TEXT = _rules(
    (r"(?:(?<=\s)|(?<=[0-9)\]}]))(or|and|to)(?=[\s(\[\\]|$)", r"\\text{\1}"),
    # 5 cm, 5 km/h
    (r"(?<=[0-9)}])\s*([A-Za-z]+(?:(?:\s+|/|\^\{?[0-9]\}?)[A-Za-z]*)*)",
     lambda m: r"\text{" + "\0".join(m[1].split()) + "}" if _BARE.match(m[1]) and is_unit(m[1]) else m[0]),
    (r"(?<![\\A-Za-z])((?:arc)?(?:sin|cos|tan)|sqrt|log|ln|exp|cis|pi|infty|infinity)" + END,
     lambda m: "\\" + m[1].replace("infinity", "infty") + " "),
    (r"(\\[A-Za-z]+)\s+(?=[A-Za-z])", "\\1\0"),
    (r"\s+", ""),
    ("\0", " "))

_ANGLE = (r"(\([^()]*\)|[0-9.]*\\frac\{[^{}]*\}\{[^{}]*\}(?:\\pi)?"
          r"|[0-9.]*(?:\\pi|\\theta|[a-z]|\^\\circ)*(?:/[0-9]+)?)")
_BRACES = _rules(
    (r"\\sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\^(\{[^{}]*\}|[0-9A-Za-z])_(\{[^{}]*\}|[0-9A-Za-z])", r"_\2^\1"),      # a^2_1
    (r"([\^_])\{([0-9A-Za-z])\}(?![0-9])", r"\1\2"),
    (r"([\^_])(-?[0-9]{2,}|-[0-9])", r"\1{\2}"),
    (r"(?<![A-Za-z])(?:(?<=([0-9}])))?\\text\{([A-Za-z])\}(?=[-+=^_])",
     lambda m: m[0] if m[1] and is_unit(m[2]) else m[2]),
    (r"(?<![0-9.])(?=\.[0-9])", "0"),
    (r"\+(?=\\infty)", ""),
    (r"(?<=[0-9])\^?\{?(?:\\text\{)?(?:st|nd|rd|th)\}{0,2}(?![A-Za-z])", ""),        # 5th
    (r"^([^'^]*[0-9}])(?:'{1,2}|\")$", r"\1"),                                          # 10'' is 10 inches
    (r"\\cis ?" + _ANGLE, r"(\\cos(\1)+i\\sin(\1))"),
    (r"\\overline\{([^{}]*|[^{}]*\\sqrt\{[0-9]+\}[^{}]*)\}", lambda m: _conjugate(m)),
    (r"^[.,;:=]+|[.,;:]+$", ""))


def _prose(s):
    """Whether the inside of a \\text is text, and not a number, or letters in parentheses or a list."""
    return re.search("[A-Za-z]", s) and not re.search("[0-9]", s) and (
        re.search("[A-Za-z]{2}", s) or not re.search("[(,]", s))


def _thousands(match):
    """1,000 as 1000; in brackets only where no item could begin so: (1,000), but not (1,234)."""
    before = match.string[: match.start()]
    inside = len(re.findall(r"[(\[]|\\\{", before)) > len(re.findall(r"[)\]]|\\\}", before))
    digits = re.sub("[^0-9]", "", match[0])
    return digits if not inside or re.search(r",[^0-9]*0", match[0]) else match[0]


def _conjugate(match):
    r"""\overline{1+2i} as (1+2(-i)); other lines over something as they are."""
    names = set(re.findall(r"\\[a-z]+|[A-Za-z]", match[1])) - {r"\sqrt", r"\pi", r"\frac"}
    if names != {"i"}:
        return match[0]
    return "(" + re.sub(r"(?<![A-Za-z\\])i", "(-i)", match[1].replace(r"\pi", r"\pi ")) + ")"


_ANSWER = re.compile(r"^(\s*\\text\{|)\s*(?:so,?\s*)?(?:it\s*is\b|(?:(?:the|my|our|final|correct)\s+)*"
                     r"answer\s*(?:is\b:?|:))\s*", re.I)
_LABEL = re.compile(r"\s*(?:\\text\{(?P<words>[^{}]*)\}|(?P<bare>(?:[A-Za-z]+[ ,']+)*[A-Za-z]+))\s*"
                    r"(?P<colon>[:=]?)\s*(?P<rest>[-+]?(?:[0-9.]|\\|[(\[{|]|[A-Za-z](?![A-Za-z])).*)", re.S)
_LEADS = frozenset("""
    is are equals be has have needs takes costs pays gets earns answer solution therefore thus hence so
    exactly precisely just""".split())
_HEDGES = frozenset("""
    not no never neither nor about around approximately roughly nearly almost less more most least than over
    under between or either maybe perhaps guess if unless except cannot isn aren wrong incorrect half twice
    minus plus negative mod base to""".split())


def hedged(s):
    r"""Whether \text{..} in s holds a word that takes back or changes what is said: not, about, half."""
    return any(_HEDGES.intersection(re.findall("[a-z]+", text.lower()))
               for text in re.findall(r"\\text\{([^{}]*)\}", s))


def _unlabelled(s):
    r"""s without words that only say what follows: \text{The answer is }7, \text{Area: }12."""
    s = _ANSWER.sub(r"\1", s)
    match = _LABEL.match(s)
    if not match:
        return s
    said = (match["words"] if match["words"] is not None else match["bare"]).strip()
    colon = match["colon"] == ":" or said.endswith((":", "="))
    words = re.findall("[A-Za-z]+", said.lower())
    if not any(len(word) > 2 for word in words) or hedged(rf"\text{{{said}}}"):
        return s
    return match["rest"] if colon or words[-1] in _LEADS else s


_NUMERAL = re.compile(r"\s*(-?[0-9]+(?:\.[0-9]+)?)[.,]?\s*")


@functools.lru_cache(8192)
def tidy(latex):
    """One spelling of an answer, in which what TeX shows alike is alike."""
    if numeral := _NUMERAL.fullmatch(latex):              # as most answers are: nothing to do
        return numeral[1]

    def raised(match):                                    # x², x₁, √12: all of the digits
        up, down, under = (part and unicodedata.normalize("NFKC", part) for part in match.groups())
        return (f"^{{{up}}}" if up else f"_{{{down}}}" if down else rf"\sqrt{{{under}}}" if under else
                r"\sqrt ")

    s = unicodedata.normalize("NFKC", _RAISED.sub(raised, latex).translate(_SYMBOLS))
    if r"\begin" not in s:
        s = re.sub(r"\\\\(?=[A-Za-z]{2})", r"\\", s)      # a command with its backslash doubled
    s = _apply(_SHOWN_AS, s)
    s = _SYSTEM.sub(_listed, _LINES.sub(_joined_lines, s))
    if (entry := _ENTRY.fullmatch(s)) and "\\\\" not in entry[1]:
        s = entry[1]
    s = _groups(_arguments(s))
    s = _unlabelled(_apply(_SPELLING, s))
    parts = re.split(r"\\text\{([^{}]*)\}", s)
    for i, part in enumerate(parts):
        parts[i] = _apply(_OUTSIDE_TEXT, part) if i % 2 == 0 else rf"\text{{{_plain_words(part)}}}"
    return half_open(unparenthesised(_apply(_BRACES, "".join(parts))))


def _plain_words(text):
    text = re.sub(r"\b([ap])\.?\s?m\b\.?", lambda m: m[1].lower() + "m", text, flags=re.I)      # 3 P.M.
    return " ".join(text.split())
