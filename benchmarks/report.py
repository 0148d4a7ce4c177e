"""How a benchmark reports its figures, and where they come from."""

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path

import diffusers
import numpy as np
import psutil
import torch
import transformers

import diffusers_svi
from diffusers_svi.training.step_times import peak_resident_bytes


def provenance() -> dict:
    """`command`, `versions`, `machine`, and `load_before`: how busy the machine was in the minute before."""
    libraries = (torch, diffusers, transformers, diffusers_svi)
    # A module's `sys.argv[0]` is where it lies on this machine.
    module = sys.modules["__main__"].__spec__
    program = sys.argv[:1] if module is None else ["-m", module.name]
    return {
        "command": "python " + shlex.join([*program, *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in libraries},
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


def add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print all figures as one line of JSON, the last one.")
    parser.add_argument("--output_file", type=Path, help="Write them, as JSON, to this file too.")


def report(results: dict, args: argparse.Namespace) -> None:
    """Print `results` as a table or a line of JSON, and write them to a file if that is asked for."""
    results["peak_resident_bytes"] = peak_resident_bytes()
    if args.output_file is not None:
        write_json(results, args.output_file)
    if args.json:
        print(json.dumps(results))
    else:
        print("\n".join(f"{name:28} {value}" for name, value in results.items()))


def ratio_of(values: list[float], others: list[float]) -> dict[str, float]:
    """The median of the ratios of pairs, and the middle half of them: what slows the machine slows both of a pair."""
    low, middle, high = np.quantile(np.array(values) / np.array(others), [0.25, 0.5, 0.75])
    return {"median": float(middle), "quarter": float(low), "three_quarters": float(high)}


def write_json(results: dict, path: Path) -> None:
    """Figures as a file; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
