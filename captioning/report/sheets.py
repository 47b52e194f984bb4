"""Drawings: attention sheets and animations."""

import hashlib
import io
import itertools
import math
import os
import sys
import textwrap

import numpy as np
from PIL import Image

from captioning.data.words import join_words
from captioning.model.grid import effective_places, split_sentinel
from captioning.report.plots import check_script, default_settings, font_families
from captioning.run.files import atomic_path
from captioning.run.messages import printable
from captioning.run.paths import attention_path

INK, FAINT = "#1e1e22", "#787880"


@default_settings()
def draw(path, picture, captioner, hypothesis, folder, say, gif=False, show=False):
    """Write the attention sheet of one caption into a folder, and perhaps an animation of it.

    :param path, picture: the picture's path, and the picture as Pillow's image
    :param say: function that prints a line
    :param gif, show: write the animation; open a window with the sheet
    """
    words, alphas = captioner.text(hypothesis), hypothesis.alphas
    fonts, file = font_families("".join(captioner.words)), io.BytesIO()
    check_script("".join(words))
    png, source = sheet_path(path, folder)
    # encoded in memory and written once, so that a full disk is one message
    sheet = attention_sheet(picture, words, alphas, fonts)
    sheet.savefig(file, format="png", metadata={"Source": source}, pil_kwargs={"compress_level": 3})
    drawings = {png: file.getvalue()}
    if gif:
        import imageio.v3 as iio

        frames = attention_frames(picture, words, alphas, fonts)
        gif = iio.imwrite("<bytes>", frames, extension=".gif", duration=700, loop=0, bits=5)
        drawings[png.with_suffix(".gif")] = gif
    for drawing, data in drawings.items():
        with atomic_path(drawing) as temporary:
            temporary.write_bytes(data)
        say(f"    {printable(drawing)}")
    if show:
        open_window(png)


def sheet_path(path, folder):
    """Where a picture's sheet goes: numbered on while another picture's has the name.

    :return: (path of the PNG file, digest of the picture's path, which the file keeps)
    """
    source = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    stem = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in path.stem)
    stem = stem.encode()[:200].decode(errors="ignore")  # names of files end at 255 bytes
    for number in itertools.count(1):
        png = attention_path(folder, stem if number == 1 else f"{stem}_{number}", "png")
        try:
            with Image.open(png) as sheet:
                if sheet.info.get("Source") == source:
                    return png, source
        except FileNotFoundError:
            return png, source
        except OSError:
            if not png.exists():
                raise
            continue  # no picture, and so not ours to replace


def spotlight(picture, alpha):
    """The picture, lit where attention was; the brightest place is the largest weight.

    :param alpha: float tensor (num_pixels,)
    :return: uint8 (height, width, 3)
    """
    side, pixels = math.isqrt(len(alpha)), np.asarray(picture, np.float32)
    # even weights light the whole picture evenly and not fully: nothing was singled out
    weights = alpha.view(side, side).numpy() / max(float(alpha.max()), 4 / len(alpha))
    light = enlarge(weights, pixels.shape[:2]).clip(0, 1)[..., None]
    dim = 0.22 * pixels.mean(axis=2, keepdims=True) + 18
    return (light * pixels + (1 - light) * dim).astype(np.uint8)


def enlarge(weights, shape):
    """Weights of a grid, float (side, side), as float (height, width), by cubic splines."""
    try:
        from skimage.transform import resize
    except (AttributeError, ImportError):  # 0.26 reads docstrings, which python -OO leaves out
        from scipy.ndimage import zoom

        factors = [new / old for new, old in zip(shape, weights.shape)]
        large = zoom(weights, factors, order=3, mode="nearest", grid_mode=True)
        return large.clip(weights.min(), weights.max())
    return resize(weights, shape, order=3, mode="edge")


