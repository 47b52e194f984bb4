"""The paper's losses on attention: the doubly stochastic penalty, and hard attention's gradient."""

import torch

from captioning.model.grid import split_sentinel
from captioning.run.messages import UserError


def doubly_stochastic_penalty(alphas):
    """Penalty that makes attention visit every pixel (Xu et al. 2015, eq. 14).

    :param alphas: float (B, max_decode_length, num_pixels), zero past each caption's end; what a
        sentinel behind them got is no visit
    :return: scalar: the sum over captions and pixels of (1 - sum_t alpha_t)^2
    """
    visits = alphas.sum(dim=1)  # (B, num_pixels)
    has_words = visits.sum(dim=1) > 0  # a CUDA graph fills its batch with rows that say nothing
    visits, _ = split_sentinel(visits)  # (B, num_pixels)
    return ((1 - visits).square().sum(dim=1) * has_words).sum()


def hard_attention_loss(output, word_nll, decoder, entropy_weight=0.002):
    """REINFORCE on the sampled locations (section 4.1), summed; updates the decoder's baseline.

    :raises UserError: if the decoder keeps none
    """
    if not hasattr(decoder, "baseline"):
        raise UserError(
            f"its attention gives a log_prob, but {type(decoder).__name__} keeps no baseline: mark "
            "the attention's function, as captioning/model/attentions.py does (hard.samples = "
            "True); a decoder of your own needs a line in its constructor, "
            'self.register_buffer("baseline", torch.zeros(()))'
        )
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
