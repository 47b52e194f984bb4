"""The pages: links lead somewhere, commands run, README's figures stand in runs.json."""

import functools
import importlib
import itertools
import json
import re
import shlex
import shutil
import string
from pathlib import Path

import pytest
from conftest import TINY_TRAINING, make_picture
from helpers import make_flickr8k
from PIL import Image
from test_extend import CHANGES, FURTHER

import datasets
import models
import utils
from captioning.model import checkpoints
from captioning.report import contact_sheet, metrics

ROOT = Path(utils.__file__).resolve().parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PAGES += [".github/CONTRIBUTING.md"]
TAUGHT = ["README.md", "docs/guide.md"]  # the pages whose commands a reader types


@functools.cache
def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def anchors(page):
    """GitHub's names of a page's headings."""
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    found = []
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page)))
    links += re.findall(r"`[^`]*`\]\(([^)\s]+)\)", text_of(page))
    for link in links:
        if not re.match(r"https?://", link):
            name, _, anchor = link.partition("#")
            path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
            assert path.exists(), link
            if anchor:
                assert anchor in anchors(path.relative_to(ROOT)), link


@pytest.mark.parametrize("page", PAGES)
def test_files_of_the_suite_that_are_named_exist(page):
    for name in re.findall(r"`((?:tests|docs|\.ci|\.github)/[\w./-]+)`", text_of(page)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page, words", [("README.md", 1400), ("docs/results.md", 4000)])
def test_the_first_pages_stay_short(page, words):
    """In words that a reader sees: comments, which name the runs, and a table's rules are none."""
    text = re.sub(r"<!--.*?-->", "", text_of(page), flags=re.S)
    assert len(re.findall(r"\S*\w\S*", text)) <= words


def test_each_question_is_first_answered_in_three_sentences():
    _, *sections = re.split(r"^## ", text_of("docs/results.md"), flags=re.M)
    for section in sections:
        title, _, body = section.partition("\n")
        answer = re.match(r"\s*\*\*Answer\.\*\* (.*?)\n(?:\n|<!--)", body, re.S)
        assert answer, title
        assert 1 <= len(re.findall(r"[.?!](?=\s|$)", answer[1])) <= 3, title


def test_the_guides_contents_name_every_section():
    contents, *sections = re.split(r"^## .*$", text_of("docs/guide.md"), flags=re.M)
    linked = re.findall(r"\]\(#([\w-]+)\)", contents)
    assert set(anchors("docs/guide.md")[1:]) == set(linked) and len(linked) == len(sections)


def test_the_changes_that_readme_shows_are_those_that_are_tested():
    blocks = "".join(re.findall(r"```python\n(.*?)```", text_of("README.md"), re.S))
    lines = [line for line in blocks.splitlines() if line.strip()]
    for _, _, snippet, _ in CHANGES.values():
        wanted = [line for line in snippet.splitlines() if line.strip()]
        starts = (i for i, line in enumerate(lines) if line == wanted[0])
        assert any(lines[i : i + len(wanted)] == wanted for i in starts), wanted[0]


@pytest.mark.parametrize("what", ["a CNN from nothing", "two CNNs"])
def test_the_cnns_that_the_guide_shows_are_those_that_are_tested(what):
    lines = lambda text: [line for line in text.splitlines() if line]
    shown = re.findall(r"```python\n(.*?)```", text_of("docs/guide.md"), re.S)
    assert lines(FURTHER[what][2]) in map(lines, shown)


def test_the_guides_lines_about_epsilon_draw_it(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", text_of("docs/guide.md"), re.S)
    (block,) = (block for block in blocks if "scheduled_sampling_epsilon" in block)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "guide", "exec"), names)
    assert names["epsilon"][0] > 0.95 and names["epsilon"][-1] == pytest.approx(0.75, abs=0.01)
    with Image.open("epsilon.png") as plot:
        assert min(plot.size) > 300


# ----------------------------------------------------------------------------------------- figures


