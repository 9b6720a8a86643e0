"""Models in and out: `fpo-mlx convert`, `evaluate` and `fuse`."""

from __future__ import annotations

import click

from fpo_mlx.cli.options import (
    PATH,
    gather,
    json_option,
    preset_option,
    settings,
    write_json,
)
from fpo_mlx.cli.show import Bar, listing, say
from fpo_mlx.config import DataConfig, Objective, ReferenceConfig


@click.command()
@settings(DataConfig, ReferenceConfig, Objective, "init_adapter", "reference")
@preset_option
@click.option("--adapter-path", help="Adapter to judge (default: the base alone).")
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    default="test",
    show_default=True,
    help="Part of the data to judge on.",
)
@click.option("--kl/--no-kl", default=True, help="Measure the sequential KL (a second pass).")
@json_option
def evaluate(adapter_path, split, kl, json_path, **values) -> None:
    """Judge an adapter on held-out pairs: accuracy, margins, drift of features and of text.

    \b
    Example:
      fpo-mlx evaluate --model M --sae S --data pairs/ --adapter-path adapters \\
        --split valid --json scores.json
    """
    from fpo_mlx import pipeline

    report = pipeline.evaluate(
        gather(values), adapter_path=adapter_path, split=split, measure_kl=kl, say=say,
        progress=Bar("reference"),
    )  # fmt: skip
    write_json(json_path, report.as_dict())
    listing(report.summary)


@click.command()
@settings("model", "trust_remote_code")
@click.option("--adapter-path", default="adapters", show_default=True, help="Adapter folder.")
@click.option(
    "--save-path", type=PATH, default="fused_model", show_default=True, help="Folder to write."
)
@click.option("--dequantize", is_flag=True, help="Write float weights.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Dtype of float weights."
)
@click.option("--export-gguf", is_flag=True, help="Write a GGUF as well (llama, mistral, mixtral).")
@click.option(
    "--gguf-path", default="ggml-model-f16.gguf", show_default=True, help="Name of the GGUF file."
)
@click.option("--upload-repo", help="Hub repository to upload the fused model to.")
@click.option("--verify", metavar="DATA", help="Compare margin and accuracy before and after.")
@json_option
def fuse(
    adapter_path, save_path, dequantize, dtype, export_gguf, gguf_path, upload_repo, verify,
    json_path, **values,
) -> None:  # fmt: skip
    """Fuse adapters into the model: a folder for mlx_lm.generate and LM Studio.

    \b
    Example:
      fpo-mlx fuse --model M --adapter-path adapters --save-path fused --verify pairs/
    """
    from fpo_mlx import pipeline

    result = pipeline.fuse(
        gather(values), adapter_path=adapter_path, save_path=save_path, dequantize=dequantize,
        dtype=dtype, gguf_path=gguf_path if export_gguf else None, upload_repo=upload_repo,
        verify=verify, say=say,
    )  # fmt: skip
    if result.before and result.after:
        for name, before in result.before.items():
            click.echo(f"{name:<36} {before:.5f} -> {result.after[name]:.5f}")
        write_json(json_path, {"before": result.before, "after": result.after})
    kind = "quantised" if result.report.quantized else "float"
    click.echo(f"{result.report.fused_layers} layers fused, {kind}, in {result.report.path}")


@click.command()
@click.option("--hf-path", required=True, help="Hub id or folder of the model to convert.")
@click.option(
    "--mlx-path", type=PATH, default="mlx_model", show_default=True, help="Folder to write."
)
@click.option("-q", "--quantize", is_flag=True, help="Quantise the weights.")
@click.option("--q-bits", type=int, help="Bits a weight.  [default: mlx-lm's, 4]")
@click.option("--q-group-size", type=int, help="Weights a scale.  [default: mlx-lm's, 64]")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Dtype of float weights."
)
@click.option("--trust-remote-code", is_flag=True, help="Let the model run its own Python code.")
def convert(mlx_path, **values) -> None:
    """Turn a hub model into a (quantised) MLX folder, with mlx_lm.convert.

    \b
    Example:
      fpo-mlx convert --hf-path google/gemma-2-2b-it --mlx-path gemma-4bit -q --q-bits 4
    """
    from fpo_mlx import pipeline

    click.echo(f"model in {pipeline.convert(mlx_path=mlx_path, **values)}")
