"""Attention besides soft attention: hard (section 4.1 of the paper), and none."""

from typing import NamedTuple

import torch
from torch import nn


class AttentionOutput(NamedTuple):
    """Where the model looked before one word."""

    alpha: torch.Tensor  # float32 (B, R, num_pixels), or one more with a sentinel; sums to 1
    weights: torch.Tensor  # float32 (B, R, num_pixels), of the sum that makes the context vector
    log_prob: torch.Tensor | None = None  # hard attention in training: (B, R), of the sample


def hard(energies, decoder):
    """Look at one place (section 4.1): the likeliest one, or in training a sampled one.

    In half of the cases training takes the expectation instead, which lowers the gradient's
    variance. The coin is tossed for each word here and for each image in the paper; one toss for
    each caption scored much worse.
    """
    alpha = energies.float().softmax(dim=2)  # (B, R, num_pixels)
    samples = decoder.training or decoder.sample_location
    place = sample(alpha.detach()) if samples else alpha.argmax(dim=2)  # (B, R)
    place = place.unsqueeze(2)  # (B, R, 1)
    weights = torch.zeros_like(alpha).scatter(2, place, 1.0)  # (B, R, num_pixels)
    if not decoder.training:
        return AttentionOutput(alpha, weights)
    expected = torch.rand_like(alpha[..., :1]) < 0.5  # (B, R, 1)
    log_prob = alpha.gather(2, place).clamp_min(1e-12).log().masked_fill(expected, 0)
    return AttentionOutput(alpha, torch.where(expected, alpha, weights), log_prob.squeeze(2))


hard.samples = True  # what draws places is marked so: its decoder keeps REINFORCE's baseline


class NoAttention(nn.Module):
    """Scores all places alike: the context vector is the image's mean feature at every word."""

    def __init__(self, *_):
        super().__init__()

    def project(self, encoder_out):
        """Nothing of the image, in the shape of ``Attention.project``'s result."""
        return encoder_out.new_zeros(*encoder_out.shape[:2], 1)

    def forward(self, zeros, h):
        """The same energy for every place."""
        return zeros.transpose(1, 2).expand(-1, h.shape[1], -1)  # (B, R, num_pixels)


def sample(probabilities):
    """Draw an index from each last dimension.

    :param probabilities: float (..., n); not a number is drawn from too, the loss will tell of it
    :return: int64 (...)
    """
    flat = probabilities.nan_to_num(1.0).flatten(0, -2)
    return torch.multinomial(flat, 1).view(probabilities.shape[:-1])
