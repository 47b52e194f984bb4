"""Caption pictures and draw where the model looked at each word.

python caption.py --img photo.jpg --model checkpoints
python caption.py --img photo.jpg --model checkpoints --n_best 3 --gif
python caption.py --img trip/ --no_plot --html trip.html --json trip.json
"""

import collections
import functools
import glob
import hashlib
import io
import itertools
import logging
import math
import os
import re
import sys
import textwrap
import warnings
from pathlib import Path

if sys.flags.safe_path:
    sys.exit("caption.py: error: unset PYTHONSAFEPATH, which hides this suite's files")
import utils
from utils import UserError

# loaded when first used: --help and a mistake in a flag need not wait for them
names = ("numpy", "torch", "PIL.Image", "datasets", "models")
np, torch, Image, datasets, models = map(utils.LazyModule, names)


def main(args):
    """Find the pictures; caption them batch by batch; print, draw and keep what was said."""
    check_flags(args)
    paths = find_pictures(args.img, args.recursive)
    captioner, options = load(args)
    bar = utils.progress(total=len(paths), unit="picture", disable=len(paths) <= args.batch_size)
    say = functools.partial(bar.write, file=sys.stderr if str(args.json) == "-" else sys.stdout)
    read = functools.partial(read_picture, captioner.image_size, options["with_alphas"], bar.write)
    pictures = datasets.read_ahead(read, paths, args.workers, ahead=args.batch_size)
    pictures = filter(None, pictures)  # without those that cannot be read
    results, shown = [], []
    try:
        while batch := list(itertools.islice(pictures, args.batch_size)):
            images = np.stack([square for _, _, square in batch])  # (B, 3, S, S)
            with utils.autocast(captioner.device, args.amp):
                encoder_out = captioner.encode(torch.from_numpy(images))
                model = [captioner.decoder], [encoder_out], captioner.word_map
                found = models.beam_search(*model, **options)
            for (path, picture, _), hypotheses, out in zip(batch, found, encoder_out):
                results.append(report(path, hypotheses, captioner, say))
                if args.html:
                    shown.append(page_entry(path, picture, captioner, hypotheses, out, args))
                if not args.no_plot:
                    draw(path, picture, captioner, hypotheses[0], args, say)
            bar.update(len(batch))
    finally:  # what is done is kept, whatever stops the rest
        bar.close()
        if args.json and results:
            utils.write_json(args.json, results)
            print(f"written: {utils.printable(args.json)}", file=sys.stderr)
        if args.html and shown:
            lead = f"by {args.model or 'the captioner of the suite'}, beam size {args.beam_size}"
            page = {"title": "Captions", "lead": lead, "alternatives": True, "pictures": shown}
            utils.write_page(args.html, page)
            print(f"written: {utils.printable(args.html)}", file=sys.stderr)
    if unreadable := len(paths) - len(results):
        print(f"{unreadable:,} of {len(paths):,} pictures could not be read", file=sys.stderr)
        sys.exit(1 if results else 2)


# ---------------------------------------------------------------- beyond the main path


def get_args_parser():
    description, _, examples = __doc__.strip().partition("\n\n")
    parser = utils.ArgumentParser(description=description, examples=examples)
    flag, switch = parser.add_argument, functools.partial(parser.add_argument, action="store_true")
    text = "picture files, folders of pictures, or patterns in quotes such as 'trip/*.jpg'"
    flag("--img", nargs="+", required=True, metavar="PICTURE", help=text)
    switch("--recursive", help="look into the sub-folders of folders too")
    utils.add_captioning_flags(parser)
    text = "captions printed per picture, best first; at most --beam_size"
    flag("--n_best", type=utils.bounded(int, 1, 100), default=1, help=text)
    text = "pictures captioned together; lower it if memory runs out"
    flag("--batch_size", type=utils.bounded(int, 1, 65536), default=32, help=text)
    flag("--output_folder", type=Path, default=Path("captions"), help="folder for the drawings")
    switch("--no_plot", help="draw no <picture>_attention.png, print only")
    switch("--gif", help="also draw <picture>_attention.gif, word by word")
    switch("--show", help="also open each drawing in a window, where there is a screen")
    text = "also write all captions to this file; - is standard output, with nothing else on it"
    flag("--json", type=Path, help=text)
    switch("--force", help="let --json and --html replace a file of another kind")
    return parser


def check_flags(args):
    """:raises UserError: for flags that do not fit each other, or name what cannot be written"""
    if args.n_best > args.beam_size:
        raise UserError(f"--n_best {args.n_best}: expected at most --beam_size {args.beam_size}")
    if args.no_plot and (args.gif or args.show):
        raise UserError("--no_plot draws nothing, so --gif and --show cannot be had with it")
    if args.json:
        args.json = utils.output_path(args.json, args.force)
    if args.html:
        utils.output_path(args.html, args.force, page=True)
    if not args.no_plot:
        utils.check_disk(args.output_folder, 0)
    # Pillow and matplotlib warn of pictures and letters, which are named in our own words
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", message="Glyph .* missing")


