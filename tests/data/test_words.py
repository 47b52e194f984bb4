"""Tests of ``captioning/data/words.py``."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import datasets
from captioning.data.words import join_words
from datasets import END, PAD, START, UNK

REAL_FLICKR8K = Path(__file__).parents[3] / "shared" / "flickr8k"


JOINTS = "aiİ\u0307\u0301\u0327\u094d\u093c\u200c\u200d\xad\u200bگकត\u17d2 "


@given(st.text(max_size=60) | st.text(JOINTS, max_size=9))
@example("Straße_und CAFÉ's ①②\u0301 नमस्ते 漢字 İ ǅ")
def test_tokens_are_words_and_splitting_again_changes_nothing(text):
    tokens = datasets.tokenize(text)
    assert datasets.tokenize(" ".join(tokens)) == tokens
    assert not any(mark in token for token in tokens for mark in " .,_-'<>\n")


@given(st.lists(st.sampled_from(["a", "dog", "runs", "on", "the", "grass", "zebra"]), max_size=12))
def test_decoding_undoes_encoding_up_to_unknown_words(tokens):
    words = [PAD, "a", "dog", "runs", "on", "the", "grass", UNK, START, END]
    word_map = {word: i for i, word in enumerate(words)}
    ids = datasets.encode_caption(tokens, word_map, 12)
    assert len(ids) == 14 and ids.count(word_map[END]) == 1
    assert datasets.decode_caption(ids, words) == [
        token if token in word_map else UNK for token in tokens
    ]


@given(st.lists(st.lists(st.text("abc", min_size=1, max_size=2))), st.integers(1, 4))
def test_word_map_holds_frequent_words_in_the_tutorials_order(token_lists, min_word_freq):
    word_map = datasets.build_word_map(token_lists, min_word_freq)
    counts = Counter(word for tokens in token_lists for word in tokens)
    words = list(word_map)
    assert [word_map[word] for word in words] == list(range(len(words)))
    assert (words[0], words[-3:]) == (PAD, [UNK, START, END])
    assert set(words[1:-3]) == {word for word, count in counts.items() if count >= min_word_freq}
    assert words[1:-3] == sorted(words[1:-3], key=lambda word: (-counts[word], word))


@pytest.mark.parametrize(
    "value",
    [
        [],
        5,
        {},
        {"a": 0},
        {PAD: 0, UNK: 1, START: 2},
        {PAD: 1, UNK: 0, START: 2, END: 3},
        {PAD: 0, UNK: 1, START: 1, END: 2},
        {PAD: 0, UNK: 1, START: 2, END: 4},
        {PAD: 0, UNK: 1, START: 2, END: "3"},
        {PAD: False, UNK: True, START: 2, END: 3},
    ],
)
def test_what_is_no_word_map_is_refused(value, write_bad_json, fails):
    with fails("is no word map"):
        datasets.load_word_map(write_bad_json(value))


def test_word_map_digest_sees_content_and_not_order(word_map):
    digest = datasets.word_map_digest(word_map)
    assert digest == datasets.word_map_digest(dict(reversed(word_map.items())))
    assert digest != datasets.word_map_digest({**word_map, "dog": 1, "a": 2})


@pytest.mark.skipif(not REAL_FLICKR8K.is_dir(), reason="needs Flickr8k's captions")
def test_vocabulary_of_flickr8k():
    records, notes = datasets.flickr8k_records(REAL_FLICKR8K)
    assert [sum(r.split == split for r in records) for split in datasets.SPLITS] == [
        6000,
        1000,
        1000,
    ] and not notes
    captions = [text for r in records if r.split == "train" for text in r.captions]
    counts = Counter(word for text in captions for word in datasets.tokenize(text))
    assert (len(counts), sum(count >= 5 for count in counts.values())) == (7370, 2535)


def test_words_with_spaces_among_embeddings_are_passed_over(tmp_path, fails):
    path = tmp_path / "glove.txt"
    path.write_text("dog 1 2 3\n. . . 4 5 6\nat name@domain.com 7 8 9\ncat 0 1 2\n")
    vectors, found = datasets.load_embeddings(path, {"<pad>": 0, "cat": 1, "dog": 2, "at": 3}, 3)
    assert found.tolist() == [False, True, True, False] and vectors[2].tolist() == [1, 2, 3]
    with fails("line 1: 3 values, expected --embed_dim 4"):
        datasets.load_embeddings(path, {"cat": 0}, 4)
    with fails("line 4: no word of the data with --embed_dim 2 numbers"):
        datasets.load_embeddings(path, {"cat": 0}, 2)
    path.write_text("dog 1 2 3\ncat 1 2\n")
    with fails("line 2: 2 values, expected --embed_dim 3"):
        datasets.load_embeddings(path, {"cat": 0}, 3)


def test_embeddings_with_capitals_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("Hund 1 1\nGras 2 2\ngras 3 3\nGRAS 4 4\n", encoding="utf-8-sig")
    vectors, found = datasets.load_embeddings(path, {"<pad>": 0, "hund": 1, "gras": 2}, 2)
    assert found.tolist() == [False, True, True] and vectors[1:, 0].tolist() == [1, 3]


@pytest.mark.parametrize(
    "words, text",
    [
        (["一", "只", "狗"], "一只狗"),
        (["a", "dog"], "a dog"),
        (["iphone", "手", "机", "2", "杯"], "iphone 手机 2 杯"),
        ([], ""),
    ],
)
def test_words_are_joined_as_people_write_them(words, text):
    assert join_words(words) == text and datasets.tokenize(text) == words


@pytest.mark.parametrize(
    "text, words",
    [
        ("一只狗在草地上奔跑。", list("一只狗在草地上奔跑")),
        ("犬が走る、ラーメン2杯", [*"犬が走るラ", "ー", *"メン", "2", "杯"]),
        ("หมาวิ่ง", ["ห", "ม", "า", "วิ่", "ง"]),
        ("ឆ្កែ ໝາ", ["ឆ្", "កែ", "ໝ", "າ"]),
        ("개가 달린다 iPhone手机", ["개가", "달린다", "iphone", "手", "机"]),
    ],
)
def test_scripts_without_spaces_are_split_by_letter(text, words):
    assert datasets.tokenize(text) == words


@pytest.mark.parametrize(
    "text, words",
    [
        ("Foot\xadball, cat\u2060s \u200eof\u200f \ufeffTürkiye", "football cats of türkiye"),
        ("foot\u200dball foot\u200cball foot\u200bball", "football football football"),
        ("ශ්\u200dරී ලංකා", "ශ්\u200dරී ලංකා"),  # Sinhala spells it with a joiner
        ("क्\u200dष", "क्\u200dष"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("İKİ iki i\u0307ki I\u0307ki", "iki iki iki iki"),
    ],
)
def test_invisible_characters_part_no_words(text, words):
    assert datasets.tokenize(text) == words.split()
