"""Plots what scripts/bench_decode.py found: the gain of Figure 7 of arXiv 2506.15545, and steps beside their bound.

python -m scripts.plot_decode decode.json docs/decode.png
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    """Reads the JSON and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("picture", type=pathlib.Path)
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    figure, (gain, bound) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    plot_gain(gain, results["figure_7"])
    plot_bound(bound, results["points"])
    figure.suptitle(f"{results['recipe']} in bf16 on {results['device']}", fontsize=10)
    figure.savefig(args.picture, dpi=150)


def plot_gain(axes, entries):
    """The share of a step that the narrow window saves, by batch, a colour for each context."""
    for color, context in enumerate(sorted({entry["context"] for entry in entries})):
        line = sorted((e for e in entries if e["context"] == context), key=lambda e: e["batch"])
        batches = [entry["batch"] for entry in line]
        measured, formula = ([100 * entry[name] for entry in line] for name in ("measured", "formula"))
        axes.plot(batches, measured, "o-", color=f"C{color}", label=f"{context:,} tokens")
        axes.plot(batches, formula, "x--", color=f"C{color}", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("batch")
    axes.set_ylabel("% of a step saved")
    axes.set_title("window 512 against 4096 (crosses: the paper's formula)", fontsize=9)
    if entries:
        axes.legend(fontsize=8)


def plot_bound(axes, points):
    """The share of the bandwidth bound, by the time that the bound allows."""
    for name in dict.fromkeys(point["model"] for point in points):
        own = [point for point in points if point["model"] == name]
        axes.plot(
            [point["milliseconds"]["median"] for point in own],
            [100 * point["bound_share"] for point in own],
            "o",
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(0, 105)
    axes.set_xlabel("ms a step")
    axes.set_ylabel("% of the bandwidth bound")
    axes.set_title("every context and batch", fontsize=9)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
