"""An epoch's sums: losses, words, seconds, and the updates that were left out."""

import torch

from captioning.run.distributed import all_reduce_sum, is_main, world_size
from captioning.run.messages import UserError, note

MAX_SKIPPED = 10  # updates in a row without a finite gradient, after which training gives up
ADVICE = "lower --learning_rate or --grad_clip, or leave out --amp; the last checkpoint is kept"


class Tally:
    """Sums over an epoch, kept on the device: asking for them would make the host wait."""

    def __init__(self, device):
        self.total = torch.zeros(3, device=device)  # loss, nll, updates
        self.skipped = torch.zeros(2, device=device)  # not finite: all of them, last in a row
        self.reset()

    def reset(self):
        """Begin an epoch."""
        self.total.zero_()
        self.skipped[0].zero_()  # in a row there may be more than an epoch has
        self.words, self.seconds, self.warned = 0, 0.0, 0

    def add(self, loss, nll, bad):
        """Count an update; ``bad`` is 1.0 where its gradient was not finite, else 0.0."""
        sums = torch.stack([loss, nll, torch.full_like(bad, 1 / world_size())])
        self.total += torch.where(bad > 0, 0, sums)
        self.skipped.copy_(torch.stack([self.skipped[0] + bad, (self.skipped[1] + 1) * bad]))

    def check(self, update):
        """Warn of updates that were left out as their gradient was not finite.

        :raises UserError: if there were many in a row
        """
        count, in_a_row = self.skipped.tolist()
        if in_a_row >= MAX_SKIPPED:
            raise UserError(f"the loss was not finite in the last {in_a_row:.0f} updates: {ADVICE}")
        if count > self.warned:
            text = f"{count:.0f} updates of this epoch were left out"
            note(f"update {update}: the loss was not finite; {text}")
            self.warned = count

    def words_per_second(self):
        """Of all processes, in the epoch so far."""
        return self.words / max(self.seconds, 1e-9)

    def so_far(self):
        """A short text for the progress bar."""
        loss, _, count = self.total.tolist()
        return f"loss {loss / max(count, 1e-9):.3f}, {self.words_per_second():,.0f} words/s"

    def means(self):
        """What the log says of the epoch, as a dict; all processes must ask at the same time.

        :raises UserError: if all of its updates were left out
        """
        loss, nll, count = all_reduce_sum(self.total.clone()).tolist()
        if count < 0.5:
            raise UserError(f"the loss was not finite in any update of this epoch: {ADVICE}")
        return {
            "loss": loss / count,
            "nll": nll / count,
            "skipped_updates": int(self.skipped[0]),
            "train_seconds": round(self.seconds, 1),
            "words_per_second": round(self.words_per_second()),
        }

    def state_dict(self):
        """What a checkpoint keeps; all processes must ask at the same time."""
        total = all_reduce_sum(self.total.clone()).cpu()
        sums = {"total": total, "skipped": self.skipped.cpu()}
        return sums | {"words": self.words, "seconds": self.seconds}

    def load_state_dict(self, state):
        """Go on from what ``state_dict`` gave."""
        self.total.copy_(state["total"] * is_main())  # the others' shares are in it
        self.skipped.copy_(state["skipped"])
        self.words, self.seconds = state["words"], state["seconds"]
