"""A model goes on with other words: which weights belong to a word, and where they go."""

import torch

from captioning.data.words import END, PAD, START, UNK
from captioning.run.messages import UserError, counted


def word_rows(build):
    """Names of a module's tensors that have a row for each word.

    :param build: function of the number of words that builds the module
    :raises UserError: if a tensor has words in another dimension than the first
    """
    with torch.device("meta"):  # which has shapes, and no memory
        few, more = (build(count).state_dict() for count in (8, 9))
    keys = [key for key in few if few[key].shape != more[key].shape]
    for key in keys:
        if few[key].shape[1:] != more[key].shape[1:]:
            raise UserError(
                f"other words cannot be taken over: {key} should have them in its first dimension, "
                "as the weight of an nn.Embedding or an nn.Linear has"
            )
    return keys


def with_words(state, known, fresh, word_map, build):
    """A module's weights for other words.

    :param state: state dict of the module for the words of ``known``
    :param fresh: state dict of the same module for those of ``word_map``: the rows of the words
        that are new stay as they are here
    :param known, word_map: dicts word -> id
    :param build: function of the number of words that builds the module
    :return: state dict for ``word_map``: the rows of the words that both know, and all tensors that
        belong to no word, are those of ``state``
    """
    if known == word_map:
        return state
    shared = [word for word in word_map if word in known]
    to, source = ([ids[word] for word in shared] for ids in (word_map, known))
    taken = dict(state)
    for key in word_rows(build):
        taken[key] = fresh[key].clone()
        taken[key][to] = state[key][source].to(fresh[key])
    return taken


def take_over(module, state, known, word_map, build):
    """Load weights that were trained with other words into a module; see :func:`with_words`."""
    module.load_state_dict(with_words(state, known, module.state_dict(), word_map, build))


def describe(path, known, word_map):
    """Say how many of the words a model knew already; nothing if it knew just these."""
    words = word_map.keys() - {PAD, UNK, START, END}
    new = len(words - known.keys())
    if known.keys() != word_map.keys():
        print(
            f"{path}: {len(words) - new:,} of {counted(len(words), 'word')} known; {new:,} "
            f"begin{'s' * (new == 1)} anew"
        )


def same_words(checkpoint, path, word_map, splits):
    """The word map of a run that goes on, and its data written with the numbers of that.

    :param word_map, splits: the data's word map, and its ``CaptionDataset``
    :raises UserError: if the data has other words than the run
    """
    known = checkpoint["word_map"]
    new, gone = len(word_map.keys() - known.keys()), len(known.keys() - word_map.keys())
    if new or gone:
        raise UserError(
            f"{path} was trained on other words than those of {splits[0].path} ({new:,} are new, "
            f"{gone:,} are gone): --resume goes on with the run as it was; start a new run from "
            "its weights with --init_from and another --output_folder"
        )
    for data in splits:
        data.renumber(word_map, known)
    return known
