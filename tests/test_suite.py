"""The suite as a whole: its house rules, and its scripts run as a user runs them."""

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import shlex
import shutil
import subprocess
import sys

import benchmark
import pytest
import torch
from conftest import DISTRIBUTIONS, ROOT, TINY_TRAINING, make_picture, required
from PIL import Image

import datasets
import utils
from captioning.run import machine
from captioning.run.lazy import LazyModule

SCRIPTS = ("create_input_files", "train", "eval", "caption")
FILES = ("utils", "datasets", "models", *SCRIPTS)
PARTS = ("run", "data", "model", "report")  # each may import those before it
ROOMS = [f"captioning.{part}.{path.stem}" for part in PARTS
         for path in sorted((ROOT / "captioning" / part).glob("[a-z]*.py"))]  # fmt: skip
MODULES = (*FILES, *ROOMS)


def source(module):
    return (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def imports(module):
    """Names of all modules that a module imports, at its top or later, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and all(alias.name != "*" for alias in node.names), module
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & set(ROOMS) or {node.module}
    values = vars(importlib.import_module(module)).values()
    return found | {value._name for value in values if isinstance(value, LazyModule)}


# ------------------------------------------------------------ house


def test_imports_go_one_way():
    """run, data, model, report, the three libraries, the scripts: nobody imports upwards."""
    floor = {room: PARTS.index(room.split(".")[1]) for room in ROOMS}
    floor |= {"utils": 4, "datasets": 5, "models": 6, **dict.fromkeys(SCRIPTS, 7)}
    for module in MODULES:
        for other in imports(module) & set(MODULES):
            above = floor[other] > floor[module]
            assert not above and other not in SCRIPTS, f"{module} imports {other}"
        assert "sys.path" not in source(module), module


def test_rooms_import_each_other_in_no_circle():
    left = {room: imports(room) & set(ROOMS) for room in ROOMS}
    while left:
        free = {room for room, needed in left.items() if not needed & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {room: needed for room, needed in left.items() if room not in free}


LINES = {"models": 520, "train": 560, "datasets": 320, "eval": 320, "caption": 240,
         "create_input_files": 260, "utils": 100}  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_longer_than_one_thing_takes(module):
    lines = source(module).count("\n")
    assert lines <= LINES.get(module, 260)
    assert source(module).startswith('"""')  # which says what the one thing is


def test_the_top_level_holds_nothing_else():
    """Of what git tracks: users may leave their photographs and results beside it."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git here")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == {
        *(f"{module}.py" for module in FILES),
        *("requirements.txt", "README.md", "LICENSE", "captioning", "tests", "docs"),
    }


HEAVY = (
    "torch numpy scipy h5py PIL matplotlib torchvision timm nltk pycocoevalcap skimage tqdm regex"
)


@pytest.mark.parametrize(
    "module, heavy",
    [
        ("utils", HEAVY),
        ("datasets", "torch matplotlib torchvision"),
        ("models", "timm matplotlib"),
        *((script, HEAVY + " datasets models") for script in SCRIPTS),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed_nor_anything_deprecated_used(module, heavy):
    """--help and an error of typing come at once, and Ctrl-C in the first seconds is one line."""
    code = f"""
import sys, warnings, {module} as module
warnings.simplefilter("error")
if hasattr(module, "get_args_parser"):
    assert "(default" in module.get_args_parser().format_help()
kinds = {{name: type(sys.modules.get(name)).__name__ for name in {heavy.split()}}}
print(*[name for name, kind in kinds.items() if kind not in ("NoneType", "LazyModule")])
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == "" and done.stdout.strip() == ""


def test_what_is_imported_is_required():
    """And what only tests need stands in their own list."""
    imported = {name.split(".")[0] for module in MODULES for name in imports(module)}
    imported -= {*sys.stdlib_module_names, *FILES, "captioning"}
    imported = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in imported}
    assert imported <= required("requirements.txt")
    assert not required("requirements.txt") & required("tests/requirements.txt")


