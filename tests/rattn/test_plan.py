"""The plan: slices by name, formulas checked by hand, the paper's table, and the compiler's word on a small step."""
# ruff: noqa: E501 - the lines of HLO text are as long as they are.

import json
import subprocess
import sys

import numpy as np
import pytest

from rattn import accounting, plan
from rattn.config import load_config, validate
from rattn.errors import UserError
from rattn.model.parameters import model_spec
from rattn.planning import paper, report, roofline
from rattn.planning.collectives import by_kind, find_collectives
from rattn.planning.forecast import forecast, variants
from rattn.planning.topologies import parse_topology
from scripts import plan_table

RECIPE_12B = "configs/rattn_12b.py"


def small_config(**changes):
    config = load_config("tests/recipes/miniature.py")
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return validate(config)


@pytest.mark.parametrize(
    ("name", "slices", "chips", "devices"),
    [("v5p:8x8x8", 1, 512, 512), ("v6e:16x16", 4, 1024, 1024), ("tpu7x:2x2x1", 1, 4, 8), ("v4:4x4x8", 2, 256, 512)],
)
def test_chips_and_devices_are_told_apart(name, slices, chips, devices):
    topology = parse_topology(name, slices)
    assert (topology.chips, topology.devices) == (chips, devices)


@pytest.mark.parametrize("name", ["v6e", "v6e:3x5", "v6e:16x32", "v5p:8x8", "v5p:8x8x4", "v5p:32x32x32", "h100:2x2"])
def test_an_unknown_topology_gets_the_known_ones(name):
    with pytest.raises(UserError, match=r"There is no TPU topology .*known are v5e/v6e: 2x2, .* v4/v5p/tpu7x: 2x2x1"):
        parse_topology(name)


def test_a_misspelt_chip_is_guessed():
    with pytest.raises(UserError, match="did you mean 'v5p'"):
        parse_topology("v5pp:2x2x1")


