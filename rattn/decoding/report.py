"""What a sequence's cache takes, by context length, beside the same model with full and with plain window layers."""

from collections.abc import Callable

from ml_collections import ConfigDict

from rattn.accounting import FOLD_TOKENS, cache_bytes_per_sequence, readable_bytes
from rattn.config import set_mixer
from rattn.planning.report import table

CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
PEER_WINDOW = 4096
# Beyond this nobody looks for a crossing.
LONGEST = 2**24


def text(config: ConfigDict, *, fold_tokens: int = FOLD_TOKENS, state_itemsize: int = 4) -> str:
    """Returns the tables of `python -m rattn.generate --report`; keys and values are bfloat16.

    Args:
      config: whose model is asked about.
      fold_tokens: C of the decoder.
      state_itemsize: bytes of an element of the state, as allocated.
    """

    def sizes(context_length: int, **changes: int) -> dict[str, int]:
        options = {"fold_tokens": fold_tokens, "state_itemsize": state_itemsize} | changes
        return cache_bytes_per_sequence(config.model, context_length, **options)

    def ours(context_length: int) -> int:
        return sum(sizes(context_length).values())

    peers = {"full": _peer(config, "full"), f"swa {PEER_WINDOW}": _peer(config, "swa")}
    lengths = sorted({*CONTEXTS, config.context_length})
    kinds = list(sizes(lengths[0]))
    window = config.model.window
    by_kind = [
        [
            f"{length:,}",
            *(readable_bytes(size) for size in sizes(length).values()),
            readable_bytes(ours(length)),
            *(readable_bytes(peer(length)) for peer in peers.values()),
        ]
        for length in lengths
    ]
    saved = []
    for length in lengths:
        full = peers["full"](length)
        whole = {
            "bf16": sizes(length, fold_tokens=0, state_itemsize=2),
            "f32": sizes(length, fold_tokens=0, state_itemsize=4),
        }
        kept = whole["f32"]
        parts = [kept["full"] + kept["window"], *(sum(kinds.values()) for kinds in whole.values()), ours(length)]
        saved.append([f"{length:,}", *(f"{1 - part / full:.2%}" for part in parts)])
    meets = [f"  {_meeting(ours, peer, name)}" for name, peer in peers.items()]
    return "\n\n".join(
        [
            f"Cache of one sequence, window {window}, C = {fold_tokens}: bf16 keys and values, "
            f"{8 * state_itemsize}-bit state",
            table(["context", *kinds, "sum", *(f"all {name}" for name in peers)], by_kind),
            "Saved against full attention in the same model",
            table(
                ["context", "window alone", "+ bf16 state", "+ float32 state", f"as allocated, C = {fold_tokens}"],
                saved,
            ),
            "\n".join(["From which context on the cache is the smaller one", *meets]),
        ]
    )


def _peer(config: ConfigDict, mixer: str) -> Callable[[int], int]:
    peer = set_mixer(config.copy_and_resolve_references(), mixer)
    peer.model.window = PEER_WINDOW
    return lambda context_length: sum(cache_bytes_per_sequence(peer.model, context_length).values())


def _meeting(ours: Callable[[int], int], peer: Callable[[int], int], name: str) -> str:
    length = crossing(ours, peer)
    return f"against {name}: " + (f"{length:,} tokens" if length else "never")


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