def tables(text):
    """The tables of a page, as (header, rows), lists of cells."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        rows = [[c.strip() for c in row.strip("| ").split("|")] for row in block.splitlines()]
        yield rows[0], rows[2:]


def spoken_for(figures, runs):
    """Whether one group of runs, scored in one way, has all figures of a row.

    :param figures: dict of metrics and cells such as 22.6, 22.6 / 22.4 (a figure for each seed), or
        22.5 ± 0.1 (mean, half of the range)
    """
    groups = {}
    for name, run in runs.items():
        for split in ("val", "test"):
            for beam, row in run.get(split, {}).get("beams", {}).items():
                groups.setdefault((re.sub(r"-seed\d+$", "", name), split, beam), []).append(row)
    return any(
        all(says(cell, [row.get(metric) for row in rows]) for metric, cell in figures.items())
        for rows in groups.values()
    )


def says(cell, values):
    shown = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell)]
    if None in values or not values:
        return False
    mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
    expected = [mean, spread] if "±" in cell else values if "/" in cell else [mean]
    digits = [len(number.partition(".")[2]) for number in re.findall(r"\d+(?:\.\d+)?", cell)]
    return len(shown) == len(expected) and all(
        abs(a - b) <= 0.5001 * 10**-n for a, b, n in zip(shown, expected, digits)
    )


def test_every_figure_of_readmes_tables_has_a_source():
    """A row's metrics are those of one group of runs.json, or the row names its command."""
    runs = json.loads((ROOT / "docs" / "runs.json").read_text())
    known = {
        m
        for r in runs.values()
        for s in ("val", "test")
        if s in r
        for b in r[s]["beams"].values()
        for m in b
    }
    for header, rows in tables(text_of("README.md")):
        for row in rows:
            figures = {m: c for m, c in zip(header, row) if m in known and re.search(r"\d", c)}
            is_source = spoken_for(figures, runs) if figures else True
            assert is_source or "`python " in " ".join(row), row


def test_a_figure_is_held_against_the_runs():
    values = {"a": 22.61, "b": 22.39}
    assert says("22.6 / 22.4", list(values.values())) and says("22.5 ± 0.1", list(values.values()))
    assert not says("22.6", list(values.values())) and not says("22.5 ± 0.2", list(values.values()))
    runs = {
        f"x-seed{i}": {"test": {"beams": {"5": {"BLEU-4": 22.0 + i, "CIDEr": 57.0}}}}
        for i in (0, 1)
    }
    assert spoken_for({"BLEU-4": "22.5 ± 0.5", "CIDEr": "57.0"}, runs)
    assert not spoken_for({"BLEU-4": "22.5 ± 0.5", "CIDEr": "57.1"}, runs)


# ---------------------------------------------------------------------------------------- commands


def commands(text):
    """The suite's commands in blocks of bash and in backticks, as (script, arguments)."""
    program = r"\s*(?:\w+=\S+ )*(?:python3?|(?:srun )?torchrun .*?)"
    scripts = "create_input_files|train|eval|caption"
    for block, spoken in re.findall(r"```bash\n(.*?)```|(?<!`)`([^`\n]+)`(?!`)", text, re.S):
        typed = (block or spoken).replace("\\\n", " ")
        values = dict(re.findall(r"\bfor (\w+) in (\S+)", typed))  # a loop's first round
        values |= dict(re.findall(r"^\s*(\w+)=(\S+)$", typed, re.M))
        for _ in range(2):  # one may be made of another
            typed = string.Template(typed).safe_substitute(values)
        for line in typed.splitlines():
            for part in re.split(r"&&|;", line.split(" #")[0]):
                found = re.match(rf"{program} ({scripts})\.py\b(.*)", part)
                if found:
                    yield found[1], shlex.split(found[2])


@pytest.mark.parametrize("page", [*TAUGHT, "docs/results.md"])
def test_every_command_is_understood(page):
    found = list(commands(text_of(page)))
    assert found
    for script, argv in found:
        importlib.import_module(script).get_args_parser().parse_args(argv)


def test_the_guide_names_every_flag_and_each_is_one_of_its_script():
    rows = next(rows for header, rows in tables(text_of("docs/guide.md")) if header[0] == "task")
    scripts = ("create_input_files", "train", "eval", "caption")
    known = {
        script: set(importlib.import_module(script).get_args_parser()._option_string_actions)
        for script in scripts
    }
    named = set()
    for _, where, flags in rows:
        for script in re.findall(r"`(\w+)\.py`", where) or scripts:
            flags_here = set(re.findall(r"--\w+", flags))
            assert flags_here <= known[script], (script, flags)
            named |= {(script, flag) for flag in flags_here}
    for script in scripts:
        opposites = {f"--no_{flag[2:]}" for flag in known[script]}
        missing = known[script] - opposites - {flag for where, flag in named if where == script}
        assert missing == {"--help", "-h"}, (script, missing)


def run(script, argv, monkeypatch):
    """Run a script's main, as its command line does."""
    module = importlib.import_module(script)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *argv])
    module.main(module.get_args_parser().parse_args(argv))


def save_pictures(folder, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i}.jpg" for i in range(start, start + 10)]
    for i, name in enumerate(names):
        Image.fromarray(make_picture(i)).save(folder / name)
    return names


def write(path, *lines):
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


SAID = "a dog runs on the grass"


