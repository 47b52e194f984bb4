"""Training steps as CUDA graphs."""

import math

import torch

from captioning.data.words import PAD_ID


class CudaGraphStep:
    """A training step, recorded as a CUDA graph for each shape of its batch and replayed at once.

    The decoder's loop is hundreds of kernels too small to keep a GPU busy. A graph has fixed
    shapes: captions are padded to a multiple of four words, the batch to a multiple of sixteen
    captions (which say nothing), and at most ``MAX_GRAPHS`` graphs are kept; other shapes run
    without. The first step of a shape runs without, too: it sets up what a recording must find.

    What the step computes in Python is recorded once and stays as it was: a number that changes
    must be a tensor that is filled before the step, as epsilon is. ``.item()`` and boolean masks,
    whose shapes depend on values, cannot be recorded.
    """

    MAX_GRAPHS = 32

    def __init__(self, step, trainer):
        self.step, self.device, self.graphs = step, trainer.device, {}
        self.epsilon = torch.ones((), device=self.device)
        self.sampling = trainer.args.scheduled_sampling != "none"
        self.stream = torch.cuda.Stream(self.device)

    def __call__(self, batch, epsilon):
        """Run a step on a batch: without a graph, then recorded, then replayed."""
        batch = self.padded(batch)
        if self.sampling:
            epsilon = self.epsilon.fill_(epsilon)
        tensors = {name: t for name, t in batch._asdict().items() if torch.is_tensor(t)}
        key = tuple((name, *t.shape) for name, t in tensors.items())
        if key not in self.graphs:
            self.graphs[key] = None
            # recording refuses what autograd began on the default stream
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.step(batch, epsilon)
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            return
        if self.graphs[key] is None:
            if sum(made is not None for made in self.graphs.values()) >= self.MAX_GRAPHS:
                self.step(batch, epsilon)
                return
            self.graphs[key] = self.record(batch, tensors, epsilon)
        graph, static = self.graphs[key]
        for name, tensor in tensors.items():
            static[name].copy_(tensor, non_blocking=True)
        graph.replay()

    def record(self, batch, tensors, epsilon):
        """Record a step; return (graph, the tensors that it reads)."""
        static = {name: tensor.clone() for name, tensor in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        pool = next((made[0].pool() for made in self.graphs.values() if made), None)
        options = {"pool": pool, "stream": self.stream}
        # thread_local: the threads that load ahead go on pinning memory meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
            self.step(batch._replace(**static), epsilon)
        return graph, static

    @staticmethod
    def padded(batch):
        """The batch in one of a few shapes; what is added counts in no loss."""
        steps = 4 * math.ceil(batch.decode_lengths[0] / 4)
        more = -len(batch.captions) % 16
        wider = steps + 1 - batch.captions.shape[1]
        pad, advantages = torch.nn.functional.pad, batch.advantages
        return batch._replace(
            captions=pad(batch.captions, (0, wider, 0, more), value=PAD_ID),
            decode_lengths=[steps] * (len(batch.captions) + more),
            image_index=pad(batch.image_index, (0, more)),
            advantages=None if advantages is None else pad(advantages, (0, more)),
        )
