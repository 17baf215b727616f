"""Evaluating one checkpoint at many windows and lengths."""

import json
import math

import jax
import numpy as np
import pytest

from rattn.config import override, saved_config, validate
from rattn.data.batches import open_data
from rattn.errors import UserError
from rattn.evaluate import evaluate, table
from rattn.evaluation.measure import Recall
from rattn.evaluation.results import checked, training_speed, write
from rattn.evaluation.slices import context_tokens
from rattn.model.parameters import model_spec
from rattn.restore import parameters_of
from rattn.sharding import Sharding, make_mesh
from rattn.windows import at_window
from tests.runs import STEPS

RECALL = Recall(context_tokens=3, frequent_rate=1.0)
MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.model=2"]


@pytest.fixture(scope="module")
def evaluated(whole):
    """The evaluation of the uninterrupted run at two windows and two lengths, sharded along three axes, in chunks."""
    config = validate(override(saved_config(whole[0]), [*MESH, "--config.loss.chunk_tokens=16"]))
    return evaluate(config, whole[0], windows=(3, 8), lengths=(1, 4), recall=RECALL)


def by_hand(workdir, window, length):
    """(nats, hits, context) of every validation target, from whole logits, on one device."""
    config = at_window(saved_config(workdir), window)
    spec = model_spec(config.model)
    config.mesh.data = 1
    parameters, _, _ = parameters_of(workdir, 0, spec, Sharding(make_mesh(config.mesh, jax.devices()[:1])))
    data = open_data(config.data, context_length=config.context_length * length, batch_size=1, seed=0)
    logits_of = jax.jit(lambda parameters, batch: spec.merge(parameters)(batch["tokens"], batch["segment_ids"]))
    found = []
    for batch in data.evaluation_batches(batch_size=8):
        logits = np.asarray(logits_of(parameters, batch), np.float64)
        own = np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        nats = np.log(np.exp(logits).sum(axis=-1)) - own
        mask = batch["loss_mask"]
        found.append((nats[mask], (logits.max(axis=-1) == own)[mask], context_tokens(batch["segment_ids"])[mask]))
    return [np.concatenate(part) for part in zip(*found, strict=True)]


