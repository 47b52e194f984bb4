"""Tables and plots of docs/results.md, drawn from what runs wrote.

    # from docs/runs.json: tables into results.md, plots beside it
    python docs/report.py
    # first take in runs: the folders of train.py and eval.py
    python docs/report.py --add runs/lstm-seed0 runs/...

A run is called as its folder; folders that differ in "-seed0", "-seed1" alone are one row, mean ±
half of the range.
"""

import argparse
import functools
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # run as a script, from anywhere

import models
import train
import utils

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
SCHEDULES = ("none", "linear", "exponential", "inverse_sigmoid")
NOT_OPTIONS = (
    "data_folder",
    "output_folder",
    "device",
    "workers",
    "resume",
    "init_from",
    "data_name",
)


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
        with torch.device("meta"):
            words = len(
                json.loads(
                    Path(config["data_folder"], f"WORDMAP_{config['data_name']}.json").read_text()
                )
            )
            decoder = models.build_decoder(config, words)
        run |= {
            "machine": config.get("machine", "not recorded"),
            "updates": config["total_updates"],
            "options": {
                key: config[key]
                for key, default in defaults.items()
                if key not in NOT_OPTIONS and config.get(key, default) != default
            }
            | start_of(config),
            "parameters": sum(p.numel() for p in decoder.parameters()),
            "epochs": list(map(rounded, epochs)),
        }
    for path in sorted(Path(folder).glob("metrics_*.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        beams, people = metrics["beam_sizes"], metrics["people"]
        run[metrics["split"]] = {
            "length_penalty": metrics["length_penalty"],
            "consensus": metrics.get("consensus", 0.0),
            "people": rounded(people),
            "beams": {beam: rounded(row) for beam, row in beams.items()},
        }
    if not run:
        raise SystemExit(f"{folder}: expected log_*.jsonl or metrics_*.json")
    return run


def start_of(config):
    """The option ``--init_from``, from the folder where the report's commands are typed."""
    start = Path(config["init_from"] or "")
    name = f"{start.parent.name}/{start.name}" if start.suffix == ".tar" else start.name
    return {"init_from": name} if name else {}


def rounded(values):
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in values.items()
    }


def seeds(runs, name):
    """The runs that differ in their seed alone."""
    return [run for key, run in sorted(runs.items()) if re.sub(r"-seed\d+$", "", key) == name]


def best_epoch(run):
    metric = run["options"].get("metric", "BLEU-4")
    return max(run["epochs"], key=lambda epoch: epoch[metric])


# --------------------------------------------------------------------------------------- the tables


def cell(values, digits=2):
    """Mean, and half of the range if there are several values."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):,.{digits}f}{spread}"


def table(header, rows):
    return "\n".join(
        "| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]
    )


def scores(group, beam, names, split="test"):
    return [cell([run[split]["beams"][beam][name] for run in group]) for name in names]


def decoders_table(runs):
    rows = []
    for decoder in ("lstm", "gru"):
        group = seeds(runs, decoder)
        rows += [[decoder.upper(), beam, *scores(group, beam, METRICS)] for beam in ("1", "3", "5")]
    return table(["decoder", "beam", *METRICS], rows)


def costs_table(runs):
    rows = []
    for decoder in ("lstm", "gru"):
        group = seeds(runs, decoder)
        rows.append(
            [
                decoder.upper(),
                f"{group[0]['parameters'] / 1e6:.2f} M",
                fastest(group),
                cell([best_epoch(run)["epoch"] for run in group], 1),
                cell([best_epoch(run)["seconds"] for run in group], 0),
            ]
        )
    return table(
        ["decoder", "parameters", "words/s, fastest epoch", "epochs to best", "seconds to best"],
        rows,
    )


def fastest(group):
    return cell([max(epoch["words_per_second"] for epoch in run["epochs"]) for run in group], 0)


def scheduled_sampling_table(runs):
    rows = []
    for decoder in ("lstm", "gru"):
        for schedule in SCHEDULES:
            group = seeds(runs, decoder if schedule == "none" else f"{decoder}-{schedule}")
            rows.append(
                [
                    decoder.upper(),
                    schedule,
                    len(group),
                    *scores(group, "1", ("BLEU-4", "METEOR", "CIDEr")),
                    *scores(group, "5", ("BLEU-4", "METEOR", "CIDEr")),
                ]
            )
    return table(
        [
            "decoder",
            "schedule",
            "seeds",
            *(f"{name}, beam {beam}" for beam in "15" for name in ("BLEU-4", "METEOR", "CIDEr")),
        ],
        rows,
    )


def beam_table(runs):
    rows = []
    for name, run in sorted(runs.items()):
        if name.startswith("beam-"):
            for beam, row in run["val"]["beams"].items():
                rows.append(
                    [
                        f"{run['val']['length_penalty']:g}",
                        beam,
                        *(
                            f"{row[key]:.2f}"
                            for key in ("BLEU-4", "METEOR", "CIDEr", "words per caption")
                        ),
                        f"{row['ms per picture']:.1f}",
                    ]
                )
    return table(
        [
            "length penalty",
            "beam",
            "BLEU-4",
            "METEOR",
            "CIDEr",
            "words per caption",
            "ms per picture",
        ],
        rows,
    )


FAILURES = (
    "words per caption",
    "words used",
    "distinct captions",
    "commonest caption",
    "repeats itself",
    "colours agreed",
    "numbers agreed",
)


def failures_table(runs):
    rows = [
        [label, beam, *scores(seeds(runs, name), beam, FAILURES)]
        for label, name in (("LSTM", "lstm"), ("GRU", "gru"))
        for beam in ("1", "5")
    ]
    people = seeds(runs, "lstm")[0]["test"]["people"]
    rows.append(["people", "", *(cell([people[name]]) for name in FAILURES)])
    return table(["model", "beam", *FAILURES], rows)


STAGES = {
    "cross-entropy": "xe",
    "then the CNN fine-tuned": "fine",
    "then self-critical, CIDEr-D": "fine-scst",
    "mean weights of the last two": "mean",
    "instead self-critical, CIDEr-D + 5 METEOR": "scst-meteor",
    "mean weights of it and the fine-tuned": "mean-meteor",
    "instead CIDEr-D + 5 METEOR with --mirror, six epochs": "scst-mirror",
    "mean weights of that one and the fine-tuned": "mean-mirror",
}
LENGTHS = {
    "CIDEr-D, one model": "mean",
    "the same, length penalty 1": "mean-lp1",
    "CIDEr-D + 5 METEOR, one model": "mean-meteor",
    "the same, 0.85": "mean-meteor-lp085",
    "the same, 1": "mean-meteor-lp1",
    "CIDEr-D, ensemble of both seeds": "ensemble",
    "CIDEr-D + 5 METEOR, ensemble": "ensemble-meteor",
    "the same ensemble, 0.85": "ensemble-meteor-lp085",
    "the same ensemble, 1": "ensemble-meteor-lp1",
    "with --mirror, one model": "mean-mirror",
    "with --mirror, 0.85": "mean-mirror-lp085",
    "with --mirror, ensemble": "ensemble-mirror",
    "with --mirror, ensemble, 0.85": "ensemble-mirror-lp085",
    "the recipe, one model, 1": "mean-three",
    "the recipe, ensemble, 1": "ensemble-three",
}
CONSENSUS = {
    f"{label}{what}": f"{name}-{how}"
    for label, name in (
        ("cross-entropy", "xe"),
        ("then the CNN fine-tuned", "fine"),
        ("its mean with the CIDEr-D model", "mean"),
        ("the recipe", "mean-three"),
    )
    for what, how in (("", "beam20"), (", **consensus**", "consensus"))
}
CONSENSUS["the recipe, ensemble, **consensus**"] = "ensemble-three-consensus"
ON_PHOTOGRAPHS = {"EfficientNet-Lite0": "xe", "EfficientNet-Lite2": "lite2"}


def models_table(runs, names, beam="5"):
    """Both splits.

    :param names: dict of labels and the names of runs
    """
    rows = [
        [
            label,
            {"val": "validation"}.get(split, split),
            len(group),
            *scores(group, beam, METRICS, split),
        ]
        for split in ("val", "test")
        for label, group in ((label, seeds(runs, name)) for label, name in names.items())
    ]
    return table(["", "split", "seeds", *METRICS], rows)


ON_SHAPES = ("BLEU-4", "CIDEr", "count", "shapes", "objects", "relation", "pointing", "by chance")


def shapes_table(runs, names):
    """Test split of the shapes, beam 5, and how long the training took.

    :param names: dict of labels and the names of runs
    """
    rows = [
        [
            label,
            len(group),
            *scores(group, "5", ON_SHAPES),
            cell([run["epochs"][-1]["seconds"] for run in group], 0),
        ]
        for label, group in ((label, seeds(runs, name)) for label, name in names.items())
    ]
    return table(["", "seeds", *ON_SHAPES, "seconds"], rows)


ATTENTIONS = {"soft": "shapes", "hard": "shapes-hard", "mean": "shapes-mean"}
FROM_SCRATCH = {"ResNet-18": "scratch-resnet18", "VGG-11": "scratch-vgg11"}


def commands_table(runs):
    rows = []
    for name, run in sorted(runs.items()):
        if "options" in run:
            options = " ".join(
                f"--{key}" if value is True else f"--{key} {value}"
                for key, value in run["options"].items()
            )
            rows.append(
                [
                    name,
                    f"`python train.py {options} --output_folder {name}`",
                    f"{run['epochs'][-1]['seconds']:.0f}",
                    run["machine"].replace(" | ", ", "),
                ]
            )
    return table(["run", "command", "seconds", "machine"], rows)


TABLES = {
    "decoders": decoders_table,
    "costs": costs_table,
    "scheduled sampling": scheduled_sampling_table,
    "beams": beam_table,
    "failures": failures_table,
    "stages": functools.partial(models_table, names=STAGES),
    "lengths": functools.partial(models_table, names=LENGTHS),
    "consensus": functools.partial(models_table, names=CONSENSUS, beam="20"),
    "encoders": functools.partial(models_table, names=ON_PHOTOGRAPHS),
    "attention": functools.partial(shapes_table, names=ATTENTIONS),
    "from scratch": functools.partial(shapes_table, names=FROM_SCRATCH),
    "commands": commands_table,
}


def write_tables(runs, path):
    """Put every table between its marks, ``<!-- name -->`` and ``<!-- end -->``."""
    text = path.read_text(encoding="utf-8")
    for name, function in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        if not pattern.search(text):
            raise SystemExit(
                f"{path} has no place for the table of {name}: <!-- {name} --> and <!-- end -->"
            )
        rows = function(runs)
        text = pattern.sub(lambda found, rows=rows: f"{found[1]}{rows}\n{found[2]}", text)
    with utils.atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------- the plots


def panels(count):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * count, 3.4), layout="constrained")
    axes = figure.subplots(1, count)
    for one in axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def decoders_plot(runs):
    """Curves of LSTM and GRU, a thin line for each seed."""
    figure, axes = panels(3)
    for decoder, color in (("lstm", "C0"), ("gru", "C1")):
        for i, run in enumerate(seeds(runs, decoder)):
            for one, name in zip(axes, ("nll", "BLEU-4", "CIDEr")):
                one.plot(
                    [e["epoch"] for e in run["epochs"]],
                    [e[name] for e in run["epochs"]],
                    "o-",
                    color=color,
                    markersize=3,
                    label=None if i else decoder.upper(),
                )
    for one, title in zip(
        axes, ("training: nats per word", "validation, beam 5: BLEU-4", "validation, beam 5: CIDEr")
    ):
        one.set_title(title)
        one.set_xlabel("epoch")
        one.legend(frameon=False)
        one.xaxis.get_major_locator().set_params(integer=True)
    return figure


def scheduled_sampling_plot(runs):
    """The true word's probability over the updates, and each schedule's scores at beams 1 and 5."""
    figure, axes = panels(3)
    for schedule in SCHEDULES[1:]:
        run = seeds(runs, f"lstm-{schedule}")[0]
        options, updates = run["options"], np.linspace(0, run["updates"], 200)
        constants = models.Schedule(run["updates"], options.get("ss_min", 0.75))
        name = options["scheduled_sampling"]
        epsilon = [models.scheduled_sampling_epsilon(name, i, constants) for i in updates]
        axes[0].plot(updates, epsilon, label=schedule.replace("_", " "))
    axes[0].set_title("probability of the true word")
    axes[0].set_xlabel("update")
    axes[0].set_ylim(0, 1.05)
    axes[0].legend(frameon=False)
    for one, beam in zip(axes[1:], "15"):
        for shift, decoder in ((-0.1, "lstm"), (0.1, "gru")):
            points = [
                (i + shift, run["test"]["beams"][beam]["CIDEr"])
                for i, schedule in enumerate(SCHEDULES)
                for run in seeds(runs, decoder if schedule == "none" else f"{decoder}-{schedule}")
            ]
            one.plot(*zip(*points), "o", label=decoder.upper())
        one.set_xticks(
            range(len(SCHEDULES)), [schedule.replace("_", "\n") for schedule in SCHEDULES]
        )
        one.set_title(f"test CIDEr, beam {beam}, a dot per seed")
        one.legend(frameon=False)
    return figure


def beams_plot(runs):
    """Scores and cost over beam sizes, a line for each length penalty."""
    figure, axes = panels(3)
    for name, run in sorted(runs.items()):
        if name.startswith("beam-"):
            beams = run["val"]["beams"]
            for one, key in zip(axes, ("BLEU-4", "CIDEr", "ms per picture")):
                one.plot(
                    list(map(int, beams)),
                    [row[key] for row in beams.values()],
                    "o-",
                    markersize=3,
                    label=f"{run['val']['length_penalty']:g}",
                )
                one.set_title(f"validation: {key}" if one is not axes[2] else key)
                one.set_xlabel("beam size")
    axes[0].legend(frameon=False, title="length penalty")
    return figure


PLOTS = {
    "decoders": decoders_plot,
    "scheduled_sampling": scheduled_sampling_plot,
    "beams": beams_plot,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--add",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="folders of runs to take into runs.json first (default: none)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=HERE,
        help="where runs.json and results.md are, and the plots go (default: this script's)",
    )
    args = parser.parse_args()
    path = args.folder / "runs.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    runs |= {folder.resolve().name: read_run(folder) for folder in args.add}
    try:
        write_tables(runs, args.folder / "results.md")
    except KeyError as error:
        raise SystemExit(
            f"a table lacks {error} of a run; nothing was taken in. Score each run as its row's "
            "others, for example by eval.py --beam_size 1 3 5 --amp"
        ) from error
    with utils.atomic_path(path) as temporary:
        temporary.write_text(
            "{\n"
            + ",\n".join(
                f"{json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(runs.items())
            )
            + "\n}\n",
            encoding="utf-8",
        )
    for name, draw in PLOTS.items():
        draw(runs).savefig(args.folder / f"{name}.png", dpi=100)


if __name__ == "__main__":
    main()