def test_keys_computed_are_whole_blocks():
    """By a mask: a block of keys is computed if any query of the block sees any key of it."""
    for length, window in ((2048, 512), (2048, 513), (2048, 700), (2048, None), (5120, 4096), (256, 64)):
        block = min(1024 if (window or length) >= 4096 else 512, length)
        distance = np.arange(length)[:, None] - np.arange(length)[None, :]
        seen = (distance >= 0) & (distance < (window or length))
        tiles = seen.reshape(length // block, block, length // block, block).any(axis=(1, 3))
        assert roofline.keys_computed(length, window) == pytest.approx(tiles.sum() * block * block / length)


def test_mxu_flops_are_model_flops_and_what_is_done_again():
    config = load_config("configs/rattn_3b.py", "mixer=full")
    config.model.remat = "none"
    config.loss.chunk_tokens = 0
    spec = model_spec(config.model)
    forward = accounting.forward_flops_per_token(config.model, spec, accounting.KeysSeen(0, 0))
    attention = 4 * 16 * 128 * 56 * roofline.keys_computed(4096, None)
    once = 3 * (forward["matrices"] + forward["unembedding"]) + 3.5 * attention
    tokens = 1024 * 4096
    assert roofline.mxu_flops(config, spec) == pytest.approx(once * tokens)
    config.model.remat = "block"
    config.loss.chunk_tokens = 512
    again = forward["matrices"] + forward["unembedding"] + attention
    assert roofline.mxu_flops(config, spec) == pytest.approx((once + again) * tokens)


def test_linear_seconds_scale_from_the_counted_shape():
    """Eight rows of 8192 tokens and 16 heads on 4 chips of two cores: each core has the counted shape once a layer."""
    config = load_config("configs/rattn_3b.py", "context=8192")
    config.batch_size = 8
    cycles = 2 * roofline.OUR_KERNEL["v5p"].forward_cycles + roofline.OUR_KERNEL["v5p"].backward_cycles
    seconds = roofline.linear_seconds(config, parse_topology("v5p:2x2x1"), roofline.OUR_KERNEL["v5p"])
    assert seconds == pytest.approx(42 * cycles / 1.75e9)


def test_last_shard_load_by_counting_keys():
    for shards in (1, 2, 8):
        seen = np.arange(1, 8 * 64 + 1).reshape(shards, -1).mean(axis=1)
        assert roofline.last_shard_load(shards) == pytest.approx(seen[-1] / seen.mean(), rel=5e-3)


def test_network_bytes_by_hand():
    """Two slices of four devices over fsdp: what a ring moves for every weight and gradient."""
    config = small_config(mesh__data=2, mesh__fsdp=4)
    spec = model_spec(config.model)
    matrices = accounting.matrix_parameters(spec)
    embedding = config.model.vocab_size * config.model.width
    mesh = {"data": 2, "fsdp": 4, "seq": 1, "model": 1}
    received = roofline.network_bytes(config, spec, mesh, slices=2)
    assert received["ici weights"] == pytest.approx((2 * matrices + embedding) * 4 * 3 / 4)
    assert received["ici gradients"] == pytest.approx(2 * (matrices + 2 * embedding) * 4 * 3 / 4)
    assert received["dcn gradients"] == pytest.approx(2 * (matrices + 2 * embedding) / 4 * 4 * 1 / 2)
    assert received["ici sequence"] == received["ici activations"] == 0


def test_local_layers_send_no_more_for_longer_rows():
    received = []
    for context in (8192, 32_768, 131_072):
        config = load_config("configs/rattn_3b.py", f"context={context}")
        config.model.pattern, config.model.rope_pattern = ("rattention",), (True,)
        mesh = {"data": 1, "fsdp": 8, "seq": 8, "model": 1}
        received.append(roofline.network_bytes(config, model_spec(config.model), mesh, 1)["ici sequence"])
    assert received[0] > 0
    assert len(set(received)) == 1


def test_local_layers_cost_no_more_a_token_for_longer_rows():
    """But for a row's first window of tokens, which see less: 0.6 % at 8192."""
    costs = []
    for context in (8192, 32_768, 131_072):
        config = load_config("configs/rattn_3b.py", f"context={context}")
        config.model.pattern, config.model.rope_pattern = ("rattention",), (True,)
        tokens = config.batch_size * context
        flops = roofline.mxu_flops(config, model_spec(config.model), seq_shards=8)
        linear = roofline.linear_seconds(config, parse_topology("v5p:8x8x8"), roofline.OUR_KERNEL["v5p"])
        costs.append((flops / tokens, linear / tokens))
    np.testing.assert_allclose(costs, np.broadcast_to(costs[-1], (3, 2)), rtol=6e-3)


def test_state_bytes_on_a_device_are_exact():
    """12B over 256 devices of fsdp: float32 parameters and two moments, all but norm scales of heads split."""
    row = forecast(load_config(RECIPE_12B), parse_topology("v6e:16x16", 4))
    assert row.mesh == {"data": 4, "fsdp": 256, "seq": 1, "model": 1}
    assert row.memory["parameters"] == pytest.approx(row.parameters * 4 / 256, rel=1e-2)
    assert row.memory["optimizer"] == pytest.approx(2 * row.memory["parameters"], rel=1e-6)


def test_largest_batch_is_the_last_that_fits():
    config, topology = load_config(RECIPE_12B), parse_topology("v6e:16x16", 4)
    row = forecast(config, topology)
    assert row.fits
    config.batch_size = row.largest_batch
    assert forecast(config, topology).fits
    config.batch_size += 1024
    assert not forecast(config, topology).fits


def test_variants_are_one_for_each_mixer_and_window():
    rows = variants(load_config(RECIPE_12B), ["full", "swa", "rattention"], [128, 512])
    names = [(row.model.pattern[0], row.model.window) for row in rows]
    assert names == [("full", 128), ("swa", 128), ("swa", 512), ("rattention", 128), ("rattention", 512)]


def test_slices_join_along_data_alone():
    config = load_config(RECIPE_12B)
    config.mesh.update(data=1, fsdp=-1)
    with pytest.raises(UserError, match=r"config\.mesh\.data comes to 1 and there are 2 slices"):
        forecast(config, parse_topology("v6e:16x16", 2))


# The paper's Table 3.


def test_eight_fitted_cells_within_ten_percent_on_average():
    topology, calibration = paper.readings()["v5p:8x8x16"]
    errors = paper.relative_errors(paper.FITTED, topology, calibration, roofline.RELEASED_KERNEL)
    assert len(errors) == 8
    assert np.abs(errors).mean() <= 0.10
    assert calibration.efficiency == pytest.approx(roofline.CALIBRATION.efficiency, abs=5e-3)
    assert calibration.fixed_seconds == pytest.approx(roofline.CALIBRATION.fixed_seconds, abs=5e-3)


def test_four_unseen_cells_within_twenty_percent_each():
    topology, calibration = paper.readings()["v5p:8x8x16"]
    errors = paper.relative_errors(paper.UNSEEN, topology, calibration, roofline.RELEASED_KERNEL)
    assert len(errors) == 4
    assert np.abs(errors).max() <= 0.20
    ours = [paper.forecast(cell, topology, calibration, roofline.OUR_KERNEL["v5p"]) for cell in paper.UNSEEN]
    released = [paper.forecast(cell, topology, calibration, roofline.RELEASED_KERNEL) for cell in paper.UNSEEN]
    assert all(np.less(ours, released))


def test_512_chips_would_have_to_beat_their_peak():
    readings = paper.readings()
    (_, many), (_, few) = readings["v5p:8x8x16"], readings["v5p:8x8x8"]
    assert few.efficiency == pytest.approx(2 * many.efficiency)
    assert few.efficiency > 1 > many.efficiency


# Collectives of a program.

HLO = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: f32[1024,64]) -> f32[1024,16] {
  %input = f32[1024,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[1024,64]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[1024,16]{1,0} dynamic-slice(%all-reduce.1)
}

%body (state: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %state = (s32[], bf16[8,16]) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%state), index=1
  %gather = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, metadata={op_name="step/w"}
  %fusion = f32[1024,16]{1,0} fusion(%gather), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], bf16[8,16]) tuple(%gather)
}

