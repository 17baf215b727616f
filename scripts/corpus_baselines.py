"""What a model has to beat: order-0 entropy and `xz -9`, in bits per byte, of a prepared corpus's own bytes.

    python -m scripts.corpus_baselines --path data/state_of_the_union

Both see the documents' text one after another, without separators; the entropy is that of the bytes' own frequencies.
"""

import argparse
import lzma
import sys

import numpy as np

from rattn.data.stream import BLOCK_TOKENS, Prepared
from rattn.errors import UserError


def main() -> int:
    """Prints a table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="data/state_of_the_union", help="a folder that rattn.prepare wrote")
    try:
        prepared = Prepared(parser.parse_args().path)
        text = {split: split_text(prepared, split) for split in ("train", "validation")}
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    text["all"] = text["train"] + text["validation"]
    for name, data in text.items():
        print(
            f"{name:>10}: {len(data):>11,} bytes, order-0 entropy {order_0_bits(data):.3f}, xz -9 {xz_bits(data):.3f} "
            "bits per byte"
        )
    return 0


def split_text(prepared: Prepared, split: str) -> bytes:
    """Returns the text of all documents of a split, by decoding its stream."""
    vocabulary = prepared.vocabulary()
    text = []
    for stream in prepared.streams(split):
        ids = [stream.read([at], BLOCK_TOKENS)[0][0] for at in range(0, stream.tokens, BLOCK_TOKENS)]
        ids = np.concatenate([*ids, np.zeros(0, np.int32)])[: stream.tokens]
        documents = np.split(ids, 1 + np.flatnonzero(ids == vocabulary.eos_id))
        text += [vocabulary.decode(document[:-1]).encode() for document in documents if len(document)]
    return b"".join(text)


def order_0_bits(data: bytes) -> float:
    """Returns the entropy of the byte frequencies, in bits per byte."""
    counts = np.bincount(np.frombuffer(data, np.uint8))
    p = counts[counts > 0] / len(data)
    return float(-(p * np.log2(p)).sum())


def xz_bits(data: bytes) -> float:
    """Returns the size that `xz -9` compresses to, in bits per byte."""
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


if __name__ == "__main__":
    sys.exit(main())
