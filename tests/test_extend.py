"""Four changes as the README's "Change it" shows them: a dozen lines and an entry in a table.

Each snippet is added to models.py as it stands here. A model with it trains, its checkpoint loads,
captions pictures by beam search and draws its attention, and no other function needs an edit.

Then seven further changes, counted in lines and places: four of models.py, and a patch for each
script that has no table for it.
"""

import math
import re
import types

import pytest
import test_encoders
import test_models
import torch
from conftest import ROOT, make_decoder, make_picture, train_args
from helpers import CAPTIONS, LENGTHS, PICTURES, features
from PIL import Image

import caption
import datasets
import models
import train
import utils
from captioning.data import formats
from captioning.model.decoders import DecoderOutput
from captioning.report import curves, metrics
from captioning.run import files, paths

DOT_PRODUCT_ATTENTION = """
class DotProductAttention(nn.Module):
    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.key = nn.Linear(encoder_dim, attention_dim)
        self.query = nn.Linear(decoder_dim, attention_dim)

    def project(self, encoder_out):  # once per image
        return self.key(encoder_out)  # (B, num_pixels, attention_dim)

    def forward(self, keys, h):  # at every word
        return self.query(h) @ keys.mT / keys.shape[2] ** 0.5  # (B, R, num_pixels)

ATTENTIONS["dot"] = (DotProductAttention, soft)
"""

RNN_DECODER = """
DECODERS["rnn"] = recurrent(nn.RNNCell)
"""

MOBILENET_ENCODER = """
def mobilenet(name):
    model = torchvision.models.get_model(name)
    return Backbone(model, list(model.features), frozen_blocks=4)

ENCODERS["mobilenet_v3_small"] = mobilenet
"""

STEP_SCHEDULE = '''
def step(progress, schedule):
    """The true word in the first half of the training, then with the smallest probability."""
    return 1.0 if progress < 0.5 else schedule.minimum

SCHEDULES["step"] = step
'''

MULTI_HEAD_ATTENTION = """
class MultiHeadAttention(nn.Module):
    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.key = nn.Linear(encoder_dim, attention_dim)
        self.query = nn.Linear(decoder_dim, attention_dim)
        self.value = nn.Parameter(torch.randn(4, attention_dim // 4) / 4)  # four heads

    def project(self, encoder_out):
        return self.key(encoder_out)

    def forward(self, keys, h):
        hidden = torch.tanh(keys.unsqueeze(1) + self.query(h).unsqueeze(2))
        energies = (hidden.unflatten(3, (4, -1)) * self.value).sum(4)  # (B, R, num_pixels, 4)
        return energies.softmax(2).mean(3).log()  # whose softmax is the heads' mean

ATTENTIONS["heads"] = (MultiHeadAttention, soft)
"""

TWO_LAYERS = """
class TwoLayers(nn.Module):
    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.lower = nn.LSTMCell(input_size, hidden_size)
        self.upper = nn.LSTMCell(hidden_size, hidden_size)

    def forward(self, x, state=None):
        upper, lower = (state[:2], state[2:]) if state else (None, None)
        lower = self.lower(x, lower)
        return *self.upper(lower[0], upper), *lower  # attention sees the first

DECODERS["two_layers"] = recurrent(TwoLayers)
"""

SMALL_CNN = """
def small_cnn(name):
    layers, channels = [], 3
    for width in (32, 64, 128, 256):  # each halves the picture's side
        conv = nn.Conv2d(channels, width, kernel_size=3, stride=2, padding=1)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return Backbone(nn.Sequential(*layers), layers, frozen_blocks=0)

ENCODERS["small_cnn"] = small_cnn
"""

SIDE_BY_SIDE = """
class SideBySide(nn.Module):
    def __init__(self, weights):
        super().__init__()
        names = "resnet18", "efficientnet_lite0"
        self.encoders = nn.ModuleList(Encoder(name, weights) for name in names)

    def forward(self, images):  # each scales the colours as it knows them
        grid = torch.cat([encoder(images) for encoder in self.encoders], dim=2)  # (B, n, channels)
        return grid.mT.unflatten(2, (math.isqrt(grid.shape[1]), -1))  # (B, channels, rows, columns)

def side_by_side(name):
    model, unscaled = SideBySide("none"), {"mean": (0, 0, 0), "std": (1 / 255,) * 3}
    load = lambda: SideBySide("imagenet").state_dict()
    return Backbone(model, [model], frozen_blocks=0, **unscaled, pretrained=load)

ENCODERS["side_by_side"] = side_by_side
"""

