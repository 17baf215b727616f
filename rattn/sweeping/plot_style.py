"""How the report's figures look: colours, axes, and saving each as a PNG and as an SVG that takes the page's ink."""

import dataclasses
import io
import math
import re
from collections.abc import Iterator, Sequence
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


def styled(group: Group) -> Iterator[tuple[Variant, dict[str, Any]]]:
    """Variants with colour, marker and dashes: a hue a mixer, darker for larger windows."""
    for mixer in dict.fromkeys(variant.mixer for variant in group.variants):
        curve = group.curve(mixer)
        for index, variant in enumerate(curve):
            style = {
                "color": colour(mixer, index / (len(curve) - 1) if len(curve) > 1 else 1.0),
                "marker": MARKERS[index % len(MARKERS)] if variant.window is not None else None,
                "linestyle": {"full": "-", "swa": "--", "linear": ":"}.get(mixer, "-"),
                "markersize": 4.5,
                "linewidth": 1.4,
            }
            yield variant, style


def colour(mixer: str, share: float = 1.0) -> str:
    """The mixer's hue, from light (0) to dark (1)."""
    low, high = COLOURS.get(mixer, OTHER_COLOURS)
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
        if max(heights[label]) > high + 1.5 * max(high - low, 0.01 * abs(high)):
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
    )  # fmt: skip


def legend(axes: Axes) -> None:
    """A legend below the axes."""
    count = len(axes.get_legend_handles_labels()[1])
    axes.figure.legend(loc="outside lower center", ncols=min(count, 4))


def saved(name: str, title: str, caption: str, figure: Figure) -> Plot:
    """Renders a figure in both forms."""
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
