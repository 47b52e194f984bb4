"""Tests of ``captioning/model/checkpoints.py``."""

import contextlib
import math
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_decoder, make_picture
from helpers import without

import models
from captioning.model import checkpoints, tensor_files


def test_a_loaded_captioner_is_the_one_that_was_saved(best_checkpoint, shapes_word_map):
    captioner = models.load_captioner(best_checkpoint, word_map=shapes_word_map)
    checkpoint = models.load_checkpoint(best_checkpoint)
    assert all(
        torch.equal(t, checkpoint["decoder"][n]) for n, t in captioner.decoder.state_dict().items()
    )
    assert all(
        torch.equal(t, checkpoint["encoder"][n]) for n, t in captioner.encoder.state_dict().items()
    )
    assert not captioner.decoder.training and captioner.image_size == 64
    hypothesis = captioner.caption(
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8), max_decode_steps=4
    )[0][0]
    assert [shapes_word_map[word] for word in captioner.text(hypothesis)] == hypothesis.words


def test_another_word_map_is_refused(best_checkpoint, word_map, fails):
    with fails("--word_map has 10 words"):
        models.load_captioner(best_checkpoint, word_map=word_map)


def test_only_numbers_with_a_fraction_are_rounded(talkative, tmp_path):
    """A decoder's mask or indices would come back as another type, and be refused."""
    captioner = models.load_captioner(talkative)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    captioner.decoder.register_buffer("mask", mask)
    models.export_captioner(captioner, tmp_path / "masked.pth.tar")
    saved = torch.load(tmp_path / "masked.pth.tar", weights_only=True)["decoder"]
    assert torch.equal(saved["mask"], mask) and saved["embedding.weight"].dtype == torch.float16


def test_an_exported_captioner_is_half_as_large_and_its_weights_rounded(talkative, tmp_path):
    captioner = models.load_captioner(talkative)
    path = tmp_path / "new" / "captioner.pth.tar"
    models.export_captioner(captioner, path)
    exported, own = models.load_checkpoint(path), models.load_checkpoint(talkative)
    assert exported.keys() == checkpoints.CHECKPOINT_KEYS.keys()
    for key in ("word_map", "history"):
        assert exported[key] == own[key] and own[key]
    assert exported["config"].items() < own["config"].items()
    assert str(talkative.parent) not in str(exported["config"])  # nor another path of this machine
    tensors = [t for part in ("encoder", "decoder") for t in own[part].values()]
    assert path.stat().st_size < 0.52 * sum(t.nbytes for t in tensors)

    again = models.load_captioner(path)
    parts = [(captioner.encoder, again.encoder), (captioner.decoder, again.decoder)]
    for before, after in parts:
        for a, b in zip(before.state_dict().values(), after.state_dict().values()):
            assert a.dtype == b.dtype and torch.equal(a.half().float() if a.dim() > 1 else a, b)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert all(found for (found,) in again.caption(images, max_decode_steps=8))


@pytest.mark.parametrize(
    "part, change, reason",
    [
        *(
            ("config", lambda c, key=key: without(c, key), f"'{key}' is missing")
            for key in (
                "encoder",
                "decoder_dim",
                "image_size",
                "data_name",
                "fine_tune_encoder",
                "dropout",
            )
        ),
        *(
            ("config", lambda c, pair=pair: {**c, pair[0]: pair[1]}, f"says {pair[0]}")
            for pair in (
                ("image_size", 10**6),
                ("image_size", None),
                ("encoded_image_size", -1),
                ("encoded_image_size", 10**6),
                ("dropout", math.nan),
                ("data_name", 5),
                ("fine_tune_encoder", "yes"),
            )
        ),
        ("config", lambda c: {**c, "encoder": "resnet5"}, "unknown encoder"),
        ("config", lambda c: {**c, "attention": "other"}, "unknown attention 'other'"),
        ("config", lambda c: {**c, "attention": []}, ""),
        (
            "config",
            lambda c: {**c, "decoder_dim": 10**6},
            "do not fit",
        ),  # and terabytes are not asked for
        ("word_map", lambda w: without(w, "<end>"), "word map"),
        ("word_map", lambda w: {**w, "a": 10**6}, "word map"),
        ("word_map", lambda w: {i: i for i in w.values()}, "word map"),
        ("word_map", lambda w: {**w, "one more": len(w)}, "do not fit"),
        ("decoder", lambda d: without(d, "fc.bias"), "weights of its decoder"),
        ("decoder", lambda d: {**d, 5: torch.zeros(2)}, "weights of its decoder"),
        ("decoder", lambda d: {**d, "fc.bias": d["fc.bias"][:-1]}, "weights of its decoder"),
        ("decoder", lambda d: {**d, "fc.bias": 5}, "no attribute"),
        ("decoder", lambda d: {**d, "fc.bias": d["fc.bias"] * math.nan}, "not all finite"),
        (
            "decoder",
            lambda d: {**d, "fc.weight": torch.zeros(1).expand(d["fc.weight"].shape)},
            "more than the file holds",
        ),
        ("encoder", lambda e: {}, "weights of its encoder"),
    ],
)
def test_a_checkpoint_whose_parts_do_not_fit_is_refused(
    part, change, reason, best_checkpoint, tmp_path, fails
):
    checkpoint = models.load_checkpoint(best_checkpoint)
    torch.save({**checkpoint, part: change(checkpoint[part])}, tmp_path / "broken.pth.tar")
    with fails(f"broken.pth.tar is damaged.*{reason}"):
        models.load_captioner(tmp_path / "broken.pth.tar")


