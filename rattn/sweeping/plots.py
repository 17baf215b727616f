"""The report's figures, each drawn once and saved twice: a PNG, and an SVG whose ink takes the page's text colour."""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rattn.errors import UserError
from rattn.sweeping.summary import Group, Run, Variant, bits_per_byte, loss, pareto_front

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator
except ModuleNotFoundError as error:
    raise UserError(
        "The report's figures need matplotlib, which is not installed; pip install 'rattn[report]', then run the sweep "
        "with --report_only (the results are kept)."
    ) from error

# Stands for the text colour: in the SVG it becomes currentColor, so that one figure serves light and dark pages.
INK = "#1a1c20"
# From small to large windows. All read on white and on near-black, and differ in lightness where hues are confused.
COLOURS = {
    "full": (INK, INK),
    "rattention": ("#6aaee8", "#2166ac"),
    "swa": ("#f0a848", "#c05a00"),
    "linear": ("#2a9d7f", "#2a9d7f"),
}
OTHER_COLOURS = ("#b48ad6", "#8250b0")
MARKERS = "osD^vPX*<>"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "rattn",
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """A finished figure.

    Attributes:
      name: of its file.
      title, caption: for the page; the caption also describes it to those who cannot see it.
      svg: inline SVG text.
      png: file contents.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


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
                drawn.append(_saved(draw.__name__.strip("_"), *described, figure))
            plt.close(figure)
    return drawn


def _against_window(group: Group, axes: Axes) -> tuple[str, str] | None:
    """Loss over windows, a curve a mixer; what has no window is a level line."""
    if not group.windowed:
        return None
    windows = sorted({variant.window for variant in group.variants if variant.window is not None})
    for variant in group.variants:
        if variant.window is None:
            axes.axhline(variant.mean(loss), color=_colour(variant.mixer), linestyle="--", linewidth=1.3)
            axes.axhspan(min(variant.values(loss)), max(variant.values(loss)), color=_colour(variant.mixer), alpha=0.13)
    for mixer in group.windowed:
        curve = group.curve(mixer)
        x = [_log_place(variant.window) for variant in curve]
        means = [variant.mean(loss) for variant in curve]
        axes.plot(x, means, color=_colour(mixer), marker=_marker(mixer), label=mixer)
        seeds = [(place, value) for place, variant in zip(x, curve, strict=True) for value in variant.values(loss)]
        axes.plot(*zip(*seeds, strict=True), ".", color=_colour(mixer), alpha=0.55, markersize=5)
    axes.set_xscale("log", base=2)
    _window_ticks(axes, windows)
    axes.set(xlabel="window W (tokens, the query included)", ylabel="validation loss (nats a token)")
    _bits_axis(group, axes)
    _keep_the_rest_in_view(axes, {variant.label: [variant.mean(loss)] for variant in group.variants})
    for variant in group.variants:
        if variant.window is None and variant.mean(loss) < axes.get_ylim()[1]:
            axes.annotate(
                variant.label, (0, variant.mean(loss)), xycoords=("axes fraction", "data"), xytext=(4, 3),
                textcoords="offset points", fontsize=9, color=_colour(variant.mixer),
            )  # fmt: skip
    _legend(axes)
    return "Loss against window", (
        "Curves join the means over seeds, dots are seeds; dashed lines are the models without a window, their bands "
        "the range over seeds."
    )


def _against_cache(group: Group, axes: Axes) -> tuple[str, str]:
    """Loss over decode cache, with the Pareto front."""
    scale, unit = (2**20, "MiB") if max(run.cache_bytes for run in group.runs) >= 2**21 else (2**10, "KiB")
    _scatter_with_front(group, axes, lambda run: run.cache_bytes / scale)
    context = group.runs[0].own["context_length"]
    _log_axis(axes)
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
    _log_axis(axes)
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
    for variant, style in _styled(group):
        bins = variant.bins("recall_by_distance")
        axes.plot([_centre(bin) for bin in bins], [bin["accuracy"] for bin in bins], label=variant.label, **style)
    _log_axis(axes)
    axes.set(
        xlabel="distance to the nearest occurrence (tokens)", ylabel="accuracy on recall tokens", ylim=(-0.02, 1.02)
    )
    _legend(axes)
    return "Recall by distance: accuracy", (
        "Share of recall tokens that are the model's likeliest token, by distance to the nearest earlier occurrence; "
        "up to distance W it lies in the window."
    )


def _recall_loss(group: Group, axes: Axes) -> tuple[str, str] | None:
    """Loss on recall tokens by distance."""
    if not _has_recall(group):
        return None
    what = _curves(group, axes, "recall_by_distance")
    _log_axis(axes)
    axes.set(xlabel="distance to the nearest occurrence (tokens)", ylabel=what)
    return "Recall by distance: loss", (
        "Loss on recall tokens by distance to the nearest earlier occurrence" + _less_full(what)
    )


def _by_length(group: Group, axes: Axes) -> tuple[str, str] | None:
    """Loss at multiples of the training length."""
    if max(len(run.lengths) for run in group.runs) < 2:
        return None
    ticks, heights = sorted({length for run in group.runs for length in run.lengths}), {}
    for variant, style in _styled(group):
        lengths = [length for length in ticks if all(run.at(length) for run in variant.runs)]
        means = [variant.mean(lambda run, length=length: run.at(length)["nats_per_token"]) for length in lengths]
        axes.plot(lengths, means, label=variant.label, **style)
        heights[variant.label] = means
    _keep_the_rest_in_view(axes, heights)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick}×" for tick in ticks])
    axes.set(xlabel="length of the row, in training contexts", ylabel="validation loss (nats a token)")
    _legend(axes)
    return "Loss beyond the training length", "Validation loss in rows of the training context and its multiples."


def _many_windows(group: Group, axes: Axes) -> tuple[str, str] | None:
    """One checkpoint at many windows."""
    found, ticks = False, set()
    for variant, style in _styled(group):
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
        axes.plot([_log_place(window) for window in windows], means, label=variant.label, **style)
    if not found:
        return None
    axes.set_xscale("log", base=2)
    _window_ticks(axes, sorted(ticks))
    axes.set(xlabel="window at evaluation", ylabel="validation loss (nats a token)")
    _legend(axes)
    return "One checkpoint, many windows", "Each line is a model trained at one window and evaluated at others."


def _scatter_with_front(group: Group, axes: Axes, cost: Callable[[Run], float]) -> None:
    points = [(variant.mean(cost), variant.mean(loss)) for variant in group.variants]
    front = [points[index] for index in pareto_front(points)]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=INK, alpha=0.45, linewidth=1.3, zorder=1)
    for mixer in dict.fromkeys(variant.mixer for variant in group.variants):
        places = [point for point, variant in zip(points, group.variants, strict=True) if variant.mixer == mixer]
        axes.plot(*zip(*places, strict=True), _marker(mixer), color=_colour(mixer), label=mixer, markersize=7)
    for (x, y), variant in zip(points, group.variants, strict=True):
        if variant.window is not None:
            axes.annotate(str(variant.window), (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.margins(0.12)
    _keep_the_rest_in_view(axes, {variant.label: [variant.mean(loss)] for variant in group.variants})
    _legend(axes)


def _curves(group: Group, axes: Axes, kind: str) -> str:
    """Draws the bins of `kind`, less full attention's where it is there; returns what the y axis says."""
    full = group.full
    base = {bin["first"]: bin["nats_per_token"] for bin in full.bins(kind)} if full else {}
    relative, heights = bool(base) and len(group.variants) > 1, {}
    for variant, style in _styled(group):
        bins = variant.bins(kind)
        if relative:
            bins = [bin for bin in bins if bin["first"] in base]
        values = [bin["nats_per_token"] - (base[bin["first"]] if relative else 0) for bin in bins]
        axes.plot([_centre(bin) for bin in bins], values, label=variant.label, **style)
        heights[variant.label] = values
    _keep_the_rest_in_view(axes, heights)
    _legend(axes)
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


