"""Runs of the miniature through the public command."""

import json
import os
import random
import subprocess
import sys
import time

import jax
import numpy as np

from rattn.checkpoint import Checkpoints
from rattn.model.parameters import model_spec
from rattn.optimizer import make_optimizer

STEPS = 100


def start(workdir, stream_folder, *arguments, devices=1):
    """Starts `python -m rattn.train` on the miniature, warnings being errors, as a user would."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        # These runs compile much and compute little.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    data = f"--config.data.path={stream_folder}"
    return _start(environment, ["-W", "error"], ["--workdir", str(workdir), data, *arguments])


def start_on_gpu(workdir, *arguments):
    """Starts the miniature on a GPU that the test's own process uses too, on synthetic documents."""
    environment = {"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return _start(environment, [], ["--workdir", str(workdir), "--config.data.source=synthetic", *arguments])


def _start(environment, python_options, arguments):
    recipe = f"tests/recipes/miniature.py:steps={STEPS}"
    command = [sys.executable, *python_options, "-m", "rattn.train", "--config", recipe, *arguments]
    environment = os.environ | environment
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def lines(workdir):
    """{(step, kind of line): values} of metrics.jsonl, without the times."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        kinds = {"eval/loss": "eval", "branches/loss": "branches"}
        key = (values["step"], next((kind for name, kind in kinds.items() if name in values), "train"))
        assert key not in found, f"{key} is there twice"
        times = ("tokens_per_second", "mfu", "data_wait_fraction")
        found[key] = {name: value for name, value in values.items() if not name.endswith(times)}
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


def final_state(workdir, config):
    """The arrays of the checkpoint of a run's last step, with their paths."""
    spec = model_spec(config.model)
    shapes = {"parameters": spec.shapes, "step": jax.ShapeDtypeStruct((), np.int32)}
    optimizer = make_optimizer(config.optimizer, config.total_steps, spec.logical)
    shapes["optimizer"] = jax.eval_shape(optimizer.init, spec.shapes)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        assert checkpoints.latest_step() == config.total_steps
        return jax.tree_util.tree_leaves_with_path(checkpoints.restore(config.total_steps, target))
    finally:
        checkpoints.close()


def assert_same_state(workdir, other, config, note=""):
    """The last states of two finished runs of `config` are equal bit for bit."""
    ours, theirs = final_state(workdir, config), final_state(other, config)
    for (path, leaf), (_, wanted) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted), err_msg=f"{path}, {note}")
