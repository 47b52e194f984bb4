"""The plots of the pages, by the names of their files."""

import math

import numpy as np
from report_rows import (
    ADAPTING,
    BEAMS,
    DECODERS,
    RECIPE,
    RECIPE_50,
    RECIPE_TRANSFORMER,
    SAMPLED,
    SIZES,
    scored,
    seeds,
    without_seed,
)

import models

# Okabe and Ito's colours, which the colour-blind can tell apart
COLORS = {"lstm8": "#0072B2", "gru8": "#D55E00"}
FIVE = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7")


def panels(*titles, height=2.9):
    """A column of panels, one for each title, which a telephone can show."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, height * len(titles)), layout="constrained")
    axes = figure.subplots(len(titles), squeeze=False)[:, 0]
    for one, title in zip(axes, titles):
        one.set_title(title, fontsize=13, loc="left")
        one.tick_params(labelsize=12)
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label_ends(one, ends, distance=0.09):
    """Write each line's name at its right end, names that would overlap pushed apart.

    :param ends: list of (x, y, text, color)
    """
    low, high = one.get_ylim()
    lowest = -math.inf
    for x, y, text, color in sorted(ends, key=lambda end: end[1]):
        lowest = max(y, lowest + distance * (high - low))
        one.annotate(
            text, (x, lowest), (6, 0), textcoords="offset points", color=color, fontsize=12,
            va="center", annotation_clip=False,
        )  # fmt: skip


def own_plot(runs):
    """Curves of any runs, a colour for each, seeds in the same."""
    figure, axes = panels("training: nats per word", "validation: CIDEr")
    for one, key in zip(axes, ("nll", "CIDEr")):
        for number, name in enumerate(sorted(set(map(without_seed, runs)))):
            for i, run in enumerate(seeds(runs, name)):
                xs, ys = zip(*((e["epoch"], e[key]) for e in run["epochs"]))
                style = {"color": f"C{number % 10}", "label": "" if i else name}
                one.plot(xs, ys, "o-", markersize=4, **style)
        one.xaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlabel("epoch", fontsize=12)
    axes[0].legend(fontsize=11)
    return figure


def decoders_plot(runs):
    """Curves of LSTM and GRU, a line for each seed."""
    figure, axes = panels("training: nats per word", "validation: CIDEr, beam 5")
    for one, name in zip(axes, ("nll", "CIDEr")):
        ends = []
        for label, decoder in DECODERS.items():
            group = seeds(runs, decoder)
            for run in group:
                xs, ys = zip(*((e["epoch"], e[name]) for e in run["epochs"]))
                one.plot(xs, ys, "o-", color=COLORS[decoder], markersize=4)
            y = np.mean([run["epochs"][-1][name] for run in group])
            ends.append((xs[-1], y, label, COLORS[decoder]))
        label_ends(one, ends)
        one.set_xticks(xs)
    axes[-1].set_xlabel("epoch", fontsize=12)
    return figure


def scheduled_sampling_plot(runs):
    """The true word's probability over the updates, and each schedule's scores at beams 1 and 5."""
    figure, axes = panels("probability of the true word", "test: CIDEr, a dot for each run")
    places = {"linear": (700, 0.65), "inverse_sigmoid": (2000, 0.85)}
    schedules = ["", *(name for name in places if seeds(runs, f"lstm8-{name}"))]
    for schedule, color in zip(schedules[1:], FIVE[2:]):
        run = seeds(runs, f"lstm8-{schedule}")[0]
        updates = np.linspace(0, run["updates"], 200)
        constants = models.Schedule(run["updates"], run["options"]["ss_min"])
        epsilon = [models.scheduled_sampling_epsilon(schedule, i, constants) for i in updates]
        axes[0].plot(updates, epsilon, color=color)
        text = {"color": color, "fontsize": 12}
        axes[0].text(*places[schedule], schedule.replace("_", "\n"), **text)
    axes[0].set_xlabel("update", fontsize=12)
    for label, name in SAMPLED.items():
        if not seeds(runs, name):
            continue
        decoder, _, schedule = name.partition("-")
        place = schedules.index(schedule) + (0.12 if decoder == "gru8" else -0.12)
        for beam, face in (("1", "white"), ("5", COLORS[decoder])):
            ys = [row["CIDEr"] for row in scored(runs, name, "test", beam)]
            style = {"color": COLORS[decoder], "markerfacecolor": face}
            text = "" if schedule else f"{label}, beam {beam}"
            axes[1].plot([place] * len(ys), ys, "o", label=text, **style)
    axes[1].legend(fontsize=11, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    names = [name.replace("_", "\n") or "none" for name in schedules]
    axes[1].set_xticks(range(len(names)), names)
    axes[1].set_xlim(-0.5, len(names) - 0.5)
    return figure


def beams_plot(runs):
    """Scores and length over beam sizes, a line for each length penalty."""
    figure, axes = panels("validation: CIDEr", "words per caption")
    for one, key in zip(axes, ("CIDEr", "words per caption")):
        ends = []
        for (penalty, name), color in zip(BEAMS.items(), FIVE):
            beams = runs[name]["val"]["beams"]
            xs, ys = list(map(int, beams)), [row[key] for row in beams.values()]
            one.plot(xs, ys, "o-", color=color, markersize=4)
            ends.append((xs[-1], ys[-1], f"penalty {penalty}", color))
        label_ends(one, ends)
        one.set_xticks(xs)
    axes[-1].set_xlabel("beam size", fontsize=12)
    return figure


def recipe_plot(runs):
    """Test CIDEr after each stage of the recipe, a dot for each seed."""
    figure, (one,) = panels("test: CIDEr, a dot for each seed", height=3.4)
    names = ["cross-entropy", "CNN fine-tuned", "self-critical", "mean of weights", "consensus"]
    encoders = {
        "Lite0, LSTM": (*RECIPE.values(), "mean-consensus"),
        "Lite0, Transformer": RECIPE_TRANSFORMER.values(),
        "ResNet-50, LSTM": (*map(RECIPE_50.get, RECIPE), "mean50-consensus"),
    }
    for i, ((label, stages), color) in enumerate(zip(encoders.items(), FIVE)):
        for y, name in enumerate(stages):
            beam = "20" if name.endswith("consensus") else "5"
            points = [row["CIDEr"] for row in scored(runs, name, "test", beam)]
            lane = [y + 0.17 * (i - 1)] * len(points)  # so that no dot hides another
            one.plot(points, lane, "o", color=color, label="" if y else label)
    one.set_yticks(range(len(names)), names, fontsize=12)
    one.invert_yaxis()
    one.legend(fontsize=10, loc="upper right", handletextpad=0.1, borderaxespad=0.2)
    return figure


def adapting_plot(runs):
    """Test CIDEr over the number of one's own pictures, a dot for each seed."""
    figure, (one,) = panels("test: CIDEr on dogs, a dot for each seed", height=3.4)
    ends = []
    for (label, name), color in zip(ADAPTING.items(), FIVE):
        found = {n: scored(runs, name.format(n), "test", "5") for n in SIZES}
        found = {n: [row["CIDEr"] for row in rows] for n, rows in found.items() if rows}
        if found:
            means = [np.mean(figures) for figures in found.values()]
            one.plot(list(found), means, "-", color=color)
            for size, figures in found.items():
                one.plot([size] * len(figures), figures, "o", color=color, markersize=4)
            ends.append((SIZES[-1], means[-1], label.partition(" of ")[0], color))
    one.set_xscale("log")
    one.margins(y=0.15)  # names pushed up stay below the title
    one.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
    one.minorticks_off()
    label_ends(one, ends)
    one.set_xlabel("pictures of dogs", fontsize=12)
    return figure


PLOTS = {
    "decoders": decoders_plot,
    "scheduled_sampling": scheduled_sampling_plot,
    "beams": beams_plot,
    "recipe": recipe_plot,
    "adapting": adapting_plot,
}
