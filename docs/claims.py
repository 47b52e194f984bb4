"""Sentences of the pages, held against runs.json by docs/report.py and tests/test_report.py.

A comment behind a paragraph or a list says which runs its figures and comparisons come from:

    <!-- holds
    CIDEr: resnet50 - vgg19 = 6.7
    BLEU-4, val, beam 1: lstm8-linear, gru8-linear < lstm8
    -->

A line is a claim: a column of runs.json, where to look (test and beam 5 unless said), and runs.

* ``NAME`` stands for all seeds of a run, ``NAME-seed0`` for one, ``people`` for the descriptions
  by people. Arithmetic (``+ - * /``, with spaces, from left to right) pairs equal seeds.
* ``= 6.7`` is the mean, ``= 55.8 ± 0.7`` the mean and half of the range, ``= 1.4 and 1.3`` each
  seed in turn, ``= 3.5 to 5.2`` the lowest and the highest of all seeds and terms. The figures must
  stand in the text since the comment or heading before, where a sign need not stand.
* ``NAME@20`` is that run at another beam than the claim's (or another epoch, where it names one).
* ``<`` and ``>`` hold for every seed and term; ``overlaps`` says that the seeds' ranges do.
* ``epoch 6`` looks into the training's log; ``parameters`` and ``updates`` belong to the run.

Figures that no run in runs.json has are from somewhere else, which the comment names, in a line
``from: python docs/knowledge.py`` or all by itself: ``<!-- from: python docs/knowledge.py -->``.
"""

import operator
import re

PEOPLE = "xe-seed0"  # the run whose "people" is shown, as in the table of faults
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
CLAIM = re.compile(r"(?P<where>[^:]+): (?P<terms>.+?) (?P<relation>=|<|>|overlaps) (?P<right>.+)")
NUMBER = r"\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?"


class WrongClaim(Exception):
    """A claim that the runs do not bear out, or that cannot be read; says why."""


def figure(run, column, split, beam, epoch):
    """One figure of a run, or None where the run has none."""
    if column in ("parameters", "updates"):
        return run.get(column)
    if epoch:
        logged = {str(line["epoch"]): line for line in run.get("epochs", ())}
        return logged.get(epoch, {}).get(column)
    return run.get(split, {}).get("beams", {}).get(beam, {}).get(column)


def where_to_look(text):
    """The column and the place that a claim names before its colon, as arguments of `figure`."""
    column, *places = text.split(", ")
    where = {"split": "test", "beam": "5", "epoch": None}
    for place in places:
        key, _, value = place.partition(" ")
        if place in ("val", "test"):
            where["split"] = place
        elif key in ("beam", "epoch") and value:
            where[key] = value
        else:
            raise WrongClaim(f"{place!r}: expected val, test, beam N or epoch N")
    return {"column": column, **where}


def operand(runs, name, where):
    """Figures by seed, a dict; a number and a single run have one figure, at the seed None."""
    name, _, place = name.partition("@")
    if place:
        where = where | {"epoch" if where["epoch"] else "beam": place}
    if re.fullmatch(r"[\d.]+(e\d+)?", name):
        return {None: float(name)}
    if name == "people":
        found = {None: runs[PEOPLE][where["split"]]["people"].get(where["column"])}
    elif name in runs:
        found = {None: figure(runs[name], **where)}
    else:
        seeds = {key: re.fullmatch(re.escape(name) + r"-seed(\d+)", key) for key in runs}
        found = {int(seed[1]): figure(runs[key], **where) for key, seed in seeds.items() if seed}
    found = {seed: value for seed, value in found.items() if value is not None}
    if not found:
        raise WrongClaim(f"no run {name!r} has it")
    return found


def pairs(left, right):
    """The figures of equal seeds, as a dict of pairs; a single figure goes with every seed."""
    if None in left or None in right:
        seeds = (left.keys() | right.keys()) - {None} or {None}
    else:
        seeds = left.keys() & right.keys()
    if not seeds:
        raise WrongClaim("runs without a common seed")
    single = left.get(None), right.get(None)
    return {s: (left.get(s, single[0]), right.get(s, single[1])) for s in sorted(seeds, key=str)}


