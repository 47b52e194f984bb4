"""How fast the suite is: against a textbook formulation of the same model, and against what the machine can do.

    python tests/benchmark.py                                   # a few minutes on two CPU cores
    python tests/benchmark.py --sections decoder beam           # some of it
    python tests/benchmark.py --device cuda --workers 16 --sections ceiling encoders extraction decoder training flickr8k finetune beam caption

The textbook encodes a picture for each of its captions, projects the picture anew at every word and searches one picture
at a time. It has the suite's parameters and gives the same numbers, which is checked before anything is timed. Features
and captions are random; captions have the lengths of Flickr8k's.
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
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere

import datasets
import models
import train
import utils

VOCABULARY = 2539  # Flickr8k's, words seen five times
WORD_MAP = {
    "<pad>": 0,
    **{f"w{i}": i for i in range(1, VOCABULARY - 3)},
    "<unk>": VOCABULARY - 3,
    "<start>": VOCABULARY - 2,
    "<end>": VOCABULARY - 1,
}


# -------------------------------------------------------------------------------------------------------- textbook


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
        """:return: scores (B, T, vocabulary), zero past each length; captions in decreasing order of length"""
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


# ------------------------------------------------------------------------------------------------------ the stage


class FakeDataset:
    """Captions of Flickr8k's lengths about pictures that exist as random features only."""

    def __init__(self, num_images, seed=0):
        rng = np.random.default_rng(seed)
        words = np.clip(np.rint(rng.gamma(8.5, 1.27, num_images * 5)), 2, 36).astype(
            np.int64
        )  # mean 10.8
        self.caption_lengths = words + 2
        self.captions = np.zeros((len(words), 52), np.int32)
        for row, n in zip(self.captions, words):
            row[: n + 2] = [VOCABULARY - 2, *rng.integers(1, VOCABULARY - 3, n), VOCABULARY - 1]
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


def pooled(features, size=14):
    """What a textbook encoder hands over: the grid pooled to 14×14."""
    pool = models.pooling_matrix(
        math.isqrt(features.shape[1]), size, features.device, features.dtype
    )
    return pool @ features


def decoder_pair(device, encoder_dim=2048):
    """A decoder of the suite and the textbook's, with the same weights."""
    torch.manual_seed(0)
    ours = models.DecoderWithAttention(VOCABULARY, encoder_dim, dropout=0.0).to(device)
    textbook = Textbook(encoder_dim).to(device)
    textbook.load_state_dict(ours.state_dict())
    return ours, textbook


