"""Stands in for rattn.train and rattn.evaluate in tests of sweeps: `python fake_point.py LOG python -m rattn.train …`.

"Training" takes no time and leaves config.json (copied from what LOG.configs, a JSON file, holds under the folder's
name), metrics.jsonl and an empty checkpoint; "evaluation" makes up losses that fall with the window. Each call appends
a line to LOG. The environment's FAKE_POINT, "stage:pattern:what", makes a
stage of the points whose folder has the pattern fail with a sentence ("fail"), ask to be started again ("restart"), or
save what it is to keep, and half of its steps when it is told to end ("wait").
"""

import itertools
import json
import math
import os
import pathlib
import signal
import sys
import time


def train(log, arguments, fault):
    folder = pathlib.Path(arguments[arguments.index("--workdir") + 1])
    config = json.loads(pathlib.Path(f"{log}.configs").read_text())[folder.name]
    (folder / "config.json").write_text(json.dumps(config))
    held = [int(path.name) for path in (folder / "checkpoints").glob("*")]
    last, total = max(held, default=0), config["total_steps"]

    def save(step):
        line = {"step": step, "loss": 5.0 - step / total, "tokens_per_second": 1000.0}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        (folder / "checkpoints" / str(step)).mkdir(parents=True)

    if fault == "nan":
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1, "loss": null, "tokens_per_second": 1000.0}\n')
        time.sleep(0.5)  # For the sweep to see it.
    if fault == "fail":
        sys.exit("rattn: The fake has no heart; give it one.")
    if fault == "restart":
        save(last + 1)
        return 75
    if fault == "wait" and not last:
        kept = config["checkpoint"]["keep_steps"]
        signal.signal(signal.SIGTERM, lambda *_: (save(max([total // 2, *(step + 1 for step in kept)])), os._exit(75)))
        for step in kept:
            save(step)
        (folder / "waiting").touch()
        time.sleep(60)
    for step in (*config["checkpoint"]["keep_steps"], total):
        if step > last:
            save(step)
    return 0


def evaluate(log, arguments, fault):
    folder = pathlib.Path(arguments[arguments.index("--checkpoint") + 1])
    if fault == "fail":
        raise RuntimeError("no sentence")
    config = json.loads((folder / "config.json").read_text())
    pathlib.Path(arguments[arguments.index("--out") + 1]).write_text(json.dumps(made_up(config)))
    return 0


def made_up(config, lengths=(1, 2)):
    """An evaluation in the form of `rattn.evaluation.results`, from a resolved config."""
    model, T, seed = config["model"], config["context_length"], config["seed"]
    mixer = next((name for name in model["pattern"] if name != "full"), "full")
    window = model["window"] if mixer in ("rattention", "swa") else None
    reach = {"full": T, "linear": 1, "rattention": 4 * (window or 0), "swa": 2 * (window or 0)}[mixer]
    wobble = 0.004 * math.sin(12.9 * seed + reach)

    def bins(lasts, loss):
        firsts = [1, *(last + 1 for last in lasts[:-1])]
        return [
            {
                "first": first,
                "last": last,
                "targets": 100 * (last - first + 1),
                "nats_per_token": loss((first + last) / 2),
                "accuracy": math.exp(-loss((first + last) / 2)),
            }
            for first, last in zip(firsts, lasts, strict=True)
        ]

    def entry(length):
        rows = T * length
        powers = [2**i for i in range((rows - 1).bit_length() + 1)]
        loss = 2 + 0.3 * math.exp(-reach / 60) + 0.02 * (length - 1) * (mixer == "full") + wobble
        return {
            "window": window,
            "length": length,
            "context_length": rows,
            "cache_bytes": {"full": rows * 64, "window": (window or 0) * 192, "state": 4096 * (mixer != "full")},
            "targets": 40_000,
            "text_bytes": 100_000,
            "nats_per_token": loss,
            "accuracy": 0.5,
            "bits_per_byte": loss / math.log(2) * 0.4,
            "by_context_tokens": bins(powers, lambda place: loss + 1 / place),
            "by_row_position": bins([rows * (i + 1) // 16 for i in range(16)], lambda place: loss + 0.1 / place),
            "recall": {"targets": 5000, "nats_per_token": loss - 0.5, "accuracy": 0.7},
            "recall_by_distance": bins(powers, lambda d: 0.3 + 0.8 / (1 + math.exp(2 * math.log2(reach / d))) + wobble),
        }

    speed = {"tokens_per_second": 5e5 * (1 - 0.1 * (mixer == "full")), "step_seconds": 0.1 + 1e-4 * (window or 300)}
    return {
        "format": 1,
        "workdir": "fake",
        "step": config["total_steps"],
        "device": "fake",
        "devices": 1,
        "config": config,
        "data_fingerprint": "0" * 64,
        "parameters": 20_000_000,
        "parameters_by_part": {},
        "tokens_seen": config["total_steps"] * config["batch_size"] * T,
        "epochs": 1.5,
        "training": speed | {"mfu": 0.4, "lines": 10, "by_window": {}},
        "measured": [entry(length) for length in lengths],
    }


def main():
    log, _, _, module, *arguments = sys.argv[1:]
    stage = module.removeprefix("rattn.")
    folder = next(a for b, a in itertools.pairwise(arguments) if b in ("--workdir", "--checkpoint"))
    with open(log, "a") as file:
        file.write(f"{stage} {pathlib.Path(folder).name}\n")
    at, pattern, fault = os.environ.get("FAKE_POINT", "::").split(":")
    fault = fault if at == stage and pattern in pathlib.Path(folder).name else ""
    sys.exit({"train": train, "evaluate": evaluate}[stage](log, arguments, fault))


if __name__ == "__main__":
    main()
