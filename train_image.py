"""Images: data -> VQ-VAE -> codes -> PixelCNN -> samples (secs. 4.2 and 3.3 of the paper).

    python train_image.py                          demo scenes, no download, no GPU: minutes
    python train_image.py --data photos/ --size 128 --preset paper       your own images, on a GPU
    python train_image.py --resume                 resume runs/image where it stopped
    python train_image.py --preset cifar10-small   bits/dim, sec. 4.1; or with --model vae, vimco
    python train_image.py --resume --second-stage  27 bits per image: a second VQ-VAE, on the codes
    python train_image.py --sample 16 --label cone           more samples from a finished run
    python train_image.py --reconstruct a.png b.jpg          your pictures through its codes

--out (runs/image) receives pictures, numbers (see .github/DATA.md), log.csv and checkpoints.
"""

import hashlib
import io
import math
import os
import tarfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset, TensorDataset

from prior import PixelCNN
from vqvae import (VAE, VIMCO, VQVAE, Categorical, Gaussian, GlobalVAE, GlobalVQVAE, Logistics,
                   Parser, bits_per_dim, check_batch, count_codes, digest, find_files, fraction,
                   in_batches, launch, likelihood_gap, load_models, make_quantizer, number,
                   perplexity, positive, prepare, reading, safe_name, say, smallest_int, spread,
                   to_unit, write_file)

FAST = dict(data="cifar10", likelihood="logistics", num_codebooks=8, num_codes=128, code_dim=8,
            beta=2.0, samples=10, batch_size=16, lr_decay=0.5, clip_norm=1.0)
PRESETS = {
    # 32 x 32 x 3 -> 8 x 8 codes of 9 bits: the 42.6-fold compression of sec. 4.2, for a laptop.
    "demo": dict(steps=1600, prior_steps=2500, batch_size=32, lr=1e-3, prior_lr=3e-3,
                 lr_decay=0.5, hidden=64, res_hidden=32, prior_channels=64),
    # ImageNet 128 x 128 x 3 -> 32 x 32. Widths and batch are those of the authors' public notebook.
    "paper": dict(steps=250_000, prior_steps=250_000, batch_size=128, lr=2e-4, prior_lr=2e-4,
                  hidden=128, res_hidden=32, size=128, prior_channels=256, second_steps=250_000),
    # Sec. 4.1; K and D are not public. bshall/VectorQuantizedVAE has 4.82, with 8 codebooks of 128.
    "cifar10": dict(data="cifar10", likelihood="categorical", num_codebooks=10, code_dim=32,
                    steps=250_000, prior_steps=50_000, batch_size=128, lr=2e-4, prior_lr=2e-4,
                    hidden=256, res_hidden=256, prior_channels=128),
    # Two hours and ten minutes of one core: their rate, a p(x|z) that learns six times as fast.
    "cifar10-night": dict(FAST, steps=120_000, prior_steps=6000, lr=1e-3, prior_lr=2e-3, flips=True,
                          hidden=128, res_hidden=128, prior_channels=64, precision="bf16"),
    "cifar10-small": dict(FAST, steps=15_000, prior_steps=600, lr=2e-3, prior_lr=3e-3,
                          hidden=64, res_hidden=64, prior_channels=32),
}


def main(run, data):
    """The paper's experiment: a VQ-VAE, the prior of its codes, samples, numbers."""
    model = fit_model(run, data)                       # secs. 3.1, 3.2: the prior is uniform
    metrics = measure(run, model, data)
    if run.args.model == "vqvae":
        codes = encode_all(run, model, data)           # every image once; the model is frozen
        metrics |= code_usage(run, codes.test, data.test)
        prior = fit_prior(run, codes, data)            # sec. 3.3: p(codes), autoregressive
        metrics |= measure_prior(run, prior, codes, data, metrics)
        labels, samples = sample_images(run, model, prior, data)
        if len(data.classes) > 1:                      # do samples show the class they should?
            metrics |= judge_samples(run, samples, labels, data)
        if run.args.second_stage:                      # sec. 4.2: a whole image in 27 bits
            metrics |= second_stage(run, model, codes, data)
    run.finish(metrics)


# -- Stage one: encoder, codebook, decoder (eq. 3) ----------------------------------------------

