"""The tables of figures that eval.py prints."""

import difflib

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
    "looks": "looks, %",
    "function looks": "of function words, %",
    "peak": "largest weight, mean",
    "fall": "fall by deletion, nats",
    "random fall": "by random deletion, nats",
    "deletion ratio": "against random deletion",
}


def make_table(heading, columns):
    """Figures as text: a column for each search and one for people, a row for each figure.

    :param heading: of the columns' labels
    :param columns: dict of dicts: label to name to figure
    :return: list of tables, as dicts: "title"; "columns", heading and labels; "rows", which are a
        label and the cells
    """
    groups, longest = {}, sorted(columns.values(), key=len, reverse=True)
    for name in dict.fromkeys(name for column in longest for name in column):  # some lack figures
        if any(isinstance(column.get(name), dict) for column in longest):
            continue  # of words, and printed by itself
        if name in GROUPS:
            rows = groups.setdefault(GROUPS[name], [])
        values = (column.get(name) for column in columns.values())
        cells = ["-" if v is None else format(v, "," if type(v) is int else "z.2f") for v in values]
        rows.append([LABELS.get(name, name), *cells])
    heads = [heading, *map(str, columns)]
    return [{"title": title, "columns": heads, "rows": rows} for title, rows in groups.items()]


def difference_table(heading, first, differences):
    """What ``bootstrap.differences`` gave, as a list of one table like those of ``make_table``.

    :param first: what the differences are from
    """
    shown = "{:+.2f} ({:+.2f} to {:+.2f})".format
    rows = [
        [metric, *(shown(*of[metric]) for of in differences.values())]
        for metric in next(iter(differences.values()))
    ]
    title = f"difference from {first}, with its 95 % interval"
    return [{"title": title, "columns": [heading, *map(str, differences)], "rows": rows}]


def print_table(tables):
    """Print tables that have the same columns."""
    heads = tables[0]["columns"]
    lines = [heads, *(row for table in tables for row in table["rows"])]
    widths = [max(8, *(len(line[i]) for line in lines)) for i in range(1, len(heads))]
    for title, rows in [("", [heads]), *((table["title"], table["rows"]) for table in tables)]:
        print(end=f"{title}\n" if title else "")
        for name, *cells in rows:
            print(f"{name:>26}", *(cell.rjust(width) for cell, width in zip(cells, widths)))
    print()


def differing(words, others):
    """Places of the words that not all other captions have there, as a list."""
    places = set(range(len(words)))
    for other in others:
        blocks = difflib.SequenceMatcher(None, words, other, autojunk=False).get_matching_blocks()
        places &= {i for block in blocks for i in range(block.a, block.a + block.size)}
    return sorted(set(range(len(words))) - places)
