"""The processes that ``torchrun`` starts: who is first, what all of them know, each one's share."""

import sys


def _distributed():
    """torch.distributed, if several processes have joined; never the first to import it."""
    distributed = sys.modules.get("torch.distributed")
    joined = distributed and distributed.is_available() and distributed.is_initialized()
    return distributed if joined else None


def rank():
    """This process's number among those of the run."""
    return _distributed().get_rank() if _distributed() else 0


def world_size():
    """How many processes the run has."""
    return _distributed().get_world_size() if _distributed() else 1


def is_main():
    """Whether this process is the one that writes files."""
    return rank() == 0


def all_gather(value):
    """List of every process's value, in order, in every process."""
    values = [value] * world_size()
    if _distributed():
        _distributed().all_gather_object(values, value)
    return values


def broadcast(value):
    """The first process's value, in every process."""
    return all_gather(value if is_main() else None)[0]


def all_reduce_sum(tensor):
    """The sum of every process's tensor, in place."""
    if _distributed():
        _distributed().all_reduce(tensor)
    return tensor


def barrier():
    """Wait until every process has come here."""
    all_gather(None)


def share(count):
    """This process's share of ``count`` things, as a slice."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())
