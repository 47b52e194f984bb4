"""A decoder is held to its three methods before the first epoch, by a dry run over two images."""

import math

import torch

from captioning.model.attentions import AttentionOutput
from captioning.model.checkpoints import check_weights
from captioning.model.decoders import DecoderOutput
from captioning.run.messages import UserError, naming


def check_decoder(captioner, images):
    """Decode three rows at once, as beam search does, one by one, and by ``forward``: see that all
    say the same. Two images are enough, so that a slip shows before all are encoded.

    :param images: uint8 array (2, 3, S, S)
    :raises UserError: if a method does not keep to the contract; the message names it. What a
        method itself raises goes on, with a note that names it
    """
    features = captioner.encode(torch.from_numpy(images))  # (2, n, encoder_dim)
    if not features.isfinite().all():
        return  # the training will say that its loss is not finite
    was_training = captioner.decoder.training
    captioner.decoder.eval()
    with torch.no_grad():
        DryRun(captioner.decoder, features).compare()
    captioner.decoder.train(was_training)


def check_loadable(decoder, build):
    """Before a decoder is trained, see that its checkpoints could be loaded again.

    :param build: function that builds the same decoder
    :raises UserError: if they could not
    """
    try:
        with torch.device("meta"):
            check_weights("decoder", build(), decoder.state_dict())
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"a checkpoint of {type(decoder).__name__} could not be loaded again: "
            f"{str(error).partition(chr(10))[0]}; loading builds it on torch's meta device, where "
            "tensors have shapes and no values"
        ) from error


class DryRun:
    """What a decoder says of two images, and whether it is what its contract asks.

    :param features: float (2, n, encoder_dim)
    """

    def __init__(self, decoder, features):
        self.decoder, self.features, self.name = decoder, features, type(decoder).__name__
        for name in ("init_hidden_state", "step", "vocab_size"):
            self.expect(hasattr(decoder, name), name, "it to be there")

    def expect(self, holds, method, what):
        if not holds:
            raise UserError(f"{self.name}.{method} breaks a decoder's contract: expected {what}")

    def call(self, method, *args):
        with naming(f"{self.name}.{method} failed in the dry run before the first epoch"):
            return (self.decoder if method == "forward" else getattr(self.decoder, method))(*args)

    def compare(self):
        """:raises UserError: if the ways of decoding differ"""
        device = self.features.device
        index = torch.tensor([1, 0, 1], device=device)  # (B,), the image of each row
        row = torch.arange(3, device=device)  # (B,)
        captions = 1 + torch.arange(24, device=device).view(2, 3, 4) % (self.decoder.vocab_size - 1)
        words = captions[..., :3].permute(2, 0, 1)  # (T, 2, R)
        beams, _ = self.decode(words, *self.start())  # (T, 2, R, vocab_size)
        alone, _ = self.decode(words[..., :1], *self.start())  # (T, 2, 1, vocab_size)
        what = "a row's scores to be those of the row alone, wherever the state's rows have gone"
        self.same(beams[:, :, :1], alone, "step", f"{what} (in eval mode nothing is drawn by lot)")
        captions = captions[index, row]  # (B, T + 1)
        words = captions[:, :3].T.unsqueeze(2)  # (T, B, 1)
        rows, alphas = self.decode(words, *self.start(index))  # (T, B, 1, ...)
        what = "the image of each row to be that of image_index"
        self.same(rows[:, :, 0], beams[:, index, row], "init_hidden_state", what)
        self.call("forward", self.features, captions, [3, 3, 3], index, 1, False)  # as in training
        output = self.call("forward", self.features, captions, [3, 3, 3], index)
        self.expect(isinstance(output, DecoderOutput), "forward", "a DecoderOutput")
        said = {  # packed, but for alphas
            "scores": rows.flatten(0, 2),  # (num_words, vocab_size)
            "targets": captions[:, 1:].T.flatten(),  # (num_words,)
            "alphas": alphas.squeeze(2).transpose(0, 1),  # (B, T, num_pixels)
            "rows": row.repeat(3),  # (num_words,)
        }
        for name, value in said.items():
            given = getattr(output, name)
            what = f"{name} {tuple(value.shape)}, found {shape_of(given)}"
            self.expect(shape_of(given) == value.shape, "forward", what)
            self.same(
                given.float(), value.float(), "forward", f"the {name} that step and captions give"
            )

    def same(self, found, expected, method, what):
        gap = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
        self.expect(gap < 1e-2, method, f"{what}, found others by {gap:.2g}")

    def start(self, *image_index):
        """(context, state) of the images, or of the rows that are asked for."""
        found = self.call("init_hidden_state", self.features, *image_index)
        is_pair = isinstance(found, tuple) and len(found) == 2
        self.expect(is_pair, "init_hidden_state", "(context, state)")
        self.check_state(found[1], "init_hidden_state", (3 if image_index else 2, 1))
        return found

    def decode(self, words, context, first):
        """Feed words, int64 (T, B, R).

        :return: (scores, alphas): float32 (T, B, R, vocab_size) and (T, B, R, num_pixels)
        """
        rows, steps = words.shape[1:], []
        state = tuple(s.expand(-1, rows[1], *s.shape[2:]) for s in first)
        for t, previous in enumerate(words):
            # as beam search reorders the rows: at every other step they stand in reverse
            turned = [1] if t % 2 else []
            state = tuple(s.flip(1) for s in state) if t else state
            found = self.call("step", previous.flip(turned), state, context)
            is_triple = isinstance(found, tuple) and len(found) == 3
            self.expect(is_triple, "step", "(scores, attention, state)")
            scores, attention, state = found
            shape, given = (*rows, self.decoder.vocab_size), shape_of(scores)
            self.expect(given == shape, "step", f"scores {shape}, found {given}")
            self.check_alpha(attention, rows)
            self.check_state(state, "step", rows)
            what = f"{len(first)} states as from init_hidden_state, found {len(state)}"
            self.expect(len(state) == len(first), "step", what)
            steps.append((scores.float().flip(turned), attention.alpha.float().flip(turned)))
        return map(torch.stack, zip(*steps))

    def check_alpha(self, attention, rows):
        is_one = isinstance(attention, AttentionOutput)
        self.expect(is_one, "step", "its attention to be an AttentionOutput")
        shape = shape_of(attention.alpha)
        what = f"alpha ({rows[0]}, {rows[1]}, num_pixels), found {shape}"
        self.expect(len(shape) == 3 and shape[:2] == rows, "step", what)
        alpha, places = attention.alpha.float(), shape[2]
        total = alpha.sum(dim=2)  # (B, R)
        sums_to_1 = (total - 1).abs().max() < 1e-2 and alpha.min() >= 0
        what = f"alpha that sums to 1 and is nowhere negative, found {total.flatten()[0]:.3f}"
        self.expect(sums_to_1, "step", what)
        is_grid = places - math.isqrt(places) ** 2 < 2  # a sentinel may stand behind the places
        self.expect(is_grid, "step", f"alpha of a square grid, found {places} places")

    def check_state(self, state, method, rows):
        tensors = isinstance(state, tuple) and len(state) and all(map(torch.is_tensor, state))
        self.expect(tensors, method, "the state to be a tuple of tensors")
        shapes = " and ".join(str(tuple(s.shape)) for s in state)
        what = f"states of shape ({rows[0]}, {rows[1]}, ...), found {shapes}"
        self.expect(all(s.shape[:2] == rows for s in state), method, what)


def shape_of(value):
    """A tensor's shape as a plain tuple; the name of anything else."""
    return tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
