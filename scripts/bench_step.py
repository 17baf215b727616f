"""Times whole training steps, through the real input pipeline, for several mixers and contexts in one run.

    python -m scripts.bench_step --config configs/rattn_3b.py --points full::8192 swa:4096:8192 rattention:512:8192
    python -m scripts.bench_step --config configs/small.py --points full::4096 full::131072 --microbatch_tokens 131072

A point is mixer:window:context. Every point runs in a process of its own, so that its peak memory is its own and one
that does not fit does not end the table. A step's time is from one step's metrics to the next one's, as the training
loop fetches them: median (extremes) after two steps of warm-up. MFU counts the model FLOPs of the documents' own keys.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from rattn import accounting, multihost, platform
from rattn.config import load_config, override, validate
from rattn.data.batches import open_data, prefetched
from rattn.errors import UserError
from rattn.model.parameters import ModelSpec, initial_parameters, model_spec
from rattn.optimizer import learning_rate_schedule, make_optimizer
from rattn.planning.collectives import by_kind, find_collectives
from rattn.planning.roofline import network_bytes
from rattn.sharding import Sharding, make_mesh
from rattn.step import batch_shapes, make_train_step
from rattn.train import state_layout
from scripts.trace_costs import costs_by_kind, costs_table

WARMUP_STEPS = 2
COLUMNS = "{:<24} {:>10} {:>26} {:>11} {:>7} {:>10} {:>9}"


def main() -> int:
    """Prints one row for each point."""
    parser = point_arguments(__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--profile", action="store_true", help="add a table of the last step's kernels by kind")
    parser.add_argument("--out", type=pathlib.Path, help="folder for results.jsonl and profiles")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile_only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args, args.points[0])))
        return 0
    print(COLUMNS.format("", "tokens/s", "seconds a step", "TFLOP/s", "MFU %", "peak GiB", "compile s"), flush=True)
    for point in args.points:
        row(args, point)
    return 0


def point_arguments(description: str) -> argparse.ArgumentParser:
    """Returns a parser of what `lower_step` reads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument(
        "--points", nargs="+", required=True, help="mixer:window:context; an empty window: the recipe's"
    )
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens a step, over all devices")
    parser.add_argument("--microbatch_tokens", type=int, default=16_384, help="tokens that a device holds at a time")
    parser.add_argument("--set", nargs="*", default=[], help="config overrides, key=value")
    parser.add_argument("--mesh", nargs="*", default=["data=1", "fsdp=-1"])
    return parser


def row(args: argparse.Namespace, point: str) -> None:
    """Measures a point in a fresh process and prints it."""
    command = [sys.executable, "-m", "scripts.bench_step", *sys.argv[1:], "--alone", "--points", point]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "Error" in line or "RESOURCE" in line), lines[-1])
        print(f"{point:<24} failed: {reason[:300]}", flush=True)
        return
    *tables, last = done.stdout.strip().splitlines()
    result = json.loads(last)
    seconds = result["seconds"]
    spread = f"{statistics.median(seconds):.3f} ({min(seconds):.3f}–{max(seconds):.3f})"
    print(
        COLUMNS.format(
            point,
            f"{result['tokens_per_second']:,.0f}",
            spread,
            f"{result['flops_per_second'] / 1e12:.0f}",
            f"{100 * result['mfu']:.1f}" if result["mfu"] else "",
            f"{result['peak_bytes'] / 2**30:.1f}",
            f"{result['compile_seconds']:.0f}",
        ),
        *tables,
        sep="\n",
        flush=True,
    )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with open(args.out / "results.jsonl", "a") as file:
            file.write(json.dumps(result | {"arguments": sys.argv[1:]}) + "\n")


@dataclasses.dataclass(frozen=True)
class Step:
    """A point's training step, lowered for the devices of its mesh.

    Attributes:
      shardings: of the state, which the step donates.
      lowered: takes the state and a batch.
    """

    config: ConfigDict
    sharding: Sharding
    spec: ModelSpec
    optimizer: optax.GradientTransformation
    shardings: dict
    lowered: jax.stages.Lowered


def lower_step(args: argparse.Namespace, point: str, devices: list[jax.Device] | None = None) -> Step:
    """Lowers the training step of a point for all devices, or for those given, which need not be there."""
    config = point_config(args, point)
    config.mesh.update({axis: int(size) for axis, _, size in (item.partition("=") for item in args.mesh)})
    sharding = Sharding(make_mesh(config.mesh, devices))
    config.accumulation_steps = max(1, args.tokens // (args.microbatch_tokens * sharding.mesh.size))
    validate(config)
    sharding.check_batch(config)
    spec = model_spec(config.model, sharding.operators())
    optimizer = make_optimizer(config.optimizer, config.total_steps, spec.logical)
    shapes, shardings = state_layout(spec, optimizer, sharding)
    state = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)
    schedule = learning_rate_schedule(config.optimizer, config.total_steps)
    jitted = jax.jit(
        make_train_step(config, spec, optimizer, schedule, sharding),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated),
    )
    lowered = jitted.lower(state, batch_shapes(config, sharding.batch))
    return Step(config, sharding, spec, optimizer, shardings, lowered)


