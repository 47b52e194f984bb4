"""What goes into a decoder's step, what a pass over captions gives, and what decoders keep to.

A decoder is three methods. ``init_hidden_state(encoder_out, image_index)`` prepares the images once
and returns (context, state); ``step(words, state, context)`` returns (scores, attention, state);
``forward`` runs over captions for training and returns a ``DecoderOutput``. The context is the
decoder's own affair. The state is a tuple of tensors (B, R, ...), whose rows beam search reorders,
and may grow at every step.
"""

import inspect
import math
from typing import NamedTuple

import torch

from captioning.data.words import PAD_ID
from captioning.model.checkpoints import ARCHITECTURE, DROPOUTS
from captioning.run.messages import UserError, look_up


class ImageContext(NamedTuple):
    """What a batch of images offers the decoder at every word."""

    encoder_out: torch.Tensor  # (B, n, encoder_dim), on the encoder's own grid
    encoder_att: torch.Tensor  # (B, num_pixels, ...), projected by the attention network
    mean: torch.Tensor  # (B, encoder_dim), of all places
    pool: torch.Tensor | None  # (num_pixels, n), if attention sees another grid than the encoder's


class DecoderOutput(NamedTuple):
    """What a training pass gives. "Packed": the live rows of step 0, then of step 1, and so on."""

    scores: torch.Tensor  # float32 (num_words, vocab_size), packed
    targets: torch.Tensor  # int64 (num_words,), packed; <pad> where a row ran past its caption
    # float32 (B, max_decode_length, num_pixels), zero past each caption's end; the weight of a
    # visual sentinel, where there is one, stands behind the places, here as everywhere
    alphas: torch.Tensor
    log_probs: torch.Tensor | None  # hard attention: (B, max_decode_length), of the samples
    rows: torch.Tensor  # int64 (num_words,), packed: the caption of each word
    grounding: torch.Tensor | None = None  # scalar, the loss of an ``AttentionTeacher``


def collect(captions, live, scores, attentions):
    """The ``DecoderOutput`` of a pass, from the lists of what each step gave."""
    targets = torch.cat([captions[:n, t + 1] for t, n in enumerate(live)])  # (num_words,)
    row = torch.arange(len(captions), device=captions.device)  # (B,)
    rows = torch.cat([row[:n] for n in live])  # (num_words,)
    step = torch.arange(len(live), device=captions.device)  # (max_decode_length,)
    steps = torch.cat([step[t].expand(n) for t, n in enumerate(live)])  # (num_words,)
    real = captions[:, 1 : len(live) + 1] != PAD_ID  # (B, max_decode_length)

    def unpacked(parts):  # by one kernel, where pad_sequence takes six a step
        packed = torch.cat(parts).squeeze(1)  # (num_words, ...)
        return packed.new_zeros(*real.shape, *packed.shape[1:]).index_put((rows, steps), packed)

    alphas = unpacked([attention.alpha for attention in attentions])
    alphas = alphas * real.unsqueeze(2)  # (B, max_decode_length, num_pixels)
    log_probs = None
    if attentions[0].log_prob is not None:  # (B, max_decode_length)
        log_probs = unpacked([attention.log_prob for attention in attentions]) * real
    return DecoderOutput(torch.cat(scores), targets, alphas, log_probs, rows)


def live_rows(decode_lengths, group=8):
    """How many rows each step runs. Rows leave in groups: kernels are compiled for fewer shapes.

    :param decode_lengths: list of B ints in decreasing order
    :return: list of max_decode_length ints
    """
    if decode_lengths != sorted(decode_lengths, reverse=True):
        raise ValueError("captions must stand in decreasing order of length")
    counts = [sum(length > t for length in decode_lengths) for t in range(decode_lengths[0])]
    return [min(len(decode_lengths), group * math.ceil(count / group)) for count in counts]


def count_states(cell, input_size):
    """How many tensors a recurrent cell returns as its state: 1 as a GRU, 2 as an LSTM, or more.

    :raises UserError: if the cell cannot begin without a state, as torch's own cells can
    """
    name = type(cell).__name__
    try:
        # autocast would keep bfloat16 copies of these random weights, and use them once a
        # checkpoint's weights have been loaded in their place
        with torch.autocast("cpu", enabled=False):
            state = cell(torch.zeros(1, input_size))
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"the cell {name} breaks its contract: called without a state it should begin with "
            f"zeros, as torch's own cells do ({error})"
        ) from error
    states = state if isinstance(state, tuple) else (state,)
    if not all(map(torch.is_tensor, states)):
        raise UserError(
            f"the cell {name} breaks its contract: it should return its state, a tensor or a tuple "
            "of tensors, as torch's own cells do"
        )
    return len(states)


COMMON = {"encoder_dim", *ARCHITECTURE, *DROPOUTS} - {"encoder", "decoder", "decoder_options"}


def own_options(table, decoder, given):
    """The options that other decoders do not have, given or with their defaults, as a dict.

    :param table, decoder: ``DECODERS``, and a key of it
    :param given: dict of options by name
    """
    factory = look_up(table, decoder, "decoder")
    parameters = inspect.signature(factory).parameters.values()
    plain = [p for p in parameters if isinstance(p.default, bool | int | float | str)]
    return {p.name: p.default for p in plain if p.name not in COMMON} | given


def fitting(factory, config):
    """What a factory of decoders takes of a configuration, as a dict.

    :raises UserError: if the configuration asks for something that the decoder does not know
    """
    if isinstance(factory, type) and issubclass(factory, torch.nn.RNNCellBase):
        cell = factory.__name__
        raise UserError(f"{cell} is a cell, no decoder: its entry is recurrent({cell})")
    own, parameters = config["decoder_options"], inspect.signature(factory).parameters.values()
    given = {name: config[name] for name in sorted(COMMON)} | own
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return given
    known = {p.name for p in parameters}
    for name in given.keys() - known:
        asked = given[name] is True or (name == "attention" and given[name] != "soft")
        if name in own or asked:
            value = "" if given[name] is True else f" {given[name]}"
            without = f"; --no_{name} where a preset has it" if given[name] is True else ""
            raise UserError(f"--{name}{value} is not for --decoder {config['decoder']}{without}")
    return {name: value for name, value in given.items() if name in known}
