"""What each point of a sweep costs, by `rattn.planning`: the table of --dry_run."""

from collections.abc import Sequence

from rattn import accounting
from rattn.errors import UserError
from rattn.model.parameters import model_spec
from rattn.planning import report
from rattn.planning.forecast import Row, forecast
from rattn.planning.topologies import Topology
from rattn.sweeping.points import Point

GIB = 2**30


def trained_tokens(point: Point) -> int:
    """Tokens that the point trains on itself, a continued trunk's left out."""
    config = point.config
    return (config.total_steps - point.first_step) * config.batch_size * config.context_length


def cost_table(points: Sequence[Point], states: dict[str, str], topology: Topology | None) -> str:
    """A line for every point, and the sum over those that are not done.

    Args:
      points: the sweep's.
      states: "done" and the like by the point's name.
      topology: of the slices to forecast memory and step time on; None leaves both out.
    """
    header = ["", "", "parameters", "FLOPs/token", "tokens", "FLOPs", "decode cache"]
    header += ["HBM GiB", "step s", "chip-hours"] if topology else []
    lines, flops_left, hours_left = [], 0.0, 0.0
    for point in points:
        config, tokens = point.config, trained_tokens(point)
        spec = model_spec(config.model)
        per_token = accounting.training_flops_per_token(
            config.model, spec, accounting.keys_seen(config.model, config.context_length)
        )
        cache = sum(accounting.cache_bytes_per_sequence(config.model, config.context_length).values())
        line = [
            point.name + (f" ← {point.trunk}" if point.trunk else ""),
            states.get(point.name, ""),
            accounting.readable_count(sum(accounting.parameters_by_part(spec).values())),
            accounting.readable_count(per_token),
            accounting.readable_count(tokens),
            accounting.readable_count(per_token * tokens),
            accounting.readable_bytes(cache),
        ]
        row = _forecast(point, topology) if topology else None
        if row:
            fits = "" if row.fits else " (does not fit)"
            line += [f"{sum(row.memory.values()) / GIB:.2f}{fits}", f"{row.time.forecast:.4f}"]
            line += [f"{row.chip_hours(tokens):.2f}"]
        lines.append(line)
        if states.get(point.name) != "done":
            flops_left += per_token * tokens
            hours_left += row.chip_hours(tokens) if row else 0.0
    total = f"  {sum(states.get(point.name) != 'done' for point in points)} of {len(points)} points to run"
    total += f", {accounting.readable_count(flops_left)} FLOPs"
    total += f", {hours_left:,.2f} chip-hours on {topology}" if topology else "; --topology adds memory and step time"
    return report.table(header, lines) + "\n\n" + total


def _forecast(point: Point, topology: Topology) -> Row:
    try:
        return forecast(point.config, topology)
    except UserError as error:
        raise UserError(f"The point {point.name!r}: {error}") from None
