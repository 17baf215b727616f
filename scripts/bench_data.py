"""Tokens a second of the data path alone, on one core: reading, cutting into rows and masking, without a model.

python scripts/bench_data.py --path data/state_of_the_union
"""

import argparse
import os
import statistics
import sys
import time

CORE = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {CORE})

from rattn.data.batches import TrainBatches, prefetched  # noqa: E402 - the libraries' threads inherit the one core
from rattn.data.stream import Prepared  # noqa: E402
from rattn.errors import UserError  # noqa: E402

SHAPES = ((8, 512), (64, 512), (8, 2048), (8, 8192), (2, 32768))
REPEATS = 7
TOKENS_PER_REPEAT = 2_000_000


def main() -> int:
    """Prints a table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="data/state_of_the_union", help="a folder that rattn.prepare wrote")
    try:
        prepared = Prepared(parser.parse_args().path)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"M tokens/s on core {CORE}: median (lowest to highest) of {REPEATS} runs of {TOKENS_PER_REPEAT:,} tokens")
    print(f"{'rows B':>7} {'length T':>8}   {'batches[step]':>24}   {'prefetched (2 threads)':>24}")
    for batch_size, context_length in SHAPES:
        batches = TrainBatches(
            prepared.streams("train"),
            prepared.names,
            prepared.weights,
            context_length=context_length,
            batch_size=batch_size,
            seed=0,
        )
        steps = TOKENS_PER_REPEAT // (batch_size * context_length)
        tokens = steps * batch_size * context_length
        direct = [tokens / _seconds_direct(batches, r * steps, steps) for r in range(REPEATS)]
        ahead = [tokens / _seconds_prefetched(batches, r * steps, steps) for r in range(REPEATS)]
        print(f"{batch_size:>7} {context_length:>8}   {_spread(direct):>24}   {_spread(ahead):>24}")
    return 0


def _seconds_direct(batches: TrainBatches, first: int, steps: int) -> float:
    began = time.perf_counter()
    for step in range(first, first + steps):
        batches[step]
    return time.perf_counter() - began


def _seconds_prefetched(batches: TrainBatches, first: int, steps: int) -> float:
    iterator = prefetched(batches, first, read_threads=2, prefetch_batches=8)
    began = time.perf_counter()
    for _ in range(steps):
        next(iterator)
    seconds = time.perf_counter() - began
    iterator.close()
    return seconds


def _spread(values: list[float]) -> str:
    low, middle, high = (value / 1e6 for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    sys.exit(main())
