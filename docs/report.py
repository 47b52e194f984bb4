"""Tables and plots of the pages, drawn from what runs wrote.

    # from docs/runs.json
    python docs/report.py
    # first take in runs: output folders of train.py and eval.py
    python docs/report.py --add runs/lstm-seed0 runs/lstm-seed1

A run is called as its folder. Runs whose names differ in "-seed0", "-seed1" alone are one row: mean
± half of the range. A page has a table where the marks <!-- name --> and <!-- end --> stand. What
its sentences say of runs is held against them, too (docs/claims.py).
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # run as a script, from anywhere

import claims

import models
import train
from captioning.report import plots
from captioning.run import files

PAGES = (
    "README.md", "docs/results.md", "docs/experiments.md", "docs/guide.md",
    "docs/captioner/README.md",
)  # fmt: skip
ELSEWHERE = "data_folder output_folder device workers resume init_from data_name".split()  # noqa: SIM905


# ----------------------------------------------------------------------------------------- the runs


def read_run(folder):
    """What is worth keeping of a run: options, machine, epochs, scores.

    :param folder: output folder of ``train.py``, of ``eval.py`` or of both
    """
    run = {}
    for path in Path(folder).glob("log_*.jsonl"):
        config, *epochs = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        config = config["config"]
        defaults = vars(train.get_args_parser().parse_args([])) | train.PRESETS.get(
            config["preset"], {}
        )
        word_map = Path(config["data_folder"], f"WORDMAP_{config['data_name']}.json")
        with torch.device("meta"):
            decoder = models.build_decoder(config, len(files.read_json(word_map)))
        options = {
            key: config[key]
            for key, default in defaults.items()
            if key not in ELSEWHERE and config.get(key, default) != default
        }
        if (
            "encoder_weights" in options
        ):  # imagenet, none, or a file, of which the name tells enough
            options["encoder_weights"] = Path(options["encoder_weights"]).name
        if config["init_from"]:  # as typed beside the run's folder
            start = Path(config["init_from"])
            is_best = start.name.startswith("BEST_checkpoint_")
            options["init_from"] = start.parent.name if is_best else start.name
        run |= {
            "machine": config.get("machine", "not recorded"),
            "updates": config["total_updates"],
            "options": options,
            "parameters": sum(p.numel() for p in decoder.parameters()),
            "epochs": list(map(rounded, epochs)),
        }
    for path in sorted(Path(folder).glob("metrics_*.json")):
        metrics = files.read_json(path)
        run[metrics["split"]] = {
            "length_penalty": metrics["length_penalty"],
            "consensus": metrics.get("consensus", 0.0),
            "people": rounded(metrics["people"]),
            "beams": {beam: rounded(row) for beam, row in metrics["beam_sizes"].items()},
        }
    if not run:
        raise SystemExit(f"{folder}: expected log_*.jsonl or metrics_*.json")
    return run


def rounded(values):
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}


def without_seed(name):
    return re.sub(r"-seed\d+$", "", name)


def seeds(runs, name):
    """The runs that differ in their seed alone."""
    return [run for key, run in sorted(runs.items()) if without_seed(key) == name]


def scored(runs, name, split, beam):
    """The figures of those that were scored so, a dict for each seed."""
    rows = (run.get(split, {}).get("beams", {}).get(beam) for run in seeds(runs, name))
    return [row for row in rows if row]


# --------------------------------------------------------------------------------------- the tables

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
SHORT = ("BLEU-4", "METEOR", "CIDEr")
SCENES = ("objects", "relation", "pointing", "by chance", "count", "shapes", "BLEU-4", "CIDEr")
GAZE = ("places", "num_pixels", "peak", "movement", "fall", "deletion ratio")
GLANCE = ("places", "movement", "fall", "deletion ratio")
VARIETY = (
    "words used",
    "distinct captions",
    "repeats itself",
    "colours agreed",
    "numbers agreed",
)
SAMPLING = ("BLEU-4", "CIDEr", "words per caption", "repeats itself")
SPLITS = {"val": "validation", "test": "test"}
# at most so many digits after the point; of other figures 1
DIGITS = {"peak": 2, "movement": 2, "fall": 3, "words used": 0, "num_pixels": 0}
TITLES = {
    "num_pixels": "of", "peak": "largest weight", "fall": "fall, nats", "deletion ratio": "ratio",
    "words used": "different words", "distinct captions": "distinct, %",
    "repeats itself": "repeats itself, %", "colours agreed": "colours, %",
    "numbers agreed": "numerals, %", "function places": "places, function words",
}  # fmt: skip

# labels, and the names of the runs without their seeds
FOCUS = {
    "Lite0, the default recipe": "lstm8",
    "Lite0, `--preset focus`": "focus",
    "ResNet-50, the default recipe": "xe50",
    "ResNet-50, `--preset focus`": "focus50",
    "ResNet-50, after four self-critical epochs": "fine50-scst",
}
GROUNDED = {
    "Lite0, the default recipe, eight epochs": "lstm8-h100",
    "… and three epochs more": "longer",
    "… and three with `--grounding 0.15`": "late0.15",
    "… and three with `--grounding 0.3`": "late0.3",
    "… and three with `--grounding 0.6`": "late0.6",
    "Lite0, eight epochs with `--grounding 0.15`": "focus-paper",
    "Lite0, `--preset focus`": "focus-h100",
    "… with `--feature_dropout 0.3`": "focus-fd3",
    "… with `--grounding 0.05`": "focus-w05",
    "ResNet-50, the default recipe, eight epochs": "xe50",
    "ResNet-50 … and three epochs more": "longer50",
    "ResNet-50 … and three with `--grounding 0.3`": "late50-0.3",
    "ResNet-50 … and three with `--grounding 0.6`": "late50-0.6",
    "ResNet-50, `--preset focus`": "focus50",
}
DECODERS = {"LSTM": "lstm8", "GRU": "gru8"}
SAMPLED = {  # eight epochs, the schedules falling to 0.25
    "LSTM": "lstm8",
    "LSTM, linear": "lstm8-linear",
    "LSTM, inverse sigmoid": "lstm8-inverse_sigmoid",
    "GRU": "gru8",
    "GRU, linear": "gru8-linear",
    "GRU, inverse sigmoid": "gru8-inverse_sigmoid",
}
THREE_EPOCHS = {  # the schedules falling to 0.75
    "LSTM": "lstm",
    "LSTM, linear": "lstm-linear",
    "LSTM, exponential": "lstm-exponential",
    "LSTM, inverse sigmoid": "lstm-inverse_sigmoid",
    "GRU": "gru",
    "GRU, linear": "gru-linear",
    "GRU, exponential": "gru-exponential",
    "GRU, inverse sigmoid": "gru-inverse_sigmoid",
}
RESNET_VGG = {"ResNet-50": "resnet50", "VGG-19": "vgg19"}
ENCODERS = RESNET_VGG | {"EfficientNet-Lite0": "lstm8"}
GRIDS = {"VGG-19, its own 16×16": "vgg16x16", "ResNet-50, third stage, 16×16": "stage50"}
EIGHT_EPOCHS = ENCODERS | GRIDS | {"EfficientNet-Lite2": "lite2"}
ON_SHAPES = {"the preset now": "shapes", "the earlier preset": "shapes-soft"}
ATTENTIONS = {"soft": "shapes-soft", "hard": "shapes-hard", "none (`mean`)": "shapes-mean"}
FROM_SCRATCH = {"ResNet-18": "scratch-resnet18", "VGG-11": "scratch-vgg11"}
RECIPE = {
    "1. cross-entropy, eight epochs, the CNN frozen": "xe",
    "2. then three epochs in which the CNN learns too": "fine",
    "3. then four self-critical epochs": "fine-scst",
    "4. mean of the weights of 2 and 3": "mean",
}
CONSENSUS = {
    "1, beam 20": "xe-beam20",
    "1, beam 20, consensus": "xe-consensus",
    "2, beam 20": "fine-beam20",
    "2, beam 20, consensus": "fine-consensus",
    "4, beam 20": "mean-beam20",
    "4, beam 20, consensus": "mean-consensus",
    "three models, beam 20": "mean-three-beam20",
    "three models, beam 20, consensus": "mean-three-consensus",
    "three models, ensemble, beam 20, consensus": "ensemble-three-consensus",
}
STAGE_1, STAGE_2, STAGE_3, STAGE_4 = RECIPE
RECIPE_50 = {
    STAGE_1: "xe50",
    STAGE_2: "fine50",
    "2c. as a control, three epochs in which it does not": "longer50",
    STAGE_3: "fine50-scst",
    "3e. eight self-critical epochs instead": "fine50-scst8",
    "3c. as 3, but the CNN learns too": "fine50-scst-cnn",
    STAGE_4: "mean50",
    "4e. mean of the weights of 2 and 3e": "mean50-scst8",
}
BEST = RECIPE_50 | {
    "4, captioned with consensus": "mean50-consensus",
    "4e, captioned with consensus": "mean50-scst8-consensus",
}
STAGES = RECIPE | {
    "3m. instead of 3: CIDEr-D + 5 METEOR": "scst-meteor",
    "4m. mean of 2 and 3m": "mean-meteor",
    "3n. as 3m with --mirror, six epochs": "scst-mirror",
    "4n. mean of 2 and 3n": "mean-mirror",
}
LENGTHS = {
    "4": "mean",
    "4, penalty 1": "mean-lp1",
    "4m": "mean-meteor",
    "4m, penalty 0.85": "mean-meteor-lp085",
    "4m, penalty 1": "mean-meteor-lp1",
    "4n": "mean-mirror",
    "4n, penalty 0.85": "mean-mirror-lp085",
    "three models, penalty 1": "mean-three",
    "4, ensemble": "ensemble",
    "4m, ensemble": "ensemble-meteor",
    "4m, ensemble, penalty 0.85": "ensemble-meteor-lp085",
    "4m, ensemble, penalty 1": "ensemble-meteor-lp1",
    "4n, ensemble": "ensemble-mirror",
    "4n, ensemble, penalty 0.85": "ensemble-mirror-lp085",
    "three models, ensemble, penalty 1": "ensemble-three",
}
BEAMS = {"0": "beam-0", "0.4": "beam-0.4", "0.7": "beam-0.7", "1": "beam-1"}
NO_REPEAT = {
    "EfficientNet-Lite0": "lstm8",
    "EfficientNet-Lite0, `--no_repeat`": "lstm8-no-repeat",
    "ResNet-50": "resnet50",
    "ResNet-50, `--no_repeat`": "resnet50-no-repeat",
}
FAULTS = {
    "LSTM, eight epochs": "lstm8",
    "GRU, eight epochs": "gru8",
    "the best recipe (4e)": "mean50-scst8",
}
ALL = (
    FOCUS, GROUNDED, SAMPLED, THREE_EPOCHS, EIGHT_EPOCHS, ON_SHAPES, ATTENTIONS, FROM_SCRATCH,
    STAGES, BEST, CONSENSUS, LENGTHS, BEAMS, NO_REPEAT,
)  # fmt: skip


def cell(values, digits=1):
    """Mean ± half of the range, with no digit that the range makes worthless."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    spread = (max(values) - min(values)) / 2
    if spread:
        digits = max(0, min(digits, -math.floor(math.log10(spread))))
    # a half is rounded up; what can only be whole and is the same in all runs has no range; the
    # spaces do not break, so that a narrow screen shows a figure in one line
    range_ = (
        f"\xa0±\xa0{spread + 1e-9:.{digits}f}" if len(values) > 1 and (spread or digits) else ""
    )
    return f"{np.mean(values):,.{digits}f}{range_}"


