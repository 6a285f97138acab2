"""Autoregressive priors over the codes of a VQ-VAE (sec. 3.3), each with a cached sampler.

    1. Drawing a code
    2. PixelCNN   for images: gated, after the paper's [38], van den Oord et al. 2016,
                  "Conditional Image Generation with PixelCNN Decoders"

p(z) = prod_i p(z_i | z_1 .. z_(i-1)), for images in raster order: left to right, top to bottom.
Training computes all factors at once: padding keeps each output from seeing its own code and the
later ones. Sampling must go code by code. The naive samplers run the whole network for every
code; they are the explanation, and the oracle that the cached ones are tested against. The
cached samplers compute every activation once.

Shapes: codes (B, H, W) or (B, T) int64; K codes; C channels. Needs torch and nothing else.

    >>> prior = PixelCNN(num_codes=512, channels=64, num_layers=15)
    >>> prior.sample(4, 8, 8).shape
    torch.Size([4, 8, 8])
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------
# 1. Drawing a code
# ---------------------------------------------------------------------------------------------


def gumbel(*shape, generator=None, device=None):
    """Standard Gumbel noise, the random numbers behind `draw`."""
    noise = torch.empty(shape, device=device).exponential_(generator=generator)
    return -noise.clamp_(min=1e-30).log_()


def draw(logits, noise, temperature):
    """Sample from softmax(logits / temperature), (B, K) -> (B,), by the Gumbel-max trick.

    argmax(logits / temperature + noise) has exactly that distribution. With the noise handed in,
    a cached sampler and its naive oracle make the same choices; at temperature 0 it is the
    argmax.
    """
    return (logits + temperature * noise).argmax(1)


def gate(x):
    """The gated activation: channels (a, b) -> tanh(a) * sigmoid(b)."""
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()


# ---------------------------------------------------------------------------------------------
# 2. PixelCNN
# ---------------------------------------------------------------------------------------------


class PixelCNNLayer(nn.Module):
    """A gated layer: the vertical stack v looks at the rows above, the horizontal h at this row.

    One masked convolution would have a blind spot: however deep the network, codes above and to
    the right stay unseen. Two stacks see them all. v and h enter shifted (see PixelCNN.forward),
    so here a position may look at itself.

    A kernel of 2r+1 lets v see r rows further up and r columns to both sides, h r columns back.
    """

    def __init__(self, channels, kernel, num_classes, cond_channels):
        super().__init__()
        C, self.reach = channels, kernel // 2
        self.vertical = nn.Conv2d(C, 2 * C, (self.reach + 1, kernel))
        self.horizontal = nn.Conv2d(C, 2 * C, (1, self.reach + 1))
        self.link = nn.Conv2d(2 * C, 2 * C, 1, bias=False)  # what h hears of v
        self.out = nn.Conv2d(C, C, 1, bias=False)
        self.label = nn.Embedding(num_classes, 4 * C) if num_classes else None
        self.cond = nn.Conv2d(cond_channels, 4 * C, 1, bias=False) if cond_channels else None

    def bias(self, labels, cond):
        """What class and conditioning map add inside the two gates: 2 x (B, 2C, H|1, W|1), or 0."""
        total = torch.zeros((), device=self.out.weight.device)
        if self.label is not None:
            total = total + self.label(labels)[:, :, None, None]
        if self.cond is not None:
            total = total + self.cond(cond)
        return total.chunk(2, 1) if total.ndim else (total, total)

    def forward(self, v, h, bias):
        """v, h (B, C, H, W) -> v, h (B, C, H, W)."""
        r = self.reach
        x_v = self.vertical(F.pad(v, (r, r, r, 0)))    # (B, 2C, H, W): sees rows i-r .. i
        x_h = self.horizontal(F.pad(h, (r, 0, 0, 0)))  # (B, 2C, H, W): sees columns j-r .. j
        h = h + self.out(gate(x_h + self.link(x_v) + bias[1]))
        return v + gate(x_v + bias[0]), h


class SliceHead(nn.Module):
    """From the horizontal stack to logits, for G codes at every position, one after the other.

    The stacks order positions. Within one, slice g sees the slices before it: their embeddings
    are added to its hidden layer, as green sees red in a PixelCNN on colours. G = 1: a plain MLP.
    """

    def __init__(self, channels, num_codes, num_codebooks):
        super().__init__()
        hidden, self.num_codes = 4 * channels, num_codes
        self.enter = nn.Conv2d(channels, hidden, 1)
        self.before = nn.Embedding((num_codebooks - 1) * num_codes, hidden)
        bound = hidden ** -0.5
        self.weight = nn.Parameter(torch.empty(num_codebooks, hidden, num_codes)
                                   .uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_codebooks, num_codes))

    def forward(self, h, codes):
        """h (B, C, H, W), codes (B, G, H, W) -> logits (B, K, G, H, W)."""
        x = self.enter(h.relu()).movedim(1, -1).unsqueeze(1)           # (B, 1, H, W, hidden)
        first = torch.arange(codes.shape[1] - 1, device=codes.device).view(-1, 1, 1)
        e = self.before(codes[:, :-1] + first * self.num_codes)        # (B, G-1, H, W, hidden)
        x = torch.cat([x, x + e.cumsum(1)], 1).relu()                  # (B, G, H, W, hidden)
        return torch.einsum("bghwa,gak->bkghw", x, self.weight) + self.bias.t()[:, :, None, None]

    def step(self, h, noise, temperature):
        """One position: h (B, C), noise (G, B, K) -> G codes (B, G)."""
        x, codes = F.linear(h.relu(), self.enter.weight.flatten(1), self.enter.bias), []
        for g, (weight, bias) in enumerate(zip(self.weight, self.bias)):
            if g:
                x = x + self.before(codes[-1] + (g - 1) * self.num_codes)
            codes.append(draw(torch.addmm(bias, x.relu(), weight), noise[g], temperature))
        return torch.stack(codes, 1)


class PixelCNN(nn.Module):
    """p(codes) for a field of codes (B, H, W), given a class and / or a conditioning map.

    Args:
        num_codes: K. channels: C, width of both stacks. num_layers: one of kernel 7, the rest of
            kernel 5 (two rows a layer). A field of (H, W) is seen whole if
            2 * num_layers + 1 >= max(H - 2, W - 1): see `layers_for`.
        num_classes: > 0 for p(codes | label). cond_channels: > 0 for p(codes | map).
        num_codebooks: G > 1 for codes (B, G, H, W), the slices of a position in their order;
            logits are then (B, K, G, H, W).

    The paper says "capacity similar to the PixelCNN paper" and no more.
    """

    def __init__(self, num_codes, channels=64, num_layers=15, num_classes=0, cond_channels=0,
                 num_codebooks=1):
        super().__init__()
        self.num_codes, self.channels, self.num_codebooks = num_codes, channels, num_codebooks
        self.num_classes, self.cond_channels = num_classes, cond_channels
        self.embed = nn.Embedding(num_codebooks * num_codes, channels)
        self.layers = nn.ModuleList(
            PixelCNNLayer(channels, 5 if i else 7, num_classes, cond_channels)
            for i in range(num_layers))
        self.head = SliceHead(channels, num_codes, num_codebooks)

    @staticmethod
    def layers_for(height, width):
        """The least num_layers with which every code sees all codes before it."""
        return max(1, -(-(max(height - 2, width - 1) - 1) // 2))

    def forward(self, codes, labels=None, cond=None):
        """codes (B, H, W), labels (B,), cond (B, cond_channels, H, W) or (B, cond_channels, 1, 1)
        -> logits (B, K, H, W). logits[:, :, i, j] see the codes before (i, j), no others."""
        self.check(labels, cond)
        codes = codes.unsqueeze(1) if self.num_codebooks == 1 else codes           # (B, G, H, W)
        x = self.embed_all(codes.movedim(1, -1)).permute(0, 3, 1, 2)   # (B, C, H, W)
        v = F.pad(x, (0, 0, 1, -1))                    # one row down: row i holds codes of row i-1
        h = F.pad(x, (1, -1, 0, 0))                    # one column right: (i, j) holds (i, j-1)
        for layer in self.layers:
            v, h = layer(v, h, layer.bias(labels, cond))
        logits = self.head(h, codes)
        return logits.squeeze(2) if self.num_codebooks == 1 else logits

    def embed_all(self, codes):
        """Codes of G slices (..., G) -> the sum of their embeddings (..., C)."""
        first = torch.arange(self.num_codebooks, device=codes.device) * self.num_codes
        return self.embed(codes + first).sum(-2)

    def check(self, labels, cond):
        for name, given, wanted in (("labels", labels, self.num_classes),
                                    ("cond", cond, self.cond_channels)):
            if (given is not None) != (wanted > 0):
                raise ValueError(f"this PixelCNN was made {'with' if wanted else 'without'} "
                                 f"{name}, and is called {'without' if wanted else 'with'}")

    @torch.no_grad()
    def sample_naive(self, batch, height, width, labels=None, cond=None, temperature=1.0,
                     generator=None):
        """Ancestral sampling as one would write it first: the whole network for every code."""
        G, K, device = self.num_codebooks, self.num_codes, self.embed.weight.device
        codes = torch.zeros(batch, G, height, width, dtype=torch.long, device=device)
        for i in range(height):
            noise = gumbel(width, G, batch, K, generator=generator, device=device)
            for j in range(width):
                for g in range(G):
                    logits = self(codes.squeeze(1) if G == 1 else codes, labels, cond)
                    logits = logits.view(batch, K, G, height, width)[:, :, g, i, j]
                    codes[:, g, i, j] = draw(logits, noise[j, g], temperature)
        return codes.squeeze(1) if G == 1 else codes

    @torch.no_grad()
    def sample(self, batch, height, width, labels=None, cond=None, temperature=1.0,
               generator=None):
        """The same codes from the same generator, for about the work of one forward pass.

        Row by row for the vertical stack, which needs nothing but finished rows; code by code
        for the horizontal one, which keeps what it has computed of the row in `line`.
        Returns (batch, height, width) int64, or (batch, G, height, width).
        """
        self.check(labels, cond)
        B, C, G, W = batch, self.channels, self.num_codebooks, width
        device = self.embed.weight.device
        codes = torch.zeros(B, height, W, G, dtype=torch.long, device=device)
        weights = [self.step_weights(layer) for layer in self.layers]
        # Inputs of each layer's vertical convolution, all rows, with its zero padding.
        above = [torch.zeros(B, C, height + layer.reach, W + 2 * layer.reach, device=device,
                             dtype=self.embed.weight.dtype) for layer in self.layers]
        v = above[0].new_zeros(B, C, 1, W)             # row 0: nothing is above it
        for i in range(height):
            row_cond = cond if cond is None or cond.shape[2] == 1 else cond[:, :, i:i + 1]
            biases = self.vertical_row(i, v, above, labels, row_cond)  # L x (W, B, 2C)
            noise = gumbel(W, G, B, self.num_codes, generator=generator, device=device)
            # Inputs of each layer's horizontal convolution in this row: (B, (W + reach) * C), so
            # that the window of a position is a slice of one axis.
            line = [v.new_zeros(B, (W + layer.reach) * C) for layer in self.layers]
            h = v.new_zeros(B, C)                      # column 0: nothing is to the left
            for j in range(W):
                for (w, w_out, r), past, bias in zip(weights, line, biases):
                    window = past[:, j * C:(j + r + 1) * C]            # columns j-r .. j
                    window[:, r * C:] = h
                    x = torch.addmm(bias[j], window, w).tanh_()
                    h = torch.addmm(h, torch.addcmul(x[:, :C], x[:, :C], x[:, C:]), w_out)
                codes[:, i, j] = self.head.step(h, noise[j], temperature)
                h = self.embed_all(codes[:, i, j])     # what the next position sees on its left
            v = self.embed_all(codes[:, i]).transpose(1, 2).unsqueeze(2)   # (B, C, 1, W)
        codes = codes.movedim(-1, 1)
        return codes.squeeze(1) if G == 1 else codes

    def vertical_row(self, i, v, above, labels, cond):
        """Run the vertical stack for row i: what it adds to each layer's horizontal gate."""
        biases = []
        for layer, rows in zip(self.layers, above):
            r = layer.reach
            rows[:, :, i + r, r:rows.shape[3] - r] = v.squeeze(2)
            x = layer.vertical(rows[:, :, i:i + r + 1])                # (B, 2C, 1, W)
            bias_v, bias_h = layer.bias(labels, cond)
            add = layer.link(x) + bias_h + layer.horizontal.bias[:, None, None]
            add[:, self.channels:] *= 0.5                              # see step_weights
            biases.append(add.squeeze(2).permute(2, 0, 1).contiguous())
            v = v + gate(x + bias_v)
        return biases

    def step_weights(self, layer):
        """A layer's horizontal weights as matrices, with the sigmoid folded into the tanh.

        sigmoid(b) = (1 + tanh(b/2)) / 2, so tanh(a) sigmoid(b) = (t + t * tanh(b/2)) / 2 with
        t = tanh(a): halve what makes b, halve the matrix after it, and one tanh does both.
        """
        w = layer.horizontal.weight.squeeze(2).permute(2, 1, 0).flatten(0, 1).clone()
        w[:, self.channels:] *= 0.5                                    # (taps * C, 2C)
        return w, 0.5 * layer.out.weight.flatten(1).t(), layer.reach   # (C, C)
