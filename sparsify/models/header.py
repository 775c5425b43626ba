"""What a model file says of itself, checked before anything is built: `Header`, read from the JSON of a file.

The schema covers all that a command reads: types, ranges and lengths. What no command reads may be any JSON value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sparsify.config import SparsityConfig, validate
from sparsify.errors import UsageError, brief, field
from sparsify.files.plain_json import from_json
from sparsify.models import timm_arguments
from sparsify.nn.adaptive import Rule, Sureness, choose
from sparsify.nn.schedules import DENSE, check_alike, dense_of, none_for

FORMAT = 1
JSON_KEYS = ("architecture", "config", "provenance", "report")
SCHEDULES, SURENESS = "schedules", "sureness"  # keys that only files made for a target have
MOST_SCHEDULES, MOST_IMAGES = 16, 1 << 14
MOST_JSON = 8 << 20  # characters of all JSON: names of 20,000 classes and their descriptions take 3 million
MOST_DEPTH = 16  # a header that `convert` wrote has 6 levels
MOST_DIGITS = 40  # characters of a number
MOST_PATCHES = 1 << 16  # 4096 px in patches of 16

Name = Annotated[str, Field(pattern=r"^[\w.-]{1,200}$")]
Side = Annotated[int, Field(ge=1, le=1 << 14)]
Classes = Annotated[int, Field(ge=0, le=1 << 24)]
Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Deviation = Annotated[float, Field(gt=0, le=1e6)]
Whole = Annotated[int, Field(ge=0, le=1 << 62)]
Share = Annotated[float, Field(ge=0, le=1)]
Distance = Annotated[float, Field(ge=-1e-3, le=1e6)]  # of equal probabilities, rounding may go below 0


class Schedule(NamedTuple):
    """A configuration that was found for a budget, and its theoretical MACs."""

    config: SparsityConfig
    report: dict[str, Any]


class Header(NamedTuple):
    """What a file says of itself (keys: `sparsify.models.checkpoint`); mappings are JSON-able."""

    architecture: dict[str, Any]
    config: SparsityConfig  # the one in use
    provenance: dict[str, Any]
    report: dict[str, Any]  # of `config`
    schedules: Mapping[float, Schedule] = {}  # by budget; none of a file that was made for no target
    sureness: Mapping[float, Sureness] = {}  # of schedules, for adaptive inference

    @property
    def budget(self) -> float | None:
        """The budget of `config`; None where it was chosen for none."""
        if self.config == dense_of(self.config):
            return DENSE
        return next((budget for budget, found in self.schedules.items() if found.config == self.config), None)

    @property
    def others(self) -> tuple[SparsityConfig, ...]:
        """The configurations of all budgets."""
        return tuple(found.config for found in self.schedules.values())

    def at(self, budget: float | None) -> Header:
        """The header with another schedule in use; None: as it is. `UsageError`: there is no such budget."""
        if budget is None or budget == self.budget:
            return self
        if budget in self.schedules:
            return self._replace(**self.schedules[budget]._asdict())
        if budget != DENSE:
            raise none_for(budget, self.schedules)
        dense = {key: self.report.get(key.replace("_sparse", "_dense"), value) for key, value in self.report.items()}
        return self._replace(config=dense_of(self.config), report=dense)

    @property
    def backbone_changed(self) -> bool:
        """Whether the weights may differ from the dense original's: False only where the file says so."""
        return self.provenance.get("backbone_changed") is not False

    @property
    def dense_sha256(self) -> str:
        """`digest_of` the dense model that was converted, at the file's image size; '' where the file does not have it."""
        return str(self.provenance.get("dense_sha256") or "")

    def rule(self, cost: float) -> Rule:
        """How a model of mean cost `cost`, a fraction of dense, runs adaptively; `UsageError`: it cannot."""
        if self.sureness:
            return choose(self.sureness, cost)
        asked = f"{field('adaptive')} {cost:g}"
        if not self.architecture["model_args"].get("num_classes", 1):
            raise UsageError(f"{asked}: this model gives features; only a classifier can be unsure of a class")
        how = f"a classifier converted for {field('target_macs')} A,B, not fine-tuned, has them"
        raise UsageError(f"{asked}: this file has no margins of calibration images; {how}")


class _Said(BaseModel):
    """An object of JSON: nothing is converted, unknown keys are left as they are."""

    model_config = ConfigDict(strict=True, extra="allow")


