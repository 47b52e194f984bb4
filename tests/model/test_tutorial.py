"""Checkpoints of the PyTorch captioning tutorial: what they say here, and that nothing runs."""

import copy
import os
import pickle
import random
import shutil
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import make_picture, train_args, write_shapes
from PIL import Image
from torch import nn

import caption
import datasets
import eval as evaluation
import models
import train
import utils
from captioning.model import checkpoints, encoders
from captioning.model import tutorial as tutorial_room
from captioning.report import metrics
from captioning.run import files, paths

# ---------------------------------------------------------------------------- the model, built anew


class Encoder(nn.Module):
    """A ResNet without its last two layers, pooled to a fixed grid."""

    def __init__(self, resnet, side=14):
        super().__init__()
        self.enc_image_size = side
        self.resnet = nn.Sequential(*list(resnet.children())[:-2])
        self.adaptive_pool = nn.AdaptiveAvgPool2d((side, side))

    def forward(self, pixels):
        return self.adaptive_pool(self.resnet(pixels)).permute(0, 2, 3, 1)


class Attention(nn.Module):
    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.relu, self.softmax = nn.ReLU(), nn.Softmax(dim=1)

    def forward(self, grid, h):
        energy = self.full_att(self.relu(self.encoder_att(grid) + self.decoder_att(h).unsqueeze(1)))
        return self.softmax(energy.squeeze(2))


class DecoderWithAttention(nn.Module):
    def __init__(self, vocab_size, encoder_dim=512, attention_dim=12, embed_dim=8, decoder_dim=16):
        super().__init__()
        self.vocab_size, self.dropout_p = vocab_size, 0.5
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(p=0.5)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim, bias=True)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.sigmoid = nn.Sigmoid()
        self.fc = nn.Linear(decoder_dim, vocab_size)

    def begin(self, grid):
        mean = grid.mean(dim=1)
        return self.init_h(mean), self.init_c(mean)

    def step(self, grid, word, state):
        alpha = self.attention(grid, state[0])
        context = (grid * alpha.unsqueeze(2)).sum(dim=1) * self.sigmoid(self.f_beta(state[0]))
        state = self.decode_step(torch.cat([self.embedding(word), context], dim=1), state)
        return self.fc(self.dropout(state[0])), alpha, state


RESNETS = [name for name, build in models.ENCODERS.items() if build is encoders.resnet]
TUTORIAL = {cls.__name__: cls for cls in (Encoder, Attention, DecoderWithAttention)}
for cls in TUTORIAL.values():
    cls.__module__ = "models"  # under which name the tutorial pickles them


