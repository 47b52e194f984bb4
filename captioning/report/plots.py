"""What all drawings by matplotlib share: its default settings, and fonts for any letters."""

import contextlib
import functools
import logging
import os
import unicodedata

from captioning.run.messages import note
from captioning.run.signals import hold_signals


@contextlib.contextmanager
def default_settings():
    """Draw with matplotlib's default settings, whatever the user's own are; also a decorator.

    A figure takes settings as it is made, as it is drawn and as it is saved: all three belong
    inside. Signals to stop wait: raised in a function that matplotlib's C++ code calls they become
    another error, and in the callback of a weak reference Python ignores them.
    """
    import matplotlib.style

    with hold_signals(), matplotlib.style.context("default"):
        yield


@functools.cache
def font_families(letters):
    """Fonts that have these letters: DejaVu Sans, and the system's for those that it lacks."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    logging.getLogger(font_manager.__name__).setLevel(logging.ERROR)  # else it tells of weights
    own = "DejaVu Sans"  # comes with matplotlib and speaks most alphabets
    missing = set(map(ord, letters)) - FT2Font(font_manager.findfont(own)).get_charmap().keys()
    if not missing:
        return [own]
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():  # matplotlib keeps a list, and asks but once
        if path not in known:
            with contextlib.suppress(OSError, RuntimeError):  # a damaged font
                font_manager.fontManager.addfont(path)
    fonts = [font for font in font_manager.fontManager.ttflist if os.path.exists(font.fname)]
    fonts = [font for font in fonts if "Last Resort" not in font.name]  # boxes for every letter
    has = {font.name: missing & FT2Font(font.fname).get_charmap().keys() for font in fonts}
    families = [own]
    while has[best := max(has, key=lambda name: len(has[name] & missing))] & missing:
        families.append(best)
        missing = missing - has[best]
    if missing:
        letters = "".join(map(chr, sorted(missing)[:8]))
        note(
            f"no font here has {letters}, drawn as boxes; install one that has, such as Noto "
            "(Debian, Ubuntu: apt install fonts-noto-cjk for Chinese, Japanese and Korean, else "
            "fonts-noto-core)"
        )
    return families


def check_script(text):
    """Say once if this matplotlib cannot set the text: before 3.11 letters went left to right.

    Letters from right to left are Unicode's classes R and AL; letters that change their places or
    forms beside others, as in Indic scripts, come with marks of category Mc.
    """
    import matplotlib

    right_to_left = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text)
    joined = any(unicodedata.category(letter) == "Mc" for letter in text)
    if (right_to_left or joined) and matplotlib.__version_info__[:2] < (3, 11):
        note(
            f"matplotlib {matplotlib.__version__} draws all letters from left to right and joins "
            "none, so these captions read wrongly in drawings: python -m pip install "
            "'matplotlib>=3.11' (Python 3.11 or newer), or look at the page that --html writes"
        )
