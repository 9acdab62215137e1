"""Every command and file name in the README exists and parses with the real Config."""

import os
import re
import shlex

import midtrain
from runtime import parse

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "README.md")) as f:
    README = f.read()
BLOCKS = re.findall(r"```\n(.*?)```", README, re.S)


def commands(start):
    lines = [line for block in BLOCKS for line in block.splitlines() if line.startswith(start)]
    return [line.split(" #")[0].strip() for line in lines]


def test_midtrain_commands_parse():
    found = commands(("python midtrain.py", "torchrun"))
    assert len(found) >= 7
    for command in found:
        words = shlex.split(command)
        flags = words[words.index("midtrain.py") + 1:]
        if flags != ["--help"]:
            cfg = parse(midtrain.Config, flags, midtrain.recipe)
            midtrain.check(cfg, 8 if words[0] == "torchrun" else 1)


def test_data_commands_run():
    import subprocess
    import sys
    found = commands("python data.py")
    assert found
    for command in found:
        subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, capture_output=True, cwd=ROOT)


def test_recipes_name_every_model_and_its_parameters():
    from model import PRESETS, parameter_counts, preset
    for name, (hub, _) in PRESETS.items():
        if hub:
            assert f"| `{name}` | {sum(parameter_counts(preset(name)).values()):,} |" in README


def test_make_targets_and_files_exist():
    with open(os.path.join(ROOT, "Makefile")) as f:
        targets = set(re.findall(r"^(\w+):", f.read(), re.M))
    assert {c.split()[1] for c in commands("make")} | set(re.findall(r"`make (\w+)`", README)) <= targets
    paths = re.findall(r"^(\S+(?:\.py|/)) ", "\n".join(BLOCKS), re.M)
    paths += re.findall(r"\]\((\w[^):]*)\)", README)
    assert len(paths) >= 10
    for path in paths:
        assert os.path.exists(os.path.join(ROOT, path)), path


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"\b(?:DEMO|TEST|BENCH)_[A-Z]+\b|\bTODO\b", README)
