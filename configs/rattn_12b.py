"""The paper's 12B model (arXiv 2506.15545): 12.58 B parameters beside embeddings.

    python -m rattn.train --config configs/rattn_12b.py --workdir gs://bucket/rattn_12b

Hardware: the paper used 1024 TPU v6e chips, 4 slices of 256. What the paper does not publish is as in `rattn_3b`; no
run has been made at this size.
"""

from ml_collections import ConfigDict

from configs import rattn_3b
from rattn.config import parse_arguments, set_mixer


def get_config(arguments: str = "") -> ConfigDict:
    args = parse_arguments(arguments, window=512, mixer="rattention", context=4096)
    config = rattn_3b.get_config(f"window={args.window},context={args.context}")
    # 600 B tokens.
    config.total_steps = 600_000_000_000 // (config.batch_size * args.context)
    config.model.update(width=5120, layers=40, query_heads=40, kv_heads=8, head_dim=128, mlp_width=16384)
    return set_mixer(config, args.mixer)
