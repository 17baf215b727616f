"""Runs several preparations in one process, because importing seqio takes ten seconds.

Reads a JSON object {name: arguments} and writes {name: {"status", "stdout", "stderr"}}, and seqio's byte ids of a text.
"""

import contextlib
import io
import json
import sys

from rattn import prepare

TEXT = "A é\n\x00 東京"

if __name__ == "__main__":
    results = {}
    for name, arguments in json.load(sys.stdin).items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = prepare.main(arguments)
        results[name] = {"status": status, "stdout": out.getvalue(), "stderr": err.getvalue()}
    import seqio

    vocabulary = seqio.ByteVocabulary()
    ids = [int(i) for i in vocabulary.encode(TEXT)]
    results["byte_vocabulary"] = [ids, vocabulary.vocab_size, vocabulary.pad_id, vocabulary.eos_id]
    json.dump(results, sys.stdout)
