"""One safetensors file <-> one sparse model. The header holds everything needed to rebuild it; nothing is unpickled.

Metadata keys (strings; all but `format` hold JSON or plain text):

    format                 "pt", for readers that expect it
    sparsify.format        version of this layout, an integer
    sparsify.architecture  architecture, model_args, pretrained_cfg: what timm needs to build the host
    sparsify.config        SparsityConfig, ranks resolved
    sparsify.provenance    source, recipe, calibration, seed, library versions, date, whether the backbone changed,
                           dense_sha256: digest of the dense model that was converted
    sparsify.report        headline figures (theoretical MACs)
    sparsify.licence       licence of the weights that were converted; unknown for a user's own checkpoint
    sparsify.sha256        digest of every other key and every tensor
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsify.config import SparsityConfig, validate
from sparsify.errors import BadFile, UsageError, field, one_line
from sparsify.files import to_json, whole
from sparsify.models import building, filetype
from sparsify.models.licence import licence_of
from sparsify.nn import graft, hosts

FORMAT = 1
JSON_KEYS = ("architecture", "config", "provenance", "report")
RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "drop_path_rate")  # timm's names; they change no tensor
_AGAIN = "convert again or fetch it anew"


class Header(NamedTuple):
    """What a file says of itself (keys: the module's docstring); mappings are JSON-able."""

    architecture: dict[str, Any]
    config: SparsityConfig
    provenance: dict[str, Any]
    report: dict[str, Any]

    @property
    def backbone_changed(self) -> bool:
        """Whether the weights may differ from the dense original's: False only where the file says so."""
        return self.provenance.get("backbone_changed") is not False

    @property
    def dense_sha256(self) -> str:
        """`digest_of` the dense model that was converted, at the file's image size; '' where the file does not have it."""
        return str(self.provenance.get("dense_sha256") or "")


def save(model: nn.Module, path: Path, header: Header) -> None:
    """Write `model`; a crash or a full disk leaves an existing file unchanged. `BadFile`: it cannot be written."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    meta = {"format": "pt", "sparsify.format": str(FORMAT)}
    meta["sparsify.licence"] = licence_of(header.architecture, header.provenance).name or "unknown"
    content = header._replace(config=header.config.model_dump(mode="json"))._asdict()  # type: ignore[arg-type]
    meta |= {f"sparsify.{key}": to_json(content[key], sort_keys=True) for key in JSON_KEYS}
    meta["sparsify.sha256"] = _digest(meta, tensors)
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata=meta)


def read_header(path: Path) -> Header:
    """What the file says of itself; tensors are not read.

    Raises:
        BadFile: missing, not safetensors, not written by sparsify, from a newer version, or damaged.
    """
    return _parse(path, metadata(path))


def digest_in(path: Path) -> str:
    """The digest of everything in the file, as the file states it; `load` checks it. Errors as of `read_header`."""
    meta = metadata(path)
    _parse(path, meta)
    return meta["sparsify.sha256"]


def load(
    path: str | Path,
    img_size: int | None = None,
    device: str | torch.device = "cpu",
    rates: Mapping[str, float] | None = None,
) -> nn.Module:
    """The sparse model of a file, a timm model in eval mode, float32, with nothing else than the file.

    Args:
        img_size: side in pixels, when it is not the file's; position embeddings and predictors are resampled.
        rates: dropout and stochastic depth of training (`RATES`), when they are not the architecture's defaults.

    Raises:
        BadFile: see `read_header`; also tensors that do not fit the architecture or the digest.
        UsageError: an image size that the architecture cannot take, or an unknown rate.
    """
    path = Path(path)
    meta = metadata(path)
    header = _parse(path, meta)
    rates = checked(rates or {})
    try:
        model = rebuild(header, rates)
    except Exception as error:
        raise BadFile(f"{path}: its header does not describe a model: {one_line(error)}") from None
    with _reading(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _check_tensors(path, model, tensors)
    if _digest({k: v for k, v in meta.items() if k != "sparsify.sha256"}, tensors) != meta["sparsify.sha256"]:
        raise BadFile(f"{path} was changed after it was written (its digest differs): {_AGAIN}")
    model.load_state_dict(tensors, assign=False)
    if img_size is not None:
        resize(model, img_size)
    return model.eval().to(device)


def rebuild(header: Header, rates: Mapping[str, float] | None = None) -> nn.Module:
    """The sparse model that `header` describes, in eval mode, every parameter zero. Errors are not translated."""
    told = header.architecture
    args = {**told["model_args"], **(rates or {})}
    return graft.graft(building.rebuild(told["architecture"], args, told["pretrained_cfg"]), header.config)


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


def metadata(path: Path) -> dict[str, str]:
    """The file's metadata as written; `BadFile`: missing, or not safetensors."""
    if not os.path.exists(path):
        raise BadFile(f"no file {path}: 'sparsify convert NAME' writes one")
    if not os.path.isfile(path):
        raise BadFile(f"{path} is a folder: give a .safetensors file that 'sparsify convert' wrote")
    if filetype.of(path) == filetype.TORCH:
        raise BadFile(
            f"{path} is a PyTorch checkpoint, not a converted model: run 'sparsify convert NAME --weights {path}'"
        )
    with _reading(path) as file:
        return dict(file.metadata() or {})


def _parse(path: Path, meta: Mapping[str, str]) -> Header:
    version = meta.get("sparsify.format")
    if version is None:
        instead = f"run 'sparsify convert NAME --weights {path}'"
        raise BadFile(f"{path} is a plain checkpoint, not a converted model: {instead}")
    if not version.isdigit() or int(version) > FORMAT:
        raise BadFile(f"{path} has format {version}, this version reads up to {FORMAT}: upgrade sparsify-vit")
    try:
        content = {key: json.loads(meta[f"sparsify.{key}"]) for key in JSON_KEYS}
        if not all(isinstance(value, dict) for value in content.values()) or "sparsify.sha256" not in meta:
            raise ValueError
        if content["config"].get("tokens"):  # older files lack the field
            content["config"]["tokens"].setdefault("importance", "attention")
        content["config"] = validate(SparsityConfig, content["config"], "config")
        return Header(**content)
    except (KeyError, ValueError, TypeError):
        raise BadFile(f"{path}: its header is damaged: {_AGAIN}") from None
    except UsageError as error:
        raise BadFile(f"{path}: its header is damaged ({error}): {_AGAIN}") from None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """The open safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BadFile(f"{path} is not a whole safetensors file ({one_line(error)}): convert again") from None


def _check_tensors(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = {name: t.shape for name, t in model.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise BadFile(f"{path}: tensor {name} is missing: {_AGAIN}")
        if name not in expected:
            raise BadFile(f"{path}: tensor {name} does not belong to {type(model).__name__}: convert again")
        if tensors[name].shape != expected[name]:
            given, shape = tuple(tensors[name].shape), tuple(expected[name])
            raise BadFile(f"{path}: tensor {name} has shape {given}, expected {shape}: convert again")


def _digest(meta: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over keys, values, names, dtypes, shapes and bytes, in sorted order."""
    sha = hashlib.sha256(json.dumps(sorted(meta.items())).encode())
    for name in sorted(tensors):
        t = tensors[name]
        sha.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        sha.update(t.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
