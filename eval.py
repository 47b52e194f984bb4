"""Caption the pictures of a split and score the captions against people's.

python eval.py --model checkpoints --beam_size 1 3 5
python eval.py --model seed0 seed1 --output_folder both   # an ensemble
python eval.py --model before after --average mean.pth.tar
python eval.py --model lstm gru --compare --html report.html
"""

import collections
import difflib
import functools
import itertools
import math
import sys
import time
from pathlib import Path

if sys.flags.safe_path:
    sys.exit("eval.py: error: unset PYTHONSAFEPATH, which hides this suite's files")
import utils
from utils import UserError

# loaded when first used: --help and a mistake in a flag need not wait for them
np, torch, datasets, models = map(utils.LazyModule, ("numpy", "torch", "datasets", "models"))


def main(args):
    """Load the models and the data, search for captions, score them, report."""
    with utils.processes(args.device) as device, utils.autocast(device, args.amp):
        data, searches, files = load(args, device)
        print(utils.describe_machine(device))
        mine, rows, said = utils.share(len(data)), {}, {}
        features = functools.cache(lambda c: c.features(data, args.data_folder, mine, args.workers))
        for label, (captioners, beam_size, consensus) in searches.items():
            outs = [features(captioner) for captioner in captioners]
            gazed = gaze_features(captioners, outs[0], mine.start)
            utils.set_seed(0)  # of sampled locations
            began = time.time()
            options = {"beam_size": beam_size, "consensus": consensus}
            options["with_alphas"] = data.scenes is not None or args.html is not None
            options |= utils.search_options(args)
            found = models.caption_split(captioners, outs, **options)
            best = [hypotheses[0] for hypotheses in sum(utils.all_gather(found), [])]
            seconds = time.time() - began
            if utils.is_main():
                captions = [captioners[0].text(hypothesis) for hypothesis in best]
                write_captions(data, captions, files["captions"][label])
                rows[label], own = score(data, captions, [h.alphas for h in best])
                if gazed is not None:
                    rows[label] |= measure_gaze(captioners[0], gazed, best)
                rows[label]["ms per picture"] = 1000 * seconds / len(captions)
                said[label] = captions, best, own
        if utils.is_main():
            report(args, data, files, rows, said)


def score(data, captions, alphas):
    """All figures of a split's captions: metrics, variety and, where scenes are known, truth.

    :param data: ``CaptionDataset``
    :param captions: list (pictures) of lists of words
    :param alphas: list (pictures) of float tensors (num_words, num_pixels), for scenes
    :return: (row, own): dict of floats, ints and None (not to be had); dict of lists, the pictures'
        own CIDEr and METEOR, where they are to be had
    """
    row = utils.score_captions(data.references, captions, meteor=True, each=True)
    own = row.pop("each")
    if len(data) == 1:
        row["CIDEr"] = None  # it weighs words by their rarity among pictures: always 0
        del own["CIDEr"]
    row |= score_variety(data.references, captions)
    scenes = score_scenes(data.scenes, captions, alphas) if data.scenes is not None else {}
    return row | scenes, own


# ---------------------------------------------------------------- beyond the main path


def get_args_parser():
    description, _, examples = __doc__.strip().partition("\n\n")
    parser = utils.ArgumentParser(description=description, examples=examples)
    utils.add_captioning_flags(parser, several=True)
    flag = parser.add_argument
    text = "several models do not vote as an ensemble: each is scored by itself, side by side"
    flag("--compare", action="store_true", help=text)
    text = "score, and save as this, the mean of models of which one was trained from another"
    flag("--average", type=Path, help=text)
    text = "score, and save as this, the model (or the mean) as a small file to give to others"
    flag("--export", type=Path, help=text)
    flag("--data_name", help="the data's name (default: what the checkpoint was trained on)")
    text = "which pictures; choose models on val, report on test"
    flag("--split", choices=("train", "val", "test"), default="test", help=text)
    text = "for captions and metrics, as JSON (default: the first model's, or --average's)"
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
    if args.export and len(given) > 1 and not args.average:
        raise UserError("--export: expected one --model, or several with --average")
    for flag in ("average", "export"):
        if path := getattr(args, flag):
            if utils.broadcast(path.exists()):
                raise UserError(f"--{flag} {path} exists: choose another name, or remove it")
            utils.output_path(path)
    if args.html:
        utils.output_path(args.html, page=True)


