"""Compiles the paper's models for TPU slices, keeps what the compiler said, and writes the tables of docs/forecast.md.

    python -m scripts.plan_table              # compiles what docs/forecast_compiled.json lacks, then writes the tables
    python -m scripts.plan_table --no-compile # the tables alone, from what is kept
    python -m scripts.plan_table --again "12b 8192 v6e:16x16 x4"

A case takes one to four minutes on two cores and under 4 GiB.
"""

import argparse
import dataclasses
import json
import pathlib
import resource

from ml_collections import ConfigDict

from rattn import platform
from rattn.config import load_config, validate
from rattn.planning.compiled import compiled_figures, ticking
from rattn.planning.forecast import Row, forecast
from rattn.planning.topologies import Topology, parse_topology

GIB = 2**30
KEPT = pathlib.Path("docs/forecast_compiled.json")
PAGE = pathlib.Path("docs/forecast.md")
BEGIN, END = "<!-- plan_table: {} -->", "<!-- /plan_table -->"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of the paper on some slices, with what differs from its recipe.

    Attributes:
      model: "3b" or "12b".
      context: tokens a row.
      topology: a slice's name.
      slices: how many.
      fitted: whether the memory formula was adjusted while looking at this case.
      changes: dotted config keys.
    """

    model: str
    context: int
    topology: str
    slices: int = 1
    fitted: bool = False
    changes: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        slices = f" x{self.slices}" if self.slices > 1 else ""
        changes = "".join(f" {key.rpartition('.')[2]}={value}" for key, value in self.changes)
        return f"{self.model} {self.context} {self.topology}{slices}{changes}"

    def config(self) -> ConfigDict:
        """The recipe with the changes."""
        config = load_config(f"configs/rattn_{self.model}.py", f"context={self.context}")
        config.update_from_flattened_dict(dict(self.changes))
        config.evaluation.batch_size = config.batch_size
        return validate(config)

    def slice(self) -> Topology:
        """Where it runs."""
        return parse_topology(self.topology, self.slices)

    def row(self) -> Row:
        """What the formulas say."""
        return forecast(self.config(), self.slice())


PAPER = (
    Case("3b", 4096, "v5p:8x8x8", fitted=True),
    Case("12b", 4096, "v5p:8x8x8", fitted=True),
    Case("3b", 4096, "v6e:16x16", 2, fitted=True),
    Case("12b", 4096, "v6e:16x16", 4, fitted=True),
    Case("3b", 8192, "v5p:8x8x8"),
    Case("12b", 8192, "v5p:8x8x8", fitted=True),
    Case("3b", 8192, "v6e:16x16", 2, fitted=True),
    Case("12b", 8192, "v6e:16x16", 4, fitted=True),
)
OTHERS = (
    Case("3b", 4096, "v5p:8x8x8", changes=(("model.remat", "save_attention"),)),
    Case("3b", 8192, "v5p:8x8x8", fitted=True, changes=(("model.remat", "offload"),)),
    Case("12b", 4096, "tpu7x:4x4x8", changes=(("batch_size", 512),)),
    Case("3b", 32_768, "v5p:8x8x8", changes=(("batch_size", 128), ("mesh.fsdp", 64), ("mesh.seq", 8))),
)


def main() -> None:
    """Compiles, keeps, writes."""
    platform.configure()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--no-compile", action="store_true", help="write the tables from what is kept")
    parser.add_argument("--again", help="compile this case although it is kept")
    options = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for case in () if options.no_compile else PAPER + OTHERS:
        if str(case) in kept and str(case) != options.again:
            continue
        with ticking(f"Compiling {case}"):
            kept[str(case)] = compiled_figures(case.config(), case.slice()).as_json()
        kept[str(case)]["peak_host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    page = PAGE.read_text()
    for name, table in (("memory", memory_table(kept)), ("collectives", collectives_table(kept))):
        before, rest = page.split(BEGIN.format(name))
        page = f"{before}{BEGIN.format(name)}\n{table}\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(page)


def memory_table(kept: dict) -> str:
    """Formula and compiler side by side, GiB a device."""
    lines = [
        "| case | of | state | activations | temporaries | formula | compiler | error | verdict | compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in PAPER + OTHERS:
        if (found := kept.get(str(case))) is None:
            continue
        row = case.row()
        memory, formula = row.memory, sum(row.memory.values())
        state = memory["parameters"] + memory["optimizer"] + memory["gradients"]
        lines.append(
            f"| {case}{' (adjusted on)' if case.fitted else ''} | {case.slice().chip.hbm_bytes_per_device / GIB:.2f} | "
            f"{state / GIB:.2f} | {memory['activations'] / GIB:.2f} | {memory['temporaries'] / GIB:.2f} | "
            f"{formula / GIB:.2f} | {found['total_bytes'] / GIB:.2f} | {formula / found['total_bytes'] - 1:+.0%} | "
            f"{'fits' if found['fits'] else 'refused'} | {found['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def collectives_table(kept: dict) -> str:
    """Runs and bytes of a step by kind."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "send")
    lines = [f"| case | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for case in PAPER + OTHERS:
        if (found := kept.get(str(case))) is None:
            continue
        cells = []
        for kind in kinds:
            entry = found["collectives"].get(kind)
            cells.append(f"{entry['bytes'] / 1e9:.2f} GB in {entry['runs']:,.0f}" if entry else "")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
