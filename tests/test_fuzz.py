"""Whatever a file or a command line holds: a result or a clear error, never a crash or a hang.

Files are mutated and given to the readers in a process of its own (libhdf5, Pillow's decoders or
torch might crash or hang). The long form takes minutes and prints how many files it mutated:
python -m pytest tests/test_fuzz.py -m slow -s
"""

import argparse
import importlib
import io
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import datasets
import utils
from captioning.data import words as words_room
from captioning.report import scenes
from captioning.run import files as files_room
from captioning.run import machine

ROOT = Path(utils.__file__).parent

# ---------------------------------------------------------------------------------------- mutations

TOKENS = [
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\n",
    b"\r",
    b"\t",
    b"#0\t",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"9" * 40,
    b"../",
    b"\\ud800",
    b"\xff\xff\xff\xff",
    b"<start>",
]


def mutate(data, rng):
    """A copy with one to three faults: changed, cut off, put in, zeroed or repeated.

    Half of them lie near the start or the end, where formats keep what says how to read the rest.
    """
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        near = min(len(data), rng.choice((40, 400, 10**9, 10**9)))
        place = rng.randrange(near + 1)
        place = len(data) - place if rng.random() < 0.3 else place
        length = rng.choice((1, 2, 4, 30, 500))
        fault = rng.choice(("change", "change", "cut", "insert", "token", "zero", "repeat"))
        if fault == "change":
            for i in range(place, min(place + rng.randint(1, 4), len(data))):
                data[i] = rng.choice((0, 255, data[i] ^ 1 << rng.randrange(8), rng.randrange(256)))
        elif fault == "cut":
            del data[place:]
        elif fault == "insert":
            data[place:place] = rng.randbytes(length)
        elif fault == "token":
            data[place : place + rng.choice((0, 1, 4))] = rng.choice(TOKENS)
        elif fault == "zero":
            data[place : place + length] = bytes(len(data[place : place + length]))
        else:
            data[place:place] = data[place : place + length]
    return bytes(data)


