"""Tests of ``captioning/report/plots.py``, and of all that is drawn with it."""

import os
import re
import signal
from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np
import pytest
import torch
from conftest import make_picture
from PIL import Image

import datasets
import train
import utils
from captioning.report import contact_sheet, curves, plots, sheets

ROOT = Path(utils.__file__).resolve().parent
SETTINGS = {  # as people have them in their matplotlibrc
    "savefig.dpi": 300, "savefig.bbox": "tight", "figure.dpi": 55, "font.size": 30,
    "font.family": "serif", "axes.facecolor": "black", "text.color": "white",
    "text.usetex": True, "savefig.transparent": True, "image.cmap": "hot", "lines.linewidth": 9,
}  # fmt: skip
HISTORY = [
    {"epoch": i, "nll": 3 / i, "val_nll": 3 / i + 0.1, **dict.fromkeys(train.METRICS, 30 + i)}
    for i in (1, 2, 3)
]
HISTORY[0] |= {"of_other_data": True, "CIDEr": 99}
HISTORY[1] |= {"CIDEr": 50}  # the best of this data by CIDEr, not by BLEU-4


def draw_curves(folder, data):
    curves.draw_curves(folder / "curves.png", HISTORY, "CIDEr")
    return (folder / "curves.png").read_bytes()


def draw_contact_sheet(folder, data):
    dataset = datasets.CaptionDataset(datasets.split_path(data[0], "test", data[1]))
    contact_sheet.draw_contact_sheet(folder / "sheet.png", dataset)
    return (folder / "sheet.png").read_bytes()


def draw_sheet(folder, data):
    picture = Image.fromarray(make_picture(1))
    sheet = sheets.attention_sheet(picture, ["a", "dog"], torch.eye(4)[:2])
    return np.asarray(sheet.canvas.buffer_rgba()).tobytes()


def draw_frames(folder, data):
    picture = Image.fromarray(make_picture(1))
    return np.stack(sheets.attention_frames(picture, ["a", "dog"], torch.eye(4)[:2])).tobytes()


DRAWINGS = draw_curves, draw_contact_sheet, draw_sheet, draw_frames


@pytest.mark.parametrize("draw", DRAWINGS, ids=lambda draw: draw.__name__)
def test_the_users_own_settings_change_no_drawing(draw, training_data, tmp_path):
    expected = draw(tmp_path, training_data)
    with matplotlib.rc_context(SETTINGS):
        before = dict(matplotlib.rcParams)
        assert draw(tmp_path, training_data) == expected
        assert dict(matplotlib.rcParams) == before  # they are the user's again


def test_the_users_own_settings_change_no_file_of_caption_py(describe):
    files = []
    for settings in ({}, SETTINGS):
        Path("pictures").mkdir(exist_ok=True)
        Image.fromarray(make_picture(1)).save("pictures/photo.png")
        with matplotlib.rc_context(settings):
            describe("--img", "pictures/photo.png", "--gif")
        files.append([path.read_bytes() for path in sorted(Path("out").iterdir())])
    assert len(files[0]) == 2 and files[0] == files[1]


def test_whoever_makes_a_figure_asks_for_the_default_settings():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "captioning").rglob("*.py")]
    drawing = [text for text in texts if "import Figure" in text]
    assert len(drawing) >= 3 and all("@default_settings()" in text for text in drawing)
    # which draws and saves all plots of docs/report_plots.py
    report = (ROOT / "docs" / "report.py").read_text(encoding="utf-8")
    assert report.count(".savefig(") == report.count("plots.default_settings()")


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("draw", DRAWINGS, ids=lambda draw: draw.__name__)
def test_a_signal_waits_for_the_end_of_a_drawing(draw, training_data, tmp_path, monkeypatch):
    matrix, calls = matplotlib.transforms.Affine2D.get_matrix, []

    def signalled(self):  # called by C++, too, which makes a ValueError of any error
        calls.append(self)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return matrix(self)

    monkeypatch.setattr(matplotlib.transforms.Affine2D, "get_matrix", signalled)
    with pytest.raises(utils.Stopped, match="SIGTERM"), utils.StopSignals():
        draw(tmp_path, training_data)
    assert len(calls) > 1


