"""Encoder, decoder, losses and beam search against plain forms of the same equations."""

import gc
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import build_decoder, make_decoder
from helpers import CAPTIONS, END, LENGTHS, PAD, PAIRS, PICTURES, RECURRENT, START, features

import models


def by_row(output, lengths):
    """Packed scores as one (length, vocab_size) per caption; rows may run past its end."""
    rows = [output.rows == row for row in range(len(lengths))]
    for row, length in zip(rows, lengths):
        real = output.targets[row] != PAD
        assert real[:length].all() and not real[length:].any() and len(real) >= length
    return [output.scores[row][:length] for row, length in zip(rows, lengths)]


def textbook(decoder, encoder_out, captions, lengths, pictures):
    """The tutorial's equations, one caption and one word at a time, by torch's own cells.

    What somebody added is called for one caption and one word, too: it has its own formula.

    :return: lists of (length, vocab_size) scores and (length, num_pixels) alphas, one per caption
    """
    cells = torch.nn.RNNCell, torch.nn.GRUCell, torch.nn.LSTMCell
    is_paper = type(decoder) is models.DecoderWithAttention and type(decoder.decode_step) in cells
    if not is_paper:
        return by_its_own_step(decoder, encoder_out, captions, lengths, pictures)
    scores, alphas = [], []
    size = math.isqrt(encoder_out.shape[1])
    if decoder.encoded_image_size not in (0, size):
        grid = encoder_out.permute(0, 2, 1).unflatten(2, (size, size))
        encoder_out = (
            F.adaptive_avg_pool2d(grid, decoder.encoded_image_size).flatten(2).permute(0, 2, 1)
        )
    for caption, length, picture in zip(captions, lengths, pictures):
        pixels = encoder_out[picture]
        mean = pixels.mean(0)
        h = decoder.init_h(mean)
        is_lstm = isinstance(decoder.decode_step, torch.nn.LSTMCell)
        state = (h, decoder.init_c(mean)) if is_lstm else h
        scores.append([])
        alphas.append([])
        for t in range(length):
            att, embedded = decoder.attention, decoder.embedding(caption[t])
            if decoder.sentinel:
                output, context, alpha, state = adaptive(decoder, embedded, pixels, state)
                if decoder.deep_output:
                    output = embedded + decoder.deep_h(output) + decoder.deep_z(context)
                scores[-1].append(decoder.fc(output))
                alphas[-1].append(alpha)
                continue
            query = torch.cat([h, embedded]) if decoder.attend_word else h
            if type(att) is models.NoAttention:
                energies = torch.zeros(len(pixels))
            elif type(att) is models.Attention:
                hidden = torch.relu(att.encoder_att(pixels) + att.decoder_att(query))
                energies = att.full_att(hidden).squeeze(1)
            else:
                energies = att(att.project(pixels[None]), query[None, None])[0, 0]
            alpha = weights = energies.softmax(0)
            if getattr(decoder.attend, "samples", False):
                weights = F.one_hot(alpha.argmax(), len(alpha)).float()
            elif decoder.attend is not models.soft:
                looked = decoder.attend(energies[None, None], decoder)
                alpha, weights = looked.alpha[0, 0], looked.weights[0, 0]
            context = torch.sigmoid(decoder.f_beta(h)) * (weights.unsqueeze(1) * pixels).sum(0)
            state = decoder.decode_step(torch.cat([embedded, context]), state)
            h = state[0] if is_lstm else state
            output = (
                embedded + decoder.deep_h(h) + decoder.deep_z(context) if decoder.deep_output else h
            )
            scores[-1].append(decoder.fc(output))
            alphas[-1].append(alpha)
    return [torch.stack(s) for s in scores], [torch.stack(a) for a in alphas]


def adaptive(decoder, embedded, pixels, state):
    """A step of Lu et al. 2017, sections 2.2 and 2.3, for one caption: eqs. 6 to 13."""
    sentinel, att = decoder.sentinel, decoder.attention
    is_lstm, x = isinstance(state, tuple), torch.cat([embedded, pixels.mean(0)])
    gate = torch.sigmoid(sentinel.gate_x(x) + sentinel.gate_h(state[0] if is_lstm else state))
    state = decoder.decode_step(x, state)
    h, memory = state if is_lstm else (state, state)
    s = gate * torch.tanh(memory)
    asked = att.decoder_att(torch.cat([h, embedded]) if decoder.attend_word else h)
    z = att.full_att(torch.relu(att.encoder_att(pixels) + asked)).squeeze(1)
    own = att.full_att(torch.relu(sentinel.sentinel_att(s) + asked))
    alpha = torch.cat([z, own]).softmax(0)
    *weights, beta = alpha
    context = sum(weight * pixel for weight, pixel in zip(weights, pixels))
    return h + sentinel.image(context) + beta * s, context, alpha, state


