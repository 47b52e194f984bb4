"""Tests of ``captioning/model/attentions.py``."""

from types import SimpleNamespace

import torch
from conftest import make_decoder
from helpers import CAPTIONS, features

import models
from captioning.model import decoders as decoders_room


def test_reinforce_rewards_looks_that_made_the_caption_likelier():
    """Two captions of one word, one likely, one not; the only parameters are their looks."""
    log_probs = torch.tensor([[-0.5], [-0.7]], requires_grad=True)
    scores = torch.tensor([[0.0, 4.0, 0.0], [0.0, 4.0, 0.0]])
    output = decoders_room.DecoderOutput(
        scores, torch.tensor([1, 2]), torch.full((2, 1, 4), 0.25), log_probs, torch.tensor([0, 1])
    )
    decoder = SimpleNamespace(baseline=torch.tensor(-1.5))
    reward = scores.log_softmax(1)[[0, 1], [1, 2]]
    assert reward[0] > -1.5 > reward[1]
    loss, _ = models.caption_loss(output, alpha_c=0, decoder=decoder)
    loss.backward()
    torch.testing.assert_close(
        log_probs.grad[:, 0], -(reward + 1.5) / 2
    )  # descent makes the first look likelier
    torch.testing.assert_close(decoder.baseline, 0.9 * torch.tensor(-1.5) + 0.1 * reward.mean())

    fresh = SimpleNamespace(baseline=torch.tensor(0.0))
    models.caption_loss(output, alpha_c=0, decoder=fresh)
    torch.testing.assert_close(fresh.baseline, reward.mean())


def test_a_decoder_without_a_baseline_is_told_to_keep_one(fails):
    output = decoders_room.DecoderOutput(
        torch.zeros(1, 3), torch.tensor([1]), torch.ones(1, 1, 1), torch.zeros(1, 1), torch.zeros(1)
    )
    with fails(
        'SimpleNamespace keeps no baseline: mark .*hard.samples = True.*register_buffer."baseline"'
    ):
        models.caption_loss(output, alpha_c=0, decoder=SimpleNamespace())


def test_entropy_term_spreads_hard_attention():
    alphas = torch.tensor([[[0.7, 0.2, 0.1]]], requires_grad=True)
    output = decoders_room.DecoderOutput(
        torch.zeros(1, 3), torch.tensor([1]), alphas, torch.zeros(1, 1), torch.tensor([0])
    )
    decoder = SimpleNamespace(baseline=torch.tensor(-1.0))
    models.caption_loss(output, alpha_c=0, decoder=decoder)[0].backward()
    step = alphas.detach() - 5 * alphas.grad
    entropy = torch.distributions.Categorical(probs=step / step.sum()).entropy()
    assert entropy > torch.distributions.Categorical(probs=alphas.detach()).entropy()


def test_hard_attention_samples_a_place_or_takes_the_expectation():
    decoder = make_decoder(attention="hard", scale=0.5).train()
    captions, lengths = CAPTIONS[:1].expand(200, -1), [6] * 200
    output = decoder(features(), captions, lengths, torch.zeros(200, dtype=torch.long))
    expected = output.log_probs == 0
    assert 0.4 < expected.float().mean() < 0.6
    looks = output.log_probs[~expected].exp().unsqueeze(1)
    assert (
        (output.alphas[~expected] - looks).abs().amin(1) < 1e-5
    ).all()  # each is the weight of some place
    # at the first step all rows have the same weights: places are seen as often as they weigh
    first = output.log_probs[:, 0][~expected[:, 0]].exp()
    weights = output.alphas[0, 0]
    seen = (first.unsqueeze(1) - weights).abs().argmin(1).bincount(minlength=9) / len(first)
    assert (seen - weights).abs().max() < 0.15
