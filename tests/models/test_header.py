"""What a file says of its model is checked before anything is built, and what was checked is what is used."""

import contextlib
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fuzz.models import HOSTS, made
from sparsify.errors import BadFile, UsageError
from sparsify.files import tensors
from sparsify.models import building, checkpoint, names, original
from sparsify.models.header import Header, check_source
from sparsify.nn import hosts

NESTED = json.loads("[" * 900 + "]" * 900)


@pytest.fixture
def drawn():
    return made(*HOSTS[0])


def refusal(file, path):
    path.write_bytes(file.bytes())
    with pytest.raises(BadFile) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def test_the_file_itself_loads(drawn, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(drawn.bytes())
    assert checkpoint.load(tmp_path / "m.safetensors").num_classes == 3


FIELDS = [
    ("config.tokens", 3, "config"),
    ("config.tokens", ["x"], "config"),
    ("config.keep", "@digits@", "number of 5000 characters"),
    ("provenance.note", "@deep@", "provenance"),
    ("provenance.note", NESTED, "nested more than 16 levels"),
    ("provenance.note", "\ud800", "provenance: not JSON"),
    ("provenance.note", "x" * (8 << 20), "more than 8 million characters"),
    ("architecture.pretrained_cfg.mean", "hf-hub:../../x", "mean"),
    ("architecture.pretrained_cfg.mean", [0.5, 0.5], "mean"),
    ("architecture.pretrained_cfg.std", {"x": 1}, "std"),
    ("architecture.pretrained_cfg.std", [0.5, 0.5, 0], "std"),
    ("architecture.pretrained_cfg.interpolation", "x", "interpolation"),
    ("architecture.pretrained_cfg.crop_pct", float("nan"), "crop_pct"),
    ("architecture.pretrained_cfg.license", 7, "license"),
    ("architecture.model_args.qkv_bias", "yes", "qkv_bias"),
    ("architecture.model_args.proj_drop_rate", float("nan"), "proj_drop_rate"),
    ("architecture.model_args.init_values", 10**30, "init_values"),
    ("architecture.model_args.proj_drop_rate", 1, "proj_drop_rate: a number from 0 up to 1"),
    ("architecture.model_args.act_layer", "x" * 41, "act_layer: a short word"),
    ("architecture.model_args", [], "model_args"),
    ("architecture.architecture", "a b", "architecture"),
    ("provenance.calibration", [], "calibration"),
    ("provenance.recipe.stages", 3, "stages"),
    ("provenance.source", 3, "source"),
    ("provenance.versions", "2.9", "versions"),
    ("report.macs_sparse", "many", "macs_sparse"),
]


@pytest.mark.parametrize(("field", "value", "named"), FIELDS)
def test_a_field_of_a_wrong_type_or_range_is_named(field, value, named, drawn, tmp_path):
    *path, last = field.split(".")
    tree = drawn.trees
    for key in path:
        tree = tree[key]
    tree[last] = value
    message = refusal(drawn, tmp_path / "m.safetensors")
    assert "header is damaged" in message and named in message


def test_a_key_that_is_no_object_is_named(drawn, tmp_path):
    drawn.trees["report"] = []
    assert "report: an object of JSON is expected" in refusal(drawn, tmp_path / "m.safetensors")


def test_what_no_command_reads_may_be_any_json(drawn, tmp_path):
    drawn.trees["provenance"]["note"] = {"a": [1, None, "text"]}
    drawn.trees["provenance"]["threads"] = [1]
    (tmp_path / "m.safetensors").write_bytes(drawn.bytes())
    assert checkpoint.read_header(tmp_path / "m.safetensors").provenance["note"] == {"a": [1, None, "text"]}
    checkpoint.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("version", ["²", "9" * 5000, "-1", "01", "2"])
def test_another_format_is_refused_in_one_line(version, drawn, tmp_path):
    drawn.version = version
    assert "has format" in refusal(drawn, tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "name", ["checkpoint_path", "pretrained", "features_only", "pretrained_cfg_overlay", "cache_dir"]
)
def test_a_header_names_no_argument_that_reads_or_changes_something_else(name, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(timm.models._factory, "load_checkpoint", lambda *_: pytest.fail("a second file is opened"))
    drawn.trees["architecture"]["model_args"][name] = str(tmp_path)
    assert f"model_args {name}" in refusal(drawn, tmp_path / "m.safetensors")


def test_a_folders_config_has_the_same_limits(tmp_path):
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"checkpoint_path": "x"}, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFile, match="checkpoint_path"):
        names.resolve(f"local-dir:{tmp_path}")


def test_timms_own_settings_are_all_within_the_limits():
    known = [each for module in hosts.MODULES for each in timm.list_models(module=module, pretrained=True)]
    assert len(known) > 200
    for each in known:
        check_source({"img_size": [96, 64], "depth": 2, "act_layer": "gelu"}, timm.get_pretrained_cfg(each).to_dict())


LARGE = [
    {"model_args": {"embed_dim": 1 << 14}},
    {"model_args": {"mlp_ratio": 1e5}},
    {"model_args": {"num_classes": 10**7}},
    {"model_args": {"reg_tokens": 10**6}},
    {"architecture": "vit_gigantic_patch14_224"},
]


@pytest.mark.parametrize("change", LARGE)
def test_shapes_are_compared_before_memory_is_taken(change, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "materialise", lambda *_: pytest.fail("memory is taken"))
    drawn.trees["architecture"]["model_args"] |= change.get("model_args", {})
    drawn.trees["architecture"] |= {k: v for k, v in change.items() if k != "model_args"}
    if "architecture" in change:
        drawn.trees["architecture"]["model_args"] = {}
    assert "tensor" in refusal(drawn, tmp_path / "m.safetensors")


