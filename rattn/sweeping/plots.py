"""The report's figures: each function draws one from a group's results, or nothing where they do not allow it."""

from collections.abc import Callable
from typing import Any

from rattn.sweeping.plot_style import (
    INK,
    STYLE,
    Plot,
    colour,
    keep_the_rest_in_view,
    legend,
    log_axis,
    log_place,
    marker,
    saved,
    styled,
    window_ticks,
)
from rattn.sweeping.summary import Group, Run, bits_per_byte, loss, pareto_front

# isort: split
# After plot_style, which says what to do where matplotlib is missing.
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator


def plots(group: Group) -> list[Plot]:
    """Draws what the group's results allow."""
    drawn = []
    for draw in (
        _against_window,
        _against_cache,
        _against_step_time,
        _by_context,
        _by_row_position,
        _recall_accuracy,
        _recall_loss,
        _by_length,
        _many_windows,
    ):
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(6.4, 4.1), layout="constrained")
            described = draw(group, axes)
            if described:
                drawn.append(saved(draw.__name__.strip("_"), *described, figure))
            plt.close(figure)
    return drawn


def _against_window(group: Group, axes: Axes) -> tuple[str, str] | None:
    """Loss over windows, a curve a mixer; what has no window is a level line."""
    if not group.windowed:
        return None
    windows = sorted({variant.window for variant in group.variants if variant.window is not None})
    for variant in group.variants:
        if variant.window is None:
            axes.axhline(variant.mean(loss), color=colour(variant.mixer), linestyle="--", linewidth=1.3)
            axes.axhspan(min(variant.values(loss)), max(variant.values(loss)), color=colour(variant.mixer), alpha=0.13)
    for mixer in group.windowed:
        curve = group.curve(mixer)
        x = [log_place(variant.window) for variant in curve]
        means = [variant.mean(loss) for variant in curve]
        axes.plot(x, means, color=colour(mixer), marker=marker(mixer), label=mixer)
        seeds = [(place, value) for place, variant in zip(x, curve, strict=True) for value in variant.values(loss)]
        axes.plot(*zip(*seeds, strict=True), ".", color=colour(mixer), alpha=0.55, markersize=5)
    axes.set_xscale("log", base=2)
    window_ticks(axes, windows)
    axes.set(xlabel="window W (tokens, the query included)", ylabel="validation loss (nats a token)")
    _bits_axis(group, axes)
    keep_the_rest_in_view(axes, {variant.label: [variant.mean(loss)] for variant in group.variants})
    for variant in group.variants:
        if variant.window is None and variant.mean(loss) < axes.get_ylim()[1]:
            axes.annotate(
                variant.label, (0, variant.mean(loss)), xycoords=("axes fraction", "data"), xytext=(4, 3),
                textcoords="offset points", fontsize=9, color=colour(variant.mixer),
            )  # fmt: skip
    legend(axes)
    return "Loss against window", (
        "Curves join the means over seeds, dots are seeds; dashed lines are the models without a window, their bands "
        "the range over seeds."
    )


def _against_cache(group: Group, axes: Axes) -> tuple[str, str]:
    """Loss over decode cache, with the Pareto front."""
    scale, unit = (2**20, "MiB") if max(run.cache_bytes for run in group.runs) >= 2**21 else (2**10, "KiB")
    _scatter_with_front(group, axes, lambda run: run.cache_bytes / scale)
    context = group.runs[0].own["context_length"]
    log_axis(axes)
    axes.set(
        xlabel=f"decode cache of one sequence of {context:,} tokens ({unit})", ylabel="validation loss (nats a token)"
    )
    return "Loss against decode cache", (
        "Means over seeds; the line is the Pareto front: no point has both a smaller cache and a lower loss. "
        "Keys and values in bf16, states in float32."
    )


def _against_step_time(group: Group, axes: Axes) -> tuple[str, str] | None:
    """Loss over training step time, with the Pareto front."""
    if not all(run.step_seconds for run in group.runs):
        return None
    _scatter_with_front(group, axes, lambda run: run.step_seconds * 1000)
    axes.set(xlabel="training step (ms)", ylabel="validation loss (nats a token)")
    devices = sorted({run.evaluation["device"] for run in group.runs})
    where = f"Measured on {', '.join(devices)}."
    if len(devices) > 1:
        where += " The devices differ, so compare step times only within one."
    return "Loss against step time", f"Means over seeds; the line is the Pareto front. {where}"


def _by_context(group: Group, axes: Axes) -> tuple[str, str] | None:
    """Loss by what stands before the target in its document."""
    what = _curves(group, axes, "by_context_tokens")
    log_axis(axes)
    axes.set(xlabel="tokens of the document before the target", ylabel=what)
    return "Loss by context", (
        "Validation loss by how many tokens of its own document a target has before it, in bins of powers of two"
        + _less_full(what)
    )


def _by_row_position(group: Group, axes: Axes) -> tuple[str, str]:
    """Loss by place in the row."""
    what = _curves(group, axes, "by_row_position")
    axes.set(xlabel="position in the row", ylabel=what)
    return "Loss by position in the row", (
        "Validation loss by the target's place in the packed row, in equal bins" + _less_full(what)
    )


def _recall_accuracy(group: Group, axes: Axes) -> tuple[str, str] | None:
    """Accuracy on recall tokens by distance."""
    if not _has_recall(group):
        return None
    for variant, style in styled(group):
        bins = variant.bins("recall_by_distance")
        axes.plot([_centre(bin) for bin in bins], [bin["accuracy"] for bin in bins], label=variant.label, **style)
    log_axis(axes)
    axes.set(
        xlabel="distance to the nearest occurrence (tokens)", ylabel="accuracy on recall tokens", ylim=(-0.02, 1.02)
    )
    legend(axes)
    return "Recall by distance: accuracy", (
        "Share of recall tokens that are the model's likeliest token, by distance to the nearest earlier occurrence; "
        "up to distance W it lies in the window."
    )


