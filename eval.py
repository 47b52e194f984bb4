"""Caption the pictures of a split and score the captions against people's.

python eval.py --model checkpoints --beam_size 1 3 5
python eval.py --model seed0 seed1 --output_folder both   # an ensemble
python eval.py --model before after --average mean.pth.tar
python eval.py --model lstm gru --compare --html report.html
python eval.py --captions theirs.json   # another system's, beside our own
"""

import functools
import os
import sys
import time
from pathlib import Path

if sys.flags.safe_path:
    sys.exit("eval.py: error: unset PYTHONSAFEPATH, which hides this suite's files")

import utils
from captioning.run import command_line, distributed, files, machine, messages, paths
from captioning.run.lazy import lazy
from utils import UserError

datasets, models, encoders = lazy("datasets", "models", "captioning.model.encoders")
bootstrap, evaluation, gaze, metrics, others, page, scenes, tables = lazy(
    "bootstrap", "evaluation", "gaze", "metrics", "others", "page", "scenes", "tables",
    within="captioning.report",
)  # fmt: skip

SEARCH = (  # flags on which the figures depend, kept beside them
    "amp", "length_penalty", "max_decode_steps", "consensus", "sample_location", "no_repeat"
)  # fmt: skip


def main(args):
    """Load the models and the data, search for captions, score them, report."""
    with machine.processes(args.device) as device, machine.autocast(device, args.amp):
        data, searches, theirs, outputs = load(args, device)
        print(machine.describe_machine(device))
        mine, rows, said, failed = distributed.share(len(data)), {}, {}, []
        features = functools.cache(lambda c: c.features(data, args.data_folder, mine, args.workers))
        try:
            for label, (captioners, beam_size, consensus) in searches.items():
                outs = [features(captioner) for captioner in captioners]
                gazed = gaze.gaze_features(captioners, outs[0], mine.start)
                best, seconds = search(args, data, captioners, outs, beam_size, consensus)
                if distributed.is_main():
                    told, row = assess(data, captioners[0], best, outputs["captions"][label])
                    with messages.naming("the gaze could not be measured", failed):
                        row |= gaze.measure_gaze(captioners[0], gazed, best)
                    row["ms per picture"] = 1000 * seconds / len(best)
                    rows[label], said[label] = row, told
        finally:  # should a later search fail, the earlier ones' figures are not lost
            if rows:
                figures = {label: score(data, captions) for label, captions in theirs.items()}
                said |= {label: (theirs[label], None, own) for label, (_, own) in figures.items()}
                report(args, data, outputs, rows, {k: row for k, (row, _) in figures.items()}, said)
    if failed:  # all else was scored and written
        sys.exit(1)


def search(args, data, captioners, outs, beam_size, consensus):
    """Caption this process's pictures, and gather those of all.

    :param outs: list of float tensors (N, n, encoder_dim), each captioner's features of them
    :return: list of the split's best ``Hypothesis``, and the seconds that it took
    """
    machine.set_seed(0)  # of sampled locations
    began = time.time()
    options = command_line.search_options(args)
    options |= {"beam_size": beam_size, "consensus": consensus}
    options["with_alphas"] = data.scenes is not None or args.html is not None
    found = models.caption_split(captioners, outs, **options)
    best = [hypotheses[0] for hypotheses in sum(distributed.all_gather(found), [])]
    return best, time.time() - began


def assess(data, captioner, best, path):
    """Score a search's hypotheses, and write the captions to a file.

    :return: (captions, best, the pictures' own scores), as ``report`` takes it; dict of figures
    """
    captions = [captioner.text(hypothesis) for hypothesis in best]
    row, own = score(data, captions, [hypothesis.alphas for hypothesis in best])
    told = captions, best, own
    evaluation.write_captions(data, told, path)
    return told, row


