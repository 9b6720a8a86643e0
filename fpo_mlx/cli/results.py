"""Models in and out: `fpo-mlx convert`, `evaluate` and `fuse`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import (
    PATH,
    READ,
    READING,
    adapter_scale_option,
    claims,
    csv_option,
    gather,
    gather_sampling,
    json_option,
    judging_preset_option,
    overwrite_option,
    sampling_options,
    settings,
    write_csv,
    write_json,
)
from fpo_mlx.cli.show import Bar, listing, say, table
from fpo_mlx.config import DataConfig, Objective, ReferenceConfig
from fpo_mlx.errors import ConfigError
from fpo_mlx.records import KEPT_BITS, FusedForm
from fpo_mlx.storage.publish import upload

if TYPE_CHECKING:
    from fpo_mlx.pipeline import Bound

GGUF_NAMES = {None: "f16", "float16": "f16", "float32": "f32", "bfloat16": "bf16"}
SHOWN = (  # rows of the table of several models; --json and --csv have every metric
    "rewards/accuracies", "policy_accuracy", "rewards/margins", "logps_per_token/chosen_change",
    "perplexity/chosen", "features/chosen", "features/rejected", "features/margin",
    "drift/rejected", "kl/chosen", "kl/rejected", "kl/margin", "answers/entropy",
    "answers/distinct_1", "answers/distinct_2", "answers/distinct_3", "answers/tokens",
)  # fmt: skip
ROOTS = {"drift/rejected": "drift, rejected"}  # shown as --target-drift and --at-drift name it


@click.command(cls=Command)
@judging_preset_option
@settings(DataConfig, ReferenceConfig, Objective, "init_adapter", "reference")
@click.option(
    "--adapter-path",
    type=READ,
    multiple=True,
    help="Adapter to judge; repeatable (default: the base alone).",
)
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    default="test",
    show_default=True,
    help="Part of the data to judge on.",
)
@click.option("--kl/--no-kl", default=True, help="Measure the sequential KL (a second pass).")
@adapter_scale_option
@click.option("--adapter-scales", metavar="LIST", help="Several, such as 0.1,0.25,0.5,1.")
@click.option("--at-kl", type=float, help="Say which scale has this KL of rejected answers, nats.")
@click.option("--at-drift", type=float, help="Say which scale has this drift of the features.")
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Prompts of the split to answer, for entropy and distinct-n; 0 for none.",
)
@sampling_options()
@json_option
@csv_option
@overwrite_option
@claims(json_path="--json", csv_path="--csv")
def evaluate(
    adapter_path, split, kl, adapter_scale, adapter_scales, at_kl, at_drift, samples, json_path,
    csv_path, **values,
) -> None:  # fmt: skip
    """Judge adapters on held-out pairs.

    Accuracy, margins, drift of features and of text, diversity; each with its interval.

    \b
    Example:
      fpo-mlx evaluate --model M --sae S --data pairs/ --adapter-path adapters \\
        --split valid --json adapters/evaluate.json
    """
    from fpo_mlx import pipeline

    sampling = gather_sampling(values)
    if adapter_scales and adapter_scale != 1.0:
        raise ConfigError("--adapter-scale and --adapter-scales: give one of them.")
    scales = parse_scales(adapter_scales) if adapter_scales else (adapter_scale,)
    config = gather(values)
    activations = config.objective.constraint == "activations"  # --layer says of which block
    _check_meeting(scales, at_kl, at_drift, kl=kl, drift=bool(config.reference.sae) or activations)
    judged = pipeline.evaluate_all(
        config, adapter_paths=adapter_path, scales=scales, split=split, measure_kl=kl,
        samples=samples, sampling=sampling, say=say, progress=Bar("reference"),
    )  # fmt: skip
    if judged.base is None:
        listing(next(iter(judged.adapters.values())).summary)
    else:
        table(side_by_side({name: report.summary for name, report in judged.columns.items()}))
    for figure, target in (("kl/rejected", at_kl), ("drift/rejected", at_drift)):
        if target is None:
            continue
        for path, reports in judged.by_path().items():
            sentence = meeting(reports, figure, target)
            click.echo(f"{path}: {sentence}" if len(adapter_path) > 1 else sentence)
    write_json(json_path, judged.as_dict())  # last: what was found is seen, come what may
    write_csv(csv_path, judged.rows())


def parse_scales(text: str) -> tuple[float, ...]:
    """Raises: ConfigError for what is no list of numbers."""
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise ConfigError(
            f"--adapter-scales {text}: wanted numbers and commas, as 0.1,0.5,1."
        ) from error


def _check_meeting(
    scales: Sequence[float], at_kl: float | None, at_drift: float | None, *, kl: bool, drift: bool
) -> None:
    """kl, drift: whether it is measured. Raises: ConfigError where no scale could be said."""
    asked = (
        ("--at-kl", at_kl, kl, "leave --no-kl out"),
        ("--at-drift", at_drift, drift, "add --sae"),
    )
    for flag, target, measured, way in asked:
        if target is None:
            continue
        if not measured:
            raise ConfigError(f"{flag} {target:g}: found that it is not measured; {way}.")
        if sum(scale > 0 for scale in scales) < 2:
            raise ConfigError(
                f"{flag} {target:g}: found no two scales above 0 for it to lie between; add "
                "--adapter-scales, as 0.1,0.25,0.5,1."
            )


def meeting(reports: Sequence[Any], figure: str, target: float) -> str:
    """Which part of one adapter meets a KL or a drift r (the root of relative D), in a sentence."""
    from fpo_mlx.judge.frontier import scale_at

    seen = [(r.adapter_scale, r.summary[figure]) for r in reports if figure in r.summary]
    name, wanted = ("KL", target) if figure == "kl/rejected" else ("drift", target**2)
    scale = scale_at([s for s, _ in seen], [value for _, value in seen], wanted)
    if scale is None:
        return f"no scale between those judged has a {name} of {target:g}; add --adapter-scales."
    return f"--adapter-scale {scale:.3g} has a {name} of {target:g}, between those judged."


def side_by_side(summaries: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of a table: a metric a row, a model a column, intervals in brackets."""
    rows = [["", *summaries]]
    for name in SHOWN:
        cells = [_with_interval(summary, name) for summary in summaries.values()]
        if any(cells):
            rows.append([ROOTS.get(name, name), *cells])
    return rows


