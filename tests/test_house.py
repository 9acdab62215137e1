"""The rules of the house, read from the source: imports (deferred ones too), rooms, files on top."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = {"midtrain", "rl", "evaluate", "analyze"}
NOUNS = {"model", "data", "generate", "verify", "runtime"}
# A room imports what stands before it in this line, and itself.
LINE = ["cli", "presets", "kernels", "corpus", "grading", "suite", "reporting"]
# These stand beside the line: what they may import besides all of it.
BESIDE = {"engines": {"model", "runtime"}, "planning": {"model"}, "suite.leaderboards": {"model"},
          "study": set()}
TORCH = {"runtime", "model", "kernels", "engines", "planning", "suite.leaderboards", *STAGES}


def product():
    """{module: its syntax tree} of every Python file that is neither test nor benchmark."""
    trees = {}
    rooms = [path.parent for path in ROOT.glob("*/*.py") if path.parent.name not in ("tests", "benchmarks")]
    for folder in {ROOT, *rooms}:
        if folder.name.startswith(".") or folder.name in ("runs", "data", "peers"):
            continue
        for path in folder.glob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            trees[name] = ast.parse(path.read_text())
    return trees


TREES = product()


def imported(name):
    """Every module name that this one imports, wherever the import stands."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


IMPORTS = {name: imported(name) for name in TREES}
OURS = {name: names & (TREES.keys() - {name}) for name, names in IMPORTS.items()}


def room(name):
    return name.partition(".")[0]


def test_ten_files_on_top():
    top = {path.stem for path in ROOT.glob("*.py")}
    assert top == STAGES | NOUNS | {"cli"} and len(top) == 10
    assert {room(name) for name in TREES} - top == {*LINE, "engines", "planning", "study"} - top


def test_no_import_circle():
    def reached(name):
        seen, waiting = set(), list(OURS[name])
        while waiting:
            other = waiting.pop()
            if other not in seen:
                seen.add(other)
                waiting += OURS[other]
        return seen

    assert [name for name in TREES if name in reached(name)] == []


@pytest.mark.parametrize("name", sorted(TREES))
def test_imports_look_forward_only(name):
    """A stage imports no stage, a noun no stage, a room only what stands before it."""
    others = {other for other in OURS[name] if room(other) != room(name)}
    if name in STAGES:
        refused = {other for other in others if other in STAGES}
    elif name in NOUNS:
        refused = {other for other in others if other in STAGES}
    else:
        place = next((key for key in (name, room(name)) if key in BESIDE), None)
        before = LINE[:LINE.index(room(name))] if room(name) in LINE else LINE
        allowed = set(before) | (BESIDE[place] if place else set())
        refused = {other for other in others if room(other) not in allowed}
    assert not refused, f"{name} imports {sorted(refused)}"


@pytest.mark.parametrize("name", sorted(TREES))
def test_torch_stays_where_it_is_needed(name):
    loads = {room(other) for other in IMPORTS[name]} & {"torch", "safetensors", "triton"}
    if loads:
        assert name in TORCH or room(name) in TORCH, f"{name} imports {sorted(loads)}"


@pytest.mark.parametrize("name", sorted(name for name in TREES
                                        if room(name) in LINE + ["engines", "planning"]))
def test_private_names_stay_in_their_file(name):
    """One way in: no module takes another one's names that begin with _."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module in TREES:
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            assert not private, f"{name} imports {private} of {node.module}"


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_planning_and_grading_load_no_torch():
    heavy = "[m for m in ('torch', 'matplotlib', 'transformers') if m in sys.modules]"
    plan = "import sys, runpy; sys.argv = ['data.py', 'plan']; runpy.run_path('data.py', run_name='__main__')"
    assert run(f"{plan}; print({heavy})").endswith("[]\n")
    assert run(f"import sys, verify; print({heavy})") == "[]\n"
    light = "[m for m in ('torch', 'numpy', 'pyarrow', 'tyro') if m in sys.modules]"
    assert run(f"import sys, cli; print({light})") == "[]\n"


def test_source_zip_holds_every_room(tmp_path):
    from runtime import Run
    run = Run.__new__(Run)
    run.folder = str(tmp_path)
    run._save_source()
    with zipfile.ZipFile(tmp_path / "source.zip") as z:
        kept = set(z.namelist())
    rooms = {room(name) for name in TREES} - {"study"}
    expected = {str(path.relative_to(ROOT)) for path in ROOT.glob("*.py")}
    for folder in rooms - {path.stem for path in ROOT.glob("*.py")}:
        expected |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).iterdir()
                     if path.suffix in (".py", ".json")}
    assert kept == expected


def test_a_preset_is_its_file():
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    for path in ROOT.glob("presets/*.json"):
        raw = json.loads(path.read_text(), parse_constant=refuse)
        assert raw["model_type"] and raw["architectures"]


def test_the_newcomers_questions_are_answered_by_file_names():
    """Where is the mixture, the loss of RL, what counts as right, a benchmark's prompt, attention?"""
    for file, name in (("data.py", "MIXTURES"), ("rl.py", "grpo_loss"), ("verify.py", "grade"),
                       ("suite/benchmarks.py", "TEMPLATES"), ("model.py", "Attention")):
        tree = TREES[".".join(Path(file).with_suffix("").parts)]
        defined = {getattr(node, "name", None) for node in tree.body}
        defined |= {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
                    if isinstance(target, ast.Name)}
        defined |= {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
        assert name in defined, (file, name)
        assert os.path.exists(ROOT / file)
