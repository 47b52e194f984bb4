"""Captions that agree with what people said of similar images."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from captioning.data.features import encode_split
from captioning.model.cider import CiderD
from captioning.model.encoders import feature_store, tell_sizes
from captioning.run.distributed import broadcast
from captioning.run.machine import autocast


class Consensus:
    """Prefers hypotheses that agree with what people said of similar images.

    Mao et al. 2015, "Deep captioning with multimodal recurrent neural networks"; Devlin et al.
    2015, "Exploring nearest neighbor approaches". Images are alike if their mean features are: by
    the cosine after each channel was given mean 0 and deviation 1 over the training images. A
    caption's agreement is its CIDEr-D against the captions of the ten nearest training images,
    weighted by exp(cosine / 0.1); its score rises by ``weight`` x that.

    :param captioners: list of ``Captioner`` that decode together
    :param references: list (training images) of lists (captions) of lists of words
    :param means: list of float32 arrays (N, encoder_dim), each captioner's mean features of those
    """

    def __init__(self, captioners, references, means, weight):
        self.text, self.weight = captioners[0].text, weight
        self.agreement, self.spaces = CiderD(references), []
        for mean in map(torch.as_tensor, means):
            center, spread = mean.mean(dim=0), mean.std(dim=0, correction=0)
            spread[spread == 0] = math.inf  # a channel that is the same in all images tells nothing
            self.spaces.append((center, spread, F.normalize((mean - center) / spread, dim=1)))

    @classmethod
    def of(cls, captioners, data, weight, workers=2, amp=False):
        """The consensus of the data that captioners were trained on.

        :param data: ``CaptionDataset``, the training split; mean features are kept beside its file
        :param amp: encode in bfloat16, if a captioner's own training does not say
        """
        tell_sizes(captioners, data)
        means = []
        for captioner in captioners:
            # in the arithmetic of its training, so that the features that this stored serve
            with autocast(captioner.device, captioner.config.get("amp", amp)):
                means.append(mean_features(data, captioner, data.path.parent, workers))
        return cls(captioners, data.references, means, weight)

    def __call__(self, encoder_outs, found):
        """Rank hypotheses anew.

        :param encoder_outs: list of float (B, n, encoder_dim), each captioner's own features
        :param found: list of B lists of ``Hypothesis``
        :return: the same lists, best first, with the new scores
        """
        with autocast(torch.device("cpu"), False):  # bfloat16 cannot tell near neighbours apart
            cosines = [
                F.normalize((out.float().mean(1).cpu() - center) / spread, dim=1) @ known.T
                for out, (center, spread, known) in zip(encoder_outs, self.spaces)
            ]  # (B, N) each
        nearest = torch.stack(cosines).mean(0).topk(min(10, len(self.spaces[0][2])))
        shares = (nearest.values / 0.1).softmax(1).tolist()
        ranked = []
        for hypotheses, *neighbours in zip(found, shares, nearest.indices.tolist()):
            scored = []
            for h in hypotheses:
                words, pairs = self.text(h), zip(*neighbours)
                agreement = sum(share * self.agreement(i, words, h.ended) for share, i in pairs)
                scored.append(h._replace(score=h.score + self.weight * agreement))
            ranked.append(sorted(scored, key=lambda h: -h.score))
        return ranked


def mean_features(dataset, captioner, folder, workers):
    """The mean feature of each image: of the feature store if there is one, else kept beside it.

    :return: float32 array (N, encoder_dim)
    """
    path, encode = feature_store(captioner, dataset, folder), captioner.encode
    if not broadcast(path.exists()):
        path = path.with_name(f"MEAN_{path.name}")
        encode = lambda images: captioner.encode(images).float().mean(dim=1, keepdim=True)
    features = encode_split(dataset, encode, path, workers=workers)
    return np.asarray(features.mean(1, dtype=np.float32))