def table(header, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]]) if rows else ""


def scores_table(runs, rows, columns=METRICS, splits=("test",), beams=("5",), first="", above=""):
    """A row for each label, split and beam that has the first of the columns.

    :param rows: dict of labels and the names of runs
    :param above: what to say above the table, if it has rows
    """
    body = []
    for split in splits:
        for label, name in rows.items():
            for beam in beams:
                found = [row for row in scored(runs, name, split, beam) if columns[0] in row]
                if found:
                    label_ = f"{label} ({len(found)} seeds)" if len(found) > 2 else label
                    where = [SPLITS[split]] * (len(splits) > 1) + [beam] * (len(beams) > 1)
                    figures = (
                        cell([row.get(name) for row in found], DIGITS.get(name, 1))
                        for name in columns
                    )
                    body.append([label_, *where, *figures])
    where = ["split"] * (len(splits) > 1) + ["beam"] * (len(beams) > 1)
    header = [first, *where, *(TITLES.get(name, name) for name in columns)]
    return (f"{above}\n\n" if above and body else "") + table(header, body)


def costs_table(runs, rows):
    """What the training took, with the figures of the fastest epoch on a shared machine."""
    body = []
    for label, name in rows.items():
        group = [run for run in seeds(runs, name) if "epochs" in run]
        if group:
            fastest = [max(e["words_per_second"] for e in run["epochs"]) for run in group]
            seconds = [run["epochs"][-1]["seconds"] / 60 for run in group]
            parameters = f"{group[0]['parameters'] / 1e6:.1f} M"
            body.append([label, parameters, cell(fastest, 0), cell(seconds, 0)])
    return table(["", "parameters", "words/s, fastest epoch", "minutes in all"], body)


