"""The window study: 20 M parameters on Python source, two budgets, one GPU.

    python -m rattn.sweep --config configs/small.py --sweep configs/sweeps/window.py --workdir runs/window

The schedule is warm-up, constant, linear decay over the last fifth. A 50 M-token point keeps the checkpoint at which
its decay begins, and the 200 M-token point of the same model goes on from there: one trunk, two budgets. Points stand
in the order of their priority, in tiers that each bring an answer, both budgets of it. How it is run on leased GPUs,
and what was found: docs/window_study.md.
"""

from rattn.sweeping.points import product

STEP_TOKENS = 32 * 2048
SMALL_STEPS, LARGE_STEPS = round(50e6 / STEP_TOKENS), round(200e6 / STEP_TOKENS)
SMALL_DECAY, LARGE_DECAY = SMALL_STEPS // 5, LARGE_STEPS // 5
BRANCH_STEP = SMALL_STEPS - SMALL_DECAY
TIERS = (
    # Ends and middle of each curve, beside two seeds of full attention.
    (
        *product(mixer=["full"], seed=[0, 1]),
        *product(mixer=["rattention"], window=[64, 256], seed=[0]),
        *product(mixer=["swa"], window=[64, 256, 1024], seed=[0]),
        *product(mixer=["linear"], seed=[0]),
    ),
    # The rest of the curve.
    tuple(product(mixer=["rattention"], window=[32, 128, 512, 1024], seed=[0])),
    # Second seeds of the smallest windows that equalled full attention, and a third of full attention, the scale.
    (
        {"mixer": "full", "seed": 2},
        {"mixer": "swa", "window": 64, "seed": 1},
        {"mixer": "rattention", "window": 32, "seed": 1},
    ),
    # Below the smallest: where does it end?
    tuple(product(mixer=["rattention", "swa"], window=[8], seed=[0])),
    # Second seeds of the rest.
    (
        *product(mixer=["swa"], window=[256, 1024], seed=[1]),
        *product(mixer=["rattention"], window=[64, 128, 256, 512, 1024], seed=[1]),
    ),
)

COMMON = {
    "optimizer.schedule": "wsd",
    "checkpoint.every_steps": 1000,
    "checkpoint.keep": 1,
    "evaluation.every_steps": 1000,
}
EVALUATION = ("--lengths=1,2,4,8",)


def sweep(add):
    for models in TIERS:
        trunks = [small_budget(add, model) for model in models]
        for trunk, model in zip(trunks, models, strict=True):
            _large_budget(add, trunk, model)


def small_budget(add, model):
    """Adds the point of a model at 50 M tokens, which keeps the checkpoint that the large budget goes on from."""
    config = {"total_steps": SMALL_STEPS, "optimizer.decay_steps": SMALL_DECAY, "checkpoint.keep_steps": (BRANCH_STEP,)}
    name = "-".join([*(str(value) for key, value in model.items() if key != "seed"), f"seed{model['seed']}"])
    return add(config, name=f"50M-{name}", group="50 M tokens", **model)


def _large_budget(add, trunk, model):
    config = {"total_steps": LARGE_STEPS, "optimizer.decay_steps": LARGE_DECAY, "init_from_step": BRANCH_STEP}
    add(config, name=trunk.replace("50M", "200M"), group="200 M tokens", init_from=trunk, **model)
