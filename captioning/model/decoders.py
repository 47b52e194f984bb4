"""What goes into a decoder's step, and what a pass over captions gives."""

import math
from typing import NamedTuple

import torch

from captioning.data.words import PAD_ID


class ImageContext(NamedTuple):
    """What a batch of images offers the decoder at every word."""

    encoder_out: torch.Tensor  # (B, n, encoder_dim), on the encoder's own grid
    encoder_att: torch.Tensor  # (B, num_pixels, ...), projected by the attention network
    pool: torch.Tensor | None  # (num_pixels, n), if attention sees another grid than the encoder's


class DecoderOutput(NamedTuple):
    """What a training pass gives. "Packed": the live rows of step 0, then of step 1, and so on."""

    scores: torch.Tensor  # float32 (num_words, vocab_size), packed
    targets: torch.Tensor  # int64 (num_words,), packed; <pad> where a row ran past its caption
    alphas: torch.Tensor  # float32 (B, max_decode_length, num_pixels), zero past each caption's end
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
