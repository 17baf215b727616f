"""Weak scaling of the training step over the GPUs of one host, and rows cut over `seq`, in one table.

    python -m scripts.bench_scaling --out scaling --set data.path=data/mine data.task=

The 3B recipe under FSDP, the same tokens for each GPU: `rattention` 512, `swa` 4096 and `full` at context 8192 on 1, 2,
4 … GPUs, as many as there are, and `rattention` 512 at context 32768 with seq = 2 on all of them. Every point is a
process of `scripts.bench_step`; points that need fewer GPUs run side by side, those that need most first, and share one
folder of compiled programs. Efficiency is tokens/s a GPU over that of one GPU. Bytes are what a GPU receives in a step,
by the compiled program and, in brackets, by `rattn.plan`'s count.
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

    def command(self, args: argparse.Namespace) -> list[str]:
        """What measures it."""
        return [
            *(sys.executable, "-m", "scripts.bench_step", "--alone", "--config", args.config, "--points", self.point),
            *("--mesh", "data=1", f"fsdp={self.gpus // self.seq}", f"seq={self.seq}"),
            *("--tokens", str(args.tokens_per_gpu * self.gpus), "--steps", str(args.steps)),
            *("--set", *args.set),
        ]


def points(gpus: int) -> list[Point]:
    """Every row, those on most GPUs first."""
    counts = [2**i for i in range(gpus.bit_length()) if 2**i <= gpus]
    rows = [Point(f"{mixer}:{CONTEXT}", count) for count in reversed(counts) for mixer in MIXERS]
    return [Point(f"rattention:512:{LONG_CONTEXT}", counts[-1], seq=2), *rows] if gpus > 1 else rows


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/rattn_3b.py")
    parser.add_argument("--gpus", type=int, default=len(list(pathlib.Path("/dev").glob("nvidia[0-9]*"))))
    parser.add_argument("--tokens_per_gpu", type=int, default=65_536)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--set", nargs="*", default=[], help="config overrides, key=value, beside those of the table")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("scaling"))
    args = parser.parse_args()
    args.set = ["model.remat=save_products", "model.scan_blocks=false", "loss.chunk_tokens=0", *args.set]
    args.out.mkdir(parents=True, exist_ok=True)
    results = run(points(args.gpus), args)
    print(table(results))
    return 0 if all("error" not in result for result in results.values()) else 1


def run(waiting: list[Point], args: argparse.Namespace) -> dict[Point, dict]:
    """Measures every point on GPUs of its own; writes each result to results.jsonl as it comes."""
    free, running, results = list(range(args.gpus)), {}, {}
    waiting = list(waiting)
    while waiting or running:
        for point in [point for point in waiting if point.gpus <= len(free)]:
            if point.gpus > len(free):
                continue
            waiting.remove(point)
            taken, free = free[: point.gpus], free[point.gpus :]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, taken))}
            environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.out / "compiled"))
            output = args.out / f"{point.point.replace(':', '_')}_{point.gpus}.txt"
            with output.open("w") as file:
                process = subprocess.Popen(point.command(args), env=environment, stdout=file, stderr=subprocess.STDOUT)
            running[process] = (point, taken, output)
            print(f"{point.point} on {point.gpus}: started", flush=True)
        for process in [process for process in running if process.poll() is not None]:
            point, taken, output = running.pop(process)
            free += taken
            lines = output.read_text().strip().splitlines() or ["no output"]
            results[point] = json.loads(lines[-1]) if process.returncode == 0 else {"error": reason(lines)}
            with open(args.out / "results.jsonl", "a") as file:
                file.write(json.dumps({"gpus": point.gpus, "seq": point.seq, **results[point]}) + "\n")
            print(f"{point.point} on {point.gpus}: {results[point].get('error', 'measured')}", flush=True)
        time.sleep(0.2)
    return results


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
