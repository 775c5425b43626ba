"""The page of `report`: whole, alone, escaped, and silent about nothing that it leaves out."""

import json
from html.parser import HTMLParser
from importlib import resources

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparsify.cli.app import main
from sparsify.measure.figures import Profile
from sparsify.models import checkpoint

EVIL = "\"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>{{ 7 * 7 }}'&amp;"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Checked(HTMLParser):
    """Tags that are closed as they were opened; what is asked of the network; the words."""

    def __init__(self, text):
        super().__init__()
        self.open, self.asked, self.tags, self.words = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "data") and not value.startswith("data:image/"):
                self.asked.append(value)
            if name == "style" and "url(" in value:
                self.asked.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag not in VOID and self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, its profile and evaluation, and a sweep's files."""
    folder = tmp_path_factory.mktemp("report")
    for arguments in (
        "convert digits --calib-images 4 --token-keep 0.6 --token-stages 2 --keep 0.2 -o m.safetensors".split(),
        "profile m.safetensors --no-measure --json theory.json".split(),
    ):
        with pytest.raises(SystemExit) as caught:
            main([str(folder / a) if a.endswith((".safetensors", ".json")) else a for a in arguments] + ["-q"])
        assert caught.value.code == 0
    tree = json.loads((folder / "theory.json").read_text())
    timed = {f"latency_ms_{name}{end}": 3.0 for name in ("dense", "sparse", "auto") for end in ("", "_p10", "_p90")}
    tree |= timed | {"latency_ms_dense": 6.0, "latency_ms_dense_p10": 5.0, "latency_ms_dense_p90": 7.0}
    tree |= {"peak_memory_dense": 10**6, "peak_memory_sparse": 10**6, "choices": []}
    tree["conditions"] |= dict(batch_size=8, dtype="float32", device="cpu", device_name="An Abacus", threads=2, runs=9)
    tree["conditions"] |= dict(torch="2", timm="1", sparsify="0")
    (folder / "profile.json").write_text(json.dumps(tree))
    count = round(tree["param_count"] / 1e6, 2)
    results = dict(model="m", images=597, img_size=224, crop_pct=1.0, interpolation="bicubic", param_count=count)
    results |= dict(top1=98.5, dense_top1=99.5, agreement=97.75, kl=0.01, images_lost=7, images_gained=1)
    (folder / "eval.json").write_text(json.dumps(results))
    setting = dict(name="keep-0.1", kind="keep", asked=0.1, macs_share=0.9, speed=1.25, top1=98.0, agreement=97.0)
    sweep = dict(
        model="digits",
        images=597,
        data="/a/machine/of/mine/val",
        dense=dict(top1=99.5),
        settings=[setting],
        conditions={},
    )
    (folder / "sweep.json").write_text(json.dumps(sweep))
    Image.new("RGB", (30, 20), "red").save(folder / "sweep.png")
    Image.effect_noise((60, 40), 90).save(folder / "photo.png")
    return folder


def page(run, made, tmp_path, *arguments):
    code, out, err = run("report", made / "m.safetensors", *arguments)
    assert code == 0, err
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    return Checked(text), " ".join(text.split()), out


def test_missing_parts_are_left_out_with_a_line_that_says_how_to_get_them(run, made, tmp_path):
    found, text, out = page(run, made, tmp_path)
    assert out.strip().endswith("settings, MACs") and found.asked == [] and "img" not in found.tags
    for words in ("report m.safetensors --measure", "--profile FILE.json", "--eval eval.json", "--sweep sweep.json"):
        assert words in text
    assert "--images a.jpg b.jpg" in text and text.count('class="missing"') == 4
    assert "merge; 0.6 of the patch tokens kept after layers 2" in text and ">theoretical<" in text
    assert ">measured<" not in text


def test_everything_given_is_on_the_page(run, made, tmp_path):
    given = ["--profile", made / "profile.json", "--eval", made / "eval.json", "--sweep", made]
    found, text, out = page(
        run, made, tmp_path, *given, "--images", made / "photo.png", made / "photo.png", "--layer", "1,4"
    )
    assert "settings, MACs, time, accuracy, sweep, 2 images" in out and 'class="missing"' not in text
    assert found.asked == [] and "http" not in text.replace("http-equiv", "")
    for words in ("An Abacus, 2 threads, float32, batch 8", "9 interleaved runs", "2.0x faster than dense", "2.00×"):
        assert words in text
    for words in (
        "98.50",
        "99.50",
        "−1.00",
        "97.8 %",
        "597 images, 224x224 pixels, crop 1, bicubic",
        "keep 0.1",
        "1.25×",
    ):
        assert words in text, words
    tokens = json.loads((made / "theory.json").read_text())["tokens"]
    assert all(f"<span>{before}</span>" in text for before, _ in tokens) and len({before for before, _ in tokens}) > 1
    per_query = 2 * 2  # layers, heads
    assert found.tags.count("img") == 1 + 2 * (1 + 1 + 2 * per_query)
    assert "597 images of mine/val;" in text and "/a/machine" not in text and str(made) not in text
    assert "default-src 'none'" in text and "script" not in found.tags
    assert text.count("of the true attention; the best choice") == 2


def test_in_print_the_table_of_modules_is_open_and_the_colours_are_light(run, made, tmp_path):
    found, text, _ = page(run, made, tmp_path)
    rules = text[text.index("@media print") : text.index("</style>")]
    assert "details + .modules { display: block;" in rules and "color-scheme: light" in rules
    assert "columns: 2" in rules  # a grid moves to the next page as a whole
    within = [inner for opened, inner in zip(found.tags, found.tags[1:], strict=False) if opened == "details"]
    assert within == ["summary"] and "table" in found.tags[found.tags.index("summary") :]


