"""Tables and plots of the pages, drawn from what runs wrote.

    # from docs/runs.json
    python docs/report.py
    # first take in runs: output folders of train.py and eval.py
    python docs/report.py --add runs/lstm-seed0 runs/lstm-seed1

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


def with_tables(runs, text):
    """A page's text with each table drawn anew."""
    tables = report_tables.TABLES

    def draw(found):
        if found[1] not in tables:
            raise SystemExit(f"<!-- {found[1]} -->: expected one of {', '.join(tables)}")
        return f"<!-- {found[1]} -->\n{tables[found[1]](runs)}\n<!-- end -->"

    return re.sub(r"<!-- ([^>\n]*?) -->\n(?:(?!<!--).)*<!-- end -->", draw, text, flags=re.S)


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
        for name, draw in report_plots.PLOTS.items():
            draw(runs).savefig(args.folder / "docs" / f"{name}.png", dpi=150)
    if wrong:
        raise SystemExit("\n".join(["all is drawn, but these sentences do not hold:", *wrong]))


if __name__ == "__main__":
    main()