def test_a_model_without_numbers_says_that_it_diverged(word_map, fails):
    decoder = make_decoder(len(word_map))
    decoder.fc.bias.data.fill_(math.nan)
    with fails("not finite.*lower --learning_rate"):
        models.beam_search([decoder], [torch.rand(2, 4, 6)], word_map, beam_size=2)


def test_a_checkpoint_that_contradicts_itself_is_refused(best_checkpoint, tmp_path, fails):
    checkpoint = models.load_checkpoint(best_checkpoint)
    for key, value in (("decoder_dim", 33), ("decoder", "gru"), ("encoder", "resnet34")):
        broken = {**checkpoint, "config": {**checkpoint["config"], key: value}}
        if key == "encoder":
            broken["encoder"] = {}
        torch.save(broken, tmp_path / "broken.pth.tar")
        with fails("broken.pth.tar is damaged"):
            models.load_captioner(tmp_path / "broken.pth.tar")


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_is_not_run(tmp_path, fails):
    victim = tmp_path / "victim"
    torch.save({"config": Touch(victim)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Touch(victim)))
    torch.save(
        {"encoder": torch.nn.Linear(2, 2)}, tmp_path / "module.pth"
    )  # a whole module, as older code keeps
    for name in ("zip.pth", "plain.pth", "module.pth"):
        with fails(f"{name} is no checkpoint"):
            models.load_checkpoint(tmp_path / name)
    assert not victim.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert victim.exists()  # it would have worked


@pytest.mark.parametrize(
    "content",
    [b"", b"hello, world\n", b"\x80\x02", b"PK\x03\x04", bytes(range(256)) * 9, b"\x00" * 5000],
)
def test_what_is_no_file_of_tensors_is_refused(tmp_path, content, fails):
    (tmp_path / "bad.pth").write_bytes(content)
    with fails("bad.pth is no checkpoint"):
        tensor_files.load_tensors(tmp_path / "bad.pth")


