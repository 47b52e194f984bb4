"""Tests of ``captioning/model/transformer.py``, beside those that every decoder passes."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_decoder
from helpers import CAPTIONS, END, LENGTHS, PAD, PICTURES, START, features, search

import models
from captioning.model.beams import sample_captions


def transformer(scale=0.7, layers=2, heads=2, **options):
    """A tiny one whose widths all differ."""
    widths = {"attention_dim": 8, "embed_dim": 4, "decoder_dim": 6}
    own = {"layers": layers, "heads": heads}
    options = widths | options
    return make_decoder(decoder="transformer", scale=scale, decoder_options=own, **options)


def textbook(decoder, pixels, words):
    """Scores and the last layer's weights after words, one head at a time.

    :param pixels, words: float (n, encoder_dim), int64 (T,)
    :return: (T, vocab_size), (T, n)
    """
    n, width = len(words), decoder.embedding.embedding_dim
    rates = 10000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(n).unsqueeze(1) * rates
    code = torch.cat([angles.sin(), angles.cos()], dim=1)
    x = decoder.widen(decoder.embedding(words) * math.sqrt(width) + code)
    memory = decoder.memory(pixels)
    future = torch.ones(n, n, dtype=torch.bool).triu(1)

    def attend(q, k, v, heads, hidden=None):
        found, weights = [], []
        for qh, kh, vh in zip(*(y.chunk(heads, dim=1) for y in (q, k, v))):
            energies = qh @ kh.T / math.sqrt(qh.shape[1])
            energies = energies if hidden is None else energies.masked_fill(hidden, -math.inf)
            weights.append(energies.softmax(1))
            found.append(weights[-1] @ vh)
        return torch.cat(found, dim=1), torch.stack(weights)

    for layer in decoder.layers:
        q, k, v = layer.words(layer.norms[0](x)).chunk(3, dim=1)
        x = x + layer.words_out(attend(q, k, v, layer.heads, future)[0])
        k, v = layer.image(memory).chunk(2, dim=1)
        seen, weights = attend(layer.query(layer.norms[1](x)), k, v, layer.heads)
        x = x + layer.image_out(seen)
        x = x + layer.feed_forward(layer.norms[2](x))
    return decoder.fc(decoder.norm(x)), weights


@pytest.mark.parametrize("layers, heads", [(1, 1), (2, 4), (3, 2)])
@pytest.mark.parametrize("same_width", [True, False])
def test_the_transformer_equals_the_textbook(layers, heads, same_width):
    widths = {"embed_dim": 6} if same_width else {}
    decoder = transformer(layers=layers, heads=heads, **widths)
    output = decoder(features(), CAPTIONS, LENGTHS, PICTURES)
    for row, length in enumerate(LENGTHS):
        scores, weights = textbook(decoder, features()[PICTURES[row]], CAPTIONS[row, :length])
        torch.testing.assert_close(
            output.scores[output.rows == row][:length], scores, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(output.alphas[row, :length], weights.mean(0))


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("side", [0, 2, 5])
def test_all_words_at_once_equal_one_by_one(amp, side):
    """With more captions than a group of similar length holds, and a code of positions."""
    decoder = transformer(encoded_image_size=side, position_encoding=True)
    captions, pictures = CAPTIONS.repeat_interleave(9, 0), PICTURES.repeat_interleave(9)
    lengths = [n for n in LENGTHS for _ in range(9)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, amp):
        output = decoder(features(), captions, lengths, pictures)
        context, state = decoder.init_hidden_state(features(), pictures)
        for t in range(LENGTHS[0]):
            scores, attention, state = decoder.step(captions[:, t : t + 1], state, context)
            assert all(s.shape == (36, 1, t + 1, 8) for s in state)
            live = [row for row, length in enumerate(lengths) if length > t]
            exact = {"rtol": 1e-4, "atol": 1e-5} if not amp else {"rtol": 0.05, "atol": 0.05}
            torch.testing.assert_close(output.alphas[live, t], attention.alpha[live, 0], **exact)
            at_once = torch.stack([output.scores[output.rows == row][t] for row in live])
            torch.testing.assert_close(at_once, scores[live, 0], **exact)


def test_a_word_does_not_see_those_after_it():
    decoder, other = transformer(), CAPTIONS.clone()
    other[0, 4:] = 5
    outputs = [decoder(features(), c, LENGTHS, PICTURES) for c in (CAPTIONS, other)]
    ours, theirs = (output.scores[output.rows == 0] for output in outputs)
    assert torch.equal(ours[:4], theirs[:4]) and not torch.allclose(ours[4], theirs[4])


@pytest.mark.parametrize("epsilon", [0.0, torch.tensor(0.0)])
def test_scheduled_sampling_takes_two_passes(epsilon):
    """At probability 0 every word but the first is what the model says after the true words."""
    decoder = transformer()
    forced = decoder(features(), CAPTIONS, LENGTHS, PICTURES)
    output = decoder(features(), CAPTIONS, LENGTHS, PICTURES, epsilon, argmax=True)
    assert torch.equal(output.targets, forced.targets)
    for row, length in enumerate(LENGTHS):
        own = forced.scores[forced.rows == row][: length - 1].argmax(1)
        words = torch.cat([torch.tensor([START]), own])
        scores, _ = textbook(decoder, features()[PICTURES[row]], words)
        torch.testing.assert_close(
            output.scores[output.rows == row][:length], scores, rtol=1e-4, atol=1e-5
        )


def test_own_words_are_drawn_as_often_as_epsilon_says():
    decoder = transformer()
    with torch.no_grad():  # one word is certain
        decoder.fc.weight.zero_()
        decoder.fc.bias.copy_(F.one_hot(torch.tensor(4), 10) * 50.0)
    fed = []
    decoder.embedding.register_forward_hook(lambda _, args, out: fed.append(args[0].flatten(1)))
    captions = torch.tensor([[START, 1, 1, 1, 1, END]]).expand(300, -1)
    decoder(features(), captions, [5] * 300, torch.zeros(300, dtype=torch.long), 0.3)
    words = torch.cat(fed[len(fed) // 2 :])  # of the second pass
    assert (words[:, 0] == START).all() and set(words[:, 1:].unique().tolist()) == {1, 4}
    assert abs((words[:, 1:] == 1).float().mean() - 0.3) < 0.06


def test_under_amp_the_pass_for_its_own_words_costs_no_gradient():
    """Some releases of torch keep, for the second pass, casts of weights that learn nothing."""
    decoder = transformer()
    with torch.autocast("cpu", torch.bfloat16):
        output = decoder(features(), CAPTIONS, LENGTHS, PICTURES, 0.0)
    models.caption_loss(output)[0].backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_one_head_can_be_shown():
    decoder = transformer(heads=4)
    context, state = decoder.init_hidden_state(features())
    words = torch.full((len(features()), 1), START)
    mean = decoder.step(words, state, context)[1].alpha
    heads = []
    for decoder.shown_head in range(4):
        heads.append(decoder.step(words, state, context)[1].alpha)
        torch.testing.assert_close(heads[-1].sum(2), torch.ones(len(words), 1))
    torch.testing.assert_close(torch.stack(heads).mean(0), mean)
    assert not torch.allclose(heads[0], heads[1])


def test_it_decodes_together_with_an_lstm(word_map):
    ours, theirs, out = transformer(), make_decoder(seed=1), features(6)
    pair = [ours, theirs]
    found = models.beam_search(pair, [out, out], word_map, beam_size=3, max_decode_steps=6)
    for picture, (best, *_) in enumerate(found):
        words = torch.tensor([[START, *best.words, END]])
        count = len(best.words) + best.ended
        probs = [
            d(out[picture][None], words, [count], torch.tensor([0])).scores.softmax(1) for d in pair
        ]
        log_probs = torch.stack(probs).mean(0).log()
        said = words[0, 1 : count + 1].unsqueeze(1)
        assert best.log_prob == pytest.approx(log_probs.gather(1, said).sum().item(), rel=1e-3)


def test_sampled_captions_are_what_it_says(word_map):
    """A word of probability 0 is never drawn, and no word follows <end>."""
    decoder = transformer()
    torch.manual_seed(0)
    captions = sample_captions(decoder, features(8), word_map, 5, 6)
    assert captions.shape[:2] == (8, 5) and not set(captions.unique().tolist()) & {7, START}
    for caption in captions.flatten(0, 1).tolist():
        if END in caption:
            assert set(caption[caption.index(END) + 1 :]) <= {PAD}


def test_captions_longer_than_the_code_of_positions_was_made_for(word_map):
    decoder = transformer()
    with torch.no_grad():
        decoder.fc.bias[END] = -1e4
    for (found,) in search(decoder, features(2), word_map, beam_size=1, max_decode_steps=70):
        assert len(found.words) == 70 and found.alphas.shape == (70, 9)


def test_as_many_parameters_as_the_guide_says():
    count = lambda d: sum(p.numel() for p in d.parameters())
    lstm = models.DecoderWithAttention(2539, 1280)
    ours = models.DECODERS["transformer"](2539, 1280)
    assert (count(lstm), count(ours)) == (10_212_588, 9_569_259)


def test_no_rows_are_no_fault():
    """The gaze asks so where no picture has a content word at some place."""
    decoder = transformer()
    context, state = decoder.init_hidden_state(features()[:0])
    for t in range(2):
        scores, attention, state = decoder.step(torch.zeros(0, 1, dtype=torch.long), state, context)
        assert scores.shape == (0, 1, 10) and attention.alpha.shape == (0, 1, 9)
        assert state[0].shape == (0, 1, t + 1, 8)


@pytest.mark.parametrize("layers", [1, 2])
def test_each_dropout_acts_and_in_training_only(layers):
    rates = dict.fromkeys(("dropout", "embed_dropout", "feature_dropout"), 0.5)
    decoder, uses = transformer(layers=layers, **rates), []
    parts = [part for part in decoder.modules() if isinstance(part, torch.nn.Dropout)]
    for part in parts:
        part.register_forward_hook(lambda part, *_: uses.append(part))
    still = decoder.eval()(features(), CAPTIONS, LENGTHS, PICTURES).scores
    assert len(parts) == 3 + layers and len(uses) == 3 + 3 * layers  # three in each layer
    for part in parts:
        part.train()
        assert not torch.equal(still, decoder(features(), CAPTIONS, LENGTHS, PICTURES).scores)
        part.eval()
