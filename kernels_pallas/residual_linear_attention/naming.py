"""The name under which outputs and saved states are offered to a rematerialisation policy.

A policy that saves it spares the backward pass every forward kernel:
`jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)`.
"""

CHECKPOINT_NAME = "residual_linear_attention"
