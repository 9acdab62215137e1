"""The code that decides a text or a verdict, for cache keys: what functions do, without comments, docstrings
and the words of errors. While that stays as it is, what was made by them need not be made again.
"""

import ast
import functools
import inspect
import re
import textwrap

PLAIN = (str, bytes, int, float, tuple, re.Pattern)       # kinds of constants that can stand for themselves


class _OnlyRules(ast.NodeTransformer):
    """Takes away what decides nothing: docstrings, what an error says, and the reason beside a verdict."""

    def visit_Expr(self, node):
        is_docstring = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_docstring else self.generic_visit(node)

    def visit_Raise(self, node):
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return node

    def visit_Call(self, node):
        if isinstance(node.func, ast.Name) and node.func.id == "Verdict":
            node.args = node.args[:2]
        return self.generic_visit(node)


def code_of(*functions):
    """The code of functions and of all functions and constants of corpus/ that they reach by name, as text.
    Of a partial: its function and arguments. Of a module: all its code. Tables of functions (a dict) and
    classes are not followed: name what they hold."""
    waiting, code = list(functions), set()
    while waiting:
        function = waiting.pop()
        if isinstance(function, functools.partial):
            code.add(f"{function.func.__name__} with {function.args} {function.keywords}")
            waiting.append(function.func)
            continue
        tree = _OnlyRules().visit(ast.parse(textwrap.dedent(inspect.getsource(function))))
        text = ast.unparse(tree)
        if text in code:
            continue
        code.add(text)
        if inspect.ismodule(function):
            continue
        known = inspect.unwrap(function).__globals__
        for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
            value = known.get(name)
            if inspect.isfunction(value) and value.__module__.startswith("corpus."):
                waiting.append(value)
            elif isinstance(value, PLAIN):
                code.add(f"{name} = {value!r}")
    return "\n".join(sorted(code))