def save(path, checkpoint, legacy=False):
    """``torch.save`` as in a process where ``models`` is the tutorial's."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Couldn't retrieve source code"
        )  # of a module that has no file
        fake = types.ModuleType("models")
        vars(fake).update(TUTORIAL)
        patch.setitem(sys.modules, "models", fake)
        torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    return path


def checkpoint_of(encoder, decoder):
    """The tutorial's dict, with an optimizer that has a state, and a NumPy number as its score."""
    decoder = copy.deepcopy(decoder)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.0)
    sum(parameter.sum() for parameter in decoder.parameters()).backward()
    optimizer.step()
    return {
        "epoch": 3,
        "epochs_since_improvement": 0,
        "bleu-4": np.float64(0.25),
        "encoder": encoder,
        "decoder": decoder,
        "encoder_optimizer": None,
        "decoder_optimizer": optimizer,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A shapes data set of pictures of 256 pixels: (folder, name)."""
    return write_shapes(tmp_path_factory.mktemp("shapes256"), (8, 1, 3), size=256)


@pytest.fixture(scope="module")
def word_map_file(data):
    return datasets.word_map_path(*data)


@pytest.fixture(scope="module")
def tutorial(word_map_file, tmp_path_factory):
    """Encoder and decoder in eval mode; a folder with zip.pth.tar and legacy.pth.tar of them."""
    torch.manual_seed(0)
    encoder = Encoder(torchvision.models.resnet18(weights=None)).eval()
    decoder = DecoderWithAttention(len(datasets.load_word_map(word_map_file))).eval()
    folder = tmp_path_factory.mktemp("tutorial")
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):  # statistics of their own, which must arrive too
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        for layer, scale in (
            (decoder.attention.full_att, 10),
            (decoder.decode_step, 3),
            (decoder.fc, 10),
        ):
            for (
                parameter
            ) in layer.parameters():  # attention that looks somewhere, words that are told apart
                parameter.mul_(scale)
    checkpoint = checkpoint_of(encoder, decoder)
    save(folder / "zip.pth.tar", checkpoint)
    save(folder / "legacy.pth.tar", checkpoint, legacy=True)
    assert (
        (folder / "zip.pth.tar").read_bytes()[:2]
        == b"PK"
        != (folder / "legacy.pth.tar").read_bytes()[:2]
    )
    return encoder, decoder, folder


@pytest.fixture(params=["zip", "legacy"])
def path(request, tutorial):
    return tutorial[2] / f"{request.param}.pth.tar"


def pixels(images):
    """The tutorial's input: values from 0 to 1, normalised as ImageNet."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def greedy(encoder, decoder, images, word_map, steps):
    """Captions (ids without <end>), log-probabilities and alphas, by the tutorial's own modules."""
    captions = []
    for image in images:
        grid = encoder(pixels(image.unsqueeze(0))).flatten(1, 2)
        state, word, words, log_prob, alphas = (
            decoder.begin(grid),
            torch.tensor([word_map["<start>"]]),
            [],
            0.0,
            [],
        )
        while len(words) < steps:
            scores, alpha, state = decoder.step(grid, word, state)
            log_probs = scores.log_softmax(dim=1)
            log_probs[:, [word_map[token] for token in ("<pad>", "<start>", "<unk>")]] = -torch.inf
            word = log_probs.argmax(dim=1)
            log_prob += log_probs.max().item()
            if word.item() == word_map["<end>"]:
                break
            words.append(word.item())
            alphas.append(alpha[0])
        captions.append((words, log_prob, torch.stack(alphas) if alphas else torch.zeros(0, 196)))
    return captions


# ------------------------------------------------------------------------------------ what they say


@torch.no_grad()
def test_it_says_what_that_model_says(path, tutorial, word_map_file):
    encoder, decoder, _ = tutorial
    word_map = datasets.load_word_map(word_map_file)
    captioner = models.load_captioner(path, word_map=word_map)
    assert (
        captioner.image_size == 256
        and captioner.word_map == word_map
        and not captioner.decoder.training
    )
    images = torch.from_numpy(
        np.stack([datasets.resize_image(make_picture(i), 256) for i in range(3)])
    )
    encoder_out, grids = captioner.encode(images), encoder(pixels(images)).flatten(1, 2)

    captions = torch.randint(1, len(word_map), (3, 9), generator=torch.Generator().manual_seed(0))
    captions[:, 0] = word_map["<start>"]
    output = captioner.decoder(encoder_out, captions, [8, 8, 8], torch.arange(3))
    state, scores = decoder.begin(grids), []
    for t in range(8):
        score, alpha, state = decoder.step(grids, captions[:, t], state)
        scores.append(score)
        torch.testing.assert_close(output.alphas[:, t], alpha, rtol=1e-4, atol=1e-4)
        assert alpha.max() > 2 * alpha.mean()
    torch.testing.assert_close(output.scores, torch.cat(scores), rtol=1e-4, atol=1e-4)

    found = captioner.caption(images, beam_size=1, max_decode_steps=7)
    expected = greedy(encoder, decoder, images, word_map, 7)
    for (best, *_), (words, log_prob, alphas) in zip(found, expected):
        assert best.words == words
        if best.ended:
            assert best.log_prob == pytest.approx(log_prob, abs=1e-4)
        torch.testing.assert_close(best.alphas, alphas, rtol=1e-4, atol=1e-4)
    assert len({tuple(words) for words, *_ in expected}) > 1  # the pictures matter


def test_every_weight_arrives_and_counters_may_be_missing(tutorial, tmp_path, word_map_file):
    encoder, decoder, _ = tutorial
    captioner = models.load_captioner(
        tutorial[2] / "zip.pth.tar", word_map=datasets.load_word_map(word_map_file)
    )
    expected = {
        name.replace("resnet.", "cnn.", 1): value for name, value in encoder.state_dict().items()
    }
    assert set(expected) == set(captioner.encoder.state_dict())
    assert all(
        torch.equal(expected[name], value) for name, value in captioner.encoder.state_dict().items()
    )
    expected = decoder.state_dict()
    assert set(expected) == set(captioner.decoder.state_dict())
    assert all(
        torch.equal(expected[name], value) for name, value in captioner.decoder.state_dict().items()
    )

    old = Encoder(torchvision.models.resnet18(weights=None), side=7)
    for module in old.modules():
        module._buffers.pop("num_batches_tracked", None)  # PyTorch 0.3 did not count
    save(tmp_path / "old.pth.tar", checkpoint_of(old, decoder), legacy=True)
    captioner = models.load_captioner(
        tmp_path / "old.pth.tar", word_map=datasets.load_word_map(word_map_file)
    )
    assert captioner.decoder.encoded_image_size == 7


@pytest.mark.parametrize("legacy", [False, True])
def test_what_data_parallel_wrapped_is_read(legacy, tutorial, tmp_path, word_map_file):
    encoder, decoder, folder = tutorial
    inner = copy.deepcopy(encoder)
    inner.resnet = nn.DataParallel(inner.resnet)
    word_map = datasets.load_word_map(word_map_file)
    expected = models.load_captioner(folder / "zip.pth.tar", word_map=word_map)
    path = tmp_path / "wrapped.pth.tar"
    for wrapped in ((nn.DataParallel(encoder), nn.DataParallel(decoder)), (inner, decoder)):
        save(path, checkpoint_of(*wrapped), legacy)
        found = models.load_captioner(path, word_map=word_map)
        for part in ("encoder", "decoder"):
            pairs = (getattr(c, part).state_dict() for c in (found, expected))
            torch.testing.assert_close(*pairs, rtol=0, atol=0)


def test_a_model_of_an_old_gpu_is_read_without_one(tutorial, tmp_path, word_map_file):
    content = (tutorial[2] / "legacy.pth.tar").read_bytes()
    assert content.count(b"ctorch\nFloatStorage\n") > 0
    (tmp_path / "gpu.pth.tar").write_bytes(
        content.replace(b"ctorch\nFloatStorage\n", b"ctorch.cuda\nFloatStorage\n")
    )
    captioner = models.load_captioner(
        tmp_path / "gpu.pth.tar", word_map=datasets.load_word_map(word_map_file)
    )
    assert torch.equal(captioner.decoder.fc.weight, tutorial[1].fc.weight)


def stand_in(module):
    """What is unpickled in place of a module."""
    made = tutorial_room.StandIn()
    children = {name: stand_in(child) for name, child in module.named_children()}
    made.state = {**vars(module), "_modules": children}
    return made


@pytest.mark.parametrize("name", RESNETS)
def test_the_resnet_is_told_by_its_layers(name, monkeypatch, word_map):
    with torch.device("meta"):
        resnet = getattr(torchvision.models, name)(weights=None)
        encoder, dim = Encoder(resnet), resnet.fc.in_features
        decoder = DecoderWithAttention(len(word_map), encoder_dim=dim)
    pickled = {"encoder": stand_in(encoder), "decoder": stand_in(decoder)}
    monkeypatch.setattr(torch, "load", lambda *_, **__: pickled)
    config = tutorial_room.tutorial_checkpoint("x", word_map)["config"]
    assert {
        key: config[key]
        for key in ("encoder", "encoder_dim", "attention_dim", "embed_dim", "decoder_dim")
    } == {
        "encoder": name,
        "encoder_dim": dim,
        "attention_dim": 12,
        "embed_dim": 8,
        "decoder_dim": 16,
    }
    assert config["encoded_image_size"] == 14


def test_caption_py_uses_it(path, word_map_file, tutorial, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(make_picture(2)).save("photo.png")
    caption.main(
        caption.get_args_parser().parse_args(
            f"--img photo.png --model {path} --word_map {word_map_file} --beam_size 1 "
            "--no_no_repeat --max_decode_steps 5 --workers 1 --device cpu".split()
        )
    )
    word_map = datasets.load_word_map(word_map_file)
    images = torch.from_numpy(datasets.resize_image(make_picture(2), 256)).unsqueeze(0)
    with torch.no_grad():
        ((words, *_),) = greedy(*tutorial[:2], images, word_map, 5)
    names = sorted(word_map, key=word_map.get)
    assert capsys.readouterr().out.startswith(
        f"photo.png: {' '.join(names[word] for word in words)}  (log-probability"
    )
    assert Path("captions/photo_attention.png").exists()


def evaluate(data, tmp_path, *flags):
    evaluation.main(
        evaluation.get_args_parser().parse_args(
            [
                *map(
                    str,
                    [
                        "--data_folder",
                        data[0],
                        "--output_folder",
                        tmp_path,
                        "--workers",
                        1,
                        "--device",
                        "cpu",
                        "--beam_size",
                        1,
                        "--max_decode_steps",
                        6,
                        *flags,
                    ],
                )
            ]
        )
    )


def test_eval_py_uses_it(path, data, word_map_file, tutorial, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_meteor", lambda gts, res: None)
    before = set(data[0].iterdir())
    evaluate(data, tmp_path, "--model", path, "--word_map", word_map_file, "--data_name", data[1])
    word_map = datasets.load_word_map(word_map_file)
    split = datasets.CaptionDataset(datasets.split_path(data[0], "test", data[1]))
    with torch.no_grad():
        expected = greedy(*tutorial[:2], torch.from_numpy(split.images(slice(None))), word_map, 6)
    names = sorted(word_map, key=word_map.get)
    said = files.read_json(paths.captions_path(tmp_path, data[1], "test", 1))
    assert [line["caption"].split() for line in said] == [
        [names[word] for word in words] for words, *_ in expected
    ]
    assert (
        set(data[0].iterdir()) == before
    )  # no features are kept of an encoder that nobody trains on


# ---------------------------------------------------------------------------------- what is refused


def test_it_needs_the_word_map_it_was_trained_with(
    path, word_map, word_map_file, data, tmp_path, fails
):
    with fails(f"{path.name} is a checkpoint of the PyTorch captioning tutorial.*--word_map"):
        models.load_captioner(path)
    words = len(datasets.load_word_map(word_map_file))
    with fails(f"--word_map has 10 words, but .*{path.name} was trained with {words}"):
        models.load_captioner(path, word_map=word_map)
    with fails("--data_name"):
        evaluate(data, tmp_path, "--model", path, "--word_map", word_map_file)


def test_a_training_starts_from_it_on_other_words(
    path, data, word_map_file, tutorial, tmp_path, fails, capsys
):
    """At a learning rate of 0 the rows of the words that both know are those of the tutorial's."""
    known = datasets.load_word_map(word_map_file)
    records, _ = datasets.shapes_records(8, 2, 1, seed=2, size=256)
    records = [record._replace(captions=["a red hexagon"]) for record in records]
    settings = {"dataset": "own", "source": "own", "min_word_freq": 1, "max_len": 20}
    datasets.write_dataset(tmp_path / "data", records, **settings)
    own = tmp_path / "data", paths.base_name("own", 5, 1)
    flags = ["--epochs", "1", "--learning_rate", "0", "--encoder", "resnet18", "--attention_dim"]
    flags += ["12", "--embed_dim", "8", "--decoder_dim", "16", "--encoded_image_size", "14"]
    flags += ["--init_from", path]
    with fails(f"{path.name} is a checkpoint of the PyTorch captioning tutorial.*--word_map"):
        train.main(train_args(own, tmp_path / "out", *flags))
    train.main(train_args(own, tmp_path / "out", *flags, "--word_map", word_map_file))
    assert "2 of 3 words known; 1 begins anew" in capsys.readouterr().out
    checkpoint = models.load_checkpoint(paths.checkpoint_path(tmp_path / "out", own[1]))
    mine, before = checkpoint["word_map"], tutorial[1].state_dict()
    for word in ("a", "red", datasets.END):
        row = before["fc.weight"][known[word]]
        assert torch.equal(checkpoint["decoder"]["fc.weight"][mine[word]], row)
    assert torch.equal(checkpoint["decoder"]["init_c.weight"], before["init_c.weight"])
    features = tutorial[0].state_dict()["resnet.0.weight"]
    assert torch.equal(checkpoint["encoder"]["cnn.0.weight"], features)


def test_no_run_of_it_is_resumed(path, training_data, tmp_path, fails):
    with fails(f"{path.name} is a checkpoint of the PyTorch captioning tutorial.*--init_from"):
        train.main(train_args(training_data, tmp_path, "--resume", path))
    assert not list(tmp_path.iterdir())


def changed(encoder, decoder, change):
    """The modules with a change that makes them another model."""
    if change == "vgg":
        encoder.resnet = nn.Sequential(nn.Conv2d(3, 512, 3, stride=32), nn.ReLU())
    elif change == "oblong":
        encoder.adaptive_pool = nn.AdaptiveAvgPool2d((14, 7))
    elif change == "blind":
        del decoder.attention
    elif change == "gru":
        decoder.decode_step = nn.GRUCell(8 + 512, 16)
    elif change == "deep":
        encoder.resnet[7][1].conv3 = nn.Conv2d(2, 2, 1)
    elif change == "wide":
        decoder.init_h = nn.Linear(2048, 16)
    elif change == "transformer":
        decoder.embedding = nn.Identity()


@pytest.mark.parametrize("change", ["vgg", "oblong", "blind", "gru", "deep", "wide", "transformer"])
def test_another_model_is_refused(change, tmp_path, fails, word_map):
    encoder, decoder = (
        Encoder(torchvision.models.resnet18(weights=None)),
        DecoderWithAttention(len(word_map)),
    )
    changed(encoder, decoder, change)
    path = save(tmp_path / "other.pth.tar", {"encoder": encoder, "decoder": decoder})
    with fails("other.pth.tar (holds another model than the tutorial's|is damaged)"):
        models.load_captioner(path, word_map=word_map)


@pytest.mark.parametrize("legacy", [False, True])
def test_shapes_beyond_what_is_stored_are_refused(legacy, tmp_path, word_map, fails):
    for size in ((1, 10**10), (10**6, 10**6)):
        encoder, decoder = nn.Sequential(nn.Conv2d(3, 2, 1)), DecoderWithAttention(len(word_map))
        decoder.attention.full_att.weight = nn.Parameter(
            torch.zeros(1).expand(size)
        )  # stored as a single number
        path = save(tmp_path / "wide.pth.tar", {"encoder": encoder, "decoder": decoder}, legacy)
        with fails("wide.pth.tar is no checkpoint"):
            models.load_captioner(path, word_map=word_map)


def test_a_cut_file_is_refused(path, tmp_path, word_map_file, fails):
    word_map, content = datasets.load_word_map(word_map_file), path.read_bytes()
    for size in (0, 3, 100, 20000, len(content) // 2):
        (tmp_path / "cut.pth.tar").write_bytes(content[:size])
        with fails("cut.pth.tar"):
            models.load_captioner(tmp_path / "cut.pth.tar", word_map=word_map)


# ----------------------------------------------------------------------------------- nothing is run


class Call:
    """Pickles as a call of a function; unpickling makes it."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def calls(victim):
    return {
        "system": Call(os.system, f"touch {victim}"),
        "exec": Call(exec, f"open({str(victim)!r}, 'w')"),
        "eval": Call(eval, f"open({str(victim)!r}, 'w')"),
        "open": Call(open, str(victim), "w"),
        "touch": Call(Path.touch, victim),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["system", "exec", "eval", "open", "touch"])
def test_code_in_it_is_not_run(kind, legacy, tmp_path, fails, word_map):
    victim, path = tmp_path / "victim", tmp_path / "hostile.pth.tar"
    call = calls(victim)[kind]
    for checkpoint in (
        call,
        {"encoder": call, "decoder": call},
        {**dict.fromkeys(checkpoints.CHECKPOINT_KEYS, {}), "x": call},
    ):
        save(path, checkpoint, legacy)
        for load in (models.load_checkpoint, lambda p: models.load_captioner(p, word_map=word_map)):
            with fails("hostile.pth.tar is no checkpoint"):
                load(path)
    module = nn.Linear(2, 2)
    module.attribute, module._buffers["buffer"] = call, call  # within what is read
    save(path, {"encoder": module, "decoder": module, "x": call}, legacy)
    with fails("hostile.pth.tar (is no checkpoint|holds another model)"):
        models.load_captioner(path, word_map=word_map)
    assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists()  # it would have worked


@pytest.mark.parametrize("legacy", [False, True])
def test_an_attribute_that_would_call_is_left_lying(legacy, tmp_path, tutorial, word_map_file):
    encoder, decoder = Encoder(torchvision.models.resnet18(weights=None)), tutorial[1]
    encoder.harmless = Call(open, str(tmp_path / "victim"), "w")
    path = save(tmp_path / "hostile.pth.tar", {"encoder": encoder, "decoder": decoder}, legacy)
    captioner = models.load_captioner(path, word_map=datasets.load_word_map(word_map_file))
    weights = captioner.encoder.state_dict()
    assert all(
        torch.equal(value, weights[f"cnn.{name}"])
        for name, value in encoder.resnet.state_dict().items()
    )
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch victim'\ntR.",  # protocol 0
        b"(S'touch victim'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch victim'\no.",  # other ways to call
        b"cbuiltins\nopen\nq\x00(S'victim'\nS'w'\ntRh\x00(S'victim'\nS'w'\ntR.",
        b"\x80\x02cos\nsystem\n}S'__setstate__'\ncos\nsystem\ns\x86b.",  # attributes of a class
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # an index that asks for gigabytes
        b"\x80\x04\x82\x01.",
        b"\x80\x02Q.",
        b"P12\n.",  # extension codes and persistent ids
    ],
)
def test_pickles_written_by_hand_do_nothing(content, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    Path("plain.pth").write_bytes(content)
    Path("legacy.pth").write_bytes(pickle.dumps(1, 2) * 3 + content + pickle.dumps([], 2))
    with zipfile.ZipFile("zip.pth", "w") as archive:
        archive.writestr("x/data.pkl", content)
    for name in ("plain.pth", "legacy.pth", "zip.pth"):
        with fails(f"{name} is no checkpoint"):
            models.load_captioner(name)
    assert {path.name for path in tmp_path.iterdir()} == {"plain.pth", "legacy.pth", "zip.pth"}


def test_a_value_is_made_of_nothing_but_stand_ins(path, word_map, monkeypatch):
    found, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **b: found.append(load(*a, **b)) or found[-1])
    with pytest.raises(utils.UserError, match="--word_map has 10 words"):
        models.load_captioner(path, word_map=word_map)
    kinds, left, seen = set(), found, set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kinds.add(
            next(kind for kind in (tutorial_room.StandIn, type(value)) if isinstance(value, kind))
        )
        if isinstance(value, dict):
            left += [*value, *value.values()]
        if isinstance(value, (list, tuple, set)):
            left += value
        if isinstance(value, tutorial_room.StandIn):
            left.append(value.state)
    assert kinds <= {
        tutorial_room.StandIn,
        dict,
        list,
        tuple,
        set,
        str,
        bytes,
        int,
        float,
        bool,
        type(None),
        torch.Tensor,
    }


def attempt(path, word_map):
    """Load; return whether that worked. All but a result or a line for the user is a failure."""
    try:
        models.load_captioner(path, word_map=word_map)
    except utils.UserError as error:
        assert "\n" not in str(error)
        return False
    return True


def mutated(content, rng):
    """Bytes with one to three of them changed, inserted or deleted."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(content))
        content[i : i + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
    return bytes(content)


def test_damaged_pickles_end_in_a_result_or_a_line(tutorial, tmp_path, word_map_file, monkeypatch):
    word_map, rng, path = (
        datasets.load_word_map(word_map_file),
        random.Random(0),
        tmp_path / "bad.pth.tar",
    )
    with zipfile.ZipFile(tutorial[2] / "zip.pth.tar") as archive:
        folder = archive.namelist()[0].split("/")[0]
        pickled = archive.read(f"{folder}/data.pkl")
        storages = {name: archive.read(name) for name in archive.namelist() if "/data/" in name}
    small = {name: content for name, content in storages.items() if len(content) < 4096}
    for _ in range(
        80
    ):  # without the large storages, which take long to write and are not what is damaged
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{folder}/data.pkl", mutated(pickled, rng))
            for name, content in small.items():
                archive.writestr(name, content)
        attempt(path, word_map)
    shutil.copy(tutorial[2] / "legacy.pth.tar", path)
    whole = path.read_bytes()[:60000]
    worked = 0
    for _ in range(20):
        with open(path, "r+b") as file:  # in place: sizes stay
            i = rng.randrange(len(whole))
            file.seek(i)
            file.write(rng.randbytes(1))
        worked += attempt(path, word_map)
        with open(path, "r+b") as file:
            file.write(whole)
    assert 0 < worked < 20