def fit_model(run, data):
    """Train the VQ-VAE, or one of the models that sec. 4.1 compares it with."""
    args = run.args
    model = make_model(args, data.facts).to(run.device, memory_format=torch.channels_last)

    def loss(net, x, *_):
        if args.flips and model.training:              # a mirror image is as likely
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
        y = net(x)
        scale = 1 / (x[0].numel() * math.log(2))       # nats per image -> bits/dim
        stats = ({"mse": F.mse_loss(y.out.detach().float(), to_unit(x)) * 255 ** 2}
                 if args.likelihood == "mse" else
                 {"rate": y.rate.mean() * scale, "distortion": y.nll.mean() * scale,
                  "bits_per_dim": (y.rate + y.nll).mean() * scale})
        if y.codes is not None:
            stats["codes_used"] = count_codes(y.codes, args.num_codes, args.num_codebooks)
        return y.loss, stats
    return run.fit(args.model, model, loss, data.train, args.steps, args.batch_size, args.lr,
                   data.valid)


def make_model(args, facts):
    """All three "using the same standard VAE architecture", sec. 4.1."""
    likelihood = {"mse": lambda: Gaussian(facts["variance"]), "categorical": Categorical,
                  "logistics": lambda: Logistics(args.mixtures)}[args.likelihood]()
    widths = dict(channels=facts["size"][2], hidden=args.hidden, res_hidden=args.res_hidden)
    model = {
        "vqvae": lambda: VQVAE(make_quantizer(args, args.num_codebooks), likelihood, **widths),
        "vae": lambda: VAE(likelihood, args.latents, **widths),
        "vimco": lambda: VIMCO(likelihood, args.num_codes, args.num_codebooks, args.code_dim,
                               args.samples, args.vimco_prior, **widths)}[args.model]()
    if args.likelihood != "mse":
        likelihood.init_logits(model.decoder[-1])
    return model


# -- Stage two: the prior, "an autoregressive distribution over z" (sec. 3.3) -------------------

Codes = NamedTuple("Codes", [(part, TensorDataset) for part in ("train", "valid", "test")])


def encode_all(run, model, data):
    """Data sets of codes (N, h, w), (N, G, h, w) of G codebooks, on the CPU; and labels if any."""
    run.say("encoding all images")
    kind = smallest_int(run.args.num_codes)
    return Codes(*(TensorDataset(torch.cat([model.encode(x).cpu().to(kind) for x in
                                            part.batches(run.device)]), *part.labels)
                   for part in (data.train, data.valid, data.test)))