def print_row(name, ours, textbook, unit, target=None):
    wanted = f"  (wanted: {target}×)" if target else ""
    print(
        f"{name:<46}{textbook:>10.2f}{ours:>11.2f} {unit:<11}{ours / textbook:>7.1f}×{wanted}",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------------- sections


def section_ceiling(device, args):
    """The machine's own limits: a large matrix product and a large copy."""
    n = 8192 if device.type == "cuda" else 2048
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (
            torch.randn(n, n, device=device).to(dtype),
            torch.randn(n, n, device=device).to(dtype),
        )
        rate = 2 * n**3 / clock(device, lambda: a @ b, 5)
        print(f"{'matrix product, ' + str(dtype)[6:]:<46}{rate / 1e12:>10.2f} TFLOP/s")
    x = torch.randn(2 ** (30 if device.type == "cuda" else 26), device=device)
    y = torch.empty_like(x)
    print(
        f"{'copy (read and write)':<46}{8 * x.numel() / clock(device, lambda: y.copy_(x), 5) / 1e9:>10.0f} GB/s"
    )


def allow_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def exact_products():
    """Float32 is float32 inside: two formulations are compared, not timed."""
    allow_tf32(False)
    yield
    allow_tf32(True)


def section_decoder(device, args):
    """One training step of the decoder on given features, 8×8×2048 seen as 14×14: forward and backward."""
    ours, textbook = decoder_pair(device)
    data = FakeDataset(args.pictures)
    rows = datasets.collate(data, np.arange(args.pictures))
    features = torch.randn(args.pictures, 64, 2048, device=device).relu()
    captions, pictures = (
        torch.from_numpy(rows.captions).to(device),
        torch.from_numpy(rows.image_index).to(device),
    )
    lengths, words = rows.decode_lengths, sum(rows.decode_lengths)

    def step_textbook():
        scores = textbook(pooled(features)[pictures], captions, lengths)
        F.cross_entropy(
            scores.flatten(0, 1), captions[:, 1 : scores.shape[1] + 1].flatten(), ignore_index=0
        ).backward()

    def step_ours(dtype=torch.float32):
        loss, _ = models.caption_loss(
            ours(features, captions, lengths, pictures, dtype=dtype), alpha_c=0
        )
        loss.backward()

    with exact_products():
        step_textbook(), step_ours()
    theirs = dict(textbook.named_parameters())
    for name, a in ours.named_parameters():
        b = theirs[name]
        if (
            name == "attention.full_att.bias"
        ):  # softmax does not see it: its gradient is 0, and the suite leaves it out
            continue
        if not torch.allclose(
            a.grad, b.grad, rtol=1e-2, atol=1e-4 * max(1.0, b.grad.abs().max().item())
        ):
            raise SystemExit(f"the two formulations disagree on the gradient of {name}")
    slow = words / clock(device, step_textbook, 2 if device.type == "cpu" else 5)
    print_row(
        "decoder training step, float32", words / clock(device, step_ours), slow, "words/s", 10
    )
    fast = words / clock(device, lambda: step_ours(torch.bfloat16))
    print_row("decoder training step, bfloat16 for ours", fast, slow, "words/s")


def section_training(device, args):
    """A whole training with a frozen ResNet-101 at 256×256: features are extracted once and serve ten epochs."""
    epochs, count = 10, 2 * args.pictures
    options = train.get_args_parser().parse_args(
        ["--amp", "--epochs", str(epochs), "--batch_size", str(args.pictures)]
    )
    encoder = models.Encoder("resnet101", "none").to(device)
    images = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8)
    data = FakeDataset(count)

    torch.manual_seed(0)
    textbook = Textbook(encoder.encoder_dim).to(device)
    optimizer = torch.optim.Adam(textbook.parameters(), lr=4e-4)
    rows = datasets.collate(data, np.arange(args.pictures))
    captions = torch.from_numpy(rows.captions).to(device)

    def update():  # every caption brings its picture along, as a loader of (picture, caption) pairs gives it
        with torch.no_grad():
            grids = pooled(
                torch.cat([encoder(part.to(device)) for part in images[rows.image_index].split(16)])
            )
        scores = textbook(grids, captions, rows.decode_lengths)
        loss = F.cross_entropy(
            scores.flatten(0, 1), captions[:, 1 : scores.shape[1] + 1].flatten(), ignore_index=0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    slow = len(captions) / clock(device, update, 1)

    def whole_training():
        decoder = models.build_decoder(
            {**vars(options), "encoder_dim": encoder.encoder_dim}, VOCABULARY
        ).to(device)
        captioner = models.Captioner(encoder, decoder, WORD_MAP, {"image_size": 256})
        parts = [captioner.encode(part, torch.bfloat16).half() for part in images.split(16)]
        train_epochs(options, captioner, data, torch.cat(parts), epochs)

    fast = epochs * len(data.captions) / clock(device, whole_training, 1)
    print_row("training with ResNet-101, bfloat16 for ours", fast, slow, "captions/s", 30)


def train_epochs(options, captioner, data, features, epochs):
    """Epochs of train.py on given features; returns their records."""
    optimizer = train.build_optimizer(options, captioner.encoder, captioner.decoder)
    step = train.Update(options, captioner, optimizer, data, features, torch.bfloat16)
    config = {
        **vars(options),
        "total_updates": epochs * math.ceil(len(data) / options.batch_size),
        "ss_constants": (None, None),
    }
    history = []
    with utils.StopSignals() as stop:
        for _ in range(epochs):
            history.append(
                train.train_epoch(options, config, captioner, step, history, stop, save=None)
            )
            step.begin_epoch()
    return history


def section_beam(device, args):
    """Beam search, beam 5: batches, once per picture, against one picture at a time, once per caption."""
    ours, textbook = decoder_pair(device)
    ours.eval()
    for decoder in (
        ours,
        textbook,
    ):  # untrained decoders never end: make <end> likely enough for captions of 10 words
        decoder.fc.bias.data[WORD_MAP["<end>"]] = 5.4
    encoder = models.Encoder("resnet101", "none").to(device)
    captioner = models.Captioner(encoder, ours, WORD_MAP, {"image_size": 256})
    count, batch = (64, 64) if device.type == "cpu" else (1024, 512)
    features = torch.randn(count, 64, 2048, device=device).relu()
    images = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8)
    with exact_products():
        for i, (found, *_) in enumerate(
            models.beam_search([ours], [features[:4]], WORD_MAP, beam_size=5)
        ):
            score, _ = textbook.search(pooled(features[i : i + 1]), 5)
            if found.log_prob < score - 1e-3:
                raise SystemExit(
                    f"picture {i}: the suite's caption ({found.log_prob}) is worse than the textbook's ({score})"
                )

    def textbook_pictures(encode):
        for i in range(4):
            with torch.no_grad():
                textbook.search(
                    pooled(encoder(images[i : i + 1].to(device)))
                    if encode
                    else pooled(features[i : i + 1]),
                    5,
                )

    def our_pictures(encode, dtype):
        for i in range(0, count, batch):
            if encode:
                captioner.caption(images[i : i + batch], dtype, beam_size=5)
            else:
                models.beam_search(
                    [ours], [features[i : i + batch]], WORD_MAP, beam_size=5, dtype=dtype
                )

    for encode, name, target in ((True, "with ResNet-101", 10), (False, "decoder alone", 20)):
        slow = 4 / clock(device, lambda: textbook_pictures(encode), 1) / 5
        for dtype in (torch.float32, torch.bfloat16):
            fast = count / clock(device, lambda: our_pictures(encode, dtype), 1)
            print_row(
                f"beam search {name}, {str(dtype)[6:]} for ours", fast, slow, "pictures/s", target
            )


