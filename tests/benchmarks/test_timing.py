"""Interleaved timing with a clock of our own."""

import gc

import pytest

from tokenformer.benchmarks.timing import Timing, interleave, paired_ratio


def test_cases_take_turns():
    calls = []
    interleave({name: (lambda name=name: calls.append(name)) for name in "abc"}, 3)
    assert "".join(calls) == "abcabcabc"


def test_times_are_those_of_the_clock():
    now = [0.0]

    def takes(seconds):
        def call():
            now[0] += seconds

        return call

    timings = interleave({"short": takes(1.0), "long": takes(4.0)}, 2, clock=lambda: now[0])
    assert timings == {"short": Timing((1.0, 1.0)), "long": Timing((4.0, 4.0))}


def test_what_goes_before_a_case_is_not_timed():
    now, calls = [0.0], []

    def takes(seconds, name):
        def call():
            now[0] += seconds
            calls.append(name)

        return call

    cases, before = {"a": takes(1.0, "a"), "b": takes(2.0, "b")}, {"b": takes(50.0, "ready")}
    timings = interleave(cases, 2, before=before, clock=lambda: now[0])
    assert timings == {"a": Timing((1.0, 1.0)), "b": Timing((2.0, 2.0))}
    assert calls == ["a", "ready", "b"] * 2


def test_collection_is_off_while_timing_and_on_after_an_error():
    def fail():
        assert not gc.isenabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave({"case": fail}, 1)
    assert gc.isenabled()


def test_figures():
    timing = Timing((5.0, 1.0, 2.0, 3.0, 4.0))
    assert timing.as_dict() == {
        "median": 3.0,
        "min": 1.0,
        "first_quartile": 2.0,
        "third_quartile": 4.0,
        "rounds": [5.0, 1.0, 2.0, 3.0, 4.0],
    }
    assert Timing((7.0,)).quartiles == (7.0, 7.0)


def test_paired_ratio_ignores_what_slows_a_whole_round():
    quiet, busy = Timing((2.0, 2.0, 2.0)), Timing((1.0, 1.0, 1.0))
    assert paired_ratio(quiet, busy) == 2.0
    # The second round ran ten times slower; medians of each case would still be paired with themselves.
    assert paired_ratio(Timing((2.0, 20.0, 20.0)), Timing((1.0, 10.0, 10.0))) == 2.0
    assert paired_ratio(Timing((2.0, 2.0, 20.0)), Timing((1.0, 10.0, 10.0))) == 2.0
