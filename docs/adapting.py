"""The data of the trials with few pictures, for docs/results.md.

    python docs/adapting.py --source data --folder adapting --seed 0

Writes files of captions for create_input_files.py. base.csv: Flickr8k's official split, only the
pictures of which no caption names a dog. own20.csv, own60.csv, own200.csv, own1000.csv: so many
pictures of dogs (at least three of the five captions name one), four fifths of them to train on and
one fifth to validate on, the smaller sets within the larger; the test split is the same in all, the
dogs of Flickr8k's test split. both200.csv: base.csv's training and validation pictures and those of
own200.csv together. language200.csv, language1000.csv: own200.csv and own1000.csv in a made-up
language, every word replaced by another. quarter.csv: the official split with a quarter of its
training pictures. --seed draws the pictures; base.csv is always the same.
"""

import argparse
import csv
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

import datasets
import utils

DOGS = set(
    """dog dogs doggy doggie doggies puppy puppies pup pups mutt mutts canine canines hound hounds
    greyhound greyhounds grayhound grayhounds shepherd shepherds shephard sheppard sheperd retriever
    retrievers retreiver terrier terriers lab labs labrador labradors labradoodle collie collies
    poodle poodles pitbull pitbulls bulldog bulldogs doberman dobermans husky huskies dachshund
    dachshunds daschund rottweiler rottweilers rotweiler pug pugs corgi corgis dalmatian dalmatians
    spaniel spaniels yorkie weimaraner chihuahua chihuahuas beagle beagles schnauzer sheepdog
    sheepdogs bloodhound wolfhound mastiff dogsled doghouse""".split()  # noqa: SIM905
)
SIZES = (20, 60, 200, 1000)
VALIDATION = 0.2  # share of one's own pictures that is validated on


def names_dog(caption):
    return not DOGS.isdisjoint(datasets.tokenize(caption))


def without_dogs(records):
    """Those of which no caption names a dog."""
    return [record for record in records if not any(map(names_dog, record.captions))]


def with_dogs(records):
    """Those of which at least three captions name a dog."""
    return [record for record in records if sum(map(names_dog, record.captions)) >= 3]


def own_pictures(records, size, seed):
    """So many pictures of dogs, and the test split's: the smaller draws within the larger."""
    dogs = sorted(with_dogs(records))
    random.Random(seed).shuffle(dogs)
    validated = round(VALIDATION * size)
    parts = {"train": size - validated, "val": validated, "test": len(dogs)}
    drawn = [[r for r in dogs if r.split == split][:count] for split, count in parts.items()]
    for part, (split, count) in zip(drawn[:2], parts.items()):
        if len(part) < count:
            raise utils.UserError(f"{len(part)} pictures of dogs in {split}, expected {count}")
    return sum(drawn, [])


def a_quarter(records, seed):
    """The records with a quarter of the training pictures."""
    training = [record for record in records if record.split == "train"]
    drawn = random.Random(seed).sample(training, len(training) // 4)
    return drawn + [record for record in records if record.split != "train"]


def in_made_up_language(record):
    """The record with every word replaced by another: read from its end, with an ending."""
    words = map(datasets.tokenize, record.captions)
    captions = [" ".join(f"{word[::-1]}ux" for word in caption) for caption in words]
    return record._replace(captions=captions)


def trials(records, seed, sizes=SIZES, together=200, languages=(200, 1000)):
    """Dict: for each file's name, without its suffix, its records."""
    base = without_dogs(records)
    own = {size: own_pictures(records, size, seed) for size in {*sizes, together, *languages}}
    learned = [record for record in base if record.split != "test"]
    return {
        "base": base,
        **{f"own{size}": own[size] for size in sizes},
        f"both{together}": learned + own[together],
        **{f"language{size}": list(map(in_made_up_language, own[size])) for size in languages},
        "quarter": a_quarter(records, seed),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, default=Path("data"), help="folder of Flickr8k")
    parser.add_argument("--folder", type=Path, default=Path("adapting"), help="where to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    records, _ = datasets.flickr8k_records(args.source)
    for name, part in trials(records, args.seed).items():
        with open(args.folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            rows = [(r.name, caption, r.split) for r in part for caption in r.captions]
            csv.writer(file).writerows([("image", "caption", "split"), *rows])
        counts = [sum(r.split == split for r in part) for split in datasets.SPLITS]
        print(f"{name}: {counts[0]:,} to train on, {counts[1]:,} to validate, {counts[2]:,} tests")


if __name__ == "__main__":
    main()
