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
    """The share of a step that the narrow window saves, by context, a colour for each batch."""
    for color, batch in enumerate(sorted({entry["batch"] for entry in entries})):
        line = sorted((e for e in entries if e["batch"] == batch), key=lambda e: e["context"])
        contexts = [entry["context"] for entry in line]
        measured, formula = ([100 * entry[name] for entry in line] for name in ("measured", "formula"))
        axes.plot(contexts, measured, "o-", color=f"C{color}", label=f"batch {batch}")
        axes.plot(contexts, formula, "x--", color=f"C{color}", linewidth=0.8)
    by_context(axes)
    axes.set_ylabel("% of a step saved")
    axes.set_title("window 512 against 4096 (crosses: the paper's formula)", fontsize=9)


def plot_bound(axes, points):
    """The share of the bandwidth bound, by context, a colour for each model and a line for each batch."""
    batches = sorted({point["batch"] for point in points})
    for color, name in enumerate(dict.fromkeys(point["model"] for point in points)):
        for style, batch in enumerate(batches):
            line = [point for point in points if point["model"] == name and point["batch"] == batch]
            line.sort(key=lambda point: point["context"])
            if line:
                axes.plot(
                    [point["context"] for point in line],
                    [100 * point["bound_share"] for point in line],
                    marker="osD^v*"[style % 6],
                    linestyle=("-", "--", ":", "-.")[style % 4],
                    color=f"C{color}",
                    label=f"{name}, batch {batch}",
                )
    by_context(axes)
    axes.set_ylabel("% of the bandwidth bound")
    axes.set_title("steps beside their bound", fontsize=9)


def by_context(axes):
    """Both pictures' axes."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context, tokens")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
