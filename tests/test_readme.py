"""Every command and file name in the README exists and parses with the real Config."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import miniatures
import pytest
from processes import Process

import evaluate
import generate
import midtrain
import rl
import sources
from runtime import parse

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "README.md")) as f:
    README = f.read()
BLOCKS = re.findall(r"```\n(.*?)```", README, re.S)


def commands(start):
    blocks = [block.replace("\\\n", "") for block in BLOCKS]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(start)]
    return [line.split(" #")[0].strip() for line in lines]


def test_training_commands_parse():
    found = commands(("python midtrain.py", "python rl.py", "python evaluate.py", "torchrun"))
    assert len(found) >= 17
    for command in found:
        words = shlex.split(command)
        stage = next(stage for stage in (midtrain, rl, evaluate) if f"{stage.__name__}.py" in words)
        flags = words[words.index(f"{stage.__name__}.py") + 1:]
        if flags[0] not in ("--help", "--compare"):
            cfg = parse(stage.Config, flags, stage.recipe)
            stage.check(cfg, 8 if words[0] == "torchrun" else 1)


@pytest.mark.slow
def test_data_commands_run(tmp_path):
    """In their order: your own texts to a mixture that trains; the paper's, from miniatures of them."""
    hub, asked = miniatures.hub(tmp_path / "hub"), {"check", "get", "get_prompts"}
    for file in os.listdir(ROOT):
        if file.endswith(".py"):
            os.symlink(os.path.join(ROOT, file), tmp_path / file)
    os.symlink(os.path.join(ROOT, "tests"), tmp_path / "tests")
    found = [c for c in commands(("python data.py", "python midtrain.py --model=toy --data=data/mine"))]
    assert len(found) == 10
    for command in found:
        flags = shlex.split(command)[2:]
        flags = ["--tokenizer=toy" if flag.startswith("--tokenizer") else flag for flag in flags]
        flags += [f"--hub={hub}"] * (flags[0] in asked)
        script = command.split()[1]
        if flags[0] in ("get_prompts", "prompts"):        # parsed, not run
            flags = [*flags, "--help"]
        done = subprocess.run([sys.executable, os.path.join(ROOT, script), *flags], capture_output=True,
                              text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def test_generate_commands_run(exported, tmp_path):
    found = commands("python generate.py")
    assert len(found) == 2
    flags = [shlex.split(command)[2:] for command in found]
    for words in flags:
        parse(generate.Config, words)
    words = [f"--init={exported}" if word.startswith("--init") else word for word in flags[0]]
    process = Process(tmp_path, *words, stage="generate")
    assert process.wait() == 0 and "What is 12 + 30?" in process.text("stdout"), process.text("stderr")


def test_analysis_commands_run(exported, tmp_path):
    for name in ("base", "mt", "rl"):
        shutil.copytree(exported, tmp_path / "runs" / name / "model")
    (tmp_path / "runs" / "rl" / "config.json").write_text('{"beta1": 0.9, "beta2": 0.95, "eps": 1e-10}')
    (tmp_path / "runs" / "rl" / "metrics.jsonl").write_text('{"step": 1, "lr": 1e-4, "gnorm": 1}\n')
    found = commands("python analyze.py")
    assert len(found) == 8
    for command in found:
        if command.split()[2] in ("landscape", "trajectory", "behaviour", "report", "merge"):
            process = Process(tmp_path, command.split()[2], "--help", stage="analyze")
            assert process.wait() == 0                    # that they run is shown in tests/test_analyze_*.py
            flags = [word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")]
            assert all(flag in process.text("stdout") for flag in flags)
            continue
        words = [str(tmp_path / w) if w.startswith("runs/") else w.replace("=runs", f"={tmp_path}/runs")
                 for w in shlex.split(command)[2:]]
        words += ["--count=8", "--resamples=10"] * (words[0] == "cka") + [f"--out={tmp_path / 'out'}"]
        process = Process(tmp_path, *words, stage="analyze")
        assert process.wait() == 0, process.text("stderr")
    assert set(os.listdir(tmp_path / "out")) == {"weights.json", "cka.json"}


def test_sources_are_named():
    for name, source in sources.REGISTRY.items():
        assert re.search(rf"^\|.*\b{re.escape(name)}\b", README, re.M), name
        for part in source.parts.values():
            assert part.repo in README or "tulu" in part.repo
            assert part.licence.split(",")[0] in README


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
