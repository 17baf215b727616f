"""python -m rattn.plan --config configs/rattn_12b.py:window=512 --topology v6e:16x16 --slices 4 [--compile]

Says what a config needs on TPU slices that are not at hand: memory, step time, chip-hours, decode cache. Formulas
answer in seconds; with --compile the TPU compiler builds the real training step and its figures stand beside them.
"""

import dataclasses
import json
import math
import pathlib

from absl import flags
from ml_collections import ConfigDict

from rattn import platform
from rattn.config import MIXERS, run_main
from rattn.errors import UserError, nearest
from rattn.planning import report
from rattn.planning.forecast import Row, forecast, variants
from rattn.planning.topologies import parse_topology


def plan(
    config: ConfigDict, topology_name: str, slices: int, mixers: list[str], windows: list[int], compiled: bool
) -> list[Row]:
    """Computes a row for every mixer and window; prints progress to standard error while compiling.

    Raises:
      UserError: an unknown topology, mixer or window, or a mesh that does not fit.
    """
    topology = parse_topology(topology_name, slices)
    rows = [forecast(variant, topology) for variant in variants(config, mixers, windows)]
    if not compiled:
        return rows
    from rattn.planning.compiled import compiled_figures, ticking  # Imports the kernels.

    result = []
    for index, row in enumerate(rows, 1):
        with ticking(f"Compiling {row.name} for {topology} ({index} of {len(rows)})"):
            result.append(dataclasses.replace(row, compiled=compiled_figures(row.config, topology)))
    return result


def main(config: ConfigDict, recipe: str) -> int:
    """Entry point behind the flags."""
    del recipe
    platform.configure()
    values = flags.FLAGS
    if not values.topology:
        raise UserError("There is no --topology; name a TPU slice, such as --topology v6e:16x16.")
    tokens = values.tokens
    if tokens is None:
        tokens = config.total_steps * config.batch_size * config.context_length
    if not math.isfinite(tokens):
        raise UserError(f"--tokens is {tokens}; give a number of tokens, such as 1e12.")
    rows = plan(
        config, values.topology, values.slices, _mixers(values.mixers), _windows(values.windows), values.compile
    )
    print(report.text(rows, tokens))
    if values.compile:
        print("\n" + report.compiled_text(rows))
    if values.json:
        _write_json(values.json, report.as_json(rows, tokens))
    return 0


def _write_json(path: str, figures: dict) -> None:
    try:
        pathlib.Path(path).write_text(json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"--json {path} cannot be written ({error.strerror}); name a file in a folder that is there."
        ) from error


def _mixers(names: list[str]) -> list[str]:
    for name in names:
        if name not in MIXERS:
            raise UserError(f"--mixers has {name!r}{nearest(name, MIXERS)}; use names of {', '.join(MIXERS)}.")
    return list(dict.fromkeys(names))


def _windows(values: list[str]) -> list[int]:
    for value in values:
        if not value.isdecimal() or int(value) >= 2**31:
            raise UserError(f"--windows has {value!r}; give whole numbers of tokens, such as 128,512,2048.")
    return list(dict.fromkeys(int(value) for value in values))


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "A TPU slice: v6e:16x16, v5p:8x8x8, …")
    flags.DEFINE_integer("slices", 1, "Slices of that shape, joined over the data-centre network.")
    flags.DEFINE_list("windows", [], "Windows to compare; the config's by default.")
    flags.DEFINE_list("mixers", [], "Mixers to compare in the local layers; the config's by default.")
    flags.DEFINE_float(
        "tokens", None, "Tokens to count chip-hours for; what the config trains on by default.", lower_bound=0
    )
    flags.DEFINE_boolean(
        "compile", False, "Also ask the TPU compiler (libtpu; one to three minutes a row on two cores)."
    )
    flags.DEFINE_string("json", None, "File to write all figures to.")
    run_main(main)
