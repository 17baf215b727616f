"""Sweep files over the miniature recipe, and a runner on stand-in commands."""

import json
import pathlib
import sys

import pytest

from rattn.config import load_config, to_json
from rattn.sweeping.points import load_sweep
from rattn.sweeping.results import Results
from rattn.sweeping.runner import Options, Runner
from rattn.sweeping.table import Table
from tests.rattn.conftest import RECIPE

FAKE = str(pathlib.Path(__file__).with_name("fake_point.py"))
BRANCHES = """
def sweep(add):
    small = add({"checkpoint.keep_steps": (40,)}, name="small", total_steps=60)
    add({"init_from_step": 40}, name="large", total_steps=200, init_from=small)
"""


@pytest.fixture
def sweep_of(tmp_path):
    """Returns a function (text of a sweep file, recipe arguments, **dotted overrides) -> the sweep."""

    def make(text, arguments="", **changes):
        file = tmp_path / "sweep.py"
        file.write_text(text)
        config = load_config(RECIPE, arguments)
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
        return load_sweep(str(file), f"{RECIPE}:{arguments}".removesuffix(":"), config)

    return make


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns a function (sweep, fault, **options) -> (status, results, calls), on stand-in commands."""
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path.cwd()))
    log = tmp_path / "calls"

    def call(sweep, fault="::", workdir="sweep", chosen=None, **options):
        monkeypatch.setenv("FAKE_POINT", fault)
        log.write_text("")
        configs = {point.name: to_json(point.config) for point in sweep.points}
        log.with_name("calls.configs").write_text(json.dumps(configs))
        results = Results(tmp_path / workdir)
        launcher = f"{sys.executable} {FAKE} {log} {{command}}"
        points = list(sweep.points) if chosen is None else chosen
        table = Table([point.name for point in points])
        status = Runner(sweep, results, Options(launcher=launcher, **options), table).run(points)
        return status, results, log.read_text().splitlines()

    return call
