"""Lays out what scripts/bench_decode.py found."""

from rattn import accounting
from rattn.planning.report import table

# Of Figure 7.
NARROW, WIDE = "rattention:512", "swa:4096"
# How a point was decoded.
HOW = ("fold", "attention", "products", "constants")


def tables(result):
    """Lays the results out."""

    def how(found):
        return [str(found[name]) for name in HOW]

    def place(found):
        return [found[name] for name in ("context", "batch", "model", *HOW)]

    rows = []
    for found in sorted(result["points"], key=place):
        ms = found["milliseconds"]
        rows.append(
            [
                found["model"],
                f"{found['context']:,}",
                str(found["batch"]),
                *how(found),
                f"{ms['median']:.3f} ({ms['least']:.3f}–{ms['most']:.3f})",
                f"{found['tokens_per_second']:,.0f}",
                accounting.readable_bytes(found["batch"] * found["cache_bytes_per_sequence"]),
                f"{found['bound_share']:.1%}",
            ]
        )
    header = ["model", "context", "batch", "C", *HOW[1:], "ms a step", "tokens/s", "caches", "of the bound"]
    kinds = ("measured", "formula")
    figure = [
        [f"{e['context']:,}", str(e["batch"]), *how(e), *(f"{e[name]:.1%}" for name in kinds)]
        for e in result.get("figure_7", [])
    ]
    title = f"Share of a step that {NARROW} saves against {WIDE} (Figure 7)"
    return "\n\n".join([table(header, rows), title, table(["context", "batch", "C", *HOW[1:], *kinds], figure)])
