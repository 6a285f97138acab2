"""Section 3 of prior.py: the WaveNet and its two samplers."""

import itertools
import statistics
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from naive import sample_wavenet
from prior import WaveNet


def wavenet(**kwargs):
    """A small WaveNet in float64 whose logits really depend on x and on the conditioning."""
    sizes = {"num_values": 7, "channels": 6, "num_layers": 5, "cycle": 3, "skip_channels": 10}
    net = WaveNet(**{**sizes, **kwargs}).double()
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(2)
    return net


def seeded(device="cpu"):
    return torch.Generator(device).manual_seed(5)


def context(net, batch, length, rate, device="cpu"):
    """The conditioning that net needs: frames of `rate` samples, speakers 0, 1, 2, 0 .."""
    given = {}
    if net.cond_channels:
        given["cond"] = torch.randn(batch, net.cond_channels, length // rate, device=device,
                                    dtype=torch.float64)
    if net.num_speakers:
        given["speaker"] = torch.arange(batch, device=device) % net.num_speakers
    return given


def gradients(net, length):
    """seen[t, m]: True where logits[:, :, t] depend on the embedded x at m."""
    kept = []
    hook = net.embed.register_forward_hook(lambda module, args, out: kept.append(out))
    logits = net(torch.randint(net.num_values, (1, length)))
    hook.remove()
    mix = torch.randn(net.num_values, dtype=torch.float64)
    rows = [torch.autograd.grad(logits[0, :, t] @ mix, kept[0], retain_graph=True)[0]
            for t in range(length)]
    return torch.cat(rows).abs().sum(2) > 0            # (T, T, C) -> (T, T)


# -- what it sees -----------------------------------------------------------------------------

STACKS = pytest.mark.parametrize("sizes", [
    dict(num_layers=1), dict(num_layers=5, cycle=3), dict(num_layers=4, cycle=2),
    dict(num_layers=3, cycle=10)])


@STACKS
def test_logits_see_neither_their_own_sample_nor_a_later_one(sizes):
    seen = gradients(wavenet(**sizes), 20)
    leaks = seen.triu().nonzero().tolist()
    assert not leaks, (
        f"(t, m) = {leaks[0]}: logits at t depend on x at m >= t. Shift the input right by one "
        "sample, and pad each convolution in front, never behind")


@STACKS
def test_logits_see_every_sample_of_the_receptive_field_and_none_before_it(sizes):
    net = wavenet(**sizes)
    R = net.receptive_field
    seen = gradients(net, R + 5)
    for t in range(R + 5):
        m = seen[t].nonzero().flatten().tolist()
        assert m == list(range(max(0, t - R), t)), (
            f"logits at {t} depend on x at {m}; receptive_field {R} says from {max(0, t - R)} to "
            f"{t - 1}: look at the dilations")


def test_thirty_layers_in_three_cycles_see_3070_samples():
    net = WaveNet(channels=1, num_layers=30, cycle=10, skip_channels=1)
    assert net.receptive_field == 1 + 3 * (2 ** 10 - 1), (
        "1 for the shift of the input, and the dilation of each layer")


# -- what it computes -------------------------------------------------------------------------


