"""Encoder, attention, decoder, losses and beam search of Show, Attend and Tell (Xu et al., 2015).

An image becomes a grid of features (``Encoder``). For every word a small network weighs the grid
(``Attention``), and an LSTM or GRU scores the next word (``DecoderWithAttention.step``).

    captioner = load_captioner("checkpoints")
    captioner("photo.jpg").text

Names imported here for scripts and students are defined in the rooms of ``captioning``.
"""

import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from captioning.data.features import encode_split
from captioning.data.pictures import square_of
from captioning.data.words import END, PAD_ID, START, letters, load_word_map, special_tokens
from captioning.model.attentions import AttentionOutput, NoAttention, hard, sample
from captioning.model.beams import (
    Hypothesis,
    ban_repeats,
    best_ended,
    empty_beams,
    read_beams,
    repeat_rows,
    sample_captions,
    score_words,
)
from captioning.model.checkpoints import (
    ARCHITECTURE,
    DROPOUTS,
    average_weights,
    export_captioner,
    read_checkpoint,
    run_checkpoint,
)
from captioning.model.consensus import Consensus, mean_features
from captioning.model.decoders import ImageContext, collect, count_states, fitting, live_rows
from captioning.model.encoder_weights import load_classifier_weights
from captioning.model.encoders import ENCODERS, Backbone, calibrate, feature_store, resized
from captioning.model.grid import compute_dtype, context_vector, pooling_matrix, position_code
from captioning.model.losses import doubly_stochastic_penalty, hard_attention_loss
from captioning.model.schedules import SCHEDULES, Schedule, scheduled_sampling_epsilon
from captioning.model.self_critical import sample_and_reward, self_critical_loss
from captioning.model.sentinel import VisualSentinel
from captioning.model.teacher import AttentionTeacher, CaptioningNetwork
from captioning.model.tensor_files import save_checkpoint
from captioning.model.transformer import TransformerDecoder
from captioning.model.utterances import Caption
from captioning.run.command_line import BEAM_SIZE, LENGTH_PENALTY, MAX_DECODE_STEPS
from captioning.run.messages import look_up, progress


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
        :return: float (B, n, encoder_dim), the grid row by row
        """
        images = (images.float() - self.mean) / self.std  # (B, 3, height, width)
        images = images.contiguous(memory_format=torch.channels_last)
        grid = self.cnn(images)  # (B, encoder_dim, rows, columns)
        return grid.permute(0, 2, 3, 1).flatten(1, 2)  # (B, n, encoder_dim)

    def fine_tune(self, fine_tune=True):
        """Let all but the first ``frozen_blocks`` blocks learn, or freeze everything."""
        self.requires_grad_(False)
        self.cnn[self.frozen_blocks :].requires_grad_(fine_tune)

    def train(self, mode=True):
        """Stay in evaluation mode, whatever is asked: see the class."""
        return super().train(False)


class Attention(nn.Module):
    """The attention network of the paper: additive scores (section 3.1.2, eq. 4; here with a ReLU).

    Another network needs a linear ``project``, called once for each image (its result is pooled to
    attention's grid), ``forward``, called at every word, and an entry in ``ATTENTIONS``.
    """

    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.full_att.bias.requires_grad_(False)  # softmax ignores what is added to all

    def project(self, encoder_out):
        """Project images: float (num_images, n, encoder_dim) to (num_images, n, any width)."""
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


def soft(energies, decoder):
    """Weigh all places: the expected context vector (section 4.2)."""
    alpha = energies.float().softmax(dim=2)  # (B, R, num_pixels)
    return AttentionOutput(alpha, alpha)


# To add an attention, add an entry: the network that scores the places, the function that turns
# scores into weights, and perhaps a module for a sentinel, whose score follows the places'.
ATTENTIONS = {"soft": (Attention, soft), "hard": (Attention, hard), "mean": (NoAttention, soft)}
ATTENTIONS |= {"adaptive": (Attention, soft, VisualSentinel)}


class DecoderWithAttention(nn.Module):
    """LSTM or GRU that looks at the image before each word (Xu et al. 2015, sections 3.1.2 and 4).

    The gate has a value for each channel (one for all in the paper), and the first state comes from
    linear maps (deeper ones in the paper), as in the well-known PyTorch tutorial. Each image has R
    rows: its beams in beam search; in training one, for each caption has its own copy of the image.

    :param vocab_size, encoder_dim: words in the word map; channels of the encoder's grid
    :param attention_dim, embed_dim, decoder_dim: widths of attention network, embedding and state
    :param attention: a key of ``ATTENTIONS``
    :param encoded_image_size: side of the grid that attention sees; 0 keeps the encoder's own
    :param deep_output: score words from word, state and context (eq. 7), not from the state alone
    :param attend_word: let attention see the previous word, too (not in the paper)
    :param position_encoding: add :func:`position_code` to the encoder's grid (not in the paper)
    :param dropout, embed_dropout, feature_dropout: on what words are scored from, on embedded
        words, on the encoder's grid
    :param cell: cell(input_size, hidden_size) makes the recurrent cell, called as torch's own
    :raises UserError: if the attention is unknown
    """

    def __init__(
        self, vocab_size, encoder_dim=2048, attention_dim=512, embed_dim=512, decoder_dim=512,
        attention="soft", encoded_image_size=14, deep_output=False, attend_word=False,
        position_encoding=False, dropout=0.5, embed_dropout=0.0, feature_dropout=0.0,
        cell=nn.LSTMCell,
    ):  # fmt: skip
        super().__init__()
        network, self.attend, *sentinel = look_up(ATTENTIONS, attention, "attention")
        self.vocab_size, self.encoded_image_size = vocab_size, encoded_image_size
        self.deep_output, self.position_encoding = deep_output, position_encoding
        self.attend_word = attend_word
        self.sample_location = False  # hard attention at inference: sample, or take the likeliest
        query_dim = decoder_dim + embed_dim if attend_word else decoder_dim
        self.attention = network(encoder_dim, query_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.decode_step = cell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        states = count_states(self.decode_step, embed_dim + encoder_dim)
        inits = [nn.Linear(encoder_dim, decoder_dim) for _ in range(states - 1)]
        self.init_c = inits[0] if inits else None  # a GRU has none
        self.init_more = nn.ModuleList(inits[1:])
        widths = encoder_dim, attention_dim, embed_dim, decoder_dim
        self.sentinel = sentinel[0](*widths) if sentinel else None
        self.f_beta = None if self.sentinel else nn.Linear(decoder_dim, encoder_dim)
        if deep_output:
            self.deep_h = nn.Linear(decoder_dim, embed_dim)
            self.deep_z = nn.Linear(encoder_dim, embed_dim, bias=False)
        self.fc = nn.Linear(embed_dim if deep_output else decoder_dim, vocab_size)
        self.dropout = nn.Dropout(dropout)
        self.embed_dropout = nn.Dropout(embed_dropout)
        self.feature_dropout = nn.Dropout(feature_dropout)
        if getattr(self.attend, "samples", False):  # the baseline of REINFORCE, a moving average
            self.register_buffer("baseline", torch.zeros(()))
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)

    def init_hidden_state(self, encoder_out, image_index=None):
        """Prepare the images once, and start the state from their mean feature (section 3.1.2).

        :param encoder_out: float (num_images, n, encoder_dim), any float type
        :param image_index: int64 (B,), the image of each row; None: every image once
        :return: (context, state): ``ImageContext``, and a tuple of float32 (B, 1, decoder_dim):
            (h, c) for an LSTM, (h,) for a GRU, as many as the cell returns
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
        inits = [layer for layer in (self.init_h, self.init_c, *self.init_more) if layer]
        state = tuple(init(mean).float().unsqueeze(1) for init in inits)  # (num_images, 1, ...)
        if image_index is not None:  # index_select, whose gradient is summed in a fixed order
            encoder_out = encoder_out.index_select(0, image_index)  # (B, n, encoder_dim)
            encoder_att = encoder_att.index_select(0, image_index)  # (B, num_pixels, attention_dim)
            state = tuple(s.index_select(0, image_index) for s in state)  # (B, 1, decoder_dim)
            mean = mean.index_select(0, image_index)  # (B, encoder_dim)
        return ImageContext(encoder_out, encoder_att, mean, pool), state

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
        if self.sentinel:  # looks after the cell has read the word, and perhaps not at all
            return self.sentinel(self, embedded, state, context)
        query = self.query(h, embedded)  # (B, R, decoder_dim), + embed_dim with attend_word
        energies = self.attention(context.encoder_att, query)  # (B, R, num_pixels)
        attention = self.attend(energies, self)  # alpha: (B, R, num_pixels)
        z = context_vector(attention.weights, context)  # (B, R, encoder_dim)
        z = torch.sigmoid(self.f_beta(h)) * z  # (B, R, encoder_dim), the gate of section 4.2.1
        state = self.recur(torch.cat([embedded.to(z.dtype), z], 2), state)  # (B, R, decoder_dim)
        return self.score(state[0], embedded, z), attention, state

    def query(self, h, embedded):
        """The input of attention, (B, R, decoder_dim), or with the word (..., + embed_dim)."""
        return torch.cat([h, embedded.to(h.dtype)], dim=2) if self.attend_word else h

    def score(self, output, embedded, z):
        """Scores of the next word, float32 (B, R, vocab_size)."""
        if self.deep_output:  # eq. 7
            output = embedded + self.deep_h(output) + self.deep_z(z)  # (B, R, embed_dim)
        return self.fc(self.dropout(output)).float()  # (B, R, vocab_size)

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
                context = ImageContext(*(x[:n] for x in context[:3]), context.pool)
                state = tuple(s[:n] for s in state)
            step_scores, attention, state = self.step(words.unsqueeze(1), state, context)
            scores.append(step_scores.squeeze(1))  # (n, vocab_size)
            attentions.append(attention)
        return collect(captions, live, scores, attentions)


def recurrent(cell):
    """A factory of decoders around a recurrent cell, for ``DECODERS``."""
    return functools.partial(DecoderWithAttention, cell=cell)


# To add a decoder, add an entry: ``recurrent`` of a cell, or a class with ``init_hidden_state``,
# ``step`` and ``forward``, called with vocab_size and the options that its constructor names.
DECODERS = {"lstm": recurrent(nn.LSTMCell), "gru": recurrent(nn.GRUCell)}
DECODERS |= {"transformer": TransformerDecoder}


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


@torch.no_grad()
def beam_search(
    decoders, encoder_outs, word_map, beam_size=BEAM_SIZE, length_penalty=LENGTH_PENALTY,
    max_decode_steps=MAX_DECODE_STEPS, n_best=1, with_alphas=True, consensus=None, no_repeat=False,
):  # fmt: skip
    """Find the likeliest captions of a batch of images.

    Several decoders form an ensemble: their word probabilities are averaged. <pad>, <start> and
    <unk> are never produced. A hypothesis ends when <end> is among the beam_size best continuations
    of its image. An image is done when no live hypothesis, were it to end now at no cost, would
    enter its n best (exact without a length penalty). If none ended, the best live ones are given.

    :param decoders, word_map: list of decoders, in eval mode, and the words of all, word to id
    :param encoder_outs: list of float (B, n, encoder_dim), each decoder's own features
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
    starts = [d.init_hidden_state(out) for d, out in zip(decoders, encoder_outs)]
    contexts, states = [c for c, _ in starts], [repeat_rows(s, beam_size) for _, s in starts]
    device, vocab_size = encoder_outs[0].device, decoders[0].vocab_size
    banned = torch.tensor(special_tokens(word_map), device=device)
    doubles = torch.tensor(letters(word_map), dtype=torch.int64, device=device)
    words = torch.full((len(encoder_outs[0]), beam_size), word_map[START], device=device)
    rows = torch.arange(len(words), device=device).unsqueeze(1)  # (B, 1), to index with (B, k)
    for step in range(max_decode_steps + 1):
        log_probs, alpha, states = score_words(decoders, words, states, contexts)
        alpha = alpha if with_alphas else alpha[..., :0]  # (B, K, num_pixels)
        if step == 0:
            live, ended = (empty_beams(alpha[:, :1], count) for count in (beam_size, keep))
            live.log_prob[:, 0] = 0  # at the start all beams are one
        log_probs[..., banned] = -math.inf  # (B, K, vocab_size)
        if no_repeat:
            log_probs = ban_repeats(log_probs, live.seqs, doubles)
        # at most K of the best 2K continuations are <end>, so K others are among them
        total = (live.log_prob.unsqueeze(2) + log_probs).flatten(1)  # (B, K * vocab_size)
        log_prob, index = total.topk(2 * beam_size, dim=1)  # (B, 2K)
        parent, word = index // vocab_size, index % vocab_size
        alpha = alpha[rows, parent]  # (B, 2K, num_pixels)
        score = log_prob / (step + 1) ** length_penalty  # (B, 2K)
        word_log_prob = log_probs[rows, parent, word]  # (B, 2K)
        grown = live.take(parent).append(log_prob, score, word, word_log_prob, alpha)
        is_end = word == word_map[END]
        ended = best_ended(ended, grown, is_end, beam_size)
        if step == max_decode_steps:
            break
        _, best = grown.log_prob.masked_fill(is_end, -math.inf).topk(beam_size, dim=1)  # (B, K)
        live = grown.take(best)
        live.log_prob.masked_fill_(is_end[rows, best], -math.inf)  # too few words are left
        parent, words = parent[rows, best], word[rows, best]  # (B, K)
        states = [tuple(s[rows, parent] for s in state) for state in states]
        done = live.log_prob[:, 0] / (step + 2) ** length_penalty <= ended.score[:, -1]  # (B,)
        done |= is_end[:, 0] & (beam_size == 1)  # greedy: the first <end> ends it
        live.log_prob.masked_fill_(done.unsqueeze(1), -math.inf)
        # asking makes the host wait for the device: on a GPU a few idle steps cost less
        if (device.type == "cpu" or step % 4 == 3) and done.all():
            break
    found = read_beams(ended, live, word_map, with_alphas)
    found = consensus(encoder_outs, found) if consensus else found
    return [hypotheses[:n_best] for hypotheses in found]


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
    with progress(total=count, desc="captioning", unit="image", leave=False) as bar:
        for i in range(0, count, batch_size):
            outs = [f[i : i + batch_size].to(device) for f in features]
            results += beam_search([c.decoder for c in captioners], outs, word_map, **options)
            bar.update(len(outs[0]))
    return results


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
        return self.encoder(resized(images, self.image_size).to(self.device))

    def __call__(self, pictures, no_repeat=True, **options):
        """Caption pictures as caption.py does; ``options`` are those of :func:`beam_search`.

        :param pictures: a path, a PIL image, an array uint8 (height, width, 3), or a list of them
        :return: a ``Caption``, of a list a list; with n_best above 1 lists of them, best first
        :raises UserError: if one is no picture
        """
        if not (isinstance(pictures, (list, tuple)) or getattr(pictures, "ndim", 0) == 4):
            return self([pictures], no_repeat, **options)[0]
        captions, options = [], {"no_repeat": no_repeat, **options}
        for i in range(0, len(pictures), 32):
            squares = [square_of(picture, self.image_size) for picture in pictures[i : i + 32]]
            encoder_out = self.encode(torch.from_numpy(np.stack(squares)))
            found = beam_search([self.decoder], [encoder_out], self.word_map, **options)
            for out, hypotheses in zip(encoder_out, found):
                best = [Caption.of(self, hypothesis, out) for hypothesis in hypotheses]
                captions.append(best if options.get("n_best", 1) > 1 else best[0])
        return captions

    def caption(self, images, **options):
        """The hypotheses about images, uint8 (B, 3, S, S), as :func:`beam_search` finds them."""
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
        features = encode_split(dataset, self.encode, path, rows, workers=workers)
        return torch.from_numpy(features if path is None else features[rows or slice(None)])


def build_decoder(config, vocab_size):
    """A decoder from the configuration that a checkpoint keeps."""
    factory = look_up(DECODERS, config["decoder"], "decoder")
    return factory(vocab_size, **fitting(factory, config))


def build_model(config, vocab_size):
    """The encoder and the decoder of a checkpoint's configuration, with random weights."""
    return Encoder(config["encoder"], "none"), build_decoder(config, vocab_size)


def load_checkpoint(path, word_map=None, strict=True):
    """Read and check a checkpoint: ``read_checkpoint`` for the models of this file."""
    return read_checkpoint(path, build_model, word_map, strict)


def known_words(path):
    """The word map that a path names, and the size of its model's pictures (None: no model)."""
    if Path(path).suffix == ".json":
        return load_word_map(path), None
    checkpoint = load_checkpoint(run_checkpoint(path))
    return checkpoint["word_map"], checkpoint["config"]["image_size"]


def load_captioner(path=None, device="cpu", word_map=None, strict=True):
    """The ``Captioner`` of a checkpoint or a run's folder (None: the suite's own), on a device."""
    checkpoint = load_checkpoint(run_checkpoint(path), word_map, strict)
    config, own = checkpoint["config"], checkpoint["word_map"]
    encoder, decoder = build_model(config, len(own))
    encoder.load_state_dict(checkpoint["encoder"])
    decoder.load_state_dict(checkpoint["decoder"])
    return Captioner(encoder.to(device), decoder.to(device), own, config, checkpoint["history"])