def _styled(group: Group) -> Iterator[tuple[Variant, dict[str, Any]]]:
    """Variants with colour, marker and dashes: a hue a mixer, darker for larger windows."""
    for mixer in dict.fromkeys(variant.mixer for variant in group.variants):
        curve = group.curve(mixer)
        for index, variant in enumerate(curve):
            style = {
                "color": _colour(mixer, index / (len(curve) - 1) if len(curve) > 1 else 1.0),
                "marker": MARKERS[index % len(MARKERS)] if variant.window is not None else None,
                "linestyle": {"full": "-", "swa": "--", "linear": ":"}.get(mixer, "-"),
                "markersize": 4.5,
                "linewidth": 1.4,
            }
            yield variant, style


def _colour(mixer: str, share: float = 1.0) -> str:
    low, high = COLOURS.get(mixer, OTHER_COLOURS)
    parts = [round(int(low[i : i + 2], 16) * (1 - share) + int(high[i : i + 2], 16) * share) for i in (1, 3, 5)]
    return "#" + "".join(f"{part:02x}" for part in parts)


def _marker(mixer: str) -> str:
    return {"full": "s", "rattention": "o", "swa": "^", "linear": "D"}.get(mixer, "P")


def _log_place(window: int) -> float:
    """A window's place on a logarithmic axis; 0 stands half an octave left of 1."""
    return window or 2**-0.5