def by_hand(net, x, cond, speaker, rate):
    """Logits (V, T) for one series x, from the definition, sample by sample in numpy."""
    p = {name: value.detach().numpy() for name, value in net.named_parameters()}
    C, L, T = net.channels, len(net.dilations), len(x)
    h = np.zeros((T, C))
    h[1:] = p["embed.weight"][x[:-1]]
    skips = np.tile(p["head.0.bias"], (T, 1))
    for l in range(L):
        mine, after = slice(l * 2 * C, (l + 1) * 2 * C), h.copy()
        for t in range(T):
            a = p[f"dilated.{l}.bias"] + p["speaker.weight"][speaker][mine]
            a = a + p["cond.weight"][mine, :, 0] @ cond[:, t // rate]
            for tap in range(2):                       # the last tap is the present
                past = t - (1 - tap) * net.dilations[l]
                if past >= 0:
                    a = a + p[f"dilated.{l}.weight"][:, :, tap] @ h[past]
            z = np.tanh(a[:C]) / (1 + np.exp(-a[C:]))
            skips[t] += p["head.0.weight"][:, l * C:(l + 1) * C, 0] @ z
            if l + 1 < L:
                after[t] += p[f"out.{l}.weight"][:, :, 0] @ z
        h = after
    s = np.maximum(skips, 0) @ p["head.2.weight"][:, :, 0].T + p["head.2.bias"]
    return (np.maximum(s, 0) @ p["head.4.weight"][:, :, 0].T + p["head.4.bias"]).T


@pytest.mark.parametrize("layers, rate", [(1, 1), (4, 4), (3, 2)])
def test_logits_are_those_of_the_definition(layers, rate):
    net = wavenet(num_layers=layers, cycle=3, cond_channels=3, num_speakers=4)
    x, cond = torch.randint(7, (2, 12)), torch.randn(2, 3, 12 // rate, dtype=torch.float64)
    logits = net(x, cond, torch.tensor([1, 3]))
    for b, speaker in enumerate((1, 3)):
        hand = by_hand(net, x[b].numpy(), cond[b].numpy(), speaker, rate)
        error = np.abs(logits[b].detach().numpy() - hand).max()
        assert error < 1e-9, (
            "gate = tanh * sigmoid of (dilated convolution + V cond + speaker); the residual path "
            f"adds to h, the skip paths add up, then ReLU, 1x1, ReLU, 1x1. Off by {error:.1e}")


def test_every_parameter_learns():
    net = wavenet(cond_channels=3, num_speakers=2)
    x = torch.randint(7, (2, 20))
    F.cross_entropy(net(x, **context(net, 2, 20, 5)), x).backward()
    untrained = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not untrained, (
        f"no gradient reaches {untrained}; training with several processes needs all")


# -- what it is conditioned on ----------------------------------------------------------------


def test_a_frame_of_cond_lasts_as_long_as_if_it_were_repeated():
    net = wavenet(cond_channels=3)
    x, cond = torch.randint(7, (2, 24)), torch.randn(2, 3, 4, dtype=torch.float64)
    slow, fast = net(x, cond), net(x, cond.repeat_interleave(6, 2))
    assert torch.allclose(slow, fast), "frame n belongs to samples n*T/N .. (n+1)*T/N - 1"


def test_a_frame_of_cond_acts_from_its_first_sample_on():
    net = wavenet(cond_channels=3)
    cond = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    logits = net(torch.randint(7, (1, 24)), cond)
    for t in range(24):
        grad, = torch.autograd.grad(logits[0, :, t].square().sum(), cond, retain_graph=True)
        seen = grad.abs().sum((0, 1)) > 0
        assert seen[t // 6], f"sample {t} does not depend on its own frame {t // 6}"
        assert not seen[t // 6 + 1:].any(), f"sample {t} depends on a frame of later samples"


def test_another_speaker_changes_every_logit():
    net, x = wavenet(num_speakers=3), torch.randint(7, (1, 20))
    one, two = net(x, speaker=torch.tensor([0])), net(x, speaker=torch.tensor([2]))
    assert (one - two).abs().amax(1).gt(1e-6).all(), "the speaker must reach every time step"


def test_another_speaker_gives_other_samples():
    net = wavenet(num_speakers=3)
    one, two = (net.sample(1, 60, speaker=torch.tensor([s]), generator=seeded()) for s in (0, 2))
    assert not torch.equal(one, two), "same noise, other speaker: sample must pass the speaker on"


def test_the_speaker_goes_with_its_own_example():
    net, x = wavenet(num_speakers=3), torch.randint(7, (2, 20))
    both = net(x, speaker=torch.tensor([0, 2]))
    for b, speaker in enumerate((0, 2)):
        alone = net(x[b:b + 1], speaker=torch.tensor([speaker]))
        assert torch.allclose(both[b:b + 1], alone), f"example {b} has speaker {speaker}"


@pytest.mark.parametrize("made, called, word", [
    ({}, {"speaker": torch.tensor([0])}, "without speaker"),
    ({"num_speakers": 2}, {}, "with speaker"),
    ({}, {"cond": torch.zeros(1, 2, 6)}, "without cond"),
    ({"cond_channels": 2}, {}, "with cond"),
    ({"cond_channels": 2}, {"cond": torch.zeros(1, 2, 4)}, "4 frames of cond do not divide 6"),
    ({"cond_channels": 2}, {"cond": torch.zeros(1, 2, 12)}, "12 frames"),
    ({"cond_channels": 2}, {"cond": torch.zeros(1, 2, 0)}, "0 frames")])
def test_conditioning_that_does_not_fit_is_a_value_error(made, called, word):
    net = WaveNet(5, 4, 2, **made)
    with pytest.raises(ValueError, match=word):
        net(torch.zeros(1, 6, dtype=torch.long), **called)
    for sample in (net.sample, partial(sample_wavenet, net)):
        with pytest.raises(ValueError, match=word):
            sample(1, 6, **called)


# -- the samplers -----------------------------------------------------------------------------

CONDITIONS = {"alone": {}, "speaker": {"num_speakers": 3}, "cond": {"cond_channels": 4},
              "cond and speaker": {"cond_channels": 4, "num_speakers": 3}}


def assert_same(cached, naive):
    same = cached == naive
    assert same.all(), (
        "from the same noise the cached sampler drew another value than the whole receptive "
        f"field, first at (example, t) = {(~same).nonzero()[0].tolist()}: before the longest "
        "dilation has passed look at the start, after it at the rings, at a new frame at cond")


@pytest.mark.parametrize("length, rate", [(1, 1), (6, 3), (8, 1), (60, 1), (60, 4), (60, 60)])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_cached_sampler_equals_naive(condition, length, rate, device):
    net = wavenet(**CONDITIONS[condition]).to(device)  # receptive field 11
    given = context(net, 3, length, rate, device)
    assert_same(*(sample(3, length, **given, temperature=0.9, generator=seeded(device))
                  for sample in (net.sample, partial(sample_wavenet, net))))


@pytest.mark.parametrize("sizes", [dict(num_layers=1), dict(num_layers=4, cycle=1),
                                   dict(num_layers=5, cycle=2), dict(num_layers=7, cycle=7)])
def test_cached_sampler_equals_naive_for_other_dilations(sizes):
    net = wavenet(**sizes, cond_channels=2)
    given = context(net, 2, 140, 5)
    assert_same(net.sample(2, 140, **given, generator=seeded()),
                sample_wavenet(net, 2, 140, **given, generator=seeded()))


def test_cached_sampler_equals_naive_in_float32():
    net = WaveNet(32, 16, 6, 3, cond_channels=4, num_speakers=3)
    speaker, cond = torch.tensor([0, 1, 2]), torch.randn(3, 4, 10)
    assert_same(net.sample(3, 40, cond, speaker, generator=seeded()),
                sample_wavenet(net, 3, 40, cond, speaker, generator=seeded()))


def test_noise_of_more_than_one_block_is_drawn_alike():
    net = wavenet(num_layers=2)
    assert_same(net.sample(1, 300, generator=seeded()),
                sample_wavenet(net, 1, 300, generator=seeded()))


def test_conditioning_projected_in_parts_is_the_same():
    net = wavenet(cond_channels=3, num_speakers=3)
    given = context(net, 2, 7, 1)
    whole, parts = list(net.frames(**given)), list(net.frames(**given, most=1))
    assert len(whole) == len(parts) == 7, "one bias for each frame of cond, in order"
    assert all(torch.allclose(a, b) for a, b in zip(whole, parts))


def test_samples_follow_the_probabilities_that_forward_gives():
    net, n = wavenet(num_values=3), 30_000
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))  # all 27 series of length 3
    log_p = net(every).log_softmax(1).gather(1, every.unsqueeze(1)).sum((1, 2))
    expected = n * log_p.exp().detach()                # p(x) = prod_t p(x_t | x_1 .. x_(t-1))
    drawn = net.sample(n, 3, generator=seeded()) @ torch.tensor([9, 3, 1])
    chi2 = ((drawn.bincount(minlength=27) - expected) ** 2 / expected).sum().item()
    # With 26 degrees of freedom it exceeds 62 once in 10,000 cases.
    assert chi2 < 62, f"chi-square {chi2:.0f}: {n} samples do not follow softmax(logits)"


def test_temperature_zero_is_the_argmax():
    net = wavenet(num_speakers=3)
    speaker = torch.tensor([0, 1])
    x = net.sample(2, 40, speaker=speaker, temperature=0.0)
    assert torch.equal(x, net(x, speaker=speaker).argmax(1)), (
        "at temperature 0 every value must be the likeliest one, given those before it")


def test_same_generator_state_same_samples_and_another_state_others():
    net = wavenet()
    draws = [net.sample(2, 30, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("batch", [1, 2])
def test_samples_can_be_trained_on(batch):
    net = wavenet()
    x = net.sample(batch, 12)
    assert x.shape == (batch, 12) and x.dtype == torch.int64
    assert not x.is_inference(), "autograd refuses tensors made in inference mode"
    F.cross_entropy(net(x), x).backward()


def test_sampling_leaves_the_weights_alone():
    net = wavenet(cond_channels=2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.sample(2, 12, **context(net, 2, 12, 4))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_cached_sampler_is_at_least_10_times_as_fast_as_the_window():
    net, steps = WaveNet(channels=32, num_layers=9, skip_channels=64), 200
    x = torch.zeros(16, net.receptive_field, dtype=torch.long)
    ratios = []
    for _ in range(3):                                 # in turns, so that a busy machine hits both
        begun = time.perf_counter()
        net.sample(16, steps)
        middle = time.perf_counter()
        with torch.no_grad():
            net(x)                                     # what one step of the naive sampler costs
        ratios.append((time.perf_counter() - middle) / ((middle - begun) / steps))
    assert statistics.median(ratios) >= 10, (
        f"a step of sample is {statistics.median(ratios):.1f} times as fast as the whole "
        "receptive field: compute every activation once")
