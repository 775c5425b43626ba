"""`sparsify show`: pictures of what a file's model does with images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli import options
from sparsify.cli.preflight import preflight

Layers = Annotated[
    str | None,
    typer.Option(
        "--layer",
        metavar="N,N,...",
        help="Layers to draw keys of, counted from 1; or all.",
        show_default="4 of those with sparse attention",
    ),
]
Heads = Annotated[
    str | None,
    typer.Option("--head", metavar="N,N,...", help="Heads, counted from 1; or all.", show_default="at most 6"),
]
Queries = Annotated[
    list[str] | None,
    typer.Option(
        "--query",
        metavar="X,Y",
        help="Patch whose keys are drawn: whole pixels of the image (120,80), or shares of its sides with a point "
        "(0.5,0.25). May be given again.",
        show_default="the middle, and near the top left corner",
    ),
]
DenseOf = Annotated[
    str | None,
    typer.Option(
        "--dense",
        metavar="NAME|FILE",
        help="Dense original: the kept share is of its attention.",
        show_default="of the sparse model's own",
    ),
]


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File that 'convert' wrote.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    query: Queries = None,
    layer: Layers = None,
    head: Heads = None,
    dense: DenseOf = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the PNGs.")] = Path(
        "show"
    ),
    img_size: options.ImgSize = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Draw the keys that patches attend to, the tokens that go on, and how much attention is kept.

    Example: sparsify show model.safetensors cat.jpg --query 120,80
    """
    preflight()
    from sparsify.cli.progress import Reporter
    from sparsify.images import photograph
    from sparsify.jobs import show as showing
    from sparsify.measure.inspection import DENSE, OWN, REFERENCES
    from sparsify.models import checkpoint, original
    from sparsify.report import captions, figures

    say = options.say(quiet)
    figures.can_write(output)
    points = [photograph.point(text) for text in query or []]
    header, model = checkpoint.read_header(file), checkpoint.load(file, img_size)
    beside = original.load_original(header, dense, img_size, say) if dense else None
    with Reporter(quiet) as reporter:
        shown = showing.look(
            model, images, points, layers=layer, heads=head, dense=beside,
            progress=lambda done, total: reporter.update("look", done, total),
        )  # fmt: skip
        files = figures.draw(shown, lambda done, total: reporter.update("draw", done, total))
    paths = figures.write(files, output)
    if not quiet:
        print(f"true attention: {REFERENCES[OWN if beside is None else DENSE]}")
        for each in shown:
            print(f"{each.photo.path.name}: {captions.mass(each.found)}.")
    if not shown[0].found.stages:
        say("no tokens leave in this model: no pictures of tokens")
    print(f"wrote {len(paths)} pictures to {output}: {', '.join(path.name for path in paths)}")
