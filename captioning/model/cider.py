"""CIDEr-D of single captions: the reward of self-critical training."""

import collections
import functools
import math


class CiderD:
    """CIDEr-D of single captions, fast enough to reward every sample in training.

    Vedantam et al. 2015, section 5; the same figure as pycocoevalcap's, with all that depends on
    the references computed once. The caption's end counts as a word: without it, training on the
    reward learns to stop in the middle of a phrase.

    :param references: list (pictures) of lists (captions) of lists of words
    """

    def __init__(self, references, end="<end>"):
        self.references, self.end, self.log_pictures = references, end, math.log(len(references))
        frequency = collections.Counter()
        for captions in references:
            frequency.update(set().union(*(self._ngrams(words, end) for words in captions)))
        self.log_frequency = {ngram: math.log(n) for ngram, n in frequency.items()}
        # when a picture is first asked for: a consensus asks for few
        self.weighed = functools.cache(lambda i: [self._weigh(said, end) for said in references[i]])

    def _ngrams(self, words, end):
        words = [*words, end] if end else words
        starts = ((i, n) for n in range(1, 5) for i in range(len(words) - n + 1))
        return collections.Counter(tuple(words[i : i + n]) for i, n in starts)

    def _weigh(self, words, end):
        """Dict n-gram -> (tf-idf, the same over the norm of all n-grams of its length); length."""
        weights, squares = {}, [0.0] * 4
        for ngram, count in self._ngrams(words, end).items():
            weights[ngram] = count * (self.log_pictures - self.log_frequency.get(ngram, 0.0))
            squares[len(ngram) - 1] += weights[ngram] ** 2
        vector = {g: (w, w / squares[len(g) - 1] ** 0.5) for g, w in weights.items() if w}
        return vector, len(words) + bool(end)

    def __call__(self, picture, words, ended=True):
        """Score a caption of a picture; 1.0 is CIDEr 100.

        :param picture: its number in the references
        :param ended: whether the caption ended by itself, and was not cut off
        """
        vector, length = self._weigh(words, self.end if ended else None)
        total = 0.0
        for other, other_length in self.weighed(picture):
            cosine = sum(
                unit * other[ngram][1] * min(1.0, other[ngram][0] / weight)
                for ngram, (weight, unit) in vector.items()
                if ngram in other
            )
            total += cosine * math.exp(-((length - other_length) ** 2) / 72)  # sigma = 6
        return 10 * total / 4 / len(self.references[picture])
