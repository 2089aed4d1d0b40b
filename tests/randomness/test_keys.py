"""Hashes of single numbers are those of arrays."""

from __future__ import annotations

import numpy as np
import pytest

from lbaccel.randomness.keys import hashed_on, keyed_hash

NUMBERS = [0, 1, 7, -1, -(2**63), 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("first", NUMBERS)
def test_a_number_hashes_as_in_an_array(first):
    for second in NUMBERS:
        one = keyed_hash(first, second)
        many = keyed_hash(np.array([first] * 2), np.array([second] * 2))
        assert one.dtype == many.dtype == np.uint64
        assert int(one) == int(many[0]) == int(many[1])
        assert int(hashed_on(keyed_hash(first), second)) == int(one)
