"""What the backward pass recomputes, by name: the values of `config.model.remat`."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.residual_linear_attention import CHECKPOINT_NAME

# Names under which the model and softmax attention offer values to a policy.
ATTENTION_OUTPUT = "attention_output"
RESIDUAL_STREAM = "residual_stream"
OPERAND = "operand"


def rematerialised(function: Callable, remat: str, *, scanned: bool) -> Callable:
    """Wraps a part of the model, a function of the residual stream x_BTD first, in the policy `remat`.

    "none" keeps every intermediate; "block" keeps x_BTD; "save_attention" keeps what attention's kernels wrote too, so
    that they do not run again; "save_products" keeps the results of weight matrices as well, so that only elementwise
    work does; "save_operands" also what matrices and attention read, but for the activations in the feed-forward;
    "offload" keeps x_BTD in the host's memory.

    Args:
      function: what is recomputed as a whole.
      remat: the policy's name.
      scanned: whether `function` is the body of a scan, which needs no guard against XLA merging it with its copy.
    """
    if remat == "none":
        return function
    policies = jax.checkpoint_policies
    attention = policies.save_from_both_policies(
        policies.save_only_these_names(ATTENTION_OUTPUT, CHECKPOINT_NAME), _nameless_kernels
    )
    products = policies.save_from_both_policies(attention, policies.dots_with_no_batch_dims_saveable)
    policy = {
        "block": None,
        "save_attention": attention,
        "save_products": products,
        "save_operands": policies.save_from_both_policies(products, policies.save_only_these_names(OPERAND)),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[RESIDUAL_STREAM],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]

    def named(x_BTD: jax.Array, *rest):
        return function(checkpoint_name(x_BTD, RESIDUAL_STREAM), *rest)

    return jax.checkpoint(named, policy=policy, prevent_cse=not scanned)


def _nameless_kernels(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy that saves what jax-linear-attention's kernels write: they are partitioned by hand and have no names."""
    return primitive.name == "custom_partitioning"
