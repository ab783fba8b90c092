"""Measuring by turns: everybody takes a step before anybody takes the next, and neighbours are compared."""

from rezero_hf.turns import Spread, by_turns, ratios


def test_steps_are_taken_by_turns_and_warm_up_does_not_count():
    taken = []
    steps = {name: lambda name=name: taken.append(name) or float(len(taken)) for name in "ab"}
    assert by_turns(steps, seconds=60.0, warm_up=2, most=3) == {"a": [5.0, 7.0, 9.0], "b": [6.0, 8.0, 10.0]}
    assert taken == ["a", "b"] * 5


def test_no_turn_begins_after_the_time_but_the_least():
    assert by_turns({"a": lambda: 1.0}, seconds=0.0, least=4) == {"a": [1.0] * 4}


def test_ratios_are_of_neighbours():
    """A slow minute, the third turn, moves neither median nor quartiles, as it would those of the costs."""
    assert ratios([1.0, 2.0, 90.0, 2.0], [1.0, 1.0, 45.0, 1.0]) == Spread(1.75, 2.0, 2.0)
    assert ratios([3.0], [2.0]) == Spread(1.5, 1.5, 1.5)
