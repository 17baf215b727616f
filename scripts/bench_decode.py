"""Times decoding of random weights on one accelerator, beside the bound that its memory's bandwidth sets.

    python -m scripts.bench_decode --out decode.json                    # the 3B model, about 8 minutes on an H100
    python -m scripts.bench_decode --fold 1 4 16 64 --contexts 4096 --batches 32 --models rattention:512
    JAX_PLATFORMS=cpu python -m scripts.bench_decode --recipe configs/tiny.py --contexts 64 128 --batches 1 2 \
        --models full swa:64 rattention:16                              # that it runs at all

A point is a model (mixer:window), a context length and a batch. Its cache is allocated for exactly the context, filled
with random keys, values and states, and its sequences stand C tokens before the end; a call samples C tokens greedily
and folds. A time is that of a step, the median of up to CALLS calls with the extremes; the next call is always queued
before one ends, so that the device never waits for the host.

The bound is what `rattn.accounting.decode_bytes` counts, over the bandwidth of a copy or of a sum of 4 GiB, whichever
is higher here. The last table is Figure 7 of arXiv 2506.15545, the share of a step that a window of 512 saves against
one of 4096: measured, and by the paper's formula B · cache / bandwidth + max(2 · B · parameters / FLOP/s, parameter
bytes / bandwidth). A point that fails costs its own line alone, one that is too large is tried again at the end with
fewer sequences, and --out is written after every point. --profile adds where a GPU's time goes, from one more call that
is compiled without CUDA graphs, whose kernels the profiler does not tell apart, as steps that leave theirs are anyhow.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import tempfile
import threading
import time

import jax
import jax.numpy as jnp

from rattn import accounting, platform
from rattn.config import load_config, set_mixer, validate
from rattn.decoding import cache as caches
from rattn.decoding.decoder import ATTENTIONS, PRODUCTS, Decoder
from rattn.decoding.sampling import Sampling
from rattn.files import write_whole
from rattn.generate import on_devices
from rattn.model.parameters import model_spec, parameter_count
from scripts.constants import constants_set
from scripts.decode_tables import NARROW, WIDE, tables
from scripts.random_decoding import clock_of, keys_of, pick, random_cache, random_weights
from scripts.trace_costs import costs_by_kind, costs_table

GREEDY = Sampling(temperature=0.0)
# Timed calls of a point, or fewer where they take so long.
CALLS, FEWEST_CALLS, ENOUGH_SECONDS = 10, 4, 3.0
# Constants are set for one point at a time.
LOWERING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Point:
    """What is timed."""

    model: str
    context: int
    batch: int
    fold: int
    attention: str
    products: str
    constants: str = ""

    def __str__(self):
        how = f"C = {self.fold}, attention {self.attention}, products {self.products}"
        parts = self.model, f"context {self.context}", f"batch {self.batch}", how, self.constants
        return ", ".join(filter(None, parts))


class Model:
    """A recipe with another mixer and window, ready to decode."""

    def __init__(self, recipe, name, state_dtype):
        """Takes "mixer" or "mixer:window"."""
        mixer, _, window = name.partition(":")
        config = set_mixer(load_config(recipe), mixer)
        config.model.window = int(window or config.model.window)
        config.model.compute_dtype = "bfloat16"
        self.model = validate(config).model
        self.spec = model_spec(self.model)
        self.state_dtype = state_dtype
        self.decoder = functools.cache(self._decoder)
        self.weight_shapes = functools.cache(self._weight_shapes)

    def _decoder(self, fold, attention, products):
        return Decoder(
            self.model,
            on_devices(1, 1),
            fold_tokens=fold,
            state_dtype=self.state_dtype,
            attention=attention,
            products=products,
        )

    def _weight_shapes(self, products):
        return jax.eval_shape(self.decoder(1, "xla", products).weights, self.spec.shapes)

    def cache_bytes(self, point):
        """Bytes of a sequence's cache."""
        sizes = accounting.cache_bytes_per_sequence(
            self.model, point.context, fold_tokens=point.fold, state_itemsize=jnp.dtype(self.state_dtype).itemsize
        )
        return sum(sizes.values())

    def bound_bytes(self, point):
        """Bytes that a step must read and write, in the middle of a call."""
        parts = accounting.decode_bytes(
            self.model,
            self.spec,
            point.context - point.fold // 2,
            fold_tokens=point.fold,
            state_itemsize=jnp.dtype(self.state_dtype).itemsize,
        )
        return parts.pop("weights") + point.batch * sum(parts.values())

    def bytes_beside_weights(self, point):
        """Bytes that a point takes at once: caches, float32 logits three times, scores, a layer's positioned keys."""
        model = self.model
        scores = 12 * model.query_heads * point.context
        ring = 8 * model.kv_heads * model.head_dim * (model.window + point.fold)
        return point.batch * (self.cache_bytes(point) + 12 * model.vocab_size + scores + ring)

    def compiled(self, point, options=None, deadline=float("inf")):
        """Compiles C sampled steps and the fold, with options of XLA's; None where its turn comes after `deadline`."""
        decoder = self.decoder(point.fold, point.attention, point.products)
        layout = decoder.layout(point.batch, point.context)
        tokens = jax.ShapeDtypeStruct((point.batch,), jnp.int32)
        run = decoder.compiled("sample", layout, GREEDY)
        shapes = caches.cache_shapes(decoder.layers, layout)
        keys = jax.eval_shape(lambda: keys_of(point))
        first = jax.ShapeDtypeStruct((), jnp.int32)
        with LOWERING, constants_set(point.constants, "rattn.decoding"):
            if time.perf_counter() > deadline:
                return None
            lowered = run.lower(self.weight_shapes(point.products), shapes, tokens, keys, first)
        return lowered.compile(compiler_options=options)


