"""The command line: parse, call the pipeline, print. Results on stdout, the rest on stderr."""

from __future__ import annotations

import dataclasses
import signal
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from fpo_mlx import __version__
from fpo_mlx.config import (
    PRESETS,
    SECTIONS,
    YAML_ONLY,
    DataConfig,
    Objective,
    ReferenceConfig,
    TrainConfig,
    load_config,
)
from fpo_mlx.errors import FpoError, Interrupted

EXISTING = click.Path(path_type=Path)


class Group(click.Group):
    """Expected errors become one plain message and their own exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FpoError as error:
            click.echo(f"fpo-mlx: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("fpo-mlx: interrupted", err=True)
            ctx.exit(Interrupted("").exit_code)


def say(text: str) -> None:
    click.echo(text, err=True)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fpo-mlx")
def main() -> None:
    """Align a language model on your own machine, held in place by SAE features (FPO).

    \b
    fpo-mlx demo                      the whole path on a small built-in example
    fpo-mlx train --help              your own model, SAE and preference pairs
    """


def settings(*sections: type, skip: tuple[str, ...] = ()) -> Callable:
    """Options for every field of these sections, with the defaults that stand there."""

    def decorate(command: Callable) -> Callable:
        for section in reversed(sections):
            hints = typing.get_type_hints(section)
            for field in reversed(dataclasses.fields(section)):
                if field.name not in (*YAML_ONLY, *skip):
                    command = _option(field, hints[field.name])(command)
        return click.option(
            "-c", "--config", type=EXISTING, help="YAML file of settings (underscored names)."
        )(command)

    return decorate


def _option(field: dataclasses.Field, hint: Any) -> Callable:
    name = "--" + field.name.replace("_", "-")
    help = field.metadata["help"] + "."
    if field.default not in (None, (), "", dataclasses.MISSING):
        help += f"  [default: {field.default}]"
    if hint is bool:
        return click.option(f"{name}/--no-{name[2:]}", field.name, default=None, help=help)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return click.option(name, field.name, type=click.Choice(arguments), help=help)
    if typing.get_origin(hint) is tuple:
        return click.option(name, field.name, multiple=True, help=help)
    kind = next((a for a in arguments if a is not type(None)), hint)
    return click.option(name, field.name, type=kind, help=help)


preset_option = click.option(
    "--objective", type=click.Choice(list(PRESETS)), help="Preset of the objective.  [default: fpo]"
)
json_option = click.option("--json", "json_path", type=EXISTING, help="Write the result here.")


def gather(values: dict[str, Any]) -> Any:
    """Flags that were given, over the YAML file, over the defaults."""
    path = values.pop("config", None)
    known = {f.name for section in SECTIONS for f in dataclasses.fields(section)} | {"objective"}
    flags = {k: v for k, v in values.items() if k in known and v not in (None, ())}
    return load_config(flags, path)


def write_json(path: Path | None, value: Any) -> None:
    if path is not None:
        from fpo_mlx import files

        files.write_json(path, value)


class Bar:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, what: str) -> None:
        self._what, self._bar = what, None

    def __call__(self, report: Any) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=report.total_pairs, desc=self._what, unit="pair", disable=None, leave=False
            )
        self._bar.update(report.pairs - self._bar.n)


@main.command()
@settings(DataConfig, ReferenceConfig)
@preset_option
@click.option("--output", type=EXISTING, help="Cache folder (default: one under the user cache).")
@click.option("--adapter-path", "adapter", help="SFT adapter that belongs to the reference.")
@click.option("--backend", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True)
@click.option("--device", help="Device of the torch backend: cpu, cuda, mps.")
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test", "all"]),
    default="all",
    show_default=True,
)
def precompute(output, adapter, backend, device, split, **values) -> None:
    """Run the frozen reference once over the data and keep what training needs of it.

    \b
    Example:
      fpo-mlx precompute --model mlx-community/gemma-2-2b-it-4bit \\
        --sae gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55 --data pairs/ --output ref/
    """
    from fpo_mlx import pipeline

    result = pipeline.precompute(
        gather(values), output=output, adapter=adapter, backend=backend, device=device,
        split=split, say=say, progress=Bar("reference"),
    )  # fmt: skip
    click.echo(f"{result.pairs} pairs, {result.rows} rows in {result.path}")


@main.command()
@settings(DataConfig, ReferenceConfig, Objective, TrainConfig)
@preset_option
def train(**values) -> None:
    """Train LoRA adapters on preference pairs. Precomputes the reference if need be.

    \b
    Example:
      fpo-mlx train --model mlx-community/gemma-2-2b-it-4bit --data pairs/ \\
        --sae gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55 \\
        --iters 300 --batch-size 2 --learning-rate 2e-5 --adapter-path adapters
    """
    from fpo_mlx import pipeline, trackers

    config = gather(values)
    track = trackers.open_trackers(config.train.report_to, config.train.project_name, config)
    show = Progress(config)
    reports = pipeline.train(config, say=show.say, progress=Bar("reference"), arm=on_signal)
    for report in reports:
        show(report)
        track(report)
    show.close()
    click.echo(f"adapters in {config.train.adapter_path}")


class Progress:
    """A line per report; on a terminal a bar below them."""

    def __init__(self, config: Any) -> None:
        self._config, self._bar = config, None

    def say(self, text: str) -> None:
        if self._bar is None:
            say(text)
        else:
            self._bar.write(text, file=sys.stderr)

    def __call__(self, report: Any) -> None:
        kind = type(report).__name__
        if kind == "StepReport":
            self._advance(report.iteration)
            for warning in report.warnings:
                self.say(f"warning: {warning}")
            self.say(
                f"{report.iteration:>6}  loss {report.loss:.4f}  {describe(report.metrics)}  "
                f"lr {report.learning_rate:.1e}  {report.tokens_per_second:.0f} tok/s  "
                f"peak {report.peak_memory_gb:.2f} GB"
            )
        elif kind == "ValidReport":
            best = "  best so far" if report.best else ""
            self.say(
                f"{report.iteration:>6}  valid {report.loss:.4f}  {describe(report.metrics)}  "
                f"{report.pairs} pairs in {report.seconds:.0f} s{best}"
            )
        elif report.numbered:
            self.say(f"{report.iteration:>6}  saved")

    def _advance(self, iteration: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            total = self._config.train.iters
            self._bar = tqdm(total=total, desc="train", unit="it", disable=None, leave=False)
        self._bar.update(iteration - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def describe(metrics: Mapping[str, float]) -> str:
    """The few figures that belong on a line: accuracy never stands alone."""
    text = (
        f"acc {metrics['rewards/accuracies']:.2f}  margin {metrics['rewards/margins']:.4f}  "
        f"chosen {metrics['logps_per_token/chosen_change']:+.4f} nats/token"
    )
    if "features/chosen" in metrics:
        text += f"  D {metrics['features/chosen']:.3g} / {metrics['features/rejected']:.3g}"
    if "kl/chosen" in metrics:
        text += f"  KL {metrics['kl/chosen']:.3g} / {metrics['kl/rejected']:.3g}"
    return text


def on_signal() -> Callable[[], int | None]:
    """Ctrl-C and SIGTERM end the run after the update in work; a second Ctrl-C ends it at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        del frame
        seen.append(128 + number)
        say("stopping after this update; press again to stop at once")
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return lambda: seen[0] if seen else None


