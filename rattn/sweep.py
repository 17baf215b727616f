"""python -m rattn.sweep --config configs/small.py --sweep configs/sweeps/window.py --workdir runs/window

Trains and evaluates every point of a sweep file, and writes the report on them. The same command continues a sweep
that was killed; nothing is done twice, and several sweeps at once in one workdir share its points out. Exit status: 0
every chosen point has its result, 75 some are left (a budget, a signal) and the command should be started again, 1 some
failed.
"""

import json
import pathlib
import shlex
import sys

from absl import flags
from ml_collections import ConfigDict

from rattn import platform
from rattn.config import run_main, take_recipe
from rattn.errors import UserError
from rattn.planning.topologies import parse_topology
from rattn.sweeping.costs import cost_table
from rattn.sweeping.points import Point, Sweep, load_sweep, select
from rattn.sweeping.report import write_report
from rattn.sweeping.results import Results
from rattn.sweeping.runner import Options, Runner, fill_launcher
from rattn.sweeping.table import Table


def main(config: ConfigDict | None, recipe: str) -> int:
    """Entry point behind the flags."""
    values = flags.FLAGS
    platform.configure()
    if not values.workdir:
        raise UserError("There is no --workdir; name the folder that holds, or will hold, the sweep's results.")
    if pathlib.Path(values.workdir).is_file():
        raise UserError(f"--workdir {values.workdir!r} is a file; name a folder.")
    if values.archive and pathlib.Path(values.archive).is_dir():
        raise UserError(f"--archive {values.archive!r} is a folder; name a file, such as results.tar.xz in it.")
    if values.epsilon is not None and not values.epsilon >= 0:
        raise UserError(f"--epsilon is {values.epsilon}; give nats a token, 0 or more.")
    results = Results(pathlib.Path(values.workdir))
    merged = _listed(values.merge)
    for other in merged:
        _merge(results, other)
    if config is None:
        if not (merged or values.report_only or values.archive):
            raise UserError("There is no --config; name a recipe, such as --config configs/small.py, and a --sweep.")
        return _finish(results, None, values, 0)
    if not values.sweep:
        raise UserError("There is no --sweep; name a sweep file, such as --sweep configs/sweeps/window.py.")
    sweep = load_sweep(values.sweep, take_recipe(sys.argv)[0], config)
    chosen = select(sweep.points, _listed(values.only), values.shard)
    if values.dry_run:
        states = {point.name: "done" if results.of(point) else "" for point in chosen}
        topology = parse_topology(values.topology, values.slices) if values.topology else None
        print(cost_table(chosen, states, topology))
        return 0
    options = Options(
        launcher=values.launcher,
        budget_seconds=values.budget_seconds,
        cut_points=values.cut_points,
        train_alone=values.train_alone,
        delete_checkpoints=values.delete_checkpoints,
        archive=pathlib.Path(values.archive) if values.archive else None,
    )
    table = Table([point.name for point in chosen])
    runner = Runner(sweep, results, options, table)
    if values.list_commands:
        _list(runner, results, chosen, values.launcher)
        return 0
    if values.report_only:
        return _finish(results, sweep, values, 0)
    if values.launcher:
        fill_launcher(values.launcher, [], stage="", name="", workdir="")
    _describe(sweep, results.workdir)
    return _finish(results, sweep, values, runner.run(chosen))


def _listed(given: list[str]) -> list[str]:
    """The values of a flag that takes several, with commas between them or each with the flag anew."""
    return [word for words in given for word in map(str.strip, words.split(",")) if word]


def _merge(results: Results, other: str) -> None:
    new, known, conflicts = results.merge(pathlib.Path(other))
    print("\n".join([f"{other}: {new} new results, {known} known.", *conflicts]))


