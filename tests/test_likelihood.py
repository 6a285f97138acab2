"""Sec. 4.1: p(x|z) over bytes, bits per dimension, VAE, VIMCO; CIFAR-10 in train_image.py."""

import csv
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import train_image
from prior import PixelCNN
from test_images import fake_run, pixels, start
from test_run import stopped
from train_image import Images, code_usage, load_cifar10, measure, measure_prior
from vqvae import (VAE, VIMCO, VQVAE, Categorical, Gaussian, Logistics, VectorQuantizer,
                   VectorQuantizerEMA, bits_per_dim, gaussian_kl, likelihood_gap,
                   read_run, to_unit, vimco)

WIDTHS = dict(hidden=8, res_hidden=8)
PRIORS = ["uniform", "learned", "gaussian"]


def vq(K=4, G=1, D=2, kind=VectorQuantizer, **kwargs):
    """A VQ-VAE whose codebook is spread over its encoder's outputs, so that codes differ."""
    model = VQVAE(kind(K, D, num_codebooks=G, data_init=False), Categorical(), **WIDTHS,
                  **kwargs).eval()
    with torch.no_grad():
        model.quantizer.codebook.copy_(torch.randn(G * K, D))
        model.encoder[-1].weight.mul_(10)
    return model


def vae(**kwargs):
    return VAE(Categorical(), latents=3, **WIDTHS, **kwargs).eval()


def draws(K=4, G=2, samples=3, prior="uniform", **kwargs):
    return VIMCO(Categorical(), K, G, 2, samples, prior, **{**WIDTHS, **kwargs}).eval()


MODELS = {"vqvae": vq, "vae": vae, "vimco": draws}


def images(count=7, height=8, width=12):
    x = torch.randint(256, (count, 3, height, width), dtype=torch.uint8)
    return x // torch.arange(1, count + 1).view(-1, 1, 1, 1)           # each darker than the last


def silence(layer):
    """Make a layer output 0 whatever comes in: as logits, a uniform distribution."""
    for p in layer.parameters():
        torch.nn.init.zeros_(p)


# -- p(x|z) over bytes ----------------------------------------------------------------------------


def every_intensity():
    """Images (2, 3, 16, 16) with all 256 intensities in every colour, at different places."""
    x = torch.stack([torch.randperm(256) for _ in range(6)])
    return x.view(2, 3, 16, 16).to(torch.uint8)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_all_256_intensities_survive_the_round_trip(layout):
    x = every_intensity()
    sure = torch.nn.functional.one_hot(x.long(), 256).float() * 100    # (B, C, H, W, 256)
    out = sure.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous(memory_format=layout)
    wrong = (Categorical().image(out) != x).sum().item()
    assert wrong == 0, f"{wrong} of {x.numel()} bytes came back as another intensity"
    assert Categorical().nll(out, x).max() < 1e-3, (
        "all probability lies on the right byte and -log p(x|z) is not 0: the classes are the "
        "bytes themselves, not what is left after scaling them to floats and back")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_categorical_nll_is_the_sum_over_all_colours_and_pixels(layout):
    x, out = every_intensity(), torch.randn(2, 3 * 256, 16, 16)
    logits = out.numpy().astype(float).reshape(2, 3, 256, 16, 16)
    log_p = logits - np.log(np.exp(logits).sum(2, keepdims=True))
    nats = [-sum(log_p[b, c, x[b, c, i, j], i, j] for c in range(3) for i in range(16)
                 for j in range(16)) for b in range(2)]
    got = Categorical().nll(out.contiguous(memory_format=layout), x)
    assert got.tolist() == pytest.approx(nats, rel=1e-5)


