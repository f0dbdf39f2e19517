"""What a run is started with: command, commit, machine and versions, for starts.jsonl."""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch


def describe_start(num_ranks: int) -> dict:
    """The command, commit, machine and versions of this process, now."""
    from data.images import printable  # here: when grpo is loaded, it imports nothing of pictures

    program = sys.argv[0] and os.path.relpath(sys.argv[0])  # empty in Python's console
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = re.findall(r"model name\s*:\s*(.+)", text) or [platform.machine()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # torch.__version__ names the CUDA build (2.11.0+cu130); the package's version may not
    libraries = {"torch": torch.__version__, "transformers": version("transformers")}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": printable(shlex.join([program, *sys.argv[1:]])),
        "commit": _commit(),
        "ranks": num_ranks,
        "machine": {
            "system": platform.platform(terse=True), "cpu": names[0], "cores": os.cpu_count(),
            "memory_gib": round(memory / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "versions": {"python": platform.python_version()} | libraries,
    }


def _commit() -> str:
    """This code's commit, with "-dirty" if the code was changed since; empty without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:  # "Permission denied" where PATH has a folder that one may not enter
        return ""
