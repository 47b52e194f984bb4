"""Words: captions into tokens, tokens into numbers, and back."""

import collections
import hashlib
import itertools
import json
import unicodedata

import numpy as np
import regex

from captioning.run.files import read_json
from captioning.run.messages import UserError, why

PAD, UNK, START, END = "<pad>", "<unk>", "<start>", "<end>"
PAD_ID = 0

# Chinese, Japanese, Thai, Lao, Khmer and Burmese put no spaces between words: each letter is a word
_SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}&&\p{L}]"
_LETTER = regex.compile(rf"{_SPACELESS}\p{{M}}*", regex.V1)
_LETTERS = rf"[[\p{{L}}\p{{M}}\p{{N}}]--{_SPACELESS}]+"
WORD = regex.compile(rf"{_SPACELESS}\p{{M}}*|{_LETTERS}(?:[\u200c\u200d]{_LETTERS})*", regex.V1)

# Invisible format characters (Cf), such as the soft hyphen, part no words: they are removed.
# The two joiners stay where they are spelling: after a virama (Hindi, Sinhala) or an Arabic letter
_NOT_SPELLED = r"(?<![\p{Canonical_Combining_Class=Virama}\p{Arabic}]\p{M}*)"
_FORMAT = regex.compile(rf"[\p{{Cf}}--[\u200c\u200d]]|{_NOT_SPELLED}[\u200c\u200d]", regex.V1)

# Python makes of a Turkish capital I with a dot a small i with a second one
_DOTS = regex.compile("i\u0307+")


def tokenize(text):
    """Split a caption, in any alphabet, into words.

    :return: list of lower-case words: runs of letters, marks and digits (Unicode NFC), or single
        letters in scripts without spaces; punctuation and underscores are dropped
    """
    text = _FORMAT.sub("", unicodedata.normalize("NFC", text.lower()))
    text = _DOTS.sub("i", text)
    return WORD.findall(unicodedata.normalize("NFC", text))


def join_words(words):
    """Words as a text: no space parts letters of scripts that are written without spaces."""
    pairs = itertools.pairwise(["", *words])
    letters_meet = lambda *pair: all(map(is_letter, pair))
    return "".join(w if letters_meet(before, w) else f" {w}" for before, w in pairs).strip()


def build_word_map(token_lists, min_word_freq, known=None):
    """Number the words that occur at least ``min_word_freq`` times.

    :param token_lists: iterable of lists of words, of the training split alone
    :param known: word map of a model, whose words keep their numbers; or None
    :return: dict word -> id: ``<pad>`` 0, then the words, most frequent first (ties in
        alphabetical order), then ``<unk>``, ``<start>``, ``<end>``; behind the words of a model
        only those that it does not know
    """
    counts = collections.Counter(itertools.chain.from_iterable(token_lists))
    words = [word for word, count in counts.items() if count >= min_word_freq]
    words.sort(key=lambda word: (-counts[word], word))
    if known:
        words = [*sorted(known, key=known.get), *(word for word in words if word not in known)]
        return {word: i for i, word in enumerate(words)}
    return {word: i for i, word in enumerate([PAD, *words, UNK, START, END])}


def encode_caption(tokens, word_map, max_len):
    """Turn words into ids.

    :param tokens: list of at most ``max_len`` words
    :return: list of ``max_len + 2`` ids: ``<start>``, the words (``<unk>`` for those not in the
        map), ``<end>``, and ``<pad>`` to the full length
    """
    words = [word_map.get(token, word_map[UNK]) for token in tokens]
    padding = [word_map[PAD]] * (max_len - len(tokens))
    return [word_map[START], *words, word_map[END], *padding]


def decode_caption(ids, words):
    """Turn ids back into words.

    :param words: list of words by id
    :return: list of words up to the first ``<end>``, without ``<start>`` and ``<pad>``
    """
    tokens = itertools.takewhile(lambda token: token != END, (words[i] for i in ids))
    return [token for token in tokens if token not in (START, PAD)]


def clean_caption(text):
    """Put a caption on one line: control characters, broken Unicode, white space become spaces."""
    return regex.sub(r"[\p{Cc}\p{Cs}\s]+", " ", text).strip()


def load_word_map(path):
    """Read a word map, dict word -> id; raises UserError if the file is none."""
    word_map = read_json(path)
    if not is_word_map(word_map):
        raise UserError(
            f"{path} is no word map: expected a JSON object that numbers words from {PAD}'s 0 on, "
            f"each number once, with {UNK}, {START} and {END}; create_input_files.py makes it"
        )
    return word_map


def is_word_map(value):
    """Whether a value numbers words from <pad>'s 0 on, each once, with all special tokens."""
    if not isinstance(value, dict) or not all(isinstance(word, str) for word in value):
        return False
    ids = list(value.values())
    has_ids = all(type(i) is int for i in ids) and sorted(ids) == list(range(len(ids)))
    return has_ids and {UNK, START, END} <= value.keys() and value.get(PAD) == PAD_ID


def is_letter(word):
    """Whether a word is a single letter, of a script without spaces between words."""
    return bool(_LETTER.fullmatch(word))


def letters(word_map):
    """Ids of the words that are letters, see :func:`is_letter`."""
    return [number for word, number in word_map.items() if is_letter(word)]


def special_tokens(word_map):
    """Ids of the tokens that no caption may hold."""
    return [word_map[PAD], word_map[START], word_map[UNK]]


def word_map_digest(word_map):
    """Short SHA-256, in hex, of a word map's content, whatever the order of its entries."""
    return hashlib.sha256(json.dumps(word_map, sort_keys=True).encode()).hexdigest()[:16]


def load_embeddings(path, word_map, embed_dim):
    """Word vectors in GloVe's or word2vec's text format for the words of a word map.

    :param path: lines of a word and ``embed_dim`` numbers, separated by spaces
    :return: (vectors, found): float32 (vocab_size, embed_dim), zero where the file lacks the word;
        bool (vocab_size,)
    :raises UserError: if the file is missing, a line is malformed (it is named), or no word is the
        data's
    """
    vectors, found = np.zeros((len(word_map), embed_dim), np.float32), np.zeros(len(word_map), bool)
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                # a few of GloVe's words have spaces in them
                word, *values = line.rstrip().rsplit(" ", embed_dim)
                if number == 1 and len(values) == 1:
                    continue  # word2vec's files begin with two counts
                if len(values) != embed_dim:
                    raise ValueError(f"{len(values)} values, expected --embed_dim {embed_dim}")
                # captions are in lower case: Hund serves if hund itself is not there
                row = word_map.get(word, word_map.get(word.lower()))
                if row is not None and not (found[row] and word not in word_map):
                    vectors[row] = np.array(values, np.float32)  # (embed_dim,)
                    found[row] = True
                    if not np.isfinite(vectors[row]).all():
                        raise ValueError("a number is not finite")
        if number and not found.any():
            raise ValueError(f"no word of the data with --embed_dim {embed_dim} numbers")
    except (OSError, ValueError) as error:
        raise UserError(f"the embeddings {path}, line {number}: {why(error)}") from error
    return vectors, found