def section_extraction(device, args):
    """Features of a frozen ResNet-101, 256×256, bfloat16, channels-last, fed from an HDF5 file."""
    encoder = models.Encoder("resnet101", "none").to(device)
    captioner = SimpleNamespace(encoder=encoder, device=device)
    count = 2048 if device.type == "cuda" else 32
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    records = [
        datasets.Record(f"{i}", split, ["a word"], lambda size: picture)
        for split in datasets.SPLITS
        for i in range(count if split == "train" else 1)
    ]
    with tempfile.TemporaryDirectory() as folder:
        datasets.write_dataset(folder, records, dataset="bench", source="random", min_word_freq=1)
        data = datasets.CaptionDataset(
            datasets.split_path(folder, "train", datasets.base_name("bench", 5, 1))
        )
        encode = lambda images: models.Captioner.encode(captioner, images, torch.bfloat16)
        out = Path(folder) / "features.npy"
        datasets.encode_split(data, encode, out, workers=args.workers)  # warms up
        out.unlink()
        began = time.perf_counter()
        datasets.encode_split(data, encode, out, workers=args.workers)
        synchronize(device)
        print(
            f"{'extraction, ResNet-101, from HDF5 to the store':<46}{count / (time.perf_counter() - began):>10.0f} pictures/s"
        )
    images = torch.randint(
        0, 256, (256 if device.type == "cuda" else 8, 3, 256, 256), dtype=torch.uint8, device=device
    )
    rate = len(images) / clock(device, lambda: captioner_encode(encoder, images, device), 3)
    print(
        f"{'extraction, ResNet-101, the CNN alone':<46}{rate:>10.0f} pictures/s, {rate * 20.4e9 / 1e12:.1f} TFLOP/s"
    )