class Preprocessing(_Said):
    """`pretrained_cfg`: timm's words for preprocessing, classifier and licence."""

    architecture: Name | None = None
    """timm's name of the architecture"""
    tag: Name | None = None
    """timm's tag of the weights"""
    input_size: tuple[Annotated[int, Field(ge=1, le=64)], Side, Side] | None = (3, 224, 224)
    """channels, height and width of an input, pixels"""
    test_input_size: tuple[Side, Side, Side] | None = None
    """the same for evaluation, where it differs"""
    min_input_size: tuple[Side, Side, Side] | None = None
    """the smallest"""
    fixed_input_size: bool | None = False
    """whether the model takes no other size"""
    custom_load: bool | None = False
    """timm's: whether weights are read by the architecture's own loader"""
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = "bicubic"
    """of resizing"""
    crop_pct: Annotated[float, Field(ge=0.01, le=4)] | None = None
    """input size over the size to which the image is resized"""
    crop_mode: Literal["center", "squash", "border"] | None = None
    """how an image becomes the input's shape"""
    mean: Number | tuple[Number, ...] | None = None
    """subtracted from pixels from 0 to 1; one number, or by channel"""
    std: Deviation | tuple[Deviation, ...] | None = None
    """then divided by; one number, or by channel"""
    num_classes: Classes | None = 0
    """outputs of the classifier; 0: features"""
    classifier: Name | tuple[Name, ...] | None = None
    """module names of the classifier"""
    first_conv: Name | tuple[Name, ...] | None = None
    """module names of the first convolution"""
    license: Annotated[str, Field(max_length=200)] | None = None
    """of the weights, as timm says it"""
    label_names: tuple[str, ...] | None = None
    """names of the classes, by index"""

    @model_validator(mode="after")
    def _fits_together(self) -> Preprocessing:
        for value in (self.mean, self.std):
            if isinstance(value, tuple) and len(value) not in (1, (self.input_size or (3,))[0]):
                raise ValueError("mean and std: one number is expected, or one for each channel")
        return self


class Architecture(_Said):
    """What timm needs to build the host."""

    architecture: Name
    """timm's name"""
    model_args: dict[str, Any]
    """arguments of the architecture's constructor; only those that shape it are taken"""
    pretrained_cfg: dict[str, Any]
    """preprocessing, classifier and licence: the table `Preprocessing`"""


class _Stage(_Said):
    """A stage of the fine-tuning."""

    name: str = ""
    """of the stage"""


class _Recipe(_Said):
    """The recipe that was followed, whole."""

    description: str = ""
    """its line"""
    stages: tuple[_Stage, ...] = ()
    """of the fine-tuning"""


class _Calibration(_Said):
    """What the predictors were fitted on."""

    images: Whole | None = None
    """how many"""
    set: str | None = None
    """built-in, or user: images of the user's own"""


class _Tuned(_Said):
    """What came of the fine-tuning."""

    kept: str | None = None
    """which weights were written, fine-tuned or calibrated: the better ones on images held back"""
    steps: Whole | None = None
    """optimiser steps that were made"""


class Provenance(_Said):
    """How the file was made, as far as a command reads it."""

    source: str | None = None
    """name of the model that was converted, as given to `convert`"""
    weights: str | None = None
    """file name of the user's checkpoint; null: the model's own weights"""
    transformers: str | None = None
    """`model_type` of a checkpoint in the form of Hugging Face transformers; null: it was in timm's"""
    dense_sha256: str | None = None
    """digest of the dense model that was converted"""
    backbone_changed: bool | None = None
    """whether the weights may differ from the dense original's; false only where they do not"""
    recipe: _Recipe | None = None
    """how the file was made"""
    calibration: _Calibration | None = None
    """what the predictors were fitted on"""
    finetuned: _Tuned | None = None
    """what came of the fine-tuning; null: there was none"""
    further: tuple[dict[str, Any], ...] | None = None
    """each time that `sparsify.save` wrote the model after training elsewhere: date, versions, what changed"""
    versions: dict[str, str] = {}
    """of the libraries that made the file"""
    date: str | None = None
    """when it was made, ISO 8601, UTC"""


class _Report(_Said):
    """Theoretical figures of the schedule in use."""

    macs_dense: Whole | None = None
    """multiply-accumulates of the dense model for one image"""
    macs_sparse: Whole | None = None
    """the same of the sparse model"""


def parse(meta: Mapping[str, str]) -> Header:
    """The header in a file's metadata, of format `FORMAT`.

    Raises:
        UsageError: a key that is missing, is not JSON, or does not fit the schema; the message names it.
    """
    texts = {key: meta.get(f"sparsify.{key}") for key in JSON_KEYS}
    if missing := [key for key, text in texts.items() if text is None]:
        raise UsageError(f"{missing[0]}: missing")
    if sum(len(meta.get(f"sparsify.{key}", "")) for key in (*JSON_KEYS, SCHEDULES, SURENESS)) > MOST_JSON:
        raise UsageError(f"more than {MOST_JSON >> 20} million characters of JSON")
    trees = {key: _json(key, text or "") for key, text in texts.items()}
    several, sure = (_json(key, meta.get(f"sparsify.{key}", "{}")) for key in (SCHEDULES, SURENESS))
    validate(Architecture, _tuples(trees["architecture"]), "architecture")
    check_source(trees["architecture"]["model_args"], trees["architecture"]["pretrained_cfg"])
    validate(Provenance, _tuples(trees["provenance"]), "provenance")
    validate(_Report, trees["report"], "report")
    config = _config(trees["config"], "config")
    found = _schedules(several, config)
    return Header(trees["architecture"], config, trees["provenance"], trees["report"], found, _sureness(sure, found))


