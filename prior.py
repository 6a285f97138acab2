"""Autoregressive priors over the codes of a VQ-VAE (sec. 3.3), each with a cached sampler.

    1. Drawing a code
    2. PixelCNN   for images: gated, after the paper's [38], "Conditional Image Generation with
                  PixelCNN Decoders", van den Oord et al. 2016
    3. WaveNet    for codes in time, and for raw speech: sec. 4.3's decoder p(x|z), after [37],
                  "WaveNet: A Generative Model for Raw Audio", van den Oord et al. 2016
    4. VideoPrior for clips of code maps, given actions: a PixelCNN conditioned on a U-Net

p(z) = prod_i p(z_i | z_1 .. z_(i-1)), for images in raster order: left to right, top to bottom.
Training computes all factors at once: padding keeps each output from seeing its own code and
later ones. Sampling goes code by code. Running the whole network for each would do (the tests and
the tutorial do it); `sample` computes each activation once, and draws the same codes.

Shapes: codes (B, H, W) or (B, T) int64; K codes; C channels. In section 3 also L layers; S skip
channels; V values of x (K for codes, 256 for speech); N frames of conditioning, which divide T.
"""

import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# == 1. Drawing a code ========================================================================

def gumbel(*shape, generator=None, device=None):
    """Standard Gumbel noise, the random numbers behind `draw`."""
    noise = torch.empty(shape, device=device).exponential_(generator=generator)
    return -noise.clamp_(min=1e-30).log_()


def draw(logits, noise, temperature, guidance=1.0):
    """Sample from softmax(logits / temperature), (B, K) -> (B,), by the Gumbel-max trick.

    argmax(logits / temperature + noise) has exactly that distribution; temperature 0 gives the
    argmax. The noise is an argument, so that any two samplers can draw the same codes.

    guidance w other than 1: logits (2B, K) given a condition and, below, without it. Both halves
    get codes from p(z) (p(z|condition) / p(z))^w ("classifier-free", Ho and Salimans 2022).
    """
    if guidance != 1:
        given, without = logits.chunk(2)
        return draw(torch.lerp(without, given, guidance), noise, temperature).repeat(2)
    return torch.add(logits, noise, alpha=temperature).argmax(1)


def gate(x):
    """The gated activation: channels (a, b) -> tanh(a) * sigmoid(b).

    The samplers' inner steps use sigmoids only (on a CPU tanh takes up to three times as long):
    tanh(a) is 2s - 1, s = sigmoid(2a), so they compute 2 s sigmoid(b) - sigmoid(b), given 2a.
    """
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()


def check(model, **conditions):
    """Each name=(what is given, how many the model was made for) must be both or neither."""
    for name, (given, wanted) in conditions.items():
        if (given is not None) != (wanted > 0):
            made, called = ("with", "without") if wanted else ("without", "with")
            raise ValueError(f"{type(model).__name__} made {made} {name}, and called {called} it")


# == 2. PixelCNN ==============================================================================

class PixelCNNLayer(nn.Module):
    """A gated layer: the vertical stack v looks at the rows above, the horizontal h at this row.
    (One masked convolution would have a blind spot: however deep the network, codes above and to
    the right stay unseen.) With a kernel of 2r+1, v sees r rows further up and r columns to both
    sides, h r columns back. Both enter shifted, so here a position may look at itself.
    """

    def __init__(self, channels, kernel, num_classes, cond_channels):
        super().__init__()
        C, self.reach = channels, kernel // 2
        self.vertical = nn.Conv2d(C, 2 * C, (self.reach + 1, kernel))
        self.horizontal = nn.Conv2d(C, 2 * C, (1, self.reach + 1))
        self.link = nn.Conv2d(2 * C, 2 * C, 1, bias=False)  # from v to h
        self.out = nn.Conv2d(C, C, 1, bias=False)
        self.label = nn.Embedding(num_classes, 4 * C) if num_classes else None
        self.cond = nn.Conv2d(cond_channels, 4 * C, 1, bias=False) if cond_channels else None

    def bias(self, labels, cond):
        """What class and conditioning map add inside the two gates: 2 x (B|1, 2C, H|1, W|1)."""
        total = self.out.weight.new_zeros(1, 4 * len(self.out.weight), 1, 1)
        if self.label is not None:
            total = total + self.label(labels)[:, :, None, None]
        if self.cond is not None:
            total = total + self.cond(cond)
        return total.chunk(2, 1)

    def forward(self, v, h, bias):
        """v, h (B, C, H, W) -> v, h (B, C, H, W)."""
        r = self.reach
        x_v = self.vertical(F.pad(v, (r, r, r, 0)))    # (B, 2C, H, W): sees rows i-r .. i
        x_h = self.horizontal(F.pad(h, (r, 0, 0, 0)))  # (B, 2C, H, W): sees columns j-r .. j
        h = h + self.out(gate(x_h + self.link(x_v) + bias[1]))
        return v + gate(x_v + bias[0]), h


