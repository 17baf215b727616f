"""Single-device mathematics of the model, in Flax NNX; knows nothing of meshes."""