@main.command()
@settings(DataConfig, ReferenceConfig, Objective)
@preset_option
@click.option("--adapter-path", help="Adapter to judge (default: the base alone).")
@click.option("--init-adapter", help="Adapter that belongs to the reference.")
@click.option("--reference", help="Reference cache (default: one under the user cache).")
@click.option(
    "--split", type=click.Choice(["train", "valid", "test"]), default="test", show_default=True
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
    for name, value in report.summary.items():
        click.echo(f"{name:<40} {_number(value)}")


def _number(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " … ".join(_number(v) for v in value)
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@main.command()
@click.option("--model", required=True, help="Model folder or hub id.")
@click.option("--adapter-path", default="adapters", show_default=True, help="Adapter folder.")
@click.option("--save-path", type=EXISTING, default="fused_model", show_default=True)
@click.option("--dequantize", is_flag=True, help="Write float weights.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]))
@click.option("--export-gguf", is_flag=True, help="Write a GGUF as well (llama, mistral, mixtral).")
@click.option("--gguf-path", default="ggml-model-f16.gguf", show_default=True)
@click.option("--upload-repo", help="Hub repository to upload the fused model to.")
@click.option("--verify", metavar="DATA", help="Compare margin and accuracy before and after.")
@click.option("--trust-remote-code/--no-trust-remote-code", default=None)
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


@main.group()
def sae() -> None:
    """Sparse autoencoders: what is public, what it is, what it says."""


@sae.command("info")
@click.argument("spec")
@click.option("--model", help="Check that it fits this model.")
@click.option("--layer", type=int)
@click.option("--site")
@click.option("--sae-format")
@click.option("--allow-pickle/--no-allow-pickle", default=None)
@json_option
def sae_info(spec, json_path, **values) -> None:
    """Say what an SAE is: family, activation, width, site, fingerprint.

    \b
    Example:
      fpo-mlx sae info gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55
    """
    from fpo_mlx import pipeline

    info = pipeline.sae_info(spec, gather(values), say)
    write_json(json_path, info)
    for name, value in info.items():
        click.echo(f"{name:<12} {value}")
