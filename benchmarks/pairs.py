"""Error recycling against its control, chain by chain, in whatever runs of `drift.py` hold both.

    python benchmarks/pairs.py outputs/*/drift.json

A pair is `erft-NAME` and `control-NAME` of one `drift.json`: the same films with the same noise. Of quality and its
parts sprite and background, where the file has them by chain, error recycling less control, with intervals of 95% by
bootstrap over chains:

- end: the mean of the last ten clips, or of the second half where there are fewer than twenty;
- change: that, less the mean of as many clips at the beginning: what the chain does.

An interval over chains says what other films would do with the same weights, not what another training would; several
pairs say that. Writes `pairs.json` and a plot.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
from drift import PARTS, interval
from report import provenance, write_json


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator


STATISTICS = ("end", "change")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="Of `drift.py`. Those without a pair are passed over.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/drift-pairs"), help="Default: %(default)s.")
    return parser.parse_args()


def differences(erft: list[list[float]], control: list[list[float]]) -> dict[str, dict[str, float]]:
    """Of figures `(chains, clips)` of both, each of `STATISTICS` with its interval."""
    pair = np.array(erft) - np.array(control)
    window = max(1, min(10, pair.shape[1] // 2))
    first, last = pair[:, :window].mean(axis=1), pair[:, -window:].mean(axis=1)
    return {"end": interval(last, np.mean), "change": interval(last - first, np.mean)}


def find_pairs(path: Path) -> dict[str, dict]:
    """What `differences` says of every pair of a file, by the folder, the setting and the name."""
    pairs = {}
    for setting, measured in json.loads(path.read_text()).get("results", {}).items():
        for name in measured:
            control = name.replace("erft", "control", 1)
            if not name.startswith("erft") or control not in measured or not measured[name].get("chains"):
                continue
            figures, reference = measured[name]["chains"], measured[control]["chains"]
            pairs[f"{path.parent.name}, {setting}, {name}"] = {
                "chains": len(figures["quality"]),
                **{part: differences(figures[part], reference[part]) for part in PARTS if part in figures},
            }
    return pairs


def plot(pairs: dict[str, dict], path: Path) -> None:
    rows, columns = len(STATISTICS), len(PARTS)
    size = (4 * columns + 2, rows * (0.3 * len(pairs) + 1))
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex="col", sharey=True)
    for axis, (statistic, part) in zip(axes.flat, product(STATISTICS, PARTS), strict=True):
        for row, pair in enumerate(pairs.values()):
            if part in pair:
                figures = pair[part][statistic]
                axis.plot([figures["low"], figures["high"]], [row, row], color="tab:blue")
                axis.plot(figures["value"], row, "o", color="tab:blue")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(f"{part}, {statistic}", fontsize=10)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_xlabel("worse   |   better than the control", fontsize=9)
    labels = [f"{name} ({pair['chains']})" for name, pair in pairs.items()]
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    args = parse_args()
    pairs = {}
    for path in args.files:
        pairs.update(find_pairs(path))
    if not pairs:
        raise ValueError(
            f"`files` hold no pair, got {', '.join(map(str, args.files))}: measure `control-NAME` and `erft-NAME` in "
            "one run of `drift.py --lora`."
        )
    write_json({**provenance(), "pairs": pairs}, args.output_dir / "pairs.json")
    plot(pairs, args.output_dir / "pairs.png")
    width = max(map(len, pairs))
    print(f"{'error recycling less control':{width}}  chains  part        end                        change")
    for name, pair in pairs.items():
        for part in (part for part in PARTS if part in pair):
            figures = (pair[part][statistic] for statistic in STATISTICS)
            shown = "   ".join(f"{x['value']:+.3f} ({x['low']:+.3f} to {x['high']:+.3f})" for x in figures)
            print(f"{name:{width}}  {pair['chains']:6}  {part:10}  {shown}")


if __name__ == "__main__":
    main()