def faults_table(runs):
    people = seeds(runs, "xe")[0]["test"]["people"]
    figures = (cell([people[name]], DIGITS.get(name, 1)) for name in VARIETY)
    body = scores_table(runs, FAULTS, VARIETY)
    return f"{body}\n| people | {' | '.join(figures)} |"


def gaze_table(runs):
    """Every run that has a gaze, by its name."""
    rows = {name: name for name in sorted(set(map(without_seed, runs)))}
    above = "Every run whose gaze `eval.py` measured, by its name in [commands](#commands):"
    return scores_table(runs, rows, (*GAZE, "function places", *SHORT), BOTH, above=above)


def others_table(runs):
    """The runs that no other table names."""
    known = {name for rows in ALL for name in rows.values()}
    rows = {name: name for name in sorted(set(map(without_seed, runs)) - known)}
    return scores_table(runs, rows, METRICS, ("val", "test"), ("1", "3", "5", "10", "20"))


def commands_list(runs):
    """The command of each training, once for all its seeds."""
    lines = {}
    for name, run in sorted(runs.items()):
        if "options" in run:
            options = {k: v for k, v in run["options"].items() if k != "seed"}
            words = [f"--{k}" if v is True else f"--{k} {v}" for k, v in options.items()]
            command = " ".join(["python train.py", *words, f"--output_folder {name}"])
            machine = re.sub(r"Python \S+ \| |device ", "", run["machine"]).replace(" | ", ", ")
            seed = f"{run['epochs'][-1]['seconds']:.0f} s, {machine}"
            if name != without_seed(name):
                command = re.sub(r"-seed\d+", "-seedN", command) + " --seed N"
                seed = f"N = {run['options'].get('seed', 0)}: {seed}"
            lines.setdefault(command, []).append(seed)
    return "\n".join(f"* `{command}`<br>{'; '.join(where)}" for command, where in lines.items())


