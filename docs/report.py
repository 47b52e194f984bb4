"""Tables and plots of the pages, drawn from what runs wrote.

    # from docs/runs.json
    python docs/report.py
    # first take in runs: output folders of train.py and eval.py
    python docs/report.py --add runs/lstm-seed0 runs/lstm-seed1
    # a table and curves of runs of your own, in a folder of their own; the pages stay as they are
    python docs/report.py --add sweep/*-seed* --to sweep

A run is called as its folder. Runs whose names differ in "-seed0", "-seed1" alone are one row: mean
± half of the range. A page has a table where the marks <!-- name --> and <!-- end --> stand. Which
runs it shows, and how, is in report_rows.py and report_tables.py, the plots in report_plots.py.
What sentences say of runs is held against them, too (claims.py).
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # run as a script, from anywhere

import claims
import report_plots
import report_tables

import models
import train
from captioning.report import plots
from captioning.run import files

PAGES = (
    "README.md", "docs/results.md", "docs/experiments.md", "docs/guide.md",
    "docs/captioner/README.md",
)  # fmt: skip
ELSEWHERE = "data_folder output_folder device workers resume init_from data_name".split()  # noqa: SIM905


def read_run(folder):
    """What is worth keeping of a run: options, machine, epochs, scores.

    :param folder: output folder of ``train.py``, of ``eval.py`` or of both
    """
    run = {}
    for path in Path(folder).glob("log_*.jsonl"):
        config, *epochs = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        config = {"decoder_options": {}} | config["config"]  # earlier revisions had none
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
        options |= options.pop("decoder_options", {})  # each is a flag of its own
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
        if "beam_sizes" not in metrics:
            continue  # a comparison of several models
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


def with_tables(runs, text):
    """A page's text with each table drawn anew."""
    tables = report_tables.TABLES

    def draw(found):
        if found[1] not in tables:
            raise SystemExit(f"<!-- {found[1]} -->: expected one of {', '.join(tables)}")
        return f"<!-- {found[1]} -->\n{tables[found[1]](runs)}\n<!-- end -->"

    return re.sub(r"<!-- ([^>\n]*?) -->\n(?:(?!<!--).)*<!-- end -->", draw, text, flags=re.S)


def said_of(run):
    """What a run has, in a few words."""
    parts = [f"{len(run['epochs'])} epochs"] if "epochs" in run else []
    for split in ("val", "test"):
        if split in run:
            parts.append(f"{split} scored with beam {', '.join(run[split]['beams'])}")
    return "; ".join(parts)


def write_own(runs, folder):
    """Write a table and curves of some runs into a folder: ``runs.md`` and ``curves.png``."""
    if not runs:
        raise SystemExit("--to: expected --add RUN too, the runs to show")
    text = report_tables.own_tables(runs)
    written = {folder / "runs.md": text}
    with files.atomic_path(folder / "runs.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    if trained := {name: run for name, run in runs.items() if "epochs" in run}:
        written[folder / "curves.png"] = None
        with plots.default_settings(), files.atomic_path(folder / "curves.png") as temporary:
            report_plots.own_plot(trained).savefig(temporary, dpi=150)
    print(text, "written:", *(f"\n  {path}" for path in written), sep="")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    text = "folders of runs to take into runs.json first (default: none)"
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="RUN", help=text)
    text = "folder for a table and curves of the added runs alone (default: the suite's pages)"
    parser.add_argument("--to", type=Path, metavar="FOLDER", help=text)
    text = "the suite's top folder, with README.md and docs (default: this script's)"
    parser.add_argument("--folder", type=Path, default=ROOT, help=text)
    args = parser.parse_args()
    added = {f.resolve().name: read_run(f) for f in args.add}
    for name, run in added.items():
        print(f"{name}: {said_of(run)}")
    if args.to:
        write_own(added, args.to)
        return
    path = args.folder / "docs" / "runs.json"
    runs = files.read_json(path) | added
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
        for name, draw in report_plots.PLOTS.items():
            draw(runs).savefig(args.folder / "docs" / f"{name}.png", dpi=150)
    print("written:", *texts, args.folder / "docs/*.png", sep="\n  ")
    if wrong:
        raise SystemExit("\n".join(["all is drawn, but these sentences do not hold:", *wrong]))


if __name__ == "__main__":
    main()
