"""Block sizes of the kernels, each with the measurement that it came from.

TPU: millions of static bundles, forward + backward, at S1 (B=1, T=8192, N=16, K=4, H=128, W=512, bfloat16, segment ids,
v5p) by `scripts/bench_tpu_static.py --search`; docs/kernel_log.md holds the search.
"""

# Tokens of a chunk: a score tile that fills a 128 x 128 matrix unit. 256 takes 1.3 times the bundles.
TPU_CHUNK = 128
# Most chunks of a block. The forward saves one state a block, the backward recomputes those between: 4 costs 17 MB of
# HBM traffic where 1 costs 67 MB, and the longer code without a branch overlaps better.
TPU_CHUNKS = 4
# Most products of key/value heads, group and chunks in one grid step. All are unrolled: two key/value heads a step save
# 11 % of the bundles of one; more leaves no parallel grid dim for the second core and compiles for minutes.
TPU_UNITS = 32
# VMEM that a grid step may take; v5p and tpu7x have 64 MiB, v5e and v6e 128 MiB.
TPU_VMEM_BYTES = 48 * 2**20
