"""The window study: 20 M parameters on Python source, two budgets, one GPU.

    python -m rattn.sweep --config configs/small.py --sweep configs/sweeps/window.py --workdir runs/window

The schedule is warm-up, constant, linear decay over the last fifth. A 50 M-token point keeps the checkpoint at which
its decay begins, and the 200 M-token point of the same model goes on from there: one trunk, two budgets. Points stand
in the order of their priority. How it is run on leased GPUs, and what was found: docs/window_study.md.
"""

from rattn.sweeping.points import product

STEP_TOKENS = 32 * 2048
SMALL_STEPS, LARGE_STEPS = round(50e6 / STEP_TOKENS), round(200e6 / STEP_TOKENS)
SMALL_DECAY, LARGE_DECAY = SMALL_STEPS // 5, LARGE_STEPS // 5
BRANCH_STEP = SMALL_STEPS - SMALL_DECAY
RATTENTION, SWA = (32, 64, 128, 256, 512, 1024), (64, 256, 1024)

COMMON = {
    "optimizer.schedule": "wsd",
    "checkpoint.every_steps": 1000,
    "checkpoint.keep": 1,
    "evaluation.every_steps": 1000,
}
EVALUATION = ("--lengths=1,2,4,8",)


def sweep(add):
    every = [{"mixer": "full"}, {"mixer": "linear"}]
    every += [*product(mixer=["rattention"], window=RATTENTION), *product(mixer=["swa"], window=SWA)]
    # The verdict rests on full attention and on the windows around the smallest one that equals it.
    decisive = [point for point in every if point["mixer"] == "full" or point.get("window", 0) >= 128]
    seeds = [*((point, 0) for point in every), *((point, 1) for point in decisive), ({"mixer": "full"}, 2)]
    trunks = []
    for point, seed in seeds:
        config = {"total_steps": SMALL_STEPS, "optimizer.decay_steps": SMALL_DECAY}
        config["checkpoint.keep_steps"] = (BRANCH_STEP,)
        name = "-".join([*(str(value) for value in point.values()), f"seed{seed}"])
        trunks.append(add(config, name=f"50M-{name}", group="50 M tokens", **point, seed=seed))
    for (point, seed), trunk in zip(seeds, trunks, strict=True):
        config = {"total_steps": LARGE_STEPS, "optimizer.decay_steps": LARGE_DECAY, "init_from_step": BRANCH_STEP}
        name = trunk.replace("50M", "200M")
        add(config, name=name, group="200 M tokens", init_from=trunk, **point, seed=seed)
