"""Plays `products_persistent_gpu` on a CPU: its own code, a thread for each warpgroup of its 128 programs, in NumPy.

Pallas interprets neither copies by threads nor counters in device memory. A product happens here when it is waited for,
with what its slots hold by then; a copy by threads leaves no number in its slot when it is begun, and its own when it
is waited for; the copy engine's happen at once. So what is read before it is there, or freed while it is needed, gives
wrong sums, and a barrier that passes somebody by, or on which all wait, is an error, if threads come to it so.

Of what is smaller than a warpgroup nothing is played: that its warps meet before one of them arrives for all, fences
between threads, copy engine and tensor cores, the order of kernels.
"""

import contextlib
import random
import threading
import time
import types

import numpy as np
import pytest

from rattn.decoding import products_persistent_gpu as kernel
from rattn.decoding.products_persistent_plan import PAIRS, PROGRAMS, SIDES, WEIGHT_NUMBERS

# All wait for each other when nobody has come past a barrier for so long.
LOCKED_SECONDS = 30
# How often a warpgroup is slow, so that others are ahead of it, and for how long at most.
SLOW_SHARE, SLOW_SECONDS = 0.1, 0.05
HERE = threading.local()
FAILED = threading.Event()
# When somebody last came past a barrier.
LAST = [0.0]


class Ref:
    """A part of an array."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    @property
    def at(self):
        """What is indexed for a part."""
        return _At(self)

    def __getitem__(self, _):
        return np.array(self.array)

    def __setitem__(self, _, value):
        assert self.shape == np.shape(value)
        self.array[...] = value

    def transpose(self, order):
        """The same part, turned."""
        return Ref(self.array.transpose(order))


class _At:
    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, index):
        return Ref(self.ref.array[(*(index if isinstance(index, tuple) else (index,)), ...)])


class Barrier:
    """A barrier; each thread waits for its phases one after another."""

    def __init__(self, arrivals):
        self.arrivals, self.arrived, self.phase = arrivals, 0, 0
        self.changed = threading.Condition()
        self.waited = {}

    def arrive(self):
        """One arrival."""
        with self.changed:
            self.arrived += 1
            if self.arrived == self.arrivals:
                self.arrived, self.phase = 0, self.phase + 1
                self.changed.notify_all()

    def wait(self):
        """Waits for the thread's next phase."""
        me = threading.get_ident()
        phase = self.waited[me] = self.waited.get(me, 0) + 1
        with self.changed:
            wait_until(self.changed, lambda: self.phase >= phase)
            assert self.phase == phase, "A barrier went on before all had waited for it."


class Barriers(list):
    """Some barriers, of which a cluster's have a twin each in the other program."""

    @property
    def at(self):
        """What is indexed for one of them."""
        return self


def wait_until(changed, done):
    """Waits until done(), holding `changed`."""
    while not changed.wait_for(done, timeout=0.1):
        assert not FAILED.is_set(), "Another warpgroup failed."
        assert time.monotonic() < LAST[0] + LOCKED_SECONDS, "All wait for each other."
    LAST[0] = time.monotonic()


def arrive(barrier):
    """Arrives at a barrier, or at a cluster's in both programs."""
    for one in barrier if isinstance(barrier, tuple) else (barrier,):
        one.arrive()


def wait(barrier):
    """Waits for a barrier, for a cluster's the one of the thread's own program; and then, at times, a little longer."""
    (barrier[HERE.side] if isinstance(barrier, tuple) else barrier).wait()
    if HERE.random.random() < SLOW_SHARE:
        time.sleep(SLOW_SECONDS * HERE.random.random())


def products_done(but):
    """Does the products that the thread has begun, except for the newest."""
    while len(HERE.products) > but:
        sums, x, w = HERE.products.pop(0)
        sums += np.einsum("ij,jk->ik", x.array, w.array)


