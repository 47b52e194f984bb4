"""How fast the suite is, against the model as tutorials write it and against the machine.

    python tests/benchmark.py                           # all of it: minutes on two CPU cores
    python tests/benchmark.py --sections decoder beam   # some of it
    python tests/benchmark.py --device cuda

The textbook encodes an image for each of its captions, projects the image anew at every word and
searches one image at a time. It has the suite's parameters and gives the same numbers, which is
checked before anything is timed. Features and captions are random; captions have the lengths of
Flickr8k's.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere

import datasets  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from captioning.model import encoders, tally
from captioning.report import log  # noqa: E402
from captioning.run import machine
from captioning.run import paths as paths_room

VOCABULARY = 2539  # Flickr8k's, words seen five times
WORDS = [f"w{i}" for i in range(1, VOCABULARY - 3)]
WORD_MAP = {word: i for i, word in enumerate(["<pad>", *WORDS, "<unk>", "<start>", "<end>"])}
SCORES = dict.fromkeys(train.METRICS, 0.0) | {"val_nll": 0.0}


# --------------------------------------------------------------------------------------- textbook


class Textbook(nn.Module):
    """The decoder as tutorials write it, with the suite's parameter names."""

    def __init__(self, encoder_dim, width=512):
        super().__init__()
        self.attention = models.Attention(encoder_dim, width, width)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.decode_step = nn.LSTMCell(width + encoder_dim, width)
        self.init_h, self.init_c = nn.Linear(encoder_dim, width), nn.Linear(encoder_dim, width)
        self.f_beta = nn.Linear(width, encoder_dim)
        self.fc = nn.Linear(width, VOCABULARY)

    def step(self, words, h, c, encoder_out):
        att = self.attention
        energy = att.full_att(
            torch.relu(att.encoder_att(encoder_out) + att.decoder_att(h).unsqueeze(1))
        ).squeeze(2)
        alpha = energy.softmax(dim=1)
        context = (encoder_out * alpha.unsqueeze(2)).sum(dim=1)
        gated = torch.sigmoid(self.f_beta(h)) * context
        h, c = self.decode_step(torch.cat([self.embedding(words), gated], dim=1), (h, c))
        return self.fc(h), alpha, h, c

    def forward(self, encoder_out, captions, decode_lengths):
        """Scores (B, T, vocabulary), zero past each length; lengths in decreasing order."""
        mean = encoder_out.mean(dim=1)
        h, c = self.init_h(mean), self.init_c(mean)
        scores = encoder_out.new_zeros(len(captions), max(decode_lengths), VOCABULARY)
        for t in range(max(decode_lengths)):
            n = sum(length > t for length in decode_lengths)
            scores[:n, t], _, h, c = self.step(captions[:n, t], h[:n], c[:n], encoder_out[:n])
        return scores

    @torch.no_grad()
    def search(self, encoder_out, beam_size, max_steps=50):
        """Beam search for one picture, (1, num_pixels, encoder_dim); finished beams leave."""
        encoder_out = encoder_out.expand(beam_size, -1, -1)
        words = torch.full((beam_size,), WORD_MAP["<start>"], device=encoder_out.device)
        seqs, top = words.unsqueeze(1), torch.zeros(beam_size, 1, device=encoder_out.device)
        mean, done = encoder_out.mean(dim=1), []
        h, c = self.init_h(mean), self.init_c(mean)
        for step in range(max_steps):
            scores, _, h, c = self.step(words, h, c, encoder_out[: len(words)])
            scores = scores.log_softmax(dim=1)
            scores[:, [0, VOCABULARY - 3, VOCABULARY - 2]] = -math.inf
            scores = top + scores
            top, index = (scores[0] if step == 0 else scores.flatten()).topk(len(words))
            beams, words = index // VOCABULARY, index % VOCABULARY
            seqs = torch.cat([seqs[beams], words.unsqueeze(1)], dim=1)
            ended = words == WORD_MAP["<end>"]
            done += [(score.item(), seq.tolist()) for score, seq in zip(top[ended], seqs[ended])]
            keep = ~ended
            if not keep.any():
                break
            seqs, beams, words, top = seqs[keep], beams[keep], words[keep], top[keep].unsqueeze(1)
            h, c = h[beams], c[beams]
        return max(done) if done else (top.max().item(), seqs[0].tolist())


