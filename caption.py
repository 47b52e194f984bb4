"""Caption pictures and draw where the model looked at each word.

python caption.py --img photo.jpg --model checkpoints/BEST_checkpoint_flickr8k_5_cap_per_img_5_min_word_freq.pth.tar
python caption.py --img holiday/ 'more/*.png' --model MODEL --beam_size 3 --n_best 3 --json captions.json --no_plot
python caption.py --img photo.jpg --model MODEL --gif
"""

import argparse
import glob
import importlib.util
import itertools
import math
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import datasets
import models
import utils
from utils import UserError

INK, FAINT, PAPER = (30, 30, 34), (120, 120, 128), (255, 255, 255)


def get_args_parser():
    parser = argparse.ArgumentParser(description="Caption pictures.")
    parser.add_argument(
        "--img",
        nargs="+",
        required=True,
        metavar="PICTURE",
        help="picture files, folders of pictures, or patterns in quotes such as 'trip/*.jpg'",
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="CHECKPOINT",
        help="checkpoint written by train.py; it says itself what model it holds",
    )
    parser.add_argument(
        "--word_map",
        type=Path,
        help="word map, checked against the checkpoint's own (default: not needed, except for a "
        "checkpoint of the PyTorch captioning tutorial, which keeps none)",
    )
    parser.add_argument(
        "--data_folder",
        type=Path,
        default=Path("data"),
        help="with --consensus: folder with the data that the model was trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--n_best",
        type=int,
        default=1,
        help="captions printed per picture, at most beam_size (default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=32,
        help="pictures captioned together; lower it if memory runs out (default: %(default)s)",
    )
    parser.add_argument(
        "--output_folder",
        type=Path,
        default=Path("captions"),
        help="folder for the attention pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--no_plot",
        action="store_true",
        help="print captions only (default: draw <picture>_attention.png)",
    )
    parser.add_argument(
        "--gif",
        action="store_true",
        help="also draw <picture>_attention.gif, the gaze moving word by word",
    )
    parser.add_argument(
        "--show", action="store_true", help="also open a window, where there is a screen"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all captions to this file"
    )
    utils.add_search_flags(parser)
    utils.add_device_flags(parser)
    return parser


def check_ranges(args, **bounds):
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} {value}: expected a value from {low} to {high}")


def main(args):
    warnings.filterwarnings(
        "ignore", module=r"PIL\."
    )  # what is wrong with a picture is said in our own words
    check_ranges(args, n_best=(1, args.beam_size), batch_size=(1, 65536))
    if args.json and args.json.is_dir():
        raise UserError(
            f"--json {args.json} is a folder; expected a file, {args.json / 'captions.json'} for example"
        )
    if args.no_plot and (args.gif or args.show):
        raise UserError("--no_plot draws nothing, so --gif and --show cannot be had with it")
    paths = find_pictures(args.img)
    device = utils.pick_device(args.device)
    word_map = datasets.load_word_map(args.word_map) if args.word_map else None
    captioner = models.load_captioner(args.model, device, word_map)
    captioner.decoder.sample_location = args.sample_location
    dtype = torch.bfloat16 if args.amp else torch.float32
    consensus = None
    if args.consensus:
        name = captioner.config["data_name"]
        if not name:
            raise UserError(
                f"{args.model} does not say on what it was trained, so --consensus cannot be had with it"
            )
        known = models.described_pictures([captioner], args.data_folder, name, dtype, args.workers)
        consensus = models.Consensus([captioner], *known, args.consensus)

    def load(path):
        return read_picture(path, captioner.image_size, not args.no_plot)

    results, unreadable, names = [], 0, set()
    with utils.progress(
        total=len(paths), unit="picture", disable=len(paths) <= args.batch_size
    ) as bar:
        waiting = datasets.read_ahead(load, paths, args.workers, ahead=args.batch_size)
        while loaded := list(itertools.islice(waiting, args.batch_size)):
            pictures = [picture for picture in loaded if not isinstance(picture[1], UserError)]
            for path, error in (
                picture[:2] for picture in loaded if isinstance(picture[1], UserError)
            ):
                bar.write(f"left out: {error}", file=sys.stderr)
                unreadable += 1
            if pictures:
                images = torch.from_numpy(np.stack([square for _, _, square in pictures]))
                found = captioner.caption(
                    images,
                    dtype,
                    beam_size=args.beam_size,
                    n_best=args.n_best,
                    length_penalty=args.length_penalty,
                    max_decode_steps=args.max_decode_steps,
                    with_alphas=not args.no_plot,
                    consensus=consensus,
                )
                for (path, picture, _), hypotheses in zip(pictures, found):
                    results.append(report(path, hypotheses, captioner, bar))
                    if not args.no_plot:
                        draw(path, picture, hypotheses[0], captioner, args, names, bar)
            bar.update(len(loaded))
    if not results:
        raise UserError(f"none of the {len(paths)} pictures could be read")
    if unreadable:
        print(f"{unreadable} of {len(paths)} pictures left out", file=sys.stderr)
    if args.json:
        utils.write_json(args.json, results)


