"""Associative recall so small that a CPU shows the ordering.

python -m rattn.sweep --config configs/recall.py --sweep configs/sweeps/tiny_recall.py --workdir runs/tiny_recall
"""

from rattn.sweeping.points import product

EVALUATION = ("--recall_context_tokens=1", "--frequent_rate=1")
COMMON = {
    "ids": 98,
    "length": 64,
    "pairs": 8,
    "width": 64,
    "steps": 600,
    "batch_size": 32,
}


def sweep(add):
    for mixer in ("full", "linear"):
        add(mixer=mixer)
    for point in product(window=[8, 16], mixer=["rattention", "swa"]):
        add(**point)