def test_tests_that_need_a_missing_package_are_skipped_and_name_it():
    code = """
import sys, pytest
sys.modules.update(dict.fromkeys(["nbclient", "nltk", "imageio"]))  # as if not installed
sys.exit(pytest.main(sys.argv[1:]))
"""
    names = ("test_notebook.py", "run/test_messages.py", "report/test_metrics.py")
    flags = ["-q", "-m", "", "-k", "notebook or bleu_equals or bearable", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, *flags, *(ROOT / "tests" / name for name in names)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed, 2 skipped" in done.stdout, done.stdout
    assert "needs the package nbclient" in done.stdout and "package nltk" in done.stdout


def actions(script):
    parser = importlib.import_module(script).get_args_parser()
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained_and_read(script):
    text = source(script) + source("captioning.run.command_line")
    for action in actions(script):
        assert action.help and len(action.help) > 5, action.dest
        assert (
            re.search(rf"\bargs\.{action.dest}\b", text)
            or f'"{action.dest}"' in source(script)
            or (script == "train" and any(f'"{action.dest}"' in source(room) for room in ROOMS))
        ), f"{action.dest} is never read"
        assert all(re.fullmatch(r"--[a-z][a-z_]*", option) for option in action.option_strings), (
            action.option_strings
        )


# flags that a command needs; what they name is not there, so that every command ends soon
NEEDED = {
    "create_input_files": ["--source", "nowhere"],
    "train": ["--data_folder", "nowhere"],
    "eval": ["--model", "nowhere.pth.tar"],
    "caption": ["--model", "nowhere.pth.tar", "--img", "nowhere.jpg"],
}


def end_of(script, *argv):
    """Run a script's main as its command line does; return (exit code, what it said)."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setattr(sys, "argv", [f"{script}.py", *NEEDED[script], *argv])
        patch.setattr(machine, "busy_cores", lambda: 0.0)  # which takes a tenth of a second
        with pytest.raises(SystemExit) as ended:
            utils.run(module.main, module.get_args_parser())
    return ended.value.code, said.getvalue()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_is_checked_before_anything_is_written(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numeric = [action for action in actions(script) if hasattr(action.type, "kind")]
    assert numeric and not [a.dest for a in actions(script) if a.type in (int, float)]
    for action in numeric:
        flag, bounds = action.option_strings[0], inspect.getclosurevars(action.type).nonlocals
        kind, low, high = bounds["kind"], bounds["low"], bounds["high"]
        step = 1 if kind is int else 1e-3 * max(abs(low), abs(high))
        wrong = ("nan", "inf", "-inf", "1e999", str(10**30), "many", "", "1,5")
        for value in (*wrong, low - step, high + step):
            code, said = end_of(script, f"{flag}={value}")
            expected = f"{flag} {value}: expected a value from {low} to {high}"
            assert code == 2 and said.startswith(f"{script}.py: error: {expected}")
            assert said.count("\n") == 1
        for value in (low, high):  # which are allowed: then something else is missed
            code, said = end_of(script, f"{flag}={value}")
            assert code == 2 and f"{flag} {value}: expected a value from" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_a_terminal_says_each_default_once_and_ends_in_examples(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = importlib.import_module(script).get_args_parser().format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert "(default: None)" not in text and "(default: False)" not in text
    assert not re.search(r"\(default[^)]*\)\s+\(default", text)
    examples = text.partition("examples:\n")[2]
    assert len(list(commands(examples))) >= 3
    for action in actions(script):
        if action.nargs != 0 and not action.choices and action.metavar:
            assert action.dest.upper() not in action.metavar, action.dest


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_path_that_no_system_knows_ends_in_one_line(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for action in actions(script):
        if action.nargs != 0 and not hasattr(action.type, "kind"):
            for value in ("x" * 5000, "/" + "é" * 300, "caf\udce9"):
                code, said = end_of(script, f"{action.option_strings[0]}={value}")
                assert (
                    code == 2
                    and "Traceback" not in said
                    and re.match(r"\w+\.py: error: .", said.splitlines()[-1])
                )
    assert not list(tmp_path.iterdir())


def commands(text):
    """The suite's commands in a text, as (script, arguments)."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;", line.split(" #")[0]):
            found = re.match(
                r"\s*(?:\S*/)?python3? (create_input_files|train|eval|caption)\.py(.*)", part
            )
            if found:
                yield found[1], shlex.split(found[2])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_of_a_docstring_is_understood(script):
    found = list(commands(ast.get_docstring(ast.parse(source(script)))))
    assert found
    for script, argv in found:
        importlib.import_module(script).get_args_parser().parse_args(argv)


# ------------------------------------------------------------ as a user


def as_user(script, *argv, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-B", ROOT / f"{script}.py", *map(str, argv)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_python_that_hides_our_files_ends_in_one_line(script, tmp_path):
    (tmp_path / "utils.py").write_text("")  # as other packages have one
    done = as_user(script, "--help", cwd=tmp_path, PYTHONSAFEPATH="1", PYTHONPATH=str(tmp_path))
    assert done.returncode and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{script}.py: error: ") and "PYTHONSAFEPATH" in done.stderr


def test_train_evaluate_and_caption_as_a_user_does(shapes_data, tmp_path):
    folder, name = shapes_data
    (tmp_path / "data").mkdir()
    for path in folder.iterdir():
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    Image.fromarray(make_picture(1)).save(tmp_path / "image.jpeg")

    done = as_user("train", "--data_name", name, *TINY_TRAINING, cwd=tmp_path)
    assert done.returncode == 0 and "best BLEU-4" in done.stdout, done.stderr
    assert "Warning" not in done.stderr
    best = f"checkpoints/BEST_checkpoint_{name}.pth.tar"
    done = as_user("eval", "--model", best, "--beam_size", "1", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0 and "BLEU-4" in done.stdout, done.stderr
    assert "Warning" not in done.stderr

    # the users' own line
    done = as_user(
        "caption",
        "--img=image.jpeg",
        f"--model={best}",
        f"--word_map=data/WORDMAP_{name}.json",
        "--beam_size=5",
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stdout.startswith("image.jpeg: "), done.stderr
    assert [path.name for path in (tmp_path / "captions").iterdir()] == ["image_attention.png"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "data",
        "checkpoints",
        "captions",
        "image.jpeg",
    }
    assert not list(tmp_path.rglob("*.partial*"))

    done = as_user("caption", "--img=other.jpeg", f"--model={best}", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"caption\.py: error: --img other\.jpeg: [^\n]*\n", done.stderr)


IN_A_NOTEBOOK = """
import io, shlex, sys
class Cell(io.TextIOBase):  # what stands for standard output there: no file
    def __init__(self, stream):
        self.stream = stream
    def write(self, text):
        return self.stream.write(text)
sys.stdout, sys.stderr = Cell(sys.stdout), Cell(sys.stderr)
root, *commands = sys.argv[1:]
sys.path.insert(0, root)
for command in commands:
    sys.argv = shlex.split(command)
    with open(f"{root}/{sys.argv[0]}") as file:
        exec(file.read(), {"__name__": "__main__"})
"""


@pytest.mark.parametrize("optimize", ["", pytest.param("2", marks=pytest.mark.slow)])
def test_scripts_run_in_a_notebook_and_without_docstrings(optimize, own_data, tmp_path):
    """One after the other in one process; PYTHONOPTIMIZE=2 leaves out docstrings and asserts."""
    images, captions = own_data
    name = datasets.base_name("mine", 5, 1)
    prepare = f"--images {images} --captions {captions} --min_word_freq 1 --image_size 64"
    found = subprocess.run(
        [
            *(sys.executable, "-B", "-c", IN_A_NOTEBOOK, ROOT),
            f"create_input_files.py --dataset mine {prepare}",
            shlex.join(["train.py", "--data_name", name, *TINY_TRAINING, "--epochs", "1"]),
            "eval.py --model checkpoints --split val --device cpu",
            "caption.py --model checkpoints --img pictures/00.jpg --device cpu",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONOPTIMIZE": optimize},
    )  # fmt: skip
    assert found.returncode == 0 and "Traceback" not in found.stderr, found.stderr
    said = ("Made mine", "best BLEU-4", "metrics_val", "captions/00_attention.png")
    assert all(words in found.stdout for words in said)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_docstrings(script, tmp_path):
    done = as_user(script, "--help", cwd=tmp_path, PYTHONOPTIMIZE="2")
    assert done.returncode == 0 and "(default" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("first", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_readmes_first_three_commands_run_in_order_in_one_clone(first, tmp_path):
    """From the given one on, in the environment of this test and not in a new one."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git here")
    clone, python = tmp_path / "clone", tmp_path / "bin" / "python"
    for name in listed.stdout.splitlines():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    subprocess.run(["sh", "-c", "git init -q && git add -A"], cwd=clone, check=True)
    Image.fromarray(make_picture(0)).save(clone / "photo.jpg")
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)[first - 1 : 3]:
        typed = [part for part in block.replace("\\\n", "").split("&&") if "-m venv" not in part]
        typed = [part for part in typed if "activate" not in part and "pip install" not in part]
        command = (
            "&&".join(typed).strip().replace("-m pytest tests", "-m pytest tests -k top_level")
        )
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=clone, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    assert "1 passed" in done.stdout  # the last one was pytest
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True
    )
    new = [line for line in status.stdout.splitlines() if line.startswith("??")]
    assert new == ["?? photo.jpg"]  # .gitignore names what the commands write


def test_the_benchmark_trains_as_train_does():
    options = benchmark.options_of_training("--batch_size", "3", "--epochs", "2")
    data, features = benchmark.FakeDataset(7), torch.rand(7, 4, 2048).half()
    history = benchmark.train_epochs(options, torch.device("cpu"), data, features)
    assert [record["update"] for record in history] == [3, 6]
    assert all(record["words_per_second"] > 0 for record in history)
    assert history[1]["nll"] < history[0]["nll"]


def test_a_missing_data_set_ends_in_one_line(tmp_path):
    done = as_user("train", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "create_input_files.py" in done.stderr
    assert (
        datasets.split_path("data", "train", datasets.base_name("flickr8k", 5, 5)).name
        in done.stderr
    )
    assert not list(tmp_path.iterdir())
