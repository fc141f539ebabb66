"""`bench facts`: what it says of streams is what arrived."""

from server.bench.facts import Load


def test_throughput_and_waits_are_those_of_the_window() -> None:
    load = Load(port=0, pieces=[], arrivals=[[0.5, 1.5, 2.5, 6.5], [1.0, 2.0, 7.0]])
    assert load.tokens_per_s(1.0, 3.0) == (2 + 1) / 2  # after its begin, up to its end
    assert load.longest_wait([(0.0, 1.8)]) == 1.0
    assert load.longest_wait([(3.0, 4.0)]) == 5.0  # the wait began before it and ends after
    assert load.longest_wait([(8.0, 9.0)]) == 0.0
