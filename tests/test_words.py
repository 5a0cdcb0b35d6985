"""Numbers in words: what a reader sees for small, large, infinite and missing ones."""

import math

import pytest

from analysis.words import ends, estimate, lines, number, ratio, safe


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.12345, "0.123"),
        (-0.5, "−0.5"),
        (999.9, "1,000"),
        (1234.5, "1,234"),
        (1_234_567, "1,234,567"),
        (2e9, "2e+09"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "not measured"),
        (None, "not measured"),
    ],
)
def test_numbers_have_three_digits(value, said):
    assert number(value) == said


def test_an_estimate_has_its_interval_where_there_is_one():
    assert estimate({"value": 1.5, "lower": -1.0, "upper": 2.0}) == "1.5 [−1, 2]"
    assert estimate({"value": 1.5, "lower": None, "upper": math.nan}) == "1.5"
    assert ends({"value": 1.5, "lower": None, "upper": 2.0}) == [1.5, 2.0]


def test_a_lost_ratio_was_infinite():
    assert [ratio(value) for value in (1.25, math.inf, math.nan, None)] == ["1.25", "∞", "∞", "∞"]


def test_labels_are_escaped_and_leave_empty_lines_out():
    assert lines("a", "", "b") == "a<br>b"
    assert safe("<b>&</b>") == "&lt;b&gt;&amp;&lt;/b&gt;"
