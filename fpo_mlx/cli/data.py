"""Before training: `fpo-mlx check` and `fpo-mlx precompute`."""

from __future__ import annotations

from pathlib import Path

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import (
    PATH,
    READ,
    backend_option,
    claims,
    device_option,
    gather,
    json_option,
    overwrite_option,
    preset_option,
    settings,
    write_json,
)
from fpo_mlx.cli.pairs_look import check_files
from fpo_mlx.cli.show import Bar, result, say, table
from fpo_mlx.config import DataConfig, ReferenceConfig
from fpo_mlx.errors import DataError


@click.command(cls=Command)
@settings(DataConfig, "model", "trust_remote_code")
@click.option("--fix", type=PATH, metavar="OUT", help="Folder to write the good rows to.")
@json_option
@overwrite_option
@claims(json_path="--json")
def check(fix, json_path, overwrite, **values) -> None:
    """Look for what in the data would waste or spoil a run.

    Files of candidates and verdicts are looked at as `pairs check` does.
    Exit code 3 when there are rows that cannot be used. Without --model the chat template and
    lengths in tokens are not checked.

    \b
    Example:
      fpo-mlx check --model M --data pairs/ --json findings.json --fix clean/
    """
    from fpo_mlx import pipeline
    from fpo_mlx.data.findings import by_kind

    config = gather(values)
    if config.data.data and fix is None and (holds := pipeline.pairs_file(config.data)):
        source, verdicts = Path(config.data.data), holds == "verdicts"
        check_files(None if verdicts else source, (source,) * verdicts, json_path)
        return
    unit = "tokens" if config.reference.model else "letters"
    report = pipeline.check(config, fix=fix, overwrite=overwrite, say=say)
    table(
        [
            ("split", "rows", "refused", "clean", f"chosen {unit}", f"rejected {unit}", "longer"),
            *(
                (name, s.rows, s.refused, s.clean, s.chosen_length, s.rejected_length,
                 f"{s.longer_chosen:.0%} chosen")
                for name, s in report.splits.items()
            ),
        ]
    )  # fmt: skip
    click.echo()
    kinds = by_kind(report.findings)
    table((kind.first.level, kind.first.kind, kind.count, str(kind.first)) for kind in kinds)
    write_json(json_path, report.as_dict())
    if report.refused:
        faults = [str(finding) for finding in report.findings if finding.level == "refused"]
        total = sum(split.rows for split in report.splits.values())
        raise DataError(f"{report.refused} of {total} rows cannot be used:", faults)


@click.command(cls=Command)
@preset_option
@settings(DataConfig, ReferenceConfig, "top_k", "project_out")
@click.option("--output", type=PATH, help="Cache folder (default: one under the user cache).")
@click.option(
    "--adapter-path", "adapter", type=READ, help="SFT adapter that belongs to the reference."
)
@backend_option
@device_option
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test", "all"]),
    default="all",
    show_default=True,
    help="Part of the data to score.",
)
@click.option(
    "--keep-features",
    type=click.IntRange(min=1),
    metavar="N",
    help="Store the N largest features of a response, not all: smaller, and D is not exact.",
)
def precompute(output, adapter, backend, device, split, keep_features, **values) -> None:
    """Run the reference once and keep what training needs of it.

    \b
    Example:
      fpo-mlx precompute --model mlx-community/gemma-2-2b-it-4bit \\
        --sae gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55 \\
        --data pairs/ --output ref/
    """
    from fpo_mlx import pipeline

    done = pipeline.precompute(
        gather(values), output=output, adapter=adapter, backend=backend, device=device,
        split=split, keep_features=keep_features, say=say, progress=Bar("reference"),
    )  # fmt: skip
    result(f"{done.pairs} pairs, {done.rows} rows in {done.path}")
    for i, (largest, share) in enumerate(done.left_out):
        result(
            f"SAE {i}: left out {share:.3%} of the squares, no feature above {largest:.4g}. Where "
            "the policy's top features are not among those kept, D takes the reference's for 0."
        )
