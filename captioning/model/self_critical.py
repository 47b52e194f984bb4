"""Self-critical training: captions are drawn, rewarded and made likelier (Rennie et al., 2017)."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from captioning.data.words import END, PAD_ID, START, decode_caption
from captioning.model.beams import sample_captions
from captioning.run.distributed import all_gather


def sample_and_reward(captioner, batch, encoder_out, reward, max_decode_steps, samples=5):
    """Sample captions, and reward each by how much it beats the others of its image.

    Rennie et al. 2017 compare with the greedy caption, which costs a search. The mean of the other
    samples costs nothing, and the advantages add up to zero (Luo 2020, "A better variant of
    self-critical sequence training").

    :param batch: ``Batch`` of this process, whose captions are not used
    :param encoder_out: float (num_images, n, encoder_dim), of its images
    :param reward: ``CiderD`` of all training images
    :return: ``Batch`` of the sampled captions, longest first, as arrays
    """
    count, captions = len(batch.numbers), np.zeros((0, 1), np.int64)
    if count:
        args = captioner.decoder, encoder_out, captioner.word_map, samples, max_decode_steps
        with torch.no_grad():
            captions = sample_captions(*args)  # (num_images, samples, steps)
        captions = captions.flatten(0, 1).cpu().numpy()  # (num_images * samples, steps)
    end = captioner.word_map[END]
    rewards = [
        reward(image, decode_caption(caption, captioner.words), end in caption)
        for image, caption in zip(batch.numbers.repeat(samples), captions)
    ]
    rewards = np.array(rewards, np.float32)
    means = rewards.reshape(-1, samples).mean(axis=1).repeat(samples)
    advantages = (rewards - means) * samples / (samples - 1)  # from the mean of the others
    lengths = (captions != PAD_ID).sum(axis=1)
    order = np.argsort(-lengths, kind="stable")
    starts = np.full((len(captions), 1), captioner.word_map[START])
    captions = np.concatenate([starts, captions], axis=1)[order, : lengths.max(initial=0) + 1]
    sums = all_gather([lengths.sum(), len(captions), rewards.sum()])
    words, number, total = np.sum(sums, axis=0, dtype=np.float32)
    return batch._replace(
        captions=captions,
        decode_lengths=lengths[order].tolist(),
        num_words=words,
        image_index=np.arange(count).repeat(samples)[order],
        advantages=advantages[order].astype(np.float32),
        reward=100 * total / number,
    )


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
