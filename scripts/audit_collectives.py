"""Which collectives the compiled training step holds, and whether each is one that its sharding calls for.

    python -m scripts.audit_collectives --topology v5p:2x2x2 --mesh fsdp=2,seq=2,model=2 --context 8192

Compiles the real training step, full width and two repeats of the pattern, for a TPU slice that need not be there;
exits with 1 if `unexpected` finds something.
"""

import argparse
import pathlib
import re
import sys

from ml_collections import ConfigDict

from rattn import platform
from rattn.accounting import layer_kinds
from rattn.config import load_config, parse_arguments, validate
from rattn.planning.collectives import Collective, find_collectives
from rattn.planning.compiled import compile_step
from rattn.planning.topologies import parse_topology
from rattn.sharding import AXES


def unexpected(found: list[Collective], config: ConfigDict) -> list[str]:
    """Names the collectives of activations that the sharding does not call for.

    What a device may exchange per token is little: partial sums of the residual stream over `model`, and the keys and
    values of global layers over `seq`, gathered in the forward pass and its recomputation, their gradients scattered.
    A window's halo is W tokens, whatever the length of a row. Arrays of tokens are known by a dim of T or T / seq, to
    which no width of the model may be equal.
    """
    model, mesh = config.model, config.mesh
    lengths = {config.context_length, config.context_length // mesh.seq}
    global_layers = layer_kinds(model).count("full")
    passes = 1 if model.remat == "none" else 2
    heads = [size for size in (model.kv_heads // mesh.model, model.head_dim) if size > 1]
    gathers_left = {"all-gather": 2 * passes * global_layers, "reduce-scatter": 2 * global_layers}
    complaints = []
    for one in found:
        dtype, dims = re.match(r"(\w+)\[([\d,]*)\]", one.shape).groups()
        dims = [int(dim) for dim in dims.split(",") if dim not in ("", "1")]
        if not lengths & set(dims) or dtype in ("s32", "pred"):
            continue
        if one.kind == "all-reduce" and one.group == mesh.model and dims[-1] == model.width:
            continue
        if one.kind in gathers_left and dims[-len(heads) :] == heads:
            gathers_left[one.kind] -= one.count
            if gathers_left[one.kind] >= 0:
                continue
        complaints.append(f"{one.count} × {one.kind} of {one.shape} among {one.group} devices, for {one.op_name}")
    return complaints


def main() -> int:
    """Compiles, prints every collective and what is unexpected among them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/rattn_3b.py")
    parser.add_argument("--topology", default="v5p:2x2x2")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--mesh", default="fsdp=2,seq=2,model=2")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--remat", default="block")
    parser.add_argument("--hlo", help="write the program's text to this file")
    options = parser.parse_args()
    platform.configure()
    config = load_config(options.config)
    config.context_length = options.context
    config.model.update(layers=2 * len(config.model.pattern), remat=options.remat)
    config.mesh.update(vars(parse_arguments(options.mesh, **dict.fromkeys(AXES, 1))))
    config.batch_size = config.evaluation.batch_size = config.mesh.data * config.mesh.fsdp
    validate(config)
    executable, seconds = compile_step(config, parse_topology(options.topology, options.slices))
    hlo = executable.as_text()
    if options.hlo:
        pathlib.Path(options.hlo).write_text(hlo)
    memory = executable.memory_analysis()
    print(f"Compiled in {seconds:.0f} s; temporaries {memory.temp_size_in_bytes / 2**30:.2f} GiB a device.")
    found = find_collectives(hlo)
    for one in sorted(found, key=lambda one: -one.bytes):
        each = f"{one.bytes_each:,.0f} B"
        print(f"{one.kind:20} {one.count:4} × {each:>16} {one.group:5}  {one.shape[:60]:60} {one.op_name}")
    complaints = unexpected(found, config)
    print("\n".join(complaints) or "Every collective is expected.")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
