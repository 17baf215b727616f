"""Pretrain and study local-global language models with RATTENTION."""