def measure(args: argparse.Namespace, point: str) -> dict:
    """Trains a few steps of one point; returns what `row` prints."""
    platform.configure()
    started = time.monotonic()
    built = lower_step(args, point)
    step, make_state = built.lowered.compile(), first_state(built).lower().compile()
    compile_seconds = time.monotonic() - started
    if args.compile_only:
        return {"point": point, "compile_seconds": compile_seconds}
    config, sharding, spec = built.config, built.sharding, built.spec
    split = multihost.BatchSplit(sharding.batch)
    data = open_data(
        config.data,
        context_length=config.context_length,
        batch_size=config.batch_size,
        seed=config.seed,
        local_rows=split.rows,
    )
    if args.turn:
        await_turn(args.turn)
    state = made_beside(step, make_state)
    batches = prefetched(data.train, 0, read_threads=2, prefetch_batches=4)
    folder = (args.out or pathlib.Path("/tmp")) / f"profile_{point.replace(':', '_')}"
    times, flops, pending = [], [], None
    for number in range(args.steps + WARMUP_STEPS + args.profile):
        if args.profile and number == args.steps + WARMUP_STEPS:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(folder))
        state, metrics = step(state, split.to_devices(next(batches), config.batch_size))
        if pending:
            times.append(look(pending, config, spec, flops))
        pending = metrics
    look(pending, config, spec, flops)
    batches.close()
    if args.profile:
        jax.profiler.stop_trace()
        costs = costs_by_kind(folder)
        print(costs_table(costs))
        folder.with_suffix(".txt").write_text(costs_table(costs, kernels=1000) + "\n")
    seconds = np.diff(times[WARMUP_STEPS - 1 : WARMUP_STEPS + args.steps]).tolist()
    per_second = config.batch_size * config.context_length / statistics.median(seconds)
    rate = statistics.mean(flops) * per_second
    device = jax.local_devices()[0]
    peak = accounting.peak_flops(device)
    traffic = {}
    if sharding.mesh.size > 1:
        traffic = network_traffic(built, step)
    return traffic | {
        "point": point,
        "device": f"{jax.device_count()} × {device.device_kind}",
        "jax": jax.__version__,
        "seconds": seconds,
        "tokens_per_second": per_second,
        "flops_per_second": rate,
        "mfu": rate / (peak * jax.device_count()) if peak else None,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
        "compile_seconds": compile_seconds,
        "accumulation_steps": config.accumulation_steps,
        "remat": config.model.remat,
    }


def await_turn(turn: pathlib.Path) -> None:
    """Says that all is compiled, by a file `turn`.compiled, and waits for the GPUs: for a file `turn`.go."""
    turn.with_name(f"{turn.name}.compiled").touch()
    while not turn.with_name(f"{turn.name}.go").exists():
        time.sleep(0.1)


def made_beside(step: jax.stages.Compiled, make_state: jax.stages.Compiled) -> dict:
    """Makes the state while the step's temporary memory, one piece, is held on every device.

    Where the allocator grows as needed, the state would be spread over twice its memory and leave no such piece.
    """
    mebibytes = -(-step.memory_analysis().temp_size_in_bytes // 2**20)
    held = []
    for device in jax.local_devices():
        with jax.default_device(device):
            held.append(jnp.zeros((mebibytes, 2**20), jnp.uint8))
    return jax.block_until_ready(make_state())


def first_state(built: Step) -> jax.stages.Wrapped:
    """Returns a jitted function without arguments, which makes the state before the first step."""

    def make():
        parameters = initial_parameters(built.config.model, built.config.seed)
        step = jnp.zeros((), jnp.int32)
        return {"parameters": parameters, "optimizer": built.optimizer.init(parameters), "step": step}

    return jax.jit(make, out_shardings=built.shardings)


def network_traffic(built: Step, step: jax.stages.Compiled) -> dict[str, dict]:
    """Returns the bytes that a device receives in a step: "collectives" by kind, "planned_bytes" by `rattn.plan`."""
    return {
        "collectives": by_kind(find_collectives(step.as_text())),
        "planned_bytes": network_bytes(built.config, built.spec, dict(built.sharding.mesh.shape), slices=1),
    }


def look(metrics: dict, config, spec, flops: list[float]) -> float:
    """Fetches a step's metrics, as the training loop does; returns the moment they came."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not values["finite"]:
        raise UserError(f"A step had loss {values['loss']}; its time means nothing.")
    keys = accounting.KeysSeen(full=values["keys_full"], window=values["keys_window"])
    flops.append(accounting.training_flops_per_token(config.model, spec, keys))
    return time.monotonic()


def point_config(args: argparse.Namespace, point: str):
    """Returns the recipe at a point, on synthetic packed documents unless --set says otherwise."""
    mixer, window, context = point.split(":")
    arguments = [f"mixer={mixer}", f"context={context}", *([f"window={window}"] if window else [])]
    config = load_config(args.config, ",".join(arguments))
    config.data.update(source="synthetic", vocabulary=f"ids:{config.model.vocab_size}")
    config.batch_size = config.evaluation.batch_size = args.tokens // config.context_length
    config.optimizer.warmup_steps = 0
    config.total_steps = 1000
    return override(config, [f"--config.{setting}" for setting in args.set])


if __name__ == "__main__":
    sys.exit(main())
