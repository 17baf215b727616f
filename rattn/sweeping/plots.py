"""The report's figures of loss against window and costs: each function draws one, or nothing where results lack it."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from rattn.sweeping.panels import panel_plots
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
    window_ticks,
)
from rattn.sweeping.summary import Group, Run, Variant, bits_per_byte, loss, pareto_front
from rattn.sweeping.verdict import epsilon_of

# isort: split
# After plot_style, which says what to do where matplotlib is missing.
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

# Points from the middle of a marker to its label, and where that goes: (right, up).
LABEL_GAP = 4.5
SIDES = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))


def plots(group: Group, epsilon: float | None, curves: Mapping[str, Mapping[int, float]]) -> list[Plot]:
    """Draws what the group's results allow.

    Args:
      group: what was measured.
      epsilon: see `verdict`.
      curves: training losses by step, of each run whose metrics are at hand, by its identity.
    """
    drawn = []
    for draw in (_against_window, _against_cache, _against_step_time):
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(6.4, 4.1), layout="constrained")
            described = draw(group, axes, epsilon)
            if described:
                drawn.append(saved(draw.__name__.strip("_"), *described, figure, wide=False))
            plt.close(figure)
    return drawn + panel_plots(group, curves)


def _against_window(group: Group, axes: Axes, epsilon: float | None) -> tuple[str, str] | None:
    """Loss over windows, a curve a mixer; what has no window is a level line."""
    if not group.windowed:
        return None
    for variant in group.variants:
        if variant.window is None:
            axes.axhline(_height(group, variant), color=colour(variant.mixer), linestyle="--", linewidth=1.3)
    equal = epsilon_of(group.full, loss, epsilon) if group.full else None
    if equal is not None:
        axes.axhspan(-equal, equal, color=INK, alpha=0.1, linewidth=0)
    for mixer in group.windowed:
        curve = group.curve(mixer)
        x = [log_place(variant.window) for variant in curve]
        means = [_height(group, variant) for variant in curve]
        axes.plot(x, means, color=colour(mixer), marker=marker(mixer), label=mixer)
        seeds = [(place, value) for place, v in zip(x, curve, strict=True) for value in _heights(group, v)]
        axes.plot(*zip(*seeds, strict=True), ".", color=colour(mixer), alpha=0.55, markersize=5)
    axes.set_xscale("log", base=2)
    window_ticks(axes, group.windows)
    axes.set(xlabel="window W (tokens, the query included)", ylabel=_loss_label(group))
    _bits_axis(group, axes)
    keep_the_rest_in_view(axes, {variant.label: _heights(group, variant) for variant in group.variants})
    for variant in group.variants:
        if variant.window is None and _height(group, variant) < axes.get_ylim()[1]:
            axes.annotate(
                variant.label, (0, _height(group, variant)), xycoords=("axes fraction", "data"), xytext=(4, 3),
                textcoords="offset points", fontsize=9, color=colour(variant.mixer),
            )  # fmt: skip
    legend(axes.figure, 4)
    band = "" if equal is None else "; the band reaches ε to both sides of full attention"
    return "Loss against window", (
        f"{_what(group)} Curves join the means over seeds, dots are seeds, dashed lines the models without a "
        f"window{band}."
    )


def _against_cache(group: Group, axes: Axes, epsilon: float | None) -> tuple[str, str]:
    """Loss over decode cache, with the Pareto front."""
    scale, unit = (2**20, "MiB") if max(run.cache_bytes for run in group.runs) >= 2**21 else (2**10, "KiB")
    context = group.runs[0].own["context_length"]
    axes.set(xlabel=f"decode cache of one sequence of {context:,} tokens ({unit})", ylabel=_loss_label(group))
    front = _scatter_with_front(group, axes, lambda run: run.cache_bytes / scale, logarithmic=True)
    dtypes = " or ".join(sorted({run.evaluation["config"]["model"]["compute_dtype"] for run in group.runs}))
    return "Loss against decode cache", f"{_what(group)} {front} Keys and values in {dtypes}, states in float32."


def _against_step_time(group: Group, axes: Axes, epsilon: float | None) -> tuple[str, str] | None:
    """Loss over training step time, with the Pareto front."""
    if not all(run.step_seconds for run in group.runs):
        return None
    axes.set(xlabel="training step (ms)", ylabel=_loss_label(group))
    front = _scatter_with_front(group, axes, lambda run: run.step_seconds * 1000)
    devices = sorted({run.evaluation["device"] for run in group.runs})
    where = f"Measured on {', '.join(devices)}."
    if len(devices) > 1:
        where += " The devices differ, so compare step times only within one."
    return "Loss against step time", f"{_what(group)} {front} {where}"


def _heights(group: Group, variant: Variant) -> list[float]:
    """What a figure shows of a variant's loss: one a seed, less full attention's where it is there."""
    return variant.differences(group.full, loss) if group.full else variant.values(loss)


def _height(group: Group, variant: Variant) -> float:
    return fmean(_heights(group, variant))


def _loss_label(group: Group) -> str:
    return "loss − full attention's (nats a token)" if group.full else "validation loss (nats a token)"


def _what(group: Group) -> str:
    if not group.full:
        return "Validation loss."
    level = group.full.mean(loss)
    return f"Validation loss less full attention's at the same seed (mean over seeds {level:.4f})."


def _scatter_with_front(group: Group, axes: Axes, cost: Callable[[Run], float], *, logarithmic: bool = False) -> str:
    """Draws each variant at (cost, loss) into labelled axes; returns what the caption says of the front."""
    points = [(variant.mean(cost), _height(group, variant)) for variant in group.variants]
    front = pareto_front(points)
    if len(front) > 1:
        axes.plot(*zip(*(points[i] for i in front), strict=True), color=INK, alpha=0.45, linewidth=1.3, zorder=1)
    for mixer in dict.fromkeys(variant.mixer for variant in group.variants):
        places = [point for point, variant in zip(points, group.variants, strict=True) if variant.mixer == mixer]
        axes.plot(*zip(*places, strict=True), marker(mixer), color=colour(mixer), label=mixer, markersize=7)
    axes.margins(0.12)
    if logarithmic:
        log_axis(axes)
    keep_the_rest_in_view(axes, {variant.label: [_height(group, variant)] for variant in group.variants})
    legend(axes.figure, 4)
    _label_windows(group, axes, points)
    if len(points) == 1:
        return ""
    if len(front) == 1:
        return f"No line, for {group.variants[front[0]].label} has both the smallest cost and the lowest loss."
    return "The line is the Pareto front: no point has both a smaller cost and a lower loss than one on it."


def _label_windows(group: Group, axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Writes each window beside its marker, on the first side where it covers no marker and no other text.

    Where every side covers something, on the one that covers least; call it when all else is drawn.
    """
    axes.figure.draw_without_rendering()  # Lays the axes out.
    renderer, radius = axes.figure.canvas.get_renderer(), LABEL_GAP * axes.figure.dpi / 72
    markers = [Bbox([(x - radius, y - radius), (x + radius, y + radius)]) for x, y in axes.transData.transform(points)]
    taken = markers + [text.get_window_extent(renderer) for text in axes.texts]
    for point, variant in zip(points, group.variants, strict=True):
        if variant.window is None or not axes.get_ylim()[0] <= point[1] <= axes.get_ylim()[1]:
            continue
        label = axes.annotate(
            str(variant.window),
            point,
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            color=colour(variant.mixer),
        )
        # Of one mixer above its markers first, of another below, for equal windows often lie close.
        sides = SIDES if variant.mixer == group.windowed[0] else [(-right, -up) for right, up in SIDES]
        boxes = [_placed(label, side, renderer) for side in sides]
        covered = [sum(_shared_area(box, other) for other in taken) for box in boxes]
        best = covered.index(min(covered))
        taken.append(_placed(label, sides[best], renderer))


def _placed(label: Annotation, side: tuple[int, int], renderer: RendererBase) -> Bbox:
    """Moves a label to a side of its point; returns the box that it takes there."""
    right, up = side
    label.set(
        position=(LABEL_GAP * right, LABEL_GAP * up),
        horizontalalignment=("right", "center", "left")[right + 1],
        verticalalignment=("top", "center", "bottom")[up + 1],
    )
    return label.get_window_extent(renderer)


def _shared_area(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return both.width * both.height if both else 0.0


def _bits_axis(group: Group, axes: Axes) -> None:
    """The same heights in bits per byte, on the right; the runs of a group are of the same text."""
    ratios = {round(bits_per_byte(run) / loss(run), 6) for run in group.runs if loss(run)}
    if len(ratios) == 1:
        ratio = ratios.pop()
        right = axes.secondary_yaxis("right", functions=(lambda nats: nats * ratio, lambda bits: bits / ratio))
        right.set_ylabel("bits per byte" + (" − full attention's" if group.full else ""))
        right.spines["right"].set_visible(True)