def load(args):
    """The captioner that ``--model`` names, and the options of its beam search, as a dict."""
    device = utils.pick_device(args.device)
    word_map = datasets.load_word_map(args.word_map) if args.word_map else None
    captioner = models.load_captioner(models.run_checkpoint(args.model), device, word_map)
    captioner.decoder.sample_location = args.sample_location
    options = utils.search_options(args) | {"beam_size": args.beam_size, "n_best": args.n_best}
    options["with_alphas"] = bool(args.html) or not args.no_plot
    if args.consensus:
        name, known = captioner.config["data_name"], (args.consensus, args.workers)
        if not name:
            raise UserError(f"--consensus: {args.model} does not say on what it was trained")
        # in the arithmetic of the training, so that the features that it stored serve
        with utils.autocast(device, captioner.config.get("amp", args.amp)):
            options["consensus"] = models.Consensus.of([captioner], args.data_folder, name, *known)
    return captioner, options


# ---------------------------------------------------------------- find and read


def find_pictures(patterns, recursive=False):
    """Files named by paths, folders and patterns, each once, in order.

    :raises UserError: if one of them matches no picture
    """
    paths = {}
    for pattern in patterns:
        path, skipped = Path(pattern), ""
        try:
            if path.is_dir():
                files, skipped = _pictures_of(path, recursive)
            else:
                files = [path] if path.exists() else _matches(pattern)
        except (OSError, ValueError) as error:  # a name too long, a folder that may not be read
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--img {pattern}: {reason}") from error
        if not files:
            what = f"is a folder without pictures{skipped}" if path.is_dir() else "matches no file"
            raise UserError(f"--img {pattern}: {what}; expected pictures, folders or patterns")
        if skipped:
            utils.note(f"in {utils.printable(path)}{skipped}")
        for file in files:
            paths.setdefault(os.path.abspath(file), file)
    return list(paths.values())


def _pictures_of(folder, recursive):
    """The pictures of a folder, and what else lies in it, by kind and number."""
    Image.init()
    readable = {name for name in Image.OPEN if Image.MIME.get(name, "").startswith("image/")}
    files, skipped = [], collections.Counter()
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        suffix = path.suffix.lower()
        if path.is_dir():
            skipped["sub-folders (see --recursive)"] += not recursive
        elif path.name.startswith(".") or not path.is_file() or _is_drawing(path):
            skipped["hidden files" if path.name.startswith(".") else "attention drawings"] += 1
        elif Image.registered_extensions().get(suffix) in readable:
            files.append(path)
        else:
            skipped[suffix or "without an ending"] += 1
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in (+skipped).items())
    return files, f", skipped: {kinds}" if kinds else ""


def _is_drawing(path):
    return path.stem.endswith("_attention") and path.suffix in (".png", ".gif")


def _matches(pattern):
    """Files that a pattern matches; a folder that exists is no pattern, brackets and all."""
    folder = next(parent for parent in Path(pattern).parents if parent.exists())
    names = glob.glob(str(Path(pattern).relative_to(folder)), root_dir=folder, recursive=True)
    files = [folder / name for name in sorted(names)]
    return [path for path in files if path.is_file() and not _is_drawing(path)]


def read_picture(size, drawn, say, path):
    """A picture as it is drawn, if it is, and as the model sees it; None if it cannot be read.

    :return: (path, PIL image or None, uint8 (3, size, size))
    """
    try:
        picture = datasets.open_image(path, size=size)
    except UserError as error:
        say(f"left out: {error}", file=sys.stderr)
        return None
    square = datasets.resize_image(picture, size)
    picture.thumbnail((1024, 1024))  # many pictures wait in memory, and none is drawn larger
    return path, picture if drawn else None, square


def report(path, hypotheses, captioner, say):
    """Print a picture's captions; return them as a JSON-ready dict.

    It has an ``image_id`` if the file is called as COCO's are: by twelve digits.
    """
    captions, lines = [], []
    for h in hypotheses:
        said = " ".join(captioner.text(h))
        scores = {"log_prob": h.log_prob, "score": h.score, "ended": h.ended}
        captions.append({"caption": said} | scores)
        lines.append(f"{said}  (log-probability {h.log_prob:.2f}, score {h.score:.3f})")
    numbered = "".join(f"\n{i:>4}. {line}" for i, line in enumerate(lines, 1))
    say(f"{utils.printable(path)}:{numbered if len(lines) > 1 else f' {lines[0]}'}")
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", path.stem)
    # Linux allows names that are no text
    result = {"image": str(path).encode("utf-8", "replace").decode(), "captions": captions}
    return {"image_id": int(number[1])} | result if number else result


