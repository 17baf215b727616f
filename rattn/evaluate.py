"""python -m rattn.evaluate --checkpoint runs/small [--windows 0,64,128] [--lengths 1,2,4,8] [--out file.json]

Evaluates a run's checkpoint on the validation split, at any window (nothing in the weights depends on it) and context
length: loss, bits per byte, loss by position, loss on recall tokens by distance. Runs in one process. What it writes is
described in `rattn.evaluation.results`. The config is the run's own; --config.key=value changes where the data lies,
the mesh, or how much is evaluated at a time.
"""

import sys
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from rattn import accounting, platform
from rattn.config import differences, override, run_main, saved_config, take_overrides, to_json, validate
from rattn.data.batches import open_data
from rattn.data.preparation import ensure_prepared
from rattn.errors import UserError
from rattn.evaluation import results
from rattn.evaluation.measure import Recall, measure, usual_recall
from rattn.model.parameters import model_spec, parameter_count
from rattn.restore import parameters_of
from rattn.sharding import Sharding, make_mesh

# What may differ from the run's config, because the model stays the same.
OVERRIDABLE = ("data.", "evaluation.", "loss.chunk_tokens", "mesh.", "model.compute_dtype")


def evaluate(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    step: int = 0,
    windows: tuple[int, ...] = (),
    lengths: tuple[int, ...] = (1,),
    max_tokens: int = 0,
    recall: Recall | None = None,
) -> dict[str, Any]:
    """Returns what `rattn.evaluation.results` describes.

    Args:
      config: the run's, with overrides; valid.
      workdir: the run's.
      step: of the checkpoint; 0: the last.
      windows: () is the run's own.
      lengths: multiples of the training context.
      max_tokens: about how many tokens are read; 0: the whole split.
      recall: which tokens are recall tokens; None: as usual for the data.

    Raises:
      UserError: no such checkpoint, data that does not fit, a window or length that cannot be.
    """
    trained = saved_config(workdir)
    changed = {key: now for key, _, now in differences(to_json(trained), to_json(config))}
    for key in changed:
        if not key.startswith(OVERRIDABLE):
            raise UserError(
                f"config.{key} belongs to the trained model; rattn.evaluate can change {', '.join(OVERRIDABLE)} alone."
            )
    if jax.process_count() > 1:
        raise UserError(
            f"rattn.evaluate runs in one process and there are {jax.process_count()}; start it on one host."
        )
    sharding = Sharding(make_mesh(config.mesh))
    if config.context_length % sharding.mesh.shape["seq"]:
        raise UserError(
            f"config.context_length is {config.context_length}, which config.mesh.seq={sharding.mesh.shape['seq']} "
            "does not divide; change config.mesh.seq."
        )
    ensure_prepared(config.data)
    spec = model_spec(config.model, sharding.operators())
    parameters, step, meta = parameters_of(workdir, step, spec, sharding)
    data = open_data(config.data, context_length=config.context_length, batch_size=config.batch_size, seed=config.seed)
    if data.fingerprint != meta["data_fingerprint"]:
        print("The data are others than the run was trained on.")
    recall = recall or usual_recall(config)
    windows = tuple(windows) or (config.model.window,)
    if not {"swa", "rattention"} & set(config.model.pattern):
        if windows != (config.model.window,):
            print("No layer of this model has a window, so it is evaluated once for each length.")
        windows = (None,)
    measured = measure(
        config,
        parameters,
        sharding,
        windows=windows,
        lengths=lengths,
        max_tokens=max_tokens,
        recall=recall,
    )
    return {
        "format": results.FORMAT,
        "workdir": str(workdir),
        "step": step,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "config": to_json(trained),
        "overrides": changed,
        "data_fingerprint": data.fingerprint,
        "recall": {"context_tokens": recall.context_tokens, "frequent_rate": recall.frequent_rate},
        "parameters": parameter_count(spec.shapes),
        "parameters_by_part": accounting.parameters_by_part(spec),
        "tokens_seen": step * trained.batch_size * trained.context_length,
        "epochs": data.train.epoch(step),
        "training": results.training_speed(workdir, trained),
        "measured": [measured[window, length] for window in windows for length in lengths],
    }


