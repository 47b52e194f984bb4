"""Tests of ``captioning/model/grid.py``."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_decoder
from helpers import CAPTIONS, LENGTHS, PICTURES, features

import models


@pytest.mark.parametrize("size, wanted", [(8, 14), (14, 7), (7, 3), (3, 3), (5, 1), (2, 5)])
def test_pooling_matrix_is_adaptive_average_pooling(size, wanted):
    grid = torch.randn(2, size * size, 4, dtype=torch.float64)
    pooled = models.pooling_matrix(size, wanted, dtype=torch.float64) @ grid
    expected = (
        F.adaptive_avg_pool2d(grid.permute(0, 2, 1).unflatten(2, (size, size)), wanted)
        .flatten(2)
        .permute(0, 2, 1)
    )
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("side", [2, 3, 8])
def test_position_code_tells_every_place_apart_and_is_added_to_the_features(side):
    code = models.position_code(side, 12)
    assert code.shape == (side * side, 12) and code.abs().max() <= 0.5
    distances = torch.cdist(code, code) + torch.eye(side * side)
    assert distances.min() > 0.1
    grid = code.view(side, side, 12)
    torch.testing.assert_close(
        grid[0, :, 6:], grid[-1, :, 6:]
    )  # the second half says the column, the first the row
    torch.testing.assert_close(grid[:, 0, :6], grid[:, -1, :6])
    with_code, without = make_decoder(position_encoding=True), make_decoder()
    out = with_code(features(side=side), CAPTIONS, LENGTHS, PICTURES)
    expected = without(
        features(side=side) + models.position_code(side, 6), CAPTIONS, LENGTHS, PICTURES
    )
    torch.testing.assert_close(out.scores, expected.scores)


def test_what_inference_keeps_serves_a_training_too():
    decoder = make_decoder(position_encoding=True, encoded_image_size=5)
    for matrix in (models.pooling_matrix, models.position_code):
        matrix.cache_clear()
    with torch.inference_mode():
        decoder.init_hidden_state(features())
    models.caption_loss(decoder(features(), CAPTIONS, LENGTHS, PICTURES))[0].backward()
    assert all(p.grad is not None for p in decoder.parameters() if p.requires_grad)


def test_the_position_code_is_as_strong_as_in_the_models_that_learned_with_it():
    code = models.position_code(4, 12)
    assert code.abs().max() <= 0.1
    assert code[0, 0].item() == pytest.approx(0.1 * math.sin(math.pi / 8))
