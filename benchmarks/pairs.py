"""Error recycling against its control, chain by chain, in whatever runs of `drift.py` hold both.

    python benchmarks/pairs.py docs/results/*/drift.json --output_dir docs/results/drift_pairs

A pair is `erft-<name>` and `control-<name>` of one `drift.json`: the same films with the same noise. Of quality and of
its part background, error recycling less control, with intervals of 95% by bootstrap over chains:

- end: the mean of the last ten clips, or of the second half where there are fewer than twenty;
- change: that, less the mean of as many clips at the beginning: what the chain does.

An interval over chains says what other films would do with the same weights, not what another training would; several
pairs say that. Writes `pairs.json` and a plot.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from drift import interval

from diffusers_svi.provenance import provenance


matplotlib.use("Agg")
import matplotlib.pyplot as plt


PARTS = ("quality", "background")
STATISTICS = ("end", "change")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="Of `drift.py`. Those without a pair are passed over.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/drift-pairs"), help="Default: %(default)s.")
    return parser.parse_args()


def differences(erft: list[list[float]], control: list[list[float]]) -> dict[str, dict[str, float]]:
    """Of figures `(chains, clips)` of both, each of `STATISTICS` with its interval."""
    pair = np.array(erft) - np.array(control)
    window = min(10, pair.shape[1] // 2)
    first, last = pair[:, :window].mean(axis=1), pair[:, -window:].mean(axis=1)
    return {"end": interval(last, np.mean), "change": interval(last - first, np.mean)}


def find_pairs(path: Path) -> dict[str, dict]:
    """What `differences` says of every pair of a file, by the folder, the setting and the name."""
    pairs = {}
    for setting, measured in json.loads(path.read_text())["results"].items():
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
    height = 0.35 * len(pairs) + 1.2
    columns = [(part, statistic) for part in PARTS for statistic in STATISTICS]
    figure, axes = plt.subplots(1, len(columns), figsize=(14, height), sharex=True, sharey=True)
    labels = [f"{name} ({pair['chains']})" for name, pair in pairs.items()]
    for axis, (part, statistic) in zip(axes, columns, strict=True):
        for row, pair in enumerate(pairs.values()):
            if part in pair:
                figures = pair[part][statistic]
                axis.plot([figures["low"], figures["high"]], [row, row], color="tab:blue")
                axis.plot(figures["value"], row, "o", color="tab:blue")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(f"{part}, {statistic}", fontsize=10)
        axis.set_xlabel("worse   |   better than the control", fontsize=9)
    axes[0].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0].invert_yaxis()
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
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "pairs.json").write_text(json.dumps({**provenance(), "pairs": pairs}, indent=1) + "\n")
    plot(pairs, args.output_dir / "pairs.png")
    width = max(map(len, pairs))
    print(
        f"{'error recycling less control':{width}}  chains  "
        + "  ".join(f"{f'{part}, {statistic}':24}" for part in PARTS for statistic in STATISTICS)
    )
    for name, pair in pairs.items():
        shown = [pair[part][statistic] for part in PARTS if part in pair for statistic in STATISTICS]
        figures = "  ".join(f"{x['value']:+.3f} ({x['low']:+.3f} to {x['high']:+.3f})" for x in shown)
        print(f"{name:{width}}  {pair['chains']:6}  {figures}")


if __name__ == "__main__":
    main()
