"""Times the weight products of a decode step on one GPU: XLA's, and the kernels with their tiles or others.

    python -m scripts.bench_products                                              # the 3B model at 32 rows
    python -m scripts.bench_products --tiles down:16:128:4 out:16:64:4 gate_up:32:128:4

A tile is name:columns:depth:warps. A time is that of one product with its norm, residual or activation, in a call of as
many as read --gib of weights, of which none is in a cache; the least of five calls. Bytes are those of the weights.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp

from rattn import platform
from rattn.config import load_config, validate
from rattn.decoding import products_gpu
from rattn.decoding.layers import product_shapes
from rattn.model.layers import ACTIVATIONS, rms_norm
from rattn.planning.report import table

CALLS = 5


def main():
    """Prints a table."""
    platform.configure()
    args = arguments()
    model = validate(load_config(args.recipe)).model
    shapes = product_shapes(model)
    points = [(name, tile) for name in shapes for tile in (None, products_gpu.TILES[name])]
    points += [tile_of(text) for text in args.tiles]
    lines = []
    for name, tile in points:
        try:
            micros, count = seconds(model, name, shapes[name], tile, args.rows, args.gib)
        except Exception as error:  # Whatever it is, the other tiles are worth having.
            print(f"{name}, {tile}: {type(error).__name__} {str(error).strip()[:150]}", flush=True)
            continue
        size = weight_bytes(name, shapes[name])
        how = f"{tile.columns} × {tile.depth}, {tile.warps} warps" if tile else "XLA"
        lines.append([name, how, f"{micros * 1e6:.1f}", f"{size / micros / 1e12:.2f}", str(count)])
        print(*lines[-1], flush=True)
    print("\n" + table(["product", "tile", "µs", "TB/s", "in a call"], lines))


def arguments():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="configs/rattn_3b.py")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--gib", type=float, default=2.0, help="of weights in a call")
    parser.add_argument("--tiles", nargs="*", default=[], help="name:columns:depth:warps, beside those in use")
    return parser.parse_args()


def tile_of(text):
    """Parses a tile; returns it with the product's name."""
    name, columns, depth, warps = text.split(":")
    sizes = {"columns": int(columns), "depth": int(depth), "warps": int(warps)}
    return name, dataclasses.replace(products_gpu.TILES[name], **sizes)


def weight_bytes(name, shape):
    """Bytes of a product's weights, in bfloat16."""
    return 2 * products_gpu.TILES[name].held * shape[0] * shape[1]


def seconds(model, name, shape, tile, rows, gib):
    """Returns the seconds of one product, and how many there are in a call; tile: None for XLA's."""
    count = max(1, round(gib * 2**30 / weight_bytes(name, shape)))
    columns, length = shape
    held = products_gpu.TILES[name].held
    draw = jax.jit(lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=(1, 2, 3))
    keys = jax.random.split(jax.random.key(0), count + 2)
    x, other = draw(keys[0], rows, length), draw(keys[1], rows, columns)
    weights = [draw(key, held, columns, length) * jnp.bfloat16(length**-0.5) for key in keys[2:]]

    @jax.jit
    def call(x, other, weights):
        squares, found = products_gpu.squares_of(x), []
        for w in weights:
            y = by_kernel(model, name, x, squares, other, w) if tile else by_xla(model, name, x, other, w)
            found.append(y)
            # One after another, as in a step.
            x, _ = jax.lax.optimization_barrier((x, y))
        return found

    kept = dict(products_gpu.TILES)
    products_gpu.TILES[name] = tile or kept[name]
    try:
        compiled = call.lower(x, other, weights).compile()
    finally:
        products_gpu.TILES.update(kept)
    times = []
    for _ in range(CALLS + 1):  # The first is slow.
        start = time.perf_counter()
        jax.block_until_ready(compiled(x, other, weights))
        times.append((time.perf_counter() - start) / count)
    return min(times), count


def by_kernel(model, name, x, squares, other, w):
    """One product as the kernels do it."""
    interpret = jax.default_backend() == "cpu"
    activation = ACTIVATIONS[model.activation]
    if name == "qkv":
        return products_gpu.project(x, squares, w[0], model.norm_epsilon, interpret=interpret)
    if name == "gate_up":
        return products_gpu.gate(x, squares, w, model.norm_epsilon, activation, interpret=interpret)
    return products_gpu.add(name, other, x, w[0], interpret=interpret)[0]


def by_xla(model, name, x, other, w):
    """The same as XLA does it."""
    if name in ("out", "down"):
        return other + jnp.einsum("bk,nk->bn", x, w[0])
    y = jnp.einsum("bk,cnk->bcn", rms_norm(x, jnp.ones(x.shape[1], jnp.float32), model.norm_epsilon), w)
    return ACTIVATIONS[model.activation](y[:, 0]) * y[:, 1] if name == "gate_up" else y[:, 0]


if __name__ == "__main__":
    main()
