"""Flags that GPUs get beside the user's own."""

from rattn.platform import gpu_flags, with_flags


def test_the_users_flags_stay_as_they_are():
    flags = {"xla_a": "true", "xla_b": "2"}
    assert with_flags("", flags) == "--xla_a=true --xla_b=2"
    assert with_flags("--xla_b=7 --xla_c", flags) == "--xla_b=7 --xla_c --xla_a=true"
    assert gpu_flags(deterministic=True)["xla_gpu_exclude_nondeterministic_ops"] == "true"
    assert "xla_gpu_exclude_nondeterministic_ops" not in gpu_flags(deterministic=False)
