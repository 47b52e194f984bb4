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
    try:
        # autocast would keep bfloat16 copies of these random weights, and use them once a
        # checkpoint's weights have been loaded in their place
        with torch.autocast("cpu", enabled=False):
            state = cell(torch.zeros(1, input_size))
    except TypeError as error:
        name = type(cell).__name__
        raise UserError(
            f"the cell {name} breaks its contract: called without a state it should begin with "
            f"zeros, as torch's own cells do ({error})"
        ) from error
    return len(state) if isinstance(state, tuple) else 1


COMMON = {"encoder_dim", *ARCHITECTURE, *DROPOUTS} - {"encoder", "decoder", "decoder_options"}


def own_options(table, args):
    """The options that other decoders do not have, given or with their defaults, as a dict.

    :param table, args: ``DECODERS``, and the flags with ``decoder`` and ``decoder_options``
    """
    factory = look_up(table, args.decoder, "decoder")
    parameters = inspect.signature(factory).parameters.values()
    plain = [p for p in parameters if isinstance(p.default, bool | int | float | str)]
    return {p.name: p.default for p in plain if p.name not in COMMON} | args.decoder_options


def fitting(factory, config):
    """What a factory of decoders takes of a configuration, as a dict.

    :raises UserError: if the configuration asks for something that the decoder does not know
    """
    own, parameters = config["decoder_options"], inspect.signature(factory).parameters.values()
    given = {name: config[name] for name in sorted(COMMON)} | own
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return given
    known = {p.name for p in parameters}
    for name in given.keys() - known:
        asked = given[name] is True or (name == "attention" and given[name] != "soft")
        if name in own or asked:
            value = "" if given[name] is True else f" {given[name]}"
            raise UserError(f"--{name}{value} is not for --decoder {config['decoder']}")
    return {name: value for name, value in given.items() if name in known}


@torch.no_grad()
def check_decoder(captioner, dataset, features=None):
    """Hold a decoder to its three methods, by a dry run over two rows before the first epoch.

    :param dataset, features: ``CaptionDataset``; its images' features, float (N, n, encoder_dim),
        if there are any yet
    :raises UserError: if a method does not keep to the contract; the message names it
    """

    def expect(holds, method, what):
        if not holds:
            name = type(decoder).__name__
            raise UserError(f"{name}.{method} breaks a decoder's contract: expected {what}")

    def check_state(state, method, rows):
        tensors = isinstance(state, tuple) and len(state) and all(map(torch.is_tensor, state))
        expect(tensors, method, "the state to be a tuple of tensors")
        shapes = " and ".join(str(tuple(s.shape)) for s in state)
        what = f"states of shape (2, {rows}, ...), found {shapes}"
        expect(all(s.shape[:2] == (2, rows) for s in state), method, what)

    decoder, device, two = captioner.decoder, captioner.device, [0, len(dataset) - 1]
    if features is None:
        features = captioner.encode(torch.from_numpy(dataset.images(two)))
    else:
        features = features[two].to(device)
    if not features.isfinite().all():
        return  # the training will say that its loss is not finite
    vocab_size = decoder.vocab_size
    index = torch.arange(2, device=device)  # (B,)
    captions = (torch.arange(1, 9, device=device) % vocab_size).view(2, 4)
    was_training = decoder.training
    decoder.eval()
    start = decoder.init_hidden_state(features, index)
    expect(isinstance(start, tuple) and len(start) == 2, "init_hidden_state", "(context, state)")
    context, first = start
    check_state(first, "init_hidden_state", 1)
    for rows in (3, 1):  # as in beam search, and as in training
        state = tuple(s.expand(-1, rows, *s.shape[2:]) for s in first)
        shape, said = (2, rows, vocab_size), []
        for t in range(3):
            found = decoder.step(captions[:, t : t + 1].expand(-1, rows), state, context)
            is_triple = isinstance(found, tuple) and len(found) == 3
            expect(is_triple, "step", "(scores, attention, state)")
            scores, attention, state = found
            expect(scores.shape == shape, "step", f"scores {shape}, found {tuple(scores.shape)}")
            check_state(state, "step", rows)
            what = f"{len(first)} states as from init_hidden_state, found {len(state)}"
            expect(len(state) == len(first), "step", what)
            alpha = attention.alpha.float()
            what = f"alpha (2, {rows}, num_pixels), found {tuple(alpha.shape)}"
            expect(alpha.dim() == 3 and alpha.shape[:2] == (2, rows), "step", what)
            total = alpha.sum(dim=2)
            what = f"alpha that sums to 1, found {total.flatten()[0]:.3f}"
            expect((total - 1).abs().max() < 1e-2, "step", what)
            said.append(scores[:, 0])
    output, said = decoder(features, captions, [3, 3], index), torch.cat(said)  # (6, vocab_size)
    what = f"packed scores {tuple(said.shape)}, found {tuple(output.scores.shape)}"
    expect(output.scores.shape == said.shape, "forward", what)
    gap = (output.scores - said).abs().max() / said.abs().max().clamp_min(1)
    expect(gap < 1e-2, "forward", f"the scores of step, found others by {gap:.2g}")
    decoder.train(was_training)
