"""Images: data -> VQ-VAE -> codes -> PixelCNN -> samples (secs. 4.2 and 3.3 of the paper).

    python train_image.py                          demo scenes, no download, no GPU: minutes
    python train_image.py --data photos/ --size 128 --preset paper       your own images, on a GPU
    python train_image.py --resume                 resume runs/image, as if never stopped
    torchrun --nproc_per_node=2 train_image.py     the same run over several processes
    python train_image.py --preset cifar10-small --model vae     bits/dim as in sec. 4.1, also for
                                                   vqvae and vimco; --preset cifar10 on a GPU
    python train_image.py --resume --second-stage  27 bits per image: a second VQ-VAE, on the codes

    python train_image.py --sample 16 --label cone           more samples from a finished run
    python train_image.py --reconstruct a.png b.jpg          your pictures through its codes

Stage one trains the VQ-VAE under a uniform prior. Then it is frozen, every image is encoded
once, and a PixelCNN learns the distribution of the codes; codes drawn from it are decoded to
images. --out (runs/image) receives reconstructions.png, samples.png, curves.png,
metrics.json, log.csv, config.json and the checkpoints; README explains every number. The models
that sec. 4.1 compares with, --model vae and vimco, have stage one only. --second-stage adds
second_stage.png, the paper's figure 5.
"""

import gzip
import hashlib
import math
import os
import re
import shutil
import tarfile
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset, TensorDataset

from prior import PixelCNN
from vqvae import (VAE, VIMCO, VQVAE, Categorical, Gaussian, GlobalVAE, GlobalVQVAE, Logistics,
                   Parser, batches, bits_per_dim, check_batch, count_codes, digest, launch,
                   likelihood_gap, make_quantizer, mix, perplexity, pick_device, positive, prepare,
                   read_run, reading, safe_name, smallest_int, to_unit)

PRESETS = {
    # 32 x 32 x 3 -> 8 x 8 codes of 9 bits: the 42.6-fold compression of sec. 4.2, for a laptop.
    "demo": dict(steps=1600, prior_steps=2500, batch_size=32, lr=1e-3, prior_lr=3e-3,
                 lr_decay=0.5, hidden=64, res_hidden=32, prior_channels=64),
    # ImageNet 128 x 128 x 3 -> 32 x 32, K = 512. Widths, batch and rate from the authors' own
    # public notebook; the paper gives Adam 2e-4 and 250,000 steps for CIFAR-10 only.
    "paper": dict(steps=250_000, prior_steps=250_000, batch_size=128, lr=2e-4, prior_lr=2e-4,
                  hidden=128, res_hidden=32, size=128, prior_channels=256, second_steps=250_000),
    # Sec. 4.1. K and D are not public. 640 latents cost 1.04 bits/dim at K = 32, 1.46 at 128, 1.88
    # at 512, which pays while a bit of rate takes more than a bit off the distortion. The best
    # public figure, 4.82 (bshall/VectorQuantizedVAE: 8 codebooks, K = 128), is 1.17 + 3.65: K =
    # 512 arrives at the paper's 4.67 if from there a bit of rate buys 1.2 of distortion. So 512,
    # as for the paper's other images; 128 is worth a try. D = 32: 320 numbers from 256 channels.
    "cifar10": dict(data="cifar10", likelihood="categorical", num_codebooks=10, code_dim=32,
                    steps=250_000, prior_steps=50_000, batch_size=128, lr=2e-4, prior_lr=2e-4,
                    hidden=256, res_hidden=256, prior_channels=128),
    # On a laptop: narrow, few steps, few samples. The rate is paid from the first step on, and the
    # distortion falls slowly: so K = 8, 0.63 bits/dim. (K = 32 has 1.04, and after 300 steps 0.02
    # less distortion.)
    "cifar10-small": dict(data="cifar10", likelihood="categorical", num_codebooks=10, code_dim=16,
                          num_codes=8, steps=700, prior_steps=150, samples=4, batch_size=8,
                          lr=3e-3, prior_lr=3e-3, lr_decay=0.5, hidden=32, res_hidden=32,
                          prior_channels=32),
}


def main(run, data):
    """The paper's experiment: a VQ-VAE, the prior of its codes, samples, numbers."""
    model = fit_model(run, data)                       # secs. 3.1, 3.2: the prior is uniform
    metrics = measure(run, model, data)
    draw_reconstructions(run, model, data)
    if run.args.model == "vqvae":
        codes = encode_all(run, model, data)           # every image once; the model is frozen
        metrics |= code_usage(run, codes.test, data.test)
        prior = fit_prior(run, codes, data)            # sec. 3.3: p(codes), autoregressive
        metrics |= measure_prior(run, prior, codes, data, metrics)
        labels, samples = sample_images(run, model, prior, data)
        draw_samples(run, samples, data.classes)
        if len(data.classes) > 1:                      # do samples show the class they should?
            metrics |= judge_samples(run, samples, labels, data)
        if run.args.second_stage:                      # sec. 4.2: a whole image in 27 bits
            metrics |= second_stage(run, model, codes, data)
    run.finish(metrics)


# ---------------------------------------------------------------------------------------------
# Stage one: encoder, codebook, decoder (eq. 3)
# ---------------------------------------------------------------------------------------------


def fit_model(run, data):
    """Train the VQ-VAE, or one of the models that sec. 4.1 compares it with."""
    args = run.args
    model = make_model(args, data.facts).to(run.device, memory_format=torch.channels_last)
    run.say(f"{sum(p.numel() for p in model.parameters()):,} weights in the model")
    run.fit(args.model, model, lambda net, x, *_: model_loss(net, x, args), data.train, args.steps,
            args.batch_size, args.lr, data.valid)
    return model.requires_grad_(False)                 # stage one is over


def make_model(args, facts):
    """All three "using the same standard VAE architecture", sec. 4.1."""
    likelihood = {"mse": lambda: Gaussian(facts["variance"]), "categorical": Categorical,
                  "logistics": lambda: Logistics(args.mixtures)}[args.likelihood]()
    widths = dict(channels=facts["size"][2], hidden=args.hidden, res_hidden=args.res_hidden)
    if args.model == "vae":
        model = VAE(likelihood, args.latents, **widths)
    elif args.model == "vimco":
        model = VIMCO(likelihood, args.num_codes, args.num_codebooks, args.code_dim, args.samples,
                      args.vimco_prior, **widths)
    else:
        model = VQVAE(make_quantizer(args, args.num_codebooks), likelihood, **widths)
    if args.likelihood != "mse":
        likelihood.init_logits(model.decoder[-1])
    return model


def model_loss(net, x, args):
    y = net(x)
    if args.likelihood == "mse":
        stats = {"mse": F.mse_loss(y.out.detach().float(), to_unit(x)) * 255 ** 2}
    else:
        scale = 1 / (x[0].numel() * math.log(2))       # nats per image -> bits/dim
        stats = {"rate": y.rate.mean() * scale, "distortion": y.nll.mean() * scale}
        stats["bits_per_dim"] = stats["rate"] + stats["distortion"]
    if y.codes is not None:
        stats["codes_used"] = count_codes(y.codes, args.num_codes, args.num_codebooks)
    return y.loss, stats


# ---------------------------------------------------------------------------------------------
# Stage two: the prior, "an autoregressive distribution over z" (sec. 3.3)
# ---------------------------------------------------------------------------------------------


