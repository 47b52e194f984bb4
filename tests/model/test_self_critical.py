"""Tests of ``captioning/model/self_critical.py``."""

import math
import types

import numpy as np
import pytest
import torch
from conftest import make_decoder
from helpers import CAPTIONS, END, LENGTHS, PAD, PICTURES, START, UNK, features

import models
from captioning.data.words import decode_caption
from captioning.model.batches import Batch


def test_self_critical_loss_favours_what_beat_the_baseline():
    decoder, advantages = make_decoder(), torch.tensor([1.0, -0.5, 0.0, 2.0])
    output = decoder(features(), CAPTIONS, [6] * 4, PICTURES)
    output.scores.retain_grad()
    banned = torch.tensor([PAD, 8])
    loss, nll = models.self_critical_loss(output, advantages, banned)
    loss.backward()
    assert not output.scores.grad[
        :, banned
    ].any()  # or what sampled words lose would go to words never sampled
    scores = output.scores.index_fill(1, banned, -torch.inf)
    log_probs = scores.log_softmax(1).gather(1, output.targets.unsqueeze(1)).squeeze(1)
    real = output.targets != PAD
    weights = advantages[output.rows] * real / sum(LENGTHS)
    torch.testing.assert_close(loss, -(weights[real] * log_probs[real]).sum())
    target_gradient = output.scores.grad.gather(1, output.targets.unsqueeze(1)).squeeze(1)
    assert torch.equal(
        target_gradient.sign(), -weights.sign()
    )  # descent makes words of the better captions likelier
    torch.testing.assert_close(nll, -log_probs[real].mean())


def test_sampled_captions_follow_the_distribution(word_map):
    decoder, encoder_out = make_decoder(scale=1.0), features(2)
    with torch.no_grad():
        decoder.fc.bias[[PAD, UNK, START]] = 3.0  # likely, and yet never said
        decoder.fc.bias[END] = 1.0
    torch.manual_seed(0)
    captions = models.sample_captions(decoder, encoder_out, word_map, 1500, 4)
    assert captions.shape == (2, 1500, 4)
    for caption in captions.flatten(0, 1).unique(dim=0).tolist():
        length = caption.index(END) + 1 if END in caption else 4
        assert not {PAD, UNK, START} & set(caption[:length]) and set(caption[length:]) <= {PAD}
    for picture in range(2):
        context, state = decoder.init_hidden_state(encoder_out[picture][None])
        scores = decoder.step(torch.tensor([[START]]), state, context)[0][0, 0].detach()
        scores[[PAD, UNK, START]] = -math.inf
        seen = captions[picture, :, 0].bincount(minlength=10) / 1500
        assert (seen - scores.softmax(0)).abs().max() < 0.05


def test_each_sample_is_worth_what_it_beats_the_others_of_its_own_picture_by(word_map):
    numbers, asked, words = np.array([7, 3]), [], sorted(word_map, key=word_map.get)
    decoder = make_decoder(scale=1.0)
    captioner = types.SimpleNamespace(decoder=decoder, word_map=word_map, words=words)

    def reward(picture, said, ended):
        asked.append((picture, said, ended))
        return picture * len(said) + ended

    torch.manual_seed(0)
    batch = Batch(numbers, None, None, [], None, None)
    drawn = models.sample_and_reward(captioner, batch, features(2), reward, 4)
    said = [
        (numbers[picture], decode_caption(caption, words), END in caption)
        for picture, caption in zip(drawn.image_index, drawn.captions)
    ]
    assert sorted(said) == sorted(asked) and len(set(map(str, said))) > 4
    worth = np.array([reward(*sample) for sample in said])
    for i, advantage in enumerate(drawn.advantages):
        others = (drawn.image_index == drawn.image_index[i]) & (np.arange(10) != i)
        assert advantage == pytest.approx(worth[i] - worth[others].mean(), abs=1e-4)
    assert drawn.reward == pytest.approx(100 * worth.mean())