def evaluate(runs, term, where):
    """A term such as ``a - b``: figures by seed."""
    first, *rest = term.split(" ")
    if len(rest) % 2 or not set(rest[::2]) <= set(OPERATORS):
        raise WrongClaim(f"{term!r}: expected + - * or / between runs, with spaces")
    values = operand(runs, first, where)
    for sign, name in zip(rest[::2], rest[1::2]):
        both = pairs(values, operand(runs, name, where))
        values = {seed: OPERATORS[sign](*pair) for seed, pair in both.items()}
    return values


def expected(values, right):
    """What a claim's figures are of: as many numbers as it names."""
    every = [value for by_seed in values for value in by_seed.values()]
    means = [sum(by_seed.values()) / len(by_seed) for by_seed in values]
    if " to " in right:
        return [min(every), max(every)]
    if " and " in right:
        return every
    if "±" in right:
        return [means[0], (max(every) - min(every)) / 2]
    return means


def rounds_to(value, number):
    digits = len(number.partition(".")[2])
    return abs(value - float(number.replace(",", ""))) <= 0.5001 * 10**-digits


def equals(runs, terms, right, where, text):
    """Why figures are not those of the runs, or do not stand in the text; None if all is well."""
    shown = re.split(r" to | and | ± ", right)
    if not all(re.fullmatch(f"-?({NUMBER})", number) for number in shown):
        raise WrongClaim(f"{right!r}: expected N, N ± N, N and N, or N to N")
    found = expected([evaluate(runs, term, where) for term in terms], right)
    numbers = shown * len(found) if len(shown) == 1 else shown
    if len(found) != len(numbers) or not all(map(rounds_to, found, numbers)):
        return f"the runs give {', '.join(f'{value:.6g}' for value in found)}"
    missing = {number.lstrip("-") for number in shown} - set(re.findall(NUMBER, text))
    return f"the text before does not say {', '.join(sorted(missing))}" if missing else None


def compares(runs, terms, relation, right, where):
    """Why a comparison does not hold; None if it does."""
    limit = evaluate(runs, right, where)
    for term in terms:
        values = evaluate(runs, term, where)
        ours, theirs = list(values.values()), list(limit.values())
        if relation == "overlaps":
            holds = min(ours) <= max(theirs) and min(theirs) <= max(ours)
        else:
            compare = operator.lt if relation == "<" else operator.gt
            holds = all(compare(*pair) for pair in pairs(values, limit).values())
        if not holds:
            return f"the runs give {term}: {ours}, {right}: {theirs}"
    return None


def why_wrong(runs, claim, text):
    """Why a claim does not hold for the text before it; None if it does."""
    parts = CLAIM.fullmatch(claim)
    if not parts:
        return "expected COLUMN: RUNS = FIGURES, or <, > or overlaps"
    try:
        where, terms = where_to_look(parts["where"]), parts["terms"].split(", ")
        if parts["relation"] == "=":
            return equals(runs, terms, parts["right"], where, text)
        return compares(runs, terms, parts["relation"], parts["right"], where)
    except WrongClaim as error:
        return str(error)


def passages(page):
    """A page cut at its headings and comments: pairs of a text and the comment behind it."""
    page = re.sub(r"```.*?```", "", page, flags=re.S)
    for found in re.finditer(r"(.*?)(?:^#+ [^\n]*$|<!-- (.*?) ?-->|\Z)", page, flags=re.S | re.M):
        yield found[1], found[2] or ""


def wrong_claims(runs, page):
    """A line for each claim of a page that does not hold."""
    lines = []
    for text, comment in passages(page):
        if not comment.startswith("hold"):
            continue
        mark, *found = comment.splitlines()
        lines += [f"<!-- {mark}: expected <!-- holds, and a claim a line"] * (mark != "holds")
        for claim in found:
            why = None if claim.startswith("from: ") else why_wrong(runs, claim, text)
            lines += [f"{claim}: {why}"] if why else []
    return lines


def without_source(page):
    """The texts, tables left out, that have a figure (1.5, 20 %) and say not where it is from."""
    for text, comment in passages(page):
        prose = re.sub(r"^\|.*$", "", text, flags=re.M)
        if re.search(r"\d\.\d|\d %", prose) and not comment.startswith(("holds\n", "from: ")):
            yield prose.strip()
