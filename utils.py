"""What every script begins with: it runs, and ends with one line if the user can mend it."""

import os
import re
import signal
import sys
import time

from captioning.run.machine import prepare_process
from captioning.run.messages import UserError, cannot, note, progress
from captioning.run.signals import Stopped, StopSignals


def run(main, parser):
    """Parse the command line and call ``main(args)``; end with one line if the user can mend it."""
    with StopSignals(together=False):
        try:
            prepare_process()
            main(parser.parse_args())
            print(end="", flush=True)  # a full disk is noticed here, where it can be said
        except (Exception, KeyboardInterrupt) as error:
            parser.exit(*ending(parser.prog, error))


def ending(prog, error):
    """Exit code and last line (or None) for an error that the user can mend; raises any other.

    The code is 2, or 1 where some work was done and is kept (see ``messages.naming``).
    """
    is_first = not int(os.environ.get("RANK", 0))  # of torchrun's processes, which end alike
    for number in StopSignals.numbers:  # the process is ending already; torchrun ends the others
        signal.signal(number, signal.SIG_IGN if is_first else signal.SIG_DFL)
    try:
        print(end="", flush=True)
    except OSError as fault:  # Python would fail once more on what is left in the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, OSError) and error.errno == fault.errno:
            error.filename = "standard output"
    kept = getattr(error, "__notes__", [])
    cause = error  # an import that is interrupted can fail in any way
    while not isinstance(cause, (KeyboardInterrupt, UserError, type(None))):
        cause = cause.__context__
    error = cause if isinstance(cause, KeyboardInterrupt) else error
    if isinstance(error, KeyboardInterrupt):
        stop = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        return 128 + stop.signal, f"{prog}: {stop}\n" if is_first else None
    if isinstance(error, BrokenPipeError):  # the reader of the output (head, less) has left
        return 141, None
    if isinstance(error, UserError):
        time.sleep(0 if is_first else 3)  # torchrun ends it before that, unless it alone failed
    elif isinstance(error, OSError) and error.filename is not None:
        error = cannot("use", error.filename, error)
    elif isinstance(error, MemoryError) or re.search("out of memory|DefaultCPUAlloc", str(error)):
        what = [*str(error).splitlines(), "no room."][0][:200]
        advice = "Lower --batch_size or --beam_size, add --amp, or see who else uses this device"
        error = UserError(f"out of memory: {what} {advice}")
    elif isinstance(error, ModuleNotFoundError):
        advice = "python -m pip install -r requirements.txt installs what the suite needs"
        error = UserError(f"{error}: {advice}")
    else:
        raise error
    return 1 if kept else 2, f"{prog}: error: {UserError(': '.join([*kept, str(error)]))}\n"
