"""The library: every function that `import sparsify` shows.

arguments      what the functions share      conversion   a dense model in, a sparse one out
loading        a file to a model, and back   measuring    MACs, time, accuracy, sweeps
programs       exports                       reporting    pictures, pages, the hub
"""

from sparsify.api.conversion import convert
from sparsify.api.loading import load, save
from sparsify.api.measuring import evaluate, predict, profile, profile_adaptive, profile_against, sweep
from sparsify.api.programs import export, export_pair
from sparsify.api.reporting import push, report, show

__all__ = [
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
