"""A model of a few thousand weights on a few kilobytes of English: what the tests train.

python -m rattn.train --config tests/recipes/miniature.py --config.data.path=…
"""

from ml_collections import ConfigDict

from configs import base
from rattn.config import parse_arguments, set_mixer


def get_config(arguments: str = "") -> ConfigDict:
    args = parse_arguments(arguments, window=8, mixer="rattention", steps=100)
    config = base.get_config()
    config.total_steps = args.steps
    config.context_length = 32
    config.batch_size = 8
    config.model.update(width=16, layers=2, query_heads=4, kv_heads=2, head_dim=8, mlp_width=24, vocab_size=260)
    config.model.update(window=args.window, pattern=("rattention", "full"), rope_pattern=(True, False))
    config.optimizer.update(learning_rate=1e-2, warmup_steps=10)
    config.checkpoint.update(every_steps=10, keep=20)
    config.evaluation.update(every_steps=50, max_batches=2, final_max_batches=2)
    config.log.every_steps = 1
    return set_mixer(config, args.mixer)
