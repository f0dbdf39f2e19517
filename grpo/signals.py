"""Signals that ask a run for a checkpoint and its end."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from grpo.distributed import rank

SAME_SIGNAL_S = 5.0
"""Seconds within which two signals count as one."""


@contextmanager
def catch_stop_signals(step: Callable[[], int] = lambda: 0) -> Iterator[list[int]]:
    """Inside, the first SIGTERM, SIGINT or SIGHUP only fills the list, for the loop to read after
    its `step`. Rank 0 prints at once that it came. A later signal interrupts.

    A second signal within `SAME_SIGNAL_S` counts as the first. A scheduler signals both the ranks
    and torchrun, and torchrun passes its own on.
    """
    caught: list[int] = []
    interrupts_from = math.inf
    is_first_rank = rank() == 0

    def say(sentence: str) -> None:
        """Writes without `print`, which the signal may have interrupted and which cannot be entered
        twice. On a terminal the progress bar's line is cleared; the bar comes again below."""
        if is_first_rank:
            with suppress(OSError):
                clear = "\r\x1b[2K" if os.isatty(2) else "\n"
                os.write(2, f"{clear}{sentence}\n".encode())

    def note(number, frame):
        nonlocal interrupts_from
        if number == signal.SIGHUP:  # the terminal has gone: what writes to it would fail
            for stream in (1, 2):
                if not os.path.isfile(f"/dev/fd/{stream}"):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if time.monotonic() > interrupts_from:
            say("stopping without saving; --resume goes on from the last checkpoint")
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if not caught:
            caught.append(number)
            interrupts_from = time.monotonic() + SAME_SIGNAL_S
            say(f"finishing step {step()}, then saving; again after {SAME_SIGNAL_S:.0f} s stops "
                "without saving")

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else it was started with nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield caught
    except SystemExit:
        before = {}  # the process is leaving: a late copy of the signal must not kill it
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
