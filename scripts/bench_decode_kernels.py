"""Times the kernels of a decode step one by one on a GPU, by its profiler, as they are tuned and otherwise.

    python -m scripts.bench_decode_kernels                                     # the 3B model's, as they are tuned
    python -m scripts.bench_decode_kernels --attention local:32 --tilings 32:2:3:512 64:4:2:256 --products
    python -m scripts.bench_decode_kernels --attention --products pallas_gpu_persistent:32 --rings 80:4 112:3

Attention is kind:batch, of a local layer by `attention_gpu` ("local") or by `attention_ring_gpu` ("ring"), or
kind:batch:context, of a full layer by `attention_gpu` ("full") or by `attention_stream_gpu` ("stream"); products are
those between two layers' attention, kind:rows. A tiling is slots:warps:stages:programs[:least] of
`rattn.decoding.attention_gpu.Tiling`, a ring KiB:LATE of `rattn.decoding.products_persistent_plan`: shared memory for
rows, and LATE. A time is that of one kernel, or of the four of "pallas_gpu" products, on arrays that no cache holds,
the median of some twenty with the extremes, without the gap before it; it counts from the end of the kernel before,
where that one let it in early.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rattn import accounting, platform
from rattn.config import load_config, validate
from rattn.decoding import (
    attention_gpu,
    attention_ring_gpu,
    attention_ring_gpu_plan,
    attention_stream_gpu,
    attention_stream_gpu_plan,
    mosaic_gpu,
    products_gpu,
    products_persistent_gpu,
    products_persistent_plan,
)
from rattn.decoding.layers import GATE_COLUMNS, layer_specs, product_shapes
from rattn.model.layers import ACTIVATIONS, rope_angles
from rattn.planning.report import table
from scripts.constants import values_set
from scripts.trace_costs import kernel_calls

# Arrays of a case, at least: several times a GPU's cache.
COLD_BYTES = 500_000_000
CALLS = 3
NUMBERS = itertools.count()
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


@dataclasses.dataclass
class Case:
    """A kernel on arrays of one size.

    Attributes:
      name: of a line.
      size: bytes that a kernel must move.
      shapes: of one kernel's own arrays, and of those that all share.
      run: (own, shared) -> results, and own as it goes on.
      variants: {name: what to set in a module while it is traced}.
      kernels: that make one; their times are added up.
      profiled: modules whose PROFILE and whose SHARED_BYTES a timeline sets, where there are any.
    """

    name: str
    size: int
    shapes: tuple[Any, Any]
    run: Callable[[Any, Any], tuple[Any, Any]]
    variants: dict[str, tuple[Any, dict[str, Any]]]
    kernels: int = 1
    profiled: tuple[Any, Any] | None = None

    @property
    def count(self) -> int:
        """Kernels in a call."""
        return max(2, COLD_BYTES // self.size)

    def traced(self):
        """Traces a call."""
        own, shared = self.shapes
        run = jax.jit(self.run)

        def call(own, shared):
            found = [run(one, shared) for one in own]
            return [kept for _, kept in found], [result for result, _ in found]

        return jax.jit(call, donate_argnums=0).trace([own] * self.count, shared)


def main():
    """Prints a line for every case and variant, and the table."""
    platform.configure()
    args = arguments()
    model = validate(load_config(args.recipe)).model
    cases = [attention_case(model, text, args) for text in args.attention]
    cases += [products_case(model, text, args.rings) for text in args.products]
    rows = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = {}
        for case in cases:
            for name, (module, values) in case.variants.items():
                with values_set(module, values):
                    jax.clear_caches()
                    lowered = case.traced().lower()
                compiled[case.name, name] = pool.submit(lowered.compile, compiler_options=NO_GRAPHS)
        for case in cases:
            for name, seconds in times(case, {n: compiled[case.name, n] for n in case.variants}).items():
                micros = [
                    f"{statistics.median(seconds) * 1e6:.1f}",
                    f"{min(seconds) * 1e6:.1f}–{max(seconds) * 1e6:.1f}",
                ]
                rows.append([case.name, name, *micros, f"{case.size / statistics.median(seconds) / 1e12:.2f}"])
                print(*rows[-1], flush=True)
    print("\n" + table(["kernel", "variant", "µs", "extremes", "TB/s"], rows))
    for case in cases if args.timeline else ():
        if case.profiled:
            print(f"\n{case.name}, thousands of cycles\n{timeline(case)}")


def arguments():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="configs/rattn_3b.py")
    parser.add_argument("--attention", nargs="*", default=["local:32", "local:384", "full:32:4096"])
    tiling = "slots:warps:stages:programs[:least], beside the one in use"
    parser.add_argument("--tilings", nargs="*", default=[], help=tiling)
    parser.add_argument("--products", nargs="*", default=["pallas_gpu:32", "pallas_gpu_persistent:64"])
    parser.add_argument("--timeline", action="store_true", help="of the programs of Mosaic GPU's kernels")
    parser.add_argument("--rings", nargs="*", default=[], help="KiB:LATE, beside the one in use")
    return parser.parse_args()


def attention_case(model, text, args):
    """Builds a case of attention in the middle of a call of steps."""
    kind, batch, *context = text.split(":")
    local, B = kind in ("local", "ring"), int(batch)
    layer = next(layer for layer in layer_specs(model) if (layer.kind == "full") != local)
    K, G, H, C = model.kv_heads, layer.group, layer.head_dim, accounting.FOLD_TOKENS
    S = layer.window + C if local else int(context[0])
    known = S if local else S - C // 2
    own = {"k_BKSH": (B, K, S, H), "v_BKSH": (B, K, S, H)}
    own = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in own.items()}
    if layer.has_linear:
        own["state_BKPH"] = jax.ShapeDtypeStruct((B, K, 2 * H, H), jnp.float32)
    shared = {"qkv_BKAH": jax.ShapeDtypeStruct((B, K, G + 2, H), jnp.bfloat16)}
    plan = attention_gpu.Plan(layer.window if local else S, layer.norm_epsilon)

    def run(own, shared):
        ones, scale, rotation = jnp.ones((K, G, H), jnp.float32), jnp.ones(H, jnp.float32), None
        if layer.rope_theta is not None and layer.has_linear:
            rotation = attention_gpu.ring_rotation(S, H, layer.rope_theta, scale, jnp.bfloat16)
        elif layer.rope_theta is not None:
            rotation = attention_gpu.Rotation(*rope_angles(jnp.full(B, known), H, layer.rope_theta))
        o_BKGH, k_BKSH, v_BKSH, _ = attention_gpu.attend(
            plan,
            shared["qkv_BKAH"],
            own["k_BKSH"],
            own["v_BKSH"],
            jnp.full(B, known - 1, jnp.int32),
            jnp.full(B, known, jnp.int32),
            jnp.zeros((B, K), jnp.int32),
            scales=(scale, scale) if layer.qk_norm else None,
            rotation=rotation,
            state_BKPH=own.get("state_BKPH"),
            unfolded=jnp.int32(C // 2),
            branch_scales=(ones, ones) if layer.has_linear else None,
        )
        return o_BKGH, own | {"k_BKSH": k_BKSH, "v_BKSH": v_BKSH}

    def run_ring(own, shared):
        ones, scale, newest = jnp.ones((K, G, H), jnp.float32), jnp.ones(H, jnp.float32), jnp.int32(known - 1)
        o_BKGH, k_BKSH, v_BKSH, _ = attention_ring_gpu.attend(
            attention_ring_gpu.Plan(layer.window, layer.norm_epsilon, layer.qk_norm),
            shared["qkv_BKAH"],
            own["k_BKSH"],
            own["v_BKSH"],
            own["state_BKPH"],
            attention_ring_gpu.moment(
                newest, jnp.full(B, known, jnp.int32), jnp.int32(C // 2), S, G, H, layer.rope_theta
            ),
            attention_ring_gpu.turns(H, layer.rope_theta, scale, jnp.bfloat16),
            (scale, scale),
            (ones, ones),
            mosaic_gpu.none_ready(),
        )
        return o_BKGH, own | {"k_BKSH": k_BKSH, "v_BKSH": v_BKSH}

    def run_stream(own, shared):
        newest_B, known_B = jnp.full(B, known - 1, jnp.int32), jnp.full(B, known, jnp.int32)
        angles = None if layer.rope_theta is None else rope_angles(known_B, H, layer.rope_theta)
        o_BKGH, k_BKSH, v_BKSH, _ = attention_stream_gpu.attend(
            attention_stream_gpu.Plan(layer.norm_epsilon, early=True),
            shared["qkv_BKAH"],
            own["k_BKSH"],
            own["v_BKSH"],
            attention_stream_gpu_plan.moment(newest_B, known_B, S, S, K, angles),
            mosaic_gpu.none_ready(),
            (jnp.ones(H, jnp.float32),) * 2 if layer.qk_norm else None,
        )
        return o_BKGH, own | {"k_BKSH": k_BKSH, "v_BKSH": v_BKSH}

    variants = {"in use": (attention_gpu, {})}
    for tiling in args.tilings if kind in ("local", "full") else ():
        value = attention_gpu.Tiling(*map(int, tiling.split(":")))
        variants[tiling] = attention_gpu, {"TILING": value, "FULL_TILING": value}
    size = 4 * B * K * known * H + (8 * B * K * H * H if layer.has_linear else 0)
    profiled = (attention_ring_gpu, attention_ring_gpu_plan) if kind == "ring" else None
    run = {"ring": run_ring, "stream": run_stream}.get(kind, run)
    return Case(text, size, (own, shared), run, variants, profiled=profiled)


def products_case(model, text, rings=()):
    """Builds the case of the products between two layers' attention."""
    kind, rows = text.split(":")
    rows, persistent = int(rows), kind == "pallas_gpu_persistent"
    shapes = product_shapes(model)
    columns, length = shapes["gate_up"]
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    weights["gate_up"] = jax.ShapeDtypeStruct((columns // GATE_COLUMNS, 2, GATE_COLUMNS, length), jnp.bfloat16)
    own = {"weights": weights, "counters": jax.eval_shape(products_persistent_gpu.zero_counters)}
    shared = {"o": (rows, shapes["out"][1]), "x": (rows, model.width)}
    shared = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shared.items()}
    if persistent:
        shared["x"] = jax.eval_shape(mosaic_gpu.padded, shared["x"])
    how = {"epsilon": model.norm_epsilon, "activation": ACTIVATIONS[model.activation]}

    def run(own, shared):
        o, x, weights = shared["o"], shared["x"], own["weights"]
        if not persistent:
            return products_gpu.run(o, x, weights, interpret=False, **how), own
        *found, counters = products_persistent_gpu.run(o, x, weights, own["counters"], **how)
        return found, own | {"counters": counters}

    variants = {"in use": (products_persistent_plan, {})}
    for ring in rings if persistent else ():
        kib, late = map(int, ring.split(":"))
        sizes = tuple(tuple((n, kib * 1024) for n, _ in of) for of in products_persistent_plan.ROW_RINGS)
        variants[ring] = products_persistent_plan, {"ROW_RINGS": sizes, "LATE": late}
    size = 2 * sum(x.size for x in weights.values())
    kernels, profiled = (1, (products_persistent_gpu, products_persistent_plan)) if persistent else (4, None)
    return Case(text, size, (own, shared), run, variants, kernels, profiled)


def draw(shape):
    """Draws an array; counters begin at zero."""
    if shape.dtype == jnp.int32:
        return jnp.zeros(shape.shape, shape.dtype)
    return jax.random.normal(jax.random.key(next(NUMBERS)), shape.shape, shape.dtype)


def times(case, compiled):
    """Returns {variant: seconds of every call of the kernel}; what cannot be compiled or run costs its own line."""
    own, shared = case.shapes
    arrays, shared, able = None, jax.tree.map(draw, shared), {}
    for name, future in compiled.items():
        arrays = arrays or [jax.tree.map(draw, own) for _ in range(case.count)]
        try:
            run = future.result()
            arrays, out = run(arrays, shared)
            jax.block_until_ready(out)
            able[name] = run
        except Exception as error:  # Whatever it is, the other variants are worth having.
            print(f"{case.name}, {name}: {type(error).__name__} {str(error).strip()[:150]}", flush=True)
            arrays = None  # It may have used them up.
    if not able:
        return {}
    arrays = arrays or [jax.tree.map(draw, own) for _ in range(case.count)]
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        for run in able.values():
            for _ in range(CALLS):
                arrays, out = run(arrays, shared)
            jax.block_until_ready(out)
        jax.profiler.stop_trace()
        calls = [seconds for name, seconds in kernel_calls(pathlib.Path(folder)) if name.startswith("decode_")]
    each = CALLS * case.count
    if len(calls) != case.kernels * each * len(able):
        print(f"{case.name}: the trace has {len(calls)} kernels, not {case.kernels * each * len(able)}", flush=True)
        return {}
    calls = [sum(calls[i : i + case.kernels]) for i in range(0, len(calls), case.kernels)]
    return {name: calls[i * each : (i + 1) * each] for i, name in enumerate(able)}


def timeline(case):
    """Runs a case once with Mosaic's profiler; returns the table of its scopes."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = traced_profiled(case, folder).lower().compile()
        own, shared = case.shapes
        arrays = [jax.tree.map(draw, own) for _ in range(case.count)]
        jax.block_until_ready(compiled(arrays, jax.tree.map(draw, shared)))
        jax.effects_barrier()
        newest = max(pathlib.Path(folder).glob("*.json"), key=lambda file: file.stat().st_mtime)
        return timeline_table(json.loads(newest.read_text())["traceEvents"])


def traced_profiled(case, folder):
    """Traces a case with Mosaic's profiler, which takes shared memory too."""
    space = {"profile_space": 256, "profile_bounds_check": True, "profile_dir": folder}
    kernel, plan = case.profiled
    with values_set(kernel, {"PROFILE": space}), values_set(plan, {"SHARED_BYTES": 208 * 1024}):
        jax.clear_caches()
        return case.traced()


def timeline_table(events):
    """Lays scopes out: when a warpgroup first enters one and last leaves it, medians over warpgroups, 1,000 cycles.

    Times count from a warpgroup's own first event.
    """
    begins, spans = {}, collections.defaultdict(dict)
    for event in sorted(events, key=lambda event: event["ts"]):
        at = event["ts"] - begins.setdefault(event["tid"], event["ts"])
        spans[event["name"]].setdefault(event["tid"], [at, at])[1] = at
    rows = []
    for name, of_warpgroup in spans.items():
        first, last = (statistics.median(span[i] for span in of_warpgroup.values()) for i in (0, 1))
        rows.append((first, [name, f"{first:.2f}", f"{last:.2f}", str(len(of_warpgroup))]))
    return table(["scope", "from", "to", "warpgroups"], [row for _, row in sorted(rows)])


if __name__ == "__main__":
    main()
