"""The grid of places that attention weighs: its pooling, codes of positions, its number type."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F


def compute_dtype(device):
    """Type of the matrix products: bfloat16 under ``torch.autocast`` (``--amp``), else float32."""
    device = torch.device(device)
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept from a caller's inference may serve a training, too
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


def split_sentinel(alphas):
    """Part the weights of a grid's places from a visual sentinel's, which stands behind them.

    :param alphas: float (..., num_pixels), or (..., num_pixels + 1) with ``--attention adaptive``
    :return: (weights, sentinel): float (..., num_pixels); float (...), or None if there is none
    """
    num_pixels = math.isqrt(alphas.shape[-1]) ** 2  # grids are square
    sentinel = alphas[..., -1] if num_pixels < alphas.shape[-1] else None
    return alphas[..., :num_pixels], sentinel


def effective_places(weights):
    """Over how many places weights, float (..., num_pixels), are spread: exp of their entropy."""
    shares = F.normalize(weights, p=1, dim=-1)  # a sentinel may have had a part of them
    return torch.special.entr(shares).sum(dim=-1).exp()


def context_vector(weights, context):
    """The features' sum by attention's weights (section 3.1.2), on the grid that attention sees.

    :param weights: float (B, R, num_pixels)
    :param context: ``ImageContext``
    :return: float (B, R, encoder_dim)
    """
    weights = weights.to(context.encoder_out.dtype)  # (B, R, num_pixels)
    if context.pool is not None:
        weights = weights @ context.pool  # (B, R, n)
    return weights @ context.encoder_out  # (B, R, encoder_dim)


def on_encoder_grid(alphas, n):
    """What attention's weights give to each place of the encoder's own grid.

    :param alphas: float (..., num_pixels), of the grid that attention sees, without a sentinel's
    :param n: places of the encoder's grid
    :return: float (..., n), with the same sums
    """
    alphas, _ = split_sentinel(alphas)  # (..., num_pixels)
    side, new_side = math.isqrt(n), math.isqrt(alphas.shape[-1])
    return alphas if side == new_side else alphas @ pooling_matrix(side, new_side, alphas.device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
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


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def position_waves(length, width, device):
    """A fixed code of each word's place in a caption (Vaswani et al. 2017, section 3.5).

    :return: float32 (length, width)
    """
    rates = torch.exp(-math.log(10000) * torch.arange(0, width, 2) / width)
    angles = torch.arange(length).unsqueeze(1) * rates  # (length, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width].to(device)
