"""Captioning pictures: which are found, what is said, drawn and refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import describe_args, make_picture
from helpers import save, written
from PIL import Image

import caption
import datasets
import models
import utils
from captioning.data import finding
from captioning.report import sheets
from captioning.run import files, messages, paths

SCRIPT = Path(caption.__file__)


@pytest.fixture
def exits():
    """``with exits(1)``: the block must end with this exit code."""

    class Exits:
        def __init__(self, code):
            self.code = code

        def __enter__(self):
            pass

        def __exit__(self, kind, error, _):
            assert kind is SystemExit and error.code == self.code
            return True

    return Exits


def test_a_picture_is_captioned_and_drawn(describe, best_checkpoint):
    path = save("pictures/photo.png")
    printed, (result,) = describe("--img", path)
    assert result["image"] == str(path) and "image_id" not in result
    (said,) = result["captions"]
    assert f"{path}: {said['caption']}  (log-probability {said['log_prob']:.2f}, sc" in printed.out
    assert written() == {"photo_attention.png"} and "written: captions.json" in printed.err
    with Image.open("out/photo_attention.png") as sheet:
        assert sheet.width > 200 and len(np.unique(np.asarray(sheet))) > 50

    captioner = models.load_captioner(best_checkpoint)
    square = datasets.resize_image(make_picture(0), 64)
    expected = captioner.caption(
        torch.from_numpy(square)[None], beam_size=5, length_penalty=0.7, max_decode_steps=6
    )[0][0]
    assert said["caption"].split() == captioner.text(expected)
    assert said["log_prob"] == pytest.approx(expected.log_prob, rel=1e-4)


def test_n_best_are_numbered_in_the_order_of_the_score_that_is_printed(describe):
    printed, (result,) = describe("--img", save("pictures/p.png"), "--n_best", 3, "--no_plot")
    captions = result["captions"]
    assert 1 < len(captions) <= 3 and len({c["caption"] for c in captions}) == len(captions)
    assert [c["score"] for c in captions] == sorted((c["score"] for c in captions), reverse=True)
    for number, c in enumerate(captions, 1):
        assert f"{number}. {c['caption']}  (log-probability {c['log_prob']:.2f}, " in printed.out
        assert f"score {c['score']:.3f})" in printed.out
        assert isinstance(c["ended"], bool)


def test_batches_change_nothing(describe):
    for i in range(5):
        save(f"pictures/{i}.png", i)
    _, one = describe("--img", "pictures", "--batch_size", 1, "--no_plot")
    _, many = describe("--img", "pictures", "--batch_size", 4, "--no_plot")
    assert [(r["image"], r["captions"][0]["caption"]) for r in one] == [
        (r["image"], r["captions"][0]["caption"]) for r in many
    ]


def test_the_consensus_of_the_training_data_can_be_asked(describe, talkative, training_data, fails):
    path = save("pictures/photo.png")
    flags = ["--model", talkative, "--img", path, "--length_penalty", 1, "--n_best", 5]
    _, (plain,) = describe(*flags)
    _, (chosen,) = describe(*flags, "--consensus", 3, "--data_folder", training_data[0])
    scores = [
        {said["caption"]: said["score"] for said in result["captions"]}
        for result in (plain, chosen)
    ]
    assert set(scores[0]) == set(scores[1])
    assert list(scores[1].values()) == sorted(scores[1].values(), reverse=True)
    captioner = models.load_captioner(talkative)
    known = datasets.CaptionDataset(paths.split_path(training_data[0], "train", training_data[1]))
    consensus = models.Consensus.of([captioner], known, weight=3, workers=1)
    square = torch.from_numpy(datasets.resize_image(make_picture(0), 64))[None]
    expected = captioner.caption(
        square,
        beam_size=5,
        n_best=5,
        length_penalty=1,
        max_decode_steps=6,
        consensus=consensus,
        no_repeat=True,
    )[0]
    assert [said["score"] for said in chosen["captions"]] == pytest.approx(
        [h.score for h in expected], rel=1e-4
    )
    assert any(scores[1][words] > score for words, score in scores[0].items())
    with fails("TRAIN_.*hdf5"):
        describe(*flags, "--consensus", 3)
    checkpoint = models.load_checkpoint(talkative)
    checkpoint["config"]["data_name"] = ""
    models.save_checkpoint(talkative, checkpoint)
    with fails("does not say on what it was trained"):
        describe(*flags, "--consensus", 3, "--data_folder", training_data[0])


def test_the_consensus_uses_the_arithmetic_of_the_training(describe, talkative, training_data):
    checkpoint = models.load_checkpoint(talkative)
    checkpoint["config"]["amp"] = False
    models.save_checkpoint(talkative, checkpoint)
    before = sorted(training_data[0].iterdir())
    flags = ["--img", save("pictures/p.png"), "--consensus", 3, "--data_folder", training_data[0]]
    describe("--model", talkative, *flags, "--amp")
    assert sorted(training_data[0].iterdir()) == before  # the features of the training served


def test_a_coco_file_name_gives_its_id(describe):
    names = ("COCO_val2014_000000391895.jpg", "000000000042.png", "2950905787_f2017d3e49.jpg")
    _, results = describe("--img", *(save(f"pictures/{name}") for name in names), "--no_plot")
    assert [result.get("image_id") for result in results] == [391895, 42, None]


def test_a_folder_of_a_run_stands_for_its_best_checkpoint(describe, trained):
    _, by_folder = describe("--img", save("pictures/p.png"), "--model", trained)
    _, by_file = describe("--img", "pictures/p.png")
    assert by_folder == by_file


def test_what_a_folder_holds_beside_pictures_is_counted_by_kind(describe, monkeypatch):
    monkeypatch.setattr(finding, "learn_heic", lambda: False)  # even if the package is there
    names = ["a.avif", "b.jfif", "c.jp2", "d.png", "sub/e.png"]
    for name in names:
        save(Path("pictures") / name)
    for name in ("1.heic", "2.heic", "notes.txt", "LICENSE", ".hidden.png", "data.h5"):
        Path("pictures", name).write_text("no picture")
    Path("pictures/d_attention.png").write_bytes(Path("pictures/d.png").read_bytes())
    printed, results = describe("--img", "pictures", "--no_plot")
    assert [Path(result["image"]).name for result in results] == names[:4]
    (note,) = [line for line in printed.err.splitlines() if "skipped" in line]
    parts = ["2 .heic", "1 .txt", "1 without an ending", "1 hidden file", "1 attention drawing"]
    for part in (*parts, "1 .h5", "1 sub-folder", "(see --recursive for sub-folders; for HEIC:"):
        assert re.search(rf"{re.escape(part)}(,|$| )", note), part
    _, results = describe("--img", "pictures", "--no_plot", "--recursive")
    assert [Path(result["image"]).name for result in results] == ["e.png", *names[:4]][1:] + [
        "e.png"
    ]


def test_a_second_run_into_the_same_folder_does_not_caption_its_own_drawings(describe):
    save("pictures/photo.png")
    for pattern in ("pictures", "pictures/*"):
        _, results = describe("--img", pattern, "--gif", "--output_folder", "pictures")
        assert [result["image"] for result in results] == ["pictures/photo.png"]
    names = {path.name for path in Path("pictures").iterdir()}
    assert names == {"photo.png", "photo_attention.png", "photo_attention.gif"}


@pytest.mark.parametrize("folder", ["set [2020]", "a*b"])
def test_brackets_and_stars_of_names_that_exist_are_no_patterns(folder, describe):
    save(f"pictures/{folder}/a.png")
    save("pictures/set 2/b.png")
    save("pictures/axb/c.png")
    _, results = describe("--img", f"pictures/{folder}/*.png", "--no_plot")
    assert [Path(result["image"]).name for result in results] == ["a.png"]


@pytest.mark.parametrize("pattern", ["missing.png", "missing/*.png", "empty", "x" * 300, "a\0b"])
def test_what_matches_nothing_is_named(pattern, describe, fails, tmp_path):
    (tmp_path / "empty").mkdir()
    with fails(f"--img {re.escape(messages.printable(pattern))}: "):
        describe("--img", pattern)


def test_a_folder_with_other_files_alone_says_what_they_are(describe, fails, monkeypatch):
    Path("pictures/sub").mkdir(parents=True)
    Path("pictures/1.heic").write_text("")
    monkeypatch.setattr(finding, "learn_heic", lambda: False)  # even if the package is there
    with fails("without pictures, skipped: 1 .heic, 1 sub-folder .*; for HEIC: .*pillow-heif"):
        describe("--img", "pictures")


@pytest.mark.parametrize(
    "name",
    [
        "a b.png",
        "it's.png",
        'say "cheese".png',
        "Straße_漢字.png",
        "[1].png",
        "100%.png",
        "-x.png",
        "two.dots.png",
        "🐕.png",
        "{0}.png",
        "~.png",
        "x" * 200 + ".png",
        "x" * 251 + ".png",
        "🐕" * 62 + ".png",
        "two\nlines\x1b[2J.png",
    ],
)
def test_any_name_will_do(name, describe):
    path = save(Path("pictures") / name)
    printed, (result,) = describe("--img", path)
    assert result["image"] == str(path) and messages.printable(path) in printed.out
    assert printed.out.count("\n") == 2 and printed.out.replace("\n", "").isprintable()
    (sheet,) = written()
    assert sheet.endswith("_attention.png")
    if not set(name) & set('"\n') and len(name.encode()) < 210:
        assert sheet == f"{path.stem}_attention.png"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text_will_do(describe):
    save("pictures/x.png")
    os.rename(b"pictures/x.png", b"pictures/caf\xe9.png")
    _, results = describe("--img", "pictures")
    assert len(results) == 1 and len(written()) == 1


def test_odd_pictures_are_captioned_and_drawn(describe):
    save("pictures/one.png", 0, 1, 1)
    save("pictures/wide.png", 0, 20_000, 30)
    save("pictures/high.png", 0, 30, 20_000)
    Image.fromarray(make_picture(0)).save("pictures/wrong_extension.jpg", "PNG")
    frames = [Image.fromarray(make_picture(i)) for i in range(3)]
    frames[0].save("pictures/moving.gif", save_all=True, append_images=frames[1:])
    for mode in ("1", "L", "LA", "RGBA", "P"):
        frames[0].convert(mode).save(f"pictures/mode_{mode}.png")
    frames[0].convert("CMYK").save("pictures/mode_CMYK.jpg")
    _, results = describe("--img", "pictures")
    assert len(results) == len(written()) == 11


def test_an_unreadable_picture_is_named_the_others_captioned_and_the_exit_code_is_1(
    describe, exits, capsys
):
    good = [save(f"pictures/{i}.png", i) for i in (1, 3)]
    Path("pictures/2.png").write_bytes(good[0].read_bytes()[:200])
    Path("pictures/4.png").write_bytes(b"")
    with exits(1):
        describe("--img", "pictures", "--batch_size", 1)
    err, results = capsys.readouterr().err, files.read_json("captions.json")
    assert [result["image"] for result in results] == [str(path) for path in good]
    assert "pictures/2.png" in err and "pictures/4.png" in err
    assert "2 of 4 pictures could not be read" in err
    assert written() == {"1_attention.png", "3_attention.png"}


def test_none_readable_is_exit_code_2_and_writes_nothing(describe, exits, capsys):
    Path("pictures").mkdir()
    Path("pictures/1.png").write_text("404")
    with exits(2):
        describe("--img", "pictures")
    assert "1 of 1 pictures could not be read" in capsys.readouterr().err
    assert not Path("captions.json").exists() and not Path("out").exists()


def test_a_page_comes_without_drawings_unless_another_flag_asks_for_them(
    best_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = save("pictures/photo.png")
    for flags, drawn in {
        ("--html", "page.html"): False,
        ("--html", "page.html", "--output_folder", "out"): True,
        ("--html", "page.html", "--gif"): True,
        (): True,
        ("--html", "page.html", "--no_plot"): False,
    }.items():
        argv = ["--model", best_checkpoint, "--img", str(path), "--device", "cpu", *flags]
        args = caption.get_args_parser().parse_args(list(map(str, argv)))
        caption.main(args)
        folder = args.output_folder
        assert (folder / "photo_attention.png").exists() == drawn, flags
        assert Path("page.html").exists()
        shutil.rmtree(folder, ignore_errors=True)


def test_what_is_done_is_in_the_json_file_if_the_rest_fails(describe, monkeypatch):
    for i in range(3):
        save(f"pictures/{i}.png", i)
    draw, calls = sheets.draw, []

    def fails_late(*args):
        calls.append(args)
        if len(calls) == 3:
            raise utils.UserError("the disk is full")
        draw(*args)

    monkeypatch.setattr(sheets, "draw", fails_late)
    with pytest.raises(utils.UserError, match="the disk is full"):
        describe("--img", "pictures", "--batch_size", 1)
    assert len(files.read_json("captions.json")) == 3  # the third was captioned, and not drawn


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_signal_ends_it_in_one_line_and_keeps_what_is_done(best_checkpoint, tmp_path):
    for i in range(200):
        save(tmp_path / f"pictures/{i:03d}.png", i)
    command = [sys.executable, SCRIPT, "--model", best_checkpoint, "--img", "pictures", "--gif"]
    command += ["--json", "done.json", "--batch_size", "1", "--device", "cpu"]
    process = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    until = time.monotonic() + 120
    while not list(tmp_path.glob("captions/*.gif")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert err.decode().endswith("\ncaption.py: stopped by SIGTERM\n"), err.decode()
    assert process.returncode == 128 + signal.SIGTERM and b"Traceback" not in err
    assert 1 <= len(files.read_json(tmp_path / "done.json")) < 200
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]  # no partial file, no lock


def test_the_json_can_go_to_standard_output_with_nothing_else_on_it(best_checkpoint, tmp_path):
    path = save(tmp_path / "photo.png")
    command = [sys.executable, SCRIPT, "--model", best_checkpoint, "--img", path, "--json", "-"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, check=True)
    (result,) = json.loads(done.stdout)
    assert result["image"] == str(path) and result["captions"][0]["caption"].encode() in done.stderr


def test_a_bomb_is_left_out_in_one_line(describe, recwarn, exits, capsys):
    save("pictures/a.png")
    Image.new("1", (20_000, 20_000)).save("pictures/bomb.png")
    Path("pictures/no picture.jpg").write_text("404")
    with exits(1):
        describe("--img", "pictures", "--no_plot")
    assert not [w for w in recwarn if "PIL" in w.filename]
    assert capsys.readouterr().err.count("left out: cannot read pictures/") == 2


def test_what_cannot_be_written_is_refused_before_the_work(describe, fails, monkeypatch):
    path = save("pictures/photo.png")
    Path("pictures/notes.md").write_text("# precious")
    monkeypatch.setattr(caption, "load", lambda args: pytest.fail("it began to work"))
    with fails("pictures is a folder; expected a file"):
        describe("--img", path, "--json", "pictures")
    with fails("there is no folder .*typo"):
        describe("--img", path, "--json", "typo/captions.json")
    with fails("notes.md exists and is not a list of captions.*--force"):
        describe("--img", path, "--json", "pictures/notes.md")
    with fails("notes.md is a file, expected a folder"):
        describe("--img", path, "--output_folder", "pictures/notes.md")
    assert Path("pictures/notes.md").read_text() == "# precious"


def test_no_name_of_a_picture_leads_out_of_the_output_folder(describe, tmp_path, monkeypatch):
    save("x.jpg")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    describe("--img", "../../x.jpg", tmp_path / "x.jpg", "--gif")
    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(found) == [
        "a/b/captions.json",
        "a/b/out/x_attention.gif",
        "a/b/out/x_attention.png",
        "x.jpg",
    ]


def test_pictures_of_one_name_do_not_overwrite_each_other_in_one_run_or_two(describe):
    paths = [
        save("pictures/a/cat.png", 1),
        save("pictures/b/cat.png", 2),
        save("pictures/b/cat.jpg", 3),
        save("pictures/c/cat_2.png", 4),
    ]
    alone = "--batch_size", 1  # products of other batches round differently
    describe("--img", *paths[:2], *alone)
    first = Path("out/cat_attention.png").read_bytes()
    for path in paths[2:]:
        describe("--img", path)
    assert len(written()) == 4
    assert len({Path("out", name).read_bytes() for name in written()}) == 4
    describe("--img", *paths, *alone)  # the same pictures again: the same files
    assert len(written()) == 4 and Path("out/cat_attention.png").read_bytes() == first


def test_a_file_that_is_no_sheet_of_ours_is_not_replaced(describe):
    save("out/photo_attention.png", 5)
    before = Path("out/photo_attention.png").read_bytes()
    describe("--img", save("pictures/photo.png"))
    assert written() == {"photo_attention.png", "photo_2_attention.png"}
    assert Path("out/photo_attention.png").read_bytes() == before


def test_show_without_a_screen_says_where_the_picture_is(describe, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    printed, _ = describe("--img", save("pictures/photo.png"), "--show")
    assert "no screen" in printed.err and "photo_attention.png" in printed.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--n_best", 6], "--n_best 6: expected at most --beam_size 5"),
        (["--no_plot", "--gif"], "--gif"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_bad_values_end_in_one_line(flags, message, describe, fails):
    with fails(message):
        describe("--img", save("pictures/photo.png"), *flags)
    assert not Path("captions.json").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_size", "0"], "--batch_size 0: expected a value from 1 to 65536"),
        (["--beam_size", "0"], "--beam_size 0: expected a value from 1 to 100"),
        (["--beam_size"], "--beam_size expected one argument"),
        (["--no-plt"], "did you mean --no_plot"),
        (["--img", "-dash.jpg"], "./-dash.jpg"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, describe, capsys):
    with pytest.raises(SystemExit) as ending:
        describe("--img", "photo.png", *flags)
    err = capsys.readouterr().err
    assert ending.value.code == 2 and err.count("\n") == 1 and message in err


def test_a_wrong_word_map_is_refused(describe, word_map, fails, tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "wrong.json"
    files.write_json(path, word_map)
    with fails("--word_map"):
        describe("--img", save("pictures/photo.png"), "--word_map", path)


def test_what_is_no_checkpoint_is_refused(describe, fails):
    path = save("pictures/photo.png")
    with fails("photo.png"):
        describe("--img", path, "--model", path)


def test_flags_of_the_gaze_reach_the_decoder(best_checkpoint, tmp_path):
    whole = models.load_checkpoint(best_checkpoint)
    own = {"decoder": "transformer", "decoder_options": {"layers": 1, "heads": 2}}
    config = whole["config"] | own
    decoder = models.build_decoder(config, len(whole["word_map"])).state_dict()
    models.save_checkpoint(tmp_path / "t.pth.tar", whole | {"config": config, "decoder": decoder})
    for head in (1, 2):
        flags = "--img", "a.jpg", "--head", head, "--sample_location"
        captioner, _ = caption.load(describe_args(tmp_path / "t.pth.tar", *flags))
        assert captioner.decoder.shown_head == head - 1 and captioner.decoder.sample_location
