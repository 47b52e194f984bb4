"""Caption every picture of a split with beam search and score the captions against what people wrote.

python eval.py --model checkpoints/BEST_checkpoint_flickr8k_5_cap_per_img_5_min_word_freq.pth.tar
python eval.py --model checkpoints/BEST_checkpoint_shapes_5_cap_per_img_5_min_word_freq.pth.tar --beam_size 1 3 5
python eval.py --model seed0/BEST_checkpoint_*.pth.tar seed1/BEST_checkpoint_*.pth.tar   # an ensemble
python eval.py --model before/BEST_checkpoint_*.pth.tar after/BEST_checkpoint_*.pth.tar --average mean/BEST.pth.tar
"""

import argparse
import collections
import itertools
import shutil
import time
from pathlib import Path

import numpy as np
import torch

import datasets
import models
import utils
from utils import UserError

COLORS = frozenset(
    [
        "black",
        "blond",
        "blonde",
        "blue",
        "brown",
        "gray",
        "green",
        "grey",
        "orange",
        "pink",
        "purple",
        "red",
        "tan",
        "white",
        "yellow",
    ]
)
NUMERALS = frozenset(
    ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
)


def get_args_parser():
    parser = argparse.ArgumentParser(description="Score a captioner.")
    parser.add_argument(
        "--model",
        type=Path,
        nargs="+",
        required=True,
        metavar="CHECKPOINT",
        help="checkpoint written by train.py; several of one word map decode together, as an ensemble",
    )
    parser.add_argument(
        "--average",
        type=Path,
        metavar="FILE",
        help="instead of decoding together: give one model the mean of the models' weights, and save it "
        "as this checkpoint; for models of which one was trained from another (--init_from), or "
        "all from one (default: no averaging)",
    )
    parser.add_argument(
        "--word_map",
        type=Path,
        help="word map, checked against the checkpoint's own (default: not needed, except for a "
        "checkpoint of the PyTorch captioning tutorial, which keeps none)",
    )
    parser.add_argument(
        "--data_folder",
        type=Path,
        default=Path("data"),
        help="folder with the files that create_input_files.py wrote (default: %(default)s)",
    )
    parser.add_argument(
        "--data_name", help="their common name (default: what the checkpoint was trained on)"
    )
    parser.add_argument(
        "--split",
        choices=datasets.SPLITS,
        default="test",
        help="which pictures; choose models on val, report on test (default: %(default)s)",
    )
    parser.add_argument(
        "--output_folder",
        type=Path,
        help="folder for captions and metrics, as JSON (default: the first checkpoint's, or --average's)",
    )
    utils.add_search_flags(parser, several=True)
    utils.add_device_flags(parser)
    return parser


def main(args):
    if args.consensus and args.split == "train":
        raise UserError(
            "--consensus asks what people said of training pictures, so --split train cannot be scored with it"
        )
    with utils.processes(args.device) as device:
        evaluate(args, device)