def make_prior(args, facts):
    height, width, _ = (side // STRIDE for side in facts["size"])
    return PixelCNN(args.num_codes, args.prior_channels, PixelCNN.layers_for(height, width),
                    len(facts["classes"]), num_codebooks=args.num_codebooks)


def fit_prior(run, codes, data):
    """A PixelCNN on the codes, given the class if there are classes."""
    prior = make_prior(run.args, data.facts)
    return fit_codes(run, "prior", prior, prior_loss, codes, run.args.prior_steps)


def prior_loss(net, codes, labels=None):
    codes = codes.long()
    loss = F.cross_entropy(net(codes, labels), codes)  # nats per code
    return loss, {"bits_per_code": loss.detach() / math.log(2)}


def fit_codes(run, stage, net, loss, codes, steps):
    return run.fit(stage, net, loss, codes.train, steps,
                   run.args.prior_batch_size or run.args.batch_size, run.args.prior_lr, codes.valid)


def draw_images(vqvae, prior, size, labels, seed, temperature):
    """Images (N, C, H, W), from codes that the prior draws, given labels (N,) if it has classes."""
    device = vqvae.quantizer.codebook.device
    generator = torch.Generator(device).manual_seed(seed)

    def draw(y):
        return vqvae.decode(prior.sample(
            len(y), size[0] // STRIDE, size[1] // STRIDE, y if prior.num_classes else None,
            temperature=temperature, generator=generator))
    return in_batches(draw, device, 50, labels)


def sample_images(run, model, prior, data):
    """Labels (N,) of all classes in training (100 to 200, or one of each), and images drawn
    given them; 64 images without classes. samples.png shows eight rows."""
    known = data.train.labels[0].unique()[:1000] if data.classes else torch.arange(8)
    labels = known.repeat(max(1, 200 // len(known)) if data.classes else 8)
    run.say(f"drawing {len(labels)} samples from the prior")
    images = draw_images(model, prior, data.facts["size"], labels[:2] if run.rehearsing else labels,
                         run.args.seed, run.args.temperature or 1.0)
    images = images[torch.arange(len(labels)) % len(images)]           # a rehearsal repeats two
    columns, names = min(len(known), 10), [data.classes[k] for k in known if data.classes]
    run.picture("samples", images[:8 * columns].unflatten(0, (8, columns)), "samples: codes from "
                "the PixelCNN, decoded", columns=names if len(known) <= 10 else ())
    return labels, images


# -- The second stage: a whole image in 27 bits (sec. 4.2, figure 5) ----------------------------

LATENTS = 3  # "We use only three latent variables (each with K=512 and their own embedding space"


def second_stage(run, model, codes, data):
    """A second VQ-VAE on the code maps of the first; figure 5; and whether its latents are used."""
    args, lookup = run.args, model.quantizer.lookup    # codes -> e_k, what the encoders take
    vqvae, vae, alone = fit_second(run, codes, lookup)
    latents = Codes(*(TensorDataset(in_batches(         # (N, 3, 1, 1)
        lambda c: vqvae.encode(lookup(c)), run.device, 128, part.tensors[0])) for part in codes))
    # To sample images unconditionally: p(k_1) p(k_2|k_1) p(k_3|k_1,k_2), a 1 x 1 grid.
    prior = PixelCNN(args.num_codes, args.prior_channels, 1, num_codebooks=LATENTS)
    fit_codes(run, "second-prior", prior, prior_loss, latents, args.second_steps)
    # One z of each test map for its decoder, (N, 3 * D, 1, 1); that of the VAE is drawn.
    maps, three = codes.test.tensors[0], latents.test.tensors[0]
    torch.manual_seed(args.seed)
    z = in_batches(vqvae.quantizer.lookup, run.device, 128, three)
    z_vae, kl = (in_batches(lambda c: vae.encode(lookup(c))[i], run.device, 128, maps)
                 for i in range(2))
    draw_figure_5(run, model, vqvae, vae, prior, data, z, z_vae)
    used = count_codes(three, args.num_codes, LATENTS).view(LATENTS, -1).count_nonzero(1)
    kl = kl.mean().item() / math.log(2)
    return {
        **{f"second_codes_used_{g + 1}": n for g, n in enumerate(used.tolist())},
        **conditional_bits("second", vqvae.decoder, maps, z, LATENTS * math.log2(args.num_codes),
                           run.device), "second_vae_kl_bits": kl,
        **conditional_bits("second_vae", vae.decoder, maps, z_vae, kl, run.device),
        "second_bits_alone": bits_per_code(alone, maps, device=run.device),
        "second_prior_bits": LATENTS * bits_per_code(prior, three, device=run.device)}


def fit_second(run, codes, lookup):
    """The second VQ-VAE; a VAE with as many dimensions and the very same decoder; and that PixelCNN
    alone. As many steps for each of the three."""
    args, latent, grid = run.args, LATENTS * run.args.code_dim, codes.train.tensors[0].shape[-2:]

    def pixelcnn(cond_channels=0):
        return PixelCNN(args.num_codes, args.prior_channels, PixelCNN.layers_for(*grid),
                        cond_channels=cond_channels, num_codebooks=args.num_codebooks)

    def loss(net, codes, *_):
        y = net(codes.long(), lookup(codes))
        stats = {"bits_per_code": y.nll.mean() / codes[0].numel() / math.log(2)}
        if y.codes is not None:
            stats["codes_used"] = count_codes(y.codes, args.num_codes, LATENTS)
        return y.loss, stats
    sizes = (args.num_codebooks * args.code_dim, grid, args.hidden, args.res_hidden)
    vqvae = GlobalVQVAE(make_quantizer(args, LATENTS), pixelcnn(latent), *sizes)
    vqvae.quantizer.restart_after = 2                  # counted in latents; a map has one for each
    vae, alone = GlobalVAE(latent, pixelcnn(latent), *sizes), pixelcnn()
    for name, net, f in (("vqvae", vqvae, loss), ("vae", vae, loss),
                         ("alone", alone, lambda net, codes, *_: prior_loss(net, codes))):
        fit_codes(run, f"second-{name}", net, f, codes, args.second_steps)
    return vqvae, vae, alone


def conditional_bits(name, decoder, codes, z, paid, device="cpu"):
    """Bits per code given an image's own z, given another image's, and in total: only with what is
    paid for z, in bits, do they compare with the PixelCNN alone."""
    # Half the set away: neighbours may be frames of one clip, and nearly the same.
    own, other = (bits_per_code(decoder, codes, cond=z.roll(shift, 0), device=device)
                  for shift in (0, len(z) // 2))
    return {f"{name}_bits_own": own, f"{name}_bits_other": other,
            f"{name}_bits_total": own + paid / codes[0].numel()}


def draw_figure_5(run, model, vqvae, vae, prior, data, z, z_vae):
    """second_stage.png: images, and samples given what the global codes encode of them."""
    index = torch.arange(0, len(data.test), max(1, len(data.test) // 8))[:8]
    generator = torch.Generator(run.device).manual_seed(run.args.seed)
    height, width, _ = (side // STRIDE for side in data.facts["size"])

    def sample(decoder, z):
        return model.decode(decoder.sample(len(z), height, width, cond=z.to(run.device),
                                           generator=generator)).cpu()
    new = [vqvae.quantizer.lookup(prior.sample(len(index), 1, 1, generator=generator))
           for _ in range(2)]
    rows = [data.test[index][0], *(sample(vqvae.decoder, z[index]) for _ in range(4)),
            sample(vae.decoder, z_vae[index]), *(sample(vqvae.decoder, z) for z in new)]
    bits = f"{LATENTS * math.log2(run.args.num_codes):.0f} bits"
    run.picture("second_stage", torch.stack(rows), f"test images, and samples given the {bits} "
                "that a second VQ-VAE keeps of each", rows=["test image", f"its {bits}",
                *["again"] * 3, "VAE, its z", f"new {bits}", "new"])


# -- Measurements and pictures ------------------------------------------------------------------

def measure(run, model, data):
    """Reconstruction error and, of a p(x|z) over bytes, bits/dim under the uniform prior, over all
    test and all validation images; reconstructions.png."""
    metrics = {}
    for prefix, part in (("", data.test), ("valid_", data.valid)):
        torch.manual_seed(run.args.seed)               # VAE and VIMCO draw z
        for x in part.batches(run.device):
            found = {"mse": ((model.reconstruct(x).float() - x) ** 2).mean().item()}
            if not isinstance(model.likelihood, Gaussian):
                found |= bits_per_dim(model, x)
            for name, value in found.items():
                metrics[prefix + name] = metrics.get(prefix + name, 0) + value * len(x) / len(part)
        metrics[f"{prefix}psnr"] = 10 * math.log10(255 ** 2 / max(metrics[f"{prefix}mse"], 1e-9))
    some = data.test[spread(len(data.test), 10)][0]
    if run.args.model == "vqvae" and "distortion" in metrics:
        # Sec. 3.2: is one term of the sum over z enough?
        gaps = [likelihood_gap(model, x.to(run.device)).item() for x in some[:4]]
        metrics["likelihood_gap_bits_per_dim"] = np.mean(gaps) / some[0].numel() / math.log(2)
    both = torch.stack([some, model.reconstruct(some.to(run.device)).cpu()])       # (2, n, ...)
    run.picture("reconstructions", both, "test images", rows=["x", "reconstruction"])
    return metrics


def code_usage(run, codes, images):
    """How many codes a whole set of images uses. Perplexity of one batch would mean little."""
    codes, K, G = codes.tensors[0], run.args.num_codes, run.args.num_codebooks
    counts = count_codes(codes, K, G)
    # Over all G * K rows the entropy is log G more than the mean of the G codebooks'.
    return {"codes_used": counts.count_nonzero().item(), "num_codes": G * K,
            "perplexity": perplexity(counts).item() / G,
            "compression": images.array[0].numel() * 8 / (codes[0].numel() * math.log2(max(2, K)))}


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


def bits_per_code(prior, codes, labels=None, cond=None, device="cpu", batch=64):
    """-log2 p(codes | labels, cond) / number of codes, under a fitted PixelCNN."""
    given = {k: v for k, v in (("labels", labels), ("cond", cond)) if v is not None}

    def nats(c, *rest):
        logits = prior(c.long(), **dict(zip(given, rest)))
        return F.cross_entropy(logits, c.long(), reduction="none").flatten(1).mean(1)
    each = in_batches(nats, device, batch, codes, *given.values())     # (N,)
    return each.double().mean().item() / math.log(2)


def judge_samples(run, samples, labels, data):
    """Train a classifier on real images; how often does it recognise the class of a sample?"""
    def loss(net, x, y):
        scores = net(to_unit(x))
        return F.cross_entropy(scores, y), {"accuracy": (scores.argmax(1) == y).float().mean()}

    def accuracy(images, labels):
        return sum(loss(classifier, x, y.to(run.device))[1]["accuracy"].item() * len(y)
                   for x, y in zip(images, labels.split(128))) / len(labels)
    blocks = [nn.Sequential(nn.Conv2d(c_in, c_out, 3, 2, 1), nn.GroupNorm(8, c_out), nn.ReLU())
              for c_in, c_out in ((samples.shape[1], 32), (32, 64), (64, 64))]
    classifier = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                               nn.Linear(64 * 16, len(data.classes)))
    run.fit("classifier", classifier, loss, data.train, min(800, run.args.steps),
            run.args.batch_size, 2e-3, data.valid)
    return {"sample_class_accuracy": accuracy(samples.to(run.device).split(128), labels),
            "real_class_accuracy": accuracy(data.test.batches(run.device, 128), *data.test.labels)}


# -- Using a finished run -----------------------------------------------------------------------

class Trained(NamedTuple):
    """A finished run. Images are uint8 (B, C, H, W), codes (B, h, w), or (B, G, h, w)."""

    vqvae: VQVAE                                       # .encode(images), .decode(codes)
    prior: PixelCNN
    classes: list                                      # names, in the order of the labels
    size: tuple                                        # (H, W, C) of the images it was trained on
    args: object                                       # the run's flags

    def sample(self, count, label=None, temperature=1.0, seed=0):
        """Draw images; label is a class's name (None: all classes in turn)."""
        if label is not None and label not in self.classes:
            raise ValueError(f"label {label}: this run's classes are {self.classes[:20]}")
        labels = (torch.arange(count) % max(1, len(self.classes)) if label is None else
                  torch.full((count,), self.classes.index(label)))
        return draw_images(self.vqvae, self.prior, self.size, labels, seed, temperature)

    def read(self, file):
        """An image file, its middle cropped and scaled to the run's size: (1, C, H, W)."""
        image = read_image(file, self.size[:2], "L" if self.size[2] == 1 else "RGB")
        return torch.from_numpy(image).view(1, *self.size).permute(0, 3, 1, 2)


def load(folder="runs/image", device="auto"):
    """The VQ-VAE and the prior of a finished run, in eval mode; ValueError if there is none."""
    models, args, facts = load_models(folder, "image", device, lambda args, facts: (
        make_model(args, facts), make_prior(args, facts)))
    return Trained(*models, facts["classes"], tuple(facts["size"]), args)


def use(args):
    """--sample and --reconstruct: a finished run, without training."""
    from PIL import Image
    run, folder, images = load(args.out, args.device), Path(args.out) / "used", {}
    if args.sample:
        samples = run.sample(args.sample, args.label,
                             args.temperature or run.args.temperature or 1.0, args.seed)
        images = {f"sample-{i:04}": x for i, x in enumerate(samples)}
    for i, file in enumerate(args.reconstruct or ()):
        x = run.read(file).to(run.vqvae.quantizer.codebook.device)
        images[f"{i}-{safe_name(Path(file).stem)}"] = run.vqvae.reconstruct(x)[0].cpu()
    folder.mkdir(exist_ok=True)
    for name, x in images.items():                     # (C, H, W)
        write_file(folder / f"{name}.png", lambda f: Image.fromarray(
            x.permute(1, 2, 0).squeeze(2).numpy()).save(f, "PNG"))
    say(f"images in {folder}: {len(images)}")


# -- Data: the demo's scenes, CIFAR-10, or your own ---------------------------------------------

STRIDE = 4  # the product of the encoder's strides: a code stands for 4 x 4 pixels
PARTS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"       # as published on that site
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


class Images(Dataset):
    """One part of the data: rows of an array (M, H, W, C) of bytes, in memory or in a file, not
    copied. images[index], index (B,) int64 -> (x, labels), or (x,), x uint8 (B, C, H, W)."""

    def __init__(self, array, rows, labels=None):
        self.array, self.rows = array, rows
        self.labels = () if labels is None else (labels[rows],)        # (N,)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        x = self.array[self.rows[index]].permute(0, 3, 1, 2)           # channels_last
        return x, *(y[index] for y in self.labels)

    def batches(self, device, size=None):
        """All images in their order, piece by piece on the device: of large ones a few."""
        size = size or min(128, 1 + 2 ** 22 // self.array[0].numel())
        for index in torch.arange(len(self)).split(size):
            yield self[index][0].to(device)


class Data:
    """Images (M, H, W, C), bytes; part (M,), 0 training, 1 validation, 2 test; labels (M,)."""

    def __init__(self, array, part, labels=None, classes=()):
        self.array, self.part = torch.as_tensor(array), torch.as_tensor(part)
        self.labels = labels if labels is None else torch.as_tensor(labels)
        self.classes = list(classes)
        self.train, self.valid, self.test = (
            Images(self.array, (self.part == p).nonzero().flatten(), self.labels) for p in range(3))
        # The variance scales eq. 3's first term: from whole numbers, the same on every machine.
        some = self.train[spread(len(self.train), 1000)]
        mean, square = (sum((x.long() ** power).sum().item() for x in some[0].split(50))
                        / some[0].numel() for power in (1, 2))
        self.facts = {"size": list(self.array.shape[1:]), "classes": self.classes,
                      "images": [len(self.train), len(self.valid), len(self.test)],
                      "digest": digest(self.array, self.part, *self.train.labels),
                      # Images that are all of one colour have no variance.
                      "variance": max(square - mean ** 2, 1.0) / 255 ** 2}

    def few(self, count=4):
        rows = torch.cat([part.rows[:count] for part in (self.train, self.valid, self.test)])
        labels = self.labels if self.labels is None else self.labels[rows]
        return Data(self.array[rows], self.part[rows], labels, self.classes)


def load_data(run):
    """--data: nothing, "cifar10", a folder of images, or a file of arrays."""
    args = run.args
    if args.label:
        raise ValueError("--label needs --sample")
    if args.second_stage and args.model != "vqvae":
        raise ValueError(f"--second-stage works on the codes of a VQ-VAE; --model {args.model}")
    if args.data is None:
        run.say(f"rendering {args.demo_images} scenes")
        counts = args.demo_images, *[max(4, args.demo_images // 10)] * 2
        images, labels, _ = demo_images(sum(counts), args.seed, args.size or 32)
        data = Data(images, np.repeat([0, 1, 2], counts), labels, SOLIDS)
    elif args.data == "cifar10":
        data = load_cifar10(Path(args.data_dir), wait=run.local_rank > 0)
    elif os.path.isdir(args.data):
        data = load_folder(run, args.data)
    else:
        data = load_file(args.data)
    height, width, _ = data.facts["size"]
    if height % STRIDE or width % STRIDE or (args.size or height, args.size or width) != (
            height, width):
        raise ValueError(f"--data {args.data}, --size {args.size}: images of {height} x {width}; "
                         f"sides must be multiples of {STRIDE}; --size S scales images in folders")
    check_batch(len(data.train), max(args.batch_size, args.prior_batch_size or 1),
                f"--data {args.data or 'demo'}", "--batch-size, --prior-batch-size")
    run.say("{} training, {} validation, {} test images of {} x {} x {}".format(
        *data.facts["images"], *data.facts["size"]))
    return data


def cut(path, groups, part):
    """Which part each example belongs to. What `part` lacks is cut from the training part: every
    tenth group (some 5,000 at most for validation). A group, such as a clip, stays together."""
    part = np.array(part)
    for missing in (2, 1):
        train = part == 0
        number = np.unique(groups[train], return_inverse=True)[1]      # 0, 1, 2, .. in their order
        count = number.max(initial=-1) + 1
        if count < (2 if (part == 2).any() else 10):
            raise ValueError(f"{path}: {len(part)} images, {sum(~train)} held out; {count} images, "
                             "clips or folders of frames left; needs ten, or two and a test part")
        if not (part == missing).any():
            every = min(count, max(10, count // 5000)) if missing == 1 else 10
            chosen = number % every == (every // 2 if missing == 1 else 9)
            part[train] = np.where(chosen, missing, 0)
    return part


def load_folder(run, path):
    """Subfolders are classes; frames in folders below those stay together. Folders train/, val/ and
    test/ at the top are parts; parts that are missing are cut from train/."""
    size, files = run.args.size and (run.args.size, run.args.size), find_files(path, IMAGE_ENDINGS)
    if not files:
        raise ValueError(f"{path}: no images ({' '.join(IMAGE_ENDINGS)})")
    paths = [os.path.join(path, name) for name, *_ in files]
    folders = [name.split(os.sep)[:-1] or [""] for name, *_ in files]

    def look_up(known, names):
        stray = [file for file, name in zip(paths, names) if name not in known]
        if stray:
            raise ValueError(f"{stray[0]}: in no training folder: {', '.join(list(known)[:9])}")
        return [known[name] for name in names]
    parts = [0] * len(files)
    if any(folder[0].lower() in PARTS for folder in folders):
        parts = look_up(PARTS, [folder[0].lower() for folder in folders])
        folders = [folder[1:] or [""] for folder in folders]
    classes = sorted({folder[0] for folder, part in zip(folders, parts) if part == 0} - {""})
    labels = look_up({name: i for i, name in enumerate(classes)},
                     [folder[0] for folder in folders]) if classes else None
    groups = [os.path.dirname(file) if len(folder) > 1 else file
              for file, folder in zip(paths, folders)]
    part = cut(path, np.array(groups), parts)
    shape = read_image(paths[0], size).shape
    images, _ = prepare(run, f"--data {os.path.abspath(path)}", f"upright {size} {files}",
                        partial(read_alike, size, shape), paths, shape)
    return Data(images, part, labels, classes)


def read_alike(size, shape, file):
    image = read_image(file, size)
    if image.shape != shape:
        found, first = ("{} x {}".format(*shape) for shape in (image.shape, shape))
        raise ValueError(f"{file}: {found}, the first image {first}; --size S scales all to S x S")
    return image[None]


def read_image(file, size=None, mode="RGB"):
    """uint8 (H, W, 3), or (H, W) for mode L; size (H, W): the middle, cropped and scaled."""
    from PIL import Image, ImageOps
    with reading(file), Image.open(file) as image:
        if image.mode[0] in "IF":                      # convert() would cut off all above 255
            raise ValueError("more than 8 bits per channel: convert it to 8 bits")
        if size:
            image.draft(mode, size[::-1])              # a JPEG is scaled while it is decoded
        image = ImageOps.exif_transpose(image)         # upright, as EXIF says
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")              # on white
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(mode)
        return np.array(ImageOps.fit(image, size[::-1], Image.BICUBIC) if size else image)


def load_file(path):
    """.npy, mapped and not read into memory; or .npz, with `labels` (N,) and `split` (N,) of
    "train" / "valid" / "test" beside its one array of images. Frames of a clip stay together."""
    with reading(path):
        # mode c: changes, which nobody makes, would stay in memory.
        file = np.load(path, mmap_mode="c", allow_pickle=False)
        arrays = dict(file) if hasattr(file, "files") else {"images": file}
    arrays = {k: a for k, a in arrays.items() if isinstance(a, np.ndarray)}
    images = [a for a in arrays.values() if a.ndim >= 3]
    images = images[0] if len(images) == 1 else np.zeros(0)
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if (images.dtype != np.uint8 or images.ndim not in (4, 5) or images.shape[-1] not in (1, 3)
            or not images.size):
        shown = ", ".join(f"{k} {a.dtype}{a.shape}" for k, a in list(arrays.items())[:9]) or "none"
        raise ValueError(f"{path}: needs one array of images (N, H, W, 3 or 1), (N, 3, H, W), "
                         "(N, H, W) or clips (N, T, H, W, 3), uint8, 0 .. 255 (of floats from 0 to "
                         f"1: (images * 255).round().astype('uint8')); found {shown}")
    N, clip, classes = len(images), images.shape[1] if images.ndim == 5 else 1, ()
    labels, split = arrays.get("labels"), arrays.get("split", np.repeat("train", N))
    for name, a, kind in ("labels", labels, "iu"), ("split", split, "U"):
        if a is not None and (a.shape != (N,) or a.dtype.kind not in kind):
            raise ValueError(f"{path}: {name} {a.dtype}{a.shape}; must be ({N},), one for each "
                             f"image or clip: integers, or words of {', '.join(PARTS)}")
    with reading(f"{path}: split, of words {', '.join(PARTS)}"):
        part = np.array([PARTS[word.lower()] for word in split.tolist()]).repeat(clip)
    if labels is not None:  # a class is a value that occurs: a label of 300,000 is one class
        classes, labels = np.unique(labels.repeat(clip), return_inverse=True)
    return Data(images.reshape(-1, *images.shape[-3:]), cut(path, np.arange(N).repeat(clip), part),
                labels, map(str, classes))


def load_cifar10(folder, wait=False):
    """The binary version, packed; downloaded by one process of a machine, while the others wait."""
    packed = folder / "cifar-10-binary.tar.gz"
    while wait and not packed.exists():
        time.sleep(0.2)
    with reading(f"{packed} (from {CIFAR10_URL}; --data-dir says where it is)"):
        if packed.exists():
            content = packed.read_bytes()
        else:
            say(f"downloading {CIFAR10_URL} (170 MB) to {packed}")
            with urllib.request.urlopen(CIFAR10_URL, timeout=60) as web:
                content = web.read()
        if hashlib.md5(content).hexdigest() != CIFAR10_MD5:
            raise OSError(f"its MD5 is not {CIFAR10_MD5}")
        if not packed.exists():                        # appears whole, or not at all
            folder.mkdir(parents=True, exist_ok=True)
            write_file(packed, lambda f: f.write(content))
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            parts = [np.frombuffer(archive.extractfile(f"cifar-10-batches-bin/{name}.bin").read(),
                                   np.uint8).reshape(-1, 3073)         # label, 3 x 32 x 32 bytes
                     for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
    part, records = np.repeat([0] * 5 + [2], list(map(len, parts))), np.concatenate(parts)
    return Data(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1),
                cut(packed, np.arange(len(part)), part), records[:, 0].astype(int), CIFAR10_CLASSES)


def make_parser():
    parser = Parser("image", PRESETS, description=__doc__)
    parser.uses = ("sample", "reconstruct")
    parser.free = parser.free | {"data_dir", "prior_lr", "prior_batch_size", "second_stage",
                                 "second_steps", "temperature", "label"}
    flag = parser.add_argument
    flag("--model", choices=["vqvae", "vae", "vimco"], default="vqvae", help="those of sec. 4.1")
    flag("--likelihood", choices=["mse", "categorical", "logistics"], default="mse", help="p(x|z)")
    flag("--mixtures", type=positive(int), default=1, help="logistics in the mixture")
    flag("--num-codebooks", type=positive(int), default=1, help="codes per position (sec. 3.2: 10)")
    flag("--latents", type=positive(int), default=32, help="dimensions per position of --model vae")
    flag("--samples", type=positive(int), default=50, help="S >= 2 of --model vimco (paper 50)")
    flag("--vimco-prior", choices=["uniform", "learned", "gaussian"], default="uniform")
    flag("--flips", action="store_true", help="mirror half of the training images, at random")
    flag("--res-hidden", type=positive(int), help="channels inside a residual block")
    flag("--prior-batch-size", type=positive(int), help="of the prior (default --batch-size)")
    flag("--prior-lr", type=fraction, help="Adam's learning rate for the prior")
    flag("--second-stage", action="store_true", help="an image in three codes (sec. 4.2, figure 5)")
    flag("--second-steps", type=positive(int), default=1000, help="steps of each of its models")
    flag("--size", type=number(int, "multiple of 4", lambda n: n > 0 == n % STRIDE),
         help="side of the demo's images (32); those in folders are cropped and scaled to it")
    flag("--demo-images", type=positive(int), default=16000, help="training images of the demo")
    flag("--data-dir", default="data", help="folder of the CIFAR-10 archive, or for its download")
    flag("--temperature", type=positive(float), help="of samples (1): below 1 less varied")
    flag("--sample", type=positive(int), metavar="N", help="draw N images from the run in --out")
    flag("--label", metavar="CLASS", help="with --sample: the class (default: all in turn)")
    flag("--reconstruct", nargs="+", metavar="FILE", help="images through the codes of that run")
    return parser


# -- Demo data: one solid in a coloured room, seen from slightly above ---------------------------

SOLIDS = ("sphere", "cylinder", "cone", "cube", "octahedron")


def demo_images(count, seed=0, size=64):
    """Images (count, size, size, 3) uint8, labels (count,) int64, and all else about the scenes."""
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
    return images, labels, scene


def render(label, scene, size):
    """Ray-trace scenes with one kind of solid: two rays per pixel each way, one light, shadows."""
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
    colour = np.where(solid[..., None], palette(s["hue"], 0.9), np.where((floor < wall)[..., None],
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


def flat_sides(solid):
    """The half-spaces a.p <= b in which it lies, [(a, b)]."""
    if solid == "octahedron":
        return [((x, y, z), 0.5 + y / 2) for x in (-0.7, 0.7) for y in (-1, 1) for z in (-0.7, 0.7)]
    walls = [(1, 0), (-1, 0), (0, 1), (0, -1)] if solid == "cube" else []
    return [((0, 1, 0), 1.0), ((0, -1, 0), 0.0)] + [((x, 0, z), 0.5) for x, z in walls]


def hit_solid(label, s, start, direction):
    """Where rays meet the solid: distance t (inf: never) and outward normal there.

    Every solid is convex: half-spaces a.p <= b and, for the round ones, one quadric x^2 + q y^2 +
    z^2 <= w around a centre. A ray is inside each of them for an interval of t, and inside the
    solid in the intersection of these intervals.
    """
    # Into the solid's own coordinates: stands on the floor at 0, radius 1/2, height 1.
    c, o = np.cos(s["turn"]), np.sin(s["turn"])
    shift = np.stack([s["x"], np.zeros_like(s["x"]), s["z"]], -1)
    p, d = ((a[..., 0] * c + a[..., 2] * o, a[..., 1] + 0 * c, a[..., 2] * c - a[..., 0] * o)
            for a in ((start - shift) / s["scale"][..., None], direction / s["scale"][..., None]))
    near, far = (np.full(d[0].shape, end, np.float32) for end in (-np.inf, np.inf))
    normal = np.zeros((*d[0].shape, 3), np.float32)
    for (ax, ay, az), b in flat_sides(SOLIDS[label]):
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
        p = p[0], p[1] - cy, p[2]
        A, B, C = (a[0] * b[0] + q * a[1] * b[1] + a[2] * b[2]
                   for a, b in ((d, d), (d, p), (p, p)))               # A t^2 + 2 B t + C <= w
        root = np.sqrt(np.maximum(B * B - A * (C - w), 0))
        t = (-B - root) / A
        far = np.where(root > 0, np.minimum(far, (-B + root) / A), -np.inf)
        enters = t > near
        near = np.where(enters, t, near)
        round_normal = np.stack([p[0] + t * d[0], q * (p[1] + t * d[1]), p[2] + t * d[2]], -1)
        normal = np.where(enters[..., None], round_normal, normal)
    t = np.where((near < far) & (near > 1e-3), near, np.inf)
    normal = np.stack([normal[..., 0] * c - normal[..., 2] * o, normal[..., 1],
                       normal[..., 2] * c + normal[..., 0] * o], -1)       # back to the room
    return t, normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)


if __name__ == "__main__":
    launch(make_parser(), load_data, main, use)
