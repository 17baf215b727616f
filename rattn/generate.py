"""python -m rattn.generate --checkpoint runs/tiny --prompt "Fellow citizens" [--max_tokens 256] [--window 128]

Samples from a run's checkpoint, at any window (nothing in the weights depends on it), and prints the text as it comes.
`--report` prints what the cache takes instead, for a checkpoint or a recipe (`--config configs/rattn_3b.py`). As a
library: `Generator`.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from rattn import platform, windows
from rattn.accounting import FOLD_TOKENS
from rattn.config import run_main, saved_config, validate
from rattn.data.vocabulary import Vocabulary, load_vocabulary
from rattn.decoding import report
from rattn.decoding.decoder import Decoder
from rattn.decoding.sampling import Sampling, sample
from rattn.decoding.text import TextStream
from rattn.errors import UserError
from rattn.model.parameters import model_spec
from rattn.restore import parameters_of
from rattn.sharding import AXES, Sharding, make_mesh

# Caches are allocated in multiples of this, so that a generator compiles for few lengths.
CAPACITY_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text that a prompt has got since its last piece.

    Attributes:
      prompt: the prompt's place in the list.
      text: may be empty in the last piece.
      completion: all of it, in the last piece; None before.
    """

    prompt: int
    text: str
    completion: "Completion | None" = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for a prompt.

    Attributes:
      text: what stands after the prompt's own.
      ids: its tokens, without EOS.
      ended: whether the model ended it with EOS, and not `max_tokens`.
    """

    text: str
    ids: list[int]
    ended: bool


class Generator:
    """Generates text from a model's parameters.

        generator = Generator.from_checkpoint("runs/tiny", window=128)
        for completion in generator.generate(["Fellow citizens", "The war"], max_tokens=200):
            print(completion.text)

    Prompts of any lengths go through the model in batches; each compiled function is kept for the next call. What a
    prompt gets does not depend on the others or on the size of a batch, up to the rounding of sums. For the caches
    themselves (prefill in chunks, one token at a time, resuming) see `rattn.decoding.decoder.Decoder`, which is
    `.decoder` here and takes `.weights`.
    """

    def __init__(
        self,
        model: ConfigDict,
        parameters: Any,
        vocabulary: Vocabulary,
        sharding: Sharding | None = None,
        *,
        batch_size: int = 32,
        prefill_tokens: int = 512,
        fold_tokens: int = FOLD_TOKENS,
        state_dtype: str = "float32",
        attention: str = "auto",
        products: str = "auto",
    ):
        """Lays the parameters out for decoding.

        Args:
          model: `config.model`, with the window to run at.
          parameters: as `rattn.restore.parameters_of` or `rattn.model.parameters.initial_parameters` returns them.
          vocabulary: of the prompts.
          sharding: over which devices; the first one alone if not given.
          batch_size: most prompts that are generated for at a time.
          prefill_tokens: most tokens of a prompt that go through the model at a time.
          fold_tokens: C (`rattn.decoding`); also how many tokens come at a time.
          state_dtype: "float32" or "bfloat16", of the states between tokens.
          attention, products: as in `rattn.decoding.decoder.Decoder`.

        Raises:
          UserError: a value that does not fit.
        """
        for name, value in (("batch_size", batch_size), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise UserError(f"{name} is {value}; give at least 1.")
        self.decoder = Decoder(
            model,
            sharding or on_devices(1, 1),
            fold_tokens=fold_tokens,
            state_dtype=state_dtype,
            attention=attention,
            products=products,
        )
        self.vocabulary = vocabulary
        self.weights = self.decoder.weights(parameters)
        self._batch_size, self._prefill_tokens = batch_size, prefill_tokens
        self._known_V = vocabulary.token_bytes() > 0
        self._sample = jax.jit(sample, static_argnames="sampling")

    @classmethod
    def from_checkpoint(
        cls,
        workdir: epath.PathLike,
        *,
        step: int = 0,
        window: int | None = None,
        sharding: Sharding | None = None,
        **options: Any,
    ) -> "Generator":
        """Restores the parameters of a run.

        Args:
          workdir: the run's.
          step: of the checkpoint; 0: the last.
          window: to run at; the run's own if not given.
          sharding: as in `Generator`.
          **options: those of `Generator`.

        Raises:
          UserError: there is no such run or checkpoint, or the window cannot be.
        """
        config = at_window(saved_config(workdir), window)
        sharding = sharding or on_devices(1, 1)
        parameters, _, _ = parameters_of(workdir, step, model_spec(config.model), sharding)
        return cls(config.model, parameters, load_vocabulary(workdir), sharding, **options)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        capacity: int | None = None,
    ) -> list[Completion]:
        """Returns a completion for each prompt, in order; arguments and errors as `stream`."""
        pieces = self.stream(prompts, max_tokens=max_tokens, sampling=sampling, seed=seed, capacity=capacity)
        done = {piece.prompt: piece.completion for piece in pieces if piece.completion}
        return [done[index] for index in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        capacity: int | None = None,
    ) -> Iterator[Piece]:
        """Yields text as it comes; every prompt's last piece holds its completion.

        Args:
          prompts: a list of texts, or of lists of ids; at least one token each.
          max_tokens: of a completion.
          sampling: how; from all tokens at temperature 1 if not given.
          seed: 0 to 2³² − 1, of the draws: those of a prompt are a function of (seed, its place in the list).
          capacity: tokens that a sequence's cache is allocated for; as many as needed if not given.

        Raises:
          UserError: a prompt that is empty, too long, or holds an unknown token; no room for the cache.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts is one text, {prompts[:20]!r}; give a list of texts.")
        if max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}; ask for at least 1.")
        if not 0 <= seed < 2**32:
            raise UserError(f"The seed is {seed}; give a number from 0 to {2**32 - 1}.")
        # The model may have more ids than the vocabulary, for the sake of its shapes.
        sampling = dataclasses.replace(sampling or Sampling(), ids=self.vocabulary.size)
        ids = [self._encoded(index, prompt) for index, prompt in enumerate(prompts)]
        for index, prompt in enumerate(ids):
            if capacity is not None and len(prompt) + max_tokens > capacity:
                raise UserError(
                    f"Prompt {index} has {len(prompt)} tokens, which with max_tokens={max_tokens} do not fit in a "
                    f"cache of {capacity}; cut the prompt, ask for fewer tokens or raise the capacity."
                )
        return self._batches(ids, max_tokens, sampling, seed, capacity)

    def _batches(
        self, prompts: list[list[int]], max_tokens: int, sampling: Sampling, seed: int, capacity: int | None
    ) -> Iterator[Piece]:
        for first in range(0, len(prompts), self._batch_size):
            batch = prompts[first : first + self._batch_size]
            # Rows that fill the devices up: their one token and what follows it is thrown away.
            rows = batch + [[0]] * (-len(batch) % self.decoder.row_multiple)
            places_B = np.arange(first, first + len(rows), dtype=np.uint32)
            keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), places_B)
            for piece in self._batch(rows, len(batch), max_tokens, sampling, keys_B, capacity):
                yield dataclasses.replace(piece, prompt=first + piece.prompt)

    def _encoded(self, index: int, prompt: str | Sequence[int]) -> list[int]:
        vocabulary = self.vocabulary
        if isinstance(prompt, bytes) or not isinstance(prompt, Sequence | np.ndarray):
            raise UserError(f"Prompt {index} is {str(prompt)[:20]}; give a text or a list of ids.")
        if isinstance(prompt, str) and (broken := [c for c in prompt if "\ud800" <= c <= "\udfff"]):
            raise UserError(f"Prompt {index} holds {broken[0]!r}, which is no character; give text in UTF-8.")
        ids = vocabulary.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids:
            raise UserError(f"Prompt {index} is empty; give at least one token to go on from.")
        for place, i in enumerate(ids):
            if not 0 <= i < vocabulary.size:
                raise UserError(f"Prompt {index} has id {i}; the vocabulary has ids 0 to {vocabulary.size - 1}.")
            if i == vocabulary.eos_id:
                raise UserError(
                    f"Prompt {index} has EOS, id {i}, as token {place}, and attention does not go from one document to "
                    "the next; give what comes after it."
                )
            if not self._known_V[i] and i != vocabulary.pad_id:
                raise UserError(
                    f"Prompt {index} holds a token that the vocabulary does not know, after "
                    f"{vocabulary.decode(ids[:place])[-20:]!r}; take it out."
                )
        return ids

    def _batch(
        self,
        rows: list[list[int]],
        count: int,
        max_tokens: int,
        sampling: Sampling,
        keys_B: jax.Array,
        capacity: int | None,
    ) -> Iterator[Piece]:
        """Yields the pieces of the first `count` rows."""
        decoder, weights = self.decoder, self.weights
        needed = max(map(len, rows)) + max_tokens
        # The capacity of a call holds all its prompts: `stream` has seen to it.
        cache = decoder.empty_cache(len(rows), capacity or -(-needed // CAPACITY_TOKENS) * CAPACITY_TOKENS)
        logits_BV, cache = self._prefilled(rows, cache)
        tokens_B = self._sample(logits_BV, keys_B, np.int32(0), sampling=sampling)
        streams = [TextStream(self.vocabulary, row) for row in rows[:count]]
        live = set(range(count))
        sampled, first = tokens_B[:, None], 0
        while live:
            # The next tokens are on their way before these are looked at.
            first += sampled.shape[1]
            following = None
            if first < max_tokens:
                following, cache = decoder.sample(weights, cache, sampled[:, -1], keys_B, first, sampling)
            for index, row in enumerate(np.asarray(sampled)[:count].tolist()):
                if index in live:
                    piece = self._piece(index, streams[index], row, max_tokens)
                    if piece.completion:
                        live.remove(index)
                    if piece.text or piece.completion:
                        yield piece
            sampled = following

    def _piece(self, index: int, stream: TextStream, ids: list[int], max_tokens: int) -> Piece:
        eos = self.vocabulary.eos_id
        ids = ids[: max_tokens - len(stream.ids)]
        ended = eos in ids
        ids = ids[: ids.index(eos)] if ended else ids
        last = ended or len(stream.ids) + len(ids) == max_tokens
        text = stream.push(ids, last=last)
        return Piece(index, text, Completion(stream.text, stream.ids, ended) if last else None)

    def _prefilled(self, rows: list[list[int]], cache: Any) -> tuple[jax.Array, Any]:
        """Runs the prompts through the model; returns the logits of the token after each, and the cache."""
        lengths_B = np.array([len(row) for row in rows])
        T = min(self._prefill_tokens, 1 << int(lengths_B.max() - 1).bit_length())
        total = -(-int(lengths_B.max()) // T) * T
        tokens = np.zeros((len(rows), total), np.int32)
        for place, row in zip(tokens, rows, strict=True):
            place[total - len(row) :] = row
        for start in range(0, total, T):
            counts_B = np.clip(lengths_B - (total - start - T), 0, T)
            x_BTD, cache = self.decoder.prefill(self.weights, cache, tokens[:, start : start + T], counts_B)
        return self.decoder.logits(self.weights, x_BTD[:, -1]), cache


def on_devices(data: int, model: int) -> Sharding:
    """Spreads sequences over `data` and heads over `model` of the first devices."""
    if data < 1 or model < 1 or data * model > jax.device_count():
        raise UserError(
            f"{data} × {model} devices were asked for and there are {jax.device_count()}; ask for 1 × 1, or up to as "
            "many as there are."
        )
    sizes = dict.fromkeys(AXES, 1) | {"data": data, "model": model}
    return Sharding(make_mesh(ConfigDict(sizes), jax.devices()[: data * model]))


def at_window(config: ConfigDict, window: int | None) -> ConfigDict:
    """Returns the valid config at another window, or at its own for None."""
    return validate(windows.at_window(config, config.model.window if window is None else window))


def show(pieces: Iterator[Piece], prompts: Sequence[str]) -> None:
    """Prints what comes: one prompt after the other, each from the moment that those before it are complete."""
    waiting: dict[int, list[Piece]] = {index: [] for index in range(len(prompts))}
    current = 0
    say = functools.partial(print, end="", flush=True)
    headed = -1
    for piece in pieces:
        waiting[piece.prompt].append(piece)
        while current < len(prompts) and waiting[current]:
            if headed < current:
                headed = current
                say((f"── prompt {current} ──\n" if len(prompts) > 1 else "") + prompts[current])
            ready = waiting[current].pop(0)
            say(ready.text)
            if ready.completion:
                say("\n" if ready.completion.ended else " …\n")
                current += 1


def _prompts(values: flags.FlagValues) -> list[str]:
    prompts = list(values.prompt)
    if values.prompts_file:
        path = pathlib.Path(values.prompts_file)
        if not path.exists() or path.is_dir():
            raise UserError(f"There is no --prompts_file {str(path)!r}; name a text file with a prompt a line.")
        # What is not UTF-8 becomes what `Generator` refuses with the prompt's number.
        lines = [line for line in path.read_text("utf-8-sig", "surrogateescape").split("\n") if line.strip()]
        if not lines:
            raise UserError(f"--prompts_file {str(path)!r} holds no prompt; write one a line.")
        prompts += lines
    if not prompts:
        raise UserError("There is no prompt; give --prompt, several times if you like, or --prompts_file.")
    return prompts


def main(config: ConfigDict | None, recipe: str) -> int:
    """Entry point behind the flags."""
    platform.configure()
    sys.stdout.reconfigure(errors="replace")  # Where it has no sign for a character.
    values = flags.FLAGS
    if recipe and values.checkpoint:
        raise UserError(f"There are --config {recipe!r} and --checkpoint {values.checkpoint!r}; give one of them.")
    if recipe and not values.report:
        raise UserError(f"--config is {recipe!r}, which has no weights; give --checkpoint, or add --report.")
    if not recipe and not values.checkpoint:
        raise UserError("There is no --checkpoint; name the workdir of a run, such as --checkpoint runs/tiny.")
    if values.report:
        config = at_window(config or saved_config(values.checkpoint), values.window)
        print(report.text(config, fold_tokens=values.fold_tokens, state_dtype=values.state_dtype), flush=True)
        return 0
    sampling = Sampling(0.0 if values.greedy else values.temperature, values.top_k, values.top_p)
    prompts = _prompts(values)
    generator = Generator.from_checkpoint(
        values.checkpoint,
        step=values.step,
        window=values.window,
        sharding=on_devices(values.data_devices, values.model_devices),
        batch_size=values.batch_size,
        fold_tokens=values.fold_tokens,
        state_dtype=values.state_dtype,
        attention=values.attention,
        products=values.products,
    )
    show(generator.stream(prompts, max_tokens=values.max_tokens, sampling=sampling, seed=values.seed), prompts)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Workdir of the run.")
    flags.DEFINE_integer("step", 0, "Step of the checkpoint; 0: the last.", lower_bound=0)
    flags.DEFINE_multi_string("prompt", [], "What to go on from; may be given several times.")
    flags.DEFINE_string("prompts_file", None, "Text file with a prompt a line; blank lines are none.")
    flags.DEFINE_integer("max_tokens", 256, "Most tokens of a completion.")
    flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 takes the best token.")
    flags.DEFINE_bool("greedy", False, "Take the best token, as --temperature 0.")
    flags.DEFINE_integer("top_k", 0, "Draw from the best top_k tokens; 0: from all.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the best tokens whose probabilities reach top_p; 1: from all.")
    flags.DEFINE_integer("seed", 0, "Of the draws; 0 to 2**32 - 1.")
    flags.DEFINE_integer("window", None, "Window to run at; the run's own by default.")
    flags.DEFINE_integer("batch_size", 32, "Most prompts at a time.")
    flags.DEFINE_integer("fold_tokens", FOLD_TOKENS, "Tokens that come, and are added to the states, at a time.")
    flags.DEFINE_string("state_dtype", "float32", "Of the states: float32 or bfloat16.")
    flags.DEFINE_string(
        "attention",
        "auto",
        "xla, pallas_gpu (for one GPU), pallas_gpu_hopper (more kernels for one Hopper GPU) or auto.",
    )
    flags.DEFINE_string("products", "auto", "xla, pallas_gpu or pallas_gpu_hopper (for one Hopper GPU) or auto.")
    flags.DEFINE_integer("data_devices", 1, "Devices that prompts are spread over.")
    flags.DEFINE_integer("model_devices", 1, "Devices that heads are spread over.")
    flags.DEFINE_bool("report", False, "Print what the cache takes, and generate nothing.")
    run_main(main, needs_config=False)
