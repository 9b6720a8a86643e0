"""The command line: parse, call the pipeline, print. Results on stdout, the rest on stderr."""

from __future__ import annotations

from typing import Any

import click

from fpo_mlx import __version__
from fpo_mlx.cli.caches import cache
from fpo_mlx.cli.chat import chat
from fpo_mlx.cli.compare import compare
from fpo_mlx.cli.data import check, precompute
from fpo_mlx.cli.export import export
from fpo_mlx.cli.features import features
from fpo_mlx.cli.features_data import data as features_data
from fpo_mlx.cli.features_show import show as features_show
from fpo_mlx.cli.help import CONTEXT, Group
from fpo_mlx.cli.machine import demo, doctor
from fpo_mlx.cli.pairs import pairs
from fpo_mlx.cli.plan import plan
from fpo_mlx.cli.report import report
from fpo_mlx.cli.results import convert, evaluate, fuse
from fpo_mlx.cli.rounds import rounds
from fpo_mlx.cli.sae_train import train_sae
from fpo_mlx.cli.saes import sae
from fpo_mlx.cli.show import unheard
from fpo_mlx.cli.train import train
from fpo_mlx.errors import FpoError, Interrupted, pip_install
from fpo_mlx.machine import set_up as machine_set_up
from fpo_mlx.storage.files import unwritable


class Main(Group):
    """Expected errors become one plain message and their own exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FpoError as error:
            _end(ctx, error)
        except OSError as error:  # a full disk, a read-only folder: the user's to mend
            _end(ctx, unwritable(error.filename or "the output", error))
            raise
        except ImportError as error:
            _end(ctx, _not_imported(error))
            raise
        except KeyboardInterrupt:
            _end(ctx, Interrupted("interrupted"))
        except (AttributeError, TypeError):  # a defect, which keeps its traceback: perhaps not ours
            _tell_versions()
            raise


def _end(ctx: click.Context, error: FpoError | None) -> None:
    """With its message and exit code, if it is one of those that are expected."""
    if error is not None:
        with unheard():
            click.echo(f"fpo-mlx: {error}", err=True)
        ctx.exit(error.exit_code)


def _not_imported(error: ImportError) -> FpoError | None:
    """What to say of a package that is missing, does not load or has changed."""
    from fpo_mlx.machine import upstream

    name = (error.name or "").partition(".")[0]
    torch = "Without it only the torch backend works (`fpo-mlx precompute --backend torch`)."
    if (why := upstream.unloadable(error)) is not None:
        return FpoError(f"{why} {torch}")
    if (plain := upstream.plain(error)) is not None or name not in ("mlx", "mlx_lm"):
        return plain
    how = upstream.how_to_get_mlx() if name == "mlx" else pip_install("mlx-lm")
    return FpoError(
        f"this command needs the package {name}, which is not installed here. Install it ({how}). "
        f"{torch}"
    )


def _tell_versions() -> None:
    from fpo_mlx.machine import upstream

    for one in upstream.outside():
        click.echo(
            f"fpo-mlx: {one.package} {one.installed} is outside the versions that were tried "
            f"({one.range}), and may be the cause of what follows",
            err=True,
        )


@click.group(cls=Main, context_settings=CONTEXT, invoke_without_command=True, no_args_is_help=False)
@click.version_option(__version__, prog_name="fpo-mlx")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Align a language model on your own machine, held in place by SAE features (FPO).

    The commands stand in the order in which you will need them. Most take --model, --data and
    --sae; -c run.yaml takes them from a file.

    \b
    Example:
      fpo-mlx demo                  the whole way on a small built-in example
      fpo-mlx train --help          your own model, SAE and preference pairs
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), color=ctx.color)
        return
    machine_set_up()


THE_WAY = {
    "Begin": (demo, doctor),
    "Prepare": (convert, pairs, check, sae, plan, precompute),
    "Train": (train, rounds),
    "Judge": (evaluate, compare, chat, features, report),
    "Ship": (fuse, export),
    "Look after": (cache,),
}
for _stage, _commands in THE_WAY.items():
    for _command in _commands:
        main.add_command(_command, panel=_stage)
sae.add_command(train_sae)
features.add_command(features_data)
features.add_command(features_show)