# -------------------------------------------------------------------------------------- the stage


class FakeDataset:
    """Captions of Flickr8k's lengths about images that exist as random features only."""

    def __init__(self, num_images, seed=0):
        rng = np.random.default_rng(seed)
        words = np.clip(np.rint(rng.gamma(8.5, 1.27, num_images * 5)), 2, 36)  # mean 10.8
        self.caption_lengths = words.astype(np.int64) + 2
        self.captions = np.zeros((len(words), 52), np.int32)
        for row, n in zip(self.captions, self.caption_lengths):
            row[:n] = [VOCABULARY - 2, *rng.integers(1, VOCABULARY - 3, n - 2), VOCABULARY - 1]
        self.caption_offsets = np.arange(0, len(words) + 1, 5)

    def __len__(self):
        return len(self.caption_offsets) - 1


def clock(device, function, repeats=3, warm_up=1):
    """Median seconds of a call."""
    seconds = []
    for i in range(warm_up + repeats):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        if i >= warm_up:
            seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2]


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pooled(features):
    """What a textbook encoder hands over: the grid pooled to 14 x 14."""
    side = math.isqrt(features.shape[1])
    return models.pooling_matrix(side, 14, features.device, features.dtype) @ features


def decoder_pair(device, encoder_dim=2048):
    """A decoder of the suite and the textbook's, with the same weights."""
    torch.manual_seed(0)
    ours = models.DecoderWithAttention(VOCABULARY, encoder_dim, dropout=0.0).to(device)
    textbook = Textbook(encoder_dim).to(device)
    textbook.load_state_dict(ours.state_dict())
    return ours, textbook


def options_of_training(*flags):
    return train.get_args_parser().parse_args([*flags, "--patience", "1000"])


def allow_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def row(name, value, unit, base=None):
    ratio = f"{value / base:>8.2f}x" if base else ""
    print(f"{name:<58}{value:>12,.2f} {unit:<11}{ratio}", flush=True)


# --------------------------------------------------------------------------------------- sections


def section_decoder(device, args):
    """A training step on given features, 8 x 8 x 2048 seen as 14 x 14: forward and backward."""
    ours, textbook = decoder_pair(device)
    captions, lengths, image_index = datasets.collate(
        FakeDataset(args.images), np.arange(args.images)
    )
    features = torch.randn(args.images, 64, 2048, device=device).relu()
    captions = torch.from_numpy(captions).to(device)
    image_index, words = torch.from_numpy(image_index).to(device), sum(lengths)

    def textbook_step():
        scores = textbook(pooled(features)[image_index], captions, lengths)
        targets = captions[:, 1 : scores.shape[1] + 1]
        textbook.zero_grad()
        F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=0).backward()

    def our_step(amp=False):
        with machine.autocast(device, amp):
            output = ours(features, captions, lengths, image_index)
        ours.zero_grad()
        models.caption_loss(output, alpha_c=0)[0].backward()

    allow_tf32(False)
    textbook_step()
    learning = [(name, p) for name, p in textbook.named_parameters() if p.requires_grad]
    expected = {name: p.grad.clone() for name, p in learning}
    our_step()
    for name, p in ours.named_parameters():
        if name not in expected:  # softmax does not see the bias of full_att
            continue
        bound = 1e-4 * max(1.0, expected[name].abs().max().item())
        if not torch.allclose(p.grad, expected[name], rtol=1e-2, atol=bound):
            raise SystemExit(f"the formulations disagree on the gradient of {name}")
    allow_tf32(True)
    slow = words / clock(device, textbook_step)
    row("decoder step, textbook, float32", slow, "words/s")
    for amp, kind in ((False, "float32"), (True, "bfloat16")):
        rate = words / clock(device, functools.partial(our_step, amp), repeats=5)
        row(f"decoder step, {kind}", rate, "words/s", slow)