def mutate_member(data, rng):
    """A zip archive with one member mutated and its checksum right again."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        members = old.infolist()
        weights = [8 if info.filename.endswith("data.pkl") else 1 for info in members]
        (victim,) = rng.choices(members, weights)
        for info in members:
            content = old.read(info)
            new.writestr(info.filename, mutate(content, rng) if info is victim else content)
    return result.getvalue()


# ------------------------------------------------------------------------------------------ readers
# Each reads a file as the scripts do and uses the result as they would; what that needs lies in the
# folder's parent.


def read_picture(path):
    square = datasets.resize_image(datasets.open_image(path, size=32), 32)
    assert square.shape == (3, 32, 32) and square.dtype == np.uint8


def read_hdf5(path):
    data = datasets.CaptionDataset(path)
    assert (
        data.images(slice(None)).shape
        == (len(data), 3, 32, 32)
        == data.images(range(len(data))).shape
    )
    assert len(data.references) == len(data)
    for scene in data.scenes:
        scenes.judge_caption(scene, ["red", "circle", "left", "star"])
        scenes.pointing(scene, ["red", "circle"], np.ones((2, 4)))
    data.check_word_map(datasets.load_word_map(path.parent.parent / "word_map.json"))
    datasets.collate(data, np.arange(len(data)))


def read_word_map(path):
    word_map = datasets.load_word_map(path)
    ids = datasets.encode_caption(["a", "zebra"], word_map, 5)
    assert len(datasets.decode_caption(ids, sorted(word_map, key=word_map.get))) <= 2


def read_captions(path):
    use(datasets.custom_records(path.parent.parent / "pictures", path, 0)[0])


def read_karpathy(path):
    use(datasets.custom_records(path.parent.parent / "pictures", path, 0)[0])


def read_archive(path):
    records, _ = datasets.custom_records(path, path.parent.parent / "captions.csv", 0)
    use(records)
    for record in records:
        try:
            assert np.array(record.image(32)).shape[2] == 3
        except utils.UserError as error:
            check_message(error)


def use(records):
    """Do with captions what writing an HDF5 file does, but for the pictures."""
    word_map = datasets.build_word_map(
        (datasets.tokenize(text) for record in records for text in record.captions), 1
    )
    for record in records:
        assert record.split in datasets.SPLITS
        for text in map(words_room.clean_caption, record.captions):
            text.encode()
            words = datasets.tokenize(text)
            ids = datasets.encode_caption(words, word_map, len(words))
            assert datasets.decode_caption(ids, list(word_map)) == words


def read_embeddings(path):
    vectors, _ = datasets.load_embeddings(path, {"<pad>": 0, "a": 1, "dog": 2}, 4)
    assert np.isfinite(vectors).all()


def read_store(path):
    import torch

    features = torch.from_numpy(datasets.encode_split(range(6), None, path))
    assert len(features) == 6 and features[torch.arange(6)].ndim == 3


def read_checkpoint(path):
    import torch

    import models

    models.Encoder = tiny_encoder(torch)
    captioner = models.load_captioner(path, word_map=None)
    pictures = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for best, *_ in captioner.caption(pictures, beam_size=2, max_decode_steps=5):
        captioner.text(best)


def tiny_encoder(torch):
    """In place of a CNN, whose weights would make every checkpoint one of 45 MB."""

    class Encoder(torch.nn.Module):
        def __init__(self, name, weights):
            super().__init__()
            if name != "resnet18":
                raise utils.UserError(f"unknown encoder {name!r}")
            self.cnn = torch.nn.Conv2d(3, 6, 4, 4)

        def forward(self, images):
            return self.cnn(images.float()).flatten(2).transpose(1, 2)

    return Encoder


def check_message(error):
    assert str(error).isprintable() and 10 < len(str(error)) <= 1000, repr(str(error))


def main(folders):
    """Read every file of the folders, each with the reader that its folder is called by."""
    for path in (path for folder in folders for path in sorted(Path(folder).iterdir())):
        print(path, end=": ", flush=True)
        try:
            READERS[path.parent.name.partition("-")[0]](path)
            print("result")
        except utils.UserError as error:
            check_message(error)
            print("refused")


READERS = {
    "picture": read_picture,
    "hdf5": read_hdf5,
    "wordmap": read_word_map,
    "captions": read_captions,
    "karpathy": read_karpathy,
    "archive": read_archive,
    "embeddings": read_embeddings,
    "store": read_store,
    "checkpoint": read_checkpoint,
}


# -------------------------------------------------------------------------------------- whole files


def make_picture(seed=0, width=40, height=30):
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Whole files to mutate: kind -> list of (suffix, bytes); and the folder of the rest."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "pictures").mkdir()
    names = [f"{i:02d}.jpg" for i in range(6)]
    for i, name in enumerate(names):
        make_picture(i).save(folder / "pictures" / name)
    rows = [
        (name, text)
        for name in names
        for text in ("A dog runs on grass.", "The dog, it runs", "É 漢字 dog")
    ]
    texts = {
        ".csv": "image,caption,split\n"
        + "".join(f'{name},"{text}",train\r\n' for name, text in rows),
        ".jsonl": "\n".join(
            json.dumps({"image": name, "captions": [text, "a"], "split": "val"})
            for name, text in rows
        ),
        ".txt": "\n".join(f"{name}#{i % 3}\t{text}" for i, (name, text) in enumerate(rows)),
        ".json": json.dumps([{"file_name": name, "text": [text]} for name, text in rows]),
        ".bars": "image_name| comment_number| comment\n"
        + "\n".join(f"{name}| {i % 3}| {text}" for i, (name, text) in enumerate(rows)),
        ".coco": json.dumps(
            {
                "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
                "annotations": [
                    {"image_id": i % 6, "caption": text} for i, (_, text) in enumerate(rows)
                ],
            }
        ),
    }
    (folder / "captions.csv").write_text(texts[".csv"], encoding="utf-8")
    karpathy = {
        "dataset": "own",
        "images": [
            {
                "filename": name,
                "filepath": "pictures",
                "split": "restval",
                "sentences": [{"raw": text}, {"tokens": ["a"]}],
            }
            for name, text in rows[::3]
        ],
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as pictures:
        for name in names:
            pictures.write(folder / "pictures" / name, f"own/{name}")
    records, _ = datasets.shapes_records(6, 2, 2, seed=1, size=32)
    _, word_map = datasets.write_dataset(
        folder / "data",
        records,
        dataset="shapes",
        source="generated",
        max_len=20,
        min_word_freq=1,
        image_size=32,
    )
    name = datasets.base_name("shapes", 5, 1)
    files_room.write_json(folder / "word_map.json", word_map)
    store = io.BytesIO()
    np.save(store, np.random.default_rng(0).random((6, 4, 8)).astype(np.float16))
    return folder, {
        "picture": [(".jpg", data) for data in whole_pictures()],
        "hdf5": [(".hdf5", datasets.split_path(folder / "data", "train", name).read_bytes())],
        "wordmap": [(".json", datasets.word_map_path(folder / "data", name).read_bytes())],
        "captions": [(suffix, text.encode()) for suffix, text in texts.items()],
        "karpathy": [(".json", json.dumps(karpathy).encode())],
        "archive": [(".zip", archive.getvalue())],
        "embeddings": [(".txt", b"a 0.5 1 -2 3e-4\ndog 1 2 3 4\nzebra 0 0 0 0\n")],
        "store": [(".npy", store.getvalue())],
        "checkpoint": [(".tar", data) for data in whole_checkpoints(word_map)],
    }


def whole_pictures():
    image, exif = make_picture(), Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        yield encoded(image, kind, exif=exif)
    yield encoded(image, "TIFF", compression="tiff_lzw")
    yield encoded(image, "GIF", save_all=True, append_images=[make_picture(1)])
    yield encoded(image, "PNG", save_all=True, append_images=[make_picture(1)])
    yield encoded(image.quantize(16), "PNG", transparency=0)
    yield encoded(image, "BMP")
    yield encoded(image, "PPM")
    yield encoded(image.convert("CMYK"), "JPEG", progressive=True)
    yield encoded(Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11) * 600), "PNG")


def whole_checkpoints(word_map):
    """A checkpoint as train.py writes it, but of a few kilobytes; in both of torch's formats."""
    import torch

    import models

    config = {
        "encoder": "resnet18",
        "encoder_dim": 6,
        "attention_dim": 3,
        "embed_dim": 3,
        "decoder_dim": 4,
        "decoder": "gru",
        "attention": "soft",
        "encoded_image_size": 0,
        "deep_output": False,
        "position_encoding": False,
        "attend_word": False,
        "decoder_options": {},
        "dropout": 0.5,
        "embed_dropout": 0.0,
        "feature_dropout": 0.0,
        "image_size": 32,
        "data_name": "shapes",
        "fine_tune_encoder": False,
    }
    decoder = models.build_decoder(config, len(word_map))
    encoder = tiny_encoder(torch)("resnet18", "none")
    checkpoint = {
        "config": config,
        "word_map": word_map,
        "encoder": encoder.state_dict(),
        "decoder": decoder.state_dict(),
        "history": [{"epoch": 1, "BLEU-4": 1.0}],
    }
    for as_zip in (True, False):
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer, _use_new_zipfile_serialization=as_zip)
        yield buffer.getvalue()


