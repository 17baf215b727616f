"""python -m rattn.train --config configs/tiny.py [--workdir runs/tiny] [--config.key=value …]

Trains, or continues where the workdir's last checkpoint stands. Exit status: 0 the run is complete, 75 it was told to
stop, saved, and should be started again, anything else failed with a sentence.
"""

import contextlib
import functools
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from rattn import accounting, multihost, platform
from rattn.checkpoint import Checkpoints, parameter_manifest
from rattn.config import run_main, to_json
from rattn.data.batches import Data, EvaluationBatches, open_data, prefetched
from rattn.data.preparation import ensure_prepared
from rattn.diagnostics import branch_diagnostics
from rattn.errors import UserError
from rattn.metrics import Clock, MetricsWriter, Progress, Speed
from rattn.model.parameters import ModelSpec, initial_parameters, model_spec
from rattn.optimizer import learning_rate_schedule, make_optimizer
from rattn.restore import own_state, parameters_of, state_of_another_run
from rattn.sharding import Sharding, make_mesh
from rattn.step import batch_shapes, make_eval_step, make_train_step
from rattn.turns import locked, turn
from rattn.windows import configs_by_window, window_of_step

EXIT_COMPLETE, EXIT_RESTART = 0, 75


def train(config: ConfigDict, workdir: epath.PathLike, command: str = "", turn_file: str | None = None) -> int:
    """Runs a valid config to its end, to a signal, or to a sentence; returns the exit status.

    Args:
      config: as `rattn.config.validate` returns it.
      workdir: local or `gs://` folder of logs and checkpoints; a run found there is continued.
      command: what the user typed, to say how to continue.
      turn_file: trainings on this machine that name the same file compile at any time and train one after another.
    """
    workdir = epath.Path(workdir)
    with _alone_in(workdir):
        return _train(config, workdir, command, turn_file)


@contextlib.contextmanager
def _alone_in(workdir: epath.Path) -> Iterator[None]:
    """Makes the folder and locks it, where it is local, for as long as this process trains in it.

    Raises:
      UserError: it cannot be made, or another training is at work in it.
    """
    if not multihost.is_main() or "://" in str(workdir):
        yield
        return
    path = workdir / "training.lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written ({error.strerror}); name another folder.") from None
    with open(path) as file:
        try:
            alone = locked(file)
        except OSError:  # A file system without locks.
            alone = True
        if not alone:
            raise UserError(f"Another training is at work in {workdir}; wait for its end, or name another --workdir.")
        yield


def _train(config: ConfigDict, workdir: epath.Path, command: str, turn_file: str | None) -> int:
    sharding = Sharding(make_mesh(config.mesh))
    sharding.check_batch(config)
    if multihost.is_main():
        ensure_prepared(config.data)
    multihost.wait_for_all("prepared")
    split = multihost.BatchSplit(sharding.batch)
    data = open_data(
        config.data,
        context_length=config.context_length,
        batch_size=config.batch_size,
        seed=config.seed,
        local_rows=split.rows,
    )
    data.check_vocabulary(config.model.vocab_size)
    evaluation = {
        last: data.evaluation_batches(max_batches=limit, batch_size=config.evaluation.batch_size)
        for last, limit in ((False, config.evaluation.max_batches), (True, config.evaluation.final_max_batches))
    }

    spec = model_spec(config.model, sharding.operators())
    schedule = learning_rate_schedule(config.optimizer, config.total_steps)
    optimizer = make_optimizer(config.optimizer, config.total_steps, spec.logical)
    shapes, shardings = state_layout(spec, optimizer, sharding)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep, keep_steps=config.checkpoint.keep_steps)
    multihost.say(f"rattn · {workdir} · {jax.device_count()} × {jax.devices()[0].device_kind}")
    multihost.say(accounting.summary(config, spec, shapes, shardings))
    meta = {
        "config": to_json(config),
        "data_fingerprint": data.fingerprint,
        "parameters": parameter_manifest(spec.shapes),
    }
    try:
        state, first_step = own_state(checkpoints, shapes, shardings, meta)
        if state is None:
            state, first_step = _first_state(config, optimizer, spec, sharding, shapes, shardings, meta)
        if first_step >= config.total_steps:
            multihost.say(f"The run is complete at step {first_step}; to train longer, raise config.total_steps.")
            return EXIT_COMPLETE
        if multihost.is_main():
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "config.json").write_text(json.dumps(meta["config"], indent=2) + "\n")
            data.vocabulary.copy_to(workdir)
        run = _Loop(config, workdir, sharding, split, data, evaluation, spec, checkpoints, meta)
        step_functions = {
            window: make_train_step(
                step_config, model_spec(step_config.model, sharding.operators()), optimizer, schedule, sharding
            )
            for window, step_config in configs_by_window(config)
        }
        status = run.loop(step_functions, state, shardings, first_step, turn_file and pathlib.Path(turn_file))
    finally:
        checkpoints.close()
    _say_goodbye(status, config, workdir, command)
    return status


