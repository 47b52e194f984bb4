"""A training's curves, as a picture."""

import math
from itertools import groupby

from captioning.model.schedules import best_epoch
from captioning.report.plots import default_settings
from captioning.run.files import atomic_path


@default_settings()
def draw_curves(path, history, metric):
    """Losses and validation scores over the epochs, the best epoch marked, as a PNG.

    Where a resumed run got other data, the curves have a gap: scores before and after it are of
    other pictures.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    parts = groupby(history, key=lambda record: record.get("of_other_data"))
    points = sum(([*part, {}] for _, part in parts), [])  # an empty record is drawn as a gap
    epochs = [record.get("epoch", math.nan) for record in points]
    best = best_epoch(history, metric)["epoch"]
    panels = {
        "loss (nll per word)": ["nll", "val_nll"],
        "validation: BLEU": ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"],
        "validation: ROUGE-L": ["ROUGE-L"], "validation: CIDEr": ["CIDEr"],
    }  # fmt: skip
    if metric not in sum(panels.values(), []):
        panels[f"validation: {metric}"] = [metric]
    figure = Figure(figsize=(3.25 * len(panels), 4), layout="constrained")
    names = {"nll": "training", "val_nll": "validation"}
    for axes, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items()):
        for key in keys:
            values = [record.get(key, math.nan) for record in points]
            axes.plot(epochs, values, "o-", markersize=4, label=names.get(key, key))
        axes.axvline(best, color="0.7", linestyle=":", label=f"best {metric}")
        axes.set(title=title, xlabel="epoch", xlim=(0.5, history[-1]["epoch"] + 0.5))
        # below the panel, where it covers no curve
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
        axes.legend(**place, edgecolor="none", fontsize=8, columnspacing=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
