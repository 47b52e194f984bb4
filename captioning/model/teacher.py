"""The teacher of attention (``--grounding``), and the network that is trained, as one module."""

import torch
import torch.nn.functional as F
from torch import nn

from captioning.data.words import PAD_ID
from captioning.model.grid import compute_dtype, on_encoder_grid, split_sentinel


class CaptioningNetwork(nn.Module):
    """What is trained, as one module, whose gradients DistributedDataParallel can average.

    The encoder is None where features are given, the teacher (``AttentionTeacher``) without one.
    """

    def __init__(self, encoder, decoder, teacher=None):
        super().__init__()
        self.encoder, self.decoder, self.teacher = encoder, decoder, teacher

    def forward(self, images, captions, decode_lengths, image_index, *sampling):
        """``images`` or, without an encoder, features; the rest as in the decoder's ``forward``."""
        if not decode_lengths:  # fewer images in the last batch than processes
            return None
        encoder_out = images if self.encoder is None else self.encoder(images)
        output = self.decoder(encoder_out, captions, decode_lengths, image_index, *sampling)
        if self.teacher is None:
            return output
        loss = self.teacher(encoder_out, output.alphas, captions, image_index)
        return output._replace(grounding=loss)


class AttentionTeacher(nn.Module):
    """Shows attention where to look, in training alone (``--grounding``).

    Each place of the grid guesses the word to come. The loss is the negative log-likelihood of the
    true word when attention chooses whose guess counts, the marginal likelihood of a latent
    alignment (Shankar et al. 2018; Deng et al. 2018). Its gradient draws attention to the places
    from which the word can be read, which the decoder's own loss hardly does: it can live on the
    mean feature.

    A place's guess is the product of two distributions, made one again (Hinton 2002): of the words
    that its own feature shows, and of those that follow the word before, in any picture. So words
    that follow from language alone draw attention nowhere, or to a visual sentinel, whose guess is
    the second distribution alone. The guesses at the words before and
    after count half: "red" and "circle" are then read at one place, which is on the circle.
    """

    def __init__(self, encoder_dim, vocab_size):
        super().__init__()
        self.place_words = nn.Linear(encoder_dim, vocab_size)
        self.next_words = nn.Sequential(nn.Embedding(vocab_size, 64), nn.Linear(64, vocab_size))

    def forward(self, encoder_out, alphas, captions, image_index):
        """
        :param encoder_out: float (num_images, n, encoder_dim)
        :param alphas: float (B, max_decode_length, num_pixels), or one more with a sentinel
        :return: scalar, summed over the real words
        """
        _, sentinel = split_sentinel(alphas)  # (B, steps), or None
        alphas = on_encoder_grid(alphas, encoder_out.shape[1]).float()  # (B, steps, n)
        steps, dtype = alphas.shape[1], compute_dtype(encoder_out.device)
        previous, targets = captions[:, :steps], captions[:, 1 : steps + 1]  # (B, steps)
        seen = _below_highest(self.place_words(encoder_out.to(dtype)))
        seen = seen.transpose(1, 2)  # (num_images, vocab_size, n)
        usual = _below_highest(self.next_words(previous))  # (B, steps, vocab_size)
        # a guess is the softmax over the vocabulary of usual + seen, at the true word
        total = usual.exp().to(dtype) @ seen.exp().to(dtype).index_select(0, image_index)
        true = _words_of_images(seen, image_index, targets) + usual.gather(2, targets.unsqueeze(2))
        guesses = true - total.float().log()  # (B, steps, n), log-probabilities
        if sentinel is not None:
            blind = usual.log_softmax(dim=2).gather(2, targets.unsqueeze(2))  # (B, steps, 1)
            guesses = torch.cat([guesses, blind], dim=2)  # (B, steps, n + 1)
            alphas = torch.cat([alphas, sentinel.unsqueeze(2)], dim=2)  # (B, steps, n + 1)
        guesses = guesses.masked_fill((targets == PAD_ID).unsqueeze(2), 0)  # (B, steps, n)
        around = F.pad(guesses, (0, 0, 1, 1))  # (B, steps + 2, n)
        guesses = guesses + 0.5 * (around[:, :-2] + around[:, 2:])  # (B, steps, n)
        # a weight may be 0, of whose logarithm there is no gradient
        weights = alphas.clamp_min(torch.finfo(alphas.dtype).tiny).log()  # (B, steps, n)
        log_likelihood = (weights + guesses).logsumexp(dim=2)  # (B, steps)
        return -(log_likelihood * (targets != PAD_ID)).sum()


def _below_highest(scores):
    """Scores less the highest of their row, as float32: their softmax is the same, exp is safe.

    What is subtracted needs no gradient, since the softmax does not depend on it.
    """
    return scores.float().sub_(scores.detach().amax(dim=-1, keepdim=True))


def _words_of_images(scores, image_index, words):
    """``scores[image_index[:, None], words]``, whose gradient is summed in a fixed order.

    :param scores: float (num_images, vocab_size, n), of each word at each place
    :param image_index: int64 (B,), the image of each caption
    :param words: int64 (B, steps)
    :return: float (B, steps, n)
    """
    row = image_index.unsqueeze(1) * scores.shape[1] + words  # (B, steps), among all images' words
    rows = scores.flatten(0, 1).index_select(0, row.flatten())  # (B * steps, n)
    return rows.unflatten(0, words.shape)  # (B, steps, n)