# the table, the entry's name, what is added to models.py, flags of train.py
CHANGES = {
    "attention": ("ATTENTIONS", "dot", DOT_PRODUCT_ATTENTION, ["--attention", "dot"]),
    "decoder": ("DECODERS", "rnn", RNN_DECODER, ["--decoder", "rnn"]),
    "encoder": (
        "ENCODERS", "mobilenet_v3_small", MOBILENET_ENCODER, ["--encoder", "mobilenet_v3_small"],
    ),
    "schedule": ("SCHEDULES", "step", STEP_SCHEDULE, ["--scheduled_sampling", "step"]),
}  # fmt: skip

# further changes, each in one place, and how many lines they may take
FURTHER = {
    "several heads": (
        "ATTENTIONS", "heads", MULTI_HEAD_ATTENTION, ["--attention", "heads"], 16,
    ),
    "two layers": ("DECODERS", "two_layers", TWO_LAYERS, ["--decoder", "two_layers"], 20),
    "a CNN from nothing": (
        "ENCODERS", "small_cnn", SMALL_CNN, ["--encoder", "small_cnn", "--fine_tune_encoder"], 12,
    ),
    "two CNNs": ("ENCODERS", "side_by_side", SIDE_BY_SIDE, ["--encoder", "side_by_side"], 16),
}  # fmt: skip

COVERAGE_LOSS = """
@@
-        return models.caption_loss(
+        loss, nll = models.caption_loss(
             output, batch.num_words, args.label_smoothing, args.alpha_c, grounding=args.grounding,
             decoder=self.captioner.decoder,
         )  # fmt: skip
+        covered = output.alphas.cumsum(dim=1) - output.alphas  # (B, steps, num_pixels), so far
+        again = torch.minimum(output.alphas, covered).sum()  # See et al. 2017, eq. 13
+        return loss + args.coverage * again / batch.num_words, nll
@@
     add("--alpha_c", type=weight, default=0.1, help=text)
+    text = "weight of the coverage loss (See et al. 2017): attention leaves where it has been"
+    add("--coverage", type=weight, default=0.0, help=text)
"""

OWN_METRIC = """
@@
     own = row.pop("each")
+    own["known words"] = [  # of a caption, that people say of the picture, in percent
+        100 * len(set(words) & set().union(*said)) / max(1, len(set(words)))
+        for words, said in zip(captions, data.references)
+    ]
+    row["known words"] = sum(own["known words"]) / len(captions)
"""

OWN_SOURCE = """
@@
 SOURCES = {"flickr8k": flickr8k, "flickr30k": own, "coco": own, "shapes": generated}
+
+
+def album(args, lost):
+    '''A folder whose album.txt has lines [PICTURE SPLIT], and below each its captions.'''
+    (folder,), pictures = args.source or [args.data_folder], []
+    for line in (folder / "album.txt").read_text(encoding="utf-8").splitlines():
+        if line.startswith("["):
+            name, split = line.strip("[]").split()
+            image = lambda size, path=folder / name: datasets.open_image(path, size)
+            pictures.append(datasets.Record(name, split, [], image))
+        elif line:
+            pictures[-1].captions.append(line)
+    return pictures, [], formats.fingerprint([folder / "album.txt"])
+
+
+SOURCES["album"] = album
"""

# patches of a script, and in how many places and lines they may change it
PATCHES = {
    "a coverage loss": ("train", COVERAGE_LOSS, 2, 16),
    "a metric": ("eval", OWN_METRIC, 1, 6),
    "a source of data": ("create_input_files", OWN_SOURCE, 1, 20),
}


def lines_of(change):
    """How many lines a snippet or a patch takes, without empty ones."""
    return len(re.findall(r"^[+-]." if "@@" in change else r"^.*\S", change, re.MULTILINE))


@pytest.mark.parametrize("what", PATCHES)
def test_a_patch_changes_few_lines_in_few_places(what):
    _, patch, places, most = PATCHES[what]
    assert patch.count("@@") == places and 1 <= lines_of(patch) <= most


def test_the_guide_says_how_many_lines_the_further_changes_take():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"^\*\*Other changes\*\*.*?\n\n", guide, re.MULTILINE | re.DOTALL)
    changes = [of[2] for of in FURTHER.values()] + [of[1] for of in PATCHES.values()]
    assert re.findall(r"\((\d+)", told) == [str(lines_of(change)) for change in changes]


