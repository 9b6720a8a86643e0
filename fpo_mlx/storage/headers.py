"""A model of the hub by the headers of its weight files: names, shapes, dtypes and no values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fpo_mlx.errors import ModelError
from fpo_mlx.storage import hub
from fpo_mlx.storage.files import read_object
from fpo_mlx.storage.hub import WEIGHTS
from fpo_mlx.storage.tensors import read_header

INDEX = "model.safetensors.index.json"
AT_ONCE = 8  # requests

Say = Callable[[str], None]


@contextmanager
def outlined(spec: str | Path, say: Say) -> Iterator[Path]:
    """The folder of a model whose weights nobody will read; that of a hub id is cheap to have.

    A local folder, or the hub's cache where the whole model lies in it, without the network.
    Else a temporary one: settings and tokenizer, and weight files that have their header and a
    hole where the values would be. Raises: ModelError when the model cannot be had.
    """
    if (there := hub.local_folder(spec) or _cached(spec)) is not None:
        yield there
        return
    small = hub.resolve_model(spec, weights=False)
    if has_weights(small):
        yield small
        return
    repo, revision = hub.hub_id(spec)
    with TemporaryDirectory(prefix="fpo-mlx-") as scratch:
        folder = Path(scratch) / repo.replace("/", "--")
        _link(small, folder)
        size, count = _fill(folder, repo, revision)
        files = f"{hub.shown_size(size)} in {count} file{'s' * (count > 1)}"
        say(
            f"{spec}: its weights ({files}) are not on this disk. Only their headers were read; "
            "the run itself downloads them"
        )
        try:
            yield folder
        except ModelError as error:  # the folder is gone when this is read
            raise ModelError(
                f"{str(error).replace(str(folder), str(spec))} (Only the headers of its weights "
                f"were read; `hf download {repo}` fetches all, and it is then read from the cache.)"
            ) from error


def has_weights(folder: Path) -> bool:
    """Whether all weight files that a folder of the hub's cache should have are in it."""
    names = {path.name for path in folder.glob(WEIGHTS) if path.is_file()}
    try:
        wanted = set(read_object(folder / INDEX)["weight_map"].values())
    except FileNotFoundError:
        parts = {found[1] for name in names if (found := re.search(r"-of-(\d+)\.", name))}
        return bool(names) and all(len(names) >= int(count) for count in parts)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False  # half of an index: it is asked for again
    return bool(wanted) and wanted <= names


def _cached(spec: str | Path) -> Path | None:
    """The model in the hub's cache, if nothing of it is missing."""
    hub.hub_id(spec)
    folder = hub.at_hand(spec)
    whole = folder is not None and has_weights(folder) and any(folder.glob("tokenizer*"))
    return folder if whole else None


def _link(small: Path, folder: Path) -> None:
    """The files that are there, under their names; weights among them, if some are."""
    folder.mkdir()
    for path in filter(Path.exists, small.iterdir()):  # a link to nothing would be written through
        (folder / path.name).symlink_to(path.resolve())


def _fill(folder: Path, repo: str, revision: str | None) -> tuple[int, int]:
    """Make the weight files that the folder lacks; their size in bytes, and how many they are."""
    try:
        listed = _listing(repo, revision)
        names = [name for name in listed if _is_weights(name)]
        lacking = [name for name in names if not (folder / name).exists()]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(lambda name: _header(repo, name, revision), lacking))
        sizes = [_hollow(folder / name, one) for name, one in zip(lacking, found, strict=True)]
    except Exception as error:  # huggingface_hub raises a dozen unrelated classes
        usual = f"Try again, or fetch it whole (`hf download {repo}`): its headers are then here."
        raise ModelError(
            f"{repo}: the headers of its weights cannot be read ({hub.reason(error)}). "
            f"{hub.remedy(repo, usual)}"
        ) from error
    if not names:
        raise _unread(repo, listed)
    return sum(sizes), len(sizes)


def _listing(repo: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision)
    return [file.rfilename for file in info.siblings or ()]


def _is_weights(name: str) -> bool:
    """Of the repository's own folder, and no path that leads elsewhere."""
    return fnmatch(name, WEIGHTS) and not set("/\\") & set(name)


def _header(repo: str, name: str, revision: str | None) -> Any:
    """Two short requests at most, whatever the file's size."""
    from huggingface_hub import parse_safetensors_file_metadata

    return parse_safetensors_file_metadata(repo, name, revision=revision)


def _hollow(path: Path, found: Any) -> int:
    """Write the file with a hole for its values, which takes no room; its size in bytes.

    MLX refuses a file that is shorter than its header says.
    """
    header: dict[str, Any] = {
        name: {"dtype": one.dtype, "shape": one.shape, "data_offsets": one.data_offsets}
        for name, one in found.tensors.items()
    }
    if found.metadata:
        header["__metadata__"] = found.metadata
    text = json.dumps(header).encode()
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    tensors = read_header(path).tensors.values()  # refuses extents that cannot be
    end = max((one.start + one.size for one in tensors), default=8 + len(text))
    with path.open("r+b") as file:
        file.truncate(end)
    return end


def _unread(repo: str, listed: Sequence[str]) -> ModelError:
    other = [name for name in listed if name.endswith((".safetensors", ".bin", ".gguf", ".pth"))]
    return ModelError(
        f"{repo}: found {', '.join(other[:3]) or 'no weights'}, wanted {WEIGHTS}, which is all "
        "that mlx-lm loads. Take a repository that has them; nothing was downloaded but settings "
        "and tokenizer."
    )