class Codes(NamedTuple):
    """The three parts of the data as data sets of codes (N, h, w), and labels (N,) if any."""

    train: TensorDataset
    valid: TensorDataset
    test: TensorDataset


@torch.no_grad()
def encode_all(run, model, data):
    """Every image once, the last, smaller batch included; in the smallest type, off the device."""
    run.say("encoding all images")

    def encode(part):
        codes = torch.cat([model.encode(x).cpu().to(smallest_int(run.args.num_codes))
                           for x in part.batches(128, run.device)])
        return TensorDataset(codes, *part.labels())
    return Codes(encode(data.train), encode(data.valid), encode(data.test))


def make_prior(args, facts):
    height, width = (side // STRIDE for side in facts["size"][:2])
    return PixelCNN(args.num_codes, args.prior_channels, PixelCNN.layers_for(height, width),
                    len(facts["classes"]), num_codebooks=args.num_codebooks)


def fit_prior(run, codes, data):
    """A PixelCNN on the codes, given the class if there are classes."""
    args = run.args
    torch.manual_seed(mix(args.seed, "prior"))         # the same start whatever was resumed
    prior = make_prior(args, data.facts)
    return run.fit("prior", prior, prior_loss, codes.train, args.prior_steps,
                   args.prior_batch_size or args.batch_size, args.prior_lr, codes.valid)


def prior_loss(net, codes, labels=None):
    codes = codes.long()
    loss = F.cross_entropy(net(codes, labels), codes)  # nats per code
    return loss, {"bits_per_code": loss.detach() / math.log(2)}


def sample_codes(run, prior, count, size, generator, labels=None, cond=None):
    """Codes (count, h, w) from a PixelCNN; a rehearsal draws one and repeats it."""
    height, width = (side // STRIDE for side in size[:2])
    drawn = (1, 1) if run.rehearsing else (height, width)
    codes = prior.sample(count, *drawn, labels=labels, cond=cond, generator=generator,
                         temperature=run.args.temperature)
    return codes.expand(*codes.shape[:-2], height, width)


def sample_images(run, model, prior, data, most=1000):
    """Labels (N,) that cover all classes, and as many images (N, C, H, W), decoded from codes
    that the prior draws given these labels. N is about 200, and at least one for each class."""
    classes = len(data.classes) or 8                   # without classes: eight columns to look at
    shown = torch.linspace(0, classes - 1, min(classes, most)).long()
    labels = shown.repeat(max(1, 200 // classes) if data.classes else 8)
    run.say(f"drawing {len(labels)} samples from the prior")
    generator, images = torch.Generator(run.device).manual_seed(run.args.seed), []
    for y in batches(labels[:2] if run.rehearsing else labels, 50, run.device):
        codes = sample_codes(run, prior, len(y), data.facts["size"], generator,
                             y if data.classes else None)
        images.append(model.decode(codes).cpu())
    images = torch.cat(images)
    return labels, images[torch.arange(len(labels)) % len(images)]     # a rehearsal repeats two


# ---------------------------------------------------------------------------------------------
# The second stage: a whole image in 27 bits (sec. 4.2, figure 5)
# ---------------------------------------------------------------------------------------------

LATENTS = 3  # "We use only three latent variables (each with K=512 and their own embedding space"


def second_stage(run, model, codes, data):
    """A second VQ-VAE on the code maps of the first; figure 5; and whether its latents are used."""
    lookup = model.quantizer.lookup                    # codes -> e_k, what the encoders take
    vqvae, vae, alone = make_second(run, data.facts["size"])
    fit_second(run, vqvae, vae, alone, codes, lookup)
    latents = Codes(*(TensorDataset(apply(run, lambda c: vqvae.encode(lookup(c)), part.tensors[0]))
                      for part in codes))              # (N, 3, 1, 1)
    prior = fit_latent_prior(run, latents)
    # One z of each test map for its decoder, (N, 3 * D, 1, 1); that of the VAE is drawn.
    z = apply(run, vqvae.quantizer.lookup, latents.test.tensors[0])
    torch.manual_seed(run.args.seed)
    z_vae, kl = (apply(run, lambda c: vae.encode(lookup(c))[i], codes.test.tensors[0])
                 for i in range(2))
    draw_figure_5(run, model, vqvae, vae, prior, data, z, z_vae)
    maps = codes.test.tensors[0]
    metrics = conditional_bits("second", vqvae.decoder, maps, z, run.device)
    metrics |= conditional_bits("second_vae", vae.decoder, maps, z_vae, run.device)
    metrics["second_bits_alone"] = bits_per_code(alone, maps, device=run.device)
    metrics["second_vae_kl_bits"] = kl.mean().item() / math.log(2)
    metrics["second_prior_bits"] = LATENTS * bits_per_code(prior, latents.test.tensors[0],
                                                           device=run.device)
    return metrics | total_bits(run, metrics, maps[0].numel()) | read_latents(run, latents, data)


def make_second(run, size):
    """The second VQ-VAE; a VAE with as many dimensions and the very same decoder; and that PixelCNN
    alone, conditioned on nothing but the codes before."""
    args, latent = run.args, LATENTS * run.args.code_dim
    grid = [side // STRIDE for side in size[:2]]
    torch.manual_seed(mix(args.seed, "second stage"))  # the same start whatever was resumed

    def pixelcnn(cond_channels=0):
        return PixelCNN(args.num_codes, args.prior_channels, PixelCNN.layers_for(*grid),
                        cond_channels=cond_channels, num_codebooks=args.num_codebooks)

    sizes = (args.num_codebooks * args.code_dim, grid, args.hidden, args.res_hidden)
    return (GlobalVQVAE(make_quantizer(args, LATENTS), pixelcnn(latent), *sizes).to(run.device),
            GlobalVAE(latent, pixelcnn(latent), *sizes).to(run.device), pixelcnn().to(run.device))


def fit_second(run, vqvae, vae, alone, codes, lookup):
    """As many steps for each of the three."""
    args, steps = run.args, run.args.second_steps

    def fit(stage, net, loss, steps):
        run.fit(stage, net, loss, codes.train, steps, args.prior_batch_size or args.batch_size,
                args.prior_lr, codes.valid)

    def loss(net, codes, *_):
        y = net(codes.long(), lookup(codes.long()))
        bits = y.nll.mean() / codes[0].numel() / math.log(2)
        if y.codes is None:
            return y.loss, {"bits_per_code": bits, "kl_bits": y.rate.mean() / math.log(2)}
        return y.loss, {"bits_per_code": bits,
                        "codes_used": count_codes(y.codes, args.num_codes, LATENTS)}

    # A warm-up without the quantiser, half of all steps: codebooks initialised before the encoder
    # has learned what the PixelCNN needs lose most of their codes.
    vqvae.quantizer.requires_grad_(False)
    fit("second-autoencoder", vqvae, lambda net, codes, *_: (
        net(codes.long(), lookup(codes.long()), quantize=False).loss, {}), -(-steps // 2))
    vqvae.quantizer.requires_grad_(True)
    # A batch has fewer maps than a codebook has codes: so initialise with the outputs of K maps.
    maps = codes.train.tensors[0]
    share = min(len(maps), args.num_codes) // run.world
    z_e = apply(run, lambda c: vqvae.encoder(lookup(c)), maps[run.rank::run.world][:share])
    vqvae.quantizer.init_codebook(vqvae.quantizer.to_vectors(z_e.to(run.device)))
    vqvae.quantizer.moved.zero_()                      # or a resumed Adam would forget its moments
    fit("second-vqvae", vqvae, loss, steps // 2 or 1)
    fit("second-vae", vae, loss, steps)
    fit("second-alone", alone, lambda net, codes, *_: prior_loss(net, codes), steps)


@torch.no_grad()
def apply(run, function, codes):
    """function(codes (B, ...) int64, on the device) for all of them, off the device again."""
    return torch.cat([function(c.long()).cpu() for c in batches(codes, 128, run.device)])


def fit_latent_prior(run, latents):
    """So that images come from nothing: p(k_1) p(k_2|k_1) p(k_3|k_1,k_2), a 1 x 1 grid."""
    args = run.args
    torch.manual_seed(mix(args.seed, "prior of three"))
    prior = PixelCNN(args.num_codes, args.prior_channels, 1, num_codebooks=LATENTS)
    return run.fit("second-prior", prior, prior_loss, latents.train, args.second_steps,
                   args.prior_batch_size or args.batch_size, args.prior_lr, latents.valid)


def conditional_bits(name, decoder, codes, z, device="cpu"):
    """Bits per code given an image's own z, and given that of another image."""
    # Half the set away: neighbours may be frames of one clip, and nearly the same.
    return {f"{name}_bits_own": bits_per_code(decoder, codes, cond=z, device=device),
            f"{name}_bits_other": bits_per_code(decoder, codes, cond=z.roll(len(z) // 2, 0),
                                                device=device)}


def total_bits(run, metrics, codes):
    """Latents are not free: per code of a map, what they cost and what the decoder adds given them.
    Only this compares with the PixelCNN alone."""
    paid = {"second": LATENTS * math.log2(run.args.num_codes),
            "second_vae": metrics["second_vae_kl_bits"]}
    total = {f"{k}_bits_total": metrics[f"{k}_bits_own"] + bits / codes for k, bits in paid.items()}
    run.say(f"bits per code: {metrics['second_bits_own']:.3f} given the latents, "
            f"{total['second_bits_total']:.3f} with the {paid['second']:.0f} bits of the latents "
            f"counted, {metrics['second_bits_alone']:.3f} by the same PixelCNN without latents")
    return total


def read_latents(run, latents, data):
    """Codes in use, and how much of a demo scene can be read from an image's three codes."""
    K, (train, _, test) = run.args.num_codes, (part.tensors[0].flatten(1) for part in latents)
    used = count_codes(test, K, LATENTS).view(LATENTS, -1).count_nonzero(1)
    metrics = {f"second_codes_used_{g + 1}": n for g, n in enumerate(used.tolist())}
    for name, values in data.factors.items():
        known, asked = values[data.train.rows], values[data.test.rows]
        guess = naive_bayes(train, known, test, K)
        metrics[f"second_read_{name}"] = (guess == asked).float().mean().item()
        metrics[f"second_chance_{name}"] = asked.bincount().max().item() / len(asked)
    return metrics


def naive_bayes(three, values, test_three, num_codes):
    """Predict a factor of the scene, `values` (N,) from 0 up, from the three codes (N, 3) of an
    image: a prediction for each of test_three. A table for each codebook counts how often code and
    value met in training; they are combined as if independent given the value.
    """
    score = values.bincount().log()                    # log p(value)
    for g in range(three.shape[1]):
        met = torch.ones(num_codes, score.shape[-1])   # add-one smoothing
        met.index_put_((three[:, g], values), met.new_ones(()), accumulate=True)
        score = score + (met / met.sum(0)).log()[test_three[:, g]]     # + log p(code|value)
    return score.argmax(1)


def draw_figure_5(run, model, vqvae, vae, prior, data, z, z_vae):
    """second_stage.png: images, and samples given what the global codes encode of them."""
    index = torch.arange(0, len(data.test), max(1, len(data.test) // 8))[:8]
    generator = torch.Generator(run.device).manual_seed(run.args.seed)
    z, z_vae = z[index].to(run.device), z_vae[index].to(run.device)

    def sample(decoder, z):
        codes = sample_codes(run, decoder, len(z), data.facts["size"], generator, cond=z)
        return model.decode(codes).cpu()

    rows = [data.test[index][0], *(sample(vqvae.decoder, z) for _ in range(4)),
            sample(vae.decoder, z_vae)]
    for _ in range(2):
        three = prior.sample(len(z), 1, 1, generator=generator)
        rows.append(sample(vqvae.decoder, vqvae.quantizer.lookup(three)))
    bits = f"{LATENTS * math.log2(run.args.num_codes):.0f} bits"
    draw(run, "second_stage", torch.stack(rows), f"test images, and samples given the {bits} that "
         "a second VQ-VAE keeps of each", rows=["test image", f"its {bits}", "again", "again",
                                                "again", "VAE, its z", f"new {bits}", "new"])


# ---------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------


def measure(run, model, data):
    """Reconstruction error and, of a p(x|z) over bytes, bits/dim under the prior of stage one."""
    def over(part):
        torch.manual_seed(run.args.seed)               # VAE and VIMCO draw z
        return reconstruction_error(model, part, run.device) | mean_bits(model, part, run.device)

    metrics = over(data.test) | {f"valid_{k}": v for k, v in over(data.valid).items()}
    if run.args.model == "vqvae" and "distortion" in metrics:
        # Sec. 3.2: is one term of the sum enough?
        some = data.test[torch.linspace(0, len(data.test) - 1, 4).long()][0]
        gaps = [likelihood_gap(model, x.to(run.device)).item() for x in some]
        metrics["likelihood_gap_bits_per_dim"] = np.mean(gaps) / some[0].numel() / math.log(2)
    return metrics


def reconstruction_error(model, part, device, batch=128):
    error = sum(((model.reconstruct(x).float() - x) ** 2).sum().item()
                for x in part.batches(batch, device)) / (len(part) * part.array[0].numel())
    return {"mse": error, "psnr": 10 * math.log10(255 ** 2 / max(error, 1e-9))}


def mean_bits(model, part, device, batch=128):
    """bits_per_dim over a whole part of the data, the last, smaller batch included."""
    total = {}
    for x in part.batches(batch, device) if not isinstance(model.likelihood, Gaussian) else ():
        for name, value in bits_per_dim(model, x).items():
            total[name] = total.get(name, 0.0) + value * len(x) / len(part)
    return total


def code_usage(run, codes, images):
    """How many codes a whole set of images uses. Perplexity of one batch would mean little."""
    codes, K, G = codes.tensors[0], run.args.num_codes, run.args.num_codebooks
    counts = count_codes(codes, K, G)
    used = int((counts > 0).sum())
    if used < 0.1 * G * K:
        run.say(f"warning: only {used} of {G * K} codes are in use: the prior will look very good, "
                "and mean little")
    # Over all G * K rows the entropy is log G more than the mean of the G codebooks'.
    return {"codes_used": used, "num_codes": G * K, "perplexity": perplexity(counts).item() / G,
            "compression": images.array[0].numel() * 8 / (codes[0].numel() * math.log2(K))}


def measure_prior(run, prior, codes, data, metrics):
    """Bits per code; with a p(x|z) over bytes also bits/dim, the PixelCNN in place of the uniform
    prior ("after training", sec. 3.3)."""
    found = {}
    for name, part in (("", codes.test), ("valid_", codes.valid)):
        bits = bits_per_code(prior, *part.tensors, device=run.device)
        found[f"{name}prior_bits_per_code"] = bits
        if f"{name}distortion" in metrics:
            # The PixelCNN is given the class. That is one more latent, and it costs log2 10 bits.
            bits = bits * part.tensors[0][0].numel() + math.log2(max(1, len(data.classes)))
            found[f"{name}rate_fitted_prior"] = rate = bits / data.test.array[0].numel()
            found[f"{name}bits_per_dim_fitted_prior"] = rate + metrics[f"{name}distortion"]
    return found


@torch.no_grad()
def bits_per_code(prior, codes, labels=None, cond=None, device="cpu", batch=64):
    """-log2 p(codes | labels, cond) / number of codes, under a fitted PixelCNN."""
    def split(given):
        return batches(given, batch, device) if given is not None else [None] * len(codes)

    nats = sum(F.cross_entropy(prior(c.long(), y, z), c.long(), reduction="sum").item()
               for c, y, z in zip(split(codes), split(labels), split(cond)))
    return nats / codes.numel() / math.log(2)


class Classifier(nn.Sequential):
    """A small network that learns the classes from real images, to judge sampled ones by."""

    def __init__(self, channels, classes):
        def block(c_in, c_out):
            return [nn.Conv2d(c_in, c_out, 3, 2, 1), nn.GroupNorm(8, c_out), nn.ReLU()]
        super().__init__(*block(channels, 32), *block(32, 64), *block(64, 64),
                         nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, classes))

    def forward(self, x):
        return super().forward(to_unit(x))


def judge_samples(run, samples, labels, data):
    """Train a classifier on real images; how often does it recognise the class of a sample?"""
    args = run.args
    torch.manual_seed(mix(args.seed, "classifier"))
    classifier = Classifier(samples.shape[1], len(data.classes))

    def loss(net, x, y):
        scores = net(x)
        return F.cross_entropy(scores, y), {"accuracy": (scores.argmax(1) == y).float().mean()}

    run.fit("classifier", classifier, loss, data.train, args.classifier_steps, args.batch_size,
            2e-3, data.valid)
    with torch.no_grad():
        right = [sum(((classifier(x.to(run.device)).argmax(1).cpu() == y).sum().item())
                     for x, y in pairs) for pairs in (
            zip(samples.split(128), labels.split(128)),
            zip(data.test.batches(128, run.device), data.test.labels()[0].split(128)))]
    return {"sample_class_accuracy": right[0] / len(labels),
            "real_class_accuracy": right[1] / len(data.test)}


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def draw(run, name, images, title, columns=(), rows=()):
    """A grid of images (rows, columns, C, H, W); greyscale is drawn with three equal channels."""
    if run.rank == 0:
        images = images.expand(*images.shape[:2], 3, *images.shape[3:])
        run.picture(name, images, title, columns, rows)


def draw_reconstructions(run, model, data):
    index = torch.linspace(0, len(data.test) - 1, min(16, len(data.test))).long()
    images = data.test[index][0]
    both = torch.stack([images, model.reconstruct(images.to(run.device)).cpu()])   # (2, n, ...)
    columns = 8 if len(index) == 16 else len(index)
    rows = both.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 1)
    draw(run, "reconstructions", rows, "test images, and below each its reconstruction")


def draw_samples(run, samples, classes):
    """A column for each of the first ten classes, if there are eight samples of each."""
    columns = len(classes) or 8
    by_class = len(samples) >= 8 * columns
    rows = (samples.unflatten(0, (-1, columns))[:8, :10] if by_class else
            samples[:len(samples) // 10 * 10][:80].unflatten(0, (-1, 10)))
    draw(run, "samples", rows, "samples: codes from the PixelCNN, decoded",
         classes[:10] if by_class else ())


# ---------------------------------------------------------------------------------------------
# Using a finished run
# ---------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A finished run. Images are uint8 tensors (B, C, H, W); codes are (B, h, w), or (B, G, h, w)
    with G codebooks."""

    model: nn.Module                                   # VQVAE; VAE or VIMCO after --model
    prior: PixelCNN                                    # None but for the VQ-VAE
    classes: list                                      # names, in the order of the labels
    size: tuple                                        # (H, W, C) of the images it was trained on
    args: object                                       # the run's flags

    def sample(self, count, label=None, temperature=1.0, seed=0):
        """Draw images; label is a class's name (None: all classes in turn)."""
        self.require_vqvae("samples")
        if label is not None and label not in self.classes:
            raise ValueError(f"label {label}: this run's classes are "
                             f"{', '.join(self.classes[:20]) or 'none'}")
        device = next(self.model.parameters()).device
        labels = None
        if self.classes:
            wanted = range(count) if label is None else [self.classes.index(label)] * count
            labels = torch.tensor(wanted, device=device) % len(self.classes)
        generator, images = torch.Generator(device).manual_seed(seed), []
        for part in torch.arange(count).split(50):
            codes = self.prior.sample(len(part), self.size[0] // STRIDE, self.size[1] // STRIDE,
                                      None if labels is None else labels[part],
                                      temperature=temperature, generator=generator)
            images.append(self.decode(codes))
        return torch.cat(images)

    def read(self, file):
        """An image file, its middle cropped and scaled to the size the run knows: (1, C, H, W)."""
        image = np.array(read_image(file, self.size[:2], "L" if self.size[2] == 1 else "RGB"))
        return torch.from_numpy(image).view(1, *self.size).permute(0, 3, 1, 2)

    def encode(self, images):
        self.require_vqvae("codes")
        return self.model.encode(images.to(next(self.model.parameters()).device))

    def decode(self, codes):
        self.require_vqvae("codes")
        return self.model.decode(codes.to(next(self.model.parameters()).device).long()).cpu()

    def require_vqvae(self, what):
        if self.prior is None:
            raise ValueError(f"a run of --model {self.args.model} has no {what}")


def load(folder="runs/image", device="auto"):
    """The models of a finished run, in eval mode; ValueError with one line if there is none."""
    args, facts, _ = read_run(folder, "image", [])
    model, prior = make_model(args, facts), None
    if args.model == "vqvae":
        prior = make_prior(args, facts)
    _, _, weights = read_run(folder, "image", [args.model, "prior"][:2 if prior else 1])
    for net, state in zip((model, prior), weights):
        net.load_state_dict(state)
        net.to(pick_device(device)).eval().requires_grad_(False)
    return Trained(model, prior, facts["classes"], tuple(facts["size"]), args)


def use(args):
    """--sample and --reconstruct: a finished run, without training."""
    run, out = load(args.out, args.device), Path(args.out)
    if args.sample:
        images = run.sample(args.sample, args.label, args.temperature, args.seed)
        save_pictures(out / "sampled", images, [f"{i:04}" for i in range(len(images))])
        print(f"{args.sample} samples are in {out / 'sampled'}")
    for file in args.reconstruct or ():
        target = out / "reconstructed" / safe_name(Path(file).stem)
        if Path(file).suffix == ".npz":
            with reading(file), np.load(file, allow_pickle=False) as arrays:
                codes = torch.from_numpy(arrays["codes"].astype(np.int64))
                check_codes(codes, run)
        else:
            codes = run.encode(run.read(file)).cpu()
            target.parent.mkdir(parents=True, exist_ok=True)
            np.savez(f"{target}.npz", codes=codes.to(smallest_int(run.args.num_codes)).numpy())
        bits = codes[0].numel() * math.log2(run.args.num_codes)
        names = [target.name + (f"-{i}" if len(codes) > 1 else "") for i in range(len(codes))]
        save_pictures(target.parent, run.decode(codes), names)
        print(f"{file}: {math.prod(run.size)} bytes as {codes[0].numel()} codes, "
              f"{math.ceil(bits / 8)} bytes; decoded to {target.parent / names[0]}.png")


def check_codes(codes, run):
    """Codes from a file must be codes of this run."""
    expected = run.encode(torch.zeros(1, run.size[2], *run.size[:2], dtype=torch.uint8)).shape
    if codes.shape[1:] != expected[1:] or not 0 <= codes.min() <= codes.max() < run.args.num_codes:
        raise ValueError(f"codes of shape {tuple(codes.shape)}; this run's are (N, "
                         f"{', '.join(map(str, expected[1:]))}), 0 .. {run.args.num_codes - 1}")


def save_pictures(folder, images, names):
    from PIL import Image
    folder.mkdir(parents=True, exist_ok=True)
    for image, name in zip(images.permute(0, 2, 3, 1).numpy(), names):
        Image.fromarray(image.squeeze()).save(folder / f"{name}.png")


# ---------------------------------------------------------------------------------------------
# Data: the demo's scenes, CIFAR-10, or your own
# ---------------------------------------------------------------------------------------------

STRIDE = 4  # the product of the encoder's strides: a code stands for 4 x 4 pixels
PARTS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"       # as published on that site
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


class Images(Dataset):
    """One part of the data: some rows of an array of bytes, in memory or in a file, not copied.

    images[index], index (B,) int64 -> (x,) or (x, labels), x uint8 (B, C, H, W).
    """

    def __init__(self, array, rows, all_labels=None):
        self.array, self.rows, self.all_labels = array, rows, all_labels   # array (M, H, W, C)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        rows = self.rows[index]
        x = self.array[rows].permute(0, 3, 1, 2)       # in memory still (B, H, W, C): channels_last
        return (x,) if self.all_labels is None else (x, self.all_labels[rows])

    def labels(self):
        """() or (labels (N,),): what a data set has beside its examples."""
        return () if self.all_labels is None else (self.all_labels[self.rows],)

    def batches(self, size, device):
        """All images in their order, piece by piece on the device."""
        for index in torch.arange(len(self)).split(size):
            yield self[index][0].to(device)


class Data:
    """Images as bytes in three parts, and what is known of them.

    array (M, H, W, C) uint8; part (M,) is 0 for training, 1 for validation, 2 for test; labels (M,)
    int64 or None; classes: their names; factors: of the demo's scenes, {name: (M,) int64}.
    """

    def __init__(self, array, part, labels=None, classes=(), factors=None):
        self.array, self.part, self.all_labels = map(as_tensor, (array, part, labels))
        self.classes = list(classes)
        self.factors = {k: as_tensor(v) for k, v in (factors or {}).items()}
        self.train, self.valid, self.test = (
            Images(self.array, (self.part == p).nonzero().flatten(), self.all_labels)
            for p in range(3))
        # The variance scales eq. 3's first term: from whole numbers, the same on every machine.
        some = self.train[torch.linspace(0, len(self.train) - 1, min(len(self.train), 1000)).long()]
        share = sum(np.bincount(x.flatten(), minlength=256) for x in some[0].split(50))
        share = share / share.sum()
        level = np.arange(256) / 255
        variance = (share * level ** 2).sum() - (share * level).sum() ** 2
        self.facts = {"size": list(self.array.shape[1:]), "classes": self.classes,
                      "images": [len(self.train), len(self.valid), len(self.test)],
                      # White images have none; they differ by half a byte's step at most.
                      "variance": max(float(variance), 255.0 ** -2), "digest": digest(self.array)}

    def few(self, count=4):
        rows = torch.cat([part.rows[:count] for part in (self.train, self.valid, self.test)])
        pick = {k: v[rows] for k, v in self.factors.items()}
        return Data(self.array[rows], self.part[rows],
                    None if self.all_labels is None else self.all_labels[rows], self.classes, pick)


def as_tensor(array):
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def load_data(run):
    """--data: nothing, "cifar10", a folder of images, or a file of arrays."""
    args = run.args
    check_flags(args)
    source = f"--data {args.data}" if args.data else f"--size {args.size}"
    if args.data is None:
        run.say(f"rendering {args.demo_images} scenes")
        held_out = max(4, args.demo_images // 10)
        images, labels, factors = demo_images(args.demo_images + 2 * held_out, args.seed,
                                              args.size or 32)
        part = np.repeat([0, 1, 2], [args.demo_images, held_out, held_out])
        data = Data(images, part, labels, SOLIDS, factors)
    elif args.data == "cifar10":
        data = load_cifar10(Path(args.data_dir), wait=run.local_rank > 0)
    elif not os.path.exists(args.data):
        raise ValueError(f"--data {args.data[:200]}: no such file or folder")
    elif os.path.isdir(args.data):
        data = load_idx_folder(Path(args.data)) or load_folder(run, args.data)
    else:
        data = load_file(Path(args.data))
    height, width, _ = data.facts["size"]
    if args.size and (height, width) != (args.size, args.size):
        raise ValueError(f"{source}: images of {height} x {width}; --size {args.size} crops and "
                         "scales only folders of images")
    if height % STRIDE or width % STRIDE:
        raise ValueError(f"{source}: images of {height} x {width}; both sides must be multiples of "
                         f"{STRIDE}, the product of the encoder's strides (--size S crops and "
                         "scales)")
    check_batch(len(data.train), args.batch_size, source, "--batch-size")
    check_batch(len(data.train), args.prior_batch_size or 1, source, "--prior-batch-size")
    run.say("{} training, {} validation, {} test images of {} x {} x {}; {} x {} positions".format(
        *data.facts["images"], *data.facts["size"], height // STRIDE, width // STRIDE))
    return data


def check_flags(args):
    """What flags of this script demand of each other."""
    if args.num_codes < 2:
        raise ValueError(f"--num-codes {args.num_codes}: a latent with one value carries no "
                         "information; at least 2")
    if args.model == "vimco" and args.samples < 2:
        raise ValueError("--samples 1: VIMCO judges each sample by the others, so it needs at "
                         "least 2")
    if args.second_stage and args.model != "vqvae":
        raise ValueError("--second-stage works on the codes of --model vqvae; --model "
                         f"{args.model} has none")


def cut(path, groups, part=None):
    """Which part each example belongs to: 0 training, 1 validation, 2 test. What `part` lacks is
    cut from the training part: every tenth group (at most 5,000 for validation). Examples of one
    group, such as the frames of a clip, stay together."""
    part = np.zeros(len(groups), np.int64) if part is None else np.array(part)
    for missing in (2, 1):
        train = part == 0
        number = np.unique(groups[train], return_inverse=True)[1]      # 0, 1, 2, .. in their order
        count = number.max(initial=-1) + 1
        if count < (2 if (part == 2).any() else 10):
            raise ValueError(f"{path}: {len(part)} images, {len(part) - int(train.sum())} held out "
                             f"and {count} for training; needs at least ten, or two and a test part")
        if not (part == missing).any():
            every = 10 if missing == 2 else min(count, max(10, count // 5000))
            part[train] = np.where(number % every == (9 if missing == 2 else every // 2), missing, 0)
    return part


# -- a folder of images -------------------------------------------------------------------------


def load_folder(run, path):
    """Images in a folder; subfolders are classes; frames in folders below those stay together.
    Folders train/, val/ and test/ at its top are parts; parts that are missing are cut from train/.
    """
    size, files = run.args.size, find_images(path)
    names = [name.split(os.sep) for name, *_ in files]
    parts = None
    if any(PARTS.get(folders[0].lower()) == 0 for folders in names if len(folders) > 1):
        parts = [PARTS.get(folders[0].lower(), -1) if len(folders) > 1 else -1 for folders in names]
        if -1 in parts:
            raise ValueError(f"{os.path.join(path, *names[parts.index(-1)])}: lies beside the "
                             f"folder {path}/train, and in none of {', '.join(PARTS)}")
        names = [folders[1:] for folders in names]
    classes = sorted({folders[0] for folders, part in zip(names, parts or [0] * len(names))
                      if len(folders) > 1 and part == 0})
    number = {name: i for i, name in enumerate(classes)}
    labels = [number.get(folders[0], -1) if len(folders) > 1 else -1 for folders in names]
    if classes and -1 in labels:
        stray = os.path.join(path, files[labels.index(-1)][0])
        raise ValueError(f"{stray}: lies outside the class folders of {path} "
                         f"({', '.join(classes[:5])}{', ...' * (len(classes) > 5)})")
    groups = np.array([os.path.dirname(name) if len(folders) > 2 else name
                       for (name, *_), folders in zip(files, names)])
    part = cut(path, groups, parts)
    paths = [os.path.join(path, name) for name, *_ in files]
    shape = read_image(paths[0], size and (size, size)).shape
    images, _ = prepare(run, f"--data {os.path.abspath(path)}", f"{size} {files}",
                        Decoder(paths, shape, size), shape)
    shown = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in classes]
    return Data(images, part, np.array(labels) if classes else None, shown)


def find_images(path):
    """(name below path, bytes, time of change) of every image, by name; hidden ones left out.
    Symbolic links to folders are followed; a folder that cannot be read is an error."""
    def fail(error):
        raise error

    files, seen = [], set()
    for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:         # a link to a folder above: would never end
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith("."):
                file = os.path.join(folder, name)
                about = os.stat(file)
                files.append((os.path.relpath(file, path), about.st_size, about.st_mtime_ns))
    if not files:
        raise ValueError(f"{path}: no images ({' '.join(IMAGE_ENDINGS)})")
    return sorted(files)


class Decoder:
    """Image files as arrays (n, H, W, 3), some files each: what `prepare` decodes in parallel."""

    def __init__(self, files, shape, size):
        self.files, self.shape, self.size = files, shape, size
        self.chunk = max(1, min(64, 2 ** 22 // math.prod(shape)))      # at most 4 MB

    def __len__(self):
        return -(-len(self.files) // self.chunk)

    def __getitem__(self, i):
        files = self.files[i * self.chunk:(i + 1) * self.chunk]
        images = np.empty((len(files), *self.shape), np.uint8)
        for image, file in zip(images, files):
            found = read_image(file, self.size and (self.size, self.size))
            if found.shape != self.shape:
                sides = f"{found.shape[0]} x {found.shape[1]}, but {self.files[0]} is " \
                    f"{self.shape[0]} x {self.shape[1]}"
                raise ValueError(f"{file}: {sides}; --size S crops and scales all to S x S")
            image[:] = found
        return images


def read_image(file, size=None, mode="RGB"):
    """uint8 (H, W, 3), or (H, W) for mode L; size (H, W): the middle, cropped and scaled."""
    from PIL import Image
    with reading(file), Image.open(file) as image:
        if size:
            # A JPEG can be decoded at a half, a quarter, an eighth of its size, in less time.
            image.draft(mode, size[::-1])
        if image.mode.startswith("I"):                 # 16 bits a pixel: convert() would cut
            wide = np.asarray(image).astype(np.int64)  # everything above 255 off
            if wide.min() < 0 or wide.max() > 65535:
                raise ValueError("32-bit pixels beyond 16 bits: convert to 8 bits")
            image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("floating-point pixels, whose range nobody knows: convert to 8 bits")
        image = image.convert(mode)
        if size:
            scale = min(image.height / size[0], image.width / size[1])
            height, width = size[0] * scale, size[1] * scale
            left, top = (image.width - width) / 2, (image.height - height) / 2
            image = image.resize(size[::-1], box=(left, top, left + width, top + height),
                                 resample=Image.Resampling.BICUBIC, reducing_gap=3.0)
        return np.asarray(image)


# -- files of arrays ----------------------------------------------------------------------------


def load_file(path):
    """.npy or .npz with images, or an IDX file as MNIST's; told apart by how they begin.

    An .npz may hold `labels` (N,) and `split` (N,) of "train" / "valid" / "test" beside the one
    array of images; or x_train, y_train, x_test, y_test, as Keras has them. A .npy is mapped, not
    read into memory.
    """
    with reading(path), open(path, "rb") as f:
        begins = f.read(4)
    if begins[:3] == b"\0\0\x08" or path.suffix == ".gz":
        return from_arrays(path, read_idx(path))
    if begins[:2] == b"PK" and path.suffix != ".npz":
        raise ValueError(f"{path}: an archive; unpack it, and give the folder")
    with reading(path):
        # mode c: changes, which nobody makes, would stay in memory.
        file = np.load(path, mmap_mode="c", allow_pickle=False)
        arrays = {k: file[k] for k in file.files} if hasattr(file, "files") else {"images": file}
    arrays = {k: a for k, a in arrays.items() if isinstance(a, np.ndarray)}
    if {"x_train", "x_test"} <= arrays.keys():
        return from_parts(path, {part: (arrays[f"x_{part}"], arrays.get(f"y_{part}"))
                                 for part in ("train", "test")})
    pictures = [k for k, a in arrays.items() if a.ndim >= 3]
    if len(pictures) != 1:
        found = ", ".join(f"{k} {a.dtype}{a.shape}" for k, a in list(arrays.items())[:9]) or "none"
        raise ValueError(f"{path}: needs one array of images (N, H, W, 3), (N, 3, H, W), (N, H, W) "
                         f"or clips (N, T, H, W, 3), found {found}")
    return from_arrays(path, arrays[pictures[0]], arrays.get("labels"), arrays.get("split"))


def load_idx_folder(path):
    """MNIST as it is published: train-images-idx3-ubyte, t10k-labels-idx1-ubyte and so on, perhaps
    with .gz; None if there are no such files."""
    parts = {}
    for file in sorted(path.iterdir()):
        if re.search(r"images.idx3-ubyte(\.gz)?$", file.name):
            labels = file.with_name(file.name.replace("images", "labels").replace("idx3", "idx1"))
            part = "test" if re.match("t10k|.*test", file.name) else "train"
            parts[part] = read_idx(file), read_idx(labels) if labels.exists() else None
    return from_parts(path, parts) if parts else None


def read_idx(path):
    """IDX: two zeros, 8 for bytes, the number of axes; the length of each, big-endian; bytes."""
    with reading(path), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
        content = bytearray(f.read())
        if content[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of bytes")
        shape = np.frombuffer(content, ">u4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def from_parts(path, parts):
    """{"train": (images, labels or None), ..}: joined, and `split` says which is which."""
    images, labels = zip(*parts.values())
    split = np.repeat(list(parts), [len(x) for x in images])
    labels = None if any(y is None for y in labels) else np.concatenate([y.ravel() for y in labels])
    with reading(path):                                # parts of different sizes
        return from_arrays(path, np.concatenate(images), labels, split)


def from_arrays(path, images, labels=None, split=None):
    """Any layout to (N, H, W, C), as a view; labels (N,) and split (N,) to numbers."""
    if images.dtype != np.uint8:
        whole = images.dtype.kind != "f" or not images.size or np.nanmax(images[:100]) > 1
        raise ValueError(f"{path}: images are {images.dtype}, must be uint8, 0 .. 255; to convert: "
                         f"images = {'images' if whole else '(images * 255).round()'}"
                         ".astype('uint8')")
    if images.ndim not in (3, 4, 5) or not images.size:
        raise ValueError(f"{path}: images of shape {images.shape}: no images in it")
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] not in (1, 3):
        if images.ndim == 5 or images.shape[1] not in (1, 3):
            raise ValueError(f"{path}: images of shape {images.shape}: needs one or three channels")
        images = images.transpose(0, 2, 3, 1)
    N = len(images)
    for name, a in (("labels", labels), ("split", split)):
        if a is not None and a.shape != (N,):
            raise ValueError(f"{path}: {name} has shape {a.shape}, must be ({N},): one for each "
                             "image or clip")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.min() < 0):
        raise ValueError(f"{path}: labels must be integers from 0 up")
    # A class is a value that occurs: a label of 300,000 is one class, not as many.
    classes, labels = (), labels if labels is None else np.unique(labels, return_inverse=True)
    if labels is not None:
        classes, labels = [str(k) for k in labels[0]], labels[1]
    clips = images.shape[1] if images.ndim == 5 else 1
    part = None if split is None else read_split(path, split).repeat(clips)
    return Data(images.reshape(-1, *images.shape[-3:]), cut(path, np.arange(N).repeat(clips), part),
                labels if labels is None else labels.repeat(clips), classes)


def read_split(path, split):
    """Words to the number of a part."""
    words, which = np.unique(split, return_inverse=True)
    if split.dtype.kind not in "SU":
        raise ValueError(f"{path}: split is {split.dtype}, must be words: {', '.join(PARTS)}")
    words = [w.decode("latin-1") if isinstance(w, bytes) else str(w) for w in words]
    for word in words:
        if word not in PARTS:
            raise ValueError(f"{path}: split has {word[:40]!r}, must be one of {', '.join(PARTS)}")
    return np.array([PARTS[word] for word in words])[which]


# -- CIFAR-10 -----------------------------------------------------------------------------------


def load_cifar10(folder, wait=False):
    """The binary version of CIFAR-10: extracted or packed in `folder`, or else downloaded (by one
    process of a machine, while the others wait)."""
    extracted, packed = folder / "cifar-10-batches-bin", folder / "cifar-10-binary.tar.gz"
    while wait and not extracted.is_dir():
        time.sleep(0.2)
    try:
        if not extracted.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:   # until whole and genuine
                found = packed if packed.exists() else Path(scratch) / packed.name
                if found != packed:
                    print(f"downloading {CIFAR10_URL} (170 MB) to {packed}", flush=True)
                    with urllib.request.urlopen(CIFAR10_URL, timeout=60) as web:
                        with open(found, "wb") as f:
                            shutil.copyfileobj(web, f)
                md5 = hashlib.md5(found.read_bytes()).hexdigest()
                if md5 != CIFAR10_MD5:
                    raise OSError(f"its MD5 is {md5}, must be {CIFAR10_MD5}")
                found.replace(packed)
                with tarfile.open(packed) as archive:
                    archive.extractall(scratch, filter="data")         # nothing outside scratch
                (Path(scratch) / extracted.name).rename(extracted)
        files = [extracted / f"{name}.bin" for name in (
            *(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
        images, labels = zip(*map(read_cifar10, files))
    except (OSError, tarfile.TarError) as e:
        why = " ".join(str(e).split())
        raise ValueError(f"--data cifar10: {packed} is not usable ({why}): put {CIFAR10_URL} "
                         "there, or say with --data-dir where it is") from e
    split = np.repeat([0, 2], [sum(map(len, labels[:-1])), len(labels[-1])])
    return Data(np.concatenate(images), cut(extracted, np.arange(len(split)), split),
                np.concatenate(labels), CIFAR10_CLASSES)


def read_cifar10(path):
    """Records of one byte of label and 3 x 32 x 32 of image."""
    records = np.fromfile(path, np.uint8)
    if len(records) % 3073 or not len(records) or records[::3073].max() > 9:
        raise OSError(f"{path}: {len(records)} bytes; must be records of 3073, first a label 0-9")
    records = records.reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0].astype(int)


# ---------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------


def make_parser():
    parser = Parser("image", PRESETS, description=__doc__)
    parser.uses = ("sample", "reconstruct")
    parser.free = parser.free | {
        "data_dir", "prior_batch_size", "prior_lr", "second_stage", "second_steps",
        "classifier_steps", "temperature", "label"}
    flag = parser.add_argument
    flag("--model", choices=["vqvae", "vae", "vimco"], default="vqvae", help="vae and vimco: what "
         "sec. 4.1 compares with")
    flag("--likelihood", choices=["mse", "categorical", "logistics"], default="mse", help="p(x|z): "
         "a Gaussian (default); over bytes, for bits/dim: a softmax over 256 intensities (sec. "
         "4.1), or a mixture of discretised logistics")
    flag("--mixtures", type=positive(int), default=1, help="logistics in the mixture (default 1)")
    flag("--data-dir", default="data", help="where --data cifar10 looks for the binary version, "
         "extracted or packed, and keeps what it downloads (default data)")
    flag("--num-codebooks", type=positive(int), default=1, help="G codes per position (sec. 3.2: "
         "10)")
    flag("--latents", type=positive(int), default=32, help="dimensions per position, for --model "
         "vae")
    flag("--samples", type=positive(int), default=50, help="S >= 2 of --model vimco (paper 50)")
    flag("--vimco-prior", choices=["uniform", "learned", "gaussian"], default="uniform",
         help="p(z) of --model vimco (default uniform, as the VQ-VAE's)")
    flag("--res-hidden", type=positive(int), help="channels inside a residual block")
    flag("--prior-batch-size", type=positive(int), help="examples per step for the prior (default "
         "--batch-size)")
    flag("--prior-lr", type=positive(float), help="Adam's learning rate for the prior")
    flag("--temperature", type=positive(float), default=1.0, help="of samples: below 1 more "
         "typical, less varied (default %(default)s)")
    flag("--second-stage", action="store_true", help="after the prior: a second VQ-VAE that "
         "encodes a whole image in three codes (sec. 4.2, figure 5), and a VAE for comparison")
    flag("--second-steps", type=positive(int), default=1000, help="training steps of each of its "
         "models (default %(default)s)")
    flag("--size", type=positive(int), help="crop all images to squares and scale them to "
         "SIZE x SIZE")
    flag("--classifier-steps", type=positive(int), default=800, help="training steps of the "
         "classifier that judges samples, where there are classes (default %(default)s)")
    flag("--demo-images", type=positive(int), default=16000, help="training images of the demo")
    flag("--sample", type=positive(int), metavar="N", help="draw N images from the finished run in "
         "--out; nothing is trained")
    flag("--label", metavar="CLASS", help="with --sample: the class (default: all in turn)")
    flag("--reconstruct", nargs="+", metavar="FILE", help="encode images with the finished run in "
         "--out, keep the codes as .npz, and decode them; or decode such .npz files")
    return parser


# ---------------------------------------------------------------------------------------------
# Demo data: one solid in a coloured room, seen from slightly above
# ---------------------------------------------------------------------------------------------

SOLIDS = ("sphere", "cylinder", "cone", "cube", "octahedron")


def demo_images(count, seed=0, size=64):
    """Render `count` scenes: images (count, size, size, 3) uint8, labels (count,) int64, and the
    scenes' factors as {name: (count,) int64} (for what a code can tell about its image)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(SOLIDS), size=count)
    # Six paints and six rooms: a prior trained for minutes must learn how colours go together.
    hue, room = rng.integers(6, size=count), rng.integers(6, size=count)
    scene = {"hue": hue / 6, "wall_hue": room / 6, "floor_hue": (room + 2) / 6,
             "x": rng.uniform(-0.7, 0.7, count), "z": rng.uniform(-0.3, 0.3, count),
             "scale": rng.uniform(1.4, 1.7, count), "turn": rng.uniform(0, np.pi / 2, count),
             "light": rng.choice((-0.8, 0.8), count)}
    images = np.empty((count, size, size, 3), np.uint8)

    def fill(part):  # images of one solid, few enough for the cache
        images[part] = render(labels[part[0]], {k: v[part] for k, v in scene.items()}, size)

    parts = [part for label in range(len(SOLIDS)) for part in
             np.split(np.flatnonzero(labels == label), range(16, count, 16)) if len(part)]
    with ThreadPoolExecutor() as pool:                 # numpy works outside Python's lock
        list(pool.map(fill, parts))
    factors = {"solid": labels, "hue": hue, "room": room,
               "position": np.digitize(scene["x"], (-0.25, 0.25))}
    return images, labels, factors


def render(label, scene, size):
    """Ray-trace scenes with one kind of solid: two rays a pixel each way, one light, shadows."""
    n, rays = len(scene["x"]), 2 * size
    s = {k: v.astype(np.float32)[:, None] for k, v in scene.items()}       # (n, 1)
    u = (np.arange(rays, dtype=np.float32) + 0.5) / rays * 2 - 1
    across, upward = (a.ravel()[None] for a in np.meshgrid(u, -u))         # (1, rays^2)
    eye = np.array([0, 1.7, -3.6], np.float32)
    view = np.stack(np.broadcast_arrays(across * 0.5, upward * 0.5 - 0.27, 1.0), -1)
    view = np.repeat(view.astype(np.float32), n, 0)                        # (n, rays^2, 3)

    t, normal = hit_solid(label, s, eye, view)
    floor = np.where(view[..., 1] < 0, -eye[1] / np.minimum(view[..., 1], -1e-6), np.inf)
    wall = (2.2 - eye[2]) / view[..., 2]
    behind = np.minimum(floor, wall)                   # distance to the room behind the solid
    solid = t < behind
    point = eye + np.where(solid, t, behind)[..., None] * view
    normal = np.where(solid[..., None], normal, 0)
    normal[..., 1] += ~solid & (floor < wall)          # the floor looks up
    normal[..., 2] -= ~solid & (floor >= wall)         # the wall looks at us

    tiles = (np.floor(point[..., 0] * 1.2) + np.floor(point[..., 2] * 1.2)) % 2
    colour = np.where(solid[..., None], palette(s["hue"], 0.9),
                      np.where((floor < wall)[..., None],
                               palette(s["floor_hue"], 0.45) * (0.82 + 0.18 * tiles[..., None]),
                               palette(s["wall_hue"], 0.45)))
    light = np.stack(np.broadcast_arrays(s["light"], np.float32(1.3), np.float32(-0.9)), -1)
    light = light / np.linalg.norm(light, axis=-1, keepdims=True)          # (n, 1, 3)
    lit = np.maximum((normal * light).sum(-1), 0)
    shade, _ = hit_solid(label, s, point + 1e-3 * normal, np.broadcast_to(light, view.shape))
    lit = np.where(np.isfinite(shade) & ~solid, 0, lit)                    # in the solid's shadow
    colour = colour * (0.40 + 0.60 * lit[..., None])
    image = colour.reshape(n, size, 2, size, 2, 3).mean((2, 4))            # smooth edges
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def palette(hue, saturation):
    """Hue in [0, 1) -> RGB, by three shifted cosines: (n, 1) -> (n, 1, 3)."""
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (hue[..., None] - np.array([0, 1 / 3, 2 / 3])))
    return (1 - saturation * (1 - wave)).astype(np.float32)


def hit_solid(label, s, start, direction):
    """Where rays meet the solid: distance t (inf: never) and outward normal there.

    Every solid is convex: an intersection of half-spaces a.p <= b and, for the round ones, of
    one quadric x^2 + q y^2 + z^2 <= w around a centre. A ray is inside each of them for an
    interval of t; it is inside the solid in the intersection of these intervals.
    """
    # Into the solid's own coordinates: stands on the floor at 0, radius 1/2, height 1.
    c, o = np.cos(s["turn"]), np.sin(s["turn"])
    shift = np.stack([s["x"], np.zeros_like(s["x"]), s["z"]], -1)
    p, d = ((a[..., 0] * c + a[..., 2] * o, a[..., 1] + 0 * c, a[..., 2] * c - a[..., 0] * o)
            for a in ((start - shift) / s["scale"][..., None], direction / s["scale"][..., None]))
    planes = [((0, 1, 0), 1.0), ((0, -1, 0), 0.0)]                         # 0 <= y <= 1
    if SOLIDS[label] == "cube":
        planes += [((x, 0, z), 0.5) for x, z in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    if SOLIDS[label] == "octahedron":
        planes = [((x, y, z), 0.5 + 0.5 * y) for x in (-0.7, 0.7) for y in (-1, 1)
                  for z in (-0.7, 0.7)]
    near = np.full(d[0].shape, -np.inf, np.float32)
    far = -near
    normal = np.zeros((*d[0].shape, 3), np.float32)
    for (ax, ay, az), b in planes:
        speed = ax * d[0] + ay * d[1] + az * d[2]      # of the ray against the plane
        t = (b - ax * p[0] - ay * p[1] - az * p[2]) / np.where(speed == 0, 1e-9, speed)
        enters = (speed < 0) & (t > near)
        near = np.where(enters, t, near)
        far = np.where(speed > 0, np.minimum(far, t), far)
        normal[enters] = (ax, ay, az)
    quadric = {"sphere": (0.5, 1.0, 0.25), "cylinder": (0.0, 0.0, 0.11),
               "cone": (1.0, -0.25, 0.0)}.get(SOLIDS[label])               # centre y, q, w
    if quadric:
        cy, q, w = quadric
        y = p[1] - cy
        A = d[0] ** 2 + q * d[1] ** 2 + d[2] ** 2
        B = d[0] * p[0] + q * d[1] * y + d[2] * p[2]
        root = B * B - A * (p[0] ** 2 + q * y * y + p[2] ** 2 - w)
        t = (-B - np.sqrt(np.maximum(root, 0))) / A
        far = np.where(root > 0, np.minimum(far, (-B + np.sqrt(np.maximum(root, 0))) / A), -np.inf)
        enters = t > near
        near = np.where(enters, t, near)
        round_normal = np.stack([p[0] + t * d[0], q * (y + t * d[1]), p[2] + t * d[2]], -1)
        normal = np.where(enters[..., None], round_normal, normal)
    t = np.where((near < far) & (near > 1e-3), near, np.inf)
    normal = np.stack([normal[..., 0] * c - normal[..., 2] * o, normal[..., 1],
                       normal[..., 2] * c + normal[..., 0] * o], -1)       # back to the room
    return t, normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)


if __name__ == "__main__":
    launch(make_parser(), load_data, main, use)
