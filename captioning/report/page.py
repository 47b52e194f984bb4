"""A page to look at, in one file: pictures, captions and where the model looked."""

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.run.files import atomic_path, output_path

PAGE = Path(__file__).with_name("page.html")  # the template, which says what it reads


def page_path(path, force=False):
    """Check a page's file that a flag names before the work starts, as ``output_path`` does."""
    return output_path(path, force, page=PAGE.read_bytes().partition(b"\n")[0])


def write_page(path, data):
    """Write a page to look at: one file that needs no other and no network, atomically.

    :param data: plain values, as ``page.html`` reads them; all texts in it are shown as text
    """
    text = json.dumps(data, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # so that nothing in it ends the script
    with atomic_path(path) as temporary:
        page = PAGE.read_text(encoding="utf-8").replace("{data}", text, 1)
        temporary.write_text(page, encoding="utf-8")


def page_picture(image, side):
    """A picture for ``write_page``, as a dict.

    :param image: PIL image or uint8 (height, width, 3)
    :param side: its longer side in pixels; a smaller picture keeps its size
    """
    small, file = Image.fromarray(np.asarray(image)), io.BytesIO()
    small.thumbnail((side, side))
    small.save(file, "JPEG", quality=80)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"image": uri, "width": small.width, "height": small.height}


def page_caption(words, hypothesis, scores, alternatives=None, **more):
    """A caption for ``write_page``, as a dict; its weights in 8 bits, a word's largest one is 255.

    :param words: list of words
    :param hypothesis: ``models.Hypothesis`` with alphas
    :param scores: dict of text; pictures are sorted by the first one
    :param alternatives: for each word a list of (word, probability), or None
    :param more: "label" of the caption; "differs", the places of words that others lack
    """
    probabilities = (round(math.exp(p), 4) for p in hypothesis.word_log_probs)
    alphas = hypothesis.alphas  # (num_words, num_pixels)
    # even weights light the whole picture evenly and not fully: nothing was singled out
    light = alphas / alphas.amax(dim=1, keepdim=True).clamp(min=4 / alphas.shape[1])
    return {
        "words": list(zip(words, probabilities, *([alternatives] if alternatives else []))),
        "alphas": base64.b64encode((255 * light).round().byte().numpy().tobytes()).decode(),
        "scores": list(scores.items()),
    } | more