def load(args, device):
    """What the flags name, all of it checked before the work.

    :return: (``CaptionDataset``, searches, files). searches is a dict: for each column of the table
        (captioners that decode together, beam size, ``Consensus`` or None); files is a dict:
        "captions", the path of each column's; "metrics", a path; "made by", the models behind them
    :raises UserError: if something is missing or does not fit the rest
    """
    check_flags(args)
    paths = [models.run_checkpoint(path) for path in args.model or [None]]
    word_map = datasets.load_word_map(args.word_map) if args.word_map else None
    captioners = [models.load_captioner(path, device, word_map) for path in paths]
    first = captioners[0]
    for path, captioner in zip(paths, captioners):
        if captioner.word_map != first.word_map:
            raise UserError(f"{path} has another word map than {paths[0]}: expected the same")
    if args.average:
        captioners = [models.average_weights(captioners)]
    name = args.data_name or first.config["data_name"]
    if not name:
        raise UserError(f"{paths[0]} does not say on what it was trained: add --data_name")
    datasets.check_name(name)
    data = datasets.CaptionDataset(datasets.split_path(args.data_folder, args.split, name))
    check_fit(captioners, data, asked=args.word_map is not None)
    files = name_files(args, name, paths)

    if args.average and utils.is_main():
        first.config["init_from"] = " ".join(map(str, paths))
        mean = {"config": first.config, "word_map": first.word_map, "history": []}
        mean |= {part: getattr(first, part).state_dict() for part in ("encoder", "decoder")}
        models.save_checkpoint(args.average, mean)
    if args.export:
        if utils.is_main():
            models.export_captioner(first, args.export)
        utils.barrier()  # what is scored is what the file holds
        captioners = [models.load_captioner(args.export, device, word_map)]
    searches, consensus, groups = {}, None, {"": captioners}
    if args.compare:
        groups = {str(model): [captioner] for model, captioner in zip(args.model, captioners)}
    for label, group in groups.items():
        for captioner in group:
            captioner.decoder.sample_location = args.sample_location
        if args.consensus:  # in the training's arithmetic, so that the features it stored serve
            with utils.autocast(device, group[0].config.get("amp", args.amp)):
                about = args.data_folder, name, args.consensus, args.workers
                consensus = models.Consensus.of(group, *about)
        searches |= {label or k: (group, k, consensus) for k in args.beam_size}
    return data, searches, files


def name_files(args, name, paths):
    """The paths of what will be written, as ``load`` returns them.

    :raises UserError: if they cannot be written, or hold the scores of another model
    """
    made_by = {"models": [str(path.absolute()) for path in paths]}
    for how, path in {"mean of": args.average, "export of": args.export}.items():
        if path:
            made_by = {"models": [str(path.absolute())], how: made_by["models"]}
    if len(made_by["models"]) > 1:
        name += f"_{'comparison' if args.compare else 'ensemble'}_of_{len(paths)}"
    beside = args.export or args.average or paths[0]
    folder = args.output_folder or (beside.parent if args.model else Path("captions"))
    utils.check_disk(folder, 0)
    metrics = datasets.metrics_path(folder, name, args.split)
    known = utils.broadcast(not metrics.exists() or utils.read_json(metrics).get("models"))
    if known not in (True, made_by["models"]):
        raise UserError(f"{metrics} holds scores of another model: choose another --output_folder")
    columns = [(k, name, k) for k in args.beam_size]
    if args.compare:  # the models by number, as their names may be paths
        numbered = enumerate(map(str, args.model), 1)
        columns = [(model, f"{name}_{i}", args.beam_size[0]) for i, model in numbered]
    captions = {c: datasets.captions_path(folder, n, args.split, k) for c, n, k in columns}
    return {"captions": captions, "metrics": metrics, "made by": made_by}


def check_fit(captioners, data, asked):
    """:raises UserError: if the pictures have another size, or the captions unasked other words"""
    sizes = sorted({captioner.image_size for captioner in captioners})
    if sizes != [data.image_size]:
        raise UserError(
            f"{data.path} has pictures of {data.image_size} pixels, but the model was trained on "
            f"{', '.join(map(str, sizes))}; prepare the data with that --image_size"
        )
    word_map = captioners[0].word_map
    if not asked and datasets.word_map_digest(word_map) != data.word_map_digest:
        raise UserError(
            f"{data.path} was prepared with another vocabulary than the model's "
            f"{len(word_map) - 4:,} words and 4 special tokens: name the model's own data with "
            "--data_name or, to score it on these captions all the same, its own --word_map"
        )


