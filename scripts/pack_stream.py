"""Packs a prepared token stream for a machine that cannot prepare it, or unpacks it there.

python -m scripts.pack_stream pack data/python_source-8192 build/study/python_source-8192.tar.xz
python -m scripts.pack_stream unpack build/study/python_source-8192.tar.xz data

The archive is an ordinary .tar.xz. LZMA is told that bytes come in pairs (tokens are uint16) and may look back over the
whole stream: 150.2 MB (73.9 M tokens of Python source) become 24.4 MB in a minute and a half on one core, and unpack in
seconds.
"""

import lzma
import pathlib
import sys
import tarfile

DICTIONARY_BYTES = 192 * 2**20
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": DICTIONARY_BYTES, "lc": 0, "lp": 1, "pb": 1}]


def pack(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Writes `folder` with all it holds into the archive `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".unfinished")
    with lzma.open(unfinished, "wb", filters=FILTERS) as file, tarfile.open(fileobj=file, mode="w|") as archive:
        archive.add(folder, folder.name)
    unfinished.replace(out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def unpack(archive: pathlib.Path, parent: pathlib.Path) -> None:
    """Puts the archive's folder into `parent`, unless it is there."""
    folder = parent / archive.name.partition(".tar")[0]
    if folder.exists():
        print(f"{folder} is there.")
        return
    with lzma.open(archive) as file, tarfile.open(fileobj=file, mode="r|") as members:
        members.extractall(parent, filter="data")
    print(f"{folder} unpacked.")


if __name__ == "__main__":
    action, source, target = sys.argv[1:]
    {"pack": pack, "unpack": unpack}[action](pathlib.Path(source), pathlib.Path(target))