def section_training(device, args):
    """An epoch of train.py on features of ResNet-101's size, at both grids."""
    on_gpu = device.type == "cuda"
    data, epochs = FakeDataset(6000 if on_gpu else 256), 15 if on_gpu else 2
    features = torch.randn(len(data), 64, 2048).half().relu_().to(device)
    for grid in (0, 14):
        for amp in ([], ["--amp"]):
            flags = ["--encoded_image_size", str(grid), "--epochs", str(epochs), *amp]
            history = train_epochs(options_of_training(*flags), device, data, features)
            rate = np.median([record["words_per_second"] for record in history])
            kind = "bfloat16" if amp else "float32"
            row(f"training, grid {grid or 8} x {grid or 8}, {kind}", rate, "words/s")
    memory = history[-1]["peak_memory_gb"]
    print(f"{'':<58}{memory} GB at most", flush=True)


def train_epochs(options, device, data, features):
    """The records of a training on given features, without validation and files."""
    torch.manual_seed(0)
    sizes = vars(options) | {"encoder_dim": features.shape[2]}
    decoder = models.build_decoder(sizes, VOCABULARY).to(device)
    updates = options.epochs * math.ceil(len(data) / options.batch_size)
    config = vars(options) | {"image_size": 256, "total_updates": updates}
    encoder = nn.Identity()
    encoder.encoder_dim = features.shape[2]
    captioner = models.Captioner(encoder, decoder, WORD_MAP, config)
    with utils.StopSignals() as stop, contextlib.ExitStack() as stack:
        trainer = train.Trainer(options, captioner, data, None, stop)
        trainer.features = features
        for owner, name in (
            (train.Trainer, "save"),
            (train.Trainer, "write_reports"),
            (log, "print_epoch"),
        ):
            stack.enter_context(mock.patch.object(owner, name))
        stack.enter_context(mock.patch.object(train, "validate", lambda *_: (SCORES, [])))
        # speed is asked for; the made-up card of the tests computes nonsense
        add = tally.Tally.add
        counted = lambda self, loss, nll, bad: add(self, loss, nll, torch.zeros_like(bad))
        stack.enter_context(mock.patch.object(tally.Tally, "add", counted))
        train.train(trainer, options)
    return trainer.history


def section_beam(device, args):
    """Beam search, beam 5: in batches against one image at a time."""
    ours, textbook = decoder_pair(device)
    for decoder in (ours.eval(), textbook):  # untrained, they would never say <end>
        decoder.fc.bias.data[WORD_MAP["<end>"]] = 5.4  # captions of about 10 words
    count = 64 if device.type == "cpu" else 1024
    features = torch.randn(count, 64, 2048, device=device).relu()
    options = {"word_map": WORD_MAP, "beam_size": 5, "length_penalty": 0}
    search = functools.partial(models.beam_search, [ours], **options)
    allow_tf32(False)
    for i, (found, *_) in enumerate(search([features[:4]])):
        score, _ = textbook.search(pooled(features[i : i + 1]), 5)
        if found.log_prob < score - 1e-3:
            raise SystemExit(f"image {i}: {found.log_prob}, but the textbook found {score}")
    allow_tf32(True)
    one_by_one = lambda: [textbook.search(pooled(features[i : i + 1]), 5) for i in range(4)]
    slow = 4 / clock(device, one_by_one)
    row("beam search, textbook, float32", slow, "images/s")
    for amp, kind in ((False, "float32"), (True, "bfloat16")):
        with machine.autocast(device, amp):
            batches = lambda: [search([part]) for part in features.split(512)]
            row(f"beam search, {kind}", count / clock(device, batches), "images/s", slow)