def main():
    """Measures the points that fit, prints the tables and writes what was found."""
    began = time.perf_counter()
    platform.configure()
    args = arguments()
    device = jax.local_devices()[0]
    result = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "recipe": args.recipe,
        "state_dtype": args.state_dtype,
        "bandwidth": bandwidth(args.copy_gib),
        "points": [],
    }
    found, measured = result["points"], ", ".join(f"{n} {x / 1e12:.3f}" for n, x in result["bandwidth"].items())
    print(f"{device.device_kind}, JAX {jax.__version__}, TB/s: {measured}", flush=True)
    models = {name: Model(args.recipe, name, args.state_dtype) for name in args.models}
    weights = {
        products: random_weights([model.weight_shapes(products) for model in models.values()])
        for products in args.products
    }
    memory = memory_bytes(device, args.memory_gib) - sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    points = points_of(args, models, memory)
    print(f"{len(points)} points, {args.threads} compiled at a time", flush=True)
    compiled = compile_all(points, models, args.threads, began + 0.6 * args.seconds)
    print(f"{time.perf_counter() - began:.0f} s since the start, {len(compiled)} compiled", flush=True)
    points.sort(key=lambda point: point not in compiled)
    for point in points:  # It grows by what is tried again.
        # Nobody knows how long a compilation takes: none begins that might not be timed.
        if time.perf_counter() - began > args.seconds * (1 if point in compiled else 0.8):
            print(f"{point}: left out, the time is over", flush=True)
            continue
        model = models[point.model]
        try:
            run, seconds = compiled.pop(point, None) or timed_compile(model, point)
            milliseconds = measure(model, run, weights, point)
        except Exception as error:  # Whatever it is, the other points are worth having.
            print(f"{point}: {said(error)}", flush=True)
            fewer = dataclasses.replace(point, batch=size_up_to(point.batch - 1))
            if "RESOURCE_EXHAUSTED" in str(error) and fewer.batch and fewer not in points:
                points.append(fewer)
            continue
        found.append(entry(model, point, milliseconds, max(result["bandwidth"].values()), seconds))
        print(line(found[-1]), flush=True)
        if args.profile:
            print(profile(model, weights, point), flush=True)
        result["figure_7"] = figure_7(models, found, max(result["bandwidth"].values()), accounting.peak_flops(device))
        result["seconds"] = time.perf_counter() - began
        write(args.out, result)
    print("\n" + tables(result))


def write(path, result):
    """Writes what there is so far, in place of what was written before."""
    if path:
        write_whole(path, json.dumps(result, indent=1) + "\n")


def said(error):
    """The beginning of an error's first line."""
    return f"{type(error).__name__} {str(error).strip().partition(chr(10))[0][:150]}"


