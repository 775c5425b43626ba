"""One safetensors file <-> one sparse model. The header holds everything needed to rebuild it; nothing is unpickled.

Metadata keys (strings; all but `format` hold JSON or plain text):

    format                 "pt", for readers that expect it
    sparsify.format        version of this layout, an integer
    sparsify.architecture  architecture, model_args, pretrained_cfg: what timm needs to build the host
    sparsify.config        SparsityConfig, ranks resolved
    sparsify.provenance    source, recipe, calibration, seed, library versions, date, whether the backbone changed,
                           dense_sha256: digest of the dense model that was converted; module: it was no name's
    sparsify.report        headline figures (theoretical MACs)
    sparsify.schedules     config and report of each budget, in files that were made for a target; config is one of them
    sparsify.sureness      margins and distances of each budget over the calibration images, for adaptive inference
    sparsify.licence       licence of the weights that were converted; unknown for a user's own checkpoint
    sparsify.sha256        digest of every other key and every tensor
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsify.errors import BadFile, UsageError, field, one_line
from sparsify.files.outputs import whole
from sparsify.files.plain_json import to_json
from sparsify.files.tensors import Entry, NotWhole, TensorFile, opened
from sparsify.models import building, filetype
from sparsify.models.header import FORMAT, MOST_PATCHES, SCHEDULES, SURENESS, Header, parse
from sparsify.models.licence import licence_of
from sparsify.models.timm_arguments import RATES
from sparsify.nn import graft, hosts, schedules

MOST_COMPUTED = 1 << 30  # bytes of buffers that are computed, beyond as many as the file's tensors have
_AGAIN = "convert again or fetch it anew"


def save(model: nn.Module, path: Path, header: Header) -> None:
    """Write `model`; a crash or a full disk leaves an existing file unchanged.

    `BadFile`: it cannot be written. `UsageError`: a header that `load` would refuse.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    meta = {"format": "pt", "sparsify.format": str(FORMAT)}
    meta["sparsify.licence"] = licence_of(header).name or "unknown"
    meta |= {f"sparsify.{key}": to_json(getattr(header, key), sort_keys=True) for key in ("architecture", "provenance")}
    meta |= of_schedule(header)
    if header.schedules:
        several = {f"{budget:g}": each._asdict() for budget, each in header.schedules.items()}
        for each in several.values():
            each["config"] = each["config"].model_dump(mode="json")
        meta[f"sparsify.{SCHEDULES}"] = to_json(several, sort_keys=True)
    if header.sureness:
        sure = {f"{budget:g}": each._asdict() for budget, each in header.sureness.items()}
        meta[f"sparsify.{SURENESS}"] = to_json(sure, sort_keys=True)
    parse(meta)
    meta["sparsify.sha256"] = _digest(meta, tensors)
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata=meta)


def of_schedule(header: Header) -> dict[str, str]:
    """The metadata of the schedule in use."""
    found = {"config": header.config.model_dump(mode="json"), "report": header.report}
    return {f"sparsify.{key}": to_json(value, sort_keys=True) for key, value in found.items()}


def read_header(path: Path) -> Header:
    """What the file says of itself; tensors are not read.

    Raises:
        BadFile: missing, not safetensors, not written by sparsify, from a newer version, or damaged.
    """
    return _parse(path, metadata(path))


class Loaded(NamedTuple):
    """What one read of a file gave."""

    model: nn.Module
    header: Header
    metadata: dict[str, str]  # as written

    @property
    def digest(self) -> str:
        """Of everything in the file."""
        return self.metadata["sparsify.sha256"]


def load(
    path: str | Path,
    img_size: int | None = None,
    device: str | torch.device = "cpu",
    rates: Mapping[str, float] | None = None,
) -> nn.Module:
    """The model of `read`, on a device."""
    return read(path, img_size, rates).model.to(device)


