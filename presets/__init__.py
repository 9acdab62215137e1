"""The models known by name: NAME.json beside this file is the hub's own config.json of a model.

To add a model, drop its config.json here under the name that --model shall take; nothing else lists them.
The key "_name_or_path", transformers' own, says where the hub keeps the weights, as in
"meta-llama/Llama-3.1-8B". A file without that key is a toy: its weights are random, its tokenizer is the toy
one.

A checkpoint's own config.json is read whenever there is one. These files serve --dry_run, random:NAME and
the parameter counts.
"""

import json
import os

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_ALIASES = {"toy": "toy-llama", "toy-h": "toy-granite-4-h"}


def names() -> list[str]:
    """Every name that --model knows: the files', and behind them the aliases."""
    files = [name.removesuffix(".json") for name in os.listdir(_FOLDER) if name.endswith(".json")]
    return [*sorted(files), *_ALIASES]


def read(name: str) -> dict:
    """The config.json of a preset, fresh at each call. FileNotFoundError if `names` does not have it."""
    config = _file(name)
    config.pop("_name_or_path", None)
    return config


def hub_id(name: str) -> str | None:
    """Where the hub keeps the weights; None of a toy, and of a name that is no preset."""
    if name not in names():
        return None
    return _file(name).get("_name_or_path")


def is_toy(name: str) -> bool:
    """Whether the name is a toy's: its weights are random, its recipe is made for two cores."""
    return name in names() and hub_id(name) is None


def _file(name):
    path = os.path.join(_FOLDER, _ALIASES.get(name, name) + ".json")
    with open(path) as f:
        return json.load(f, object_hook=_infinity)


def _infinity(value):
    """JSON has no infinity: Nemotron-H's is written {"__float__": "Infinity"}, as transformers 5 does it."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