def test_words_from_a_header_and_from_results_cannot_become_markup(run, made, tmp_path):
    with safe_open(made / "m.safetensors", framework="pt") as file:
        meta = dict(file.metadata())
    about, built = json.loads(meta["sparsify.provenance"]), json.loads(meta["sparsify.architecture"])
    for key in ("source", "weights", "date"):
        about[key] = EVIL
    about["recipe"]["description"], about["versions"] = EVIL, {EVIL: EVIL}
    built["pretrained_cfg"]["license"] = EVIL
    meta |= {"sparsify.provenance": json.dumps(about), "sparsify.architecture": json.dumps(built)}
    tensors = load_file(made / "m.safetensors")
    meta["sparsify.sha256"] = checkpoint._digest({k: v for k, v in meta.items() if k != "sparsify.sha256"}, tensors)
    save_file(tensors, tmp_path / "evil.safetensors", metadata=meta)
    results = json.loads((made / "eval.json").read_text()) | {"model": EVIL, "interpolation": EVIL}
    (tmp_path / "eval.json").write_text(json.dumps(results))
    sweep = json.loads((made / "sweep.json").read_text()) | {"model": EVIL, "images": EVIL, "data": EVIL}
    sweep["settings"][0]["asked"], sweep["conditions"] = EVIL, {"device_name": EVIL, "runs": EVIL}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    photo = tmp_path / "<script>alert(3)<&.png"
    photo.write_bytes((made / "photo.png").read_bytes())
    code, _, err = run(
        "report",
        "evil.safetensors",
        photo,
        "--eval",
        "eval.json",
        "--sweep",
        "sweep.json",
        "--layer",
        "1",
        "--head",
        "1",
    )
    assert code == 0, err
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = Checked(text)
    assert "script" not in found.tags and found.asked == []
    assert "".join(found.words).count(EVIL) >= 10 and "50337" not in text
    assert any("alert(3)" in words for words in found.words)


def test_a_header_that_says_nothing_is_shown_and_one_of_wrong_types_is_refused(run, made, tmp_path):
    with safe_open(made / "m.safetensors", framework="pt") as file:
        meta = dict(file.metadata())
    for about, right in (({}, True), ({"source": 5, "recipe": [], "calibration": "x", "date": 1}, False)):
        meta["sparsify.provenance"] = json.dumps(about)
        tensors = load_file(made / "m.safetensors")
        meta["sparsify.sha256"] = checkpoint._digest({k: v for k, v in meta.items() if k != "sparsify.sha256"}, tensors)
        save_file(tensors, tmp_path / "odd.safetensors", metadata=meta)
        code, _, err = run("report", "odd.safetensors", "-q")
        assert code == (0 if right else 1), err
        assert right or "provenance source" in err
        text = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "the file does not say" in text and "No dense figures" in text  # so it may have been fine-tuned


BAD = {
    "profile of another model": (["--profile", "other.json"], 1, "another model"),
    "no profile": (["--profile", "MADE/eval.json"], 1, "is not a profile"),
    "results of another model": (["--eval", "large.json"], 1, "22.05 M"),
    "results of another file": (["--eval", "foreign.json"], 1, "another file"),
    "no results": (["--eval", "MADE/sweep.json"], 1, "sweep.json"),
    "broken JSON": (["--eval", "broken.json"], 1, "broken.json"),
    "no such file": (["--sweep", "none.json"], 1, "none.json"),
    "no sweep": (["--sweep", "MADE/eval.json"], 1, "is not a sweep"),
    "no sweep in the folder": (["--sweep", "."], 1, "0 sweeps"),
    "no image": (["--images", "none.png"], 1, "none.png"),
    "measured and given": (["--measure", "--profile", "MADE/profile.json"], 2, "--measure"),
    "output": (["-o", "x/report.html"], 1, "x/report.html"),
    "query": (["MADE/photo.png", "--query", "0.5"], 2, "--query 0.5"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(kind, run, made, tmp_path):
    tree = json.loads((made / "profile.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(tree | {"param_count": 5}))
    (tmp_path / "large.json").write_text(json.dumps({"images": 5, "top1": 1.0, "param_count": 22.05}))
    foreign = {"images": 5, "top1": 1.0, "conditions": {"file_sha256": "0" * 64}}
    (tmp_path / "foreign.json").write_text(json.dumps(foreign))
    (tmp_path / "broken.json").write_text("{")
    before = sorted(p.name for p in tmp_path.iterdir())
    arguments, expected, words = BAD[kind]
    code, out, err = run("report", made / "m.safetensors", *[a.replace("MADE", str(made)) for a in arguments])
    assert code == expected, err
    assert err.count("\n") == 1 and err.startswith("error: ") and words in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_profile_comes_back_from_its_json(made):
    for name in ("theory.json", "profile.json"):
        tree = json.loads((made / name).read_text())
        again = json.loads(json.dumps(Profile.from_dict(tree).as_dict()))
        assert {
            key: value for key, value in again.items() if key in tree and not key.startswith(("through", "speed"))
        } == tree


def test_the_template_is_shipped():
    assert (resources.files("sparsify.reports") / "page.html.jinja").is_file()
    import tomllib
    from pathlib import Path

    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "*.jinja" in settings["tool"]["setuptools"]["package-data"]["*"]
    assert any(each.startswith("Jinja2") for each in settings["project"]["dependencies"])