def by_its_own_step(decoder, encoder_out, captions, lengths, pictures):
    """What :func:`textbook` returns, by the decoder's own ``step`` for one caption at a time."""
    scores, alphas = [], []
    for caption, length, picture in zip(captions, lengths, pictures):
        context, state = decoder.init_hidden_state(encoder_out[picture][None])
        scores.append([])
        alphas.append([])
        for t in range(length):
            words, looked, state = decoder.step(caption[t].view(1, 1), state, context)
            scores[-1].append(words[0, 0])
            alphas[-1].append(looked.alpha[0, 0])
    return [torch.stack(s) for s in scores], [torch.stack(a) for a in alphas]


VARIANTS = [
    dict(zip(("decoder", "attention", "deep_output", "encoded_image_size"), values))
    for values in itertools.product(RECURRENT, models.ATTENTIONS, (False, True), (0, 2, 5))
]


VARIANTS += [{"attention": attention, "attend_word": True} for attention in models.ATTENTIONS]


@pytest.mark.parametrize(
    "options", VARIANTS, ids=lambda options: "-".join(map(str, options.values()))
)
@pytest.mark.parametrize("epsilon", [1.0, torch.tensor(1.0)], ids=["at_once", "word_by_word"])
def test_decoder_equals_the_textbook(options, epsilon):
    decoder = make_decoder(scale=1.0, **options)
    encoder_out = features().requires_grad_()
    output = decoder(encoder_out, CAPTIONS, LENGTHS, PICTURES, epsilon)
    scores, alphas = textbook(decoder, encoder_out, CAPTIONS, LENGTHS, PICTURES)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(by_row(output, LENGTHS)[row], scores[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.alphas[row, :length], alphas[row], rtol=1e-4, atol=1e-5)

    # a random weighing of all that comes out, whose gradient must reach all parameters alike
    weights = (
        [torch.randn(len(s), s.shape[1]) for s in scores],
        [torch.randn(*a.shape) for a in alphas],
    )
    tensors = {name: p for name, p in decoder.named_parameters() if p.requires_grad} | {
        "encoder_out": encoder_out
    }
    gradients = []
    for these_scores, these_alphas in (
        (by_row(output, LENGTHS), [a[:n] for a, n in zip(output.alphas, LENGTHS)]),
        (scores, alphas),
    ):
        total = sum((w * s).sum() for w, s in zip(weights[0], these_scores))
        total = total + sum((w * a).sum() for w, a in zip(weights[1], these_alphas))
        gradients.append(torch.autograd.grad(total, list(tensors.values()), allow_unused=True))
    for name, ours, theirs in zip(tensors, *gradients):
        ours, theirs = (torch.zeros_like(tensors[name]) if g is None else g for g in (ours, theirs))
        torch.testing.assert_close(
            ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


MANY = CAPTIONS.repeat_interleave(5, dim=0), [n for n in LENGTHS for _ in range(5)]


@pytest.mark.parametrize("decoder, attention", PAIRS)
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("amp", [False, True])
def test_an_update_leaves_nothing_behind(decoder, attention, backward, amp):
    """Without the cycle collector: what it would free late would fill a GPU meanwhile."""
    decoder = make_decoder(decoder=decoder, attention=attention).train()

    def left():
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    def update(epsilon):
        with torch.autocast("cpu", torch.bfloat16, amp):
            output = decoder(features(), CAPTIONS, LENGTHS, PICTURES, epsilon)
        loss, _ = models.caption_loss(output, decoder=decoder)
        if backward:
            loss.backward()

    update(1.0)  # the first one makes the gradients
    gc.collect()
    gc.disable()
    try:
        before = left()
        for epsilon in (1.0, 0.5):
            update(epsilon)
        assert left() == before
    finally:
        gc.enable()


def test_gradients_are_the_same_every_time():
    """Large enough for several threads: a resumed run must add in the same order."""
    decoder = make_decoder(scale=0.5, encoder_dim=64, attention_dim=512)
    encoder_out = features(16, side=8, encoder_dim=64).requires_grad_()
    captions, pictures = (
        CAPTIONS[3:].expand(80, -1),
        torch.randperm(80, generator=torch.Generator().manual_seed(0)) % 16,
    )
    tensors = [
        encoder_out,
        *(p for p in decoder.parameters() if p is not decoder.attention.full_att.bias),
    ]
    gradients = [
        torch.autograd.grad(
            models.caption_loss(decoder(encoder_out, captions, [2] * 80, pictures))[0], tensors
        )
        for _ in range(10)
    ]
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other))


