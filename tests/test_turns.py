"""Measuring by turns: everybody takes a step before anybody takes the next, and neighbours are compared."""

from rezero_hf.turns import Spread, by_turns, ratios, sign_test


def test_steps_are_taken_by_turns_and_warm_up_does_not_count():
    taken = []
    steps = {name: lambda name=name: taken.append(name) or float(len(taken)) for name in "ab"}
    assert by_turns(steps, seconds=60.0, warm_up=2, most=3) == {"a": [5.0, 8.0, 9.0], "b": [6.0, 7.0, 10.0]}
    assert "".join(taken) == "abab" + "ab" + "ba" + "ab"


def test_no_turn_begins_after_the_time_but_the_least():
    assert by_turns({"a": lambda: 1.0}, seconds=0.0, least=4) == {"a": [1.0] * 4}


def test_ratios_are_of_neighbours():
    """A slow minute, the third turn, moves neither median nor quartiles, as it would those of the costs."""
    assert Spread.of(ratios([1.0, 2.0, 90.0, 2.0], [1.0, 1.0, 45.0, 1.0])) == Spread(1.75, 2.0, 2.0)
    assert Spread.of(ratios([3.0], [2.0])) == Spread(1.5, 1.5, 1.5)


def test_signs_tell_a_side_from_chance():
    """Six ratios on one side do, five do not, nor eight of ten; nine of ten do. Equal ratios lie on neither side."""
    assert [sign_test([2.0] * above + [0.5] * below) for above, below in [(6, 0), (0, 5), (8, 2), (1, 9)]] == [
        *(2 / 64, 2 / 32, 112 / 1024, 22 / 1024)
    ]
    assert sign_test([1.0] * 9) == 1