def arguments():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="configs/rattn_3b.py")
    parser.add_argument("--models", nargs="+", default=["full", "swa:4096", "rattention:512"], help="mixer:window")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument(
        "--batches",
        nargs="+",
        default=["32", "128", "max", "1"],
        help="in this order; max: most that fit, and most of the model before",
    )
    parser.add_argument("--fold", type=int, nargs="+", default=[accounting.FOLD_TOKENS], help="C, tokens between folds")
    parser.add_argument("--attention", nargs="+", default=["auto"], choices=ATTENTIONS)
    parser.add_argument("--products", nargs="+", default=["auto"], choices=PRODUCTS)
    parser.add_argument("--constants", nargs="+", default=[""], help='of rattn.decoding: "module.NAME[.key]=value,…"')
    parser.add_argument("--state_dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=8, help="compilations at a time")
    parser.add_argument("--seconds", type=float, default=540, help="points that have not begun by then are left out")
    parser.add_argument("--memory_gib", type=float, help="of the device; what it says by default")
    parser.add_argument("--copy_gib", type=float, default=4.0, help="size of the array whose copy is timed")
    parser.add_argument("--profile", action="store_true", help="add a table of a call's kernels by kind")
    parser.add_argument("--out", help="JSON file of all results; scripts/plot_decode.py draws it")
    return parser.parse_args()


def compile_all(points, models, threads, deadline):
    """Returns {point: (compiled, seconds)} of what is begun in time, before anything is timed.

    The first point of each batch size goes before the others, which then find the matrix products that XLA has tuned.
    """
    compiled = {}

    def compile_one(point):
        try:
            run, seconds = timed_compile(models[point.model], point, deadline)
            if run:
                compiled[point] = run, seconds
        except Exception as error:
            print(f"{point}: not compiled yet, {said(error)}", flush=True)

    first = list({point.batch: point for point in reversed(points)}.values())
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for group in (first, [point for point in points if point not in first]):
            list(pool.map(compile_one, group))
    return compiled


def timed_compile(model, point, deadline=float("inf")):
    """Returns what `Model.compiled` returns and how many seconds it took."""
    start = time.perf_counter()
    return model.compiled(point, deadline=deadline), time.perf_counter() - start


def points_of(args, models, memory):
    """Lists the points that fit in `memory` bytes beside the weights, in the order of --batches."""

    def most(name, context, fold):
        return size_up_to(0.95 * memory // models[name].bytes_beside_weights(Point(name, context, 1, fold, "", "")))

    points = []
    options = (args.batches, args.contexts, args.fold, args.attention, args.products, args.constants)
    for batch, context, fold, *how in itertools.product(*options):
        for name, before in zip(models, [None, *models], strict=False):
            sizes = [most(name, context, fold)] if batch == "max" else [int(batch)]
            if batch == "max" and before:
                sizes.append(most(before, context, fold))
            sizes = [size for size in sizes if 1 <= size <= most(name, context, fold)]
            wanted = [Point(name, context, size, fold, *how) for size in sizes]
            points += [point for point in wanted if point not in points]
    return points


def size_up_to(limit):
    """Returns the largest 2ⁿ or 3 · 2ⁿ⁻¹ up to `limit`, 0 below 1: each batch size tunes its own matrix products."""
    if limit < 1:
        return 0
    power = 1 << int(limit).bit_length() - 1
    return power * 3 // 2 if power > 1 and limit >= power * 3 // 2 else power


def memory_bytes(device, asked):
    """Returns what a program may have of the device's memory."""
    if asked:
        return asked * 2**30
    return (device.memory_stats() or {"bytes_limit": 2**30})["bytes_limit"]


def bandwidth(gib):
    """Returns the bytes a second of a copy, read and written, and of a sum, read: the best of five runs of ten each."""
    x = jnp.zeros(int(gib * 2**30) // 4, jnp.int32)
    size = x.nbytes
    copy, add = jax.jit(lambda x: x + 1, donate_argnums=0), jax.jit(jnp.sum)
    seconds = {"copy": [], "sum": []}
    for _ in range(6):  # The first compiles.
        start = time.perf_counter()
        for _ in range(10):
            x = copy(x)
        jax.block_until_ready(x)
        middle = time.perf_counter()
        jax.block_until_ready([add(x) for _ in range(10)])
        seconds["copy"].append(middle - start)
        seconds["sum"].append(time.perf_counter() - middle)
    return {"copy": 20 * size / min(seconds["copy"]), "sum": 10 * size / min(seconds["sum"])}


def measure(model, compiled, weights, point):
    """Returns milliseconds of a step in each call, sorted."""
    ended, before = [], None
    for out in calls(model, compiled, weights, point, 2 + CALLS):
        if before is not None:
            before.block_until_ready()
            ended.append(time.perf_counter())
        before = out
        if len(ended) > FEWEST_CALLS and ended[-1] - ended[0] > ENOUGH_SECONDS:
            break
    jax.block_until_ready(before)
    return sorted((end - start) / point.fold * 1e3 for start, end in itertools.pairwise(ended))


def calls(model, compiled, weights, point, count):
    """Queues call after call of C steps each; yields the tokens of each, which may not be there yet."""
    cache = random_cache(model.decoder(point.fold, point.attention, point.products), point)
    weights = pick(weights[point.products], model.weight_shapes(point.products))
    tokens, keys, first = jnp.zeros(point.batch, jnp.int32), keys_of(point), jnp.int32(0)
    clocks = [clock_of(point) for _ in range(count)]
    jax.block_until_ready((cache, clocks, tokens, keys))
    for clock in clocks:
        out, cache = compiled(weights, dataclasses.replace(cache, clock=clock), tokens, keys, first)
        yield out


def profile(model, weights, point):
    """Returns a table of the kernels of a call."""
    compiled = model.compiled(point, {"xla_gpu_enable_command_buffer": ""})
    with tempfile.TemporaryDirectory() as folder:
        for number, out in enumerate(calls(model, compiled, weights, point, 2)):
            jax.block_until_ready(out)
            if number == 0:
                jax.profiler.start_trace(folder)
        jax.profiler.stop_trace()
        return costs_table(costs_by_kind(pathlib.Path(folder)), kernels=20)


def entry(model, point, milliseconds, bytes_per_second, compile_seconds):
    """Returns a point's JSON object."""
    median = statistics.median(milliseconds)
    bound = model.bound_bytes(point)
    decoder = model.decoder(point.fold, point.attention, point.products)
    return dataclasses.asdict(point) | {
        "attention": decoder.attention,
        "products": decoder.products,
        "milliseconds": {"median": median, "least": milliseconds[0], "most": milliseconds[-1]},
        "tokens_per_second": point.batch / median * 1e3,
        "cache_bytes_per_sequence": model.cache_bytes(point),
        "bound_bytes": bound,
        "bound_share": bound / bytes_per_second / median * 1e3,
        "compile_seconds": compile_seconds,
    }


def line(found):
    """One line of progress."""
    point = Point(**{field.name: found[field.name] for field in dataclasses.fields(Point)})
    return f"{point}: {found['milliseconds']['median']:.3f} ms a step, {found['bound_share']:.1%} of the bound"


def figure_7(models, found, bytes_per_second, flops):
    """Compares NARROW with WIDE wherever both were timed at the same C, context and batch."""
    times = {
        Point(**{f.name: e[f.name] for f in dataclasses.fields(Point)}): e["milliseconds"]["median"] for e in found
    }
    result = []
    for point, milliseconds in times.items():
        peer = dataclasses.replace(point, model=WIDE)
        if point.model != NARROW or peer not in times:
            continue
        seconds = [formula_seconds(models[p.model], p, bytes_per_second, flops) for p in (point, peer)]
        saved = {"measured": 1 - milliseconds / times[peer], "formula": 1 - seconds[0] / seconds[1]}
        result.append(dataclasses.asdict(point) | saved)
    return sorted(result, key=lambda e: (e["context"], e["batch"]))


def formula_seconds(model, point, bytes_per_second, flops):
    """The paper's step time: keys, values and states at the bandwidth, weights at the bandwidth or the FLOP/s."""
    parameters = parameter_count(model.spec.shapes)
    return point.batch * model.cache_bytes(point) / bytes_per_second + max(
        2 * point.batch * parameters / (flops or float("inf")), 2 * parameters / bytes_per_second
    )


if __name__ == "__main__":
    main()
