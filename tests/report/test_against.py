"""What is said of dense and converted in several runtimes, by hand-made times."""

import pytest
from markdown_it import MarkdownIt

from sparsify.measure.against import Against, Pair
from sparsify.measure.latency import Timing
from sparsify.report import against as report

CONDITIONS = {
    "batch_size": 8, "img_size": [224, 224], "dtype": "float32", "device": "cpu", "device_name": "AMD EPYC", "threads": 2,
    "runs": 25, "torch": "2.14", "runtimes": {"onnxruntime": "1.32"},
}  # fmt: skip


def timing(median, spread=0.02):
    return None if median is None else Timing(median, median * (1 - spread), median * (1 + spread), 25)


def measured(left_out=None, notes=(), **ms):
    """`ms`: dense and converted by runtime."""
    pairs = {
        name: Pair(*(each if isinstance(each, Timing) else timing(each) for each in two)) for name, two in ms.items()
    }
    return Against(pairs, left_out or {}, notes, CONDITIONS)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (
            {"eager": (80, 60), "openvino": (40, 30)},
            "Converted is faster than dense here, 1.33x: openvino 30 ms against the best dense way, openvino 40 ms.",
        ),
        (  # each in the runtime that is best for it
            {"eager": (80, 30), "openvino": (40, 50)},
            "Converted is faster than dense here, 1.33x: eager 30 ms against the best dense way, openvino 40 ms.",
        ),
        (
            {"eager": (88, 106), "openvino": (43, 89)},
            "Converted is slower than dense here, in every runtime (0.48x): openvino 89 ms against the best dense way, "
            "openvino 43 ms.",
        ),
        (
            {"eager": (90, 60), "onnxruntime": (90, 75), "openvino": (50, 80)},
            "Converted is slower than dense here (0.83x): eager 60 ms against the best dense way, openvino 50 ms; it is "
            "faster only beside dense in eager (1.50x), onnxruntime (1.20x).",
        ),
        (
            {"eager": (100, 100.5)},
            "Converted is as fast as dense here, within what the runs can tell (1.00x): eager 100.5 ms against the best "
            "dense way, eager 100 ms.",
        ),
        (
            {"eager": (None, 60), "onnxruntime": (None, 50)},
            "No dense figures: the weights are not the dense original's, which was not given (--dense). Converted is "
            "fastest in onnxruntime, 50 ms.",
        ),
        ({"eager": (60, None)}, "No runtime here can run the converted model: nothing is compared."),
    ],
)
def test_the_verdict(times, said):
    assert report.verdict(measured(**times)) == said


def test_many_runs_tell_medians_apart_whose_spreads_overlap():
    slow, fast = timing(10.0, 0.3), timing(9.0, 0.3)
    assert slow.overlaps(fast) and not slow.differs(fast)
    many = [Timing(t.median, t.p10, t.p90, 2500) for t in (slow, fast)]
    assert many[0].overlaps(many[1]) and many[0].differs(many[1]) and many[1].differs(many[0])
    assert many[0].error == pytest.approx(slow.error / 10)
    assert not Timing(9.0, 9.0, 9.0, 5).differs(Timing(9.0, 9.0, 9.0, 5))


def test_rows_have_both_speeds_and_a_dash_where_nothing_was_measured():
    figures = measured(eager=(80, 60), compile=(50, None), onnxruntime=(40, 80))
    assert figures.best_dense == "onnxruntime" and figures.best_converted == "eager"
    assert report.rows(figures) == [
        ("eager", "80 (78.4-81.6)", "60 (58.8-61.2)", "1.33x", "0.67x"),
        ("compile", "50 (49-51)", "–", "–", "–"),
        ("onnxruntime", "40 (39.2-40.8)", "80 (78.4-81.6)", "0.50x", "0.50x"),
    ]
    found = figures.as_dict()
    assert (
        found["speed_same_runtime"]["eager"] == pytest.approx(80 / 60) and found["ms"]["compile"]["converted"] is None
    )
    assert found["speed_best_dense"] == {"eager": pytest.approx(40 / 60), "compile": None, "onnxruntime": 0.5}


def test_notes_name_what_is_left_out_and_the_conditions():
    figures = measured({"openvino": "openvino needs openvino: pip install it"}, ("a note",), eager=(80, 60))
    assert report.notes(figures) == [
        "openvino is left out: openvino needs openvino: pip install it",
        "a note",
        "AMD EPYC, 2 threads, float32, batch 8, 224x224, 25 interleaved runs, torch 2.14, onnxruntime 1.32",
    ]
    text = report.markdown(figures)
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert "<td>eager</td>" in html and "<strong>Converted is faster than dense here, 1.33x" in html
    assert all(f"<p>{line}</p>" in html for line in report.notes(figures))
