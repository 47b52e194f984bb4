"""What several test files need: pictures, captions, a vocabulary, a data set, a trained model."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from captioning.run.lazy import lazy

# the models here are so small that threads wait for each other longer than one alone works; read by
# OpenMP when torch is loaded, and by the scripts that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")

# so that a package that is not installed stops the tests that need it, and not this file
np, torch, Image = lazy("numpy", "torch", "PIL.Image")
caption, datasets, models, train, utils = lazy("caption", "datasets", "models", "train", "utils")
files, paths = lazy("files", "paths", within="captioning.run")

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image"}  # of packages with another name


def required(path):
    """The names in a list of requirements, as they are imported or as in ``DISTRIBUTIONS``."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    found = (re.match(r"[\w.-]+", line) for line in lines)
    return {name[0].lower().replace("_", "-") for name in found if name}


def skipped_if_a_requirement_is_missing(report, where, error):
    """A report of pytest; a test or file that fails for want of a required package is skipped."""
    while error and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__ or error.__context__
    package = (getattr(error, "name", None) or "").partition(".")[0]
    name = DISTRIBUTIONS.get(package, package).lower().replace("_", "-")
    if report.failed and name in required("requirements.txt") | required("tests/requirements.txt"):
        report.outcome = "skipped"
        report.longrepr = (str(where.path), 0, f"needs the package {name}, which is not installed")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    error = report.call.excinfo and report.call.excinfo.value
    return skipped_if_a_requirement_is_missing(report, collector, error)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    error = call.excinfo and call.excinfo.value
    return skipped_if_a_requirement_is_missing(report, item, error)


@pytest.fixture(autouse=True)
def fresh_notes():
    """A note is said once in a process, and each test is a process of its own to what it tests."""
    utils.note.cache_clear()


@pytest.fixture
def word_map():
    """A vocabulary of six words."""
    words = ("a", "dog", "runs", "on", "the", "grass")
    return {
        word: i
        for i, word in enumerate([datasets.PAD, *words, datasets.UNK, datasets.START, datasets.END])
    }


