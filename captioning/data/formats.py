"""Formats of caption files: CSV, JSON, COCO's, Karpathy's, Flickr8k's."""

import collections
import csv
import io
import json

import regex

from captioning.data.finding import suffix
from captioning.data.pictures import read_bytes
from captioning.data.records import Record, is_list_of
from captioning.run.messages import UserError, why


def read_text(path):
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    except Exception as error:  # zipfile raises several types on damaged archives
        raise UserError(f"cannot read {path}: {why(error)}") from error


SPLIT_NAMES = {"train": "train", "restval": "train", "test": "test"}


SPLIT_NAMES |= dict.fromkeys(("val", "validation", "valid", "dev"), "val")


IMAGE_KEYS = ("image", "file_name", "image_name", "filename")


CAPTION_KEYS = ("caption", "captions", "text", "comment")


def read_rows(path, notes):
    """Yield the rows of a file of captions; its content tells its format, see ``READERS``.

    A row is a :class:`Record` without its picture, after the file and line where it stands.

    :param path: the file; or a Hugging Face image folder, with ``metadata.csv`` or
        ``metadata.jsonl`` beside the pictures, and with folders for the splits, if any
    :param notes: list to which notes for the user are added
    :raises UserError: if the file is malformed (the line is named)
    """
    if not path.is_dir():
        text = read_text(path)
        read = next(read for form, read in READERS if regex.match(form, text.lstrip()[:1000]))
        yield from read(text, path, notes)
        return
    files = sorted(p for p in path.rglob("metadata.*") if p.suffix in (".csv", ".jsonl"))
    if not files:
        raise UserError(f"{path.absolute()} holds no metadata.csv or .jsonl; give --captions FILE")
    for file in files:
        for where, row in read_rows(file, notes):
            name = file.relative_to(path).parent / row.name
            splits = [row.split, *(SPLIT_NAMES.get(part.lower()) for part in name.parts[:-1])]
            split = next(filter(None, splits), None)
            yield where, row._replace(name=name.as_posix(), split=split)


def _row(fields, where):
    """A row of the fields that CSV and JSON name."""
    fields = fields if isinstance(fields, dict) else {}
    name = next((fields[key] for key in IMAGE_KEYS if key in fields), None)
    captions = next((fields[key] for key in CAPTION_KEYS if key in fields), None)
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(name, str) or not name.strip() or not is_list_of(captions, str):
        forms = 'below the header image,caption[,split], or {"image": "a.jpg", "caption": "a dog"}'
        what = f"expected a picture's name and its caption, {forms}; found {str(fields)[:80]}"
        raise UserError(f"{where}: {what}")
    split, number = str(fields.get("split") or "").strip().lower(), str(fields.get("image_id", ""))
    if split and split not in SPLIT_NAMES:
        raise UserError(f"{where}: unknown split {split!r}; expected one of train, val, test")
    image_id = int(number) if number.isdecimal() and len(number) < 19 else None
    return where, Record(name.strip(), SPLIT_NAMES.get(split), captions, image_id=image_id)


def _json_rows(text, path, notes):
    """COCO's captions, Karpathy's files, a JSON array, or JSON lines."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None  # JSON lines, or damaged
    entries, convert, kind = text.split("\n"), json.loads, "line"
    if isinstance(content, list):
        entries, convert, kind = content, lambda entry: entry, "entry"
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        convert = _coco_fields(content, path) if "annotations" in content else _karpathy_fields
        entries, kind = content["images"], "image"
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, str) and not entry.strip():
            continue
        try:
            fields = convert(entry)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            what = "not valid JSON" if kind == "line" else "malformed, a key is missing or wrong"
            raise UserError(f"{path}, {kind} {number}: {what} ({why(error)})") from error
        yield _row(fields, f"{path}, {kind} {number}")


def _karpathy_fields(image):
    """Of ``dataset_flickr8k.json``, ``dataset_flickr30k.json``, ``dataset_coco.json``."""
    folder, name = image.get("filepath"), image["filename"]
    return {
        "image": f"{folder}/{name}" if folder else name,
        "captions": [s["raw"] if "raw" in s else " ".join(s["tokens"]) for s in image["sentences"]],
        "split": image["split"],
        "image_id": image.get("cocoid", image.get("imgid")),
    }


def _coco_fields(content, path):
    """Of ``captions_train2014.json`` and the like: function of an image."""
    captions = collections.defaultdict(list)
    try:
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: annotations without image_id and caption") from error
    return lambda image: {
        "image": image["file_name"],
        "captions": captions[image["id"]],
        "split": "train" if "train" in path.name else None,
        "image_id": image["id"],
    }


def _token_rows(text, path, notes):
    """Flickr8k's and Flickr30k's own format: ``name.jpg#0<TAB>caption``."""
    for number, line in enumerate(text.split("\n"), 1):
        found, where = _TOKEN.fullmatch(line.rstrip("\r")), f"{path}, line {number}"
        if found:
            yield where, Record(found[1], None, [found[2]])
        elif line.strip():
            raise UserError(f"{where}: expected name.jpg#0<TAB>caption, found {line[:80]!r}")


def _csv_rows(text, path, notes):
    """CSV with a header, as Kaggle's Flickr8k; with bars for commas, as Kaggle's Flickr30k."""
    bars = "|" in text.lstrip().split("\n")[0]
    form = {"delimiter": "|", "quoting": csv.QUOTE_NONE} if bars else {"strict": True}
    reader, unlike = csv.reader(io.StringIO(text, newline=""), **form), 0
    lines = filter(any, reader)
    try:
        header = [field.strip().lower() for field in next(lines, [])]
        # are the columns there?
        _row(dict.fromkeys(header, "train"), f"{path}, line {reader.line_num}")
        for fields in lines:
            where = f"{path}, line {reader.line_num}"
            if len(fields) != len(header):
                unlike += 1
                has_picture = header[0] in IMAGE_KEYS and suffix(fields[0].strip())
                if bars and has_picture and unlike == 1:
                    notes.append(f"{where}: a field is missing; left out: {'|'.join(fields)}")
                    continue
                if not has_picture or len(header) > 2 or len(fields) < 2:
                    what = f"{where}: {len(fields)} fields, expected {len(header)}"
                    raise UserError(f"{what}; put captions that hold a comma in double quotes")
                fields = [fields[0], ",".join(fields[1:])]
            yield _row(dict(zip(header, fields)), where)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error
    if unlike and not bars:
        what = f"{unlike:,} captions of {path} hold commas without quotes"
        notes.append(f"{what}: all that follows the picture's name was read as the caption")


_TOKEN = regex.compile(r"\s*(\S[^\t\n]*?)\s*#\s*\d+\s*\t(.*)")


READERS = ((r"[\[{]", _json_rows), (_TOKEN.pattern, _token_rows), ("", _csv_rows))  # by beginnings