# ---------------------------------------------------------------- the page


def page_entry(path, picture, captioner, hypotheses, encoder_out, args):
    """A picture and its captions, as ``utils.write_page`` wants them."""
    captions = []
    for hypothesis in hypotheses:
        with utils.autocast(captioner.device, args.amp):
            likely = alternatives(captioner, encoder_out, hypothesis)
        score, log_prob = f"{hypothesis.score:.3f}", f"{hypothesis.log_prob:.2f}"
        scores, words = {"score": score, "log-probability": log_prob}, captioner.text(hypothesis)
        captions.append(utils.page_caption(words, hypothesis, scores, likely))
    return {"name": str(path), "captions": captions} | utils.page_picture(picture, 480)


def alternatives(captioner, encoder_out, hypothesis, count=5):
    """What a model could have said at each word of a caption, after the words before it.

    :param encoder_out: float (n, encoder_dim), of the picture
    :return: list (words) of lists of (word, probability), likeliest first
    """
    word_map, device = captioner.word_map, encoder_out.device
    said = [word_map[datasets.START], *hypothesis.words, word_map[datasets.END]]
    caption = torch.tensor([said], device=device), [len(said) - 1]
    only = torch.zeros(1, dtype=torch.long, device=device)  # the one picture of the caption
    with torch.no_grad():
        scores = captioner.decoder(encoder_out.unsqueeze(0), *caption, only).scores
    probabilities = scores.softmax(dim=1)  # (num_words + 1, vocab_size), the last of the end
    probabilities[:, datasets.special_tokens(word_map)] = 0  # which are never said
    best = probabilities[:-1].topk(min(count, len(word_map)))  # (num_words, count)
    pairs = zip(best.values.tolist(), best.indices.tolist())
    return [[(captioner.words[i], round(p, 4)) for p, i in zip(*pair)] for pair in pairs]


# ---------------------------------------------------------------- draw

INK, FAINT = "#1e1e22", "#787880"


def draw(path, picture, captioner, hypothesis, args, say):
    """Write the attention sheet (and animation) of one caption into the output folder."""
    words, alphas = captioner.text(hypothesis), hypothesis.alphas
    fonts, file = font_families("".join(captioner.words)), io.BytesIO()
    png, source = sheet_path(path, args.output_folder)
    # encoded in memory and written once, so that a full disk is one message
    sheet = attention_sheet(picture, words, alphas, fonts)
    sheet.savefig(file, format="png", metadata={"Source": source}, pil_kwargs={"compress_level": 3})
    drawings = {png: file.getvalue()}
    if args.gif:
        import imageio.v3 as iio

        frames = attention_frames(picture, words, alphas, fonts)
        gif = iio.imwrite("<bytes>", frames, extension=".gif", duration=700, loop=0, bits=5)
        drawings[png.with_suffix(".gif")] = gif
    for drawing, data in drawings.items():
        with utils.atomic_path(drawing) as temporary:
            temporary.write_bytes(data)
        say(f"    {utils.printable(drawing)}")
    if args.show:
        show(png)


def sheet_path(path, folder):
    """Where a picture's sheet goes: numbered on while another picture's has the name.

    :return: (path of the PNG file, digest of the picture's path, which the file keeps)
    """
    source = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    stem = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in path.stem)
    stem = stem.encode()[:200].decode(errors="ignore")  # names of files end at 255 bytes
    for number in itertools.count(1):
        png = datasets.attention_path(folder, stem if number == 1 else f"{stem}_{number}", "png")
        try:
            with Image.open(png) as sheet:
                if sheet.info.get("Source") == source:
                    return png, source
        except FileNotFoundError:
            return png, source
        except OSError:
            continue  # no picture, and so not ours to replace


