"""This machine's processor, without torch: its name, and which of the kernels' instruction sets it has."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

# as `best_isa` of src/binding.cpp asks for them, in the words of /proc/cpuinfo; the best last
FLAGS_OF = {
    "avx2": "avx2 fma bmi1 bmi2",
    "avx512": "avx512f avx512bw avx512dq avx512vl",
    "avx512bf16": "avx512_bf16 avx512vbmi avx512_vbmi2 avx512_vnni",
}


def name() -> str:
    """The processor's name; of one that /proc/cpuinfo does not tell, the kind of machine."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def isa() -> str:
    """The best instruction set of the kernels that the processor has; '' for none, or where that is not known."""
    flags, best = set(_cpuinfo().get("flags", "").split()), ""
    for found, needed in FLAGS_OF.items():
        if not flags.issuperset(needed.split()):
            break
        best = found
    return best


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    return {key.strip().lower(): value.strip() for key, _, value in lines}
