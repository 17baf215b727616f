"""A window sweep that a laptop finishes in a few minutes: short runs of the tiny model, report included.

    python -m rattn.sweep --config configs/tiny.py --sweep configs/sweeps/tiny_window.py --workdir runs/tiny_window

It shows the machinery. 100 steps (0.2 M bytes) say nothing about windows: the models have hardly learned to spell.
"""

COMMON = {
    "total_steps": 100,
    "optimizer.warmup_steps": 20,
    "checkpoint.every_steps": 100,
    # rattn.evaluate measures the finished model anyway.
    "evaluation.final_max_batches": 1,
}
# Tokens are bytes here, so two of them before a third recall nothing.
EVALUATION = ("--lengths=1,2", "--max_tokens=65536", "--recall_context_tokens=6")


def sweep(add):
    for seed in (0, 1):
        add(mixer="full", seed=seed)
    for window in (16, 64):
        add(mixer="rattention", window=window, seed=0)
    add(mixer="swa", window=16, seed=0)
