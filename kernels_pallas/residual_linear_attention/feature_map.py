"""The feature maps φ of residual linear attention (arXiv 2506.15545, section 2)."""

import jax
import jax.numpy as jnp

FEATURE_MAPS = ("softmax", "relu", "identity")


def feature_dim(feature_map: str, head_dim: int) -> int:
    """Returns P, the size of φ(x) for a head dim of `head_dim`."""
    return head_dim if feature_map == "identity" else 2 * head_dim


def features(feature_map: str, x: jax.Array) -> jax.Array:
    """Returns φ(x) over the last dim, in float32: [..., H] of any float dtype to [..., P]."""
    x = x.astype(jnp.float32)
    if feature_map == "softmax":
        return jnp.concatenate([jax.nn.softmax(x), jax.nn.softmax(-x)], axis=-1)
    if feature_map == "relu":
        return jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
    return x
