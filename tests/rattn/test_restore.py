"""Beginning from another run, and windows drawn for each step."""

import json
import shutil

import jax
import numpy as np
import pytest

from rattn.config import saved_config
from rattn.errors import UserError
from rattn.model.parameters import flatten, model_spec
from rattn.restore import parameters_of
from rattn.sharding import Sharding, make_mesh
from rattn.train import train
from rattn.windows import window_of_step
from tests.runs import STEPS, assert_same_state, final_state, finish, lines, start

DRAWN = {
    "model__window_choices": (4, 8),
    "model__window_weights": (3, 1),
    "model__window_final_steps": 3,
    "checkpoint__every_steps": 4,
    "checkpoint__keep": 1,
    "checkpoint__keep_steps": (5,),
    "log__branches_every_steps": 6,
    "init_from_what": "parameters",
    "init_from_step": 60,
}


def test_a_branch_with_one_window_to_draw_equals_the_uninterrupted_run_bit_for_bit(
    whole, tmp_path, stream_folder, miniature
):
    workdir = tmp_path / "branch"
    arguments = [f"--config.init_from={whole[0]}", "--config.init_from_step=60", "--config.model.window_choices=(8,)"]
    status, out, err = finish(start(workdir, stream_folder, *arguments))
    assert status == 0, err
    assert "Going on from step 60 of" in out
    assert "Changed since step 60: config.model.window_choices [] -> [8]" in out
    ours, theirs = lines(workdir), lines(whole[0])
    assert ours.keys() == {key for key in theirs if key[0] > 60}
    for key, values in ours.items():
        assert values.pop("window", 8) == 8
        assert values == theirs[key]
    assert_same_state(workdir, whole[0], miniature(f"steps={STEPS}"))


@pytest.fixture(scope="module")
def one_device():
    """Trains in this process on one of its devices, for which less is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rattn.train.make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def drawn(whole, one_device, tmp_path_factory):
    """(config, workdir, output) of a run that starts from parameters alone and draws its windows."""
    config = saved_config(whole[0])
    config.total_steps, config.init_from = 12, str(whole[0])
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in DRAWN.items()})
    workdir = tmp_path_factory.mktemp("drawn") / "run"
    assert train(config, workdir) == 0
    return config, workdir


def test_drawn_windows_are_logged_and_a_resumed_run_draws_them_again(drawn, tmp_path, capsys):
    config, workdir = drawn
    values = lines(workdir)
    windows = [values[step + 1, "train"]["window"] for step in range(12)]
    assert windows == [window_of_step(config, step) for step in range(12)]
    assert set(windows[:9]) == {4, 8}
    assert windows[9:] == [8, 8, 8]
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert first["tokens_per_second"] == first[f"window_{windows[0]}/tokens_per_second"]
    assert [key for key in first if key.startswith("window_")] == [f"window_{windows[0]}/tokens_per_second"]

    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "12")
    assert train(config, copy) == 0
    out = capsys.readouterr().out
    assert "Continuing from step 5." in out
    assert "Compiling the training step for window 4" in out
    assert lines(copy) == values
    assert_same_state(copy, workdir, config)


def test_steps_to_keep_are_saved_and_stay(drawn):
    steps = {int(path.name) for path in (drawn[1] / "checkpoints").iterdir() if path.name.isdigit()}
    assert steps == {5, 12}


def test_branches_are_logged(drawn):
    values = lines(drawn[1])
    assert [step for step, kind in values if kind == "branches"] == [6, 12]
    names = {"softmax_rms", "linear_rms", "linear_share"}
    wanted = {f"branches/{name}" for name in names} | {f"branches/layer_0/{name}" for name in names}
    assert values[6, "branches"].keys() == {"step", "branches/loss", "branches/loss_without_linear", *wanted}
    assert values[6, "branches"]["branches/loss"] < values[6, "branches"]["branches/loss_without_linear"]


def test_parameters_alone_come_from_the_step_asked(whole, miniature):
    spec = model_spec(miniature().model)
    mesh = make_mesh(miniature().mesh)
    last, step, _ = parameters_of(whole[0], 0, spec, Sharding(mesh))
    earlier, _, _ = parameters_of(whole[0], 60, spec, Sharding(mesh))
    assert step == STEPS
    wanted = [leaf for path, leaf in final_state(whole[0], miniature(f"steps={STEPS}")) if path[0].key == "parameters"]
    for leaf, other in zip(jax.tree.leaves(last), wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))
    out = "blocks.layers.0.mixer.out_NHD"
    assert (np.asarray(flatten(last)[out]) != np.asarray(flatten(earlier)[out])).any()


@pytest.mark.parametrize(
    ("arguments", "changes", "sentence"),
    [
        ("", {"init_from_step": 55}, "There is no checkpoint of step 55 in .*it holds 10, 20, .*name one of those"),
        ("", {"init_from": "nowhere"}, "There are no checkpoints in 'nowhere'; name the workdir of a run"),
        ("steps=60", {"init_from_step": 60}, "goes on from step 60 of .* and config.total_steps is 60, which counts"),
        ("", {"data__source": "synthetic"}, "with fingerprint .* or its weights alone, with config.init_from_what"),
        ("", {"optimizer__name": "rmsprop"}, "holds the state of adamw and config.optimizer.name is 'rmsprop'; use"),
        ("", {"optimizer__clip_norm": 0.0}, r"was trained with config.optimizer.clip_norm=1.0 and here it is 0.0, for"),
        ("mixer=swa", {}, r"linear_norm.scale is \(1, 4, 8\) float32 there and absent in this config; use that run's"),
        (
            "mixer=swa",
            {"init_from_what": "parameters"},
            "linear_norm.scale is .* absent in this config; use that run's",
        ),
    ],
)
def test_what_cannot_be_begun_from_gets_a_sentence(whole, miniature, tmp_path, arguments, changes, sentence):
    config = miniature(arguments, **{"init_from": str(whole[0]), **changes})
    with pytest.raises(UserError, match=sentence):
        train(config, tmp_path / "run")


def test_draws_are_a_function_of_seed_and_step_alone(miniature):
    config = miniature("steps=4000", model__window_choices=(2, 4, 8), model__window_weights=(1, 1, 2), seed=3)
    draws = [window_of_step(config, step) for step in range(3000)]
    assert draws[1234] == window_of_step(config, 1234)
    shares = [draws.count(window) / len(draws) for window in (2, 4, 8)]
    # Four standard deviations of a share of 3000 draws.
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.5], atol=4 * (0.25 / 3000) ** 0.5)
    # As long as these stay, so do the windows of a run that is resumed with another version.
    assert draws[:8] == [8, 2, 2, 2, 2, 4, 8, 2]
    config.seed = 4
    assert [window_of_step(config, step) for step in range(3000)] != draws
    config.model.window_choices, config.model.window_weights = (), ()
    assert window_of_step(config, 5) == 8
