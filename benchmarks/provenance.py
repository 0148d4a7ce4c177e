"""Where figures come from: the command, the versions and the machine, to be kept beside them."""

import platform
import shlex
import sys
from pathlib import Path

import diffusers
import psutil
import torch
import transformers

from . import __version__


def provenance() -> dict:
    """`command`, `versions`, `machine`, and `load_before`: how busy the machine was in the minute before."""
    libraries = (torch, diffusers, transformers)
    return {
        "command": "python " + shlex.join(sys.argv),
        "versions": {
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in libraries},
            "diffusers_svi": __version__,
        },
        "machine": f"{_processor()}, {torch.get_num_threads()} threads",
        "load_before": round(psutil.getloadavg()[0], 2),
    }


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