def _finish(results: Results, sweep: Sweep | None, values: flags.FlagValues, status: int) -> int:
    """Writes what the results allow, and says what failed; of the sweep's points, or of all that is there."""
    found, failures, missing = results.all(), results.failures(), []
    if sweep:
        found = [result for point in sweep.points if (result := results.of(point))]
        missing = [point.name for point in sweep.points if not results.of(point)]
        failures = [failure for failure in failures if failure["identity"] in {p.identity for p in sweep.points}]
    if values.archive:
        print(f"{results.write_archive(pathlib.Path(values.archive))} results in {values.archive}")
    if found and values.report:
        try:
            print(f"Report: {write_report(found, failures, results.workdir, values.epsilon, missing)}")
        except UserError as error:
            if values.report_only:
                raise
            # The points are none the worse for it.
            print(error)
    elif values.report_only:
        raise UserError(f"There are no results in {str(results.workdir)!r}; run the sweep, or --merge another workdir.")
    for failure in failures:
        print(f"{failure['name']} failed ({failure['stage']}): {failure['reason']} See {failure['log']}.")
    if status == 75:
        print(f"Points are left. To go on: {shlex.join(['python', '-m', 'rattn.sweep', *sys.argv[1:]])}")
    elif failures:
        print("To try again what failed: the same command.")
    return status


def _describe(sweep: Sweep, workdir: pathlib.Path) -> None:
    """Leaves beside the results what the sweep was: its command and its points, in sweep.json."""
    workdir.mkdir(parents=True, exist_ok=True)
    points = [
        {"name": point.name, "identity": point.identity, "recipe": point.recipe, "overrides": list(point.overrides)}
        for point in sweep.points
    ]
    command = ["python", "-m", "rattn.sweep", *sys.argv[1:]]
    (workdir / "sweep.json").write_text(json.dumps({"command": shlex.join(command), "points": points}, indent=1) + "\n")


def _list(runner: Runner, results: Results, points: list[Point], launcher: str) -> None:
    """Prints the commands of the points that have no result; the sweep collects what they leave."""
    for point in points:
        if results.of(point):
            continue
        where = {"name": point.name, "workdir": str(results.point_folder(point.name))}
        commands = runner.commands(point).items()
        print(
            " && ".join(fill_launcher(launcher or "{command}", line, stage=stage, **where) for stage, line in commands)
        )


if __name__ == "__main__":
    flags.DEFINE_string("sweep", None, "The sweep file: what points there are.")
    flags.DEFINE_string("workdir", None, "Folder of runs, results and report, on a local file system.")
    flags.DEFINE_multi_string("only", [], "Points to run: names or patterns, such as 'rattention-*,full-seed0'.")
    flags.DEFINE_string("shard", "", "Which part of the points to run: 2/3 is the second of three.")
    flags.DEFINE_boolean("dry_run", False, "Print the points and what they cost, and run nothing.")
    flags.DEFINE_alias("dry-run", "dry_run")
    flags.DEFINE_string("topology", None, "For --dry_run: a TPU slice to forecast memory and step time on.")
    flags.DEFINE_integer("slices", 1, "For --dry_run: slices of that shape.")
    flags.DEFINE_boolean("list_commands", False, "Print the commands of what is to be done, and run nothing.")
    flags.DEFINE_string(
        "launcher",
        "",
        "Shell command that runs a point's command: {command} is replaced; {stage}, {name} and {workdir} too.",
    )
    flags.DEFINE_float(
        "budget_seconds", 0.0, "Start no point that would not fit, and stop what overruns; 0: no limit.", lower_bound=0
    )
    flags.DEFINE_boolean("cut_points", False, "With a budget: start what does not fit too, to be continued later.")
    flags.DEFINE_boolean(
        "train_alone", False, "Of the sweeps in this workdir with the same CUDA_VISIBLE_DEVICES, one trains at a time."
    )
    flags.DEFINE_boolean("delete_checkpoints", False, "Delete the checkpoints of finished points that none needs.")
    flags.DEFINE_multi_string("merge", [], "Workdirs or archives whose results to take over.")
    flags.DEFINE_string(
        "archive", "", "File (.tar.xz) into which all results are packed as they come, for --merge elsewhere."
    )
    flags.DEFINE_boolean("report_only", False, "Rebuild the report from the results that there are.")
    flags.DEFINE_boolean("report", True, "Write the report.")
    flags.DEFINE_float(
        "epsilon", None, "Nats a token that count as equal; by default twice full attention's spread over seeds."
    )
    run_main(main, needs_config=False)
