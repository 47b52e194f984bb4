"""Four changes as the README's "Change it" shows them: a dozen lines and an entry in a table.

Each snippet is added to models.py as it stands here. A model with it trains, its checkpoint loads,
captions pictures by beam search and draws its attention, and no other function needs an edit.
"""

import math

import pytest
import test_encoders
import test_models
import torch
from conftest import make_decoder, make_picture, train_args
from helpers import CAPTIONS, LENGTHS, PICTURES, features
from PIL import Image

import caption
import datasets
import models
import train
import utils

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
}  # fmt: skip


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
    assert "nearly the same features" not in capsys.readouterr().err
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
    assert len([line for line in snippet.splitlines() if line.strip()]) <= most
    change(what)
    checkpoint = train_caption_and_draw(training_data, tmp_path, monkeypatch, capsys, *flags)
    assert name in (checkpoint["config"]["attention"], checkpoint["config"]["decoder"])


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
