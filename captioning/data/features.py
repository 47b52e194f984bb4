"""Feature stores: what a frozen CNN makes of a split, computed once."""

import collections
import math
import os

import numpy as np

from captioning.run.distributed import barrier, broadcast, is_main, share
from captioning.run.files import atomic_path, check_disk, locked, reserve
from captioning.run.machine import read_ahead
from captioning.run.messages import UserError, note, progress, why
from captioning.run.paths import lock_path


def encode_split(dataset, encode, path=None, rows=None, batch_size=32, workers=2):
    """Features of the pictures of a split, read from the feature store ``path`` or computed for it.

    With several processes each computes its share. A run that is stopped leaves what it has, and
    the next one goes on from there. Where no file can be written, they are kept in memory.

    :param dataset: ``CaptionDataset``
    :param encode: function of uint8 (B, 3, S, S) torch tensors to float (B, n, encoder_dim) tensors
    :param path: feature store, a .npy file whose name holds the key; None computes into memory
    :param rows: without a store: slice of the pictures to encode; None: all
    :return: float16 array (N, n, encoder_dim), memory-mapped if stored
    :raises UserError: if the store is damaged or the disk is full
    """
    if path is not None and not broadcast(path.exists() or os.access(path.parent, os.W_OK)):
        where = path.parent.absolute()
        note(f"{where} may not be written: {dataset.split}'s features are kept in memory")
        path = rows = None
    if path is None:
        numbers = np.arange(len(dataset))[rows or slice(None)]
        parts = [part for _, part in _encoded(dataset, encode, numbers, batch_size, workers)]
        none = np.empty((0, 1, 1), np.float16)  # when there are fewer pictures than processes
        return np.concatenate(parts or [none])  # (N, n, encoder_dim)
    if not broadcast(path.exists()):
        # of two runs on one data set the second waits for the first's features
        with locked(lock_path(path), path, wait=True):
            if not broadcast(path.exists()):
                _write_features(path, dataset, encode, batch_size, workers)
    try:
        features = np.load(path, mmap_mode="c")  # copy on write: torch wants to be able to write
        size = features.offset + features.nbytes if features.flags.c_contiguous else 0
        is_whole = size == os.path.getsize(path) and features.dtype == np.float16
        if not is_whole or features.ndim != 3 or len(features) != len(dataset):
            raise ValueError(f"it has not the features of {len(dataset):,} pictures in float16")
    except PermissionError as error:
        raise UserError(f"{path} may not be read: ask its owner for the permission") from error
    except Exception as error:  # numpy's header is Python text, and raises nearly every type
        what = f"the feature store {path} is damaged ({why(error)})"
        raise UserError(f"{what}; delete it and run again") from error
    return features  # (N, n, encoder_dim)


def _encoded(dataset, encode, numbers, batch_size, workers):
    """Yield (picture numbers (B,), float16 features (B, n, encoder_dim)) batch by batch."""
    import torch

    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    bar = progress(total=len(numbers), desc=f"encoding {dataset.split}", unit="picture")
    with bar:
        for batch, images in zip(batches, read_ahead(dataset.images, batches, workers)):
            yield batch, encode(torch.from_numpy(images)).to(torch.float16).cpu().numpy()
            bar.update(len(batch))


def _write_features(path, dataset, encode, batch_size, workers):
    """Write a feature store; each process of the run fills in its share.

    It grows as ``.NAME.growing``, at whose end a byte for each picture says whether its features
    are there, so that a run that was stopped can be continued.
    """
    import torch

    growing = path.with_name(f".{path.name}.growing")
    if is_main() and not growing.exists():
        one = encode(torch.from_numpy(dataset.images([0])))  # (1, n, encoder_dim)
        shape = (len(dataset), *one.shape[1:])
        check_disk(path.parent, 2 * math.prod(shape))
        with atomic_path(growing) as temporary:
            np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            reserve(temporary, temporary.stat().st_size + len(dataset))
    barrier()
    features = np.load(growing, mmap_mode="r+")
    done = np.memmap(growing, bool, "r+", features.offset + features.nbytes, len(dataset))
    numbers = np.arange(len(dataset))[share(len(dataset))]
    numbers = numbers[~done[numbers]]
    parts = _encoded(dataset, encode, numbers, batch_size, workers)
    fresh = []

    def count_as_done():  # once they are on the disk
        features.flush()
        done[fresh] = True
        fresh.clear()

    def store(part):
        features[part[0]] = part[1]  # (B, n, encoder_dim)
        fresh.extend(part[0])
        if len(fresh) >= 1000:
            count_as_done()

    try:  # in a thread, so that the CNN need not wait for the disk
        collections.deque(read_ahead(store, parts, 1), maxlen=0)
    finally:
        count_as_done()
        if not done[numbers].all():
            note("the features made so far are kept: the next run goes on from there")
    barrier()  # all have written
    if is_main():
        os.truncate(growing, features.offset + features.nbytes)
        os.replace(growing, path)
    barrier()  # and the file has its name
