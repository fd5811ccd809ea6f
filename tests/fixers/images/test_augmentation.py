import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from fixers.images.augmentation import (
    MORE_OPERATIONS,
    OPERATIONS,
    Chains,
    apply_chains,
    augmix,
    beta,
    dirichlet,
    draw_chains,
    mix,
)


def images(seed=0, count=6, shape=(3, 12, 12), low=0, high=255):
    """Pixels that are multiples of 1/255, with some structure."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(low, high + 1, (count, *shape), generator=generator, dtype=torch.uint8)
    raw[:, :, 3:7, 2:9] = raw[:, :, :1, :1] // 2
    return raw


def once(pixels, name, strength, sign=1.0):
    """One operation, of the same strength for all images."""
    count = len(pixels)
    chains = Chains(
        torch.zeros(count, 1, dtype=torch.int64),
        torch.full((count, 1), strength),
        torch.full((count, 1), sign),
        (name,),
    )
    return apply_chains(pixels.float() / 255, chains)


def as_bytes(pixels):
    return (pixels * 255).round().to(torch.uint8)


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 28, 28), (3, 9, 14)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "strength", "expected"),
    [
        ("autocontrast", 0.3, reference.autocontrast),
        ("equalize", 0.3, reference.equalize),
        ("posterize", 0.3, lambda x: reference.posterize(x, 3)),
        ("posterize", 0.1, lambda x: reference.posterize(x, 4)),
        ("solarize", 0.3, lambda x: reference.solarize(x, 180)),
        ("color", 0.25, lambda x: reference.adjust_saturation(x, 0.55) if x.shape[1] == 3 else x),
        ("brightness", 0.75, lambda x: reference.adjust_brightness(x, 1.45)),
        ("sharpness", 0.75, lambda x: reference.adjust_sharpness(x, 1.45)),
    ],
)
def test_operations_on_values_are_torchvisions(name, strength, expected, shape, seed):
    pixels = images(seed, shape=shape, low=20 * seed, high=255 - 30 * seed)
    difference = as_bytes(once(pixels, name, strength)).int() - expected(pixels).int()
    # Blends and stretches round where torchvision truncates.
    tolerance = 0 if name in ("equalize", "posterize", "solarize") else 1
    assert difference.abs().max() <= tolerance


def test_contrast_is_torchvisions():
    pixels = images().float() / 255
    expected = reference.adjust_contrast(pixels, 0.55)
    torch.testing.assert_close(once(images(), "contrast", 0.25), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 9, 15)])
@pytest.mark.parametrize(
    ("name", "strength", "affine"),
    [
        ("rotate", 0.31, {"angle": 9}),
        ("shear_x", 0.3, {"shear": (torch.rad2deg(torch.tensor(0.09).atan()).item(), 0.0)}),
        ("translate_x", 0.5, {"translate": "x"}),
        ("translate_y", 0.5, {"translate": "y"}),
    ],
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_geometry_is_torchvisions(name, strength, affine, shape, sign):
    pixels = images(shape=shape)
    arguments = {"angle": 0, "translate": (0, 0), "scale": 1.0, "shear": (0.0, 0.0), **affine}
    if arguments["translate"] == "x":
        arguments["translate"] = (-sign * int(shape[2] / 6), 0)
    elif arguments["translate"] == "y":
        arguments["translate"] = (0, -sign * int(shape[1] / 6))
    arguments["angle"] *= -sign
    arguments["shear"] = tuple(sign * value for value in arguments["shear"])
    expected = reference.affine(pixels.float() / 255, interpolation=InterpolationMode.BILINEAR, **arguments)
    torch.testing.assert_close(once(pixels, name, strength, float(sign)), expected, atol=1e-4, rtol=0)


def test_shear_y_is_shear_x_transposed():
    pixels = images()
    expected = once(pixels.transpose(-1, -2), "shear_x", 0.3).transpose(-1, -2)
    torch.testing.assert_close(once(pixels, "shear_y", 0.3), expected)


def test_a_plain_channel_survives_every_operation():
    plain = torch.full((4, 1, 8, 8), 100, dtype=torch.uint8)
    for name in ("autocontrast", "equalize"):
        assert torch.equal(as_bytes(once(plain, name, 0.3)), plain)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), severity=st.floats(0.2, 10), channels=st.sampled_from([1, 2, 3]))
def test_views_keep_range_and_shape_and_leave_the_images_alone(seed, severity, channels):
    pixels = images(seed, shape=(channels, 8, 11)).float() / 255
    before = pixels.clone()
    view = augmix(pixels, torch.Generator().manual_seed(seed), names=MORE_OPERATIONS, severity=severity)
    assert view.shape == pixels.shape
    assert view.isfinite().all()
    assert view.min() >= 0
    assert view.max() <= 1 + 1e-6
    assert torch.equal(pixels, before)


def test_images_dont_influence_each_other():
    """The batch is only a way of computing: any selection gives the same images."""
    pixels = images(count=40).float() / 255
    chains = draw_chains(40, torch.Generator().manual_seed(3), names=MORE_OPERATIONS)
    whole = apply_chains(pixels, chains)
    rows = torch.tensor([7, 31, 2])
    torch.testing.assert_close(apply_chains(pixels[rows], chains.select(rows)), whole[rows])


def test_operations_of_a_chain_are_applied_in_order():
    pixels = images()
    chains = Chains(torch.tensor([[0, 1, -1]] * 6), torch.full((6, 3), 0.3), torch.ones(6, 3), ("solarize", "rotate"))
    first = once(pixels, "solarize", 0.3)
    rotate = Chains(torch.zeros(6, 1, dtype=torch.int64), torch.full((6, 1), 0.3), torch.ones(6, 1), ("rotate",))
    torch.testing.assert_close(apply_chains(pixels.float() / 255, chains), apply_chains(first, rotate))


def test_draws_are_uniform_and_follow_the_seed():
    one, same, other = (draw_chains(9000, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.operations, same.operations) and torch.equal(one.strengths, same.strengths)
    assert not torch.equal(one.operations, other.operations)
    depths = (one.operations >= 0).sum(dim=1)
    assert torch.bincount(depths, minlength=4).tolist() == pytest.approx([0, 3000, 3000, 3000], abs=250)
    assert torch.bincount(one.operations[:, 0]).tolist() == pytest.approx([1000] * len(OPERATIONS), abs=150)
    assert one.strengths.min() >= 0.01 and one.strengths.max() <= 0.3
    assert one.signs.unique().tolist() == [-1, 1]


def test_mixing_weights_are_those_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    weights, shares = dirichlet(5000, 3, 1.0, generator), beta(5000, 1.0, generator)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(5000))
    assert weights.min() >= 0
    # Dirichlet(1, 1, 1) has means 1/3 and variances 1/18, Beta(1, 1) is uniform.
    assert weights.mean(dim=0).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    assert weights.var(dim=0).tolist() == pytest.approx([1 / 18] * 3, abs=0.01)
    assert (shares.mean().item(), shares.var().item()) == pytest.approx((1 / 2, 1 / 12), abs=0.02)


def test_a_mix_is_convex():
    pixels = images(count=50).float() / 255
    chained = torch.rand(50, 3, *pixels.shape[1:], generator=torch.Generator().manual_seed(1))
    mixed = mix(pixels, chained, torch.Generator().manual_seed(2))
    ingredients = torch.cat([pixels[:, None], chained], dim=1)
    assert (mixed >= ingredients.amin(dim=1) - 1e-6).all()
    assert (mixed <= ingredients.amax(dim=1) + 1e-6).all()
    only_first = torch.tensor([[1.0, 0.0, 0.0]]).expand(50, 3)
    mixed = mix(pixels, chained, torch.Generator().manual_seed(2), chain_weights=only_first)
    share = (mixed - pixels)[:, 0, 0, 0] / (chained[:, 0] - pixels)[:, 0, 0, 0]
    torch.testing.assert_close(torch.lerp(pixels, chained[:, 0], share[:, None, None, None]), mixed, atol=1e-4, rtol=0)