def section_decoders(device, args):
    """Each decoder: an epoch, and beam search (5) for captions of ten words, on an 8 x 8 grid."""
    count = 64 if device.type == "cpu" else 1024
    features = torch.randn(count, 64, 1280, device=device).relu()
    data = FakeDataset(6000 if device.type == "cuda" else 256)
    seen = torch.randn(len(data), 64, 1280).half().relu_().to(device)
    for amp, kind in (([], "float32"), (["--amp"], "bfloat16")):
        lstm = None
        for name in models.DECODERS:
            flags = ["--decoder", name, "--encoded_image_size", "0", "--epochs", "3", *amp]
            history = train_epochs(options_of_training(*flags), device, data, seen)
            rate = np.median([record["words_per_second"] for record in history])
            lstm = lstm or rate
            row(f"training, {name}, {kind}", rate, "words/s", lstm)
    options = {"word_map": WORD_MAP, "beam_size": 5, "max_decode_steps": 10, "with_alphas": False}
    for amp, kind in ((False, "float32"), (True, "bfloat16")):
        lstm = None
        for name in models.DECODERS:
            flags = options_of_training("--decoder", name, "--encoded_image_size", "0")
            decoder = models.build_decoder(vars(flags) | {"encoder_dim": 1280}, VOCABULARY)
            decoder = decoder.to(device).eval()
            decoder.fc.bias.data[WORD_MAP["<end>"]] = -100
            with machine.autocast(device, amp):
                search = lambda decoder=decoder: models.beam_search(
                    [decoder], [features], **options
                )
                rate = count / clock(device, search)
            lstm = lstm or rate
            row(f"beam search, {name}, {kind}", rate, "images/s", lstm)


def section_encoders(device, args):
    """What each encoder costs at 256 x 256: of the part that is used."""
    from torch.utils.flop_counter import FlopCounterMode

    count = 16 * args.images if device.type == "cuda" else 8
    images = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8, device=device)
    print("encoder: M parameters, grid, channels, GFLOP; images/s in float32, bfloat16, fine-tuned")
    for name in ("resnet18", "resnet50", "resnet101", "vgg16", "vgg19", *encoders.EFFICIENTNETS):
        encoder, rates = models.Encoder(name, "none").to(device), []

        def encode(amp, train=False, encoder=encoder):
            with torch.set_grad_enabled(train), machine.autocast(device, amp):
                out = encoder(images)
            if train:
                out.float().square().mean().backward()

        with FlopCounterMode(display=False) as counter, torch.no_grad():
            places = encoder(images[:1]).shape[1]
        for amp, fine_tune in ((False, False), (True, False), (True, True)):
            encoder.fine_tune(fine_tune)
            rates.append(count / clock(device, functools.partial(encode, amp, fine_tune), 1))
        millions = sum(p.numel() for p in encoder.parameters()) / 1e6
        print(
            f"{name:<20}{millions:>8.1f}{places:>6}{encoder.encoder_dim:>6}"
            f"{counter.get_total_flops() / 1e9:>8.2f}"
            + "".join(f"{rate:>10.1f}" for rate in rates),
            flush=True,
        )
        del encoder, encode
        if device.type == "cuda":
            torch.cuda.empty_cache()


def section_caption(device, args):
    """caption.py on one image, from start to PNG, against the imports and an encoder pass alone."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        image = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8))
        image.save(Path(folder, "a.jpg"))
        config = vars(options_of_training()) | {"encoder_dim": 2048, "image_size": 256}
        config = {key: str(v) if isinstance(v, Path) else v for key, v in config.items()}
        decoder = models.build_decoder(config, VOCABULARY)
        decoder.fc.bias.data[WORD_MAP["<end>"]] = 5.4
        state = {"encoder": models.Encoder("resnet101", "none").state_dict()}
        state |= {"config": config, "word_map": WORD_MAP, "decoder": decoder.state_dict()}
        models.save_checkpoint(Path(folder, "m.pth.tar"), state | {"history": []})
        floor = (
            f"import torch, torchvision; m = torchvision.models.resnet101().eval().to('{device}')\n"
            f"with torch.no_grad(): m(torch.rand(1, 3, 256, 256, device='{device}')).cpu()"
        )
        flags = ["--img", "a.jpg", "--model", "m.pth.tar", "--device", str(device)]
        seconds = [
            clock(torch.device("cpu"), functools.partial(python, *command, cwd=folder))
            for command in (("-c", floor), (ROOT / "caption.py", *flags))
        ]
    row("torch, torchvision and an encoder pass", seconds[0], "s")
    row("caption.py, one image", seconds[1], "s", seconds[0])


def python(*command, **options):
    """Run Python to its end; an error shows what it said."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


