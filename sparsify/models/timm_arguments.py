"""Which arguments of timm's models a header or a `config.json` may name, with their types and ranges."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import types
import typing
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model, model_validator

RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "drop_path_rate")  # timm's names; they change no tensor
NORM_EPS, CLS_AND_MEAN = "norm_eps", "cls_and_mean"  # besides timm's arguments (`building.completed`)
_LEFT_OUT = {"self", "args", "kwargs", "cfg", "device", "dtype", "embed_layer", "block_fn", "mlp_layer", "attn_layer"}
"""Of the constructors: they shape no architecture, or take a class. Arguments of `timm.create_model` (checkpoint_path,
pretrained, cache_dir, ...) are none of a constructor."""
_SHARES = {"patch_drop_rate", "attn_drop_rate", *RATES}


class _Arguments(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="after")
    def _bounded(self) -> _Arguments:
        for name in self.model_fields_set:
            value = getattr(self, name)
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, str) and len(each) > 40:
                    raise ValueError(f"{name}: a short word is expected")
                if isinstance(each, int | float) and not (math.isfinite(each) and abs(each) <= 1 << 24):
                    raise ValueError(f"{name}: a finite number up to {1 << 24} is expected")
                if name == NORM_EPS and not 0 < (each or 1) <= 1:
                    raise ValueError(f"{name}: a number above 0 and up to 1 is expected")
                if name in _SHARES and not 0 <= (each or 0) < 1:
                    raise ValueError(f"{name}: a number from 0 up to 1 is expected")
        return self


@functools.cache
def schema() -> type[BaseModel]:
    """The arguments that shape an architecture, with timm's own types: those of the constructors of `hosts.MODELS`."""
    from timm.models.naflexvit import NaFlexVitCfg

    from sparsify.nn import hosts

    allowed: dict[str, Any] = {"use_naflex": bool | None}
    for maker in (*hosts.MODELS, NaFlexVitCfg):
        hints = typing.get_type_hints(maker.__init__)
        for name in inspect.signature(maker.__init__).parameters:
            if name not in _LEFT_OUT:
                allowed[name] = allowed.get(name, types.NoneType) | _of_json(hints[name])
    allowed |= {NORM_EPS: float | None, CLS_AND_MEAN: bool | None}
    fields: dict[str, Any] = {name: (hint, None) for name, hint in allowed.items()}
    return create_model("Arguments", __base__=_Arguments, **fields)


def _of_json(hint: Any) -> Any:
    """The part of a type that JSON has; a layer has a name in timm."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain = [p for p in parts if p in (bool, int, float, str) or typing.get_origin(p) in (tuple, Literal)]
    return functools.reduce(operator.or_, plain or [str])
