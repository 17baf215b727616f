"""Weak scaling of the training step over the GPUs of one host, and rows cut over `seq`, in one table.

    python -m scripts.bench_scaling --out scaling --set data.path=data/mine data.task=

The 3B recipe under FSDP, the same tokens for each GPU: `rattention` 512, `swa` 4096 and `full` at context 8192 on 1, 2,
4 … GPUs, as many as there are, and `rattention` 512 at context 32768 with seq = 2 on all of them. Every point is a
process of `scripts.bench_step`. All compile at once, which takes as long as the slowest, and end, for what was tuned
holds memory; then all start from what was compiled and train one after another, those on most GPUs first and those on
fewer side by side, each on GPUs of its own. Efficiency is tokens/s a GPU over that of one GPU. Bytes are what a GPU
receives in a step, by the compiled program and, in brackets, by `rattn.plan`'s count.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

MIXERS = ("rattention:512", "swa:4096", "full:")
CONTEXT, LONG_CONTEXT = 8192, 32768
COLUMNS = "{:<24} {:>4} {:>26} {:>7} {:>11} {:>9}  {}"


@dataclasses.dataclass(frozen=True)
class Point:
    """One row: a point of `scripts.bench_step` on so many GPUs."""

    point: str
    gpus: int
    seq: int = 1

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.point.replace(':', '_')}_{self.gpus}"

    def command(self, args: argparse.Namespace) -> list[str]:
        """What measures it."""
        return [
            *(sys.executable, "-m", "scripts.bench_step", "--alone", "--config", args.config, "--points", self.point),
            *("--mesh", "data=1", f"fsdp={self.gpus // self.seq}", f"seq={self.seq}"),
            *("--tokens", str(args.tokens_per_gpu * self.gpus), "--steps", str(args.steps)),
            # A row that is cut over `seq` cannot do with one exchange a step.
            *("--set", *args.set, *(["mesh.exchange=microbatch"] if self.seq > 1 else [])),
        ]


def points(gpus: int, counts: list[int] | None = None) -> list[Point]:
    """Every row, those on most GPUs first, or in the order of `counts`."""
    counts = counts or [2**i for i in reversed(range(gpus.bit_length())) if 2**i <= gpus]
    rows = [Point(f"{mixer}:{CONTEXT}", count) for count in counts for mixer in MIXERS]
    most = max(counts)
    return [Point(f"rattention:512:{LONG_CONTEXT}", most, seq=2), *rows] if most > 1 else rows


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/rattn_3b.py")
    parser.add_argument("--gpus", type=int, default=len(list(pathlib.Path("/dev").glob("nvidia[0-9]*"))))
    parser.add_argument("--counts", type=int, nargs="*", help="of GPUs, in this order; all powers of two otherwise")
    parser.add_argument("--tokens_per_gpu", type=int, default=65_536)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit_seconds", type=int, default=120, help="that a point may train, or it has failed")
    parser.add_argument("--set", nargs="*", default=[], help="config overrides, key=value, beside those of the table")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("scaling"))
    args = parser.parse_args()
    args.set = ["model.remat=save_products", "model.scan_blocks=false", "loss.chunk_tokens=0", *args.set]
    args.out.mkdir(parents=True, exist_ok=True)
    results = run(points(args.gpus, args.counts), args)
    print(table(results))
    return 0 if all("error" not in result for result in results.values()) else 1


@dataclasses.dataclass
class Started:
    """A point's process.

    Attributes:
      gpus: that it sees, and that are its own while it trains.
      began: when it was given its turn, by `time.monotonic`.
    """

    point: Point
    gpus: list[int]
    process: subprocess.Popen
    output: pathlib.Path
    began: float = 0.0

    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def is_ready(self) -> bool:
        """Whether it waits for its turn, or has ended."""
        return self.has_ended() or self.output.with_suffix(".compiled").exists()

    def begin(self) -> None:
        """Gives it its turn."""
        self.began = time.monotonic()
        self.output.with_suffix(".go").touch()

    def result(self, limit: int) -> dict | None:
        """What it measured, or why it did not; None while it trains."""
        if not self.has_ended():
            if time.monotonic() - self.began < limit:
                return None
            # Where one GPU has failed the others wait for it.
            self.process.kill()
            self.process.wait()
            return {"error": f"did not end within {limit} s; {reason(self.lines())}"}
        lines = self.lines()
        return json.loads(lines[-1]) if self.process.returncode == 0 else {"error": reason(lines)}

    def lines(self) -> list[str]:
        """What it printed."""
        return self.output.read_text().strip().splitlines() or ["no output"]


def run(rows: list[Point], args: argparse.Namespace) -> dict[Point, dict]:
    """Measures every point on GPUs of its own; writes each result to results.jsonl as it comes."""
    began, results = time.monotonic(), {}

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:4.0f} s  {what}", flush=True)

    def keep(point: Point, result: dict) -> None:
        results[point] = result
        with open(args.out / "results.jsonl", "a") as file:
            file.write(json.dumps({"gpus": point.gpus, "seq": point.seq, **result}) + "\n")
        say(f"{point.point} on {point.gpus}: {result.get('error', 'measured')}")

    def started(*, compile_only: bool) -> list[Started]:
        left = [(number, point) for number, point in enumerate(rows) if point not in results]
        return [start(number, point, args, compile_only) for number, point in left]

    say(f"{len(rows)} points compile")
    for one in started(compile_only=True):
        one.process.wait()
        if one.process.returncode:
            keep(one.point, {"error": reason(one.lines())})
    say("compiled")
    waiting, running = started(compile_only=False), []
    while not all(one.is_ready() for one in waiting):
        time.sleep(0.1)
    say("ready to train")
    while waiting or running:
        for one in list(waiting):
            if not {gpu for other in running for gpu in other.gpus} & set(one.gpus):
                waiting.remove(one)
                running.append(one)
                one.begin()
        for one in list(running):
            result = one.result(args.limit_seconds)
            if result is not None:
                running.remove(one)
                keep(one.point, result)
        time.sleep(0.1)
    return results


def start(number: int, point: Point, args: argparse.Namespace, compile_only: bool) -> Started:
    """Starts a point's process on GPUs that differ from point to point, and are in another order where it takes all."""
    first = number if point.gpus == args.gpus else number * point.gpus
    gpus = [(first + i) % args.gpus for i in range(point.gpus)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.out / "compiled"))
    # Those that wait leave the memory to those that train, all that there is.
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    output = args.out / f"{point.name}.txt"
    for suffix in (".compiled", ".go"):
        output.with_suffix(suffix).unlink(missing_ok=True)
    flags = ["--compile_only"] if compile_only else ["--turn", str(output.with_suffix(""))]
    with output.open("w") as file:
        process = subprocess.Popen(
            [*point.command(args), *flags], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    return Started(point, gpus, process, output)


def reason(lines: list[str]) -> str:
    """The line of a failed process that says most."""
    return next((line for line in reversed(lines) if "Error" in line or "RESOURCE" in line), lines[-1])[:200]


def table(results: dict[Point, dict]) -> str:
    """Formats the results, one mixer after the other, by number of GPUs."""
    alone = {point.point: result for point, result in results.items() if point.gpus == 1 and "error" not in result}
    lines = [COLUMNS.format("", "GPUs", "seconds a step", "MFU %", "efficiency", "peak GiB", "GB received (planned)")]
    for point, result in sorted(results.items(), key=lambda item: (item[0].point, item[0].gpus)):
        name = f"{point.point}{f' seq={point.seq}' if point.seq > 1 else ''}"
        if "error" in result:
            lines.append(f"{name:<24} {point.gpus:>4} failed: {result['error']}")
            continue
        seconds = result["seconds"]
        base = alone.get(point.point)
        efficiency = result["tokens_per_second"] / point.gpus / base["tokens_per_second"] if base else None
        collectives = ", ".join(
            f"{kind} {entry['bytes'] / 1e9:.1f}" for kind, entry in result.get("collectives", {}).items()
        )
        planned = sum(result.get("planned_bytes", {}).values())
        lines.append(
            COLUMNS.format(
                name,
                point.gpus,
                f"{statistics.median(seconds):.3f} ({min(seconds):.3f}–{max(seconds):.3f})",
                f"{100 * result['mfu']:.1f}" if result["mfu"] else "",
                f"{100 * efficiency:.1f} %" if efficiency else "",
                f"{result['peak_bytes'] / 2**30:.1f}",
                f"{collectives} ({planned / 1e9:.1f})" if planned else "",
            )
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
