"""What `sae encode` refuses leaves nothing open."""

import numpy as np
from command_line import run


def test_an_archive_that_is_refused_is_closed(tmp_path, monkeypatch):
    opened, real = [], np.load

    def load(*args, **kwargs):
        opened.append(real(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(np, "load", load)
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    flags = ["--input", tmp_path / "x.npz", "--output", tmp_path / "acts.npy"]
    result = run("sae", "encode", "--sae", tmp_path, *flags)
    assert "several arrays" in result.stderr
    assert [archive.zip for archive in opened] == [None]
