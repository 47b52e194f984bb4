"""Hypotheses of beam search, and captions drawn from a decoder."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from captioning.data.words import END, PAD_ID, START, special_tokens
from captioning.model.attentions import sample
from captioning.run.messages import UserError


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
        return Beams(
            log_prob,
            score,
            torch.cat([self.seqs, word.unsqueeze(2)], dim=2),
            torch.cat([self.word_log_probs, word_log_prob.unsqueeze(2)], dim=2),
            torch.cat([self.alphas, alpha.unsqueeze(2)], dim=2),
        )

    def padded(self):
        """The same hypotheses and a <pad>, as wide as those that are one word longer."""
        return self._replace(
            seqs=F.pad(self.seqs, (0, 1), value=PAD_ID),
            word_log_probs=F.pad(self.word_log_probs, (0, 1)),
            alphas=F.pad(self.alphas, (0, 0, 0, 1)),
        )

    def only(self, wanted):
        """The same hypotheses; those not in a bool mask (B, K) as good as none."""
        return self._replace(
            log_prob=self.log_prob.masked_fill(~wanted, -math.inf),
            score=self.score.masked_fill(~wanted, -math.inf),
        )


def empty_beams(alpha, count):
    """Hypotheses without a word, and so unlikely that any other is preferred.

    :param alpha: weights of one word, (B, 1, num_pixels), which tell sizes and device
    :raises UserError: if there are none to keep
    """
    if count < 1:
        raise UserError(f"beam_size and n_best: expected 1 or more, found {count}")
    none = alpha.new_full((len(alpha), count), -math.inf)
    words = alpha.new_zeros(len(alpha), count, 0, dtype=torch.long)
    alphas = alpha.new_zeros(len(alpha), count, 0, alpha.shape[2])
    return Beams(none, none.clone(), words, words.float(), alphas)


def repeat_rows(state, count):
    """A state of one row for each image, (B, 1, ...) each, for as many rows: (B, count, ...)."""
    return tuple(s.expand(-1, count, *s.shape[2:]) for s in state)


def best_ended(ended, grown, is_end, beam_size):
    """The best of what had ended before, and of those of the beam_size likeliest that end now.

    :param ended, grown: ``Beams`` of (B, n) and (B, 2K) hypotheses, the second one word longer and
        in decreasing order of probability
    :param is_end: bool (B, 2K), which of the second end
    :return: ``Beams`` of (B, n) hypotheses, best first
    """
    ending = Beams(*(x[:, :beam_size] for x in grown)).only(is_end[:, :beam_size])  # (B, K)
    both = Beams(*(torch.cat(pair, dim=1) for pair in zip(ended.padded(), ending)))  # (B, n + K)
    _, best = both.score.topk(ended.score.shape[1], dim=1)  # (B, n)
    return both.take(best)


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


def ban_repeats(log_probs, seqs, letters):
    """Rule out what repeats the last word, or three words in a row that were said before.

    :param log_probs: float (B, K, vocab_size), of the next word
    :param seqs: int64 (B, K, t), the words so far
    :param letters: int64 (n,), ids that are letters and no words, see ``words.letters``: these
        may be doubled
    """
    last = seqs[..., -1:]  # (B, K, 1)
    # places at which the last two words were said before, and the words that followed there
    again = (seqs[..., :-2] == seqs[..., -2:-1]) & (seqs[..., 1:-1] == last)  # (B, K, t - 2)
    doubled = torch.where(torch.isin(last, letters), PAD_ID, last)  # <pad> is never said anyway
    followed = torch.where(again, seqs[..., 2:], doubled)  # (B, K, t - 2)
    return log_probs.scatter(2, torch.cat([doubled, followed], dim=2), -math.inf)


def read_beams(ended, live, word_map, with_alphas):
    """The hypotheses of each image, best first, on the CPU."""
    results = []
    ended, live = Beams(*(x.cpu() for x in ended)), Beams(*(x.cpu() for x in live))
    for image in range(len(ended.score)):
        has_ended, found = bool(ended.score[image, 0] > -math.inf), []
        beams = ended if has_ended else live  # of which there may be fewer than captions wanted
        for k in range(beams.score.shape[1]):
            log_prob, score, seq, word_log_probs, alphas = (x[image, k] for x in beams)
            if log_prob > -math.inf:
                n = seq.tolist().index(word_map[END]) if has_ended else len(seq)
                words, log_probs = seq[:n].tolist(), word_log_probs[:n].tolist()
                # a view would be sent to other processes with the whole batch
                alphas = alphas[:n].clone() if with_alphas else None
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
    state = repeat_rows(state, samples)
    device, captions = encoder_out.device, []
    words = torch.full((len(encoder_out), samples), word_map[START], device=device)
    banned = torch.tensor(special_tokens(word_map), device=device)
    ended = torch.zeros_like(words, dtype=torch.bool)  # (B, samples)
    for step in range(max_decode_steps):
        scores, _, state = decoder.step(words, state, context)  # (B, samples, vocab_size)
        scores[..., banned] = -math.inf
        words = sample(scores.softmax(dim=2)).masked_fill(ended, PAD_ID)  # (B, samples)
        captions.append(words)
        ended = ended | (words == word_map[END])
        if (device.type == "cpu" or step % 4 == 3) and ended.all():
            break
    return torch.stack(captions, dim=2)
