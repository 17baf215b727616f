"""A model that learns English letters on a laptop.

    python -m rattn.train --config configs/tiny.py --workdir runs/tiny

Hardware: two CPU cores. Result: see README.md.
"""

from ml_collections import ConfigDict

from configs import base
from rattn.config import parse_arguments, set_mixer


def get_config(arguments: str = "") -> ConfigDict:
    args = parse_arguments(arguments, window=64, mixer="rattention")
    config = base.get_config()
    config.total_steps = 1000
    config.batch_size = 4
    config.model.window = args.window
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.checkpoint.every_steps = 200
    config.evaluation.every_steps = 200
    config.evaluation.max_batches = 8
    return set_mixer(config, args.mixer)
