"""The report on a sweep: report.html (self-contained), a PNG of each figure, tables.md, results.csv."""

import csv
import datetime
import html
import io
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from rattn.accounting import readable_bytes, readable_count
from rattn.sweeping.results import Result, training_losses
from rattn.sweeping.summary import (
    Group,
    Run,
    Variant,
    bits_per_byte,
    grouped,
    loss,
    loss_at,
    recall_beyond,
    recall_loss,
    repeated,
    weighted,
)
from rattn.sweeping.verdict import compare, verdict

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1a1c20; --soft: #5b6270; --line: #d8dce3; --mark: #eef3fa; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171c; --ink: #e6e9ee; --soft: #a3abb8; --line: #363c47; --mark: #1d2530; }
}
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; } p { margin: .5rem 0; max-width: 52rem; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.verdict { background: var(--mark); border-left: 4px solid #3b8edb; padding: .5rem 1rem; margin: 1rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 2rem; }
figure { margin: 0; min-width: 0; }
figcaption { margin-top: .5rem; }
figure.wide { grid-column: 1 / -1; } figure.wide svg { min-width: 48rem; }
section > .scroll { margin: 0 0 2rem; } .scroll { overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 26rem; height: auto; }
figure svg text { font-family: system-ui, sans-serif; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
td.good { font-weight: 600; } code { font-size: .9em; overflow-wrap: anywhere; }
"""
NO_FIGURE = "–"


def write_report(
    results: Sequence[Result],
    failures: Sequence[dict[str, str]],
    workdir: pathlib.Path,
    epsilon: float | None,
    missing: Sequence[str] = (),
) -> pathlib.Path:
    """Writes report.html, the PNGs, tables.md and results.csv into `workdir / "report"`; returns the page's path.

    Curves of the training loss are of the runs whose metrics.jsonl is under `workdir / "points"`.

    Args:
      results: of every finished point.
      failures: records of the points that failed.
      workdir: the sweep's.
      epsilon: see `verdict`.
      missing: names of the sweep's points that have no result.

    Raises:
      UserError: matplotlib is not installed; tables.md and results.csv are written all the same.
    """
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    groups = grouped(results)
    with (folder / "results.csv").open("w", newline="") as file:
        file.write(csv_text(results))
    (folder / "tables.md").write_text("\n".join(markdown_section(group, epsilon) for group in groups))
    # A machine that only runs points needs no matplotlib.
    from rattn.sweeping.plots import plots

    points = workdir / "points"
    curves = {result["identity"]: training_losses(points / result["name"]) for result in results}
    for old in folder.glob("*.png"):
        old.unlink()
    sections = []
    slugs: list[str] = []
    for group in groups:
        slug = _slug(group.name)
        # Names may differ in signs alone that no file's name has.
        slugs.append(f"{slug}{slugs.count(slug) + 1}-" if slug in slugs else slug)
        drawn = plots(group, epsilon, {identity: curve for identity, curve in curves.items() if curve})
        for plot in drawn:
            (folder / f"{slugs[-1]}{plot.name}.png").write_bytes(plot.png)
        sections.append(_section(group, drawn, epsilon, titled=len(groups) > 1 or bool(group.name)))
    page = folder / "report.html"
    page.write_text(_page(workdir.name, results, failures, missing, sections))
    return page


def csv_text(results: Sequence[Result]) -> str:
    """A line for every measured (window, length) of every run."""
    out = io.StringIO()
    writer = None
    for run in map(Run, results):
        for entry in run.evaluation["measured"]:
            row = _csv_row(run, entry)
            if writer is None:
                writer = csv.DictWriter(out, row.keys())
                writer.writeheader()
            writer.writerow(row)
    return out.getvalue()


def _csv_row(run: Run, entry: dict[str, Any]) -> dict[str, Any]:
    evaluation, result = run.evaluation, run.result
    training = evaluation["training"] or {}
    window = entry["window"] or 0
    recall = entry["recall_by_distance"]
    return {
        "name": result["name"],
        "group": result["group"],
        "identity": result["identity"],
        "mixer": run.mixer,
        "trained_window": run.window,
        "seed": run.seed,
        "window": entry["window"],
        "length": entry["length"],
        "context_length": entry["context_length"],
        "loss": entry["nats_per_token"],
        "bits_per_byte": entry["bits_per_byte"],
        "accuracy": entry["accuracy"],
        "targets": entry["targets"],
        "recall_targets": entry["recall"]["targets"],
        "recall_loss": entry["recall"]["nats_per_token"],
        "recall_accuracy": entry["recall"]["accuracy"],
        "recall_loss_within_window": weighted(bin for bin in recall if bin["last"] <= window),
        "recall_loss_beyond_window": weighted(bin for bin in recall if bin["first"] > window),
        "cache_bytes": sum(entry["cache_bytes"].values()),
        "parameters": evaluation["parameters"],
        "tokens_seen": evaluation["tokens_seen"],
        "epochs": evaluation["epochs"],
        "step": evaluation["step"],
        "step_seconds": training.get("step_seconds"),
        "tokens_per_second": training.get("tokens_per_second"),
        "mfu": training.get("mfu"),
        "train_seconds": result["seconds"]["train"],
        "evaluate_seconds": result["seconds"]["evaluate"],
        "device": evaluation["device"],
        "data_fingerprint": evaluation["data_fingerprint"],
        "finished_at": result["finished_at"],
    }


def _section(group: Group, drawn: Sequence[Any], epsilon: float | None, *, titled: bool) -> str:
    title = f"<h2>{html.escape(group.name or 'Other points')}</h2>" if titled else ""
    sentences = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in verdict(group, epsilon))
    figures = "".join(
        f"<figure{' class=wide' if plot.wide else ''}><h3>{html.escape(plot.title)}</h3>"
        f'<div class="scroll">{plot.svg}</div><figcaption>{html.escape(plot.caption)}</figcaption></figure>'
        for plot in drawn
    )
    return (
        f'<section>{title}<p class="soft">{_budget(group)}</p>'
        f'<div class="verdict">{sentences}</div>{_html_table(group, epsilon)}'
        f'<div class="figures">{figures}</div></section>'
    )


def _budget(group: Group) -> str:
    """Tokens that the group's models have seen, how often they saw the corpus, and their size."""

    def said(values: set[float], form: Callable[[float], str]) -> str:
        return " to ".join(dict.fromkeys(map(form, (min(values), max(values)))))

    tokens = said({run.evaluation["tokens_seen"] for run in group.runs}, readable_count)
    parameters = said({run.evaluation["parameters"] for run in group.runs}, readable_count)
    epochs = {round(run.evaluation["epochs"], 2) for run in group.runs}
    passes = f", {said(epochs, '{:g}'.format)} passes over the training text" if max(epochs) else ""
    return f"{_runs(len(group.runs))} of {parameters} parameters, each trained on {tokens} tokens{passes}."


def _table(group: Group, epsilon: float | None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of plain text, a row for each variant."""
    full, longer = group.full, [length for length in group.lengths if length != 1]
    header = ["", "seeds", "loss", "± spread", "− full's", "bits per byte", "recall loss", "beyond W", "− full's"]
    header += ["within ε", *(f"loss at {length}×" for length in longer), "cache", "step ms", "tokens/s"]
    rows = []
    for variant in group.variants:
        other = full if variant is not full else None
        compared = compare(variant, other, epsilon) if other else None
        beyond = recall_beyond(variant.window or 0)
        rows.append(
            [
                variant.label,
                ", ".join(map(str, sorted(run.seed for run in variant.runs))),
                f"{variant.mean(loss):.4f}",
                _number(variant.spread(loss), ".4f"),
                _number(other and variant.excess(other, loss), "+.4f"),
                f"{variant.mean(bits_per_byte):.4f}",
                _number(variant.mean(recall_loss), ".3f"),
                _number(variant.mean(beyond), ".3f"),
                _number(other and variant.excess(other, beyond), "+.3f"),
                ("yes" if compared.within else "no") if compared else NO_FIGURE,
                *(_number(variant.mean(loss_at(length)), ".4f") for length in longer),
                readable_bytes(variant.mean(lambda run: run.cache_bytes)),
                _number(_step_ms(variant), ".1f"),
                _number(variant.mean(lambda run: run.tokens_per_second), ",.0f"),
            ]
        )
    return header, rows


def _html_table(group: Group, epsilon: float | None) -> str:
    header, rows = _table(group, epsilon)
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="good">{cell}</td>' if cell == "yes" else f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def markdown_section(group: Group, epsilon: float | None) -> str:
    """The group's verdict and table, for a page of documentation."""
    header, rows = _table(group, epsilon)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    title = f"### {group.name}\n\n" if group.name else ""
    said = "\n".join(f"- {sentence}" for sentence in verdict(group, epsilon))
    return f"{title}{_budget(group)}\n\n{said}\n\n{table}\n"


def _step_ms(variant: Variant) -> float | None:
    return variant.mean(lambda run: run.step_seconds and run.step_seconds * 1000)


def _number(value: float | None, form: str) -> str:
    return NO_FIGURE if value is None else format(value, form)


def _page(
    name: str,
    results: Sequence[Result],
    failures: Sequence[dict[str, str]],
    missing: Sequence[str],
    sections: Sequence[str],
) -> str:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    facts = _facts(results)
    failed = "".join(
        f"<li><b>{html.escape(failure['name'])}</b> ({failure['stage']}): {html.escape(failure['reason'])}</li>"
        for failure in failures
    )
    failed = f"<section><h2>Failed points</h2><ul>{failed}</ul></section>" if failed else ""
    if missing:
        facts.insert(0, f"Not complete. Points without a result: {', '.join(missing)}.")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Window sweep: {html.escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<header><h1>Window sweep: {html.escape(name)}</h1><p class=soft>{_runs(len(results))} · {today}</p></header>"
        f"{''.join(f'<p class=soft>{html.escape(fact)}</p>' for fact in facts)}{''.join(sections)}{failed}"
        '<p class="soft">The window W counts the query itself. Spread is the sample standard deviation over seeds. '
        "Differences from full attention (− full's) are between runs of the same seed where both have one. Recall loss "
        "is that of all recall tokens; beyond W, of those whose nearest earlier occurrence is more than W tokens back, "
        "so that rows of different windows compare by the difference beside it alone (W is 0 for models without a "
        "window). Recall tokens: see <code>rattn/evaluation/recall.py</code>. All figures: <code>results.csv</code>; "
        "the tables as Markdown: <code>tables.md</code>.</p>"
        "</body></html>\n"
    )


def _facts(results: Sequence[Result]) -> list[str]:
    """What a reader must know before comparing: hardware, data, evaluation."""
    groups = grouped(results)
    runs = [run for group in groups for run in group.runs]
    devices = sorted({run.evaluation["device"] for run in runs})
    facts = [f"Evaluated on {', '.join(devices)}."]
    data: dict[tuple[str, int], set[str]] = {}
    for group in groups:
        for run in group.runs:
            data.setdefault((group.name, run.seed), set()).add(run.evaluation["data_fingerprint"])
    if max(map(len, data.values())) > 1:
        facts.append("The results come from different data (their fingerprints differ): losses do not compare.")
    elif len(set.union(*data.values())) > 1:
        facts.append("Groups or seeds have data of their own: losses compare within a group, at equal seeds.")
    targets = [{run.own["targets"] for run in group.runs} for group in groups]
    if max(map(len, targets)) > 1:
        facts.append("The results were measured on different numbers of targets: compare within one evaluation only.")
    elif len(set.union(*targets)) == 1:
        facts.append(f"Each loss is of the same {targets[0].pop():,} held-out tokens.")
    names = ", ".join(f"{result['name']} ({result['identity']})" for result in repeated(results))
    if names:
        facts.append(
            f"Left out, for a later result has the same group, mixer, window and seed: {names}. Give points that "
            "differ in something else a group= of their own."
        )
    return facts


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"


def _slug(name: str) -> str:
    slug = re.sub(r"[^\w.]+", "_", name).strip("_")
    return f"{slug}-" if slug else ""
