"""The command line: a parser with hints, bounded numbers, and the flags that scripts share."""

import argparse
import contextlib
import os
import re
import sys
from pathlib import Path

from captioning.run.machine import own_cores
from captioning.run.messages import did_you_mean, one_line


class ArgumentParser(argparse.ArgumentParser):
    """argparse with hyphens for underscores, errors of one line that give a hint, and examples.

    :param doc: of a script: what it does, an empty line, and example commands for the end of --help
    :param presets: dict of flags to dicts of their values to defaults of other flags; later flags
        win over earlier ones
    """

    def __init__(self, doc=None, presets=None, **options):
        description, _, examples = (doc or "").strip().partition("\n\n")
        options |= {"formatter_class": _HelpFormatter, "allow_abbrev": False}
        super().__init__(description=description, **options)
        self.presets = presets or {}
        self._negative_number_matcher = re.compile(r"-(\d|\.|inf|nan)")
        self.epilog = "\n  ".join(["examples:", *examples.split("\n")]) if examples else None

    def parse_known_args(self, args=None, namespace=None):
        args = [self._as_declared(arg) for arg in (sys.argv[1:] if args is None else args)]
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name in self.presets:
            first.add_argument(f"--{name}", nargs="?")  # that a value is missing is said below
        given, _ = first.parse_known_args(args)
        namespace = namespace or argparse.Namespace()
        for name, table in self.presets.items():
            vars(namespace).update(table.get(getattr(given, name), {}))
        return super().parse_known_args(args, namespace)

    def _as_declared(self, arg):
        name, equals, value = arg.partition("=")
        if re.match("--.", name):
            name, known = "--" + name[2:].replace("-", "_"), self._option_string_actions
            if name not in known:
                hint = did_you_mean(name, known) or "; --help lists all flags"
                self.error(f"unknown flag {name}{hint}")
        elif re.match("-[^-h]", name) and not self._negative_number_matcher.match(name):
            self.error(f"{arg}: flags begin with two hyphens; write a file of that name ./{arg}")
        # a shell expands the ~ of --img ~/a.jpg, but not that of --img=~/a.jpg
        return name + equals + (os.path.expanduser(value) if equals else value)

    def _check_value(self, action, value):
        if action.choices and value not in action.choices:
            expected = f"expected {', '.join(action.choices)}{did_you_mean(value, action.choices)}"
            raise argparse.ArgumentError(action, f"{value}: {expected}")

    def error(self, message):
        message = re.sub(r"^argument (\S+): ", r"\1 ", message)
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Defaults where they mean something, and metavars that say what is expected."""

    def _get_help_string(self, action):
        said = "(default" in action.help or action.nargs == 0 or action.default in (None, "", [])
        return action.help if said else f"{action.help} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action):
        kinds = {int: "N", float: "X", Path: "FILE"}
        kind = kinds.get(getattr(action.type, "kind", action.type), "NAME")
        return "FOLDER" if action.dest.endswith("folder") else kind


class Switch(argparse.Action):
    """A flag that is on or off, with a second one to switch it off: ``--amp``, ``--no_amp``."""

    def __init__(self, option_strings, dest, default=False, help=None, **_):
        names = [*option_strings, f"--no_{dest}"]
        super().__init__(names, dest, nargs=0, default=default, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string != self.option_strings[-1])


def bounded(kind, low, high):
    """Type of a flag that takes an int or float from low to high: ``type=bounded(int, 1, 64)``."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:  # written so that nan fails too
                return value
        whole = ", a whole number" if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text}: expected a value from {low} to {high}{whole}")

    parse.kind = kind
    return parse


class IntoDict(argparse.Action):
    """Of several flags with one ``dest``: keeps their values in a dict, by the flags' names."""

    def __call__(self, parser, namespace, values, option_string=None):
        name = self.option_strings[0].removeprefix("--")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), name: values})


def add_device_flags(parser):
    """Flags of every script that runs a network."""
    add = parser.add_argument_group("machine").add_argument
    text = "auto, cpu, cuda, cuda:N (GPU number N) or mps; auto is the first GPU if there is one"
    add("--device", type=_device_name, default="auto", help=text)
    text = "do matrix products in bfloat16, which is faster on recent GPUs and CPUs than float32"
    add("--amp", action=Switch, help=text)
    text = "threads that read pictures; raise it if the device waits for them"
    add("--workers", type=bounded(int, 1, 256), default=min(8, len(own_cores())), help=text)


