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
from cli import parse
from corpus import registry

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "README.md")) as f:
    README = f.read()
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)          # (language, text)
BLOCKS = [text for language, text in FENCES if not language]


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
    assert len(found) == 14
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


ABLATIONS = [(text, FENCES[i + 1][1]) for i, (language, text) in enumerate(FENCES) if language == "diff"]


def apply(diff, folder):
    """The repository with a diff of the README in `folder`."""
    skipped = shutil.ignore_patterns(".*", "runs", "data", "peers", "docs", "tests")
    shutil.copytree(ROOT, folder, ignore=skipped)
    done = subprocess.run(["git", "apply", "--verbose", "-"], input=diff, cwd=folder, capture_output=True,
                          text=True, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})
    assert done.returncode == 0 and "cleanly" in done.stderr, done.stderr


@pytest.mark.parametrize("diff", [diff for diff, _ in ABLATIONS], ids=["mixture", "kl", "reference"])
def test_ablations_apply_cleanly_and_change_one_line(diff, tmp_path):
    apply(diff, tmp_path / "repository")
    changed = [line for line in diff.splitlines() if re.match(r"[-+](?![-+]{2} )", line)]
    assert [line[0] for line in changed] == ["-", "+"]
    file, = re.findall(r"^\+\+\+ b/(.*)$", diff, re.M)
    assert changed[1][1:] in (tmp_path / "repository" / file).read_text().splitlines()
    assert changed[0][1:] not in (tmp_path / "repository" / file).read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("diff, told", ABLATIONS, ids=["mixture", "kl", "reference"])
def test_ablations_run(diff, told, exported, tmp_path):
    """Their commands, but for fewer steps, in a repository with the diff."""
    apply(diff, tmp_path / "repository")
    shutil.copytree(exported, tmp_path / "repository" / "start")
    found = [line for line in told.splitlines() if line.startswith("python")]
    assert found
    for command in found:
        words = ["--init=start" if word.startswith("--init") else word
                 for word in shlex.split(command)[1:]]
        few = {"midtrain.py": ["--steps=2", "--warmup=0", "--eval_rows=1"],
               "rl.py": ["--steps=2", "--batch=2", "--eval_prompts=2"],
               "evaluate.py": ["--problems=2", "--tasks=toy-math"]}[words[0]]
        done = subprocess.run([sys.executable, *words, *few], cwd=tmp_path / "repository", timeout=300,
                              capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def test_sources_are_named():
    for name, source in registry.REGISTRY.items():
        assert re.search(rf"^\|.*\b{re.escape(name)}\b", README, re.M), name
        for part in source.parts.values():
            assert part.repo in README or "tulu" in part.repo
            assert part.licence.split(",")[0] in README


def test_recipes_name_every_model_and_its_parameters():
    import presets
    from model import parameter_counts, preset
    for name in presets.names():
        if not presets.is_toy(name):
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
    assert set(os.listdir(os.path.join(ROOT, "docs"))) == set(re.findall(r"\(docs/(\S+)\)", README))


def test_the_map_quotes_lines():
    """Of each file and folder, within a tenth: who edits a file need not edit the README."""
    quoted = dict(re.findall(r"^(\S+(?:\.py|\.sh|/)) +([\d,]+)  \S", README, re.M))
    files = {name for name in os.listdir(ROOT) if name.endswith((".py", ".sh"))}
    assert quoted.keys() == files | {"kernels/", "benchmarks/", "tests/"}
    for name, count in quoted.items():
        if name.endswith("/"):
            found = [os.path.join(folder, file) for folder, _, some in os.walk(os.path.join(ROOT, name))
                     for file in some if file.endswith(".py")]
        else:
            found = [os.path.join(ROOT, name)]
        lines = 0
        for path in found:
            with open(path) as f:
                lines += sum(1 for _ in f)
        assert 0.9 * lines <= int(count.replace(",", "")) <= 1.1 * lines, (name, lines)


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@\w+@|\b(?:DEMO|TEST|BENCH)_[A-Z]+\b", README)
    loose = re.compile(r"(?i)to[d]o\b|fix[m]e|\bmo[c]k|\bst[u]b|^(?!.*(?:import|torch\.nn)).*\but[i]ls\b")
    if not os.path.exists(os.path.join(ROOT, ".git")):
        pytest.skip("no git checkout: which files are ours is not known")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for file in listed.stdout.splitlines():
        assert not loose.search(file), file
        if file.endswith((".py", ".sh", ".md", ".txt", ".toml", "Makefile", "run")):
            with open(os.path.join(ROOT, file)) as f:
                found = [line for line in f if loose.search(line)]
            assert not found, (file, found)
