"""VQ-VAE: "Neural Discrete Representation Learning", van den Oord, Vinyals, Kavukcuoglu, 2017.

Read this file beside the paper, top to bottom:

    1. Quantisation       eqs. 1-3 (loss codebook), eqs. 4-8 (EMA codebook, appendix A.1)
    2. Encoder, decoder   sec. 4.1
    3. p(x|z)             the data term of eq. 3
    4. The VQ-VAE         sec. 3; its likelihood in bits per dimension, sec. 3.2
    5. VAE and VIMCO      what sec. 4.1 compares it with
    6. A VQ-VAE on codes  sec. 4.2, second stage: a whole image in 27 bits
    7. Running an experiment: training loop, checkpoints, several processes; draws with matplotlib.

The paper's symbols, used in every file:

    x         data                             B         examples in a batch
    z_e       encoder output z_e(x)            H, W, T   height, width, time; h, w of the latents
    codes     k, the index of the nearest e_k  K         codes in a codebook   (num_codes)
    z_q       e_k, the decoder's input         D         size of one e_k       (code_dim)
    codebook  e, the embedding vectors         G         codebooks, one a slice of the channels
    beta      weight of the commitment term    N         latents, of one x; in section 1 of a batch
    gamma     decay of the EMA codebook        sg[.]     stop gradient, .detach()

Sections 1 to 6 need torch and nothing else. Section 1 stands alone: copy it, and the imports
of math, NamedTuple and torch.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None

# == 1. Quantisation: from a vector z_e(x) to an index k, and on to e_k (sec. 3.1, 3.2, A.1) ==

class Quantized(NamedTuple):
    """What a quantiser returns for z_e of shape (B, G*D, ...)."""

    z_q: torch.Tensor    # (B, G*D, ...)  value e_k; its gradient goes to z_e unchanged
    codes: torch.Tensor  # (B, ...) int64, or (B, G, ...) with G > 1 codebooks
    loss: torch.Tensor   # scalar: terms 2 + 3 of eq. 3, or term 3 alone for the EMA codebook


class CopyGradient(torch.autograd.Function):
    """Straight-through estimator (sec. 3.2): forward gives z_q, backward hands grad to z_e.

    The usual one-liner z_e + (z_q - z_e).detach() has the same gradient, but is e_k only up to
    rounding. Here the decoder sees e_k itself, as it will when a prior has sampled the codes.
    """

    @staticmethod
    def forward(ctx, z_e, z_q):
        return torch.empty_like(z_e).copy_(z_q)  # z_q in the memory layout and dtype of z_e

    @staticmethod
    def backward(ctx, grad):
        return grad, None  # the gradient "is passed unaltered to the encoder"; none to e


def mse(a, b):
    """F.mse_loss(a, b); that would hold two temporaries as large as a, this holds one."""
    return F.mse_loss(a, b, reduction="none").sum() / a.numel()


class VectorQuantizer(nn.Module):
    """Nearest-code quantiser whose codebook learns by gradient: eqs. 1-3.

    Args:
        num_codes: K, how many vectors e_1 .. e_K a codebook has.
        code_dim: D, the length of one e_k.
        beta: weight of the commitment term; 0.25 in all the paper's experiments.
        num_codebooks: G. The channels are cut into G slices of D, each with a codebook of its
            own: G latents at every position (the 10 in sec. 3.2's 8 x 8 x 10, say).
        data_init: initialise the codebook with encoder outputs of the first training batch. The
            paper does not say how; False is uniform in [-1/K, 1/K].
        restart_after: a code is dead once restart_after * K latents in a row have chosen others,
            and is moved to an encoder output of that batch. A batch counts as 4 K at most: what is
            rare is absent from many batches. Not in the paper; 0 is the paper's rule, under
            which a code that begins in the wrong place stays there. See also reset_moments.

    Input (B, G*D, ...), any number of axes after the channels, at least one latent; ValueError for
    another number of channels. Works in the codebook's dtype, also under autocast: keep that
    float32 or float64, as bfloat16 confuses near neighbours, and counts of EMA stop at 256.
    Over several processes all must bring the same number of latents (drop_last=True).
    """

    def __init__(self, num_codes, code_dim, beta=0.25, num_codebooks=1, data_init=True,
                 restart_after=30):
        super().__init__()
        self.num_codes, self.code_dim, self.num_codebooks = num_codes, code_dim, num_codebooks
        self.beta, self.restart_after = beta, restart_after
        # G codebooks stacked: rows g*K .. (g+1)*K - 1 belong to slice g.      (G*K, D)
        table = torch.empty(num_codebooks * num_codes, code_dim)
        self.codebook = nn.Parameter(table.uniform_(-1 / num_codes, 1 / num_codes))
        # In the state dict: a resumed model must not be initialised again.
        self.register_buffer("initialized", torch.tensor(not data_init))
        self.ready = not data_init                     # a Python copy: no GPU has to be waited for
        # How many latents came since one last chose this code.        (G*K)
        self.register_buffer("unused", torch.zeros(len(table), dtype=torch.long))
        self.register_buffer("moved", self.unused > 0, persistent=False)   # since the last step

    def forward(self, z_e):
        z = self.to_vectors(z_e.detach())              # (G, N, D)
        if self.training and not self.ready:
            if not self.initialized:
                self.init_codebook(z)
            self.ready = True
        codes = self.nearest(z)                        # (G, N)     eq. 1: q(z = k|x) = 1
        rows = self.rows(codes)                        # (G, N)     the same, in the stack
        e = self.codebook.index_select(0, rows.flatten()).view_as(z)  # (G, N, D)  eq. 2: e_k
        z_q = CopyGradient.apply(z_e, self.to_field(e.detach(), z_e.shape))
        # ||.||_2^2 is a sum over the D dimensions, then follows "an average over N terms ... - one
        # for each latent". mse averages over both, hence the factor D, here and below.
        commitment = self.code_dim * mse(z_e.to(e), z_q.detach().to(e))                # term 3
        loss = self.codebook_term(z, e, rows) + self.beta * commitment                 # eq. 3
        if self.training and self.restart_after:
            self.restart_dead_codes(z, rows)
        codes = codes.view(self.num_codebooks, z_e.shape[0], *z_e.shape[2:]).transpose(0, 1)
        return Quantized(z_q, codes.squeeze(1) if self.num_codebooks == 1 else codes, loss)

    def codebook_term(self, z, e, rows):
        """Eq. 3, term 2: moves e towards the encoder outputs z, and never the encoder."""
        return self.code_dim * mse(e, z)

    @torch.no_grad()
    def nearest(self, z, tile=2048):
        """Eq. 1: k = argmin_j ||z_e - e_j||_2 for z (G, N, D), as (G, N) int64."""
        # ||z - e||^2 = |z|^2 - 2 z.e + |e|^2, with |z|^2 the same for every j: the argmax of
        # z.e - |e|^2 / 2, one matrix product, on tiles that stay in cache, never N x K at once.
        e = self.codebook.view(self.num_codebooks, self.num_codes, self.code_dim)
        half = -0.5 * e.square().sum(2).unsqueeze(1)   # (G, 1, K)
        tile = tile if z.device.type == "cpu" else 32 * tile
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([torch.baddbmm(half, part, e.transpose(1, 2)).max(2).indices
                              for part in z.split(tile, 1)], 1)        # argmax() is slower

    @torch.no_grad()
    def init_codebook(self, z):
        """Initialise every codebook with K of the vectors z (G, N, D), chosen by k-means++: each
        next one with a probability proportional to its squared distance from the nearest one
        chosen before (Arthur and Vassilvitskii, 2007). Uniform picks would crowd (sky, walls).
        """
        _, world = processes()
        if world > 1:                                  # from the joint batch of all processes
            parts = [torch.empty_like(z) for _ in range(world)]
            dist.all_gather(parts, z.contiguous())
            z = torch.cat(parts, 1)
        # A generator of its own: the same rows in every process, the global one untouched.
        generator, K = torch.Generator().manual_seed(0), self.num_codes
        z = z[:, torch.randperm(z.shape[1], generator=generator)[:2 ** 15].to(z.device)]
        if z.shape[1] < K:  # add copies, moved a little: equal codes would tie for ever
            spread = z.std(1, keepdim=True) if z.shape[1] > 1 else torch.ones_like(z)
            copies = z.repeat(1, K // z.shape[1], 1)
            noise = torch.randn(copies.shape, generator=generator).to(z)
            z = torch.cat([z, copies + 0.1 * spread * noise], 1)
        e, distance = [z[:, :1]], torch.full_like(z[..., 0], math.inf)         # (G, N)
        while len(e) < K:
            distance = torch.minimum(distance, (z - e[-1]).square().sum(2).clamp(min=1e-30))
            pick = torch.multinomial(distance.cpu(), 1, generator=generator).to(z.device)
            e.append(z.take_along_dim(pick.unsqueeze(2), 1))                   # (G, 1, D)
        self.move(torch.ones_like(self.unused, dtype=torch.bool), torch.cat(e, 1).flatten(0, 1))
        self.initialized.fill_(True)

    @torch.no_grad()
    def restart_dead_codes(self, z, rows):
        """Move dead codes to vectors of this batch: z (G, N, D), and the rows (G, N) they chose.

        The outputs of a new encoder are so alike that a few codes serve them all; the others are
        left behind as these spread. All processes count together, and move the same codes to the
        same vectors of the joint batch. No random number is drawn, and no GPU has to wait.
        """
        (G, N, _), (rank, world) = z.shape, processes()
        self.unused += min(N * world, 4 * self.num_codes)           # one image's are alike
        self.unused.index_fill_(0, rows.flatten(), 0)
        start = rows.sum(1, keepdim=True)              # (G, 1)  modulo N as good as random
        if world > 1:  # a code that any process has used is 0 now, in all of them
            dist.all_reduce(self.unused, dist.ReduceOp.MIN)
            dist.all_reduce(start)
        dead = (self.unused >= self.restart_after * self.num_codes).view(G, -1)        # (G, K)
        nth = dead.cumsum(1) - 1                       # 0, 1, 2, .. for the dead ones
        dead &= nth < N * world                        # two at one vector would tie
        count = dead.sum(1, keepdim=True).clamp(min=1)
        # Evenly spread places, as neighbours are alike; from 0 on they would be corners of images.
        place = (nth * (N * world) // count + start) % (N * world) - rank * N          # (G, K)
        here = (place >= 0) & (place < N)              # the others are in other processes' shares
        new = z.take_along_dim(place.clamp(0, N - 1).unsqueeze(2), 1) * here.unsqueeze(2)
        if world > 1:
            dist.all_reduce(new)
        self.move(dead.flatten(), new.flatten(0, 1))

    def move(self, which, to):
        """Codes `which` (G*K) bool to the vectors `to` (G*K, D); their counts begin anew."""
        self.codebook.copy_(torch.where(which.unsqueeze(1), to, self.codebook))
        self.unused.masked_fill_(which, 0)
        self.moved |= which

    def reset_moments(self, optimizer):
        """Call once, after the optimiser is made: before each of its steps the averages that Adam
        keeps of a moved code's gradients are set to 0. They belong to the place that it left."""
        def forget(optimizer, *_):
            for average in optimizer.state.get(self.codebook, {}).values():
                if average.shape == self.codebook.shape:
                    average.masked_fill_(self.moved.unsqueeze(1), 0)
            self.moved.zero_()
        optimizer.register_step_pre_hook(forget)

    def lookup(self, codes):
        """codes (B, ...), or (B, G, ...), integers, to vectors (B, G*D, ...): for the decoder."""
        codes = codes.unsqueeze(1) if self.num_codebooks == 1 else codes
        rows = self.rows(codes.transpose(0, 1).flatten(1).long())
        shape = (codes.shape[0], self.num_codebooks * self.code_dim, *codes.shape[2:])
        return self.to_field(F.embedding(rows, self.codebook), shape)

    def rows(self, codes):                             # (G, N) codes -> rows of the stack
        first = torch.arange(self.num_codebooks, device=codes.device) * self.num_codes
        return codes + first.unsqueeze(1)

    def to_vectors(self, z_e):
        """(B, G*D, ...) -> (G, N, D): a vector is the D channels of one position, nothing else."""
        G, D = self.num_codebooks, self.code_dim
        if z_e.dim() < 2 or z_e.shape[1] != G * D:
            raise ValueError(f"z_e must be (B, {G * D}, ...): num_codebooks {G} x code_dim {D} "
                             f"channels; got {tuple(z_e.shape)}")
        z = z_e.unflatten(1, (G, D)).transpose(0, 1).movedim(2, -1)    # (G, B, ..., D)
        return z.reshape(G, -1, D).to(self.codebook.dtype)

    def to_field(self, e, shape):
        """The way back: (G, N, D) -> (B, G*D, ...)."""
        e = e.view(self.num_codebooks, shape[0], *shape[2:], self.code_dim)
        return e.movedim(-1, 2).transpose(0, 1).reshape(shape)


class VectorQuantizerEMA(VectorQuantizer):
    """The same quantiser; a code is a moving average of the outputs that chose it: A.1, eqs. 6-8.

    gamma is the decay: 0.99 was found "to work well in practice". The codebook is a buffer, which
    the optimiser never sees. It moves in training mode only.
    """

    def __init__(self, num_codes, code_dim, beta=0.25, gamma=0.99, num_codebooks=1,
                 data_init=True, restart_after=30):
        super().__init__(num_codes, code_dim, beta, num_codebooks, data_init, restart_after)
        self.gamma = gamma
        table = self.codebook.detach()
        del self.codebook
        # N_i starts at 1 and m_i at e_i, so that eq. 8 holds from the first step on. With N_i at
        # 0, as often seen, every code that was not hit yet is thrown far away.
        self.register_buffer("codebook", table)                        # e_i  (G*K, D)
        self.register_buffer("ema_count", torch.ones(len(table)))      # N_i  (G*K)
        self.register_buffer("ema_sum", table.clone())                 # m_i  (G*K, D)

    def codebook_term(self, z, e, rows):
        """Eq. 4 is minimised by averaging, not by gradient: nothing is left of it in the loss."""
        if self.training:
            self.update(z.flatten(0, 1), rows.flatten())
        return 0.0

    @torch.no_grad()
    def update(self, z, rows):
        """One step of eqs. 6-8 with z (G*N, D) and the row of the codebook each one chose."""
        n = torch.zeros_like(self.ema_count).index_add_(0, rows, torch.ones_like(z[:, 0]))
        total = torch.zeros_like(self.ema_sum).index_add_(0, rows, z)  # sum_j z_ij
        if processes()[1] > 1:                         # every process sees the joint batch
            dist.all_reduce(n)
            dist.all_reduce(total)
        self.ema_count.lerp_(n, 1 - self.gamma)                        # eq. 6: N_i
        self.ema_sum.lerp_(total, 1 - self.gamma)                      # eq. 7: m_i
        # eq. 8. For a code without a latent eqs. 6 and 7 shrink N_i and m_i alike: e_i stays
        # where it is, and is spared 0/0 after thousands of such steps.
        chosen = (n > 0).unsqueeze(1)
        mean = self.ema_sum / self.ema_count.unsqueeze(1)
        self.codebook.copy_(torch.where(chosen, mean, self.codebook))

    def move(self, which, to):
        super().move(which, to)
        self.ema_count.masked_fill_(which, 1)
        self.ema_sum.copy_(torch.where(which.unsqueeze(1), to, self.ema_sum))


def processes():
    """This process's rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def count_codes(codes, num_codes, num_codebooks=1):
    """How often each code occurs: codes (B, ...) or (B, G, ...) -> (G*K,) int64."""
    codes = codes.unsqueeze(1) if num_codebooks == 1 else codes
    first = torch.arange(num_codebooks, device=codes.device).unsqueeze(1) * num_codes
    rows = (codes.transpose(0, 1).flatten(1) + first).flatten()        # (G*N,)
    return rows.new_zeros(num_codebooks * num_codes).index_add_(0, rows, torch.ones_like(rows))


def perplexity(counts):
    """exp of the entropy of code frequencies: K (for G codebooks G K) if all are equally frequent,
    1 (G) if only one is used. For counts over a whole data set: a batch has too few latents."""
    return torch.special.entr(counts / counts.sum()).sum().exp()


# == 2. Encoder and decoder (sec. 4.1; with ndim=1 the encoder of raw speech, sec. 4.3) =======

CONV = {1: nn.Conv1d, 2: nn.Conv2d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


class ResidualBlock(nn.Module):
    """ "ReLU, 3x3 conv, ReLU, 1x1 conv", added to the input."""

    def __init__(self, hidden, res_hidden, ndim=2):
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReLU(),  # not in place: the skip must carry x, and x.relu_() would change it
            CONV[ndim](hidden, res_hidden, 3, padding=1), nn.ReLU(inplace=True),
            CONV[ndim](res_hidden, hidden, 1))

    def forward(self, x):
        return x + self.branch(x)


class Encoder(nn.Sequential):
    """x (B, C, ...) -> z_e (B, out_channels, ...), each axis smaller by the product of strides.

    "2 strided convolutional layers with stride 2 and window size 4 x 4, followed by two residual
    3 x 3 blocks". The 1x1 convolution at the end, to G*D channels, is not in the paper.
    """

    def __init__(self, in_channels, hidden, res_hidden, out_channels, strides=(2, 2), ndim=2):
        layers = []
        for i, s in enumerate(strides):
            # Window s + 2*(s//2), so 4 for stride 2, and padding s//2 divide the length by s.
            layers += [CONV[ndim](hidden if i else in_channels, hidden, s + 2 * (s // 2), s,
                                  s // 2), nn.ReLU(inplace=True)]
        layers.pop()  # the residual block brings its own ReLU
        super().__init__(*layers, *(ResidualBlock(hidden, res_hidden, ndim) for _ in range(2)),
                         nn.ReLU(inplace=True), CONV[ndim](hidden, out_channels, 1))

    def forward(self, x):
        return super().forward(x.to(self[0].weight.dtype))             # float64 if the model is


class Decoder(nn.Sequential):
    """z_q (B, in_channels, ...) -> parameters of p(x|z_q), (B, out_channels, ...).

    "Two residual 3 x 3 blocks, followed by two transposed convolutions with stride 2 and window
    size 4 x 4": the encoder's mirror image, from a 1x1 convolution that the paper leaves out.
    """

    def __init__(self, in_channels, hidden, res_hidden, out_channels, strides=(2, 2), ndim=2):
        layers = [CONV[ndim](in_channels, hidden, 1), ResidualBlock(hidden, res_hidden, ndim),
                  ResidualBlock(hidden, res_hidden, ndim), nn.ReLU(inplace=True)]
        for i, s in enumerate(strides):
            last = i == len(strides) - 1
            layers += [CONV_TRANSPOSE[ndim](hidden, out_channels if last else hidden,
                                            s + 2 * (s // 2), s, s // 2), nn.ReLU(inplace=True)]
        layers.pop()  # none after the output
        super().__init__(*layers)


# == 3. p(x|z): what the decoder's output means, and -log p(x|z) in nats ======================

class Gaussian:
    """p(x|z) = N(x; decoder output, sigma^2 I), x scaled to [-0.5, 0.5]: "MSE over pixels".

    The paper leaves sigma free, and with it the scale of eq. 3's first term. With 2 sigma^2 the
    variance of the training data, a model that outputs the mean pixel scores 1 per dimension.
    """

    outputs = 1  # decoder channels for each channel of x

    def __init__(self, variance=1.0):
        self.variance = variance  # of x in [-0.5, 0.5], over all pixels of the training data

    def nll(self, out, x):
        """-log p(x|z) without its constant, in nats: out and uint8 x (B, C, H, W) -> (B,)."""
        return (out - to_unit(x)).square().flatten(1).sum(1) / self.variance

    def image(self, out):
        """The mean of p(x|z) as uint8 (B, C, H, W)."""
        return ((out.float() + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)


class Categorical:
    """p(x|z) = a softmax over the 256 intensities of every colour of every pixel.

    What the authors used for sec. 4.1 (they said so by e-mail; the paper does not). -log2 p is a
    number of bits: comparable between models, and with the 8 bits of a byte itself.
    """

    outputs = 256

    def init_logits(self, layer):
        """Initialise a decoder's last, transposed convolution as if p(x|z) were a Gaussian.

        Not in the paper. A softmax has no order of intensities. These weights give it one: the bias
        is a wide bell, a cosine of half a period moves it, one of a whole period widens it.
        """
        level = (torch.arange(256) + 0.5) / 256                        # 0 .. 1
        inputs, outputs, *window = layer.weight.shape                  # outputs = C * 256
        periods = torch.tensor([0.5, 0.5, 0.5, 1]).repeat(inputs)[:inputs, None]
        wave = (2 * math.pi * periods * level).cos()                   # (inputs, 256)
        size = torch.randn(inputs, outputs // 256, 1, *window) * 6 / inputs ** 0.5
        with torch.no_grad():
            layer.weight.copy_((size * wave[:, None, :, None, None]).flatten(1, 2))
            layer.bias.copy_((-0.5 * ((level - 0.5) / 0.2) ** 2).repeat(outputs // 256))

    def logits(self, out):
        """(B, C * 256, H, W) -> (B, H, W, C, 256): a view when the network is channels_last."""
        return out.permute(0, 2, 3, 1).unflatten(3, (-1, 256))

    def nll(self, out, x):
        """-log p(x|z) in nats: out (B, C * 256, H, W), uint8 x (B, C, H, W) -> (B,)."""
        # The bytes themselves are the classes: rebuilt from scaled floats some would be off by 1.
        target = x.permute(0, 2, 3, 1).long()          # (B, H, W, C)
        nats = F.cross_entropy(self.logits(out).flatten(0, 3), target.flatten(), reduction="none")
        return nats.view(len(x), -1).sum(1)

    def image(self, out):
        """The mean of p(x|z) as uint8 (B, C, H, W)."""
        p = self.logits(out).float().softmax(-1)
        mean = p @ torch.arange(256, device=out.device, dtype=p.dtype)
        return mean.round().to(torch.uint8).permute(0, 3, 1, 2)


class Logistics:
    """p(x|z) = a mixture of M discretised logistics for every colour of every pixel.

    Not in the paper; [PixelCNN++, Salimans et al. 2017] without its autoregression, so that, as
    in sec. 4.1, all bytes are independent given z. A logistic is a bell with mean m and scale s
    whose CDF is a sigmoid. Byte k takes what lies within half a byte of k, and 0 and 255 the tails:

        P(k) = sigmoid(a) - sigmoid(b),  a = (k + 1/2 - m) / s,  b = (k - 1/2 - m) / s

    3 M outputs for the softmax's 256, and near intensities are alike from the start: far ahead
    at equal computing time. In the code x and m are scaled to [-0.5, 0.5], and s by 1/255.
    """

    def __init__(self, mixtures=1):
        self.mixtures, self.outputs = mixtures, 3 * mixtures

    def init_logits(self, layer):
        """Initialise a decoder's last layer: M bells side by side, together as wide as images."""
        M = self.mixtures
        means = torch.linspace(-0.5, 0.5, M + 2)[1:-1]
        bias = torch.stack([torch.zeros(M), means, torch.full((M,), -2.0)])            # (3, M)
        with torch.no_grad():
            layer.bias.copy_(bias.flatten().repeat(len(layer.bias) // bias.numel()))

    def mixture(self, out):
        """(B, C * 3 * M, H, W) -> log weight, m, log s, (B, C, M, H, W) each, in float32."""
        weight, mean, log_s = out.float().unflatten(1, (-1, 3, self.mixtures)).unbind(2)
        # Below e^-8 over 99 % is in one byte; above e^8 all is in the tails.
        return weight.log_softmax(2), mean, log_s.clamp(-8, 8)

    def nll(self, out, x):
        """-log p(x|z) in nats: out (B, C * 3 * M, H, W), uint8 x (B, C, H, W) -> (B,)."""
        weight, mean, log_s = self.mixture(out)
        x, half = x.unsqueeze(2), 0.5 / 255                            # (B, C, 1, H, W)
        middle, precision = to_unit(x) - mean, (-log_s).exp()
        # A difference of sigmoids loses all its digits in the tails; but it is a product,
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a)), exact in logarithms.
        # Byte 0 has b = -inf and is the first factor alone, byte 255 the second.
        below, above = x > 0, x < 255
        log_p = (above * F.logsigmoid((middle + half) * precision)
                 + below * F.logsigmoid((half - middle) * precision)
                 + (above & below) * (-torch.expm1(-2 * half * precision)).log())
        return -(weight + log_p).logsumexp(2).flatten(1).sum(1)

    def image(self, out):
        """The mean of p(x|z) as uint8 (B, C, H, W)."""
        weight, mean, log_s = self.mixture(out)
        # The mean of a logistic clipped to [-1/2, 1/2] is -1/2 plus the integral, from
        # -1/2 to 1/2, of P(X > t) = sigmoid((m - t) / s), which is s softplus((m - t) / s).
        s, mean = log_s.exp(), mean.clamp(-1e3, 1e3)
        mean = s * (F.softplus((mean + 0.5) / s) - F.softplus((mean - 0.5) / s))
        return ((weight.exp() * mean).sum(2) * 255).round().clamp(0, 255).to(torch.uint8)


def to_unit(x):
    """uint8 0..255 -> float in [-0.5, 0.5], what every encoder gets."""
    return x.float().div(255).sub(0.5)


# == 4. The VQ-VAE (sec. 3) ===================================================================

class Output(NamedTuple):
    """What a model returns. -log p(x) <= nll + rate, in nats (Gaussian: but for a constant; VAE,
    VIMCO: on average over z)."""

    loss: torch.Tensor   # scalar to minimise: per latent, per number of x or per example
    nll: torch.Tensor    # (B,)  distortion: -log p(x|z)
    rate: torch.Tensor   # (B,)  what z costs: for the VQ-VAE and the VAE the KL from the prior
    out: torch.Tensor    # (B, C * likelihood.outputs, H, W)  parameters of p(x|z)
    codes: torch.Tensor  # (B, h, w) or (B, G, h, w) int64; None for continuous z


def loss_per_latent(nll, q):
    """Eq. 3 for images, speech and code maps: nll, -log p(x|z_q) in nats, of any shape, is summed
    over all of x and divided by the number of latents, as terms 2 and 3 are.

    Literally, eq. 3 sums its first term over all of x, and "we get an average over N terms" for
    the others: the bigger the image, the less they would weigh. This is the loss of one latent
    at every size: what its part of x costs, plus how far its z_e is from e. For 32 x 32 x 3 bytes
    and 8 x 8 codes that part is 48 dimensions. The authors' public code averages over the
    dimensions of x and over the D of z: terms 2 and 3 then weigh 48 / D of what they do here.
    """
    return nll.sum() / q.codes.numel() + q.loss


class VQVAE(nn.Module):
    """Encoder, quantiser and decoder for images of bytes.

    Args:
        channels: C of x. hidden, res_hidden: width of the convolutions and of the residual
            blocks' inner layer; sec. 4.1 has 256 for both.
        quantizer: VectorQuantizer or VectorQuantizerEMA.
        likelihood: p(x|z), one of section 3.
        strides: one stride for each strided convolution; (2, 2) takes 128 to 32, 84 to 21.

    Input x: uint8 (B, C, H, W), H and W multiples of the product of the strides.
    """

    def __init__(self, quantizer, likelihood, channels=3, hidden=256, res_hidden=256,
                 strides=(2, 2)):
        super().__init__()
        latent = quantizer.num_codebooks * quantizer.code_dim
        self.encoder = Encoder(channels, hidden, res_hidden, latent, strides)
        self.quantizer = quantizer
        self.decoder = Decoder(latent, hidden, res_hidden, channels * likelihood.outputs, strides)
        self.likelihood = likelihood

    def forward(self, x):
        q = self.quantizer(self.encoder(to_unit(x)))
        out = self.decoder(q.z_q)
        nll = self.likelihood.nll(out, x)              # eq. 3, term 1 (printed without its minus)
        # Sec. 3.1: q(z|x) is one-hot and p(z) uniform, so the KL is log K for every latent:
        # sum_k q log(q / p) = 1 * log(1 / (1/K)). A constant: no gradient, no place in the loss.
        latents = q.codes[0].numel()                   # N of one image
        rate = torch.full_like(nll, latents * math.log(self.quantizer.num_codes))
        return Output(loss_per_latent(nll, q), nll, rate, out, q.codes)

    @torch.no_grad()
    def encode(self, x):
        """uint8 (B, C, H, W) -> codes (B, h, w), or (B, G, h, w). Call eval() first."""
        return self.quantizer(self.encoder(to_unit(x))).codes

    @torch.no_grad()
    def decode(self, codes):
        """codes -> uint8 images (B, C, H, W), the mean of p(x|z)."""
        return self.likelihood.image(self.decoder(self.quantizer.lookup(codes)))

    def reconstruct(self, x):
        return self.decode(self.encode(x))


@torch.no_grad()
def bits_per_dim(model, images, batch=32):
    """An upper bound of -log2 p(x) per byte of x, over all of `images` (M, C, H, W) uint8.

    Sec. 3.2 for the VQ-VAE: log p(x) = log sum_k p(x|z_k) p(z_k). A sum of positive terms is at
    least any one of them, so log p(x) >= log p(x|z_q(x)) p(z_q(x)). The uniform prior gives each
    of the N latents of an image 1/K, hence
        -log p(x) <= -log p(x|z_q)  [distortion]  +  N log K  [rate, the KL of sec. 3.1].
    Divided by log 2 and by the number of bytes in x: bits per dimension. The VAE's rate is the KL
    of its Gaussians; VIMCO's bound is split in VIMCO.forward. Uniform bytes cost exactly 8.

    Returns {"bits_per_dim", "rate", "distortion"}. Call model.eval() first: in training mode the
    codebook would move. VAE and VIMCO draw z: seed torch.
    """
    if isinstance(model.likelihood, Gaussian):
        raise ValueError("bits per dimension need p(x|z) over bytes, Categorical() or Logistics(): "
                         "the density of a Gaussian is not a probability, and may exceed 1")
    nll = rate = 0.0
    for x in images.split(batch):                      # the last, smaller batch included
        y = model(x)
        nll, rate = nll + y.nll.double().sum().item(), rate + y.rate.double().sum().item()
    scale = 1 / (images.numel() * math.log(2))
    return {"bits_per_dim": (nll + rate) * scale, "rate": rate * scale, "distortion": nll * scale}


@torch.no_grad()
def likelihood_gap(model, x, nearest=1, batch=64):
    """How far -log p(x) is below -log p(x, z_q(x)), at least: in nats, of an image (C, H, W).

    Sec. 3.2 keeps one term of log sum_z p(x|z) p(z), for "the decoder should not allocate any
    probability mass to p(x|z) for z != z_q(x) once it has fully converged". Here those N * nearest
    terms are added in which one latent takes one of its `nearest` other codes, each a run of the
    decoder. All K^N terms are positive: what these add is a lower bound of what all would.
    """
    vq, x = model.quantizer, x.unsqueeze(0)
    z_e = model.encoder(to_unit(x))
    codes = vq(z_e).codes                              # (1, h, w) or (1, G, h, w)
    e = vq.codebook.view(vq.num_codebooks, vq.num_codes, vq.code_dim)
    distance = torch.cdist(vq.to_vectors(z_e), e).flatten(0, 1)        # (N, K), N = G*h*w
    distance.scatter_(1, codes.view(-1, 1), math.inf)  # the code that is in z_q already
    others = distance.topk(min(nearest, vq.num_codes - 1), largest=False).indices  # (N, nearest)
    z = codes.view(1, -1).repeat(1 + others.numel(), 1)                # row 0 is z_q(x)
    z[1:].unflatten(0, others.shape).diagonal(0, 0, 2).copy_(others.t())  # row (n, i): latent n
    z = z.view(-1, *codes.shape[1:])
    nll = torch.cat([model.likelihood.nll(model.decoder(vq.lookup(part)),
                                          x.expand(len(part), -1, -1, -1))
                     for part in z.split(batch)])
    return (nll[0] - nll).logsumexp(0)                 # the prior is uniform: it cancels


# == 5. What sec. 4.1 compares with, "the same standard VAE architecture": VAE and VIMCO ======

class VAE(nn.Module):
    """Gaussian z with the reparametrisation trick (the paper's [23, 32]): `latents` dimensions at
    each position. Unused ones cost nothing: their q(z|x) becomes the prior, KL 0."""

    def __init__(self, likelihood, latents=32, channels=3, hidden=256, res_hidden=256):
        super().__init__()
        self.encoder = Encoder(channels, hidden, res_hidden, 2 * latents)
        self.decoder = Decoder(latents, hidden, res_hidden, channels * likelihood.outputs)
        self.likelihood = likelihood

    def forward(self, x):
        mean, log_var = self.encoder(to_unit(x)).float().chunk(2, 1)   # (B, latents, h, w)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)      # z ~ q(z|x)
        out = self.decoder(z)
        nll = self.likelihood.nll(out, x)
        rate = gaussian_kl(mean, log_var).flatten(1).sum(1)
        return Output((nll + rate).mean() / x[0].numel(), nll, rate, out, None)

    @torch.no_grad()
    def reconstruct(self, x):
        return self.likelihood.image(self.decoder(self.encoder(to_unit(x)).chunk(2, 1)[0]))


def gaussian_kl(mean, log_var):
    """KL(N(mean, var) || N(0, 1)) of every dimension, in nats."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var)


def gaussian_log_prob(z, mean, log_var):
    """log N(z; mean, var) of every dimension."""
    return -0.5 * ((z - mean).square() * (-log_var).exp() + log_var + math.log(2 * math.pi))


class VIMCO(nn.Module):
    """Latents that are drawn, learned by multi-sample score-function gradients (the paper's [28],
    Mnih and Rezende 2016, "Variational inference for Monte Carlo objectives").

    Args:
        num_codes, num_codebooks, code_dim: K, G, D as in the quantiser. The encoder outputs the
            logits of q(z|x) for every latent, the decoder gets a learned vector for every code.
        samples: S of the bound, at least 2; "we use 50 samples". The decoder runs S times.
        chunk: how many of them it keeps in memory. With more samples than that it runs twice,
            chunk by chunk: without gradient for all p(x|z_s), and again in the backward pass.
        prior: "independent Gaussian or categorical priors": "uniform" or "learned" over the K
            codes, or "gaussian", where z is G numbers at a position and p(z) = N(0, 1).
    """

    def __init__(self, likelihood, num_codes=512, num_codebooks=10, code_dim=32, samples=50,
                 prior="uniform", channels=3, hidden=256, res_hidden=256, chunk=10):
        super().__init__()
        if samples < 2 or prior not in ("uniform", "learned", "gaussian"):
            raise ValueError(f"samples {samples}, prior {prior}: each sample is judged by the "
                             "others, so at least 2; the prior is uniform, learned or gaussian")
        G, K, D = num_codebooks, num_codes, code_dim
        self.num_codes, self.num_codebooks, self.samples, self.prior = K, G, samples, prior
        self.chunk = chunk
        K, D = (2, 1) if prior == "gaussian" else (K, D)               # mean and log variance
        self.encoder = Encoder(channels, hidden, res_hidden, G * K)
        self.decoder = Decoder(G * D, hidden, res_hidden, channels * likelihood.outputs)
        if prior != "gaussian":
            self.codebook = nn.Embedding(G * K, D)     # rows g*K .. (g+1)*K - 1 belong to slice g
            # log p(z) but for its normaliser, the same at every position.
            self.log_prior = nn.Parameter(torch.zeros(G, 1, 1, K), prior == "learned")
        self.likelihood = likelihood

    def encode(self, x):
        """What q(z|x) is made of: (B, G, h, w, K) logits, or (B, G, h, w, 2)."""
        h = self.encoder(to_unit(x)).float()
        return h.unflatten(1, (self.num_codebooks, -1)).movedim(2, -1)

    def draw(self, x):
        """z (S, B, G, h, w) from q(z|x), and log q(z|x) and log p(z), (S, B) each."""
        h, S = self.encode(x), self.samples
        if self.prior == "gaussian":
            mean, log_var = h.unbind(-1)
            z = mean + (0.5 * log_var).exp() * torch.randn(S, *mean.shape, device=h.device)
            z, zero = z.detach(), torch.zeros_like(mean)               # no reparametrisation here
            log_q, log_p = gaussian_log_prob(z, mean, log_var), gaussian_log_prob(z, zero, zero)
        else:
            log_q = h.log_softmax(-1)
            log_p = self.log_prior.log_softmax(-1).expand_as(h)
            u = torch.rand(*h.shape[:-1], S, device=h.device)          # (B, G, h, w, S)
            z = torch.searchsorted(log_q.detach().exp().cumsum(-1), u).clamp(max=self.num_codes - 1)
            log_q, log_p, z = (a.movedim(-1, 0)
                               for a in (log_q.gather(-1, z), log_p.gather(-1, z), z))
        return z, log_q.flatten(2).sum(2), log_p.flatten(2).sum(2)

    def embed(self, z):
        """z (M, G, h, w) -> the decoder's input (M, G * D, h, w)."""
        if self.prior == "gaussian":
            return z
        first = torch.arange(self.num_codebooks, device=z.device).view(-1, 1, 1) * self.num_codes
        return self.codebook(z + first).movedim(-1, 2).flatten(1, 2)

    def forward(self, x):
        z, log_q, log_p = self.draw(x)
        decode = self.decode_chunk
        if self.samples > self.chunk:  # keeps z and nll only; decodes again for the gradient
            decode = partial(checkpoint, decode, use_reentrant=False, preserve_rng_state=False)
        out, nll = zip(*(decode(part, x) for part in z.split(self.chunk)))
        nll = torch.cat(nll)                                           # (S, B)
        log_f = log_p - nll - log_q                                    # (S, B)
        bound, surrogate = vimco(log_f, log_q)
        # -L, split with w_s = f_s / sum f: the distortion is sum_s w_s nll_s, the rate the rest.
        distortion = (log_f.softmax(0) * nll).sum(0).detach()
        codes = None if self.prior == "gaussian" else z[0]
        return Output(-surrogate.mean() / x[0].numel(), distortion, -bound.detach() - distortion,
                      out[0], codes)

    def decode_chunk(self, z, x):
        """z (s, B, G, h, w) -> the decoder's output for the first of these samples, and
        -log p(x|z) of all of them, (s, B)."""
        out = self.decoder(self.embed(z.flatten(0, 1)))                # (s * B, ...)
        nll = self.likelihood.nll(out, x.repeat(len(z), 1, 1, 1)).view(z.shape[:2])
        return out[:len(x)].detach().clone(), nll  # a view would keep all of it alive

    @torch.no_grad()
    def reconstruct(self, x):
        h = self.encode(x)
        z = h[..., 0] if self.prior == "gaussian" else h.argmax(-1)    # mean or mode of q(z|x)
        return self.likelihood.image(self.decoder(self.embed(z)))


def vimco(log_f, log_q):
    """The multi-sample bound, and a scalar whose gradient is VIMCO's estimate of the bound's.

    log_f, log_q (S, B): log p(x, z_s) - log q(z_s|x), and log q(z_s|x), for S >= 2 samples.
    Returns bound (B,), L = log 1/S sum_s f_s, whose mean is <= log p(x), and surrogate (B,).

    grad E[L] = E[ sum_s L grad log q(z_s|x) + grad L ], the last with every z_s held fixed. The
    first part is REINFORCE: every sample gets the same reward L. VIMCO gives sample s what it
    alone has brought, L - L_-s, where L_-s is L with f_s replaced by the geometric mean of the
    others: independent of z_s, so E[L_-s grad log q(z_s|x)] = 0, and only the variance falls.
    """
    S = len(log_f)
    bound = log_f.logsumexp(0) - math.log(S)
    others = (log_f.sum(0) - log_f) / (S - 1)          # (S, B)  log of that geometric mean
    own = torch.eye(S, dtype=torch.bool, device=log_f.device).unsqueeze(2)
    without = torch.where(own, others.unsqueeze(1), log_f.unsqueeze(0))    # (S, S, B)
    signal = bound - (without.logsumexp(1) - math.log(S))                  # (S, B)  L - L_-s
    return bound, bound + (signal.detach() * log_q).sum(0)


# == 6. A VQ-VAE on the codes of a VQ-VAE: a whole image in three codes (sec. 4.2, figure 5) ==

class GlobalEncoder(nn.Sequential):
    """Vectors of a code map e (B, in_channels, h, w) -> (B, out_channels, 1, 1): the whole map.
    field: (h, w), any; the paper has 21 x 21. The map is halved until its shorter side is less
    than 8; then one window takes in all that is left."""

    def __init__(self, in_channels, field, hidden, res_hidden, out_channels):
        halvings = max(0, min(field).bit_length() - 3)
        left = [side >> halvings for side in field]    # 21 -> 10 -> 5
        super().__init__(Encoder(in_channels, hidden, res_hidden, hidden, (1,) + (2,) * halvings),
                         nn.ReLU(inplace=True), nn.Conv2d(hidden, out_channels, left))


class GlobalVQVAE(nn.Module):
    """The second stage: its data are code maps of the first, (B, h, w) int64.

    "We use only three latent variables (each with K=512 and their own embedding space e)":
    quantizer has three codebooks, and they are all that is transmitted about the map.
    decoder(codes, cond=z_q) -> logits (B, K, h, w), autoregressive: a PixelCNN, which could do
    without z. Its likelihood takes the place of the pixels' in eq. 3.

    The encoder takes e = lookup(codes) of the first stage: codes that mean nearly the same are
    near each other there, which a new embedding would have to learn.
    """

    def __init__(self, quantizer, decoder, in_channels, field, hidden=256, res_hidden=256):
        super().__init__()
        latent = quantizer.num_codebooks * quantizer.code_dim
        self.encoder = GlobalEncoder(in_channels, field, hidden, res_hidden, latent)
        self.quantizer = quantizer
        self.decoder = decoder

    def forward(self, codes, e):
        """codes (B, h, w), e (B, in_channels, h, w)."""
        q = self.quantizer(self.encoder(e))            # z_q (B, 3 * D, 1, 1)
        out, nll = code_nll(self.decoder, codes, q.z_q)
        rate = torch.full_like(nll, q.codes[0].numel() * math.log(self.quantizer.num_codes))
        return Output(loss_per_latent(nll, q), nll, rate, out, q.codes)

    @torch.no_grad()
    def encode(self, e):
        """e (B, in_channels, h, w) -> the global code (B, 3, 1, 1)."""
        return self.quantizer(self.encoder(e)).codes


class GlobalVAE(nn.Module):
    """The same with a Gaussian z of `latents` dimensions: what "this setup typically breaks".

    The bound is -log p(codes|z) + KL(q(z|codes) || p(z)). What z transmits costs KL, and a PixelCNN
    predicts most of it from the codes it has seen: q(z|x) = p(z), KL 0, is cheaper, "posterior
    collapse". The VQ-VAE's rate is constant: to ignore z would save nothing.
    """

    def __init__(self, latents, decoder, in_channels, field, hidden=256, res_hidden=256):
        super().__init__()
        self.encoder = GlobalEncoder(in_channels, field, hidden, res_hidden, 2 * latents)
        self.decoder = decoder

    def forward(self, codes, e):
        z, rate = self.encode(e)
        out, nll = code_nll(self.decoder, codes, z)
        return Output((nll + rate).mean(), nll, rate, out, None)

    def encode(self, e):
        """e (B, in_channels, h, w) -> z ~ q(z|e) (B, latents, 1, 1), and its KL in nats (B,)."""
        mean, log_var = self.encoder(e).float().chunk(2, 1)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        return z, gaussian_kl(mean, log_var).flatten(1).sum(1)


def code_nll(decoder, codes, z):
    """Logits (B, K, h, w), and -log p(codes|z) in nats (B,)."""
    out = decoder(codes, cond=z)
    return out, F.cross_entropy(out, codes, reduction="none").flatten(1).sum(1)


# == 7. Running an experiment: what the three scripts share. The paper ends above this line =====

def launch(parser, load_data, main, use=None):
    """What `python train_x.py` does: main(run, data), the experiment, or use(args) on a finished
    run if one of the flags in parser.uses is given.

    Errors end here, in one line: what loaders find wrong (ValueError), what the operating
    system and the allocator refuse, and in the rehearsal what would fail after hours.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # a terminal without this letter
    warnings.filterwarnings("ignore", module="PIL|numpy")  # what matters becomes an error
    run = None
    try:
        args = parser.parse_args()
        if any(getattr(args, name) is not None for name in parser.uses):
            return use(args)
        run = Run(parser)
        data = load_data(run)
        run.check_data(data.facts)
        run.rehearse(main, data.few())
        main(run, data)
    except (OSError, MemoryError) as e:
        stop(reason(e))
    except Exception as e:
        begun = run and run.folder_made
        if begun and not re.search("memory|alloc", str(e)):
            raise  # a fault of the program: its traceback is needed
        stop(reason(e) + "; what was saved before is kept, see --resume" * bool(begun))
    except KeyboardInterrupt:
        stop("interrupted; what was saved before is kept, see --resume", status=130)


def stop(message, status=2):
    """One line that says what is wrong, and the exit status of bad input."""
    print(f"error: {' '.join(message.split())[:1000]}", file=sys.stderr)
    raise SystemExit(status)


def reason(error):
    """An exception in half a line."""
    clear = isinstance(error, (OSError, ValueError, RuntimeError, MemoryError))
    text = getattr(error, "strerror", None) or clear and str(error) or repr(error)
    name = getattr(error, "filename", None)
    return f"{name}: {text}" if name else " ".join(text.split())[:300]


@contextmanager
def reading(path):
    """Whatever a file of the user's makes a library raise becomes ValueError("path: ...")."""
    try:
        yield
    except Exception as e:
        raise ValueError(f"{path}: not readable ({reason(e)[:160]})") from e


class Parser(argparse.ArgumentParser):
    """argparse with the flags that all scripts have, and its errors in one line. uses: flags that
    work on a finished run. free: may change with --resume, as they shape no data and no model."""

    uses = ()
    free = {"out", "data", "device", "precision", "resume", "steps", "prior_steps", "batch_size",
            "lr", "lr_decay", "keep"}

    def __init__(self, name, presets, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         **kwargs)
        self.name, self.presets = name, presets
        flag = self.add_argument
        flag("--preset", choices=presets, default="demo", help="defaults (demo) for other flags")
        flag("--data", type=path, metavar="PATH", help="your own data instead of the demo's")
        flag("--out", type=path, default=f"runs/{name}", help="folder for all that the run writes")
        flag("--steps", type=positive(int), help="training steps of stage one")
        flag("--prior-steps", type=positive(int), help="training steps of the prior")
        flag("--batch-size", type=positive(int), help="examples per step, over all processes")
        flag("--lr", type=fraction, help="Adam's learning rate (paper 2e-4)")
        flag("--lr-decay", type=fraction, default=0.0, help="last part over which --lr falls to 0")
        flag("--clip-norm", type=positive(float), help="largest norm of a gradient (paper: none)")
        flag("--codebook", choices=["loss", "ema"], default="loss", help="eq. 3, term 2; or A.1")
        flag("--num-codes", type=positive(int), default=512, help="K (paper 512; phonemes 128)")
        flag("--code-dim", type=positive(int), default=64, help="D (not in the paper)")
        flag("--beta", type=positive(float), default=0.25, help="of eq. 3, term 3 (paper 0.25)")
        flag("--hidden", type=positive(int), help="channels of encoder and decoder (paper 256)")
        flag("--prior-channels", type=positive(int), help="channels of the prior")
        flag("--seed", type=natural, default=0, help="of data, weights, batches and samples")
        flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
        flag("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: GPUs, newer CPUs")
        flag("--keep", choices=["best", "last"], default="best", help="weights: best in validation")
        flag("--finetune", type=path, metavar="RUN", help="start from a finished run's weights")
        flag("--resume", action="store_true", help="continue the run in --out, with its flags")

    def error(self, message):
        stop(f"{message} (see --help)")


def number(kind, name, fits):
    """argparse type: a number of that kind that fits."""
    def convert(text):
        value = kind(text)
        if not fits(value):
            raise ValueError
        return value
    convert.__name__ = name
    return convert


def positive(kind):
    return number(kind, f"positive {kind.__name__}", lambda x: 0 < x < 2 ** 62)


fraction = number(float, "number from 0 to 1", lambda x: 0 <= x <= 1)
depth = number(int, "integer from 1 to 1000", lambda x: 0 < x <= 1000)
natural = number(int, "integer from 0 up", lambda x: 0 <= x < 2 ** 63)
path = number(str, "path", str.strip)


class Run:
    """One experiment: its flags, its folder, its device and processes, and how far it is.

    Everything random is a function of (seed, stage, step, process): so a resumed run equals one
    that never stopped, and no random state is saved.
    """

    rehearsing = trained = False                       # trained: a stage has taken a step

    def __init__(self, parser):
        args = parser.parse_args()
        self.script, self.free, self.facts, self.rows = parser.name, parser.free, {}, {}
        self.started, self.seconds_before, self.folder_made = time.time(), 0.0, False
        with reading("RANK, WORLD_SIZE, LOCAL_RANK in the environment, as torchrun sets them"):
            self.rank, self.world, self.local_rank = (int(os.environ.get(name, default)) for
                name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
            if not 0 <= self.rank < self.world:
                raise ValueError(f"process {self.rank} of {self.world}")
        self.out = self.home = Path(args.out)          # a rehearsal writes elsewhere than home
        self.device = pick_device(args.device, self.local_rank)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        # Later defaults win: script < preset < checkpoint < what was typed; text is checked.
        parser.set_defaults(**parser.presets[args.preset])
        self.saved = self.read("checkpoint.pt") if args.resume else None
        before = self.saved["args"] if args.resume else {}
        if args.resume and self.saved["script"] != self.script:
            stop(f"--resume: {self.out} holds a run of train_{self.saved['script']}.py")
        parser.set_defaults(**{name: value if isinstance(value, bool) else str(value)
                               for name, value in before.items() if value is not None
                               and name not in ("out", "device", "resume")})
        self.args = parser.parse_args()
        for name, value in before.items():
            if name not in self.free and getattr(self.args, name, value) != value:
                stop(f"--resume: --{name.replace('_', '-')} {getattr(self.args, name)} differs "
                     f"from {value}, with which this run was begun; --out starts another one")
        for name in ("batch_size", "prior_batch_size"):
            if (getattr(self.args, name, None) or 0) % self.world:
                stop(f"--{name.replace('_', '-')} {getattr(self.args, name)} does not divide among "
                     f"{self.world} processes")
        torch.manual_seed(self.args.seed)

    def check_data(self, facts):
        """facts: all that models and results depend on; on resume they must be the same."""
        self.facts = facts
        for name, value in (self.saved["facts"] if self.saved else {}).items():
            if facts.get(name) != value:
                stop(f"--resume: the data is not that of this run: {name} was {str(value)[:80]}, "
                     f"is {str(facts.get(name))[:80]}")

    def rehearse(self, main, few):
        """The whole experiment on a handful of examples, one step per stage, into a folder that is
        thrown away: what would fail after hours fails now. No random number is moved."""
        twin = copy(self)
        twin.rehearsing, twin.rows, twin.world = True, {}, 1           # each process for itself
        try:
            gpus = [self.device] if self.device.type == "cuda" else []
            with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(gpus):
                twin.out = Path(folder)
                main(twin, few)
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            stop(f"these flags and data do not work together: {reason(e)} "
                 f"({Path(where.filename).name}, line {where.lineno}; found in a rehearsal, "
                 "nothing was trained or written)")

    def make_folder(self):
        """Called when training begins: until then flags and data may turn out to be bad."""
        if self.rank or self.folder_made or self.rehearsing:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if fcntl:  # two runs at once would overwrite each other; freed however this one ends
                self.lock = os.open(self.out, os.O_RDONLY)
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stop(f"--out {self.out}: another run is writing there")
        except OSError as e:
            stop(f"--out {self.out} cannot be written: {e.strerror}")
        if not self.saved and any(self.out.glob("checkpoint*.pt")):
            # Forgetting --resume must not cost a run: its files are moved aside.
            old = next(d for n in itertools.count(1) if not (d := self.out / f"old-{n}").exists())
            old.mkdir()
            for file in filter(Path.is_file, list(self.out.iterdir())):
                file.rename(old / file.name)
            self.say(f"the run that was in {self.out} is in {old} now")
        args, self.folder_made = vars(self.args), True
        about = {**args, "torch": torch.__version__, "device_used": str(self.device),
                 "processes": self.world}
        self.write("config.json", lambda f: f.write(json.dumps(about, indent=1).encode()))
        self.write("checkpoint.pt", lambda f: torch.save(
            {"script": self.script, "args": args, "facts": self.facts}, f))

    # -- training ------------------------------------------------------------------------------

    def fit(self, stage, model, loss, data, steps, batch_size, lr, valid=None):
        """Minimise loss by Adam, or continue where the checkpoint says that this stage stopped.

        data, valid: data sets that answer a list of indices with a whole batch, a tuple of CPU
        tensors (torch.utils.data.TensorDataset does). loss(net, *batch) -> (scalar, stats), net
        being the model, wrapped if there are several processes. stats maps names to tensors:
        scalars are averaged for the log; of vectors, counts, it says how many are not zero.
        valid is measured some 20 times; --keep best keeps the weights that were best on it.
        Returns the model in eval mode and frozen: from now on it builds no graph.
        """
        steps = 1 if self.rehearsing else steps
        batch_size = min(batch_size, len(data)) if self.rehearsing else batch_size
        check_batch(len(data), batch_size, f"stage {stage}", "--batch-size or --prior-batch-size")
        self.make_folder()
        s = self.restore(stage, model.to(self.device).train(), loss, steps, lr)
        begun, saved_at, first, every = time.time(), time.time(), s.step, max(1, steps // 200)
        with interrupts() as interrupted:
            for batch in self.loader(data, stage, range(first, steps), batch_size):
                self.train(s, batch)
                self.trained = True
                asked, last = self.agree(bool(interrupted), s.step), s.step == steps
                if last or s.step % every == 0:
                    row = self.make_row(s)
                    if valid is not None and (last or s.step % (10 * every) == 0):
                        row |= self.validate(s, valid, batch_size)
                    self.progress(row, steps, (s.step - first) / (time.time() - begun))
                if last or asked or time.time() - saved_at > 60:
                    self.save(s, batch)
                    saved_at = time.time()
                if asked:
                    self.say(f"stopped at step {s.step} of stage {stage}; continue with:  "
                             f"python {Path(sys.argv[0]).name} --resume --out {self.out}")
                    raise KeyboardInterrupt if self.rehearsing else SystemExit(130)
        if s.best and self.args.keep == "best":
            model.load_state_dict(s.best["model"])
        torch.manual_seed(mix(self.args.seed, stage))  # so starts the next one, after any resume
        return model.eval().requires_grad_(False)

    def restore(self, stage, model, loss, steps, lr):
        """All that fit works on, at the step at which the checkpoint says that it stopped."""
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for module in model.modules():
            if isinstance(module, VectorQuantizer):
                module.reset_moments(optimizer)
        s = SimpleNamespace(stage=stage, model=model, net=model, loss=loss, optimizer=optimizer,
                            steps=steps, lr=lr, step=0, rows=[], sums={}, best=None,
                            bad=torch.full((), -1, device=self.device))
        name, source = f"checkpoint-{stage}.pt", self.args.finetune
        # A forgotten --resume leaves checkpoints of another run; and what was fitted to an earlier
        # stage that has been trained on since (--resume --steps 9000) begins anew.
        if self.saved and not self.trained and self.share(lambda: (self.home / name).exists()):
            saved = self.read(name)
            try:
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
            except Exception as e:
                stop(f"{self.home / name} holds another model for stage {stage}: {reason(e)}")
            s.step, s.rows, s.best = saved["step"], saved["rows"], saved["best"]
            self.seconds_before = max(self.seconds_before, saved["seconds"])
            if self.rank == 0:
                s.sums = {k: x.to(self.device) for k, x in saved["sums"].items()}
        elif source:
            with reading(f"--finetune {source}, stage {stage}"):
                model.load_state_dict(read_run(source, self.script, [stage])[2][0])
        if self.world > 1 and s.step < steps:
            s.net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        self.rows[stage] = s.rows
        return s

    def loader(self, data, stage, steps, batch_size):
        """The batches of these steps, on the device. The joint batch of a step is a function of
        (seed, stage, step) alone, and each process takes its share of it."""
        gpu, share = self.device.type == "cuda", batch_size // self.world
        rank = self.rank if self.world > 1 else 0

        def indices():
            for step in steps:
                generator = torch.Generator().manual_seed(mix(self.args.seed, stage, step))
                index = torch.randint(len(data), (batch_size,), generator=generator)
                yield index[rank * share:(rank + 1) * share]

        batches = torch.utils.data.DataLoader(
            data, batch_size=None, sampler=indices(), num_workers=4 * gpu, pin_memory=gpu,
            worker_init_fn=begin_worker, generator=torch.Generator())
        for batch in batches:
            yield [x.to(self.device, non_blocking=True) for x in batch]

    def train(self, s, batch):
        """One step of Adam; and what the next line of the log will say of it."""
        torch.manual_seed(mix(self.args.seed, s.stage, s.step, self.rank))     # noise in models
        for group in s.optimizer.param_groups:
            group["lr"] = s.lr * schedule(s.step, s.steps, self.args.lr_decay)
        value, stats = self.forward(s.loss, s.net, batch)
        s.optimizer.zero_grad()
        value.backward()
        if self.args.clip_norm:
            nn.utils.clip_grad_norm_(s.model.parameters(), self.args.clip_norm)
        s.optimizer.step()
        s.step += 1
        # No .item() here: it would make a GPU wait for Python at every step.
        bad = (s.bad < 0) & ~value.detach().isfinite()                 # the first such step
        s.bad = torch.where(bad, s.step, s.bad)
        for name, x in {"loss": value, **stats, "steps": torch.ones_like(value)}.items():
            s.sums[name] = s.sums.get(name, 0) + x.detach()

    def forward(self, loss, net, batch):
        with torch.autocast(self.device.type, torch.bfloat16,
                            enabled=self.args.precision == "bf16"):
            return loss(net, *batch)

    def make_row(self, s):
        """A line of the log: what was counted since the last one, over all processes."""
        self.check_finite(s)
        sums, s.sums = s.sums, {}
        if self.world > 1:
            for x in sums.values():
                dist.all_reduce(x)
        steps = sums.pop("steps").item()
        row = {"stage": s.stage, "step": s.step, "seconds": round(self.seconds, 1)}
        row.update({name: (x > 0).sum().item() if x.ndim else x.item() / steps
                    for name, x in sums.items()})
        s.rows.append(row)
        return row

    def check_finite(self, s):
        if s.bad >= 0:
            stop(f"the loss of stage {s.stage} is not finite at step {int(s.bad)}: try a lower "
                 "--lr" + ("; a checkpoint written before is kept, --resume continues from it"
                           if (self.home / f"checkpoint-{s.stage}.pt").exists() else ""))

    @torch.no_grad()
    def validate(self, s, valid, batch_size, most=16):
        """The loss and stats of evenly spread validation examples, the same every time."""
        index, sums = spread(len(valid), most * batch_size), {}
        s.model.eval()
        torch.manual_seed(mix(self.args.seed, s.stage, "validation"))
        for part in index.split(batch_size):
            batch = [x.to(self.device) for x in valid[part]]
            value, stats = self.forward(s.loss, s.model, batch)
            for name, x in {"loss": value, **stats}.items():
                sums[name] = sums.get(name, 0) + x * (1 if x.ndim else len(part) / len(index))
        s.model.train()
        found = {f"valid_{k}": (x > 0).sum().item() if x.ndim else x.item()
                 for k, x in sums.items()}
        if found["valid_loss"] < (s.best["loss"] if s.best else math.inf):
            weights = {k: v.to("cpu", copy=True) for k, v in s.model.state_dict().items()}
            s.best = {"loss": found["valid_loss"], "step": s.step, "model": weights}
        return found

    def agree(self, asked, step):
        """Ctrl-C reaches processes at different steps: they stop together, at a multiple of ten."""
        if self.world == 1 or step % 10:
            return asked and self.world == 1
        flag = torch.tensor(float(asked), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    # -- files ---------------------------------------------------------------------------------

    @property
    def seconds(self):
        """Time spent on this run, before and after a resume."""
        return self.seconds_before + time.time() - self.started

    @torch.no_grad()
    def save(self, s, batch):
        """Write this stage's checkpoint and log.csv; a run killed in here loses neither."""
        if self.rank or self.rehearsing:
            return
        # The last update may have spoilt the weights: save what another look confirms.
        value, _ = self.forward(s.loss, s.model.eval(), batch)
        s.model.train()
        s.bad = torch.where((s.bad < 0) & ~value.isfinite(), s.step, s.bad)
        self.check_finite(s)
        state = {name: getattr(s, name) for name in ("step", "steps", "rows", "sums", "best")}
        self.write(f"checkpoint-{s.stage}.pt", lambda f: torch.save({
            **state, "model": s.model.state_dict(), "optimizer": s.optimizer.state_dict(),
            "seconds": self.seconds}, f))
        rows = [row for rows in self.rows.values() for row in rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        self.write("log.csv", lambda f: f.write(text.getvalue().encode()))

    def read(self, name):
        try:
            return self.share(lambda: read_checkpoint(self.home / name))
        except ValueError as e:
            stop(f"--resume: {e}")

    def share(self, find):
        """find() by the first process, sent to the others; in a rehearsal each is by itself."""
        found = [find() if self.rank == 0 or self.world == 1 else None]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def write(self, name, writer):
        write_file(self.out / name, writer)

    def finish(self, metrics):
        """metrics.json, curves.png and the last words."""
        if self.rank:
            return
        metrics["seconds"] = round(self.seconds, 1)
        # JSON has neither NaN nor infinity.
        text = re.sub(r"(?<=[ \[])-?(NaN|Infinity)(?=[,\n])", "null", json.dumps(metrics, indent=1))
        self.write("metrics.json", lambda f: f.write(text.encode()))
        self.draw_curves()
        for name, value in metrics.items():
            numbers = value if isinstance(value, list) else [value]
            self.say(f"{name:32} " + " ".join(f"{x:.4g}" if isinstance(x, float) else str(x)
                                              for x in numbers))
        self.say(f"pictures and numbers are in {self.out}")

    def draw_curves(self):
        """curves.png: every number of the log against the step, validation beside training."""
        from matplotlib.figure import Figure
        rows = [row for stage in self.rows.values() for row in stage]
        panels = list(dict.fromkeys((row["stage"], name.removeprefix("valid_")) for row in rows
                                    for name in row if name not in ("stage", "step", "seconds")))
        height = -(-len(panels) // 4) or 1
        figure = Figure((12.8, 2.4 * height), layout="constrained")
        for i, (stage, name) in enumerate(panels, 1):
            axis = figure.add_subplot(height, 4, i, title=f"{stage}: {name}", xlabel="step")
            for key, label in ((name, "training"), (f"valid_{name}", "validation")):
                points = [(r["step"], r[key]) for r in rows if r["stage"] == stage and key in r]
                if points:
                    axis.plot(*zip(*points), linewidth=1, label=label)
            axis.legend(fontsize=7)
        self.write("curves.png", lambda f: figure.savefig(f, format="png", dpi=100))

    def picture(self, name, images, title="", columns=(), rows=()):
        """name.png: a grid of images (rows, columns, C, H, W) uint8, with the names of both."""
        from matplotlib.figure import Figure
        if self.rank:
            return
        *_, H, W = images.shape
        sheet = images.cpu().expand(-1, -1, 3, -1, -1).permute(0, 3, 1, 4, 2)
        sheet = F.pad(sheet, (0, 0, 1, 1, 0, 0, 1, 1), value=255)
        sheet = sheet.flatten(2, 3).flatten(0, 1)      # (rows * (H + 2), columns * (W + 2), 3)
        height, width = sheet.shape[:2]
        inch = max(width / 11, height / 14)            # pixels per inch: at most 11 x 14 inches
        figure = Figure((max(3, width / inch), max(1, height / inch) + 0.6), layout="constrained")
        axis = figure.add_subplot(title=plain(title, 200))
        axis.imshow(sheet.numpy(), interpolation="nearest")
        axis.set_xticks([(k + 0.5) * (W + 2) for k in range(len(columns))], map(plain, columns))
        axis.set_yticks([(k + 0.5) * (H + 2) for k in range(len(rows))], map(plain, rows))
        axis.tick_params(length=0, labelsize=8)
        self.write(f"{name}.png", lambda f: figure.savefig(
            f, format="png", dpi=120, bbox_inches="tight"))            # no white margins

    # -- output --------------------------------------------------------------------------------

    def say(self, text, end="\n"):
        if not (self.rank or self.rehearsing):
            say(text, end)

    def progress(self, row, steps, speed):
        left = int((steps - row["step"]) / max(speed, 1e-9))
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in row.items()
                            if k not in ("stage", "step", "seconds"))
        line = (f"{row['stage']} {row['step']}/{steps}  {speed:.2f} steps/s  "
                f"{left // 60}:{left % 60:02d} left  {numbers}")
        if sys.stdout and sys.stdout.isatty():  # one line, rewritten in place
            self.say(f"\r\x1b[K{line}", end="\n" if row["step"] == steps else "")
        elif row["step"] == steps or row["step"] % (10 * max(1, steps // 200)) == 0:
            self.say(line)


def say(text, end="\n"):
    try:
        print(text, end=end, flush=True)
    except (OSError, ValueError):                      # `| head -1`: training continues in silence
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def write_file(file, writer):
    """writer(open file): it is written whole, or what is there stays."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            writer(f)
        os.replace(temporary, file)                    # atomic: the old file or the new one
    except (OSError, RuntimeError) as e:               # torch.save: RuntimeError on a full disk
        temporary.unlink(missing_ok=True)
        stop(f"{file} cannot be written: {reason(e)}; what was saved before is kept")


def read_checkpoint(file):
    """A checkpoint of this project; ValueError with one line if it is anything else."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        kinds = ({"script": str, "args": dict, "facts": dict} if file.name == "checkpoint.pt" else
                 {"step": int, "steps": int, "rows": list, "sums": dict, "model": dict,
                  "optimizer": dict, "best": (dict, type(None)), "seconds": float})
        if type(state) is dict and all(isinstance(state[k], kinds[k]) for k in kinds):
            return state
    except OSError as e:
        raise ValueError(f"there is no {file} that can be read: {e.strerror}") from None
    except Exception:  # what a torn file makes torch and pickle raise has no end
        pass
    raise ValueError(f"{file} is corrupt, or not a checkpoint of this project")


def read_run(folder, script, stages):
    """A finished run -> its args, the facts of its data, and the weights of each of the stages."""
    folder = Path(folder)
    common = read_checkpoint(folder / "checkpoint.pt")
    if common["script"] != script:
        raise ValueError(f"{folder} holds a run of train_{common['script']}.py, not of "
                         f"train_{script}.py")
    weights, args = [], argparse.Namespace(**common["args"])
    for stage in stages:
        state = read_checkpoint(folder / f"checkpoint-{stage}.pt")
        if state["step"] < state["steps"]:
            raise ValueError(f"{folder}: stage {stage} is at step {state['step']} of "
                             f"{state['steps']}; --resume finishes it")
        best = state["best"] if common["args"].get("keep") == "best" else None
        weights.append(best["model"] if best else state["model"])
    return args, common["facts"], weights


def load_models(folder, script, device, make):
    """The networks make(args, facts) of a finished run, with its weights, in eval mode; and both.
    ValueError with one line if the folder holds no such run."""
    args, facts, weights = read_run(folder, script, ["vqvae", "prior"])
    with reading(folder):                              # a checkpoint of another version, say
        models = make(args, facts)
        for net, state in zip(models, weights):
            net.load_state_dict(state)
            net.to(pick_device(device)).eval().requires_grad_(False)
    return models, args, facts


def find_files(root, endings):
    """(path below root, bytes, time of change) of each file with one of these endings, sorted by
    path, hidden ones left out. Links to folders are followed; an unreadable folder is an error."""
    def fail(error):
        raise error
    files = []
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        above = os.path.realpath(folder) + os.sep      # a link back up would never end
        folders[:] = [name for name in folders if not name.startswith(".") and not above.startswith(
            os.path.realpath(os.path.join(folder, name)) + os.sep)]
        for name in names:
            if name.lower().endswith(endings) and not name.startswith("."):
                file = os.path.join(folder, name)
                about = os.stat(file)
                files.append((os.path.relpath(file, root), about.st_size, about.st_mtime_ns))
    return sorted(files)


def prepare(run, source, key, read, files, item_shape):
    """Decode files once, in parallel, into one memory-mapped file that all processes of a machine
    share and that later runs find again.

    read(file) returns a uint8 array (n, *item_shape), or raises ValueError. source: what is
    decoded, in words. key: all that the result depends on (paths, sizes, times of files; flags).
    Returns all items joined, (sum of n, *item_shape) uint8, and the list of the n.
    """
    words = (s.encode("utf-8", "surrogateescape") for s in (source, f"{key} {item_shape}"))
    name = "-".join(hashlib.sha256(word).hexdigest()[:12] for word in words)
    file = run.home.parent / "cache" / f"{name}.bin"
    if run.local_rank == 0 and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as f:
            lengths = json.dumps(decode(run, source, read, files, f)).encode()
            f.write(lengths + b"%16d" % len(lengths))  # and its length, in 16 characters
        for stale in file.parent.glob(f"{name.split('-')[0]}-*"):      # other files, other flags
            if stale.suffix == ".bin" or time.time() - stale.stat().st_mtime > 3600:   # or torn
                stale.unlink()
        os.replace(temporary, file)
    while not file.exists():                           # however long the first process takes
        time.sleep(0.1)
    with open(file, "rb") as f:
        f.seek(-16, os.SEEK_END)
        f.seek(-16 - int(f.read()), os.SEEK_END)
        lengths = json.loads(f.read()[:-16])
    x = torch.from_file(str(file), False, sum(lengths) * math.prod(item_shape), dtype=torch.uint8)
    return x.view(-1, *item_shape), lengths


def decode(run, source, read, files, out):
    """Write files one after the other, decoded by all cores; returns how long each one is."""
    lengths, said = [], time.time()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(min(cores, len(files)), initializer=begin_worker) as pool:
        for x in pool.map(read, files, chunksize=16):
            out.write(x.tobytes())
            lengths.append(len(x))
            if time.time() - said > 5:
                said = time.time()
                run.say(f"{source}: {100 * len(lengths) // len(files)} % decoded")
    return lengths


def begin_worker(number=0):
    """Ctrl-C reaches worker processes too, but the main process still wants its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)                           # after a fork torch would wait for threads


def in_batches(function, device, size, *tensors):
    """torch.cat of function over CPU tensors, `size` rows at a time on the device."""
    return torch.cat([function(*(x.to(device) for x in part)).cpu()
                      for part in zip(*(x.split(size) for x in tensors))])


def smallest_int(num_codes):
    """The dtype to keep codes in; they are int64 in use."""
    return next(t for t in (torch.uint8, torch.int16, torch.int32)
                if num_codes - 1 <= torch.iinfo(t).max)


def spread(n, count):
    """At most `count` indices, evenly spread from 0 to n - 1. (Float32 rounds those above 2^24.)"""
    return torch.linspace(0, n - 1, min(n, count), dtype=torch.float64).long()


def digest(*tensors):
    """Checksums of a thousand evenly spread examples: is this the data of the checkpoint?"""
    return [zlib.crc32(x[spread(len(x), 1000)].numpy().tobytes(), len(x)) for x in tensors]


def make_quantizer(args, num_codebooks=1):
    Quantizer = {"loss": VectorQuantizer, "ema": VectorQuantizerEMA}[args.codebook]
    return Quantizer(args.num_codes, args.code_dim, args.beta, num_codebooks=num_codebooks)


def check_batch(examples, batch_size, what, flag):
    if examples < batch_size:
        stop(f"{what}: {examples} training examples are fewer than a batch of {batch_size}, {flag}")


def plain(text, most=40):
    """Any name, so that matplotlib can draw it: no mathematics, no odd bytes, not too long."""
    text = str(text).encode("utf-8", "backslashreplace").decode()
    return " ".join(text.split())[:most].replace("$", r"\$")


def safe_name(text):
    """Any name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", str(text).encode("ascii", "backslashreplace").decode())[:99]


@contextmanager
def interrupts():
    """A list that Ctrl-C is added to, for the end of the step; a second one stops at once."""
    def ask(number, frame):
        asked.append(number)
        signal.signal(number, old[number])

    asked = []
    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def pick_device(name, local_rank=0):
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(n for n in has if has[n]) if name == "auto" else name
    if not has[name]:
        stop(f"--device {name}: torch {torch.__version__} finds none on this machine")
    if name == "cuda":
        torch.cuda.set_device(local_rank)
    return torch.device(name, local_rank if name == "cuda" else None)


def mix(*parts):
    """A seed for torch from (seed, stage, step, ...), unlike for unlike parts."""
    return random.Random(repr(parts)).getrandbits(32)


def schedule(step, steps, decay):
    """Factor on the learning rate: linear warm-up over 100 steps (a quarter of a short run), then
    1, then linear decay to zero over the last part, `decay`. Without warm-up Adam's first steps
    carry the encoder's outputs away from a codebook just initialised with them, and codes die."""
    up = (step + 1) / min(100, 1 + steps // 4)
    down = (steps - step) / (decay * steps) if decay > 0 else 1.0
    return min(1.0, up, down)