def load(args, device):
    """What the flags name, all of it checked before the work.

    :return: (``CaptionDataset``, searches, theirs, outputs). searches is a dict: for each column of
        the table (captioners that decode together, beam size, ``Consensus`` or None); theirs one of
        other systems' captions; outputs one: "captions", the path of each column's; "metrics" and
        "scores", paths; "made by", the models behind them
    :raises UserError: if something is missing or does not fit the rest
    """
    check_flags(args)
    checkpoints = [models.run_checkpoint(path) for path in args.model or [None]]
    word_map = datasets.load_word_map(args.word_map) if args.word_map else None
    options = device, word_map, not args.compare
    captioners = [models.load_captioner(path, *options) for path in checkpoints]
    first = captioners[0]
    strange = (p for p, c in zip(checkpoints, captioners) if c.word_map != first.word_map)
    if (other := next(strange, None)) and not (args.compare or args.average):
        raise UserError(
            f"{other} has another word map than {checkpoints[0]}: models that vote need the same "
            "words; --compare scores each by itself"
        )
    if args.average:
        captioners = [models.average_weights(captioners, models.build_decoder)]
    name = args.data_name or first.config["data_name"]
    if not name:
        raise UserError(f"{checkpoints[0]} does not say on what it was trained: add --data_name")
    paths.check_name(name)
    path = paths.split_path(args.data_folder, args.split, name)
    names = {captioner.config["data_name"] for captioner in captioners} - {name, ""}
    if names and not (args.data_name or path.exists()):
        names = " or ".join(sorted(names))
        raise UserError(f"there is no {path}, of the first model: add --data_name, perhaps {names}")
    data = datasets.CaptionDataset(path)
    encoders.tell_sizes(captioners, data)
    theirs = {str(path): others.read_captions(path, data) for path in args.captions}
    outputs = name_files(args, name, checkpoints)
    train_path = paths.split_path(args.data_folder, "train", name)
    known = datasets.CaptionDataset(train_path) if args.consensus else None

    if args.average and distributed.is_main():
        first.config["init_from"] = " ".join(map(str, checkpoints))
        mean = {"config": first.config, "word_map": first.word_map, "history": []}
        mean |= {part: getattr(first, part).state_dict() for part in ("encoder", "decoder")}
        models.save_checkpoint(args.average, mean)
    if args.export:
        if distributed.is_main():
            models.export_captioner(first, args.export)
        distributed.barrier()  # what is scored is what the file holds
        captioners = [models.load_captioner(args.export, device, word_map)]
    searches, consensus, groups = {}, None, {"": captioners}
    if args.compare:
        groups = {str(model): [captioner] for model, captioner in zip(args.model, captioners)}
    for label, group in groups.items():
        for captioner in group:
            captioner.decoder.sample_location = args.sample_location
        if args.consensus:
            how = args.consensus, args.workers, args.amp
            consensus = models.Consensus.of(group, known, *how)
        searches |= {label or k: (group, k, consensus) for k in args.beam_size}
    return data, searches, theirs, outputs


def name_files(args, name, checkpoints):
    """The paths of what will be written, as ``load`` returns them.

    :raises UserError: if they cannot be written, or hold the scores of another model
    """
    made_by = {"models": [str(path.absolute()) for path in checkpoints]}
    for how, path in {"mean of": args.average, "export of": args.export}.items():
        if path:
            made_by = {"models": [str(path.absolute())], how: made_by["models"]}
    if len(made_by["models"]) > 1:
        name += f"_{'comparison' if args.compare else 'ensemble'}_of_{len(checkpoints)}"
    beside = args.export or args.average or checkpoints[0]
    own = Path("captions") if beside == paths.DEFAULT_CAPTIONER else beside.parent
    folder = args.output_folder or own
    files.check_disk(folder, 0)
    metrics = paths.metrics_path(folder, name, args.split)
    found = metrics.exists() and files.read_json(metrics)
    # beside its model a run that was moved is known by the name of its file
    is_beside = folder.resolve() == own.resolve() and len(made_by["models"]) == 1
    told = lambda found: [Path(m).name if is_beside else os.path.realpath(m) for m in found]
    other = found and told(found.get("models") or [""]) != told(made_by["models"])
    if distributed.broadcast(other):
        raise UserError(f"{metrics} holds scores of another model: choose another --output_folder")
    columns = [(k, name, k) for k in args.beam_size]
    if args.compare:  # the models by number, as their names may be paths
        numbered = enumerate(map(str, args.model), 1)
        columns = [(model, f"{name}_{i}", args.beam_size[0]) for i, model in numbered]
    captions = {c: paths.captions_path(folder, n, args.split, k) for c, n, k in columns}
    lost = found and found.get("beam_sizes", {}).keys() - {str(column) for column, *_ in columns}
    lost = lost or (found and "captions" in found and not args.captions)
    if lost or found and any(found.get(flag) != getattr(args, flag) for flag in SEARCH):
        messages.note(f"{metrics} has figures of other flags: --output_folder FOLDER keeps both")
    written = {path.resolve() for path in captions.values()}
    if lost := [path for path in args.captions if path.resolve() in written]:
        what = "would be written over: copy it, or choose another --output_folder"
        raise UserError(f"--captions {lost[0]} {what}")
    scores = paths.scores_path(folder, name, args.split)
    return {"captions": captions, "metrics": metrics, "scores": scores, "made by": made_by}


def score(data, captions, alphas=None):
    """All figures of a split's captions: metrics, variety and, where scenes are known, truth.

    :param data: ``CaptionDataset``
    :param captions: list (pictures) of lists of words
    :param alphas: list (pictures) of float tensors (num_words, num_pixels), for scenes
    :return: (row, own): dict of floats, ints and None (not to be had); dict of lists, the pictures'
        own scores, where they are to be had
    """
    row = metrics.score_captions(data.references, captions, meteor=True, each=True)
    own = row.pop("each")
    if len(data) == 1:
        row["CIDEr"] = None  # it weighs words by their rarity among pictures: always 0
        del own["CIDEr"]
    row |= metrics.score_variety(data.references, captions)
    if data.scenes is not None:
        row |= scenes.score_scenes(data.scenes, captions, alphas)
    return row, own


