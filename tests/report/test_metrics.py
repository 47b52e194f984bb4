"""Tests of ``captioning/report/metrics.py``."""

import math
import multiprocessing
import os
import random
import shutil
import signal
from collections import Counter

import pytest
from helpers import HYPOTHESES, REFERENCES, as_coco
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

import utils
from captioning.report import metrics
from captioning.report import metrics as metrics_room


def bleu(references, hypotheses, n):
    """Papineni et al. 2002, by loops: clipped counts over the corpus, closest reference length."""
    precisions, length, reference_length = [], 0, 0
    for order in range(1, n + 1):
        hits = total = 0
        for texts, words in zip(references, hypotheses):
            grams = Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
            limits = Counter()
            for text in texts:
                limits |= Counter(tuple(text[i : i + order]) for i in range(len(text) - order + 1))
            hits += sum((grams & limits).values())
            total += sum(grams.values())
        precisions.append(hits / total)
    for texts, words in zip(references, hypotheses):
        length += len(words)
        reference_length += min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
    brevity = 1 if length > reference_length else math.exp(1 - reference_length / length)
    return 100 * brevity * math.exp(sum(map(math.log, precisions)) / n)


def test_bleu_equals_the_papers_formula():
    scores = metrics.score_captions(REFERENCES, HYPOTHESES)
    for n in range(1, 5):
        assert scores[f"BLEU-{n}"] == pytest.approx(bleu(REFERENCES, HYPOTHESES, n))
    assert 0 < scores["BLEU-4"] < scores["BLEU-1"] < 100


def test_metrics_equal_their_published_implementations():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    scores = metrics.score_captions(REFERENCES, HYPOTHESES)
    gts, res = as_coco()
    assert [scores[f"BLEU-{n}"] for n in range(1, 5)] == pytest.approx(
        [100 * b for b in Bleu().compute_score(gts, res, verbose=0)[0]], rel=1e-4
    )
    assert scores["ROUGE-L"] == pytest.approx(100 * Rouge().compute_score(gts, res)[0])
    assert scores["CIDEr"] == pytest.approx(100 * Cider().compute_score(gts, res)[0])
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_meteor_is_the_same_in_every_language(monkeypatch):
    found = []
    for options in ("", "-Duser.language=de -Duser.country=DE", "-Duser.language=fr"):
        for name in ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS"):
            monkeypatch.setenv(name, options)
        found.append(metrics.score_captions(REFERENCES, HYPOTHESES, meteor=True)["METEOR"])
    assert 10 < found[0] < 80 and found == found[:1] * 3
    same = [texts[0] for texts in REFERENCES]
    perfect = metrics.score_captions(REFERENCES, same, meteor=True)["METEOR"]
    assert perfect == pytest.approx(100)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_java_with_too_little_memory_costs_meteor_alone(monkeypatch, capsys):
    for limit, why in (("2m", ""), ("16m", "OutOfMemoryError")):
        monkeypatch.setenv("_JAVA_OPTIONS", f"-Xmx{limit}")
        scores = metrics.score_captions(REFERENCES, HYPOTHESES, meteor=True)
        assert scores["METEOR"] is None and scores["CIDEr"] > 0
        assert why in (err := capsys.readouterr().err) and "-Xmx512m" in err


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_meteor_is_the_same_beside_another():
    with multiprocessing.get_context("spawn").Pool(2) as pool:  # as two eval.py, each with its Java
        first, second = pool.starmap(metrics._meteor, [as_coco()] * 2)
    assert first == second and 10 < first[0] < 80


