"""`features find` on a real model: answers with lists against answers without, judged on others.

    python scripts/studies/find_features.py [--model M] [--sae S] [--data FILE] [--texts N]

Prints the features that were found on three quarters of the texts and the AUC of each on the rest.
Exits with 1 when the best one's held-out AUC is below 0.8. The SAE and the pairs that it looks for
by default lie in a folder `shared` beside the checkout; they are not part of the repository.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from texts import SAE, answers_apart, is_list, rows, say, shared

from fpo_mlx import pipeline
from fpo_mlx.config import load_config
from fpo_mlx.demo import smollm2

WANTED = 0.8
ANSWER_TOKENS = 160  # prompt and answer; longer ones are cut


def text_sets(data: Path, folder: Path, count: int) -> tuple[Path, Path]:
    """Chosen answers with and without a list, to different prompts."""
    pairs = [row for row in rows(data) if len(row["prompt"]) < 400]
    sets = answers_apart(pairs, is_list, count, folder)
    least = min(len(rows(path)) for path in sets)
    if least < count:
        raise SystemExit(f"{data}: {least} answers of one kind, wanted {count}")
    return sets


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--sae", type=Path, default=SAE)
    parser.add_argument("--data", type=Path, default=shared("data", "train.jsonl"))
    parser.add_argument("--texts", type=int, default=40, help="of each kind")
    parser.add_argument("--examples", type=int, default=3, help="contexts; 0 saves a pass")
    options = parser.parse_args()
    model = options.model or smollm2.fetch(say=say).full
    with tempfile.TemporaryDirectory() as folder:
        sets = text_sets(options.data, Path(folder), options.texts)
        config = load_config(
            {"model": str(model), "sae": (str(options.sae),), "max_seq_length": ANSWER_TOKENS}
        )
        found = pipeline.find_features(
            config, positive=sets[0], negative=sets[1], held_out=0.25, limit=options.texts,
            examples=options.examples, say=say,
        )  # fmt: skip
    print("feature  AUC    held out  fires most on")
    for one in found:
        tokens = " ".join(repr(context.token) for context in one.contexts)
        print(f"{one.feature:>7}  {one.auc:.3f}  {one.held_out_auc:.3f}     {tokens}")
    best = found[0].held_out_auc or 0.0
    held = options.texts // 4
    print(f"best feature on {held} + {held} held-out texts: AUC {best:.3f}, wanted {WANTED}")
    return 0 if best >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
