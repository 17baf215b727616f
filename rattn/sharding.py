"""One frozen value maps logical dims to mesh axes; one function makes the mesh."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from kernels_pallas.normed_sum import implementation_for, normed_sum
from rattn.attention import Attention, linear_attention_for, softmax_attention_for
from rattn.errors import UserError
from rattn.model.operators import Operators
from rattn.model.parameters import flatten
from rattn.sequence_parallel import linear_attention_over, softmax_attention_over

NormedSum = Callable[..., jax.Array]

AXES = ("data", "fsdp", "seq", "model")


def make_mesh(mesh: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays devices out along `AXES` with Auto axis types.

    On TPU the axes follow the chips' links, and slices, which a slower network joins, follow one another along `data`.

    Args:
      mesh: `config.mesh`, devices along each axis; at most one is -1 and takes what is left.
      devices: defaults to all devices; those of a topology without a TPU do as well.

    Raises:
      UserError: the axes do not use every device exactly once, or `data` cannot be split over the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [mesh[axis] for axis in AXES]
    wanted = " × ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f"config.mesh is {wanted}; give positive sizes, at most one of them -1.")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise UserError(f"config.mesh is {wanted} and there are {len(devices)} devices; make the product equal to it.")
    return Mesh(_lay_out(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _lay_out(devices: list[jax.Device], sizes: list[int]) -> np.ndarray:
    """Returns the devices as an array of shape `sizes`."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise UserError(
            f"config.mesh.data is {sizes[0]} and there are {slices} slices; make it a multiple, for slices are joined "
            "along 'data' alone."
        )
    per_slice, over_slices = [sizes[0] // slices, *sizes[1:]], [slices, 1, 1, 1]
    return mesh_utils.create_hybrid_device_mesh(per_slice, over_slices, devices, allow_split_physical_axes=True)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axis, axes or none that each logical dim is split over."""

    batch: tuple[str, ...] = ("data", "fsdp")
    length: str | None = "seq"
    vocab: str | None = "model"
    embed: str | None = "fsdp"
    heads: str | None = "model"
    kv_heads: str | None = "model"
    head_dim: str | None = None
    mlp: str | None = "model"
    layers: str | None = None

    def spec(self, dims: Sequence[str | None]) -> P:
        """Returns the partition spec of an array with these logical dims (None: not split).

        Raises:
          UserError: two dims of one array on one mesh axis.
        """
        axes = [None if dim is None else getattr(self, dim) for dim in dims]
        used = [name for axis in axes if axis for name in ((axis,) if isinstance(axis, str) else axis)]
        for name in used:
            if used.count(name) > 1:
                raise UserError(
                    f"Dims {tuple(dims)} put mesh axis {name!r} on two dims of one array; change ShardingRules."
                )
        return P(*axes)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh with the rules that lay arrays out on it."""

    mesh: Mesh
    rules: ShardingRules = ShardingRules()

    def named(self, *dims: str | None) -> NamedSharding:
        """Sharding of an array with these logical dims."""
        return NamedSharding(self.mesh, self.rules.spec(dims))

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, P())

    @property
    def batch(self) -> NamedSharding:
        """Sharding of a [B, T] batch."""
        return self.named("batch", "length")

    def parameters(self, logical: Any, shapes: Any) -> Any:
        """Tree of shardings for a tree of logical dims.

        Raises:
          UserError: a dim that its mesh axis does not divide.
        """
        flat_shapes = flatten(shapes)
        for path, dims in flatten(logical).items():
            for dim, size, axis in zip(dims, flat_shapes[path].shape, self.rules.spec(dims), strict=True):
                parts = self.mesh.shape[axis] if axis else 1
                if size % parts:
                    raise UserError(
                        f"Parameter {path} has {dim}={size}, which mesh axis {axis!r} of {parts} does not divide; "
                        "use fewer devices along it or change the model."
                    )
        return jax.tree.map(lambda dims: self.named(*dims), logical, is_leaf=lambda x: isinstance(x, tuple))

    def like_parameters(self, tree: Any, shapes: Any, shardings: Any) -> Any:
        """Shardings for optimizer state: a leaf that mirrors a parameter (same path, same shape) is laid out like it.

        What mirrors none (counts, factored moments) is replicated.
        """
        known = {
            path: (shape.shape, sharding)
            for (path, shape), sharding in zip(flatten(shapes).items(), flatten(shardings).values(), strict=True)
        }

        def of(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            names = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))) for key in path]
            for start in range(len(names)):
                shape, sharding = known.get(".".join(names[start:]), (None, None))
                if shape == leaf.shape:
                    return sharding
            return self.replicated

        return jax.tree_util.tree_map_with_path(of, tree)

    def check_batch(self, config: ConfigDict) -> None:
        """Raises UserError where batch or context length does not divide over the mesh."""
        rows = int(np.prod([self.mesh.shape[axis] for axis in self.rules.batch]))
        for key, size in (
            ("batch_size", config.batch_size // config.accumulation_steps),
            ("evaluation.batch_size", config.evaluation.batch_size),
        ):
            if size % rows:
                raise UserError(
                    f"config.{key} gives {size} rows at a time, which the {rows} devices along "
                    f"{' × '.join(self.rules.batch)} do not divide; make it a multiple."
                )
        if config.context_length % self.mesh.shape["seq"]:
            raise UserError(
                f"config.context_length is {config.context_length}, which mesh axis 'seq' of "
                f"{self.mesh.shape['seq']} devices does not divide; make it a multiple."
            )

    def operators(self) -> Operators:
        """What the model is handed: attention for the mesh's devices, and activations that follow the rules."""
        platform = self.mesh.devices.flat[0].platform
        sums = functools.partial(normed_sum, implementation=implementation_for(platform))
        return self.map_attention(softmax_attention_for(platform), linear_attention_for(platform), sums)

    def map_attention(
        self, softmax_attention: Attention, linear_attention: Attention, sums: NormedSum = normed_sum
    ) -> Operators:
        """Makes operators of attention functions, and of a `normed_sum`, that know one device only."""
        if self.mesh.size == 1:
            return Operators(softmax_attention, linear_attention, sums, self._constrain)
        axis = self.rules.length
        if axis and self.mesh.shape[axis] > 1:
            softmax_attention = softmax_attention_over(axis, softmax_attention)
            linear_attention = linear_attention_over(axis, linear_attention)
        attentions = self._mapped(softmax_attention), self._mapped(linear_attention)
        return Operators(*attentions, self._mapped_sum(sums), self._constrain)

    def _mapped_sum(self, sums: NormedSum) -> NormedSum:
        """Runs `sums`, in which no row, token or head meets another, on every device's own."""
        heads = self.rules.spec(("batch", "length", "heads", "head_dim"))
        scales = self.rules.spec(("heads", "head_dim"))

        def mapped(a: jax.Array, b: jax.Array, a_scale: jax.Array, b_scale: jax.Array, *, epsilon: float) -> jax.Array:
            if _on_own_rows():
                return sums(a, b, a_scale, b_scale, epsilon=epsilon)
            run = jax.shard_map(
                functools.partial(sums, epsilon=epsilon),
                mesh=self.mesh,
                in_specs=(heads, heads, scales, scales),
                out_specs=heads,
                check_vma=False,  # as for attention
            )
            return run(a, b, a_scale, b_scale)

        return mapped

    def _mapped(self, attention: Attention) -> Attention:
        """Runs `attention` on every device's own rows, heads and tokens: XLA cannot split a kernel by itself."""
        heads, kv_heads = (self.rules.spec(("batch", "length", dim, "head_dim")) for dim in ("heads", "kv_heads"))
        ids = self.rules.spec(("batch", "length"))
        states = self.rules.spec(("batch", "kv_heads", None, "head_dim"))

        def mapped(
            q_BTNH: jax.Array,
            k_BTKH: jax.Array,
            v_BTKH: jax.Array,
            *,
            q_segment_ids: jax.Array | None = None,
            kv_segment_ids: jax.Array | None = None,
            initial_state: jax.Array | None = None,
            return_state: bool = False,
            **static: Any,
        ) -> jax.Array | tuple[jax.Array, jax.Array]:
            if kv_segment_ids is None:
                q_segment_ids, kv_segment_ids = (jnp.zeros(x.shape[:2], jnp.int32) for x in (q_BTNH, k_BTKH))
            # Softmax attention knows of no state.
            given = {} if initial_state is None else {"initial_state": initial_state}
            wanted = {"return_state": True} if return_state else {}

            def local(
                q: jax.Array, k: jax.Array, v: jax.Array, q_ids: jax.Array, kv_ids: jax.Array, given: dict
            ) -> jax.Array | tuple[jax.Array, jax.Array]:
                return attention(q, k, v, q_segment_ids=q_ids, kv_segment_ids=kv_ids, **given, **wanted, **static)

            if _on_own_rows():
                return local(q_BTNH, k_BTKH, v_BTKH, q_segment_ids, kv_segment_ids, given)
            # check_vma: a Pallas call does not say over which axes its result varies.
            run = jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(heads, kv_heads, kv_heads, ids, ids, states),
                out_specs=(heads, states) if return_state else heads,
                check_vma=False,
            )
            return run(q_BTNH, k_BTKH, v_BTKH, q_segment_ids, kv_segment_ids, given)

        return mapped

    def _constrain(self, x: jax.Array, *dims: str | None) -> jax.Array:
        return x if _on_own_rows() else jax.lax.with_sharding_constraint(x, self.named(*dims))


def _on_own_rows() -> bool:
    """Whether the model runs inside a `shard_map`, so that every array is a device's own already."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
