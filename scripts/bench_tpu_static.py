"""Counts what the TPU compiler makes of the residual linear attention kernels; needs no TPU.

    python scripts/bench_tpu_static.py                        # shape S1 on a v5p, beside splash attention
    python scripts/bench_tpu_static.py --table                # the table of docs/performance.md
    python scripts/bench_tpu_static.py --search               # chunk, chunks a block and heads a step at S1
    python scripts/bench_tpu_static.py --topology v6e:2x2 --heads 32 --kv-heads 4 --no-segments

The compiler writes the final schedule of every kernel. A bundle, one very long instruction, takes at least one cycle,
so bundles per grid step x grid steps is a lower bound of the cycles, equal on every machine. It leaves out waiting for
memory: it is read beside the bytes that the grid moves.

Columns: `bundles` in millions, each branch charged only to the steps that enter the main branch (queries with keys) or
to all steps (everything else); `all` charges all code to all steps; `core` is the share of the busiest core; `MXU` the
filled part of the matrix units' issue slots; `spills` the register spills in a step; `VMEM` in MiB, windows, scratch
and spills; `HBM` in MB, a block counted when its index changes; `floor` the kernel's own products at the nominal peak,
in millions of bundles, and `ratio` bundles to that. Each kernel is one pass; `outside` lists what XLA runs around them.
"""

import argparse
import dataclasses
import itertools
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
DUMP = tempfile.mkdtemp(prefix="tpu_static_")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.extend.core import jaxpr_as_fun, jaxprs_in_params  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from kernels_pallas.residual_linear_attention import residual_linear_attention, tuning  # noqa: E402

# Cores that share a kernel's parallel grid dims, and multiply-adds of a core in a cycle, nominal, in bfloat16.
CHIPS = {"v5p": (2, 4 * 128 * 128), "v5e": (1, 4 * 128 * 128), "v6e": (1, 2 * 256 * 256), "tpu7x": (1, 2 * 256 * 256)}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One problem; the default is S1."""

    topology: str = "v5p:2x2x1"
    batch: int = 1
    length: int = 8192
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    window: int = 512
    segments: bool = True

    @property
    def chip(self) -> str:
        """The TPU's name."""
        return self.topology.split(":")[0]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What was counted of one kernel."""

    name: str
    grid: tuple
    step: int
    total: float
    all_code: float
    core_share: float
    mxu: float
    spills: int
    vmem_mib: float
    hbm_mb: float | None


def main() -> None:
    """Prints what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="all shapes of docs/performance.md")
    parser.add_argument("--search", action="store_true", help="chunk, chunks a block and units a step")
    for field in dataclasses.fields(Shape):
        if field.type is not bool:
            parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, default=field.default)
    parser.add_argument("--no-segments", dest="segments", action="store_false")
    args = parser.parse_args()
    base = Shape(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Shape)})
    try:
        if args.search:
            search(base)
        elif args.table:
            for shape in table(base):
                report(shape)
        else:
            report(base)
            for window in (512, 4096):
                report_splash(base, window)
    finally:
        shutil.rmtree(DUMP, ignore_errors=True)


def table(base: Shape) -> list[Shape]:
    """Returns the shapes of docs/performance.md, each one change away from S1."""
    changes = [
        {},
        {"segments": False},
        {"topology": "v5e:2x2"},
        {"topology": "v6e:2x2"},
        {"topology": "tpu7x:2x2x1"},
        {"head_dim": 64},
        {"head_dim": 256},
        {"heads": 4},
        {"heads": 32},
        {"heads": 4, "kv_heads": 1},
        {"window": 128},
        {"window": 500},
        {"window": 1024},
    ]
    return [dataclasses.replace(base, **change) for change in changes]


