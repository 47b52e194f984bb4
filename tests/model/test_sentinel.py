"""Tests of ``captioning/model/sentinel.py``, and of who must know one more place than the grid has.

What a step computes is held to the paper's equations in ``tests/test_models.py``.
"""

import re
from pathlib import Path

import pytest
import torch
from conftest import make_decoder, make_talkative, train_args
from helpers import CAPTIONS, LENGTHS, PICTURES, check_contract, features
from PIL import Image

import caption
import eval as evaluate
import models
import train
from captioning.model.grid import effective_places, on_encoder_grid, split_sentinel
from captioning.run import files


@pytest.mark.parametrize("num_pixels", [1, 4, 9, 64, 196])
def test_the_sentinel_is_what_stands_behind_a_square_grid(num_pixels):
    alphas = torch.rand(2, 3, num_pixels + 1)
    weights, sentinel = split_sentinel(alphas)
    assert weights.equal(alphas[..., :-1]) and sentinel.equal(alphas[..., -1])
    weights, sentinel = split_sentinel(alphas[..., :-1])
    assert weights.equal(alphas[..., :-1]) and sentinel is None
    assert on_encoder_grid(alphas, num_pixels).equal(weights)


def test_places_are_counted_among_what_the_sentinel_left():
    weights = torch.tensor([[0.25, 0.25, 0, 0], [0.1, 0.1, 0.1, 0.1], [1.0, 0, 0, 0]])
    torch.testing.assert_close(effective_places(weights), torch.tensor([2.0, 4, 1]))


def test_the_penalty_asks_that_places_are_visited_and_not_the_sentinel():
    alphas = torch.zeros(2, 2, 5)
    alphas[0] = torch.tensor([[0.1, 0.2, 0.3, 0, 0.4], [0, 0.5, 0, 0, 0.5]])
    expected = 0.9**2 + 0.3**2 + 0.7**2 + 1  # the second row says nothing
    assert models.doubly_stochastic_penalty(alphas).item() == pytest.approx(expected)


def test_the_sentinel_holds_the_memory_that_attention_sees_of_a_cell_with_more_states():
    """The c of (h, c): what stands behind them belongs to other layers."""
    decoder = make_decoder(attention="adaptive", scale=0.5)
    context, state = decoder.init_hidden_state(features())
    words, layers = torch.full((3, 1), 4), torch.zeros_like(state[0])
    expected, _, _ = decoder.step(words, state, context)
    recur = decoder.recur
    decoder.recur = lambda x, states: (*recur(x, states[:2]), *states[2:])
    found, _, _ = decoder.step(words, (*state, layers, layers), context)
    torch.testing.assert_close(found, expected)


def test_a_word_can_be_said_without_a_look():
    """Where the sentinel has all the weight, what the picture shows at its places is nothing."""
    decoder = make_decoder(attention="adaptive", scale=1.0)
    with torch.no_grad():
        decoder.attention.encoder_att.weight.zero_()
        decoder.attention.encoder_att.bias.fill_(-1e4)  # places are scored by the ReLU's zero
        decoder.attention.full_att.weight.fill_(100.0)
    encoder_out = features()
    context, state = decoder.init_hidden_state(encoder_out)
    words = torch.full((len(encoder_out), 1), 4)
    scores, attention, _ = decoder.step(words, state, context)
    assert attention.alpha.shape == (len(encoder_out), 1, 10)
    assert (attention.alpha[..., -1] > 0.99).any()
    blind = attention.alpha[:, 0, -1] > 0.999999
    shuffled = context._replace(encoder_out=context.encoder_out.flip(1) * 3)
    then, _, _ = decoder.step(words, state, shuffled)
    torch.testing.assert_close(then[blind], scores[blind], rtol=1e-4, atol=1e-4)


def test_the_sentinel_is_a_place_like_others_to_all_who_read_a_decoder(word_map):
    decoder, encoder_out = make_decoder(attention="adaptive"), features()
    check_contract(decoder)
    output = decoder(encoder_out, CAPTIONS, LENGTHS, PICTURES)
    sums = output.alphas.sum(2)  # (B, max_decode_length)
    real = torch.tensor([[t < length for t in range(sums.shape[1])] for length in LENGTHS])
    torch.testing.assert_close(sums, real.float())
    models.caption_loss(output, alpha_c=1.0)[0].backward()
    for name, parameter in decoder.sentinel.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("decoder", ["lstm", "gru"])
def test_the_scripts_tell_how_much_words_look(
    decoder, training_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = f"--attention adaptive --decoder {decoder} --epochs 1 --grounding 0.15 --alpha_c 0"
    flags = [*flags.split(), "--deep_output", "--attend_word"]  # as --preset focus
    train.main(train_args(training_data, Path("run"), *flags))
    (best,) = Path("run").glob("BEST_*")
    make_talkative(best, best)
    Image.new("RGB", (90, 60), "red").save("red.png")
    for flags in ("", "--html one.html"):
        flags = f"--model run --img red.png --device cpu --max_decode_steps 5 {flags}".split()
        caption.main(caption.get_args_parser().parse_args(flags))
    assert Path("captions/red_attention.png").exists()
    flags = f"--model run --data_folder {training_data[0]} --html all.html --device cpu --split val"
    evaluate.main(evaluate.get_args_parser().parse_args(flags.split()))
    (path,) = Path("run").glob("metrics_*.json")
    row = files.read_json(path)["beam_sizes"]["5"]
    assert 0 <= row["looks"] <= 100 and 0 <= row["function looks"] <= 100
    assert all(0 <= share <= 100 for share in row["looks least for"].values())
    said = capsys.readouterr().out
    assert re.search(rf"looks, % +{row['looks']:.2f}", said)
    assert "beam size 5 looks least for: " in said
    for page in ("one.html", "all.html"):
        text = Path(page).read_text()
        shares = re.findall(r'style="--looks: ([0-9.]+)%"', text)
        assert shares and text.count('class="word') == len(shares)
        assert '"looks":[' in text and all(0 <= float(share) <= 100 for share in shares)
