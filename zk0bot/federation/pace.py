"""Flower's wait before an object is asked for again, shortened; flwr is pinned to 1.41.0."""

from flwr.supercore.inflatable import inflatable_utils

FIRST_RETRY_S = 0.05
LONGEST_PULL_S = 1800.0
"""Of one reply; Flower's own limit is two hours."""


def hasten_pulls() -> None:
    """Ask again for an object that is not uploaded yet after 0.05 s instead of 1 s, then doubling.

    A reply is announced before its tensors are uploaded, so the first try usually comes too early.
    """
    for pull in (
        inflatable_utils.pull_objects,
        inflatable_utils.pull_and_inflate_object_from_tree,
    ):
        assert pull.__kwdefaults__ is not None and "initial_backoff" in pull.__kwdefaults__
        assert "max_time" in pull.__kwdefaults__
        pull.__kwdefaults__ |= {"initial_backoff": FIRST_RETRY_S, "max_time": LONGEST_PULL_S}