# -------------------------------------------------------------------------------------------- files


def write_mutated(folder, kind, wholes, numbers):
    """Write whole files of a kind and mutated ones; each depends on its number alone."""
    folder = folder / f"{kind}-{numbers.start}"
    folder.mkdir()
    for i, (suffix, data) in enumerate(wholes):
        (folder / f"whole{i}{suffix}").write_bytes(data)
    for number in numbers:
        rng = random.Random(f"{kind}/{number}")
        suffix, data = wholes[number % len(wholes)]
        change = mutate_member if data[:2] == b"PK" and rng.random() < 0.6 else mutate
        (folder / f"{number:06d}{suffix}").write_bytes(change(data, rng))
    return folder


def read_in_a_process(folders, timeout):
    """Run :func:`main` on the folders in a process of its own; on a failure, name the file.

    :return: ``Counter`` of the outcomes of the mutated files: "result", "refused"
    """
    command = [sys.executable, "-B", "-W", "ignore", __file__, *folders]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"a hang while reading {(error.stdout or b'').decode().splitlines()[-1:]}")
    assert done.returncode == 0, (
        f"{done.stdout.splitlines()[-1:]}: code {done.returncode}\n{done.stderr[-3000:]}"
    )
    outcomes = [line.rpartition(": ")[::2] for line in done.stdout.splitlines()]
    # if whole files were refused, mutated ones would be, too, and hold nothing
    assert {outcome for path, outcome in outcomes if "/whole" in path} == {"result"}, done.stdout
    return Counter(outcome for path, outcome in outcomes if "/whole" not in path)


@pytest.mark.parametrize(
    "kinds, number",
    [
        (("picture", "hdf5", "wordmap", "captions", "karpathy", "archive", "embeddings"), 150),
        (("store", "checkpoint"), 80),
    ],
)
def test_a_damaged_file_gives_a_result_or_a_clear_error(kinds, number, wholes):
    folder, files = wholes
    outcomes = read_in_a_process(
        [write_mutated(folder, kind, files[kind], range(number)) for kind in kinds], 120
    )
    assert (
        outcomes.total() == number * len(kinds)
        and min(outcomes["result"], outcomes["refused"]) > number / 10
    )


