"""Associative recall with uniform gaps in an all-local stack: where windows separate most clearly, and soonest.

    python -m rattn.train --config configs/recall.py:window=32,mixer=swa --workdir runs/recall_swa32

No layer sees the whole row unless the mixer does, so a stack of L window layers reaches back about L·W tokens, a linear
branch as far as its state of P × H features tells keys apart, and full attention everywhere. Evaluate with
--recall_context_tokens=1 --frequent_rate=1: the key alone says which value is asked for. Hardware: two cores, two
to three minutes.
"""

from ml_collections import ConfigDict

from configs import base
from rattn.config import parse_arguments, set_mixer


def get_config(arguments: str = "") -> ConfigDict:
    args = parse_arguments(
        arguments, window=32, mixer="rattention", pairs=32, length=256, layers=2, width=64, ids=194, steps=800
    )
    config = base.get_config()
    config.context_length = args.length
    config.batch_size = 16
    config.total_steps = args.steps
    config.model.update(
        width=args.width,
        layers=args.layers,
        query_heads=2,
        kv_heads=2,
        head_dim=args.width // 2,
        mlp_width=2 * args.width,
        vocab_size=args.ids,
        pattern=("rattention",),
        rope_pattern=(True,),
        rope_theta=1e4,
        window=args.window,
    )
    config.data.update(source="recall", recall_pairs=args.pairs, vocabulary=f"ids:{args.ids}")
    # Down to 2 or 3 pairs: among so few, full attention finds out what is asked for, within 400 steps and then for all
    # sizes at once. From rows of 32 pairs in 512 tokens alone it had not in 1,860 steps of 16 rows, and down to 4 pairs
    # (16 in 128 tokens) in part after 2,000 of 64.
    config.data.recall_halvings = max(0, args.pairs.bit_length() - 2)
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = args.steps // 20
    config.checkpoint.every_steps = args.steps
    config.evaluation.update(every_steps=args.steps, batch_size=64)
    config.log.every_steps = 20
    return set_mixer(config, args.mixer)
