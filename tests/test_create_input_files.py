"""Preparing a data set as a user does: flags, downloads, running twice, what is printed."""

import argparse
import hashlib
import http.server
import io
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import make_picture
from helpers import make_flickr8k
from PIL import Image

import create_input_files
import datasets
from captioning.data import downloads
from captioning.run import paths

ROOT = Path(create_input_files.__file__).parent


def prepare(*flags, size=32):
    """Run the script's ``main`` in this process; a size of None leaves the flag out."""
    flags = [*map(str, flags), "--min_word_freq", "1"]
    flags += ["--image_size", str(size)] if size else []
    create_input_files.main(create_input_files.get_args_parser().parse_args(flags))


def state(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_own_data_from_flags_to_files(own_data, tmp_path, capsys):
    images, captions = own_data
    (images / "05.jpg").write_bytes(b"no picture")
    out = tmp_path / "out folder"
    prepare("--dataset", "mine", "--images", images, "--captions", captions, "--data_folder", out)
    printed = capsys.readouterr().out
    name = datasets.base_name("mine", 5, 1)
    assert {path.name for path in out.iterdir()} == {
        f"TRAIN_{name}.hdf5",
        f"VAL_{name}.hdf5",
        f"TEST_{name}.hdf5",
        f"WORDMAP_{name}.json",
        f"CONTACT_SHEET_{name}.png",
    }
    train = datasets.CaptionDataset(datasets.split_path(out, "train", name))
    assert len(train) == 17 and "05.jpg" not in train.image_names
    assert train.attributes["source"].startswith("captions.csv (SHA-256 ")
    assert (train.attributes["image_size"], train.scenes) == (32, None)
    assert (
        "05.jpg" in printed and "Vocabulary:" in printed and f"CONTACT_SHEET_{name}.png" in printed
    )
    sheet = np.asarray(Image.open(paths.contact_sheet_path(out, name)).convert("RGB"))
    assert sheet.std() > 20 and min(sheet.shape[:2]) > 500


def test_contact_sheet_of_any_captions(own_data, tmp_path):
    images, captions = own_data
    odd = ["$x^2$ \\alpha_{", "漢字 हिन्दी عربى", "word " * 60, "w" * 300]
    captions.write_text(
        "image,caption,split\n"
        + "".join(
            f'{i:02d}.jpg,"{text}",{split}\n'
            for i, split in enumerate(datasets.SPLITS)
            for text in odd
        ),
        encoding="utf-8",
    )
    prepare(
        "--dataset",
        "odd",
        "--images",
        images,
        "--captions",
        captions,
        "--data_folder",
        tmp_path / "out",
    )
    assert (
        paths.contact_sheet_path(tmp_path / "out", datasets.base_name("odd", 5, 1)).stat().st_size
        > 10_000
    )


@pytest.mark.parametrize(
    "caption, message",
    [
        ("", "no word of the training captions"),
        ("?!, - '…'", "no word of the training captions"),
        ("dog " * 500, "check the captions and --max_len"),
        ("\x00\x07\u200b", "no word of the training captions"),
    ],
)
def test_captions_that_cannot_be_used_end_in_one_line(caption, message, own_data, tmp_path, fails):
    images, captions = own_data
    captions.write_text(
        "image,caption\n" + "".join(f'{i:02d}.jpg,"{caption}"\n' for i in range(20)),
        encoding="utf-8",
    )
    with fails(message):
        prepare(
            "--dataset",
            "mine",
            "--images",
            images,
            "--captions",
            captions,
            "--data_folder",
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()  # a failure leaves no empty folder


def test_a_folder_without_pictures_is_named(own_data, tmp_path, fails):
    (tmp_path / "none").mkdir()
    with fails("20 of 20 pictures are missing in .*none"):
        prepare(
            "--dataset",
            "mine",
            "--images",
            tmp_path / "none",
            "--captions",
            own_data[1],
            "--data_folder",
            "out",
        )


def test_no_name_of_a_picture_leads_out_of_the_data_folder(tmp_path):
    rows = ["image,caption,split"]
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "own.zip", "w") as archive:
        for i, split in enumerate(("train", "val", "test")):
            archive.writestr(f"../../{i}.png", picture_bytes(i))
            rows.append(f"../../{i}.png,a dog,{split}")
    (tmp_path / "in" / "own.csv").write_text("\n".join(rows), encoding="utf-8")
    prepare(
        "--dataset",
        "own",
        "--images",
        tmp_path / "in" / "own.zip",
        "--captions",
        tmp_path / "in" / "own.csv",
        "--data_folder",
        tmp_path / "a" / "out",
    )
    assert {path.name for path in tmp_path.iterdir()} == {"a", "in"} and len(
        list((tmp_path / "a").iterdir())
    ) == 1
    assert len(list((tmp_path / "a" / "out").iterdir())) == 5


def picture_bytes(seed):
    buffer = io.BytesIO()
    Image.fromarray(make_picture(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def test_flickr8k_is_read_in_place(tmp_path):
    source = make_flickr8k(tmp_path / "source")
    before = state(source)
    prepare("--source", source, "--data_folder", tmp_path / "out")
    assert state(source) == before
    val = datasets.CaptionDataset(
        datasets.split_path(tmp_path / "out", "val", datasets.base_name("flickr8k", 5, 1))
    )
    assert val.image_names == ["06_ab.jpg", "07_ab.jpg"] and val.captions.shape == (10, 52)


@pytest.mark.parametrize("is_named", [True, False])
def test_lists_of_the_official_split_that_came_later_are_noticed(is_named, tmp_path, capsys, fails):
    """As the note of the first run says, which dealt the pictures out."""
    source = make_flickr8k(tmp_path / "source")
    out = tmp_path / "out" if is_named else source  # --data_folder is searched without --source
    text = shutil.move(source / "Flickr8k_text.zip", tmp_path / "kept.zip")
    rows = (f"{i:02d}_ab.jpg,a dog runs" for i in range(10))
    (source / "captions.txt").write_text("\n".join(["image,caption", *rows]))
    flags = [*(["--source", source] if is_named else []), "--data_folder", out]
    prepare(*flags)
    assert "for the official split put Flickr8k_text.zip" in "".join(capsys.readouterr())
    prepare(*flags)
    assert "already" in capsys.readouterr().out
    shutil.move(text, source / "Flickr8k_text.zip")
    with fails("made with source Flickr8k, split by seed, not .*official split; give --force"):
        prepare(*flags)
    for path in source.glob("Flickr8k_*"):  # what is gone is not asked for
        path.unlink()
    prepare(*flags)


def test_second_run_stops_and_force_gives_the_same_bytes(own_data, tmp_path, capsys, fails):
    flags = [
        "--dataset",
        "mine",
        "--images",
        own_data[0],
        "--captions",
        own_data[1],
        "--data_folder",
        tmp_path / "out",
    ]
    prepare(*flags)
    before = state(tmp_path / "out")
    capsys.readouterr()
    prepare(*flags)
    assert "already" in capsys.readouterr().out and state(tmp_path / "out") == before
    with fails("was made with image_size 32, not 48; give --force"):
        prepare(*flags, size=48)
    original = own_data[1].read_bytes()
    own_data[1].write_bytes(original + b"\n")
    with fails("was made with source .*SHA-256.*give --force"):
        prepare(*flags)
    own_data[1].write_bytes(original)
    prepare(*flags, "--force", "--workers", 7)
    after = state(tmp_path / "out")
    assert {name: data for name, (_, data) in after.items()} == {
        name: data for name, (_, data) in before.items()
    }
    assert all(after[name][0] != before[name][0] for name in after)
    path = datasets.split_path(tmp_path / "out", "test", datasets.base_name("mine", 5, 1))
    path.write_bytes(path.read_bytes()[:5000])
    with fails("--force"):
        prepare(*flags)


def test_a_crawl_with_bad_pictures_names_them_all_and_goes_on_where_told(tmp_path, capsys, fails):
    folder, out = tmp_path / "crawl", tmp_path / "out"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i:03d}.png").write_bytes(picture_bytes(i) if i % 10 else b"<html>")
    rows = "".join(f"{i:03d}.png,a dog\n" for i in range(313))  # 13 are missing, 30 are broken
    (tmp_path / "c.csv").write_text(f"image,caption\n{rows}")
    flags = ["--dataset", "mine", "--images", folder, "--captions", tmp_path / "c.csv"]
    flags += ["--data_folder", out]
    name = datasets.base_name("mine", 5, 1)
    with fails(
        f"13 of 313 pictures are missing .*'300.png', .*{name}.txt names all 13 .*--skip_bad"
    ):
        prepare(*flags)
    (listed,) = out.iterdir()
    assert listed.name == f"LEFT_OUT_{name}.txt"
    assert [line.split("\t")[0] for line in listed.read_text().splitlines()] == [
        f"{i}.png" for i in range(300, 313)
    ]
    (tmp_path / "c.csv").write_text("".join(f"image,caption\n{rows}".splitlines(True)[:301]))
    with fails(r"\d+ of \d+ pictures of train cannot be read, such as '\d\d0.png'.* names all 30 "):
        prepare(*flags)
    assert [path.name for path in out.iterdir()] == [listed.name]
    lines = dict(line.split("\t") for line in listed.read_text().splitlines())
    assert sorted(lines) == [f"{i:03d}.png" for i in range(0, 300, 10)]
    assert "000.png as a picture: not in a known format" in lines["000.png"]
    (tmp_path / "c.csv").write_text(f"image,caption\n{rows}")
    capsys.readouterr()
    prepare(*flags, "--skip_bad_pictures")
    assert f"Note: {listed} names all 43 that are lost." in capsys.readouterr().out
    assert len(listed.read_text().splitlines()) == 43
    splits = [datasets.split_path(out, split, name) for split in datasets.SPLITS]
    assert sum(len(datasets.CaptionDataset(path)) for path in splits) == 270
    for i in range(0, 300, 10):
        (folder / f"{i:03d}.png").write_bytes(picture_bytes(i))
    (tmp_path / "c.csv").write_text("".join(f"image,caption\n{rows}".splitlines(True)[:301]))
    prepare(*flags, "--force")
    assert not listed.exists()  # nothing is lost any more


def test_captions_that_were_edited_in_a_folder_are_noticed(tmp_path, capsys, fails):
    (tmp_path / "p").mkdir()
    for i in range(10):
        (tmp_path / "p" / f"{i}.png").write_bytes(picture_bytes(i))
        (tmp_path / "p" / f"{i}.txt").write_text("a dog")
    flags = ["--dataset", "mine", "--images", tmp_path / "p", "--data_folder", tmp_path / "out"]
    prepare(*flags)
    prepare(*flags)
    assert "already" in capsys.readouterr().out
    (tmp_path / "p" / "3.txt").write_text("a cat")
    with fails("was made with source p .SHA-256 .*, not p .SHA-256 .*give --force"):
        prepare(*flags)
    rows = "".join(f"{i}.png,a bird\n" for i in range(10))
    (tmp_path / "p" / "metadata.csv").write_text(f"file_name,text\n{rows}")
    prepare(*flags, "--force")
    prepare(*flags)
    (tmp_path / "p" / "metadata.csv").write_text(
        f"file_name,text\n{rows}".replace("3.png,a", "3.png,A")
    )
    with fails("was made with source p .SHA-256"):
        prepare(*flags)


def test_a_missing_file_is_made_again(own_data, tmp_path):
    flags = [
        "--dataset",
        "mine",
        "--images",
        own_data[0],
        "--captions",
        own_data[1],
        "--data_folder",
        tmp_path,
    ]
    prepare(*flags)
    path = datasets.word_map_path(tmp_path, datasets.base_name("mine", 5, 1))
    content = path.read_text()
    path.unlink()
    prepare(*flags)
    assert path.read_text() == content


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset", "../mine"], "--dataset '../mine'"),
        (["--dataset", "mine"], "give --images and --captions"),
        (["--dataset", "coco"], "needs --captions and --images.*dataset_coco.json"),
        (
            ["--dataset", "flikr8k"],
            "none of flickr8k, flickr30k, coco, shapes; did you mean flickr8k?",
        ),
        (["--dataset", "mine", "--captions", "c.csv"], "--captions needs --images"),
        (["--dataset", "mine", "--images", "i"], "--images needs"),
        (["--images", "i", "--captions", "c.csv"], "another name"),
        (
            ["--dataset", "mine", "--images", "i", "--captions", "c", "--source", "s"],
            "--source is for Flickr8k",
        ),
        (["--dataset", "shapes", "--source", "s"], "shapes takes no other data"),
        (
            ["--source", "nowhere"],
            "/nowhere is not the whole of Flickr8k: expected",
        ),
        (
            ["--dataset", "mine", "--images", "nowhere", "--captions", "nowhere.csv"],
            "there is no folder and no zip archive /.*nowhere",
        ),
        (
            ["--dataset", "coco", "--images", "nowhere", "--karpathy_json", "no.json"],
            "there is no folder and no zip archive /.*nowhere",
        ),
    ],
)
def test_wrong_flags_end_in_one_line_and_write_nothing(
    flags, message, tmp_path, fails, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with fails(message):
        prepare(*flags)
    assert not list(tmp_path.iterdir())


def test_disk_that_is_too_small_is_seen_first(tmp_path, fails, monkeypatch):
    disk = argparse.Namespace(free=5 * 10**8, total=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    with fails("needs 1.12GB, but its disk has 500MB free"):
        prepare("--data_folder", tmp_path)


def test_command_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "create_input_files.py", "--source", tmp_path / "a b"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        result.returncode == 2
        and result.stderr.count("\n") == 1
        and "Traceback" not in result.stderr
    )
    result = subprocess.run(
        [sys.executable, "create_input_files.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Flickr8k" in result.stdout


def test_each_form_of_data_takes_one_command(tmp_path, capsys):
    for i in range(10):
        for folder in ("Images", "train2014"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{i}.jpg").write_bytes(picture_bytes(i))
    rows = [f"{i}.jpg,a dog runs" for i in range(10)]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *rows]))
    metadata = "\n".join(["file_name,text", *rows])
    (tmp_path / "Images" / "metadata.csv").write_text(metadata)
    coco = {
        "images": [{"file_name": f"{i}.jpg", "id": 900 + i} for i in range(10)],
        "annotations": [{"image_id": 900 + i, "caption": "a dog"} for i in range(10)],
    }
    (tmp_path / "captions_train2014.json").write_text(json.dumps(coco))
    for flags in (
        ["--dataset", "Flickr8k", "--source", tmp_path],
        ["--dataset", "folder", "--images", tmp_path / "Images"],
        [
            *("--dataset", "coco", "--captions", tmp_path / "captions_train2014.json"),
            *("--images", tmp_path / "train2014"),
        ],
    ):
        prepare(*flags, "--data_folder", tmp_path / "out")
        said = capsys.readouterr().out
        assert "as 8 train, 1 val, 1 test" in said and " words and 4 special tokens" in said
        name = datasets.base_name(flags[1].lower(), 5, 1)
        train = datasets.CaptionDataset(datasets.split_path(tmp_path / "out", "train", name))
        assert len(train) == 8 and (train.image_ids[0] is None) == (flags[1] != "coco")
        assert ("split by seed" in train.attributes["source"]) == (flags[1] == "Flickr8k")
        prepare(*flags, "--data_folder", tmp_path / "out")
        assert "already" in capsys.readouterr().out


def test_a_vocabulary_that_misses_many_words_is_a_warning(own_data, tmp_path, capsys):
    images, captions = own_data
    rows = [f"{i:02d}.jpg,word{i} other{i} dog" for i in range(20)]
    captions.write_text("\n".join(["image,caption", *rows]))
    flags = ["--dataset", "mine", "--images", images, "--captions", captions, "--data_folder"]
    args = create_input_files.get_args_parser().parse_args([*map(str, flags), str(tmp_path / "o")])
    create_input_files.main(args)
    said = capsys.readouterr().out
    assert "67% of the words of the training captions are <unk>" in said
    assert "Vocabulary: 1 words and 4 special tokens" in said


def test_flickr8k_is_downloaded_and_prepared(tmp_path, monkeypatch):
    served = make_flickr8k(tmp_path / "served")
    handler = type(
        "Quiet",
        (http.server.SimpleHTTPRequestHandler,),
        {
            "log_message": lambda *_: None,
            "__init__": lambda self, *args: http.server.SimpleHTTPRequestHandler.__init__(
                self, *args, directory=served
            ),
        },
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    archives = {
        path.name: (hashlib.md5(path.read_bytes()).hexdigest(), path.stat().st_size)
        for path in served.iterdir()
    }
    monkeypatch.setattr(
        downloads.download,
        "__defaults__",
        (f"http://127.0.0.1:{server.server_port}/", archives, 5, 2, 0.01),
    )
    try:
        prepare("--data_folder", tmp_path / "out")
    finally:
        server.shutdown()
        server.server_close()
    name = datasets.base_name("flickr8k", 5, 1)
    assert len(datasets.CaptionDataset(datasets.split_path(tmp_path / "out", "train", name))) == 6
