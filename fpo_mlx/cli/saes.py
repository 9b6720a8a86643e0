"""`fpo-mlx sae list | info | convert | encode | evaluate`."""

from __future__ import annotations

import click

from fpo_mlx.cli.help import Group
from fpo_mlx.cli.options import (
    PATH,
    READ,
    READING,
    claims,
    gather,
    json_option,
    overwrite_option,
    put,
    settings,
    write_json,
)
from fpo_mlx.cli.show import Steps, listing, say, table
from fpo_mlx.config import DataConfig


@click.group(cls=Group)
def sae() -> None:
    """Sparse autoencoders: list, info, evaluate, train, convert.

    \b
    Example:
      fpo-mlx sae list --model google/gemma-2-2b-it
    """


@sae.command("list")
@click.option("--model", help="Only those for this model, its base or its chat sibling.")
@json_option
@overwrite_option
@claims(json_path="--json")
def list_(model, json_path) -> None:
    """List the public SAEs that are known by name.

    \b
    Example:
      fpo-mlx sae list --model mlx-community/gemma-2-2b-it-4bit
    """
    from fpo_mlx import pipeline

    rows = pipeline.sae_list(model)
    write_json(json_path, rows)
    if not rows:
        say(
            f"no public SAE is known for {model}. `fpo-mlx sae train --model {model}` makes one; "
            "`fpo-mlx train --objective tdpo2` (at a lower rate, 5e-6) needs none; an SAE that is "
            "not in this table is given as owner/repo/path"
        )
        return
    columns = ("release", "model", "site", "layers", "widths", "example")
    table([columns, *([", ".join(r[c]) if c == "widths" else r[c] for c in columns] for r in rows)])


@sae.command()
@click.argument("spec", type=READ)
@settings("model", "layer", "site", *READING)
@json_option
@overwrite_option
@claims(json_path="--json")
def info(spec, json_path, **values) -> None:
    """Say what an SAE is, and whether it fits a model.

    Family, activation, width, site, fingerprint.

    \b
    Example:
      fpo-mlx sae info gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55
    """
    from fpo_mlx import pipeline

    about = pipeline.sae_info(spec, gather(values), say)
    listing(about)
    write_json(json_path, about)


@sae.command()
@click.argument("spec", type=READ)
@click.option("--output", type=PATH, required=True, help="Folder to write.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16", "int8"]), default="float32",
    show_default=True, help="Of the stored weights; SAELens reads all but int8.",
)  # fmt: skip
@settings("layer", "site", *READING)
@overwrite_option
def convert(spec, output, dtype, overwrite, **values) -> None:
    """Write an SAE in SAELens' layout.

    \b
    Example:
      fpo-mlx sae convert gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55 \\
        --output my-sae --dtype float16
    """
    from fpo_mlx import pipeline

    done = pipeline.sae_convert(
        spec, gather(values), output=output, dtype=dtype, overwrite=overwrite, say=say
    )
    click.echo(f"{done.architecture}, {done.dtype}, {done.size / 1e6:.1f} MB in {done.folder}")


@sae.command()
@settings("sae", *READING)
@click.option("--input", type=PATH, required=True, help=".npy of vectors, [N, D].")
@click.option("--output", type=PATH, required=True, help=".npy of activations to write, [N, F].")
@overwrite_option
@claims(output="--output")
def encode(input, output, **values) -> None:
    """Feature activations of given vectors, without a model.

    \b
    Example:
      fpo-mlx sae encode --sae my-sae --input vectors.npy --output activations.npy
    """
    from fpo_mlx import pipeline

    acts = pipeline.sae_encode(gather(values), input=input, say=say)
    written = put(output, lambda name: pipeline.write_activations(name, acts))
    click.echo(f"{len(acts)} x {acts.shape[1]} activations in {written}")


@sae.command()
@settings(DataConfig, "model", "sae", "layer", "site", *READING, "trust_remote_code")
@click.option(
    "--adapter-path", type=READ, help="Adapter that belongs to the model that is looked at."
)
@click.option(
    "--sequences", type=click.IntRange(min=1), default=64, show_default=True,
    help="Answers, chats or texts to look at, spread evenly over the data.",
)  # fmt: skip
@click.option(
    "--ablation", type=click.Choice(["zero", "mean"]), default="zero", show_default=True,
    help="What stands for nothing where loss recovered is measured.",
)  # fmt: skip
@json_option
@overwrite_option
@claims(json_path="--json")
def evaluate(adapter_path, sequences, ablation, json_path, **values) -> None:
    """Say how well an SAE reads a model.

    L0, unexplained variance, dead features, loss recovered.

    Rows of --data: preference pairs, {"messages": [...]} or {"text": ...}; without --data the
    demo's pairs. Warnings say what the figures call wrong.

    \b
    Example:
      fpo-mlx sae evaluate --model M --sae S --data pairs/ --json fit.json
    """
    from fpo_mlx import pipeline

    report = pipeline.sae_evaluate(
        gather(values), adapter_path=adapter_path, sequences=sequences, ablation=ablation, say=say,
        progress=Steps("passes"),
    )  # fmt: skip
    listing(report.as_dict())
    for warning in report.warnings:
        say(f"warning: {warning}")
    write_json(json_path, report.as_dict() | {"warnings": list(report.warnings)})
