"""Training through the public command: what is killed and resumed equals what was left alone."""

import fcntl
import json
import shutil
import signal
import time
import types

import numpy as np
import pytest

from rattn import turns
from rattn.config import load_config
from rattn.errors import UserError
from rattn.train import train
from tests.rattn.conftest import RECIPE
from tests.runs import STEPS, assert_same_state, finish, interrupt, lines, start, start_on_gpu


def test_killed_and_stopped_and_resumed_equals_uninterrupted_bit_for_bit(whole, tmp_path, stream_folder, miniature):
    workdir = tmp_path / "run"
    process = start(workdir, stream_folder)
    killed_at = interrupt(process, workdir, 25, 50, signal.SIGKILL)
    finish(process)
    assert not (workdir / "checkpoints" / str(STEPS)).exists()
    process = start(workdir, stream_folder)
    stopped_at = interrupt(process, workdir, 60, 85, signal.SIGTERM)
    status, out, err = finish(process)
    assert status == 75, err
    assert "Continuing from step" in out
    assert "To continue: python -m rattn.train" in out
    status, out, err = finish(start(workdir, stream_folder))
    assert status == 0, err
    note = f"killed at {killed_at}, stopped at {stopped_at}"
    assert lines(workdir) == lines(whole[0]), note
    assert_same_state(workdir, whole[0], miniature(f"steps={STEPS}"), note)


@pytest.mark.gpu
def test_a_deterministic_run_on_a_gpu_resumes_bit_for_bit(tmp_path):
    """The Hopper kernels, packed documents, in bfloat16; both runs with the first one's tuning choices."""
    arguments = ["--config.deterministic=true", "--config.context_length=256", "--config.model.head_dim=128"]
    arguments += ["--config.model.compute_dtype=bfloat16", "--config.model.remat=save_products"]
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    status, _, err = finish(start_on_gpu(whole, *arguments))
    assert status == 0, err
    shutil.copytree(whole / "compiled", workdir / "compiled")
    process = start_on_gpu(workdir, *arguments)
    killed_at = interrupt(process, workdir, 25, 50, signal.SIGKILL)
    finish(process)
    status, out, err = finish(start_on_gpu(workdir, *arguments))
    assert status == 0, err
    assert "Continuing from step" in out
    config = load_config(RECIPE, f"steps={STEPS}")
    config.model.head_dim = 128
    assert lines(workdir) == lines(whole), f"killed at {killed_at}"
    assert_same_state(workdir, whole, config, f"killed at {killed_at}")


