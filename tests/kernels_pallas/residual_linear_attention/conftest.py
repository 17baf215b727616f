import pytest

from kernels_pallas.residual_linear_attention import chunked
from tests.kernels_pallas.residual_linear_attention.rla_suite import CHUNK


@pytest.fixture(autouse=True)
def small_chunk(monkeypatch):
    """Several chunks in a short sequence."""
    monkeypatch.setattr(chunked, "MIN_CHUNK", CHUNK)
