"""Captions of pictures as lists for what comes next: JSON, a table, lines of text."""

import os
import re

from captioning.run.files import output_path, write_csv, write_json, write_text
from captioning.run.messages import UserError

BEGINS = {  # as no list that people write begins; but a text is one of Flickr's
    "json": rb'\[\s*(\]|\{\s*("image_id": \d+,\s*)?"image": ".*",\s*"captions": \[)',
    "csv": rb"(\xef\xbb\xbf)?(image_id,)?image,number,caption,",
    "txt": rb"[^\t\r\n]+#\d+\t",
}


def list_paths(force=False, **paths):
    """Check the files that flags name before the work starts, as ``output_path`` does.

    :param paths: path or None of each of "json", "csv" and "txt"
    :return: dict of those that are given
    """
    given = {kind: path for kind, path in paths.items() if path}
    given = {kind: output_path(p, force, kind, BEGINS[kind]) for kind, p in given.items()}
    if list(map(str, given.values())).count("-") > 1:
        raise UserError(f"--{' - --'.join(given)} -: expected one list on standard output")
    files = [os.path.realpath(path) for path in given.values()]
    if len(set(files)) < len(files):
        raise UserError(f"--{' and --'.join(given)} name one file: give each list its own")
    return given


def result(path, captions):
    """What is kept of a picture, as a dict.

    It has an ``image_id`` if the file is called as COCO's are: by twelve digits.

    :param captions: list of dicts, best first
    """
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", path.stem)
    # Linux allows names that are no text
    found = {"image": str(path).encode("utf-8", "replace").decode(), "captions": captions}
    return {"image_id": int(number[1])} | found if number else found


def write_list(kind, path, results):
    """Write results of :func:`result` as JSON, as a table, or as text.

    The table has a row for each caption. The text has lines as Flickr's token files do, which
    ``create_input_files.py`` reads: name of the picture, #, number of the caption, tab, caption.
    """
    if kind == "json":
        return write_json(path, results)
    rows = []
    for found in results:
        picture = {key: value for key, value in found.items() if key != "captions"}
        numbered = enumerate(found["captions"], 1)
        rows += [picture | {"number": number, **caption} for number, caption in numbered]
    if kind == "csv":
        return write_csv(path, rows)
    lines = (f"{row['image']}#{row['number'] - 1}\t{row['caption']}\n" for row in rows)
    return write_text(path, "".join(lines))