%condition (state: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(15)
  %state = (s32[], bf16[8,16]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(%one)
  %first = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%start, %p)
  %loop = (s32[], bf16[8,16]) while(%first), condition=%condition, body=%body
  %reduce = (f32[100]{0:T(128)}, /*index=1*/f32[28]{0}) all-reduce(%p, %p), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %permute = bf16[8,16]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
  %begun = (bf16[8,16]{1,0}, bf16[8,64]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}
  %ended = bf16[8,64]{1,0} all-gather-done(%begun)
  %parts = ((f32[8,8], f32[4]), (f32[4,8], f32[2])) reduce-scatter-start(%p, %q), replica_groups={{0,1},{2,3}}, to_apply=%add
  %sums = ((f32[50]{0}), f32[50]{0}) all-reduce-start(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
  %out = (bf16[8,16]{1,0}, u32[], token[]) send(%p), channel_id=7, is_host_transfer=true
  ROOT %r = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_collectives_are_counted_through_loops():
    table = by_kind(find_collectives(HLO))
    assert table == {
        "all-gather": {"operations": 2, "runs": 15, "bytes": 15 * 8 * 64 * 2 * 3 / 4},
        "reduce-scatter": {"operations": 2, "runs": 15, "bytes": 14 * 1024 * 64 * 4 * 3 / 4 + (64 + 4) * 4 / 2},
        "all-reduce": {"operations": 2, "runs": 2, "bytes": 2 * (128 + 50) * 4 / 2},
        "collective-permute": {"operations": 1, "runs": 1, "bytes": 8 * 16 * 2},
        "send": {"operations": 1, "runs": 1, "bytes": 8 * 16 * 2},
    }


def test_report_states_the_calibration_and_json_round_trips():
    config = load_config(RECIPE_12B)
    config.context_length = 8192
    config.mesh.update(data=-1, fsdp=64, seq=4)
    rows = [
        forecast(variant, parse_topology("v5p:4x8x8")) for variant in variants(config, ["full", "rattention"], [512])
    ]
    text = report.text(rows, 1e12)
    for words in (
        "fits in 95.73 GiB, largest batch",
        "Calibration",
        "last sees 1.75 times",
        "the fixed cost is not understood",
    ):
        assert words.lower() in text.lower()
    figures = json.loads(json.dumps(report.as_json(rows, 1e12)))
    assert [row["mixer"] for row in figures["rows"]] == ["full", "rattention"]
    assert figures["global_layers_last_shard_load"] == 1.75


def run_plan(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rattn.plan", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_command_answers_without_libtpu():
    """No TPU library is loaded for formulas: it is hidden, and the answer still comes."""
    block = (
        "import sys; sys.modules['libtpu'] = None; import runpy; runpy.run_module('rattn.plan', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", block, "--config", "configs/rattn_3b.py", "--topology", "v6e:16x16", "--slices", "2"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 slices of v6e:16x16 (512 chips)" in done.stdout
    assert "rattention-512" in done.stdout
    assert "Neither constant was measured on v6e" in done.stdout


def test_mistakes_get_a_sentence():
    done = run_plan("--config", "configs/rattn_3b.py", "--topology", "v5p:8x8x8", "--mixers", "ful")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "rattn: --mixers has 'ful', did you mean 'full'?; use names of full, swa, rattention, linear."
    ]


def test_the_compiler_judges_a_small_step(tmp_path):
    """The real training step, compiled for two v5e chips over fsdp and two over data; no TPU is there."""
    out = tmp_path / "plan.json"
    small = {
        "batch_size": 4,
        "context_length": 256,
        "evaluation.batch_size": 4,
        "model.layers": 2,
        "model.width": 128,
        "model.head_dim": 128,
        "model.query_heads": 2,
        "model.kv_heads": 1,
        "model.vocab_size": 512,
        "model.compute_dtype": "bfloat16",
        "model.remat": "block",
        "loss.chunk_tokens": 64,
        "mesh.data": 2,
        "mesh.fsdp": 2,
    }
    changes = [f"--config.{key}={value}" for key, value in small.items()]
    recipe = "tests/recipes/miniature.py:window=128"
    done = run_plan("--config", recipe, "--topology", "v5e:2x2", "--compile", "--json", str(out), *changes)
    assert done.returncode == 0, done.stderr
    assert "Compiling rattention-128 for v5e:2x2 (4 chips) (1 of 1): " in done.stderr
    assert "formula against it" in done.stdout
    (row,) = json.loads(out.read_text())["rows"]
    found = row["compiled"]
    assert found["fits"]
    state = row["memory_bytes_per_device"]["parameters"] + row["memory_bytes_per_device"]["optimizer"]
    # Arguments are the state, the batch and tiles' padding.
    assert state < found["argument_bytes"] < 1.2 * state
    assert found["argument_bytes"] < found["total_bytes"]
    # Weights are gathered over fsdp in the forward and in the backward pass.
    assert found["collectives"]["all-gather"]["bytes"] > 0


def test_memory_formula_agrees_with_the_compiler():
    """Against what the compiler said of the paper's models, kept by `python -m scripts.plan_table`."""
    kept = json.loads(plan_table.KEPT.read_text())
    checked = [case for case in plan_table.PAPER + plan_table.OTHERS if str(case) in kept]
    assert {case.model for case in checked} == {"3b", "12b"}
    for case in checked:
        row, found = case.row(), kept[str(case)]
        assert row.fits == found["fits"], case
        assert sum(row.memory.values()) == pytest.approx(found["total_bytes"], rel=0.15), case


def test_what_is_asked_for_twice_is_planned_once_and_without_a_window_none_is_drawn():
    assert (plan._windows(["64", "8", "64"]), plan._mixers(["full", "swa", "full"])) == ([64, 8], ["full", "swa"])
    with pytest.raises(UserError, match=r"--windows has '99999999999'; give whole numbers"):
        plan._windows(["99999999999"])
    rows = variants(small_config(model__window_choices=(2, 4)), ["full", "rattention"], [])
    assert [tuple(row.model.window_choices) for row in rows] == [(), (2, 4)]


def test_a_number_of_tokens_is_finite():
    done = subprocess.run(
        [sys.executable, "-m", "rattn.plan", "--config", RECIPE_12B, "--topology", "v6e:16x16", "--tokens=nan"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "rattn: --tokens is nan; give a number of tokens, such as 1e12.\n"
