"""Signals that ask a process to stop, and the place at which they take effect."""

import contextlib
import math
import signal
import time

from captioning.run.distributed import all_gather, world_size


class Stopped(KeyboardInterrupt):
    """The process was asked to stop, by Ctrl-C or a scheduler; the text says how to go on."""

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@contextlib.contextmanager
def hold_signals():
    """A signal that arrives inside takes effect at the end, where ``StopSignals`` handles it."""
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    with owner.held() if isinstance(owner, StopSignals) else contextlib.nullcontext():
        yield


class StopSignals:
    """Turn a signal that asks to stop into Stopped, but not inside ``held``.

    SIGINT is Ctrl-C, SIGUSR1 SLURM's warning, and SIGHUP says that the line to the server broke;
    where that is ignored already (``nohup``), it stays so. What comes within five seconds counts as
    the same signal: torchrun and ``timeout`` send two.

    :param together: with several processes a signal takes effect in ``check`` alone, in all at once
    """

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, together=True):
        self._held, self._received, self._since = together and world_size() > 1, 0, -math.inf

    def __enter__(self):
        hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
        numbers = [n for n in self.numbers if hangs_up or n != signal.SIGHUP]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if time.monotonic() - self._since > 5:
            self._since = time.monotonic()
            if not self._held:
                raise Stopped(number)
            self._received = number

    @contextlib.contextmanager
    def held(self):
        """A signal that arrives inside takes effect at the end."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before
        if not before:
            self.check()

    def check(self):
        """:raises Stopped: if a signal was held back in any of the processes"""
        # emptied before the processes agree, so that what comes meanwhile waits for the next check
        received, self._received = self._received, 0
        if number := max(all_gather(received)):
            raise Stopped(number)
