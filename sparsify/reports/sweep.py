"""A sweep as a table, Markdown, JSON, a picture and a recipe for each setting."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsify.errors import BadFile, one_line
from sparsify.files.outputs import write_all
from sparsify.measure.accuracy import Evaluation
from sparsify.measure.latency import Timing
from sparsify.measure.sweep import Setting, Sweep
from sparsify.recipe import recipe_yaml
from sparsify.reports import profile, words
from sparsify.reports.sweep_plot import PUBLISHED_DENSE_TOP1, label, plot, published, top1_error
from sparsify.reports.words import number

FORMAT = 1  # of the JSON


def quality(e: Evaluation) -> list[tuple[str, str, str]]:
    """Figures of a setting beside dense, those that apply: heading, the dense model's, the setting's."""
    cells: list[tuple[str, str, str]] = []
    if e.top1 is not None:
        cells.append(("top-1 %", number(e.dense_top1, ".2f", ""), number(e.top1, ".2f")))
    if e.agreement is not None:
        cells.append(("agree %", "", f"{e.agreement:.2f}"))
        cells.append(("KL", "", number(e.kl, ".4f", "").replace("-0.0000", "0.0000")))  # equal but for rounding
    if e.correlation is not None:
        cells.append(("correlation", "", f"{e.correlation:.4f}"))
    if e.images_lost is not None:
        cells.append(("lost/gained", "", f"{e.images_lost}/{e.images_gained}"))
    if e.cosine_pooled is not None:
        cells.append(("cosine", "", f"{e.cosine_pooled:.4f}"))
        cells.append(("of patches", "", number(e.cosine_patch, ".4f", "")))
    if e.knn_top1 is not None:
        cells.append(("kNN top-1 %", number(e.dense_knn_top1, ".2f", ""), f"{e.knn_top1:.2f}"))
    return cells


def conditions(sweep: Sweep) -> str:
    """Where and how the times were measured, in one line."""
    c = sweep.conditions
    runs = f"all models in turns, {c['runs']} runs"
    return f"{words.timed_on(words.device(c), c, runs, c['backend'])}, sparsify {c['sparsify']}"


def seen(sweep: Sweep) -> str:
    """What the accuracy was measured on, in one line."""
    e = sweep.settings[0].evaluation
    broken = f", {e.broken} that could not be read left out" if e.broken else ""
    labels = "" if sweep.labelled else " without labels"
    return f"{e.images:,} images{labels} of {sweep.images}{broken}; calibrated on {sweep.calibration}"


def to_markdown(sweep: Sweep, prefix: str, picture: bool) -> str:
    """The sweep as GitHub Markdown; the names of its files begin with `prefix`."""
    e = sweep.settings[0].evaluation
    return words.rendered(
        "sweep.md.jinja",
        sweep=sweep,
        figures=_table(sweep),
        seen=seen(sweep),
        top1=e.top1 is not None,
        conditions=conditions(sweep),
        not_speed=profile.NOT_SPEED,
        uncounted=profile.uncounted({k: v for s in sweep.settings for k, v in s.profile.unsupported.items()}),
        picture=picture,
        prefix=prefix,
        published_dense=f"{PUBLISHED_DENSE_TOP1:g}" if published(sweep) else "",
        measured_dense=number(e.dense_top1, ".2f", ""),
        example=sweep.settings[-1].choice.name,
        settings=[
            (label(s), f"{s.choice.name}.yaml", " ".join(_keeps(s)), " ".join(map(str, _tokens(s))))
            for s in sweep.settings
        ],
    )


def _table(sweep: Sweep) -> str:
    """All settings beside dense; the first figure of `quality` has its change beside it, if that is top-1."""
    first, *others = quality(sweep.settings[0].evaluation)
    change = sweep.settings[0].evaluation.top1 is not None
    headings = ["setting", "MACs", "change", "MHSA MACs", "change", first[0], *["change"] * change]
    headings += [*(name for name, _, _ in others), "ms (p10-p90)", "speed"]
    dense = sweep.settings[0].profile.dense
    row = ["dense", words.human(dense.macs), "", words.human(dense.mhsa_macs), "", first[1], *[""] * change]
    rows = [[*row, *(cell for _, cell, _ in others), _ms(sweep.dense), "1"]]
    for s in sweep.settings:
        p, speed = s.profile, s.speed
        row = [label(s), words.human(p.macs_sparse), words.change(dense.macs, p.macs_sparse)]
        row += [words.human(p.mhsa_macs_sparse), words.change(dense.mhsa_macs, p.mhsa_macs_sparse)]
        figure, *figures = [cell for _, _, cell in quality(s.evaluation)]
        row += [figure, *[_top1_change(s.evaluation)] * change, *figures]
        rows.append([*row, _ms(s.timing), f"{speed.median:.2f}x ({speed.p10:.2f}-{speed.p90:.2f})"])
    return words.markdown_table(headings, rows)


def as_dict(sweep: Sweep, prefix: str) -> dict[str, Any]:
    """Every figure, fit for JSON. MACs per image, theoretical; ms per batch; fractions of the dense model's from 0 to 1.

    Figures of the evaluation are `sparsify.measure.accuracy.Evaluation`'s, percent from 0 to 100.
    """
    one, e = sweep.settings[0], sweep.settings[0].evaluation
    tree: dict[str, Any] = {"format": FORMAT, "model": sweep.model, "weights": sweep.weights}
    tree |= {"architecture": sweep.architecture, "classes": sweep.classes}
    tree |= {"data": sweep.images, "labelled": sweep.labelled, "images": e.images}
    tree |= {"broken": e.broken, "calibration": sweep.calibration, "seed": one.recipe.seed}
    dense: dict[str, Any] = {"macs": one.profile.dense.macs, "mhsa_macs": one.profile.dense.mhsa_macs}
    dense |= {"top1": e.dense_top1, "top5": e.dense_top5, "knn_top1": e.dense_knn_top1}
    tree |= {"dense": dense | {"latency_ms": asdict(sweep.dense)}}
    tree |= {"settings": [_setting_dict(s, prefix) for s in sweep.settings], "skipped": dict(sweep.skipped)}
    tree |= {"conditions": dict(sweep.conditions), "convert": " ".join(sweep.convert)}
    return tree | {"published": [p._asdict() for p in published(sweep)], "seconds": sweep.seconds}


def _setting_dict(s: Setting, prefix: str) -> dict[str, Any]:
    e, p, c = s.evaluation, s.profile, s.choice
    tree: dict[str, Any] = {"name": c.name, "kind": c.kind, "asked": c.asked}
    tree |= {"macs": p.macs_sparse, "macs_share": s.share, "mhsa_macs": p.mhsa_macs_sparse}
    tree |= {"mhsa_macs_share": p.mhsa_macs_sparse / p.dense.mhsa_macs, "stage_macs": p.stage_macs}
    same = "model param_count img_size crop_pct interpolation images broken".split()  # in all settings
    tree |= {k: v for k, v in e.as_dict().items() if k not in same and not k.startswith(("dense_", "throughput_"))}
    tree["top1_change"] = None if e.top1 is None else e.top1 - (e.dense_top1 or 0)
    tree |= {"top1_change_error": top1_error(e), "latency_ms": asdict(s.timing)}
    tree |= {"speed": s.speed.median, "speed_p10": s.speed.p10, "speed_p90": s.speed.p90}
    tree |= {"keeps": _keeps(s), "tokens": _tokens(s), "predicted_damage": c.damage}
    return tree | {"recipe": f"{prefix}.recipes/{c.name}.yaml", "sparsity": c.config.model_dump(mode="json")}


def outputs(prefix: Path) -> tuple[Path, Path, Path]:
    """PREFIX.md, .json and .png."""
    return Path(f"{prefix}.md"), Path(f"{prefix}.json"), Path(f"{prefix}.png")


def recipe_folder(prefix: Path) -> Path:
    """PREFIX.recipes."""
    return Path(f"{prefix}.recipes")


def write(sweep: Sweep, prefix: Path) -> tuple[list[Path], str]:
    """Writes PREFIX.md, .json, .png and .recipes in place of those of an earlier sweep; raises `BadFile` if it cannot.

    An error or Ctrl-C leaves the old ones. Returns the files and the folder; and one line if the plot failed, else ''.
    """
    name, note, recipes = prefix.name, "", recipe_folder(prefix)
    markdown, tree, picture = outputs(prefix)
    contents: dict[Path, Any] = {recipes / f"{s.choice.name}.yaml": recipe_yaml(s.recipe) for s in sweep.settings}
    try:
        contents[picture] = plot(sweep)
    except Exception as error:  # a missing font must not cost figures that took an hour
        note = f"could not draw the plot: {one_line(error)}"
    contents[markdown] = to_markdown(sweep, name, not note)
    contents[tree] = as_dict(sweep, name)
    try:
        recipes.mkdir(exist_ok=True)
        write_all(contents)
        for stale in (*recipes.glob("keep-*.yaml"), *recipes.glob("macs-*.yaml"), picture):
            if stale not in contents:  # of an earlier sweep
                stale.unlink(missing_ok=True)
    except OSError as error:
        raise BadFile(f"cannot write {markdown} and what goes with it: {one_line(error)}") from error
    return [path for path in (markdown, tree, picture) if path in contents] + [recipes], note


def _keeps(setting: Setting) -> list[str]:
    config, depth = setting.choice.config, len(setting.profile.tokens)
    return ["dense" if (keep := config.keep_of(i)) is None else f"{keep:.3g}" for i in range(depth)]


def _tokens(setting: Setting) -> list[int]:
    """Tokens into each block's attention, and out of the last block; prefix included."""
    pairs = setting.profile.tokens
    return [before for before, _ in pairs] + [pairs[-1][1]]


def _top1_change(e: Evaluation) -> str:
    if e.top1 is None or e.dense_top1 is None:
        return ""
    return f"{e.top1 - e.dense_top1:+.2f} ± {top1_error(e) or 0:.2f}"


def _ms(t: Timing) -> str:
    return f"{words.plain(t.median)} ({words.spread(t)})"
