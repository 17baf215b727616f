"""What scripts/compile_gpu.py says where it cannot compile; that it can needs JAX's CUDA plugin."""

import pytest

from rattn.errors import UserError
from scripts.compile_gpu import absent_gpus


@pytest.mark.parametrize(
    ("topology", "sentence"),
    [
        ("h20:8", "There is no GPU target 'h20', did you mean 'h200'"),
        ("h200:many", "'h200:many' names no number of GPUs"),
    ],
)
def test_a_target_that_is_none(topology, sentence):
    with pytest.raises(UserError, match=sentence), absent_gpus(topology):
        pass


def test_without_the_plugin(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(UserError, match="install the `cuda` extra"), absent_gpus("h200:2"):
        pass
