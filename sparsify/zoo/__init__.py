"""From a name to a dense timm model with its weights: aliases, timm names, hub names, local files and `digits`.

source = resolve("deit_small")           # what the name means; nothing is built or downloaded
graft.check(skeleton(source))            # refused by class name before anything is computed
model = load(source)                     # weights downloaded, or read from a file given by the user
header = describe(model, source)         # JSON-able; `rebuild(**header)` needs no network
"""

from sparsify.zoo.building import describe, note, rebuild, shallow, skeleton
from sparsify.zoo.catalogue import architectures, listing
from sparsify.zoo.names import ALIASES, DIGITS, Source, resolve
from sparsify.zoo.pretrained import load

__all__ = [
    "ALIASES", "DIGITS", "Source", "architectures", "describe", "listing", "load", "note", "rebuild", "resolve", "shallow",
    "skeleton",
]  # fmt: skip