def begin_copy(source, place, *_):
    """Begins a copy by threads: from now on its place may hold anything."""
    place.array[...] = np.nan
    HERE.copies.append((place, source))


def copies_done(but):
    """Does the copies that the thread has begun, except for the newest."""
    while len(HERE.copies) > but:
        place, source = HERE.copies.pop(0)
        place[...] = source.array


def copy_rows(source, place, full, collective_axes):
    """The copy engine's: rows that are not there are zeros; what both programs take, each brings half of to both."""
    rows, half = place.shape[0], place.shape[0] // SIDES
    whole = np.zeros(place.shape, place.array.dtype)
    whole[: source.shape[0]] = source.array
    if collective_axes is None:
        place.array[...] = whole
        full.arrive()
        return
    at, slot = HERE.side * half, HERE.shared["rows_full"].index(full)
    for shared in HERE.pair:
        shared["rows"].array[slot * rows + at : slot * rows + at + half] = whole[at : at + half]
        shared["rows_halves"][slot].arrive()


class _Sums:
    def __init__(self, shape):
        self.array = np.zeros(shape, np.float32)

    def __getitem__(self, _):
        products_done(0)
        return self.array


def store_to_other(value, half, full, *, cluster_idx, **_):
    """Writes to the same place of the other program."""
    other = HERE.pair[cluster_idx]
    group = int(np.argmax([np.shares_memory(half.array, x) for x in HERE.shared["half"].array]))
    other["half"].array[group] = value
    other["half_full"].arrive()


def fori_loop(lower, upper, body, carry):
    """The loop itself."""
    for i in range(lower, upper):
        carry = body(i, carry)
    return carry


def when(condition):
    """Does what it decorates, or not."""
    return lambda work: work() if condition else None