def _window_ticks(axes: Axes, windows: Sequence[int]) -> None:
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([_log_place(window) for window in windows], [str(window) for window in windows])
    axes.margins(x=0.06)


def _log_axis(axes: Axes) -> None:
    """A logarithmic axis of powers of two in plain numbers, of what is drawn on it."""
    low, high = axes.get_xlim() if axes.get_xlim()[0] > 0 else (axes.dataLim.minposx, axes.dataLim.x1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    exponents = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    ticks = [2.0**exponent for exponent in exponents[:: -(-len(exponents) // 9)]]
    if high < 8 * low:
        places = sorted({float(x) for line in axes.get_lines() for x in line.get_xdata()})
        ticks = places[:: -(-len(places) // 6)]
    axes.set_xticks(ticks, [f"{tick:,g}" if tick >= 1e-2 else f"{tick:.1e}" for tick in ticks])
    axes.set_xlim(low / 1.15, high * 1.15)


def _keep_the_rest_in_view(axes: Axes, heights: dict[str, list[float]]) -> None:
    """Leaves the linear model above the axes where it would flatten what all others do.

    Args:
      axes: after everything is drawn.
      heights: of each variant's label.
    """
    rest = [height for label, values in heights.items() if label != "linear" for height in values]
    linear = heights.get("linear", [])
    if len(heights) < 3 or not linear or not rest:
        return
    low, high = min(rest), max(rest)
    if max(linear) <= high + 1.5 * (high - low):
        return
    axes.set_ylim(low - 0.12 * (high - low), high + 0.2 * (high - low))
    value = f"{linear[0]:.3f}" if len(linear) == 1 else f"{min(linear):.3f} to {max(linear):.3f}"
    axes.annotate(
        f"linear, above: {value}", (0.5, 1), xycoords="axes fraction", xytext=(0, -4), textcoords="offset points",
        ha="center", va="top", fontsize=9, color=_colour("linear"),
    )  # fmt: skip


def _centre(bin: dict[str, Any]) -> float:
    return (bin["first"] + bin["last"]) / 2


def _legend(axes: Axes) -> None:
    count = len(axes.get_legend_handles_labels()[1])
    axes.figure.legend(loc="outside lower center", ncols=min(count, 4))


def _saved(name: str, title: str, caption: str, figure: Figure) -> Plot:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=150, facecolor="white")
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(name, title, caption, _page_svg(svg.getvalue(), f"{title}. {caption}"), png.getvalue())


def _page_svg(text: str, description: str) -> str:
    """Makes matplotlib's SVG part of a page: no prologue, no fixed size, ink in the page's colour, described."""
    text = text[text.index("<svg") :]
    head, _, body = text.partition(">")
    view = re.search(r'viewBox="[^"]+"', head)[0]
    described = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL).replace(INK, "currentColor")
    # matplotlib writes a text's size and family into its style; the family is the page's.
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} {view} role="img" aria-label="{described}">{body}'