def write_captions(data, captions, path):
    """Write captions in COCO's results format, with the source's ids if all pictures have one."""
    numbers = range(len(data)) if None in data.image_ids else data.image_ids
    rows = zip(numbers, data.image_names, map(" ".join, captions))
    names = ("image_id", "file_name", "caption")
    utils.write_json(path, [dict(zip(names, row)) for row in rows])


def report(args, data, files, rows, said):
    """Write all figures as JSON, and the page if it is wanted, and print the table."""
    # the yardstick: what people say of a picture first, held against what others say of it
    described = [captions for captions in data.references if len(captions) > 1]
    others, first = [captions[1:] for captions in described], [c[0] for c in described]
    people = score_variety(others, first) if described else {}
    names = ("amp", "length_penalty", "max_decode_steps", "consensus", "sample_location",
             "no_repeat")  # fmt: skip
    options = {name: getattr(args, name) for name in names}
    facts = {**files["made by"], "data": data.name, "split": args.split, "scale": "0-100"}
    by = "compared" if args.compare else "beam_sizes"
    utils.write_json(files["metrics"], facts | options | {by: rows, "people": people})
    table, lead = make_table({**rows, "people": people}), f"{args.split} split of {data.name}"
    heading = "model" if args.compare else "beam size"
    print(f"\n{lead}, {len(data):,} pictures")
    print_table(heading, *table)
    if next(iter(rows.values()))["METEOR"] is None:
        print("METEOR left out: it needs a Java that works (see java -version)")
    if len(data) == 1:
        print("CIDEr left out: of a single picture it is always 0")
    if None in data.image_ids:
        print("image_id in the captions is the row number: the data's source gave no ids")
    print(f"written: {files['metrics']}", *files["captions"].values(), sep="\n  ")
    if args.html:
        if not args.compare:
            lead += f", by {' and '.join(map(str, args.model or ['the captioner of the suite']))}"
        utils.write_page(args.html, page(data, table, heading, said, lead))
        print(f"  {args.html}")


def page(data, table, heading, said, lead):
    """The report as ``utils.write_page`` wants it.

    :param said: for each column of the table (captions, hypotheses, own scores), as in ``main``
    """
    (columns, groups), pictures = table, []
    for i in utils.progress(range(len(data)), desc="page", unit="picture"):
        others, captions = [texts[i] for texts, _, _ in said.values()], []
        for label, (texts, hypotheses, own) in said.items():
            scores = {name: f"{values[i]:.1f}" for name, values in own.items()}
            more = {"label": f"{heading} {label}", "differs": differing(texts[i], others)}
            more = more if len(said) > 1 else {}
            captions.append(utils.page_caption(texts[i], hypotheses[i], scores, **more))
        entry = {"name": data.image_names[i], "references": data.raw_references[i]}
        picture = utils.page_picture(data.images([i])[0].transpose(1, 2, 0), 200)
        pictures.append(entry | {"captions": captions} | picture)
    heads = [heading, *columns]
    tables = [{"title": t, "columns": heads, "rows": rows} for t, rows in groups.items()]
    return {"title": "What was said", "lead": lead, "tables": tables, "pictures": pictures}


def differing(words, others):
    """Places of the words that not all other captions have there, as a list."""
    places = set(range(len(words)))
    for other in others:
        blocks = difflib.SequenceMatcher(None, words, other, autojunk=False).get_matching_blocks()
        places &= {i for block in blocks for i in range(block.a, block.a + block.size)}
    return sorted(set(range(len(words))) - places)


GROUPS = {  # by the first figure of each
    "BLEU-1": "metrics, 0-100",
    "words per caption": "variety",
    "count": "scenes, %",
    "num_pixels": "gaze of content words",
    "ms per picture": "search",
}
PERCENT = ("distinct captions", "commonest caption", "repeats itself", "colours agreed",
           "numbers agreed")  # fmt: skip
LABELS = {name: f"{name}, %" for name in PERCENT} | {  # other names than the JSON file's
    "words used": "different words",
    "by chance": "pointing by chance",
    "num_pixels": "places of the grid",
    "function places": "of function words",
    "peak": "largest weight, mean",
    "fall": "fall by deletion, nats",
    "random fall": "by random deletion, nats",
    "deletion ratio": "against random deletion",
}


