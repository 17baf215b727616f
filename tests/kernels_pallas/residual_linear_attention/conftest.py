import pytest
from rla_suite import CHUNK

from kernels_pallas.residual_linear_attention import chunked


@pytest.fixture(autouse=True)
def small_chunk(monkeypatch):
    """Several chunks in a short sequence."""
    monkeypatch.setattr(chunked, "CHUNK", CHUNK)
