"""Triton kernels compiled ahead of time, without a GPU, exactly as the ops launch them: recorded calls on meta tensors."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from sparsify.ops.gpu import attention, tokens

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")
CUDA = ("sm_80", "sm_89", "sm_90")
TARGETS = (*CUDA, "gfx942")


class Launch(NamedTuple):
    """A recorded launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Compiled(NamedTuple):
    """What a kernel takes of a multiprocessor, and whether it multiplies on tensor cores."""

    registers: int  # of a thread
    shared: int  # bytes of a program
    spills: int  # loads and stores of local memory (sm), registers (gfx)
    tensor_cores: bool


def recorded(call: Callable[[], object]) -> list[Launch]:
    """The launches of a call of the ops' functions on meta tensors."""
    found: list[Launch] = []

    def record(kernel: Any, grid: Any, arguments: Any, device: Any, **options: Any) -> None:
        found.append(Launch(kernel, tuple(arguments), options))

    with mock.patch.object(tokens, "launch", record), mock.patch.object(attention, "launch", record):
        call()
    return found


def compiled(launch: Launch, target: str) -> Compiled:
    """The kernel of a launch for one of `TARGETS`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, constants, attributes = {}, {}, {}
    given = {k: v for k, v in launch.options.items() if k not in OPTIONS}
    if target == "gfx942" and "PRECISION" in given:
        given["PRECISION"] = "ieee"  # as `launching.precision` says there
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[i] if i < len(launch.arguments) else given[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            if type(value) is int and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    backend = GPUTarget("hip", "gfx942", 64) if target == "gfx942" else GPUTarget("cuda", int(target[3:]), 32)
    options = {k: launch.options[k] for k in OPTIONS if k in launch.options}
    done = compile(source, target=backend, options=options)
    return _amd(done) if target == "gfx942" else _nvidia(done)


def _nvidia(done: Any) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "k.cubin"
        file.write_bytes(done.asm["cubin"])
        usage, code = _tool("cuobjdump", "--dump-resource-usage", str(file)), _tool("nvdisasm", str(file))
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Compiled(registers, done.metadata.shared, spills, bool(re.search(r"\bH(?:G)?MMA\b", code)))


def _amd(done: Any) -> Compiled:
    code = done.asm["amdgcn"]
    registers, spills = (int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
    return Compiled(registers, done.metadata.shared, spills, "v_mfma" in code)


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


# ---- calls ----


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(dtype: torch.dtype, B: int, n: int, C: int, d: int) -> Iterator[Callable[[], object]]:
    """Calls of all ops for models of a width C with n patch tokens, a cls token and heads of size d."""
    x, I = meta(B, 1 + n, C, dtype=dtype), meta(B, n)
    size, place = meta(B, 1 + n), meta(B, n, dtype=torch.int64)
    q, k, v = meta(B, 1 + n, 3, C // d, d, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    m = round(0.7 * n)
    yield lambda: tokens.fitted_importance.function(x, meta(C + 1), size, 1, 1e-20)
    yield lambda: tokens.attention_importance.function(q, k, size, d**-0.5, 1, 1, 1e-20)
    yield lambda: tokens.merge_tokens.function(x, I, size, place, 1, m, min(n - 1, 2 * (n - m)))
    yield lambda: tokens.choose_tokens.function(x, I, place, 1, m, True)
    yield lambda: attention.sized_attention.function(q, k, v, size, d**-0.5)
