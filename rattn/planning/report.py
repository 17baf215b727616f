"""The plan as text for people and as JSON for programs."""

import dataclasses
import textwrap
from typing import Any

from rattn.accounting import readable_bytes, readable_count
from rattn.planning import roofline
from rattn.planning.collectives import by_kind
from rattn.planning.forecast import Row

GIB = 2**30


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligns columns: the first to the left, all others to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        rest = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([f"  {cells[0]:<{widths[0]}}", *rest]).rstrip()

    return "\n".join([line(header), *map(line, rows)])


def text(rows: list[Row], tokens: float) -> str:
    """Everything that the formulas say, one table for each question."""
    first = rows[0]
    topology, mesh, model = first.topology, first.mesh, first.config.model
    sections = [
        f"{topology} · mesh {' × '.join(f'{axis}={size}' for axis, size in mesh.items())} · "
        f"{first.config.batch_size} rows of {first.config.context_length} tokens · remat {model.remat}",
        _verdicts(rows, tokens),
        f"HBM per device, GiB of {topology.chip.hbm_bytes_per_device / GIB:.2f} that a program may have (formulas)",
        _memory(rows),
        "Step time, seconds: arithmetic at the peak, the RLA kernel at its static cycles, bytes at full bandwidth",
        _times(rows),
        "Bytes that a device receives in a step (formulas)",
        _network(rows),
        f"Decode cache of one sequence by context length (keys and values in {model.compute_dtype}, states in float32)",
        _cache(rows),
    ]
    if mesh["seq"] > 1:
        load = roofline.last_shard_load(mesh["seq"])
        sections.append(
            f"Global layers: rows lie in {mesh['seq']} contiguous shards, whose last sees {load:.2f} times the keys of "
            f"the average one; all wait for it, and the MXU term counts it. Local layers are balanced."
        )
    return "\n\n".join([*sections, calibration_text(first)])


def _verdicts(rows: list[Row], tokens: float) -> str:
    header = ["", "parameters", "HBM GiB", "verdict", "FLOPs/token", "bound s", "MFU bound", "forecast s", "MFU"]
    header += ["vs first", "tokens/s", f"chip-hours for {readable_count(tokens)} tokens"]
    lines = []
    for row in rows:
        lines.append(
            [
                row.name,
                readable_count(row.parameters),
                f"{sum(row.memory.values()) / GIB:.1f}",
                verdict(row),
                readable_count(row.flops_per_token),
                f"{row.time.bound:.3f}",
                f"{row.mfu_bound:.1%}",
                f"{row.time.forecast:.3f}",
                f"{row.mfu_forecast:.1%}",
                f"{row.time.forecast / rows[0].time.forecast:.3f}",
                readable_count(row.tokens / row.time.forecast),
                f"{row.chip_hours(tokens):,.0f}",
            ]
        )
    return table(header, lines)


def verdict(row: Row) -> str:
    """Whether the step fits, and the largest batch that does."""
    largest = f"largest batch {row.largest_batch:,}" if row.largest_batch else "no batch does on this mesh"
    limit = row.topology.chip.hbm_bytes_per_device / GIB
    return f"{'fits' if row.fits else 'does not fit'} in {limit:.2f} GiB, {largest}"


def _memory(rows: list[Row]) -> str:
    parts = list(rows[0].memory)
    lines = [
        [row.name, *(f"{row.memory[part] / GIB:.2f}" for part in parts), f"{sum(row.memory.values()) / GIB:.2f}"]
        for row in rows
    ]
    return table(["", *parts, "sum"], lines)


def _times(rows: list[Row]) -> str:
    names = ["mxu", "linear", "hbm", "ici", "dcn"]
    lines = [
        [row.name, *(f"{getattr(row.time, name):.4f}" for name in names), row.time.limit, f"{row.time.fixed:.2f}"]
        for row in rows
    ]
    return table(["", "MXU", "RLA", "HBM", "ICI", "DCN", "bound by", "fixed cost"], lines)


def _network(rows: list[Row]) -> str:
    names = list(rows[0].network)
    return table(["", *names], [[row.name, *(readable_bytes(row.network[name]) for name in names)] for row in rows])


def _cache(rows: list[Row]) -> str:
    lengths = list(rows[0].cache)
    lines = [[row.name, *(readable_bytes(sum(row.cache[length].values())) for length in lengths)] for row in rows]
    return table(["", *(f"{length:,}" for length in lengths)], lines)


