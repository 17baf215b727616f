"""How the report's figures look: colours, axes, and saving each as a PNG and as an SVG that takes the page's ink."""

import dataclasses
import io
import math
import re
from collections.abc import Sequence
from typing import Any

from rattn.errors import UserError
from rattn.sweeping.summary import Group, Variant

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator
except ModuleNotFoundError as error:
    raise UserError(
        "The report's figures need matplotlib, which is not installed; pip install 'rattn[report]', then run the sweep "
        "with --report_only (the results are kept)."
    ) from error

# Stands for the text colour: in the SVG it becomes currentColor, so that one figure serves light and dark pages.
INK = "#1a1c20"
# All read on white and on near-black.
COLOURS = {"full": INK, "rattention": "#2f7fd0", "swa": "#d9761a", "linear": "#2a9d7f"}
OTHER_COLOUR = "#9a60c8"
# From small to large windows, where a mixer has its own axes.
WINDOW_COLOURS = ("#4a7fe0", "#17a2a8", "#58a32b", "#cf9a00", "#e3641c", "#d63a78", "#9a60c8")
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
      wide: whether it takes the page's whole width.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes
    wide: bool


def line_style(group: Group, variant: Variant) -> dict[str, Any]:
    """Colour, marker and dashes of a variant's curve: a window looks the same whatever the mixer."""
    style = {"linewidth": 1.4, "markersize": 4.5, "color": colour(variant.mixer)}
    if variant.window is None:
        return style | {"linestyle": "-" if variant.mixer == "full" else ":"}
    index = group.windows.index(variant.window)
    share = index / max(len(group.windows) - 1, 1) * (len(WINDOW_COLOURS) - 1)
    low, high = WINDOW_COLOURS[math.floor(share)], WINDOW_COLOURS[math.ceil(share)]
    return style | {"color": _between(low, high, share % 1), "marker": MARKERS[index % len(MARKERS)]}


def colour(mixer: str) -> str:
    """The mixer's."""
    return COLOURS.get(mixer, OTHER_COLOUR)


def _between(low: str, high: str, share: float) -> str:
    parts = [round(int(low[i : i + 2], 16) * (1 - share) + int(high[i : i + 2], 16) * share) for i in (1, 3, 5)]
    return "#" + "".join(f"{part:02x}" for part in parts)


def marker(mixer: str) -> str:
    """The mixer's marker where windows are not told apart."""
    return {"full": "s", "rattention": "o", "swa": "^", "linear": "D"}.get(mixer, "P")


def log_place(window: int) -> float:
    """A window's place on a logarithmic axis; 0 stands half an octave left of 1."""
    return window or 2**-0.5


def window_ticks(axes: Axes, windows: Sequence[int]) -> None:
    """One tick a window, at its `log_place`."""
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([log_place(window) for window in windows], [str(window) for window in windows])
    axes.margins(x=0.06)


def log_axis(axes: Axes) -> None:
    """A logarithmic axis in plain numbers, of what is drawn on it: powers of two, on a short one more than those."""
    low, high = axes.dataLim.minposx, axes.dataLim.x1
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.15, high * 1.15)
    axes.xaxis.set_minor_locator(NullLocator())
    octaves = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    steps = (1, 1.25, 1.5, 1.75) if high < 3 * low else (1, 1.5) if high < 12 * low else (1,)
    ticks = [2.0**octave * step for octave in octaves[:: -(-len(octaves) // 9)] for step in steps]
    axes.set_xticks(ticks, [f"{tick:,g}" if tick >= 1e-2 else f"{tick:.1e}" for tick in ticks])
    axes.set_xlim(low / 1.15, high * 1.15)


def keep_the_rest_in_view(axes: Axes, heights: dict[str, list[float]]) -> None:
    """Lets those variants leave the axes at the top that would flatten what all others do, and says how far they go.

    Args:
      axes: after everything is drawn.
      heights: of each variant's label.
    """
    labels = sorted((label for label in heights if heights[label]), key=lambda label: max(heights[label]))
    shown = labels[: len(labels) // 2 + 1]
    low, high = (limit(limit(heights[label]) for label in shown) for limit in (min, max)) if shown else (0.0, 0.0)
    for label in labels[len(shown) :]:
        if max(heights[label]) > high + max(high - low, 0.01 * abs(high)):
            break
        shown.append(label)
        low, high = min(low, *heights[label]), max(heights[label])
    above = [f"{label} {max(heights[label]):.3f}" for label in labels[len(shown) :]]
    if not above:
        return
    axes.set_ylim(low - 0.12 * (high - low), high + 0.2 * (high - low))
    axes.annotate(
        f"beyond the top: {', '.join(above)}", (0.5, 1), xycoords="axes fraction", xytext=(0, -4),
        textcoords="offset points", ha="center", va="top", fontsize=8,
        # Curves that leave at the top pass behind it.
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, zorder=10,
    )  # fmt: skip


def legend(figure: Figure, columns: int) -> None:
    """A legend below the axes, a name once."""
    lines = {}
    for axes in figure.axes:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), columns))


def saved(name: str, title: str, caption: str, figure: Figure, *, wide: bool) -> Plot:
    """Renders a figure in both forms."""
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=100, facecolor="white")
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(name, title, caption, _page_svg(svg.getvalue(), f"{title}. {caption}"), png.getvalue(), wide)


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
