"""An image size that whole patches do not cover is refused in the same words, wherever it is named."""

import pytest
import timm

import sparsify
from sparsify.errors import UsageError
from sparsify.models import checkpoint
from sparsify.nn import graft, hosts

WORDS = "image size 27 is not a multiple of the patch size 2 of "


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "digits.safetensors"
    return sparsify.convert("digits", output=path, calib_images=4).path


@pytest.mark.parametrize(
    "command", ["convert digits", "profile FILE --no-measure", "eval FILE --data digits", "export FILE --format onnx"]
)
def test_the_command_line_refuses_it(run, file, command):
    words = [str(file) if word == "FILE" else word for word in command.split()]
    code, out, err = run(*words, "--img-size", 27)
    assert code == 2 and WORDS in err and "Traceback" not in err and out == ""


def test_load_refuses_it_and_leaves_the_model_as_it_was(file):
    with pytest.raises(UsageError, match=WORDS):
        sparsify.load(file, img_size=27)
    model = sparsify.load(file)
    with pytest.raises(UsageError, match=WORDS):
        graft.resize(model, 27)
    assert hosts.image_size(model) == (28, 28) and hosts.patch_grid(model) == (14, 14)
    checkpoint.resize(model, 42)
    assert hosts.patch_grid(model) == (21, 21)


@pytest.mark.parametrize("size", [27, (28, 27)])
def test_profile_refuses_it(file, size):
    with pytest.raises(UsageError, match="27 is not a multiple of the patch size 2 of "):
        sparsify.profile(sparsify.load(file), img_size=size, measure=False)
    with pytest.raises(UsageError, match="this model takes 28x28"):  # whole patches, and another size
        sparsify.profile(sparsify.load(file), img_size=30, measure=False)


@pytest.mark.parametrize(
    ("name", "options", "taken", "refused"),
    [
        ("vit_tiny_patch16_224", dict(dynamic_img_size=True), 48, 40),
        ("vit_tiny_r_s16_p8_224", {}, 64, 72),  # convolutions leave a 16th (here 4), patches 8 of it: 32 px
        ("naflexvit_base_patch16_gap", dict(embed_dim=96, num_heads=3), 48, 40),
    ],
)
def test_the_size_of_a_patch_is_that_of_the_whole_embedding(name, options, taken, refused):
    model = timm.create_model(name, depth=1, num_classes=2, **options)
    hosts.set_image_size(model, taken, taken)
    assert hosts.image_size(model) == (taken, taken)
    with pytest.raises(UsageError, match=f"image size {refused} is not a multiple of the patch size"):
        hosts.set_image_size(model, refused, refused)
    with pytest.raises(UsageError, match="image size 0: a positive number of pixels is expected"):
        hosts.check_image_size(model, 0, 0)
