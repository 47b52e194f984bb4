"""Metrics of captions against references, and what these do not show: variety."""

import collections
import contextlib
import functools
import operator
import os
import shutil

import numpy as np

from captioning.data.words import is_letter
from captioning.run.messages import UserError, note


def score_captions(references, hypotheses, meteor=False, each=False):
    """Corpus metrics on the 0–100 scale, computed on words that were tokenised alike.

    BLEU-1..4 from nltk (Papineni et al. 2002), ROUGE-L, CIDEr and METEOR 1.5 from pycocoevalcap.
    nltk's BLEU-n counts one n-gram for a caption shorter than n words, where coco-caption counts
    none; on captions of at least four words the two agree.

    :param references: list (pictures) of lists (captions) of lists of words
    :param hypotheses: list of lists of words, one per picture
    :param meteor: METEOR too; it needs Java and takes some seconds
    :param each: the pictures' own too: "each", a dict of lists, CIDEr, METEOR if it is to be had,
        ROUGE-L and BLEU-4, smoothed as a single caption's must be (see :func:`bleu`)
    :return: dict of floats: BLEU-1, …, BLEU-4, [METEOR,] ROUGE-L, CIDEr; METEOR may be None
    :raises UserError: if there is nothing to score
    """
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if not references or len(references) != len(hypotheses):
        counts = f"{len(references)} pictures with references, {len(hypotheses)} captions"
        raise UserError(f"{counts}: expected as many of both, and at least one")
    # nltk warns when no 4-gram matches; a vanishing count instead leaves other scores alone
    smooth = SmoothingFunction(epsilon=1e-300).method1  # BLEU-4 takes its fourth root
    weights = [(1 / n,) * n for n in range(1, 5)]
    of_corpus = corpus_bleu(references, hypotheses, weights=weights, smoothing_function=smooth)
    gts = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)}
    res = {i: [" ".join(words)] for i, words in enumerate(hypotheses)}
    cider, own_cider = Cider().compute_score(gts, res)
    found = (_meteor(gts, res) if meteor else None) or (None, [])
    rouge, own_rouge = Rouge().compute_score(gts, res)
    own = {"CIDEr": own_cider, "METEOR": found[1], "ROUGE-L": own_rouge}
    own = {name: [100 * float(score) for score in scores] for name, scores in own.items()}
    if each:
        own["BLEU-4"] = bleu(bleu_counts(references, hypotheses), smooth=True)[:, 3].tolist()
    return {
        **{f"BLEU-{n}": 100 * score * (score > 1e-9) for n, score in enumerate(of_corpus, 1)},
        **({"METEOR": found[0]} if meteor else {}),
        "ROUGE-L": 100 * float(rouge),
        "CIDEr": 100 * float(cider),
        **({"each": {name: scores for name, scores in own.items() if scores}} if each else {}),
    }


def too_short(captions):
    """What to say of captions too short for BLEU-4, which counts runs of four words; or None.

    :param captions: list of lists of words
    """
    short = sum(len(words) < 4 for words in captions)
    if 2 * short < len(captions):
        return None
    return (
        f"{short:,} of {len(captions):,} captions have fewer than four words, so BLEU-4, which "
        "counts runs of four, tells little: look at CIDEr and BLEU-1"
    )


def bleu_counts(references, hypotheses):
    """What BLEU is made of, for each picture; a corpus's is that of the sums.

    :param references, hypotheses: as for :func:`score_captions`
    :return: int64 (num_pictures, 10): for n = 1 to 4 the caption's n-grams that are in a reference
        as often, then for n = 1 to 4 all its n-grams, its length, and that of the reference nearest
        in length; a caption shorter than n counts as one n-gram, as nltk has it
    """
    rows = []
    for described, words in zip(references, hypotheses):
        hits, totals = [], []
        for n in range(1, 5):
            grams, *others = (_ngrams(text, n) for text in (words, *described))
            limit = functools.reduce(operator.or_, others, collections.Counter())
            hits.append((grams & limit).total())
            totals.append(max(1, grams.total()))
        nearest = min(map(len, described), key=lambda n: (abs(n - len(words)), n))
        rows.append([*hits, *totals, len(words), nearest])
    return np.array(rows)


def _ngrams(words, n):
    return collections.Counter(zip(*(words[i:] for i in range(n))))


