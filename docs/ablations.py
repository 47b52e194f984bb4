"""Trainings of variants that are no flags, for the tables of docs/experiments.md.

    # a variant, or several joined by "+", then a script of the suite and its flags
    python docs/ablations.py dot train.py --encoder efficientnet_lite0 --output_folder runs/dot
    python docs/ablations.py dot eval.py --model runs/dot

A variant is an entry of a table of ``models.py`` or a changed function of it, as in README's
"Change it". Its checkpoints need the same variant to be read.
"""

import importlib
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

import models
import train
import utils
from captioning.model import encoders

VARIANTS = {"plain": lambda: None}


def variant(change):
    """Enter a function that changes the suite into the table."""
    VARIANTS[change.__name__] = change
    return change


def after(module, name, change):
    """Replace a function by one that hands what it returns to ``change``, with the arguments."""
    original = getattr(module, name)
    setattr(module, name, lambda *args, **options: change(original(*args, **options), *args))


def each_decoder(change):
    """Change every decoder that is built."""

    def changed(decoder, *_):
        change(decoder)
        return decoder

    after(models, "build_decoder", changed)


@variant
def dot():
    """Scaled dot product in place of the additive energies (Vaswani et al. 2017)."""

    class DotProductAttention(nn.Module):
        def __init__(self, encoder_dim, decoder_dim, attention_dim):
            super().__init__()
            self.key = nn.Linear(encoder_dim, attention_dim)
            self.query = nn.Linear(decoder_dim, attention_dim)

        def project(self, encoder_out):
            return self.key(encoder_out)

        def forward(self, keys, h):
            return self.query(h) @ keys.mT / keys.shape[2] ** 0.5

    models.ATTENTIONS["soft"] = (DotProductAttention, models.soft)


@variant
def temperature():
    """Energies times a learned factor."""

    class Sharpened(models.Attention):
        def __init__(self, *widths):
            super().__init__(*widths)
            self.log_factor = nn.Parameter(torch.zeros(()))

        def forward(self, encoder_att, h):
            return super().forward(encoder_att, h) * self.log_factor.exp()

    models.ATTENTIONS["soft"] = (Sharpened, models.soft)


@variant
def normalised():
    """Features of each place normalised over the channels (LayerNorm without parameters)."""
    original = models.DecoderWithAttention.init_hidden_state

    def init_hidden_state(self, encoder_out, image_index=None):
        encoder_out = encoder_out.to(self.fc.weight.device, torch.float32)
        return original(self, F.layer_norm(encoder_out, encoder_out.shape[2:]), image_index)

    models.DecoderWithAttention.init_hidden_state = init_hidden_state


@variant
def zero_state():
    """A state that starts from zero, and so knows nothing of the picture's mean feature."""

    def zeroed(prepared, *_):
        context, state = prepared
        return context, tuple(torch.zeros_like(s) for s in state)

    after(models.DecoderWithAttention, "init_hidden_state", zeroed)


@variant
def no_gate():
    """The gate of section 4.2.1 always open."""

    def opened(decoder):
        nn.init.zeros_(decoder.f_beta.weight)
        nn.init.constant_(decoder.f_beta.bias, 20.0)
        decoder.f_beta.requires_grad_(False)

    each_decoder(opened)


@variant
def whole_in_output():
    """With --deep_output: words are scored from the picture's mean feature, too."""

    class LocalAndWhole(nn.Module):
        def __init__(self, local):
            super().__init__()
            self.local = local
            self.whole = nn.Linear(local.in_features, local.out_features, bias=False)

        def forward(self, z):
            mean = self.context.encoder_out.mean(dim=1, keepdim=True)  # (B, 1, encoder_dim)
            return self.local(z) + self.whole(mean)  # (B, R, embed_dim)

    def extended(decoder):
        decoder.deep_z = LocalAndWhole(decoder.deep_z)

    step = models.DecoderWithAttention.step

    def step_with_context(self, words, state, context):
        self.deep_z.context = context
        return step(self, words, state, context)

    each_decoder(extended)
    models.DecoderWithAttention.step = step_with_context


@variant
def large_scale():
    """Weights of the attention network three times as large at the start."""

    def scaled(decoder):
        with torch.no_grad():
            for weight in decoder.attention.parameters():
                weight *= 3

    each_decoder(scaled)


@variant
def fast_attention():
    """The attention network learns at three times the rate."""
    after(train, "build_optimizer", lambda built, *given: attention_group(built, given, rate=3))


@variant
def no_decay():
    """The attention network's weights do not decay."""
    after(train, "build_optimizer", lambda built, *given: attention_group(built, given, decay=0))


def attention_group(optimizer, given, rate=1, decay=None):
    """The optimizer, with a group of its own for the attention network."""
    args, captioner, *_ = given
    own = [p for p in captioner.decoder.attention.parameters() if p.requires_grad]
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if all(p is not other for other in own)]
    options = {"lr": torch.tensor(0.0), "peak_lr": rate * args.learning_rate}
    optimizer.add_param_group(
        {"params": own, **options} | ({} if decay is None else {"weight_decay": decay})
    )
    return optimizer


@variant
def concatenated_position():
    """A code of row and column as 32 channels more, at full amplitude."""
    init, build = models.DecoderWithAttention.init_hidden_state, models.build_decoder

    def init_hidden_state(self, encoder_out, image_index=None):
        side = math.isqrt(encoder_out.shape[1])
        code = 10 * models.position_code(side, 32, encoder_out.device)
        code = code.expand(len(encoder_out), -1, -1)
        return init(self, torch.cat([encoder_out.float(), code], dim=2), image_index)

    models.DecoderWithAttention.init_hidden_state = init_hidden_state
    models.build_decoder = lambda config, size: build(
        {**config, "encoder_dim": config["encoder_dim"] + 32}, size
    )


@variant
def third_stage():
    """ResNets without their last stage: a grid of 16 x 16 places with half the channels."""

    def shorter(name):
        backbone = encoders.resnet(name)
        return backbone._replace(blocks=backbone.blocks[:-1])

    for name, build in models.ENCODERS.items():
        if build is encoders.resnet:
            models.ENCODERS[name] = shorter


if __name__ == "__main__":
    _, names, script, *flags = sys.argv
    for name in names.split("+"):
        models.look_up(VARIANTS, name, "variant")()
    sys.argv = [script, *flags]
    script = importlib.import_module(script.removesuffix(".py"))
    utils.run(script.main, script.get_args_parser())