@pytest.mark.parametrize("members", [1, 40])
def test_a_zip_bomb_is_refused_before_it_inflates(tmp_path, fails, members, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(members):
            archive.writestr(f"bomb/data/{i}", bytes(20_000_000 // members))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    with fails("bomb.pth is no checkpoint"):
        tensor_files.load_tensors(tmp_path / "bomb.pth")


def test_a_truncated_checkpoint_is_refused(tmp_path, fails):
    torch.save({"a": torch.arange(1000)}, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    for size in (1, 10, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.pth").write_bytes(data[:size])
        with fails("cut.pth"):
            tensor_files.load_tensors(tmp_path / "cut.pth")


def test_a_missing_file_or_a_folder_is_refused(tmp_path, fails):
    with fails("there is no file .*missing.pth"):
        tensor_files.load_tensors(tmp_path / "missing.pth")
    with fails(f"cannot read {tmp_path}"):
        tensor_files.load_tensors(tmp_path)


PARTS = {"config": {}, "word_map": {}, "encoder": {}, "decoder": {}, "history": []}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"config": {}, "word_map": {}},
        [1, 2],
        5,
        torch.zeros(2),
        None,
        *({**PARTS, key: 5} for key in PARTS),
        {**PARTS, "history": {}},
        {"conv1.weight": torch.zeros(2)},
    ],
)
def test_tensors_of_something_else_are_no_checkpoint(tmp_path, value, fails):
    torch.save(value, tmp_path / "other.pth")
    with fails("other.pth is no checkpoint"):
        models.load_checkpoint(tmp_path / "other.pth")


def test_a_checkpoint_comes_back_as_it_was(best_checkpoint, tmp_path):
    checkpoint = models.load_checkpoint(best_checkpoint)
    models.save_checkpoint(tmp_path / "again.pth.tar", checkpoint)
    loaded = models.load_checkpoint(tmp_path / "again.pth.tar")
    assert loaded.keys() == checkpoint.keys()
    for key in ("encoder", "decoder"):
        torch.testing.assert_close(loaded[key], checkpoint[key], rtol=0, atol=0)
    for key in ("config", "word_map", "history"):
        assert loaded[key] == checkpoint[key]


def test_a_runs_folder_stands_for_its_best_checkpoint(best_checkpoint, tmp_path, fails):
    assert models.run_checkpoint(best_checkpoint.parent) == best_checkpoint
    assert models.run_checkpoint(str(best_checkpoint)) == best_checkpoint
    with fails(f"{tmp_path} holds no BEST_checkpoint"):
        models.run_checkpoint(tmp_path)
    for name in ("BEST_checkpoint_a.pth.tar", "BEST_checkpoint_b.pth.tar"):
        (tmp_path / name).touch()
    with fails("BEST_checkpoint_a.pth.tar, BEST_checkpoint_b.pth.tar.*name its checkpoint"):
        models.run_checkpoint(tmp_path)
    assert models.run_checkpoint(tmp_path, "b") == tmp_path / "BEST_checkpoint_b.pth.tar"


# what revision 4f44731 said of six pictures: caption, log-probability, first place, its weight
EARLIER = {
    "lstm": [
        ("runs dog dog dog", -6.156909, 3, 0.313217),
        ("runs dog dog dog dog", -7.471115, 1, 0.289876),
        ("runs dog dog dog dog dog dog", -9.988611, 3, 0.313889),
        ("runs dog dog dog dog", -7.141140, 3, 0.332125),
        ("runs dog dog dog dog dog", -8.240353, 3, 0.337214),
        ("runs dog dog dog dog dog", -8.510342, 1, 0.286292),
    ],
    "gru": [
        ("a a a a a a a a", -2.913344, 2, 0.182407),
        ("a a", -1.270350, 2, 0.193673),
        ("a a a a a a a a", -2.701723, 0, 0.160475),
        ("a a a a a a", -2.162861, 2, 0.225023),
        ("a a a a a a a", -2.866378, 2, 0.192067),
        ("a a a", -1.768370, 2, 0.194534),
    ],
}


@pytest.mark.parametrize("cell", EARLIER)
def test_a_checkpoint_of_an_earlier_revision_still_captions(cell, tmp_path):
    """Its weights are a pattern that repeats, so that the archive is small."""
    with tarfile.open(Path(__file__).parents[1] / "checkpoints_4f44731.tar.xz") as archive:
        archive.extract(f"{cell}.pth.tar", tmp_path, filter="data")
    captioner = models.load_captioner(tmp_path / f"{cell}.pth.tar")
    images = np.stack([make_picture(i, 64, 64).transpose(2, 0, 1) for i in range(6)])
    options = {"beam_size": 3, "length_penalty": 0.7, "max_decode_steps": 8}
    found = captioner.caption(torch.from_numpy(images.copy()), **options)
    for (best, *_), (text, log_prob, place, weight) in zip(found, EARLIER[cell]):
        assert " ".join(captioner.text(best)) == text
        assert best.log_prob == pytest.approx(log_prob, rel=1e-4)
        assert best.alphas[0].argmax() == place
        assert best.alphas[0].max().item() == pytest.approx(weight, rel=1e-3)


def test_a_captioner_loaded_under_autocast_has_the_weights_of_its_file(best_checkpoint):
    """As eval.py --amp loads it: nothing is left over of the random weights that it began with."""
    features = torch.randn(3, 4, 512, generator=torch.Generator().manual_seed(0))
    captions = torch.randint(1, 9, (3, 6), generator=torch.Generator().manual_seed(1))
    said = []
    for early in (True, False):
        with contextlib.nullcontext() if early else torch.autocast("cpu", torch.bfloat16):
            captioner = models.load_captioner(best_checkpoint)
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                rows = torch.arange(3)
                said.append(captioner.decoder(features, captions, [5, 5, 5], rows).scores)
    torch.testing.assert_close(*said, rtol=0, atol=0)