@building.in_float32()
def read(
    path: str | Path,
    img_size: int | None = None,
    rates: Mapping[str, float] | None = None,
    budget: float | None = None,
) -> Loaded:
    """The sparse model of a file with its header: a timm model in eval mode, float32, on the CPU.

    Nothing else than the file is needed, which is read once. The header is held against names and shapes of the tensors
    before memory is allocated. The digest is that of the model that is returned.

    Args:
        img_size: side in pixels, when it is not the file's; position embeddings and predictors are resampled.
        rates: dropout and stochastic depth of training (`RATES`), when they are not the architecture's defaults.
        budget: the schedule to use, also in the header; None: the file's first; 1: dense attention over all tokens.

    Raises:
        BadFile: see `read_header`; also tensors that do not fit the architecture or the digest.
        UsageError: an image size that the architecture cannot take, an unknown rate, or a budget that the file has not.
    """
    path, rates = Path(path), checked(rates or {})
    with reading(path) as file:
        header = _parse(path, file.metadata)
        chosen = header.at(budget)
        model = _rebuilt(path, header, rates, file.entries)
        state = model.state_dict()
        for name, tensor in state.items():
            file.read_into(name, tensor)
    loaded = Loaded(model, chosen, file.metadata)
    if _digest({k: v for k, v in file.metadata.items() if k != "sparsify.sha256"}, state) != loaded.digest:
        raise BadFile(f"{path} was changed after it was written (its digest differs): {_AGAIN}")
    if img_size is not None:
        resize(model, img_size)
    if several := schedules.offered(model):
        several(several.budget if chosen.budget is None else chosen.budget)
    elif chosen is not header:
        schedules.apply(model, chosen.config)
    return loaded


def rebuild(header: Header, rates: Mapping[str, float] | None = None) -> nn.Module:
    """The sparse model that `header` describes, in eval mode, every parameter zero. Errors are not translated."""
    return building.materialise(_builder(header, rates or {})).eval()


def _builder(header: Header, rates: Mapping[str, float]) -> Callable[[], nn.Module]:
    told = header.architecture
    args = {**told["model_args"], **rates}

    def build() -> nn.Module:
        dense = building.described(told["architecture"], args, told["pretrained_cfg"]).eval()
        model = graft.graft(dense, header.config, others=header.others)
        if header.schedules and header.budget is not None:
            schedules.offer(model, {b: each.config for b, each in header.schedules.items()}, header.budget)
        return model

    return build


def _rebuilt(path: Path, header: Header, rates: Mapping[str, float], entries: Mapping[str, Entry]) -> nn.Module:
    """`rebuild`, after a look at the model on the meta device, where it takes no memory."""
    depth = header.architecture["model_args"].get("depth") or 0
    if depth > len(entries):
        raise BadFile(f"{path}: its header asks for {depth} blocks, but it has {len(entries)} tensors: {_AGAIN}")
    build = _builder(header, rates)
    try:
        with torch.device("meta"):
            frame = build()
        patches = hosts.num_tokens(frame)
    except Exception as error:
        raise BadFile(f"{path}: its header does not describe a model: {one_line(error)}") from None
    _check_tensors(path, frame, entries)
    beyond = sum(t.nbytes for t in frame.buffers()) - sum(t.nbytes for t in frame.state_dict().values())
    if patches > MOST_PATCHES or beyond > MOST_COMPUTED:
        raise BadFile(f"{path}: its header asks for {patches} tokens, too many for tensors of this size: {_AGAIN}")
    return building.materialise(build, frame).eval()


def checked(rates: Mapping[str, float]) -> dict[str, float]:
    """`rates` if each is known and a share; `UsageError` for another name or value."""
    for name, rate in rates.items():
        if name not in RATES:
            raise UsageError(f"unknown argument {name}: expected one of {', '.join(RATES)}")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise UsageError(f"{name} {rate}: a number from 0 up to 1 is expected")
    return dict(rates)


