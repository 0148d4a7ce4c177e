"""The start-end contrast of films that `drift.py` has measured: how far their last clips are from their first.

    python benchmarks/ends.py docs/results/drift/drift.json --output_dir docs/results/drift

|M(start) - M(end)| of every measure M that a file has chain by chain, as `drift.py` defines it, with intervals of 95%
by bootstrap over chains. Newer files of `drift.py` have it for all of its measures. Writes `ends.json`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from drift import interval, start_end
from report import provenance, write_json


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="Of `drift.py`.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/drift-ends"), help="Default: %(default)s.")
    return parser.parse_args()


def find_ends(path: Path) -> dict[str, dict]:
    """Of everyone in a file, by folder, setting and name, for every measure that is there by chain."""
    return {
        f"{path.parent.name}, {setting}, {name}": {
            "chains": len(measured["chains"]["quality"]),
            **{
                measure: interval(start_end(np.array(chains)), np.nanmean)
                for measure, chains in measured["chains"].items()
            },
        }
        for setting, everyone in json.loads(path.read_text())["results"].items()
        for name, measured in everyone.items()
    }


def main():
    args = parse_args()
    ends = {name: figures for path in args.files for name, figures in find_ends(path).items()}
    write_json({**provenance(), "ends": ends}, args.output_dir / "ends.json")
    for name, figures in ends.items():
        for measure, told in list(figures.items())[1:]:
            print(f"{name:36} {measure:10} {told['value']:.3f} ({told['low']:.3f} to {told['high']:.3f})")


if __name__ == "__main__":
    main()
