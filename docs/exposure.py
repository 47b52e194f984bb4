"""Exposure bias: how much worse the true next word is predicted after a model's own words.

    python docs/exposure.py --runs runs/lstm-seed0 runs/lstm-linear-seed0

For each run (an output folder of train.py) the test split's captions are read twice: once after
their true words, as in training, and once after words that the model draws from its own
distribution, one by one, which is scheduled sampling with epsilon 0. Shown is the mean negative
log-likelihood of the true word, in nats, by its position in the caption. The first word is the same
in both. The rest of the difference is not all a fault: after other words another word can be right.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

import datasets
import models
from captioning.run import machine

POSITIONS = {"1": (0, 1), "2 to 4": (1, 4), "5 to 8": (4, 8), "9 and on": (8, None)}


@torch.no_grad()
def nll_by_position(decoder, data, features, epsilon, batch_size=64):
    """Sum of the true words' negative log-likelihoods, and number of words, at each position.

    :param features: float (N, n, encoder_dim)
    :param epsilon: probability that a true word is fed; else the model's own
    :return: float64 (2, max_len + 1)
    """
    device, found = features.device, np.zeros((2, data.captions.shape[1] - 1))
    for i in range(0, len(data), batch_size):
        numbers = np.arange(len(data))[i : i + batch_size]
        captions, lengths, image_index = datasets.collate(data, numbers)
        captions, image_index = torch.from_numpy(captions), torch.from_numpy(image_index)
        output = decoder(
            features[i : i + batch_size], captions.to(device), lengths, image_index.to(device),
            epsilon,
        )  # fmt: skip
        nll = F.cross_entropy(output.scores, output.targets, reduction="none")  # (num_words,)
        live = models.live_rows(lengths)
        positions = np.repeat(np.arange(len(live)), live)  # (num_words,)
        real = (output.targets != datasets.PAD_ID).cpu().numpy()
        np.add.at(found[0], positions[real], nll.cpu().numpy()[real])
        np.add.at(found[1], positions[real], 1)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_folder", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    header = ["run", "read", *(f"word {name}" for name in POSITIONS), "all"]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for run in args.runs:
        captioner = models.load_captioner(models.run_checkpoint(run))
        name = captioner.config["data_name"]
        data = datasets.CaptionDataset(datasets.split_path(args.data_folder, "test", name))
        with machine.autocast(captioner.device, captioner.config["amp"]):  # its feature stores
            features = captioner.features(data, args.data_folder)
        for label, epsilon in {"true words": 1.0, "its own words": 0.0}.items():
            machine.set_seed(0)
            nll, words = nll_by_position(captioner.decoder, data, features, epsilon)
            spans = [slice(*span) for span in (*POSITIONS.values(), (None,))]
            cells = [f"{nll[span].sum() / words[span].sum():.3f}" for span in spans]
            print(f"| {run.name} | {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
