"""How many kernels a word takes in training: without CUDA graphs a GPU waits for their launches."""

import pytest
import torch
from conftest import make_decoder
from torch.utils._python_dispatch import TorchDispatchMode

import models


class Kernels(TorchDispatchMode):
    """Counts the operators that compute or copy; views of a tensor cost a GPU nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias and not alias.is_write for alias in aliases)
        self.count += not is_view and func._schema.name != "aten::_unsafe_view"
        return func(*args, **(kwargs or {}))


def kernels(steps, options):
    """Of an update of two captions of so many words: (forward, backward)."""
    dropouts = dict.fromkeys(("dropout", "embed_dropout", "feature_dropout"), 0.5)
    decoder = make_decoder(**dropouts, **options).train()
    captions = torch.arange(2 * (steps + 1)).view(2, -1) % 6 + 1
    with Kernels() as forward:
        output = decoder(torch.randn(2, 4, 6), captions, [steps] * 2, torch.arange(2))
        loss, _ = models.caption_loss(output, 2 * steps, label_smoothing=0.1, alpha_c=0.1)
    with Kernels() as backward:
        loss.backward()
    return torch.tensor([forward.count, backward.count])


@pytest.mark.parametrize(
    "options, most",
    [({}, (33, 57)), ({"decoder": "gru"}, (36, 56)), ({"deep_output": True}, (37, 67))],
    ids=str,
)
def test_a_word_takes_no_more_kernels_than_it_did(options, most):
    """Counted on a CPU, by torch 2.14, where a recurrent cell is not one kernel as on a GPU."""
    per_word = (kernels(12, options) - kernels(6, options)) / 6
    assert (per_word <= torch.tensor(most)).all(), per_word
