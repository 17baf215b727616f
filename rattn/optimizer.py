"""Optimizers and learning-rate schedules, all from optax."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict


def learning_rate_schedule(optimizer: ConfigDict, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then the schedule that `config.optimizer` names, ending at peak · final_fraction."""
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    final = peak * optimizer.final_fraction
    after = total_steps - warmup
    if optimizer.schedule == "cosine":
        parts = [(optax.cosine_decay_schedule(peak, max(after, 1), alpha=optimizer.final_fraction), after)]
    elif optimizer.schedule == "linear":
        parts = [(optax.linear_schedule(peak, final, after), after)]
    else:
        stable = after - optimizer.decay_steps
        parts = [
            (optax.constant_schedule(peak), stable),
            (optax.linear_schedule(peak, final, optimizer.decay_steps), optimizer.decay_steps),
        ]
    if warmup:
        parts.insert(0, (optax.linear_schedule(0.0, peak, warmup), warmup))
    boundaries, step = [], 0
    for _, steps in parts[:-1]:
        step += steps
        boundaries.append(step)
    return optax.join_schedules([schedule for schedule, _ in parts], boundaries)


def is_matrix(path: str, dims: tuple[str, ...]) -> bool:
    """Whether a parameter is a matrix product's weight: neither a norm's scale nor an (un)embedding.

    These alone are decayed, and these alone does Muon orthogonalise.
    """
    return not path.endswith("scale") and "vocab" not in dims


def matrices(logical: Any) -> Any:
    """Returns, for a tree of logical dims as in `ModelSpec`, the tree of what `is_matrix` says of each parameter."""
    return _map_with_path(is_matrix, logical)


def make_optimizer(optimizer: ConfigDict, total_steps: int, logical: Any) -> optax.GradientTransformation:
    """Builds the update rule of `config.optimizer`.

    Clipping by global norm first; weight decay is decoupled, scaled by the learning rate, on matrices only.
    `rmsprop` is RMSProp with momentum, both bias-corrected (the paper's "variant" is not specified further), its
    momentum an exponential mean so that learning rates compare with Adam's. `adafactor` is Shazeer & Stern 2018: the
    learning rate is relative to each parameter's RMS. `muon` runs AdamW on what is not a matrix.

    Args:
      optimizer: `config.optimizer`.
      total_steps: length of the schedule.
      logical: tree of logical dims, as in `ModelSpec`.
    """
    schedule = learning_rate_schedule(optimizer, total_steps)
    decay = optax.add_decayed_weights(optimizer.weight_decay, mask=matrices(logical))
    if optimizer.name == "adamw":
        rule = [optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon), decay]
    elif optimizer.name == "rmsprop":
        rms = optax.scale_by_rms(optimizer.beta2, optimizer.epsilon, bias_correction=True)
        rule = [rms, optax.ema(optimizer.beta1), decay]
    elif optimizer.name == "adafactor":
        rule = [_adafactor(logical), decay]
    else:
        rule = [_muon(optimizer, logical), decay]
    clip = [optax.clip_by_global_norm(optimizer.clip_norm)] if optimizer.clip_norm else []
    return _standard_promotion(optax.chain(*clip, *rule, optax.scale_by_learning_rate(schedule)))


def _adafactor(logical: Any) -> optax.GradientTransformation:
    """Factored second moments, block clipping and parameter scale, one layer of a stack at a time."""
    one = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    # Left to itself, Adafactor would factor and clip over the stacked dim and so mix layers.
    per_layer = optax.GradientTransformation(jax.vmap(one.init), jax.vmap(one.update))
    labels = _map_with_path(lambda _, dims: "stacked" if "layers" in dims else "single", logical)
    return optax.partition({"stacked": per_layer, "single": one}, labels)


def _muon(optimizer: ConfigDict, logical: Any) -> optax.GradientTransformation:
    """Muon on matrices (a stack's layers apart, heads joined), Adam elsewhere."""

    def dimension_numbers(path: str, dims: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
        if not is_matrix(path, dims):
            return None
        # The residual width is one side of every matrix; all other dims but the stack's are the other.
        width = (dims.index("embed"),)
        other = tuple(i for i, dim in enumerate(dims) if dim not in ("embed", "layers"))
        return optax.contrib.MuonDimensionNumbers(*((width, other) if width < other else (other, width)))

    numbers = _map_with_path(dimension_numbers, logical)
    return optax.contrib.muon(
        -1.0,  # The sign that `scale_by_learning_rate` gives again at the end of the chain.
        beta=optimizer.beta2,
        adam_b1=optimizer.beta1,
        adam_b2=optimizer.beta2,
        eps=optimizer.epsilon,
        muon_weight_dimension_numbers=numbers,
        # Updates of AdamW's size, so that one learning rate serves both (Liu et al. 2025).
        consistent_rms=0.2,
    )


def _map_with_path(function: Callable[[str, tuple[str, ...]], Any], logical: Any, prefix: str = "") -> Any:
    """Maps function(dotted path, dims) over a tree of logical dims."""
    if isinstance(logical, dict):
        return {key: _map_with_path(function, value, f"{prefix}{key}.") for key, value in logical.items()}
    return function(prefix.removesuffix("."), logical)


def _standard_promotion(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets optax mix its int32 counts with floats where the process runs with strict promotion."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return transformation.update(updates, state, params)

    return optax.GradientTransformation(transformation.init, update)