def _config(tree: Any, source: str) -> SparsityConfig:
    tokens = tree.get("tokens") if isinstance(tree, dict) else None
    if isinstance(tokens, dict):  # older files lack the field
        tokens.setdefault("importance", "attention")
    return validate(SparsityConfig, tree, source)


def _schedules(trees: dict[str, Any], config: SparsityConfig) -> dict[float, Schedule]:
    """The schedules of a file by budget, from the largest; `config` is the one in use."""
    if len(trees) > MOST_SCHEDULES:
        raise UsageError(f"{SCHEDULES}: more than {MOST_SCHEDULES}")
    found: dict[float, Schedule] = {}
    for name, tree in trees.items():
        where = f"{SCHEDULES} {brief(name)}"
        try:
            budget = float(name)
        except ValueError:
            budget = 0.0
        if (
            not 0 < budget <= 1
            or name != f"{budget:g}"
            or not isinstance(tree, dict)
            or tree.keys() != {*Schedule._fields}
        ):
            raise UsageError(f"{where}: a budget above 0 and up to 1 with {' and '.join(Schedule._fields)} is expected")
        validate(_Report, tree["report"], f"{where} report")
        found[budget] = Schedule(_config(tree["config"], f"{where} config"), tree["report"])
    configs = [each.config for each in found.values()]
    if found:
        check_alike([config, *configs])
        if config not in [*configs, dense_of(config)]:
            raise UsageError(f"{SCHEDULES}: config is none of them")
    return dict(sorted(found.items(), reverse=True))


class _Sureness(_Said):
    """How sure one schedule is of the calibration images, for adaptive inference."""

    margins: tuple[Share, ...] = Field(min_length=1, max_length=MOST_IMAGES)
    """largest less second largest class probability of each image"""
    distances: tuple[Distance, ...] = Field(min_length=1, max_length=MOST_IMAGES)
    """KL(dense || this schedule) of each image, nats"""


def _sureness(trees: dict[str, Any], schedules: Mapping[float, Schedule]) -> dict[float, Sureness]:
    """The sureness of all schedules by budget, over the same images, or of none."""
    if trees and trees.keys() != {f"{budget:g}" for budget in schedules}:
        raise UsageError(f"{SURENESS}: expected of each schedule")
    read = {name: validate(_Sureness, _tuples(tree), f"{SURENESS} {name}") for name, tree in trees.items()}
    if len({len(values) for each in read.values() for values in (each.margins, each.distances)}) > 1:
        raise UsageError(f"{SURENESS}: expected of the same images")
    return {float(name): Sureness(each.margins, each.distances) for name, each in read.items()}


def check_source(model_args: Any, pretrained_cfg: Any) -> None:
    """Raise `UsageError` where a `config.json` asks timm for more than an architecture and its preprocessing."""
    validate(timm_arguments.schema(), _tuples(model_args), "model_args")
    validate(Preprocessing, _tuples(pretrained_cfg), "pretrained_cfg")


def _tuples(tree: Any) -> Any:
    """A tree of JSON with tuples instead of lists, which the strict types expect."""
    if isinstance(tree, dict):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(map(_tuples, tree)) if isinstance(tree, list | tuple) else tree


def _json(key: str, text: str) -> dict[str, Any]:
    """A JSON object of bounded depth, with numbers of bounded length, and text that can be encoded."""
    try:
        tree = from_json(text, parse_int=_short(int), parse_float=_short(float))
        _bound(tree, MOST_DEPTH)
    except ValueError as error:
        raise UsageError(f"{key}: {error if isinstance(error, _Unreadable) else 'not JSON'}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{key}: an object of JSON is expected")
    return tree


class _Unreadable(ValueError):
    """JSON that is not read; the message says why."""


def _short(number: type) -> Any:
    def read(text: str) -> Any:
        if len(text) > MOST_DIGITS:
            raise _Unreadable(f"a number of {len(text)} characters")
        return number(text)

    return read


def _bound(tree: Any, levels: int) -> None:
    if isinstance(tree, str):
        tree.encode()  # half of a pair of surrogates raises UnicodeEncodeError, a ValueError
    elif isinstance(tree, dict | list):
        if not levels:
            raise _Unreadable(f"nested more than {MOST_DEPTH} levels deep")
        for each in [*tree, *tree.values()] if isinstance(tree, dict) else tree:
            _bound(each, levels - 1)
