"""The tables of the pages, by the names that their marks have."""

import math
import re

import numpy as np
import report_rows as shown
from report_rows import of, scored, seeds, without_seed

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
SHORT = ("BLEU-4", "METEOR", "CIDEr")
# stages, by how their rows begin
IN_RESULTS = ("1. ", "2", "3. ", "4. ", "4e. ", "4, ", "10e. ", "10e, captioned")
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
    "looks": "looks, %", "function looks": "function words look, %",
}  # fmt: skip


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


def adapting_table(runs):
    """CIDEr on pictures of dogs and on those without, by how many pictures of dogs there were."""
    body = []
    for size in shown.SIZES:
        for label, name in shown.ADAPTING.items():
            names = name.format(size), f"{name.format(size)}-old"
            figures = [[row["CIDEr"] for row in scored(runs, n, "test", "5")] for n in names]
            if figures[0] and (size == shown.SIZES[0] or "{}" in name):
                body.append([f"{size:,}" if "{}" in name else "", label, *map(cell, figures)])
    header = ["pictures", "", "CIDEr on dogs", "CIDEr on pictures without dogs"]
    return table(header, body)


def faults_table(runs):
    people = seeds(runs, "xe")[0]["test"]["people"]
    figures = (cell([people[name]], DIGITS.get(name, 1)) for name in VARIETY)
    body = scores_table(runs, shown.FAULTS, VARIETY)
    return f"{body}\n| people | {' | '.join(figures)} |"


def gaze_table(runs):
    """Every run that has a gaze, by its name."""
    rows = {name: name for name in sorted(set(map(without_seed, runs)))}
    above = "Every run whose gaze `eval.py` measured, by its name in [commands](#commands):"
    return scores_table(runs, rows, (*GAZE, "function places", *SHORT), BOTH, above=above)


def others_table(runs):
    """The runs that no other table names."""
    known = {name for rows in shown.ALL for name in rows.values()}
    rows = {name: name for name in sorted(set(map(without_seed, runs)) - known)}
    return scores_table(runs, rows, METRICS, ("val", "test"), ("1", "3", "5", "10", "20"))


def own_tables(runs):
    """A page of any runs: what training reached, what ``eval.py`` found; seeds are one row."""
    names = {name: name for name in sorted(set(map(without_seed, runs)))}
    body = []
    for name in names:
        group = [run["epochs"] for run in seeds(runs, name) if "epochs" in run]
        if group:
            best = [max(epochs, key=lambda epoch: epoch["CIDEr"]) for epochs in group]
            figures = (cell([e[key] for e in best], 1) for key in ("BLEU-4", "ROUGE-L", "CIDEr"))
            minutes = cell([epochs[-1]["seconds"] / 60 for epochs in group], 0)
            body.append([name, len(group), *figures, cell([e["epoch"] for e in best], 0), minutes])
    header = ["training", "seeds", "BLEU-4", "ROUGE-L", "CIDEr", "best epoch", "minutes"]
    beams = sorted({b for run in runs.values() for s in SPLITS for b in beams_of(run, s)}, key=int)
    scores = scores_table(runs, names, METRICS, tuple(SPLITS), beams or ("5",), first="scores")
    lead = "Seeds of a run are one row: mean ± half of the range.\n"
    lead += "Of trainings: validation, at the epoch of the best CIDEr."
    return "\n\n".join(filter(None, [lead, table(header, body), scores])) + "\n"


def beams_of(run, split):
    return run.get(split, {}).get("beams", {})


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


BOTH, ONE_TO_FIVE = ("val", "test"), ("1", "3", "5")
TABLES = {
    # of results.md
    "encoders": lambda runs: scores_table(runs, shown.ENCODERS | shown.GRIDS, SHORT),
    "decoders": lambda runs: scores_table(runs, shown.DECODERS, ("BLEU-1", *SHORT)),
    "transformer": lambda runs: scores_table(
        runs,
        shown.DECODERS_OF_ALL_KINDS,
        (*SHORT, "words used", "repeats itself", "colours agreed", "places", "fall"),
    ),
    "sampling": lambda runs: scores_table(runs, of("LSTM"), SAMPLING, beams=("1", "5")),
    "gaze": lambda runs: scores_table(runs, shown.FOCUS, ("BLEU-4", "CIDEr", *GLANCE)),
    "attention": lambda runs: scores_table(runs, shown.ATTENTIONS, SCENES[:4]),
    "recipe": lambda runs: scores_table(
        runs, {k: v for k, v in shown.BEST.items() if k.startswith(IN_RESULTS)}, SHORT,
        beams=("5", "20"),
    ),
    "adapting": adapting_table,
    "shapes": lambda runs: scores_table(runs, shown.ON_SHAPES, (*SCENES[:4], "CIDEr")),
    "faults": faults_table,
    # of experiments.md
    "sampling of GRUs": lambda runs: scores_table(runs, of("GRU"), SAMPLING, beams=("1", "5")),
    "focus": lambda runs: scores_table(runs, shown.FOCUS, METRICS, BOTH, ONE_TO_FIVE),
    "gazes": gaze_table,
    "decoders in full": lambda runs: scores_table(runs, shown.SAMPLED, METRICS, beams=("1", "5")),
    "costs of eight": lambda runs: costs_table(runs, shown.SAMPLED),
    "costs": lambda runs: costs_table(runs, shown.THREE_EPOCHS),
    "three epochs": lambda runs: scores_table(runs, shown.THREE_EPOCHS, METRICS, beams=ONE_TO_FIVE),
    "costs of two": lambda runs: costs_table(runs, shown.RESNET_VGG),
    "eight epochs": lambda runs: scores_table(runs, shown.EIGHT_EPOCHS, METRICS, BOTH, ONE_TO_FIVE),
    "scenes": lambda runs: scores_table(
        runs, {"the preset now": "shapes"} | shown.ATTENTIONS | shown.FROM_SCRATCH, SCENES
    ),
    "beams": lambda runs: scores_table(
        runs, shown.BEAMS, (*SHORT, "words per caption", "ms per picture"), ("val",),
        ("1", "2", "3", "5", "8"), first="length penalty",
    ),
    "looking": lambda runs: scores_table(
        runs, shown.LOOKING, (*SHORT, *VARIETY, *GLANCE[:3]), BOTH
    ),
    "sentinel": lambda runs: scores_table(
        runs, shown.SENTINEL, (*SHORT, *GLANCE[:3], "looks", "function looks"), BOTH
    ),
    "recipes of Transformers": lambda runs: scores_table(
        runs, shown.TRANSFORMERS, (*SHORT, VARIETY[0], VARIETY[2], "places", "fall"), ("val",)
    ),
    "grounded": lambda runs: scores_table(runs, shown.GROUNDED, (*SHORT, *GAZE), ("val",)),
    "no repeat": lambda runs: scores_table(runs, shown.NO_REPEAT, (*SHORT, "repeats itself"), BOTH),
    "stages": lambda runs: scores_table(runs, shown.STAGES, METRICS, BOTH),
    "stages of ResNet-50": lambda runs: scores_table(runs, shown.BEST, METRICS, BOTH, ("5", "20")),
    "lengths": lambda runs: scores_table(runs, shown.LENGTHS, METRICS, BOTH),
    "consensus": lambda runs: scores_table(runs, shown.CONSENSUS, METRICS, BOTH, ("20",)),
    "others": others_table,
    "commands": commands_list,
}  # fmt: skip
