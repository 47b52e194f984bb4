"""Tests of ``captioning/model/decoders.py``: what decoders keep to, and how others are named."""

import argparse

import pytest
import torch
from conftest import make_decoder
from helpers import PAIRS, features, search
from torch import nn

import models
from captioning.model.decoders import check_decoder, fitting, own_options


def check(decoder):
    captioner = argparse.Namespace(decoder=decoder, device=torch.device("cpu"))
    check_decoder(captioner, range(5), features(5))


@pytest.mark.parametrize("decoder, attention", PAIRS)
@pytest.mark.parametrize("training", [True, False])
def test_every_decoder_keeps_the_contract(decoder, attention, training):
    decoder = make_decoder(decoder=decoder, attention=attention).train(training)
    before = torch.get_rng_state()
    check(decoder)
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
        "step", lambda s, a, state: (s, a, tuple(x * 0 for x in state)), "the scores of step",
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
        check(decoder)


class ThreeStates(nn.Module):
    """A cell whose state is three tensors."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.cell, self.hidden_size = nn.GRUCell(input_size, hidden_size), hidden_size

    def forward(self, x, state=None):
        h, before, long_before = state or [x.new_zeros(len(x), self.hidden_size)] * 3
        return self.cell(x, h + long_before), h, before


@pytest.mark.parametrize(
    "cell, states",
    [(nn.RNNCell, 1), (nn.GRUCell, 1), (nn.LSTMCell, 2), (ThreeStates, 3)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_cell_is_known_by_what_it_returns(cell, states, word_map):
    torch.manual_seed(0)
    decoder = models.recurrent(cell)(10, 6, 5, 4, 7, encoded_image_size=0).eval()
    context, state = decoder.init_hidden_state(features())
    assert [s.shape for s in state] == [(len(features()), 1, 7)] * states
    check(decoder)
    assert search(decoder, features(), word_map, max_decode_steps=4)


def test_a_subclass_of_lstm_cell_is_one():
    """It was taken for a plain cell, and failed at its first word."""

    class Mine(nn.LSTMCell):
        pass

    check(models.recurrent(Mine)(10, 6, 5, 4, 7))


def test_a_cell_that_cannot_begin_is_refused(fails):
    class Stubborn(nn.RNNCell):
        def forward(self, x, h):
            return super().forward(x, h)

    with fails("the cell Stubborn breaks its contract: called without a state"):
        models.recurrent(Stubborn)(10, 6, 5, 4, 7)


def test_search_asks_the_decoders_own_init_hidden_state(word_map):
    """A subclass's was bypassed."""

    class Dark(models.DecoderWithAttention):
        def init_hidden_state(self, encoder_out, image_index=None):
            return super().init_hidden_state(encoder_out * 0, image_index)

    torch.manual_seed(0)
    decoder = Dark(10, 6, 5, 4, 7, encoded_image_size=0).eval()
    found = search(decoder, features(), word_map, max_decode_steps=4)
    dark = search(decoder, features() * 0, word_map, max_decode_steps=4)
    assert [h[0].log_prob for h in found] == [h[0].log_prob for h in dark]


def test_own_options_are_those_that_no_other_decoder_has():
    asked = argparse.Namespace(decoder="transformer", decoder_options={"layers": 3})
    assert own_options(models.DECODERS, asked) == {"layers": 3, "heads": 4}
    asked = argparse.Namespace(decoder="lstm", decoder_options={})
    assert own_options(models.DECODERS, asked) == {}


CONFIG = {
    "decoder": "transformer", "encoder_dim": 6, "attention_dim": 8, "embed_dim": 4,
    "decoder_dim": 7, "attention": "soft", "encoded_image_size": 0, "deep_output": False,
    "attend_word": False, "position_encoding": False, "dropout": 0.0, "embed_dropout": 0.0,
    "feature_dropout": 0.0, "decoder_options": {},
}  # fmt: skip


@pytest.mark.parametrize(
    "asked, expected",
    [
        ({"deep_output": True}, "--deep_output is not for --decoder transformer"),
        ({"attend_word": True}, "--attend_word is not for --decoder transformer"),
        ({"attention": "hard"}, "--attention hard is not for --decoder transformer"),
        ({"decoder_options": {"depth": 3}}, "--depth 3 is not for --decoder transformer"),
        ({"decoder_options": {"layers": 0}}, "--layers 0: expected 1 to 48"),
        ({"decoder_options": {"heads": 3}}, "--heads 3: expected a divisor of 8"),
        ({"decoder": "gru", "decoder_options": {"heads": 2}}, "--heads 2 is not for --decoder gru"),
    ],
)
def test_what_a_decoder_does_not_know_is_refused(asked, expected, fails):
    with fails(expected):
        models.build_decoder(CONFIG | asked, 10)


def test_a_decoder_of_ones_own_takes_what_it_names():
    def factory(vocab_size, encoder_dim, depth=3):
        return vocab_size, encoder_dim, depth

    config = CONFIG | {"decoder_options": {"depth": 5}}
    assert factory(10, **fitting(factory, config)) == (10, 6, 5)
    everything = fitting(lambda vocab_size, **options: None, config)
    assert everything == {k: v for k, v in config.items() if not k.startswith("decoder")} | {
        "decoder_dim": 7, "depth": 5,
    }  # fmt: skip