MANY = {
    "picture": 6000,
    "hdf5": 3000,
    "wordmap": 2000,
    "captions": 3000,
    "karpathy": 1500,
    "archive": 1000,
    "embeddings": 1000,
    "store": 2000,
    "checkpoint": 3000,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MANY)
def test_many_damaged_files_give_results_or_clear_errors(kind, wholes):
    folder, files = wholes
    began, read = time.time(), Counter()
    for start in range(10**6, 10**6 + MANY[kind], 500):
        made = write_mutated(folder, kind, files[kind], range(start, start + 500))
        read += read_in_a_process([made], 300)
        shutil.rmtree(made)
    print(
        f"\n{kind}: {read.total():,} mutated files, {read['refused']:,} refused, "
        f"{time.time() - began:.0f} s"
    )
    assert read.total() == MANY[kind]


def test_mutations_are_many_and_of_every_sort():
    rng, data = random.Random(0), bytes(range(1, 200)) * 5
    made = [mutate(data, rng) for _ in range(300)]
    assert len(set(made)) > 280 and data not in made[:10]
    assert (
        min(map(len, made)) < 100
        and max(map(len, made)) > 1200
        and any(b"\0" * 30 in m for m in made)
    )


# ----------------------------------------------------------------------------------------- captions


@given(st.lists(st.text(max_size=40), max_size=8), st.integers(1, 3))
@example(
    [
        "\ufeffA\x00dog\r\n\u2028runs",
        "漢字 हिन्दी",
        "\ud800",
        "<start> <pad> <end> <unk>",
        "I\u0307 ǅ ß",
    ],
    1,
)
def test_any_caption_comes_back_from_its_ids(texts, min_word_freq):
    texts = [words_room.clean_caption(text) for text in texts]
    tokens = [datasets.tokenize(text) for text in texts]
    word_map = datasets.build_word_map(tokens, min_word_freq)
    words = list(word_map)
    for text, caption in zip(texts, tokens):
        assert "\n" not in text and text.encode().decode() == text  # one line, and valid Unicode
        ids = datasets.encode_caption(caption, word_map, len(caption) + 1)
        assert datasets.decode_caption(ids, words) == [
            w if w in word_map else datasets.UNK for w in caption
        ]
        assert len(ids) == len(caption) + 3


# -------------------------------------------------------------------------------------------- flags

SCRIPTS = ("create_input_files", "train", "eval", "caption")
# what keeps a script from working for long if all its flags are sound: it finds nothing to read
IDLE = {
    "create_input_files": ["--source", "nowhere"],
    "train": ["--data_folder", "."],
    "eval": ["--model", "nowhere.pth.tar"],
    "caption": ["--model", "nowhere.pth.tar", "--img", "nowhere.jpg"],
}


def flags_of(script):
    """A script's flags, but for those that IDLE holds and those that do something else."""
    parser = importlib.import_module(script).get_args_parser()
    return [
        action
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
        and not {*action.option_strings} & {*IDLE[script]}
    ]


def values_of(action):
    """Strategy of a flag with its value or values, as on a command line."""
    # bytes that are no UTF-8 come from a shell as these surrogates, and no others can
    letters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
    escaped = st.characters(categories=["Cs"], min_codepoint=0xDC80, max_codepoint=0xDCFF)
    text = st.text(letters | escaped, max_size=12)
    number = st.integers(-2, 9).map(str) | st.integers().map(str) | st.floats().map(str)
    value = (
        number
        if action.type in (int, float)
        else st.sampled_from(["../x", "/", "x" * 5000, "nowhere"]) | text
    )
    value = st.sampled_from(list(action.choices)) | text if action.choices else value | text
    few = (
        st.just([])
        if action.nargs == 0
        else st.lists(value, min_size=1, max_size=3 if action.nargs == "+" else 1)
    )
    return few.map(lambda values: [action.option_strings[0], *values])


@pytest.mark.parametrize("script", SCRIPTS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_flags_end_in_one_line_and_nothing_is_written(
    script, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    chosen = data.draw(
        st.lists(
            st.sampled_from(flags_of(script)), max_size=2, unique_by=lambda action: action.dest
        )
    )
    argv = list(itertools.chain(*(data.draw(values_of(action)) for action in chosen), IDLE[script]))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    monkeypatch.setattr(machine, "busy_cores", lambda: 0.0)  # which takes a tenth of a second
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        utils.run(module.main, module.get_args_parser())
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in errors, argv
    last = errors.rstrip("\n").rsplit("\n", 1)[-1]
    assert re.match(rf"{script}\.py: error: ..........", last), (
        errors
    )  # argparse prints the usage before it
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    main(sys.argv[1:])