# what a search does unless it is told otherwise, from the prompt and from Python alike
BEAM_SIZE, LENGTH_PENALTY, MAX_DECODE_STEPS = 5, 0.7, 50


def add_search_flags(parser, several=False, no_repeat=False):
    """Flags of every script that utters captions.

    :param several: --beam_size takes several values
    :param no_repeat: the default of --no_repeat
    :return: function that adds flags to the same group
    """
    add = parser.add_argument_group("beam search").add_argument
    text = f"hypotheses kept per picture; 1 is greedy (default: {BEAM_SIZE})"
    size, several = bounded(int, 1, 100), {"nargs": "+", "default": [BEAM_SIZE]} if several else {}
    add("--beam_size", **{"type": size, "default": BEAM_SIZE, "help": text, **several})
    text = "rank by log-probability / length^this: raise it if captions are too short; 0 is plain"
    add("--length_penalty", type=bounded(float, 0, 10), default=LENGTH_PENALTY, help=text)
    text = "hard attention: look at a location drawn by its weight, instead of the likeliest"
    add("--sample_location", action="store_true", help=text)
    text = "say no word twice in succession, and no three words in a row a second time (default: "
    text += "on)" if no_repeat else "off, as in published tables)"
    add("--no_repeat", action=Switch, default=no_repeat, help=text)
    text = "longest caption, in words"
    add("--max_decode_steps", type=bounded(int, 1, 1000), default=MAX_DECODE_STEPS, help=text)
    return add


def add_captioning_flags(parser, several=False):
    """Flags of the scripts that caption with a trained model.

    :param several: or with more of them, to score them
    """
    add = parser.add_argument
    text = "checkpoint of train.py, or the folder of a run, for its best (default: the suite's own)"
    add("--model", type=Path, nargs="+" if several else None, help=text)
    text = "the model's own word map; checkpoints of the PyTorch tutorial need it"
    add("--word_map", type=Path, help=text)
    text = "folder with the files that create_input_files.py wrote"
    add("--data_folder", type=Path, default=Path("data"), help=text)
    text = "also write a page to look at: point at a word and see where the model looked"
    add("--html", type=Path, help=text)
    text = "longer side of the page's pictures, in pixels: lower it for a smaller file"
    add("--page_side", type=bounded(int, 32, 1024), default=200 if several else 480, help=text)
    text = (
        "among the captions of the beam prefer what people said of similar training pictures: add "
        "this x their CIDEr-D to the score (Mao et al. 2015); 0 is off, 0.8 with --beam_size 20 "
        "--length_penalty 1 does well; needs the training data in --data_folder"
    )
    # who looks at captions wants the better ones; who scores them, what others scored
    add = add_search_flags(parser, several, no_repeat=not several)
    add("--consensus", type=bounded(float, 0, 1000), default=0.0, metavar="WEIGHT", help=text)
    add_device_flags(parser)


def search_options(args):
    """The flags of beam search that all scripts hand on to ``models.beam_search``, as a dict."""
    return {
        "beam_size": args.beam_size,
        "length_penalty": args.length_penalty,
        "max_decode_steps": args.max_decode_steps,
        "no_repeat": args.no_repeat,
    }


def _device_name(name):
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise argparse.ArgumentTypeError(f"{name}: expected auto, cpu, cuda, cuda:N or mps")
    return name


def given_flags(parser):
    """The names of the flags that stand on the command line itself, a set."""
    plain = lambda words: {word.partition("=")[0].replace("-", "_") for word in words}
    words = plain(sys.argv[1:])
    return {action.dest for action in parser._actions if words & plain(action.option_strings)}


def changed_flags(parser, args):
    """The flags that are not as when left out: dict of their groups' titles to dicts."""
    groups = {}
    for group in parser._action_groups:
        for action in group._group_actions:
            value = getattr(args, action.dest, action.default)
            if value != action.default:
                groups.setdefault(group.title, {})[action.dest] = value
    return groups