def evaluate(args, device):
    dtype = torch.bfloat16 if args.amp else torch.float32
    word_map = datasets.load_word_map(args.word_map) if args.word_map else None
    captioners = [models.load_captioner(path, device, word_map) for path in args.model]
    first = captioners[0]
    for path, captioner in zip(args.model, captioners):
        if captioner.word_map != first.word_map:
            raise UserError(
                f"{path} has another word map than {args.model[0]}; an ensemble needs one word map"
            )
        captioner.decoder.sample_location = args.sample_location
    if args.average:
        if utils.broadcast(args.average.exists()):
            raise UserError(f"--average {args.average} exists: choose another name, or remove it")
        captioners = [models.average_weights(captioners)]
    name = args.data_name or first.config["data_name"]
    if not name:
        raise UserError(
            f"{args.model[0]} does not say on what it was trained: name the data with --data_name"
        )
    datasets.check_name(name)
    label = name if len(captioners) == 1 else f"{name}_ensemble_of_{len(captioners)}"
    folder = args.output_folder or (args.average or args.model[0]).parent
    data = datasets.CaptionDataset(datasets.split_path(args.data_folder, args.split, name))
    if any(captioner.image_size != data.image_size for captioner in captioners):
        raise UserError(
            f"{data.path} has pictures of {data.image_size} pixels, but the model was trained on "
            f"{', '.join(str(c.image_size) for c in captioners)}; prepare the data with that --image_size"
        )
    path = datasets.metrics_path(folder, label, args.split)
    made_by = {"models": [str(model.absolute()) for model in args.model]}
    if args.average:
        made_by = {"models": [str(args.average.absolute())], "mean of": made_by["models"]}
    if utils.broadcast(path.exists() and utils.read_json(path).get("models") != made_by["models"]):
        raise UserError(
            f"{path} holds the scores of another model: choose another --output_folder, or remove it"
        )
    if args.average:
        save_average(args, first)
    print(utils.describe_machine(device))
    features = [features_of(data, captioner, args, name, dtype) for captioner in captioners]
    consensus = None
    if args.consensus:
        known = models.described_pictures(captioners, args.data_folder, name, dtype, args.workers)
        consensus = models.Consensus(captioners, *known, args.consensus)
    rows = {}
    for beam_size in args.beam_size:
        utils.set_seed(0)  # of sampled locations
        began = time.time()
        found = models.caption_split(
            captioners,
            features,
            dtype,
            beam_size=beam_size,
            length_penalty=args.length_penalty,
            max_decode_steps=args.max_decode_steps,
            with_alphas=data.scenes is not None,
            consensus=consensus,
        )
        found = sum(utils.all_gather(found), [])
        seconds = time.time() - began
        if not utils.is_main():
            continue
        best = [hypotheses[0] for hypotheses in found]
        captions = [first.text(hypothesis) for hypothesis in best]
        utils.write_json(
            datasets.captions_path(folder, label, args.split, beam_size),
            [
                {"image_id": i, "file_name": data.image_names[i], "caption": " ".join(words)}
                for i, words in enumerate(captions)
            ],
        )
        rows[beam_size] = {
            **utils.score_captions(data.references, captions, meteor=True),
            **score_variety(data.references, captions),
            "ms per picture": 1000 * seconds / len(captions),
        }
        if data.scenes is not None:
            rows[beam_size] |= score_scenes(
                data.scenes, captions, [hypothesis.alphas for hypothesis in best]
            )
            if first.decoder.attention_kind == "mean":  # it looks nowhere
                rows[beam_size]["pointing"] = None
    if not utils.is_main():
        return
    # the yardstick: what people say of a picture first, held against what others say of it
    described = [captions for captions in data.references if len(captions) > 1]
    people = (
        score_variety([others for _, *others in described], [first for first, *_ in described])
        if described
        else {}
    )
    utils.write_json(
        path,
        {
            **made_by,
            "data": name,
            "split": args.split,
            "scale": "0-100",
            "amp": args.amp,
            "length_penalty": args.length_penalty,
            "max_decode_steps": args.max_decode_steps,
            "consensus": args.consensus,
            "sample_location": args.sample_location,
            "beam_sizes": rows,
            "people": people,
        },
    )
    print_table(
        {**rows, "people": people},
        f"{args.split} split of {name}, {len(data)} pictures; metrics on the scale 0-100",
    )
    print(f"written: {path} and the captions beside it")


def save_average(args, captioner):
    """Save the captioner with the mean weights as ``--average`` asks."""
    captioner.config["init_from"] = " ".join(map(str, args.model))
    if utils.is_main():
        models.save_checkpoint(
            args.average,
            {
                "config": captioner.config,
                "word_map": captioner.word_map,
                "encoder": captioner.encoder.state_dict(),
                "decoder": captioner.decoder.state_dict(),
                "history": [],
            },
        )


def features_of(data, captioner, args, name, dtype):
    """Features of this process's share of the split; a frozen encoder's come from the store that training shares."""
    path, rows = None, utils.share(len(data))
    if not captioner.config["fine_tune_encoder"]:
        key = datasets.feature_key(captioner.encoder.digest(), data.images_digest, dtype)
        path = datasets.features_path(args.data_folder, name, data.split, key)
    encode = lambda images: captioner.encode(images, dtype)
    features = torch.from_numpy(
        datasets.encode_split(data, encode, path, rows, workers=args.workers)
    )
    return features if path is None else features[rows]


def score_variety(references, captions):
    """What metrics of overlap do not show: whether a model says the same of everything, repeats itself, or guesses.

    :param references: list (pictures) of lists (captions) of lists of words
    :param captions: list of lists of words
    :return: dict. "words per caption"; "words used": how many different ones; in percent: "distinct captions";
        "commonest caption" (pictures that get it); "repeats itself" (captions that say a word twice in a row or three
        words twice); "colours agreed" and "numbers agreed" (colour words and numerals that stand in at least one of the
        picture's references, None where none is said)
    """
    counts = collections.Counter(map(tuple, captions))
    known = [set().union(*described) for described in references]
    agreed = lambda words: percentage(
        [
            word in said
            for said, caption in zip(known, captions)
            for word in caption
            if word in words
        ]
    )
    return {
        "words per caption": sum(map(len, captions)) / len(captions),
        "words used": len(set().union(*captions)),
        "distinct captions": 100 * len(counts) / len(captions),
        "commonest caption": 100 * max(counts.values()) / len(captions),
        "repeats itself": percentage([repeats_itself(caption) for caption in captions]),
        "colours agreed": agreed(COLORS),
        "numbers agreed": agreed(NUMERALS),
    }


