"""Tests of ``captioning/model/dry_run.py``: what decoders keep to, and how others are named."""

import pytest
import torch
from conftest import make_decoder
from helpers import PAIRS, check_contract
from torch import nn

import models
from captioning.model.decoders import live_rows
from captioning.model.dry_run import check_loadable


@pytest.mark.parametrize("decoder, attention", PAIRS)
@pytest.mark.parametrize("training", [True, False])
def test_every_decoder_keeps_the_contract(decoder, attention, training):
    decoder = make_decoder(decoder=decoder, attention=attention).train(training)
    before = torch.get_rng_state()
    check_contract(decoder)
    assert decoder.training == training
    assert torch.equal(torch.get_rng_state(), before)  # a training draws what it would have drawn


def broken(method, change):
    """A decoder of which one method's result is changed."""
    decoder = make_decoder()
    original = getattr(decoder, method)
    setattr(decoder, method, lambda *args, **options: change(*original(*args, **options)))
    return decoder


FAULTS = {
    "not a pair": ("init_hidden_state", lambda context, state: context, "(context, state)"),
    "a list": ("init_hidden_state", lambda context, state: (context, [*state]), "tuple of tensors"),
    "no state": ("init_hidden_state", lambda context, state: (context, ()), "tuple of tensors"),
    "flat": (
        "init_hidden_state", lambda c, state: (c, tuple(s[:, 0] for s in state)), "found (2, 7)",
    ),
    "not a triple": ("step", lambda scores, attention, state: (scores, state), "attention, state)"),
    "less": ("step", lambda s, a, state: (s, a, state[:1]), "2 states .*, found 1"),
    "rows lost": (
        "step", lambda s, a, state: (s, a, tuple(x[:, :1] for x in state)), "(2, 3, ...)",
    ),
    "other scores": ("step", lambda s, a, state: (s[..., 1:], a, state), "(2, 3, 10), found"),
    "does not sum to 1": (
        "step", lambda s, a, state: (s, a._replace(alpha=a.alpha / 2), state), "found 0.500",
    ),
    "forgets": (
        "step", lambda s, a, state: (s, a, tuple(x * 0 for x in state)),
        "the scores that step and captions give",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_breaks_the_contract_is_named(fault, fails):
    method, change, expected = FAULTS[fault]
    named = "forward" if fault == "forgets" else method
    expected = expected.replace("(", r"\(").replace(")", r"\)")
    with fails(
        rf"DecoderWithAttention\.{named} breaks a decoder's contract: expected .*{expected}"
    ):
        decoder = broken(method, change)
        if fault == "forgets":  # in forward it does not, which calls the class's own step
            decoder.forward = lambda *args: make_decoder()(*args)
        check_contract(decoder)


class Own(models.DecoderWithAttention):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(10, 6, 5, 4, 7, encoded_image_size=0)


class MixesBeams(Own):
    def step(self, words, state, context):
        scores, attention, state = super().step(words, state, context)
        return scores.roll(1, dims=1), attention, state


class LosesPictures(Own):
    def init_hidden_state(self, encoder_out, image_index=None):
        index = None if image_index is None else image_index.sort().values
        return super().init_hidden_state(encoder_out, index)


class SaysOtherwise(Own):
    def forward(self, encoder_out, captions, decode_lengths, image_index, epsilon=1, argmax=False):
        output = super().forward(encoder_out, captions, decode_lengths, image_index)
        return output._replace(**self.wrong(output, captions, live_rows(decode_lengths)))


class NamesTheWordBefore(SaysOtherwise):
    def wrong(self, output, captions, live):
        return {"targets": torch.cat([captions[:n, t] for t, n in enumerate(live)])}


class LooksElsewhere(SaysOtherwise):
    def wrong(self, output, captions, live):
        return {"alphas": output.alphas.flip(2)}


class ForgetsAlphas(SaysOtherwise):
    def wrong(self, output, captions, live):
        return {"alphas": None}


class MixesRows(SaysOtherwise):
    def wrong(self, output, captions, live):
        return {"rows": output.rows.flip(0)}


class TellsWeightsAlone(Own):
    def step(self, words, state, context):
        scores, attention, state = super().step(words, state, context)
        return scores, attention.alpha, state


class SevenPlaces(Own):
    def step(self, words, state, context):
        scores, attention, state = super().step(words, state, context)
        alpha = attention.alpha[..., :7]
        return scores, attention._replace(alpha=alpha / alpha.sum(2, keepdim=True)), state


class TellsScoresAlone(Own):
    def forward(self, *args):
        return super().forward(*args).scores


class NoStep(nn.Module):
    vocab_size = 10

    def init_hidden_state(self, encoder_out, image_index=None):
        return None, (encoder_out,)


class KeepsThePastToItself(Own):
    """What was said stands in the context, whose rows no search reorders."""

    def init_hidden_state(self, encoder_out, image_index=None):
        context, state = super().init_hidden_state(encoder_out, image_index)
        return (context, []), state

    def step(self, words, state, context):
        context, past = context
        past.append(words)
        scores, attention, state = super().step(words, state, context)
        counts = nn.functional.one_hot(torch.stack(past), self.vocab_size).sum(dim=0)  # (B, R, V)
        return scores + counts, attention, state


@pytest.mark.parametrize(
    "decoder, expected",
    [
        (KeepsThePastToItself, "step .* to be those of the row alone, wherever the state's rows"),
        (MixesBeams, "step .* a row's scores to be those of the row alone, .* found others by"),
        (LosesPictures, "init_hidden_state .* the image of each row to be that of image_index"),
        (NamesTheWordBefore, "forward .* the targets that step and captions give, found others"),
        (LooksElsewhere, "forward .* the alphas that step and captions give, found others"),
        (ForgetsAlphas, r"forward .* alphas \(3, 3, 9\), found NoneType"),
        (MixesRows, "forward .* the rows that step and captions give, found others"),
        (TellsWeightsAlone, "step .* its attention to be an AttentionOutput"),
        (SevenPlaces, "step .* alpha of a square grid, found 7 places"),
        (TellsScoresAlone, "forward .* a DecoderOutput"),
        (NoStep, "step .* it to be there"),
    ],
)
def test_what_would_train_on_the_wrong_things_is_named(decoder, expected, fails):
    method, _, what = expected.partition(" .* ")
    with fails(rf"{decoder.__name__}\.{method} breaks a decoder's contract: expected .*{what}"):
        check_contract(decoder())


class NeedsIndex(Own):
    def init_hidden_state(self, encoder_out, image_index):
        return super().init_hidden_state(encoder_out, image_index)


class NoEpsilon(Own):
    def forward(self, encoder_out, captions, decode_lengths, image_index):
        return super().forward(encoder_out, captions, decode_lengths, image_index)


@pytest.mark.parametrize(
    "decoder, method", [(NeedsIndex, "init_hidden_state"), (NoEpsilon, "forward")]
)
def test_what_a_method_raises_itself_is_shown_and_the_method_named(decoder, method):
    with pytest.raises(TypeError) as raised:
        check_contract(decoder())
    assert raised.value.__notes__ == [
        f"{decoder.__name__}.{method} failed in the dry run before the first epoch"
    ]


class Masked(Own):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))


class Expanded(Own):
    def __init__(self):
        super().__init__()
        self.register_buffer("wide", torch.zeros(1).expand(4))


class ReadsValues(Own):
    def __init__(self):
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]


def test_what_could_not_be_loaded_again_is_refused_before_the_training(fails):
    check_loadable(Masked(), Masked)
    with fails("Expanded could not be loaded again: .* claim more than the file holds"):
        check_loadable(Expanded(), Expanded)
    with fails("ReadsValues could not be loaded again: .*meta.* shapes and no values"):
        check_loadable(ReadsValues(), ReadsValues)
