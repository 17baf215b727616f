"""Times decoding of random weights on one accelerator, beside the bound that its memory's bandwidth sets.

    python -m scripts.bench_decode --out decode.json                    # the 3B model, about 8 minutes on an H100
    python -m scripts.bench_decode --fold 1 4 16 64 --contexts 4096 --batches 32 --models rattention:512
    JAX_PLATFORMS=cpu python -m scripts.bench_decode --recipe configs/tiny.py --contexts 64 128 --batches 1 2 \
        --models full swa:64 rattention:16                              # that it runs at all

A point is a model (mixer:window), a context length and a batch. Its cache is allocated for exactly the context, filled
with random keys, values and states, and its sequences stand C tokens before the end; a call samples C tokens greedily
and folds. A time is that of a step: the median, with the extremes, of rounds of two calls queued at once.

The bound is what `rattn.accounting.decode_bytes` counts, over the bandwidth of a copy of 4 GiB measured here. The last
table is Figure 7 of arXiv 2506.15545, the share of a step that a window of 512 saves against one of 4096: measured, and
by the paper's formula B · cache / bandwidth + max(2 · B · parameters / FLOP/s, parameter bytes / bandwidth).
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from rattn import accounting, platform
from rattn.config import load_config, set_mixer, validate
from rattn.decoding import cache as caches
from rattn.decoding.decoder import ATTENTIONS, Decoder
from rattn.decoding.sampling import Sampling
from rattn.generate import on_devices
from rattn.model.parameters import model_spec, parameter_count
from rattn.planning.report import table

GREEDY = Sampling(temperature=0.0)
CALLS, ROUNDS = 2, 5


@dataclasses.dataclass(frozen=True)
class Point:
    """What is timed."""

    model: str
    context: int
    batch: int
    fold: int
    attention: str

    def __str__(self):
        return f"{self.model}, context {self.context}, batch {self.batch}, C = {self.fold}, {self.attention}"


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
        self.weight_shapes = jax.eval_shape(self.decoder(1, "xla").weights, self.spec.shapes)

    def _decoder(self, fold, attention):
        return Decoder(
            self.model, on_devices(1, 1), fold_tokens=fold, state_dtype=self.state_dtype, attention=attention
        )

    def cache_bytes(self, point):
        """Bytes of a sequence's cache."""
        sizes = accounting.cache_bytes_per_sequence(
            self.model, point.context, fold_tokens=point.fold, state_itemsize=jnp.dtype(self.state_dtype).itemsize
        )
        return sum(sizes.values())

    def bound_bytes(self, point):
        """Bytes that a step must read and write."""
        parts = accounting.decode_bytes(
            self.model,
            self.spec,
            point.context,
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

    def compiled(self, point):
        """Compiles C sampled steps and the fold."""
        decoder = self.decoder(point.fold, point.attention)
        layout = decoder.layout(point.batch, point.context)
        tokens = jax.ShapeDtypeStruct((point.batch,), jnp.int32)
        run = decoder.compiled("sample", layout, GREEDY)
        shapes = caches.cache_shapes(decoder.layers, layout)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return run.lower(self.weight_shapes, shapes, tokens, key, jax.ShapeDtypeStruct((), jnp.int32)).compile()


def main():
    """Measures the points that fit, prints the tables and writes what was found."""
    platform.configure()
    args = arguments()
    device = jax.local_devices()[0]
    began = time.perf_counter()
    copied = copy_bandwidth(args.copy_gib)
    print(f"{device.device_kind}, JAX {jax.__version__}, copy {copied / 1e12:.3f} TB/s", flush=True)
    models = {name: Model(args.recipe, name, args.state_dtype) for name in args.models}
    weights = random_weights(models)
    memory = memory_bytes(device, args.memory_gib) - sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    points = points_of(args, models, memory)
    print(f"{len(points)} points, {args.threads} compiled at a time", flush=True)
    compiled = compile_all(points, models, args.threads, began + 0.6 * args.seconds)
    print(f"{time.perf_counter() - began:.0f} s since the start, {len(compiled)} compiled", flush=True)
    found = []
    for point in points:
        if point not in compiled or time.perf_counter() - began > args.seconds:
            print(f"{point}: left out, the time is over", flush=True)
            continue
        run, seconds = compiled.pop(point)
        try:
            milliseconds = measure(models[point.model], run, weights, point)
        except jax.errors.JaxRuntimeError as error:
            print(f"{point}: {str(error).splitlines()[0][:150]}", flush=True)
            continue
        found.append(entry(models[point.model], point, milliseconds, copied, seconds))
        print(line(found[-1]), flush=True)
    result = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "recipe": args.recipe,
        "state_dtype": args.state_dtype,
        "copy_bytes_per_second": copied,
        "seconds": time.perf_counter() - began,
        "points": found,
        "figure_7": figure_7(models, found, copied, accounting.peak_flops(device)),
    }
    print("\n" + tables(result))
    if args.out:
        pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