@pytest.mark.parametrize("decoder", ["lstm", "gru"])
def test_parameter_names_are_the_tutorials(decoder):
    layers = [
        "attention.encoder_att",
        "attention.decoder_att",
        "attention.full_att",
        "init_h",
        "f_beta",
        "fc",
    ]
    layers += ["init_c"] if decoder == "lstm" else []
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {
        "embedding.weight"
    }
    expected |= {
        f"decode_step.{kind}_{side}" for kind in ("weight", "bias") for side in ("ih", "hh")
    }
    assert set(make_decoder(decoder=decoder).state_dict()) == expected


@pytest.mark.parametrize("decoder, attention", PAIRS)
@pytest.mark.parametrize("encoded_image_size", [0, 2])
def test_forward_equals_repeated_step(decoder, attention, encoded_image_size):
    options = {"attention": attention, "encoded_image_size": encoded_image_size}
    decoder = make_decoder(decoder=decoder, **options)
    encoder_out = features()
    with torch.no_grad():
        output = decoder(encoder_out, CAPTIONS, LENGTHS, PICTURES)
        context, state = decoder.init_hidden_state(encoder_out[PICTURES])
        for t in range(LENGTHS[0]):
            live = sum(length > t for length in LENGTHS)
            scores, looked, state = decoder.step(CAPTIONS[:, t : t + 1], state, context)
            for row in range(live):
                torch.testing.assert_close(by_row(output, LENGTHS)[row][t], scores[row, 0])
                torch.testing.assert_close(output.alphas[row, t], looked.alpha[row, 0])


@pytest.mark.parametrize("decoder, attention", PAIRS)
def test_a_caption_does_not_depend_on_its_neighbours(decoder, attention):
    """Alone, in another batch, padded, run on past its end: its scores stay what they are."""
    decoder, encoder_out = make_decoder(decoder=decoder, attention=attention), features()
    with torch.no_grad():
        together = by_row(decoder(encoder_out, CAPTIONS, LENGTHS, PICTURES), LENGTHS)
        padded = decoder(encoder_out, F.pad(CAPTIONS, (0, 3)), [9] * 4, PICTURES)
        turned = decoder(encoder_out, CAPTIONS.flip(0), [6] * 4, PICTURES.flip(0))
        many = by_row(decoder(encoder_out, *MANY, PICTURES.repeat_interleave(5)), MANY[1])
        for row, length in enumerate(LENGTHS):
            alone = decoder(
                encoder_out[PICTURES[row]][None],
                CAPTIONS[row : row + 1, : length + 1],
                [length],
                torch.tensor([0]),
            )
            torch.testing.assert_close(alone.scores, together[row])
            torch.testing.assert_close(many[5 * row + 2], together[row])
            torch.testing.assert_close(padded.scores[padded.rows == row][:length], together[row])
            torch.testing.assert_close(
                turned.scores[turned.rows == 3 - row][:length], together[row]
            )


@pytest.mark.parametrize("decoder, attention", PAIRS)
@pytest.mark.parametrize("lengths", [LENGTHS, [6] * 4], ids=["exact", "run_on"])
def test_alphas_sum_to_one_while_a_caption_lasts_and_are_zero_after(decoder, attention, lengths):
    decoder = make_decoder(decoder=decoder, attention=attention).train()
    alphas = decoder(features(), CAPTIONS, lengths, PICTURES).alphas
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(alphas[row, :length].sum(1), torch.ones(length))
        assert (alphas[row, length:] == 0).all()


