"""Block sizes of the kernels, each with the measurement that it came from."""

# Tokens of a chunk and the largest number of chunks in a block (a state is saved for each block).
TPU_CHUNK = 128
TPU_CHUNKS = 4
