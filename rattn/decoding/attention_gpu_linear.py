"""The linear branch of `attention_gpu`: the state, and the keys that left the window since it was folded."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# Keys that wait for the fold, and rows of a state, that a program reads at a time.
WAITING_TILE, STATE_TILE = 16, 32


def linear_branch(program):
    """Returns φ(q) · the state and the keys that wait for the fold, [H, Q]."""
    H, raw = program.H, program.queries()
    normed = program.plan.normed_features and "q scale" in program.refs
    inverse_rms = program.inverse_rms(raw) if normed else None
    (_, most, inverse), (_, other_most, other_inverse) = of_q = _powers(program, _taken(program, raw, "q scale"))
    phi_q = _features(program, of_q)

    def phi_q_tile(i):
        """Returns φ(q)'s dims of tile i, [Q, STATE_TILE], read again, for registers have no number."""
        turned = i >= H // STATE_TILE
        first = jnp.where(turned, i * STATE_TILE - H, i * STATE_TILE)
        x = program.load("qkv", program.rows, program.rows < program.G, first, STATE_TILE)
        if normed:
            x = program.scaled(x, inverse_rms, program.refs["q scale"][pl.ds(first, STATE_TILE)][None])
        x = x.astype(jnp.float32)
        powers = program.exp(jnp.where(turned, -x, x), jnp.where(turned, other_most, most))
        return (powers * jnp.where(turned, other_inverse, inverse)).astype(program.dtype)

    def state_tile(i, o):
        state = program.refs["state"][program.batch, program.head, pl.ds(i * STATE_TILE, STATE_TILE), :]
        return o + program.dot(state.astype(program.dtype), phi_q_tile(i), 0, 1)

    def waiting_tile(i, o):
        waiting = i * WAITING_TILE + jnp.arange(WAITING_TILE)
        ages = program.plan.window + waiting
        valid = (waiting < program.unfolded) & (ages < program.known)
        slots = (program.newest - ages) % program.slots
        k = _taken(program, program.load_halves("k", slots, valid), "k scale")
        phi_k = _features(program, _powers(program, k))
        scores = sum(program.dot(a, b, 1, 1) for a, b in zip(phi_k, phi_q, strict=True))
        scores = jnp.where(valid[:, None], scores, 0.0).astype(program.dtype)
        return o + program.dot(program.load("v", slots, valid, 0, H), scores, 0, 0)

    o = jnp.zeros((H, program.Q), jnp.float32)
    o = jax.lax.fori_loop(0, 2 * H // STATE_TILE, state_tile, o)
    return jax.lax.fori_loop(0, pl.cdiv(program.unfolded, WAITING_TILE), waiting_tile, o)


def _taken(program, x, scale):
    """Returns projected rows as φ takes them."""
    return program.normed(x, scale) if program.plan.normed_features else x


def _powers(program, x):
    """Returns for x and for −x: e^(x − m) of both halves, m [rows, 1] and the inverse of their sum."""
    found = []
    for halves in ([half.astype(jnp.float32) for half in x], [-half.astype(jnp.float32) for half in x]):
        most = jnp.maximum(*(jnp.max(half, axis=1) for half in halves))[:, None]
        powers = [program.exp(half, most) for half in halves]
        found.append((powers, most, 1.0 / sum(jnp.sum(half, axis=1) for half in powers)[:, None]))
    return found


def _features(program, found):
    """Returns the pieces of φ(x), from its powers: softmax(x) and softmax(−x), each in its halves."""
    return [(half * inverse).astype(program.dtype) for powers, _, inverse in found for half in powers]
