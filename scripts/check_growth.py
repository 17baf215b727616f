"""Whether local layers cost the same per token at every context length, in the compiled training step.

    python -m scripts.check_growth [--mixer rattention] [--contexts 8192,32768,131072]

Compiles a model of local layers alone for a v5p slice that need not be there, with rows cut over `seq`=8; prints what
one device does for a token of its own: FLOPs and bytes as the compiler counts them (kernels by their cost estimates)
and temporaries; beside it the bytes received in collectives but all-reduces, which are the weights' gradients. Exits
with 1 where FLOPs or temporaries grow by more than 2 %, or the collectives' bytes at all.
"""

import argparse
import sys

from rattn import platform
from rattn.config import load_config, set_mixer, validate
from rattn.planning.collectives import find_collectives
from rattn.planning.compiled import compile_step, ticking
from rattn.planning.topologies import parse_topology

SHARDS = 8


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mixer", default="rattention")
    parser.add_argument("--contexts", default="8192,32768,131072")
    options = parser.parse_args()
    platform.configure()
    rows = []
    heads = ("context", "FLOPs a token", "bytes a token", "temporaries a token", "received", "compile")
    print("{:>8} {:>14} {:>14} {:>20} {:>12} {:>8}".format(*heads))
    for context in map(int, options.contexts.split(",")):
        config = load_config("configs/rattn_3b.py", f"context={context},window=512")
        config.model.update(width=512, layers=2, query_heads=8, kv_heads=2, mlp_width=1536, vocab_size=1024)
        config.model.update(pattern=("rattention",), rope_pattern=(True,))
        config.loss.chunk_tokens = 1024
        config.batch_size = config.evaluation.batch_size = 1
        config.mesh.update(data=1, fsdp=1, seq=SHARDS, model=1)
        set_mixer(config, options.mixer)
        with ticking(f"compiling {options.mixer} at {context:,} tokens"):
            executable, seconds = compile_step(validate(config), parse_topology("v5p:2x2x2"))
        tokens = context // SHARDS
        cost, memory = executable.cost_analysis(), executable.memory_analysis()
        # Halos and states; gradients of the weights are summed in float32 all-reduces.
        received = sum(one.bytes for one in find_collectives(executable.as_text()) if one.kind != "all-reduce")
        row = (cost["flops"] / tokens, cost["bytes accessed"] / tokens, memory.temp_size_in_bytes / tokens, received)
        rows.append(row)
        print(f"{context:>8,} {row[0]:>14,.0f} {row[1]:>14,.0f} {row[2]:>20,.0f} {row[3]:>12,.0f} {seconds:>6.0f} s")
    first, last = rows[0], rows[-1]
    grows = last[0] > 1.02 * first[0] or last[2] > 1.02 * first[2] or last[3] > first[3]
    print("Something grows with the context." if grows else "Nothing grows with the context.")
    return 1 if grows else 0


if __name__ == "__main__":
    sys.exit(main())
