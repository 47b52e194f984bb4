"""Which runs a row or a plot of the pages shows: labels, and names without their seeds."""

import re


def without_seed(name):
    return re.sub(r"-seed\d+$", "", name)


def seeds(runs, name):
    """The runs that differ in their seed alone."""
    return [run for key, run in sorted(runs.items()) if without_seed(key) == name]


def scored(runs, name, split, beam):
    """The figures of those that were scored so, a dict for each seed."""
    rows = (run.get(split, {}).get("beams", {}).get(beam) for run in seeds(runs, name))
    return [row for row in rows if row]


FOCUS = {
    "Lite0, the default recipe": "lstm8",
    "Lite0, `--preset focus`": "focus",
    "ResNet-50, the default recipe": "xe50",
    "ResNet-50, `--preset focus`": "focus50",
    "ResNet-50, after four self-critical epochs": "fine50-scst",
}
GROUNDED = {
    "Lite0, the default recipe, eight epochs": "lstm8-h100",
    "… and three epochs more": "longer",
    "… and three with `--grounding 0.15`": "late0.15",
    "… and three with `--grounding 0.3`": "late0.3",
    "… and three with `--grounding 0.6`": "late0.6",
    "Lite0, eight epochs with `--grounding 0.15`": "focus-paper",
    "Lite0, `--preset focus`": "focus-h100",
    "… with `--feature_dropout 0.3`": "focus-fd3",
    "… with `--grounding 0.05`": "focus-w05",
    "ResNet-50, the default recipe, eight epochs": "xe50",
    "ResNet-50 … and three epochs more": "longer50",
    "ResNet-50 … and three with `--grounding 0.3`": "late50-0.3",
    "ResNet-50 … and three with `--grounding 0.6`": "late50-0.6",
    "ResNet-50, `--preset focus`": "focus50",
}
LOOKING = {  # the whole recipe, taught to look until the self-critical epochs
    "LSTM, stage 1": "look",
    "LSTM, 2": "look-fine",
    "LSTM, 3": "look-scst",
    "LSTM, 4": "look-mean",
    "LSTM, 3e": "look-scst8",
    "LSTM, 4e": "look-mean8",
    "LSTM, 4e and eight self-critical epochs more": "look-scst16",
    "LSTM, mean of 2 and those": "look-mean16",
    "LSTM, 5: from 4e, 320 pixels": "look320-fine",
    "LSTM, 6": "look320-scst",
    "LSTM, 7: mean of 5 and 6": "look320-mean",
    "LSTM, 8: mean of both seeds' 5 and 6": "look320-both",
    "LSTM, 6e: eight self-critical epochs": "look320-scst8",
    "LSTM, 7e: mean of 5 and 6e": "look320-mean8",
    "LSTM, 8e: mean of both seeds' 5 and 6e": "look320-both8",
    "Transformer, stage 1": "tlook",
    "Transformer, 2": "tlook-fine",
    "Transformer, 3": "tlook-scst",
    "Transformer, 4": "tlook-mean",
    "ResNet-50, LSTM, stage 1": "look50",
    "ResNet-50, LSTM, 2": "look50-fine",
    "ResNet-50, LSTM, 3e": "look50-scst8",
    "ResNet-50, LSTM, 4e": "look50-mean8",
}
SENTINEL = {
    "soft, three epochs": "lstm",
    "adaptive, three epochs": "adaptive",
    "adaptive, `--alpha_c 0`, three epochs": "adaptive-free",
    "soft, `--preset focus`": "focus",
    "adaptive, `--preset focus`": "adaptive-focus",
}
DECODERS = {"LSTM": "lstm8", "GRU": "gru8"}
DECODERS_OF_ALL_KINDS = DECODERS | {
    "Transformer": "transformer8",
    "ResNet-50, LSTM": "resnet50",
    "ResNet-50, GRU": "gru50",
    "ResNet-50, Transformer": "transformer50",
    "a quarter of the pictures, LSTM": "quarter-lstm",
    "a quarter of the pictures, GRU": "quarter-gru",
    "a quarter of the pictures, Transformer": "quarter-transformer",
}
TRANSFORMERS = {
    "Transformer, as it is": "transformer8",
    "… 256 wide (`--embed_dim 256 --decoder_dim 256`)": "transformer-narrow",
    "… one layer (`--layers 1`)": "transformer-one-layer",
    "… twelve epochs, dropout 0.4": "transformer12",
    "LSTM, as it is": "lstm8",
    "… with the Transformer's rate and dropout": "lstm-as-transformer",
}
SAMPLED = {  # eight epochs, the schedules falling to 0.25
    "LSTM": "lstm8",
    "LSTM, linear": "lstm8-linear",
    "LSTM, inverse sigmoid": "lstm8-inverse_sigmoid",
    "GRU": "gru8",
    "GRU, linear": "gru8-linear",
    "GRU, inverse sigmoid": "gru8-inverse_sigmoid",
}
THREE_EPOCHS = {  # the schedules falling to 0.75
    "LSTM": "lstm",
    "LSTM, linear": "lstm-linear",
    "LSTM, exponential": "lstm-exponential",
    "LSTM, inverse sigmoid": "lstm-inverse_sigmoid",
    "GRU": "gru",
    "GRU, linear": "gru-linear",
    "GRU, exponential": "gru-exponential",
    "GRU, inverse sigmoid": "gru-inverse_sigmoid",
}
RESNET_VGG = {"ResNet-50": "resnet50", "VGG-19": "vgg19"}
ENCODERS = RESNET_VGG | {"EfficientNet-Lite0": "lstm8"}
GRIDS = {"VGG-19, its own 16×16": "vgg16x16", "ResNet-50, third stage, 16×16": "stage50"}
PIXELS_320 = {
    "EfficientNet-Lite0, 320 pixels, 10×10": "px320",
    "ResNet-50, 320 pixels, 10×10": "px50",
}
OTHERS = {
    "EfficientNet-Lite2": "lite2",
    "ResNet-50 and EfficientNet-Lite0, side by side": "both-encoders",
}
EIGHT_EPOCHS = ENCODERS | GRIDS | PIXELS_320 | OTHERS
ON_SHAPES = {"the preset now": "shapes", "the earlier preset": "shapes-soft"}
ATTENTIONS = {"soft": "shapes-soft", "hard": "shapes-hard", "none (`mean`)": "shapes-mean"}
FROM_SCRATCH = {"ResNet-18": "scratch-resnet18", "VGG-11": "scratch-vgg11"}
RECIPE = {
    "1. cross-entropy, eight epochs, the CNN frozen": "xe",
    "2. then three epochs in which the CNN learns too": "fine",
    "3. then four self-critical epochs": "fine-scst",
    "4. mean of the weights of 2 and 3": "mean",
}
CONSENSUS = {
    "1, beam 20": "xe-beam20",
    "1, beam 20, consensus": "xe-consensus",
    "2, beam 20": "fine-beam20",
    "2, beam 20, consensus": "fine-consensus",
    "4, beam 20": "mean-beam20",
    "4, beam 20, consensus": "mean-consensus",
    "three models, beam 20": "mean-three-beam20",
    "three models, beam 20, consensus": "mean-three-consensus",
    "three models, ensemble, beam 20, consensus": "ensemble-three-consensus",
}
STAGE_1, STAGE_2, STAGE_3, STAGE_4 = RECIPE
RECIPE_TRANSFORMER = {
    "Transformer: 1": "transformer8",
    "Transformer: 2": "transformer-fine",
    "Transformer: 3": "transformer-scst",
    "Transformer: 4": "transformer-mean",
}
RECIPE_50 = {
    STAGE_1: "xe50",
    STAGE_2: "fine50",
    "2c. as a control, three epochs in which it does not": "longer50",
    STAGE_3: "fine50-scst",
    "3e. eight self-critical epochs instead": "fine50-scst8",
    "3c. as 3, but the CNN learns too": "fine50-scst-cnn",
    STAGE_4: "mean50",
    "4e. mean of the weights of 2 and 3e": "mean50-scst8",
}
BEST = RECIPE_50 | {
    "4, captioned with consensus": "mean50-consensus",
    "4e, captioned with consensus": "mean50-scst8-consensus",
    "5. as 1, of pictures of 320 pixels": "px50",
    "6. then four self-critical epochs": "px50-scst",
    "7. mean of the weights of 5 and 6": "px50-mean",
    "7, captioned with consensus": "px50-consensus",
    "8. from 5, two epochs in which the CNN learns them": "px50-fine",
    "9. then four self-critical epochs": "px50-fine-scst",
    "10. mean of the weights of 8 and 9, 320 pixels": "px50-fine-mean",
    "10, captioned with consensus": "px50-fine-consensus",
    "9e. four self-critical epochs more": "px50-fine-scst8",
    "10e. as 4e, of pictures of 320 pixels": "px50-fine-mean8",
    "10e, length penalty 1": "px50-fine-mean8-lp1",
    "10e, length penalty 1.3": "px50-fine-mean8-lp13",
    "10e, captioned with consensus": "px50-fine-consensus8",
}
STAGES = (
    RECIPE
    | RECIPE_TRANSFORMER
    | {
        "3m. instead of 3: CIDEr-D + 5 METEOR": "scst-meteor",
        "4m. mean of 2 and 3m": "mean-meteor",
        "3n. as 3m with --mirror, six epochs": "scst-mirror",
        "4n. mean of 2 and 3n": "mean-mirror",
    }
)
LENGTHS = {
    "4": "mean",
    "4, penalty 1": "mean-lp1",
    "4m": "mean-meteor",
    "4m, penalty 0.85": "mean-meteor-lp085",
    "4m, penalty 1": "mean-meteor-lp1",
    "4n": "mean-mirror",
    "4n, penalty 0.85": "mean-mirror-lp085",
    "three models, penalty 1": "mean-three",
    "4, ensemble": "ensemble",
    "4m, ensemble": "ensemble-meteor",
    "4m, ensemble, penalty 0.85": "ensemble-meteor-lp085",
    "4m, ensemble, penalty 1": "ensemble-meteor-lp1",
    "4n, ensemble": "ensemble-mirror",
    "4n, ensemble, penalty 0.85": "ensemble-mirror-lp085",
    "three models, ensemble, penalty 1": "ensemble-three",
}
BEAMS = {"0": "beam-0", "0.4": "beam-0.4", "0.7": "beam-0.7", "1": "beam-1"}
NO_REPEAT = {
    "EfficientNet-Lite0": "lstm8",
    "EfficientNet-Lite0, `--no_repeat`": "lstm8-no-repeat",
    "ResNet-50": "resnet50",
    "ResNet-50, `--no_repeat`": "resnet50-no-repeat",
    "ResNet-50, 320 pixels": "px50",
    "ResNet-50, 320 pixels, `--no_repeat`": "px50-no-repeat",
}
FAULTS = {
    "LSTM, eight epochs": "lstm8",
    "GRU, eight epochs": "gru8",
    "the best recipe (4e)": "mean50-scst8",
}
ADAPTING = {  # to dogs, of which the base has seen none; "-old" is scored on what it has seen
    "the base as it is": "adapt-base",
    "trained on these alone": "adapt-alone{}",
    "adapted": "adapt-own{}",
    "mean of base and adapted": "adapt-mean{}",
    "trained on both together": "adapt-both{}",
}
SIZES = (20, 60, 200, 1000)  # pictures of dogs
ADAPTED = {
    f"{label}, {size}{old}": name.format(size) + old
    for label, name in ADAPTING.items()
    for size in SIZES
    for old in ("", "-old")
}
ALL = (
    FOCUS, GROUNDED, LOOKING, SENTINEL, TRANSFORMERS, SAMPLED, THREE_EPOCHS, EIGHT_EPOCHS,
    ON_SHAPES, ATTENTIONS, FROM_SCRATCH, STAGES, BEST, CONSENSUS, LENGTHS, BEAMS, NO_REPEAT,
    ADAPTED,
)  # fmt: skip


def of(decoder):
    """The trials of scheduled sampling with a decoder."""
    return {label: name for label, name in SAMPLED.items() if label.startswith(decoder)}
