"""Checkpoints: the whole state of a run, its config and what it needs to be recognised, through Orbax."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from rattn.errors import UserError
from rattn.model.parameters import flatten

Tree = Any


class Checkpoints:
    """The checkpoints of one workdir, saved asynchronously, each complete or absent.

    A step holds `state` (parameters, optimizer state, step) and `meta` (JSON: the resolved config, the fingerprint of
    the data, shape and dtype of every parameter). Any mesh can restore it. `gs://` paths go through Orbax; they have
    not been tried.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        keep: int | None = None,
        *,
        keep_steps: Sequence[int] = (),
        read_only: bool = False,
    ):
        """Opens `folder`, which is made at the first save.

        Args:
          folder: `workdir / "checkpoints"`.
          keep: how many of the newest stay; None: all.
          keep_steps: steps that stay whatever `keep` says.
          read_only: touch nothing, not even what a killed run left half-written: another run may be writing there.
        """
        self.folder = epath.Path(folder).resolve()  # Orbax wants absolute paths.
        # Asked before Orbax opens the folder, for it clears them in the background.
        self.unfinished_steps = sorted(
            int(path.name.partition(".")[0]) for path in self.folder.glob("*.orbax-checkpoint-tmp*")
        )
        newest = preservation_policy.LatestN(n=keep)
        policy = preservation_policy.AnyPreservationPolicy([newest, preservation_policy.CustomSteps(tuple(keep_steps))])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, cleanup_tmp_directories=not read_only, create=not read_only
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Tree, meta: dict[str, Any]) -> None:
        """Starts to save; the arrays may be donated as soon as this returns.

        The transfer guard is lifted for it: Orbax copies to the host.
        """
        with jax.transfer_guard("allow"):
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
            )

    def read_meta(self, step: int) -> dict[str, Any]:
        """Returns the `meta` of a step."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._read(step, lambda: self._manager.restore(step, args=args)["meta"])

    def restore(self, step: int, target: Tree) -> Tree:
        """Returns the state of a step as `target` says: a tree of ShapeDtypeStructs with shardings."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        return self._read(step, lambda: self._manager.restore(step, args=args)["state"])

    def restore_part(self, step: int, target: Tree) -> Tree:
        """Returns the branches of the state that `target` names, and reads no others; see `restore`."""
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        part = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        return self._read(step, lambda: self._manager.restore(step, args=ocp.args.Composite(state=part))["state"])

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:
            earlier = [other for other in self.steps() if other < step]
            what_next = f"to continue from step {max(earlier)}" if earlier else "to start again from step 0"
            reason = str(error).strip().partition("\n")[0][:200]
            raise UserError(
                f"The checkpoint {self.folder / str(step)} cannot be read ({type(error).__name__}: {reason}); "
                f"restore it from a copy, or rename it {what_next}."
            ) from error

    def wait(self) -> None:
        """Waits until what was saved is committed; raises what failed in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and closes."""
        self._manager.wait_until_finished()
        self._manager.close()


def parameter_manifest(shapes: Tree) -> dict[str, list]:
    """{"path": [shape, dtype]} of every parameter: what a checkpoint's architecture is recognised by."""
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in flatten(shapes).items()}


def check_same_parameters(found: dict[str, list], wanted: dict[str, list], where: str, remedy: str) -> None:
    """Raises UserError with the first difference where a checkpoint was made by another architecture.

    Args:
      found: the manifest of the checkpoint.
      wanted: that of the config.
      where: names the checkpoint, as the beginning of the sentence.
      remedy: what to do, as its end.
    """
    for path in sorted(found.keys() | wanted.keys()):
        before, now = found.get(path), wanted.get(path)
        if before != now:
            old = f"{tuple(before[0])} {before[1]}" if before else "absent"
            new = f"{tuple(now[0])} {now[1]}" if now else "absent"
            raise UserError(
                f"{where} was made by another architecture: parameter {path} is {old} there and {new} in this config; "
                f"{remedy}."
            )
