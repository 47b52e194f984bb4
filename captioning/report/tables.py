"""The table of figures that eval.py prints."""

import difflib


def differing(words, others):
    """Places of the words that not all other captions have there, as a list."""
    places = set(range(len(words)))
    for other in others:
        blocks = difflib.SequenceMatcher(None, words, other, autojunk=False).get_matching_blocks()
        places &= {i for block in blocks for i in range(block.a, block.a + block.size)}
    return sorted(set(range(len(words))) - places)


GROUPS = {  # by the first figure of each
    "BLEU-1": "metrics, 0-100",
    "words per caption": "variety",
    "count": "scenes, %",
    "num_pixels": "gaze of content words",
    "ms per picture": "search",
}


PERCENT = ("distinct captions", "commonest caption", "repeats itself", "colours agreed",
           "numbers agreed")  # fmt: skip


LABELS = {name: f"{name}, %" for name in PERCENT} | {  # other names than the JSON file's
    "words used": "different words",
    "by chance": "pointing by chance",
    "num_pixels": "places of the grid",
    "function places": "of function words",
    "peak": "largest weight, mean",
    "fall": "fall by deletion, nats",
    "random fall": "by random deletion, nats",
    "deletion ratio": "against random deletion",
}


def make_table(columns):
    """Figures as text: a column for each search and one for people, a row for each figure.

    :param columns: dict of dicts: label to name to figure
    :return: (labels, groups): list; dict of lists: title to rows, which are a label and the cells
    """
    groups = {}
    for name in next(iter(columns.values())):
        if name in GROUPS:
            rows = groups.setdefault(GROUPS[name], [])
        values = (column.get(name) for column in columns.values())
        cells = ["-" if v is None else format(v, "," if type(v) is int else ".2f") for v in values]
        rows.append([LABELS.get(name, name), *cells])
    return list(map(str, columns)), groups


def print_table(heading, labels, groups):
    """Print what ``make_table`` gave."""
    for title, rows in {"": [[heading, *labels]], **groups}.items():
        print(end=f"{title}\n" if title else "")
        for name, *cells in rows:
            print(f"{name:>26}", *(c.rjust(max(8, len(x))) for c, x in zip(cells, labels)))
    print()
