"""`fpo-mlx sae train`."""

from __future__ import annotations

import dataclasses

import click

from fpo_mlx.cli.help import Command
from fpo_mlx.cli.options import claims, json_option, section_options, write_json
from fpo_mlx.cli.show import listing, say
from fpo_mlx.cli.train import on_signal_within
from fpo_mlx.config import SaeTrainConfig, load_section
from fpo_mlx.machine.processes import is_first
from fpo_mlx.storage.publish import upload


@click.command("train", cls=Command)
@section_options(SaeTrainConfig)
@click.option("--upload-repo", help="Hub repository to upload the SAE and its card to.")
@json_option
@claims(json_path="--json")
def train_sae(config, upload_repo, json_path, overwrite, **values) -> None:
    """Train an SAE for a model that has none, on its own activations.

    \b
    Example:
      fpo-mlx sae train --model mlx-community/SmolLM2-135M-Instruct \\
        --data chats.jsonl --minutes 30 --output my-sae
    """
    from fpo_mlx import pipeline
    from fpo_mlx.saetrain import finish

    chosen = load_section(SaeTrainConfig, {**values, "overwrite": overwrite}, config, say)
    done = pipeline.sae_train(chosen, say=say, report=_training_line, stopping=on_signal_within)
    if not is_first():
        return
    figures = {} if done.figures is None else dataclasses.asdict(done.figures)
    if done.loss is not None:
        figures["loss_recovered"] = done.loss.recovered
    listing(figures)
    click.echo(f"SAE in {done.folder}: train with --sae {done.folder}")
    write_json(json_path, {"tokens": done.tokens, **figures})
    if upload_repo:
        upload(done.folder, upload_repo, "The SAE", only=finish.PUBLISHED)
        say(f"uploaded to {upload_repo}")


def _training_line(report) -> None:
    say(
        f"{report.step:>6}/{report.steps}  loss {report.loss:.4f}  L0 {report.l0:.1f}  "
        f"dead {report.dead:.3f}  lr {report.learning_rate:.1e}  "
        f"{report.tokens_per_second:.0f} tok/s  peak {report.peak_memory_gb:.2f} GB"
    )
