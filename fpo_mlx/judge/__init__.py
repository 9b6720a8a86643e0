"""Judging: held-out pairs, sampled answers, features that moved, how well an SAE fits."""
