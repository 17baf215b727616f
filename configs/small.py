"""About 20 M parameters beside embeddings: a window study on one GPU.

    python -m rattn.train --config configs/small.py --workdir runs/small

Hardware: one GPU.
"""

from ml_collections import ConfigDict

from configs import base
from rattn.config import parse_arguments, set_mixer


def get_config(arguments: str = "") -> ConfigDict:
    args = parse_arguments(arguments, window=256, mixer="rattention", context=2048)
    config = base.get_config()
    config.context_length = args.context
    config.batch_size = 32
    config.total_steps = 3000
    config.model.update(
        width=512,
        layers=8,
        query_heads=8,
        kv_heads=4,
        head_dim=64,
        mlp_width=1152,
        vocab_size=8192,
        window=args.window,
        compute_dtype="bfloat16",
        # A scan would fill 24 GB of stacks with zeros and copy into and out of them.
        scan_blocks=False,
    )
    config.data.update(
        task="python_source",
        path="data/python_source-8192",
        train_vocabulary_size=8192,
    )
    config.optimizer.warmup_steps = 200
    config.evaluation.max_batches = 32
    config.evaluation.batch_size = 32
    return set_mixer(config, args.mixer)