def bleu(counts, smooth=False):
    """BLEU-1 to 4 (Papineni et al. 2002) on the scale 0-100, the same as nltk's.

    :param counts: (..., 10), as :func:`bleu_counts` gives them, or sums of them
    :param smooth: add one to hits and totals of n > 1 (Lin and Och 2004): a single caption without
        a common run of four words has a score too
    :return: float64 (..., 4)
    """
    hits, totals = np.asarray(counts[..., :4], float), counts[..., 4:8]
    length, nearest = counts[..., 8:9], counts[..., 9:10]
    with np.errstate(divide="ignore"):  # log 0 is -inf, of which exp is 0
        more = np.arange(4) > 0 if smooth else np.zeros(4)
        logs = np.log((hits + more) / (totals + more))
        logs = np.where(hits[..., :1] == 0, -np.inf, logs)  # nothing in common, nothing to smooth
        brevity = np.where(length > nearest, 0, 1 - nearest / np.maximum(length, 1e-300))
    return 100 * np.exp(brevity + logs.cumsum(axis=-1) / np.arange(1, 5))


def _meteor(gts, res):
    """METEOR 1.5 (Denkowski and Lavie 2014), 0-100, and a list of the captions' own, 0-1.

    :return: None where Java is missing or fails
    """
    from unittest import mock

    from pycocoevalcap.meteor.meteor import Meteor

    if not shutil.which("java"):
        return None
    # the Java program reads and writes numbers by the user's language, some of which have 0,5
    options = "-Duser.language=en -Duser.country=US -Duser.language.format=en"
    options = f"{os.environ.get('_JAVA_OPTIONS', '')} {options} -Dfile.encoding=UTF-8"
    with mock.patch.dict(os.environ, {"_JAVA_OPTIONS": options, "LC_ALL": "C"}):
        scorer = Meteor()
    try:
        score, own = scorer.compute_score(gts, res)
        return 100 * score, own
    except BaseException as error:  # a signal to stop is one, too
        java = scorer.meteor_p
        with contextlib.suppress(RuntimeError):  # it was not held
            scorer.lock.release()  # else its destructor waits for ever, or complains
        with contextlib.suppress(OSError):
            java.stdin.close()
        java.kill()  # it may have something to say all the same
        if not isinstance(error, OSError | ValueError):
            raise
        # Java is there but does not run the program
        said = (line.decode(errors="replace").strip() for line in (*java.stderr, *java.stdout))
        why = next((line for line in said if not line.startswith("Picked up")), error)
        advice = "see whether java -version works, and let it have half a GB (-Xmx512m)"
        note(f"METEOR left out, it failed in Java ({why}): {advice}")


COLOR_WORDS = """black blond blonde blue brown gray green grey orange pink purple red tan white
    yellow""".split()  # noqa: SIM905

NUMERALS = "one two three four five six seven eight nine ten".split()  # noqa: SIM905


def score_variety(references, captions):
    """What metrics of overlap do not show: whether a model says the same of everything, or guesses.

    :param references: list (pictures) of lists (captions) of lists of words
    :param captions: list of lists of words
    :return: dict. "words per caption"; "words used": how many different ones; in percent: "distinct
        captions"; "commonest caption" (pictures that get it); "repeats itself" (captions that say a
        word twice in a row or three words twice); "colours agreed" and "numbers agreed" (colour
        words and numerals that stand in at least one of the picture's references, None where none
        is said, or nobody says any)
    """
    counts = collections.Counter(map(tuple, captions))
    known = [set().union(*described) for described in references]

    def agreed(words):
        pairs = [(w, said) for said, caption in zip(known, captions) for w in caption if w in words]
        if all(said.isdisjoint(words) for _, said in pairs):
            return None  # nobody says any where the captions do
        return percentage([word in said for word, said in pairs])

    return {
        "words per caption": sum(map(len, captions)) / len(captions),
        "words used": len(set().union(*captions)),
        "distinct captions": 100 * len(counts) / len(captions),
        "commonest caption": 100 * max(counts.values()) / len(captions),
        "repeats itself": percentage([repeats_itself(caption) for caption in captions]),
        "colours agreed": agreed(COLOR_WORDS),
        "numbers agreed": agreed(NUMERALS),
    }


def repeats_itself(caption):
    """Whether a list of words has a word twice in a row, or the same three in a row twice.

    A letter of a script without spaces may be doubled: it is no word.
    """
    threes = list(zip(caption, caption[1:], caption[2:]))
    doubled = (a for a, b in zip(caption, caption[1:]) if a == b)
    return len(set(threes)) < len(threes) or not all(map(is_letter, doubled))


def percentage(values):
    """Mean of numbers or truth values in percent, None of none."""
    return 100 * sum(values) / len(values) if values else None
