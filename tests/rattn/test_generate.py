"""From a run's checkpoint to text: the command, the library, the report, the sentences."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rattn import generate
from rattn.config import load_config, validate
from rattn.data.vocabulary import SentencePieceVocabulary, train_sentencepiece
from rattn.decoding import report
from rattn.decoding.sampling import Sampling
from rattn.errors import UserError
from rattn.generate import Generator, Piece, on_devices, show
from rattn.model.parameters import model_spec
from rattn.restore import parameters_of

GREEDY = Sampling(temperature=0.0)
# The longest is two pieces of 16 tokens; batches of three and their shapes are compiled once for most tests.
PROMPTS = ["Fellow-citizens of the Senate", "The", "It is my duty to tell you"]


def command(*arguments, code="import runpy; runpy.run_module('rattn.generate', run_name='__main__', alter_sys=True)"):
    """Runs `python -m rattn.generate`, warnings being errors."""
    # The devices and flags of these tests, so that it finds what they have compiled.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    line = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def generator(whole):
    return Generator.from_checkpoint(whole[0])


def test_the_command_prints_every_prompt_and_imports_no_tensorflow(whole, generator):
    code = (
        "import sys, atexit, runpy\n"
        "names = ('tensorflow', 'seqio')\n"
        "atexit.register(lambda: print(sorted(n for n in names if n in sys.modules), file=sys.stderr))\n"
        "runpy.run_module('rattn.generate', run_name='__main__', alter_sys=True)"
    )
    prompts = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    completions = generator.generate(PROMPTS, max_tokens=20, sampling=GREEDY)
    done = command("--checkpoint", str(whole[0]), *prompts, "--max_tokens", "20", "--greedy", code=code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    expected = [f"── prompt {i} ──\n{PROMPTS[i]}{completions[i].text} …\n" for i in range(3)]
    assert done.stdout == "".join(expected)
    assert [len(completion.ids) for completion in completions] == [20] * 3


def test_greedy_text_does_not_depend_on_the_batch_or_on_how_a_prompt_is_cut(whole, generator, miniature):
    together = [completion.ids for completion in generator.generate(PROMPTS, max_tokens=20, sampling=GREEDY)]
    # Pieces of 16 tokens, each prompt alone.
    config = miniature()
    spec = model_spec(config.model)
    parameters = parameters_of(whole[0], 0, spec, on_devices(1, 1))[0]
    cut = Generator(config.model, parameters, generator.vocabulary, prefill_tokens=16, batch_size=1)
    alone = cut.generate([PROMPTS[0], PROMPTS[2]], max_tokens=20, sampling=GREEDY)
    assert [completion.ids for completion in alone] == [together[0], together[2]]
    # Draws as well follow from the seed and the prompt's place in the list.
    for seed in range(5):
        one, three = (
            g.generate([PROMPTS[0], PROMPTS[2], "The"][:n], max_tokens=1, seed=seed)
            for g, n in ((cut, 2), (generator, 3))
        )
        assert [completion.ids for completion in one] == [completion.ids for completion in three[:2]]
    # And it is what training's forward pass finds best; nowhere are the two best within 1e-4 of scale.
    forward = jax.jit(lambda p, t: spec.merge(p)(t))
    prompt = generator.vocabulary.encode(PROMPTS[2])
    logits = np.asarray(forward(parameters, jnp.asarray([prompt + together[2]], jnp.int32)))[0]
    best = np.sort(logits[len(prompt) - 1 : -1, :259], axis=-1)
    assert (best[:, -1] - best[:, -2]).min() > 1e-4 * np.abs(logits).max()
    assert logits[len(prompt) - 1 : -1, :259].argmax(axis=-1).tolist() == together[2]


def test_draws_follow_the_seed(generator):
    def texts(seed, prompts=PROMPTS):
        return [c.text for c in generator.generate(prompts, max_tokens=12, seed=seed)]

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)
    assert len(set(texts(0, [PROMPTS[0]] * 3))) == 3


def test_eos_ends_a_text(generator, monkeypatch):
    """At once in the first prompt, inside the tokens of a call in the second, never in the third."""
    first, following = np.array([1, 100, 101]), np.array([[102] * 16, [103, 104, 1, *[105] * 13], [106] * 16])
    monkeypatch.setattr(generator, "_sample", lambda *_, **__: first)
    monkeypatch.setattr(generator.decoder, "sample", lambda weights, cache, *_: (following, cache))
    found = generator.generate(PROMPTS, max_tokens=20, sampling=GREEDY)
    assert [(c.ended, c.ids) for c in found] == [(True, []), (True, [100, 103, 104]), (False, [101, *[106] * 19])]
    assert [c.text for c in found] == ["", "ade", "b" + "g" * 19]


def test_one_prompt_is_shown_after_the_other(capsys):
    done = {i: Piece(i, "", object.__new__(Done)) for i in range(2)}
    show(iter([Piece(1, "x"), Piece(0, "a"), done[1], Piece(0, "b"), done[0]]), ["P", "Q"])
    assert capsys.readouterr().out == "── prompt 0 ──\nPab\n── prompt 1 ──\nQx\n"


class Done:
    ended = True


def test_the_report_shows_the_paper_figures():
    text = report.text(validate(load_config("configs/rattn_3b.py", "window=1024")), fold_tokens=16)
    row = next(
        line
        for line in text.splitlines()[text.splitlines().index("Saved against full attention in the same model") :]
        if line.strip().startswith("4,096")
    )
    assert row.split()[1:4] == ["56.25%", "53.91%", "51.56%"]
    assert "against full: 1,297 tokens" in text


def test_without_local_layers_the_report_compares_no_windows():
    text = report.text(validate(load_config("configs/rattn_3b.py", "mixer=full")))
    assert "as full" in text
    assert "swa" not in text


def test_the_report_needs_a_recipe_alone():
    done = command("--config", "configs/rattn_3b.py:window=512", "--report")
    assert done.returncode == 0, done.stderr
    assert "window 512" in done.stdout


@pytest.mark.parametrize(
    ("kept", "peer", "expected"),
    [((0, 10), (1, 0), 11), ((1, 1), (1, 0), None), ((0, 0), (1, 0), 1)],
)
def test_crossing(kept, peer, expected):
    lines = [lambda length, line=line: line[0] * length + line[1] for line in (kept, peer)]
    assert report.crossing(*lines, longest=1000) == expected


def test_mistakes_get_a_sentence(generator, whole, tmp_path):
    def refuse(prompts, sentence, **arguments):
        with pytest.raises(UserError, match=sentence):
            generator.generate(prompts, **{"max_tokens": 5} | arguments)

    refuse(["x" * 60], r"Prompt 0 has 60 tokens, which with max_tokens=5 do not fit in a cache of 64", capacity=64)
    refuse([[5, 300]], r"Prompt 0 has id 300; the vocabulary has ids 0 to 258")
    refuse([[5, 2]], r"Prompt 0 holds a token that the vocabulary does not know, after '\\x02'")
    refuse([[5, 1, 7]], r"Prompt 0 has EOS, id 1, as token 1, and attention does not go from one document")
    refuse(["a", ""], r"Prompt 1 is empty")
    refuse([5, 6], r"Prompt 0 is 5; give a text or a list of ids")
    refuse([b"abc"], r"Prompt 0 is b'abc'; give a text or a list of ids")
    refuse(["a"], r"do not fit in a cache of 0; cut the prompt", capacity=0)
    refuse(["a"], r"max_tokens is 0", max_tokens=0)
    refuse("abc", r"prompts is one text, 'abc'; give a list of texts")
    refuse(["a\udcff"], r"Prompt 0 holds '\\udcff', which is no character")
    refuse(["a"], r"The seed is -1; give a number from 0 to 4294967295", seed=-1)
    with pytest.raises(UserError, match="max_tokens is 0"):  # Before the first piece is asked for.
        generator.stream(["a"], max_tokens=0)
    with pytest.raises(UserError, match="fold_tokens is -3; give the steps"):
        report.text(load_config("configs/rattn_3b.py"), fold_tokens=-3)
    with pytest.raises(UserError, match="state_dtype is 'float16', did you mean 'bfloat16'"):
        report.text(load_config("configs/rattn_3b.py"), state_dtype="float16")
    (tmp_path / "config.json").write_text((whole[0] / "config.json").read_text())
    with pytest.raises(UserError, match=r"There are no checkpoints in"):
        Generator.from_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"config.model.window is -3; it cannot be negative"):
        Generator.from_checkpoint(whole[0], window=-3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("", r"config.json is damaged \(Expecting value.*\); copy it"), ("[]", r"holds '\[\]' and no config; copy it")],
)
def test_a_damaged_config_gets_a_sentence(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        Generator.from_checkpoint(tmp_path)


def test_a_file_of_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfThe war\r\n\n  \nFellow\xff\n")
    values = SimpleNamespace(prompt=["first"], prompts_file=str(file))
    assert generate._prompts(values) == ["first", "The war", "Fellow\udcff"]
    file.write_bytes(b" \n\n")
    with pytest.raises(UserError, match=r"prompts.txt' holds no prompt; write one a line"):
        generate._prompts(values)
    values.prompts_file = str(tmp_path)
    with pytest.raises(UserError, match="There is no --prompts_file"):
        generate._prompts(values)
    read, write = os.pipe()
    os.write(write, b"a\nb\n")
    os.close(write)
    values.prompts_file = f"/dev/fd/{read}"
    assert generate._prompts(values) == ["first", "a", "b"]
    os.close(read)


def test_the_window_may_be_another(whole, generator):
    wide, row = Generator.from_checkpoint(whole[0], window=64), generator.vocabulary.encode(PROMPTS[2] + "what")
    tokens = np.asarray([row[:32]] * 3, np.int32)
    last = []
    for one in (generator, wide):
        x_BTD, _ = one.decoder.prefill(one.weights, one.decoder.empty_cache(3, 128), tokens)
        last.append(np.asarray(one.decoder.logits(one.weights, x_BTD))[0])
    # The windows are 8 and 64: what they see parts at the ninth token.
    np.testing.assert_allclose(last[0][:8], last[1][:8], atol=1e-5)
    assert np.abs(last[0][8:] - last[1][8:]).max(axis=-1).min() > 1e-3


def test_pieces_of_a_sentencepiece_model_are_known():
    text = "we hold these truths to be self evident that all men are created equal " * 20
    vocabulary = SentencePieceVocabulary(train_sentencepiece([text], 300), where="here")
    known = vocabulary.token_bytes() > 0
    assert known[vocabulary.encode("we hold ö truths")].all()


def test_a_recipe_has_no_weights():
    done = command("--config", "configs/tiny.py", "--prompt", "x")
    assert done.returncode == 1
    assert "--config is 'tiny', which has no weights; give --checkpoint, or add --report." in done.stderr
    assert "Traceback" not in done.stderr
