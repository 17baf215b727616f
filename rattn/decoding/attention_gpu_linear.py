"""The linear branch of `attention_gpu`: the state, and the keys that left the window since it was folded."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# Keys that wait for the fold, and rows of a state, that a program reads at a time.
WAITING_TILE, STATE_TILE = 16, 32


def linear_branch(program):
    """Returns φ(q) · the state and the keys that wait for the fold, [H, Q]."""
    q = program.queries()
    if program.plan.normed_features:
        q = program.normed(q, "q scale")
    phi_q = _features(program, q)

    def state_tile(i, o):
        state = program.refs["state"][program.batch, program.head, pl.ds(i * STATE_TILE, STATE_TILE), :]
        return o + program.dot(state.astype(program.dtype), _feature_tile(program, q, i), 0, 1)

    def waiting_tile(i, o):
        waiting = i * WAITING_TILE + jnp.arange(WAITING_TILE)
        ages = program.plan.window + waiting
        valid = (waiting < program.unfolded) & (ages < program.known)
        slots = (program.newest - ages) % program.slots
        k = program.load_halves("k", slots, valid)
        phi_k = _features(program, program.normed(k, "k scale") if program.plan.normed_features else k)
        scores = sum(program.dot(a, b, 1, 1) for a, b in zip(phi_k, phi_q, strict=True))
        scores = jnp.where(valid[:, None], scores, 0.0).astype(program.dtype)
        return o + program.dot(program.load("v", slots, valid, 0, program.H), scores, 0, 0)

    o = jnp.zeros((program.H, program.Q), jnp.float32)
    o = jax.lax.fori_loop(0, 2 * program.H // STATE_TILE, state_tile, o)
    return jax.lax.fori_loop(0, (program.unfolded + WAITING_TILE - 1) // WAITING_TILE, waiting_tile, o)


def _powers(program, x, sign):
    """Returns e^(±x − m) of both halves, m [rows, 1] and the inverse of their sum."""
    halves = [half.astype(jnp.float32) if sign > 0 else -half.astype(jnp.float32) for half in x]
    most = jnp.maximum(*(jnp.max(half, axis=1) for half in halves))[:, None]
    powers = [program.exp(half, most) for half in halves]
    return powers, most, 1.0 / sum(jnp.sum(half, axis=1) for half in powers)[:, None]


def _features(program, x):
    """Returns the pieces of φ(x): softmax(x) and softmax(−x), each in its halves."""
    pieces = []
    for sign in (1.0, -1.0):
        powers, _, inverse = _powers(program, x, sign)
        pieces += [(half * inverse).astype(program.dtype) for half in powers]
    return pieces


def _feature_tile(program, q, i):
    """Returns φ(q)'s dims of tile i, [Q, STATE_TILE], read again, for registers have no number."""
    turned = i >= program.H // STATE_TILE
    first = jnp.where(turned, i * STATE_TILE - program.H, i * STATE_TILE)
    x = program.load("qkv", program.rows, program.rows < program.G, first, STATE_TILE)
    if program.plan.normed_features and "q scale" in program.refs:
        x = program.scaled(
            x, program.inverse_rms(program.queries()), program.refs["q scale"][pl.ds(first, STATE_TILE)][None]
        )
    x = x.astype(jnp.float32)
    (_, most, inverse), (_, other_most, other_inverse) = (_powers(program, q, sign) for sign in (1.0, -1.0))
    x, most = jnp.where(turned, -x, x), jnp.where(turned, other_most, most)
    return (program.exp(x, most) * jnp.where(turned, other_inverse, inverse)).astype(program.dtype)
