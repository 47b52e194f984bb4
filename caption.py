"""Caption pictures and draw where the model looked at each word.

python caption.py --img photo.jpg --model checkpoints
python caption.py --img photo.jpg --model checkpoints --n_best 3 --gif
python caption.py --img trip/ --html trip.html --json trip.json
"""

import functools
import itertools
import sys
import warnings
from pathlib import Path

if sys.flags.safe_path:
    sys.exit("caption.py: error: unset PYTHONSAFEPATH, which hides this suite's files")

import utils
from captioning.run import command_line, files, machine, messages, paths
from captioning.run.lazy import lazy
from utils import UserError

np, torch, datasets, models = lazy("numpy", "torch", "datasets", "models")
finding, words, utterances, lists, page, sheets = lazy(
    "data.finding", "data.words", "model.utterances", "report.lists", "report.page",
    "report.sheets", within="captioning",
)  # fmt: skip


def main(args):
    """Find the pictures; caption them batch by batch; print, draw and keep what was said."""
    check_flags(args)
    image_paths = finding.find_pictures(args.img, args.recursive)
    captioner, options = load(args)
    count, few = len(image_paths), len(image_paths) <= args.batch_size
    bar = utils.progress(total=count, desc="captioning", unit="picture", disable=few)
    to_stdout = Path("-") in args.lists.values()
    say = functools.partial(bar.write, file=sys.stderr if to_stdout else sys.stdout)
    read = functools.partial(read_picture, captioner.image_size, options["with_alphas"], bar.write)
    pictures = machine.read_ahead(read, image_paths, args.workers, ahead=args.batch_size)
    pictures = filter(None, pictures)  # without those that cannot be read
    results, shown = [], []
    try:
        while batch := list(itertools.islice(pictures, args.batch_size)):
            images = np.stack([square for _, _, square in batch])  # (B, 3, S, S)
            with machine.autocast(captioner.device, args.amp):
                encoder_out = captioner.encode(torch.from_numpy(images))
                model = [captioner.decoder], [encoder_out], captioner.word_map
                found = models.beam_search(*model, **options)
            for (path, picture, _), hypotheses, out in zip(batch, found, encoder_out):
                results.append(report(path, hypotheses, captioner, say))
                if args.html:
                    shown.append(page_entry(path, picture, captioner, hypotheses, out, args))
                if not args.no_plot:
                    drawn = captioner, hypotheses[0], args.output_folder
                    sheets.draw(path, picture, *drawn, say, args.gif, args.show)
            bar.update(len(batch))
    finally:  # what is done is kept, whatever stops the rest
        bar.close()
        for kind, path in args.lists.items() if results else ():
            lists.write_list(kind, path, results)
            print(f"written: {messages.printable(path)}", file=sys.stderr)
        if args.html and shown:
            lead = f"by {args.model or 'the captioner of the suite'}, beam size {args.beam_size}"
            lead += "; below each word its probability in %"
            shown = {"title": "Captions", "lead": lead, "alternatives": True, "pictures": shown}
            page.write_page(args.html, shown)
            print(f"written: {messages.printable(args.html)}", file=sys.stderr)
    if unreadable := len(image_paths) - len(results):
        print(f"{unreadable:,} of {len(image_paths):,} pictures could not be read", file=sys.stderr)
        sys.exit(1 if results else 2)


def load(args):
    """The captioner that ``--model`` names, and the options of its beam search, as a dict."""
    device = machine.pick_device(args.device)
    word_map = datasets.load_word_map(args.word_map) if args.word_map else None
    captioner = models.load_captioner(args.model, device, word_map)
    captioner.decoder.sample_location = args.sample_location
    if args.head:
        heads = getattr(captioner.decoder, "heads", 0)
        if args.head > heads:
            has = f"{heads} heads" if heads else "no heads, which the Transformer has"
            raise UserError(f"--head {args.head}: the model has {has}")
        captioner.decoder.shown_head = args.head - 1
    options = command_line.search_options(args) | {"n_best": args.n_best}
    options["with_alphas"] = bool(args.html) or not args.no_plot
    if args.consensus:
        name = captioner.config["data_name"]
        if not name:
            raise UserError(f"--consensus: {args.model} does not say on what it was trained")
        data = datasets.CaptionDataset(paths.split_path(args.data_folder, "train", name))
        how = args.consensus, args.workers, args.amp
        options["consensus"] = models.Consensus.of([captioner], data, *how)
    return captioner, options


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
    """Print a picture's captions; return what is kept of them (see ``lists.result``)."""
    captions, lines = [], []
    for h in hypotheses:
        said = words.join_words(captioner.text(h))
        scores = {"log_prob": h.log_prob, "score": h.score, "ended": h.ended}
        captions.append({"caption": said} | scores)
        lines.append(f"{said}  (log-probability {h.log_prob:.2f}, score {h.score:.3f})")
    numbered = "".join(f"\n{i:>4}. {line}" for i, line in enumerate(lines, 1))
    say(f"{messages.printable(path)}:{numbered if len(lines) > 1 else f' {lines[0]}'}")
    return lists.result(path, captions)


