"""Goldens that a person can read; `make goldens` writes them anew."""

import json
import pathlib

import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from rattn.config import load_config, to_json, validate
from rattn.model.parameters import flatten, model_spec
from rattn.sharding import AXES, Sharding, ShardingRules
from tests.runs import STEPS, lines

GOLDENS = pathlib.Path("tests/goldens")
RECIPES = ("tiny", "small", "rattn_3b", "rattn_12b")


@pytest.fixture
def golden(request):
    """Returns a function (file name, text) -> the golden's text, which is written first where that was asked for."""

    def read(name, text):
        if request.config.getoption("--regenerate-goldens"):
            GOLDENS.mkdir(exist_ok=True)
            (GOLDENS / name).write_text(text)
        return (GOLDENS / name).read_text()

    return read


@pytest.mark.parametrize("recipe", RECIPES)
def test_resolved_config(recipe, golden):
    text = json.dumps(to_json(validate(load_config(f"configs/{recipe}.py"))), indent=1) + "\n"
    assert text == golden(f"{recipe}.config.json", text)


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameter_shapes_and_partition_specs(recipe, golden):
    spec = model_spec(load_config(f"configs/{recipe}.py").model)
    logical, rules = flatten(spec.logical), ShardingRules()
    rows = [
        f"{path}  {tuple(leaf.shape)}  {leaf.dtype}  {tuple(rules.spec(logical[path]))}"
        for path, leaf in flatten(spec.shapes).items()
    ]
    text = "\n".join(rows) + "\n"
    assert text == golden(f"{recipe}.parameters.txt", text)


@pytest.mark.parametrize(("recipe", "v6e_slices"), [("rattn_3b", 2), ("rattn_12b", 4)])
def test_parameter_shards_on_both_pods(recipe, v6e_slices, golden):
    """What each device of the paper's pods holds, fsdp over 256 devices and the rest along data."""
    config = load_config(f"configs/{recipe}.py")
    spec = model_spec(config.model)
    for pod, devices in (("v5p-8x8x8", 512), (f"v6e-16x16-x{v6e_slices}", 256 * v6e_slices)):
        sizes = (devices // config.mesh.fsdp, config.mesh.fsdp, config.mesh.seq, config.mesh.model)
        mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        shardings = flatten(Sharding(mesh).parameters(spec.logical, spec.shapes))
        rows = [f"mesh {dict(zip(AXES, sizes, strict=True))}"] + [
            f"{path}  {leaf.shape}  {tuple(shardings[path].spec)}  a device {shardings[path].shard_shape(leaf.shape)}"
            for path, leaf in flatten(spec.shapes).items()
        ]
        text = "\n".join(rows) + "\n"
        assert text == golden(f"{recipe}.{pod}.parameters.txt", text)


def test_a_hundred_losses(whole, golden):
    """Bit equality holds on one machine (see test_train); other CPUs round differently and 100 steps amplify it."""
    losses = [values["loss"] for (_, kind), values in sorted(lines(whole[0]).items()) if kind == "train"]
    assert len(losses) == STEPS
    text = "\n".join(f"{step + 1} {loss:.6f}" for step, loss in enumerate(losses)) + "\n"
    wanted = [float(line.split()[1]) for line in golden("miniature.losses.txt", text).splitlines()]
    np.testing.assert_allclose(losses, wanted, rtol=2e-3)
    np.testing.assert_allclose(losses[:10], wanted[:10], rtol=1e-5)
