"""Defaults that belong together, of data, purpose and decoder; flags that do nothing together."""

from captioning.run.messages import note

FOCUS = {"grounding": 0.15, "alpha_c": 0.0, "deep_output": True, "attend_word": True,
         "feature_dropout": 0.1}  # fmt: skip

PRESETS = {  # defaults that suit a data set; any flag given beside --preset wins
    "shapes": {
        "data_name": "shapes_5_cap_per_img_5_min_word_freq", "encoder": "efficientnet_lite0",
        "encoded_image_size": 0, "position_encoding": True, "decoder_dim": 256,
        "attention_dim": 256, "embed_dim": 128, "epochs": 5, "batch_size": 16,
        "learning_rate": 3e-3, "warmup": 50, "label_smoothing": 0.0,
        "dropout": 0.2, "embed_dropout": 0.1, "beam_size": 1, "amp": True, **FOCUS,
        "grounding": 0.3,
    },
    "focus": FOCUS,
    "adapt": {"epochs": 20, "batch_size": 4, "metric": "CIDEr", "amp": True},
}  # fmt: skip

DECODER_DEFAULTS = {  # defaults that suit a decoder; any flag given beside --decoder wins
    "transformer": {"learning_rate": 4e-4, "dropout": 0.3, "embed_dropout": 0.3,
                    "deep_output": False, "attend_word": False},
}  # fmt: skip


def note_idle(args, given):
    """Say which of train.py's flags do nothing beside the others.

    :param given: names of the flags on the command line
    """
    of_teaching = ("grounding", "alpha_c", "label_smoothing")
    dropouts = ("dropout", "embed_dropout", "feature_dropout")
    idle = {
        "without --fine_tune_encoder": ["encoder_learning_rate"] * (not args.fine_tune_encoder),
        "without --scheduled_sampling": ["ss_min"] * (args.scheduled_sampling == "none"),
        "beside --init_from, whose CNN goes on": ["encoder_weights"] * bool(args.init_from),
        "with --scst": [*of_teaching, *dropouts] * args.scst,
        "with --attention mean": ["grounding", "alpha_c"] * (args.attention == "mean"),
    }
    for why, names in idle.items():
        for name in names:
            if name in given:
                note(f"--{name} does nothing {why}")
