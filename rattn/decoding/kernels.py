"""Which kernels decoding runs."""

import dataclasses

from rattn.decoding import products_gpu, products_persistent_plan


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Which kernels a step runs.

    Attributes:
      attention: "xla"; "pallas_gpu", `rattn.decoding.attention_gpu` in layers that it fits; or "pallas_gpu_hopper",
        with `attention_ring_gpu` and `attention_stream_gpu` in those that these fit.
      products: "xla"; "pallas_gpu", `rattn.decoding.products_gpu` for up to its MOST_ROWS rows; or "pallas_gpu_hopper",
        with `products_persistent_gpu` from LEAST_ROWS to MOST_ROWS of its plan. The weights lie for both of these
        kernels, or for "xla".
      interpret: run Triton's kernels on a CPU, to test them.
    """

    attention: str
    products: str
    interpret: bool = False

    def products_for(self, rows: int) -> str:
        """Returns what takes the products of so many rows: "persistent", "triton" or "xla"."""
        plan = products_persistent_plan
        if self.products == "pallas_gpu_hopper" and plan.LEAST_ROWS <= rows <= plan.MOST_ROWS:
            return "persistent"
        return "triton" if self.products != "xla" and rows <= products_gpu.MOST_ROWS else "xla"