def test_the_curves_part_where_the_data_changed_and_no_legend_covers_them(tmp_path, monkeypatch):
    figures, savefig = [], matplotlib.figure.Figure.savefig
    keep = lambda self, *args, **options: figures.append(self) or savefig(self, *args, **options)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    draw_curves(tmp_path, None)
    (line,) = (line for line in figures[0].axes[0].lines if line.get_linestyle() == ":")
    assert set(line.get_xdata()) == {2}  # of the epochs of this data, the best
    losses = figures[0].axes[0].lines[0].get_ydata()
    assert np.allclose(losses, [3, np.nan, 1.5, 1, np.nan], equal_nan=True)  # a gap at new data
    for axes in figures[0].axes:
        legend, panel = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert legend.y1 < panel.y0 and legend.y0 >= 0 and len(axes.get_legend().get_texts()) >= 2


@pytest.mark.parametrize(
    "text, version, said",
    [
        ("كلب يجري", (3, 10), True),
        ("כלב רץ", (3, 8), True),
        ("कुत्ता दौड़ता है", (3, 10), True),
        ("كلب يجري", (3, 11), False),
        ("a dog runs, 狗 собака é", (3, 8), False),
    ],
)
def test_letters_that_an_old_matplotlib_cannot_set_are_named_once(
    text, version, said, monkeypatch, capsys
):
    utils.note.cache_clear()
    monkeypatch.setattr(matplotlib, "__version_info__", (*version, 0, "final", 0))
    plots.check_script(text)
    plots.check_script(text)
    err = capsys.readouterr().err
    assert err.count("\n") == said and (not said or re.search(r"matplotlib>=3\.11.*--html", err))


def test_letters_without_a_font_are_named_with_what_to_install(capsys):
    utils.note.cache_clear()
    assert plots.font_families("a dog é") == ["DejaVu Sans"]
    assert capsys.readouterr().err == ""
    assert plots.font_families("dog \U0001f9ff\ue000")[0] == "DejaVu Sans"
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "install" in note and "fonts-noto" in note


def test_a_font_of_the_system_even_a_new_one_is_taken_for_letters_that_dejavu_lacks(monkeypatch):
    from matplotlib import font_manager, ft2font

    class Font:
        def __init__(self, name):
            self.name = name

        def get_charmap(self):
            letters = {
                "DejaVu": "abc",
                "Serif": "abc狗ꚠ",
                "Han": "狗草地",
                "Last Resort": "abc狗草地ꚠ",
            }
            return {
                ord(letter): 1 for key in letters if key in self.name for letter in letters[key]
            }

    font = lambda name: type("", (), {"name": name, "fname": "/"})

    class System:  # of which one font was installed since matplotlib looked
        ttflist = list(map(font, ("Serif", "Last Resort")))

        @classmethod
        def addfont(cls, path):
            if path == "/damaged.ttf":
                raise RuntimeError(path)
            cls.ttflist.append(font("Han"))

    names = iter(["DejaVu", "Serif", "Han"])
    monkeypatch.setattr(ft2font, "FT2Font", lambda path: Font(next(names)))
    monkeypatch.setattr(font_manager, "fontManager", System)
    monkeypatch.setattr(font_manager, "findfont", lambda name: name)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: ["/", "/damaged.ttf", "/han.ttf"])
    assert plots.font_families("a狗草地ꚠ") == ["DejaVu Sans", "Han", "Serif"]


def test_a_name_without_a_space_is_cut_where_it_is_too_long():
    cut = contact_sheet.cut
    assert cut("a" * 80, 48) == "a" * 42 + " [...]" and cut("short.png", 48) == "short.png"
    assert cut("two words " * 9, 24) == "two words two [...]"


def test_a_sheet_that_cannot_be_opened_ends_the_search_for_a_name(tmp_path, monkeypatch):
    def stale(path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(sheets.Image, "open", stale)
    with pytest.raises(OSError, match="Stale"):
        sheets.sheet_path(tmp_path / "a.png", tmp_path)


def test_the_contact_sheet_shows_each_picture_with_its_own_captions(
    shapes_train, tmp_path, monkeypatch
):
    drawn, savefig = [], matplotlib.figure.Figure.savefig
    watched = lambda figure, *args, **options: (
        drawn.append(figure) or savefig(figure, *args, **options)
    )
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", watched)
    contact_sheet.draw_contact_sheet(tmp_path / "sheet.png", shapes_train, number=3)
    pictures, texts = drawn[0].axes[:3], drawn[0].axes[3:6]
    for i, picture, below in zip((0, 12, 23), pictures, texts, strict=True):
        assert picture.get_title() == shapes_train.image_names[i]
        said = below.texts[0].get_text().replace("– ", "").split()
        assert said == " ".join(shapes_train.raw_references[i]).split()
