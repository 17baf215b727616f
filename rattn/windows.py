"""The window of a training step, where a run draws it from a set."""

from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

# Sets these draws apart from others of the same key.
PHILOX_STREAM = 1


def window_of_step(config: ConfigDict, step: int) -> int:
    """Returns the window that step `step` (from 0) trains with: a pure function of the config and the step.

    `config.model.window` where no set is given and in the last `config.model.window_final_steps`; before, one of
    `config.model.window_choices`, drawn with `config.model.window_weights` by Philox with the key (seed, step): the
    same in every process and every microbatch, and after a resume.
    """
    model = config.model
    if not model.window_choices or step >= config.total_steps - model.window_final_steps:
        return model.window
    # Raw output, unlike NumPy's distributions, is promised to stay the same.
    draw = np.random.Philox(key=[config.seed % 2**64, step], counter=[0, 0, 0, PHILOX_STREAM]).random_raw() / 2.0**64
    weights = np.asarray(model.window_weights or [1.0] * len(model.window_choices), np.float64)
    place = np.searchsorted(np.cumsum(weights) / weights.sum(), draw, side="right")
    return int(model.window_choices[min(place, len(weights) - 1)])


def configs_by_window(config: ConfigDict) -> Iterator[tuple[int, ConfigDict]]:
    """Gives every window that a step may have, with the config of such a step."""
    for window in dict.fromkeys((*config.model.window_choices, config.model.window)):
        yield window, at_window(config, window)


def at_window(config: ConfigDict, window: int) -> ConfigDict:
    """Returns a copy of the config at another window."""
    copy = config.copy_and_resolve_references()
    copy.model.window = window
    return copy
