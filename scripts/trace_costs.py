"""Where a GPU's time goes: a profiler trace's kernels, summed by kind.

python -m scripts.trace_costs runs/small/profile
"""

import collections
import gzip
import json
import pathlib
import re
import sys

# The first that matches a kernel's name; XLA's fusions are named after the operations they hold.
KINDS = {
    "collectives": r"nccl",
    "copies": r"memcpy|memset|^copy|dynamic_(update_)?slice|dynamic-(update-)?slice",
    "linear attention": r"rla_",
    "norms": r"normed_sum",
    "softmax attention": r"flash|attention|fmha|cudnn|mosaic_gpu",
    "matrix products": r"gemm|nvjet|cutlass|cublas|wgmma|sm90_|dot_|decode_product",
    "reductions": r"reduce",
    "elementwise": r"fusion|loop_|add|mul|convert|transpose|concatenate|select|scatter|gather|broadcast|iota|sort",
}


def kernel_calls(folder: pathlib.Path) -> list[tuple[str, float]]:
    """Returns name and seconds of every kernel on the first GPU of the newest trace under `folder`, in their order.

    Seconds count from the end of the kernels before on its stream: a kernel that was let in early has only waited.

    Raises:
      FileNotFoundError: there is no trace.
    """
    traces = sorted(folder.rglob("*.trace.json.gz"), key=lambda file: file.stat().st_mtime)
    if not traces:
        raise FileNotFoundError(f"There is no *.trace.json.gz under {folder}; profile a run first.")
    events = json.loads(gzip.decompress(traces[-1].read_bytes()))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    gpu = min((pid for pid, name in names.items() if "/device:GPU" in name), default=None)
    calls = []
    for event in events:
        stream = threads.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") == "X" and event["pid"] == gpu and stream.startswith("Stream"):
            calls.append((event["ts"], event["name"], event["dur"], stream))
    found, ended = [], collections.defaultdict(float)
    for start, name, micros, stream in sorted(calls):
        end = max(start + micros, ended[stream])
        found.append((name, (end - max(start, ended[stream])) * 1e-6))
        ended[stream] = end
    return found


def costs_by_kind(folder: pathlib.Path) -> dict[str, dict]:
    """Returns {kind: {"seconds", "kernels": [(name, seconds, calls)], largest first}}, largest first."""
    times = collections.defaultdict(list)
    for name, seconds in kernel_calls(folder):
        times[name].append(seconds)
    kinds = collections.defaultdict(lambda: {"seconds": 0.0, "kernels": []})
    for name, calls in times.items():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")
        kinds[kind]["seconds"] += sum(calls)
        kinds[kind]["kernels"].append((name, sum(calls), len(calls)))
    for entry in kinds.values():
        entry["kernels"].sort(key=lambda kernel: -kernel[1])
    return dict(sorted(kinds.items(), key=lambda item: -item[1]["seconds"]))


def costs_table(kinds: dict[str, dict], kernels: int = 8) -> str:
    """Formats `costs_by_kind`, with the largest kernels of each kind."""
    total = sum(entry["seconds"] for entry in kinds.values())
    lines = [f"  kernels in all {total:.3f} s"]
    for kind, entry in kinds.items():
        lines.append(f"  {kind:<20} {entry['seconds']:8.3f} s {100 * entry['seconds'] / total:5.1f} %")
        for name, seconds, calls in entry["kernels"][:kernels]:
            lines.append(f"      {seconds:8.4f} s {calls:6d} × {name[:100]}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(costs_table(costs_by_kind(pathlib.Path(sys.argv[1]))))
