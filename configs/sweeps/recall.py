"""The recall study: associative recall with uniform gaps, in stacks without a global layer, on a CPU.

    python -m rattn.sweep --config configs/recall.py --sweep configs/sweeps/recall.py --workdir runs/recall

256 tokens hold 32 pairs and 32 queries whose distances spread over the whole row, so what a window misses shows in the
accuracy by distance: a stack of two window layers reaches about 2·W tokens. A second group asks for 56 pairs, where a
linear state of fixed size has more keys to tell apart. Points stand in the order of their priority. What was found:
docs/window_study.md.
"""

from rattn.sweeping.points import product

# The key alone says which value is asked for, and no pair is known from training. Rows of twice the length ask for
# twice the distances.
EVALUATION = ("--recall_context_tokens=1", "--frequent_rate=1", "--lengths=1,2")
WINDOWS = (8, 16, 32, 64)


def sweep(add):
    points = [{"mixer": "full"}, {"mixer": "linear"}, *product(window=WINDOWS, mixer=["rattention", "swa"])]
    for seed in (0, 1):
        for point in points:
            add(**point, seed=seed, group="32 pairs in 256 tokens")
    for point in points:
        add(**point, seed=0, pairs=56, group="56 pairs in 256 tokens")