def test_tokens_that_no_tensor_bears_out_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "materialise", lambda *_: pytest.fail("memory is taken"))
    args = {**HOSTS[0][1], "pos_embed": "none"}
    file = made("vit_tiny_patch16_224", args, HOSTS[0][2])
    file.trees["architecture"]["model_args"]["img_size"] = [1 << 14, 1 << 14]
    assert "too many" in refusal(file, tmp_path / "m.safetensors")


def test_buffers_that_no_tensor_bears_out_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "materialise", lambda *_: pytest.fail("memory is taken"))
    monkeypatch.setattr(checkpoint, "MOST_COMPUTED", -(1 << 20))  # no small file gets past the real limit
    assert "too many" in refusal(made(*HOSTS[2]), tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_args": {"depth": 20_000}}, "20000 blocks"),
        ({"architecture": "swinv2_base_window8_256", "model_args": {}}, "none that can be converted"),
    ],
)
def test_what_cannot_be_is_not_even_built(change, words, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "build", lambda *_: pytest.fail("it is built"))
    drawn.trees["architecture"] |= change
    assert words in refusal(drawn, tmp_path / "m.safetensors")


def test_a_tensor_of_another_dtype_is_refused(drawn, tmp_path):
    drawn.tensors["head.bias"] = drawn.tensors["head.bias"].half()
    assert "float16" in refusal(drawn, tmp_path / "m.safetensors")


def test_a_header_that_could_not_be_read_is_not_written(tmp_path):
    file = made(*HOSTS[0])
    (tmp_path / "m.safetensors").write_bytes(file.bytes())
    model, header = checkpoint.load(tmp_path / "m.safetensors"), checkpoint.read_header(tmp_path / "m.safetensors")
    wrong = header._replace(provenance={"calibration": []})
    with pytest.raises(UsageError, match="calibration"):
        checkpoint.save(model, tmp_path / "n.safetensors", wrong)
    assert isinstance(header, Header) and not (tmp_path / "n.safetensors").exists()


# ---- the file changes while it is read ----


@pytest.fixture
def during(monkeypatch):
    """Does something to the file after the first tensor was read."""

    def do(change):
        read, done = tensors.TensorFile.read_into, []

        def then(self, name, tensor):
            read(self, name, tensor)
            if not done:
                done.append(change())

        monkeypatch.setattr(tensors.TensorFile, "read_into", then)

    return do


def test_a_mixture_of_two_models_does_not_pass_the_digest(drawn, tmp_path, during):
    path = tmp_path / "m.safetensors"
    path.write_bytes(drawn.bytes())
    drawn.tensors = {name: t + 1 for name, t in drawn.tensors.items()}
    other = drawn.bytes()

    def overwrite():
        with open(path, "r+b") as file:
            file.write(other)

    during(overwrite)
    with pytest.raises(BadFile, match="digest differs"):
        checkpoint.load(path)


def test_a_file_cut_while_it_is_read_is_one_line(drawn, tmp_path, during):
    path = tmp_path / "m.safetensors"
    path.write_bytes(drawn.bytes())
    during(lambda: open(path, "r+b").truncate(4096))
    with pytest.raises(BadFile, match="shorter while it was read"):
        checkpoint.load(path)


@pytest.mark.parametrize("read", [original.opened, checkpoint.read])
def test_header_digest_and_model_are_those_of_one_file_though_another_takes_its_place(
    read, drawn, tmp_path, monkeypatch
):
    path, whole = tmp_path / "m.safetensors", checkpoint.reading
    path.write_bytes(drawn.bytes())
    source, digest = drawn.trees["provenance"]["source"], checkpoint.read(path).digest
    bias = drawn.tensors["head.bias"].clone()
    drawn.trees["provenance"]["source"], drawn.tensors["head.bias"] = "another", bias + 1
    other = drawn.bytes()

    @contextlib.contextmanager
    def then_replaced(path):
        with whole(path) as file:
            yield file
        path.write_bytes(other)

    monkeypatch.setattr(checkpoint, "reading", then_replaced)
    found = read(path)
    assert found.header.provenance["source"] == source and found.digest == digest
    assert torch.equal(found.model.state_dict()["head.bias"], bias)


def test_a_layout_that_the_library_refuses_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.ones(2, 2)}, path, {"x": "y"})
    content = path.read_bytes()
    with checkpoint.reading(path) as file:
        read = {name: file.read(name) for name in file.entries}
        assert file.metadata == {"x": "y"}
    assert all(torch.equal(t, read[name]) for name, t in load_file(path).items())
    wrong = [content + b"0", content[:-1], content.replace(b"[12,28]", b"[13,29]") + b"0"]
    for old, new in (
        (b"[0,12]", b"[1,12]"), (b"[0,12]", b"[0,-1]"), (b"[2,2]", b"[2,3]"), (b'"F32"', b'"F31"'), (b'"y"', b"123"),
    ):  # fmt: skip
        assert old in content
        wrong.append(content.replace(old, new, 1))
    for each in wrong:
        path.write_bytes(each)
        with pytest.raises(BadFile, match="not a whole safetensors"), checkpoint.reading(path):
            pass


def test_a_header_of_many_megabytes_is_not_read(tmp_path):
    text = b"{" + b" " * (16 << 20) + b"}"
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(BadFile, match="length of its header"):
        checkpoint.load(tmp_path / "m.safetensors")
