"""Push to a hub and load from it: a stand-in on this machine, the real client, no network."""

import json
import re
import socket
from collections import Counter

import pytest
import timm
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import save_file

import sparsify
import sparsify.registry
from helpers.families import images
from helpers.hubserver import READS, WRITES, point_to, serving
from helpers.image_folders import class_folders
from sparsify.errors import BadFile, SparsifyError, UsageError
from sparsify.jobs import push
from sparsify.jobs.convert import OutputOptions, convert
from sparsify.jobs.dense import DenseRequest
from sparsify.models import checkpoint, names, pretrained
from sparsify.nn import attention
from sparsify.recipe import Recipe
from sparsify.reports import header


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "digits.safetensors"
    return convert(DenseRequest("digits"), Recipe().override(calib_images=8, spread="none"), OutputOptions(path))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub that huggingface_hub talks to; logged in with a token that may write."""
    with serving(monkeypatch, tmp_path) as server:
        yield server


def logits(model):
    x = images(model)
    with torch.inference_mode():
        return model(x)


def test_push_and_load_give_the_same_model(made, hub, run):
    code, out, err = run("push", made.path, "someone/digits-sparse", "--private", "--message", "first", "-q")
    assert (code, err) == (0, "") and "sparsify.load('hf-hub:someone/digits-sparse')" in out
    repo = hub.repos["someone/digits-sparse"]
    files = repo.commits[repo.branches["main"]]
    assert repo.private and repo.messages == ["initial commit", "first"]  # one commit holds everything
    assert files.keys() == {".gitattributes", "model.safetensors", "config.json", "README.md"}
    assert files["model.safetensors"] == made.path.read_bytes()
    assert WRITES not in out and WRITES.encode() not in files["config.json"] + files["README.md"]

    expected = logits(made.model)
    for name in (
        "hf-hub:someone/digits-sparse",
        "someone/digits-sparse",
        f"someone/digits-sparse@{repo.branches['main']}",
    ):
        assert torch.equal(logits(sparsify.load(name, backend="cpu" if cpu() else "reference")), expected)
    assert sparsify.profile("hf-hub:someone/digits-sparse", measure=False).macs_sparse == made.profile.macs_sparse

    code, out, _ = run("profile", "hf-hub:someone/digits-sparse", "--no-measure", "--json", "p.json")
    assert code == 0 and "whole model" in out

    hub.requests.clear()
    assert run("push", made.path, "someone/digits-sparse", "-q")[0] == 0  # the same model again
    assert len(repo.messages) == 3


def cpu():
    from sparsify.ops import backends

    return backends.not_built() is None


def test_timm_builds_what_was_pushed_or_written(made, hub, tmp_path):
    package = push.package(made.path, "someone/digits-sparse")
    push.push(package)
    push.write(package, tmp_path / "folder")
    expected = logits(made.model)
    for name in ("hf-hub:someone/digits-sparse", f"local-dir:{tmp_path / 'folder'}"):
        model = timm.create_model(name, pretrained=True)
        assert len(attention.sparse_modules(model)) == 4 and torch.equal(logits(model), expected)
        assert timm.data.resolve_model_data_config(model)["mean"] == (0.5, 0.5, 0.5)
    assert timm.create_model("hf-hub:someone/digits-sparse", pretrained=True, num_classes=3).num_classes == 3
    assert (
        torch.equal(logits(sparsify.load(f"local-dir:{tmp_path / 'folder'}", backend="reference")), expected) or cpu()
    )
    with pytest.raises(BadFile, match="already"):
        push.write(package, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("sparsify_vit", 10)
    assert config["sparsify"]["architecture"] == "vit_digits_patch2_28" and config["pretrained_cfg"]["license"]
    with pytest.raises(BadFile, match="sparse already.*sparsify.load"):  # not to be converted a second time
        sparsify.convert(f"local-dir:{tmp_path / 'folder'}", output=tmp_path / "again.safetensors")


def test_a_branch_is_made_and_read_back(made, hub):
    done = push.push(push.package(made.path, "someone/m"), revision="v2")
    assert done.name == "hf-hub:someone/m@v2" and "model.safetensors" not in hub.repos["someone/m"].commits[
        hub.repos["someone/m"].branches["main"]
    ]  # fmt: skip
    assert sparsify.load(done.name).num_classes == 10
    with pytest.raises(BadFile, match="no model.safetensors"):
        sparsify.load("someone/m")
    with pytest.raises(BadFile, match="no such revision"):
        sparsify.load("someone/m@v3")


def test_downloaded_once_and_read_from_the_cache_without_network(made, hub, monkeypatch):
    push.push(push.package(made.path, "someone/m"))
    sparsify.load("hf-hub:someone/m")
    monkeypatch.setattr("sparsify.models.hub.reachable", lambda url: False)
    hub.requests.clear()
    assert sparsify.load("hf-hub:someone/m").num_classes == 10 and not hub.requests
    with pytest.raises(SparsifyError, match="no connection to the hub") as caught:
        sparsify.load("hf-hub:someone/other")
    assert "\n" not in str(caught.value)


NAMES = {
    "no such model": ("hf-hub:someone/nothing", 1, "no model someone/nothing, or it is private"),
    "no name": ("hf-hub:nothing", 2, "ORG/NAME is expected"),
    "a plain file name": ("nothing.safetensors", 1, "no file nothing.safetensors"),
    "a folder without one": ("local-dir:nowhere", 1, "no file"),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_name_that_cannot_be_loaded_is_one_line(case, hub, run):
    name, expected, message = NAMES[case]
    code, _, err = run("profile", name)
    assert code == expected and message in err and err.count("\n") == 1
    assert name.startswith("hf-hub:someone") or not [r for r in hub.requests if "resolve" in r[1]]


def refuse(server, monkeypatch, tmp_path, case):
    if case == "no login":
        monkeypatch.delenv("HF_TOKEN")
    elif case == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif case == "reads only":
        monkeypatch.setenv("HF_TOKEN", READS)
    elif case == "no name service":
        monkeypatch.setattr("sparsify.models.hub.reachable", lambda url: False)
    elif case == "nobody answers":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            point_to(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}")
    elif case == "another model":
        server.make("someone/m", {"config.json": b'{"architecture": "resnet50"}', "model.safetensors": b"x"})
    elif case == "another sparse model":
        config = {
            "architecture": "sparsify_vit",
            "num_classes": 10,
            "sparsify": {"architecture": "deit_tiny_patch16_224"},
        }
        server.make("someone/m", {"config.json": json.dumps(config).encode()})
    elif case == "public":
        server.make("someone/m", {})


REFUSED = {
    "no login": "hf auth login",
    "wrong token": "does not accept the token",
    "reads only": "may not write",
    "no name service": "no connection to the hub",
    "nobody answers": "no connection to the hub",
    "another model": "another model.*did not write.*--force",
    "another sparse model": "another model .a sparse deit_tiny_patch16_224.*--force",
    "public": "exists and is public",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_push_that_fails_is_one_line_and_nothing_is_sent(case, made, hub, run, monkeypatch, tmp_path):
    refuse(hub, monkeypatch, tmp_path, case)
    code, out, err = run("push", made.path, "someone/m", *(["--private"] if case == "public" else []))
    assert code == 1 and err.count("\n") == 1 and err.startswith("error: ")
    assert re.search(REFUSED[case], err)
    assert not any("commit" in path or "lfs" in path for path in hub.sent())
    assert "hf_w" not in out + err and READS not in out + err


def test_another_model_is_replaced_with_force(made, hub, run):
    hub.make("someone/m", {"pytorch_model.bin": b"x"})
    assert run("push", made.path, "someone/m")[0] == 1
    assert run("push", made.path, "someone/m", "--force", "-q")[0] == 0
    assert sparsify.load("someone/m").num_classes == 10


def test_a_file_that_is_no_converted_model_is_not_sent(made, hub, run, tmp_path):
    torch.manual_seed(0)
    (tmp_path / "text.safetensors").write_text("hello")
    damaged = bytearray(made.path.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    for name, message in (("text", "not a whole"), ("damaged", "changed after"), ("none", "no file")):
        code, _, err = run("push", f"{name}.safetensors", "someone/m")
        assert code == 1 and message in err and err.count("\n") == 1
    for repo in ("m", "a/b/c", "someone/m@v2", "some one/m"):
        code, _, err = run("push", made.path, repo)
        assert code == 2 and err.count("\n") == 1
    assert not hub.sent()


# the card


def parts(text):
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_card_says_what_it_is_and_only_what_is_known(made, run, tmp_path):
    code, out, err = run("push", made.path, "someone/digits-sparse", "--dry-run")
    head, body = parts(out)
    assert (code, err) == (0, "")
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "sparsify" and "datasets" not in head
    assert head["pipeline_tag"] == "image-classification" and "base_model" not in head
    assert 'sparsify.load("hf-hub:someone/digits-sparse")' in body and "bibtex" in body
    assert f"{made.profile.macs_sparse / 1e6:.1f} M" in body and "Theoretical" in body
    assert "| keep: share of keys of a query, mean over heads | 0.1 |" in body and "8 images built in" in body
    assert "Not measured" in body and "## Speed" not in body and "Conditions" not in body


def test_measured_figures_come_with_their_conditions_and_of_this_file_only(made, run, tmp_path):
    pictures = class_folders(tmp_path / "photos" / "val", "0123456789", 2)
    assert run("eval", made.path, "--data", pictures, "--results-file", "e.json", "-q")[0] == 0
    times = sparsify.profile(made.path, repeats=3).as_dict()
    (tmp_path / "p.json").write_text(json.dumps(times))
    code, out, err = run("push", made.path, "someone/m", "--dry-run", "--eval", "e.json", "--profile", "p.json")
    body, results = parts(out)[1], json.loads((tmp_path / "e.json").read_text())
    assert (code, err) == (0, "")
    assert (
        f"{results['top1']:.2f}" in body
        and "20 images of photos/val, 28x28 pixels" in body
        and str(tmp_path) not in body
    )
    assert "## Speed" in body and "interleaved runs" in body and body.count("Conditions: ") == 2

    results["conditions"]["file_sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(results))
    del results["conditions"]
    (tmp_path / "bare.json").write_text(json.dumps(results))
    (tmp_path / "broken.json").write_text("{")
    for option, name, message in (
        ("--eval", "other", "another file"), ("--eval", "bare", "conditions"), ("--eval", "broken", "as JSON"),
        ("--eval", "none", "no file none.json"), ("--profile", "e", "is not a profile"),
    ):  # fmt: skip
        code, _, err = run("push", made.path, "someone/m", "--dry-run", option, f"{name}.json")
        assert code == 1 and message in err and err.count("\n") == 1
    (tmp_path / "q.json").write_text(json.dumps(times | {"macs_sparse": 1}))
    with pytest.raises(BadFile, match="another model"):
        push.package(made.path, "someone/m", timing=tmp_path / "q.json")


def described(made, tmp_path, licence="apache-2.0", **provenance):
    """A card of the same file with another past."""
    config = made.header.architecture["pretrained_cfg"] | {"license": licence}
    header = made.header._replace(
        architecture=made.header.architecture | {"pretrained_cfg": config},
        provenance=made.header.provenance | provenance,
    )  # fmt: skip
    checkpoint.save(made.model, tmp_path / "told.safetensors", header)
    package = push.package(tmp_path / "told.safetensors", "someone/m")
    return *parts(package.card), package


LICENCES = {
    "apache-2.0": ("apache-2.0", ""),
    "cc-by-nc-4.0": ("cc-by-nc-4.0", "commercial use"),
    "fair-noncommercial-research-license": ("other", "commercial use"),
    "dinov3-license": ("other", ""),
    None: ("unknown", "unknown"),
}


@pytest.mark.parametrize("licence", LICENCES)
def test_licence_is_carried_over_and_its_limits_are_said(licence, made, tmp_path):
    head, body, package = described(made, tmp_path, licence)
    identifier, warned = LICENCES[licence]
    assert head["license"] == identifier and head.get("license_name") == (licence if identifier == "other" else None)
    assert ("> **Licence:**" in body) == bool(warned) == bool(package.notes) and warned in body
    assert f"Licence: {licence or 'unknown'}." in body


def test_card_names_the_original(made, tmp_path):
    head, body, _ = described(made, tmp_path, source="deit_small")
    assert (
        head["base_model"] == "timm/deit_small_patch16_224.fb_in1k"
        and "(https://huggingface.co/timm/deit_small" in body
    )
    head, body, _ = described(made, tmp_path, source="hf-hub:lab/vit@main")
    assert head["base_model"] == "lab/vit"
    head, body, _ = described(made, tmp_path, source="deit_small", weights="secret-name.pth")
    assert "base_model" not in head and "secret-name" not in body
    assert head["license"] == "unknown"  # what timm says of its own weights is no answer for the user's
    head, body, package = described(made, tmp_path, source="local-dir:/home/me/models/own")
    assert "/home" not in body and "base_model" not in head and "/home/me/models/own" in package.notes[0]


EVIL = (
    "x <script>alert(1)</script> | [l](javascript:alert(2)) ![i](http://evil.example/i.png) `c` https://evil.example "
    "www.evil.example **b** _e_\n\n# Heading\n\n- item\n\n---\nlicense: mit\n---\n\nLicence: mit.\n\x1b[2J"
)


def rendered(body):
    """Kinds of all tokens of a text in Markdown, its links and images, and the words that a reader sees."""
    blocks = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [child for block in blocks for child in block.children or []]
    kinds = [token.type for token in (*blocks, *inline)]
    asked = [str(token.attrs.get("href") or token.attrs.get("src")) for token in inline if token.attrs]
    return Counter(kinds), asked, " ".join(token.content for token in inline)


def test_words_from_a_header_become_no_markup(made, tmp_path):
    stage = {"name": EVIL, "epochs": 1}
    past = {
        "source": "hf-hub:" + EVIL,
        "recipe": {"stages": [stage]},
        "finetuned": {"steps": 3, "kept": EVIL},
        "calibration": {"images": 8, "set": "user"},
        "versions": {"sparsify-vit": EVIL},
    }
    calm = json.loads(json.dumps(past).replace(json.dumps(EVIL)[1:-1], "calm"))
    expected = rendered(described(made, tmp_path, "calm", **calm)[1])
    head, body, _ = described(made, tmp_path, EVIL, **past)
    kinds, asked, words = rendered(body)
    assert expected[0] - Counter({"link_open": 1, "link_close": 1}) <= kinds | expected[0]
    for kind in (
        "html_block",
        "html_inline",
        "image",
        "link_open",
        "heading_open",
        "bullet_list_open",
        "td_open",
        "hr",
    ):
        assert kinds[kind] <= expected[0][kind], kind
    assert asked == [] and "javascript:alert(2)" in words and "<script>" in words and "\x1b" not in body
    assert words.count("# Heading") >= 4 and not re.search(r"(https:|www\.)(//)?evil", body)
    assert head["license"] == "other" and "base_model" not in head and body.count("\nLicence: ") == 1


def test_results_in_a_card_become_no_markup(made, run, tmp_path):
    pictures = class_folders(tmp_path / "photos", "0123456789", 1)
    assert run("eval", made.path, "--data", pictures, "--results-file", "e.json", "-q")[0] == 0
    results = json.loads((tmp_path / "e.json").read_text())
    results["interpolation"], results["conditions"]["device_name"] = EVIL, EVIL
    (tmp_path / "e.json").write_text(json.dumps(results))
    body = parts(push.package(made.path, "someone/m", evaluation=tmp_path / "e.json").card)[1]
    kinds, asked, words = rendered(body)
    assert asked == [] and not {"html_block", "html_inline", "image"} & kinds.keys()
    assert words.count("# Heading") == 2 and "KL(dense || sparse), nats per image" in words  # a cell may hold a pipe


def test_a_checkpoint_has_no_licence_until_its_owner_says_one(tmp_path, run):
    weights = tmp_path / "own.safetensors"
    save_file(pretrained.load(names.resolve("digits")).state_dict(), weights)
    path = tmp_path / "own-sparse.safetensors"
    recipe = Recipe().override(calib_images=8, spread="none")
    own = convert(DenseRequest("digits", weights), recipe, OutputOptions(path))
    stored = checkpoint.metadata(path)
    assert stored["sparsify.licence"] == "unknown" and "license" not in stored["sparsify.architecture"]
    assert ("licence of the weights", "unknown") in header.origin(own.header, path)
    old = own.header.architecture["pretrained_cfg"] | {"license": "mit"}  # as files of before have it
    old_header = own.header._replace(architecture=own.header.architecture | {"pretrained_cfg": old})
    assert ("licence of the weights", "unknown") in header.origin(old_header, path)
    assert push.package(path, "someone/m", licence="mit").notes == ()


def test_owner_can_say_the_licence(made):
    package = push.package(made.path, "someone/m", licence="mit")
    assert (
        parts(package.card)[0]["license"] == "mit" and json.loads(package.config)["pretrained_cfg"]["license"] == "mit"
    )


def test_card_of_a_file_that_was_trained_says_so(made, tmp_path):
    tuned = {"kept": "fine-tuned", "steps": 120, "judged_on": "x", "start": {}, "best": {}}
    stages = [{"name": "distill"}, {}]  # another program's may have no name
    recipe = made.header.provenance["recipe"] | {"stages": stages}
    _, body, _ = described(made, tmp_path, backbone_changed=True, finetuned=tuned, recipe=recipe, further=[{}])
    assert "120 steps (distill); then further by a training loop" in body and "| whole model | 196.1 M |" in body
    assert "not the original's any more" in body


def test_convert_leaves_folders_of_the_machine_out_of_the_file(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=3)
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=dict(img_size=64, depth=1))
    made = sparsify.convert(
        f"local-dir:{folder}", output=tmp_path / "m.safetensors", calib_images=2, spread="none", keep=0.5
    )
    assert made.header.provenance["source"] == "local-dir:weights"
    assert str(tmp_path) not in json.dumps(made.header.provenance)


def test_registry_refuses_what_it_cannot_do(made, tmp_path):
    overlay = dict(file=str(made.path))
    for arguments, message in (
        (dict(), "pretrained=True"),
        (dict(pretrained=True), "where it lies"),
        (dict(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1), "3 channels"),
        (dict(pretrained=True, pretrained_cfg_overlay=overlay, attn_drop_rate=0.1), "unknown argument attn_drop_rate"),
        (dict(pretrained=True, pretrained_cfg_overlay=overlay, drop_path_rate=2), "from 0 up to 1"),
        (dict(pretrained=True, pretrained_cfg_overlay=overlay, img_size=(28, 42)), "square"),
    ):
        with pytest.raises(UsageError, match=message):
            timm.create_model("sparsify_vit", **arguments)
