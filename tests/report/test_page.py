"""The page to look at, in a real browser: pip install playwright, and Debian's chromium."""

import base64
import html
import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_picture
from PIL import Image

import caption
import datasets
import eval as evaluation
import models
from captioning.model import checkpoints
from captioning.report import metrics as metrics_room
from captioning.report import page as page_room
from captioning.report import sheets, tables
from captioning.run import files as files_room
from captioning.run import paths

ATTACK = "</script><script>window.ran = 1</script><img src=x onerror='ran = 1'>"


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; tests that need it are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
    if not path:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Function of the page's data: the page, opened; all that it asks for or complains of fails."""
    contexts, faults, asked = [], [], []

    def open_(data, width=1280, **options):
        path = tmp_path / "page.html"
        page_room.write_page(path, data)
        size = {"width": width, "height": 800}
        contexts.append(browser.new_context(viewport=size, reduced_motion="reduce", **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not faults
    assert all(url.startswith("data:image/jpeg") or url.endswith("/page.html") for url in asked)


def say(words, scores, probability=0.5, alternatives=None, **more):
    """A caption whose word number i looks at place number i of nine, as the scripts hand it on."""
    alphas = torch.eye(9)[: len(words)] if words else torch.zeros(0, 9)
    found = types.SimpleNamespace(alphas=alphas, word_log_probs=[np.log(probability)] * len(words))
    return page_room.page_caption(words, found, scores, alternatives, **more)


def read_page(path):
    """What a script wrote into a page."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S)[1])


def picture(name, *captions, seed=0, **more):
    image = page_room.page_picture(make_picture(seed, 90, 90), 90)
    return {"name": name, "captions": list(captions)} | image | more


def captions_page(*pictures):
    return {"title": "Captions", "lead": "by a model", "alternatives": True, "pictures": pictures}


OTHERS = [[(f"other{i}", 0.2 - i / 50) for i in range(5)]] * 3
DOG = say(["a", "dog", "runs"], {"score": "-1.500"}, 0.04, OTHERS)


def lit(page):
    """The lit word, and how opaque (0 to 255) the light is at nine places of its picture."""
    word = page.locator(".word.lit")
    if not word.count():
        assert not page.locator(".frame.lit").count()
        return None, None
    page.wait_for_timeout(100)
    opacity = page.evaluate("""() => {
      const canvas = document.querySelector(".frame.lit canvas"), pen = canvas.getContext("2d");
      const at = [0, 1, 2].map((i) => Math.floor((i + 0.5) * canvas.width / 3));
      return at.flatMap((y) => at.map((x) => pen.getImageData(x, y, 1, 1).data[3]));
    }""")
    assert word.count() == 1
    return word.evaluate("word => word.firstChild.textContent"), opacity


def test_the_template_is_short_and_the_page_needs_nothing_else():
    text = page_room.PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 270
    marks = ["title", "title", "lead", "tables", "kind", "pictures", "data"]
    assert re.findall(r"\[\[(\w+)\]\]", text) == marks
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|fetch|XMLHttp|https?:", text)


def test_what_is_no_text_of_ours_is_shown_and_never_run(open_page):
    evil = say([ATTACK, "a"], {ATTACK: ATTACK}, 0.5, [[(ATTACK, 0.5)]] * 2)
    table = {"title": ATTACK, "columns": ["", ATTACK], "rows": [[ATTACK, ATTACK]]}
    data = captions_page(*[picture(ATTACK, evil, evil, references=[ATTACK])] * 9)
    page = open_page(data | {"title": ATTACK, "lead": ATTACK, "tables": [table]})
    page.locator(".word").first.hover()
    page.wait_for_timeout(300)
    assert page.evaluate("window.ran === undefined && document.scripts.length === 2")
    assert page.locator("img").count() == page.locator("article .frame img").count() > 0
    for place in ("h1", "h2", "section caption", "section td", "ul li", ".panel li span"):
        assert page.locator(place).first.text_content() == ATTACK
    assert page.locator(".word").first.text_content() == ATTACK
    assert page.title() == ATTACK
    assert ATTACK in page.locator("article img").first.get_attribute("alt")


def test_names_that_are_no_text_are_written_too(tmp_path):
    data = captions_page(picture("caf\udce9 \u2028 é", DOG))
    page_room.write_page(tmp_path / "page.html", data)
    assert read_page(tmp_path / "page.html")["pictures"][0]["name"] == "caf\udce9 \u2028 é"


def test_pointing_at_a_word_lights_where_the_model_looked(open_page):
    page = open_page(captions_page(picture("dog.jpg", DOG, DOG)))
    assert lit(page) == (None, None)
    for i, word in enumerate(["a", "dog", "runs"]):
        page.locator(".word").nth(i).hover()
        found, opacity = lit(page)
        assert found == word and np.argmax(opacity) == i and opacity[i] > 200
        assert max(opacity[3:]) < 0.5 * opacity[i]
    page.locator("h1").hover()
    assert lit(page) == (None, None)


def test_what_else_it_could_have_said_stands_below_with_its_own_word_marked(open_page):
    page = open_page(captions_page(picture("dog.jpg", DOG)))
    page.locator(".word").nth(1).hover()
    rows = page.locator(".panel li").all_inner_texts()
    assert [row.split() for row in rows] == [
        *([f"other{i}", f"{20 - 2 * i}", "%"] for i in range(5)),
        ["dog", "4.0", "%"],
    ]
    assert page.locator(".panel li.own span").first.text_content() == "dog"
    below = "word => getComputedStyle(word, '::after').content"
    assert page.locator(".word").first.evaluate(below).startswith('"4"')
    one_line = "word => getComputedStyle(word, '::after').whiteSpace"  # 100 below "a", too
    assert page.locator(".word").first.evaluate(one_line) == "nowrap"


def test_with_a_sentinel_each_word_says_how_much_it_looks(open_page):
    alphas = torch.zeros(2, 10)  # of nine places and the sentinel
    alphas[0, 3], alphas[0, 9], alphas[1, 9] = 0.62, 0.38, 1.0
    found = types.SimpleNamespace(alphas=alphas, word_log_probs=[np.log(0.5)] * 2)
    page = open_page(captions_page(picture("dog.jpg", page_room.page_caption("ab", found, {}))))
    for i, (share, width) in enumerate([("62 %", "62%"), ("<0.1 %", "0%")]):
        word = page.locator(".word").nth(i)
        word.hover()
        assert page.locator(".panel").inner_text() == f"{'ab'[i]} 50 %, looks {share}"
        size = word.evaluate("word => getComputedStyle(word).backgroundSize")
        assert size.startswith(width)
    assert "the line under a word tells how much" in page.locator("#lead").inner_text()
    page.locator(".word").first.hover()
    _, opacity = lit(page)
    assert np.argmax(opacity) == 3 and opacity[3] > 200


def test_the_keyboard_goes_from_word_to_word_and_from_caption_to_caption(open_page):
    page = open_page(captions_page(picture("1.jpg", DOG), picture("2.jpg", DOG)))
    pressed, second = [], page.locator("article").nth(1)
    second.locator(".word").first.wait_for()
    for key in ("Tab", "Tab", "ArrowRight", "End", "ArrowLeft", "Home", "ArrowDown", "Escape"):
        page.keyboard.press(key)
        pressed.append((key, lit(page)[0], bool(second.locator(":focus").count())))
    assert pressed == [
        ("Tab", None, False),  # the play button
        ("Tab", "a", False),
        ("ArrowRight", "dog", False),
        ("End", "runs", False),
        ("ArrowLeft", "dog", False),
        ("Home", "a", False),
        ("ArrowDown", "a", True),
        ("Escape", None, True),
    ]


def test_a_tap_lights_and_another_one_ends_it(open_page):
    page = open_page(captions_page(picture("dog.jpg", DOG)), width=390, has_touch=True)
    page.locator(".word").nth(1).tap()
    assert lit(page)[0] == "dog"
    page.locator(".word").nth(2).tap()
    assert lit(page)[0] == "runs"
    page.locator(".word").nth(2).tap()
    assert lit(page)[0] is None


def test_the_play_button_lets_the_gaze_move_and_stop(open_page):
    page = open_page(captions_page(picture("dog.jpg", DOG)))
    page.evaluate("""() => {
      window.seen = [];
      const note = () => seen.push(document.querySelector(".word.lit")?.firstChild.data);
      new MutationObserver(note).observe(document.querySelector(".caption"),
        { subtree: true, attributes: true });
    }""")
    button, playing = page.locator(".play"), page.locator(".play[aria-label=stop]")
    button.click()
    playing.wait_for()
    playing.wait_for(state="detached")
    words = page.evaluate("seen.filter((word, i) => word !== seen[i - 1])")
    assert words == ["a", "dog", "runs", None]
    button.click()
    button.click()
    assert lit(page)[0] is None and not playing.count()


def report(count, **more):
    words = ["a", "dog", "runs"]
    pictures = [
        picture(
            f"{i}.jpg",
            say([*words, f"w{i}"], {"CIDEr": f"{7 * i % count}.0"}),
            references=[f"People said r{i}."],
        )
        for i in range(count)
    ]
    return {"title": "Report", "lead": "test", "pictures": pictures} | more


def names(page):
    """The pictures in their order."""
    return page.locator("main article h2").all_text_contents()


def test_pictures_are_sorted_and_searched(open_page):
    page = open_page(report(12))
    in_order = [f"{i}.jpg" for i in range(12)]
    assert names(page) == in_order
    by_score = sorted(in_order, key=lambda name: 7 * int(name[:-4]) % 12)
    orders = {"worst first": by_score, "best first": by_score[::-1], "name": sorted(in_order)}
    for how, expected in orders.items():
        page.locator("select").select_option(how)
        got = names(page)
        assert got == expected or how == "name" and sorted(got) == expected
    drawn = {}
    for seed in ("1", "2", "1"):
        page.locator("select").select_option("random")
        page.locator("[type=number]").fill(seed)
        assert sorted(names(page)) == sorted(in_order) and names(page) != in_order
        assert drawn.setdefault(seed, names(page)) == names(page)
    assert drawn["1"] != drawn["2"]
    page.locator("select").select_option("as they came")
    searches = {"w7": ["7.jpg"], "R3.": ["3.jpg"], "dog w1": ["1.jpg", "10.jpg", "11.jpg"]}
    searches |= {"1.jp": ["1.jpg", "11.jpg"], "jpg 0": ["0.jpg", "10.jpg"]}  # any part of a name
    for sought, expected in {**searches, "og": [], "": in_order, "5.jpg": ["5.jpg"]}.items():
        page.locator("[type=search]").fill(sought)
        assert names(page) == expected
        count = f"{len(expected)} picture{'s' * (len(expected) != 1)}"
        assert page.locator("output").inner_text() == count


def test_all_texts_can_be_found_from_the_start_and_none_is_cut(open_page):
    page = open_page(report(200))
    assert page.evaluate("find('main').textContent.includes('People said r199.')")
    assert page.evaluate("window.find('People said r199.')")  # as Ctrl-F does
    page.get_by_text("People said r199.").wait_for()


def on_paper(page):
    """For each card (whether it is seen, is in one piece, has its caption beside the picture)."""
    return page.evaluate("""() => [...document.querySelectorAll("article")].map((article) => {
      const [card, frame, said] = [article, ...article.querySelectorAll(".frame, .caption")].map(
        (node) => node.getBoundingClientRect());
      const image = article.querySelector("img");
      return [image.complete && frame.height > 20 && said.height > 10,
        getComputedStyle(article).breakInside, said.left >= frame.right && said.top < frame.bottom];
    })""")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_of_it_is_printed_dark_on_white_and_captions_stand_beside_pictures(scheme, open_page):
    page = open_page(report(60), width=720, color_scheme=scheme)  # A4 within its margins
    page.emulate_media(media="print", color_scheme=scheme)
    assert on_paper(page) == [[True, "avoid", True]] * 60
    dark = "node => Math.max(...getComputedStyle(node).color.match(/\\d+/g).slice(0, 3)) < 110"
    for place in ("h1", "h2", ".word", ".scores", "ul li"):
        assert page.locator(place).first.evaluate(dark), place
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    for place in ("search", ".frame button", ".panel", ".how"):
        assert page.locator(place).first.is_hidden()


@pytest.mark.parametrize("n_best", [True, False])
def test_a_caption_is_selected_and_copied_as_a_sentence(n_best, open_page):
    page = open_page(captions_page(*[picture("1.jpg", DOG, DOG)] * 2) | {"alternatives": n_best})
    selected = "getSelection().toString().trim()"
    page.locator(".caption").first.click(click_count=3, position={"x": 3, "y": 8})
    assert page.evaluate(selected) == "a dog runs"
    page.keyboard.press("Control+a")
    lines = [line for line in page.evaluate(selected).splitlines() if line.strip()]
    assert lines.count("a dog runs") == 4 and not [line for line in lines if "%" in line]
    first, last = (page.locator(".word").nth(i).bounding_box() for i in (0, 2))
    page.mouse.move(first["x"] + 1, first["y"] + 9)
    page.mouse.down()
    page.mouse.move(last["x"] + last["width"] - 1, last["y"] + 9, steps=5)
    page.mouse.up()
    assert "dog" in page.evaluate(selected)


def test_without_javascript_pictures_captions_and_tables_are_there(open_page):
    table = {"title": "metrics", "columns": ["beam size", "3"], "rows": [["BLEU-4", "20.0"]]}
    page = open_page(report(12, tables=[table]), java_script_enabled=False)
    for i in (0, 11):
        article = page.locator("article").nth(i)
        assert article.locator(".caption").inner_text() == f"a dog runs w{i}"
        assert article.locator("img").bounding_box()["height"] > 80
        assert article.locator("li").inner_text() == f"People said r{i}."
    assert page.locator("td").inner_text() == "20.0" and page.locator("search").is_hidden()
    assert not page.locator("button:visible").count()


def test_what_a_reader_without_script_and_browser_finds_in_the_file(tmp_path):
    page_room.write_page(tmp_path / "page.html", report(3))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    body, _, script = text.partition('<script id="data"')
    words = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", body.partition("<main")[2])))
    for i in range(3):
        assert f"{i}.jpg" in words and f"a dog runs w{i}" in words and f"People said r{i}." in words
    assert body.count("data:image/jpeg;base64,") == 3 and "base64," not in script


ORDER = """([words, line]) => {
  const range = document.createRange(), places = [];
  for (const word of words.split(" ")) {
    const walker = document.createTreeWalker(line, NodeFilter.SHOW_TEXT);
    let node = walker.nextNode();
    while (!node.data.includes(word)) node = walker.nextNode();
    range.setStart(node, node.data.indexOf(word));
    range.setEnd(node, node.data.indexOf(word) + word.length);
    places.push([word, range.getBoundingClientRect().left]);
  }
  return places.sort((a, b) => a[1] - b[1]).map(([word]) => word);
}"""


@pytest.mark.parametrize("said", ["كلب يجري فوق العشب", "שני ילדים NIKE SHOES כאן", "a dog runs"])
@pytest.mark.parametrize("n_best", [True, False])
def test_a_caption_reads_as_the_reference_below_it(said, n_best, open_page):
    """From right to left or left to right, and mixed as the Unicode standard has it."""
    words = said.split()
    others = [[(word, 0.5)] for word in words] if n_best else None
    shown = picture("1.jpg", say(words, {"score": "1.0"}, 0.5, others), references=[said])
    page = open_page(captions_page(shown) | {"alternatives": n_best})
    line, reference = page.locator(".caption"), page.locator("ul li")
    order = [node.evaluate("(line, words) => (" + ORDER + ")([words, line])", said)
             for node in (line, reference)]  # fmt: skip
    assert order[0] == order[1]
    assert (order[0] == words) == (said == "a dog runs")
    page.locator(".word").first.focus()
    page.keyboard.press("ArrowRight" if said == "a dog runs" else "ArrowLeft")
    assert lit(page)[0] == words[1]


def test_panoramas_are_shown_whole_and_seen(open_page):
    shown = []
    for width, height in ((1200, 200), (200, 1200), (300, 200), (40, 40)):
        image = page_room.page_picture(make_picture(1, width, height), 300)
        shown.append({"name": f"{width}.jpg", "captions": [DOG]} | image)
    assert [(one["width"], one["height"]) for one in shown] == [
        (1200, 200), (50, 300), (300, 200), (40, 40),
    ]  # fmt: skip
    for width, least in ((1280, 170), (390, 50)):
        page = open_page(captions_page(*shown), width=width)
        for one, image in zip(shown, page.locator("article img").all()):
            box = image.bounding_box()
            assert box["width"] / box["height"] == pytest.approx(one["width"] / one["height"], 0.05)
            assert least <= box["height"] <= 0.71 * 800 and box["width"] <= width


@pytest.mark.parametrize(
    "paths, names",
    [
        (["a/b/1.jpg", "a/b/2.jpg"], ["1.jpg", "2.jpg"]),
        (["a/x/1.jpg", "a/y/1.jpg", "2.jpg"], ["x/1.jpg", "y/1.jpg", "2.jpg"]),
        (["1.jpg", "a/1.jpg", "b/a/1.jpg"], ["1.jpg", "a/1.jpg", "b/a/1.jpg"]),
        (["/tmp/1.jpg", "/tmp/1.jpg"], ["/tmp/1.jpg", "/tmp/1.jpg"]),
        ([], []),
    ],
)
def test_names_are_as_short_as_they_are_distinct(paths, names):
    assert page_room.short_names(paths) == names


def test_a_phone_is_told_to_tap(open_page):
    how = "document.querySelector('.how').textContent"
    assert "tap a word" in open_page(report(1), has_touch=True, is_mobile=True).evaluate(how)
    assert "point at a word" in open_page(report(1)).evaluate(how)


def test_captions_of_several_models_stand_side_by_side_with_the_words_that_differ(open_page):
    said = [
        say(["a", "dog", "runs"], {"CIDEr": "80.0"}, label="lstm", differs=[1]),
        say(["a", "cat", "runs"], {"CIDEr": "20.0"}, label="gru", differs=[1]),
    ]
    equal = [say(["a"], {"CIDEr": "5.0"}, label=name, differs=[]) for name in ("lstm", "gru")]
    page = open_page(
        {
            "title": "t",
            "lead": "l",
            "pictures": [picture("same.jpg", *equal)] * 8 + [picture("dog.jpg", *said)],
        }
    )
    page.locator("select").select_option("largest difference")
    assert names(page)[0] == "dog.jpg"
    first = page.locator("article").first
    boxes = [line.bounding_box() for line in first.locator(".caption").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    assert first.locator(".differs").all_inner_texts() == ["dog", "cat"]
    first.get_by_text("cat").hover()
    assert lit(page)[0] == "cat"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_in_light_and_dark(scheme, open_page):
    """All texts have the contrast of 4.5 that the WCAG (1.4.3) asks for."""
    table = {"title": "metrics", "columns": ["beam size", "3"], "rows": [["BLEU-4", "20.0"]]}
    both = captions_page(picture("dog.jpg", DOG | {"differs": [2]}, DOG, references=["A dog."]))
    page = open_page(both | {"tables": [table]}, color_scheme=scheme)
    page.locator(".word").nth(1).hover()
    ratios = page.evaluate("""() => {
      const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
      const light = (color) => { const [r, g, b] = color.map((c) =>
        c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const behind = (node) => { const color = rgb(getComputedStyle(node).backgroundColor);
        return color[3] === 0 ? behind(node.parentElement) : color; };
      const found = {};
      for (const name of ["h1", "p", "h2", "th", "td", ".word", ".word.lit",
          ".differs", ".scores", ".panel b", ".panel li", "ul li"]) {
        const node = document.querySelector(name), a = light(rgb(getComputedStyle(node).color));
        const b = light(behind(node));
        found[name] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      }
      return found;
    }""")
    assert len(ratios) == 12 and {name: r for name, r in ratios.items() if r < 4.5} == {}
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 600) == (scheme == "light")


def test_a_phone_shows_all_of_it_without_scrolling_sideways(open_page):
    long = say(["Donaudampfschiffahrtsgesellschaft" * 2, "a"], {"score": "1.0"}, 0.5, OTHERS[:2])
    page = open_page(captions_page(picture("x" * 200, long, long), picture("y", DOG)), width=390)
    page.locator("article img").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    top, below = page.locator("article").first.locator(".frame, .caption").all()[:2]
    assert top.bounding_box()["y"] + top.bounding_box()["height"] <= below.bounding_box()["y"]


def test_a_caption_without_words_and_one_picture_are_shown(open_page):
    page = open_page(captions_page(picture("empty.jpg", say([], {"score": "0"}, 0.5, []))))
    assert page.get_by_text("(no words)").is_visible() and page.locator("select").is_hidden()
    page.locator(".play").click()
    assert lit(page)[0] is None


def test_weights_keep_their_order_and_the_largest_is_all_light():
    alphas = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0]])
    found = types.SimpleNamespace(alphas=alphas, word_log_probs=[-1.0] * 3)
    caption = page_room.page_caption(["a", "b", "c"], found, {})
    light = np.frombuffer(base64.b64decode(caption["alphas"]), np.uint8).reshape(3, 4)
    assert light.tolist() == [[26, 51, 76, 102], [64] * 4, [0, 0, 0, 255]]
    assert caption["words"] == [(word, 0.3679) for word in "abc"]


@pytest.mark.parametrize("text", ["words of mine", "<!doctype html><p>mine", "\x89PNG"])
def test_only_a_page_of_ours_is_replaced_unasked(text, tmp_path, fails):
    path = tmp_path / "page.html"
    path.write_text(text)
    with fails("page.html exists and is not a page of this suite"):
        page_room.page_path(path)
    assert page_room.page_path(path, force=True) == path
    for count in (0, 1):
        page_room.write_page(path, report(count))
        assert page_room.page_path(path) == path
    path.write_text("")
    assert page_room.page_path(path) == path
    with fails("there is no folder"):
        page_room.page_path(tmp_path / "no" / "page.html")
    with fails("is a folder.*captions.html"):
        page_room.page_path(tmp_path)


# ---------------------------------------------------------------- what the scripts write


def light_of(caption):
    """The weights of each word, uint8 (num_words, num_pixels)."""
    light = np.frombuffer(base64.b64decode(caption["alphas"]), np.uint8)
    return light.reshape(len(caption["words"]), -1)


@pytest.fixture
def captions_html(talkative, tmp_path, monkeypatch):
    """What caption.py writes of two pictures with the three best captions: (its JSON, its page)."""
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        Image.fromarray(make_picture(i)).save(f"{i}.png")
    flags = "--img 0.png 1.png --n_best 3 --no_plot --json said.json --html page.html --device cpu"
    argv = [*flags.split(), "--max_decode_steps", "6", "--model", str(talkative)]
    caption.main(caption.get_args_parser().parse_args(argv))
    return files_room.read_json("said.json"), read_page(Path("page.html"))


def test_captions_stand_with_their_words_chances_and_what_else_was_likely(captions_html, talkative):
    said, page = captions_html
    captioner = models.load_captioner(talkative)
    decoder, words = captioner.decoder, captioner.words
    for result, shown in zip(said, page["pictures"]):
        assert shown["name"] == result["image"] and len(shown["captions"]) == 3
        square = datasets.resize_image(make_picture(int(result["image"][0])), 64)
        features = captioner.encode(torch.from_numpy(square)[None])
        for spoken, found in zip(shown["captions"], result["captions"]):
            text = [word for word, _, _ in spoken["words"]]
            assert " ".join(text) == found["caption"]
            assert dict(spoken["scores"])["score"] == f"{found['score']:.3f}"
            assert (light_of(spoken).max(axis=1) > 0).all()
            # the decoder's own pass over whole captions
            ids = [captioner.word_map[word] for word in [datasets.START, *text, datasets.END]]
            one = torch.zeros(1, dtype=torch.long)
            with torch.no_grad():
                passed = decoder(features, torch.tensor([ids]), [len(text) + 1], one)
            chances = passed.scores.softmax(dim=1)
            chances[:, datasets.special_tokens(captioner.word_map)] = 0
            for (word, chance, others), expected in zip(spoken["words"], chances):
                assert chance == pytest.approx(expected[captioner.word_map[word]].item(), abs=1e-3)
                best = expected.topk(5)
                assert [other for other, _ in others] == [words[i] for i in best.indices]
                assert [p for _, p in others] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_what_is_done_is_on_the_page_if_the_rest_fails(talkative, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sheets, "draw", lambda *_: 1 / 0)
    Image.fromarray(make_picture(0)).save("0.png")
    argv = ["--img", "0.png", "--html", "page.html", "--device", "cpu", "--model", str(talkative)]
    argv += ["--output_folder", "out"]
    with pytest.raises(ZeroDivisionError):
        caption.main(caption.get_args_parser().parse_args(argv))
    assert len(read_page(Path("page.html"))["pictures"]) == 1


@pytest.fixture
def evaluate(training_data, tmp_path, monkeypatch):
    """Function of flags: runs eval.py on the test split; returns (its metrics, its page)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics_room, "_meteor", lambda gts, res: (50.0, [0.5] * len(res)))

    def run(*flags):
        argv = ["--data_folder", training_data[0], "--output_folder", "out", "--device", "cpu"]
        argv += ["--max_decode_steps", 8, "--html", "page.html", *flags]
        evaluation.main(evaluation.get_args_parser().parse_args([str(arg) for arg in argv]))
        (metrics,) = Path("out").glob("metrics_*.json")
        return files_room.read_json(metrics), read_page(Path("page.html"))

    return run


def test_the_report_has_the_table_and_each_pictures_own_scores(evaluate, talkative, training_data):
    metrics, page = evaluate("--model", talkative, "--beam_size", 2, 3)
    data = datasets.CaptionDataset(datasets.split_path(training_data[0], "test", training_data[1]))
    assert [shown["name"] for shown in page["pictures"]] == data.image_names
    assert [shown["references"] for shown in page["pictures"]] == data.raw_references
    for number, beam_size in enumerate((2, 3)):
        path = paths.captions_path("out", training_data[1], "test", beam_size)
        captions = [shown["captions"][number] for shown in page["pictures"]]
        texts = [" ".join(word for word, _ in caption["words"]) for caption in captions]
        assert texts == [row["caption"] for row in files_room.read_json(path)]
        assert {caption["label"] for caption in captions} == {f"beam size {beam_size}"}
        own = [float(dict(caption["scores"])["CIDEr"]) for caption in captions]
        cider = metrics["beam_sizes"][str(beam_size)]["CIDEr"]
        assert np.mean(own) == pytest.approx(cider, abs=0.1) and len(set(own)) > 1
        assert {dict(caption["scores"])["METEOR"] for caption in captions} == {"50.0"}
        assert all(light_of(caption).shape[1] == 4 for caption in captions)
    table = page["tables"][0]
    assert table["title"] == "metrics, 0-100" and table["columns"] == [
        "beam size",
        "2",
        "3",
        "people",
    ]
    rows = {name: cells for name, *cells in table["rows"]}
    assert rows["CIDEr"] == [f"{metrics['beam_sizes'][k]['CIDEr']:.2f}" for k in "23"] + ["-"]


def test_compared_models_are_each_scored_as_if_alone(evaluate, talkative, best_checkpoint, fails):
    alone, _ = evaluate("--model", talkative, "--beam_size", 2)
    shutil.rmtree("out")
    both, page = evaluate("--model", best_checkpoint, talkative, "--compare", "--beam_size", 2)
    assert list(both["compared"]) == both["models"] == [str(best_checkpoint), str(talkative)]
    rows = [both["compared"][str(talkative)], alone["beam_sizes"]["2"]]
    for row in rows:
        row.pop("ms per picture")
    assert rows[0] == rows[1] != both["compared"][str(best_checkpoint)]
    labels = [caption["label"] for caption in page["pictures"][0]["captions"]]
    assert labels == [f"model {best_checkpoint}", f"model {talkative}"]
    files = [row["caption"] for row in files_room.read_json(sorted(Path("out").glob("capt*"))[1])]
    texts = [[word for word, _ in shown["captions"][1]["words"]] for shown in page["pictures"]]
    assert list(map(" ".join, texts)) == files
    with fails("--compare: expected several different --model"):
        evaluate("--model", talkative, talkative, "--compare")
    with fails("--compare: expected several different --model, and one --beam_size"):
        evaluate("--model", best_checkpoint, talkative, "--compare", "--beam_size", 2, 3)
    with fails("--compare: expected no --average"):
        evaluate("--model", best_checkpoint, talkative, "--compare", "--average", "mean.pth.tar")
    Path("page.html").write_text("mine")
    with fails("page.html exists and is not a page of this suite"):
        evaluate("--model", talkative)


@pytest.mark.parametrize(
    "words, others, places",
    [
        ("a dog runs", ["a dog runs"], []),
        ("a dog runs", ["a cat runs"], [1]),
        ("a dog runs", ["a dog runs", "the dog sits"], [0, 2]),
        ("a dog and a dog", ["a dog"], [2, 3, 4]),
        ("a dog", [""], [0, 1]),
        ("", ["a dog"], []),
    ],
)
def test_words_differ_that_another_caption_lacks_at_their_place(words, others, places):
    assert tables.differing(words.split(), [other.split() for other in others]) == places


@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_each_pictures_own_scores_are_those_of_the_metrics_alone():
    references = [[["a", "dog", "runs"]], [["two", "cats", "sit"]]]
    hypotheses = [["a", "dog", "runs"], ["a", "dog", "sits"]]
    own = metrics_room.score_captions(references, hypotheses, meteor=True, each=True)["each"]
    assert own["METEOR"][0] == pytest.approx(100) and own["METEOR"][1] < 50
    assert own["CIDEr"][0] > own["CIDEr"][1] >= 0


# ---------------------------------------------------------------- the captioner of the suite


def test_without_a_model_the_captioner_of_the_suite_is_taken_and_named(
    evaluate, best_checkpoint, tmp_path, monkeypatch, capsys
):
    own = tmp_path / "docs" / "captioner" / "flickr8k.pth.tar"
    own.parent.mkdir(parents=True)
    shutil.copy(best_checkpoint, own)
    monkeypatch.setattr(checkpoints, "DEFAULT_CAPTIONER", own)
    Image.fromarray(make_picture(0)).save("0.png")
    argv = ["--img", "0.png", "--no_plot", "--device", "cpu", "--json", "said.json"]
    caption.main(caption.get_args_parser().parse_args(argv))
    said = capsys.readouterr().err
    assert said.count(f"without --model: taking {own}") == 1
    assert files_room.read_json("said.json")[0]["image"] == "0.png"
    metrics, page = evaluate("--output_folder", "out")
    assert metrics["models"] == [str(own)] and "the captioner of the suite" in page["lead"]
    assert {path.name for path in own.parent.iterdir()} == {own.name}


def test_the_captioner_of_the_suite_that_is_gone_or_damaged_is_named(tmp_path, monkeypatch, fails):
    own = tmp_path / "flickr8k.pth.tar"
    monkeypatch.setattr(checkpoints, "DEFAULT_CAPTIONER", own)
    for content in (None, b"half a file"):
        if content:
            own.write_bytes(content)
        with fails("flickr8k.pth.tar"):
            models.load_captioner(models.run_checkpoint(None))


def test_what_is_exported_is_what_is_scored(evaluate, talkative, fails):
    metrics, _ = evaluate("--model", talkative, "--export", "small.pth.tar", "--beam_size", 2)
    small = Path("small.pth.tar").absolute()
    assert metrics["models"] == [str(small)] and metrics["export of"] == [str(talkative)]
    again, _ = evaluate("--model", small, "--beam_size", 2)
    for row in (metrics["beam_sizes"]["2"], again["beam_sizes"]["2"]):
        row.pop("ms per picture")
    assert again["beam_sizes"] == metrics["beam_sizes"]
    with fails("--export small.pth.tar exists"):
        evaluate("--model", talkative, "--export", "small.pth.tar")
    with fails("--export: expected one --model"):
        evaluate("--model", talkative, small, "--export", "other.pth.tar")


def test_another_systems_caption_is_shown_and_lights_nothing(open_page):
    ours, theirs = say(["a", "dog"], {"CIDEr": "9.0"}), ["a", "cat"]
    theirs = page_room.page_caption(theirs, None, {"CIDEr": "3.0"}, label="theirs.json")
    data = {"title": "What was said", "lead": "", "pictures": [picture("dog.jpg", ours, theirs)]}
    page = open_page(data)
    page.get_by_text("cat", exact=True).hover()
    page.wait_for_timeout(300)
    assert not page.locator(".frame.lit").count() and page.locator(".word.lit").count() == 1
    assert page.locator(".panel").text_content() == "cat"
    page.get_by_text("dog", exact=True).hover()
    page.wait_for_timeout(300)
    assert page.locator(".frame.lit").count() == 1
