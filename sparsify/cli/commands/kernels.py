"""`sparsify build-kernels`: compile the CPU kernels now."""

from __future__ import annotations

from typing import Annotated

from sparsify.cli import options, terminal
from sparsify.cli.options import flag
from sparsify.cli.preflight import preflight
from sparsify.errors import SparsifyError


def build_kernels(
    force: Annotated[bool, flag("--force", "Compile again, even after a failure.")] = False,
    verbose: Annotated[bool, flag("--verbose", "Show the compiler's commands and output.")] = False,
) -> None:
    """Compile the CPU kernels now instead of at first use.

    Example: sparsify build-kernels --verbose
    """
    preflight()
    from sparsify.ops.cpu import kernels
    from sparsify.ops.cpu.build import PREBUILT, build

    built = build(force=force, verbose=verbose, say=options.say(False))
    if reason := built.reason or kernels.available():
        raise SparsifyError(f"the CPU kernels cannot be used, the reference is: {reason}")
    terminal.line(f"library: {built.path}")
    terminal.line(f"instruction set of this machine: {kernels.isa()}")
    if built.path == PREBUILT:
        terminal.line("it came with the package: nothing is compiled")
    else:
        terminal.line(f"built in {built.seconds:.0f} s" if built.seconds else "already built")
