"""Models in and out: `fpo-mlx convert`, `evaluate` and `fuse`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import (
    PATH,
    csv_option,
    gather,
    gather_sampling,
    json_option,
    preset_option,
    sampling_options,
    settings,
    write_csv,
    write_json,
)
from fpo_mlx.cli.show import Bar, listing, say, table
from fpo_mlx.config import DataConfig, Objective, ReferenceConfig
from fpo_mlx.errors import ConfigError

SHOWN = (  # rows of the table of several models; --json and --csv have every metric
    "rewards/accuracies", "policy_accuracy", "rewards/margins", "logps_per_token/chosen_change",
    "perplexity/chosen", "features/chosen", "features/rejected", "features/margin",
    "kl/chosen", "kl/rejected", "kl/margin", "answers/entropy", "answers/distinct_1",
    "answers/distinct_2", "answers/distinct_3", "answers/tokens",
)  # fmt: skip


@click.command(cls=Command)
@preset_option
@settings(DataConfig, ReferenceConfig, Objective, "init_adapter", "reference")
@click.option(
    "--adapter-path", multiple=True, help="Adapter to judge; repeatable (default: the base alone)."
)
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    default="test",
    show_default=True,
    help="Part of the data to judge on.",
)
@click.option("--kl/--no-kl", default=True, help="Measure the sequential KL (a second pass).")
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Prompts of the split to answer, for entropy and distinct-n; 0 for none.",
)
@sampling_options
@json_option
@csv_option
def evaluate(adapter_path, split, kl, samples, json_path, csv_path, **values) -> None:
    """Judge adapters on held-out pairs.

    Accuracy, margins, drift of features and of text, diversity; each with its interval.

    \b
    Example:
      fpo-mlx evaluate --model M --sae S --data pairs/ --adapter-path adapters \\
        --split valid --json scores.json
    """
    from fpo_mlx import pipeline

    sampling = gather_sampling(values)
    judged = pipeline.evaluate_all(
        gather(values), adapter_paths=adapter_path, split=split, measure_kl=kl, samples=samples,
        sampling=sampling, say=say, progress=Bar("reference"),
    )  # fmt: skip
    write_json(json_path, judged.as_dict())
    write_csv(csv_path, judged.rows())
    if judged.base is None:
        listing(next(iter(judged.adapters.values())).summary)
    else:
        table(side_by_side({name: report.summary for name, report in judged.columns.items()}))


def side_by_side(summaries: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of a table: a metric a row, a model a column, intervals in brackets."""
    rows = [["", *summaries]]
    for name in SHOWN:
        cells = [_with_interval(summary, name) for summary in summaries.values()]
        if any(cells):
            rows.append([name, *cells])
    return rows


def _with_interval(summary: Mapping[str, Any], name: str) -> str:
    if summary.get(name) is None:
        return ""
    low_high = summary.get(f"{name}/ci95")
    text = f"{summary[name]:.4g}"
    return text if low_high is None else f"{text} [{low_high[0]:.4g}, {low_high[1]:.4g}]"


@click.command(cls=Command)
@settings("model", "trust_remote_code")
@click.option("--adapter-path", help="Adapter folder. [default: adapters]")
@click.option(
    "--save-path", type=PATH, default="fused_model", show_default=True, help="Folder to write."
)
@click.option("--dequantize", is_flag=True, help="Write float weights.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Dtype of float weights."
)
@click.option("--export-gguf", is_flag=True, help="Write a GGUF as well (llama, mistral, mixtral).")
@click.option("--gguf-path", help="Name of the GGUF file. [default: ggml-model-f16.gguf]")
@click.option("--upload-repo", help="Hub repository to upload the fused model to.")
@click.option("--verify", metavar="DATA", help="Compare margin and accuracy before and after.")
@json_option
def fuse(
    adapter_path, save_path, dequantize, dtype, export_gguf, gguf_path, upload_repo, verify,
    json_path, **values,
) -> None:  # fmt: skip
    """Fuse adapters into the model, for mlx_lm.generate and LM Studio.

    \b
    Example:
      fpo-mlx fuse --model M --adapter-path adapters --save-path fused
    """
    from fpo_mlx import pipeline

    if gguf_path and not export_gguf:
        raise ConfigError(f"--gguf-path {gguf_path}: nothing is exported without --export-gguf.")
    config = gather(values)
    result = pipeline.fuse(
        config, adapter_path=adapter_path or config.train.adapter_path, save_path=save_path,
        dequantize=dequantize, dtype=dtype,
        gguf_path=(gguf_path or "ggml-model-f16.gguf") if export_gguf else None,
        upload_repo=upload_repo, verify=verify, say=say,
    )  # fmt: skip
    report = result.report
    written: dict[str, Any] = {"path": str(report.path), "fused_layers": report.fused_layers}
    written["quantized"] = report.quantized
    if result.before and result.after:
        for name, before in result.before.items():
            click.echo(f"{name:<36} {before:.5f} -> {result.after[name]:.5f}")
        written |= {"before": result.before, "after": result.after}
    write_json(json_path, written)
    kind = "quantised" if report.quantized else "float"
    click.echo(f"{report.fused_layers} layers fused, {kind}, in {report.path}")


@click.command(cls=Command)
@click.option("--hf-path", required=True, help="Hub id or folder of the model to convert.")
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
def convert(mlx_path, **values) -> None:
    """Turn a hub model into a (quantised) MLX folder, by mlx-lm.

    \b
    Example:
      fpo-mlx convert --hf-path google/gemma-2-2b-it --mlx-path gemma-4bit -q
    """
    from fpo_mlx import pipeline

    click.echo(f"model in {pipeline.convert(mlx_path=mlx_path, **values)}")