def section_prepare(device, args):
    """Preparing photographs: against one thread, and against what it cannot do without."""
    import h5py
    from PIL import Image

    count, cores = 400, len(machine.own_cores())
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for i in range(count):  # of Flickr8k's size, and about as many bytes
            coarse = Image.fromarray(rng.integers(0, 256, (75, 100, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(
                folder / f"{i}.jpg", quality=90
            )
        paths = sorted(folder.glob("*.jpg"))

        def square(path):
            with Image.open(path) as image:
                return np.asarray(
                    image.convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
                ).transpose(2, 0, 1)

        def plain():
            with h5py.File(folder / "plain.hdf5", "w") as file:
                images = file.create_dataset("images", (count, 3, 256, 256), np.uint8)
                for i, path in enumerate(paths):
                    images[i] = square(path)

        def alone():
            with ThreadPoolExecutor(cores) as pool, open(folder / "alone.bin", "wb") as file:
                for image in pool.map(square, paths):
                    file.write(np.ascontiguousarray(image))

        records = [
            datasets.Record(
                path.name, "train", ["a word"], functools.partial(datasets.open_image, path)
            )
            for path in paths
        ]

        def ours():
            datasets.write_split(
                folder / "ours.hdf5",
                records,
                WORD_MAP,
                datasets.Settings(),
                {},
                workers=cores,
            )

        slow, most, fast = (count / clock(device, function, 3) for function in (plain, alone, ours))
    row("preparing photographs, one thread", slow, "images/s")
    row("preparing photographs, decoding, resizing and writing alone", most, "images/s", slow)
    row(f"preparing photographs, {cores} cores", fast, "images/s", slow)


def section_neighbours(device, args):
    """train.py on the CPU, alone and beside two busy processes, by how OpenMP's threads wait."""
    name = datasets.base_name("shapes", 5, 5)
    waits = {
        "spinning, torch's own": {"GOMP_SPINCOUNT": "300000"},  # the default of its OpenMP library
        "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
        "the suite's choice": {},
    }
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        records, _ = datasets.shapes_records(320, 8, 8, size=64)
        datasets.write_dataset(folder, records, dataset="shapes", source="generated", image_size=64)
        flags = ["--data_folder", folder, "--data_name", name, "--encoder", "resnet18", "--device"]
        flags += ["cpu", "--encoder_weights", "none", "--epochs", "2", "--max_decode_steps", "3"]
        for busy in (0, 2):
            command = [sys.executable, "-c", "while True: pass"]
            loops = [subprocess.Popen(command) for _ in range(busy)]
            try:
                for wait, variables in waits.items():
                    out = Path(folder, f"{busy} {wait}")
                    command = [ROOT / "train.py", *flags, "--output_folder", out]
                    python(*command, env=clean | variables)
                    log = paths_room.log_path(out, name).read_text().splitlines()
                    rate = json.loads(log[-1])["words_per_second"]
                    row(f"train.py beside {busy} busy processes, {wait}", rate, "words/s")
            finally:
                for loop in loops:
                    loop.kill()
                    loop.wait()


SECTIONS = {
    name[8:]: function for name, function in list(globals().items()) if name.startswith("section_")
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    text = f"what to time, of {', '.join(SECTIONS)} (default: all)"
    known = {"choices": SECTIONS, "metavar": "SECTION", "default": list(SECTIONS)}
    parser.add_argument("--sections", nargs="+", help=text, **known)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    text = "images of five captions per training step (default: 16)"
    parser.add_argument("--images", type=int, default=16, help=text)
    args = parser.parse_args()
    utils.prepare_process()
    device = machine.pick_device(args.device)
    allow_tf32(True)
    print(machine.describe_machine(device))
    for section in args.sections:
        SECTIONS[section](device, args)


if __name__ == "__main__":
    main()
