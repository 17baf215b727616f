"""Gathers English prose for a study, some 50 MB, as .txt files for `python -m rattn.prepare --task text_files`.

    python -m scripts.english_text build/english
    python -m rattn.prepare --task text_files --files 'build/english/*/*.txt' --train_vocabulary_size 8192 \\
      --out data/english-8192

The documentation of Linux and of Python, of Debian 12's packages (apt, which needs no root for it), and the speeches of
the task state_of_the_union. A document is a file; copies are left out. OUT/versions says which packages it was: others
make another text, and a report on both says so.
"""

import argparse
import gzip
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from rattn.data.corpora import state_of_the_union
from rattn.errors import UserError

# Debian's package, its folder, and the ends of the names of its texts.
PACKAGES = {
    "linux": ("linux-doc-6.1", "usr/share/doc/linux-doc-6.1", (".rst", ".rst.gz", ".txt", ".txt.gz")),
    "python": ("python3.11-doc", "usr/share/doc/python3.11", (".rst.txt", ".rst.txt.gz")),
}


def main() -> None:
    """Writes OUT/SOURCE/NAME.txt and OUT/versions; OUT is there once all of it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="a folder that does not exist yet")
    out = parser.parse_args().out
    if out.exists():
        raise UserError(f"{out} is there already; give a folder that does not exist yet.")
    speeches = state_of_the_union()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        downloaded, made = pathlib.Path(work) / "packages", pathlib.Path(work) / "made"
        versions = list(unpack(downloaded))
        seen: set[str] = set()
        for source, (_, folder, ends) in PACKAGES.items():
            write(made / source, texts(downloaded / folder, ends), seen)
        write(made / "union", ((document.group, document.text) for document in speeches.documents()), seen)
        versions += [f"{name} {version}" for name, version in speeches.origin["packages"].items()]
        (made / "versions").write_text("\n".join(versions) + "\n")
        made.rename(out)


def unpack(folder: pathlib.Path) -> Iterator[str]:
    """Downloads and unpacks Debian's packages into a new folder; yields their names with versions."""
    folder.mkdir()
    names = [package for package, *_ in PACKAGES.values()]
    try:
        subprocess.run(["apt-get", "-qq", "download", *names], cwd=folder, check=True)
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)
            yield package.stem
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{' and '.join(names)} cannot be had ({error}); run this on Debian 12, with apt.") from None


def texts(folder: pathlib.Path, ends: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yields names and texts of the files whose names end so, but for those that are not UTF-8."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(ends)):
        data = path.read_bytes()
        try:
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        except UnicodeDecodeError:
            continue
        name = str(path.relative_to(folder)).removesuffix(".gz").removesuffix(".txt")
        yield name.replace("/", "__"), text


def write(folder: pathlib.Path, named: Iterator[tuple[str, str]], seen: set[str]) -> None:
    """Writes texts that are not empty and have not been seen, and says how much it was."""
    folder.mkdir(parents=True)
    files = size = 0
    for name, text in named:
        if text.strip() and text not in seen:
            seen.add(text)
            size += (folder / f"{name}.txt").write_bytes(text.encode())
            files += 1
    print(f"{folder.name}: {files} files, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"rattn: {error}")