def test_targets_are_the_next_words():
    output = make_decoder()(features(), CAPTIONS, LENGTHS, PICTURES)
    for row, length in enumerate(LENGTHS):
        targets = output.targets[output.rows == row].tolist()
        assert targets[:length] == CAPTIONS[row, 1 : length + 1].tolist()
        assert set(targets[length:]) <= {PAD}


def test_lengths_must_fall():
    with pytest.raises(ValueError, match="decreasing"):
        make_decoder()(features(), CAPTIONS, [6, 4, 5, 2], PICTURES)


@pytest.mark.parametrize("options", [{"decoder": "unheard_of"}, {"attention": "unheard_of"}])
def test_unknown_decoder_is_refused(options, fails):
    with fails(next(iter(options.values()))):
        make_decoder(**options)


@pytest.mark.parametrize("decoder", models.DECODERS)
@pytest.mark.parametrize("encoded_image_size", [0, 2])
def test_bfloat16_products_give_nearly_the_same(decoder, encoded_image_size):
    decoder = make_decoder(
        scale=1.0,
        decoder=decoder,
        encoded_image_size=encoded_image_size,
        deep_output=decoder in RECURRENT,
    )
    outputs = []
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, amp):
            outputs.append(decoder(features(), CAPTIONS, LENGTHS, PICTURES))
    exact, rough = ([out.scores.log_softmax(1), out.alphas] for out in outputs)
    for a, b in zip(exact, rough):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)
    gradients = []
    for output in outputs:
        decoder.zero_grad()
        models.caption_loss(output)[0].backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
        )
    assert F.cosine_similarity(*gradients, dim=0) > 0.999


def test_dropout_acts_in_training_only():
    decoder = make_decoder(dropout=0.5, embed_dropout=0.5, feature_dropout=0.5)
    for part in (decoder.dropout, decoder.embed_dropout, decoder.feature_dropout):
        decoder.eval()
        first, second = (decoder(features(), CAPTIONS, LENGTHS, PICTURES).scores for _ in range(2))
        assert torch.equal(first, second)
        part.train()
        assert not torch.equal(first, decoder(features(), CAPTIONS, LENGTHS, PICTURES).scores)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_loss_is_cross_entropy_over_real_words(label_smoothing):
    output = make_decoder()(
        features(), CAPTIONS, [6] * 4, PICTURES
    )  # rows run on past their ends: targets <pad>
    loss, nll = models.caption_loss(output, label_smoothing=label_smoothing, alpha_c=0)
    expected = F.cross_entropy(
        output.scores, output.targets, ignore_index=PAD, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        nll, F.cross_entropy(output.scores, output.targets, ignore_index=PAD)
    )
    assert not nll.requires_grad


def test_penalty_is_equation_14():
    alphas = make_decoder()(features(), CAPTIONS, LENGTHS, PICTURES).alphas.detach()
    total = 0.0
    for row, length in enumerate(LENGTHS):
        for pixel in range(9):
            total += (1 - sum(alphas[row, t, pixel].item() for t in range(length))) ** 2
    assert models.doubly_stochastic_penalty(alphas).item() == pytest.approx(total, rel=1e-5)
    output = make_decoder()(features(), CAPTIONS, LENGTHS, PICTURES)
    with_it, without = (
        models.caption_loss(output, alpha_c=alpha_c)[0].item() for alpha_c in (0.7, 0)
    )
    assert with_it - without == pytest.approx(0.7 * total / sum(LENGTHS), rel=1e-4)


