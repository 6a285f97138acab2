"""The samplers of prior.py as one would write them first, the whole network for every code: what
the cached ones are tested against. From the same generator both must draw the same codes."""

import torch
import torch.nn.functional as F

from prior import draw, gumbel


@torch.no_grad()
def sample_pixelcnn(net, batch, height, width, labels=None, cond=None, temperature=1.0,
                    generator=None):
    G, K, device = net.num_codebooks, net.num_codes, net.embed.weight.device
    codes = torch.zeros(batch, G, height, width, dtype=torch.long, device=device)
    for i in range(height):
        noise = gumbel(width, G, batch, K, generator=generator, device=device)
        for j in range(width):
            for g in range(G):
                logits = net(codes.squeeze(1) if G == 1 else codes, labels, cond)
                logits = logits.view(batch, K, G, height, width)[:, :, g, i, j]
                codes[:, g, i, j] = draw(logits, noise[j, g], temperature)
    return codes.squeeze(1) if G == 1 else codes


@torch.no_grad()
def sample_wavenet(net, batch, length, cond=None, speaker=None, temperature=1.0, generator=None):
    """The receptive field for every sample, not the whole past: still the same codes."""
    net.check(length, cond, speaker)
    x = torch.zeros(batch, length, dtype=torch.long, device=net.embed.weight.device)
    rate = 1 if cond is None else length // cond.shape[2]              # the window has whole frames
    for t, noise in enumerate(net.noise(batch, length, generator)):
        first, last = max(0, t - net.receptive_field) // rate, t // rate + 1
        part = None if cond is None else cond[:, :, first:last]
        logits = net(x[:, first * rate:last * rate], part, speaker)[:, :, t - first * rate]
        x[:, t] = draw(logits, noise, temperature)
    return x


@torch.no_grad()
def sample_video(net, codes, actions, frames, generator, guidance=1.0):
    """Guidance: log p(z|action) + (w - 1) (log p(z|action) - log p(z|unknown)), softmax of that."""
    B, T, H, W = codes.shape
    clip = F.pad(codes, (0, 0, 0, 0, 0, frames))                       # (B, T + frames, H, W)
    for t in range(T, T + frames):
        for i in range(H):
            noise = gumbel(W, B, net.num_codes, generator=generator)
            for j in range(W):
                logits = net(clip, actions)[:, :, t, i, j].log_softmax(1)
                if guidance != 1:
                    plan = actions.clone()
                    plan[:, t - 1] = -1                # what leads to this frame, not before it
                    unknown = net(clip, plan)[:, :, t, i, j].log_softmax(1)
                    logits = logits + (guidance - 1) * (logits - unknown)
                clip[:, t, i, j] = draw(logits, noise[j], 1.0)
    return clip[:, T:]