def arguments():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="configs/rattn_3b.py")
    parser.add_argument("--models", nargs="+", default=["full", "swa:4096", "rattention:512"], help="mixer:window")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument(
        "--batches",
        nargs="+",
        default=["32", "max", "1", "128"],
        help="in this order; max: most that fit, and most of the model before",
    )
    parser.add_argument("--fold", type=int, nargs="+", default=[accounting.FOLD_TOKENS], help="C, tokens between folds")
    parser.add_argument("--attention", nargs="+", default=["xla"], choices=ATTENTIONS)
    parser.add_argument("--state_dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=8, help="compilations at a time")
    parser.add_argument("--seconds", type=float, default=540, help="points that have not begun by then are left out")
    parser.add_argument("--memory_gib", type=float, help="of the device; what it says by default")
    parser.add_argument("--copy_gib", type=float, default=4.0, help="size of the array that is copied")
    parser.add_argument("--out", help="JSON file of all results; scripts/plot_decode.py draws it")
    return parser.parse_args()


def compile_all(points, models, threads, deadline):
    """Returns {point: (compiled, seconds)} of what is ready in time, before anything is timed.

    Points of one batch size are compiled one after the other, so that the later ones find the matrix products that
    XLA has tuned for the first.
    """
    compiled = {}

    def compile_batch(batch):
        for point in points:
            if point.batch == batch and time.perf_counter() < deadline:
                start = time.perf_counter()
                run = models[point.model].compiled(point)
                compiled[point] = run, time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(compile_batch, dict.fromkeys(point.batch for point in points)))
    return compiled


def points_of(args, models, memory):
    """Lists the points that fit in `memory` bytes beside the weights, in the order of --batches."""

    def most(name, context, fold):
        size = int(0.95 * memory // models[name].bytes_beside_weights(Point(name, context, 1, fold, "")))
        # 2ⁿ or 3 · 2ⁿ⁻¹: each batch size tunes its own matrix products.
        power = 1 << max(size, 1).bit_length() - 1
        return 0 if size < 1 else power * 3 // 2 if size >= power * 3 // 2 else power

    points = []
    for batch, context, fold, attention in itertools.product(args.batches, args.contexts, args.fold, args.attention):
        for name, before in zip(models, [None, *models], strict=False):
            sizes = [most(name, context, fold)] if batch == "max" else [int(batch)]
            if batch == "max" and before:
                sizes.append(most(before, context, fold))
            sizes = [size for size in sizes if 1 <= size <= most(name, context, fold)]
            wanted = [Point(name, context, size, fold, attention) for size in sizes]
            points += [point for point in wanted if point not in points]
    return points


def memory_bytes(device, asked):
    """Returns what a program may have of the device's memory."""
    if asked:
        return asked * 2**30
    return (device.memory_stats() or {"bytes_limit": 2**30})["bytes_limit"]


def copy_bandwidth(gib):
    """Returns bytes read and written a second by a copy, the best of ten."""
    x = jnp.zeros(int(gib * 2**30) // 4, jnp.int32)
    copy = jax.jit(lambda x: x + 1)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(copy(x))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(times)


def random_weights(models):
    """Draws weights on the device; models share all that they have in common."""
    largest = max(models.values(), key=lambda model: len(jax.tree.leaves(model.weight_shapes)))
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(largest.weight_shapes))))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key, shape, dtype):
        fan_in = shape[1] if len(shape) == 2 else shape[0]
        return (jax.random.normal(key, shape, jnp.bfloat16) * fan_in**-0.5).astype(dtype)

    def leaf(path, shape):
        if "norm" in path[-1].key:
            return jnp.ones(shape.shape, shape.dtype)
        return draw(next(keys), shape.shape, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, largest.weight_shapes)


def pick(weights, shapes):
    """Returns the part of `weights` that a model has."""
    layers = tuple(
        {name: kept[name] for name in w} for w, kept in zip(shapes["layers"], weights["layers"], strict=True)
    )
    return {"model": weights["model"], "layers": layers}


def random_cache(decoder, point):
    """Makes a cache whose sequences stand C tokens before its end."""
    layout = decoder.layout(point.batch, point.context)
    shapes = caches.cache_shapes(decoder.layers, layout)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(seed, shape, dtype):
        # Not by jax.random, whose float32 bits would take more memory than what they become.
        index = jax.lax.iota(jnp.uint32, int(np.prod(shape))) * jnp.uint32(2654435761) + seed
        return ((index >> 16).astype(jnp.float32) / 2**15 - 1).astype(dtype).reshape(shape)

    layers = [
        {name: draw(np.uint32(seed), x.shape, x.dtype) for name, x in layer.items()}
        for seed, layer in enumerate(shapes.layers)
    ]
    return caches.Cache(tuple(layers), clock_of(point), layout)


