"""Captioning pictures: which are found, what is said, drawn and refused."""

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import caption
import datasets
import models
import utils


@pytest.fixture
def describe(best_checkpoint, tmp_path, monkeypatch, capsys):
    """Function of flags: runs caption.py in an empty folder; returns (what it printed, its JSON)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        argv = [
            "--model",
            best_checkpoint,
            "--workers",
            2,
            "--device",
            "cpu",
            "--max_decode_steps",
            6,
            "--output_folder",
            "out",
            "--json",
            "out/captions.json",
            *flags,
        ]
        caption.main(caption.get_args_parser().parse_args([str(arg) for arg in argv]))
        return capsys.readouterr(), utils.read_json("out/captions.json")

    return run


def save(path, seed=0, width=48, height=36):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_picture(seed, width, height)).save(path)
    return path


def written():
    """Files below the current folder's ``out``, and that nothing else was made beside the pictures."""
    assert {path.name for path in Path().iterdir()} <= {"out", "pictures"}
    return {path.name for path in Path("out").iterdir()} - {"captions.json"}


def test_a_folder_for_json_is_refused_before_the_work(describe, fails):
    Path("pictures").mkdir()
    with fails("--json pictures is a folder; expected a file"):
        describe("--img", save("pictures/photo.png"), "--json", "pictures")


def test_a_picture_is_captioned_and_drawn(describe, best_checkpoint, tmp_path):
    path = save("pictures/photo.png")
    printed, (result,) = describe("--img", path)
    assert result["image"] == str(path)
    (said,) = result["captions"]
    assert f"{path}: {said['caption']}  (log-probability {said['log_prob']:.2f})" in printed.out
    assert written() == {"photo_attention.png"}
    with Image.open("out/photo_attention.png") as sheet:
        assert sheet.width > 200 and len(np.unique(np.asarray(sheet))) > 50

    captioner = models.load_captioner(best_checkpoint)
    square = datasets.resize_image(make_picture(0), 64)
    expected = captioner.caption(
        torch.from_numpy(square)[None], beam_size=5, length_penalty=0.7, max_decode_steps=6
    )[0][0]
    assert said["caption"].split() == captioner.text(expected)
    assert said["log_prob"] == pytest.approx(expected.log_prob, rel=1e-4)


def test_the_consensus_of_the_training_data_can_be_asked(describe, talkative, training_data, fails):
    path = save("pictures/photo.png")
    flags = ["--model", talkative, "--img", path, "--length_penalty", 1, "--n_best", 5]
    _, (plain,) = describe(*flags)
    _, (chosen,) = describe(*flags, "--consensus", 3, "--data_folder", training_data[0])
    scores = [
        {said["caption"]: said["score"] for said in result["captions"]}
        for result in (plain, chosen)
    ]
    assert set(scores[0]) == set(scores[1]) and list(scores[1].values()) == sorted(
        scores[1].values(), reverse=True
    )
    captioner = models.load_captioner(talkative)
    known = models.described_pictures([captioner], *training_data, torch.float32)
    consensus = models.Consensus([captioner], *known, 3)
    square = torch.from_numpy(datasets.resize_image(make_picture(0), 64))[None]
    expected = captioner.caption(
        square, beam_size=5, n_best=5, length_penalty=1, max_decode_steps=6, consensus=consensus
    )[0]
    assert [said["score"] for said in chosen["captions"]] == pytest.approx(
        [h.score for h in expected], rel=1e-4
    )
    assert any(scores[1][words] > score for words, score in scores[0].items())
    with fails("TRAIN_.*hdf5"):
        describe(*flags, "--consensus", 3)
    captioner.image_size = 32
    with fails("pictures of 64 pixels, but the model was trained on 32"):
        models.described_pictures([captioner], *training_data, torch.float32)
    checkpoint = models.load_checkpoint(talkative)
    checkpoint["config"]["data_name"] = ""
    models.save_checkpoint(talkative, checkpoint)
    with fails("does not say on what it was trained"):
        describe(*flags, "--consensus", 3, "--data_folder", training_data[0])


def test_files_folders_and_patterns_are_found_each_once_in_order(describe):
    for i, name in enumerate(("a.png", "b.jpg", "C.JPG", "sub/d.png", "sub/deep/e.png")):
        save(Path("pictures") / name, i)
    Path("pictures/notes.txt").write_text("no picture")
    _, results = describe("--img", "pictures/b.jpg", "pictures", "pictures/**/*.png", "--no_plot")
    assert [result["image"] for result in results] == [
        f"pictures/{name}" for name in ("b.jpg", "C.JPG", "a.png", "sub/d.png", "sub/deep/e.png")
    ]
    assert written() == set()


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
    assert result["image"] == str(path) and utils.printable(path) in printed.out
    assert printed.out.count("\n") == 2 and printed.out.replace("\n", "").isprintable()
    (sheet,) = written()
    assert sheet.endswith("_attention.png")
    if not set(name) & set('"\n') and len(name.encode()) < 210:
        assert sheet == f"{path.stem}_attention.png"


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