def find_pictures(patterns):
    """Files named by paths, folders and patterns, each once, in order.

    :raises UserError: if one of them matches no picture
    """
    paths = {}
    for pattern in patterns:
        path = Path(pattern)
        try:
            if path.is_dir():
                found = sorted(
                    p
                    for p in path.iterdir()
                    if p.suffix.lower() in datasets.PICTURE_SUFFIXES and p.is_file()
                )
            elif path.exists():
                found = [path]
            else:
                found = [
                    Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if Path(p).is_file()
                ]
        except (OSError, ValueError) as error:  # a name too long, a folder that may not be read
            raise UserError(
                f"--img {pattern}: {getattr(error, 'strerror', None) or error}"
            ) from error
        if not found:
            what = "is a folder without pictures" if path.is_dir() else "matches no file"
            raise UserError(
                f"--img {pattern}: {what}; expected a picture, a folder of pictures or a pattern"
            )
        paths.update(dict.fromkeys(found))
    return list(paths)


def read_picture(path, image_size, drawn=True):
    """A picture as it is drawn, if it is, and as the model sees it, or why it cannot be read.

    :return: (path, PIL image or None, uint8 (3, image_size, image_size)) or (path, UserError)
    """
    try:
        picture = datasets.open_image(path, size=image_size)
    except UserError as error:
        return path, error
    square = datasets.resize_image(picture, image_size)
    picture.thumbnail((1024, 1024))  # many pictures wait in memory, and none is drawn larger
    return path, picture if drawn else None, square


def report(path, hypotheses, captioner, bar):
    """Print a picture's captions; return them as a JSON-ready dict."""
    captions = [
        {
            "caption": " ".join(captioner.text(h)),
            "log_prob": h.log_prob,
            "score": h.score,
            "ended": h.ended,
        }
        for h in hypotheses
    ]
    first, *others = [f"{c['caption']}  (log-probability {c['log_prob']:.2f})" for c in captions]
    bar.write(
        "\n".join([f"{utils.printable(path)}: {first}", *(" " * 4 + line for line in others)]),
        file=sys.stdout,
    )
    # Linux allows names that are no text
    return {"image": str(path).encode("utf-8", "replace").decode(), "captions": captions}


# -------------------------------------------------------------------------------------------------------- drawing


def draw(path, picture, hypothesis, captioner, args, names, bar):
    """Write the attention picture (and animation) of one caption into the output folder."""
    words = captioner.text(hypothesis)
    stem = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in path.stem)
    stem = stem.encode()[:200].decode(
        errors="ignore"
    )  # names of files end at 255 bytes, and ours is longer
    name, number = stem, 2
    while name in names:  # a/cat.jpg and b/cat.png both want to be cat
        name, number = f"{stem}_{number}", number + 1
    names.add(name)
    sheet = attention_sheet(picture, words, hypothesis.alphas)
    png = datasets.attention_path(args.output_folder, name, "png")
    with utils.atomic_path(png) as temporary:
        sheet.save(temporary)
    bar.write(f"    {utils.printable(png)}", file=sys.stdout)
    if args.gif:
        import imageio.v3

        gif = datasets.attention_path(args.output_folder, name, "gif")
        with utils.atomic_path(gif) as temporary:
            imageio.v3.imwrite(
                temporary, attention_frames(picture, words, hypothesis.alphas), duration=700, loop=0
            )
        bar.write(f"    {utils.printable(gif)}", file=sys.stdout)
    if args.show:
        show(sheet, png)


