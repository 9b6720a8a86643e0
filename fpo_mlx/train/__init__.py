"""Training: losses of pairs, the loop, its safety, its files, several processes."""