def resize(model: nn.Module, img_size: int) -> None:
    """Another image size, in place; `UsageError` where the architecture cannot take it.

    Position embeddings and predictors are resampled.
    """
    if hosts.image_size(model) == (img_size, img_size):
        return
    try:
        graft.resize(model, img_size)
    except Exception as error:
        raise UsageError(f"{field('img_size')} {img_size}: {one_line(error)}") from None


def digest_of(model: nn.Module) -> str:
    """SHA-256 over the state dict of a model: names, dtypes, shapes and bytes. Dense: before anything is folded."""
    return _digest({}, {name: t.detach().cpu() for name, t in model.state_dict().items()})


def may_overwrite(path: Path, architecture: Mapping[str, Any], force: bool) -> None:
    """`BadFile` where a file at `path` is not a model of the same architecture, unless `force` is set."""
    if force or not os.path.exists(path):
        return
    with contextlib.suppress(BadFile):
        if read_header(path).architecture == architecture:
            return
    choices = f"choose another {field('output')} or overwrite it with {field('force')}"
    raise BadFile(f"{path} exists and is not this model: {choices}")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[TensorFile]:
    """The open file at `path`; `BadFile`: missing, no file, or not a whole safetensors file, also when it changes inside."""
    if not os.path.exists(path):
        raise BadFile(f"no file {path}: 'sparsify convert NAME' writes one")
    if not os.path.isfile(path):
        raise BadFile(f"{path} is a folder or a device: give a .safetensors file that 'sparsify convert' wrote")
    if filetype.of(path) == filetype.TORCH:
        instead = f"run 'sparsify convert NAME --weights {path}'"
        raise BadFile(f"{path} is a PyTorch checkpoint, not a converted model: {instead}")
    try:
        with opened(path) as file:
            yield file
    except (OSError, NotWhole) as error:
        raise BadFile(f"{path} is not a whole safetensors file ({one_line(error)}): convert again") from None


def metadata(path: Path) -> dict[str, str]:
    """The file's metadata as written; `BadFile`: missing, or not safetensors."""
    with reading(path) as file:
        return file.metadata


def _parse(path: Path, meta: Mapping[str, str]) -> Header:
    version = meta.get("sparsify.format")
    if version is None:
        instead = f"run 'sparsify convert NAME --weights {path}'"
        raise BadFile(f"{path} is a plain checkpoint, not a converted model: {instead}")
    if version != str(FORMAT):
        other = f"{version[:9]!r}, this version reads {FORMAT}: upgrade sparsify-vit"
        raise BadFile(f"{path} has format {other}")
    try:
        if "sparsify.sha256" not in meta:
            raise UsageError("sha256: missing")
        return parse(meta)
    except UsageError as error:
        raise BadFile(f"{path}: its header is damaged ({error}): {_AGAIN}") from None


def _check_tensors(path: Path, model: nn.Module, entries: Mapping[str, Entry]) -> None:
    expected = model.state_dict()
    for name in sorted(expected.keys() | entries.keys()):
        if name not in entries:
            raise BadFile(f"{path}: tensor {name} is missing: {_AGAIN}")
        if name not in expected:
            raise BadFile(f"{path}: tensor {name} does not belong to {type(model).__name__}: convert again")
        given, right = entries[name], expected[name]
        if given.shape != right.shape:
            shapes = f"{given.shape}, expected {tuple(right.shape)}"
            raise BadFile(f"{path}: tensor {name} has shape {shapes}: convert again")
        if given.dtype != right.dtype:
            raise BadFile(f"{path}: tensor {name} is {given.dtype}, expected {right.dtype}: convert again")


def _digest(meta: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over keys, values, names, dtypes, shapes and bytes, in sorted order."""
    sha = hashlib.sha256(json.dumps(sorted(meta.items())).encode())
    for name in sorted(tensors):
        t = tensors[name]
        sha.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        sha.update(t.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