@pytest.mark.parametrize("label_smoothing, alpha_c", [(0.1, 1.0), (0.0, 0.0)])
def test_padding_never_counts(label_smoothing, alpha_c):
    """Captions padded and run on, as on a GPU, give the same loss and gradients."""
    results = []
    for captions, lengths in ((CAPTIONS, LENGTHS), (F.pad(CAPTIONS, (0, 2)), [8] * 4)):
        decoder = make_decoder()
        loss, nll = models.caption_loss(
            decoder(features(), captions, lengths, PICTURES), None, label_smoothing, alpha_c
        )
        loss.backward()
        results.append([loss, nll, *(p.grad for p in decoder.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", models.ATTENTIONS)
def test_rows_without_words_never_count(attention):
    """What fills a CUDA graph's batch up to one of its shapes."""
    results = []
    for more in (0, 12):
        decoder = make_decoder(attention=attention)
        captions, lengths = F.pad(CAPTIONS, (0, 2, 0, more)), [8] * (4 + more)
        output = decoder(features(), captions, lengths, F.pad(PICTURES, (0, more)))
        if (
            output.log_probs is None and attention == "hard"
        ):  # given, as in training none are the same
            log_probs = output.alphas.amax(2).clamp_min(1e-9).log() * (output.alphas.sum(2) > 0)
            output = output._replace(log_probs=log_probs)
        loss, nll = models.caption_loss(output, None, 0.1, decoder=decoder)
        loss.backward()
        results.append([loss, nll, *(p.grad for p in decoder.parameters() if p.grad is not None)])
        if attention == "hard":
            results[-1].append(decoder.baseline)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_shares_of_a_batch_add_up():
    decoder, num_words = make_decoder(), sum(LENGTHS)
    whole, _ = models.caption_loss(
        decoder(features(), CAPTIONS, LENGTHS, PICTURES), label_smoothing=0.1
    )
    parts = [
        models.caption_loss(
            decoder(features(), CAPTIONS[rows], LENGTHS[rows], PICTURES[rows]), num_words, 0.1
        )[0]
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("decoder, attention", PAIRS)
def test_one_batch_can_be_learnt_by_heart(decoder, attention):
    torch.manual_seed(1)
    sizes = {"attention_dim": 16, "embed_dim": 16, "decoder_dim": 32}
    decoder = build_decoder(decoder=decoder, attention=attention, **sizes)
    pictures = torch.arange(4)  # one picture per caption: only the picture tells them apart
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.02)
    decoder.train()
    for _ in range(90):
        loss, nll = models.caption_loss(
            decoder(features(4), CAPTIONS, LENGTHS, pictures), alpha_c=0.01, decoder=decoder
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decoder.eval()
    output = decoder(features(4), CAPTIONS, LENGTHS, pictures)
    assert models.caption_loss(output)[1] < 0.1
    real = output.targets != PAD
    assert (output.scores.argmax(1) == output.targets)[real].all() and real.sum() == sum(LENGTHS)


@pytest.mark.parametrize("argmax", [False, True])
def test_epsilon_one_is_teacher_forcing(argmax):
    decoder = make_decoder()
    forced = decoder(features(), CAPTIONS, LENGTHS, PICTURES)
    torch.testing.assert_close(
        decoder(features(), CAPTIONS, LENGTHS, PICTURES, 1.0, argmax), forced, rtol=0, atol=0
    )
    torch.testing.assert_close(
        decoder(features(), CAPTIONS, LENGTHS, PICTURES, torch.tensor(1.0), argmax), forced
    )


def test_epsilon_zero_feeds_the_models_own_words():
    decoder = make_decoder()
    output = decoder(features(), CAPTIONS, LENGTHS, PICTURES, 0.0, argmax=True)
    differs = False
    for row, length in enumerate(LENGTHS):
        context, state = decoder.init_hidden_state(features()[PICTURES[row]][None])
        word = torch.tensor([[START]])
        for t in range(length):
            scores, _, state = decoder.step(word, state, context)
            torch.testing.assert_close(by_row(output, LENGTHS)[row][t], scores[0, 0])
            word = scores.argmax(-1)
            differs |= word.item() != CAPTIONS[row, t + 1].item()
    assert differs  # or teacher forcing would have passed
    assert torch.equal(output.targets, decoder(features(), CAPTIONS, LENGTHS, PICTURES).targets)


def test_own_words_are_drawn_from_the_distribution_and_per_token():
    """One word is certain: what is fed is it or the true word, as often as epsilon says."""
    decoder = make_decoder()
    with torch.no_grad():
        decoder.fc.weight.zero_()
        decoder.fc.bias.copy_(F.one_hot(torch.tensor(4), 10) * 50.0)
    fed = []
    decoder.embedding.register_forward_hook(lambda _, args, out: fed.append(args[0].squeeze(1)))
    captions = torch.tensor([[START, 1, 1, 1, 1, END]]).expand(300, -1)
    decoder(features(), captions, [5] * 300, torch.zeros(300, dtype=torch.long), 0.3)
    assert (fed[0] == START).all()
    later = torch.stack(fed[1:])
    assert set(later.unique().tolist()) == {1, 4}
    assert abs((later == 1).float().mean() - 0.3) < 0.06
    assert (later[0] != later[1]).float().mean() > 0  # a coin for each token, not for each caption