@torch.no_grad()
def captioner_encode(encoder, images, device):
    with torch.autocast(device.type, torch.bfloat16):
        return encoder(images)


def section_encoders(device, args):
    """What each encoder costs at 256×256: parameters and operations of the part that is used, speed, memory."""
    from torch.utils.flop_counter import FlopCounterMode

    count = 256 if device.type == "cuda" else 16
    images = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8, device=device)
    print(
        f"{'':<20}{'parameters':>12}{'grid':>9}{'dim':>6}{'GFLOP':>8}{'float32':>10}{'bfloat16':>10} pictures/s"
        f"{'fine-tuning':>13} pictures/s, MB per picture"
    )
    for name in (
        "resnet18",
        "resnet50",
        "resnet101",
        "vgg16",
        "efficientnet_lite0",
        "efficientnet_lite2",
    ):
        encoder = models.Encoder(name, "none").to(device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            side = math.isqrt(encoder(images[:1]).shape[1])
        rates = []
        for dtype in (torch.float32, torch.bfloat16):
            captioner = SimpleNamespace(encoder=encoder, device=device)
            rates.append(
                count / clock(device, lambda: models.Captioner.encode(captioner, images, dtype))
            )
        encoder.fine_tune()

        def kept(number):
            """Bytes that the backward pass needs of so many pictures, and of the weights."""
            storages = {}
            with (
                torch.autocast(device.type, torch.bfloat16),
                torch.autograd.graph.saved_tensors_hooks(
                    lambda t: storages.setdefault(t.data_ptr(), t), lambda t: t
                ),
            ):
                encoder(images[:number])
            return sum(t.untyped_storage().nbytes() for t in storages.values())

        def update():
            with torch.autocast(device.type, torch.bfloat16):
                encoder(images).float().square().mean().backward()

        tuning = count / clock(device, update, 1)
        parameters = sum(p.numel() for p in encoder.parameters())
        print(
            f"{name:<20}{parameters / 1e6:>10.1f} M{f'{side}×{side}':>9}{encoder.encoder_dim:>6}"
            f"{counter.get_total_flops() / 1e9:>8.2f}{rates[0]:>10.1f}{rates[1]:>10.1f}{tuning:>24.1f}"
            f"{(kept(4) - kept(2)) / 2e6:>24.1f}",
            flush=True,
        )


def section_flickr8k(device, args):
    """Epochs of 6,000 pictures × 5 captions with ResNet-101-size features, LSTM 512, as train.py runs them."""
    data = FakeDataset(6000)
    epochs = 15 if device.type == "cuda" else 1
    features = (
        torch.randn(6000, 64, 2048, device=device, dtype=torch.float16).relu_()
        if device.type == "cuda"
        else (torch.randn(6000, 64, 2048).half().relu_())
    )
    for grid in (0, 14):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        options = train.get_args_parser().parse_args(
            ["--amp", "--encoded_image_size", str(grid), "--epochs", str(epochs)]
        )
        torch.manual_seed(0)
        synchronize(device)
        began = time.perf_counter()
        decoder = models.build_decoder({**vars(options), "encoder_dim": 2048}, VOCABULARY).to(
            device
        )
        captioner = SimpleNamespace(encoder=None, decoder=decoder, device=device)
        history = train_epochs(options, captioner, data, features, epochs)
        synchronize(device)
        seconds = time.perf_counter() - began
        rate = np.median([record["words_per_second"] for record in history])
        print(
            f"{f'{epochs} epochs of 30,000 captions, grid ' + ('8×8' if grid == 0 else '14×14'):<46}{seconds:>10.1f} s in all, "
            f"{rate:,.0f} words/s, loss {history[-1]['nll']:.3f}, peak memory {history[-1]['peak_memory_gb']} GB",
            flush=True,
        )


def section_prepare(device, args):
    """Preparing photographs: against one thread, and against decoding, resizing and writing alone."""
    import h5py
    from PIL import Image

    count, cores = 400, utils.available_cores()
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
    print_row(f"preparing photographs, {cores} cores", fast, slow, "pictures/s", 1.7)
    print(f"{'  decoding, resizing and writing alone':<46}{'':>10}{most:>11.2f} pictures/s")


OPEN_AND_READ = """
import sys, time
began = time.time()
sys.path.insert(0, sys.argv[1])
import torch, datasets, utils
data = datasets.CaptionDataset(sys.argv[2])
for batch in datasets.training_batches(data, 16, seed=0, epoch=0)[:100]:
    data.images(batch), datasets.collate(data, batch)
print(f"{time.time() - began:.1f} s for imports, opening and 100 batches, peak memory "
      f"{utils.peak_memory_gb(torch.device('cpu'))} GB")
"""


def section_coco(device, args):
    """Start-up on a data set of COCO's size: 590,000 captions of 118,000 pictures (here 32×32 pixels)."""
    picture = np.zeros((32, 32, 3), np.uint8)
    captions = [
        f"a picture of w{i} and w{i + 1} beside some w{i + 2} on the w{i + 3}" for i in range(5)
    ]
    records = [
        datasets.Record(f"{i:012d}.jpg", split, captions, lambda size: picture)
        for split, count in (("train", 118000), ("val", 5000), ("test", 1))
        for i in range(count)
    ]
    with tempfile.TemporaryDirectory() as folder:
        datasets.write_dataset(folder, records, dataset="coco", source="generated", image_size=32)
        path = datasets.split_path(folder, "train", datasets.base_name("coco", 5, 5))
        shown = subprocess.run(
            [sys.executable, "-c", OPEN_AND_READ, str(ROOT), str(path)],
            check=True,
            capture_output=True,
            text=True,
        )
    print(f"{'start-up on 590,000 captions':<46}{shown.stdout.strip()}")


def section_caption(device, args):
    """caption.py: on one picture, start to PNG, against imports and one encoder pass; on a folder, captions alone."""
    from PIL import Image

    count = 32 if device.type == "cpu" else 8192
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
        ).save(folder / "a.jpg")
        (folder / "many").mkdir()
        for i in range(count):
            (folder / "many" / f"{i}.jpg").write_bytes((folder / "a.jpg").read_bytes())
        config = {
            **vars(train.get_args_parser().parse_args([])),
            "encoder": "resnet101",
            "encoder_dim": 2048,
            "image_size": 256,
        }
        config = {
            key: str(value) if isinstance(value, Path) else value for key, value in config.items()
        }
        decoder = models.build_decoder(config, VOCABULARY)
        decoder.fc.bias.data[WORD_MAP["<end>"]] = 5.4
        models.save_checkpoint(
            folder / "m.pth.tar",
            {
                "config": config,
                "word_map": WORD_MAP,
                "encoder": models.Encoder("resnet101", "none").state_dict(),
                "decoder": decoder.state_dict(),
                "history": [],
            },
        )
        floor = (
            f"import torch, torchvision; m = torchvision.models.resnet101().eval().to('{device}')\n"
            f"with torch.no_grad(): m(torch.rand(1, 3, 256, 256, device='{device}')).cpu()"
        )

        def process(*command):
            return clock(
                torch.device("cpu"),
                lambda: subprocess.run(
                    [sys.executable, *command], cwd=folder, check=True, capture_output=True
                ),
            )

        ours = process(
            ROOT / "caption.py", "--img", "a.jpg", "--model", "m.pth.tar", "--device", str(device)
        )
        base = process("-c", floor)
        many = process(
            ROOT / "caption.py",
            "--img",
            "many",
            "--model",
            "m.pth.tar",
            "--device",
            str(device),
            "--amp",
            "--no_plot",
            "--workers",
            str(args.workers),
        )
        print(
            f"{'caption.py, one picture':<46}{ours:>10.2f} s, torch + torchvision + one encoder pass {base:.2f} s: "
            f"{ours / base:.2f}×  (wanted: at most 1.5×)"
        )
        print(
            f"{f'caption.py, a folder of {count}, bfloat16':<46}{count / many:>10.0f} pictures/s, start included"
        )


