"""How a program ends: on bad input at once, with one sentence and the right exit code."""

import atexit
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch.distributed as dist

from data.io import disk_sentence


def run_program(main: Callable[[list[str]], None], arguments: list[str] | None = None) -> None:
    """Runs a program, without `arguments` on those of the command line, and ends it with one
    sentence where it fails. Bad input (ValueError) and what the system refuses (OSError, as on a
    full disk) give exit code 2, Ctrl-C 130. A letter that the console cannot show is printed as
    its number, and nothing where the output is closed (>&-).

    CAPRL_TRACEBACK=1 shows where the error was raised. A process that is a rank does not return,
    nor does one that Ctrl-C stops.
    """
    nowhere = partial(open, os.devnull, "w", encoding="utf-8")
    sys.stdout, sys.stderr = sys.stdout or nowhere(), sys.stderr or nowhere()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    # Their new names are unknown to transformers before 5.24; remove once that is required.
    message = "`(past_key_values|gradient_checkpointing_enable)` is deprecated"
    warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    try:
        try:
            main(sys.argv[1:] if arguments is None else arguments)
        except (OSError, ValueError) as error:
            if os.environ.get("CAPRL_TRACEBACK"):
                raise
            if isinstance(error, BrokenPipeError):  # else flushing at the exit would raise again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            reason = disk_sentence(error) if isinstance(error, OSError) else error
            print(f"error: {reason}", file=sys.stderr)
            tell_torchrun(f"error: {reason}")
            sys.exit(2)
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":
                print("\nstopped by Ctrl-C", file=sys.stderr)
            _leave(SystemExit(128 + signal.SIGINT))
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == 2:  # tyro has printed what is wrong
            tell_torchrun("error: expected other arguments, see above torchrun's own lines")
        if dist.is_initialized():
            _leave(error)
        raise
    if dist.is_initialized():
        _leave(SystemExit(0))


def tell_torchrun(text: str) -> None:
    """Under torchrun, the text ends the report that it prints when a rank has failed. Otherwise
    nothing.

    That report quotes the file which it names to each rank, as torch's own `record` writes it:
    https://pytorch.org/docs/stable/elastic/errors.html
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not Path(path).exists():  # the first text is the one that says why
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        message = {"message": text, "extraInfo": extra}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def _leave(error: BaseException) -> None:
    """Ends this process at once, with the code that `error` would have ended it with.

    At its exit the interpreter waits for threads, such as those with a request that a verifier's
    server has not answered. And threads of gloo outlive the interpreter where anything (a mesh, a
    DTensor, a group) still holds a process group. Now and then they abort the process while it
    leaves: "terminate called without an active exception" (pytorch issue 190489). Pull request
    179291 destroyed the groups at exit. That does not always help, and it was given up. So the
    interpreter is never taken down.
    """
    if dist.is_initialized():  # a signal that torchrun passes on late does nothing
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    atexit._run_exitfuncs()  # what the interpreter would have done: open logs, temporary files
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a closed pipe
            stream.flush()
    os._exit(error.code or 0 if isinstance(error, SystemExit) else 1)
