"""Dense models with their weights: from the package, a hub, a folder, or a file that the user gives."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn

from sparsify.errors import BadFile, SparsifyError, UnsupportedModel, UsageError, field, one_line
from sparsify.models import building, dense_weights, shards
from sparsify.models.dense_weights import Checkpoint
from sparsify.models.digits import network
from sparsify.models.hub import quick_hub
from sparsify.models.huggingface import families, tensors
from sparsify.models.names import DIGITS, Source, not_downloaded, of_kind
from sparsify.nn import hosts


def given_weights(source: Source, path: Path | None, ema: bool | None = None) -> tuple[Source, Checkpoint | None]:
    """The checkpoint to load: the file that a user gives, or that of a repository or folder which timm does not read.

    Args:
        path: of the user's file; None: the source's own weights.
        ema: see `dense_weights.read_checkpoint`.

    Returns:
        The source with the head that the checkpoint has, and the checkpoint; None where timm loads the weights.

    Raises:
        BadFile, SparsifyError: see `dense_weights.read_checkpoint` and `shards.find`.
    """
    if path is None and not source.read_here:
        return source, None
    own = path is None
    path = path or shards.find(*source.pretrained_name.split(":", 1))
    given = dense_weights.read_checkpoint(path, ema)._replace(own=own)
    return _with_head_of(source, given), given


def _with_head_of(source: Source, given: Checkpoint) -> Source:
    """A checkpoint of transformers with the head that its file has, whatever its config.json says; others as they are."""
    if source.foreign is None:
        return source
    if not tensors.is_transformers(given.state):
        raise BadFile(f"{given.path} does not fit {source.asked}: names as of Hugging Face transformers are expected")
    return of_kind(source, tensors.kind_of(given.state))


def load(
    source: Source,
    weights: Path | Checkpoint | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
) -> nn.Module:
    """The dense model on the CPU, float32, in eval mode, with its weights.

    Args:
        weights: local checkpoint (safetensors, or a torch file of tensors only), or what was read from it; None: the
            source's weights are downloaded.
        num_classes: outputs of the head; 0 drops the head; None takes what the weights have.
        img_size: pixels, square; position embeddings are resampled; None takes what the weights have.

    Raises:
        UsageError: a number of classes that the weights to be downloaded do not have, or an impossible image size.
        BadFile: the file cannot be read, is not a checkpoint, or does not fit the architecture.
        SparsifyError: the weights cannot be downloaded.
    """
    if weights is None:
        source, weights = given_weights(source, None)
    if weights is not None:
        given = weights if isinstance(weights, Checkpoint) else dense_weights.read_checkpoint(Path(weights))
        source = _with_head_of(source, given)
        model = _load_file(source, given, num_classes, img_size)
        if not given.own:
            cast(dict, model.pretrained_cfg).pop("license", None)  # of timm's weights, not of these
    else:
        classes = building.skeleton(source).num_classes
        if num_classes not in (None, 0, classes):
            choices = f"{field('weights')} FILE with a head of that size, or {field('num_classes')} 0 for features"
            have = f"the weights of {source.pretrained_name} have {classes} classes, not {num_classes}"
            raise UsageError(f"{have}: give {choices}")
        building.skeleton(source, num_classes, img_size)  # refuses an impossible size before anything is downloaded
        builtin = source.pretrained_name == DIGITS
        model = _load_digits(num_classes, img_size) if builtin else _download(source, num_classes, img_size)
    return building.with_true_config(model).float().eval()


def _load_digits(num_classes: int | None, img_size: int | None) -> nn.Module:
    model = network.build(pretrained=True)
    if num_classes == 0:
        model.reset_classifier(0)
    return building.completed(model, {"img_size": img_size})


def _download(source: Source, num_classes: int | None, img_size: int | None) -> nn.Module:
    """timm's model with the weights of a hub or a folder."""
    args = building.arguments(source, num_classes, img_size)
    config = copy.deepcopy(source.pretrained_cfg) or building.tag(source)
    scheme, _, location = source.pretrained_name.partition(":")
    local = scheme == "local-dir"
    try:
        with contextlib.nullcontext() if local else quick_hub():
            timms = building.timms(args)
            model = timm.create_model(source.architecture, pretrained=True, pretrained_cfg=config, **timms)
            return building.completed(model, args)
    except Exception as error:
        if (
            scheme == "hf-hub"
            and isinstance(error, EntryNotFoundError)
            and not isinstance(error, LocalEntryNotFoundError)
        ):
            given = dense_weights.read_checkpoint(shards.find(scheme, location))._replace(own=True)
            return _load_file(source, given, num_classes, img_size)
        text = one_line(error)
        if "No pretrained weights exist" in text or "Invalid pretrained config" in text:
            none = f"timm has no pretrained weights for {source.asked}: give {field('weights')} FILE"
            raise UsageError(none) from error
        if local or "Error(s) in loading state_dict" in text:
            raise BadFile(f"the weights of {source.pretrained_name} cannot be loaded: {text}") from error
        raise SparsifyError(not_downloaded(f"the weights of {source.pretrained_name}", error)) from error


def _load_file(source: Source, given: Checkpoint, num_classes: int | None, img_size: int | None) -> nn.Module:
    """A model of the architecture with the weights of a file, which must fit it but for its head and number of patches."""
    path, state = given.path, given.state
    frame = building.skeleton(source, num_classes, img_size)
    known = None if source.foreign is None else families.family(source.foreign.model_type)
    if known is not None:
        state = tensors.translated(state, frame, known)
    if type(frame) not in hosts.MODELS:
        raise UnsupportedModel(f"{source.asked}: model class {type(frame).__name__} is not understood")
    patch = tuple(cast(Any, hosts.embedding(frame)).patch_size)
    stem = state.get("patch_embed.proj.weight")
    if stem is not None and stem.ndim == 4 and tuple(stem.shape[2:]) != patch:
        raise BadFile(f"{path} has patches of {stem.shape[2]} px, {source.architecture} of {patch[0]} px")
    dense_weights.check_positions(state, frame, path, source.architecture)
    if img_size is None and not (known is not None and known.any_size):
        img_size = dense_weights.image_side(state, frame)
    frame = building.skeleton(source, num_classes, img_size)
    if known is not None:
        state = tensors.resampled(state, frame, known)
    try:
        state = dense_weights.checkpoint_filter(source.architecture)(state, frame)
    except Exception as error:  # the filter meets another architecture's tensors
        raise BadFile(f"{path} does not fit {source.architecture}: {one_line(error)}") from error
    classifier = cast(dict, frame.pretrained_cfg).get("classifier") or "head"
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    rows = state[f"{heads[0]}.weight"].shape[0] if f"{heads[0]}.weight" in state else None
    if num_classes is None:
        num_classes = rows if rows is not None else int(cast(Any, frame).num_classes)
    elif num_classes == 0:
        state = {k: v for k, v in state.items() if k.rpartition(".")[0] not in heads}
    elif rows is not None and rows != num_classes:
        raise BadFile(f"the head in {path} has {rows} classes, not {num_classes}")
    config = copy.deepcopy(source.pretrained_cfg) or building.tag(source)
    args = {**source.model_args, "num_classes": num_classes, "img_size": img_size or hosts.image_size(frame)}
    build = partial(building.build, source.architecture, args, config)
    with torch.device("meta"):  # a configuration may ask for any amount of memory
        frame = build()
    dense_weights.check_fit(state, frame, path, source.architecture, headless=bool(num_classes) and rows is None)
    model = building.materialise(build, frame)
    model.load_state_dict(state)
    return model
