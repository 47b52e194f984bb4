"""A page to look at, in one file: pictures, captions and where the model looked.

Pictures and texts are HTML, so that the page is read, printed, searched and copied from like any
other, by mail programs too. Its script reads the weights of attention and lights the pictures.
"""

import base64
import collections
import html
import io
import json
import math
import re
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.model.grid import split_sentinel
from captioning.run.files import atomic_path, output_path

PAGE = Path(__file__).with_name("page.html")  # the template: style and script
WIDE = 2  # a picture of this width / height or more, as panoramas are, is shown above its captions


def page_path(path, force=False):
    """Check a page's file that a flag names before the work starts, as ``output_path`` does."""
    return output_path(path, force, "html", re.escape(PAGE.read_bytes().partition(b"\n")[0]))


def write_page(path, data):
    """Write a page to look at: one file that needs no other and no network, atomically.

    :param data: dict of "title", "lead" and "pictures", which are dicts of "name", "captions" (see
        :func:`page_caption`), perhaps "references", and what :func:`page_picture` gave; perhaps
        "tables" of figures and "alternatives", true if captions are the n best of one model; all
        texts in it are shown as text
    """
    pictures, tables = data["pictures"], data.get("tables", [])
    names = short_names([picture["name"] for picture in pictures])
    pictures = [picture | {"name": name} for picture, name in zip(pictures, names)]
    several = any(len(picture["captions"]) > 1 for picture in pictures)
    kind = "captions" if data.get("alternatives") else "compare" if several else "report"
    known = [{k: v for k, v in picture.items() if k != "image"} for picture in pictures]
    known = json.dumps(data | {"kind": kind, "pictures": known}, separators=(",", ":"))
    parts = {
        "title": html.escape(data["title"]),
        "lead": html.escape(data["lead"]),
        "kind": kind,
        "tables": "".join(map(_table, tables)),
        "pictures": "\n".join(_card(picture, kind) for picture in pictures),
        "data": known.replace("<", "\\u003c"),  # so that nothing in it ends the script
    }
    text = PAGE.read_text(encoding="utf-8")
    text = re.sub(r"\[\[(\w+)\]\]", lambda mark: parts[mark[1]], text)
    with atomic_path(path) as temporary:  # names of files may be no text
        temporary.write_bytes(text.encode("utf-8", "replace"))


def short_names(paths):
    """As many of each path's last parts as tell it from the others, as a list of texts."""
    parts = [path.split("/") for path in paths]
    ends = [["/".join(names[-n:]) for n in range(1, len(names) + 1)] for names in parts]
    counts = collections.Counter(end for of_one in ends for end in of_one)
    return [next((e for e in of_one if counts[e] == 1), of_one[-1]) for of_one in ends]


def page_picture(image, side):
    """A picture for ``write_page``, as a dict.

    :param image: PIL image or uint8 (height, width, 3)
    :param side: its longer side in pixels, a panorama's up to four times that; none is enlarged
    """
    small, file = Image.fromarray(np.asarray(image)), io.BytesIO()
    is_wide = small.width >= WIDE * small.height
    small.thumbnail((4 * side if is_wide else side, side))
    small.save(file, "JPEG", quality=80)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"image": uri, "width": small.width, "height": small.height}


def page_caption(words, hypothesis, scores, alternatives=None, **more):
    """A caption for ``write_page``, as a dict; its weights in 8 bits, a word's largest one is 255.

    :param words: list of words
    :param hypothesis: ``models.Hypothesis`` with alphas; None for another system's caption
    :param scores: dict of text; pictures are sorted by the first one
    :param alternatives: for each word a list of (word, probability), or None
    :param more: "label" of the caption; "differs", the places of words that others lack
    """
    if hypothesis is None:
        return {"words": [(word, None) for word in words], "scores": list(scores.items())} | more
    probabilities = (round(math.exp(p), 4) for p in hypothesis.word_log_probs)
    alphas, sentinel = split_sentinel(hypothesis.alphas)  # (num_words, num_pixels), (num_words,)
    if sentinel is not None:
        more["looks"] = [round(1 - share, 3) for share in sentinel.tolist()]
    # even weights light the whole picture evenly and not fully: nothing was singled out
    light = alphas / alphas.amax(dim=1, keepdim=True).clamp(min=4 / alphas.shape[1])
    return {
        "words": list(zip(words, probabilities, *([alternatives] if alternatives else []))),
        "alphas": base64.b64encode((255 * light).round().byte().numpy().tobytes()).decode(),
        "scores": list(scores.items()),
    } | more


class _Markup(str):
    """Text that is HTML already."""


def _element(tag, *content, **attributes):
    """An element as HTML: texts in it are escaped, elements are not; None is left out.

    A text shows from left to right or right to left as its own letters do.
    """
    inner = [c if isinstance(c, _Markup) else html.escape(c) for c in content if c is not None]
    pairs = {k.strip("_").replace("_", "-"): v for k, v in attributes.items() if v is not None}
    given = "".join(f' {name}="{html.escape(str(value))}"' for name, value in pairs.items())
    end = "" if tag == "img" else f"</{tag}>"
    return _Markup(f"<{tag}{given}>{''.join(inner)}{end}")


def _table(table):
    """A table of figures, from a dict of "title", "columns" and "rows"."""
    rows = []
    for i, (label, *cells) in enumerate([table["columns"], *table["rows"]]):
        cells = [_element("td" if i else "th", cell) for cell in cells]
        rows.append(_element("tr", _element("th", label), *cells))
    return _element("table", _element("caption", table["title"]), *rows)


def _card(picture, kind):
    """A picture and what was said of it."""
    width, height = picture["width"], picture["height"]
    image = _element(
        "img",
        src=picture["image"],
        width=width,
        height=height,
        decoding="async",
        alt=picture["name"],
    )
    blocks = [_said(caption) for caption in picture["captions"]]
    first = 1 if kind == "captions" else len(blocks)  # of the n best, one is large
    said, others = blocks[:first], blocks[first:]
    people = [_element("li", text, dir="auto") for text in picture.get("references") or []]
    texts = [
        _element("h2", picture["name"], dir="auto"),
        _element("div", *said, class_="said columns" if len(said) > 1 else "said"),
        _element("div", class_="panel"),
        _element("div", *others, class_="said more") if others else None,
        _element("ul", *people, aria_label="what people said") if people else None,
    ]
    frame = _element("div", image, class_="frame", style=f"--ratio: {width / height:.4f}")
    is_wide = "wide" if width >= WIDE * height else None
    return _element("article", frame, _element("div", *texts), class_=is_wide)


def _said(caption):
    """A caption with its label and scores; each word can be pointed at."""
    spans = []
    for i, (word, probability, *_) in enumerate(caption["words"]):
        kind = "word differs" if i in caption.get("differs", ()) else "word"
        percent = None if probability is None else f"{100 * probability:.0f}"
        looks = f"--looks: {caption['looks'][i]:.1%}" if "looks" in caption else None
        spans += [" ", _element("span", word, class_=kind, data_p=percent, style=looks)]
    said = spans[1:] or [_element("small", "(no words)")]
    scores = " · ".join(" ".join(pair) for pair in caption["scores"])
    label = caption.get("label")
    label = _element("small", label) if label else None
    line = _element("p", *said, class_="caption", dir="auto")
    return _element("div", label, line, _element("p", scores, class_="scores"))
