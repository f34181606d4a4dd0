"""Commands that measure: `eval`, `fd`, `stats`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from core_tensor.app.cli import device_option, emit, json_option, out_option, seed_option, table, threads_option

from frechet_gan.choices import ESTIMATORS, RESIZES, Estimator

if TYPE_CHECKING:
    from frechet_gan.frechet.stats import FeatureStats

_ENCODERS = (
    "efficientnet-lite0|1|2, inception:FILE, dinov2:FILE, clip:FILE (OpenAI's), openclip:FILE (LAION's), pixels, "
    "pixels:SIZE, mobilenet:FILE.npz, torchvision:MODEL or timm:MODEL"
)
_encoder_option = click.option("--encoder", default="efficientnet-lite0", help=f"{_ENCODERS}.")
_images = click.Path(exists=True, path_type=Path)
_reader_options = [
    click.option("--resize", default="native", type=click.Choice(RESIZES), help="How images reach the encoder's size."),
    click.option("--batch", default=64, type=click.IntRange(1), help="Images per batch."),
    click.option("--workers", default=0, type=click.IntRange(0), help="Processes that read and resize images."),
    click.option("--num", type=click.IntRange(16), help="Random choice of this many images. [default: all]"),
    click.option(
        "--cache", type=click.Path(file_okay=False), help="Folder that keeps features by the content of the images."
    ),
    device_option,
    threads_option,
    json_option,
]
_size_option = click.option(
    "--size", type=click.IntRange(1), help="Resize to this height and width, in pixels. [default: the encoder's]"
)


def _with_reader(command: Any) -> Any:
    for option in reversed(_reader_options):
        command = option(command)
    return command


@click.command()
@click.argument("images", type=_images)
@out_option("npz file to write.", required=True)
@_encoder_option
@_size_option
@seed_option
@_with_reader
def stats(images: Path, out: Path, encoder: str, num: int | None, seed: int, as_json: bool, **options: Any) -> None:
    """Mean and covariance of the features of IMAGES (folder, zip or npz), as npz (mu, sigma, count, encoder)."""
    from frechet_gan.evaluation.compare import Reader, choose
    from frechet_gan.images.sources import open_images

    if out.suffix != ".npz":
        raise ValueError(f"out: expected a name ending in .npz, got {out}")
    source = open_images(images)
    _say(source.note())
    found = Reader(encoder, **options).stats(source, None, choose(source, num, seed, str(source.path)))
    found.save(out)
    result = {
        "out": str(out),
        "encoder": encoder,
        "identity": found.encoder,
        "count": found.count,
        "width": found.dim,
        "skipped": len(source.skipped),
    }
    emit(result, as_json, f"{out}: {found.count} images, {found.dim} features of {encoder}")


def _say(note: str | None) -> None:
    """Print a note on standard error."""
    if note is not None:
        click.echo(f"note: {note}", err=True)


@click.command()
@click.argument("a", type=_images)
@click.argument("b", type=_images)
@click.option("--estimator", default="plugin", type=click.Choice(ESTIMATORS), help="Estimator of the distance.")
@click.option("--confidence", default=0.95, type=click.FloatRange(0, 1, True, True), help="Coverage of the interval.")
@click.option("--seeds", default=1, type=click.IntRange(1), help="Average over this many random splits.")
@_encoder_option
@_size_option
@_with_reader
def fd(
    a: Path,
    b: Path,
    estimator: Estimator,
    confidence: float,
    seeds: int,
    encoder: str,
    num: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Frechet distance between A and B: images (folder, zip or npz), or npz files of statistics (taken as exact).

    Only the estimator rtd has a confidence interval: around the plug-in, which is biased, none would hold.
    """
    from frechet_gan.evaluation.compare import Reader, check_encoders, choose, is_stats, shared_channels
    from frechet_gan.frechet.estimators import estimate_frechet
    from frechet_gan.frechet.stats import FeatureStats
    from frechet_gan.images.sources import open_images

    # 1. read: statistics as they are, images through the encoder
    loaded = [FeatureStats.load(p) if is_stats(p) else open_images(p) for p in (a, b)]
    sources = [s for s in loaded if not isinstance(s, FeatureStats)]
    given = [s for s in loaded if isinstance(s, FeatureStats)]
    for source in sources:
        _say(source.note())
    if not sources:
        check_encoders(given[0], given[1])
        _between_stats(given[0], given[1], estimator, as_json)
        return
    reader = Reader(encoder, **options)
    for side in given:
        _check_reader(side, reader.identity)
    channels = shared_channels(sources)
    features = [reader.features(s, channels, choose(s, num, 0, str(s.path)))[0] for s in sources]
    # 2. estimate, averaged over splits
    left, right = features[0], given[0] if given else features[1]
    runs = [estimate_frechet(left, right, estimator, confidence=confidence, seed=s) for s in range(seeds)]
    values = [r.value for r in runs]
    value = sum(values) / seeds
    first = runs[0]
    half = None if first.low is None or first.high is None else (first.high - first.low) / 2
    width = left.shape[1]
    fewest = min(n for n in (first.count_x, first.count_y) if n)
    spread = (sum((v - value) ** 2 for v in values) / (seeds - 1)) ** 0.5 if seeds > 1 else 0.0
    warning = (
        f"{fewest} images for {width} features: below 4 per feature the plug-in's bias exceeds what it measures"
        if fewest < 4 * width and estimator == "plugin"
        else None
    )
    result = {
        "fd": value,
        "low": None if half is None else value - half,
        "high": None if half is None else value + half,
        "estimator": estimator,
        "confidence": confidence,
        "seed_spread": spread,
        "encoder": encoder,
        "identity": reader.identity,
        "counts": [first.count_x, first.count_y],
        "width": width,
        "skipped": [len(s.skipped) for s in sources],
        "warning": warning,
    }
    interval = "" if half is None else f"  [{value - half:.6g}, {value + half:.6g}]"
    text = f"Frechet distance {value:.6g}{interval}  ({estimator}, {encoder})"
    emit(result, as_json, text + (f"\nwarning: {warning}" if warning else ""))


