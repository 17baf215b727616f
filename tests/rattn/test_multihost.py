"""Two real processes of four CPU devices each, joined on localhost."""

import shutil
import signal
import socket

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rattn.multihost import BatchSplit
from rattn.sharding import Sharding, make_mesh
from tests.runs import finish, interrupt, lines, start

MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.seq=2"]


def start_two(workdir, stream_folder):
    """Two processes of four devices; the mesh's `data` axis crosses from one to the other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"--coordinator_address=localhost:{free.getsockname()[1]}"
    joined = [*MESH, address, "--num_processes=2"]
    return [start(workdir, stream_folder, *joined, f"--process_id={index}", devices=4) for index in range(2)]


@pytest.fixture(scope="module")
def two(tmp_path_factory, stream_folder):
    """The workdir of a run by two processes that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    results = [finish(process) for process in start_two(workdir, stream_folder)]
    assert [status for status, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    # Gloo speaks in both.
    assert "validation loss" in results[0][1]
    assert not {"step", "loss", "Compiling", "parameters"} & set(results[1][1].split()), results[1][1]
    return workdir


def test_two_processes_train_as_one(whole, two):
    wanted, alone = lines(two), lines(whole[0])
    assert wanted.keys() == alone.keys()
    for key, values in alone.items():
        for name in values.keys() & {"loss", "eval/loss"}:
            # Another order of sums is amplified by training: exact at first, near at the end.
            np.testing.assert_allclose(wanted[key][name], values[name], rtol=1e-5 if key[0] <= 10 else 2e-3)


def test_two_processes_killed_and_stopped_and_resumed_equal_the_uninterrupted_run(two, tmp_path, stream_folder):
    workdir = tmp_path / "run"
    processes = start_two(workdir, stream_folder)
    interrupt(processes[0], workdir, 25, 50, signal.SIGKILL)
    # The other one cannot go on alone; whether it notices or waits, a scheduler ends it.
    for process in processes:
        process.kill()
        finish(process)
    processes = start_two(workdir, stream_folder)
    interrupt(processes[0], workdir, 60, 85, signal.SIGTERM, also=processes[1])
    results = [finish(process) for process in processes]
    assert [status for status, _, _ in results] == [75, 75], results[0][2] + results[1][2]
    assert "Continuing from step" in results[0][1]
    results = [finish(process) for process in start_two(workdir, stream_folder)]
    assert [status for status, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    assert lines(workdir) == lines(two)


def test_one_process_on_another_mesh_continues_what_two_began(two, tmp_path, stream_folder):
    workdir, wanted = tmp_path / "run", lines(two)
    shutil.copytree(two, workdir)
    for folder in (workdir / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > 80:
            shutil.rmtree(folder)
    status, out, err = finish(start(workdir, stream_folder, devices=1))
    assert status == 0, err
    assert "Continuing from step 80." in out
    for key, values in lines(workdir).items():
        for name in values.keys() & {"loss", "eval/loss"}:
            np.testing.assert_allclose(values[name], wanted[key][name], rtol=1e-5, err_msg=f"{key} {name}")


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "seq": 4}, {"fsdp": 2, "seq": 2, "model": 2}])
def test_rows_become_the_arrays_they_would_be_on_one_device(mesh, miniature):
    config = miniature()
    config.mesh.update({"data": 1, **mesh})
    sharding = Sharding(make_mesh(config.mesh))
    split = BatchSplit(sharding.batch)
    assert split.rows(8) == list(range(8))
    value = np.arange(8 * 32).reshape(8, 32)
    array = split.to_devices({"tokens": value}, 8)["tokens"]
    np.testing.assert_array_equal(np.asarray(array), value)
    assert array.sharding.spec == P(("data", "fsdp"), "seq")
    assert len(array.addressable_shards) == jax.device_count()