def make_picture(seed, width=48, height=36):
    """A smooth coloured picture, uint8 (height, width, 3), of its own for each seed."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def picture():
    """Function of a seed: a small picture as uint8 (height, width, 3)."""
    return make_picture


@pytest.fixture
def own_data(tmp_path):
    """Twenty JPEG pictures in a folder, and three captions of each with splits, as CSV.

    :return: (folder of pictures, CSV file)
    """
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = ["image,caption,split"]
    for i in range(20):
        Image.fromarray(make_picture(i)).save(folder / f"{i:02d}.jpg", quality=95)
        split = {18: "val", 19: "test"}.get(i, "train")
        texts = (f"A dog runs on grass {i}.", '"The dog, it runs"', "A grass")
        rows += [f"{i:02d}.jpg,{text},{split}" for text in texts]
    captions = tmp_path / "captions.csv"
    captions.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder, captions


def write_shapes(folder, counts, size):
    """Prepare generated pictures, all words kept; return (folder, name)."""
    records, _ = datasets.shapes_records(*counts, seed=1, size=size)
    settings = {"min_word_freq": 1, "max_len": 20, "image_size": size, "seed": 1}
    datasets.write_dataset(folder, records, dataset="shapes", source="generated", **settings)
    return folder, datasets.base_name("shapes", 5, 1)


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory):
    """A shapes data set: 24 / 6 / 6 pictures of 64 pixels, all words kept. Do not write into it.

    :return: (folder, name)
    """
    return write_shapes(tmp_path_factory.mktemp("shapes"), (24, 6, 6), size=64)


@pytest.fixture
def shapes_train(shapes_data):
    """Training split of the small shapes data set, opened anew."""
    folder, name = shapes_data
    return datasets.CaptionDataset(datasets.split_path(folder, "train", name))


@pytest.fixture
def shapes_word_map(shapes_data):
    """Word map of the small shapes data set."""
    return datasets.load_word_map(datasets.word_map_path(*shapes_data))


@pytest.fixture
def write_bad_json(tmp_path):
    """Function of a value: the path of a JSON file that holds it."""

    def write(value):
        path = tmp_path / "value.json"
        path.write_text(json.dumps(value), encoding="utf-8")
        return path

    return write


@pytest.fixture
def fails():
    """``with fails("word")``: the block must end in a ``UserError`` of one line with the word."""

    def expect(match):
        return pytest.raises(utils.UserError, match=rf"\A[^\n]*{match}[^\n]*\Z")

    return expect


# -------------------------------------------------------------------------------------- tiny models


def build_decoder(vocab_size=10, **options):
    """A tiny decoder without dropout, built as train.py and checkpoints build it.

    :param options: what differs from train.py's flags and from the sizes here
    """
    config = vars(train.get_args_parser().parse_args([])) | dict.fromkeys(models.DROPOUTS, 0.0)
    config |= {"encoder_dim": 6, "attention_dim": 8, "embed_dim": 4, "decoder_dim": 7}
    config |= {"encoded_image_size": 0}
    assert options.keys() <= config.keys()
    return models.build_decoder(config | options, vocab_size)


def make_decoder(vocab_size=10, seed=0, scale=3.0, **options):
    """A tiny decoder in eval mode; ``scale`` makes its word choices distinct."""
    torch.manual_seed(seed)
    decoder = build_decoder(vocab_size, **options)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(scale * torch.empty_like(parameter).uniform_(-0.5, 0.5))
    return decoder.eval()


def train_args(data, output_folder, *flags):
    """Parsed flags of a training that takes a second.

    :param data: (folder, name), as ``shapes_data``
    :param flags: more flags, which win over those here
    """
    folder, name = data
    return train.get_args_parser().parse_args(
        [
            "--data_folder",
            str(folder),
            "--data_name",
            name,
            "--output_folder",
            str(output_folder),
            *TINY_TRAINING,
            *map(str, flags),
        ]
    )


TINY_TRAINING = [
    "--encoder",
    "resnet18",
    "--encoder_weights",
    "none",
    "--encoded_image_size",
    "0",
    "--attention_dim",
    "16",
    "--embed_dim",
    "16",
    "--decoder_dim",
    "32",
    "--batch_size",
    "8",
    "--epochs",
    "2",
    "--warmup",
    "2",
    "--learning_rate",
    "0.02",
    "--beam_size",
    "2",
    "--max_decode_steps",
    "12",
    "--workers",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture(scope="session")
def training_data(shapes_data, tmp_path_factory):
    """A copy of the small shapes data set in which feature stores may be written.

    :return: (folder, name)
    """
    folder, name = shapes_data
    copy = tmp_path_factory.mktemp("training") / "data"
    shutil.copytree(folder, copy)
    return copy, name


@pytest.fixture(scope="session")
def trained(training_data, tmp_path_factory):
    """Output folder of a tiny run of two epochs on ``training_data``. Do not write into it."""
    folder = tmp_path_factory.mktemp("trained")
    train.main(train_args(training_data, folder))
    return folder


@pytest.fixture(scope="session")
def best_checkpoint(trained, training_data):
    """Path of the tiny run's best checkpoint."""
    return paths.checkpoint_path(trained, training_data[1], best=True)


@pytest.fixture
def talkative(best_checkpoint, tmp_path):
    """Path of a checkpoint like the tiny run's, whose decoder says many different things."""
    path = tmp_path / "talkative" / best_checkpoint.name
    path.parent.mkdir()
    make_talkative(best_checkpoint, path)
    return path


def make_talkative(source, path):
    """Save a checkpoint with random weights in its decoder, which then says many things."""
    checkpoint = models.load_checkpoint(source)
    generator = torch.Generator().manual_seed(0)
    for weights in checkpoint["decoder"].values():
        weights.copy_(torch.rand(weights.shape, generator=generator) - 0.5)
    models.save_checkpoint(path, checkpoint)


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return models.Encoder("resnet18", "none")


def describe_args(model, *flags):
    """Parsed flags; later ones win."""
    given = ["--model", model, "--workers", 2, "--device", "cpu", "--max_decode_steps", 6]
    given += ["--output_folder", "out", "--json", "captions.json", *flags]
    return caption.get_args_parser().parse_args([str(flag) for flag in given])


@pytest.fixture
def describe(best_checkpoint, tmp_path, monkeypatch, capsys):
    """Function of flags: runs caption.py in an empty folder; returns (printed, its JSON)."""
    monkeypatch.chdir(tmp_path)
    utils.note.cache_clear()

    def run(*flags):
        caption.main(describe_args(best_checkpoint, *flags))
        return capsys.readouterr(), files.read_json("captions.json")

    return run