def report(shape: Shape) -> None:
    """Compiles forward and backward of one shape and prints a line for each kernel and their sum."""
    forward, backward, outside = measure(shape)
    print(f"\n{shape}")
    floors = [products(shape, n) / CHIPS[shape.chip][1] / 1e6 for n in (FORWARD_PRODUCTS, BACKWARD_PRODUCTS)]
    for kernel, floor in zip((forward, backward), floors, strict=True):
        print_kernel(kernel, f" floor {floor:.3f} ratio {kernel.total / floor:.2f}")
    total = forward.total + backward.total
    everything = forward.all_code + backward.all_code
    hbm = forward.hbm_mb + backward.hbm_mb
    print(f"  sum: {total:.3f} M (all {everything:.3f}) HBM {hbm:.1f} MB floor {sum(floors):.3f}", end=" ")
    print(f"ratio {total / sum(floors):.2f}")
    print("  outside: " + ("; ".join(outside) or "nothing"), flush=True)


def print_kernel(kernel: Kernel, end: str = "") -> None:
    """Prints one kernel's line."""
    hbm = "" if kernel.hbm_mb is None else f" HBM {kernel.hbm_mb:.1f} MB"
    print(f"  {kernel.name}: grid {kernel.grid} step {kernel.step}", end=" ")
    print(f"bundles {kernel.total:.3f} M (all {kernel.all_code:.3f}) core {kernel.core_share:.2f}", end=" ")
    print(f"MXU {kernel.mxu:.2f} spills {kernel.spills} VMEM {kernel.vmem_mib:.1f}{hbm}{end}")


# Tiles of products a chunk of C tokens, as (query heads, key/value heads) x (C P, C H, P H) x C multiply-adds.
FORWARD_PRODUCTS = {"query": (1, 1, 1), "kv": (0, 0, 1)}
BACKWARD_PRODUCTS = {"query": (3, 2, 2), "kv": (0, 0, 3)}


def products(shape: Shape, counts: dict) -> float:
    """Returns the multiply-adds of one kernel, masked halves of score tiles included."""
    C, P, H = tuning.TPU_CHUNK, 2 * shape.head_dim, shape.head_dim
    sizes = (C * P, C * H, P * H)
    heads = {"query": shape.heads, "kv": shape.kv_heads}
    per_token = sum(heads[kind] * n * size for kind, row in counts.items() for n, size in zip(row, sizes, strict=True))
    return shape.batch * shape.length * per_token


