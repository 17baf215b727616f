"""The figures of docs/window_study.md that the sweep's report does not print.

    python -m scripts.window_numbers runs/window
    python -m scripts.window_numbers runs/recall --distances
    python -m scripts.window_numbers runs/window --contexts

Needs each run's metrics.jsonl under runs/window/points. A line for every run, beside full attention of the same seed:

- recall, rest: loss on recall tokens and on all others; below, the correlation of loss and recall loss over the runs;
- inside, beyond: accuracy on recall tokens in the last bin of distances within the window and in the first beyond it,
  full attention's in the same bins in brackets;
- trained: the training loss of the last fifth of the steps less full attention's on the same batches;
- step: the first at which the training loss has been 0.7 nats below linear's on the same batches, over 50 steps.

Under it a line for every points/NAME-unevaluated (and -unevaluated-2, …), the log of a training of point NAME that no
result came of: the loss that its training measured at the end, less that of NAME's result, and less full attention's of
the same seed; then, for each budget, the sample standard deviation of a point's loss when it is trained again with one
seed, pooled over the points.

With --distances accuracy on recall tokens alone, by the first distance of each bin, in rows of the shortest and of the
longest length that was evaluated. With --contexts likewise the loss by tokens of the document before the target.
"""

import argparse
import pathlib
from collections.abc import Mapping
from statistics import correlation, fmean, variance

from rattn.planning.report import table
from rattn.sweeping.results import Results, last_metrics, training_losses
from rattn.sweeping.summary import Group, Run, grouped, loss, recall_loss

UNEVALUATED = "-unevaluated"
BELOW_LINEAR = 0.7
LINES = 5  # Of metrics.jsonl, ten steps each.


def main() -> None:
    """Prints a table for each group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--distances", action="store_true", help="accuracy by distance, instead")
    parser.add_argument("--contexts", action="store_true", help="loss by tokens of context, instead")
    args = parser.parse_args()
    results = Results(args.workdir)
    asked = [lay for lay, wanted in ((by_distance, args.distances), (by_context, args.contexts)) if wanted]
    if asked:
        print("\n".join(lay(group) for group in grouped(results.all()) for lay in asked))
        return
    for group in grouped(results.all()):
        curves = {run.identity: training_losses(results.point_folder(run.result["name"])) for run in group.runs}
        print(f"{group.name}\n{'':28}recall    rest  inside         beyond         trained  step")
        for run in group.runs:
            print(_line(group, run, curves))
        learned = [run for run in group.runs if run.mixer != "linear"]
        both = correlation([loss(run) for run in learned], [recall_loss(run) for run in learned])
        print(f"loss and recall loss of all but linear: correlation {both:.3f}\n")
    print(unevaluated(results))


def by_distance(group: Group) -> str:
    """Lays accuracy by distance out, a table for the shortest rows and one for the longest."""
    return _by_bin(group, "recall_by_distance", "accuracy", "distance from")


def by_context(group: Group) -> str:
    """Lays the loss by tokens of context out, a table for the shortest rows and one for the longest."""
    return _by_bin(group, "by_context_tokens", "nats_per_token", "tokens from")


def unevaluated(results: Results) -> str:
    """Says what the logs know of trainings that no result came of, and how far a point is from itself."""
    losses = {result["name"]: loss(Run(result)) for result in results.all()}
    trained = {name: [value] for name, value in losses.items()}
    lines = []
    for folder in sorted(results.point_folder("").glob(f"*{UNEVALUATED}*")):
        name, own = folder.name.partition(UNEVALUATED)[0], last_metrics(folder)["eval/loss"]
        full = losses.get(f"{_budget(name)}-full-{name.rpartition('-')[2]}")
        gaps = [f"{own - other:+.4f}" if other else "" for other in (losses.get(name), full)]
        lines.append(f"{name:28}{own:.4f}  {gaps[0]:12}{gaps[1]}".rstrip())
        trained.setdefault(name, []).append(own)
    if lines:
        lines.insert(0, f"{'not evaluated':28}{'loss':8}− result's  − full's")
    for budget in dict.fromkeys(map(_budget, trained)):
        again = [values for name, values in trained.items() if _budget(name) == budget and len(values) > 1]
        if again:
            freedom = sum(len(values) - 1 for values in again)
            spread = (sum(variance(values) * (len(values) - 1) for values in again) / freedom) ** 0.5
            lines.append(f"{budget}: {len(again)} points trained again, {freedom} times, spread {spread:.4f}")
    return "\n".join(lines)


def _budget(name: str) -> str:
    return name.partition("-")[0]


def _by_bin(group: Group, bins_of: str, value: str, title: str) -> str:
    tables = []
    for length in sorted({group.lengths[0], group.lengths[-1]}):
        bins = [
            {bin["first"]: f"{bin[value]:.2f}" for bin in run.at(length)[bins_of] if bin["targets"]}
            for run in group.runs
        ]
        firsts = sorted(set().union(*bins))
        rows = [
            [run.result["name"], *(of_run.get(first, "") for first in firsts)]
            for run, of_run in zip(group.runs, bins, strict=True)
        ]
        rows_of = f"{group.name}, rows of {length} training contexts"
        tables.append(f"{rows_of}\n{table([title, *map(str, firsts)], rows)}\n")
    return "\n".join(tables)


def _line(group: Group, run: Run, curves: Mapping[str, Mapping[int, float]]) -> str:
    own, recall = run.own, run.own["recall"]
    rest = own["targets"] - recall["targets"]
    rest_nats = own["nats_per_token"] * own["targets"] - recall["nats_per_token"] * recall["targets"]
    rest_loss = f"{rest_nats / rest:.4f}" if rest else " " * 6  # Associative recall has no other targets.
    parts = [f"{run.result['name']:28}{recall['nats_per_token']:.3f}  {rest_loss}"]
    full, linear = (_same_seed(group, mixer, run) for mixer in ("full", "linear"))
    edges = (run.window, run.window + 1) if full and run.window else ()
    parts += [f"{_accuracy(run, edge):.2f} ({_accuracy(full, edge):.2f})  " for edge in edges] or [" " * 13] * 2
    last = run.evaluation["step"] * 4 // 5
    gaps = _gaps(curves, run, full)
    parts.append(f"{fmean(gap for step, gap in gaps.items() if step > last):+.4f}" if gaps else " " * 7)
    below = list(_gaps(curves, run, linear).items())
    firsts = (below[i][0] for i in range(LINES - 1, len(below)) if _mean(below[i - LINES + 1 : i + 1]) < -BELOW_LINEAR)
    parts.append(str(next(firsts, "")))
    return "  ".join(parts)


def _same_seed(group: Group, mixer: str, run: Run) -> Run | None:
    return next((other for other in group.runs if other.mixer == mixer and other.seed == run.seed), None)


def _accuracy(run: Run, distance: int) -> float:
    return next(bin["accuracy"] for bin in run.own["recall_by_distance"] if bin["first"] <= distance <= bin["last"])


def _gaps(curves: Mapping[str, Mapping[int, float]], run: Run, other: Run | None) -> dict[int, float]:
    """Training loss less the other run's by step, where both were logged."""
    ours, theirs = curves[run.identity], curves[other.identity] if other else {}
    return {step: ours[step] - theirs[step] for step in sorted(ours.keys() & theirs.keys())}


def _mean(pairs: list[tuple[int, float]]) -> float:
    return fmean(gap for _, gap in pairs)


if __name__ == "__main__":
    main()
