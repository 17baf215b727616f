"""Times residual linear attention, its peers and softmax attention on one GPU, with errors against float32.

    python scripts/bench_gpu.py                      # shape S2, every peer that is installed
    python scripts/bench_gpu.py --lengths 2048 8192 32768 131072 --tokens 131072 --only pallas_gpu jax-linear

Shape S2: 32,768 tokens in rows of 8,192, N = 16, K = 4, H = 128, W = 512, bfloat16, packed documents of about 1,024. A
time is the median, with the extremes, of 5 rounds of up to 20 calls queued at once (fewer where a round would take more
than 0.2 s), so that the host's share of a call is hidden. An error is ‖x - x₃₂‖ / ‖x₃₂‖, the largest of o, dq, dk and
dv, against `chunked` in float32 on the same inputs. Peers that take no documents run, and are compared, without. Errors
of softmax attention are not computed.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.residual_linear_attention import residual_linear_attention
from kernels_pallas.residual_linear_attention.feature_map import features

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 16, 4, 128, 512
ROUND_SECONDS = 0.2


def main():
    """Prints one table for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of the rows to measure")
    args = parser.parse_args()
    device = jax.local_devices()[0]
    print(f"{device.device_kind}, JAX {jax.__version__}, {args.tokens} tokens, W = {WINDOW}")
    for length in args.lengths:
        print(f"\nT = {length}: milliseconds, median (extremes)\n{'':48}{'forward':>24}{'forward+backward':>24}  error")
        bench_length(args.tokens // length, length, args.only)


def bench_length(batch, length, only):
    """Times every candidate at one shape."""
    draws = iter(jax.random.split(jax.random.key(0), 4))
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, do = (jax.random.normal(next(draws), (batch, length, n, HEAD_DIM), jnp.bfloat16) for n in heads)
    ids = jnp.asarray(documents(batch, length))
    expected = float32_results(q, k, v, ids, do)
    for name, takes_documents, error, make in candidates():
        if not any(part in name for part in only):
            continue
        try:
            forward = make()
        except ModuleNotFoundError as e:
            print(f"{name:48}skipped: {e.name} is not installed")
            continue
        both = getattr(forward, "both", None) or with_gradients(forward)
        used_ids = ids if takes_documents else None
        try:
            times = [measure(forward, q, k, v, used_ids), measure(both, q, k, v, used_ids, do)]
        except Exception as e:  # a peer that does not take this shape must not end the table
            print(f"{name:48}failed: {str(e).splitlines()[0][:100]}")
            continue
        off = largest_error(both(q, k, v, used_ids, do), expected(takes_documents)) if error else ""
        print(f"{name:48}{times[0]:>24}{times[1]:>24}  {off}", flush=True)


def candidates():
    """Yields (name, takes documents, whether to compute the error, () -> forward(q, k, v, ids))."""
    yield "RLA pallas_gpu", True, True, functools.partial(ours, "pallas_gpu")
    yield "RLA pallas_gpu, no documents", False, True, functools.partial(ours, "pallas_gpu")
    yield "RLA by jax-linear-attention simple_gla, twice", False, True, by_simple_gla
    for window in (WINDOW, 4096, None):
        size = f"window {window}" if window else "full"
        yield f"softmax cuDNN, {size}", False, False, functools.partial(by_cudnn, window)
    for window in (WINDOW, 4096, None):
        size = f"window {window}" if window else "full"
        yield f"softmax jax-linear-attention, {size}", True, False, functools.partial(by_jla_attention, window)
        yield (
            f"softmax jax-linear-attention, {size}, no documents",
            False,
            False,
            functools.partial(by_jla_attention, window),
        )
    # Last, for they are tuned for minutes.
    yield "RLA by flash-linear-attention", False, True, by_fla
    yield "RLA chunked", True, True, functools.partial(ours, "chunked")


def ours(implementation):
    """Residual linear attention of this repository."""

    def forward(q, k, v, ids):
        return residual_linear_attention(q, k, v, window=WINDOW, q_segment_ids=ids, implementation=implementation)

    return jax.jit(forward)


def by_simple_gla():
    """One call for each half of φ, its keys and values repeated for the query heads and delayed."""
    from jla.ops.mosaic_gpu.scalar_gate import simple_gla

    @jax.jit
    def forward(q, k, v, ids):
        # No constant, for XLA would fold what the kernel makes of one for half a minute.
        gate = jax.lax.stop_gradient(q[..., 0].astype(jnp.float32) * 0.0)
        delay = ((0, 0), (WINDOW, 0), (0, 0), (0, 0))
        phi_q, phi_k = (jnp.split(features("softmax", x).astype(x.dtype), 2, axis=-1) for x in (q, k))
        phi_k = [jnp.pad(x, delay)[:, : q.shape[1]] for x in phi_k]
        v = jnp.repeat(jnp.pad(v, delay)[:, : q.shape[1]], HEADS // KV_HEADS, axis=2)
        halves = ((a, jnp.repeat(b, HEADS // KV_HEADS, axis=2)) for a, b in zip(phi_q, phi_k, strict=True))
        return sum(simple_gla(a, b, v, gate, scale=1.0)[0] for a, b in halves)

    return forward


def by_fla():
    """φ, repeats and delay in PyTorch around flash-linear-attention's chunked kernel, with state dims P = 2H."""
    import torch
    from fla.ops.linear_attn import chunk_linear_attn

    def attend(q, k, v):
        def phi(x):
            return torch.cat([torch.softmax(sign * x.float(), dim=-1) for sign in (1, -1)], dim=-1).to(x.dtype)

        def delayed(x):
            return torch.nn.functional.pad(x, (0, 0, 0, 0, WINDOW, 0))[:, : q.shape[1]]

        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (delayed(phi(k)), delayed(v)))
        return chunk_linear_attn(phi(q), k, v, scale=1.0, normalize=False)[0]

    class OnTorch:
        """Calls on JAX arrays; results come back without a copy."""

        def __call__(self, q, k, v, ids):
            with torch.no_grad():
                return TorchResults(attend(*map(torch.from_dlpack, (q, k, v))))

        def both(self, q, k, v, ids, do):
            q, k, v = (torch.from_dlpack(x).detach().requires_grad_() for x in (q, k, v))
            o = attend(q, k, v)
            return TorchResults(o.detach(), *torch.autograd.grad(o, (q, k, v), torch.from_dlpack(do)))

    class TorchResults(tuple):
        """Tensors that JAX can wait for."""

        def __new__(cls, *tensors):
            return super().__new__(cls, tensors)

        def block_until_ready(self):
            torch.cuda.synchronize()
            return self

        def __iter__(self):
            return (jax.dlpack.from_dlpack(x.contiguous()) for x in super().__iter__())

    return OnTorch()


def by_cudnn(window):
    """Causal softmax attention of cuDNN, over the last `window` keys."""
    local = None if window is None else (window - 1, 0)

    @jax.jit
    def forward(q, k, v, ids):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation="cudnn")

    return forward


def by_jla_attention(window):
    """Causal softmax attention of jax-linear-attention, over the last `window` keys of a document."""
    from jla.ops.mosaic_gpu.attention import flash_attention

    return jax.jit(lambda q, k, v, ids: flash_attention(q, k, v, segment_ids=ids, sliding_window=window))


def with_gradients(forward):
    """Returns (q, k, v, ids, do) -> (o, dq, dk, dv)."""

    @jax.jit
    def both(q, k, v, ids, do):
        o, pull = jax.vjp(lambda q, k, v: forward(q, k, v, ids), q, k, v)
        return o, *pull(do)

    return both


def measure(function, *arguments, rounds=5):
    """Returns "median (least–most)" of a call in milliseconds."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    for _ in range(2):
        out = function(*arguments)
    jax.block_until_ready(out)
    calls = int(np.clip(ROUND_SECONDS / ((time.perf_counter() - start) / 2), 1, 20))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return f"{statistics.median(times):.3f} ({min(times):.3f}–{max(times):.3f})"


def float32_results(q, k, v, ids, do):
    """Returns has_documents -> (o, dq, dk, dv) of the plain form in float32, compiled once for both."""

    q, k, v, do = (x.astype(jnp.float32) for x in (q, k, v, do))

    @functools.cache
    def compiled():
        # Tuning its products would take minutes and change no result.
        lowered = with_gradients(ours("chunked")).lower(q, k, v, ids, do)
        return lowered.compile(compiler_options={"xla_gpu_autotune_level": "0"})

    @functools.cache
    def results(has_documents):
        return compiled()(q, k, v, ids if has_documents else jnp.zeros_like(ids), do)

    return results


def largest_error(results, expected):
    """Returns the largest relative error of the results, in the Frobenius norm."""

    @jax.jit
    def relative(x, y):
        return jnp.linalg.norm((x.astype(jnp.float32) - y).ravel()) / jnp.linalg.norm(y.ravel())

    return f"{max(float(relative(x, y)) for x, y in zip(results, expected, strict=True)):.1e}"


def documents(batch, length):
    """Returns ids [B, T] of documents cut at random, 1,024 tokens long on average."""
    rng = np.random.default_rng(0)
    ids = np.zeros((batch, length), np.int32)
    for row in ids:
        cuts = np.sort(rng.choice(np.arange(1, length), max(1, length // 1024), replace=False))
        row[:] = np.searchsorted(cuts, np.arange(length), side="right")
    return ids


if __name__ == "__main__":
    main()
