"""`python -m fpo_mlx` is the same program as `fpo-mlx`."""

from fpo_mlx.cli import main

if __name__ == "__main__":
    main()
