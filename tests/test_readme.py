"""Every command, file name and Python block of the README, docs/ and study/ exists, parses with the real
Config or runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import miniatures
import pytest
from processes import Process

import evaluate
import generate
import midtrain
import presets
import rl
from cli import parse
from corpus import registry
from model import parameter_counts, preset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted(ROOT.glob("docs/*.md")),
         *sorted(ROOT.glob("study/**/*.md"))]
TEXT = {page: page.read_text() for page in PAGES}
README = TEXT[ROOT / "README.md"]
ABLATIONS = sorted(ROOT.glob("study/ablations/*.diff"))


def blocks(page, language=""):
    """The fenced blocks of a page that are of a language ("": of none)."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", TEXT[page], re.S | re.M)
    return [text for kind, text in fences if kind == language]


def commands(start, pages=PAGES):
    """The command lines that begin so, each once, without their comments."""
    lines = []
    for page in pages:
        for block in blocks(page):
            lines += block.replace("\\\n", "").splitlines()
    return list(dict.fromkeys(line.split(" #")[0].strip() for line in lines if line.startswith(start)))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 280 and len(README.encode()) <= 20_000


def test_training_commands_parse():
    found = commands(("python midtrain.py", "python rl.py", "python evaluate.py", "torchrun"))
    assert len(found) >= 20
    for command in found:
        words = shlex.split(command)
        stage = next(stage for stage in (midtrain, rl, evaluate) if f"{stage.__name__}.py" in words)
        flags = words[words.index(f"{stage.__name__}.py") + 1:]
        if flags[0] not in ("--help", "--compare") and "meta-llama/" not in command:
            cfg = parse(stage.Config, flags, stage.recipe)
            stage.check(cfg, 8 if words[0] == "torchrun" else 1)


@pytest.mark.slow
def test_data_commands_run(tmp_path):
    """In their order: your own texts to a mixture that trains; the paper's, from miniatures of them."""
    hub, asked = miniatures.hub(tmp_path / "hub"), {"check", "get", "get_prompts"}
    for file in ROOT.glob("*.py"):
        os.symlink(file, tmp_path / file.name)
    os.symlink(ROOT / "tests", tmp_path / "tests")
    pages = [ROOT / "docs" / "data.md", ROOT / "README.md"]
    found = commands(("python data.py", "python midtrain.py --model=toy --data=data/mine"), pages)
    assert len(found) >= 11
    for command in found:
        flags = shlex.split(command)[2:]
        flags = ["--tokenizer=toy" if flag.startswith("--tokenizer") else flag for flag in flags]
        if flags[0] in asked:
            flags.append(f"--hub={hub}")
        if flags[0] in ("get_prompts", "prompts"):        # parsed, not run
            flags.append("--help")
        script = ROOT / command.split()[1]
        done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, cwd=tmp_path,
                              timeout=120)
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def test_generate_commands_run(exported, tmp_path):
    found = commands("python generate.py")
    assert len(found) >= 3
    for command in found:
        parse(generate.Config, shlex.split(command)[2:])
    words = shlex.split(next(command for command in found if "vllm" not in command))[2:]
    words = [f"--init={exported}" if word.startswith("--init") else word for word in words]
    process = Process(tmp_path, *words, stage="generate")
    assert process.wait() == 0 and "What is 12 + 30?" in process.text("stdout"), process.text("stderr")