def test_without_java_there_is_no_meteor(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert metrics.score_captions(REFERENCES, HYPOTHESES, meteor=True)["METEOR"] is None


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """``fake_java("exit 1")``: from now on java is this line of shell."""

    def install(line):
        (tmp_path / "java").write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


def test_java_that_fails_costs_meteor_alone(fake_java, capsys):
    fake_java("exit 1")
    utils.note.cache_clear()
    scores = metrics.score_captions(REFERENCES, HYPOTHESES, meteor=True)
    assert scores["METEOR"] is None and scores["CIDEr"] > 0
    err = capsys.readouterr().err
    assert "java -version" in err and "Traceback" not in err
    fake_java("echo Picked up options >&2; echo no memory >&2; exit 1")
    assert metrics.score_captions(REFERENCES, HYPOTHESES, meteor=True)["METEOR"] is None
    assert "failed in Java (no memory): " in capsys.readouterr().err


def test_a_signal_during_meteor_ends_it(fake_java):
    """Java's lock stayed held, and the object's destructor waited for it for ever."""
    fake_java("exec sleep 30")

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            metrics.score_captions([[["a", "dog"]]], [["a", "dog"]], meteor=True)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_java_reads_numbers_as_the_program_writes_them(fake_java, monkeypatch, tmp_path):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("_JAVA_OPTIONS", "-Xss2m -Duser.language=de")
    fake_java(f'echo "$LC_ALL $_JAVA_OPTIONS" > {tmp_path}/said; exit 1')
    assert metrics.score_captions(REFERENCES, HYPOTHESES, meteor=True)["METEOR"] is None
    language, said = "-Duser.language=en", (tmp_path / "said").read_text()
    assert said.startswith("C -Xss2m") and said.rindex(language) > said.rindex("language=de")
    assert os.environ["LC_ALL"] == "de_DE.UTF-8"  # this process keeps its own


@pytest.mark.parametrize(
    "hypotheses", [[[]] * 4, [["zebra"]] * 4, [["a"]] * 4, [["zebra"] * 9] * 4]
)
def test_poor_captions_score_low_and_quietly(hypotheses, recwarn):
    scores = metrics.score_captions(REFERENCES, hypotheses)
    assert all(0 <= score < 40 for score in scores.values())
    assert scores["BLEU-4"] == 0
    assert not [w for w in recwarn if "BLEU" in str(w.message)]


@pytest.mark.parametrize("references, hypotheses", [([], []), (REFERENCES, HYPOTHESES[:3])])
def test_nothing_to_score_is_refused(references, hypotheses, fails):
    with fails("expected as many"):
        metrics.score_captions(references, hypotheses)


def test_variety_is_counted_by_hand():
    references = [
        [["a", "red", "dog"], ["two", "dogs"]],
        [["a", "cat"]],
        [["a", "blue", "cat"]],
        [["it"]],
    ]
    captions = [
        caption.split()
        for caption in ("a red dog and three blue dogs", "a cat", "a cat", "a cat and a cat and a")
    ]
    assert metrics_room.score_variety(references, captions) == {
        "words per caption": 4.5,
        "words used": 8,
        "distinct captions": 75,
        "commonest caption": 50,
        "repeats itself": 25,
        "colours agreed": 50,
        "numbers agreed": 0,
    }
    silent = metrics_room.score_variety(references, [[]] * 4)
    assert (
        silent["words used"] == 0
        and silent["colours agreed"] is None
        and silent["repeats itself"] == 0
    )


def test_agreement_on_words_that_nobody_says_cannot_be_had():
    variety = metrics_room.score_variety(
        [[["a", "dog"]], [["a", "red", "cat"]]], [["two", "red"]] * 2
    )
    assert variety["numbers agreed"] is None and variety["colours agreed"] == 50


@pytest.mark.parametrize(
    "caption, repeats",
    [
        ("a dog and a dog", False),
        ("a dog dog", True),
        ("", False),
        ("a b c a b c", True),
        ("a b a b", False),
        ("a b a b a", True),
        ("妈 妈 抱 着 宝 宝", False),  # letters, not words
        ("妈 妈 dog dog", True),
        ("一 二 三 一 二 三", True),
    ],
)
def test_what_counts_as_repeating(caption, repeats):
    assert metrics_room.repeats_itself(caption.split()) is repeats


def random_captions(seed, count=200):
    """References and captions of few words, many of them too short for n-grams of four."""
    rng = random.Random(seed)
    say = lambda least: [rng.choice("abc") for _ in range(rng.randint(least, 9))]
    references = [[say(1) for _ in range(rng.randint(1, 5))] for _ in range(count)]
    return references, [say(0) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_bleu_of_counts_is_nltks_of_a_corpus_and_of_single_captions(seed):
    references, hypotheses = random_captions(seed)
    counts = metrics.bleu_counts(references, hypotheses)
    corpus = metrics.bleu(counts.sum(axis=0))
    scores = metrics.score_captions(references, hypotheses)
    assert corpus == pytest.approx([scores[f"BLEU-{n}"] for n in range(1, 5)])
    smooth = SmoothingFunction().method2
    expected = [
        100 * sentence_bleu(described, words, smoothing_function=smooth)
        for described, words in zip(references, hypotheses)
    ]
    assert metrics.bleu(counts, smooth=True)[:, 3] == pytest.approx(expected)


def test_each_pictures_own_scores_have_the_corpus_mean():
    scores = metrics.score_captions(REFERENCES, HYPOTHESES, each=True)
    own = scores.pop("each")
    assert list(own) == ["CIDEr", "ROUGE-L", "BLEU-4"]
    for metric in ("CIDEr", "ROUGE-L"):
        assert sum(own[metric]) / 4 == pytest.approx(scores[metric])