def table(result: dict[str, Any]) -> str:
    """Lays out a result's main numbers, a line for each window and length."""
    rows = [("window", "tokens a row", "loss", "bits a byte", "recall loss", "recall tokens", "cache")]
    for entry in result["measured"]:
        recall = entry["recall"]
        rows.append(
            (
                "–" if entry["window"] is None else str(entry["window"]),
                f"{entry['context_length']:,}",
                f"{entry['nats_per_token']:.4f}",
                f"{entry['bits_per_byte']:.4f}",
                "–" if recall["nats_per_token"] is None else f"{recall['nats_per_token']:.4f}",
                f"{recall['targets']:,}",
                accounting.readable_bytes(sum(entry["cache_bytes"].values())),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def _numbers(name: str, smallest: int) -> tuple[int, ...]:
    """Reads a flag of comma-separated whole numbers, each once."""
    words = flags.FLAGS[name].value or []
    for word in words:
        if not word.isdecimal() or int(word) < smallest:
            raise UserError(f"--{name} has {word!r}; give whole numbers from {smallest}, separated by commas.")
    return tuple(dict.fromkeys(int(word) for word in words))


def _recall(config: ConfigDict) -> Recall:
    usual, asked = usual_recall(config), flags.FLAGS
    return Recall(
        usual.context_tokens if asked.recall_context_tokens is None else asked.recall_context_tokens,
        usual.frequent_rate if asked.frequent_rate is None else asked.frequent_rate,
    )


def main(recipe: str, overrides: list[str]) -> int:
    """Entry point behind the flags."""
    platform.configure()
    workdir = flags.FLAGS.checkpoint
    if recipe:
        raise UserError(f"--config is {recipe!r} and a checkpoint has its own config; leave --config out.")
    if not workdir:
        raise UserError("There is no --checkpoint; name the workdir of a run, such as --checkpoint runs/small.")
    config = validate(override(saved_config(workdir), overrides))
    out = results.checked(flags.FLAGS.out or epath.Path(workdir) / "evaluation.json")
    result = evaluate(
        config,
        workdir,
        step=flags.FLAGS.step,
        windows=_numbers("windows", 0),
        lengths=_numbers("lengths", 1) or (1,),
        max_tokens=flags.FLAGS.max_tokens,
        recall=_recall(config),
    )
    results.write(result, out)
    print(f"{workdir}, step {result['step']}, {result['measured'][0]['targets']:,} validation tokens")
    print(table(result))
    print(f"Written to {out}.")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Workdir of the run.")
    flags.DEFINE_integer("step", 0, "Step of the checkpoint; 0: the last.", lower_bound=0)
    flags.DEFINE_list("windows", None, "Windows to evaluate at; the run's own by default.")
    flags.DEFINE_list("lengths", ["1"], "Context lengths, as multiples of the training context.")
    flags.DEFINE_integer("max_tokens", 2**22, "About how many validation tokens to read; 0: all.", lower_bound=0)
    flags.DEFINE_integer(
        "recall_context_tokens",
        None,
        "Tokens before a recall token that occurred before: 2, or 1 on the associative-recall task, by default.",
        lower_bound=1,
    )
    flags.DEFINE_float(
        "frequent_rate",
        None,
        "N-grams that are at least this share of training's are no recall tokens: 1e-6, or 1 (none is left out) on the "
        "associative-recall task, by default.",
        lower_bound=0.0,
    )
    flags.DEFINE_string("out", None, "Where the result goes; CHECKPOINT/evaluation.json by default.")
    config_overrides, sys.argv[1:] = take_overrides(sys.argv[1:])
    run_main(lambda _, recipe: main(recipe, config_overrides), needs_config=False)
