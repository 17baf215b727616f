"""How `attention_ring_gpu` divides its work and a multiprocessor's shared memory."""

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
# Warpgroups that take keys.
KEY_WARPGROUPS = 2
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
      slots: tiles that shared memory holds at a time.
      copies: a head's tiles of keys ("k", tile), state ("s") and values ("v"), in the order in which they are copied.
      values: the number of the first copy of values.
    """

    def __init__(self, B: int, K: int, G: int, S: int):
        self.B, self.K, self.G, self.S = B, K, G, S
        self.Q, self.tiles = queries_of(G), tiles_of(S)
        self.columns = 2 * self.Q + LINEAR
        self.key_tiles = [range(number, self.tiles, KEY_WARPGROUPS) for number in range(KEY_WARPGROUPS)]
        used = 2 * HEAD_DIM * (self.tiles * 2 * self.Q + 2 * LINEAR + 2 * (2 * self.Q + 2))
        used += 2 * self.columns * self.tiles * TILE + 4 * HEAD_DIM * (self.columns + LINEAR) + 4 * self.Q * TILE
        self.slots = (SHARED_BYTES - SMALL_BYTES - used) // TILE_BYTES
        # Values wait for the weights of all keys, so keys are first.
        counts = ("k", self.tiles), ("s", STATE_TILES), ("v", self.tiles)
        self.values = self.tiles + STATE_TILES
        self.copies = [(kind, n) for kind, count in counts for n in range(count)]

    def place(self, kind: str, n: int) -> tuple[int, int]:
        """Returns the number of a tile among its head's copies, and its slot in shared memory."""
        number = n + {"k": 0, "s": self.tiles, "v": self.values}[kind]
        return number, number % self.slots

    def before(self, number: int) -> tuple[int, bool]:
        """Returns the copy that was in the slot of copy `number` before it, and whether it was the head's own.

        Every head begins with the first slot, where it finds the last copies of the head before it.
        """
        if number >= self.slots:
            return number - self.slots, True
        rounds = (len(self.copies) - 1 - number) // self.slots
        return number + rounds * self.slots, False