def test_the_softmax_starts_as_a_bell_that_the_decoder_moves():
    likelihood, layer = Categorical(), torch.nn.ConvTranspose2d(5, 3 * 256, 4, 2, 1)
    likelihood.init_logits(layer)
    level = (np.arange(256) + 0.5) / 256
    bell = np.exp(-0.5 * ((level - 0.5) / 0.2) ** 2)
    p = likelihood.logits(layer(torch.zeros(1, 5, 2, 2))).softmax(-1)
    assert np.abs(p.detach().numpy() - bell / bell.sum()).max() < 1e-6, (
        "a decoder that says nothing must expect any intensity, those in the middle the most")
    logits = likelihood.logits(layer(torch.randn(8, 5, 2, 2))).detach()
    mean = (logits.softmax(-1) * torch.arange(256)).sum(-1)
    assert mean.std() > 20, "what the decoder says moves the bell"
    assert logits.diff(dim=-1).abs().max() < 0.05 * (logits.amax(-1) - logits.amin(-1)).max(), (
        "near intensities get near logits")
    darker, wider = torch.zeros(2, 1, 5, 2, 2)
    darker[:, 0], wider[:, 3] = 1, 1
    darker, wider = (likelihood.logits(layer(h)).softmax(-1).detach() for h in (darker, wider))
    assert torch.allclose(wider, wider.flip(-1), atol=1e-6), "every fourth input leaves the mean"
    assert (wider.amax(-1).std() > 1e-3) and not torch.allclose(darker, darker.flip(-1), atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_of_sec_4_1_starts_like_that(kind):
    flags = ["--model", kind, "--likelihood", "categorical", "--hidden", "8", "--res-hidden", "8"]
    model = train_image.make_model(train_image.make_parser().parse_args(flags),
                                   {"size": [8, 8, 3], "variance": 1.0})
    bias = model.decoder[-1].bias.detach().view(3, 256)
    assert (bias.argmax(1) // 2 == 63).all() and bias.amin() < -3, "a bell around the middle"


def test_categorical_image_is_the_mean_of_p():
    out = torch.full((1, 3 * 256, 1, 1), -1e9)
    for c, (low, high) in enumerate([(10, 20), (0, 255), (200, 202)]):
        out[0, [c * 256 + low, c * 256 + high]] = 0.0  # two intensities, equally likely
    assert Categorical().image(out).flatten().tolist() == [15, 128, 201]


# -- a mixture of discretised logistics -----------------------------------------------------------


ALL = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)          # an image for each byte


def parameters(mixtures, seed=0):
    """Decoder outputs (3 M) for one byte: ordinary ones, and extreme ones of every sort."""
    generator = torch.Generator().manual_seed(seed)
    for size in (0.3, 3, 30, 1e4, 1e10):
        yield size * torch.randn(3 * mixtures, generator=generator)
    for mean in (0.1, -40.0, 7e3):                     # inside, outside, far outside
        for log_s in (-1e6, -7.9, -3.0, 5.0, 1e6):     # from a spike to a plain
            out = torch.zeros(3, mixtures)
            out[1], out[2] = mean, log_s
            yield out.flatten()


@pytest.mark.parametrize("mixtures", [1, 2, 5])
def test_the_256_probabilities_of_logistics_sum_to_1(mixtures):
    likelihood = Logistics(mixtures)
    for out in parameters(mixtures):
        nll = likelihood.nll(out.view(1, -1, 1, 1).expand(256, -1, -1, -1), ALL)
        total = (-nll.double()).exp().sum().item()
        assert nll.isfinite().all() and total == pytest.approx(1, abs=1e-5), (
            f"{total} with {out.tolist()}: bytes 0 and 255 take the tails of the logistics")


@pytest.mark.parametrize("mixtures", [1, 3])
def test_logistics_are_differences_of_the_cdf(mixtures):
    for seed in range(20):
        out = torch.randn(3, mixtures, generator=torch.Generator().manual_seed(seed)).double()
        weight, mean, s = out[0].softmax(0).numpy(), out[1].numpy(), out[2].exp().numpy()
        edges = (np.arange(257)[:, None] - 0.5) / 255 - 0.5            # between the bytes
        with np.errstate(over="ignore"):
            cdf = (weight / (1 + np.exp(-(edges - mean) / s))).sum(1)
        cdf[0], cdf[-1] = 0, 1
        expected = -np.log(np.diff(cdf))
        got = Logistics(mixtures).nll(out.float().view(1, -1, 1, 1).expand(256, -1, -1, -1), ALL)
        assert got.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("mixtures", [1, 3])
def test_gradients_of_logistics_are_finite_everywhere(mixtures):
    for out in parameters(mixtures):
        out = out.view(1, -1, 1, 1).expand(256, -1, -1, -1).clone().requires_grad_()
        Logistics(mixtures).nll(out, ALL).sum().backward()
        assert out.grad.isfinite().all(), f"a gradient at {out[0].flatten().tolist()} is not finite"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_logistics_are_those_of_their_own_pixel_and_colour(layout):
    x, out = every_intensity(), torch.randn(2, 3 * 6, 16, 16)
    whole = Logistics(2).nll(out.contiguous(memory_format=layout), x)
    one = sum(Logistics(2).nll(out[:, 6 * c:6 * c + 6, i:i + 1, j:j + 1],
                               x[:, c:c + 1, i:i + 1, j:j + 1])
              for c in range(3) for i in range(16) for j in range(16))
    assert torch.allclose(whole, one, rtol=1e-5), "a sum over all colours of all pixels"


@pytest.mark.parametrize("mixtures", [1, 3])
def test_logistics_image_is_the_mean_of_p(mixtures):
    for seed in range(40):
        out = torch.randn(3 * mixtures, generator=torch.Generator().manual_seed(seed))
        out[2 * mixtures:] -= 2
        out = out.view(1, -1, 1, 1)
        p = (-Logistics(mixtures).nll(out.expand(256, -1, -1, -1), ALL)).exp()
        mean = (p * torch.arange(256)).sum().item()
        assert abs(Logistics(mixtures).image(out).item() - mean) < 0.6


def test_logistics_under_bf16_are_those_of_the_rounded_outputs():
    out, x = torch.randn(2, 3 * 6, 16, 16).bfloat16(), every_intensity()
    with torch.autocast("cpu", torch.bfloat16):
        nll = Logistics(2).nll(out, x)
    assert nll.dtype == torch.float32
    assert torch.equal(nll, Logistics(2).nll(out.float(), x)), "only the outputs may be rounded"


@pytest.mark.parametrize("mixtures", [1, 2, 5])
def test_logistics_start_as_a_density_as_wide_as_images(mixtures):
    likelihood = Logistics(mixtures)
    layer = torch.nn.ConvTranspose2d(5, 3 * likelihood.outputs, 4, 2, 1)
    likelihood.init_logits(layer)
    out = layer(torch.zeros(1, 5, 2, 2))[:, :likelihood.outputs, :1, :1].detach()
    nats = likelihood.nll(out.expand(256, -1, -1, -1), ALL)
    assert nats.max() < math.log(256) + 2, "no intensity comes as a surprise"
    assert likelihood.image(out).item() in (127, 128)
    assert nats.mean() / math.log(2) < 8.5, "noise costs about 8 bits a byte, not many more"


def test_logistics_as_a_model_of_noise_cost_about_8_bits():
    model = VAE(Logistics(5), latents=3, **WIDTHS).eval()
    silence(model.decoder[-1]), silence(model.encoder[-1])
    model.likelihood.init_logits(model.decoder[-1])
    got = bits_per_dim(model, torch.randint(256, (20, 3, 8, 12), dtype=torch.uint8))
    assert 8 < got["bits_per_dim"] < 8.3, (
        "noise has 8 bits a byte: less is not possible, and a wide density does not need many more")


# -- bits per dimension ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_knows_nothing_scores_exactly_8(kind):
    model = MODELS[kind](**({} if kind == "vae" else {"K": 1}))
    silence(model.decoder[-1]), silence(model.encoder[-1])
    got = bits_per_dim(model, images())
    assert got == pytest.approx({"bits_per_dim": 8, "rate": 0, "distortion": 8}, abs=1e-5), (
        "a uniform p(x|z) and a z that says nothing: 8 bits for a byte, no more and no less")


def test_rate_at_k_1_is_0():
    got = bits_per_dim(vq(K=1), images())
    assert got["rate"] == 0 and got["bits_per_dim"] == got["distortion"]


@pytest.mark.parametrize("G, K, rate", [(10, 512, 1.875), (10, 128, 1.4583), (10, 32, 1.0417),
                                        (1, 512, 0.1875)])
def test_rate_is_n_log2_k_over_dims(G, K, rate):
    got = bits_per_dim(vq(K=K, G=G), images(2, 32, 32))["rate"]
    assert got == pytest.approx(64 * G * math.log2(K) / 3072, rel=1e-6)
    assert got == pytest.approx(rate, abs=1e-4), "8 x 8 x G latents for 32 x 32 x 3 bytes"


def test_bits_per_dim_is_the_mean_over_all_images_the_last_small_batch_too():
    model, x = vq(G=2), images(7)
    nats = [model(one[None]).nll.item() for one in x]
    got = bits_per_dim(model, x, batch=3)["distortion"]
    assert got == pytest.approx(np.mean(nats) / (3 * 8 * 12) / math.log(2), rel=1e-5), (
        "7 images in batches of 3: the seventh counts, and as much as any other")


@pytest.mark.parametrize("kind", ["vqvae", "vae"])
def test_bits_per_dim_does_not_depend_on_the_batch_size(kind):
    model, x = MODELS[kind](), images(7)
    if kind == "vae":                                  # no noise: z is the mean of q(z|x)
        model.encoder[-1].bias.data[3:] = -60
    one, *others = (bits_per_dim(model, x, batch) for batch in (1, 2, 3, 7, 100))
    for other in others:
        assert other == pytest.approx(one, rel=1e-5)


def test_bits_per_dim_adds_up_and_leaves_no_gradient():
    for make in MODELS.values():
        got = bits_per_dim(make(), images())
        assert got["bits_per_dim"] == pytest.approx(got["rate"] + got["distortion"], rel=1e-9)


def test_a_gaussian_has_no_bits_per_dim():
    model = VQVAE(VectorQuantizer(4, 2), Gaussian(0.1), **WIDTHS).eval()
    with pytest.raises(ValueError, match="Categorical"):
        bits_per_dim(model, images())


# -- one term for the whole sum over z (sec. 3.2) -------------------------------------------------


def every_z(model, x):
    """All codes (K^N, ...) and log p(x, z) of each, by the uniform prior, for one image."""
    K, shape = model.quantizer.num_codes, model.encode(x[None]).shape[1:]
    codes = torch.tensor(list(itertools.product(range(K), repeat=math.prod(shape))))
    codes = codes.view(-1, *shape)
    with torch.no_grad():
        out = model.decoder(model.quantizer.lookup(codes))
        nll = model.likelihood.nll(out, x.expand(len(codes), -1, -1, -1))
    return codes, -nll - math.prod(shape) * math.log(K)


def test_bits_per_dim_bounds_the_exact_sum_over_z():
    for G in (1, 2):
        model, x = vq(K=4, G=G), images(3, 4, 8)
        for one in x:
            _, log_joint = every_z(model, one)
            exact = -log_joint.logsumexp(0).item() / one.numel() / math.log(2)
            bound = bits_per_dim(model, one[None])["bits_per_dim"]
            assert exact < bound, "sec. 3.2: log p(x) >= log p(x|z_q(x)) p(z_q(x))"


@pytest.mark.parametrize("kind", [VectorQuantizer, VectorQuantizerEMA])
def test_likelihood_gap_is_exact_when_there_is_one_latent(kind):
    model = vq(K=5, kind=kind)
    for x in images(3, 4, 4):
        codes, log_joint = every_z(model, x)
        z_q = (codes == model.encode(x[None])).flatten(1).all(1)
        gap = log_joint.logsumexp(0) - log_joint[z_q].squeeze()
        assert likelihood_gap(model, x, nearest=4).item() == pytest.approx(gap.item(), abs=1e-4)


@pytest.mark.parametrize("G", [1, 3])
def test_likelihood_gap_sums_what_differs_from_z_q_in_one_latent(G):
    model, x = vq(K=3, G=G), images(1, 4, 8)[0]        # 1 x 2 positions
    codes, log_joint = every_z(model, x)
    changed = (codes != model.encode(x[None])).flatten(1).sum(1)
    base = log_joint[changed == 0].squeeze()
    expected = (log_joint[changed <= 1].logsumexp(0) - base).item()
    assert likelihood_gap(model, x, nearest=2, batch=3).item() == pytest.approx(expected, abs=1e-4)
    few = likelihood_gap(model, x, nearest=1).item()
    assert 0 < few < expected < (log_joint.logsumexp(0) - base).item(), (
        "fewer neighbours add less, and none adds more than the whole sum over z")


@pytest.mark.parametrize("K", [1, 2])
def test_likelihood_gap_counts_no_code_twice(K):
    torch.manual_seed(0)
    model = VQVAE(VectorQuantizer(K, 4), Categorical(), hidden=8, res_hidden=8).eval()
    x = torch.randint(256, (3, 4, 4), dtype=torch.uint8)               # one latent
    with torch.no_grad():
        nll = torch.stack([model.likelihood.nll(model.decoder(model.quantizer.lookup(
            torch.full((1, 1, 1), k))), x[None])[0] for k in range(K)])
    gap = nll[model.encode(x[None]).item()] + (-nll).logsumexp(0)      # all of the K terms
    assert likelihood_gap(model, x, nearest=4).item() == pytest.approx(gap.item(), abs=1e-3), (
        "there are only K - 1 other codes")


def test_likelihood_gap_takes_the_codes_next_in_distance():
    model, x = vq(K=6), images(1, 4, 4)[0]
    codes, log_joint = every_z(model, x)
    z_e = model.encoder(to_unit(x[None])).flatten()
    order = (model.quantizer.codebook - z_e).square().sum(1).argsort()
    expected = log_joint[order[:3]].logsumexp(0) - log_joint[order[0]]
    assert likelihood_gap(model, x, nearest=2).item() == pytest.approx(expected.item(), abs=1e-4)


# -- the continuous VAE ---------------------------------------------------------------------------


def test_closed_form_kl_equals_monte_carlo():
    mean, log_var = torch.tensor([0.0, 1.5, -0.7, 2.0]), torch.tensor([0.0, -2.0, 1.0, 0.5])
    q = torch.distributions.Normal(mean, log_var.exp().sqrt())
    z = q.sample((200_000,))
    terms = q.log_prob(z) - torch.distributions.Normal(0, 1).log_prob(z)
    error = terms.std(0) / len(terms) ** 0.5
    off = (gaussian_kl(mean, log_var) - terms.mean(0)).abs() / error.clamp(min=1e-6)
    assert gaussian_kl(mean, log_var)[0] == 0 and off.max() < 4, (
        f"{off.tolist()} standard errors from the mean of log q(z)/p(z): log_var is the log of "
        "the variance, and the KL runs from q(z|x) to p(z)")


def test_vae_draws_z_from_q():
    model, x = vae(), images(1).expand(4000, -1, -1, -1)
    mean, log_var = model.encoder(to_unit(x[:1])).chunk(2, 1)
    seen = []
    model.decoder.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    with torch.no_grad():
        model(x)
    z = seen[0]
    assert torch.allclose(z.mean(0), mean[0], atol=0.1)
    assert torch.allclose(z.std(0), (0.5 * log_var[0]).exp(), rtol=0.1)
    assert not torch.equal(z[0], z[1]), "noise must be drawn anew for every image"


def test_vae_loss_is_the_negative_elbo_and_trains_the_encoder():
    model, x = vae(), images()
    y = model(x)
    mean, log_var = model.encoder(to_unit(x)).chunk(2, 1)
    assert torch.allclose(y.rate, gaussian_kl(mean, log_var).sum((1, 2, 3)))
    assert y.loss.item() == pytest.approx((y.nll + y.rate).mean().item() / (3 * 8 * 12), rel=1e-5)
    y.nll.sum().backward()
    gradient = model.encoder[-1].weight.grad.flatten(1).norm(dim=1)
    assert (gradient > 0).all(), "-log p(x|z) must reach mean and log_var: z = mean + std * noise"


# -- VIMCO ----------------------------------------------------------------------------------------


def estimates(theta, log_joint, picks, estimator):
    """An estimate of the gradient of the bound, for each row of picks (M, S), samples of
    q(z) = softmax(theta) when p(x, z) = exp(log_joint): (M, 2K), by theta and by log_joint."""
    theta, log_joint = (a.detach().expand(len(picks), -1).clone().requires_grad_()
                        for a in (theta, log_joint))
    log_q = theta.log_softmax(1).gather(1, picks).t()                  # (S, M)
    estimator(log_joint.gather(1, picks).t() - log_q, log_q)[1].sum().backward()
    return torch.cat([theta.grad, log_joint.grad], 1)


def reinforce(log_f, log_q):
    """The same bound and the plain estimator: the whole bound is every sample's reward."""
    bound = log_f.logsumexp(0) - math.log(len(log_f))
    return bound, bound + bound.detach() * log_q.sum(0)


def enumerated(theta, log_joint, S):
    """Every way to draw S samples (K^S, S), its probability, and the mean of the bound."""
    picks = torch.tensor(list(itertools.product(range(len(theta)), repeat=S)))
    log_q = theta.log_softmax(0)
    p = log_q[picks].sum(1).exp()
    return picks, p, (p * ((log_joint - log_q)[picks].logsumexp(1) - math.log(S))).sum()


@pytest.fixture
def small():
    """Logits of q(z) and log p(x, z) for K = 4, as far below 0 as those of an image."""
    theta = torch.tensor([0.3, -1.0, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    log_joint = torch.tensor([-31.0, -28.5, -30.0, -29.0], dtype=torch.float64, requires_grad=True)
    return theta, log_joint


@pytest.mark.parametrize("S", [2, 3, 5])
def test_vimco_is_unbiased(small, S):
    picks, p, bound = enumerated(*small, S)
    exact = torch.cat(torch.autograd.grad(bound, small))
    mean = (p.unsqueeze(1) * estimates(*small, picks, vimco)).sum(0)
    assert torch.allclose(mean, exact, atol=1e-9), (
        f"mean of VIMCO's estimate {mean.tolist()}, gradient of the bound {exact.tolist()}: a "
        "baseline may depend on the other samples, never on the sample it is subtracted for")


def test_vimco_gradient_of_many_samples_is_the_exact_one_within_its_standard_error(small):
    _, _, bound = enumerated(*small, 4)
    exact = torch.cat(torch.autograd.grad(bound, small))
    picks = torch.multinomial(small[0].detach().softmax(0), 4 * 50_000, True).view(-1, 4)
    g = estimates(*small, picks, vimco)
    error = g.std(0) / len(g) ** 0.5
    off = (g.mean(0) - exact).abs() / error
    assert off.max() < 4, f"{off.tolist()} standard errors from the exact gradient"
    assert error.norm() < 0.02 * exact.norm(), "too few samples to tell"


@pytest.mark.parametrize("S", [2, 3, 5])
def test_vimco_varies_less_than_reinforce(small, S):
    picks, p, _ = enumerated(*small, S)

    def variance(estimator):
        g = estimates(*small, picks, estimator)
        return (p.unsqueeze(1) * (g - (p.unsqueeze(1) * g).sum(0)).square()).sum().item()

    assert variance(vimco) < 0.02 * variance(reinforce), (
        "subtracting L_-s is there to lower the variance: REINFORCE pays every sample the whole "
        "log-likelihood, thousands of nats, most of it nobody's merit")


def test_the_bound_grows_with_the_number_of_samples(small):
    bounds = [enumerated(*small, S)[2].item() for S in (1, 2, 3, 4, 5, 6)]
    exact = small[1].logsumexp(0).item()
    assert all(a < b for a, b in zip(bounds, bounds[1:])) and bounds[-1] < exact, (
        f"{bounds}, log p(x) = {exact}: L = log 1/S sum f approaches log p(x) from below")


def test_vimco_returns_the_bound_in_sums_too_large_for_exp():
    log_f = torch.tensor([[-9000.0, 5.0], [-9001.0, 5.0]])
    bound, _ = vimco(log_f, torch.zeros(2, 2))
    assert bound.tolist() == pytest.approx([-9000 + math.log((1 + math.exp(-1)) / 2), 5.0])


def one_pixel_field(prior, samples, G=2, K=3):
    """VIMCO on a 4 x 4 image with 1 x 1 x G latents: K^G values of z, few enough to enumerate."""
    model = draws(K, G, samples, prior, channels=1, hidden=4, res_hidden=4)
    with torch.no_grad():
        if prior == "learned":
            model.log_prior.copy_(torch.randn(model.log_prior.shape))
        model.encoder[-1].weight.mul_(8)
        model.codebook.weight.mul_(6)
        model.decoder[-1].weight.mul_(40)              # so that it matters which z is drawn
    return model, torch.randint(256, (1, 1, 4, 4), dtype=torch.uint8)


def enumerated_model(model, x):
    """log q(z|x) and log p(x, z) of all K^G values of z."""
    K, G = model.num_codes, model.num_codebooks
    z = torch.tensor(list(itertools.product(range(K), repeat=G)))      # (K^G, G)
    log_q = model.encode(x).view(G, K).log_softmax(1)
    log_p = model.log_prior.view(G, K).log_softmax(1)
    out = model.decoder(model.embed(z.view(-1, G, 1, 1)))
    nll = model.likelihood.nll(out, x.expand(len(z), -1, -1, -1))
    sum_over_slices = [sum(a[g, z[:, g]] for g in range(G)) for a in (log_q, log_p)]
    return sum_over_slices[0], sum_over_slices[1] - nll


@pytest.mark.parametrize("prior", ["uniform", "learned"])
def test_gradient_of_the_whole_model_is_the_exact_one_within_its_standard_error(prior):
    model, x = one_pixel_field(prior, samples=2)
    log_q, log_joint = enumerated_model(model, x)
    _, _, bound = enumerated(log_q, log_joint, 2)      # log_q is normalised: its own logits
    leaves = {"encoder": model.encoder[-1].bias, "vectors": model.codebook.weight}
    if prior == "learned":
        leaves["prior"] = model.log_prior
    exact = torch.autograd.grad(-bound / 16, list(leaves.values()))
    exact = torch.cat([g.flatten() for g in exact])
    rounds = []
    for _ in range(60):
        loss = model(x.expand(500, -1, -1, -1)).loss
        grads = torch.autograd.grad(loss, list(leaves.values()))
        rounds.append(torch.cat([g.flatten() for g in grads]))
    rounds = torch.stack(rounds)
    error = rounds.std(0) / len(rounds) ** 0.5
    off = (rounds.mean(0) - exact).abs() / error.clamp(min=1e-7)
    assert off.max() < 5, f"{off.tolist()} standard errors off, for {list(leaves)} in turn"
    assert error.norm() < 0.1 * exact.norm(), "too few samples to tell"


@pytest.mark.parametrize("prior", ["uniform", "learned"])
def test_vimco_bits_per_dim_fall_with_samples_and_bound_the_exact_ones(prior):
    bits = []
    for samples in (2, 10, 50):
        torch.manual_seed(1)
        model, x = one_pixel_field(prior, samples)
        bits.append(bits_per_dim(model, x.expand(200, -1, -1, -1))["bits_per_dim"])
    exact = -enumerated_model(model, x)[1].logsumexp(0).item() / 16 / math.log(2)
    assert bits[0] > bits[1] > bits[2] > exact - 0.01, f"{bits} with 2, 10, 50 samples; {exact}"


def test_vimco_draws_every_code_as_often_as_q_says():
    model, x = one_pixel_field("uniform", samples=50)
    with torch.no_grad():
        z, log_q, log_p = model.draw(x.expand(200, -1, -1, -1))        # z (S, B, G, 1, 1)
    q = model.encode(x).view(2, 3).softmax(1)
    for g in range(2):
        found = z[:, :, g].flatten().bincount(minlength=3) / z[:, :, g].numel()
        assert torch.allclose(found, q[g], atol=0.02), f"slice {g}: {found} drawn, q(z|x) {q[g]}"
    expected = sum(q[g].log()[z[:, :, g, 0, 0]] for g in range(2))
    assert torch.allclose(log_q, expected, atol=1e-4)
    assert torch.allclose(log_p, torch.full_like(log_p, -2 * math.log(3)))


def test_vimco_with_gaussian_z_scores_its_samples_and_does_not_reparametrise():
    model, x = draws(samples=5, prior="gaussian"), images(3, 4, 4)
    z, log_q, log_p = model.draw(x)
    mean, log_var = model.encode(x).unbind(-1)
    q, p = torch.distributions.Normal(mean, log_var.exp().sqrt()), torch.distributions.Normal(0, 1)
    assert torch.allclose(log_q, q.log_prob(z).flatten(2).sum(2), atol=1e-5)
    assert torch.allclose(log_p, p.log_prob(z).flatten(2).sum(2), atol=1e-5)
    assert not z.requires_grad, "VIMCO's gradient goes by log q(z|x): z itself must carry none"
    # The score has mean 0 under q: its standard deviation is 1/std by the mean.
    torch.manual_seed(1)
    wide = draws(samples=2000, prior="gaussian")
    z, _, _ = wide.draw(x)
    mean, log_var = wide.encode(x).unbind(-1)
    assert torch.allclose(z.mean(0), mean, atol=0.15)
    assert torch.allclose(z.std(0), (0.5 * log_var).exp(), rtol=0.1)


@pytest.mark.parametrize("prior", PRIORS)
def test_vimco_in_chunks_equals_the_whole_at_once(prior):
    model, results = draws(samples=7, prior=prior), []
    for chunk in (7, 3, 1):                            # 7; 3 + 3 + 1; one by one
        model.chunk = chunk
        model.zero_grad()
        torch.manual_seed(0)
        y = model(images(3))
        y.loss.backward()
        grad = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": y.loss, "nll": y.nll, "rate": y.rate, "out": y.out, **grad})
    for other in results[1:]:
        assert results[0].keys() == other.keys()
        for name, value in results[0].items():
            small = 1e-5 * value.abs().max().item()
            assert torch.allclose(value, other[name], rtol=1e-4, atol=small), (
                f"{name}: in chunks all is the same to rounding")


def test_vimco_holds_one_chunk_at_a_time():
    model, x = draws(samples=12), images(2)
    model.chunk = 3
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda a: sizes.append(a) or a, lambda a: a):
        model(x).loss                                  # what forward keeps for backward
    kept = sum({a.data_ptr(): a.untyped_storage().nbytes() for a in sizes}.values())
    sizes.clear()
    model.chunk = 12
    with torch.autograd.graph.saved_tensors_hooks(lambda a: sizes.append(a) or a, lambda a: a):
        model(x).loss
    whole = sum({a.data_ptr(): a.untyped_storage().nbytes() for a in sizes}.values())
    assert kept < whole / 5, f"{kept} bytes are kept for backward; {whole} without chunks"


@pytest.mark.parametrize("prior", PRIORS)
def test_vimco_trains_all_it_has(prior):
    model = draws(prior=prior)
    y = model(images())
    y.loss.backward()
    still = [name for name, p in model.named_parameters()
             if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still, f"no gradient reaches {still}"
    assert y.out.shape == (7, 768, 8, 12) and y.nll.shape == y.rate.shape == (7,)
    assert not y.nll.requires_grad and not y.rate.requires_grad
    assert (y.codes is None) == (prior == "gaussian")
    assert model.reconstruct(images()).dtype == torch.uint8
    assert ("log_prior" in dict(model.named_parameters()) and model.log_prior.requires_grad) == (
        prior == "learned"), "the uniform prior is kept constant"


def test_vimco_rate_and_distortion_add_up_to_the_bound():
    model, x = draws(samples=4), images(3)
    with torch.no_grad():
        model.codebook.weight.mul_(20)                 # else all z are as good as each other
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    with torch.no_grad():
        z, log_q, log_p = model.draw(x)
        nll = torch.stack([model.likelihood.nll(model.decoder(model.embed(s)), x) for s in z])
    log_f = log_p - nll - log_q
    assert torch.allclose(y.nll + y.rate, math.log(4) - log_f.logsumexp(0), rtol=1e-5)
    assert torch.allclose(y.nll, (log_f.softmax(0) * nll).sum(0), rtol=1e-5)
    assert not torch.allclose(y.nll, nll.mean(0), rtol=1e-4), "the better z count for more"


def test_reconstructions_take_the_middle_of_q():
    x = images(3)
    with torch.no_grad():
        for prior in ("uniform", "gaussian"):
            model = draws(K=4, G=2, prior=prior)
            h = model.encode(x)                        # (B, G, h, w, K), or mean and log variance
            z = h[..., 0] if prior == "gaussian" else h.max(-1).indices
            expected = model.likelihood.image(model.decoder(model.embed(z)))
            assert torch.equal(model.reconstruct(x), expected), "the mode of q(z|x), or its mean"
        model = vae()
        mean = model.encoder(to_unit(x))[:, :3]
        assert torch.equal(model.reconstruct(x), model.likelihood.image(model.decoder(mean)))


def test_vimco_slices_have_vectors_of_their_own():
    model = draws(K=4, G=2)
    z = torch.full((1, 2, 1, 1), 1)
    e = model.codebook.weight
    assert torch.equal(model.embed(z).flatten(), torch.cat([e[1], e[4 + 1]]))


@pytest.mark.parametrize("wrong", [{"samples": 1}, {"prior": "Gaussian"}])
def test_vimco_refuses_one_sample_and_unknown_priors(wrong):
    with pytest.raises(ValueError, match="at least 2; the prior is uniform, learned or gaussian"):
        draws(**wrong)


# -- numbers of the script ------------------------------------------------------------------------


def parts(*x):
    """Images (N, 3, H, W) as a part of the data: training, validation, test."""
    return SimpleNamespace(**{name: Images(a.permute(0, 2, 3, 1), torch.arange(len(a)))
                              for name, a in zip(("train", "valid", "test"), x)})


@pytest.mark.parametrize("classes", [(), ("cat", "dog", "frog")])
def test_bits_per_dim_with_the_fitted_prior(classes):
    model, x = vq(K=4, G=2), images(5)
    codes, labels = model.encode(x), torch.tensor([0, 1, 2, 1, 0])
    prior = PixelCNN(4, 8, 2, num_classes=len(classes), num_codebooks=2)
    test = TensorDataset(codes.to(torch.uint8), *[labels] * (len(classes) > 0))
    data = parts(x, x, x)
    data.classes = classes
    got = measure_prior(fake_run(num_codes=4), prior, SimpleNamespace(test=test, valid=test), data,
                        {"distortion": 5.0})
    with torch.no_grad():
        log_p = prior(codes, labels if classes else None).log_softmax(1)
    log_p = log_p.gather(1, codes.unsqueeze(1))
    bits = -log_p.sum().item() / math.log(2) / 5
    assert got["prior_bits_per_code"] == pytest.approx(bits / codes[0].numel(), rel=1e-5)
    bits += math.log2(3) if classes else 0
    assert got["rate_fitted_prior"] == pytest.approx(bits / x[0].numel(), rel=1e-5), (
        "-log2 p(z) of an image, and log2 of the number of classes for telling the prior which")
    assert got["bits_per_dim_fitted_prior"] == pytest.approx(got["rate_fitted_prior"] + 5.0)
    assert got["valid_prior_bits_per_code"] == got["prior_bits_per_code"]


def test_code_usage_with_several_codebooks():
    model, x = vq(K=4, G=3), images(6, 16, 16)
    codes = model.encode(x)
    run = fake_run(num_codes=4)
    run.args.num_codebooks = 3
    got = code_usage(run, TensorDataset(codes.to(torch.uint8)), parts(x).train)
    used, perplexities = 0, []
    for g in range(3):
        n = codes[:, g].flatten().bincount(minlength=4)
        p = n[n > 0] / n.sum()
        used, perplexities = used + len(p), perplexities + [-(p * p.log()).sum().item()]
    assert got["codes_used"] == used and got["num_codes"] == 12
    assert got["perplexity"] == pytest.approx(math.exp(np.mean(perplexities)), rel=1e-4), (
        "of a codebook, between 1 and K: the geometric mean over the codebooks")
    assert got["compression"] == pytest.approx(16 * 16 * 3 * 8 / (4 * 4 * 3 * 2))


@pytest.mark.parametrize("kind", MODELS)
def test_measure_reports_the_bits_of_the_whole_set(kind):
    model, x, valid = MODELS[kind](), images(7), images(5)
    run = fake_run(num_codes=4)
    run.args.model = kind
    got = measure(run, model, parts(x, valid, x))
    for prefix, part in (("", x), ("valid_", valid)):
        torch.manual_seed(0)
        error = (model.reconstruct(part).double() - part.double()).square().mean().item()
        assert got[f"{prefix}mse"] == pytest.approx(error)
        for name, value in bits_per_dim(model, part).items():
            assert got[prefix + name] == pytest.approx(value, rel=1e-5), prefix + name
    assert ("likelihood_gap_bits_per_dim" in got) == (kind == "vqvae")
    assert got.get("likelihood_gap_bits_per_dim", 0) >= 0


# -- CIFAR-10 -------------------------------------------------------------------------------------


def cifar10_files(count=4):
    """The six files of the binary version in small: {name: bytes}, images, labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6 * count, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(6 * count) % 10
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    files = {}
    for i, name in enumerate(names):                   # a byte of label, then red, green, blue
        files[name] = b"".join(bytes([y]) + x.transpose(2, 0, 1).tobytes() for x, y in zip(
            images[i * count:(i + 1) * count], labels[i * count:(i + 1) * count]))
    return files, images, labels


def write_archive(path, folder="cifar-10-batches-bin"):
    """cifar-10-binary.tar.gz in small -> its MD5."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in cifar10_files()[0].items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def archive(monkeypatch, tmp_path):
    """Such an archive, served on localhost; train_image expects its digest."""
    (tmp_path / "web").mkdir()
    path = tmp_path / "web" / "cifar-10-binary.tar.gz"
    monkeypatch.setattr(train_image, "CIFAR10_MD5", write_archive(path))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "web"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(train_image, "CIFAR10_URL",
                        f"http://127.0.0.1:{server.server_port}/{path.name}")
    yield path
    server.shutdown()
    server.server_close()


def same_as_the_files(data):
    _, images, labels = cifar10_files()
    assert np.array_equal(data.array, images) and np.array_equal(pixels(data.test), images[20:]), (
        "a record is red, green, blue planes of 32 rows: as an image (32, 32, 3)")
    assert sorted([*data.train.rows.tolist(), *data.valid.rows.tolist()]) == list(range(20)), (
        "validation is cut from training, never from the test batch")
    assert len(data.valid) == 2 and len(data.classes) == 10
    for part in (data.train, data.valid, data.test):
        assert part.labels[0].tolist() == labels[part.rows].tolist()


def refused(folder):
    with pytest.raises(ValueError) as error:
        load_cifar10(folder)
    return str(error.value)


def test_cifar10_packed(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(train_image, "CIFAR10_URL", "http://127.0.0.1:1/none")
    same_as_the_files(load_cifar10(tmp_path / "web"))
    assert [p.name for p in (tmp_path / "web").iterdir()] == ["cifar-10-binary.tar.gz"]


def test_cifar10_downloaded_once(archive, tmp_path, monkeypatch):
    same_as_the_files(load_cifar10(tmp_path / "new" / "data"))
    left = [p.name for p in (tmp_path / "new" / "data").iterdir()]
    assert left == ["cifar-10-binary.tar.gz"], "something was left behind"
    monkeypatch.setattr(train_image, "CIFAR10_URL", "http://127.0.0.1:1/none")
    same_as_the_files(load_cifar10(tmp_path / "new" / "data"))


def test_cifar10_offline_names_the_file_and_where_it_belongs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_image, "CIFAR10_URL", "http://127.0.0.1:1/cifar-10-binary.tar.gz")
    line = refused(tmp_path)
    assert str(tmp_path / "cifar-10-binary.tar.gz") in line and "http://127.0.0.1:1" in line
    assert "--data-dir" in line and not list(tmp_path.iterdir())


def test_cifar10_download_of_something_else_is_not_kept(archive, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_image, "CIFAR10_MD5", "0" * 32)
    line = refused(tmp_path / "data")
    assert "0" * 32 in line and not (tmp_path / "data").exists(), (
        "what is not the file we know must not be there under its name")


def test_cifar10_torn_archive_is_named(archive, tmp_path, capsys):
    archive.write_bytes(archive.read_bytes()[:-100])
    line = refused(tmp_path / "web")
    assert "MD5" in line and str(archive) in line


# -- the whole run --------------------------------------------------------------------------------

TINY = ("--preset cifar10-small --steps 4 --prior-steps 2 "
        "--hidden 8 --res-hidden 8 --prior-channels 8 --num-codes 8 --num-codebooks 3 --code-dim 4 "
        "--latents 3 --batch-size 4 --samples 3 --device cpu").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likelihood")
    (folder / "data").mkdir()
    md5 = write_archive(folder / "data" / "cifar-10-binary.tar.gz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_image, "CIFAR10_MD5", md5)
        patch.chdir(folder)                            # --data cifar10 --data-dir data by default
        for kind in MODELS:
            start(patch, *TINY, "--model", kind, "--out", kind)
        yield folder


@pytest.mark.parametrize("kind", MODELS)
def test_metrics_are_what_the_trained_model_scores(folder, kind):
    metrics = json.loads((folder / kind / "metrics.json").read_text())
    args, facts, [state] = read_run(folder / kind, "image", [kind])
    model = train_image.make_model(args, facts).eval().to(memory_format=torch.channels_last)
    model.load_state_dict(state)
    test = torch.from_numpy(cifar10_files()[1][20:]).permute(0, 3, 1, 2)
    torch.manual_seed(0)
    got = bits_per_dim(model, test)
    assert {k: metrics[k] for k in got} == pytest.approx(got, rel=1e-4)
    assert metrics["mse"] == pytest.approx(
        (model.reconstruct(test).double() - test.double()).square().mean().item(), rel=1e-2)


def test_vqvae_has_bits_under_both_priors_and_the_likelihood_gap(folder):
    metrics = json.loads((folder / "vqvae" / "metrics.json").read_text())
    assert metrics["rate"] == pytest.approx(64 * 3 * 3 / 3072)
    fitted = (metrics["prior_bits_per_code"] * 192 + math.log2(10)) / 3072
    assert metrics["rate_fitted_prior"] == pytest.approx(fitted)
    assert metrics["bits_per_dim_fitted_prior"] == pytest.approx(fitted + metrics["distortion"])
    assert metrics["likelihood_gap_bits_per_dim"] >= 0


@pytest.mark.parametrize("kind", MODELS)
def test_the_log_has_bits_per_dim_of_validation_images_against_steps(folder, kind):
    with open(folder / kind / "log.csv") as f:
        rows = [row for row in csv.DictReader(f) if row["stage"] == kind]
    curve = [float(row["valid_bits_per_dim"]) for row in rows if row["valid_bits_per_dim"]]
    metrics = json.loads((folder / kind / "metrics.json").read_text())
    assert curve[-1] == pytest.approx(metrics["valid_bits_per_dim"], rel=1e-2), (
        "2 validation images: the curve ends where the measurement stands, but for the noise")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"] and rows[0]["distortion"]
    for name in ("reconstructions.png", "curves.png", "config.json"):
        assert (folder / kind / name).stat().st_size > 0, name


@pytest.mark.parametrize("kind", ["vae", "vimco"])
def test_resume_of_a_finished_run_measures_the_same(folder, kind, monkeypatch):
    before = json.loads((folder / kind / "metrics.json").read_text())
    monkeypatch.chdir(folder)
    start(monkeypatch, "--resume", "--out", folder / kind)
    after = json.loads((folder / kind / "metrics.json").read_text())
    assert {**after, "seconds": 0} == pytest.approx({**before, "seconds": 0}, rel=1e-6)


@pytest.mark.parametrize("flags", [["--samples", "1"], ["--samples", "0"]])
def test_vimco_with_too_few_samples_is_named(folder, capsys, monkeypatch, flags):
    monkeypatch.chdir(folder)
    line = stopped(capsys, start, monkeypatch, *TINY, "--model", "vimco", *flags)
    assert "samples" in line, "the rehearsal finds what VIMCO refuses"


@pytest.mark.parametrize("kind", ["vae", "vimco"])
def test_models_without_codes_say_so(folder, kind):
    with pytest.raises(ValueError, match="checkpoint-vqvae.pt"):
        train_image.load(folder / kind, "cpu")