def _with_interval(summary: Mapping[str, Any], name: str) -> str:
    if summary.get(name) is None:
        return ""
    shown = [summary[name], *(summary.get(f"{name}/ci95") or ())]
    text, *low_high = (f"{x**0.5 if name in ROOTS else x:.4g}" for x in shown)
    return f"{text} [{', '.join(low_high)}]" if low_high else text


@click.command(cls=Command)
@settings(
    "model", "trust_remote_code", "chat_template", "chat_template_args", "sae", "layer", "site",
    *READING, "top_k", "valid_share",
)  # fmt: skip
@click.option("--adapter-path", type=READ, help="Adapter folder. [default: adapters]")
@click.option(
    "--save-path", type=PATH, default="fused_model", show_default=True, help="Folder to write."
)
@adapter_scale_option
@click.option("--dequantize", is_flag=True, help="Write float weights.")
@click.option(
    "--keep-bits", type=click.Choice(["base", "5", "6", "8"]),
    help="Bits of the layers with adapters, where a quantised model has fewer; base: leave them as "
    f"they are. [default: {KEPT_BITS}]",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Dtype of float weights."
)
@click.option(
    "--export-gguf", is_flag=True,
    help="Write a GGUF as well: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text.",
)  # fmt: skip
@click.option(
    "--gguf-path",
    help="Name of the GGUF file. [default: ggml-model-f16.gguf; --dtype sets the type]",
)
@click.option("--upload-repo", help="Hub repository to upload the fused model to.")
@click.option(
    "--verify",
    type=READ,
    metavar="DATA",
    help="Compare margin and accuracy before and after, on its test split, else valid, else train.",
)
@click.option(
    "--target-kl", type=float,
    help="Take the largest part of the adapter whose KL on the pairs of --verify, nats per "
    "rejected answer, is within this.",
)  # fmt: skip
@click.option(
    "--target-drift", type=float,
    help="The same for the drift of the --sae's features: .1 lets them move by a tenth.",
)  # fmt: skip
@json_option
@overwrite_option
@claims(json_path="--json")
def fuse(
    adapter_path, save_path, adapter_scale, dequantize, keep_bits, dtype, export_gguf, gguf_path,
    upload_repo, verify, target_kl, target_drift, json_path, overwrite, **values,
) -> None:  # fmt: skip
    """Fuse adapters into the model, for mlx_lm.generate.

    For transformers, which does not read MLX's packing, a quantised base needs --dequantize.

    \b
    Example:
      fpo-mlx fuse --model M --adapter-path adapters --save-path fused
    """
    from fpo_mlx import pipeline

    if gguf_path and not export_gguf:
        raise ConfigError(f"--gguf-path {gguf_path}: nothing is exported without --export-gguf.")
    config = gather(values)
    form = FusedForm(
        dequantize, int(keep_bits) if keep_bits and keep_bits != "base" else keep_bits, dtype,
        (gguf_path or f"ggml-model-{GGUF_NAMES[dtype]}.gguf") if export_gguf else None,
        adapter_scale,
    )  # fmt: skip
    result = pipeline.fuse(
        config, form, adapter_path=adapter_path or config.train.adapter_path,
        save_path=save_path, bound=_bound(target_kl, target_drift), verify=verify,
        overwrite=overwrite, say=say,
    )  # fmt: skip
    report = result.report
    written: dict[str, Any] = {"path": str(report.path), "fused_layers": report.fused_layers}
    written["adapter_scale"] = result.scale
    if (within := result.within) is not None:
        written |= {within.bound.kind: within.found, "bound": within.bound.value}
    written["quantized"] = report.quantized
    for name, found in (("raised", report.raised), ("rounding", report.kept)):
        written |= {name: asdict(found)} if found is not None else {}
    if result.before and result.after:
        for name, before in result.before.items():
            click.echo(f"{name:<36} {before:.5f} -> {result.after[name]:.5f}")
        written |= {"before": result.before, "after": result.after}
    kind = "quantised" if report.quantized else "float"
    click.echo(f"{report.fused_layers} layers fused, {kind}, in {report.path}")
    write_json(json_path, written)
    if upload_repo:  # last: what was found stands there whether the hub takes it or not
        upload(report.path, upload_repo, "The fused model")
        say(f"uploaded to {upload_repo}")