def repeats_itself(caption):
    """Whether a list of words has a word twice in a row, or three words in a row that come again."""
    threes = list(zip(caption, caption[1:], caption[2:]))
    return len(set(threes)) < len(threes) or any(a == b for a, b in zip(caption, caption[1:]))


def score_scenes(scenes, captions, alphas):
    """How far captions and attention are true, where it is known what the pictures show.

    :param scenes: list of scenes (see ``datasets.shapes_records``)
    :param captions: list of lists of words
    :param alphas: list of float tensors (num_words, num_pixels)
    :return: dict of percentages: captions that name as many shapes as there are ("count"), the right ones ("shapes"), in
        the right colours too ("objects"); "relation" (true ones among the captions that state one), "pointing" (words
        whose attention peaks in the box of what they name) and "by chance" (the same for attention that peaks anywhere)
    """
    verdicts = [judge_caption(scene, words) for scene, words in zip(scenes, captions)]
    looks = []
    for scene, words, alpha in zip(scenes, captions, alphas):
        side = int(alpha.shape[1] ** 0.5)
        looks += pointing(scene, words, alpha.numpy(), (side, side))
    shares = {
        name: percentage([verdict[name] for verdict in verdicts if verdict[name] is not None])
        for name in ("count", "shapes", "objects", "relation")
    }
    return shares | {
        "pointing": percentage([hit for hit, _ in looks]),
        "by chance": percentage([chance for _, chance in looks]),
    }


def judge_caption(scene, words):
    """Hold a caption against the scene that it should describe.

    :param scene: ``Record.scene`` or an element of ``CaptionDataset.scenes``
    :param words: list of words
    :return: dict of verdicts. ``count``: whether as many shapes are mentioned as there are; ``shapes``: whether they are
        those of the scene, each as often as it is there; ``objects``: the same with the colour just before each;
        ``relation``: None if the caption puts no mentioned shape left of, right of, above or below the next one; else
        whether all it says so is true by at least 5 % of the picture (it is not, of a shape that is not there)
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
        stated += [
            _is_true(relation, objects.get(subject), objects.get(other)) for relation in relations
        ]
    shapes = collections.Counter(shape for _, (_, shape) in mentions)
    return {
        "count": len(mentions) == len(objects),
        "shapes": shapes == collections.Counter(shape for _, shape in objects),
        "objects": collections.Counter(mention for _, mention in mentions)
        == collections.Counter(list(objects)),
        "relation": all(stated) if stated else None,
    }


def _is_true(relation, box, other):
    if box is None or other is None:
        return False
    axis = 0 if relation in ("left", "right") else 1
    difference = (box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2
    return (difference if relation in ("right", "below") else -difference) >= 0.05


def pointing(scene, words, alphas, image_grid):
    """For each word that names an object of the scene: did attention peak on what it names?

    :param scene: ``Record.scene`` or an element of ``CaptionDataset.scenes``
    :param words: list of words
    :param alphas: attention weights, float (at least num_words, num_pixels), pixels row by row
    :param image_grid: (rows, columns) of the attention map
    :return: list of (hit, chance), one for each such word: whether the centre of the peak's cell lies in a box of
        what the word names, and the share of all cells whose centre does
    """
    rows, columns = image_grid
    y, x = np.divmod(np.arange(rows * columns), columns)
    x, y = (x + 0.5) / columns, (y + 0.5) / rows
    scores = []
    for word, alpha in zip(words, np.asarray(alphas)):
        boxes = [scene["objects"][i]["box"] for i in scene["names"].get(word, ())]
        if boxes:
            inside = np.any(
                [(x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1) for x0, y0, x1, y1 in boxes], axis=0
            )
            scores.append((bool(inside[np.argmax(alpha)]), float(inside.mean())))
    return scores


def percentage(values):
    """Mean of numbers or truth values in percent, None of none."""
    return 100 * sum(values) / len(values) if values else None


def print_table(columns, title):
    """A column for each beam size and one for people, a row for each figure."""
    print(f"\n{title}\n{'beam size':>18}" + "".join(f"{column:>9}" for column in columns))
    for name in next(iter(columns.values())):
        values = (column.get(name) for column in columns.values())
        shown = (
            "-" if value is None else value if isinstance(value, int) else f"{value:.2f}"
            for value in values
        )
        print(f"{name:>18}" + "".join(f"{value:>9}" for value in shown))
    if next(iter(columns.values()))["METEOR"] is None:
        print(
            "METEOR left out: it needs a Java that works"
            if shutil.which("java")
            else "METEOR left out: it needs Java, which is not installed here"
        )
    print()


if __name__ == "__main__":
    utils.run(main, get_args_parser())
