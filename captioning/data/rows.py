"""Rows of captions: the names that people give to columns and keys, and what a row says."""

import ast
import contextlib
import html
import io
import itertools
from tokenize import TokenError, generate_tokens

import regex

from captioning.data.records import Record, is_list_of
from captioning.data.words import tokenize
from captioning.run.messages import UserError

SPLIT_NAMES = {"train": "train", "training": "train", "restval": "train"}
SPLIT_NAMES |= dict.fromkeys(("val", "validation", "valid", "dev"), "val")
SPLIT_NAMES |= dict.fromkeys(("test", "testing"), "test")

IMAGE_KEYS = (  # the first that a row has names its picture
    *("image", "file_name", "image_name", "filename", "image_file", "image_filename"),
    *("image_path", "file_path", "filepath", "path", "file", "img", "img_name", "img_path"),
    *("photo", "photo_name", "picture", "picture_name", "image_id"),
)

_CAPTION = regex.compile(r"(alt_text|caption|text|comment|sentence|description)s?(?![a-z])")

_NO_CAPTION = regex.compile(
    r".*_(author|category|class|count|date|file|ids?|idx|index|lang|language|len|lengths?|model|no"
    r"|num|number|quality|rating|score|source|time|type|url|user)"
)

_MARK = regex.compile(r"</?(s|start|end|pad|bos|eos|sos)>", regex.IGNORECASE)


def key_of(name):
    """A column's name or a key as it is compared: ``File Name`` is ``file_name``."""
    return regex.sub(r"[\s._-]+", "_", str(name).strip().lower())


def holds_captions(key):
    """Whether the column or key of this name, see ``key_of``, holds captions."""
    return bool(_CAPTION.match(key)) and not _NO_CAPTION.fullmatch(key)


def caption_keys(keys):
    """Those of a row's keys that hold captions, as a list; beside captions comments are remarks."""
    keys = [key for key in keys if holds_captions(key)]
    has_captions = any(key.startswith("caption") for key in keys)
    return [key for key in keys if not (has_captions and key.startswith("comment"))]


def row_of(fields, where):
    """What the fields of a line say.

    :param fields: list of (key, see ``key_of``; value); several may hold captions
    :param where: file and line
    :return: ``where``, :class:`Record` without its picture
    :raises UserError: if there is no picture's name or no caption, or the split is unknown
    """
    first = dict(reversed(fields))
    names = (first.get(key) for key in IMAGE_KEYS)
    names = (str(name).strip() for name in names if type(name) in (str, int))
    name = next(filter(None, names), None)
    keys = caption_keys(key for key, _ in fields)
    values = [value for key, value in fields if key in keys]
    # None and NaN are how programs write an empty cell
    values = ["" if value is None or value != value else value for value in values]
    captions = [texts_of(value) for value in values if isinstance(value, (str, list))]
    if name is None or not captions or None in captions:
        forms = 'below the header image,caption[,split], or {"image": "a.jpg", "caption": "a dog"}'
        found = ", ".join(f"{key}: {value!r}" for key, value in fields)[:80] or "nothing"
        what = f"expected a picture's name and its caption, {forms}; found {found}"
        raise UserError(f"{where}: {what}")
    captions = [unescaped(text) for texts in captions for text in texts]
    captions = [text for text in captions if text.strip()] or captions[:1]
    split, *others = (
        str(first.get(key) or "").strip().lower() for key in ("split", "set", "subset", "partition")
    )
    split = split or next((other for other in others if other in SPLIT_NAMES), "")
    number = str(first.get("image_id", ""))
    if split and split not in SPLIT_NAMES:
        raise UserError(f"{where}: unknown split {split!r}; expected one of train, val, test")
    image_id = int(number) if number.isdecimal() and len(number) < 19 else None
    return where, Record(name, SPLIT_NAMES.get(split), captions, image_id=image_id)


def texts_of(value):
    """The captions that a value holds, as a list of str; None if it holds anything else.

    A text is one caption; and so is a list of single words. In a table a list is text, too.
    """
    if isinstance(value, str) and value.strip().startswith("["):
        faults = (ValueError, SyntaxError, TokenError, MemoryError, RecursionError)
        with contextlib.suppress(*faults):
            value = ast.literal_eval(_with_commas(value.strip()))
    if isinstance(value, str):
        return [value]
    if is_list_of(value, dict):  # as caption.py writes them, with figures beside
        value = [item.get("caption") for item in value]
    if is_list_of(value, str):
        are_words = len(value) > 1 and all(len(tokenize(item)) <= 1 for item in value)
        return [" ".join(value)] if are_words else value
    lists = isinstance(value, list) and all(is_list_of(item, str) for item in value)
    return [" ".join(words) for words in value] if lists else None


def _with_commas(text):
    """A list as NumPy writes it, ``['a' 'b']``, with commas: without, Python joins the texts."""
    tokens = [token.string for token in generate_tokens(io.StringIO(text).readline)]
    tokens = [token for token in tokens if token.strip()]
    are_texts = lambda pair: all(token[0] in "'\"" for token in pair)
    pairs = itertools.pairwise([*tokens, "]"])
    return " ".join(f"{pair[0]}," if are_texts(pair) else pair[0] for pair in pairs)


def unescaped(text):
    """A caption without what programs add: the escapes of web pages, such as ``&amp;``, however
    often they were made, and the marks of its start and end, such as ``<start>``."""
    while (plain := regex.sub(r"&#?\w+;", lambda found: html.unescape(found[0]), text)) != text:
        text = plain
    return _MARK.sub(" ", text)


def split_of(name):
    """The split that the words of a file's name tell, such as ``captions_val2014.json``; or None"""
    words = regex.findall(r"[a-z]+", name.lower())
    splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return splits.pop() if len(splits) == 1 else None