def page_entry(path, picture, captioner, hypotheses, encoder_out, args):
    """A picture and its captions, as ``page.write_page`` wants them."""
    captions = []
    for hypothesis in hypotheses:
        with machine.autocast(captioner.device, args.amp):
            likely = utterances.alternatives(captioner, encoder_out, hypothesis)
        score, log_prob = f"{hypothesis.score:.3f}", f"{hypothesis.log_prob:.2f}"
        scores, said = {"score": score, "log-probability": log_prob}, captioner.text(hypothesis)
        captions.append(page.page_caption(said, hypothesis, scores, likely))
    picture = page.page_picture(picture, args.page_side)
    return {"name": path.as_posix(), "captions": captions} | picture


def get_args_parser():
    parser = command_line.ArgumentParser(__doc__)
    flag, switch = parser.add_argument, functools.partial(parser.add_argument, action="store_true")
    text = "picture files, folders of pictures, or patterns in quotes such as 'trip/*.jpg'"
    flag("--img", nargs="+", required=True, metavar="PICTURE", help=text)
    switch("--recursive", help="look into the sub-folders of folders too")
    command_line.add_captioning_flags(parser)
    text = (
        "captions printed per picture, best first; at most --beam_size. For several the search goes"
        " on longer, so that the first may be a better one"
    )
    flag("--n_best", type=command_line.bounded(int, 1, 100), default=1, help=text)
    text = "pictures captioned together; lower it if memory runs out"
    flag("--batch_size", type=command_line.bounded(int, 1, 65536), default=32, help=text)
    text = (
        "folder for the drawings (default: captions; with --html none are drawn if it is left out)"
    )
    flag("--output_folder", type=Path, help=text)
    switch("--no_plot", help="draw no <picture>_attention.png, print only")
    switch("--gif", help="also draw <picture>_attention.gif, word by word")
    text = "of a Transformer draw this head of the last layer, counted from 1 (default: their mean)"
    flag("--head", type=command_line.bounded(int, 1, 64), metavar="K", help=text)
    switch("--show", help="also open each drawing in a window, where there is a screen")
    text = "also write all captions to this file; - is standard output, with nothing else on it"
    flag("--json", type=Path, help=text)
    flag("--csv", type=Path, help="the same as a table for spreadsheets, a row for each caption")
    text = "the same as lines of picture#number, tab, caption, which create_input_files.py reads"
    flag("--txt", type=Path, help=text)
    switch("--force", help="let --json, --csv, --txt and --html replace a file of another kind")
    return parser


def check_flags(args):
    """:raises UserError: for flags that do not fit each other, or name what cannot be written"""
    if args.n_best > args.beam_size:
        raise UserError(f"--n_best {args.n_best}: expected at most --beam_size {args.beam_size}")
    if args.no_plot and (args.gif or args.show):
        raise UserError("--no_plot draws nothing, so --gif and --show cannot be had with it")
    args.lists = lists.list_paths(args.force, json=args.json, csv=args.csv, txt=args.txt)
    if args.html:
        page.page_path(args.html, args.force)
    # a page shows what drawings show: beside it they are drawn if another flag asks for them
    args.no_plot |= bool(args.html) and not (args.output_folder or args.gif or args.show)
    args.output_folder = args.output_folder or Path("captions")
    if not args.no_plot:
        files.check_disk(args.output_folder, 0)
    # Pillow and matplotlib warn of pictures and letters, which are named in our own words
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", message="Glyph .* missing")


if __name__ == "__main__":
    utils.run(main, get_args_parser())