def calibration_text(row: Row) -> str:
    """The constants that stand in no datasheet, where they come from and where they do not apply."""
    fitted, kernel = roofline.CALIBRATION, roofline.OUR_KERNEL[row.topology.chip.name]
    fit = (
        f"Matrix products run at {fitted.efficiency:.3f} of the peak, a step takes {fitted.fixed_seconds:.2f} s more: "
        "fitted to eight step times of arXiv 2506.15545, Table 3 (v5p-1024 read as 1024 chips; 3B and 12B, batch 1024, "
        "contexts 4096 and 8192) with a mean error of 9 %; the four RATTENTION cells, unseen, come within 20 % "
        "(python -m scripts.paper_forecast)."
    )
    cycles = (
        f"RLA takes {kernel.forward_cycles / 1e6:.3f} M cycles forward and {kernel.backward_cycles / 1e6:.3f} M "
        f"backward at B=1, T=8192, N=16, K=4, H=128 on {row.topology.chip.name}: its static schedule, without waiting "
        f"for memory (scripts/bench_tpu_static.py), at {row.topology.chip.clock_hz / 1e9:.2f} GHz."
    )
    if row.time.fixed:
        reach = (
            "The fixed cost is not understood, for no slice was at hand: other numbers of chips, rows or mesh axes may "
            "have another. Compare rows, and read absolute times with that in mind."
        )
    else:
        reach = (
            f"Neither constant was measured on {row.topology.chip.name}: the efficiency is v5p's, the fixed cost is "
            "left out, so forecasts are relative. Compare rows (column 'vs first'), not absolute times."
        )
    paragraphs = [textwrap.indent(textwrap.fill(sentence, 116), "  ") for sentence in (fit, cycles, reach)]
    return "\n".join(["Calibration", *paragraphs])


def compiled_text(rows: list[Row]) -> str:
    """The compiler's memory beside the formulas', and the collectives that it put into the step."""
    lines = []
    for row in rows:
        found, formula = row.compiled, sum(row.memory.values())
        if not found.fits:
            lines.append([row.name, f"{formula / GIB:.2f}", f"refused: needs {found.total_bytes / GIB:.2f}"])
            continue
        figures = (found.argument_bytes, found.peak_bytes, found.total_bytes)
        error, host = f"{formula / found.total_bytes - 1:+.0%}", readable_bytes(found.host_bytes)
        sizes = [f"{size / GIB:.2f}" for size in figures]
        lines.append([row.name, f"{formula / GIB:.2f}", *sizes, error, host, f"{found.seconds:.0f}"])
    header = ["", "formula", "state", "peak in use", "compiler's sum", "formula against it", "host", "compiled in s"]
    title = "HBM per device, GiB: the formula's beside the TPU compiler's"
    sections = [title, table(header, _padded(lines, len(header)))]
    sections.append("Collectives in the compiled step, a device's share (send: to other slices)")
    collectives = [
        [f"{row.name} {kind}", f"{entry['operations']:,.0f}", f"{entry['runs']:,.0f}", readable_bytes(entry["bytes"])]
        for row in rows
        for kind, entry in by_kind(list(row.compiled.collectives)).items()
    ]
    sections.append(table(["", "operations", "runs a step", "bytes a step"], collectives))
    return "\n\n".join(sections)


def _padded(lines: list[list[str]], width: int) -> list[list[str]]:
    return [line + [""] * (width - len(line)) for line in lines]


def as_json(rows: list[Row], tokens: float) -> dict[str, Any]:
    """The same figures, bytes and seconds without rounding."""
    first = rows[0]
    return {
        "topology": {
            "name": first.topology.name,
            "slices": first.topology.slices,
            "chips": first.topology.chips,
            "devices": first.topology.devices,
            "hbm_bytes_per_device": first.topology.chip.hbm_bytes_per_device,
        },
        "mesh": first.mesh,
        "batch_size": first.config.batch_size,
        "context_length": first.config.context_length,
        "remat": first.config.model.remat,
        "global_layers_last_shard_load": roofline.last_shard_load(first.mesh["seq"]),
        "calibration": dataclasses.asdict(roofline.CALIBRATION) | {"device": roofline.CALIBRATED_ON},
        "rows": [
            {
                "mixer": row.mixer,
                "window": row.config.model.window,
                "parameters": row.parameters,
                "memory_bytes_per_device": row.memory,
                "fits": row.fits,
                "largest_batch": row.largest_batch,
                "flops_per_token": row.flops_per_token,
                "seconds": dataclasses.asdict(row.time) | {"bound": row.time.bound, "forecast": row.time.forecast},
                "bound_by": row.time.limit,
                "mfu_bound": row.mfu_bound,
                "tokens_per_second": row.tokens / row.time.forecast,
                "chip_hours": row.chip_hours(tokens),
                "network_bytes_per_device": row.network,
                "cache_bytes_per_sequence": row.cache,
                "compiled": row.compiled and row.compiled.as_json(),
            }
            for row in rows
        ],
        "tokens": tokens,
    }
