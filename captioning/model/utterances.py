"""Captions as objects, for who works from Python: text, words, probabilities, attention."""

import dataclasses
import math

import numpy as np
import torch

from captioning.data.words import END, START, join_words, special_tokens
from captioning.model.grid import split_sentinel


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption of a picture and how it came about; ``str`` gives its text."""

    text: str
    words: list  # of strings
    word_probs: list  # of floats, 0 to 1: each word's, after the words before it
    log_prob: float  # of the words and of the caption's end, if it ended
    score: float  # what beam search ranked it by
    ended: bool  # False: cut off at max_decode_steps
    # each word's weights, float32 (num_words, rows, columns); they sum to 1, or with adaptive
    # attention to how much the word looks
    attention: np.ndarray | None = dataclasses.field(repr=False, compare=False)
    # for each word the likeliest ones at its place, as pairs (word, probability), likeliest first
    alternatives: list = dataclasses.field(repr=False)

    def __str__(self):
        return self.text

    @classmethod
    def of(cls, captioner, hypothesis, encoder_out):
        """The caption of a ``Hypothesis`` about a picture, float (n, encoder_dim)."""
        words, alphas = captioner.text(hypothesis), hypothesis.alphas
        if alphas is not None:
            alphas, _ = split_sentinel(alphas)  # (num_words, num_pixels)
            side = math.isqrt(alphas.shape[1])
            alphas = alphas.float().view(-1, side, side).numpy()  # (num_words, rows, columns)
        return cls(
            text=join_words(words),
            words=words,
            word_probs=[math.exp(p) for p in hypothesis.word_log_probs],
            log_prob=hypothesis.log_prob,
            score=hypothesis.score,
            ended=hypothesis.ended,
            attention=alphas,
            alternatives=alternatives(captioner, encoder_out, hypothesis),
        )


def alternatives(captioner, encoder_out, hypothesis, count=5):
    """What a model could have said at each word of a caption, after the words before it.

    :param encoder_out: float (n, encoder_dim), of the picture
    :return: list (words) of lists of (word, probability), likeliest first
    """
    word_map, device = captioner.word_map, encoder_out.device
    said = [word_map[START], *hypothesis.words, word_map[END]]
    caption = torch.tensor([said], device=device), [len(said) - 1]
    only = torch.zeros(1, dtype=torch.long, device=device)  # the one picture of the caption
    with torch.no_grad():
        scores = captioner.decoder(encoder_out.unsqueeze(0), *caption, only).scores
    probabilities = scores.softmax(dim=1)  # (num_words + 1, vocab_size), the last of the end
    probabilities[:, special_tokens(word_map)] = 0  # which are never said
    best = probabilities[:-1].topk(min(count, len(word_map)))  # (num_words, count)
    pairs = zip(best.values.tolist(), best.indices.tolist())
    return [[(captioner.words[i], round(p, 4)) for p, i in zip(*pair)] for pair in pairs]