def make_table(columns):
    """Figures as text: a column for each search and one for people, a row for each figure.

    :param columns: dict of dicts: label to name to figure
    :return: (labels, groups): list; dict of lists: title to rows, which are a label and the cells
    """
    groups = {}
    for name in next(iter(columns.values())):
        if name in GROUPS:
            rows = groups.setdefault(GROUPS[name], [])
        values = (column.get(name) for column in columns.values())
        cells = ["-" if v is None else format(v, "," if type(v) is int else ".2f") for v in values]
        rows.append([LABELS.get(name, name), *cells])
    return list(map(str, columns)), groups


def print_table(heading, labels, groups):
    """Print what ``make_table`` gave."""
    for title, rows in {"": [[heading, *labels]], **groups}.items():
        print(end=f"{title}\n" if title else "")
        for name, *cells in rows:
            print(f"{name:>26}", *(c.rjust(max(8, len(x))) for c, x in zip(cells, labels)))
    print()


# ---------------------------------------------------------------- variety

COLOR_WORDS = """black blond blonde blue brown gray green grey orange pink purple red tan white
    yellow""".split()  # noqa: SIM905
NUMERALS = "one two three four five six seven eight nine ten".split()  # noqa: SIM905


def score_variety(references, captions):
    """What metrics of overlap do not show: whether a model says the same of everything, or guesses.

    :param references: list (pictures) of lists (captions) of lists of words
    :param captions: list of lists of words
    :return: dict. "words per caption"; "words used": how many different ones; in percent: "distinct
        captions"; "commonest caption" (pictures that get it); "repeats itself" (captions that say a
        word twice in a row or three words twice); "colours agreed" and "numbers agreed" (colour
        words and numerals that stand in at least one of the picture's references, None where none
        is said, or nobody says any)
    """
    counts = collections.Counter(map(tuple, captions))
    known = [set().union(*described) for described in references]

    def agreed(words):
        pairs = [(w, said) for said, caption in zip(known, captions) for w in caption if w in words]
        if all(said.isdisjoint(words) for _, said in pairs):
            return None  # nobody says any where the captions do
        return percentage([word in said for word, said in pairs])

    return {
        "words per caption": sum(map(len, captions)) / len(captions),
        "words used": len(set().union(*captions)),
        "distinct captions": 100 * len(counts) / len(captions),
        "commonest caption": 100 * max(counts.values()) / len(captions),
        "repeats itself": percentage([repeats_itself(caption) for caption in captions]),
        "colours agreed": agreed(COLOR_WORDS),
        "numbers agreed": agreed(NUMERALS),
    }


def repeats_itself(caption):
    """Whether a list of words has a word twice in a row, or the same three in a row twice."""
    threes = list(zip(caption, caption[1:], caption[2:]))
    return len(set(threes)) < len(threes) or any(a == b for a, b in zip(caption, caption[1:]))


def percentage(values):
    """Mean of numbers or truth values in percent, None of none."""
    return 100 * sum(values) / len(values) if values else None


# ---------------------------------------------------------------- scenes


def score_scenes(scenes, captions, alphas):
    """How far captions and attention are true, where it is known what the pictures show.

    :param scenes: list of scenes (see ``datasets.shapes_records``)
    :param captions: list of lists of words
    :param alphas: list of float tensors (num_words, num_pixels)
    :return: dict of percentages: captions that name as many shapes as there are ("count"), the
        right ones ("shapes"), in the right colours too ("objects"); "relation" (true ones among
        captions that state one), "pointing" (words whose attention peaks in the box of what they
        name; None for even attention) and "by chance" (the same for a peak anywhere)
    """
    verdicts = [judge_caption(scene, words) for scene, words in zip(scenes, captions)]
    looks = list(itertools.chain(*map(pointing, scenes, captions, alphas)))
    shares = {
        name: percentage([verdict[name] for verdict in verdicts if verdict[name] is not None])
        for name in ("count", "shapes", "objects", "relation")
    }
    even = all((alpha == alpha[:, :1]).all() for alpha in alphas)  # as without attention
    return shares | {
        "pointing": None if even else percentage([hit for hit, _ in looks]),
        "by chance": percentage([chance for _, chance in looks]),
    }


