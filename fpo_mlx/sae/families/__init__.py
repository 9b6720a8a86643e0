"""One file per published layout of SAEs; each brings `FORMAT`, `matches` and `load`."""