@default_settings()
def attention_sheet(picture, words, alphas, fonts=None):
    """One panel per word, the picture lit where the model looked as it said the word.

    :param alphas: float tensor (num_words, num_pixels); with a sentinel's weight behind them, each
        word's label says how much it looks
    :param fonts: see :func:`captioning.report.plots.font_families`
    :return: matplotlib figure, 100 dots per inch
    """
    scale = 230 / math.sqrt(picture.width * picture.height)  # panels have the area of 230 x 230
    small = _scaled(picture, scale, 90)
    panels = [("the picture", np.asarray(small)), *_lit(small, words, alphas)]
    # as many columns as bring the sheet near the shape of a screen
    columns = round(math.sqrt(1.7 * len(panels) * (small.height + 42) / (small.width + 12)))
    columns = min(max(columns, 2), len(panels))
    weights, sentinel = split_sentinel(alphas)  # (num_words, num_pixels), (num_words,) or None
    places = effective_places(weights).mean()
    note = f"attention spread over {places:.0f} of {weights.shape[1]} places" if words else ""
    if words and sentinel is not None:
        note += f"; words look {1 - sentinel.mean():.0%} on average"
    return _page(panels, columns, join_words(words) or "(no words)", note, fonts)


@default_settings()
def attention_frames(picture, words, alphas, fonts=None):
    """Frames of an animation: the light moves word by word over the picture.

    :return: list of uint8 (height, width, 3)
    """
    # a GIF of 32 colours and so many pixels in all stays below 600 KB
    scale = math.sqrt(800_000 / (len(words) + 2) / picture.width / picture.height)
    scale = min(1, scale, 480 / max(picture.size))
    small = _scaled(picture, scale, 160)
    whole = ("", np.asarray(small))
    views = _lit(small, words, alphas)
    pages = (_page([view], 1, join_words(words), "", fonts) for view in [whole, *views, whole])
    return [np.asarray(page.canvas.buffer_rgba())[..., :3] for page in pages]


def _lit(picture, words, alphas):
    """The picture lit for each word, as a list of (label, uint8 (height, width, 3))."""
    weights, sentinel = split_sentinel(alphas)  # (num_words, num_pixels), (num_words,) or None
    if sentinel is not None:
        words = [f"{word}  (looks {1 - share:.0%})" for word, share in zip(words, sentinel)]
    return [(word, spotlight(picture, alpha)) for word, alpha in zip(words, weights)]


def _scaled(picture, scale, least_width):
    width, height = round(picture.width * scale), round(picture.height * scale)
    return picture.resize((max(width, least_width), max(height, 60)))


def _page(panels, columns, caption, note, fonts):
    """A caption, a note in small letters, and below them panels in rows.

    :param panels: list of (label, uint8 (height, width, 3)), all of one size
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    high, wide, _ = panels[0][1].shape
    gap, band, margin = 12, 30, 20
    room, rows = columns * (wide + gap) - gap, math.ceil(len(panels) / columns)
    lines = textwrap.wrap(caption, max(12, room // 11), break_long_words=False)
    top = margin + 28 * len(lines) + (24 if note else 0)
    width, height = room + 2 * margin, top + rows * (high + band + gap) - gap + margin
    figure = Figure((width / 100 + 0.001, height / 100 + 0.001), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)

    def write(text, x, y, size, room, color=INK):
        label = figure.text(x / width, 1 - y / height, text, color=color, family=fonts)
        label.set(size=0.72 * size, parse_math=False)  # points of 1/72 inch from pixels of 1/100
        while label.get_window_extent().width > room and label.get_size() > 1:
            label.set_size(0.9 * label.get_size())

    for row, line in enumerate(lines):
        write(line, margin, margin + 20 + 28 * row, 20, room)
    write(note, margin, top - 8, 14, room, FAINT)
    for i, (label, image) in enumerate(panels):
        x, y = margin + i % columns * (wide + gap), top + i // columns * (high + band + gap) + band
        write(label, x, y - 8, 17, wide, INK if i or len(panels) == 1 else FAINT)
        figure.figimage(image, x, height - y - high)
    figure.canvas.draw()
    return figure


def open_window(png):
    """Open a window with the sheet, or say why there is none."""
    from PIL import ImageShow

    screen = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    with Image.open(png) as sheet:
        if not screen or not ImageShow.show(sheet):
            print(f"--show: there is no screen here; the picture is {png}", file=sys.stderr)
