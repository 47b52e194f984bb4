"""How focused attention is, how far it moves, and whether the words depend on it."""

import collections
import math

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from captioning.data.words import PAD_ID, START
from captioning.model.decoders import ImageContext
from captioning.model.grid import effective_places, on_encoder_grid, split_sentinel
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
    """Features of the first pictures, from all processes; of none if there is no gaze to measure.

    :param features: float (N, n, encoder_dim), of this process's share, which begins at ``start``
    """
    if len(captioners) > 1 or captioners[0].config["attention"] == "mean":
        pictures = 0
    parts = all_gather(features[: max(0, pictures - start)].float())
    return torch.cat([part for part in parts if len(part)] or parts[:1])  # a share may be empty


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
        nothing); the other words' "function places"; and "num_pixels". Empty for N = 0, or if
        nothing was said. Of what a visual sentinel left: "looks" (percent), "function looks", and
        "looks least for", a dict of ten words; places, peak and movement are then of the weights
        that places share
    """
    spoken = [i for i in range(len(features)) if hypotheses[i].words]
    generator, found = torch.Generator().manual_seed(0), collections.defaultdict(list)
    for start in range(0, len(spoken), batch_size):
        batch = spoken[start : start + batch_size]
        images = features[batch].to(captioner.device)
        captions = [torch.tensor(hypotheses[i].words) for i in batch]
        with torch.no_grad():
            for name, values in _gaze_of(captioner, images, captions, generator).items():
                found[name].append(values.cpu())
    found = {name: torch.cat(values) for name, values in found.items()}
    each = found.pop("each look", torch.empty(0, 2))  # of a word's id and how much it looked
    means = {name: values.mean().item() for name, values in found.items()}
    means = {name: None if math.isnan(mean) else mean for name, mean in means.items()}
    if spoken:
        means["num_pixels"] = round(means["num_pixels"])
    if (means.get("random fall") or 0) > 0:
        means["deletion ratio"] = means["fall"] / means["random fall"]
    if len(each):
        means["looks least for"] = _least(captioner.words, each)
    return means


def _least(words, looks, count=10, at_least=5):
    """The words said often enough that look least, as a dict of word to percent.

    :param looks: float (number said, 2), of a word's id and how much it looked
    """
    of_word = collections.defaultdict(list)
    for word, look in looks.tolist():
        of_word[words[int(word)]].append(look)
    means = {word: sum(of) / len(of) for word, of in of_word.items() if len(of) >= at_least}
    return {word: round(means[word], 1) for word in sorted(means, key=means.get)[:count]}


def _gaze_of(captioner, images, captions, generator):
    """The figures of :func:`measure_gaze` for each word of a batch, as a dict of tensors.

    :param images: float (B, n, encoder_dim)
    :param captions: list of B int64 tensors of at least one word id each
    """
    decoder, said = captioner.decoder, pad_sequence(captions, batch_first=True)  # (B, T)
    functional = torch.tensor([word in FUNCTION_WORDS for word in captioner.words])[said]
    content = ~functional & (said != PAD_ID)  # (B, T)
    chance = torch.zeros(*said.shape, images.shape[1])  # (B, T, n)
    chance[content] = torch.rand(int(content.sum()), images.shape[1], generator=generator)
    inputs = F.pad(said, (1, 0), value=captioner.word_map[START]).to(images.device)  # (B, T + 1)
    alphas, falls = [], {"fall": [], "random fall": []}
    context, state = decoder.init_hidden_state(images)
    for t in range(said.shape[1]):
        scores, attention, new_state = decoder.step(inputs[:, t : t + 1], state, context)
        alphas.append(attention.alpha[:, 0].float())  # (B, num_pixels)
        rows = content[:, t].nonzero()[:, 0].to(images.device)  # captions with a content word here
        previous, word = inputs[rows, t : t + 2].split(1, dim=1)  # (rows, 1) each
        log_prob = _log_prob(scores[rows], word)  # (rows,)
        before = tuple(s[rows] for s in state)
        shares = on_encoder_grid(alphas[-1], images.shape[1])  # (B, n)
        for name, weights in (("fall", shares), ("random fall", chance[:, t].to(shares))):
            deleted = _without_heaviest(images[rows], weights[rows])
            changed, _ = decoder.init_hidden_state(deleted)
            if isinstance(changed, ImageContext):  # the mean that a sentinel's cell reads stays
                changed = changed._replace(mean=context.mean[rows])
            new_scores, _, _ = decoder.step(previous, before, changed)
            falls[name].append(log_prob - _log_prob(new_scores, word))
        state = new_state
    alphas, sentinel = split_sentinel(torch.stack(alphas, dim=1).cpu())
    alphas = F.normalize(alphas, p=1, dim=2)  # (B, T, num_pixels)
    places = effective_places(alphas)  # (B, T)
    spoken = [alpha[is_content] for alpha, is_content in zip(alphas, content)]
    figures = {
        "num_pixels": torch.tensor([alphas.shape[2]], dtype=torch.float32),
        "places": places[content],
        "function places": places[functional],
        "peak": alphas.amax(dim=2)[content],
        "movement": torch.cat([(a[1:] - a[:-1]).abs().sum(dim=1) / 2 for a in spoken]),
    }
    if sentinel is not None:
        looks, real = 100 * (1 - sentinel), said != PAD_ID  # (B, T)
        figures |= {"looks": looks[content], "function looks": looks[functional]}
        figures["each look"] = torch.stack([said[real].float(), looks[real]], dim=1)
    return figures | {name: torch.cat(values) for name, values in falls.items()}


def _log_prob(scores, word):
    """Log-probability of a word, int64 (B, 1), from scores (B, 1, vocab_size): float32 (B,)."""
    return scores[:, 0].float().log_softmax(dim=1).gather(1, word)[:, 0]


def _without_heaviest(images, weights):
    """Images (B, n, encoder_dim) whose heaviest tenth by weights (B, n) is their mean feature."""
    count = max(1, round(weights.shape[1] / 10))
    heaviest = weights.topk(count).indices  # (B, count)
    gone = torch.zeros_like(weights, dtype=torch.bool).scatter(1, heaviest, True)  # (B, n)
    return torch.where(gone.unsqueeze(2), images.mean(dim=1, keepdim=True), images)
