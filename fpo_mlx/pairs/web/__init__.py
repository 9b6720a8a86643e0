"""The page on which a person rates: a small server on this machine alone."""
