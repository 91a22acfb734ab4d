from dataclasses import replace

from ordmoe_peft.tools.report import inspect_report
from tests.tools.report.pages import Page, health


def test_the_verdict_stands_first(tmp_path, undrawn):
    words = Page(inspect_report(health(), tmp_path)).text
    assert (
        words.index("Not fit to be cut into tiers")
        < words.index("Layer 2 has a dead expert.")
        < words.index("Utilisation")
    )
    assert "2 model.layers.2.mlp 8 2 1 0.001 2.000 1.900 0.800 0.400 0.600 / 0.300 / 0.200 0.900 0.0123" in words
    words = Page(inspect_report(health(is_fit=True, reasons=[]), tmp_path)).text
    assert "Tiers can be cut. Whether ranks carry a signal" in words
    assert "Not fit" not in words


def test_the_heat_map_is_centred_on_the_fair_share(tmp_path, drawn):
    inspect_report(health(), tmp_path)
    (image,) = drawn[0].axes[0].images
    assert image.norm(1.0) == 0.5
    assert image.norm(0.0) == 0.0
    shares = image.get_array()
    assert shares.shape == (4, 8)
    # Layers 0 and 2 of the four have 4 experts; the rest of their row is no expert, not an unused one.
    assert shares.mask[0].tolist() == [False] * 4 + [True] * 4
    dead = drawn[0].axes[0].collections[0].get_offsets()
    assert dead.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]


def test_what_is_missing_is_left_out(tmp_path):
    """One layer, no adapter, scores that are no numbers; and no layer at all."""
    (layer,) = health(1).layers
    layer = replace(layer, drift_overlap=None, drift_kl=None, score_std=float("nan"))
    path = inspect_report(health(layers=[layer]), tmp_path / "one")
    names = {file.stem for file in path.parent.glob("*.png")}
    assert names == {"utilisation", "entropy", "gate_mass", "tier_probability"}
    path = inspect_report(health(layers=[]), tmp_path / "none")
    assert list(path.parent.glob("*.png")) == []
    assert "0 MoE layers" in Page(path).text
