"""Every name of timm that converts, built small: keep=1 through the sparse op beside dense, both predictors.

    python benchmarks/families.py --write      docs/families.md from the classes that timm builds (`make families`)
    python benchmarks/families.py              the comparison (`make bench-families`), then every other name of timm, which
                                               has to be refused by its name; ten minutes on one core
    python benchmarks/families.py eva beit     the comparison for these modules of timm; --limit N: for N names of each

The models are random, one block deep and 64 channels wide on a grid of 4x4 patches, with attention made uneven
(`tests/helpers/timm_names.py`).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import timm
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers import timm_names  # noqa: E402
from sparsify.errors import UnsupportedModel  # noqa: E402
from sparsify.nn import hosts  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=[], help="modules of timm (default: all)")
    parser.add_argument("--write", action="store_true", help="write docs/families.md instead")
    parser.add_argument("--limit", type=int, help="names of each module (default: all)")
    arguments = parser.parse_args()
    if arguments.write:
        (ROOT / "docs" / "families.md").write_text(timm_names.table())
        return 0
    modules = arguments.modules or list(timm_names.names())
    start, worst, equal, refused, failed = time.perf_counter(), (0.0, ""), 0, 0, []
    for module in modules:
        names = timm_names.names()[module][: arguments.limit]
        for name in names:
            if isinstance(timm_names.frame(name), str):
                refused += 1
                continue
            dense = timm_names.small(name)
            try:
                found = max(timm_names.difference(dense, predictor) for predictor in ("head-lowrank", "token-lowrank"))
                assert found <= timm_names.TOLERANCE and timm_names.reaches_the_output(dense), found
            except Exception as error:
                failed.append(f"{name}: {error!r}")
                continue
            equal, worst = equal + 1, max(worst, (found, name))
        print(f"{module}: {len(names)} names, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{equal} equal dense at keep=1 (worst {worst[0]:.1e}, {worst[1]}), {refused} refused, {len(failed)} failed")
    print(*failed, sep="\n")
    strange = others() if len(modules) == len(timm_names.names()) else []
    print(*strange, sep="\n")
    return 1 if failed or strange else 0


def others() -> list[str]:
    """Names that are not refused as they should be: whole models of the six modules that are not what their first block
    is, and models of other modules that are understood. Built on the meta device."""
    found, refused, unbuilt = [], 0, 0
    own = {name for names in timm_names.names().values() for name in names}
    for name in timm.list_models():
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except Exception:  # some of timm's constructors compute with their tensors
            unbuilt += 1
            continue
        try:
            hosts.supported_attentions(model, name)
            converts = True
        except UnsupportedModel as error:
            converts, refused = False, refused + 1
            if name not in str(error) or "\n" in str(error):
                found.append(f"{name}: refused, but not by name: {error}")
        if converts != (name in own and isinstance(timm_names.frame(name), nn.Module)):
            found.append(f"{name}: whole model {'converts' if converts else 'is refused'}, unlike what the page says")
    print(
        f"{refused} of timm's names refused by name, {unbuilt} not to be built on the meta device, {len(found)} strange"
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
