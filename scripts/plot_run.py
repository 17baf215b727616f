"""Plots a run's loss curve.

python scripts/plot_run.py runs/tiny docs/tiny_loss.png
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from rattn.files import metrics_lines


def main(workdir: str, out: str) -> None:
    """Training loss in bits a token, validation in bits per byte, over steps."""
    values = metrics_lines(workdir)
    train = [(v["step"], v["loss"] / np.log(2)) for v in values if v.get("loss") is not None]
    evaluation = [(v["step"], v["eval/bits_per_byte"]) for v in values if "eval/bits_per_byte" in v]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.plot(*zip(*train, strict=True), color="#9db4c0", linewidth=1, label="training, bits a token")
    axes.plot(*zip(*evaluation, strict=True), "o-", color="#253237", markersize=4, label="validation, bits per byte")
    axes.annotate(
        f"{evaluation[-1][1]:.2f}", evaluation[-1], textcoords="offset points", xytext=(-4, 9), ha="right", fontsize=9
    )
    axes.set(xlabel="step", title=f"{pathlib.Path(workdir).name}: {values[-1]['step']:,} steps", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
