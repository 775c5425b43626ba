"""Pictures of `show`: what is coloured is what is kept; files, names and refusals of the command."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.families import grafted, images
from helpers.image_folders import class_folders
from sparsify.cli.app import main
from sparsify.images.photograph import Line, Photograph
from sparsify.jobs import show
from sparsify.measure import inspection
from sparsify.reports import captions, figures, panels


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("show") / "model.safetensors"
    how = ["--token-keep", "0.6", "--token-stages", "2", "--keep", "0.2,0.2,dense,0.1"]
    with pytest.raises(SystemExit) as caught:
        main(["convert", "digits", "--calib-images", "4", "-o", str(path), "--quiet", *how])
    assert caught.value.code == 0
    return path


def photo_of(model, tmp_path):
    h, w = model.patch_embed.img_size
    view = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return Photograph(tmp_path / "noise.png", w, h, images(model)[0], view, Line(0, 1), Line(0, 1))


def centres(picture, grid, cell):
    return picture[cell // 2 :: cell, cell // 2 :: cell].reshape(grid[0] * grid[1], 3).astype(int)


@pytest.mark.parametrize("way", [None, "merge", "evit"])
def test_coloured_patches_are_the_kept_keys(way, tmp_path):
    model = grafted("deit", **({} if way is None else dict(tokens=dict(way=way, keep=0.5, stages=(1,)))))
    photo = photo_of(model, tmp_path)
    found = inspection.inspect(model, photo.x, range(24))
    scale = panels.scale_of(found, (0, 1), (0, 1, 2))
    cell = 20
    for layer in found.layers:
        for query in (0, 9, 23):
            picture = panels.keys(photo, found, layer, 1, query, scale, cell)
            assert picture.shape == (4 * cell, 6 * cell, 3) and picture.dtype == np.uint8
            spread = np.ptp(centres(picture, found.grid, cell), axis=1)  # grey has none
            kept = np.array([
                layer.owner[patch] >= 0 and bool(layer.kept[1, query, 1 + layer.owner[patch]]) for patch in range(24)
            ])  # fmt: skip
            assert ((spread > 40) == kept).all()


def test_stronger_attention_is_brighter_and_the_scale_has_its_ends():
    scale = panels.Scale(0.001, 0.1)
    assert scale.place(np.array([0.0, 0.001, 0.01, 0.1, 0.5])).tolist() == pytest.approx([0, 0, 0.5, 1, 1])
    light = panels.colours(np.linspace(0, 1, 20)) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > 0).all()


def test_tokens_that_left_are_dark_and_merged_ones_have_one_colour(tmp_path):
    for way in ("evit", "merge"):
        model = grafted("deit", tokens=dict(way=way, keep=0.4, stages=(1,)))
        photo = photo_of(model, tmp_path)
        photo.view[:] = photo.view // 2 + 127
        found = inspection.inspect(model, photo.x)
        picture, owner = panels.tokens(photo, found, found.stages[0], 16), found.stages[0].owner
        flat = picture.reshape(4, 16, 6, 16, 3).mean((1, 3, 4)).flatten()
        if way == "evit":
            assert flat[owner < 0].max() < 60 < flat[owner >= 0].min() and bool((owner < 0).any())
        before = panels.view(photo, found, 16).astype(float)
        same = [(a, b) for a in range(24) for b in range(a) if owner[a] == owner[b] >= 0]
        assert bool(same) == (way == "merge")
        parts, old = (
            x.reshape(4, 16, 6, 16, 3).transpose(0, 2, 1, 3, 4).reshape(24, -1).std(1) for x in (picture, before)
        )
        for a, b in same:
            assert parts[a] < old[a] and parts[b] < old[b]


@pytest.mark.parametrize("case", ["registers", "one head", "token stages", "prefix alone"])
def test_figures_of_every_kind_are_drawn(case, tmp_path):
    model = {
        "registers": lambda: grafted("dinov2-registers", patches=(2, 9)),
        "one head": lambda: grafted("vit-avg-pool", patches=(7, 2), granularity="tile", tile=(2, 2)),
        "token stages": lambda: grafted("deit-distilled", tokens=dict(way="evit-fused", keep=0.6, stages=(1, 2))),
        "prefix alone": lambda: grafted("deit", keep=(0.2, "dense"), tokens=dict(keep=(0.5, 0.0))),
    }[case]()
    photo = photo_of(model, tmp_path)
    found = inspection.inspect(model, photo.x)
    heads = (0,) if case == "one head" else (0, 2)
    shown = inspection.Shown("noise", photo, found, (0, 1), heads)
    drawn = [figures.keys(shown, query) for query in range(len(found.queries))] + [figures.mass(shown)]
    drawn += [figures.tokens(shown)] if found.stages else []
    for content in drawn:
        image = Image.open(io.BytesIO(content))
        image.load()
        assert image.format == "PNG" and min(image.size) > 200 and np.ptp(np.asarray(image.convert("L"))) > 200
    value, best, dense = figures.mass_table(found)
    assert value.shape == (2, found.heads) and np.isnan(value).any() == (case == "prefix alone")
    assert dense.tolist() == [False, False]
    for layer in found.layers:
        assert np.allclose(value[layer.block], layer.mass) and np.allclose(best[layer.block], layer.best)


def test_words_say_where_the_rest_of_the_attention_goes():
    model = grafted("dinov2-registers")
    found = inspection.inspect(model, images(model)[0], [0])
    for layer in found.layers:
        words = captions.panel(found, layer, 2, 0).replace("\u00a0", " ")
        assert [part.split()[0] for part in words.split(", ")] == ["cls", "reg", "tail"]
        share = float(layer.weight[2, 0, 1:5].sum())
        said = words.split(", ")[1].split()[1]
        assert math.isclose(float(said), 100 * share, rel_tol=0.1) if layer.kept[2, 0, 1:5].any() else said == "–"
    assert captions.percent(0.0312) == "3.1\u00a0%" and captions.percent(0.31) == "31\u00a0%"
    assert captions.percent(0.0004) == "0.04\u00a0%" and captions.percent(0) == "0.0\u00a0%"


def test_names_do_not_meet_and_choices_are_spread():
    assert show.unique(["a", "A", "b", "a", "a-2"]) == ["a", "A-2", "b", "a-3", "a-2-2"]
    assert show.spread(3, 4) == [0, 1, 2] and show.spread(12, 4) == [0, 4, 7, 11] and show.spread(0, 4) == []
    for n in range(1, 40):
        assert len(set(show.spread(n, 6))) == min(n, 6)


@pytest.fixture
def photos(tmp_path):
    class_folders(tmp_path, ["a", "b"])
    generator = np.random.default_rng(1)
    for place in ("a/cat.png", "b/cat.png"):
        Image.fromarray(generator.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / place)
    return ["a/cat.png", "b/cat.png"]


def test_show_writes_pictures_of_every_image(run, converted, photos, tmp_path):
    code, out, err = run(
        "show",
        converted,
        *photos,
        "--query",
        "35,20",
        "--query",
        "0.5,0.9",
        "--layer",
        "1,3",
        "--head",
        "2",
        "-o",
        "out",
    )
    assert code == 0 and "error" not in err, err
    names = ["keys-1", "keys-2", "mass", "tokens"]
    expected = sorted(f"{stem}.{name}.png" for stem in ("cat", "cat-2") for name in names)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == expected
    assert (
        "inside the sparse model" in out
        and out.count("of the true attention;") == 2
        and "wrote 8 pictures to out" in out
    )
    code, out, _ = run("show", converted, photos[0], "-o", "out", "-q", "--dense", "digits", "--head", "all")
    assert code == 0 and out.startswith("wrote 4 pictures") and len(out.splitlines()) == 1
    code, out, _ = run("show", converted, photos[0], "--dense", "digits", "--layer", "1", "--head", "1")
    assert "of the dense original" in out and (tmp_path / "show" / "cat.mass.png").exists()


BAD = {
    "no image given": (["show", "MODEL"], 2, "IMAGE"),
    "no such image": (["show", "MODEL", "none.png"], 1, "none.png"),
    "a folder": (["show", "MODEL", "a"], 1, "a/*.jpg"),
    "no picture": (["show", "MODEL", "text.png"], 1, "text.png"),
    "one bad of two": (["show", "MODEL", "a/cat.png", "text.png"], 1, "text.png"),
    "query": (["show", "MODEL", "a/cat.png", "--query", "middle"], 2, "--query middle"),
    "query outside": (["show", "MODEL", "a/cat.png", "--query", "70,3"], 2, "70x50"),
    "layer": (["show", "MODEL", "a/cat.png", "--layer", "5"], 2, "from 1 to 4"),
    "layer word": (["show", "MODEL", "a/cat.png", "--layer", "last"], 2, "--layer last"),
    "head": (["show", "MODEL", "a/cat.png", "--head", "0"], 2, "--head 0"),
    "output is a file": (["show", "MODEL", "a/cat.png", "-o", "text.png"], 1, "text.png"),
    "output nowhere": (["show", "MODEL", "a/cat.png", "-o", "x/y"], 1, "x"),
    "no model": (["show", "a/cat.png", "b/cat.png"], 1, "cat.png"),
    "another dense model": (["show", "MODEL", "a/cat.png", "--dense", "plain.safetensors"], 1, "plain.safetensors"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(kind, run, converted, photos, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    arguments, expected, words = BAD[kind]
    code, out, err = run(*[str(converted) if a == "MODEL" else a for a in arguments])
    assert code == expected, err
    assert err.count("\n") == 1 and err.startswith("error: ") and words in err
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["show", "report"])
def test_every_option_has_a_help_text(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert "--query" in out and "--dense" in out


def test_a_name_that_is_not_utf8_is_shown_escaped(run, converted, tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "caf\udce9.png")
    few = ["--layer", "1", "--head", "1", "--query", "3,3"]
    code, out, err = run("show", converted, "caf\udce9.png", *few)
    assert code == 0 and r"caf\udce9.png: " in out and len(list((tmp_path / "show").iterdir())) >= 2, err
    code, out, err = run("report", converted, "caf\udce9.png", *few)
    assert code == 0 and r"caf\udce9.png" in (tmp_path / "report.html").read_text(encoding="utf-8"), err
