"""What the backward pass recomputes, by name: the values of `config.model.remat`."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

# Names under which the model and the attention kernels offer values to a policy.
ATTENTION_OUTPUT = "attention_output"
RESIDUAL_STREAM = "residual_stream"


def rematerialised(function: Callable, remat: str, *, scanned: bool) -> Callable:
    """Wraps a part of the model, a function of the residual stream x_BTD first, in the policy `remat`.

    "none" keeps every intermediate; "block" keeps x_BTD; "save_attention" keeps attention's outputs too, so that its
    kernels do not run again; "offload" keeps x_BTD in the host's memory.

    Args:
      function: what is recomputed as a whole.
      remat: the policy's name.
      scanned: whether `function` is the body of a scan, which needs no guard against XLA merging it with its copy.
    """
    if remat == "none":
        return function
    policies = jax.checkpoint_policies
    policy = {
        "block": None,
        "save_attention": policies.save_only_these_names(ATTENTION_OUTPUT),
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
