"""A person rates: the page on this machine, and what the votes say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fpo_mlx.errors import ConfigError, pip_install
from fpo_mlx.pairs.rating import Rating, votes_in
from fpo_mlx.pairs.summary import self_agreement


def pairs_rate(
    candidates: Path, output: Path, *, per_prompt: int = 1, seed: int = 0, keep_cut: bool = False,
    port: int = 0, opened: Callable[[str], None],
) -> dict[str, int]:  # fmt: skip
    """Serve the page until it is stopped; gives the votes, and how often the person agreed twice.

    opened: called with the page's address when it can be opened.
    Raises: ConfigError (no web packages, a port that is taken), DataError, FpoError.
    """
    try:
        from fpo_mlx.pairs.web.serve import serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the page needs the package {error.name}: run `{pip_install('starlette', 'uvicorn')}`."
        ) from error
    rating = Rating(candidates, output, per_prompt=per_prompt, seed=seed, keep_cut=keep_cut)
    try:
        serve(rating, port=port, opened=opened)
    finally:
        rating.close()
    votes = votes_in(output)
    same, twice = self_agreement(votes)
    return {"votes": sum(v.verdict != "skip" for v in votes), "same": same, "twice": twice}