class _Loop:
    """The training loop and what it carries between steps."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        sharding: Sharding,
        split: multihost.BatchSplit,
        data: Data,
        evaluation: dict[bool, EvaluationBatches],
        spec: ModelSpec,
        checkpoints: Checkpoints,
        meta: dict[str, Any],
    ):
        self.config, self.workdir, self.sharding, self.split, self.spec = (config, workdir, sharding, split, spec)
        self.data, self.evaluation, self.checkpoints, self.meta = data, evaluation, checkpoints, meta
        peak = accounting.peak_flops(jax.devices()[0])
        self.speed = Speed(
            config.batch_size * config.context_length,
            peak * jax.device_count() if peak else None,
            by_window=bool(config.model.window_choices),
        )

    def loop(
        self,
        step_functions: dict[int, Any],
        state: Any,
        shardings: Any,
        first_step: int,
        turn_file: pathlib.Path | None,
    ) -> int:
        """Trains from `first_step` to the end or a signal; returns the exit status."""
        config, total = self.config, self.config.total_steps
        self.writer = MetricsWriter(self.workdir, config.log, first_step) if multihost.is_main() else None
        self.progress = Progress(total, first_step, silent=not multihost.is_main())
        self.saved_step = first_step
        reading = {"read_threads": config.data.read_threads, "prefetch_batches": config.data.prefetch_batches}
        batches = prefetched(self.data.train, first_step, **reading)
        step, pending = first_step, None
        with multihost.StopRequest().listening() as stop, contextlib.ExitStack() as cleanup:
            cleanup.callback(batches.close)
            self._profiling = cleanup.enter_context(contextlib.ExitStack())
            if self.writer:
                cleanup.callback(self.writer.close)
            train_steps = self._compile(step_functions, state, shardings)
            stopped = functools.partial(stop.after, step)
            cleanup.enter_context(turn(turn_file, stopped=stopped, say=self.progress.say))
            self.progress.start()
            self.clock = Clock()
            cleanup.enter_context(jax.transfer_guard("disallow"))
            while step < total and not stop.after(step):
                self._profile(step)
                with self.clock.waiting():
                    batch = self.split.to_devices(next(batches), config.batch_size)
                window = window_of_step(config, step)
                state, metrics = train_steps[window](state, batch)
                step += 1
                # Looked at only now, with the next step queued, so that the devices never wait for the host.
                if pending:
                    self._look(*pending)
                pending = (step, window, metrics)
                evaluate = step == total or step % config.evaluation.every_steps == 0
                save = step == total or step % config.checkpoint.every_steps == 0
                save = save or step in config.checkpoint.keep_steps
                diagnose = config.log.branches_every_steps and step % config.log.branches_every_steps == 0
                if evaluate or save or diagnose:
                    self._look(*pending)
                    pending = None
                    with self.clock.paused():
                        if evaluate:
                            self._evaluate(step, state["parameters"])
                        if diagnose:
                            self._diagnose(step, state["parameters"])
                        if save:
                            self._save(step, state)
            if pending:
                self._look(*pending)
            if self.saved_step != step:
                self._save(step, state)
            self.checkpoints.wait()
        return EXIT_COMPLETE if step == total else EXIT_RESTART

    def _compile(self, step_functions: dict[int, Any], state: Any, shardings: Any) -> dict[int, Any]:
        """Compiles the steps of every window and the evaluation ahead, so that no step's time holds it."""
        compiled = {}
        for window, step_function in step_functions.items():
            started = time.monotonic()
            which = f" for window {window}" if len(step_functions) > 1 else ""
            self.progress.say(f"Compiling the training step{which} …")
            compiled[window] = (
                jax.jit(step_function, donate_argnums=0, out_shardings=(shardings, self.sharding.replicated))
                .lower(state, batch_shapes(self.config, self.sharding.batch))
                .compile()
            )
            self.progress.say(f"Compiled in {time.monotonic() - started:.1f} s.")
        rows = batch_shapes(self.config, self.sharding.batch, self.config.evaluation.batch_size)
        self._eval_step = (
            jax.jit(make_eval_step(self.spec, self.config.loss.chunk_tokens), out_shardings=self.sharding.replicated)
            .lower(state["parameters"], rows, self._token_bytes)
            .compile()
        )
        return compiled

    def _look(self, step: int, window: int, metrics: dict[str, jax.Array]) -> None:
        """Fetches a step's metrics, stops at what is not finite, and logs."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not values.pop("finite"):
            self._not_finite(step, values)
        keys = accounting.KeysSeen(full=values.pop("keys_full"), window=values.pop("keys_window"))
        flops_per_token = accounting.training_flops_per_token(self.config.model, self.spec, keys)
        self.speed.add(window, *self.clock.lap(), flops_per_token)
        if step % self.config.log.every_steps and step != self.config.total_steps:
            return
        values |= self.speed.read()
        if self.writer:
            self.writer.write(step, values)
            self.progress.show(step, values)

    def _not_finite(self, step: int, values: dict[str, float]) -> None:
        rows = ", ".join(f"{source}:{row}" for source, row in self.data.train.row_ids(step - 1)[:8])
        what = (
            f"Step {step} has loss {values['loss']} and gradient norm {values['grad_norm']} (rows {rows}, …); "
            f"its update was not applied, and the last good checkpoint is of step {self.saved_step}"
        )
        if self.config.on_non_finite == "stop":
            raise UserError(
                f"{what}; lower the learning rate, or pass over such steps with --config.on_non_finite=skip."
            )
        self.progress.say(f"{what}; going on.")

    def _evaluate(self, step: int, parameters: Any) -> None:
        """Writes `eval/loss` (nats a target) and `eval/bits_per_byte` of the validation rows."""
        batches, size = self.evaluation[step == self.config.total_steps], self.config.evaluation.batch_size
        sums = [
            self._eval_step(parameters, self.split.to_devices(batches[index], size), self._token_bytes)
            for index in range(len(batches))
        ]
        totals = {name: sum(float(entry[name]) for entry in jax.device_get(sums)) for name in sums[0]}
        values = {
            "eval/loss": totals["nats"] / totals["targets"],
            "eval/bits_per_byte": totals["nats"] / np.log(2) / totals["text_bytes"],
        }
        if self.writer:
            self.writer.write(step, values)
            self.progress.say(
                f"step {step:,} · validation loss {values['eval/loss']:.4f} · "
                f"{values['eval/bits_per_byte']:.4f} bits per byte ({totals['targets']:,.0f} tokens)"
            )

    def _diagnose(self, step: int, parameters: Any) -> None:
        """Writes `branches/…`: what each branch of the local layers does on the first validation batch."""
        batch = self.split.to_devices(self.evaluation[False][0], self.config.evaluation.batch_size)
        values = self._branch_diagnostics(parameters, batch)
        if self.writer:
            self.writer.write(step, values)

    @functools.cached_property
    def _branch_diagnostics(self) -> Any:
        return branch_diagnostics(self.spec, self.config, self.sharding)

    @functools.cached_property
    def _token_bytes(self) -> jax.Array:
        table = np.zeros(self.config.model.vocab_size, np.int32)
        token_bytes = self.data.vocabulary.token_bytes()
        table[: len(token_bytes)] = token_bytes
        return jax.device_put(table, self.sharding.replicated)

    def _save(self, step: int, state: Any) -> None:
        """Starts to save a step whose metrics were looked at, so are known to be finite."""
        self.checkpoints.save(step, state, self.meta)
        self.saved_step = step

    def _profile(self, step: int) -> None:
        first, last = tuple(self.config.log.profile_steps) or (None, None)
        if step == first:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self._profiling.callback(jax.profiler.stop_trace)
        elif step == last:
            self._profiling.close()  # Where the run was continued after the first step nothing is to be stopped.


def state_layout(spec: ModelSpec, optimizer: Any, sharding: Sharding) -> tuple[Any, Any]:
    """Shapes and shardings of {"parameters", "optimizer", "step"}."""
    parameters = sharding.parameters(spec.logical, spec.shapes)
    optimizer_shapes = jax.eval_shape(optimizer.init, spec.shapes)
    shapes = {
        "parameters": spec.shapes,
        "optimizer": optimizer_shapes,
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    shardings = {
        "parameters": parameters,
        "optimizer": sharding.like_parameters(optimizer_shapes, spec.shapes, parameters),
        "step": sharding.replicated,
    }
    return shapes, shardings


def _first_state(
    config: ConfigDict,
    optimizer: Any,
    spec: ModelSpec,
    sharding: Sharding,
    shapes: Any,
    shardings: Any,
    meta: dict[str, Any],
) -> tuple[Any, int]:
    """Returns the (state, step) of a run that has no checkpoint yet: a new one, or what `config.init_from` names."""
    if config.init_from and config.init_from_what == "everything":
        return state_of_another_run(config, shapes, shardings, meta)

    def state(parameters: Any) -> Any:
        return {"parameters": parameters, "optimizer": optimizer.init(parameters), "step": jnp.zeros((), jnp.int32)}

    if config.init_from:
        parameters, step, _ = parameters_of(config.init_from, config.init_from_step, spec, sharding)
        multihost.say(f"Starting from the parameters of step {step} of {config.init_from}.")
        return jax.jit(state, out_shardings=shardings, donate_argnums=0)(parameters), 0
    initialise = jax.jit(lambda: state(initial_parameters(config.model, config.seed)), out_shardings=shardings)
    return initialise(), 0


def _say_goodbye(status: int, config: ConfigDict, workdir: epath.Path, command: str) -> None:
    logs = f"{workdir}/metrics.jsonl" + (f" and {workdir}/tensorboard" if config.log.tensorboard else "")
    multihost.say(f"Logs: {logs} · checkpoints: {workdir}/checkpoints")
    if status == EXIT_RESTART:
        multihost.say(f"Stopped by a signal and saved. To continue: {command}")
    else:
        multihost.say(f"Complete. To train longer: {command} --config.total_steps=…")


def main(config: ConfigDict, recipe: str) -> int:
    """Entry point behind the flags."""
    workdir = flags.FLAGS.workdir or f"runs/{recipe}"
    platform.configure(epath.Path(workdir) / "compiled" if config.deterministic else None)
    multihost.join()
    command = shlex.join(["python", "-m", "rattn.train", *sys.argv[1:]])
    return train(config, workdir, command, flags.FLAGS.turn_file)


if __name__ == "__main__":
    multihost.define_flags()
    flags.DEFINE_string("workdir", None, "Folder of logs and checkpoints; runs/RECIPE by default.")
    flags.DEFINE_string("turn_file", None, "Trainings that name the same file train one after another.")
    run_main(main)
