"""Tests of ``captioning/model/decoders.py``: cells and options of decoders."""

import pytest
import torch
from helpers import check_contract, features, search
from torch import nn

import models
from captioning.model.decoders import fitting, own_options


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
    check_contract(decoder)
    assert search(decoder, features(), word_map, max_decode_steps=4)


def test_a_subclass_of_lstm_cell_is_one():
    """It was taken for a plain cell, and failed at its first word."""

    class Mine(nn.LSTMCell):
        pass

    check_contract(models.recurrent(Mine)(10, 6, 5, 4, 7))


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
    asked = own_options(models.DECODERS, "transformer", {"layers": 3})
    assert asked == {"layers": 3, "heads": 4}
    assert own_options(models.DECODERS, "lstm", {}) == {}


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


def test_a_cell_in_place_of_a_decoder_is_said(fails):
    with fails("GRUCell is a cell, no decoder: its entry is recurrent"):
        fitting(torch.nn.GRUCell, CONFIG)


def test_a_decoder_of_ones_own_takes_what_it_names():
    def factory(vocab_size, encoder_dim, depth=3):
        return vocab_size, encoder_dim, depth

    config = CONFIG | {"decoder_options": {"depth": 5}}
    assert factory(10, **fitting(factory, config)) == (10, 6, 5)
    everything = fitting(lambda vocab_size, **options: None, config)
    assert everything == {k: v for k, v in config.items() if not k.startswith("decoder")} | {
        "decoder_dim": 7, "depth": 5,
    }  # fmt: skip