def of(decoder):
    """The trials of scheduled sampling with a decoder."""
    return {label: name for label, name in SAMPLED.items() if label.startswith(decoder)}


BOTH, ONE_TO_FIVE = ("val", "test"), ("1", "3", "5")
TABLES = {
    # of results.md
    "encoders": lambda runs: scores_table(runs, ENCODERS | GRIDS, SHORT),
    "decoders": lambda runs: scores_table(runs, DECODERS, ("BLEU-1", *SHORT)),
    "sampling": lambda runs: scores_table(runs, of("LSTM"), SAMPLING, beams=("1", "5")),
    "gaze": lambda runs: scores_table(runs, FOCUS, ("BLEU-4", "CIDEr", *GLANCE)),
    "attention": lambda runs: scores_table(runs, ATTENTIONS, SCENES[:4]),
    "recipe": lambda runs: scores_table(
        runs, {k: v for k, v in BEST.items() if k[:2] != "3c"}, SHORT, beams=("5", "20")
    ),
    "shapes": lambda runs: scores_table(runs, ON_SHAPES, (*SCENES[:4], "CIDEr")),
    "faults": faults_table,
    # of experiments.md
    "sampling of GRUs": lambda runs: scores_table(runs, of("GRU"), SAMPLING, beams=("1", "5")),
    "focus": lambda runs: scores_table(runs, FOCUS, METRICS, BOTH, ONE_TO_FIVE),
    "gazes": gaze_table,
    "decoders in full": lambda runs: scores_table(runs, SAMPLED, METRICS, beams=("1", "5")),
    "costs of eight": lambda runs: costs_table(runs, SAMPLED),
    "costs": lambda runs: costs_table(runs, THREE_EPOCHS),
    "three epochs": lambda runs: scores_table(runs, THREE_EPOCHS, METRICS, beams=ONE_TO_FIVE),
    "costs of two": lambda runs: costs_table(runs, RESNET_VGG),
    "eight epochs": lambda runs: scores_table(runs, EIGHT_EPOCHS, METRICS, BOTH, ONE_TO_FIVE),
    "scenes": lambda runs: scores_table(
        runs, {"the preset now": "shapes"} | ATTENTIONS | FROM_SCRATCH, SCENES
    ),
    "beams": lambda runs: scores_table(
        runs, BEAMS, (*SHORT, "words per caption", "ms per picture"), ("val",),
        ("1", "2", "3", "5", "8"), first="length penalty",
    ),
    "grounded": lambda runs: scores_table(runs, GROUNDED, (*SHORT, *GAZE), ("val",)),
    "no repeat": lambda runs: scores_table(runs, NO_REPEAT, (*SHORT, "repeats itself"), BOTH),
    "stages": lambda runs: scores_table(runs, STAGES, METRICS, BOTH),
    "stages of ResNet-50": lambda runs: scores_table(runs, BEST, METRICS, BOTH, ("5", "20")),
    "lengths": lambda runs: scores_table(runs, LENGTHS, METRICS, BOTH),
    "consensus": lambda runs: scores_table(runs, CONSENSUS, METRICS, BOTH, ("20",)),
    "others": others_table,
    "commands": commands_list,
}  # fmt: skip


