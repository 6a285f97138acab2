"""Sections 2-4 of vqvae.py: encoder, decoder, p(x|z), and the VQ-VAE that joins them."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from vqvae import (VQVAE, Decoder, Encoder, Gaussian, ResidualBlock, VectorQuantizer,
                   VectorQuantizerEMA, to_unit)

BOTH = pytest.mark.parametrize("kind", [VectorQuantizer, VectorQuantizerEMA])


def tiny(kind=VectorQuantizer, G=1, variance=0.1):
    return VQVAE(kind(16, 4, num_codebooks=G, beta=0.7), Gaussian(variance), hidden=8,
                 res_hidden=6)


def images(count=3, height=16, width=8):
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8)


# -- residual blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [1, 2])
def test_residual_skip_carries_x_itself(ndim):
    block, x = ResidualBlock(4, 3, ndim), torch.randn(2, 4, *[5] * ndim)
    nn.init.zeros_(block.branch[-1].weight), nn.init.zeros_(block.branch[-1].bias)
    before = x.clone()
    assert torch.equal(block(x), before), (
        "with a branch that gives 0 the block is the identity, for negative x too: a ReLU in "
        "place at the head of the branch makes the skip carry relu(x)")
    assert torch.equal(x, before), "the block changed its input in place"


@pytest.mark.parametrize("network", [Encoder(3, 8, 6, 4), Decoder(4, 8, 6, 3)],
                         ids=["encoder", "decoder"])
def test_residual_blocks_own_their_weights(network):
    one, two = (m for m in network.modules() if isinstance(m, ResidualBlock))
    shared = {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}
    assert not shared, "[block] * 2 is one block applied twice: build each block by itself"


# -- sec. 4.1 -----------------------------------------------------------------------------------


def kernels(network, kind):
    return [(m.kernel_size[0], m.stride[0]) for m in network.modules() if isinstance(m, kind)]


def test_encoder_and_decoder_are_those_of_sec_4_1():
    encoder, decoder = Encoder(3, 8, 6, 4), Decoder(4, 8, 6, 3)
    residual = [(3, 1), (1, 1)] * 2
    assert kernels(encoder, nn.Conv2d) == [(4, 2), (4, 2)] + residual + [(1, 1)], (
        "sec. 4.1: two convolutions of stride 2 and window 4 x 4, two residual blocks of 3x3 and "
        "1x1 (and a 1x1 to D channels)")
    assert kernels(decoder, nn.Conv2d) == [(1, 1)] + residual
    assert kernels(decoder, nn.ConvTranspose2d) == [(4, 2), (4, 2)]


@pytest.mark.parametrize("size, strides, latent", [
    (128, (2, 2), 32), (84, (2, 2), 21), (32, (2, 2), 8), (64, (2, 2), 16), (64, (2, 2, 2), 8),
    (21, (3, 7), 1), (30, (5, 3), 2), (16, (1, 4), 4)])
@pytest.mark.parametrize("ndim", [1, 2])
def test_strides_divide_the_size_and_multiply_it_back(size, strides, latent, ndim):
    x = torch.randn(1, 2, *[size] * ndim)
    z_e = Encoder(2, 4, 3, 5, strides, ndim)(x)
    assert z_e.shape == (1, 5, *[latent] * ndim)
    assert Decoder(5, 4, 3, 2, strides[::-1], ndim)(z_e).shape == x.shape


def test_encoder_output_can_be_negative_and_large():
    z_e = Encoder(3, 8, 6, 4)(torch.randn(2, 3, 16, 16))
    assert z_e.min() < 0 < z_e.max(), "nothing may clip z_e: no activation after the last layer"


# -- p(x|z) -------------------------------------------------------------------------------------


def test_every_byte_survives_the_way_to_floats_and_back():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert to_unit(x).min() == -0.5 and to_unit(x).max() == 0.5
    assert torch.equal(Gaussian().image(to_unit(x)), x), (
        "byte -> float -> byte must give the same 256 values: round, do not cut off")


def test_image_clamps_instead_of_wrapping_around():
    out = torch.tensor([-3.0, -0.6, 0.6, 3.0])
    assert Gaussian().image(out).tolist() == [0, 0, 255, 255]


def test_gaussian_nll_matches_numpy():
    x, out = images(2, 4, 4), torch.randn(2, 3, 4, 4)
    expected = [sum((out.numpy()[b][i] - (float(x.numpy()[b][i]) / 255 - 0.5)) ** 2
                    for i in np.ndindex(3, 4, 4)) / 0.3 for b in range(2)]
    assert Gaussian(0.3).nll(out, x).tolist() == pytest.approx(expected, rel=1e-5), (
        "-log p(x|z) is a sum over the pixels of each example, in units of 2 sigma^2")


def test_a_model_that_outputs_the_mean_image_scores_1_a_dimension():
    x = images(50)
    variance = to_unit(x).var(correction=0).item()
    nll = Gaussian(variance).nll(to_unit(x).mean().expand(x.shape), x)
    assert (nll.mean() / x[0].numel()).item() == pytest.approx(1, rel=1e-4)


# -- the VQ-VAE ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("G", [1, 2])
def test_loss_is_eq_3(kind, G):
    model, x = tiny(kind, G).eval(), images()
    y, z_e = model(x), model.encoder(to_unit(x))
    e = model.quantizer.lookup(y.codes)
    N = y.codes[0].numel()                             # latents of an image
    distance = (z_e - e).square().sum() / (len(x) * N)
    data = (y.out - to_unit(x)).square().sum() / 0.1 / (len(x) * N)
    weight = 0.7 + (kind is VectorQuantizer)
    assert y.loss.item() == pytest.approx((data + weight * distance).item(), rel=1e-5), (
        "eq. 3: all three terms summed, and divided by the number of latents")


def test_data_term_trains_encoder_and_decoder_but_not_the_codebook():
    model = tiny().eval()
    y = model(images())
    y.nll.sum().backward()
    for name in ("encoder", "decoder"):
        for key, p in getattr(model, name).named_parameters():
            assert p.grad is not None and p.grad.any(), f"{name}.{key} gets no gradient"
    grad = model.quantizer.codebook.grad
    assert grad is None or not grad.any(), (
        "eq. 3: the data term is for the encoder and the decoder; the codebook has term 2")


def test_codebook_and_commitment_terms_never_reach_the_decoder():
    model, x = tiny().eval(), images()
    model.quantizer(model.encoder(to_unit(x))).loss.backward()
    assert all(p.grad is None for p in model.decoder.parameters())
    assert model.quantizer.codebook.grad.any()


@BOTH
@pytest.mark.parametrize("G", [1, 2])
def test_decoding_the_codes_of_an_image_is_its_reconstruction(kind, G):
    model, x = tiny(kind, G).eval(), images()
    y = model(x)
    assert torch.equal(model.encode(x), y.codes)
    decoded = model.decode(model.encode(x))
    assert decoded.dtype == torch.uint8 and decoded.shape == x.shape
    assert torch.equal(decoded, model.likelihood.image(y.out)), (
        "decode(encode(x)) must be what training reconstructs")


@BOTH
def test_bf16_autocast_trains(kind):
    model, x = tiny(kind), images()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.loss.backward()
    assert y.loss.dtype == torch.float32 and y.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_vqvae_runs_in_float64():
    torch.manual_seed(0)
    model = VQVAE(VectorQuantizer(8, 4), Gaussian(), hidden=8, res_hidden=8).eval()
    x = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    single, double = model(x).out, model.double()(x).out
    assert double.dtype == torch.float64 and torch.allclose(single.double(), double, atol=1e-4)
