"""Pairs that say the same: equal ones by hash, near ones by MinHash (Broder 1997)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from fpo_mlx.errors import pip_install

PERMUTATIONS = 64
SHINGLE = 3  # words
INDEXED = 0.9  # highest similarity that the index is made for

IsNew = Callable[[Iterable[str]], bool]


def finder(threshold: float, note: Callable[[str], None]) -> IsNew:
    """A function that says whether the texts of a pair are unlike those of all pairs before.

    threshold: Jaccard similarity of their word triples from which two are the same; 1 for equal
    texts only, which is also all that can be done without the package datasketch.
    """
    seen: set[bytes] = set()
    near = None if threshold == 1 else _near(threshold, note)

    def is_new(texts: Iterable[str]) -> bool:
        words = "\0".join(" ".join(text.split()) for text in texts)
        name = hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()
        if name in seen:
            return False
        seen.add(name)
        return near is None or near(words)

    return is_new


def _near(threshold: float, note: Callable[[str], None]) -> Callable[[str], bool] | None:
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        note(f"near duplicates stay, equal ones go: for both run `{pip_install('datasketch')}`")
        return None
    # above .96 it would have one band only, which is refused; what it names is compared anyway
    index, kept = MinHashLSH(threshold=min(threshold, INDEXED), num_perm=PERMUTATIONS), {}

    def is_new(text: str) -> bool:
        words = text.lower().split()
        shingles = {
            " ".join(words[i : i + SHINGLE]).encode("utf-8", "surrogatepass")
            for i in range(max(1, len(words) - SHINGLE + 1))
        }
        made = MinHash(num_perm=PERMUTATIONS)
        made.update_batch(shingles)
        if any(kept[name].jaccard(made) >= threshold for name in index.query(made)):
            return False
        name = len(kept)
        kept[name] = made
        index.insert(name, made)
        return True

    return is_new
