"""The report's figures of curves: panels side by side, one for each mixer with windows, beside the models without."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from rattn.sweeping.plot_style import (
    INK,
    STYLE,
    Plot,
    keep_the_rest_in_view,
    legend,
    line_style,
    log_axis,
    log_place,
    saved,
    window_ticks,
)
from rattn.sweeping.summary import Group, Run, loss_at

# isort: split
# After plot_style, which says what to do where matplotlib is missing.
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

Curves = Mapping[str, Mapping[int, float]]
# (x, y) of each line, by the variant's label.
Lines = dict[str, list[tuple[list[float], list[float]]]]
PIECES = 40
RECALL_DISTANCE = "distance to the nearest occurrence (tokens)"


def panel_plots(group: Group, curves: Curves) -> list[Plot]:
    """Draws what the group's results allow; `curves` as `plots` takes them."""
    drawn = []
    for draw in (
        _training_loss,
        _by_context,
        _by_row_position,
        _recall_accuracy,
        _recall_loss,
        _by_length,
        _long_by_context,
        _long_recall,
        _many_windows,
    ):
        count = max(len(group.windowed), 1)
        with plt.rc_context(STYLE):
            figure, _ = plt.subplots(1, count, figsize=(1.4 + 4.9 * count, 4.2), layout="constrained", sharey=True)
            described = draw(group, figure.axes, curves)
            if described:
                drawn.append(saved(draw.__name__.strip("_"), *described, figure, wide=count > 1))
            plt.close(figure)
    return drawn


def _training_loss(group: Group, panels: list[Axes], curves: Curves) -> tuple[str, str] | None:
    """Training loss over tokens after the warm-up, less full attention's on the same batches where there is one."""
    full = {run.seed: curves[run.identity] for run in group.full.runs if run.identity in curves} if group.full else {}
    lines: Lines = {}
    for variant in group.variants:
        for run in variant.runs:
            curve = curves.get(run.identity, {})
            if full:
                base = full.get(run.seed, {})
                curve = {step: curve[step] - base[step] for step in sorted(curve.keys() & base.keys())}
            warmup_steps = run.evaluation["config"]["optimizer"]["warmup_steps"]
            curve = {step: value for step, value in curve.items() if step > warmup_steps}
            if len(curve) > 1:
                lines.setdefault(variant.label, []).append(_smoothed(curve, run))
    if not lines:
        return None
    _draw(group, panels, lines, "tokens (M)", _less_full("training loss", full))
    return "Training loss", "Means over a fortieth of the steps after the warm-up, a line a seed" + (
        "; full attention's of the same seed, which had the same batches, is the zero line." if full else "."
    )


def _smoothed(curve: Mapping[int, float], run: Run) -> tuple[list[float], list[float]]:
    """A loss by step as means over `PIECES` pieces, over tokens in millions."""
    config, steps = run.evaluation["config"], list(curve)
    million = config["batch_size"] * config["context_length"] / 1e6
    size = math.ceil(len(steps) / PIECES)
    pieces = [steps[i : i + size] for i in range(0, len(steps), size)]
    return [fmean(piece) * million for piece in pieces], [fmean(curve[step] for step in piece) for piece in pieces]


def _by_context(group: Group, panels: list[Axes], curves: Curves) -> tuple[str, str] | None:
    """Loss by what stands before the target in its document."""
    return _bins(group, panels, "by_context_tokens", "Loss by context", "tokens of the document before the target")


def _by_row_position(group: Group, panels: list[Axes], curves: Curves) -> tuple[str, str] | None:
    """Loss by place in the row."""
    return _bins(group, panels, "by_row_position", "Loss by position in the row", "position in the row")


def _recall_accuracy(group: Group, panels: list[Axes], curves: Curves) -> tuple[str, str] | None:
    """Accuracy on recall tokens by distance."""
    return _accuracy(group, panels, 1, "Recall by distance: accuracy")


def _recall_loss(group: Group, panels: list[Axes], curves: Curves) -> tuple[str, str] | None:
    """Loss on recall tokens by distance."""
    return _bins(group, panels, "recall_by_distance", "Recall by distance: loss", RECALL_DISTANCE)


