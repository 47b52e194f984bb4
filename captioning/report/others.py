"""Captions of other systems: COCO's results, and what else a file of captions may be."""

import json
from pathlib import Path

from captioning.data.finding import normal, parts_of
from captioning.data.formats import read_rows
from captioning.data.rows import IMAGE_KEYS, unescaped
from captioning.data.text_files import read_text
from captioning.data.words import tokenize
from captioning.run.messages import UserError, note, printable

FORMAT = 'expected COCO\'s format of results, a list of {"image_id": …, "caption": …}'


def read_captions(path, data):
    """Captions of another system, one for each picture of a split.

    A picture is known by its file's name, with or without folders, or by ``image_id``: the id of
    the data's source; where it gave none, the name of the file, with or without suffix, else the
    row number that eval.py writes.

    :param path: a JSON list of dicts with "caption" and one or both of these (the name's key is one
        of ``IMAGE_KEYS``), or what else ``read_rows`` reads, such as caption.py's lists
    :param data: ``CaptionDataset``
    :return: list (pictures) of lists of words, in the order of the data
    :raises UserError: if it is something else, or has no caption or several for a picture
    """
    entries, found, strange = _entries(path), {}, 0
    find = _finder(data)
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str):
            raise UserError(f"{path}: entry {number} is {str(entry)[:80]}; {FORMAT}")
        row = find(entry)
        if row is None:
            strange += 1
        else:
            found.setdefault(row, []).append(entry["caption"])
    where = f"the {data.split} split of {data.name}"
    if not found:
        raise UserError(
            f"{path}: none of its {len(entries):,} captions is of a picture of {where}, such as "
            f"image_id {_ids(data)[0]}, file_name {data.image_names[0]}"
        )
    twice = [row for row, captions in found.items() if len(captions) > 1]
    missing = [row for row in range(len(data)) if row not in found]
    for rows, fault in ((twice, "several captions"), (missing, "no caption")):
        if rows:
            names = ", ".join(printable(data.image_names[row]) for row in sorted(rows)[:3])
            names += ", …" if len(rows) > 3 else ""
            of = f"{len(rows):,} of {len(data):,} pictures of {where} have {fault}"
            raise UserError(f"{path}: {of} ({names}); expected one for each")
    if strange:
        note(f"{path}: {strange:,} captions of pictures that are not in {where} are left out")
    return [tokenize(unescaped(found[row][0])) for row in range(len(data))]


def _entries(path):
    """The captions of a file, as a list of dicts with "caption" and what names the picture."""
    path, rows, notes = Path(path), [], []
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError):  # it is no JSON, or JSON lines
        content = None
    of_several = lambda entry: isinstance(entry, dict) and "captions" in entry
    if isinstance(content, list) and not any(map(of_several, content)):
        for entry in filter(lambda entry: isinstance(entry, dict), content):
            names = (entry.get(key) for key in IMAGE_KEYS if key != "image_id")
            if name := next(filter(None, names), None):
                entry["file_name"] = name
        return content
    for _, row in read_rows(path, notes):
        is_id = row.image_id is not None and row.name == str(row.image_id)
        known = {"image_id": row.image_id, "file_name": None if is_id else row.name}
        rows += [known | {"caption": caption} for caption in row.captions]
    for text in notes:
        note(text)
    return rows


def _ids(data):
    """The source's ids of a split's pictures, or, where some have none, the numbers of the rows."""
    return range(len(data)) if None in data.image_ids else data.image_ids


def _finder(data):
    """Function of an entry: the row of the data that it is about, or None."""
    rows_of = {}
    for row, name in enumerate(data.image_names):
        for end in _ends(name):  # what two pictures share tells nothing
            rows_of[end] = None if rows_of.get(end, row) != row else row
    numbered = None in data.image_ids
    ids = {str(number): row for row, number in enumerate(_ids(data))}
    by_id = lambda key: ids.get(str(key).lstrip("0") or "0")  # COCO's names begin with zeros
    by_name = lambda key: next((rows_of[end] for end in _ends(str(key)) if end in rows_of), None)

    def find(entry):
        name, number = entry.get("file_name"), entry.get("image_id")
        if isinstance(name, str):
            row = by_name(name)
            if row is not None or numbered:
                return row
        searches = (by_name, by_id) if numbered else (by_id, by_name)
        searches = searches if numbered or isinstance(number, str) else searches[:1]
        rows = (search(number) for search in searches)
        return next((row for row in rows if row is not None), None)

    return find


def _ends(name):
    """The ends of a path, longest first, each as it is and then in one case and without suffix."""
    parts = parts_of(name)
    for i in range(len(parts)):
        yield parts[i:]
        yield tuple(normal(parts[i:]))