def played(plan, given, counters):
    """Runs the kernel on arrays of NumPy; returns all that it writes, by name.

    Args:
      plan: a `Plan`, with an activation of NumPy.
      given: "o", "x" (`padded`) and "weights", [columns, length] by product, in bfloat16.
      counters: COUNTERS zeros, and what is cleared.
    """
    shared = plan.shared()
    found = {name: Ref(np.full(x.shape, np.nan, x.dtype)) for name, x in plan.results().items()}
    device = {"o": Ref(given["o"]), "x": Ref(given["x"]), "mine": Ref(counters[0]), "others": Ref(counters[1])}
    device |= {"found": found, "weights": {name: Ref(x) for name, x in given["weights"].items()}}
    counted, errors, threads = threading.Condition(), [], []

    def count(counter):
        with counted:
            counter.array += 1
            counted.notify_all()

    def wait_for_count(counter, value):
        with counted:
            wait_until(counted, lambda: counter.array >= value)

    fake = {
        "jnp": types.SimpleNamespace(
            int32=int,
            float32=np.float32,
            bfloat16=given["x"].dtype,
            zeros=np.zeros,
            broadcast_to=np.broadcast_to,
            where=lambda c, a, b: np.where(c, a, b) if np.ndim(c) else (a if c else b),
            minimum=min,
        ),
        "jax": types.SimpleNamespace(
            named_scope=lambda _: contextlib.nullcontext(),
            lax=types.SimpleNamespace(
                axis_index=lambda name: getattr(HERE, name),
                div=lambda a, b: a // b,
                rem=lambda a, b: a % b,
                fori_loop=fori_loop,
                rsqrt=lambda x: 1 / np.sqrt(x),
                broadcast_in_dim=lambda x, shape, dims: np.broadcast_to(x[:, None], shape),
            ),
        ),
        "pl": types.SimpleNamespace(
            ds=lambda start, size: slice(start, start + size), when=when, run_scoped=lambda scope, sums: scope(sums)
        ),
        "plgpu": types.SimpleNamespace(
            griddepcontrol_launch_dependents=lambda: None,
            griddepcontrol_wait=lambda: None,
            barrier_arrive=arrive,
            barrier_wait=wait,
            copy_gmem_to_smem=copy_rows,
            load=lambda ref, **_: ref[...],
            async_store_smem=store_to_other,
            wgmma=lambda sums, x, w: HERE.products.append((sums.array, x, w)),
            wgmma_wait=products_done,
            ACC=lambda shape, _: _Sums(shape),
        ),
        "mosaic_gpu": types.SimpleNamespace(
            wait_for_copies=copies_done,
            wait_if=lambda condition, barrier: wait(barrier) if condition else None,
            copy=begin_copy,
            show_copies=lambda: None,
            join=lambda: None,
            count=count,
            wait_for_count=wait_for_count,
        ),
    }

    def run(number, warpgroup, pair):
        HERE.warpgroup, HERE.pair, HERE.side = warpgroup, pair, number % SIDES
        HERE.random = random.Random(4 * number + warpgroup)
        HERE.shared, HERE.products, HERE.copies = pair[HERE.side], [], []
        try:
            program = kernel._Program.__new__(kernel._Program)
            vars(program).update(device | HERE.shared, plan=plan, products=plan.products)
            program.pair, program.side, program.number = number // SIDES, HERE.side, number
            work = program.copy_weights, program.copy_rows, *(program.multiply_all for _ in range(plan.groups))
            work[warpgroup]()
            assert not HERE.copies + HERE.products
        except BaseException as error:
            errors.append(error)
            FAILED.set()

    FAILED.clear()
    LAST[0] = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, np.errstate(invalid="ignore"):
        for name, value in fake.items():
            patch.setattr(kernel, name, value)
        for first in range(0, PROGRAMS, SIDES):
            pair = _pair(plan, shared)
            for side in range(SIDES):
                for warpgroup in range(kernel.FIRST_MULTIPLIER + plan.groups):
                    threads.append(threading.Thread(target=run, args=(first + side, warpgroup, pair), daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise next((error for error in errors if "Another" not in str(error)), errors[0])
    assert len(threads) == (2 + plan.groups) * SIDES * PAIRS
    return {name: ref.array for name, ref in found.items()}


def _pair(plan, types_of):
    """Shared memory of both programs of a cluster: all that it holds is no number before it is written."""
    pair = []
    for _ in range(SIDES):
        ring = np.full((plan.slots["weights"], WEIGHT_NUMBERS), np.nan, np.float32)
        shared = {name: Ref(np.full(types_of[name].shape, np.nan, np.float32)) for name in ("rows", "half")}
        shared["rings"] = {d: Ref(ring.reshape(-1, WEIGHT_NUMBERS // d, d)) for d in plan.depths}
        for name in ("weights_full", "weights_empty", "rows_full"):
            barriers = types_of[name]
            shared[name] = Barriers(Barrier(barriers.num_arrivals) for _ in range(barriers.num_barriers[0]))
        for name in ("half_full", "written"):
            shared[name] = Barrier(types_of[name].num_arrivals)
        # A slot that both fill is full when both halves are there.
        shared["rows_halves"] = [_Halves(full) for full in shared["rows_full"]]
        pair.append(shared)
    empty, done = types_of["rows_empty"], types_of["done"]
    twins = [tuple(Barrier(SIDES * empty.num_arrivals) for _ in range(SIDES)) for _ in range(empty.num_barriers[0])]
    whole = tuple(Barrier(SIDES * done.num_arrivals) for _ in range(SIDES))
    for shared in pair:
        shared["rows_empty"], shared["done"] = Barriers(twins), whole
    return pair


class _Halves:
    """Arrives at a barrier when both programs have brought their half."""

    def __init__(self, full):
        self.full, self.arrived, self.lock = full, 0, threading.Lock()

    def arrive(self):
        with self.lock:
            self.arrived += 1
            whole = self.arrived % SIDES == 0
        if whole:
            self.full.arrive()
