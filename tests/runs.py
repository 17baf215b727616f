"""Runs of the miniature through the public command."""

import json
import os
import random
import subprocess
import sys
import time

import jax

STEPS = 100


def start(workdir, stream_folder, *arguments, devices=1):
    """Starts `python -m rattn.train` on the miniature, warnings being errors, as a user would."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "rattn.train",
        "--config",
        f"tests/recipes/miniature.py:steps={STEPS}",
    ]
    command += ["--workdir", str(workdir), f"--config.data.path={stream_folder}", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def lines(workdir):
    """{(step, kind of line): values} of metrics.jsonl, without the times."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        key = (values["step"], "eval" if "eval/loss" in values else "train")
        assert key not in found, f"{key} is there twice"
        found[key] = {k: v for k, v in values.items() if k not in ("tokens_per_second", "data_wait_fraction")}
    return found


def interrupt(process, workdir, first, last, number, also=None):
    """Sends a signal at a random step between `first` and `last`; returns the step it was seen at.

    `also` is another process to send it to, as a scheduler does.
    """
    wanted = random.SystemRandom().randint(first, last)
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        step = len(path.read_text().splitlines()) if path.exists() else 0
        if step >= wanted:
            process.send_signal(number)
            if also:
                also.send_signal(number)
            return step
        time.sleep(0.002)
    raise AssertionError(f"the run ended before step {wanted}: {process.communicate()}")