def measure(shape: Shape) -> tuple[Kernel, Kernel, list[str]]:
    """Compiles the gradient at one shape; returns its two kernels and the XLA work outside them."""
    B, T, N, K, H = shape.batch, shape.length, shape.heads, shape.kv_heads, shape.head_dim

    def gradients(q, k, v, do, ids):
        # A projection writes [B, T, heads · H]; its split into heads and the kernels' join of them cancel.
        def forward(q, k, v):
            o = residual_linear_attention(
                q.reshape(B, T, N, H),
                k.reshape(B, T, K, H),
                v.reshape(B, T, K, H),
                window=shape.window,
                kv_segment_ids=ids,
                implementation="pallas_tpu",
            )
            return o.reshape(B, T, N * H)

        o, pull = jax.vjp(forward, q, k, v)
        return o, *pull(do)

    wide, narrow = ((B, T, heads * H) for heads in (N, K))
    arrays = [(wide, jnp.bfloat16), (narrow, jnp.bfloat16), (narrow, jnp.bfloat16), (wide, jnp.bfloat16)]
    arrays += [((B, T), jnp.int32)] if shape.segments else [None]
    calls, compiled = compile_for(shape, gradients, arrays)
    block = block_shape(calls[0], 0)[1]
    rows = math.prod(calls[0].params["grid_mapping"].grid[:-1])
    kernels = [count(shape, call, entered=rows * (-(-T // block) - shape.window // block)) for call in calls]
    return *kernels, work_outside(compiled.as_text())


def compile_for(shape: Shape, function, arrays):
    """Returns the Pallas calls that the function makes, in order, and the compiled program."""
    shutil.rmtree(DUMP, ignore_errors=True)
    device = topologies.get_topology_desc(platform="tpu", topology_name=shape.topology).devices[0]
    sharding = SingleDeviceSharding(device)
    arguments = [a and jax.ShapeDtypeStruct(*a, sharding=sharding) for a in arrays]
    calls = [e for e in pallas_calls(jax.make_jaxpr(function)(*arguments).jaxpr) if not e.params["interpret"]]
    return calls, jax.jit(function).lower(*arguments).compile()


def pallas_calls(jaxpr):
    """Yields the Pallas calls inside a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for inner in jaxprs_in_params(equation.params):
                yield from pallas_calls(inner)


def count(shape: Shape, call, entered: int) -> Kernel:
    """Reads the schedule of one kernel, which enters its main branch `entered` times.

    The others are steps of queries without keys, of keys without queries, or of blocks that are masked.
    """
    grid = tuple(int(n) for n in call.params["grid_mapping"].grid)
    name = re.split(r"[ \n]", str(call.params["name"]))[0]
    steps = math.prod(grid)
    schedule = Schedule(name)
    total = schedule.outside + steps * (schedule.body - schedule.main) + entered * schedule.main
    cores = CHIPS[shape.chip][0]
    rows = steps // grid[-1]
    return Kernel(
        name=name,
        grid=grid,
        step=schedule.body,
        total=total / 1e6,
        all_code=(schedule.outside + steps * schedule.body) / 1e6,
        core_share=-(-rows // cores) / rows,
        mxu=schedule.mxu,
        spills=schedule.spills,
        vmem_mib=schedule.vmem_bytes / 2**20,
        hbm_mb=hbm_bytes(call) / 1e6 if "rla" in name else None,
    )


class Schedule:
    """The compiler's final schedule of one kernel: bundles outside the grid's loop, in its body, in its main branch."""

    def __init__(self, name: str):
        depth, starts, branches = [], {}, []
        for line in dump(name, "final_bundles.txt").splitlines():
            bundle = re.match(r"\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(>*)", line)
            if bundle:
                depth.append(len(bundle[1]))
            if depth:
                for region in re.findall(r"Start(?:/End empty)? region (\d+)", line):
                    starts.setdefault(region, len(depth) - 1)
                branches += [
                    (len(depth) - 1, r) for r in re.findall(r"sbr\.rel \(%?!?\w+\) target = \$region(\d+)", line)
                ]
        if max(depth) > 1:
            print(f"  {name}: holds a loop inside its grid step, counted once: the figure is too small")
        self.outside = depth.count(0)
        self.body = len(depth) - self.outside
        self.main = max((starts[r] - i for i, r in branches if starts.get(r, 0) > i), default=0)
        head, _, rows = dump(name, "final_hlo-static-per-bundle-utilization.txt").partition("== UTILIZATION:")
        names = head.splitlines()[1].split(", ")
        capacity = dict(zip(names, map(int, head.splitlines()[2].split()), strict=True))
        use = np.array([[int(n) for n in row.split()] for row in rows.splitlines() if row[:1].isdigit()]).sum(0)
        use = dict(zip(names, use.tolist(), strict=True))
        self.mxu = use["MXU"] / (self.body * capacity["MXU"])
        self.spills = use["VSTORE:SPILL"]
        sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+)", dump(name, "post-ra.txt"))
        self.vmem_bytes = sum(int(size, 16) for size in sizes)


def dump(name: str, ending: str) -> str:
    """Returns the text that the compiler wrote at one stage of one kernel."""
    pattern = re.compile(rf"\d+-{re.escape(name)}(\.\d+)?-\d+-{re.escape(ending)}")
    (path,) = [p for p in pathlib.Path(DUMP).iterdir() if pattern.fullmatch(p.name)]
    return path.read_text()


def block_shape(call, i: int) -> tuple:
    """Returns the block shape of operand i of a Pallas call."""
    return tuple(getattr(n, "block_size", n) for n in call.params["grid_mapping"].block_mappings[i].block_shape)


def hbm_bytes(call) -> int:
    """Returns the bytes that the grid copies between HBM and VMEM: a block whenever its index changes."""
    mapping = call.params["grid_mapping"]
    grid = [int(n) for n in mapping.grid]
    points = [jnp.asarray(x) for x in np.array(list(itertools.product(*map(range, grid))), np.int32).T]
    total = 0
    for i, block in enumerate(mapping.block_mappings):
        jaxpr = block.index_map_jaxpr
        unread = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in jaxpr.jaxpr.invars[len(grid) :]]

        def index(*point, jaxpr=jaxpr, unread=unread):
            return jaxpr_as_fun(jaxpr)(*point, *unread)

        indices = np.stack([np.broadcast_to(np.asarray(x), len(points[0])) for x in jax.vmap(index)(*points)])
        copies = 1 + int((indices[:, 1:] != indices[:, :-1]).any(axis=0).sum())
        total += copies * math.prod(block_shape(call, i)) * block.array_aval.dtype.itemsize
    return total


def work_outside(hlo: str) -> list[str]:
    """Returns the operations of a compiled program that move data outside the kernels, with the bytes they write."""
    entry = hlo[hlo.index("\nENTRY") :]
    free = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "custom-call"}
    work = []
    for name, dtype, dims, opcode in re.findall(r"%?([\w.\-]+) = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(", entry):
        if opcode not in free and not opcode.endswith("-done"):
            size = math.prod(int(n) for n in dims.split(",") if n) * {"bf16": 2, "pred": 1}.get(dtype, 4)
            work.append(f"{name} writes {size / 1e6:.3f} MB")
    return work


def report_splash(shape: Shape, window: int, block: int = 512) -> None:
    """Prints what splash attention takes at the same shape."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, N, K, H = shape.batch, shape.length, shape.heads, shape.kv_heads, shape.head_dim
    group = N // K
    mask = masks.MultiHeadMask([masks.LocalMask((T, T), (window - 1, 0), 0) for _ in range(group)])
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=True)
    kernel = splash.make_splash_mqa_single_device(mask, block_sizes=sizes)

    def gradients(q, k, v, do, ids):
        segments = splash.SegmentIds(ids, ids)
        o, pull = jax.vjp(lambda q, k, v: jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v), q, k, v)
        return o, *pull(do)

    wide, narrow = (K, group, T, H), (K, T, H)
    arrays = [(s, jnp.bfloat16) for s in (wide, narrow, narrow, wide)] + [((T,), jnp.int32)]
    calls, _ = compile_for(shape, gradients, arrays)
    print(f"\nsplash attention, window {window}, blocks {block}, batch 1, {shape.chip}")
    blocks = sum(min(i, -(-(window - 1) // block)) + 1 for i in range(T // block))
    kernels = [count(shape, call, entered=B * N * blocks) for call in calls]
    for counted in kernels:
        print_kernel(counted)
    print(f"  sum: {sum(k.total for k in kernels):.3f} M", flush=True)


def search(base: Shape) -> None:
    """Prints the sums of one shape over the sizes that tuning.py holds."""
    defaults = tuning.TPU_CHUNK, tuning.TPU_CHUNKS, tuning.TPU_UNITS
    for chunk, chunks, heads in itertools.product((128, 256), (1, 2, 4), (1, 2)):
        tuning.TPU_CHUNK, tuning.TPU_CHUNKS = chunk, chunks
        tuning.TPU_UNITS = heads * chunks * base.heads // base.kv_heads
        if base.window % (chunk * chunks) == 0:
            forward, backward, _ = measure(base)
            print(f"chunk {chunk} chunks {chunks} heads {heads}: {forward.total:.3f} + {backward.total:.3f} M", end=" ")
            print(f"= {forward.total + backward.total:.3f} HBM {forward.hbm_mb + backward.hbm_mb:.0f} MB", flush=True)
    tuning.TPU_CHUNK, tuning.TPU_CHUNKS, tuning.TPU_UNITS = defaults


if __name__ == "__main__":
    main()