class CodebookHead(nn.Module):
    """From the horizontal stack to logits, for G codes at every position, one after the other: the
    code of codebook g is conditioned on those before it, as green is on red in a PixelCNN over
    pixels. Their embeddings are added to its hidden layer. With G = 1 this is a plain MLP.
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

    def stepper(self):
        """A function step(h (B, C), noise (G, B, K), *how to draw) -> G codes (B,)."""
        enter, bias = self.enter.weight.flatten(1).t(), self.enter.bias
        before = [None, *self.before.weight.split(self.num_codes)]
        codebooks = list(zip(before, self.weight, self.bias))

        def step(h, noise, *how):
            x, codes = torch.addmm(bias, h.relu(), enter), []
            for (table, weight, bias_g), noise_g in zip(codebooks, noise):
                if codes:
                    x = x + table.index_select(0, codes[-1])
                codes.append(draw(torch.addmm(bias_g, x.relu(), weight), noise_g, *how))
            return codes
        return step


class PixelCNN(nn.Module):
    """p(codes) for a grid of codes (B, H, W), given a class and / or a conditioning map. The paper
    gives no sizes, only "similar to those used by the authors of the PixelCNN paper".

    Args:
        num_codes: K. channels: C, width of both stacks. num_layers: one of kernel 7, the rest of
            kernel 5 (two rows per layer); `layers_for` says how many a grid needs.
        num_classes: > 0 for p(codes | label). cond_channels: > 0 for p(codes | map).
        num_codebooks: G > 1 for codes (B, G, H, W), the G codes of a position in order;
            logits are then (B, K, G, H, W).
    """

    def __init__(self, num_codes, channels=64, num_layers=15, num_classes=0, cond_channels=0,
                 num_codebooks=1):
        super().__init__()
        self.num_codes, self.channels, self.num_codebooks = num_codes, channels, num_codebooks
        self.num_classes, self.cond_channels = num_classes, cond_channels
        self.embed = nn.Embedding(num_codebooks * num_codes, channels)
        self.pos_embed = nn.Linear(2 * 8, channels)
        self.layers = nn.ModuleList(PixelCNNLayer(channels, 5 if i else 7, num_classes,
                                                  cond_channels) for i in range(num_layers))
        self.head = CodebookHead(channels, num_codes, num_codebooks)

    @staticmethod
    def layers_for(height, width):
        """The least num_layers with which every code sees all codes before it."""
        return max(1, -(-(max(height - 2, width - 1) - 1) // 2))

    def forward(self, codes, labels=None, cond=None):
        """codes (B, H, W), labels (B,), cond (B, cond_channels, H, W) or (B, cond_channels, 1, 1)
        -> logits (B, K, H, W). logits[:, :, i, j] see the codes before (i, j), no others."""
        check(self, labels=(labels, self.num_classes), cond=(cond, self.cond_channels))
        codes = codes.unsqueeze(1) if self.num_codebooks == 1 else codes           # (B, G, H, W)
        x = self.embed_all(codes.movedim(1, -1)).permute(0, 3, 1, 2)   # (B, C, H, W)
        pos = self.positions(*x.shape[2:]).permute(2, 0, 1)            # (C, H, W)
        v = F.pad(x, (0, 0, 1, -1)) + pos              # one row down: row i holds codes of row i-1
        h = F.pad(x, (1, -1, 0, 0)) + pos              # one column right: (i, j) holds (i, j-1)
        for layer in self.layers:
            v, h = layer(v, h, layer.bias(labels, cond))
        logits = self.head(h, codes)
        return logits.squeeze(2) if self.num_codebooks == 1 else logits

    def embed_all(self, codes):
        """Codes of G codebooks (..., G) -> the sum of their embeddings (..., C)."""
        first = torch.arange(self.num_codebooks, device=codes.device) * self.num_codes
        return self.embed(codes + first).sum(-2)

    def positions(self, height, width):
        """Positional encoding (H, W, C), from eight cosines of the row and eight of the column. Not
        in the paper: convolutions alone must infer a position from the zero padding."""
        weight = self.pos_embed.weight
        at = [(torch.arange(n, device=weight.device) + 0.5) / n for n in (height, width)]  # 0 .. 1
        at = torch.stack(torch.meshgrid(at, indexing="ij"), 2).unsqueeze(3)        # (H, W, 2, 1)
        waves = (math.pi * at * torch.arange(1, 9, device=weight.device)).cos().flatten(2)
        return self.pos_embed(waves.to(weight.dtype))                  # (H, W, 16) -> (H, W, C)

    def sample(self, batch, height, width, labels=None, cond=None, temperature=1.0, generator=None,
               guidance=1.0):
        """Ancestral sampling for about the work of one forward pass: row by row for the vertical
        stack, which sees only finished rows; code by code for the horizontal one.
        With guidance (see `draw`) labels or cond have 2 * batch rows, the last `batch` of them
        for "no condition". Returns (batch, height, width) int64, or (batch, G, height, width)."""
        check(self, labels=(labels, self.num_classes), cond=(cond, self.cond_channels))
        B, C, G, W = batch * (1 + (guidance != 1)), self.channels, self.num_codebooks, width
        if guidance != 1 and any(x is not None and len(x) != B for x in (labels, cond)):
            raise ValueError(f"guidance {guidance}: labels and cond need {B} rows, 2 * batch")
        if cond is not None and cond.shape[2:] not in ((1, 1), (height, width)):
            raise ValueError(f"cond {tuple(cond.shape)}: not a map of {height} x {width}, or 1 x 1")
        device = self.embed.weight.device
        codes = torch.zeros(height, B, W, G, dtype=torch.long, device=device)
        with torch.inference_mode():  # a fifth off the cost of a small operation
            bias = self.embed.weight.new_zeros(len(self.layers), B, W, 2 * C)
            # Each layer's vertical convolution: inputs of all rows, with their zero padding, and
            # weights. Channels last, or every call would have to lay both out anew.
            vertical = [(bias.new_zeros(B, height + layer.reach, W + 2 * layer.reach, C),
                         layer.vertical.weight.contiguous(memory_format=torch.channels_last))
                        for layer in self.layers]
            step, draw_codes = self.stepper(bias), self.head.stepper()
            tables = self.embed.weight.split(self.num_codes)           # G x (K, C)
            v = bias.new_zeros(B, W, C)                # row 0: nothing is above it
            for i, pos in enumerate(self.positions(height, W)):        # (W, C)
                row_cond = cond if cond is None or cond.shape[2] == 1 else cond[:, :, i:i + 1]
                self.vertical_row(i, v + pos, vertical, bias, labels, row_cond)
                noise = gumbel(W, G, batch, self.num_codes, generator=generator, device=device)
                left, row = (), []                     # column 0: nothing is to the left
                for j, (h, noise_j) in enumerate(zip(pos, noise)):
                    for table, code in zip(tables, left):
                        h = h + table.index_select(0, code)            # (B, C)
                    left = draw_codes(step(j, h), noise_j, temperature, guidance)
                    row += left
                codes[i] = torch.stack(row, 1).view(B, W, G)
                v = self.embed_all(codes[i])           # (B, W, C)
        codes = codes[:, :batch].permute(1, 3, 0, 2).contiguous()
        return codes.squeeze(1) if G == 1 else codes

    def vertical_row(self, i, v, vertical, bias, labels, cond):
        """Run the vertical stack for row i, v (B, W, C). What it and the conditioning add inside
        the horizontal gates goes to bias (L, B, W, 2C)."""
        for layer, (rows, weight), gates in zip(self.layers, vertical, bias):
            r = layer.reach
            rows[:, i + r, r:rows.shape[2] - r] = v
            x = F.conv2d(rows[:, i:i + r + 1].permute(0, 3, 1, 2), weight, layer.vertical.bias)
            bias_v, bias_h = layer.bias(labels, cond)  # x is (B, 2C, 1, W)
            x_h = F.conv2d(x, layer.link.weight, layer.horizontal.bias) + bias_h
            gates.copy_(x_h.squeeze(2).transpose(1, 2))
            v = v + gate(x + bias_v).squeeze(2).transpose(1, 2)
        bias[..., :self.channels] *= 2                 # see gate

    def stepper(self, bias):
        """A function step(j, h (B, C)) -> h (B, C): the horizontal stack at column j of a row. Four
        operations per layer, each into memory laid out here. A layer's inputs of the row lie side
        by side: the window of a position is one slice. For the sigmoid see gate."""
        B, W, C, new, columns = *bias.shape[1:3], self.channels, bias.new_zeros, []
        gates, z, top = new(B, 2 * C), new(B, C), new(B, C)
        a, b = gates.chunk(2, 1)
        lines = [new(B, (layer.reach + W) * C) for layer in self.layers]
        h = [line.split(C, 1)[-W:] for line in lines] + [[top] * W]    # (L+1) x W x (B, C)
        for l, layer in enumerate(self.layers):
            w = layer.horizontal.weight.permute(3, 1, 0, 2).reshape(-1, 2 * C)  # (taps * C, 2C)
            w = torch.cat([2 * w[:, :C], w[:, C:]], 1)
            w_out = -layer.out.weight.flatten(1).t().contiguous()      # (C, C)
            windows = lines[l].unfold(1, len(w), C).unbind(1)          # columns j-r .. j
            columns.append([(w, w_out, *views) for views in
                            zip(windows, bias[l].unbind(1), h[l], h[l + 1])])
        columns = list(zip(*columns))                  # W x L x what a step needs

        def step(j, h_0):
            h[0][j].copy_(h_0)
            for w, w_out, window, bias_j, h_j, above in columns[j]:
                torch.addmm(bias_j, window, w, out=gates).sigmoid_()
                torch.addcmul(b, a, b, value=-2, out=z)                # -z
                torch.addmm(h_j, z, w_out, out=above)
            return top
        return step


# == 3. WaveNet ===============================================================================

class WaveNet(nn.Module):
    """p(x) for a series x (B, T) of V values: the prior over codes. With conditioning p(x|z, s):
    sec. 4.3's decoder, "conditioned on both the latents and a one-hot embedding for the speaker".

    Args:
        num_values: V, 256 for mu-law speech, K for codes.
        channels: C of the residual path (the gates have 2C). skip_channels: S.
        num_layers: L. cycle: dilations are 1, 2, 4 .. 2^(cycle - 1), and again from 1.
        cond_channels: > 0 for local conditioning, num_speakers: > 0 for global.

    The paper says "a dilated convolutional architecture similar to WaveNet decoder". The sizes
    are those of the WaveNets in public use; 30 layers see 3070 samples (`receptive_field`). x
    enters through an embedding, which equals [37]'s one-hot input.
    """

    def __init__(self, num_values=256, channels=64, num_layers=30, cycle=10, skip_channels=256,
                 cond_channels=0, num_speakers=0):
        super().__init__()
        L, C, S = num_layers, channels, skip_channels
        self.num_values, self.channels = num_values, channels
        self.cond_channels, self.num_speakers = cond_channels, num_speakers
        self.dilations = [2 ** (l % cycle) for l in range(L)]
        self.embed = nn.Embedding(num_values, C)
        self.dilated = nn.ModuleList(nn.Conv1d(C, 2 * C, 2, dilation=d) for d in self.dilations)
        # Nothing follows the last layer but its skip path.
        self.out = nn.ModuleList(nn.Conv1d(C, C, 1, bias=False) for _ in range(L - 1))
        # [37] sums a 1x1 convolution of each layer: that is one of all layers side by side.
        self.head = nn.Sequential(nn.Conv1d(L * C, S, 1), nn.ReLU(), nn.Conv1d(S, S, 1),
                                  nn.ReLU(), nn.Conv1d(S, num_values, 1))
        # What conditioning adds inside the gates, for all layers at once.
        self.cond = nn.Conv1d(cond_channels, L * 2 * C, 1, bias=False) if cond_channels else None
        self.speaker = nn.Embedding(num_speakers, L * 2 * C) if num_speakers else None

    @property
    def receptive_field(self):
        """R: logits at t see x at t-R .. t-1."""
        return 1 + sum(self.dilations)

    def forward(self, x, cond=None, speaker=None):
        """x (B, T) int64, cond (B, cond_channels, N), speaker (B,) int64 -> logits (B, V, T).
        logits[:, :, t] see x[:, :t], no more. Each frame of cond lasts T/N samples."""
        self.check(x.shape[1], cond, speaker)
        h = F.pad(self.embed(x).transpose(1, 2), (1, -1))              # (B, C, T): t holds t-1
        biases = self.bias(cond, speaker)
        skips = []
        for l, d in enumerate(self.dilations):
            a = self.dilated[l](F.pad(h, (d, 0)))      # (B, 2C, T): sees h at t-d and at t
            if biases is not None:
                # Frames repeat by broadcasting: T/N times cheaper than to project them at the
                # rate of x, and the repeated tensor never exists.
                bias = biases[:, l].unsqueeze(3)                       # (B, 2C, N, 1)
                a = (a.unflatten(2, (bias.shape[2], -1)) + bias).flatten(2)
            skips.append(gate(a))                                      # (B, C, T)
            if l + 1 < len(self.dilations):
                h = h + self.out[l](skips[l])
        return self.head(torch.cat(skips, 1))

    def bias(self, cond, speaker):
        """What conditioning adds inside the gates: (B, L, 2C, N), N = 1 for the speaker alone."""
        parts = [self.cond(cond)] if self.cond is not None else []     # (B, L*2C, N)
        if self.speaker is not None:
            parts.append(self.speaker(speaker).unsqueeze(2))           # (B, L*2C, 1)
        return sum(parts).unflatten(1, (-1, 2 * self.channels)) if parts else None

    def check(self, length, cond, speaker):
        check(self, cond=(cond, self.cond_channels), speaker=(speaker, self.num_speakers))
        if cond is not None and (cond.shape[2] == 0 or length % cond.shape[2]):
            raise ValueError(f"{cond.shape[2]} frames of cond do not divide {length} samples")

    def sample(self, batch, length, cond=None, speaker=None, temperature=1.0, generator=None):
        """Ancestral sampling, one column of activations per sample: x (batch, length) int64."""
        self.check(length, cond, speaker)
        x = torch.zeros(length, batch, dtype=torch.long, device=self.embed.weight.device)
        rate = length // (1 if cond is None else cond.shape[2])
        step, before = self.stepper(batch), None
        samples = zip(x, self.noise(batch, length, generator))
        with torch.inference_mode():  # a fifth off the cost of a small operation
            for bias in self.frames(cond, speaker):                    # (L, B, 2C)
                for x_t, noise in itertools.islice(samples, rate):     # those of this frame
                    x_t.copy_(draw(step(before, bias), noise, temperature))
                    before = x_t
        return x.t().contiguous()

    def stepper(self, batch):
        """A function step(x_(t-1), bias) -> logits at t (B, V), to be called for t = 0, 1, ..

        A layer needs its own input of d steps ago: a ring buffer of d rows per layer, one after the
        other in `ring`; the newest input overwrites the one that was just read, nothing is moved.
        The number of operations counts, not their size: past inputs and skips are one product over
        all layers, and four operations per layer are left, each into memory laid out here.
        """
        B, C, L = batch, self.channels, len(self.dilations)
        past, now, out, (skip, skip_bias), (mix, mix_bias), (logit, logit_bias) = self.matrices()
        rows, new, table = self.rows(), self.embed.weight.new_zeros, self.embed.weight
        ring, old, known = new(sum(self.dilations), B, C), new(L, B, C), new(L, B, 2 * C)
        h, gates, z = new(L, B, C), new(B, 2 * C), new(B, L * C)
        a, b = gates.chunk(2, 1)
        layers = list(zip(known, now, h, z.split(C, 1), [*out, None], [*h[1:], None]))
        h_0 = h[0]                                     # zero at t = 0

        def step(before, bias):
            if before is not None:
                torch.index_select(table, 0, before, out=h_0)
            row = next(rows)
            torch.index_select(ring, 0, row, out=old)
            torch.baddbmm(bias, old, past, out=known)
            for known_l, now_l, h_l, z_l, out_l, above in layers:
                torch.addmm(known_l, h_l, now_l, out=gates).sigmoid_()
                torch.addcmul(b, a, b, value=-2, out=z_l)              # -z, see gate
                if above is not None:
                    torch.addmm(h_l, z_l, out_l, alpha=-1, out=above)
            ring.index_copy_(0, row, h)
            s = F.relu_(torch.addmm(skip_bias, z, skip, alpha=-1))     # (B, S)
            s = F.relu_(torch.addmm(mix_bias, s, mix))
            return torch.addmm(logit_bias, s, logit)
        return step

    def matrices(self):
        """All weights of a step as matrices (in, out)."""
        w = torch.stack([conv.weight for conv in self.dilated])        # (L, 2C, C, 2)
        w[:, :self.channels] *= 2                      # see gate
        past, now = w.permute(3, 0, 2, 1).contiguous()                 # each (L, C, 2C)
        out = [conv.weight.squeeze(2).t().contiguous() for conv in self.out]   # each (C, C)
        head = [(conv.weight.squeeze(2).t().contiguous(), conv.bias) for conv in self.head[::2]]
        return past, now, out, *head

    def rows(self):
        """The rows (L,) of `ring` that are d steps old at t = 0, 1, .."""
        d = torch.tensor(self.dilations, device=self.embed.weight.device)
        # One period is enough: the dilations are powers of 2, all divide the longest.
        t = torch.arange(int(d.max()), device=d.device).unsqueeze(1)
        return itertools.cycle(d.cumsum(0) - d + t % d)

    def frames(self, cond, speaker, most=2 ** 24):
        """The part of the gates independent of x: (L, B, 2C), frame after frame of cond."""
        own = torch.stack([conv.bias for conv in self.dilated]).unsqueeze(2)   # (L, 2C, 1)
        batch = 1 if cond is None else len(cond)
        chunk = max(1, most // (batch * own.numel()))  # frames projected at a time
        for part in [None] if cond is None else cond.split(chunk, 2):
            biases = self.bias(part, speaker)
            total = own.unsqueeze(0) if biases is None else own + biases       # (B, L, 2C, N)
            total = total.permute(3, 1, 0, 2).contiguous()
            total[..., :self.channels] *= 2                            # see gate
            yield from total

    def noise(self, batch, length, generator):
        """Gumbel noise (B, V) for each sample, generated for 256 samples at a time."""
        for t in range(0, length, 256):
            yield from gumbel(min(256, length - t), batch, self.num_values, generator=generator,
                              device=self.embed.weight.device)


# == 4. VideoPrior (sec. 4.4) =================================================================

class ActionBlock(nn.Module):
    """Residual block of two 3x3 convolutions. The action scales and shifts its hidden channels:
    FiLM (Perez et al. 2018), here for each position, since a step forward moves the left half of
    the picture to the left and the right half to the right. Without the normalisation the network
    is slow to learn to copy. A actions, "unknown" among them; M action_channels."""

    def __init__(self, channels, action_channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(1, channels)
        self.norm_hidden = nn.GroupNorm(1, channels, affine=False)     # FiLM is the affine part
        self.film = nn.Conv2d(action_channels, 2 * channels, 1)

    def forward(self, x, action_map, action):
        """x (B, C, H, W), action_map (A, M, H, W), action (B,) in 0 .. A-1 -> (B, C, H, W)."""
        scale, shift = self.film(action_map).index_select(0, action).chunk(2, 1)   # (B, C, H, W)
        h = self.norm_hidden(self.first(F.relu(self.norm(x))))
        return x + self.second(F.relu(torch.addcmul(h + shift, h, scale)))


class VideoPrior(nn.Module):
    """p(z_t | z_<t, a_<t) for clips of code maps z_t (H, W): sec. 4.4, p(z_1, .., z_T).

    A U-Net computes a feature map of the last `context` maps and the actions that lead on from
    them; a gated PixelCNN conditioned on it generates the next map. A turn moves the picture, and
    the next one may bring back what has left the view: see `panorama`.

    Args:
        num_codes: K. num_actions: 0 for a model without actions.
        channels: of U-Net and PixelCNN. num_layers: of the PixelCNN; with few of them a code
            sees only its neighbours in its own frame, and all of the frames before.
        context: how many frames back the model sees. action_channels: M, of the action map.

    Frames before the first hold a code of their own, "no frame": p(z_1) is learned with the rest,
    and a clip may start from nothing. Action -1, or no actions at all, means "unknown".
    """

    kernel = 3, 7                                      # of `move`: rows, columns

    def __init__(self, num_codes, num_actions=0, channels=64, num_layers=4, context=4,
                 action_channels=32):
        super().__init__()
        self.num_codes, self.num_actions, self.context = num_codes, num_actions, context
        C, E, A, taps = channels, -(-channels // 2), num_actions + 1, math.prod(self.kernel)
        self.embed = nn.Embedding(num_codes + 1, E)                    # row K: no frame
        self.enter = nn.Conv2d(context * E, C, 1)
        self.move = nn.Embedding(A, E * taps)          # row 0: action unknown
        self.look = nn.Conv2d(E, C, 1)
        self.embed_action = nn.Embedding(A, action_channels)
        self.pos_embed = nn.Conv2d(2, action_channels, 1)
        self.mix = nn.Conv2d(action_channels, action_channels, 1)
        widths = (C, 2 * C, 2 * C)                     # at 1, 1/2 and 1/4 of the resolution
        self.before = nn.ModuleList(ActionBlock(w, action_channels) for w in widths)
        self.after = nn.ModuleList(ActionBlock(w, action_channels) for w in widths)
        self.down = nn.ModuleList(nn.Conv2d(w, v, 3, 2, 1) for w, v in zip(widths, widths[1:]))
        self.up = nn.ModuleList(nn.Conv2d(v, w, 1) for w, v in zip(widths, widths[1:]))
        self.norm = nn.GroupNorm(1, C)
        self.pixelcnn = PixelCNN(num_codes, C, num_layers, cond_channels=C)
        # PyTorch's default initialisation loses two thirds of the variance in each convolution:
        # what the U-Net sees would not reach its output, and copying would be slow to learn.
        for layer in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        nn.init.dirac_(self.move.weight.data.view(A * E, 1, *self.kernel), A * E)  # nothing moves

    def forward(self, codes, actions=None, last=None):
        """codes (B, T, H, W), actions (B, T-1) or None -> logits (B, K, T, H, W), or with last=n
        those of the last n frames. logits[:, :, t, i, j] see the frames t - context .. t - 1,
        the actions that lead on from each, and the codes of frame t before (i, j)."""
        B, T = codes.shape[:2]
        n = T if last is None else last
        actions = self.checked(codes, actions, T - 1)  # (B, context + T - 1)
        before = F.pad(codes, (0, 0, 0, 0, self.context, 0), value=self.num_codes)
        # For each of the n frames: the `context` maps before it, and what leads on from each map.
        cond = self.unet(*(x.unfold(1, self.context, 1)[:, T - n:T].flatten(0, 1)
                           for x in (before, actions)))
        logits = self.pixelcnn(codes[:, T - n:].flatten(0, 1), cond=cond)      # (B*n, K, H, W)
        return logits.unflatten(0, (B, n)).transpose(1, 2)

    def unet(self, codes, actions):
        """codes (B, H, W, context), actions (B, context) -> features (B, C, H, W)."""
        action, e = actions[:, -1] + 1, self.embed(codes)              # (B, H, W, context, E)
        x = self.enter(e.flatten(3).permute(0, 3, 1, 2))               # (B, C, H, W)
        x = x + self.look(self.panorama(e.permute(3, 0, 4, 1, 2), actions))
        skips = []
        for i, block in enumerate(self.before):
            x = self.down[i - 1](x) if i else x
            x = block(x, self.action_map(x), action)
            skips.append(x)
        for i in reversed(range(len(self.after))):
            if i < len(self.after) - 1:
                x = F.interpolate(self.up[i](x), skips[i].shape[2:]) + skips[i]
            x = self.after[i](x, self.action_map(x), action)
        return self.norm(x)

    def panorama(self, e, actions):
        """Maps e (context, B, E, H, W), actions (B, context) -> what has been seen, where it should
        be now (B, E, H, W). Map after map is laid upon the middle of a canvas twice as wide, and
        all that is there is moved by the action that follows: a depthwise convolution."""
        n, B, E, H, W = e.shape
        canvas, side = e.new_zeros(B * E, H, W + 2 * (W // 2)), W // 2
        kernels = self.move(actions.t() + 1).view(n, B * E, 1, *self.kernel)
        for seen, kernel in zip(e.flatten(1, 2), kernels):
            canvas = torch.cat([canvas[..., :side], seen, canvas[..., side + W:]], 2)
            canvas = F.conv2d(canvas, kernel, padding=[k // 2 for k in self.kernel], groups=B * E)
        return canvas[..., side:side + W].unflatten(0, (B, E))

    def action_map(self, x):
        """Features of every action at every position of a map like x: (A, M, H, W)."""
        H, W = x.shape[2:]
        rows, cols = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in (H, W))
        pos = self.pos_embed(torch.stack(torch.meshgrid(rows, cols, indexing="ij")).unsqueeze(0))
        return F.relu(self.mix(F.relu(self.embed_action.weight[:, :, None, None] + pos)))

    def checked(self, codes, actions, length):
        """The actions, -1 for unknown, also before the first frame: (B, context + length)."""
        if codes.dim() != 4:
            raise ValueError(f"codes must be (B, T, H, W), got {tuple(codes.shape)}")
        if actions is None:
            return codes.new_full((len(codes), self.context + length), -1)
        if not self.num_actions or actions.shape != (len(codes), length):
            raise ValueError(f"actions must be ({len(codes)}, {length}), one between any two frames"
                             f" (None: a model without actions); got {tuple(actions.shape)}")
        return F.pad(actions, (self.context, 0), value=-1)

    @torch.no_grad()
    def sample(self, codes, actions=None, frames=1, temperature=1.0, generator=None, guidance=1.0):
        """Continue codes (B, T, H, W) int64, T >= 0, by `frames` code maps: (B, frames, H, W).
        actions (B, T + frames - 1): those between the given frames, then those of the roll-out.
        guidance above 1 strengthens the effect of the action, against "unknown" (see `draw`)."""
        (B, T, H, W), n, plans = codes.shape, self.context, 1 + (guidance != 1)
        actions = self.checked(codes, actions, T + frames - 1)
        if actions.numel() and not -1 <= actions.min() <= actions.max() < self.num_actions:
            raise ValueError(f"actions must be 0 .. {self.num_actions - 1}, or -1 for unknown")
        clip = F.pad(codes, (0, 0, 0, 0, n, 0), value=self.num_codes)
        for t in range(T, T + frames):
            before, taken = clip[:, t:t + n].permute(0, 2, 3, 1), actions[:, t:t + n]
            wanted = taken, F.pad(taken[:, :-1], (0, 1), value=-1)     # and the last one unknown
            cond = torch.cat([self.unet(before, a) for a in wanted[:plans]])
            z = self.pixelcnn.sample(B, H, W, None, cond, temperature, generator, guidance)
            clip = torch.cat([clip, z.unsqueeze(1)], 1)
        return clip[:, n + T:]
