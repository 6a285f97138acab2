"""Section 2 of prior.py: the gated PixelCNN and its two samplers."""

import statistics
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from naive import sample_pixelcnn
from prior import PixelCNN, draw, gumbel

GRIDS = pytest.mark.parametrize("height, width", [(1, 1), (6, 6), (9, 4), (3, 10)])


def influence(cnn, height, width, labels=None, cond=None):
    """seen[i, j] (H*W, H*W): True where logits[:, :, i, j] depend on the code at a position."""
    kept = []
    hook = cnn.embed.register_forward_hook(lambda module, args, out: kept.append(out))
    codes = torch.randint(cnn.num_codes, (1, height, width))
    logits = cnn(codes, labels, cond)
    hook.remove()
    mix = torch.randn(cnn.num_codes, dtype=torch.float64)
    seen = torch.empty(height * width, height * width, dtype=torch.bool)
    for n in range(height * width):
        score = logits[0, :, n // width, n % width] @ mix
        grad, = torch.autograd.grad(score, kept[0], retain_graph=True)
        seen[n] = grad.abs().sum((3, 4)).flatten() > 0  # (1, H, W, 1, C) -> (H*W)
    return seen


def past(height, width):
    """Raster order: position n may see 0 .. n-1."""
    n = torch.arange(height * width)
    return n[:, None] > n[None, :]


def missing(wrong, width):
    n, m = wrong.nonzero()[0].tolist()
    return f"logits at {divmod(n, width)} and the code at {divmod(m, width)}"


# -- what it sees -------------------------------------------------------------------------------


@GRIDS
def test_prior_sees_no_future(height, width):
    cnn = PixelCNN(5, 16, 3, num_classes=2, cond_channels=3).double()
    cond = torch.randn(1, 3, height, width, dtype=torch.float64)
    leak = influence(cnn, height, width, torch.tensor([1]), cond) & ~past(height, width)
    assert not leak.any(), (
        f"a code sees itself or a later one ({missing(leak, width)}): shift the input of both "
        "stacks, and pad before, never behind")


@GRIDS
def test_prior_sees_all_the_past(height, width):
    cnn = PixelCNN(5, 16, PixelCNN.layers_for(height, width)).double()
    blind = past(height, width) & ~influence(cnn, height, width)
    assert not blind.any(), (
        f"not seen, though it comes before ({missing(blind, width)}): a blind spot, or too few "
        "layers for this grid")


@pytest.mark.parametrize("height, width", [(7, 3), (3, 7), (8, 8)])
def test_layers_for_asks_for_no_layer_too_many(height, width):
    cnn = PixelCNN(5, 16, PixelCNN.layers_for(height, width) - 1).double()
    blind = past(height, width) & ~influence(cnn, height, width)
    assert blind.any(), "one layer less would see the whole grid too: layers_for wastes layers"


# -- what it is conditioned on ------------------------------------------------------------------


def test_label_changes_the_distribution_of_every_code():
    cnn, codes = PixelCNN(5, 8, 2, num_classes=3), torch.randint(5, (1, 4, 3))
    one, two = cnn(codes, torch.tensor([0])), cnn(codes, torch.tensor([2]))
    assert (one - two).abs().amax(1).gt(1e-6).all(), "the label must reach every position"


def test_positional_encoding_tells_positions_apart():
    cnn = PixelCNN(5, 8, 1).double()                   # sees 3 rows and columns: no edge from here
    logits = cnn(torch.zeros(1, 12, 12, dtype=torch.long))
    for i, j in ((5, 6), (6, 5)):
        assert not torch.allclose(logits[..., 5, 5], logits[..., i, j]), (
            f"(5, 5) and {i, j} have the same past and no edge in view: see `positions`")


def test_label_goes_with_its_own_example():
    cnn, codes = PixelCNN(5, 8, 2, num_classes=3).double(), torch.randint(5, (2, 4, 3))
    both = cnn(codes, torch.tensor([0, 2]))
    for b, label in enumerate((0, 2)):
        alone = cnn(codes[b:b + 1], torch.tensor([label]))
        assert torch.allclose(both[b:b + 1], alone)


def test_constant_map_equals_the_same_map_written_out():
    cnn, codes = PixelCNN(5, 8, 2, cond_channels=2).double(), torch.randint(5, (2, 4, 3))
    cond = torch.randn(2, 2, 1, 1, dtype=torch.float64)
    assert torch.allclose(cnn(codes, cond=cond), cnn(codes, cond=cond.expand(2, 2, 4, 3)))


def test_map_reaches_its_own_position():
    cnn, codes = PixelCNN(5, 8, 1, cond_channels=2).double(), torch.randint(5, (1, 4, 3))
    cond = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    for i in range(4):
        for j in range(3):
            grad, = torch.autograd.grad(cnn(codes, cond=cond)[0, :, i, j].square().sum(), cond)
            assert grad[0, :, i, j].any(), f"logits at {i, j} do not depend on the map at {i, j}"


def test_guidance_with_one_condition_for_two_is_a_value_error():
    cnn = PixelCNN(5, 8, 2, num_classes=3)
    with pytest.raises(ValueError, match="need 2 rows"):
        cnn.sample(1, 3, 3, labels=torch.tensor([1]), guidance=2.0)


@pytest.mark.parametrize("shape", [(8, 4), (4, 3), (2, 4)])
def test_a_map_of_another_size_than_the_samples_is_a_value_error(shape):
    cnn = PixelCNN(5, 8, 2, cond_channels=2)
    with pytest.raises(ValueError, match="not a map of 4 x 4"):
        cnn.sample(1, 4, 4, cond=torch.zeros(1, 2, *shape))            # its first rows, say


@pytest.mark.parametrize("made, called, word", [
    ({}, {"labels": torch.tensor([0])}, "labels"), ({"num_classes": 2}, {}, "labels"),
    ({}, {"cond": torch.zeros(1, 2, 3, 3)}, "cond"), ({"cond_channels": 2}, {}, "cond")])
def test_missing_or_surplus_conditioning_is_a_value_error(made, called, word):
    cnn = PixelCNN(5, 8, 1, **made)
    with pytest.raises(ValueError, match=word):
        cnn(torch.zeros(1, 3, 3, dtype=torch.long), **called)
    with pytest.raises(ValueError, match=word):
        cnn.sample(1, 3, 3, **called)


# -- drawing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax(temperature):
    n, logits = 40_000, torch.tensor([0.0, 1.0, -1.0, 2.0])
    noise = gumbel(n, 4, generator=torch.Generator().manual_seed(1))
    share = draw(logits.expand(n, 4), noise, temperature).bincount(minlength=4) / n
    p = F.softmax(logits / temperature, 0)
    error = (share - p).abs() / (p * (1 - p) / n).sqrt()               # in standard errors
    assert error.max() < 5, f"drew {share.tolist()}, softmax(logits / temperature) is {p.tolist()}"


def test_temperature_zero_is_the_argmax():
    cnn = PixelCNN(11, 8, 2)
    codes = cnn.sample(2, 4, 4, temperature=0.0, generator=torch.Generator().manual_seed(3))
    assert torch.equal(codes, cnn(codes).argmax(1)), (
        "at temperature 0 every code must be the likeliest one, given those before it")


# -- the cached sampler -------------------------------------------------------------------------

CONDITIONS = {"alone": (0, None), "labels": (3, None), "maps": (0, "map"),
              "constant maps": (0, "constant"), "labels and maps": (3, "map")}


@pytest.mark.parametrize("height, width", [(5, 5), (7, 3), (2, 8), (1, 1)])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_cached_sampler_equals_naive(height, width, condition, device):
    classes, kind = CONDITIONS[condition]
    cnn = PixelCNN(23, 8, PixelCNN.layers_for(height, width), num_classes=classes,
                   cond_channels=4 if kind else 0).double().to(device)
    for p in cnn.parameters():
        p.data.mul_(3)                                 # far from uniform: errors show in the codes
    labels = torch.tensor([2, 0, 1], device=device) if classes else None
    size = (1, 1) if kind == "constant" else (height, width)
    cond = torch.randn(3, 4, *size, dtype=torch.float64, device=device) if kind else None
    codes = [sample(3, height, width, labels, cond, temperature=0.9,
                    generator=torch.Generator(device).manual_seed(5))
             for sample in (cnn.sample, partial(sample_pixelcnn, cnn))]
    same = codes[0] == codes[1]
    assert same.all(), (
        f"the cached sampler drew another code than the whole network first at "
        f"{(~same).nonzero()[0].tolist()} (example, row, column)")


def test_cached_sampler_equals_naive_in_float32():
    cnn = PixelCNN(64, 16, 5, num_classes=3)
    labels = torch.tensor([0, 1, 2, 0])
    one = cnn.sample(4, 8, 8, labels, generator=torch.Generator().manual_seed(5))
    two = sample_pixelcnn(cnn, 4, 8, 8, labels, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, two)


def test_cached_sampler_equals_naive_after_training():
    cnn, codes = PixelCNN(8, 8, 3).double(), torch.randint(8, (4, 5, 5))
    optimizer = torch.optim.Adam(cnn.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(cnn(codes), codes).backward()
        optimizer.step()
    one = cnn.sample(4, 5, 5, generator=torch.Generator().manual_seed(5))
    two = sample_pixelcnn(cnn, 4, 5, 5, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, two)


def test_sampling_leaves_the_weights_alone():
    cnn = PixelCNN(8, 8, 2, num_classes=2)
    before = {k: v.clone() for k, v in cnn.state_dict().items()}
    cnn.sample(2, 3, 3, torch.tensor([0, 1]))
    assert all(torch.equal(v, before[k]) for k, v in cnn.state_dict().items())


@pytest.mark.parametrize("batch, num_codebooks", [(1, 1), (2, 2)])
def test_samples_can_be_trained_on(batch, num_codebooks):
    cnn = PixelCNN(8, 8, 2, num_codebooks=num_codebooks)
    codes = cnn.sample(batch, 3, 4)
    assert codes.dtype == torch.int64 and codes.is_contiguous()
    assert not codes.is_inference(), "autograd refuses tensors made in inference mode"
    F.cross_entropy(cnn(codes), codes).backward()


def test_state_dict_is_safe_to_load(tmp_path):
    torch.manual_seed(1)
    cnn, other = (PixelCNN(8, 8, 2, num_classes=3, cond_channels=2) for _ in range(2))
    torch.save(cnn.state_dict(), tmp_path / "prior.pt")
    other.load_state_dict(torch.load(tmp_path / "prior.pt", weights_only=True))
    given = torch.randint(8, (2, 4, 3)), torch.tensor([0, 2]), torch.randn(2, 2, 4, 3)
    assert torch.equal(cnn(*given), other(*given)), "something is not in the state dict"


def test_same_generator_state_same_codes_and_another_state_others():
    cnn = PixelCNN(64, 8, 2)
    draws = [cnn.sample(2, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_cached_sampler_is_at_least_5_times_as_fast_as_naive():
    cnn = PixelCNN(64, 32, 4)
    ratios = []
    for _ in range(3):                                 # in turns, so that a busy machine hits both
        times = []
        for sample in (cnn.sample, partial(sample_pixelcnn, cnn)):
            begun = time.perf_counter()
            sample(16, 8, 8)
            times.append(time.perf_counter() - begun)
        ratios.append(times[1] / times[0])
    assert statistics.median(ratios) >= 5, (
        f"sample is {statistics.median(ratios):.1f} times as fast as the whole network for every "
        "code: compute every activation once")


# -- several codes at a position (8 x 8 x 10) ---------------------------------------------------


def test_slices_of_a_position_see_those_before_them_only():
    cnn = PixelCNN(4, 8, 2, num_codebooks=3).double()
    codes = torch.randint(4, (1, 3, 3, 4))
    before = cnn(codes)
    for g in range(3):
        other = codes.clone()
        other[0, g, 1, 2] = (other[0, g, 1, 2] + 1) % 4
        changed = (cnn(other) - before).abs().amax((0, 1)) > 1e-12     # (G, H, W)
        order = torch.arange(3 * 4).view(3, 4)
        for k in range(3):
            later = (order > order[1, 2]) | ((order == order[1, 2]) & (k > g))
            assert not changed[k][~later].any(), (
                f"a change in codebook {g} reached logits of codebook {k} that come before it")
            assert changed[k][1, 3] and changed[k][1, 2] == (k > g), (
                f"codebook {k} does not see codebook {g}, which comes before it")


@pytest.mark.parametrize("height, width", [(3, 4), (4, 1)])
def test_cached_sampler_equals_naive_for_several_codebooks(height, width, device):
    torch.manual_seed(0)
    cnn = PixelCNN(6, 8, 2, num_codebooks=3, num_classes=2, cond_channels=2).double().to(device)
    for p in cnn.parameters():
        p.data.mul_(3)                                 # far from uniform
    cond = torch.randn(2, 2, height, width, dtype=torch.float64, device=device)
    fast, naive = (sample(2, height, width, torch.tensor([0, 1], device=device), cond,
                          generator=torch.Generator(device).manual_seed(5))
                   for sample in (cnn.sample, partial(sample_pixelcnn, cnn)))
    assert fast.shape == (2, 3, height, width) and torch.equal(fast, naive)