def kaggles_flickr8k():
    names = save_pictures(Path("FOLDER/Images"))
    write(Path("FOLDER/captions.txt"), "image,caption", *(f"{n},{SAID}" for n in names))


def kaggles_flickr30k():
    names = save_pictures(Path("flickr30k_images"))
    rows = (f"{n}| {k}| {SAID}" for n in names for k in range(5))
    write(Path("results.csv"), "image_name| comment_number| comment", *rows)


def coco():
    for start, split in ((0, "train2014"), (10, "val2014")):
        names = save_pictures(Path(split), start)
        shutil.make_archive(split, "zip", split)
        images = [{"file_name": n, "id": i} for i, n in enumerate(names)]
        annotations = [{"image_id": i, "caption": SAID} for i in range(len(names))]
        content = {"images": images, "annotations": annotations}
        write(Path(f"captions_{split}.json"), json.dumps(content))


def karpathy():
    names = save_pictures(Path("FOLDER"))
    splits = ["train"] * 8 + ["val", "test"]
    entries = [
        {"filename": n, "split": s, "sentences": [{"raw": SAID, "tokens": SAID.split()}]}
        for n, s in zip(names, splits)
    ]
    write(Path("dataset_coco.json"), json.dumps({"images": entries, "dataset": "coco"}))


def hugging_face():
    names = save_pictures(Path("FOLDER"))
    write(Path("FOLDER/metadata.csv"), "file_name,text", *(f"{n},{SAID}" for n in names))


def csv():
    names = save_pictures(Path("FOLDER"))
    write(Path("captions.csv"), "image,caption", *(f"{n},{SAID}" for n in names))


def json_lines():
    names = save_pictures(Path("FOLDER"))
    rows = (json.dumps({"image": n, "caption": [SAID, SAID]}) for n in names)
    write(Path("captions.json"), *rows)


def token_lines():
    names = save_pictures(Path("FOLDER"))
    write(Path("captions.token.txt"), *(f"{n}#0\t{SAID}" for n in names))


def texts():
    for name in save_pictures(Path("FOLDER")):
        write(Path("FOLDER", name).with_suffix(".txt"), SAID, SAID)


def a_file_for_each_split():
    names = save_pictures(Path("FOLDER"))
    for split, part in (("train", names[:8]), ("val", names[8:9]), ("test", names[9:])):
        write(Path(f"{split}.csv"), "image,caption", *(f"{n},{SAID}" for n in part))


HAVE = {  # how a row of the guide's table of data begins, and what it says that one has
    "nothing": lambda: make_flickr8k(Path("data")),
    "`Flickr8k_Dataset.zip`": lambda: make_flickr8k(Path("FOLDER")),
    "Kaggle's Flickr8k": kaggles_flickr8k,
    "Kaggle's Flickr30k": kaggles_flickr30k,
    "COCO's own files": coco,
    "Karpathy's JSON": karpathy,
    "a Hugging Face": hugging_face,
    "a CSV": csv,
    "JSON lines": json_lines,
    "Flickr's token lines": token_lines,
    "a text beside": texts,
    "a file of captions": a_file_for_each_split,
}


@pytest.fixture
def few_shapes(monkeypatch):
    """The shapes data set has 24 pictures to train on, 6 to validate and 6 to test."""
    draw = datasets.shapes_records
    monkeypatch.setattr(datasets, "shapes_records", lambda **o: draw(24, 6, 6, **o))


@pytest.mark.parametrize("have", HAVE)
def test_what_you_have_takes_the_command_of_its_row(have, few_shapes, tmp_path, monkeypatch):
    every = tables(text_of("docs/guide.md"))
    rows = next(rows for header, rows in every if header == ["what you have", "the command"])
    assert len(rows) == len(HAVE)
    (row,) = [row for row in rows if row[0].startswith(have)]
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    HAVE[have]()
    found = list(commands(row[1]))
    assert found
    monkeypatch.setattr(contact_sheet, "draw_contact_sheet", lambda *_: None)
    for script, argv in found:
        run(script, [*argv, "--image_size", "32"], monkeypatch)
    assert len(list(Path("data").glob("TRAIN_*.hdf5"))) == len(found)


def remove_what_an_earlier_command_wrote(script, args):
    """Each command is typed in a fresh folder but for what it names."""
    if script == "train" and args.resume is None:
        old = [*args.output_folder.glob("*.pth.tar"), *args.output_folder.glob("log_*")]
    elif script == "eval":
        old = [*Path().rglob("metrics_*.json"), *([args.average] if args.average else [])]
    else:
        old = []
    for path in old:
        path.unlink(missing_ok=True)