def _check_reader(side: "FeatureStats", identity: str | None) -> None:
    """Refuse statistics that another encoder made."""
    if side.encoder is not None and side.encoder != identity:
        raise ValueError(f"encoder: expected `{side.encoder}`, which made the statistics, got `{identity}`")


def _between_stats(left: "FeatureStats", right: "FeatureStats", estimator: str, as_json: bool) -> None:
    from frechet_gan.frechet.distance import frechet_distance

    if estimator != "plugin":
        raise ValueError(f"estimator: expected plugin between two files of statistics, got {estimator}")
    value = float(frechet_distance(left, right))
    result = {"fd": value, "estimator": "plugin", "encoder": left.encoder, "counts": [left.count, right.count]}
    emit(result, as_json, f"Frechet distance {value:.6g}")


@click.command("eval")
@click.argument("generated", type=_images)
@click.argument("real", type=_images)
@click.option("--encoder", default="efficientnet-lite0", help=f"One or several, separated by commas: {_ENCODERS}.")
@click.option("--confidence", default=0.95, type=click.FloatRange(0, 1, True, True), help="Coverage of the interval.")
@seed_option
@_with_reader
def evaluate(
    generated: Path,
    real: Path,
    encoder: str,
    confidence: float,
    seed: int,
    num: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare GENERATED with REAL images: folders, zip files of images, or npz files with arr_0.

    Per encoder: the Frechet distance as papers report it (FID with inception:FILE), its debiased estimate with an
    interval, KID, CMMD, precision, recall, density, coverage, the ratio to what real images score, and alarms.
    """
    from frechet_gan.evaluation.compare import compare

    names = [name for name in encoder.split(",") if name]
    found = compare(generated, real, names, num=num, confidence=confidence, seed=seed, **options)
    for note in found["notes"]:
        _say(note)
    emit(found, as_json, lambda: _report(found))


def _report(found: dict[str, Any]) -> str:
    """The report as a table: a row per figure with its sample and cost, a column per encoder."""
    views = found["encoders"]
    debiased = {id(v): next(e for e in v["distance"] if e != "plugin") for v in views}

    def interval(view: dict[str, Any]) -> str:
        name = debiased[id(view)]
        ends = "too few for an interval" if view["low"] is None else f"{view['low']:.4g} to {view['high']:.4g}"
        return f"{view['distance'][name]:.4g} ({name}; {ends})"

    figures: list[tuple[str, Any, str]] = [
        ("Frechet distance (plug-in)", lambda v: f"{v['distance']['plugin']:.5g}", "plugin"),
        (f"debiased, with a {100 * found['confidence']:g} % interval", interval, "debiased"),
        ("over real against real (FDr)", lambda v: f"{v['ratio']:.3g}", "ratio"),
        ("KID x 1000, 20 subsets", lambda v: f"{1000 * v['kid']:.3g} +- {1000 * v['kid_spread']:.2g}", "kid"),
        ("CMMD, of these features", lambda v: f"{v['cmmd']:.3g}", "cmmd"),
        ("precision / recall", lambda v: f"{v['precision']:.3f} / {v['recall']:.3f}", "manifold"),
        ("density / coverage", lambda v: f"{v['density']:.3f} / {v['coverage']:.3f}", ""),
        ("near copies of real images", lambda v: f"{100 * v['memorized']:.1f} %", "memorized"),
        ("number of features", lambda v: str(v["width"]), "encode"),
    ]
    rows = []
    for title, show, key in figures:
        keys = [debiased[id(v)] if key == "debiased" else key for v in views]
        sizes = {v["rows"][k] for v, k in zip(views, keys, strict=True) if k in v["rows"]}
        took = [v["seconds"][k] for v, k in zip(views, keys, strict=True) if k in v["seconds"]]
        row = {"figure": title, **{str(v["encoder"]): show(v) for v in views}}
        row["images, generated / real"] = ", ".join(f"{a} / {b}" for a, b in sorted(sizes))
        rows.append(row | {"seconds": f"{sum(took):.1f}" if took else ""})
    rows[-1]["images, generated / real"] = f"{views[0]['count']} / {views[0]['real_count']}"
    return "\n".join([table(rows), *(f"alarm: {a}" for a in found["alarms"])])
