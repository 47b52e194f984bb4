"""A Transformer decoder (Vaswani et al. 2017), in the place of the recurrent one.

python train.py --decoder transformer --layers 2 --heads 4
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from captioning.model.attentions import AttentionOutput, sample
from captioning.model.decoders import collect, live_rows
from captioning.model.grid import compute_dtype, pooling_matrix, position_code, position_waves
from captioning.run.messages import UserError


class TransformerDecoder(nn.Module):
    """Reads all words so far, looks at the grid in every layer, and scores the next word.

    The layers are pre-norm (Xiong et al. 2020): causal self-attention over the words,
    cross-attention over the grid, feed-forward network. ``alpha`` is the last layer's
    cross-attention, the mean of its heads. Training runs all words at once; ``step`` finds the keys
    and values of the words before in the state, which grows by a place at every word.

    Parameters are those of ``DecoderWithAttention``, but:

    :param attention_dim, decoder_dim: widths of all heads together, and of what the layers pass on;
        the feed-forward network is twice as wide
    :param dropout: on what layers add, and on what words are scored from
    :param layers, heads: layers, and heads of each attention
    :raises UserError: if there are too many layers, or the heads do not share attention_dim evenly
    """

    def __init__(
        self, vocab_size, encoder_dim=2048, attention_dim=512, embed_dim=512, decoder_dim=512,
        encoded_image_size=14, position_encoding=False, dropout=0.3, embed_dropout=0.3,
        feature_dropout=0.3, layers=2, heads=4,
    ):  # fmt: skip
        super().__init__()
        if not 1 <= layers <= 48:
            raise UserError(f"--layers {layers}: expected 1 to 48")
        if heads < 1 or attention_dim % heads:
            raise UserError(f"--heads {heads}: expected a divisor of {attention_dim}, the width")
        self.vocab_size, self.encoded_image_size = vocab_size, encoded_image_size
        self.position_encoding = position_encoding
        self.heads, self.shown_head = heads, None  # number; whose weights alpha is, None: the mean
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        same = embed_dim == decoder_dim
        self.widen = nn.Identity() if same else nn.Linear(embed_dim, decoder_dim)
        self.memory = nn.Sequential(nn.Linear(encoder_dim, decoder_dim), nn.LayerNorm(decoder_dim))
        widths = decoder_dim, attention_dim, heads, dropout
        self.layers = nn.ModuleList(Layer(*widths) for _ in range(layers))
        self.norm, self.fc = nn.LayerNorm(decoder_dim), nn.Linear(decoder_dim, vocab_size)
        self.dropout, self.embed_dropout = nn.Dropout(dropout), nn.Dropout(embed_dropout)
        self.feature_dropout = nn.Dropout(feature_dropout)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def init_hidden_state(self, encoder_out, image_index=None):
        """Prepare the images once; the state holds no word yet.

        :param encoder_out: float (num_images, n, encoder_dim), any float type
        :param image_index: int64 (B,), the image of each row; None: every image once
        :return: (context, state): keys of the layers and their values, tuples of (B, heads,
            num_pixels, attention_dim / heads); the same of the words before, (B, 1, 0, ...)
        """
        place = encoder_out.device, compute_dtype(encoder_out.device)
        encoder_out = encoder_out.to(*place)  # (num_images, n, encoder_dim)
        side = math.isqrt(encoder_out.shape[1])
        if self.position_encoding:
            encoder_out = encoder_out + position_code(side, encoder_out.shape[2], *place)
        memory = self.memory(self.feature_dropout(encoder_out))  # (num_images, n, decoder_dim)
        both = [layer.image(memory) for layer in self.layers]  # (num_images, n, 2 * attention_dim)
        if self.encoded_image_size not in (0, side):
            pool = pooling_matrix(side, self.encoded_image_size, *place)  # (num_pixels, n)
            both = [pool @ kv for kv in both]  # (num_images, num_pixels, 2 * attention_dim)
        if image_index is not None:  # index_select, whose gradient is summed in a fixed order
            both = [kv.index_select(0, image_index) for kv in both]  # (B, num_pixels, ...)
        pairs = [map(layer.split, kv.chunk(2, 2)) for layer, kv in zip(self.layers, both)]
        none = both[0].new_zeros(len(both[0]), 1, 0, both[0].shape[2] // 2)
        return tuple(zip(*pairs)), (none,) * (2 * len(self.layers))

    def step(self, words, state, context):
        """Read the previous word, look at the image and score the next word.

        :param words, state: int64 (B, R); tuple of (B, R, t, attention_dim)
        :return: (scores, attention, state): float32 (B, R, vocab_size); ``AttentionOutput``; tuple
            of (B, R, t + 1, attention_dim)
        """
        output, alpha, state = self.decode(words.unsqueeze(2), state, context)
        alpha = alpha[:, :, 0]  # (B, R, num_pixels)
        return self.score(output[:, :, 0]), AttentionOutput(alpha, alpha), state

    def forward(self, encoder_out, captions, decode_lengths, image_index, epsilon=1, argmax=False):
        """Run over captions for training, all words at once; see ``DecoderWithAttention.forward``.

        Scheduled sampling takes two passes (Mihaylova and Martins 2019): the first, over the true
        words and without gradient, gives the model's own words.
        """
        prepared = self.init_hidden_state(encoder_out, image_index)
        live, words = live_rows(decode_lengths), captions[:, : decode_lengths[0]]  # (B, T)
        if torch.is_tensor(epsilon) or epsilon < 1:
            with torch.no_grad():
                output, _ = self.decode_captions(words, decode_lengths, *prepared)
                own = self.score(output[:, :-1])  # (B, T - 1, vocab_size)
            torch.clear_autocast_cache()  # older torch: casts of weights made here learn nothing
            own = own.argmax(2) if argmax else sample(own.softmax(2))  # (B, T - 1)
            true = torch.rand(own.shape, device=own.device) < epsilon
            words = torch.cat([words[:, :1], torch.where(true, words[:, 1:], own)], dim=1)
        output, alpha = self.decode_captions(words, decode_lengths, *prepared)
        output = torch.cat([output[:n, t] for t, n in enumerate(live)])  # (num_words, decoder_dim)
        attentions = [AttentionOutput(a := alpha[:n, t : t + 1], a) for t, n in enumerate(live)]
        return collect(captions, live, [self.score(output)], attentions)

    def decode_captions(self, words, decode_lengths, context, state):
        """``decode`` of captions; on a CPU in groups of similar length, 1.2 times as fast."""
        size, parts = 16 if words.device.type == "cpu" else len(words), []
        for i, steps in list(enumerate(decode_lengths))[::size]:
            *images, own = (tuple(x[i : i + size] for x in xs) for xs in (*context, state))
            part = self.decode(words[i : i + size, None, :steps], own, images)
            parts.append([F.pad(x[:, 0], (0, 0, 0, words.shape[1] - steps)) for x in part[:2]])
        return map(torch.cat, zip(*parts))

    def decode(self, words, state, context):
        """Run words through all layers; each sees those of the state and those before it.

        :param words: int64 (B, R, T); T is 1 where the state holds words
        :return: (output, alpha, state): (B, R, T, decoder_dim); float32 (B, R, T, num_pixels); the
            state, T places longer
        """
        start, end = state[0].shape[2], state[0].shape[2] + words.shape[2]
        x = self.embedding(words) * math.sqrt(self.embedding.embedding_dim)  # (B, R, T, embed_dim)
        waves = position_waves(1 << max(6, end.bit_length()), x.shape[3], x.device)
        x = x + waves[start:end]  # (B, R, T, embed_dim)
        x, longer = self.embed_dropout(self.widen(x)), []  # (B, R, T, decoder_dim)
        for i, (layer, *image) in enumerate(zip(self.layers, *context)):
            x, alpha, past = layer(x, state[2 * i : 2 * i + 2], image, i + 1 == len(self.layers))
            longer += past
        head = self.shown_head  # alpha: (B, heads, R * T, num_pixels)
        alpha = alpha.mean(dim=1) if head is None else alpha[:, head]  # (B, R * T, num_pixels)
        return x, alpha.unflatten(1, words.shape[1:]), tuple(longer)

    def score(self, output):
        """Scores of the next word, float32 (..., vocab_size), from (..., decoder_dim)."""
        return self.fc(self.dropout(self.norm(output))).float()


class Layer(nn.Module):
    """Self-attention over the words, cross-attention over the grid, feed-forward network."""

    def __init__(self, decoder_dim, attention_dim, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(decoder_dim) for _ in range(3))
        self.words = nn.Linear(decoder_dim, 3 * attention_dim)  # queries, keys, values
        self.words_out = nn.Linear(attention_dim, decoder_dim)
        self.query = nn.Linear(decoder_dim, attention_dim)
        self.image = nn.Linear(decoder_dim, 2 * attention_dim)  # keys, values
        self.image_out = nn.Linear(attention_dim, decoder_dim)
        wide = 2 * decoder_dim
        self.feed_forward = nn.Sequential(
            nn.Linear(decoder_dim, wide), nn.GELU(), nn.Linear(wide, decoder_dim)
        )

    def split(self, x):
        """(N, T, attention_dim) to (N, heads, T, attention_dim / heads)."""
        return x.unflatten(2, (self.heads, x.shape[2] // self.heads)).transpose(1, 2)

    def forward(self, x, past, image, with_alpha):
        """
        :param x: (B, R, T, decoder_dim)
        :param past, image: keys and values: of the words before, (B, R, t, attention_dim); of the
            grid, (B, heads, num_pixels, attention_dim / heads)
        :return: (x, alpha, past): alpha is None, or float32 (B, heads, R * T, num_pixels)
        """
        (keys, values), alpha, shape = image, None, x.shape[:3]
        q, k, v = self.words(self.norms[0](x)).chunk(3, dim=3)  # (B, R, T, attention_dim)
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = attend(*(self.split(y.flatten(0, 1)) for y in (q, k, v)), is_causal=shape[2] > 1)
        y = self.words_out(y.transpose(1, 2).flatten(2))  # (B * R, T, decoder_dim)
        x = x + self.dropout(y.unflatten(0, shape[:2]))
        q = self.split(self.query(self.norms[1](x)).flatten(1, 2))  # (B, heads, R * T, ...)
        if with_alpha:
            energies = q @ keys.mT / math.sqrt(q.shape[3])
            alpha = energies.float().softmax(dim=3)  # (B, heads, R * T, num_pixels)
            y = alpha.to(values.dtype) @ values  # (B, heads, R * T, ...)
        else:
            y = attend(q, keys, values)
        y = self.image_out(y.transpose(1, 2).flatten(2))  # (B, R * T, decoder_dim)
        x = x + self.dropout(y.unflatten(1, shape[1:]))
        x = x + self.dropout(self.feed_forward(self.norms[2](x)))
        return x, alpha, (k, v)


def attend(q, k, v, **options):
    """Scaled dot-product attention; on a CPU in float32: its kernel for bfloat16 is slow."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    return y.to(q.dtype)
