"""What a preparation is asked for, from the command line or from `config.data`, and running a missing one."""

import dataclasses
import os
import subprocess
import sys

from etils import epath
from ml_collections import ConfigDict

from rattn.data.stream import MANIFEST_FILE, Prepared
from rattn.data.vocabulary import load_vocabulary
from rattn.errors import UserError


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of a preparation; `rattn.prepare` documents each."""

    task: str
    module: str = ""
    files: tuple[str, ...] = ()
    vocabulary: str = "bytes"
    train_vocabulary_size: int = 0
    validation_fraction: float = 0.05

    @classmethod
    def from_config(cls, data_config: ConfigDict) -> "Request":
        """Takes `config.data`, whose `files` is a comma-separated string of paths and globs."""
        files = data_config.files.split(",") if isinstance(data_config.files, str) else data_config.files
        return cls(
            task=data_config.task,
            module=data_config.module,
            files=tuple(filter(None, files)),
            vocabulary="bytes" if data_config.train_vocabulary_size else data_config.vocabulary,
            train_vocabulary_size=data_config.train_vocabulary_size,
            validation_fraction=data_config.validation_fraction,
        )

    def command_line(self, out: epath.PathLike) -> list[str]:
        """Returns the arguments of `python -m rattn.prepare`."""
        line = ["--task", self.task, "--out", str(out), "--vocabulary", self.vocabulary]
        line += ["--validation_fraction", repr(self.validation_fraction)]
        line += ["--train_vocabulary_size", str(self.train_vocabulary_size)]
        line += ["--module", self.module] if self.module else []
        return [*line, "--files", *self.files] if self.files else line

    def check_same(self, prepared: Prepared) -> None:
        """Raises UserError if `prepared` was made from another request. (Vocabularies are compared by their ids.)

        A request without a task takes anything.
        """
        if not self.task:
            return
        made = prepared.manifest["arguments"]
        for key, value in dataclasses.asdict(self).items():
            value = list(value) if isinstance(value, tuple) else value
            if key != "vocabulary" and value != made[key]:
                raise UserError(
                    f"{str(prepared.folder)!r} was prepared with {key} {made[key]!r} and this asks for {value!r}; "
                    "name another folder, or delete that one to prepare it again."
                )
        if self.train_vocabulary_size:
            return
        wanted = load_vocabulary(self.vocabulary)
        found = prepared.manifest["vocabulary"]
        if wanted.fingerprint != found["fingerprint"]:
            raise UserError(
                f"{str(prepared.folder)!r} was prepared with another vocabulary ({found['name']} of {found['size']} "
                f"ids, fingerprint {found['fingerprint'][:12]}) than {self.vocabulary!r} ({wanted.name} of "
                f"{wanted.size} ids, fingerprint {wanted.fingerprint[:12]}); change the vocabulary, or prepare into "
                "another folder."
            )


def ensure_prepared(data_config: ConfigDict) -> None:
    """Prepares what `config.data` names, in a subprocess, if it is not there; one process of a run calls it.

    Raises:
      UserError: the preparation failed (it has said why), or the folder holds another one, or none and no task.
    """
    if data_config.source != "stream":
        return
    request = Request.from_config(data_config)
    if (epath.Path(data_config.path) / MANIFEST_FILE).exists():
        request.check_same(Prepared(data_config.path))
        return
    if not request.task:
        raise UserError(
            f"config.data.path is {str(data_config.path)!r}, which holds no prepared data, and config.data.task is "
            "empty; name a folder that rattn.prepare wrote, or a task."
        )
    # A subprocess, so that neither TensorFlow nor seqio is ever imported here; the accelerators stay this process's.
    command = [sys.executable, "-m", "rattn.prepare", *request.command_line(data_config.path)]
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
    if done.returncode:
        raise UserError(
            f"Preparing task {request.task!r} into {str(data_config.path)!r} failed with status {done.returncode}; "
            "the reason stands above."
        )
