"""The paper's 3B model (arXiv 2506.15545): 2.88 B parameters beside embeddings.

    python -m rattn.train --config configs/rattn_3b.py --workdir gs://bucket/rattn_3b
    python -m rattn.train --config configs/rattn_3b.py:window=4096,mixer=swa,context=8192 --workdir …

Hardware: the paper used 512 TPU v6e chips, 2 slices of 256. The paper publishes neither vocabulary, learning rate,
warm-up nor weight decay: those here are our choices, and no run has been made at this size.
"""

from ml_collections import ConfigDict

from configs import base
from rattn.config import parse_arguments, set_mixer


def get_config(arguments: str = "") -> ConfigDict:
    args = parse_arguments(arguments, window=512, mixer="rattention", context=4096)
    config = base.get_config()
    config.context_length = args.context
    config.batch_size = 1024
    # 400 B tokens: the paper's window curve.
    config.total_steps = 400_000_000_000 // (config.batch_size * args.context)
    config.model.update(
        vocab_size=131_072,
        width=2048,
        layers=56,
        query_heads=16,
        kv_heads=4,
        head_dim=128,
        mlp_width=6656,
        window=args.window,
        compute_dtype="bfloat16",
        remat="block",
    )
    config.loss.chunk_tokens = 512
    config.data.update(
        task="pretraining_mixture",
        module="my_tasks",
        path="data/pretraining_mixture",
        vocabulary="data/vocabulary.model",
    )
    config.optimizer.update(
        name="rmsprop", learning_rate=1e-3, warmup_steps=2000, beta1=0.9, beta2=0.95, weight_decay=0.1
    )
    config.mesh.fsdp = 256
    config.checkpoint.update(every_steps=1000, keep=3)
    config.evaluation.update(every_steps=1000, max_batches=16, final_max_batches=64, batch_size=1024)
    return set_mixer(config, args.mixer)
