"""`sparsify predict`: the classes of images, or their features, by the model of a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sparsify.cli import completion, options, parsers, terminal
from sparsify.cli.options import argument, flag, option
from sparsify.errors import SparsifyError, UsageError

if TYPE_CHECKING:
    from sparsify.jobs.predict import Prediction

IMAGES = "Image files, folders (every image below), .tar, timm data sets, digits."
FEATURES = "Write features to --output: patch (one per patch) or pooled (one per image)."
LIMIT = "Number of images, drawn by --seed and spread over the folders."


def predict(
    file: options.Model,
    images: Annotated[list[str], argument("IMAGE", IMAGES)],
    csv: Annotated[Path | None, option("FILE", "Write classes and probabilities as .csv.", default="printed")] = None,
    top: Annotated[int, option("K", "Number of most probable classes per image.", min=1)] = 5,
    features: Annotated[str | None, option("KIND", FEATURES, default="none", words=completion.FEATURES)] = None,
    output: Annotated[Path, option("FILE", "File to write --features to.", names="--output -o")] = Path(
        "features.safetensors"
    ),
    limit: Annotated[int | None, option("N", LIMIT, default="all", min=1)] = None,
    seed: options.LimitSeed = 0,
    strict: Annotated[bool, flag("--strict", "Stop at the first image that cannot be read.")] = False,
    img_size: options.ImgSize = None,
    budget: options.Budget = None,
    adaptive: options.Adaptive = None,
    mean: options.Mean = None,
    std: options.Std = None,
    crop_pct: options.CropPct = None,
    interpolation: options.Interpolation = None,
    class_map: options.ClassMap = None,
    batch_size: options.BatchSize = 32,
    workers: options.Workers = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    backend: options.Backend = "auto",
    kernel_precision: options.KernelPrecision = "input",
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Predict the classes of images with probabilities, or write their features.

    --features writes a .safetensors file: the tensor 'features' of shape [images, patches, channels] or [images, channels],
    and the image names in the metadata.

    Example: sparsify predict model.safetensors photos/ --csv classes.csv
    """
    if features is not None:
        parsers.one_of("--features", features, completion.FEATURES)
    if csv is not None and csv.suffix != ".csv":
        raise UsageError(f"--csv {csv}: a name that ends in .csv is expected")
    compute = parsers.compute(device, dtype, backend, kernel_precision, batch_size=batch_size, workers=workers)
    from sparsify.cli.progress import Reporter
    from sparsify.files.locks import reserved
    from sparsify.images.listed import ImagePaths
    from sparsify.jobs import predict as job
    from sparsify.models.original import Which, opened
    from sparsify.processes import Listener

    say, given = options.say(quiet), ImagePaths(tuple(images), limit, seed, strict)
    with reserved(csv, output if features else None):
        one = opened(file, None, img_size, say, Which(budget, adaptive))
        parsers.preprocessing(mean, std, crop_pct, interpolation, class_map).apply(one.lead)
        written, nonfinite = [], 0
        with Reporter(quiet) as reporter:
            how: Any = {"compute": compute, "listener": Listener(say, reporter.update)}
            if csv is not None or features is None:
                found = job.predictions(one.model, given, top=top, **how)
                if csv is None:
                    nonfinite = _print(found, quiet)
                else:
                    heads = job.columns(int(getattr(one.lead, "num_classes", 0)), top)
                    rows, nonfinite = job.write_csv(csv, found, heads)
                    written.append(f"{csv}: {rows:,} images")
            if features is not None:
                about = {"model_sha256": one.digest}
                made = job.write_features(one.model, given, features, output, about=about, **how)
                shape = ", ".join(f"{n:,}" for n in made.shape)
                written.append(f"{made.path}: features [{shape}], {dtype}, {made.bytes / 1e6:,.1f} MB")
    for line in written:
        terminal.line(f"wrote {line}")
    if nonfinite:
        raise SparsifyError(
            f"{nonfinite:,} images give outputs that are not finite: look at the weights, or at --dtype"
        )


def _print(found: Any, quiet: bool) -> int:
    """Prints predictions; returns how many images have none."""
    nonfinite = 0
    for each in found:
        nonfinite += not each.probabilities
        if not quiet:
            terminal.line(f"{each.image}  {_words(each)}")
    return nonfinite


def _words(one: Prediction) -> str:
    """'0.834 tiger shark; 0.101 hammerhead'; the number of a class without a name."""
    if not one.classes:
        return f"{one.probabilities[0]:.6g}" if one.probabilities else "outputs that are not finite"
    named = zip(one.probabilities, one.names, one.classes, strict=True)
    return "; ".join(f"{p:.3f} {name or number}" for p, name, number in named)
