"""Autoregressive priors over the codes of a VQ-VAE (sec. 3.3), each with a cached sampler.

    1. Drawing a code
    2. PixelCNN   for images: gated, after the paper's [38], van den Oord et al. 2016,
                  "Conditional Image Generation with PixelCNN Decoders"
    4. VideoPrior for clips of code maps, given actions: a U-Net over the last frames conditions
                  a PixelCNN over the next one

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


# ---------------------------------------------------------------------------------------------
# 4. VideoPrior (sec. 4.4)
# ---------------------------------------------------------------------------------------------


class ActionBlock(nn.Module):
    """Residual block of two 3x3 convolutions; the actions scale and shift its hidden channels.

    The scale is what lets an action choose: a left turn opens the channels that move the
    picture to the right, and closes those that move it to the left. Without the normalisation
    the network is very slow to discover that copying pays.
    """

    def __init__(self, channels, action_channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(1, channels)
        self.norm_hidden = nn.GroupNorm(1, channels, affine=False)     # the actions' scale is one
        self.film = nn.Linear(action_channels, 2 * channels)

    def forward(self, x, a):
        """x (B, C, H, W), a (B, action_channels) -> (B, C, H, W)."""
        scale, shift = self.film(a)[:, :, None, None].chunk(2, 1)      # (B, C, 1, 1)
        h = self.norm_hidden(self.first(F.relu(self.norm(x))))
        return x + self.second(F.relu(torch.addcmul(h + shift, h, scale)))


class VideoPrior(nn.Module):
    """p(z_t | z_<t, a_<t) for clips of code maps z_t (H, W): sec. 4.4, p(z_1, .., z_T).

    A U-Net looks at the last `context` maps and actions and makes a feature map of what the next
    frame will show; a gated PixelCNN, conditioned on it, spells that frame out code by code. A
    turn moves the picture by several columns: at a quarter of the resolution they are one or
    two, and five 3x3 convolutions there reach 20 columns. The skips keep the detail.

    Args:
        num_codes: K. num_actions: how many actions there are, 0 for a model without actions.
        channels: of U-Net and PixelCNN. num_layers: of the PixelCNN; with few of them a code
            sees only its neighbours in its own frame, and all of the frames before.
        context: how many frames back the model looks. More are allowed in, and not seen.

    Frames before the first hold a code of their own, "no frame": p(z_1) is learnt with the rest,
    and a clip may start from nothing. Action -1, or no actions at all, stands for "not known".
    """

    def __init__(self, num_codes, num_actions=0, channels=64, num_layers=4, context=4):
        super().__init__()
        self.num_codes, self.num_actions, self.context = num_codes, num_actions, context
        C, A = channels, max(1, channels // 4)
        self.embed = nn.Embedding(num_codes + 1, C // 2)               # row K: no frame
        self.embed_action = nn.Embedding(num_actions + 1, A)           # row 0: not known
        self.enter = nn.Conv2d(context * (C // 2) + 2, C, 1)           # + row and column
        widths = (C, 2 * C, 2 * C)                     # at 1, 1/2 and 1/4 of the resolution
        self.before = nn.ModuleList(ActionBlock(w, context * A) for w in widths)
        self.after = nn.ModuleList(ActionBlock(w, context * A) for w in widths)
        self.down = nn.ModuleList(nn.Conv2d(w, v, 3, 2, 1) for w, v in zip(widths, widths[1:]))
        self.up = nn.ModuleList(nn.Conv2d(v, w, 1) for w, v in zip(widths, widths[1:]))
        self.norm = nn.GroupNorm(1, C)
        self.pixelcnn = PixelCNN(num_codes, C, num_layers, cond_channels=C)
        # torch's own start loses two thirds of the variance in each convolution: of what the
        # U-Net sees nothing would get through, and the prior would be slow to learn to copy.
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")

    def forward(self, codes, actions=None):
        """codes (B, T, H, W), actions (B, T-1) or None -> logits (B, K, T, H, W).

        logits[:, :, t, i, j] see the frames t - context .. t - 1, the actions between them, the
        action a_(t-1) that leads to frame t, and the codes of frame t before (i, j)."""
        B, T = codes.shape[:2]
        actions = self.check(codes, actions, T - 1)
        windows, acts = self.windows(codes, actions, T)
        cond = self.look_back(windows.flatten(0, 1), acts.flatten(0, 1))
        logits = self.pixelcnn(codes.flatten(0, 1), cond=cond)         # (B*T, K, H, W)
        return logits.unflatten(0, (B, T)).transpose(1, 2)

    def windows(self, codes, actions, T):
        """What each of frames 0 .. T-1 looks back on: (B, T, H, W, context), (B, T, context)."""
        n = self.context
        codes = F.pad(codes, (0, 0, 0, 0, n, 0), value=self.num_codes)
        actions = F.pad(actions, (n, 0), value=-1)
        return codes.unfold(1, n, 1)[:, :T], actions.unfold(1, n, 1)[:, :T]

    def look_back(self, codes, actions):
        """The U-Net: codes (B, H, W, context), actions (B, context) -> (B, C, H, W)."""
        B, H, W, _ = codes.shape
        x = self.embed(codes).flatten(3).permute(0, 3, 1, 2)           # (B, context * C/2, H, W)
        rows = torch.linspace(-1, 1, H, device=x.device, dtype=x.dtype).view(1, 1, H, 1)
        cols = torch.linspace(-1, 1, W, device=x.device, dtype=x.dtype).view(1, 1, 1, W)
        x = self.enter(torch.cat([x, rows.expand(B, 1, H, W), cols.expand(B, 1, H, W)], 1))
        a = self.embed_action(actions + 1).flatten(1)                  # (B, context * A)
        skips = []
        for i, block in enumerate(self.before):
            x = block(self.down[i - 1](x) if i else x, a)
            skips.append(x)
        for i in reversed(range(len(self.after))):
            if i < len(self.after) - 1:
                x = F.interpolate(self.up[i](x), skips[i].shape[2:]) + skips[i]
            x = self.after[i](x, a)
        return self.norm(x)

    def check(self, codes, actions, length):
        """The actions as (B, length), -1 for what is not known."""
        if codes.dim() != 4:
            raise ValueError(f"codes must be (B, T, H, W), got {tuple(codes.shape)}")
        if actions is None:
            return codes.new_full((len(codes), length), -1)
        if not self.num_actions:
            raise ValueError("this VideoPrior was made without actions, and is called with them")
        if actions.shape != (len(codes), length):
            raise ValueError(f"actions must be ({len(codes)}, {length}), one between any two "
                             f"frames; got {tuple(actions.shape)}")
        return actions

    @torch.no_grad()
    def sample_naive(self, codes, actions=None, frames=1, temperature=1.0, generator=None):
        """The plain sampler: the whole network, over the whole clip, for every code."""
        B, T, H, W = codes.shape
        clip = F.pad(codes, (0, 0, 0, 0, 0, frames))                   # (B, T + frames, H, W)
        for t in range(T, T + frames):
            for i in range(H):
                noise = gumbel(W, B, self.num_codes, generator=generator, device=codes.device)
                for j in range(W):
                    logits = self(clip, actions)[:, :, t, i, j]
                    clip[:, t, i, j] = draw(logits, noise[j], temperature)
        return clip[:, T:]

    @torch.no_grad()
    def sample(self, codes, actions=None, frames=1, temperature=1.0, generator=None):
        """Go on from codes (B, T, H, W), T >= 0, by `frames` code maps: (B, frames, H, W) int64.

        actions (B, T + frames - 1): those between the given frames, then those to imagine. The
        U-Net runs once a frame, the PixelCNN samples from its caches. No pixel is needed.
        """
        (B, T, H, W), n = codes.shape, self.context
        actions = self.check(codes, actions, T + frames - 1)
        if actions.numel() and not -1 <= actions.min() <= actions.max() < self.num_actions:
            raise ValueError(f"actions must be 0 .. {self.num_actions - 1}, or -1 for not known")
        clip = F.pad(codes, (0, 0, 0, 0, n, 0), value=self.num_codes)  # as in `windows`
        actions = F.pad(actions, (n, 0), value=-1)
        for t in range(T, T + frames):
            cond = self.look_back(clip[:, t:t + n].permute(0, 2, 3, 1), actions[:, t:t + n])
            z = self.pixelcnn.sample(B, H, W, cond=cond, temperature=temperature,
                                     generator=generator)
            clip = torch.cat([clip, z.unsqueeze(1)], 1)
        return clip[:, n + T:]
