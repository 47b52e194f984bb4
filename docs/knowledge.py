"""What models know of the pictures, for the comparison of encoders in docs/results.md.

    python docs/knowledge.py --runs runs/resnet50-seed0 runs/vgg19-seed0

For each run (an output folder of train.py in which eval.py has captioned the test split) two things
are measured. The captions: of the people, animals, colours, numbers and actions that they name, the
share that at least one of the picture's references names, too, and how often they name any. The
features: a linear probe, ridge regression from the picture's mean feature to each of the twenty
commonest nouns (named by at least two of its captions), fitted on the training split, its penalty
chosen on validation; its average precision on the test split shows how plainly the frozen CNN's
features tell what is there. At last: which gender captions assume.
"""

import argparse
import collections
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

import datasets
import models
from captioning.report import metrics
from captioning.run import machine, paths

PEOPLE = """man men woman women boy boys girl girls child children baby lady guy person people
    player players kid kids toddler crowd"""
ANIMALS = "dog dogs puppy horse horses bird birds cat animal animals cow"
KINDS = {
    "people": PEOPLE.split(),
    "animals": ANIMALS.split(),
    "colours": metrics.COLOR_WORDS,
    "numbers": metrics.NUMERALS,
}
NOT_ACTIONS = """building ceiling clothing evening king morning painting railing ring sling
    something spring string swing thing wedding wing"""
NOUNS = """man dog boy woman girl people water shirt grass child snow beach ball street field
    mountain bike pool rock tree wall horse car"""


WOMEN = {"woman", "women", "girl", "girls", "lady", "ladies", "female", "she", "her"}
MEN = {"man", "men", "boy", "boys", "guy", "guys", "gentleman", "male", "he", "his"}


def is_kind(kind, word):
    if kind == "actions":  # in these captions nearly all verbs are participles: "is running"
        return bool(re.fullmatch(r"\w{2,}ing", word)) and word not in NOT_ACTIONS.split()
    return word in KINDS[kind]


def score_captions(references, captions):
    """Dict: for each kind of word (share of those named that are right, named per 100 captions)."""
    known = [set().union(*described) for described in references]
    found = {}
    for kind in (*KINDS, "actions"):
        hits = [
            w in said for said, words in zip(known, captions) for w in words if is_kind(kind, w)
        ]
        found[kind] = 100 * sum(hits) / max(1, len(hits)), 100 * len(hits) / len(captions)
    return found


def genders(references, captions):
    """What captions say of pictures of which at least three people wrote of one gender alone.

    :return: dict of "women" and "men": (pictures, captions with a female word, with a male word)
    """
    found = {}
    for name, own, other in (("women", WOMEN, MEN), ("men", MEN, WOMEN)):
        only = lambda words, own=own, other=other: own & set(words) and not other & set(words)
        rows = [i for i, said in enumerate(references) if sum(map(bool, map(only, said))) >= 3]
        said = [sum(bool(words & set(captions[i])) for i in rows) for words in (WOMEN, MEN)]
        found[name] = (len(rows), *said)
    return found


def labels(data, nouns):
    """Which nouns at least two of a picture's captions name: bool (N, nouns)."""
    counts = (collections.Counter(w for c in said for w in set(c)) for said in data.references)
    return np.array([[count[noun] >= 2 for noun in nouns] for count in counts])


def average_precision(scores, truth):
    """Mean of the precision at each true item, the highest score first."""
    truth = truth[np.argsort(-scores, kind="stable")]
    return (truth.cumsum() / np.arange(1, len(truth) + 1))[truth].mean()


def probe(features, truth, strengths=(0.01, 0.1, 1, 10)):
    """Average precision, in percent, of ridge regression from features to nouns.

    :param features: float32 arrays (N, encoder_dim) of the training, validation and test split
    :param truth: bool arrays (N, nouns) of the same
    :param strengths: of the penalty, as a share of the features' variance; the best on validation
        counts, so that neither many nor few channels are favoured
    """
    center, spread = features[0].mean(axis=0), features[0].std(axis=0) + 1e-6
    x, x_val, x_test = ((f - center) / spread for f in features)
    gram, target = x.T @ x, x.T @ (truth[0] - truth[0].mean(axis=0))
    precise = lambda scores, truth: np.array(
        [100 * average_precision(s, t) for s, t in zip(scores.T, truth.T)]
    )
    found = []
    for strength in strengths:
        ridge = strength * len(x) * np.eye(len(gram), dtype=np.float32)
        weights = np.linalg.solve(gram + ridge, target)  # (encoder_dim, nouns)
        found.append((precise(x_val @ weights, truth[1]).mean(), weights))
    _, weights = max(found, key=lambda item: item[0])
    return precise(x_test @ weights, truth[2])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_folder", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    probes, assumed = {}, {}
    print("| run | probe | " + " | ".join((*KINDS, "actions")) + " |\n" + "|---" * 7 + "|")
    for run in args.runs:
        captioner = models.load_captioner(models.run_checkpoint(run))
        name = captioner.config["data_name"]
        splits = train, _, test = [
            datasets.CaptionDataset(datasets.split_path(args.data_folder, split, name))
            for split in datasets.SPLITS
        ]
        if captioner.config["encoder"] not in probes:
            counts = labels(train, NOUNS.split()).sum(axis=0)
            nouns = [NOUNS.split()[i] for i in np.argsort(-counts, kind="stable")[:20]]
            with machine.autocast(captioner.device, captioner.config["amp"]):  # its feature stores
                means = [
                    models.mean_features(data, captioner, args.data_folder, workers=2)
                    for data in splits
                ]
            truth = [labels(data, nouns) for data in splits]
            probes[captioner.config["encoder"]] = probe(means, truth).mean()
        path = paths.captions_path(run, name, "test", 5)
        captions = [row["caption"].split() for row in json.loads(path.read_text("utf-8"))]
        found = score_captions(test.references, captions)
        cells = [f"{right:.1f} ({often:.0f})" for right, often in found.values()]
        print(f"| {run.name} | {probes[captioner.config['encoder']]:.1f} | {' | '.join(cells)} |")
        assumed[run.name] = genders(test.references, captions)
    for run, found in assumed.items():
        for name, (count, female, male) in found.items():
            print(f"{run}: of {count} pictures of {name} {female} get a female word, {male} a male")


if __name__ == "__main__":
    main()
