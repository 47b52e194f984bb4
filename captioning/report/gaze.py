"""How focused attention is, how far it moves, and whether the words depend on it."""

import collections
import math

import torch

from captioning.data.words import START
from captioning.run.distributed import all_gather

# all other words count as content: nouns, verbs, adjectives, numerals; "front" and "next" are here
# for "in front of" and "next to"
FUNCTION_WORDS = frozenset(
    """a about above across after against all along alongside also although am amid among amongst an
    and another any are around as at away back be because been before behind being below beneath
    beside besides between both but by can could did do does doing down during each either every
    few for from front had has have having he her hers herself him himself his how if in inside
    into is it its itself just many may more most much near next no nor not of off on onto or
    other others out outside over past s several she so some something than that the their
    theirs them themselves then there these they this those through to together too toward
    towards under underneath until up upon very was way were what when where which while who
    whom whose will with within without would yet you your""".split()  # noqa: SIM905
)


def gaze_features(captioners, features, start, pictures=400):
    """Features of the first pictures, from all processes; None where there is no gaze to measure.

    :param features: float (N, n, encoder_dim), of this process's share, which begins at ``start``
    """
    if len(captioners) > 1 or captioners[0].config["attention"] == "mean":
        return None
    return torch.cat(all_gather(features[: max(0, pictures - start)].float()))


def measure_gaze(captioner, features, hypotheses, batch_size=16):
    """How focused attention is, how far it moves, and whether the words depend on it.

    Measured on the model's own captions, teacher-forced. Deletion: at one word, the tenth of the
    places with the largest weights gets the picture's mean feature, and the word's log-probability
    falls; a random tenth is taken away for comparison. The state stays as it was with the whole
    picture: only what attention sees at this one word changes.

    :param features: float (N, n, encoder_dim), the encoder's own grid
    :param hypotheses: list of at least N ``Hypothesis``
    :return: dict of means over content words (see ``FUNCTION_WORDS``), None where there are none:
        "places" (effective number: exp of the entropy of alpha), "peak" (largest weight),
        "movement" (half the L1 distance to the previous content word's alpha, 0 to 1), "fall" and
        "random fall" (nats), "deletion ratio" (of the two, not where a random tenth costs
        nothing); the other words' "function places"; and "num_pixels"
    """
    rows = [i for i in range(len(features)) if hypotheses[i].words]
    generator, found = torch.Generator().manual_seed(0), collections.defaultdict(list)
    for i in range(0, len(rows), batch_size):
        images = features[rows[i : i + batch_size]].to(captioner.device)
        spoken = [torch.tensor(hypotheses[row].words) for row in rows[i : i + batch_size]]
        with torch.no_grad():
            for name, values in _gaze_of(captioner, images, spoken, generator).items():
                found[name].append(values.cpu())
    means = {"num_pixels": captioner.decoder.encoded_image_size**2 or features.shape[1]}
    means |= {name: torch.cat(values).mean().item() for name, values in found.items()}
    means = {name: None if math.isnan(mean) else mean for name, mean in means.items()}
    if means.get("random fall", 0) > 0:
        means["deletion ratio"] = means["fall"] / means["random fall"]
    return means


def _gaze_of(captioner, images, spoken, generator):
    """The figures of :func:`measure_gaze` for each word of a batch, as a dict of tensors."""
    functional, decoder = torch.nn.functional, captioner.decoder
    row = torch.repeat_interleave(torch.tensor([len(words) for words in spoken]))
    step = torch.cat([torch.arange(len(words)) for words in spoken])
    content = torch.tensor([captioner.words[i] not in FUNCTION_WORDS for i in torch.cat(spoken)])
    spoken = torch.nn.utils.rnn.pad_sequence(spoken, batch_first=True).to(images.device)  # (B, T)
    inputs = functional.pad(spoken, (1, 0), value=captioner.word_map[START])
    context, state = decoder.init_hidden_state(images)
    states, alphas, scores = [], [], []
    for t in range(spoken.shape[1]):
        states.append(state)
        score, attention, state = decoder.step(inputs[:, t : t + 1], state, context)
        scores.append(score[:, 0])
        alphas.append(attention.alpha[:, 0])
    alphas = torch.stack(alphas, dim=1).float()  # (B, T, num_pixels)
    places = torch.special.entr(alphas).sum(dim=2).exp()[row, step]
    found = {"places": places[content], "function places": places[~content]}
    row, step = row[content], step[content]
    if not len(row):
        return found
    alpha, words = alphas[row, step], spoken[row, step].unsqueeze(1)  # (W, num_pixels), (W, 1)
    moved = (alpha[1:] - alpha[:-1]).abs().sum(dim=1) / 2
    found |= {"peak": alpha.amax(dim=1), "movement": moved[row[1:] == row[:-1]]}

    side, size = math.isqrt(images.shape[1]), math.isqrt(alpha.shape[1])
    if side != size:  # the places that are taken away are those of the encoder's own grid
        alpha = functional.interpolate(alpha.view(-1, 1, size, size), (side, side), mode="area")
    chance = torch.rand(len(row), side * side, generator=generator)
    before = tuple(torch.stack(parts)[step, row] for parts in zip(*states))  # (W, 1, decoder_dim)
    log_prob = torch.stack(scores, dim=1)[row, step].float().log_softmax(dim=1).gather(1, words)
    for name, order in (("fall", alpha.flatten(1)), ("random fall", chance.to(alpha))):
        most = order.topk(max(1, round(side * side / 10))).indices
        deleted = torch.zeros_like(order, dtype=torch.bool).scatter(1, most, True).unsqueeze(2)
        less = torch.where(deleted, images.mean(dim=1, keepdim=True)[row], images[row])
        context, _ = decoder.init_hidden_state(less)
        score, _, _ = decoder.step(inputs[row, step].unsqueeze(1), before, context)
        after = score[:, 0].float().log_softmax(dim=1).gather(1, words)
        found[name] = (log_prob - after).squeeze(1)
    return found
