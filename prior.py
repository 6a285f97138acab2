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
        return gate(x_v + bias[0]), h


class PixelCNN(nn.Module):
    """p(codes) for a field of codes (B, H, W), given a class and / or a conditioning map.

    Args:
        num_codes: K. channels: C, width of both stacks. num_layers: one of kernel 7, the rest of
            kernel 5 (two rows a layer). A field of (H, W) is seen whole if
            2 * num_layers + 1 >= max(H - 2, W - 1): see `layers_for`.
        num_classes: > 0 for p(codes | label). cond_channels: > 0 for p(codes | map).

    The paper says "capacity similar to the PixelCNN paper" and no more.
    """

    def __init__(self, num_codes, channels=64, num_layers=15, num_classes=0, cond_channels=0):
        super().__init__()
        self.num_codes, self.channels = num_codes, channels
        self.num_classes, self.cond_channels = num_classes, cond_channels
        self.embed = nn.Embedding(num_codes, channels)
        self.layers = nn.ModuleList(
            PixelCNNLayer(channels, 5 if i else 7, num_classes, cond_channels)
            for i in range(num_layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, 4 * channels, 1), nn.ReLU(),
                                  nn.Conv2d(4 * channels, num_codes, 1))

    @staticmethod
    def layers_for(height, width):
        """The least num_layers with which every code sees all codes before it."""
        return max(1, -(-(max(height - 2, width - 1) - 1) // 2))

    def forward(self, codes, labels=None, cond=None):
        """codes (B, H, W), labels (B,), cond (B, cond_channels, H, W) or (B, cond_channels, 1, 1)
        -> logits (B, K, H, W). logits[:, :, i, j] see the codes before (i, j), no others."""
        self.check(labels, cond)
        x = self.embed(codes).permute(0, 3, 1, 2)      # (B, C, H, W)
        v = F.pad(x, (0, 0, 1, -1))                    # one row down: row i holds codes of row i-1
        h = F.pad(x, (1, -1, 0, 0))                    # one column right: (i, j) holds (i, j-1)
        for layer in self.layers:
            v, h = layer(v, h, layer.bias(labels, cond))
        return self.head(h)

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
        codes = torch.zeros(batch, height, width, dtype=torch.long, device=self.embed.weight.device)
        for i in range(height):
            noise = gumbel(width, batch, self.num_codes, generator=generator, device=codes.device)
            for j in range(width):
                logits = self(codes, labels, cond)[:, :, i, j]
                codes[:, i, j] = draw(logits, noise[j], temperature)
        return codes

    @torch.no_grad()
    def sample(self, batch, height, width, labels=None, cond=None, temperature=1.0,
               generator=None):
        """The same codes from the same generator, for about the work of one forward pass.

        Row by row for the vertical stack, which needs nothing but finished rows; code by code
        for the horizontal one, which keeps what it has computed of the row in `line`.
        Returns (batch, height, width) int64.
        """
        self.check(labels, cond)
        B, C, W, device = batch, self.channels, width, self.embed.weight.device
        codes = torch.zeros(B, height, W, dtype=torch.long, device=device)
        weights = [self.step_weights(layer) for layer in self.layers]
        enter, logit = self.head[1], self.head[3]
        # Inputs of each layer's vertical convolution, all rows, with its zero padding.
        above = [torch.zeros(B, C, height + layer.reach, W + 2 * layer.reach, device=device,
                             dtype=enter.weight.dtype) for layer in self.layers]
        v = above[0].new_zeros(B, C, 1, W)             # row 0: nothing is above it
        for i in range(height):
            row_cond = cond if cond is None or cond.shape[2] == 1 else cond[:, :, i:i + 1]
            biases = self.vertical_row(i, v, above, labels, row_cond)  # L x (W, B, 2C)
            noise = gumbel(W, B, self.num_codes, generator=generator, device=device)
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
                x = F.linear(h.relu(), enter.weight.flatten(1), enter.bias).relu_()
                x = F.linear(x, logit.weight.flatten(1), logit.bias)
                codes[:, i, j] = draw(x, noise[j], temperature)
                h = self.embed(codes[:, i, j])         # what the next position sees on its left
            v = self.embed(codes[:, i]).transpose(1, 2).unsqueeze(2)   # (B, C, 1, W)
        return codes

    def vertical_row(self, i, v, above, labels, cond):
        """Run the vertical stack for row i; returns what it adds to each layer's horizontal gate."""
        biases = []
        for layer, rows in zip(self.layers, above):
            r = layer.reach
            rows[:, :, i + r, r:rows.shape[3] - r] = v.squeeze(2)
            x = layer.vertical(rows[:, :, i:i + r + 1])                # (B, 2C, 1, W)
            bias_v, bias_h = layer.bias(labels, cond)
            add = layer.link(x) + bias_h + layer.horizontal.bias[:, None, None]
            add[:, self.channels:] *= 0.5                              # see step_weights
            biases.append(add.squeeze(2).permute(2, 0, 1).contiguous())
            v = gate(x + bias_v)
        return biases

    def step_weights(self, layer):
        """A layer's horizontal weights as matrices, with the sigmoid folded into the tanh.

        sigmoid(b) = (1 + tanh(b/2)) / 2, so tanh(a) sigmoid(b) = (t + t * tanh(b/2)) / 2 with
        t = tanh(a): halve what makes b, halve the matrix after it, and one tanh does both.
        """
        w = layer.horizontal.weight.squeeze(2).permute(2, 1, 0).flatten(0, 1).clone()
        w[:, self.channels:] *= 0.5                                    # (taps * C, 2C)
        return w, 0.5 * layer.out.weight.flatten(1).t(), layer.reach   # (C, C)
