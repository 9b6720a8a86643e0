"""Files that name SAE features: weights for the objective (index -> w_i) and labels for people.

Weights, one mapping for one SAE or a list with one mapping per SAE, in the order of --sae:
  JSON, YAML   {"812": 4.0, "97": 0}      or      [{"812": 4.0}, {}]
  CSV          a header with `feature` and `weight` (and `sae`, from 0); other columns are ignored
Labels: the same forms with texts (`label` in a CSV), or Neuronpedia's export, a JSON list of
objects with `index` and `description`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fpo_mlx.errors import ConfigError
from fpo_mlx.storage import files

Weights = tuple[dict[int, float], ...]  # per SAE: feature -> w_i of Eq. 10
WANTED = 'Wanted feature: weight, such as {"812": 4.0}; JSON, YAML or CSV (feature,weight).'


def read_weights(
    path: str | Path, sizes: Sequence[int], flag: str = "--feature-weights"
) -> Weights:
    """w_i of the features that a file names. sizes: number of features of each SAE.

    flag: the option that named the file, for messages.
    Raises: ConfigError naming every entry that cannot be used.
    """
    entries = _read(Path(path), flag, "weight")
    faults: list[str] = []
    out: Weights = tuple({} for _ in sizes)
    for sae, index, value in entries:
        where = f"feature {index}" + (f" of SAE {sae}" if len(sizes) > 1 else "")
        feature, weight = _index(index), _number(value)
        if not 0 <= sae < len(sizes):
            faults.append(f"{where}: there is no SAE {sae}; --sae names {len(sizes)}")
        elif feature is None or not 0 <= feature < sizes[sae]:
            faults.append(f"{where}: the SAE's features are 0 to {sizes[sae] - 1}")
        elif weight is None or not math.isfinite(weight) or weight < 0:
            faults.append(f"{where}: weight {value!r}; wanted a finite number, 0 or more")
        elif feature in out[sae]:
            faults.append(f"{where}: stands there twice")
        else:
            out[sae][feature] = weight
    if faults:
        raise ConfigError(f"{flag} {path}:\n" + "\n".join(f"  {f}" for f in faults[:20]))
    if not any(out):
        raise ConfigError(f"{flag} {path} names no feature. {WANTED}")
    return out


def read_steering(text: str, size: int) -> dict[int, float | None]:
    """ "812=+4,97=0" -> {812: 4.0, 97: None}: what is added, None for what is taken out.

    size: number of the SAE's features. Raises: ConfigError naming the part that cannot be used.
    """
    out: dict[int, float | None] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = part.partition("=")
        feature, amount = _index(name.strip()), _number(value.strip())
        if feature is None or amount is None or not math.isfinite(amount):
            raise ConfigError(f"--steer {part}: wanted FEATURE=+4 to add, FEATURE=0 to take out.")
        if not 0 <= feature < size:
            raise ConfigError(f"--steer {part}: the SAE's features are 0 to {size - 1}.")
        if feature in out:
            raise ConfigError(f"--steer {part}: feature {feature} stands there twice.")
        out[feature] = amount or None
    return out


def read_labels(path: str | Path, n_saes: int = 1) -> tuple[dict[int, str], ...]:
    """What the features mean, in somebody's words. Raises: ConfigError."""
    out: tuple[dict[int, str], ...] = tuple({} for _ in range(n_saes))
    for sae, index, text in _read(Path(path), "--labels", "label"):
        feature = _index(index)
        if feature is None or not 0 <= sae < n_saes:
            raise ConfigError(f"--labels {path}: feature {index!r} of SAE {sae} cannot be one.")
        out[sae][feature] = _printable(str(text))
    return out


def weights_fingerprint(weights: Weights) -> str | None:
    """sha256 of what the weights say, whatever file they come from; None without any."""
    if not any(weights):
        return None
    text = json.dumps([sorted(named.items()) for named in weights])
    return hashlib.sha256(text.encode()).hexdigest()


def write_weights(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A file that `read_weights` reads. rows: at least `feature` and `weight`; a CSV keeps all."""
    if path.suffix.lower() == ".csv":
        files.write_text(path, csv_text(rows))
        return
    saes = 1 + max((int(row.get("sae", 0)) for row in rows), default=0)
    maps: list[dict[str, float]] = [{} for _ in range(saes)]
    for row in rows:
        maps[int(row.get("sae", 0))][str(row["feature"])] = float(row["weight"])
    files.write_json(path, maps[0] if saes == 1 else maps)  # JSON is YAML too


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV; the columns are the keys in the order in which they first come up."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


Entry = tuple[int, Any, Any]  # number of the SAE, feature, value


def _read(path: Path, flag: str, value: str) -> list[Entry]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path}: cannot be read: {error}. {WANTED}") from error
    read: Callable[[str, str], Iterable[Entry]]
    read = _from_csv if path.suffix.lower() == ".csv" else _from_tree
    try:
        return list(read(text, value))
    except RecursionError:
        raise ConfigError(f"{flag} {path}: nested too deeply. {WANTED}") from None
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ConfigError(f"{flag} {path}: {error}. {WANTED}") from error


def _from_csv(text: str, value: str) -> Iterable[Entry]:
    reader = csv.DictReader(io.StringIO(text))
    if not {"feature", value} <= set(reader.fieldnames or ()):
        raise ValueError(f"the header is {reader.fieldnames}, wanted feature and {value}")
    for row in reader:
        yield int(row.get("sae") or 0), row["feature"], row[value]


def _from_tree(text: str, value: str) -> Iterable[Entry]:
    try:  # YAML takes no tabs, makes two characters of an escaped emoji, and is slow
        tree = json.loads(text, object_pairs_hook=list)
    except ValueError:
        tree = _yaml(text)
    if not isinstance(tree, list):
        raise ValueError(f"found {type(tree).__name__}")
    maps = tree if tree and isinstance(tree[0], list) else [tree]
    if value == "label" and all(_exported(entries) for entries in maps):
        for entries in maps:
            one = dict(entries)
            yield 0, one["index"], one.get("description", "")
        return
    for sae, entries in enumerate(maps):
        for entry in entries:
            if not isinstance(entry, tuple):
                raise ValueError(f"found {entry!r} where `feature: {value}` was wanted")
            yield sae, entry[0], entry[1]


def _yaml(text: str) -> Any:
    """The value of a YAML text; a mapping is a list of (key, value), as of the JSON hook above."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Keeps a key that stands twice, so that it can be complained of."""

    def pairs(loader: Any, node: Any) -> Any:
        return [tuple(loader.construct_object(n, deep=True) for n in pair) for pair in node.value]

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, pairs)
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"neither JSON nor YAML: {str(error).splitlines()[0]}") from error


def _printable(text: str) -> str:
    """Two halves of a character made one, as YAML leaves them; a half alone is replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _exported(entries: Any) -> bool:
    """Whether this is one object of Neuronpedia's export of explanations."""
    return isinstance(entries, list) and {"index", "description"} <= {
        entry[0] for entry in entries if isinstance(entry, tuple)
    }


def _index(value: Any) -> int | None:
    if isinstance(value, bool | float):
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