def _recall_loss(group: Group, axes: Axes) -> tuple[str, str] | None:
    """Loss on recall tokens by distance."""
    if not _has_recall(group):
        return None
    what = _curves(group, axes, "recall_by_distance")
    log_axis(axes)
    axes.set(xlabel="distance to the nearest occurrence (tokens)", ylabel=what)
    return "Recall by distance: loss", (
        "Loss on recall tokens by distance to the nearest earlier occurrence" + _less_full(what)
    )


def _by_length(group: Group, axes: Axes) -> tuple[str, str] | None:
    """Loss at multiples of the training length."""
    if max(len(run.lengths) for run in group.runs) < 2:
        return None
    ticks, heights = sorted({length for run in group.runs for length in run.lengths}), {}
    for variant, style in styled(group):
        lengths = [length for length in ticks if all(run.at(length) for run in variant.runs)]
        means = [variant.mean(lambda run, length=length: run.at(length)["nats_per_token"]) for length in lengths]
        axes.plot(lengths, means, label=variant.label, **style)
        heights[variant.label] = means
    keep_the_rest_in_view(axes, heights)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick}×" for tick in ticks])
    axes.set(xlabel="length of the row, in training contexts", ylabel="validation loss (nats a token)")
    legend(axes)
    return "Loss beyond the training length", "Validation loss in rows of the training context and its multiples."


def _many_windows(group: Group, axes: Axes) -> tuple[str, str] | None:
    """One checkpoint at many windows."""
    found, ticks = False, set()
    for variant, style in styled(group):
        measured = {
            entry["window"]: [
                other["nats_per_token"]
                for run in variant.runs
                for other in run.evaluation["measured"]
                if other["length"] == 1 and other["window"] == entry["window"]
            ]
            for entry in variant.runs[0].evaluation["measured"]
            if entry["length"] == 1 and entry["window"] is not None
        }
        if len(measured) < 2:
            continue
        found, windows = True, sorted(measured)
        ticks |= set(windows)
        means = [sum(measured[window]) / len(measured[window]) for window in windows]
        axes.plot([log_place(window) for window in windows], means, label=variant.label, **style)
    if not found:
        return None
    axes.set_xscale("log", base=2)
    window_ticks(axes, sorted(ticks))
    axes.set(xlabel="window at evaluation", ylabel="validation loss (nats a token)")
    legend(axes)
    return "One checkpoint, many windows", "Each line is a model trained at one window and evaluated at others."


def _scatter_with_front(group: Group, axes: Axes, cost: Callable[[Run], float]) -> None:
    points = [(variant.mean(cost), variant.mean(loss)) for variant in group.variants]
    front = [points[index] for index in pareto_front(points)]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=INK, alpha=0.45, linewidth=1.3, zorder=1)
    for mixer in dict.fromkeys(variant.mixer for variant in group.variants):
        places = [point for point, variant in zip(points, group.variants, strict=True) if variant.mixer == mixer]
        axes.plot(*zip(*places, strict=True), marker(mixer), color=colour(mixer), label=mixer, markersize=7)
    for (x, y), variant in zip(points, group.variants, strict=True):
        if variant.window is not None:
            # Of one mixer above its markers, of another below, for equal windows often lie close.
            place = (6, 4) if variant.mixer == group.windowed[0] else (6, -11)
            axes.annotate(
                str(variant.window), (x, y), xytext=place, textcoords="offset points", fontsize=8,
                color=colour(variant.mixer),
            )  # fmt: skip
    axes.margins(0.12)
    keep_the_rest_in_view(axes, {variant.label: [variant.mean(loss)] for variant in group.variants})
    legend(axes)


def _curves(group: Group, axes: Axes, kind: str) -> str:
    """Draws the bins of `kind`, less full attention's where it is there; returns what the y axis says."""
    full = group.full
    base = {bin["first"]: bin["nats_per_token"] for bin in full.bins(kind)} if full else {}
    relative, heights = bool(base) and len(group.variants) > 1, {}
    for variant, style in styled(group):
        bins = variant.bins(kind)
        if relative:
            bins = [bin for bin in bins if bin["first"] in base]
        values = [bin["nats_per_token"] - (base[bin["first"]] if relative else 0) for bin in bins]
        axes.plot([_centre(bin) for bin in bins], values, label=variant.label, **style)
        heights[variant.label] = values
    keep_the_rest_in_view(axes, heights)
    legend(axes)
    return "loss − full attention's (nats a token)" if relative else "loss (nats a token)"


def _less_full(what: str) -> str:
    return "; full attention's own is the zero line." if "full" in what else "."


def _has_recall(group: Group) -> bool:
    return any(variant.bins("recall_by_distance") for variant in group.variants)


def _bits_axis(group: Group, axes: Axes) -> None:
    """The same heights in bits per byte, on the right; the runs of a group are of the same text."""
    ratios = {round(bits_per_byte(run) / loss(run), 6) for run in group.runs if loss(run)}
    if len(ratios) == 1:
        ratio = ratios.pop()
        right = axes.secondary_yaxis("right", functions=(lambda nats: nats * ratio, lambda bits: bits / ratio))
        right.set_ylabel("bits per byte")
        right.spines["right"].set_visible(True)


def _centre(bin: dict[str, Any]) -> float:
    return (bin["first"] + bin["last"]) / 2