def patched(what):
    """The module of a script as it is with a patch of ``PATCHES``."""
    script, patch, *_ = PATCHES[what]
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    for place in patch.split("@@\n")[1:]:
        before, after = (
            "".join(f"{line[1:]}\n" for line in place.splitlines() if line[0] in kinds)
            for kinds in (" -", " +")
        )
        assert text.count(before) == 1, f"{script}.py has no longer one place like this:\n{before}"
        text = text.replace(before, after)
    module = types.ModuleType(script)
    exec(compile(text, f"{script}.py", "exec"), vars(module))
    return module


def test_a_coverage_loss_has_its_value():
    """Two captions of three and two words, with two places to look at."""
    alphas = torch.tensor([[[0.5, 0.5], [0.8, 0.2], [0.1, 0.9]], [[1, 0], [1, 0], [0, 0]]])
    by_hand = (0.5 + 0.2) + (0.1 + 0.7) + 1
    scores, targets = torch.zeros(5, 10), torch.arange(1, 6)
    output = DecoderOutput(scores, targets, alphas, None, torch.tensor([0, 1, 0, 1, 0]))
    batch, module = types.SimpleNamespace(num_words=torch.tensor(5.0)), patched("a coverage loss")
    losses = {}
    for weight in ("0", "2"):
        args = module.get_args_parser().parse_args(["--coverage", weight])
        trainer = types.SimpleNamespace(args=args, captioner=types.SimpleNamespace(decoder=None))
        losses[weight], _ = module.Trainer.loss(trainer, output, batch)
    assert losses["0"] == models.caption_loss(output, 5, args.label_smoothing, args.alpha_c)[0]
    assert losses["2"] - losses["0"] == pytest.approx(2 * by_hand / 5)


def test_a_coverage_loss_is_a_flag_of_the_training(training_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "draw_curves", lambda *_: None)
    module, records = patched("a coverage loss"), {}
    for weight in ("0", "5"):
        args = train_args(training_data, tmp_path / weight, "--epochs", "1")
        flags = module.get_args_parser().parse_args(["--coverage", weight])
        module.main(types.SimpleNamespace(**vars(flags) | vars(args)))
        checkpoint = models.load_checkpoint(models.run_checkpoint(tmp_path / weight))
        assert checkpoint["config"]["coverage"] == float(weight)
        records[weight] = checkpoint["history"][0]
        assert ("--coverage 5.0" in capsys.readouterr().out) == (weight == "5")
    assert records["5"]["loss"] > records["0"]["loss"] + 1
    assert records["5"]["nll"] != records["0"]["nll"]  # its gradient reaches the weights
    with pytest.raises(SystemExit):
        module.get_args_parser().parse_args(["--coverage", "-1"])


