"""What every command needs before anything heavy is loaded: flags, errors, small files.

Standard library only (tyro when flags are parsed), so that a typing mistake is answered at once.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import sys
import time
import typing


class InputError(ValueError):
    """Something the user gave does not fit: the message names the flag or file, the numbers and the fix. The
    scripts print it without a traceback and exit with status 2."""


def did_you_mean(name, known):
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


# -- flags -------------------------------------------------------------------------------------------------

def parse(Config, argv=None, recipe=lambda model: {}):
    """The command line to a Config dataclass: --key=value, or a saved config.json first, then --key=value
    over it. recipe(model) gives the defaults that go with --model. The comment behind each field is its
    --help text."""
    import tyro
    argv = list(sys.argv[1:] if argv is None else argv)
    saved = {}
    if argv and not argv[0].startswith("-"):
        path = argv.pop(0)
        try:
            with open(path) as f:
                saved = dict(json.load(f))
        except (OSError, ValueError, TypeError) as e:
            raise InputError(f"{path}: not a readable config.json ({e}); flags are written "
                             f"--key=value") from None
    argv = [token for key, value in saved.items() for token in (f"--{key}", str(value))] + split_flags(argv)
    argv = ["--run" if token == "--out" else token for token in argv]    # --run is torchrun's own --run-path
    refuse_flags(Config, argv)
    models = [b for a, b in zip(argv, argv[1:], strict=False) if a == "--model"]
    default = Config()
    default = dataclasses.replace(default, **recipe(models[-1] if models else getattr(default, "model", "")))
    return tyro.cli(Config, args=argv, default=default, use_underscores=True,
                    config=(tyro.conf.FlagConversionOff,),
                    console_outputs=os.environ.get("RANK", "0") == "0")


def split_flags(argv):
    """--key=value as the two tokens that tyro's did-you-mean needs; other arguments as they are."""
    return [token for arg in argv for token in (arg.split("=", 1) if arg.startswith("--") else [arg])]


def refuse_flags(Config, argv):
    """InputError on the first flag or value that Config does not have: one line, where tyro draws a box. A
    field of type Literal takes one of its values."""
    types = {f"--{field.name}": field.type for field in dataclasses.fields(Config)}
    wanted = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    tokens = iter(argv)
    for flag in tokens:
        if flag in ("-h", "--help"):
            continue
        if flag not in types:
            raise InputError(f"{flag} is not a flag{did_you_mean(flag, types)} (--help lists them; they are "
                             f"written --key=value)")
        value = next(tokens, None)
        choices = choices_of(types[flag])
        kind = type(choices[0]) if choices else types[flag]
        try:
            if value is None or kind is bool and value not in ("True", "False"):
                raise ValueError
            parsed = kind(value)
        except ValueError:
            written = flag if value is None else f"{flag}={value}"
            raise InputError(f"{written}: give {wanted[kind]}") from None
        refuse_choice(flag, parsed, choices)


def choices_of(kind):
    """The values of a type Literal["a", "b"], () of any other type."""
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def refuse_choice(flag, value, choices):
    """InputError unless the value is one of the choices, if there are any."""
    if choices and value not in choices:
        raise InputError(f"{flag}={value!r} is not one of {', '.join(map(str, choices))}")


def check_bounds(cfg, least):
    """InputError unless every field of {name: least value} is a finite number, at least that, and every
    field of type Literal one of its values (parse() did so for flags; a notebook makes its own Config)."""
    for field in dataclasses.fields(cfg):
        refuse_choice(f"--{field.name}", getattr(cfg, field.name), choices_of(field.type))
    for name, bound in least.items():
        refuse_below(f"--{name}", getattr(cfg, name), bound)


def refuse_below(flag, value, least):
    """InputError unless the value is a finite number, at least that."""
    if not least <= value < math.inf:                     # refuses nan as well
        raise InputError(f"{flag}={value} must be a finite number, at least {least}")


def launch(main, Config, recipe=lambda model: {}):
    """The `if __name__ == "__main__"` of a stage: parse, run, and turn an InputError into one readable
    line."""
    try:
        main(parse(Config, recipe=recipe))
    except InputError as e:
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)                                 # rank 0 most likely says the same, and ends us all
        print(f"error: {e}", file=sys.stderr, flush=True)
        os._exit(2)                                       # others may wait in a collective: do not join them


def commands(*functions):
    """The `if __name__ == "__main__"` of a file of commands: `data.py plan --tokens=1B` calls
    plan(tokens="1B"); a single command needs no name. Errors end in one line and status 2, as in launch()."""
    import tyro
    settings = dict(use_underscores=True, config=(tyro.conf.FlagConversionOff,),
                    args=split_flags(sys.argv[1:]))
    try:
        if len(functions) == 1:
            tyro.cli(functions[0], **settings)
        else:
            named = {function.__name__: function for function in functions}
            tyro.extras.subcommand_cli_from_dict(named, **settings)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        print(f"error: {e.filename or e}: {e.strerror or 'failed'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


# -- small files -------------------------------------------------------------------------------------------

@contextlib.contextmanager
def appearing(path):
    """A file open for writing that takes its name when it is whole."""
    with open(path + ".tmp", "w") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def write_atomic(path, text):
    """A file that is there whole or not at all."""
    with appearing(path) as f:
        f.write(text)


@contextlib.contextmanager
def appending(path):
    """A .jsonl file open for appending bytes; a last line that a kill cut short is taken away first."""
    f = open(path, "ab+")
    try:
        end = f.tell()
        f.seek(0)
        whole = sum(len(line) for line in f if line.endswith(b"\n"))
        if whole < end:
            f.truncate(whole)
        yield f
    except BaseException:
        with contextlib.suppress(OSError):                # of a full disk, which was told already
            f.close()
        raise
    f.close()


def read_jsonl(path, flag=""):
    """(line number, byte offset, object) of each line; InputError names a line that is no JSON object.

    flag: the one that named the file, whose messages begin with it. Without one the file is a run's own: of
    it a last line that a kill cut short is left out, and an OSError is raised as it is."""
    try:
        with open(path, "rb") as f:
            at = 0
            for n, line in enumerate(f, 1):
                if not flag and not line.endswith(b"\n"):
                    return
                try:
                    value = json.loads(line)
                except ValueError:
                    value = None
                if not isinstance(value, dict):
                    if flag:
                        raise InputError(f"--{flag}: {path}, line {n} is no JSON object; write one a line")
                    raise InputError(f"{path}, line {n} is damaged: remove the line, the same command makes "
                                     f"again what it held")
                yield n, at, value
                at += len(line)
    except OSError as e:
        if not flag:
            raise
        raise InputError(f"--{flag}: {path} cannot be read ({e.strerror})") from None


def read_lines(path):
    """The objects of a run's own .jsonl file, as read_jsonl() has them."""
    return [value for _, _, value in read_jsonl(path)]


# -- values as text ----------------------------------------------------------------------------------------

def digest(*what):
    """16 hex digits that stand for values of plain types."""
    return hashlib.blake2b(repr(what).encode(), digest_size=8).hexdigest()


def human(n):
    """A count in three digits: 26.2B, 786M, 16.5k."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"
