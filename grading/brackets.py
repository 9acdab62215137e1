r"""What stands inside which brackets of a tidy answer."""

import functools
import re

_BRACKET = r"\\[{}]|\\(?:begin|end|[lr]angle|[lr]floor|[lr]ceil)(?![a-z])|[()\[\]{}]"
_OPEN = ("(", "[", "{", r"\{", r"\begin", r"\langle", r"\lfloor", r"\lceil")
_BESIDE = r"\\cup ?|\\cap ?|\\text\{or\}|\\setminus ?"
_ISO = re.compile(rf"(^|=|\\in ?|{_BESIDE})([\[\](])([^\[\]()]+[,;][^\[\]()]+)([\[\])])(?=$|{_BESIDE})")


@functools.lru_cache(64)
def _cutter(separators):
    return re.compile(rf"(?P<cut>{separators})|{_BRACKET}")


def cut(s, separators):
    """s cut at the separators (a pattern) that stand outside all brackets: parts and separators in turn."""
    parts, depth, start = [], 0, 0
    for match in _cutter(separators).finditer(s):
        if match["cut"] is None:
            depth += 1 if match[0] in _OPEN else -1
        elif depth == 0:
            parts += [s[start : match.start()], match[0]]
            start = match.end()
    return [*parts, s[start:]]


def inside(s, opening, closing):
    """What stands between an opening bracket and a closing one that ends s and belongs to it, or None."""
    if not (s.startswith(opening) and s.endswith(closing) and len(s) >= len(opening) + len(closing)):
        return None
    content, depth = s[len(opening) : len(s) - len(closing)], 0
    for match in re.finditer(_BRACKET, content):
        depth += 1 if match[0] in _OPEN else -1
        if depth < 0:
            return None
    return content if depth == 0 else None


def unparenthesised(s):
    """s without parentheses about the whole of it, unless they make a pair of it."""
    while content := inside(s, "(", ")"):
        if len(cut(content, "[,;]")) > 1:
            break
        s = content
    return s


def half_open(s):
    r"""]2,5[ as (2,5), [0,5[ as [0,5): open ends as the ISO writes them."""
    def turned(match):
        opening = "[" if match[2] == "[" else "("
        return f"{match[1]}{opening}{match[3]}{']' if match[4] == ']' else ')'}"
    return _ISO.sub(turned, s)
