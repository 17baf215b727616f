"""Prefill and decode with caches of the size that the mixers need.

    prompts ── prefill, chunk by chunk, with the training kernels ──> cache
    token ──> step: one token of every sequence through all layers ──> logits ──> sample ──> token …
                    every C steps: fold, which moves what left the window from the rings into the states

| layer | keys and values kept | k is kept | state |
|---|---|---|---|
| full | all, slot = position | as attention reads it | – |
| swa | ring of W | as attention reads it | – |
| rattention | ring of W + C | as projected | P × H for each key/value head |
| linear | ring of C | as projected | P × H for each key/value head |

One k serves both branches of a rattention layer: the linear branch reads it as projected, the softmax branch norms and
rotates it when it reads it. The state lags: it holds the keys that had left the window at the last fold, and the up to
C that have left it since are read from the ring. So the state is written once in C tokens, and what is read is exact.

All sequences of a batch write the same slot of a ring, whatever their lengths: prefill lays every ring out with the
newest token in its last slot. So a step writes by one `dynamic_update_slice` and moves nothing, the distance of a slot
to the query is the same in all sequences, and a slot that a shorter sequence has not filled is hidden.

Weights and caches are one array a layer, not stacked, and a step holds every layer one after the other. A scan over
stacked layers would compile faster, but it hands XLA slices of the stacks, and a slice that a matrix product reads is
copied first unless the backend can fuse it: weights and caches are all that a step reads, so that a copy of them takes
longer than the step.

A step is written twice, in XLA's operations (`attention_xla`, `layers`) and for one GPU in kernels, which `attention`
and `step` take where they fit: `attention_gpu` for all of a layer between its products; on a Hopper in its place
`attention_ring_gpu` for rings with a state and `attention_stream_gpu` for keys that are kept as attention reads them;
`products_gpu` and, for more sequences, `products_persistent_gpu` for the products.
"""
