"""Where a state comes from: the run's own last checkpoint, another run's, or any run's parameters alone."""

from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from rattn import multihost
from rattn.checkpoint import Checkpoints, check_same_parameters, parameter_manifest
from rattn.config import differences
from rattn.errors import UserError
from rattn.model.parameters import ModelSpec
from rattn.sharding import Sharding

Tree = Any
Meta = dict[str, Any]

# Keys that may change between a run and its continuation without making another run of it.
FREE_SECTIONS = (
    "checkpoint.",
    "evaluation.",
    "log.",
    "mesh.",
    "data.read_threads",
    "data.prefetch_batches",
    "init_from",
)


def own_state(checkpoints: Checkpoints, shapes: Tree, shardings: Tree, meta: Meta) -> tuple[Tree | None, int]:
    """Returns (state, step) of the last committed checkpoint of the run itself, or (None, 0).

    Args:
      checkpoints: the run's.
      shapes: tree of ShapeDtypeStructs, as `rattn.train.state_layout` gives it.
      shardings: the same tree of shardings.
      meta: what the run writes beside its state: config, data_fingerprint, parameters.

    Raises:
      UserError: another architecture, optimizer or data; a checkpoint that cannot be read.
    """
    for step in checkpoints.unfinished_steps:
        multihost.say(
            f"Skipping the half-written checkpoint of step {step} in {checkpoints.folder}: it was never committed."
        )
    step = checkpoints.latest_step()
    if step is None:
        return None, 0
    _check_continues(checkpoints, step, meta, "another --workdir")
    state = checkpoints.restore(step, _target(shapes, shardings))
    multihost.say(f"Continuing from step {step}.")
    return state, step


def state_of_another_run(config: ConfigDict, shapes: Tree, shardings: Tree, meta: Meta) -> tuple[Tree, int]:
    """Returns the whole (state, step) that `config.init_from` names; arguments and errors as `own_state`."""
    checkpoints, step = _open(config.init_from, config.init_from_step)
    try:
        _check_continues(checkpoints, step, meta, "its weights alone, with config.init_from_what=parameters")
        if step >= config.total_steps:
            raise UserError(
                f"config.init_from goes on from step {step} of {config.init_from} and config.total_steps is "
                f"{config.total_steps}, which counts from that run's beginning; raise it, or name an earlier "
                "config.init_from_step."
            )
        state = checkpoints.restore(step, _target(shapes, shardings))
    finally:
        checkpoints.close()
    multihost.say(f"Going on from step {step} of {config.init_from}.")
    return state, step


def parameters_of(workdir: epath.PathLike, step: int, spec: ModelSpec, sharding: Sharding) -> tuple[Tree, int, Meta]:
    """Restores the parameters alone of a run's checkpoint, which that run may be adding to.

    Nothing in them depends on the window, so `spec` may have another.

    Args:
      workdir: the run's.
      step: of the checkpoint; 0: the last.
      spec: of the model that they are for.
      sharding: where they go.

    Returns:
      the parameters, the step, and what the checkpoint holds beside its state (config, data_fingerprint, parameters).

    Raises:
      UserError: no such checkpoint, or one of another architecture.
    """
    checkpoints, step = _open(workdir, step)
    try:
        meta = checkpoints.read_meta(step)
        where, remedy = f"The checkpoint {checkpoints.folder / str(step)}", "use that run's config.model"
        check_same_parameters(meta["parameters"], parameter_manifest(spec.shapes), where, remedy)
        target = {"parameters": _target(spec.shapes, sharding.parameters(spec.logical, spec.shapes))}
        return checkpoints.restore_part(step, target)["parameters"], step, meta
    finally:
        checkpoints.close()


def _open(workdir: epath.PathLike, step: int) -> tuple[Checkpoints, int]:
    """Opens another run's checkpoints and finds the step, 0 being the last."""
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.exists():
        raise UserError(f"There are no checkpoints in {str(workdir)!r}; name the workdir of a run that has saved one.")
    checkpoints = Checkpoints(folder, read_only=True)
    steps = checkpoints.steps()
    if not steps or (step and step not in steps):
        checkpoints.close()
        if not steps:
            raise UserError(f"There are no checkpoints in {folder}; name the workdir of a run that has saved one.")
        held = ", ".join(map(str, steps))
        raise UserError(f"There is no checkpoint of step {step} in {folder}, it holds {held}; name one of those.")
    return checkpoints, step or steps[-1]


def _check_continues(checkpoints: Checkpoints, step: int, meta: Meta, otherwise: str) -> None:
    """Raises UserError where a state cannot go on in this config, and says what else has changed."""
    where, remedy = f"The checkpoint {checkpoints.folder / str(step)}", f"use that run's config or {otherwise}"
    found = checkpoints.read_meta(step)
    check_same_parameters(found["parameters"], meta["parameters"], where, remedy)
    if found["data_fingerprint"] != meta["data_fingerprint"]:
        raise UserError(
            f"{where} was trained on data with fingerprint {found['data_fingerprint']}, config.data.path holds "
            f"{meta['data_fingerprint']}; use the same data or {otherwise}."
        )
    before, now = (config["optimizer"]["name"] for config in (found["config"], meta["config"]))
    if before != now:
        raise UserError(f"{where} holds the state of {before} and config.optimizer.name is {now!r}; {remedy}.")
    before, now = (config["optimizer"]["clip_norm"] for config in (found["config"], meta["config"]))
    if bool(before) != bool(now):
        raise UserError(
            f"{where} was trained with config.optimizer.clip_norm={before} and here it is {now}, for which the state "
            f"has another form; give a number that clips nothing in place of 0, or {remedy}."
        )
    for key, before, now in differences(found["config"], meta["config"]):
        if not key.startswith(FREE_SECTIONS):
            multihost.say(f"Changed since step {step}: config.{key} {before} -> {now}")


def _target(shapes: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
