"""How `attention_ring_gpu` divides its work and a multiprocessor's shared memory."""

import itertools

# Slots of a tile; bytes of one.
TILE, TILE_BYTES = 64, 16 * 1024
HEAD_DIM = 128
HALF = HEAD_DIM // 2
# Tiles of a head's state.
STATE_TILES = 8
# Scores of a head that fit in registers.
MOST_TILES = 17
# Bytes of a multiprocessor's 227 KiB that are used, and of them what barriers and the ends of small arrays take.
SHARED_BYTES, SMALL_BYTES = 224 * 1024, 6 * 1024
# Warpgroups that take keys, most tiles in the ring of each, and tiles of state and values that come first.
KEY_WARPGROUPS, MOST_KEY_SLOTS, LEAST_OTHER_SLOTS = 2, 3, 4
# Registers of a thread that copies, that takes keys, that takes the rest: 512 together.
COPY_REGISTERS, KEY_REGISTERS, OTHER_REGISTERS = 24, 192, 104
PROGRAMS = 132
# Columns of the linear branch: the least that a product has.
LINEAR = 8


def tiles_of(slots: int) -> int:
    """Tiles of a ring."""
    return -(-slots // TILE)


def queries_of(group: int) -> int:
    """Columns of a product for the queries of a group."""
    return 4 if group <= 4 else 8


class Call:
    """What follows from the sizes of a call.

    Attributes:
      Q: columns of a product for a head's queries, of which there are two sets.
      tiles: of a ring.
      columns: of weights: two sets of queries, and the linear branch's.
      key_tiles: those of each warpgroup that takes keys.
      key_slots: tiles in the ring of each.
      other_slots: tiles in the ring of state and values.
      early: a head's copies that there is room for at once, ("k", "s" or "v", tile) each, in their order.
      late: those after them.
    """

    def __init__(self, B: int, K: int, G: int, S: int):
        self.B, self.K, self.G, self.S = B, K, G, S
        self.Q, self.tiles = queries_of(G), tiles_of(S)
        self.columns = 2 * self.Q + LINEAR
        self.key_tiles = [range(number, self.tiles, KEY_WARPGROUPS) for number in range(KEY_WARPGROUPS)]
        used = 2 * HEAD_DIM * (self.tiles * 2 * self.Q + 2 * LINEAR + 2 * (2 * self.Q + 2))
        used += 2 * self.columns * self.tiles * TILE + 4 * HEAD_DIM * (self.columns + LINEAR) + 4 * self.Q * TILE
        room = (SHARED_BYTES - SMALL_BYTES - used) // TILE_BYTES
        self.key_slots = max(2, min(MOST_KEY_SLOTS, (room - LEAST_OTHER_SLOTS) // KEY_WARPGROUPS))
        self.other_slots = room - KEY_WARPGROUPS * self.key_slots
        # Copies of a head in the order in which they are asked for: the first are all that there is room for at once.
        # Values wait for the weights of all keys, so keys come before them.
        keys, states = ([(kind, n) for n in range(count)] for kind, count in (("k", self.tiles), ("s", STATE_TILES)))
        first = KEY_WARPGROUPS * self.key_slots, max(self.other_slots, 0)
        self.early, self.late = (
            [x for pair in itertools.zip_longest(keys[of_keys], states[of_states]) for x in pair if x]
            for of_keys, of_states in (map(slice, first), (slice(n, None) for n in first))
        )
        self.late += [("v", n) for n in range(self.tiles)]

    def key_slot(self, t: int) -> tuple[int, bool]:
        """Returns the slot of tile t of a head's keys, and whether another tile of the head was in it before."""
        taker, n = t % KEY_WARPGROUPS, t // KEY_WARPGROUPS
        return taker * self.key_slots + n % self.key_slots, n >= self.key_slots

    def other_slot(self, n: int) -> tuple[int, bool]:
        """Returns the same of tile n of state and values, those after each other."""
        return n % self.other_slots, n >= self.other_slots
