"""A layer's weight products in a step, as Triton kernels for a Hopper GPU that leave nothing else to do but attention.

    qkv    = rms_norm(x) · W                            `project`
    x'     = x + o · W                                  `add`
    hidden = activation(rms_norm(x') · G) ⊙ rms_norm(x') · U    `gate`
    x''    = x' + hidden · W                            `add`

A norm's scale is part of the weights that follow it (`rattn.decoding.layers`), and its 1 / RMS a factor of their
product: who writes x adds up the squares of its columns, who reads x adds up these sums.

A program takes a tile of columns through the whole sum, so that a row's result follows from that row alone. Weights
are read once, a column's numbers one after another, but the rows once a program, from the L2 cache: tiles want to be
wide. A Hopper's tensor cores multiply 64 rows at a time, here columns of weights; a tile of fewer is stood up as that
many rows by cutting the sum into pieces, each beside the rows' numbers of all pieces. Of the blocks of

    [W₀ᵀ; W₁ᵀ] · [x₀ x₁] = [W₀ᵀx₀ W₀ᵀx₁; W₁ᵀx₀ W₁ᵀx₁]

those on the diagonal are added up. It reads every number once from shared memory, which would be the limit otherwise.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from rattn.decoding.layers import GATE_COLUMNS
from rattn.decoding.triton_gpu import cells, dot, let_next_begin

# Rows of a product, at least and at most: more would not fit as what they are multiplied with.
LEAST_ROWS, MOST_ROWS = 16, 64
# What the tensor cores take at a time.
STOOD_UP = 64
# Of a multiprocessor's 227 KiB: bytes that its program keeps on the way.
SHARED_BYTES = 200 * 1024


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program does.

    Attributes:
      columns: of the result, a power of two from 16.
      depth: numbers of each column that are read at a time, a power of two; 64 fill a line of the cache.
      warps: in groups of four.
      held: weight columns for each column of the result.
      least: numbers that are read at a time where `depth` does not divide the sum, half of it or less; 0: none but it.
    """

    columns: int
    depth: int
    warps: int = 4
    held: int = 1
    least: int = 0

    @property
    def pieces(self) -> int:
        """How many pieces the sum is cut into."""
        return max(1, STOOD_UP // (self.held * self.columns))

    def fitted(self, length: int) -> "Tile":
        """Returns the tile with the depth that a sum so long takes, if it takes any."""
        depth = self.depth
        while length % (self.pieces * depth) and depth // 2 >= self.least > 0:
            depth //= 2
        return dataclasses.replace(self, depth=depth)

    def stages(self, rows: int, itemsize: int) -> int:
        """How many reads are on the way or in use at a time."""
        size = self.pieces * (self.held * self.columns + rows) * self.depth * itemsize
        return max(2, SHARED_BYTES // size)


# For the 3B model at 32 rows on an H200 (docs/kernel_log_gpu.md, 5): programs read rows as often as there are tiles,
# and what a multiprocessor reads at most, 64 bytes a cycle, is the limit where they are few. All reads of "out" are on
# the way at once.
TILES = {
    "qkv": Tile(columns=32, depth=128),
    "out": Tile(columns=16, depth=128, least=64),
    "gate_up": Tile(columns=64, depth=128, held=2),
    "down": Tile(columns=16, depth=128),
}


def fits(dtype: jnp.dtype, shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Returns whether the kernels take the products whose columns and length of sum `shapes` gives by name."""
    whole = all(
        not columns % TILES[name].columns and not length % (TILES[name].pieces * TILES[name].fitted(length).depth)
        for name, (columns, length) in shapes.items()
    )
    return dtype == jnp.bfloat16 and whole


def run(
    o_BE: jax.Array,
    x_BD: jax.Array,
    weights: Mapping[str, jax.Array],
    *,
    epsilon: float,
    activation: Callable[[jax.Array], jax.Array],
    interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the residual stream x_BD and the next layer's qkv [B, columns], or None, both in bfloat16.

    Args:
      o_BE: bfloat16, what attention says.
      x_BD: bfloat16, the residual stream.
      weights: bfloat16 by product, [columns, length of sum]; "qkv" where a layer follows. Gate and up are
        [tiles, 2, GATE_COLUMNS, length].
      epsilon: of the norms.
      activation: of the gate.
      interpret: run on a CPU, to test it.
    """
    x_BD, squares_PB = add("out", x_BD, o_BE, weights["out"], interpret=interpret)
    hidden_BF = gate(x_BD, squares_PB, weights["gate_up"], epsilon, activation, interpret=interpret)
    x_BD, squares_PB = add("down", x_BD, hidden_BF, weights["down"], interpret=interpret)
    if "qkv" not in weights:
        return x_BD, None
    return x_BD, project(x_BD, squares_PB, weights["qkv"], epsilon, interpret=interpret)


def project(
    x_BD: jax.Array, squares_PB: jax.Array, weights_ND: jax.Array, epsilon: float, *, interpret: bool
) -> jax.Array:
    """Returns rms_norm(x) · W, [B, N] in bfloat16."""
    (out,) = _product("qkv", x_BD, weights_ND, interpret, squares=squares_PB, epsilon=epsilon)
    return out


def add(
    name: str, residual_BD: jax.Array, x_BK: jax.Array, weights_DK: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns residual + x · W, [B, D] in bfloat16, and the sums of its squares, float32 [P, B].

    Args:
      name: of the tile, "out" or "down".
      residual_BD: bfloat16.
      x_BK: bfloat16.
      weights_DK: bfloat16.
      interpret: run on a CPU, to test it.
    """
    return _product(name, x_BK, weights_DK, interpret, residual=residual_BD)


def gate(
    x_BD: jax.Array,
    squares_PB: jax.Array,
    weights_JCFD: jax.Array,
    epsilon: float,
    activation: Callable[[jax.Array], jax.Array],
    *,
    interpret: bool,
) -> jax.Array:
    """Returns activation(rms_norm(x) · G) ⊙ rms_norm(x) · U, [B, F] in bfloat16; G and U are C's two in J tiles."""
    weights_ND = weights_JCFD.reshape(-1, weights_JCFD.shape[-1])
    (out,) = _product(
        "gate_up", x_BD, weights_ND, interpret, squares=squares_PB, epsilon=epsilon, activation=activation
    )
    return out


def _product(name, x_BK, weights_NK, interpret, *, squares=None, residual=None, epsilon=None, activation=None):
    tile, B = TILES[name].fitted(x_BK.shape[1]), x_BK.shape[0]
    columns = weights_NK.shape[0] // tile.held
    programs = columns // tile.columns
    rows = max(LEAST_ROWS, 1 << (B - 1).bit_length())
    given = {"x": x_BK, "weights": weights_NK, "squares": squares, "residual": residual}
    given = {key: value for key, value in given.items() if value is not None}
    wanted = {"out": jax.ShapeDtypeStruct((B, columns), x_BK.dtype)}
    if residual is not None:
        wanted["out squares"] = jax.ShapeDtypeStruct((programs, B), jnp.float32)

    def kernel(*refs):
        program = _Program(tile, dict(zip((*given, *wanted), refs, strict=True)), rows, interpret)
        program.run(epsilon, activation)

    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=list(wanted.values()),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages(rows, x_BK.dtype.itemsize)),
        interpret=interpret,
        name=f"decode_product_{name}",
    )(*given.values())


class _Program:
    """One program: a tile of columns, of all rows."""

    def __init__(self, tile, refs, rows, interpret):
        self.tile, self.refs, self.rows, self.interpret = tile, refs, rows, interpret
        self.B, self.length = refs["x"].shape
        self.number = let_next_begin(pl.program_id(0), interpret)
        self.first = self.number * tile.columns

    def run(self, epsilon, activation):
        """Computes and writes the tile."""
        # Read first, so that nobody waits for them in the end.
        columns = self.first + jnp.arange(self.tile.columns)
        residual = self.load("residual", *self.tile_of(jnp.arange(self.rows), columns)) if epsilon is None else None
        squares = self.squares() if epsilon is not None else None
        y = self.sums()
        if epsilon is not None:
            y *= jax.lax.rsqrt(jnp.sum(squares, axis=0) / self.length + epsilon)[:, None]
        else:
            y += residual.astype(jnp.float32)
        if activation is not None:
            g, u = jax.lax.split(y, (self.tile.columns,) * 2, axis=1)
            y = activation(g) * u
        y = y.astype(self.refs["out"].dtype)
        index, valid = self.tile_of(jnp.arange(self.rows), columns)
        plgpu.store(self.refs["out"].at[index], y, mask=valid)
        if "out squares" in self.refs:
            wide = y.astype(jnp.float32)
            row = jnp.arange(self.rows)
            index = jnp.broadcast_to(self.number, row.shape), jnp.where(row < self.B, row, self.B)
            plgpu.store(self.refs["out squares"].at[index], jnp.sum(wide * wide, axis=1), mask=row < self.B)

    def sums(self):
        """Returns x · W for the tile's weight columns, float32 [rows, held · columns]."""
        tile, refs = self.tile, self.refs
        held, length = tile.held * tile.columns, self.length // tile.pieces
        side, beside = jnp.arange(tile.pieces * held), jnp.arange(tile.pieces * self.rows)
        piece, piece_beside = side // held, beside // self.rows
        column = self.number * held + self.place(side % held)

        def read(i, sums):
            at = i * tile.depth + jnp.arange(tile.depth)[None]
            shape = (side.shape[0], tile.depth)
            columns = jnp.broadcast_to(column[:, None], shape), piece[:, None] * length + at
            rows, valid = self.tile_of(beside % self.rows, piece_beside[:, None] * length + at)
            return sums + dot(refs["weights"][columns], self.load("x", rows, valid), 1, 1, self.interpret)

        start = jnp.zeros((side.shape[0], beside.shape[0]), jnp.float32)
        sums = jax.lax.fori_loop(0, length // tile.depth, read, start)
        if tile.pieces > 1:
            sums = jnp.where(piece[:, None] == piece_beside[None], sums, 0.0)
            # In this order: a thread has all of a column's rows.
            sums = sums.reshape(tile.pieces * held, tile.pieces, self.rows).sum(axis=1)
            sums = sums.reshape(tile.pieces, held, self.rows).sum(axis=0)
        return sums.T

    def place(self, column):
        """Returns where a column lies among the tile's weight columns, of which sums have all of the gate's first."""
        if self.tile.held == 1:
            return column
        # `//` and `%` round down below zero too, which every thread would pay before its first copy.
        div, rem, columns, width = jax.lax.div, jax.lax.rem, jnp.int32(self.tile.columns), jnp.int32(GATE_COLUMNS)
        group = div(rem(column, columns), width) * self.tile.held + div(column, columns)
        return group * GATE_COLUMNS + rem(column, width)

    def squares(self):
        """Loads the sums of squares of the tiles that x was written in, [P or the next power of two, rows]."""
        ref = self.refs["squares"]
        P, shape = ref.shape[0], (pl.next_power_of_2(ref.shape[0]), self.rows)
        part, row = (jax.lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (0, 1))
        if shape == ref.shape:
            return ref[part, row]
        index = jnp.where(part < P, part, P), jnp.where(row < self.B, row, self.B)
        return plgpu.load(ref.at[index], mask=(part < P) & (row < self.B), other=0.0)

    def tile_of(self, rows, columns):
        """Returns the indices of these columns ([n], or [rows, n]) of rows, and which rows there are."""
        return cells(rows, rows < self.B, self.B, columns)

    def load(self, name, index, valid):
        """Loads what is valid, and zeros."""
        ref = self.refs[name]
        if self.rows == self.B:
            return ref[index]
        return plgpu.load(ref.at[index], mask=valid, other=jnp.zeros((), ref.dtype))
