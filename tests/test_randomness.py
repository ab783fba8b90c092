"""Permutations and draws by position: reproducible for ever, the same one by one and in arrays, and random enough."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rezero_hf.randomness import permutation, permute, uniform


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**70), st.integers(0, 9)))
def test_permutation_is_a_bijection(size, key):
    """Every index has exactly one image in range."""
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_shuffle_and_differ():
    """Different keys give unrelated orders, and neighbours do not stay neighbours."""
    orders = [[permute(i, 1000, (seed, epoch)) for i in range(1000)] for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        assert abs(np.corrcoef(one, range(1000))[0, 1]) < 0.15
        assert sum(b - a == 1 for a, b in itertools.pairwise(one)) < 10
        for two in orders[:i]:
            assert sum(a == b for a, b in zip(one, two, strict=True)) < 10


@given(size=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**70), st.integers(0, 9)))
def test_the_array_is_the_same_permutation(size, key):
    """A whole epoch's order at once is what asking for each place gives."""
    assert permutation(size, key).tolist() == [permute(i, size, key) for i in range(size)]


def test_the_numbers_never_change():
    """A run resumed with a later version goes on with the order and the draws it began with."""
    assert [permute(i, 10, (0, 1)) for i in range(10)] == [8, 7, 3, 4, 1, 9, 0, 5, 6, 2]
    drawn = [[0.620888087184074, 0.9513131477949971], [0.05491603890906682, 0.31579177954202553]]
    assert uniform((0, 1), np.arange(2), 2).tolist() == drawn


def test_draws_are_uniform_and_independent():
    """Of each index, of neighbouring ones and under neighbouring keys: mean 1/2, variance 1/12, no correlation."""
    draws = np.concatenate([uniform((seed,), np.arange(20_000), 3) for seed in (0, 1)], axis=1)
    assert draws.min() >= 0
    assert draws.max() < 1
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(draws.var(0), 1 / 12, atol=0.002)
    columns = np.concatenate([draws[:-1], draws[1:]], axis=1)
    np.testing.assert_allclose(np.corrcoef(columns.T), np.eye(12), atol=0.03)


def test_a_draw_depends_on_its_index_alone():
    """Neither on the others asked for with it nor on how many numbers are."""
    whole = uniform((5, 7), np.arange(100), 8)
    np.testing.assert_array_equal(uniform((5, 7), np.array([90, 3]), 4), whole[[90, 3], :4])