def judge_caption(scene, words):
    """Hold a caption against the scene that it should describe.

    :param scene: ``Record.scene`` or an element of ``CaptionDataset.scenes``
    :param words: list of words
    :return: dict of verdicts. ``count``: whether as many shapes are mentioned as there are;
        ``shapes``: whether they are those of the scene, each as often as it is there; ``objects``:
        the same with the colour just before each; ``relation``: None if the caption puts no
        mentioned shape left of, right of, above or below the next one; else whether all it says so
        is true by at least 5 % of the picture (it is not, of a shape that is not there)
    """
    mentions = [
        (i, (words[i - 1] if i and words[i - 1] in datasets.SHAPE_COLORS else None, word))
        for i, word in enumerate(words)
        if word in datasets.SHAPES
    ]
    objects = {(thing["color"], thing["shape"]): thing["box"] for thing in scene["objects"]}
    stated = []
    for (i, subject), (j, other) in itertools.pairwise(mentions):
        relations = [word for word in words[i + 1 : j] if word in datasets.PHRASES]
        stated += [_is_true(word, objects.get(subject), objects.get(other)) for word in relations]
    said = collections.Counter(mention for _, mention in mentions)
    shapes = collections.Counter(shape for _, (_, shape) in mentions)
    return {
        "count": len(mentions) == len(objects),
        "shapes": shapes == collections.Counter(shape for _, shape in objects),
        "objects": said == collections.Counter(list(objects)),
        "relation": all(stated) if stated else None,
    }