def section_finetune(device, args):
    """Training encoder and decoder together, ResNet-101 at 256×256: against a loop that encodes a picture per caption."""
    options = train.get_args_parser().parse_args(
        ["--amp", "--fine_tune_encoder", "--batch_size", str(args.pictures)]
    )
    data = FakeDataset(args.pictures)
    images = torch.randint(0, 256, (args.pictures, 3, 256, 256), dtype=torch.uint8)
    data.images = lambda pictures: images.numpy()[pictures]
    encoder = models.Encoder("resnet101", "none").to(device)
    encoder.fine_tune()
    decoder = models.build_decoder(
        {**vars(options), "encoder_dim": encoder.encoder_dim}, VOCABULARY
    ).to(device)
    textbook = Textbook(encoder.encoder_dim).to(device)
    rows = datasets.collate(data, np.arange(args.pictures))
    captions = torch.from_numpy(rows.captions).to(device)
    parameters = [p for p in [*encoder.parameters(), *textbook.parameters()] if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-5)

    def update():
        scores = textbook(
            pooled(encoder(images[rows.image_index].to(device))), captions, rows.decode_lengths
        )
        loss = F.cross_entropy(
            scores.flatten(0, 1), captions[:, 1 : scores.shape[1] + 1].flatten(), ignore_index=0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    repeats = 1 if device.type == "cpu" else 5
    slow = len(captions) / clock(device, update, repeats)
    captioner = models.Captioner(encoder, decoder, WORD_MAP, {"image_size": 256})
    step = train.Update(
        options,
        captioner,
        train.build_optimizer(options, encoder, decoder),
        data,
        None,
        torch.bfloat16,
    )
    decoder.train()
    loaded = step.load(np.arange(args.pictures))
    fast = len(captions) / clock(device, lambda: step(*loaded, 1.0), repeats, warm_up=3)
    print_row("fine-tuning ResNet-101, bfloat16 for ours", fast, slow, "captions/s", 2)


def section_processes(device, args):
    """Training by one process and by two, each with one thread: words per second, from train.py's own log."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        records, _ = datasets.shapes_records(320, 8, 8, size=64)
        datasets.write_dataset(folder, records, dataset="shapes", source="generated", image_size=64)
        for count in (1, 2):
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    f"--nproc_per_node={count}",
                    ROOT / "train.py",
                    "--data_folder",
                    folder,
                    "--data_name",
                    datasets.base_name("shapes", 5, 5),
                    "--encoder",
                    "resnet18",
                    "--encoder_weights",
                    "none",
                    "--output_folder",
                    f"{folder}/{count}",
                    "--epochs",
                    "2",
                    "--beam_size",
                    "1",
                    "--max_decode_steps",
                    "3",
                    "--device",
                    str(device),
                ],
                check=True,
                capture_output=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            log = datasets.log_path(f"{folder}/{count}", datasets.base_name("shapes", 5, 5))
            rates[count] = json.loads(log.read_text().splitlines()[-1])["words_per_second"]
    print(
        f"{'training, one process and two':<46}{rates[1]:>10.0f}{rates[2]:>11.0f} words/s    {rates[2] / rates[1]:>7.1f}×"
    )


SECTIONS = {
    name[8:]: function for name, function in list(globals().items()) if name.startswith("section_")
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        metavar="SECTION",
        default=["ceiling", "decoder", "training", "beam", "prepare", "caption"],
        help=f"what to time, of {', '.join(SECTIONS)} (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--pictures",
        type=int,
        default=16,
        help="pictures of five captions per training step (default: 16)",
    )
    parser.add_argument(
        "--workers", type=int, default=4, help="threads that read pictures (default: 4)"
    )
    args = parser.parse_args()
    device = utils.pick_device(args.device)
    allow_tf32(True)
    print(utils.describe_machine(device))
    print(f"{'':<46}{'textbook':>10}{'suite':>11}")
    for section in args.sections:
        SECTIONS[section](device, args)


if __name__ == "__main__":
    main()