def test_a_bomb_is_left_out_in_one_line(describe, recwarn):
    save("pictures/a.png")
    for side in (10_000, 20_000):
        Image.new("1", (side, side)).save(f"pictures/bomb{side}.png")
    Path("pictures/no picture.jpg").write_text("404")
    printed, results = describe("--img", "pictures", "--no_plot")
    assert len(results) == 1 and not [w for w in recwarn if "PIL" in w.filename]
    assert (
        printed.err.count("left out: cannot read pictures/") == 3
        and printed.err.count("shrink it") == 2
    )


def test_no_name_of_a_picture_leads_out_of_the_output_folder(describe, tmp_path, monkeypatch):
    save("x.jpg")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    describe("--img", "../../x.jpg", tmp_path / "x.jpg", "--gif")
    found = sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    )
    assert found == [
        "a/b/out/captions.json",
        "a/b/out/x_2_attention.gif",
        "a/b/out/x_2_attention.png",
        "a/b/out/x_attention.gif",
        "a/b/out/x_attention.png",
        "x.jpg",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text_will_do(describe):
    save("pictures/x.png")
    os.rename(b"pictures/x.png", b"pictures/caf\xe9.png")
    _, results = describe("--img", "pictures")
    assert len(results) == 1 and len(written()) == 1


def test_pictures_of_one_name_do_not_overwrite_each_other(describe):
    paths = [
        save("pictures/a/cat.png", 1),
        save("pictures/b/cat.png", 2),
        save("pictures/b/cat.jpg", 3),
        save("pictures/c/cat_2.png", 4),
    ]
    describe("--img", *paths)
    assert len(written()) == 4
    assert len({Path("out", name).read_bytes() for name in written()}) == 4


def test_an_unreadable_picture_is_named_and_the_others_captioned(describe):
    good = [save(f"pictures/{i}.png", i) for i in (1, 3)]
    Path("pictures/2.png").write_bytes(good[0].read_bytes()[:200])
    Path("pictures/4.png").write_bytes(b"")
    printed, results = describe("--img", "pictures", "--batch_size", 1)
    assert [result["image"] for result in results] == [str(path) for path in good]
    assert "pictures/2.png" in printed.err and "pictures/4.png" in printed.err
    assert "2 of 4 pictures left out" in printed.err
    assert written() == {"1_attention.png", "3_attention.png"}


def test_none_readable_is_an_error(describe, fails):
    Path("pictures").mkdir()
    Path("pictures/1.png").write_text("404")
    with fails("none of the 1 pictures could be read"):
        describe("--img", "pictures")
    assert not Path("out").exists()


@pytest.mark.parametrize("pattern", ["missing.png", "missing/*.png", "empty", "x" * 300])
def test_what_matches_nothing_is_named(pattern, describe, fails, tmp_path):
    (tmp_path / "empty").mkdir()
    with fails(f"--img {re.escape(pattern)}: "):
        describe("--img", pattern)


def test_n_best_are_printed_and_written(describe):
    path = save("pictures/photo.png")
    printed, (result,) = describe("--img", path, "--n_best", 3, "--no_plot")
    captions = result["captions"]
    assert 1 < len(captions) <= 3
    assert [c["score"] for c in captions] == sorted((c["score"] for c in captions), reverse=True)
    assert len({c["caption"] for c in captions}) == len(captions)
    for c in captions:
        assert f"{c['caption']}  (log-probability {c['log_prob']:.2f})" in printed.out
        assert isinstance(c["ended"], bool)


def test_batches_change_nothing(describe):
    for i in range(5):
        save(f"pictures/{i}.png", i)
    _, one = describe("--img", "pictures", "--batch_size", 1, "--no_plot")
    _, many = describe("--img", "pictures", "--batch_size", 4, "--no_plot")
    assert [(r["image"], r["captions"][0]["caption"]) for r in one] == [
        (r["image"], r["captions"][0]["caption"]) for r in many
    ]


def test_the_gif_moves_word_by_word(describe):
    frames = caption.attention_frames(
        Image.open(save("pictures/photo.png")), ["a", "dog"], torch.eye(2, 4)
    )
    assert len(frames) == 4 and len({frame.tobytes() for frame in frames}) == 4
    assert len({frame.shape for frame in frames}) == 1 and frames[0].shape[1] >= 160
    describe("--img", "pictures/photo.png", "--gif")
    assert written() == {"photo_attention.png", "photo_attention.gif"}
    with Image.open("out/photo_attention.gif") as animation:
        assert animation.format == "GIF" and animation.width == frames[0].shape[1]


def test_show_without_a_screen_says_where_the_picture_is(describe, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    printed, _ = describe("--img", save("pictures/photo.png"), "--show")
    assert "no screen" in printed.err and "photo_attention.png" in printed.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--n_best", 6], "--n_best 6"),
        (["--no_plot", "--gif"], "--gif"),
        (["--batch_size", 0], "--batch_size 0"),
        (["--beam_size", 0], "--beam_size 0"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_bad_values_end_in_one_line(flags, message, describe, fails):
    with fails(message):
        describe("--img", save("pictures/photo.png"), *flags)
    assert not Path("out").exists()


def test_a_beam_size_without_a_number_is_refused(describe):
    with pytest.raises((SystemExit, utils.UserError)):
        describe("--img", save("pictures/photo.png"), "--beam_size")


def test_a_wrong_word_map_is_refused(describe, word_map, fails, tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "wrong.json"
    utils.write_json(path, word_map)
    with fails("--word_map has 10 words"):
        describe("--img", save("pictures/photo.png"), "--word_map", path)


def test_what_is_no_checkpoint_is_refused(describe, fails):
    path = save("pictures/photo.png")
    with fails("photo.png is not a readable file of tensors"):
        args = caption.get_args_parser().parse_args(
            ["--img", str(path), "--model", str(path), "--device", "cpu"]
        )
        caption.main(args)


# -------------------------------------------------------------------------------------------------------------- drawing

SIZES = st.sampled_from(
    [(48, 36), (36, 48), (400, 8), (8, 400), (1, 1), (3000, 20), (20, 3000), (64, 64)]
)
WORDS = st.lists(
    st.sampled_from(["a", "dog", "running", "skateboarders", "漢字", "é", "🐕"]), max_size=30
)


@settings(max_examples=25, deadline=None)
@given(SIZES, WORDS, st.sampled_from([1, 2, 7, 14]))
def test_the_sheet_has_a_panel_for_every_word(size, words, side):
    width, height = size
    alphas = torch.rand(len(words), side * side).softmax(1)
    sheet = caption.attention_sheet(Image.fromarray(make_picture(1, width, height)), words, alphas)
    pixels = np.asarray(sheet)
    assert pixels.shape[2] == 3 and 100 < sheet.width < 12000 and 80 < sheet.height < 12000
    # nothing is cut at the margins
    assert (
        (pixels[:8] == 255).all()
        and (pixels[-8:] == 255).all()
        and (pixels[:, :8] == 255).all()
        and (pixels[:, -8:] == 255).all()
    )


@pytest.mark.parametrize("number", [1, 2, 5, 10, 20, 30])
def test_the_sheet_is_near_a_screens_shape_and_grows_with_the_words(number):
    sheet = caption.attention_sheet(
        Image.fromarray(make_picture(1, 300, 200)),
        ["dog"] * number,
        torch.full((number, 49), 1 / 49),
    )
    assert 1 < sheet.width / sheet.height < 3
    assert sheet.width * sheet.height > (number + 1) * 150 * 150


def test_panels_are_lit_where_the_model_looked():
    picture = Image.fromarray(np.full((90, 90, 3), (200, 60, 60), np.uint8))
    alpha = torch.full((9,), 0.02)
    alpha[2] = 0.84  # above, on the right
    view = np.asarray(caption.spotlight(picture, alpha)).astype(int)
    assert abs(view[10, 80] - (200, 60, 60)).max() < 12
    assert view[80, 10].max() < 80 and np.ptp(view[80, 10]) < 20  # dim and grey elsewhere
    even = np.asarray(caption.spotlight(picture, torch.full((9,), 1 / 9)))
    assert np.ptp(even, axis=(0, 1)).max() <= 1


@settings(max_examples=15, deadline=None)
@given(SIZES, WORDS)
def test_frames_are_of_one_size_and_one_per_word(size, words):
    frames = caption.attention_frames(
        Image.fromarray(make_picture(1, *size)), words, torch.rand(len(words), 4).softmax(1)
    )
    assert len(frames) == len(words) + 2
    assert len({frame.shape for frame in frames}) == 1
    height, width, _ = frames[0].shape
    assert 160 <= width <= 480 and 60 <= height < 3000


def test_a_model_that_says_nothing_is_drawn_too(best_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = models.load_checkpoint(best_checkpoint)
    checkpoint["decoder"]["fc.bias"][checkpoint["word_map"]["<end>"]] = 1e4
    torch.save(checkpoint, "silent.pth.tar")
    save("pictures/photo.png")
    argv = [
        "--img",
        "pictures/photo.png",
        "--model",
        "silent.pth.tar",
        "--device",
        "cpu",
        "--gif",
        "--output_folder",
        "out",
        "--json",
        "out.json",
    ]
    caption.main(caption.get_args_parser().parse_args(argv))
    assert utils.read_json("out.json")[0]["captions"][0]["caption"] == ""
    assert Path("out/photo_attention.png").exists() and Path("out/photo_attention.gif").exists()
    shutil.rmtree("out")
