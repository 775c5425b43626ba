"""What every Triton kernel takes of a GPU, compiled ahead of time without one: `make bench-gpu-kernels`, about ten minutes.

    python benchmarks/gpu_kernels.py [--markdown FILE] [--target TARGET ...] [--model MODEL ...]

All kernels for the widths, heads and numbers of tokens of models in use. Exit code 1 where one spills registers, takes more
shared memory than the target has, or does not multiply on tensor cores. `tests/ops/test_gpu.py` holds one of these models.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import aot

MODELS = {  # patch tokens, channels, head size, dtype
    "ViT-S/16 224": (196, 384, 64, torch.bfloat16),
    "ViT-S/16 224, float16": (196, 384, 64, torch.float16),
    "ViT-S/16 224, float32": (196, 384, 64, torch.float32),
    "ViT-B/16 384": (576, 768, 64, torch.bfloat16),
    "ViT-L/14 518": (1369, 1024, 64, torch.bfloat16),
    "SigLIP SO400M/14 384": (729, 1152, 72, torch.bfloat16),
    "ViT-H/14 224": (256, 1280, 80, torch.bfloat16),
    "ViT of heads of 96": (196, 768, 96, torch.bfloat16),
    "ViT of heads of 128": (576, 1024, 128, torch.bfloat16),
    "ViT-S/16 1024": (4096, 384, 64, torch.bfloat16),
}
SHARED = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "gfx942": 65_536}  # bytes that one program can have
MULTIPLY = ("nearest", "sized")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--target", nargs="+", choices=aot.TARGETS, default=aot.TARGETS)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    arguments = parser.parse_args()
    lines = [
        f"| registers / shared bytes | | {' | '.join(arguments.target)} |",
        "|---|---|" + "---|" * len(arguments.target),
    ]
    print(*lines, sep="\n", flush=True)
    wrong = []
    for model in arguments.model:
        n, C, d, dtype = MODELS[model]
        launches = [launch for call in aot.calls(dtype, 8, n, C, d) for launch in aot.recorded(call)]
        for launch in launches:
            name, cells = launch.kernel.fn.__name__, []
            if name == "sized" and dtype == torch.float32:  # PyTorch's own there
                continue
            for target in arguments.target:
                found = aot.compiled(launch, target)
                cells.append(f"{found.registers} / {found.shared}")
                if found.spills or found.shared > SHARED[target] or found.tensor_cores != (name in MULTIPLY):
                    wrong.append(f"{model}: {name} on {target}: {found}")
            lines.append(f"| {model} | {name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