def _bound(kl: float | None, drift: float | None) -> Bound | None:
    from fpo_mlx.pipeline import Bound

    if kl is not None and drift is not None:
        raise ConfigError("--target-kl and --target-drift: give one of them.")
    if kl is not None:
        return Bound("kl", kl)
    return None if drift is None else Bound("drift", drift)


@click.command(cls=Command)
@click.option(
    "--hf-path", type=READ, required=True, help="Hub id or folder of the model to convert."
)
@click.option(
    "--mlx-path", type=PATH, default="mlx_model", show_default=True, help="Folder to write."
)
@click.option("-q", "--quantize", is_flag=True, help="Quantise the weights.")
@click.option("--q-bits", type=int, help="Bits a weight. [default: mlx-lm's, 4]")
@click.option("--q-group-size", type=int, help="Weights a scale. [default: mlx-lm's, 64]")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Dtype of float weights."
)
@click.option("--trust-remote-code", is_flag=True, help="Let the model run its own Python code.")
@overwrite_option
def convert(mlx_path, **values) -> None:
    """Turn a hub model into a (quantised) MLX folder, by mlx-lm.

    \b
    Example:
      fpo-mlx convert --hf-path google/gemma-2-2b-it --mlx-path gemma-4bit -q
    """
    from fpo_mlx import pipeline

    click.echo(f"model in {pipeline.convert(mlx_path=mlx_path, **values)}")