def report(args, data, outputs, rows, theirs, said):
    """Write all figures as JSON, each picture's as CSV, and a page if wanted; print the table.

    :param rows, theirs: dicts: the figures of each column, of own captions and of other systems'
    :param said: dict: for each column (captions, hypotheses or None, the pictures' own scores)
    """
    # the yardstick: what people say of a picture first, held against what others say of it
    described = [captions for captions in data.references if len(captions) > 1]
    rest, first = [captions[1:] for captions in described], [c[0] for c in described]
    people = metrics.score_variety(rest, first) if len(described) > 1 else {}
    options = {name: getattr(args, name) for name in SEARCH}
    facts = {**outputs["made by"], "data": data.name, "split": args.split, "scale": "0-100"}
    found = {"compared" if args.compare else "beam_sizes": rows, "people": people}
    found |= {"captions": theirs} if theirs else {}
    kind = "model" if args.compare else "beam size"
    heading = f"{kind} or file" if theirs else kind
    columns = rows | theirs | ({"people": people} if people else {})  # not of a single picture
    figures = [tables.make_table(heading, columns)]
    if len(said) > 1 and (args.compare or theirs):  # the search may have been stopped
        against = f"{kind} {next(iter(rows))}"
        texts, own = ({label: part[i] for label, part in said.items()} for i in (0, 2))
        above = bootstrap.differences(data.references, texts, own)
        found["differences"] = {"from": against, **bootstrap.FACTS, "of": above}
        figures.append(tables.difference_table(heading, against, above))
    files.write_json(outputs["metrics"], facts | options | found)
    evaluation.write_scores(data, said, heading, outputs["scores"])
    lead = f"{args.split} split of {data.name}"
    print(f"\n{lead}, {messages.counted(len(data), 'picture')}")
    for table in figures:
        tables.print_table(table)
    if next(iter(rows.values()))["METEOR"] is None:
        print("METEOR left out: it needs a Java that works (see java -version)")
    if len(data) == 1:
        print("CIDEr left out: of a single picture it is always 0")
    for label, row in rows.items():
        if least := row.get("looks least for"):
            least = ", ".join(f"{word} {share:.0f} %" for word, share in least.items())
            print(f"{kind} {label} looks least for: {least}")
    for label, (captions, *_) in said.items():
        if short := metrics.too_short(captions):
            print(f"{label if label in theirs else f'{kind} {label}'}: {short}")
    if None in data.image_ids:
        print("image_id in the captions is the row number: the data's source gave no ids")
    written = [outputs["metrics"], outputs["scores"], *(outputs["captions"][k] for k in rows)]
    print(f"written: {written[0]}", *written[1:], sep="\n  ")
    if args.html:
        if not args.compare:
            lead += f", by {' and '.join(map(str, args.model or ['the captioner of the suite']))}"
        shown = {label if label in theirs else f"{kind} {label}": s for label, s in said.items()}
        shown = evaluation.report_page(data, sum(figures, []), shown, lead, args.page_side)
        page.write_page(args.html, shown)
        print(f"  {args.html}")


def get_args_parser():
    parser = command_line.ArgumentParser(__doc__)
    command_line.add_captioning_flags(parser, several=True)
    flag = parser.add_argument
    text = "several models do not vote as an ensemble: each is scored by itself, side by side"
    flag("--compare", action="store_true", help=text)
    text = "captions of other systems, as COCO's results or caption.py's lists, to be scored too"
    flag("--captions", type=Path, nargs="+", default=[], metavar="FILE", help=text)
    text = "score, and save as this, the mean of models of which one was trained from another"
    flag("--average", type=Path, help=text)
    text = "score, and save as this, the model (or the mean) as a small file to give to others"
    flag("--export", type=Path, help=text)
    flag("--data_name", help="the data's name (default: what the checkpoint was trained on)")
    text = "which pictures; choose models on val, report on test"
    flag("--split", choices=("train", "val", "test"), default="test", help=text)
    text = (
        "for captions and metrics, as JSON (default: beside the first model, or the one that is "
        "made; captions for the suite's own)"
    )
    flag("--output_folder", type=Path, help=text)
    return parser


def check_flags(args):
    """:raises UserError: for flags that do not fit each other, or name what cannot be written"""
    if args.consensus and args.split == "train":
        raise UserError("--consensus asks the training captions, which cannot be scored with it")
    given = args.model or []
    if args.compare and (len(set(given)) < max(2, len(given)) or len(args.beam_size) > 1):
        raise UserError("--compare: expected several different --model, and one --beam_size")
    if args.compare and (args.average or args.export):
        raise UserError("--compare: expected no --average and no --export, which make one model")
    if len(set(args.captions)) < len(args.captions):
        raise UserError("--captions: expected different files")
    if args.export and len(given) > 1 and not args.average:
        raise UserError("--export: expected one --model, or several with --average")
    if args.average and args.average == args.export:
        raise UserError("--average and --export: expected different files")
    for flag in ("average", "export"):
        if path := getattr(args, flag):
            if distributed.broadcast(path.exists()):
                raise UserError(f"--{flag} {path} exists: choose another name, or remove it")
            files.output_path(path)
    if args.average and len(given) < 2:
        raise UserError("--average: expected several --model, of which it writes the mean")
    if args.html:
        page.page_path(args.html)


if __name__ == "__main__":
    utils.run(main, get_args_parser())