def test_analysis_commands_run(exported, tmp_path):
    for name in ("base", "mt", "rl"):
        shutil.copytree(exported, tmp_path / "runs" / name / "model")
    (tmp_path / "runs" / "rl" / "config.json").write_text('{"beta1": 0.9, "beta2": 0.95, "eps": 1e-10}')
    (tmp_path / "runs" / "rl" / "metrics.jsonl").write_text('{"step": 1, "lr": 1e-4, "gnorm": 1}\n')
    found = commands("python analyze.py")
    assert len(found) >= 9
    for command in found:
        if command.split()[2] not in ("weights", "cka"):
            process = Process(tmp_path, command.split()[2], "--help", stage="analyze")
            assert process.wait() == 0                    # that they run is shown in tests/test_analyze_*.py
            flags = [word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")]
            assert all(flag in process.text("stdout") for flag in flags)
            continue
        words = [str(tmp_path / w) if w.startswith("runs/") else w.replace("=runs", f"={tmp_path}/runs")
                 for w in shlex.split(command)[2:]]
        if words[0] == "cka":
            words += ["--count=8", "--resamples=10"]
        process = Process(tmp_path, *words, f"--out={tmp_path / 'out'}", stage="analyze")
        assert process.wait() == 0, process.text("stderr")
    assert set(os.listdir(tmp_path / "out")) == {"weights.json", "cka.json"}


PYTHON = [(page.name, text) for page in PAGES for text in blocks(page, "python")]


@pytest.mark.parametrize("text", [text for _, text in PYTHON], ids=[
    f"{name}-{i}" for i, (name, _) in enumerate(PYTHON)])
def test_python_blocks_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "a block of the docs", "exec"), {"__name__": "block"})


# -- ablations -----------------------------------------------------------------------------------------------

def apply(diff, folder):
    """The repository in `folder`, with a diff applied as the page says."""
    skipped = shutil.ignore_patterns(".*", "runs", "data", "peers", "docs", "tests")
    shutil.copytree(ROOT, folder, ignore=skipped)
    done = subprocess.run(["git", "apply", "--verbose", diff], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})
    assert done.returncode == 0 and "cleanly" in done.stderr, done.stderr


def section(diff):
    """What study/ablations/README.md says of a diff."""
    page = TEXT[ROOT / "study" / "ablations" / "README.md"]
    [text] = re.findall(rf"^## {re.escape(diff.name)}: (.*?)(?=^## |\Z)", page, re.S | re.M)
    return text


@pytest.mark.parametrize("diff", ABLATIONS, ids=lambda diff: diff.stem)
def test_ablations_apply_cleanly_and_are_small(diff, tmp_path):
    apply(diff, tmp_path / "repository")
    changed = [line for line in diff.read_text().splitlines() if re.match(r"[-+](?![-+]{2} )", line)]
    assert 2 <= len(changed) <= 20
    assert section(diff)


@pytest.mark.slow
@pytest.mark.parametrize("diff", ABLATIONS, ids=lambda diff: diff.stem)
def test_ablations_run(diff, exported, tmp_path):
    """Their commands, but for fewer steps, in a repository with the diff."""
    apply(diff, tmp_path / "repository")
    shutil.copytree(exported, tmp_path / "repository" / "start")
    found = [line for line in section(diff).splitlines() if line.startswith("python")]
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


# -- names ---------------------------------------------------------------------------------------------------

def test_sources_are_named():
    page = TEXT[ROOT / "docs" / "data.md"]
    for name, source in registry.REGISTRY.items():
        assert re.search(rf"^\|.*\b{re.escape(name)}\b", page, re.M), name
        for part in source.parts.values():
            assert part.repo in page or "tulu" in part.repo
            assert part.licence.split(",")[0] in page


def test_recipes_name_every_model_and_its_parameters():
    for name in presets.names():
        if not presets.is_toy(name):
            assert f"| `{name}` | {sum(parameter_counts(preset(name)).values()):,} |" in README


def test_make_targets_and_files_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert {c.split()[1] for c in commands("make")} <= targets
    for page, text in TEXT.items():
        assert set(re.findall(r"`make (\w+)`", text)) <= targets, page
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / link).exists(), (page, link)
    named = re.findall(r"^(\S+(?:\.py|/)) ", "\n".join(blocks(ROOT / "README.md")), re.M)
    assert len(named) >= 20
    for path in named:
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(?<![\w./-])((?:\w+/)+\w+\.(?:py|sh|md|diff))", "".join(TEXT.values())):
        assert (ROOT / path).exists() or path.startswith("runs/"), path


def test_every_manual_is_linked():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
            waiting += [(page.parent / link).resolve() for link in links]
    assert set(PAGES) <= reached