def test_what_the_guide_types_in_python_runs(trained, tmp_path, monkeypatch, capsys):
    section = re.search(r"^## From Python\n(.*?)^## ", text_of("docs/guide.md"), re.S | re.M)[1]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == 2 and len([line for line in blocks[0].splitlines() if line]) <= 5
    shutil.copytree(trained, tmp_path / "checkpoints")
    save_pictures(tmp_path / "photos")
    shutil.copy(tmp_path / "photos/0.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile("".join(blocks), "guide", "exec"), names)
    caption, said = names["captioner"]("photo.jpg"), capsys.readouterr().out
    assert said.startswith(caption.text) and names["best"].text == caption.text
    rows = next(rows for header, rows in tables(section) if header[0] == "of a caption")
    fields = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(fields) == sorted(vars(caption))


@pytest.mark.slow
def test_every_command_of_readme_and_guide_runs(few_shapes, tmp_path, monkeypatch):
    """In their order, at toy sizes: few small pictures, narrow models, random CNNs, one epoch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "_meteor", lambda gts, res: None)
    make_flickr8k(Path("data"))
    csv()
    flags = "--dataset mine --captions captions.csv --images FOLDER --image_size 64"
    run("create_input_files", flags.split(), monkeypatch)
    for name in ("path/to/image.jpeg", "photo.jpg", "photos/1.jpg", "more/2.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_picture(1)).save(name)
    theirs = [{"file_name": f"{name}_ab.jpg", "caption": SAID} for name in ("08", "09")]
    write(Path("theirs.json"), json.dumps(theirs))
    vectors = (f"{word} " + " ".join(["0.1"] * 16) for word in SAID.split())
    write(Path("glove.6B.300d.txt"), *vectors)
    encoder = TINY_TRAINING.index("--encoded_image_size")
    sizes = {
        "create_input_files": ["--image_size", "64"],
        "train": ["--encoder_weights", "none", *TINY_TRAINING[encoder + 2 :], "--epochs", "1"],
        "eval": ["--device", "cpu", "--max_decode_steps", "8"],
        "caption": ["--device", "cpu", "--max_decode_steps", "8"],
    }
    tables_of_models = {
        "attention": models.ATTENTIONS, "decoder": models.DECODERS, "encoder": models.ENCODERS,
        "scheduled_sampling": models.SCHEDULES,
    }  # fmt: skip
    done, last = [], {}
    for script, argv in itertools.chain(*(commands(text_of(page)) for page in TAUGHT)):
        args = importlib.import_module(script).get_args_parser().parse_args(argv)
        unknown = script == "train" and not all(
            getattr(args, name).split("/")[0] in {key.split("/")[0] for key in table}
            for name, table in tables_of_models.items()
        )  # an addition of "Change it", which test_extend.py tries
        has_default = checkpoints.DEFAULT_CAPTIONER.exists() and script == "caption"
        unknown |= script in ("caption", "eval") and args.model is None and not has_default
        elsewhere = "FOLDER" in argv or "BEST_checkpoint.pth.tar" in argv  # other tests have them
        # the captioner is not tiny: test_adapting.py has the commands of that section
        elsewhere |= "captioner" in argv or "checkpoints/mine" in argv
        elsewhere |= script == "create_input_files" and args.dataset not in ("flickr8k", "shapes")
        if unknown or elsewhere or (script, argv) in done:
            continue
        done.append((script, argv))
        if script == "train":
            going_on = last.get(args.output_folder, []) if args.resume else []
            last[args.output_folder] = argv = [*going_on, *argv]  # "the same command with --resume"
        remove_what_an_earlier_command_wrote(script, args)
        run(script, [*argv, *sizes[script]], monkeypatch)
    assert {script for script, _ in done} == {"create_input_files", "train", "eval", "caption"}


def test_every_test_that_the_page_of_faults_names_exists():
    """A cell names them as ``file: test, test; file: test``; "…" stands for what is left out."""
    rows = re.findall(r"^\| .*\| (.*) \|$", text_of("docs/reliability.md"), re.M)
    cells = [re.sub(r"\([^)]*\)", "", row) for row in rows if re.match(r"[\w, ]+: \w", row)]
    assert len(cells) > 50
    tests = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        found = re.findall(r"^def test_(\w+)", path.read_text(encoding="utf-8"), re.M)
        tests[path.stem.removeprefix("test_")] = found
    for part in "; ".join(cells).split("; "):
        files, _, names = part.partition(": ")
        for file, name in itertools.product(files.split(", "), names.split(", ")):
            pattern = re.escape(name.strip()).replace("…", r"\w+")
            assert any(re.fullmatch(pattern, test) for test in tests[file]), f"{file}: {name}"
