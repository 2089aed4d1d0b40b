"""Bytes that are asked for when they count (no torch).

A kernel's workspace may have to be measured, and what reads a trace's seconds alone, such as the
survey of a layout that is not taken, needs none. What reads bytes needs them all: sizes give no
bound. The backward pass of a depthwise 7 x 7 convolution with a bias (768 channels, 7 x 7 pixels,
one sample, AVX-512) takes 36.9 MiB, 51 times its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property


class Later:
    """A number of bytes that is asked for when it counts.

    Args:
        ask: gives the number; it is called once at most.
    """

    def __init__(self, ask: Callable[[], int]) -> None:
        self._ask = ask

    @cached_property
    def num_bytes(self) -> int:
        """The number."""
        return self._ask()


def known(num_bytes: int | Later) -> int:
    """The number itself."""
    return num_bytes.num_bytes if isinstance(num_bytes, Later) else num_bytes