def test_another_mesh_continues_with_the_same_losses(whole, tmp_path, stream_folder):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    for folder in (workdir / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > 60:
            shutil.rmtree(folder)
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.model=2"]
    status, out, err = finish(start(workdir, stream_folder, *mesh, devices=8))
    assert status == 0, err
    assert "Continuing from step 60." in out
    ours, theirs = lines(workdir), lines(whole[0])
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        for name, value in values.items():
            np.testing.assert_allclose(
                value, theirs[key][name], rtol=1e-5 if "loss" in name else 1e-3, err_msg=f"{key} {name}"
            )


def test_a_run_leaves_what_it_promises(whole):
    workdir, out = whole
    assert {path.name for path in workdir.iterdir()} >= {"config.json", "metrics.jsonl", "tensorboard", "checkpoints"}
    assert any(path.name.startswith("vocabulary") for path in workdir.iterdir())
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert first.keys() == {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "data_wait_fraction"}
    values = lines(workdir)
    assert values[STEPS, "train"]["loss"] < values[1, "train"]["loss"] - 1
    assert values[STEPS, "eval"]["eval/bits_per_byte"] == pytest.approx(
        values[STEPS, "eval"]["eval/loss"] / np.log(2), rel=1e-2
    )
    for words in ("parameters", "tokens a step", "FLOPs a token", "memory estimate", "decode cache", "validation loss"):
        assert words in out
    assert f"Logs: {workdir}/metrics.jsonl" in out
    assert "To train longer: python -m rattn.train" in out


def test_a_complete_run_says_so(whole, miniature, capsys):
    assert train(miniature(f"steps={STEPS}"), whole[0]) == 0
    assert f"The run is complete at step {STEPS}; to train longer, raise config.total_steps." in capsys.readouterr().out


def copy_of(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def test_another_architecture_is_refused_by_name(whole, miniature):
    with pytest.raises(UserError) as error:
        train(miniature(f"steps={STEPS}", model__mlp_width=32), whole[0])
    path = "made by another architecture: parameter blocks.layers.0.mlp.down_FD is"
    assert f"{path} (1, 24, 16) float32 there and (1, 32, 16) float32 in this config" in str(error.value)
    with pytest.raises(UserError, match=r"softmax_norm.scale is \(1, 4, 8\) float32 there and absent in this config"):
        train(miniature(f"steps={STEPS},mixer=linear"), whole[0])


def test_other_data_is_refused(whole, miniature):
    with pytest.raises(UserError, match="was trained on data with fingerprint"):
        train(miniature(f"steps={STEPS}", data__source="synthetic"), whole[0])


def test_half_written_checkpoint_is_skipped_and_said(whole, tmp_path, miniature, capsys):
    workdir = copy_of(whole, tmp_path)
    shutil.copytree(workdir / "checkpoints" / "100", workdir / "checkpoints" / "110.orbax-checkpoint-tmp")
    train(miniature(f"steps={STEPS}"), workdir)
    out = capsys.readouterr().out
    assert "Skipping the half-written checkpoint of step 110" in out
    assert "complete at step 100" in out


def test_damaged_checkpoint_names_the_one_before(whole, tmp_path, miniature):
    workdir = copy_of(whole, tmp_path)
    for file in (workdir / "checkpoints" / "100" / "state").rglob("*"):
        if file.is_file() and "d" in file.parts[-2:-1]:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoints/100 cannot be read .* or rename it to continue from step 90"):
        train(miniature(f"steps={STEPS + 1}"), workdir)


def test_vocabulary_larger_than_the_model_is_refused(miniature, tmp_path):
    with pytest.raises(
        UserError, match=r"config.model.vocab_size is 200 and the vocabulary of config.data has 259 ids"
    ):
        train(miniature(model__vocab_size=200), tmp_path)


def test_changed_settings_are_said(whole, miniature, capsys):
    train(miniature(f"steps={STEPS}", optimizer__learning_rate=0.5), whole[0])
    assert "Changed since step 100: config.optimizer.learning_rate 0.01 -> 0.5" in capsys.readouterr().out


def test_a_workdir_that_is_no_folder_or_in_use_gets_a_sentence(miniature, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--workdir .*file/run cannot be written \(.*\); name another folder"):
        train(miniature(), tmp_path / "file" / "run")
    with open(tmp_path / "training.lock", "w") as another:
        fcntl.flock(another, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"Another training is at work in .*; wait for its end, or name another"):
            train(miniature(), tmp_path)


def test_a_non_finite_step_stops_with_its_rows_and_keeps_the_last_good_checkpoint(miniature, tmp_path):
    """A learning rate beyond float32 sends the weights to infinity at the first update."""
    config = miniature(optimizer__learning_rate=1e38, optimizer__warmup_steps=2, optimizer__weight_decay=1e3)
    config.checkpoint.every_steps = 2
    with pytest.raises(UserError) as error:
        train(config, tmp_path)
    sentence = str(error.value)
    step = int(sentence.split()[1])
    assert f"Step {step} has loss" in sentence
    assert "rows speeches:" in sentence
    assert f"the last good checkpoint is of step {(step - 1) // 2 * 2}" in sentence
    kept = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert max(kept, default=0) < step


def test_a_non_finite_step_is_passed_over_when_told_to(miniature, tmp_path, capsys, monkeypatch):
    """In a workdir with a relative path, as users type it, and after the training before it ended."""
    config = miniature("steps=8", optimizer__learning_rate=1e38, optimizer__warmup_steps=2, optimizer__weight_decay=1e3)
    config.on_non_finite = "skip"
    config.log.profile_steps = (3, 9)  # The run ends before.
    monkeypatch.chdir(tmp_path)
    with open("lock", "w") as another:
        fcntl.flock(another, fcntl.LOCK_EX)
        ends = types.SimpleNamespace(
            monotonic=time.monotonic, time_ns=time.time_ns, sleep=lambda _: fcntl.flock(another, fcntl.LOCK_UN)
        )
        monkeypatch.setattr(turns, "time", ends)
        assert train(config, "run", turn_file="lock") == 0
    out = capsys.readouterr().out
    assert "Compiled; waiting for another training to end" in out
    assert "its update was not applied" in out
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    config.total_steps = 10  # What is continued after the first of them has nothing to stop.
    assert train(config, "run") == 0
