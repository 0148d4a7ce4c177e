"""How a benchmark reports its figures: a table or a line of JSON, and a file."""

import argparse
import json
import resource
import sys
from pathlib import Path


def add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print all figures as one line of JSON, the last one.")
    parser.add_argument("--output_file", type=Path, help="Write them, as JSON, to this file too.")


def report(results: dict, args: argparse.Namespace) -> None:
    # ru_maxrss is in kilobytes, but in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    results["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if args.output_file is not None:
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        args.output_file.write_text(json.dumps(results, indent=1) + "\n")
    if args.json:
        print(json.dumps(results))
    else:
        print("\n".join(f"{name:28} {value}" for name, value in results.items()))
