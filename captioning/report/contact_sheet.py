"""The contact sheet of a data set."""

import textwrap
import warnings

import numpy as np

from captioning.report.plots import check_script, default_settings, font_families
from captioning.run.files import atomic_path


def cut(text, length):
    """A text of at most so many letters, whole words where it has any that fit."""
    end = " [...]"
    short = textwrap.shorten(text, length, placeholder=end)
    return short if short != end.strip() else text[: length - len(end)] + end


@default_settings()
def draw_contact_sheet(path, dataset, number=6):
    """Draw a few pictures spread over a split, as they are stored, with their captions."""
    from matplotlib.figure import Figure

    chosen = np.linspace(0, len(dataset) - 1, min(number, len(dataset))).round().astype(int)
    letters = "".join("".join(dataset.raw_references[i][:5]) for i in chosen)
    check_script(letters)
    style = {"family": font_families(letters), "parse_math": False}
    rows = -(-len(chosen) // 3)
    figure = Figure(figsize=(12, 0.5 + 5.6 * rows), layout="constrained")
    figure.suptitle(f"{dataset.name}: {dataset.split}\n", fontsize=11, parse_math=False)
    axes = figure.subplots(2 * rows, 3, squeeze=False, height_ratios=[3.6, 1.8] * rows)
    for axis in axes.flat:
        axis.axis("off")
    for place, (i, image) in enumerate(zip(chosen, dataset.images(chosen))):
        shown, below = axes[2 * (place // 3), place % 3], axes[2 * (place // 3) + 1, place % 3]
        shown.imshow(image.transpose(1, 2, 0), interpolation="antialiased")
        title = cut(dataset.image_names[i], 48)
        shown.set_title(title, fontsize=8, **style)
        texts = (cut(text, 150) for text in dataset.raw_references[i][:5])
        marks = {"initial_indent": "– ", "subsequent_indent": "   "}
        text = "\n".join(textwrap.fill(text, 54, **marks) for text in texts)
        below.text(0, 1, text, fontsize=9, va="top", **style)
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        figure.savefig(temporary, dpi=100)