def test_a_metric_is_in_the_table_the_files_and_the_page(
    talkative, training_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(metrics, "_meteor", lambda gts, res: None)
    module, page = patched("a metric"), tmp_path / "page.html"
    flags = ["--model", talkative, "--data_folder", training_data[0], "--output_folder", tmp_path]
    flags += ["--beam_size", "2", "--html", page, "--device", "cpu", "--max_decode_steps", "8"]
    module.main(module.get_args_parser().parse_args(list(map(str, flags))))

    data = datasets.CaptionDataset(paths.split_path(training_data[0], "test", training_data[1]))
    said = files.read_json(paths.captions_path(tmp_path, training_data[1], "test", 2))
    expected = []
    for row, references in zip(said, data.references):
        words = set(row["caption"].split())
        expected.append(100 * sum(any(w in r for r in references) for w in words) / len(words))
    assert [row["known words"] for row in said] == pytest.approx(expected, abs=0.01)
    found = files.read_json(paths.metrics_path(tmp_path, training_data[1], "test"))
    assert found["beam_sizes"]["2"]["known words"] == pytest.approx(sum(expected) / len(expected))
    mean = f"{sum(expected) / len(expected):.2f}"
    assert re.search(rf"known words +{mean} +-\n", capsys.readouterr().out)  # "-": of people
    shown = page.read_text(encoding="utf-8")
    assert f"<th>known words</th><td>{mean}</td>" in shown
    assert all(f"known words {score:.1f}" in shown for score in expected)
    assert "known words" in paths.scores_path(tmp_path, training_data[1], "test").read_text()


def test_a_source_of_data_is_prepared_and_its_digest_held(tmp_path, capsys, fails):
    module, lines = patched("a source of data"), []
    for i, split in enumerate(["train", "train", "val", "test"]):
        Image.fromarray(make_picture(i)).save(tmp_path / f"{i}.png")
        lines += [f"[{i}.png {split}]", f"a dog runs {i}", "a dog", ""]
    album, out = tmp_path / "album.txt", tmp_path / "out"
    album.write_text("\n".join(lines), encoding="utf-8")
    flags = ["--dataset", "album", "--source", tmp_path, "--data_folder", out]
    flags = [*map(str, flags), "--image_size", "32", "--min_word_freq", "1"]
    prepare = lambda *more: module.main(module.get_args_parser().parse_args([*flags, *more]))
    prepare()
    data = datasets.CaptionDataset(
        paths.split_path(out, "train", datasets.base_name("album", 5, 1))
    )
    assert data.image_names == ["0.png", "1.png"]
    assert data.raw_references == [["a dog runs 0", "a dog"], ["a dog runs 1", "a dog"]]
    expected = datasets.resize_image(make_picture(1), 32)
    assert (data.images([1])[0] == expected).all()
    assert data.attributes["source"] == formats.fingerprint([album])
    capsys.readouterr()
    prepare()
    assert "already" in capsys.readouterr().out
    album.write_text("\n".join(lines).replace("a dog runs 3", "a cat runs 3"), encoding="utf-8")
    with fails(r"was made with source album.txt \(SHA-256 .*, not album.txt .*; give --force"):
        prepare()
    prepare("--force")
    with fails("--dataset album is for --source"):
        prepare("--images", str(tmp_path))


@pytest.fixture
def change(monkeypatch):
    """Function of a key of ``CHANGES``: make that change until the test ends."""

    def make(what):
        table, name, snippet, *_ = (CHANGES | FURTHER)[what]
        monkeypatch.setitem(getattr(models, table), name, None)  # which the snippet replaces
        exec(compile(snippet, "snippet", "exec"), dict(vars(models)))

    return make


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_takes_at_most_twelve_lines(what):
    lines = [line for line in CHANGES[what][2].splitlines() if line.strip()]
    assert 1 <= len(lines) <= 12


def train_caption_and_draw(data, folder, monkeypatch, capsys, *flags):
    """Train for an epoch, caption a picture and look at its sheet; return the checkpoint."""
    train.main(train_args(data, folder / "run", "--epochs", 1, "--ss_min", 0.5, *flags))
    capsys.readouterr()
    path = models.run_checkpoint(folder / "run")
    checkpoint = models.load_checkpoint(path)
    assert math.isfinite(checkpoint["history"][0]["val_nll"])

    Image.fromarray(make_picture(0)).save(folder / "photo.png")
    monkeypatch.chdir(folder)
    flags = f"--img photo.png --model {path} --beam_size 3 --max_decode_steps 6 --device cpu"
    caption.main(caption.get_args_parser().parse_args(flags.split()))
    captioner = models.load_captioner(path)
    image = datasets.resize_image(make_picture(0), captioner.image_size)
    ((best, *_),) = captioner.caption(
        torch.from_numpy(image).unsqueeze(0), beam_size=3, max_decode_steps=6, no_repeat=True
    )
    assert " ".join(captioner.text(best)) in capsys.readouterr().out
    torch.testing.assert_close(best.alphas.sum(1), torch.ones(len(best.words)))
    with Image.open(folder / "captions" / "photo_attention.png") as sheet:
        assert min(sheet.size) > 100
    return checkpoint


@pytest.mark.parametrize(
    "amp", [[], pytest.param(["--amp"], marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_model_trains_captions_and_draws(
    what, amp, change, training_data, tmp_path, monkeypatch, capsys
):
    change(what)
    flags = [*CHANGES[what][3], *amp]
    checkpoint = train_caption_and_draw(training_data, tmp_path, monkeypatch, capsys, *flags)
    key = "scheduled_sampling" if what == "schedule" else what
    assert checkpoint["config"][key] == CHANGES[what][1]


@pytest.mark.parametrize("what", FURTHER)
def test_a_further_change_trains_captions_and_draws(
    what, change, training_data, tmp_path, monkeypatch, capsys
):
    _, name, snippet, flags, most = FURTHER[what]
    assert lines_of(snippet) <= most
    change(what)
    checkpoint = train_caption_and_draw(training_data, tmp_path, monkeypatch, capsys, *flags)
    assert name in checkpoint["config"].values()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_network_of_timm_trains_captions_and_draws(
    name, training_data, tmp_path, monkeypatch, capsys
):
    flags = ["--encoder", f"timm/{name}", "--fine_tune_encoder"]
    checkpoint = train_caption_and_draw(training_data, tmp_path, monkeypatch, capsys, *flags)
    assert checkpoint["config"]["encoder"] == f"timm/{name}"


@pytest.mark.parametrize("what", ["attention", "decoder"])
@pytest.mark.parametrize("deep_output, side", [(False, 0), (True, 2)])
def test_a_changed_decoder_equals_the_textbook(what, deep_output, side, change):
    """Scores, attention and gradients, one caption and one word at a time."""
    change(what)
    options = {"deep_output": deep_output, "encoded_image_size": side, what: CHANGES[what][1]}
    test_models.test_decoder_equals_the_textbook(options, 1.0)
    test_models.test_decoder_equals_the_textbook(options, torch.tensor(1.0))


class Sharper(models.Attention):
    """The paper's scores, twice as large."""

    def forward(self, encoder_att, h):
        return 2 * super().forward(encoder_att, h)


def upside_down(energies, decoder):
    """Look where the scores are lowest."""
    return models.soft(-energies, decoder)


@pytest.mark.parametrize("entry", [(Sharper, models.soft), (models.Attention, upside_down)])
def test_an_own_attention_is_held_to_its_own_formula(entry, monkeypatch):
    monkeypatch.setitem(models.ATTENTIONS, "own", entry)
    test_models.test_decoder_equals_the_textbook({"attention": "own"}, 1.0)
    own, plain = make_decoder(attention="own"), make_decoder()
    batch = features(), CAPTIONS, LENGTHS, PICTURES
    assert not torch.allclose(own(*batch).alphas, plain(*batch).alphas, atol=1e-3)


class Forgetful(models.DecoderWithAttention):
    """Begins every word anew."""

    def step(self, words, state, context):
        return super().step(words, tuple(map(torch.zeros_like, state)), context)


def test_an_own_decoder_is_built_and_held_to_its_own_step(monkeypatch):
    build = models.build_decoder

    def build_own(config, vocab_size):
        decoder = build(config, vocab_size)
        decoder.__class__ = Forgetful
        return decoder

    monkeypatch.setattr(models, "build_decoder", build_own)
    assert type(make_decoder()) is Forgetful
    test_models.test_decoder_equals_the_textbook({}, 1.0)


def test_a_changed_encoder_sees_the_pictures(change):
    """With random weights, whose BatchNorm statistics come from the training pictures."""
    change("encoder")
    test_encoders.test_every_encoder_gives_its_last_grid("mobilenet_v3_small")
    torch.manual_seed(0)
    encoder = models.Encoder("mobilenet_v3_small", "none")
    assert encoder.encoder_dim == 576
    images = torch.stack(
        [torch.from_numpy(datasets.resize_image(make_picture(i), 64)) for i in range(8)]
    )
    with torch.no_grad():
        assert encoder(images).mean(1).std(0).max() < 1e-4  # blind
        models.calibrate(encoder, [images])
        assert encoder(images).mean(1).std(0).mean() > 0.05


def test_a_changed_schedule_is_followed(change):
    change("schedule")
    schedule = models.Schedule(100, minimum=0.25)
    said = [models.scheduled_sampling_epsilon("step", i, schedule) for i in (0, 49, 50, 100)]
    assert said == [1.0, 1.0, 0.25, 0.25]


@pytest.mark.parametrize("what", ["attention", "decoder", "encoder"])
def test_a_checkpoint_with_an_unknown_entry_is_refused(what, best_checkpoint, tmp_path, fails):
    name = "unheard_of"
    checkpoint = models.load_checkpoint(best_checkpoint)
    checkpoint["config"][what] = name
    models.save_checkpoint(tmp_path / "other.pth.tar", checkpoint)
    known = next(iter(getattr(models, CHANGES[what][0])))
    with fails(f"other.pth.tar .*unknown {what} '{name}'; expected one of {known}"):
        models.load_captioner(tmp_path / "other.pth.tar")


@pytest.mark.parametrize("what", ["attention", "decoder"])
def test_a_checkpoint_does_not_load_into_another_entry(what, change, best_checkpoint, tmp_path):
    """Replaced in place, an old checkpoint would caption with the wrong equation."""
    change(what)
    checkpoint = models.load_checkpoint(best_checkpoint)
    checkpoint["config"][what] = CHANGES[what][1]
    models.save_checkpoint(tmp_path / "other.pth.tar", checkpoint)
    with pytest.raises(utils.UserError, match="weights of its decoder do not fit"):
        models.load_captioner(tmp_path / "other.pth.tar")


@pytest.mark.parametrize("what", CHANGES)
def test_an_unknown_flag_value_lists_the_known(what, training_data, tmp_path, fails):
    known = next(iter(getattr(models, CHANGES[what][0])))
    flags = [str(flag).replace(CHANGES[what][1], "unheard_of") for flag in CHANGES[what][3]]
    with fails(f"'unheard_of'; expected one of {known}"):
        train.main(train_args(training_data, tmp_path / "run", *flags))
