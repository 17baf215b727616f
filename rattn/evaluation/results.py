"""The file that `python -m rattn.evaluate` writes: one JSON object.

    {
      "format": 1,
      "workdir": "runs/small",            the run that was evaluated
      "step": 3000,                       of the checkpoint
      "device": "NVIDIA H100 80GB HBM3",  what the evaluation ran on
      "devices": 1,
      "config": {...},                    the resolved config that the run was trained with
      "overrides": {"data.path": "…"},    what rattn.evaluate was told otherwise
      "data_fingerprint": "…",            of the evaluated data
      "recall": {"context_tokens": 2, "frequent_rate": 1e-06},
      "parameters": 24123456,             scalars, all
      "parameters_by_part": {"embedding": …, "mixers": …, "feed-forward": …, "norms": …},
      "tokens_seen": 196608000,           step × batch_size × context_length; a run that began with everything of
                                          another (config.init_from) counts that one's too
      "epochs": 4.27,                     passes over the most often read source
      "training": {...} or null,          null where the workdir has no usable metrics.jsonl
      "measured": [{...}, …]              one entry for each (window, length), windows outermost, in the order asked
    }

`training` is read from metrics.jsonl: medians over its lines of training steps, without the first tenth of them
(rounded up, one line stays).

    {"tokens_per_second": 512345.6, "step_seconds": 0.128, "mfu": 0.41 or null, "lines": 270,
     "by_window": {"256": {"tokens_per_second", "step_seconds", "mfu", "lines"}, …}}

`by_window` has the window of the config, or every window that config.model.window_choices drew; the outer values are
those of the final window (config.model.window).

An entry of `measured`:

    {
      "window": 256,                      null where no layer has a window (full and linear models: one entry a length)
      "length": 2,                        multiple of the training context
      "context_length": 4096,             tokens a row: length × config.context_length
      "cache_bytes": {"full": …, "window": …, …},   of one sequence of context_length tokens, by kind, as
                                          `rattn.accounting.cache_bytes_per_sequence` counts them; their sum is the
                                          decode cache
      "targets": 1048576,                 tokens that count
      "text_bytes": 3912345,              UTF-8 bytes of their text
      "nats_per_token": 1.234,            the validation loss
      "accuracy": 0.71,                   share of targets that are the model's likeliest token
      "bits_per_byte": 0.4771,
      "by_context_tokens": [bin, …],      number of tokens of the target's own document that stand before it in the row
                                          (at least 1): what the model can predict it from; bins of powers of two
      "by_row_position": [bin, …],        place of the target's last input token in the row, from 1 (documents are
                                          packed, so this is not what the model can see); 16 equal bins
      "recall": bin without first and last,                  all recall tokens
      "recall_by_distance": [bin, …]      recall tokens, by distance to the nearest occurrence; bins of powers of two
    }

A bin is {"first": 33, "last": 64, "targets": 12345, "nats_per_token": 1.5, "accuracy": 0.6}: both ends belong to it,
and bins of powers of two are 1, 2, 3–4, 5–8, 9–16, …. A bin without targets is there with null for its means, so
that all entries of one context_length have the same bins. All entries of a file have the same targets (on the
associative-recall task those of one length); the recall tokens of a length are those of its rows, so longer rows have
more.

A target x_j at distance d = j − i has x_i among the keys of the query that predicts it (at j − 1) exactly where d ≤ W:
for a window W that is a power of two, the bins with last ≤ W are recall within the window, those with first > W recall
beyond it. Sums over bins are weighted by `targets`. What a recall token is stands in `rattn.evaluation.recall`.
"""

import json
import math
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from rattn.errors import UserError
from rattn.files import metrics_lines, write_whole

FORMAT = 1


def training_speed(workdir: epath.PathLike, config: ConfigDict) -> dict[str, Any] | None:
    """Returns the entry `training`, None where the workdir has no metrics of training steps."""
    lines = [line for line in metrics_lines(workdir) if "tokens_per_second" in line]
    lines = lines[min(math.ceil(len(lines) / 10), len(lines) - 1) :]
    if not lines:
        return None
    tokens = config.batch_size * config.context_length
    if not config.model.window_choices:
        speed = _medians(lines, "", tokens)
        return {**speed, "by_window": {str(config.model.window): speed}}
    windows = dict.fromkeys((*config.model.window_choices, config.model.window))
    by_window = {str(window): _medians(lines, f"window_{window}/", tokens) for window in windows}
    by_window = {window: speed for window, speed in by_window.items() if speed}
    return {**(by_window.get(str(config.model.window)) or _medians(lines, "", tokens)), "by_window": by_window}


def _medians(lines: list[dict[str, Any]], prefix: str, tokens_per_step: int) -> dict[str, Any] | None:
    rates = [line[f"{prefix}tokens_per_second"] for line in lines if f"{prefix}tokens_per_second" in line]
    shares = [line[f"{prefix}mfu"] for line in lines if f"{prefix}mfu" in line]
    if not rates:
        return None
    median = float(np.median(rates))
    return {
        "tokens_per_second": median,
        "step_seconds": tokens_per_step / median,
        "mfu": float(np.median(shares)) if shares else None,
        "lines": len(rates),
    }


def checked(out: epath.PathLike) -> epath.Path:
    """Returns the path of a result and makes its folder, before any work that would be lost without.

    Raises:
      UserError: it is a folder, or its own cannot be made.
    """
    out = epath.Path(out)
    if out.is_dir():
        raise UserError(f"--out {str(out)!r} is a folder; name a file.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {str(out)!r} cannot be written ({error.strerror}); name another file.") from None
    return out


def write(result: dict[str, Any], out: epath.PathLike) -> None:
    """Writes the file, which appears only when it is whole."""
    write_whole(out, json.dumps(result, indent=1, allow_nan=False) + "\n")
