"""What is said of dense and converted in several runtimes, by hand-made times."""

import pytest
from markdown_it import MarkdownIt

from sparsify.measure.against import CONVERTED, DENSE, Against, Speed, Way, compare
from sparsify.reports import against as report

CONDITIONS = {
    "batch_size": 8, "img_size": [224, 224], "dtype": "float32", "device": "cpu", "device_name": "AMD EPYC", "threads": 2,
    "runs": 25, "torch": "2.14", "versions": {"onnxruntime": "1.32"},
}  # fmt: skip


def measured(left_out=None, notes=(), noise=0.02, **ms):
    """`ms`: dense and converted by runtime, None: not there; 25 rounds, each as slow for all as the machine is then."""
    rounds = [1 + noise * (i - 12) / 12 for i in range(25)]
    runs = {
        Way(name, model): [median * slow for slow in rounds]
        for name, two in ms.items()
        for model, median in zip((DENSE, CONVERTED), two, strict=True)
        if median is not None
    }
    return Against(compare(runs), left_out or {}, notes, CONDITIONS)


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
            {"eager": (None, 60), "onnxruntime": (None, 50)},
            "No dense figures: the weights are not the dense original's, which was not given (--dense). Converted is "
            "fastest in onnxruntime 50 ms.",
        ),
        ({"eager": (60, None)}, "No runtime here can run the converted model: nothing is compared."),
    ],
)
def test_the_verdict(times, said):
    assert report.verdict(measured(**times)) == said


def test_noise_that_falls_on_both_hides_nothing_that_the_rounds_show():
    """Every other round the machine is busy, and takes four times as long for whichever model it meets."""
    busy = [1.0, 4.0] * 20
    dense, slower = [10.0 * b for b in busy], [10.5 * b for b in busy]
    slow = compare({Way("eager", DENSE): dense, Way("eager", CONVERTED): slower})["eager"]
    assert slow.dense.overlaps(slow.converted) and slow.same_runtime == Speed(pytest.approx(1 / 1.05), 0, 40)
    assert slow.same_runtime.clear
    apart = [10.0 * b for b in busy[1:] + busy[:1]]  # the busy rounds of one are the quiet ones of the other
    figures = Against(compare({Way("eager", DENSE): dense, Way("eager", CONVERTED): apart}), {}, (), CONDITIONS)
    assert figures.pairs["eager"].same_runtime.won == 20 and not figures.pairs["eager"].same_runtime.clear
    assert report.verdict(figures).startswith("Converted is as fast as dense here, as far as the runs tell (")
    assert "faster in 20 of 40 runs): eager 25 ms against the best dense way, eager 25 ms." in report.verdict(figures)


@pytest.mark.parametrize(
    ("won", "runs", "clear"),
    [(1, 1, False), (4, 4, False), (5, 5, True), (60, 100, False), (61, 100, True), (39, 100, True)],
)
def test_how_often_one_must_win(won, runs, clear):
    assert Speed(1.0, won, runs).clear == clear


def test_rows_have_both_speeds_and_a_dash_where_nothing_was_measured():
    figures = measured(noise=0, eager=(80, 60), compile=(50, None), onnxruntime=(40, 80))
    assert figures.best_dense == "onnxruntime" and figures.best_converted == "eager"
    assert report.rows(figures) == [
        ("eager", "80 (80-80)", "60 (60-60)", "1.33x", "0.67x"),
        ("compile", "50 (50-50)", "–", "–", "–"),
        ("onnxruntime", "40 (40-40)", "80 (80-80)", "0.50x", "0.50x"),
    ]
    found = figures.as_dict()
    assert found["runtimes"]["eager"]["best_dense"] == {"ratio": pytest.approx(40 / 60), "won": 0, "runs": 25}
    assert found["runtimes"]["compile"]["converted"] is None and found["best_dense"] == "onnxruntime"


def test_of_two_programs_the_faster_stands_for_the_converted_model():
    ms = {("eager", DENSE, ""): 80, ("eager", CONVERTED, ""): 70, ("onnxruntime", DENSE, ""): 60}
    ms |= {("onnxruntime", CONVERTED, "dense"): 50, ("onnxruntime", CONVERTED, "sparse"): 90}
    figures = Against(compare({Way(*way): [each] * 5 for way, each in ms.items()}), {}, (), CONDITIONS)
    assert figures.pairs["onnxruntime"].converted.median == 50 and figures.pairs["eager"].attention == ""
    said = "attention of the converted programs, the faster kind: onnxruntime: dense, over the tokens present"
    assert report.notes(figures)[0] == said


def test_a_busy_machine_is_said():
    assert not any("vary" in line for line in report.notes(measured(noise=0.1, eager=(80, 60))))
    assert "times vary 2.3x from p10 to p90: measure again while nothing else runs here" in report.notes(
        measured(noise=0.5, eager=(80, 60))
    )


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
