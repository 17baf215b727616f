"""What a sequence's cache takes, by context length, beside the same model with full and with plain window layers."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from rattn.accounting import FOLD_TOKENS, cache_bytes_per_sequence, readable_bytes
from rattn.config import set_mixer
from rattn.decoding.cache import STATE_ITEMSIZES, check_options
from rattn.planning.report import table

CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
PEER_WINDOW = 4096
# Beyond this nobody looks for a crossing.
LONGEST = 2**24


def text(config: ConfigDict, *, fold_tokens: int = FOLD_TOKENS, state_dtype: str = "float32") -> str:
    """Returns the tables of `python -m rattn.generate --report`.

    Args:
      config: whose model is asked about; keys and values have its compute dtype.
      fold_tokens: C of the decoder.
      state_dtype: "float32" or "bfloat16", of the states as allocated.

    Raises:
      UserError: a C or a dtype that no cache has.
    """
    check_options(fold_tokens, state_dtype)

    def sizes(length: int, of: ConfigDict = config, fold: int = fold_tokens, state: str = state_dtype) -> dict:
        return cache_bytes_per_sequence(of.model, length, fold_tokens=fold, state_itemsize=STATE_ITEMSIZES[state])

    def total(*args: Any, **options: Any) -> int:
        return sum(sizes(*args, **options).values())

    peers = {"full": _peer(config, "full")}
    if set(config.model.pattern) != {"full"}:  # Else no layer is local, and windows change nothing.
        peers[f"swa {PEER_WINDOW}"] = _peer(config, "swa")
    lengths = sorted({*CONTEXTS, config.context_length})
    by_kind, saved = [], []
    for length in lengths:
        row = [*sizes(length).values(), total(length), *(total(length, of=peer) for peer in peers.values())]
        by_kind.append([f"{length:,}", *map(readable_bytes, row)])
        alone = sizes(length)["full"] + sizes(length)["window"]
        kept = [alone, *(total(length, fold=0, state=dtype) for dtype in ("bfloat16", "float32")), total(length)]
        saved.append([f"{length:,}", *(f"{1 - part / total(length, of=peers['full']):.2%}" for part in kept)])
    meets = []
    for name, peer in peers.items():
        length = crossing(total, lambda length, peer=peer: total(length, of=peer))
        meets.append(f"  against {name}: " + (f"{length:,} tokens" if length else "never"))
    allocated = f"as allocated, C = {fold_tokens}"
    return "\n\n".join(
        [
            f"Cache of one sequence, window {config.model.window}, C = {fold_tokens}: keys and values in "
            f"{config.model.compute_dtype}, states in {state_dtype}\n"
            "(full: of full layers; window: the newest W of the others; pending: C that await the state; "
            "as …: with other local layers)",
            table(["context", *sizes(lengths[0]), "total", *(f"as {name}" for name in peers)], by_kind),
            "Saved against full attention in the same model",
            table(["context", "window alone", "+ bf16 state", "+ float32 state", allocated], saved),
            "\n".join(["From which context on the cache is the smaller one", *meets]),
        ]
    )


def _peer(config: ConfigDict, mixer: str) -> ConfigDict:
    peer = set_mixer(config.copy_and_resolve_references(), mixer)
    peer.model.window = PEER_WINDOW
    return peer


def crossing(ours: Callable[[int], int], peer: Callable[[int], int], longest: int = LONGEST) -> int | None:
    """Returns the least context length at which `ours` is smaller; None where that is not up to `longest`.

    What a window saves never shrinks with the context, so bisection finds it.
    """
    if ours(longest) >= peer(longest):
        return None
    low, high = 0, longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ours(middle) < peer(middle) else (middle, high)
    return high
