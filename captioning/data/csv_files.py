"""Tables of captions: CSV with any delimiter, below a header that names the columns."""

import csv
import io

import regex

from captioning.data.finding import suffix
from captioning.data.rows import (
    IMAGE_KEYS,
    SPLIT_NAMES,
    caption_keys,
    holds_captions,
    key_of,
    row_of,
)
from captioning.run.messages import UserError, counted

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def csv_rows(text, path, notes):
    """Rows of a table, see :func:`captioning.data.formats.read_rows`.

    Several columns may hold captions, see :func:`captioning.data.rows.caption_keys`. Of two columns
    the second may hold the delimiter without quotes.
    """
    text = regex.sub(r"^sep=.(?=[\r\n])", "", text)  # which Excel writes above a table
    delimiter, unlike = _delimiter(text, path), 0
    (_, header), *rows = _table(text, path, delimiter)
    header = [key_of(field) for field in header]
    columns = caption_keys(header)
    if len(columns) > 1:
        notes.append(f"{path} has captions in the columns {', '.join(columns)}")
    for line, fields in rows:
        where, given, lacking = f"{path}, line {line}", header[: len(fields)], header[len(fields) :]
        # rows of fewer captions than others may be shorter
        is_short = any(map(holds_captions, given)) and all(map(holds_captions, lacking))
        if len(fields) > len(header) or (lacking and not is_short):
            unlike += 1
            has_picture = header[0] in IMAGE_KEYS and suffix(fields[0].strip())
            if delimiter == "|" and has_picture and unlike == 1:
                notes.append(f"{where}: a field is missing; left out: {'|'.join(fields)}")
                continue
            if not has_picture or len(header) > 2 or len(fields) < 2:
                what = f"{where}: {len(fields)} fields, expected {len(header)}"
                advice = f"put captions that hold {DELIMITERS[delimiter]} in double quotes"
                raise UserError(f"{what}; {advice}")
            fields = [fields[0], delimiter.join(fields[1:])]
        yield row_of(list(zip(header, fields)), where)
    if unlike and delimiter != "|":
        what = f"{counted(unlike, 'caption')} of {path} with {DELIMITERS[delimiter]} but no quotes"
        notes.append(f"{what}: all that follows the picture's name was read as the caption")


def _table(text, path, delimiter):
    """List of (number of a line, its fields), without empty lines."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        table = [(reader.line_num, fields) for fields in reader if any(map(str.strip, fields))]
        texts = (text for _, fields in table for text in fields)
        # a field that holds whole rows began with a quote that is the caption's own
        if delimiter in ",;" or not any(delimiter in text and "\n" in text for text in texts):
            return table
    except csv.Error as error:
        if delimiter in ",;":
            where = f"{path}, line {reader.line_num}"
            raise UserError(f"{where}: not valid CSV: {error}") from error
    # tables with tabs or bars need no quotes, so that a caption may begin with one
    lines = enumerate(regex.split(r"\r\n|\r|\n", text), 1)
    table = [(number, list(map(_bare, line.split(delimiter)))) for number, line in lines]
    return [(number, fields) for number, fields in table if any(map(str.strip, fields))]


def _delimiter(text, path):
    """What stands between the columns; raises UserError if no header names those that we need."""
    line = regex.split(r"[\r\n]", text.lstrip()[:10_000], maxsplit=1)[0]
    headers = {sign: next(csv.reader([line], delimiter=sign), []) for sign in DELIMITERS}
    for delimiter, header in headers.items():
        keys = {key_of(name) for name in header}
        if keys & set(IMAGE_KEYS) and any(map(holds_captions, keys)):
            return delimiter
    for delimiter, fields in headers.items():
        if len(fields) > 1 and any(suffix(field.strip()) for field in fields):
            header = delimiter.join(map(_column_of, fields)).replace("\t", "<TAB>")
            raise UserError(f"{path} has no header; write {header} above its first line")
    what = "expected a header that names the columns of pictures and captions"
    raise UserError(f"{path}: {what}, such as image,caption or image,caption,split; found {line!r}")


def _column_of(field):
    """What the column may be called that has this in its first line."""
    field = field.strip()
    kinds = {"image": suffix(field), "split": field.lower() in SPLIT_NAMES}
    kinds["number"] = field.isdecimal()
    return next((kind for kind, is_it in kinds.items() if is_it), "caption")


_bare = lambda field: field[1:-1] if len(field) > 1 and field[0] == field[-1] == '"' else field
