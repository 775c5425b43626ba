"""`sparsify show`: pictures of what a file's model does with images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from sparsify import processes
from sparsify.cli import options, terminal
from sparsify.cli.options import argument, option
from sparsify.cli.preflight import preflight

DENSE_OF = "Dense original; attention kept is then a fraction of its attention."


def show(
    file: options.LocalModel,
    images: Annotated[list[Path], argument("IMAGE", "Image files.")],
    query: options.Queries = None,
    layer: options.Layers = None,
    head: options.Heads = None,
    dense: Annotated[str | None, option("NAME|FILE", DENSE_OF, default="the sparse model's own attention")] = None,
    output: Annotated[Path, option("FOLDER", "Folder for the PNG files.", names="--output -o")] = Path("show"),
    img_size: options.ImgSize = None,
    budget: options.Budget = None,
    device: options.Device = "cpu",
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Draw the keys that patches attend to, the remaining tokens, and the fraction of attention kept.

    Example: sparsify show model.safetensors cat.jpg --query 120,80
    """
    preflight()
    from sparsify.cli.progress import Reporter
    from sparsify.files.destinations import check_folder
    from sparsify.images import photograph
    from sparsify.jobs.show import Views, show
    from sparsify.measure.inspection import DENSE, OWN, REFERENCES
    from sparsify.models.original import Which, opened
    from sparsify.processes import Listener
    from sparsify.reports import captions

    say = options.say(quiet)
    check_folder(output)
    views = Views(images, [photograph.point(text) for text in query or []], layer, head)
    target = processes.torch_device(device)
    one = opened(file, dense, img_size, say, Which(budget)).on(target)
    with Reporter(quiet) as reporter:
        made = show(one.model, views, output, one.dense, Listener(say, reporter.update))
    if not quiet:
        terminal.line(f"true attention: {REFERENCES[OWN if one.dense is None else DENSE]}")
        for each in made.shown:
            terminal.line(f"{each.photo.path.name}: {captions.mass(each.found)}.")
    if not made.shown[0].found.stages:
        say("this model removes no tokens: no pictures of tokens")
    terminal.line(f"wrote {len(made.paths)} pictures to {output}: {', '.join(path.name for path in made.paths)}")
