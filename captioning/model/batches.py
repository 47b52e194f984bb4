"""One update's images and captions, as a process sees them."""

from typing import Any, NamedTuple

import torch


class Batch(NamedTuple):
    """One process's share of an update."""

    numbers: Any  # int64 (num_images,), numpy: the images' numbers in the split
    # uint8 images (num_images, 3, S, S), if the CNN is trained too; if it is frozen its features,
    # float16 (num_images, n, encoder_dim), or their numbers, int64, if all are on the GPU
    inputs: Any
    captions: Any  # int64 (B, max_decode_length + 1)
    decode_lengths: list  # of B ints
    image_index: Any  # int64 (B,): each caption's image in this batch
    num_words: Any  # float32 (), words of all processes' shares
    advantages: Any = None  # float32 (B,), of sampled captions
    reward: Any = None  # float32 (), of sampled captions, mean over all processes' shares

    def tensors(self, device):
        """The batch with its arrays as tensors, in memory that a GPU can fetch from by itself."""
        fields = set(self._fields) - {"numbers", "decode_lengths"}
        arrays = {key: getattr(self, key) for key in fields if getattr(self, key) is not None}
        pin = torch.Tensor.pin_memory if device.type == "cuda" else torch.as_tensor
        return self._replace(**{key: pin(torch.as_tensor(a)) for key, a in arrays.items()})

    def to(self, device):
        """The batch with its tensors on a device."""
        tensors = {key: x for key, x in self._asdict().items() if torch.is_tensor(x)}
        return self._replace(**{k: x.to(device, non_blocking=True) for k, x in tensors.items()})
