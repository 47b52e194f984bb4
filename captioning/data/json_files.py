"""JSON files of captions: COCO's, Karpathy's, arrays, lines, and objects from names to captions."""

import collections
import json

from captioning.data.records import is_list_of
from captioning.data.rows import IMAGE_KEYS, SPLIT_NAMES, caption_keys, key_of, row_of
from captioning.run.messages import UserError, why


def json_rows(text, path, notes):
    """Rows of a JSON file, see :func:`captioning.data.formats.read_rows`."""
    entries, fields_of, kind = _layout(text, path)
    keys = {}
    for number, entry in entries:
        where = f"{path}, {kind} {number}"
        try:
            fields = fields_of(entry)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            what = "not valid JSON" if kind == "line" else "malformed, a key is missing or wrong"
            raise UserError(f"{where}: {what} ({why(error)})") from error
        fields = fields.items() if isinstance(fields, dict) else ()
        fields = [(key_of(key), value) for key, value in fields]
        keys |= dict.fromkeys(caption_keys(key for key, text in fields if text))
        yield row_of(fields, where)
    if len(keys) > 1:
        notes.append(f"{path} has captions under the keys {', '.join(keys)}")


def _layout(text, path):
    """Pairs of a number and an entry; function of an entry that gives a dict; what it is called."""
    whole = lambda entry: entry
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not any(_is_json(line) for _, line in lines[:3]):  # else they are JSON lines
            where = f"{path}, line {getattr(error, 'lineno', 1)}"
            raise UserError(f"{where}: not valid JSON ({why(error)})") from error
        return lines, json.loads, "line"
    if isinstance(content, list):
        return enumerate(content, 1), whole, "entry"
    if isinstance(content.get("images"), list):
        fields_of = _coco_fields(content, path) if "annotations" in content else _karpathy_fields
        return enumerate(content["images"], 1), fields_of, "image"
    if content and all(key in SPLIT_NAMES and is_list_of(content[key], dict) for key in content):
        entries = [{**entry, "split": split} for split in content for entry in content[split]]
        return enumerate(entries, 1), whole, "entry"
    if any(key_of(key) in IMAGE_KEYS for key in content):
        return [(1, content)], whole, "line"
    names_pictures = lambda rows: any(key_of(key) in IMAGE_KEYS for row in rows[:1] for key in row)
    lists = [rows for rows in content.values() if is_list_of(rows, dict) and names_pictures(rows)]
    if len(lists) == 1:  # below a key such as "data", with others beside that say less
        return enumerate(lists[0], 1), whole, "entry"
    return enumerate(content.items(), 1), _named_fields, "entry"


def _is_json(line):
    try:
        return bool(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _named_fields(item):
    """Of an object whose keys are names of pictures; its values captions, or what a row has."""
    name, value = item
    fields = value if isinstance(value, dict) else {"captions": value}
    is_named = any(key_of(key) in IMAGE_KEYS and key != "image_id" for key in fields)
    return fields if is_named else {"image": name, **fields}


def _karpathy_fields(image):
    """Of ``dataset_flickr8k.json``, ``dataset_flickr30k.json``, ``dataset_coco.json``."""
    folder, name = image.get("filepath"), image["filename"]
    texts = [s["raw"] if "raw" in s else " ".join(s["tokens"]) for s in image["sentences"]]
    return {
        "image": f"{folder}/{name}" if folder else name,
        "captions": [[text] for text in texts],
        "split": image["split"],
        "image_id": image.get("cocoid", image.get("imgid")),
    }


def _coco_fields(content, path):
    """Of ``captions_train2014.json`` and the like: function of an image."""
    captions = collections.defaultdict(list)
    try:
        for annotation in content["annotations"]:
            captions[str(annotation["image_id"])].append([annotation["caption"]])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: annotations without image_id and caption") from error
    return lambda image: {
        "image": image["file_name"],
        "captions": captions[str(image["id"])],
        "split": image.get("split"),
        "image_id": image["id"],
    }
