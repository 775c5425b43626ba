"""sparsify: pretrained timm Vision Transformers with learned, per-image sparse attention (Sparsifiner, CVPR 2023).

    import sparsify

    sparsify.convert("deit_small", keep=0.1)          # writes model.safetensors
    model = sparsify.load("model.safetensors")        # a timm model; model(x) as before
    sparsify.profile(model).as_dict()                 # MACs and latency, dense beside sparse
    sparsify.profile_against(model).best_dense        # beside dense in eager, torch.compile, ONNX Runtime, OpenVINO
    sparsify.evaluate(model, "imagenet")              # top-1, top-5, agreement with dense
    sparsify.predict(model, "photos")                 # classes of images with names and probabilities
    sparsify.load("model.safetensors", adaptive=0.6)  # of a file with several budgets: cheap where that is sure enough
    sparsify.save(model, "tuned.safetensors", like="model.safetensors")     # after a training loop of your own
    sparsify.convert(timm_model, loader, keep=0.1).model                    # of what you hold; no file is written

The names are resolved at first use, so that `import sparsify` does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsify.api import (
        convert,
        evaluate,
        export,
        export_pair,
        load,
        predict,
        profile,
        profile_adaptive,
        profile_against,
        push,
        report,
        save,
        show,
        sweep,
    )
    from sparsify.config import SparsityConfig
    from sparsify.version import __version__

__all__ = [
    "SparsityConfig",
    "__version__",
    "convert",
    "evaluate",
    "export",
    "export_pair",
    "load",
    "predict",
    "profile",
    "profile_adaptive",
    "profile_against",
    "push",
    "report",
    "save",
    "show",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sparsify' has no attribute '{name}'")
    room = {"SparsityConfig": "config", "__version__": "version"}.get(name, "api")
    return getattr(import_module(f"sparsify.{room}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
