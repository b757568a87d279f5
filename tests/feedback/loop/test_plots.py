import pytest

from openpalm.feedback.loop import plots


def places(plot, css):
    return [mark.numbers for mark in plot.marks if mark.css == css]


def test_an_interval_stands_where_its_numbers_are():
    plot = plots.interval({"value": 0.75, "low": 0.5, "high": 1.0})
    scale = plots.Scale(0, 1, 1, 99)
    (line,) = places(plot, "interval")
    assert [float(line["x1"]), float(line["x2"])] == [scale(0.5), scale(1.0)]
    (point,) = places(plot, "point")
    assert float(point["x1"]) == pytest.approx(74.5)
    (reference,) = places(plot, "reference")
    assert float(reference["x1"]) == scale(0.5) == 50.0


def test_a_figure_without_an_interval_has_a_dot_only():
    plot = plots.interval({"value": 2.0, "low": None, "high": None}, low=0, high=4, unit="")
    assert plot is not None
    assert places(plot, "point")
    assert not places(plot, "interval")
    assert plot.title == "2.00 (no interval)"


@pytest.mark.parametrize("missing", [None, {}, {"value": None}])
def test_without_a_figure_there_is_no_picture(missing):
    assert plots.interval(missing) is None
    assert plots.in_words(missing) == "undefined"


def test_values_beyond_the_scale_stay_inside():
    (point,) = places(plots.interval({"value": 7.0, "low": 6.0, "high": 8.0}), "point")
    assert float(point["x1"]) == 99.0


def test_words():
    assert plots.in_words({"value": 0.712, "low": 0.65, "high": 0.768}) == "71.2 % (65.0 to 76.8)"


def test_calibration_has_a_dot_for_each_bin_with_judgements():
    full = {
        "low": 0.5,
        "high": 0.6,
        "judgements": 4,
        "mean_confidence": 0.55,
        "agreement": {"value": 0.5, "low": 0.2, "high": 0.8},
    }
    empty = {"low": 0.6, "high": 0.7, "judgements": 0, "mean_confidence": None, "agreement": None}
    plot = plots.calibration([full, empty])
    assert len(places(plot, "dot")) == len(places(plot, "area")) == 1
    assert plots.calibration([empty]) is None


def test_a_curve_goes_from_left_to_right_and_larger_is_higher():
    (line,) = places(plots.curve([[1, 0.9], [5, 0.4], [10, 0.5]], "loss"), "line")
    points = [tuple(map(float, pair.split(","))) for pair in line["points"].split()]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[0][1] < points[2][1] < points[1][1]
    assert plots.curve([[1, 0.9]], "loss") is None
    assert plots.curve([[1, 0.5], [2, 0.5]], "loss") is not None
