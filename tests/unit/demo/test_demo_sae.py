"""The SAE that comes with the package: small, whole, and made for the demo's model."""

from importlib.resources import files
from pathlib import Path

import numpy as np

from fpo_mlx.records import Site
from fpo_mlx.sae.encode import encode
from fpo_mlx.sae.load import load_sae

FOLDER = Path(str(files("fpo_mlx.demo"))) / "sae"


def test_the_demo_sae_fits_smollm2_and_is_at_most_3_megabytes():
    sae = load_sae(FOLDER)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 3e6
    assert (sae.activation, sae.k, sae.d_in, sae.n_features) == ("topk", 32, 576, 1024)
    assert sae.site == Site(27, "resid_post")
    assert sae.model_name == "SmolLM2-135M-Instruct"


def test_its_decoder_rows_have_length_1_and_its_input_bias_is_the_decoders():
    sae = load_sae(FOLDER)
    assert sae.w_dec is not None
    assert sae.b_in is not None
    np.testing.assert_allclose(np.linalg.norm(sae.w_dec, axis=1), 1, atol=2e-3)  # float16
    np.testing.assert_array_equal(sae.b_in, sae.b_dec)


def test_a_feature_that_is_put_in_is_the_feature_that_fires():
    # b_dec + 300 * decoder row i must come out as feature i; it does for nearly all 1,024
    sae = load_sae(FOLDER)
    assert sae.w_dec is not None
    assert sae.b_dec is not None
    acts = encode(sae, sae.b_dec + 300 * sae.w_dec)  # [F, F]
    assert ((acts > 0).sum(axis=1) <= 32).all()
    assert (acts.argmax(axis=1) == np.arange(1024)).mean() > 0.95