def _is_true(relation, box, other):
    if box is None or other is None:
        return False
    axis = 0 if relation in ("left", "right") else 1
    difference = (box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2
    return (difference if relation in ("right", "below") else -difference) >= 0.05


def pointing(scene, words, alphas):
    """For each word that names an object of the scene: did attention peak on what it names?

    :param scene: ``Record.scene`` or an element of ``CaptionDataset.scenes``
    :param words: list of words
    :param alphas: attention weights, float (num_words, num_pixels), pixels row by row
    :return: list of (hit, chance), one for each such word: whether the centre of the peak's cell
        lies in a box of what the word names, and the share of all cells whose centre does
    """
    side = math.isqrt(alphas.shape[1])
    y, x = (np.indices((side, side)).reshape(2, -1) + 0.5) / side  # centres of the cells
    scores = []
    for word, alpha in zip(words, np.asarray(alphas)):
        boxes = [t["box"] for t in scene["objects"] if word in (t["color"], t["shape"])]
        if boxes:
            inside = np.any(
                [(x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1) for x0, y0, x1, y1 in boxes], axis=0
            )
            scores.append((bool(inside[np.argmax(alpha)]), float(inside.mean())))
    return scores


# ---------------------------------------------------------------- gaze

# all other words count as content: nouns, verbs, adjectives, numerals; "front" and "next" are here
# for "in front of" and "next to"
FUNCTION_WORDS = frozenset(
    """a about above across after against all along alongside also although am amid among amongst an
    and another any are around as at away back be because been before behind being below beneath
    beside besides between both but by can could did do does doing down during each either every
    few for from front had has have having he her hers herself him himself his how if in inside
    into is it its itself just many may more most much near next no nor not of off on onto or
    other others out outside over past s several she so some something than that the their
    theirs them themselves then there these they this those through to together too toward
    towards under underneath until up upon very was way were what when where which while who
    whom whose will with within without would yet you your""".split()  # noqa: SIM905
)


def gaze_features(captioners, features, start, pictures=400):
    """Features of the first pictures, from all processes; None where there is no gaze to measure.

    :param features: float (N, n, encoder_dim), of this process's share, which begins at ``start``
    """
    if len(captioners) > 1 or captioners[0].config["attention"] == "mean":
        return None
    return torch.cat(utils.all_gather(features[: max(0, pictures - start)].float()))


def measure_gaze(captioner, features, hypotheses, batch_size=16):
    """How focused attention is, how far it moves, and whether the words depend on it.

    Measured on the model's own captions, teacher-forced. Deletion: at one word, the tenth of the
    places with the largest weights gets the picture's mean feature, and the word's log-probability
    falls; a random tenth is taken away for comparison. The state stays as it was with the whole
    picture: only what attention sees at this one word changes.

    :param features: float (N, n, encoder_dim), the encoder's own grid
    :param hypotheses: list of at least N ``Hypothesis``
    :return: dict of means over content words (see ``FUNCTION_WORDS``), None where there are none:
        "places" (effective number: exp of the entropy of alpha), "peak" (largest weight),
        "movement" (half the L1 distance to the previous content word's alpha, 0 to 1), "fall" and
        "random fall" (nats), "deletion ratio" (of the two, not where a random tenth costs
        nothing); the other words' "function places"; and "num_pixels"
    """
    rows = [i for i in range(len(features)) if hypotheses[i].words]
    generator, found = torch.Generator().manual_seed(0), collections.defaultdict(list)
    for i in range(0, len(rows), batch_size):
        images = features[rows[i : i + batch_size]].to(captioner.device)
        spoken = [torch.tensor(hypotheses[row].words) for row in rows[i : i + batch_size]]
        with torch.no_grad():
            for name, values in _gaze_of(captioner, images, spoken, generator).items():
                found[name].append(values.cpu())
    means = {"num_pixels": captioner.decoder.encoded_image_size**2 or features.shape[1]}
    means |= {name: torch.cat(values).mean().item() for name, values in found.items()}
    means = {name: None if math.isnan(mean) else mean for name, mean in means.items()}
    if means.get("random fall", 0) > 0:
        means["deletion ratio"] = means["fall"] / means["random fall"]
    return means


def _gaze_of(captioner, images, spoken, generator):
    """The figures of :func:`measure_gaze` for each word of a batch, as a dict of tensors."""
    functional, decoder = torch.nn.functional, captioner.decoder
    row = torch.repeat_interleave(torch.tensor([len(words) for words in spoken]))
    step = torch.cat([torch.arange(len(words)) for words in spoken])
    content = torch.tensor([captioner.words[i] not in FUNCTION_WORDS for i in torch.cat(spoken)])
    spoken = torch.nn.utils.rnn.pad_sequence(spoken, batch_first=True).to(images.device)  # (B, T)
    inputs = functional.pad(spoken, (1, 0), value=captioner.word_map[datasets.START])
    context, state = decoder.init_hidden_state(images)
    states, alphas, scores = [], [], []
    for t in range(spoken.shape[1]):
        states.append(state)
        score, attention, state = decoder.step(inputs[:, t : t + 1], state, context)
        scores.append(score[:, 0])
        alphas.append(attention.alpha[:, 0])
    alphas = torch.stack(alphas, dim=1).float()  # (B, T, num_pixels)
    places = torch.special.entr(alphas).sum(dim=2).exp()[row, step]
    found = {"places": places[content], "function places": places[~content]}
    row, step = row[content], step[content]
    if not len(row):
        return found
    alpha, words = alphas[row, step], spoken[row, step].unsqueeze(1)  # (W, num_pixels), (W, 1)
    moved = (alpha[1:] - alpha[:-1]).abs().sum(dim=1) / 2
    found |= {"peak": alpha.amax(dim=1), "movement": moved[row[1:] == row[:-1]]}

    side, size = math.isqrt(images.shape[1]), math.isqrt(alpha.shape[1])
    if side != size:  # the places that are taken away are those of the encoder's own grid
        alpha = functional.interpolate(alpha.view(-1, 1, size, size), (side, side), mode="area")
    chance = torch.rand(len(row), side * side, generator=generator)
    before = tuple(torch.stack(parts)[step, row] for parts in zip(*states))  # (W, 1, decoder_dim)
    log_prob = torch.stack(scores, dim=1)[row, step].float().log_softmax(dim=1).gather(1, words)
    for name, order in (("fall", alpha.flatten(1)), ("random fall", chance.to(alpha))):
        most = order.topk(max(1, round(side * side / 10))).indices
        deleted = torch.zeros_like(order, dtype=torch.bool).scatter(1, most, True).unsqueeze(2)
        less = torch.where(deleted, images.mean(dim=1, keepdim=True)[row], images[row])
        context, _ = decoder.init_hidden_state(less)
        score, _, _ = decoder.step(inputs[row, step].unsqueeze(1), before, context)
        after = score[:, 0].float().log_softmax(dim=1).gather(1, words)
        found[name] = (log_prob - after).squeeze(1)
    return found


if __name__ == "__main__":
    utils.run(main, get_args_parser())
