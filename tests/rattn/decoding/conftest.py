"""Miniatures of every mixer, decoded by shared compiled functions."""

import functools
import re
import zlib

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import shared_memory
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas import devices
from rattn.config import load_config, validate
from rattn.decoding.decoder import Decoder
from rattn.generate import on_devices
from rattn.model.parameters import model_spec

TWO_MIXERS = {"pattern": ("rattention", "full"), "rope_pattern": (True, False)}
# Two layers with heads that the kernels for a Hopper take.
WIDE_HEADS = {
    "layers": 2,
    "width": 64,
    "query_heads": 8,
    "kv_heads": 2,
    "head_dim": 128,
    "mlp_width": 64,
    "vocab_size": 64,
    "window": 64,
    "compute_dtype": "bfloat16",
}
TOKENS = np.random.default_rng(7).integers(0, 11, (3, 24)).astype(np.int32)


def drawn(path, shape):
    """A parameter drawn by NumPy, which compiles nothing; norm scales of their own, so that an exchange would show."""
    name = path[-1].key
    if name == "scale":
        return np.linspace(0.5, 1.5, shape.size, dtype=np.float32).reshape(shape.shape)
    seed = zlib.crc32(jax.tree_util.keystr(path).encode())
    scale = 1.0 if name == "embedding_VD" else 0.3
    return scale * np.random.default_rng(seed).standard_normal(shape.shape, np.float32)


@pytest.fixture
def hopper(monkeypatch):
    """Has kernels ask for a Hopper and find one."""
    monkeypatch.setattr(devices, "on_hopper", lambda: True)
    monkeypatch.setattr(devices, "multiprocessors", lambda: 132)


@pytest.fixture
def interpreter(monkeypatch):
    """Lets a kernel of Mosaic GPU end with barriers whose last phase nobody waited for, as the hardware does."""

    def deallocate(barrier):
        with barrier.cv:
            barrier.ref_count -= 1

    monkeypatch.setattr(shared_memory.Barrier, "deallocate", deallocate)


def races(printed):
    """Returns the races that Pallas' search printed, but for copies to where a warpgroup has read.

    The search wants a fence between the two. A barrier does, as in CUTLASS.
    """
    found = printed.split("RACE DETECTED")[1:]
    return [race for race in found if "read of" not in race or not re.search(r"write of [^\n]*\(Copies\.", race)]


def lowered_step(mini, batch, capacity):
    """Returns a step as it is lowered for a Hopper."""
    cache = mini.decoder.empty_cache(batch, capacity)
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        step = jax.jit(lambda *x: mini.decoder._step(*x)).trace(mini.weights, cache, np.zeros(batch, np.int32))
        return step.lower(lowering_platforms=("cuda",)).as_text()


def check_attention(miniature, attention, changes):
    """A model's steps are those of XLA's attention: prompts of three lengths and twenty tokens, with two folds.

    The bound is `test_products`'s.
    """
    tokens, found = np.random.default_rng(3).integers(0, 64, (3, 90)).astype(np.int32), []
    for how in ("xla", attention):
        mini = miniature(fold_tokens=8, attention=how, **changes)
        rows = [row[:length] for row, length in zip(tokens, (70, 66, 3), strict=True)]
        _, cache = mini.chunk(mini.decoder.empty_cache(3, 96), rows, 70)
        found.append(mini.steps(cache, tokens[:, 70:].T)[0])
    error = np.sqrt(np.mean((found[1] - found[0]) ** 2) / np.mean(found[0] ** 2))
    assert 0 < error < np.sqrt(2 * 15 * mini.model.layers) * 2.0**-8 / np.sqrt(3)


class Miniature:
    """A model of a few hundred weights, its training forward and its decoder."""

    def __init__(self, fold_tokens, state_dtype="float32", sharding=None, attention="xla", products="xla", **changes):
        config = load_config("configs/base.py")
        config.model.update(width=16, layers=5, query_heads=4, kv_heads=2, head_dim=4, mlp_width=24, vocab_size=11)
        config.model.update(
            pattern=("rattention", "swa", "linear", "full"), rope_pattern=(True, True, False, True), window=3
        )
        config.model.update(changes)
        self.model = validate(config).model
        self.spec = model_spec(self.model)
        self.parameters = jax.tree_util.tree_map_with_path(drawn, self.spec.shapes)
        self.decoder = Decoder(
            self.model,
            sharding or on_devices(1, 1),
            fold_tokens=fold_tokens,
            state_dtype=state_dtype,
            attention=attention,
            products=products,
        )
        self.weights = self.decoder.weights(self.parameters)
        self._forward = jax.jit(lambda parameters, *inputs: self.spec.merge(parameters)(*inputs))

    def trained(self, tokens, segments=None):
        """Logits of the training forward, as NumPy."""
        return np.asarray(self._forward(self.parameters, tokens, segments))

    def chunk(self, cache, rows, length, segments=None):
        """Prefills lists of tokens, each at most `length` long; returns a list of their logits, and the cache."""
        counts = np.array([len(row) for row in rows])
        tokens = np.zeros((len(rows), length), np.int32)
        for row, padded in zip(rows, tokens, strict=True):
            padded[length - len(row) :] = row
        x_BTD, cache = self.decoder.prefill(self.weights, cache, tokens, counts, segments)
        logits = np.asarray(self.decoder.logits(self.weights, x_BTD))
        return [one[length - count :] for one, count in zip(logits, counts, strict=True)], cache

    def steps(self, cache, tokens_TB):
        """Decodes given tokens one at a time; returns logits [T, B, V] and the cache."""
        found = []
        for tokens_B in tokens_TB:
            logits, cache = self.decoder.step(self.weights, cache, tokens_B)
            found.append(np.asarray(logits))
        return np.stack(found), cache


@pytest.fixture(scope="session")
def miniature():
    """Returns a function of the miniature's arguments, which makes each once."""
    return functools.cache(Miniature)