def with_tables(runs, text):
    """A page's text with each table drawn anew."""

    def draw(found):
        if found[1] not in TABLES:
            raise SystemExit(f"<!-- {found[1]} -->: expected one of {', '.join(TABLES)}")
        return f"<!-- {found[1]} -->\n{TABLES[found[1]](runs)}\n<!-- end -->"

    return re.sub(r"<!-- ([^>\n]*?) -->\n(?:(?!<!--).)*<!-- end -->", draw, text, flags=re.S)


# ---------------------------------------------------------------------------------------- the plots

# Okabe and Ito's colours, which the colour-blind can tell apart
COLORS = {"lstm8": "#0072B2", "gru8": "#D55E00"}
FOUR = ("#0072B2", "#D55E00", "#009E73", "#000000")


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
    for schedule, color in zip(schedules[1:], FOUR[2:]):
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
        for (penalty, name), color in zip(BEAMS.items(), FOUR):
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
        "EfficientNet-Lite0": (*RECIPE.values(), "mean-consensus"),
        "ResNet-50": (*map(RECIPE_50.get, RECIPE), "mean50-consensus"),
    }
    for (label, stages), color in zip(encoders.items(), FOUR):
        for y, name in enumerate(stages):
            beam = "20" if name.endswith("consensus") else "5"
            points = [row["CIDEr"] for row in scored(runs, name, "test", beam)]
            one.plot(points, [y] * len(points), "o", color=color, label="" if y else label)
    one.set_yticks(range(len(names)), names, fontsize=12)
    one.invert_yaxis()
    one.legend(fontsize=11, loc="upper right")
    return figure


PLOTS = {
    "decoders": decoders_plot,
    "scheduled_sampling": scheduled_sampling_plot,
    "beams": beams_plot,
    "recipe": recipe_plot,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    text = "folders of runs to take into runs.json first (default: none)"
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="RUN", help=text)
    text = "the suite's top folder, with README.md and docs (default: this script's)"
    parser.add_argument("--folder", type=Path, default=ROOT, help=text)
    args = parser.parse_args()
    path = args.folder / "docs" / "runs.json"
    runs = files.read_json(path) | {f.resolve().name: read_run(f) for f in args.add}
    lines = (f"{json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(runs.items()))
    texts = {path: "{\n" + ",\n".join(lines) + "\n}\n"}
    wrong = []
    for page in (args.folder / name for name in PAGES):
        texts[page] = with_tables(runs, page.read_text(encoding="utf-8"))
        wrong += [f"{page.name}: {line}" for line in claims.wrong_claims(runs, texts[page])]
    for path, text in texts.items():
        with files.atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    with plots.default_settings():
        for name, draw in PLOTS.items():
            draw(runs).savefig(args.folder / "docs" / f"{name}.png", dpi=150)
    if wrong:
        raise SystemExit("\n".join(["all is drawn, but these sentences do not hold:", *wrong]))


if __name__ == "__main__":
    main()