@pytest.mark.parametrize(("window", "length"), [(3, 4)])
def test_losses_are_those_of_the_whole_logits_at_each_window_and_length(evaluated, whole, window, length):
    entry = next(e for e in evaluated["measured"] if (e["window"], e["length"]) == (window, length))
    nats, hits, context = by_hand(whole[0], window, length)
    assert entry["context_length"] == 32 * length
    assert entry["targets"] == len(nats)
    assert entry["nats_per_token"] == pytest.approx(nats.mean(), rel=1e-5)
    assert entry["accuracy"] == pytest.approx(hits.mean(), abs=1e-9)
    for each in entry["by_context_tokens"]:
        chosen = (context >= each["first"]) & (context <= each["last"])
        assert each["targets"] == chosen.sum() > 0
        assert each["nats_per_token"] == pytest.approx(nats[chosen].mean(), rel=1e-5)
    assert entry["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / entry["text_bytes"], rel=1e-5)


def test_entries_are_comparable(evaluated):
    entries = evaluated["measured"]
    assert [(e["window"], e["length"]) for e in entries] == [(3, 1), (3, 4), (8, 1), (8, 4)]
    assert len({(e["targets"], e["text_bytes"]) for e in entries}) == 1
    assert entries[0]["nats_per_token"] != entries[2]["nats_per_token"]
    for one, other in ((0, 2), (1, 3)):
        for name in ("recall_by_distance", "by_context_tokens", "by_row_position"):
            counts = [[each["targets"] for each in entries[i][name]] for i in (one, other)]
            assert counts[0] == counts[1]
    assert entries[1]["recall"]["targets"] > entries[0]["recall"]["targets"] > 0
    assert entries[0]["cache_bytes"]["window"] < entries[2]["cache_bytes"]["window"]


def test_a_result_says_what_was_evaluated(evaluated, whole, tmp_path):
    assert evaluated["step"] == STEPS
    assert evaluated["tokens_seen"] == STEPS * 8 * 32
    assert evaluated["overrides"] == {"loss.chunk_tokens": 16, "mesh.data": 2, "mesh.fsdp": 2, "mesh.model": 2}
    assert evaluated["config"] == json.loads((whole[0] / "config.json").read_text())
    speed = evaluated["training"]
    rates = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in rates if "tokens_per_second" in line][STEPS // 10 :]
    assert speed["tokens_per_second"] == np.median(rates)
    assert speed["step_seconds"] == pytest.approx(256 / np.median(rates))
    assert speed["by_window"] == {"8": {key: value for key, value in speed.items() if key != "by_window"}}
    write(evaluated, tmp_path / "new" / "result.json")
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == evaluated
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result.json"]
    assert len(table(evaluated).splitlines()) == 5


def test_speed_by_window(tmp_path, miniature):
    config = miniature(model__window_choices=(4, 8))
    lines = [{"step": 0, "tokens_per_second": 1.0, "window_8/tokens_per_second": 1.0}]
    lines += [{"step": 1, "tokens_per_second": 20.0, "window_4/tokens_per_second": 16.0, "window_4/mfu": 0.5}]
    lines += [{"step": 2, "tokens_per_second": 30.0, "window_8/tokens_per_second": 32.0}, {"step": 2, "eval/loss": 1.0}]
    # The last line is cut off.
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "tok')
    four = {"tokens_per_second": 16.0, "step_seconds": 16.0, "mfu": 0.5, "lines": 1}
    eight = {"tokens_per_second": 32.0, "step_seconds": 8.0, "mfu": None, "lines": 1}
    assert training_speed(tmp_path, config) == {**eight, "by_window": {"4": four, "8": eight}}
    assert training_speed(tmp_path / "none", config) is None


def test_a_limit_takes_the_same_tokens_at_every_length(whole):
    config = saved_config(whole[0])
    data = [open_data(config.data, context_length=length, batch_size=1, seed=0) for length in (32, 128)]
    short = data[0].evaluation_batches(batch_size=8, max_batches=3, group_rows=4)
    long = data[1].evaluation_batches(batch_size=2, max_batches=3)
    tokens = [np.concatenate([batch["tokens"].ravel() for batch in batches]) for batches in (short, long)]
    assert len(tokens[0]) == 3 * 256
    np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize(
    ("changes", "arguments", "sentence"),
    [
        ([], {"step": 55}, "There is no checkpoint of step 55 in .*, it holds 10, 20, .*; name one of those"),
        ([], {"lengths": (1, 512)}, "split has 6002 tokens and a row at 512 × the training context has 16384"),
        (["--config.model.window=4"], {}, "config.model.window belongs to the trained model"),
        ([], {"windows": (-1,)}, "config.model.window is -1"),
    ],
)
def test_what_cannot_be_evaluated_gets_a_sentence(whole, changes, arguments, sentence):
    config = override(saved_config(whole[0]), changes)
    with pytest.raises(UserError, match=sentence):
        evaluate(config, whole[0], recall=RECALL, **arguments)


def test_where_a_result_cannot_go_is_said_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .* is a folder; name a file"):
        checked(tmp_path)
    with pytest.raises(UserError, match=r"--out .*file/e.json' cannot be written \(File exists\); name another"):
        checked(tmp_path / "file" / "e.json")
    assert checked(tmp_path / "new" / "e.json").parent.is_dir()


def test_what_is_no_run_gets_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"There is no config.json in .*; name the workdir of a run"):
        saved_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {"widow": 3}}')
    with pytest.raises(UserError, match=r"config.model.widow = 3, which this version does not know"):
        saved_config(tmp_path)
