"""Block sizes of the Triton kernels, tuned on an H100 at shape S2 (docs/kernel_log_gpu.md)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the work of one program. A chunk is the tokens between two stored states."""

    chunk: int
    columns: int  # of the values' head dim that a state is loaded by
    sums: tuple[int, int] = (8, 1)  # warps and software pipeline stages of each kernel
    outputs: tuple[int, int] = (8, 1)
    dq: tuple[int, int] = (8, 1)
    dkv: tuple[int, int] = (8, 1)
    sums_heads: int = 1  # query heads of a tile in each kernel
    outputs_heads: int = 1
    dq_heads: int = 1
    dkv_heads: int = 1


def blocks(dtype: str, head_dim: int) -> Blocks:
    """Returns the block sizes for inputs of `dtype`, "float32" or "bfloat16", and `head_dim`.

    Float32 products run without tensor cores, fully unrolled: their blocks are small to keep compilation short.
    """
    if dtype == "float32":
        return Blocks(chunk=16, columns=min(head_dim, 32))
    if head_dim > 128:
        return Blocks(chunk=32, columns=64)
    return Blocks(
        chunk=64,
        columns=head_dim,
        sums=(4, 3),  # of q: 0.27 ms at S2
        outputs=(8, 2),  # 0.40 ms with two heads a tile, 0.51 with one
        dq=(8, 2),  # 0.48 ms with two heads a tile, 0.59 with one
        dkv=(8, 2),  # 0.69 ms
        outputs_heads=2,
        dq_heads=2,
    )