def font(size):
    """DejaVu Sans, which speaks most alphabets and comes with matplotlib (found, not imported: that takes a second)."""
    folder = importlib.util.find_spec("matplotlib").submodule_search_locations[0]
    return ImageFont.truetype(
        os.path.join(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf"), size
    )


def spotlight(picture, alpha):
    """The picture, lit where attention was and dim elsewhere; the brightest place is the largest weight.

    :param picture: PIL image
    :param alpha: float tensor (num_pixels,)
    :return: PIL image
    """
    side = math.isqrt(len(alpha))
    weights = alpha.view(side, side).numpy()
    # even weights light the whole picture evenly and not fully: nothing was singled out
    light = Image.fromarray(weights / max(weights.max(), 4 / len(alpha))).resize(
        picture.size, Image.Resampling.BICUBIC
    )
    light = np.clip(np.asarray(light), 0, 1)[..., None]
    pixels = np.asarray(picture, np.float32)
    dim = 0.22 * pixels.mean(axis=2, keepdims=True) + 18
    return Image.fromarray((light * pixels + (1 - light) * dim).astype(np.uint8))


def fit_text(canvas, text, width, size):
    """A text and the largest font up to ``size`` in which it is at most ``width`` wide; cut if nothing else helps."""
    while size > 9 and canvas.textlength(text, font(size)) > width:
        size -= 1
    while len(text) > 1 and canvas.textlength(text, font(size)) > width:
        text = text[:-2] + "…"
    return text, font(size)


def wrap_text(canvas, text, width, face):
    """Break a text into lines of at most ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and canvas.textlength(longer, face) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def attention_sheet(picture, words, alphas):
    """One panel per word, the picture lit where the model looked as it said the word.

    :param picture: PIL image
    :param words: list of words
    :param alphas: float tensor (num_words, num_pixels)
    :return: PIL image
    """
    width, height = picture.size
    scale = math.sqrt(230 * 230 / (height * width))
    panel = max(90, round(width * scale)), max(60, round(height * scale))
    small = picture.resize(panel, Image.Resampling.LANCZOS)
    panels = [("", small)] + [(word, spotlight(small, alpha)) for word, alpha in zip(words, alphas)]
    gap, band, margin = 12, 30, 20
    # as many columns as bring the sheet near the shape of a screen
    columns = min(
        range(1, len(panels) + 1),
        key=lambda n: abs(
            math.log(
                n * (panel[0] + gap) / (math.ceil(len(panels) / n) * (panel[1] + band + gap)) / 1.7
            )
        ),
    )
    columns = max(columns, min(2, len(panels)))
    rows = math.ceil(len(panels) / columns)
    sheet_width = 2 * margin + columns * (panel[0] + gap) - gap
    title = font(20)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = wrap_text(ruler, " ".join(words) or "(no words)", sheet_width - 2 * margin, title)
    top = margin + 28 * len(lines) + 6
    sheet = Image.new(
        "RGB", (sheet_width, top + rows * (panel[1] + band + gap) - gap + margin), PAPER
    )
    canvas = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        canvas.text((margin, margin + 28 * i), line, INK, title)
    for i, (word, image) in enumerate(panels):
        x = margin + i % columns * (panel[0] + gap)
        y = top + i // columns * (panel[1] + band + gap)
        text, face = fit_text(canvas, word or "the picture", panel[0], 17)
        canvas.text((x, y + band - 8), text, INK if word else FAINT, face, anchor="ls")
        sheet.paste(image, (x, y + band))
    return sheet


def attention_frames(picture, words, alphas):
    """Frames of an animation: the gaze moves over the picture while the caption grows below it.

    :return: list of uint8 (height, width, 3)
    """
    width, height = picture.size
    scale = 480 / max(height, width)
    large = picture.resize(
        (max(160, round(width * scale)), max(60, round(height * scale))), Image.Resampling.LANCZOS
    )
    face = font(18)
    lines = wrap_text(ImageDraw.Draw(large), " ".join(words), large.width - 24, face)
    frames = []
    for i, view in enumerate(
        [large, *(spotlight(large, alpha) for alpha in alphas[: len(words)]), large]
    ):
        frame = Image.new("RGB", (large.width, large.height + 24 + 26 * len(lines)), PAPER)
        frame.paste(view)
        canvas, said = ImageDraw.Draw(frame), 0
        for row, line in enumerate(lines):
            x = 12
            for word in line.split():
                if said < i:
                    ink = INK if said == i - 1 or i > len(words) else FAINT
                    canvas.text((x, large.height + 12 + 26 * row), word, ink, face)
                x += canvas.textlength(word + " ", face)
                said += 1
        frames.append(np.asarray(frame))
    return frames


def show(sheet, png):
    """Open a window with the sheet, or say why there is none."""
    if sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        print(f"--show: there is no screen here; the picture is {png}", file=sys.stderr)
        return
    import matplotlib.pyplot as plt

    plt.figure(figsize=(sheet.width / 100, sheet.height / 100))
    plt.imshow(np.asarray(sheet))
    plt.axis("off")
    plt.tight_layout(pad=0)
    plt.show()


if __name__ == "__main__":
    utils.run(main, get_args_parser())
