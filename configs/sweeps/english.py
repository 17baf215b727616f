"""The window study's small budget on English: documentation and speeches, three epochs, one GPU.

    python -m scripts.english_text build/english
    python -m rattn.prepare --task text_files --files 'build/english/*/*.txt' --train_vocabulary_size 8192 \\
      --out data/english-8192
    python -m rattn.sweep --config configs/small.py --sweep configs/sweeps/english.py --workdir runs/english

Models, schedule and batches are `configs/sweeps/window.py`'s; the text alone is another, so that what the study finds
of code can be seen not to be of code alone. Points stand in the order of their priority.
"""

from configs.sweeps import window
from rattn.sweeping.points import product

COMMON = window.COMMON | {
    "data.task": "text_files",
    "data.path": "data/english-8192",
    "data.files": "build/english/*/*.txt",
}
EVALUATION = window.EVALUATION
MODELS = (
    *product(mixer=["full"], seed=[0]),
    *product(mixer=["rattention", "swa"], window=[64], seed=[0]),
    *product(mixer=["full"], seed=[1]),
    *product(mixer=["rattention", "swa"], window=[64], seed=[1]),
    *product(mixer=["rattention", "swa"], window=[256], seed=[0]),
    *product(mixer=["linear"], seed=[0]),
    *product(mixer=["full"], seed=[2]),
)


def sweep(add):
    for model in MODELS:
        window.small_budget(add, model)
