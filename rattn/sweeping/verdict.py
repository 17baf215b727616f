"""The verdict in words: the smallest window that is as good as full attention."""

import dataclasses
from collections.abc import Callable

from rattn.sweeping.summary import Group, Run, Variant, loss, recall_beyond, recall_targets_beyond

# Fewer recall tokens than this are named in the verdict, for their loss is a matter of chance.
FEW_TARGETS = 2000


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A variant against full attention, in nats a token; a recall of None: nothing lies beyond the window.

    `loss_excess` and `recall_excess` are the variant's figure minus full attention's (`Variant.excess`), the epsilons
    what counts as equal; `recall_targets` recall tokens lie beyond the window.
    """

    variant: Variant
    loss_excess: float
    loss_epsilon: float
    recall_excess: float | None
    recall_epsilon: float | None
    recall_targets: int

    @property
    def within(self) -> bool:
        """Whether loss and recall beyond the window are within ε of full attention's."""
        recalls = self.recall_excess is None or self.recall_excess <= self.recall_epsilon
        return self.loss_excess <= self.loss_epsilon and recalls

    def __str__(self) -> str:
        recall = "nothing to recall beyond the window"
        if self.recall_excess is not None:
            recall = f"recall beyond the window {_against(self.recall_excess, self.recall_epsilon)}"
            recall += f" on {self.recall_targets:,} tokens" if self.recall_targets < FEW_TARGETS else ""
        return f"loss {_against(self.loss_excess, self.loss_epsilon)}, {recall}"


def compare(variant: Variant, full: Variant, epsilon: float | None) -> Comparison | None:
    """Compares a variant with full attention; None where no ε is given and full attention has a single seed."""
    recall = recall_beyond(variant.window or 0)
    epsilons = [epsilon_of(full, measure, epsilon) for measure in (loss, recall)]
    if epsilons[0] is None:
        return None
    recall_excess = variant.excess(full, recall)
    both = None not in (recall_excess, epsilons[1])
    return Comparison(
        variant=variant,
        loss_excess=variant.excess(full, loss),
        loss_epsilon=epsilons[0],
        recall_excess=recall_excess if both else None,
        recall_epsilon=epsilons[1] if both else None,
        recall_targets=recall_targets_beyond(variant.window or 0, variant.runs[0]),
    )


def verdict(group: Group, epsilon: float | None) -> list[str]:
    """Sentences: for each mixer with a window, the smallest one within ε of full attention; or why there is none.

    Args:
      group: what was measured.
      epsilon: nats a token that count as equal; None: twice full attention's spread over seeds, of each measure.
    """
    full = group.full
    if full is None:
        return ["No verdict: full attention is not among the points; add one with mixer=full."]
    if epsilon is None and len(full.runs) < 2:
        return [
            "No verdict: ε is twice full attention's spread over seeds, and full attention ran with a single seed "
            f"({full.runs[0].seed}); add another seed, or say with --epsilon how many nats a token count as equal."
        ]
    sentences = [_mixer_verdict(group, mixer, full, epsilon) for mixer in group.windowed]
    if not sentences:
        return ["No verdict: no point has a window; add points with mixer=rattention or mixer=swa."]
    return [*sentences, _caution(group, full, epsilon)]


def _mixer_verdict(group: Group, mixer: str, full: Variant, epsilon: float | None) -> str:
    compared = [compare(variant, full, epsilon) for variant in group.curve(mixer)]
    within = [comparison for comparison in compared if comparison.within]
    tried = ", ".join(str(comparison.variant.window) for comparison in compared)
    if not within:
        nearest = min(compared, key=lambda comparison: comparison.loss_excess)
        return (
            f"{mixer}: no window of {tried} is within ε of full attention; the nearest in loss is "
            f"{nearest.variant.window}: {nearest}."
        )
    smallest = within[0]
    later = [c for c in compared if c.variant.window > smallest.variant.window and not c.within]
    sentence = (
        f"{mixer}: the smallest window whose loss, and whose recall beyond the window, are within ε of full "
        f"attention's is {smallest.variant.window} (of {tried}): {smallest}."
    )
    if smallest.loss_excess < -smallest.loss_epsilon:
        sentence += " Its loss is lower than full attention's by more than ε."
    if len(smallest.variant.runs) == 1:
        sentence += " It rests on a single seed."
    if later:
        sentence += (
            f" The curve is not monotone: {', '.join(str(c.variant.window) for c in later)} "
            f"{'is' if len(later) == 1 else 'are'} larger and not within ε, so the choice is not safe."
        )
    if smallest is compared[0]:
        sentence += " No smaller one was tried."
    return sentence


def _caution(group: Group, full: Variant, epsilon: float | None) -> str:
    if epsilon is not None:
        return f"ε is {epsilon:g} nats a token, as given."
    seeds = len(full.runs)
    sentence = (
        f"ε is twice full attention's spread (sample standard deviation) over {seeds} seeds: "
        f"{_nats(2 * full.spread(loss))} nats a token for the loss, and for recall the same of each window's own "
        "figure." + (" Two or three seeds estimate a spread badly: read ε as a rough scale." if seeds < 4 else "")
    )
    if pooled := group.paired_spread(loss):
        sentence += (
            f" From seed to seed the loss's difference from full attention at the same seed spreads by "
            f"{_nats(pooled[0])} (pooled, {pooled[1]} degree{'s' if pooled[1] > 1 else ''} of freedom)."
        )
    return sentence


def epsilon_of(full: Variant, measure: Callable[[Run], float | None], epsilon: float | None) -> float | None:
    """What counts as equal: `epsilon` if given, else twice full attention's spread; None with a single seed."""
    if epsilon is not None:
        return epsilon
    spread = full.spread(measure)
    return None if spread is None else 2 * spread


def _against(excess: float, epsilon: float) -> str:
    return f"{excess:+.4f} ({'within' if excess <= epsilon else 'beyond'} ε = {_nats(epsilon)})"


def _nats(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.1e}"