def _by_length(group: Group, panels: list[Axes], curves: Curves) -> tuple[str, str] | None:
    """Loss at multiples of the training length."""
    if len(group.lengths) < 2:
        return None
    lines = {
        variant.label: [(group.lengths, [variant.mean(loss_at(length)) for length in group.lengths])]
        for variant in group.variants
    }
    _draw(group, panels, lines, "length of the row, in training contexts", "validation loss (nats a token)")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(group.lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(group.lengths, [f"{length}×" for length in group.lengths])
    return "Loss beyond the training length", (
        "Validation loss of the same text in rows of the training context and of its multiples, means over the seeds "
        "that each has."
    )


def _long_by_context(group: Group, panels: list[Axes], curves: Curves) -> tuple[str, str] | None:
    """Loss by context in the longest rows."""
    longest = group.lengths[-1]
    title = f"Loss by context in rows of {longest} training contexts"
    where = "tokens of the document before the target"
    return _bins(group, panels, "by_context_tokens", title, where, longest) if longest > 1 else None


def _long_recall(group: Group, panels: list[Axes], curves: Curves) -> tuple[str, str] | None:
    """Accuracy on recall tokens by distance in the longest rows."""
    longest = group.lengths[-1]
    title = f"Recall by distance in rows of {longest} training contexts: accuracy"
    return _accuracy(group, panels, longest, title) if longest > 1 else None


def _many_windows(group: Group, panels: list[Axes], curves: Curves) -> tuple[str, str] | None:
    """One checkpoint at many windows."""
    lines: Lines = {}
    for variant in group.variants:
        measured: dict[int, list[float]] = {}
        for entry in (entry for run in variant.runs for entry in run.evaluation["measured"]):
            if entry["length"] == 1 and entry["window"] is not None:
                measured.setdefault(entry["window"], []).append(entry["nats_per_token"])
        if len(measured) > 1:
            windows = sorted(measured)
            lines[variant.label] = [(windows, [fmean(measured[window]) for window in windows])]
    if not lines:
        return None
    ticks = sorted({window for ((windows, _),) in lines.values() for window in windows})
    lines = {label: [([log_place(w) for w in windows], means)] for label, ((windows, means),) in lines.items()}
    _draw(group, panels, lines, "window at evaluation", "validation loss (nats a token)")
    for axes in panels:
        axes.set_xscale("log", base=2)
        window_ticks(axes, ticks)
    return "One checkpoint, many windows", "Each line is a model trained at one window and evaluated at others."


def _bins(
    group: Group, panels: list[Axes], kind: str, title: str, x_label: str, length: int = 1
) -> tuple[str, str] | None:
    """Loss in the bins of `kind`, less full attention's where it is there."""
    lines: Lines = {}
    for variant in group.variants:
        ours, full = variant.paired(group.full) if group.full else (variant, None)
        base = {bin["first"]: bin["nats_per_token"] for bin in full.bins(kind, length)} if full else None
        bins = [bin for bin in ours.bins(kind, length) if base is None or bin["first"] in base]
        if bins:
            heights = [bin["nats_per_token"] - (base[bin["first"]] if base else 0.0) for bin in bins]
            lines[variant.label] = [([_centre(bin) for bin in bins], heights)]
    if not lines:
        return None
    _draw(group, panels, lines, x_label, _less_full("loss", group.full))
    _distance_axes(group, panels, length, logarithmic=kind != "by_row_position")
    what = {
        "by_context_tokens": "Validation loss by how many tokens of its own document a target has before it",
        "by_row_position": "Validation loss by the target's place in the packed row",
        "recall_by_distance": "Loss on recall tokens by distance to the nearest earlier occurrence",
    }[kind]
    zero = "; full attention's own at the same seeds is the zero line" if group.full else ""
    return title, f"{what}{zero}.{_beyond(group, length)}"


def _accuracy(group: Group, panels: list[Axes], length: int, title: str) -> tuple[str, str] | None:
    lines: Lines = {}
    for variant in group.variants:
        if bins := variant.bins("recall_by_distance", length):
            lines[variant.label] = [([_centre(bin) for bin in bins], [bin["accuracy"] for bin in bins])]
    if not lines:
        return None
    _draw(group, panels, lines, RECALL_DISTANCE, "accuracy on recall tokens", in_view=False)
    _distance_axes(group, panels, length)
    panels[0].set_ylim(-0.02, 1.02)
    return title, (
        "Share of recall tokens that are the model's likeliest token, by distance to the nearest earlier occurrence, "
        f"means over seeds; up to distance W it lies in the window.{_beyond(group, length)}"
    )


def _draw(group: Group, panels: list[Axes], lines: Lines, x_label: str, y_label: str, *, in_view: bool = True) -> None:
    """Draws each mixer's lines into its panel, and those of models without a window into all."""
    for axes, mixer in zip(panels, group.windowed or [None], strict=True):
        for variant in group.variants:
            if variant.mixer == mixer or variant.window is None:
                for index, (x, y) in enumerate(lines.get(variant.label, [])):
                    style = line_style(group, variant) | {"alpha": 1.0 if index == 0 else 0.55}
                    # A point in ten wears the marker on a long line.
                    axes.plot(x, y, label=variant.label, markevery=max(len(x) // 10, 1) if len(x) > 20 else 1, **style)
        axes.set(xlabel=x_label, title=mixer if len(panels) > 1 else None)
    panels[0].set_ylabel(y_label)
    if in_view:
        heights = {label: [value for _, y in each for value in y] for label, each in lines.items()}
        keep_the_rest_in_view(panels[0], heights)
    legend(panels[0].figure, 4 * len(panels))


def _distance_axes(group: Group, panels: list[Axes], length: int, *, logarithmic: bool = True) -> None:
    for axes in panels:
        if logarithmic:
            log_axis(axes)
        if length > 1:
            axes.axvline(group.runs[0].own["context_length"], color=INK, alpha=0.35, linewidth=1)


def _beyond(group: Group, length: int) -> str:
    context = group.runs[0].own["context_length"]
    return f" The upright line is the training context, {context:,} tokens." if length > 1 else ""


def _less_full(what: str, full: Any) -> str:
    return f"{what} − full attention's (nats a token)" if full else f"{what} (nats a token)"


def _centre(bin: dict[str, Any]) -> float:
    return (bin["first"] + bin["last"]) / 2
