"""Strict test mode: fake devices, strict promotion, warnings as errors, one compilation cache."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("RATTN_TEST_PLATFORM", "cpu")
# Several processes share a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Tests compile much and compute little.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import pathlib

import jax
import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()
CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects (and so reports) the tests that need a GPU where there is none."""
    if jax.default_backend() == "gpu":
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuses to run without the eight devices that the sharding tests stand on."""
    if jax.default_backend() == "cpu":
        assert jax.device_count() == 8, f"tests need 8 fake CPU devices, found {jax.device_count()}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make goldens`."""
    parser.addoption("--regenerate-goldens", action="store_true", help="write tests/goldens instead of comparing")
