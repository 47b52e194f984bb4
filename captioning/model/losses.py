"""The gradient estimate of hard attention (section 4.1 of the paper)."""

import torch


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
