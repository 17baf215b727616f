"""The compiled training step exchanges what its sharding calls for, and the audit notices what it does not."""

import dataclasses

import pytest

from rattn.config import load_config, validate
from rattn.planning.collectives import Collective, find_collectives
from rattn.planning.compiled import compile_step
from rattn.planning.topologies import parse_topology
from scripts.audit_collectives import unexpected

T = 2048


def audited_config():
    """Two layers of small width on all axes but `data`, with what a real run uses; T / seq is no width of the model."""
    config = load_config("tests/recipes/miniature.py", "window=256")
    config.context_length = T
    config.batch_size = config.evaluation.batch_size = 4
    config.model.update(width=256, head_dim=128, mlp_width=768, vocab_size=3072, compute_dtype="bfloat16")
    config.model.remat = "block"
    config.loss.chunk_tokens = 512
    config.mesh.update(data=1, fsdp=2, seq=2, model=2)
    return validate(config)


def test_collectives_of_the_compiled_step_are_expected():
    config = audited_config()
    executable, _ = compile_step(config, parse_topology("v5p:2x2x2"))
    found = find_collectives(executable.as_text())
    assert unexpected(found, config) == []
    halos = [one for one in found if one.kind == "collective-permute" and one.shape.startswith("bf16[2,256,1,128]")]
    assert halos, "the local layer's halo of W keys is gone"


EXPECTED = [
    Collective("all-reduce", "bf16[2,1024,256]", 2, 2, 1e6, "btd,df->btf"),
    Collective("all-gather", "bf16[2,2048,1,128]", 2, 4, 1e6, "gathered keys and values"),
    Collective("reduce-scatter", "bf16[2,1024,1,128]", 2, 2, 1e6, "their gradients"),
    Collective("collective-permute", "bf16[2,256,1,128]", 2, 4, 1e5, "halo"),
    Collective("all-gather", "bf16[256,384]", 2, 4, 1e6, "weights"),
    Collective("all-gather", "s32[2,2048]", 2, 1, 1e4, "document ids"),
]


@pytest.mark.parametrize(
    ("index", "change", "sentence"),
    [
        (0, {"kind": "all-gather"}, "2 × all-gather of bf16[2,1024,256] among 2 devices, for btd,df->btf"),
        (0, {"group": 4}, "2 × all-reduce of bf16[2,1024,256] among 4 devices"),
        (1, {"count": 6}, "6 × all-gather of bf16[2,2048,1,128]"),
        (3, {"shape": "bf16[2,1024,1,128]"}, "4 × collective-permute of bf16[2,1024,1,128]"),
    ],
    ids=["activations", "sums over tokens", "keys of a local layer", "a halo of the whole shard"],
)
def test_the_audit_notices(index, change, sentence):
    assert unexpected(EXPECTED, audited_config()) == []
    planted = [*EXPECTED[:index], dataclasses.replace(EXPECTED[index], **change), *EXPECTED[index + 1 :]]
    assert [complaint.startswith(sentence) for complaint in unexpected(planted, audited_config())] == [True]
