"""Which attention runs where: the functions that `rattn.sharding` hands to the model, by platform."""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from kernels_pallas import devices
from kernels_pallas.residual_linear_attention import implementation_for, residual_linear_attention
from rattn.model.remat import ATTENTION_OUTPUT
from rattn.model.softmax_attention import blockwise_attention

Attention = Callable[..., jax.Array]

LANES = 128
# Splash's block of queries and keys. On v5p at B=1, T=8192, N=16, K=4, H=128, bfloat16, millions of static bundles,
# forward + backward: window 512 takes 2.85 with blocks of 512 and 4.4 with 256; window 4096 9.9 with 512 and about 8.4
# with 1024. Between the two nothing was measured.
SPLASH_BLOCK = 512
SPLASH_WIDE_BLOCK = 1024
SPLASH_WIDE_WINDOW = 4096


def softmax_attention_for(platform: str) -> Attention:
    """Returns the softmax attention of a platform: "tpu", "gpu" or "cpu"."""
    return {"tpu": splash_attention, "gpu": gpu_attention}.get(platform, blockwise_attention)


def linear_attention_for(platform: str) -> Attention:
    """Returns the residual linear attention of a platform, which need not be the one that this process runs on."""

    def linear_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, **rest: Any) -> jax.Array:
        implementation = implementation_for(platform, q_BTNH.shape[-1])
        return residual_linear_attention(q_BTNH, k_BSKH, v_BSKH, implementation=implementation, **rest)

    return linear_attention


def gpu_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    window: int | None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Computes `blockwise_attention` with the fastest kernels that take the arguments.

    - jax-linear-attention's on a Hopper GPU, where it is installed: 16-bit floats, H of 64 or 128, documents;
    - cuDNN's: 16-bit floats, H up to 128, no documents, S = T;
    - `blockwise_attention` itself for all else.

    Arguments and result are those of `blockwise_attention`. All three count the query itself into the window.
    """
    (_, T, _, H), S = q_BTNH.shape, k_BSKH.shape[1]
    kernel = _hopper_attention()
    # The kernel knows no history: queries are padded in front, which pays while most of them are real.
    if kernel and S <= 2 * T and not kernel.supported(k_BSKH, k_BSKH, v_BSKH):
        q_BSNH = jnp.pad(q_BTNH, ((0, 0), (S - T, 0), (0, 0), (0, 0)))
        # It relies on implicit promotion.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            o_BSNH = kernel.flash_attention(
                q_BSNH, k_BSKH, v_BSKH, segment_ids=kv_segment_ids, sliding_window=window, scale=H**-0.5
            )
        return o_BSNH[:, S - T :]
    if kv_segment_ids is None and S == T and q_BTNH.dtype in (jnp.bfloat16, jnp.float16) and H <= 128 and H % 8 == 0:
        # cuDNN counts the keys before the query.
        before = None if window is None or window >= S else (window - 1, 0)
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                q_BTNH, k_BSKH, v_BSKH, is_causal=True, local_window_size=before, scale=H**-0.5, implementation="cudnn"
            )
    return blockwise_attention(
        q_BTNH, k_BSKH, v_BSKH, window=window, q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids
    )


def _hopper_attention() -> Any | None:
    """Returns jax-linear-attention's attention module where it is installed and the GPU is a Hopper."""
    if not devices.on_hopper() or importlib.util.find_spec("jla") is None:
        return None
    return importlib.import_module("jla.ops.mosaic_gpu.attention")


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    window: int | None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes `blockwise_attention` with JAX's splash attention kernels, for TPU.

    Arguments and result are those of `blockwise_attention`. T and S may have any length: they are padded to whole
    blocks with tokens of a document of their own.

    Args:
      interpret: run the kernels on a CPU, to test them.
    """
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    window = S if window is None else min(window, S)
    if kv_segment_ids is None:
        q_segment_ids, kv_segment_ids = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
    elif q_segment_ids is None:
        q_segment_ids = kv_segment_ids[:, S - T :]

    block = SPLASH_WIDE_BLOCK if window >= SPLASH_WIDE_WINDOW else SPLASH_BLOCK
    block = min(block, _round_up(T, LANES))
    T_pad = _round_up(T, block) - T
    # Every padding query needs a key at its own position, for a row that sees nothing has no softmax.
    S_pad = _round_up(S + T_pad, block) - S
    mask = _BandMask((T + T_pad, S + S_pad), offset=S - T, window=window)
    kernel = splash.make_splash_mqa_single_device(
        splash_mask.MultiHeadMask([mask] * (N // K)),
        block_sizes=_square_blocks(block),
        residual_checkpoint_name=ATTENTION_OUTPUT,
        interpret=interpret,
    )
    padding_id = jnp.iinfo(jnp.int32).max
    ids = splash.SegmentIds(
        q=jnp.pad(q_segment_ids, ((0, 0), (0, T_pad)), constant_values=padding_id),
        kv=jnp.pad(kv_segment_ids, ((0, 0), (0, S_pad)), constant_values=padding_id),
    )
    q_BNTH = _heads_first(q_BTNH * np.asarray(H**-0.5, q_BTNH.dtype), T_pad)
    k_BKSH, v_BKSH = _heads_first(k_BSKH, S_pad), _heads_first(v_BSKH, S_pad)
    q_BKGTH = q_BNTH.reshape(B, K, N // K, T + T_pad, H)
    o_BKGTH = jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))(q_BKGTH, k_BKSH, v_BKSH, ids)
    return jnp.swapaxes(o_BKGTH.reshape(B, N, T + T_pad, H), 1, 2)[:, :T]


@dataclasses.dataclass(frozen=True)
class _BandMask(splash_mask.Mask):
    """Query t stands at key position t + offset and sees the newest `window` keys up to there.

    Splash asks a mask for every block of the T × S plane and looks only whether it is empty, partial or full: the
    kernel computes what it masks from `mask_function`. JAX's own masks answer with the whole block, so that 128 k
    tokens take minutes of NumPy; this one answers with two entries that have the same any() and all().
    """

    lengths: tuple[int, int]
    offset: int
    window: int

    @property
    def shape(self) -> tuple[int, int]:
        """(T, S)."""
        return self.lengths

    @functools.cached_property
    def q_sequence(self) -> np.ndarray:
        """int32 [T], what the kernel passes to `mask_function` as the queries' indices."""
        return np.arange(self.lengths[0], dtype=np.int32)

    def mask_function(self, q_ids: jax.Array, kv_ids: jax.Array) -> jax.Array:
        """Which keys the queries see."""
        distance = q_ids + self.offset - kv_ids
        return (distance >= 0) & (distance < self.window)

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        queries, keys = block
        nearest = queries.start + self.offset - (keys.stop - 1)
        farthest = queries.stop - 1 + self.offset - keys.start
        some = farthest >= 0 and nearest < self.window
        every = nearest >= 0 and farthest < self.window
        return np.array([some, every])


def _square_blocks(block: int) -> splash.BlockSizes:
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    return splash.BlockSizes(**{f"block_{name}": block for name in names})


def _heads_first(x_BTNH: jax.Array, padding: int) -> jax.Array:
    return jnp.pad(jnp.swapaxes(x_BTNH, 1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