def clock_of(point):
    """The clock of sequences that stand C tokens before the end of their cache."""
    length_B = jnp.full(point.batch, point.context - point.fold, jnp.int32)
    none_B = jnp.zeros(point.batch, jnp.int32)
    return caches.Clock(length_B, none_B, jnp.zeros_like(none_B), jnp.int32(0), jnp.int32(0))


def measure(model, compiled, weights, point):
    """Returns milliseconds of a step in each round, sorted."""
    cache = random_cache(model.decoder(point.fold, point.attention), point)
    weights = pick(weights, model.weight_shapes)
    tokens, key, first = jnp.zeros(point.batch, jnp.int32), jax.random.key(0), jnp.int32(0)
    times = []
    for _ in range(1 + ROUNDS):
        clocks = [clock_of(point) for _ in range(CALLS)]
        jax.block_until_ready((cache, clocks))
        start = time.perf_counter()
        for clock in clocks:
            out, cache = compiled(weights, dataclasses.replace(cache, clock=clock), tokens, key, first)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / CALLS / point.fold * 1e3)
    return sorted(times[1:])


def entry(model, point, milliseconds, copied, compile_seconds):
    """Returns a point's JSON object."""
    median = statistics.median(milliseconds)
    bound = model.bound_bytes(point)
    return dataclasses.asdict(point) | {
        "milliseconds": {"median": median, "least": milliseconds[0], "most": milliseconds[-1]},
        "tokens_per_second": point.batch / median * 1e3,
        "cache_bytes_per_sequence": model.cache_bytes(point),
        "bound_bytes": bound,
        "bound_share": bound / copied / median * 1e3,
        "compile_seconds": compile_seconds,
    }


def line(found):
    """One line of progress."""
    point = Point(**{field.name: found[field.name] for field in dataclasses.fields(Point)})
    return f"{point}: {found['milliseconds']['median']:.3f} ms a step, {found['bound_share']:.1%} of the bound"


def tables(result):
    """Lays the results out."""

    def place(found):
        return [found[name] for name in ("context", "batch", "model", "attention", "fold")]

    rows = []
    for found in sorted(result["points"], key=place):
        ms = found["milliseconds"]
        rows.append(
            [
                found["model"],
                f"{found['context']:,}",
                str(found["batch"]),
                str(found["fold"]),
                found["attention"],
                f"{ms['median']:.3f} ({ms['least']:.3f}–{ms['most']:.3f})",
                f"{found['tokens_per_second']:,.0f}",
                accounting.readable_bytes(found["batch"] * found["cache_bytes_per_sequence"]),
                f"{found['bound_share']:.1%}",
            ]
        )
    header = ["model", "context", "batch", "C", "attention", "ms a step", "tokens/s", "caches", "of the bound"]
    figure = [
        [f"{e['context']:,}", str(e["batch"]), f"{e['measured']:.1%}", f"{e['formula']:.1%}"]
        for e in result["figure_7"]
    ]
    title = "Share of a step that a window of 512 saves against one of 4096 (Figure 7)"
    return "\n\n".join(
        [table(header, rows), title, table(["context", "batch", "C", "attention", "measured", "formula"], figure)]
    )


def figure_7(models, found, copied, flops):
    """Compares rattention:512 with swa:4096 wherever both were timed at the same C, context and batch."""
    ours, theirs = "rattention:512", "swa:4096"
    if not {ours, theirs} <= models.keys():
        return []
    times = {
        Point(**{f.name: e[f.name] for f in dataclasses.fields(Point)}): e["milliseconds"]["median"] for e in found
    }
    result = []
    for point, milliseconds in times.items():
        peer = dataclasses.replace(point, model=theirs)
        if point.model != ours or peer not in times:
            continue
        seconds = [formula_seconds(models[p.model], p, copied, flops) for p in (point, peer)]
        saved = {"measured": 1 - milliseconds / times[peer], "formula": 1 - seconds[0] / seconds[1]}
        result.append(dataclasses.asdict(point) | saved)
    return sorted(result, key=lambda e: (e["context"], e["batch"]))


def formula_seconds(model, point, bandwidth, flops):
    """The paper's step time: keys, values and states at the bandwidth, weights at the bandwidth or the FLOP/s."""
    parameters = parameter_count(model.spec.shapes)
    return point.batch * model.cache_bytes(point) / bandwidth + max(
        2 * point.batch * parameters / (flops or float("inf")), 2 * parameters / bandwidth
    )


if __name__ == "__main__":
    main()
