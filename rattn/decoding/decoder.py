"""The compiled functions of decoding, each laid out by the sharding value that training uses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kernels_pallas import devices
from rattn.accounting import FOLD_TOKENS, readable_bytes
from rattn.decoding import cache as caches
from rattn.decoding import layers, prefill, products_gpu, products_persistent_plan, step
from rattn.decoding.attention import moments, ring_rotations
from rattn.decoding.cache import Cache, CacheLayout
from rattn.decoding.kernels import Kernels
from rattn.decoding.sampling import Sampling
from rattn.errors import UserError, nearest
from rattn.model.parameters import model_spec
from rattn.sharding import Sharding

Tree = Any
ATTENTIONS = ("auto", "xla", "pallas_gpu", "pallas_gpu_hopper")
PRODUCTS = ("auto", "xla", "pallas_gpu", "pallas_gpu_hopper")


class Decoder:
    """Runs a model token by token.

    Every function that takes a cache uses it up (its buffers are donated) and returns the one to go on with. Sequences
    lie along `data` and `fsdp`, heads along `model`.

    Attributes:
      attention, products: what was taken for them.
    """

    def __init__(
        self,
        model: ConfigDict,
        sharding: Sharding,
        *,
        fold_tokens: int = FOLD_TOKENS,
        state_dtype: str = "float32",
        attention: str = "auto",
        products: str = "auto",
    ):
        """Takes what all caches have in common.

        Args:
          model: `config.model`.
          sharding: as in training; the mesh must not cut sequences.
          fold_tokens: C, steps between two folds: more make rings longer and write states less often.
          state_dtype: "float32" or "bfloat16", of the states that are kept.
          attention: of a step: "xla", or "pallas_gpu", on one device and in the layers that
            `rattn.decoding.attention_gpu` fits, or "pallas_gpu_hopper", on a Hopper GPU, which has other kernels for
            layers and batches that `attention_ring_gpu` or `attention_stream_gpu` fits. "auto" takes
            "pallas_gpu_hopper" on one Hopper GPU, "pallas_gpu" on another and "xla" elsewhere.
          products: of a step with its weights: "xla", or on one device, for models that it fits, "pallas_gpu"
            (`rattn.decoding.products_gpu` for up to 64 sequences and "xla" for more), or on a Hopper GPU, for models
            that both fit, "pallas_gpu_hopper" (`products_persistent_gpu` for 33 to 128 sequences, with a
            multiprocessor for each of its programs, which wait for each other; "pallas_gpu" for fewer and "xla" for
            more). A model that one does not fit gets the one before. "auto" takes "pallas_gpu_hopper" on one Hopper
            GPU with so many multiprocessors, "pallas_gpu" on another and "xla" elsewhere.

        Raises:
          UserError: a value that does not fit.
        """
        if sharding.mesh.shape["seq"] > 1:
            raise UserError(
                f"Decoding runs on a mesh with seq={sharding.mesh.shape['seq']}; use 1: a token cannot be cut."
            )
        caches.check_options(fold_tokens, state_dtype)
        for name, value, known in (("attention", attention, ATTENTIONS), ("products", products, PRODUCTS)):
            if value not in known:
                raise UserError(f"{name} is {value!r}{nearest(value, known)}; use {', '.join(known)}.")
            if value.startswith("pallas_gpu") and sharding.mesh.size > 1:
                raise UserError(f"{name}={value!r} runs on one device and there are {sharding.mesh.size}; use 'xla'.")
        if sharding.mesh.size > 1:
            spec = model_spec(model)
            sharding.parameters(spec.logical, spec.shapes)  # Raises where the mesh does not divide the model.
        self.model, self.sharding = model, sharding
        self.layers = layers.layer_specs(model)
        self._fold_tokens, self._state_dtype = fold_tokens, state_dtype
        platform = sharding.mesh.devices.flat[0].platform
        one_gpu = platform == "gpu" and sharding.mesh.size == 1
        one_hopper = one_gpu and devices.on_hopper()
        if attention == "auto":
            attention = "pallas_gpu_hopper" if one_hopper else "pallas_gpu" if one_gpu else "xla"
        for name, value in (("attention", attention), ("products", products)):
            if value == "pallas_gpu_hopper" and not devices.on_hopper():
                raise UserError(f"{name}={value!r} runs on a Hopper GPU and there is none; use 'auto'.")
        self.attention, self.products = attention, _products_taken(products, model, one_hopper)
        self._kernels = Kernels(self.attention, self.products, interpret=platform == "cpu")
        self._operators = sharding.operators()
        self.compiled = functools.cache(self._compiled)
        self._logits = jax.jit(lambda weights, x_BTD: layers.logits(model, weights, x_BTD))
        self._embed = jax.jit(layers.embed, out_shardings=sharding.named("batch", None, None))
        self._begin_chunk = jax.jit(prefill.begin_chunk, static_argnames="T")

    def weights(self, parameters: Tree) -> dict[str, Any]:
        """Lays training's parameters out for decoding; see `rattn.decoding.layers.decoding_weights`."""
        return layers.decoding_weights(self.model, parameters, self.sharding, for_kernels=self.products != "xla")

    def layout(self, batch: int, capacity: int) -> CacheLayout:
        """Describes a cache for `batch` sequences of up to `capacity` tokens."""
        model = self.model
        return CacheLayout(batch, capacity, model.window, self._fold_tokens, model.compute_dtype, self._state_dtype)

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """Allocates a cache for `batch` sequences of up to `capacity` tokens, prompt and output.

        Raises:
          UserError: the mesh does not divide the batch, or the devices have no room for the cache.
        """
        rows = self.row_multiple
        if batch % rows or batch < 1 or capacity < 1:
            raise UserError(
                f"The cache is for {batch} sequences of {capacity} tokens; give at least 1 of each, and a multiple of "
                f"the {rows} devices that sequences are spread over."
            )
        layout = self.layout(batch, capacity)
        try:
            return jax.block_until_ready(caches.empty_cache(self.layers, layout, self.sharding))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            size = readable_bytes(caches.cache_bytes(caches.cache_shapes(self.layers, layout)))
            raise UserError(
                f"A cache for {batch} sequences of {capacity} tokens takes {size}, which the device has no room for; "
                "take fewer sequences at a time, fewer tokens or a smaller fold_tokens."
            ) from None

    @property
    def row_multiple(self) -> int:
        """What the number of sequences must be a multiple of."""
        return int(np.prod([self.sharding.mesh.shape[axis] for axis in self.sharding.rules.batch]))

    def prefill(
        self,
        weights: dict[str, Any],
        cache: Cache,
        tokens_BT: np.ndarray,
        counts_B: np.ndarray | None = None,
        segment_ids_BT: np.ndarray | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Runs a chunk of every sequence through the model, after what is in the cache.

        Args:
          weights: what `weights` returned.
          cache: of the same model and window.
          tokens_BT: int32, T at least 1; a sequence's own tokens are the last of its row, what is in front of them is
            ignored.
          counts_B: how many are its own, 0 to T; None: all.
          segment_ids_BT: int32, documents of the tokens, where a row packs several: sequences go on in the last. A
            document that goes on keeps its id from chunk to chunk (0 before any was named), others have their own.

        Returns:
          x_BTD, from which `logits` makes logits_BTV (those of padding mean nothing), and the cache.

        Raises:
          UserError: the cache is for another window or another batch, or too short; counts that cannot be; a token
            that the model does not have.
        """
        B, T = tokens_BT.shape
        counts_B = np.full(B, T, np.int32) if counts_B is None else np.asarray(counts_B, np.int32)
        self._check(cache, B)
        if not T:
            raise UserError(
                f"tokens_BT is {tokens_BT.shape}; give at least one token a row, with a count of 0 for none."
            )
        if counts_B.shape != (B,) or counts_B.min() < 0 or counts_B.max() > T:
            raise UserError(
                f"counts_B is {counts_B.tolist()} and the {B} rows have {T} tokens; give 0 to {T} for each row."
            )
        ids = np.asarray(tokens_BT)[np.arange(T) >= T - counts_B[:, None]]
        if unknown := ids[(ids < 0) | (ids >= self.model.vocab_size)].tolist():
            raise UserError(f"tokens_BT has id {unknown[0]}; the model has ids 0 to {self.model.vocab_size - 1}.")
        held = np.asarray(cache.clock.length_B)
        if (held + counts_B).max() > cache.layout.capacity:
            raise UserError(
                f"A prompt brings a sequence to {(held + counts_B).max()} tokens and the cache was allocated for "
                f"{cache.layout.capacity}; allocate a longer cache or cut the prompt."
            )
        # A power of two, so that few lengths are compiled.
        most = int(held.max())
        history = min(1 << (most - 1).bit_length(), cache.layout.capacity) if most else 0
        chunk = self._begin_chunk(cache.clock, counts_B, segment_ids_BT, T=T)
        x_BTD = self._embed(weights["model"], tokens_BT)
        kept = []
        for layer, w, layer_cache in zip(self.layers, weights["layers"], cache.layers, strict=True):
            # The others are compiled once for all lengths.
            slots = history if layer.kind == "full" else 0
            run = self.compiled("prefill_layer", cache.layout, layer, slots)
            x_BTD, layer_cache = run(w, layer_cache, chunk, x_BTD)
            kept.append(layer_cache)
        return x_BTD, Cache(tuple(kept), chunk.after, cache.layout)

    def logits(self, weights: dict[str, Any], x_BTD: jax.Array) -> jax.Array:
        """Returns float32 logits_BTV of what `prefill` returned, or of a slice of it."""
        return self._logits(weights["model"], x_BTD)

    def step(self, weights: dict[str, Any], cache: Cache, tokens_B: np.ndarray) -> tuple[jax.Array, Cache]:
        """Runs one given token of every sequence through the model; returns float32 logits_BV and the cache.

        The cache drops what is past its capacity: who goes on beyond it gets logits that mean nothing. Ids are not
        looked at, which may be on a device. XLA may copy a few rings here, never a full layer's cache; `sample` copies
        nothing.
        """
        self._check(cache, len(tokens_B))
        return self.compiled("step", cache.layout)(weights, cache, tokens_B)

    def sample(
        self,
        weights: dict[str, Any],
        cache: Cache,
        tokens_B: np.ndarray | jax.Array,
        keys_B: jax.Array,
        first: int,
        sampling: Sampling,
    ) -> tuple[jax.Array, Cache]:
        """Samples C tokens of every sequence on the device.

        The cache drops what is past its capacity, as in `step`.

        Args:
          weights: what `weights` returned.
          cache: as `prefill` or this function returned it, not `step`: all states must have caught up.
          tokens_B: int32, each sequence's newest token, which is not in the cache yet.
          keys_B: of each sequence's draws.
          first: how many tokens were sampled before.
          sampling: how.

        Returns:
          int32 tokens [B, C], and the cache with all but the last of them.

        Raises:
          UserError: the cache is for another window or another batch.
        """
        self._check(cache, len(tokens_B))
        run = self.compiled("sample", cache.layout, sampling)
        return run(weights, cache, tokens_B, keys_B, np.int32(first))

    def _compiled(self, what: str, layout: CacheLayout, *rest: Any) -> Any:
        """Makes a jitted function of a cache layout, in which the cache is donated and comes back as it lay.

        `compiled` keeps what this returns.

        Args:
          what: "step"; "sample", with the `Sampling`; or "prefill_layer", with the `LayerSpec` and the history's slots.
          layout: of the cache.
          *rest: as `what` says.
        """
        where = caches.cache_shardings(self.layers, layout, self.sharding)
        rows_and_cache = self.sharding.named("batch", None), where
        if what == "step":
            return jax.jit(self._step, donate_argnums=1, out_shardings=rows_and_cache)
        if what == "sample":
            run = functools.partial(
                step.sampled_steps, self.layers, self.model, self._kernels, sampling=rest[0], steps=layout.fold_tokens
            )
            options = step.compiler_options(self.layers, layout, self._kernels)
            return jax.jit(run, donate_argnums=1, out_shardings=rows_and_cache, compiler_options=options)
        layer, history = rest
        run = functools.partial(prefill.prefill_layer, layer, layout, self._operators, history)
        x_sharding = self.sharding.named("batch", None, None)
        return jax.jit(run, donate_argnums=1, out_shardings=(x_sharding, where.layers[self.layers.index(layer)]))

    def _step(self, weights: dict[str, Any], cache: Cache, tokens_B: jax.Array) -> tuple[jax.Array, Cache]:
        cache = jax.lax.cond(
            cache.clock.unfolded == cache.layout.fold_tokens,
            lambda cache: step.folded(self.layers, self._kernels, weights, cache),
            lambda cache: cache,
            cache,
        )
        rotations = ring_rotations(self.layers, cache.layout, self._kernels, weights)
        now = jax.tree.map(lambda x: x[0], moments(self.layers, cache.layout, self._kernels, cache.clock, 1))
        notes = step.first_notes(self.layers, cache.layout, self._kernels)
        given = rotations, now, weights, cache, tokens_B, notes
        logits_BV, cache, _ = step.step(self.layers, self.model, self._kernels, *given)
        return logits_BV, cache

    def _check(self, cache: Cache, batch: int) -> None:
        expected = self.layout(cache.layout.batch, cache.layout.capacity)
        for name, what in (("window", "a window"), ("fold_tokens", "fold_tokens"), ("state_dtype", "a state_dtype")):
            found, wanted = getattr(cache.layout, name), getattr(expected, name)
            if found != wanted:
                raise UserError(
                    f"The cache was allocated for {what} of {found} and this decoder has {wanted}; allocate another "
                    "cache with its empty_cache."
                )
        if batch != cache.layout.batch:
            raise UserError(
                f"There are {batch} rows of tokens and the cache was allocated for {cache.layout.batch} sequences; "
                "give one row for each."
            )


def _products_taken(asked: str, model: ConfigDict, one_hopper: bool) -> str:
    """Returns which of PRODUCTS but "auto" a decoder takes that was asked for one of them."""
    programs, there = products_persistent_plan.PROGRAMS, devices.multiprocessors()
    fitting = jnp.dtype(model.compute_dtype), layers.product_shapes(model)
    taken = asked
    if asked == "auto":
        taken = "xla" if not one_hopper else "pallas_gpu" if there < programs else "pallas_gpu_hopper"
    if taken == "pallas_gpu_hopper" and not products_persistent_plan.fits(*fitting):
        taken = "pallas_gpu"
    if taken != "xla" and not products_gpu.fits(*fitting):
        taken = "xla"
    if taken == "pallas_gpu_hopper" and there < programs:
        raise UserError(f"products={asked!r} runs on {programs} multiprocessors and there are {there}; use 'auto'.")
    return taken