@functools.cache
def font_families(letters):
    """Fonts that have these letters: DejaVu Sans, and the system's best for those that it lacks."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    logging.getLogger(font_manager.__name__).setLevel(logging.ERROR)  # else it tells of weights
    own = "DejaVu Sans"  # comes with matplotlib and speaks most alphabets
    missing = set(map(ord, letters)) - FT2Font(font_manager.findfont(own)).get_charmap().keys()
    if not missing:
        return [own]
    fonts = [font for font in font_manager.fontManager.ttflist if os.path.exists(font.fname)]
    fonts = [font for font in fonts if "Last Resort" not in font.name]  # boxes for every letter
    lacks = {font.name: missing - FT2Font(font.fname).get_charmap().keys() for font in fonts}
    best = min(lacks, key=lambda name: len(lacks[name]))
    if lacks[best]:
        letters = "".join(map(chr, sorted(lacks[best])[:8]))
        utils.note(
            f"no font here has {letters}, drawn as boxes; install one that has, such as Noto "
            "(Debian, Ubuntu: apt install fonts-noto-cjk for Chinese, Japanese and Korean, else "
            "fonts-noto-core)"
        )
    return [own] if lacks[best] == missing else [own, best]


def spotlight(picture, alpha):
    """The picture, lit where attention was; the brightest place is the largest weight.

    :param alpha: float tensor (num_pixels,)
    :return: uint8 (height, width, 3)
    """
    from skimage.transform import resize

    side, pixels = math.isqrt(len(alpha)), np.asarray(picture, np.float32)
    # even weights light the whole picture evenly and not fully: nothing was singled out
    weights = alpha.view(side, side).numpy() / max(float(alpha.max()), 4 / len(alpha))
    light = resize(weights, pixels.shape[:2], order=3, mode="edge").clip(0, 1)[..., None]
    dim = 0.22 * pixels.mean(axis=2, keepdims=True) + 18
    return (light * pixels + (1 - light) * dim).astype(np.uint8)


def attention_sheet(picture, words, alphas, fonts=None):
    """One panel per word, the picture lit where the model looked as it said the word.

    :param alphas: float tensor (num_words, num_pixels)
    :param fonts: see :func:`font_families`
    :return: matplotlib figure, 100 dots per inch
    """
    scale = 230 / math.sqrt(picture.width * picture.height)  # panels have the area of 230 x 230
    small = _scaled(picture, scale, 90)
    panels = [("the picture", np.asarray(small))]
    panels += [(word, spotlight(small, alpha)) for word, alpha in zip(words, alphas)]
    # as many columns as bring the sheet near the shape of a screen
    columns = round(math.sqrt(1.7 * len(panels) * (small.height + 42) / (small.width + 12)))
    columns = min(max(columns, 2), len(panels))
    places = torch.special.entr(alphas).sum(dim=1).exp().mean()  # exp of the entropy
    note = f"attention spread over {places:.0f} of {alphas.shape[1]} places" if words else ""
    return _page(panels, columns, " ".join(words) or "(no words)", note, fonts)


def attention_frames(picture, words, alphas, fonts=None):
    """Frames of an animation: the light moves word by word over the picture.

    :return: list of uint8 (height, width, 3)
    """
    # a GIF of 32 colours and so many pixels in all stays below 600 KB
    scale = math.sqrt(800_000 / (len(words) + 2) / picture.width / picture.height)
    scale = min(1, scale, 480 / max(picture.size))
    small = _scaled(picture, scale, 160)
    whole = ("", np.asarray(small))
    views = [(word, spotlight(small, alpha)) for word, alpha in zip(words, alphas)]
    pages = (_page([view], 1, " ".join(words), "", fonts) for view in [whole, *views, whole])
    return [np.asarray(page.canvas.buffer_rgba())[..., :3] for page in pages]


def _scaled(picture, scale, least_width):
    width, height = round(picture.width * scale), round(picture.height * scale)
    return picture.resize((max(width, least_width), max(height, 60)))


def _page(panels, columns, caption, note, fonts):
    """A caption, a note in small letters, and below them panels in rows.

    :param panels: list of (label, uint8 (height, width, 3)), all of one size
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    high, wide, _ = panels[0][1].shape
    gap, band, margin = 12, 30, 20
    room, rows = columns * (wide + gap) - gap, math.ceil(len(panels) / columns)
    lines = textwrap.wrap(caption, max(12, room // 11), break_long_words=False)
    top = margin + 28 * len(lines) + (24 if note else 0)
    width, height = room + 2 * margin, top + rows * (high + band + gap) - gap + margin
    figure = Figure((width / 100 + 0.001, height / 100 + 0.001), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)

    def write(text, x, y, size, room, color=INK):
        label = figure.text(x / width, 1 - y / height, text, color=color, family=fonts)
        label.set(size=0.72 * size, parse_math=False)  # points of 1/72 inch from pixels of 1/100
        while label.get_window_extent().width > room and label.get_size() > 1:
            label.set_size(0.9 * label.get_size())

    for row, line in enumerate(lines):
        write(line, margin, margin + 20 + 28 * row, 20, room)
    write(note, margin, top - 8, 14, room, FAINT)
    for i, (label, image) in enumerate(panels):
        x, y = margin + i % columns * (wide + gap), top + i // columns * (high + band + gap) + band
        write(label, x, y - 8, 17, wide, INK if i or len(panels) == 1 else FAINT)
        figure.figimage(image, x, height - y - high)
    figure.canvas.draw()
    return figure


def show(png):
    """Open a window with the sheet, or say why there is none."""
    from PIL import ImageShow

    screen = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    with Image.open(png) as sheet:
        if not screen or not ImageShow.show(sheet):
            print(f"--show: there is no screen here; the picture is {png}", file=sys.stderr)


if __name__ == "__main__":
    utils.run(main, get_args_parser())
