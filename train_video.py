"""Video: frames -> VQ-VAE -> codes -> action-conditional prior -> imagined clips (sec. 4.4).

    python train_video.py                          demo world, no download, no GPU: minutes
    python train_video.py --play                   walk through what it has learned: arrow keys
    python train_video.py --play left,left,forward               the same walk as a GIF
    python train_video.py --no-actions             a prior that is not conditioned on actions
    python train_video.py --data clips.npz --preset paper        your own clips, on a GPU
    python train_video.py --resume                 continue runs/video, as if never stopped
    torchrun --nproc_per_node=2 train_video.py     the same run over several processes

Stage one trains a VQ-VAE on single frames. Then it is frozen, every frame is encoded once, and
a VideoPrior learns p(z_1, .., z_T | actions). A roll-out gets 6 frames and generates 10 "purely
in the latent space"; the decoder makes pictures of them when all are there. --out (runs/video)
receives rollout.gif, rollout.png (the paper's fig. 7, with the ground truth below),
rollout_long.png, reconstructions.png, curves.png, metrics.json, log.csv and the checkpoints;
README explains every number.

--data: an .npz with `frames` (N, T, H, W, 3) uint8 and `actions` (N, T) or (N, T-1) integers
from 0; or a folder with frames.npy and actions.npy, which stay on the disk (a memory map).
actions[n, t] leads from frames[n, t] to frames[n, t + 1]. From any Gymnasium environment with
discrete actions and pictures of a fixed size (84 x 84, say):

    env, frames, actions = gymnasium.make(NAME, render_mode="rgb_array"), [], []
    for episode in range(200):
        env.reset(seed=episode)
        for step in range(30):
            frames.append(env.render())
            actions.append(env.action_space.sample())
            if any(env.step(actions[-1])[2:4]):        # ended too early: leave this clip out
                del frames[-step - 1:], actions[-step - 1:]
                break
    frames, actions = np.array(frames), np.array(actions)
    np.savez_compressed("clips.npz", actions=actions.reshape(-1, 30),
                        frames=frames.reshape(-1, 30, *frames.shape[1:]))
"""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from prior import VideoPrior
from vqvae import (VQVAE, Gaussian, Parser, batches, check_batch, count_codes, digest, launch,
                   make_quantizer, mix, perplexity, pick_device, positive, read_run, reading,
                   smallest_int, to_unit)

GIVEN, GENERATED = 6, 10                               # frames of a roll-out, as in fig. 7
FACTOR = 4                                             # pixels per code, each way

PRESETS = {
    # 24 x 48 x 3 -> 6 x 12 codes, for a laptop.
    "demo": dict(warmup_steps=100, steps=1000, prior_steps=4600, judge_steps=500, batch_size=32,
                 prior_batch_size=48, lr=1e-3, prior_lr=3e-3, lr_decay=0.5, codebook="ema",
                 num_codes=128, code_dim=32, hidden=48, res_hidden=32, prior_channels=32,
                 prior_layers=2, temperature=1.0),
    # DeepMind Lab, 84 x 84 x 3 -> 21 x 21, K = 512. The paper gives no more: Adam's rate and the
    # number of steps are those of its CIFAR-10 experiment.
    "paper": dict(warmup_steps=1000, steps=250_000, prior_steps=250_000, judge_steps=5000,
                  batch_size=128, prior_batch_size=128, lr=2e-4, prior_lr=2e-4, num_codes=512,
                  code_dim=64, hidden=128, res_hidden=32, prior_channels=128, prior_layers=10,
                  temperature=1.0),
}


def main(run, data):
    """Sec. 4.4. (The models are made in here: a rehearsal on a few clips comes first.)"""
    model = make_model(run.args, data.facts)
    run.say("{} clips of {} frames of {}x{}x{} for training".format(*data.parts["train"].shape))

    fit_vqvae(run, model.vqvae, data)                  # stage one: frames, uniform p(z)
    codes = {part: encode_all(model.vqvae, clips) for part, clips in data.parts.items()}
    fit_prior(run, model.prior, codes, data)           # stage two: p(z_1, .., z_T | actions)
    judge = fit_judge(run, data)                       # of measurements, no part of the model

    if run.rank == 0:
        metrics, *films = measure(run, model, judge, data, codes)      # roll-outs
        draw(run, model, data, codes, *films)          # fig. 7
        run.finish(metrics)


class Model(NamedTuple):
    """What a run trains, and what `load` gives back."""

    vqvae: VQVAE
    prior: VideoPrior
    names: list          # of the actions
    args: object         # the run's flags

    def imagine(self, frames, actions, temperature=None, seed=0):
        """What follows frames (N, T, 3, H, W) uint8, T >= 1, if actions (N, n) int64 are taken
        next: (N, n, 3, H, W) uint8. A model without actions asks `actions` for n alone."""
        codes = encode_all(self.vqvae, torch.as_tensor(frames))
        return roll_out(self, codes, torch.as_tensor(actions), temperature, seed)


def make_model(args, facts):
    if args.prior_channels < 2:
        raise ValueError("--prior-channels must be at least 2")
    vqvae = VQVAE(make_quantizer(args), Gaussian(facts["variance"]), hidden=args.hidden,
                  res_hidden=args.res_hidden)
    prior = VideoPrior(args.num_codes, 0 if args.no_actions else len(facts["actions"]),
                       args.prior_channels, args.prior_layers, context=GIVEN)
    return Model(vqvae, prior.to(memory_format=torch.channels_last), facts["actions"], args)


# ---------------------------------------------------------------------------------------------
# Stage one: the VQ-VAE of single frames
# ---------------------------------------------------------------------------------------------


def fit_vqvae(run, vqvae, data):
    """The codebook starts at encoder outputs; those of a random encoder are a poor place, so it
    first learns for a moment without a codebook."""
    args = run.args
    train, valid = (Stretches(data.parts[p], data.parts[p].actions, 1) for p in ("train", "valid"))
    vqvae.quantizer.requires_grad_(False)
    run.fit("autoencoder", vqvae, lambda net, x, action: (net(x[:, 0], quantize=False).loss, {}),
            train, args.warmup_steps, args.batch_size, args.lr)
    vqvae.quantizer.requires_grad_(True)
    run.fit("vqvae", vqvae, lambda net, x, action: vqvae_loss(net, x[:, 0], args),
            train, args.steps, args.batch_size, args.lr, valid)
    vqvae.requires_grad_(False)                        # stage one is over


def vqvae_loss(net, x, args):
    y = net(x)
    mse = F.mse_loss(y.out.detach().float(), to_unit(x)) * 255 ** 2
    return y.loss, {"mse": mse, "codes_used": count_codes(y.codes, args.num_codes)}


class Stretches(torch.utils.data.Dataset):
    """All stretches of `length` consecutive frames (or code maps) of clips (N, T, ...), each with
    the action that leads to its last frame: a data set for Run.fit.

    self[index (B,)] -> stretches (B, length, ...), actions (B,). With `fill`, stretches also end
    at the first frames of a clip: what is before them holds `fill`, and action -1, "none", leads
    to the first.
    """

    def __init__(self, clips, actions, length, fill=None):
        self.clips, self.actions, self.fill = clips, actions, fill
        self.back = torch.arange(1 - length, 1)        # -length + 1 .. 0
        self.first = length - 1 if fill is None else 0
        self.ends = clips.shape[1] - self.first        # stretches of a clip

    def __len__(self):
        return len(self.clips) * self.ends

    def __getitem__(self, index):
        n, t = index // self.ends, index % self.ends + self.first      # clip and last frame
        at = t[:, None] + self.back                    # (B, length)
        x = self.clips[n[:, None], at.clamp(min=0)]
        if self.fill is not None:
            x[at < 0] = self.fill
        return x, self.actions[n, (t - 1).clamp(min=0)].masked_fill(t == 0, -1)


@torch.no_grad()
def encode_all(vqvae, clips, size=8):
    """Codes (N, T, h, w) of all clips (N, T, 3, H, W), on the CPU, in the smallest dtype."""
    device = next(vqvae.parameters()).device
    dtype = smallest_int(vqvae.quantizer.num_codes + 1)                # K stands for "no frame"
    return torch.cat([vqvae.encode(clips[n:n + size].flatten(0, 1).to(device)).to("cpu", dtype)
                      for n in range(0, len(clips), size)]).unflatten(0, (-1, clips.shape[1]))


@torch.no_grad()
def decode_all(vqvae, codes, size=128):
    """The way back, when all codes are there: (N, T, h, w) -> (N, T, 3, H, W) uint8, CPU."""
    device = next(vqvae.parameters()).device
    return torch.cat([vqvae.decode(z.long()).cpu() for z in batches(
        codes.flatten(0, 1), size, device)]).unflatten(0, codes.shape[:2])


# ---------------------------------------------------------------------------------------------
# Stage two: the prior on the codes, and roll-outs
# ---------------------------------------------------------------------------------------------


def fit_prior(run, prior, codes, data):
    args = run.args
    train, valid = (Stretches(codes[p], data.parts[p].actions, GIVEN + 1, fill=args.num_codes)
                    for p in ("train", "valid"))
    run.fit("prior", prior, lambda net, z, action: prior_loss(
        net, z, None if args.no_actions else action),
        train, args.prior_steps, args.prior_batch_size, args.prior_lr, valid)


def prior_loss(net, z, action):
    """-log p(z_t | z_<t, a_(t-1)), teacher-forced: the frames before, z[:, :-1], are recorded ones.
    z (B, GIVEN + 1, h, w); action (B,) leads to the last frame, or None."""
    z = z.long()
    if action is not None:  # of the earlier ones the prior sees what they did, in the frames
        action = F.pad(action[:, None], (GIVEN - 1, 0), value=-1)
    loss = F.cross_entropy(net(z, action, last=1), z[:, -1:])          # nats per code
    return loss, {"bits_per_code": loss.detach() / math.log(2)}


def roll_out(model, codes, actions, temperature=None, seed=0, size=50):
    """Codes (N, T, h, w) of given frames, actions (N, n) -> n more frames, (N, n, 3, H, W) uint8.
    All codes come first, "purely in the latent space"; the pictures are decoded after that."""
    device = next(model.prior.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    temperature = model.args.temperature if temperature is None else temperature
    known = model.prior.num_actions > 0
    plan = F.pad(actions.long(), (codes.shape[1] - 1, 0), value=-1)    # between given frames: any
    imagined = [model.prior.sample(z.to(device).long(), a.to(device) if known else None,
                                   actions.shape[1], temperature, generator)
                for z, a in zip(codes.split(size), plan.split(size))]
    return decode_all(model.vqvae, torch.cat(imagined))


# ---------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------


class RollOut(NamedTuple):
    """What may follow GIVEN frames of N clips."""

    name: str
    actions: torch.Tensor    # (N, n)
    given: torch.Tensor      # (N, GIVEN, 3, H, W) uint8
    imagined: torch.Tensor   # (N, n, 3, H, W)
    truth: torch.Tensor      # the same, recorded or rendered; None where it is not known


def measure(run, model, judge, data, codes):
    """metrics.json, and roll-outs of the test clips for pictures. Nothing was chosen by these
    clips; what settings are chosen by is measured on validation clips."""
    metrics = {"valid_bits_per_code": measure_prior(
        model.prior, codes["valid"], data.parts["valid"].actions)["bits_per_code"]}
    rows = {}
    for part in [p for p in ("test", "unseen") if p in data.parts]:    # demo: mazes never seen
        clips, z = data.parts[part], codes[part]
        run.say(f"imagining what follows {GIVEN} frames of {part} clips")
        rows[part] = imagine_all(run, model, clips, z)
        found = (measure_vqvae(model.vqvae, clips, z) | measure_prior(model.prior, z, clips.actions)
                 | measure_roll_outs(model, judge, rows[part], pieces(z[:100])))
        metrics |= {f"{part}_{k}" if part != "test" else k: v for k, v in found.items()}
    long = long_roll_out(run, model, rows["test"][0], codes["test"], data.parts["test"])
    by_step = edges(long.imagined)
    metrics["sharpness_long"] = (by_step[-10:].mean() / by_step[:10].mean()).item()
    return metrics | speed(model.prior, codes["test"]), rows["test"], long


@torch.no_grad()
def measure_vqvae(vqvae, clips, codes):
    error = sum((decode_all(vqvae, codes[n:n + 8]).float() - clips[n:n + 8]).square().sum().item()
                for n in range(0, len(clips), 8)) / math.prod(clips.shape)
    K = vqvae.quantizer.num_codes
    counts, bits = count_codes(codes.long(), K), codes[0, 0].numel() * math.log2(K)
    return {"psnr": 10 * math.log10(255 ** 2 / max(error, 1e-2)),
            "codes_used": int((counts > 0).sum()), "num_codes": K,
            "perplexity": perplexity(counts).item(),
            "compression": math.prod(clips.shape[2:]) * 8 / bits if bits else math.inf}


def measure_prior(prior, codes, actions):
    """Bits per code of the frames after the first GIVEN, and what the actions do to them."""
    bits = {"": bits_per_frame(prior, codes, actions)}
    if prior.num_actions:
        bits["_shuffled_actions"] = bits_per_frame(prior, codes, actions.roll(1, 0))
        bits["_without_actions"] = bits_without_actions(prior, codes)
    return {f"bits_per_code{name}": x.mean().item() / codes[0, 0].numel()
            for name, x in bits.items()}


@torch.no_grad()
def bits_per_frame(prior, codes, actions, size=4):
    """-log2 p(z_t | z_<t, a_<t) of the frames after the first GIVEN: (N, T - GIVEN)."""
    device, bits = next(prior.parameters()).device, []
    for z, a in zip(codes.split(size), actions.split(size)):
        z = z.to(device).long()
        logits = prior(z, a.to(device) if prior.num_actions else None, last=z.shape[1] - GIVEN)
        bits.append(F.cross_entropy(logits, z[:, GIVEN:], reduction="none").sum((2, 3)).cpu())
    return torch.cat(bits) / math.log(2)


def bits_without_actions(prior, codes):
    """The same if the actions are not known: p(z_t | z_<t) = mean_a p(z_t | z_<t, a). No term is
    negative, so this costs at most log2(number of actions) bits per frame more."""
    n, T = codes.shape[:2]
    nats = torch.stack([-math.log(2) * bits_per_frame(prior, codes, torch.full((n, T - 1), a))
                        for a in range(prior.num_actions)])
    return -(nats.logsumexp(0) - math.log(prior.num_actions)) / math.log(2)


def imagine_all(run, model, clips, codes):
    """Roll-outs of up to 100 clips: for the recorded actions, and for each constant one."""
    frames, z = pieces(clips[:100]), pieces(codes[:100])               # (n, 16, ...)
    taken = pieces(F.pad(clips.actions[:100], (0, 1)))[:, GIVEN - 1:-1]

    def row(name, actions, truth):
        imagined = roll_out(model, z[:, :GIVEN], actions, seed=run.args.seed)
        return RollOut(name, actions, frames[:, :GIVEN], imagined, truth)

    constant = [(f"only {name}", torch.full_like(taken, k)) for k, name in enumerate(model.names)]
    return [row("recorded actions", taken, frames[:, GIVEN:])] + [
        row(name, actions, clips.truth(actions))
        for name, actions in constant[:min(4, model.prior.num_actions)]]


def pieces(x, most=100):
    """Clips (N, T, ...), cut to the length of a roll-out: (n, GIVEN + GENERATED, ...)."""
    length = min(x.shape[1], GIVEN + GENERATED)
    return x[:, :x.shape[1] // length * length].unflatten(1, (-1, length)).flatten(0, 1)[:most]


def measure_roll_outs(model, judge, rows, codes):
    """rows: from imagine_all. codes (N, 16, h, w): of the given frames and of the true future."""
    recorded, *constant = rows
    last, decoded = recorded.given[:, -1:], decode_all(model.vqvae, codes[:, GIVEN - 1:])
    metrics = compare(recorded.imagined, recorded.truth, decoded[:, 1:], last)
    if constant and constant[0].truth is not None:
        metrics["action_accuracy"] = action_accuracy(constant)
        metrics["action_accuracy_chance"] = 1 / len(constant)
    if judge is not None:                              # pairs of frames, the first one given
        for name, film in (("real", torch.cat([last, recorded.truth], 1)),
                           ("reconstructed", decoded),
                           ("imagined", torch.cat([decoded[:, :1], recorded.imagined], 1))):
            metrics[f"judge_{name}"] = judge_accuracy(judge, film, recorded.actions)
    return metrics


def compare(frames, truth, reconstruction, last):
    """Imagined frames (N, n, 3, H, W) against what really happened, step by step: averages over
    the moving clips, for a walker that stands at a wall makes copying unbeatable."""
    moving = is_moving(truth, last)
    ratio = edges(frames) / edges(reconstruction)
    return {"clips": len(moving), "moving_clips": int(moving.sum()),
            "psnr_generated": psnr(frames[moving], truth[moving]),
            "psnr_copy_last": psnr(last[moving], truth[moving]),
            "psnr_reconstruction": psnr(reconstruction[moving], truth[moving]),
            "sharpness": ratio.tolist(), "sharpness_last_to_first": (ratio[-1] / ratio[0]).item()}


def is_moving(truth, last):
    """Clips in which every frame differs from the last given one; all clips, if none does. (N,)"""
    error = (truth.float() - last.float()).square().mean((2, 3, 4))
    moving = (error > 255 ** 2 / 10 ** 3).all(1)       # below 30 dB
    return moving | ~moving.any()


def psnr(a, b):
    """Clips (N, T, 3, H, W) -> 10 log10(255^2 / mean squared error) in dB, a list over T."""
    error = (a.float() - b.float()).square().mean((0, 2, 3, 4))
    return (10 * torch.log10(255 ** 2 / error.clamp(min=1e-2))).tolist()


def edges(frames):
    """Gradient energy of frames (N, T, 3, H, W) by step: (T,). Blur lowers it."""
    x = frames.float()
    return x.diff(dim=-1).abs().mean((0, 2, 3, 4)) + x.diff(dim=-2).abs().mean((0, 2, 3, 4))


def action_accuracy(rows):
    """Roll-outs of constant actions, a row each -> the share that is nearer to the ground truth of
    its own action than to that of any other."""
    right = total = 0
    for k, row in enumerate(rows):
        error = torch.stack([(row.imagined.float() - r.truth.float()).square().mean((1, 2, 3, 4))
                             for r in rows])           # (actions, N)
        other = torch.cat([error[:k], error[k + 1:]]).amin(0)
        right, total = right + (error[k] < other).sum().item(), total + len(row.imagined)
    return right / total


class Judge(nn.Sequential):
    """Inverse dynamics: which action leads from a frame to the next? (B, 2, 3, H, W) in
    [-0.5, 0.5] -> logits (B, actions). Trained on real frames, it is asked about imagined ones:
    after some steps two different futures may both be right, but a left turn must look like one."""

    def __init__(self, num_actions, width=32):
        layers = [nn.Flatten(1, 2)]
        for i, o in ((6, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [nn.Conv2d(i, o, 5, 2, 2), nn.GroupNorm(1, o), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d((2, 4)), nn.Flatten(),
                         nn.Linear(16 * width, 4 * width), nn.ReLU(),
                         nn.Linear(4 * width, num_actions))


def fit_judge(run, data):
    args = run.args
    if args.no_actions:
        return None
    train, valid = (Stretches(data.parts[p], data.parts[p].actions, 2) for p in ("train", "valid"))
    return run.fit("judge", Judge(len(data.names)), judge_loss, train, args.judge_steps,
                   args.batch_size, args.lr, valid)


def judge_loss(net, pair, action):
    logits = net(to_unit(pair))
    right = (logits.detach().argmax(1) == action).float().mean()
    return F.cross_entropy(logits, action), {"accuracy": right}


@torch.no_grad()
def judge_accuracy(judge, film, actions):
    """Clips (N, n + 1, 3, H, W), actions (N, n): how often the judge names the action, by step."""
    device = next(judge.parameters()).device
    return [(torch.cat([judge(to_unit(x)).argmax(1).cpu() for x in batches(
        film[:, t:t + 2], 100, device)]) == actions[:, t]).float().mean().item()
        for t in range(actions.shape[1])]


def long_roll_out(run, model, row, codes, clips, count=4):
    """100 frames imagined after those given to `row`, for the recorded actions of many clips."""
    n, count = 5 if run.rehearsing else 100, min(count, len(row.actions))
    later = row.actions.flatten().repeat(count * n)[:count * n].view(count, n)
    imagined = roll_out(model, pieces(codes[:count])[:count, :GIVEN], later, seed=run.args.seed)
    truth = clips.truth(later) if model.prior.num_actions else None
    return RollOut("recorded actions", later, row.given[:count], imagined, truth)


@torch.no_grad()
def speed(prior, codes):
    """Frames per second, batch 1."""
    given, begun = codes[:1, :GIVEN].to(next(prior.parameters()).device).long(), time.perf_counter()
    prior.sample(given, None, 5).sum().item()          # .item() waits for a GPU
    return {"frames_per_second": 5 / (time.perf_counter() - begun)}


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def draw(run, model, data, codes, rows, long, every=5):
    some = slice(0, 8)
    frames, decoded = data.parts["test"][some][:, -1], decode_all(model.vqvae, codes["test"][some])
    run.picture("reconstructions", torch.stack([frames, decoded[:, -1]]),
                "test frames, each above its reconstruction")
    draw_fig7(run, rows)
    sheet = [x[n, every - 1::every] for n in range(len(long.imagined))
             for x in (long.imagined, long.truth) if x is not None]
    n = long.actions.shape[1]
    run.picture("rollout_long", torch.stack(sheet), f"{n} frames imagined from {GIVEN} given ones, "
                f"every {every}th shown" + (long.truth is not None) *
                "; below each row the ground truth", range(every, n + 1, every))
    run.write("rollout.gif", lambda file: save_film(file, median_film(rows)))


def draw_fig7(run, rows):
    """As the paper's fig. 7: frames given, then imagined; the ground truth in the row below."""
    sheet, labels = [], []
    for n in range(min(2, len(rows[0].given))):
        for row in rows:
            for label, film in ((f"{row.name}: imagined", row.imagined), ("truth", row.truth)):
                if film is not None:
                    sheet.append(torch.cat([row.given[n], film[n]]))
                    labels.append(label)
    n = rows[0].actions.shape[1]
    steps = [f"given {t + 1}" for t in range(GIVEN)] + [f"+{t + 1}" for t in range(n)]
    run.picture("rollout", torch.stack(sheet), f"{GIVEN} frames are given, {n} imagined: all codes "
                "first, pictures after that", steps, labels)


def median_film(rows):
    """rollout.gif shows one clip, one sequence of actions after the other. It is the median of the
    moving test clips by the squared error of its roll-out for the recorded actions: neither a
    lucky nor an unlucky one."""
    first, film = rows[0], []
    error = (first.imagined.float() - first.truth.float()).square().mean((1, 2, 3, 4))
    moving = is_moving(first.truth, first.given[:, -1:]).nonzero().flatten()
    n = moving[error[moving].argsort()[len(moving) // 2]]
    for row in rows:
        film += [(x, x, f"{row.name}, given") for x in row.given[n]]
        film += [(x, None if row.truth is None else row.truth[n, t], f"{row.name}, +{t + 1}")
                 for t, x in enumerate(row.imagined[n])]
    return film


def save_film(file, film, width=320, duration=350):
    """A GIF of pictures (3, H, W) side by side: (imagined, ground truth or None, caption)."""
    from PIL import Image, ImageDraw, ImageFont
    pictures, scale = [], max(1, round(width / film[0][0].shape[2]))
    for imagined, truth, caption in film:
        pair = [F.pad(x, (1, 1)) for x in (imagined, truth) if x is not None]
        pair = torch.cat(pair + [0 * pair[0]] * (truth is None), 2)    # (3, H, 2 * (W + 2))
        x = pair.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
        sheet = Image.new("RGB", (x.shape[1], x.shape[0] + 24), "white")
        sheet.paste(Image.fromarray(x), (0, 24))
        for at, text in ((0, f"imagined: {caption}"), (x.shape[1] // 2, "ground truth")):
            ImageDraw.Draw(sheet).text((at + 6, 3), text, "black", ImageFont.load_default(15))
        pictures.append(sheet)
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=duration,
                     loop=0)


# ---------------------------------------------------------------------------------------------
# Using a finished run: load, --play
# ---------------------------------------------------------------------------------------------


def load(folder="runs/video", device="auto"):
    """The trained Model of a finished run, in eval mode, on that device; ValueError if there is
    none in the folder."""
    args, facts, weights = read_run(folder, "video", ["vqvae", "prior"])
    with reading(folder):                              # a checkpoint of another version, say
        model = make_model(args, facts)
        for net, state in zip(model[:2], weights):
            net.load_state_dict(state)
            net.to(pick_device(device)).eval().requires_grad_(False)
    return model


def test_clips(args):
    """The test clips of the run with these flags."""
    return demo_clips_of(args, "test") if args.data is None else load_clips(args.data).parts["test"]


def use(args):
    """--play: a window, or a list of actions and a GIF."""
    model = load(args.out, args.device)
    torch.set_num_threads(1)                           # one clip: threads would only wait
    walk = Walk(model, test_clips(model.args), args.temperature or model.args.temperature)
    if args.play:
        for word in args.play.split(","):
            action = find_action(word.strip(), model.names)
            if action is None:
                raise ValueError(f"--play {word}: no such action; there are: "
                                 f"{', '.join(model.names)} (or 0 .. {len(model.names) - 1})")
            walk.act(action)
        return print(walk.save(Path(args.out) / "play.gif"))
    import matplotlib.pyplot as plt
    window = Window(walk, plt.figure("train_video.py --play", (9, 5)), args.out)
    if window.figure.canvas.required_interactive_framework is None:
        raise ValueError("--play: no display to open a window on; --play left,left,forward "
                         "writes the walk as a GIF")
    plt.show()


ARROWS = ("up", "left", "right", "down")               # keys of the first four actions


def find_action(word, names):
    """The number of an action from its name, its number or its arrow key; None if it is none."""
    for words in (names, [str(k) for k in range(len(names))], ARROWS[:len(names)]):
        if word in words:
            return words.index(word)


class Walk:
    """A walk through the imagination, from the given frames of a clip on: each action is one more
    code map, and the picture that the decoder makes of it."""

    def __init__(self, model, clips, temperature, seed=0):
        self.model, self.clips, self.temperature = model, clips, temperature
        self.device = next(model.prior.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.restart(0)

    def restart(self, n):
        self.n = n % len(self.clips)
        given = self.clips[self.n, torch.arange(GIVEN)]                # (GIVEN, 3, H, W)
        self.codes = encode_all(self.model.vqvae, given[None]).long().to(self.device)
        self.pose = self.clips.poses[[self.n], GIVEN - 1] if self.clips.world else None
        truth = [None if self.pose is None else x for x in given]
        self.film = [(x, y, "given") for x, y in zip(given, truth)]

    @torch.no_grad()
    def act(self, action):
        plan = torch.full((1, GIVEN), action, device=self.device)     # only the last is seen
        z = self.model.prior.sample(self.codes, plan if self.model.prior.num_actions else None, 1,
                                    self.temperature, self.generator)  # (1, 1, h, w)
        self.codes = torch.cat([self.codes[:, 1:], z], 1)
        truth = None
        if self.clips.world:
            self.pose = self.clips.world.move(self.pose, np.array([action]))
            frame = self.clips.world.render(self.pose, self.clips.shape[-2])[0]
            truth = torch.from_numpy(frame).permute(2, 0, 1)
        picture = self.model.vqvae.decode(z[0])[0].cpu()
        self.film.append((picture, truth, self.model.names[action]))

    def save(self, path):
        with open(path, "wb") as file:
            save_film(file, self.film)
        return f"{len(self.film)} frames are in {path}"


class Window:
    """Walk.act and its pictures, in a matplotlib figure that listens to the keyboard."""

    help = ("{}: act     n: another clip     + -: temperature     g: save as GIF     q: quit")

    def __init__(self, walk, figure, out):
        self.walk, self.figure, self.out = walk, figure, Path(out)
        if figure.canvas.manager is not None:          # matplotlib's own keys: left is "back" there
            figure.canvas.mpl_disconnect(figure.canvas.manager.key_press_handler_id)
        figure.canvas.mpl_connect("key_press_event", self.on_key)
        self.colors = code_colors(walk.model.vqvae.quantizer.codebook.cpu())
        big, *small = figure.subplot_mosaic("aab;aac").values()
        titles = ["imagined", "its codes", "ground truth"][:3 if walk.clips.world else 2]
        self.images = [axis.imshow(np.zeros((1, 1, 3)), interpolation="nearest")
                       for axis in (big, *small)]
        for axis, title in zip((big, *small), titles + [""]):
            axis.axis("off")
            axis.set_title(title)
        keys = [f"{key} {name}" for key, name in zip(ARROWS, walk.model.names)]
        figure.text(0.02, 0.02, self.help.format("   ".join(keys)), fontsize=9)
        self.status = figure.text(0.02, 0.96, "")
        self.show()

    def show(self, note=""):
        picture, truth, last = self.walk.film[-1]
        sheets = [picture.permute(1, 2, 0).numpy(), self.colors[self.walk.codes[0, -1].cpu()]]
        sheets += [] if truth is None else [truth.permute(1, 2, 0).numpy()]
        for image, sheet in zip(self.images, sheets):
            image.set_data(sheet)
            image.set_extent((0, sheet.shape[1], sheet.shape[0], 0))
            image.set_clim(0, 1)
        self.status.set_text(f"clip {self.walk.n}   step {len(self.walk.film) - GIVEN}: {last}   "
                             f"temperature {self.walk.temperature:.1f}   {note}")
        self.figure.canvas.draw_idle()

    def on_key(self, event):
        walk, note = self.walk, ""
        action = find_action(event.key, walk.model.names)
        if action is not None:
            walk.act(action)
        elif event.key in ("+", "-"):
            walk.temperature = max(0.0, walk.temperature + (0.1 if event.key == "+" else -0.1))
        elif event.key == "n":
            walk.restart(walk.n + 1)
        elif event.key == "g":
            note = walk.save(self.out / "play.gif")
        elif event.key == "q":
            import matplotlib.pyplot as plt
            return plt.close(self.figure)
        self.show(note)


def code_colors(codebook):
    """A colour for each of K codes (K, D): its place along the three directions in which the
    vectors differ most, so that similar codes have similar colours. (K, 3) in 0 .. 1."""
    e = codebook - codebook.mean(0)
    axes = F.pad(torch.linalg.svd(e, full_matrices=False)[2], (0, 0, 0, 3))[:3]    # (3, D)
    rank = (e @ axes.t()).argsort(0).argsort(0)
    return (rank / max(1, len(e) - 1)).numpy()


# ---------------------------------------------------------------------------------------------
# Your own data
# ---------------------------------------------------------------------------------------------


class Clips:
    """Clips number `which` (n,) of arrays frames (N, T, H, W, 3) and actions (N, T) or (N, T-1). No
    copy is made of the frames: they may be a memory map. In the demo also poses and their world.
    """

    def __init__(self, frames, actions, which=None, world=None, poses=None):
        self.all = torch.from_numpy(frames).permute(0, 1, 4, 2, 3)     # (N, T, 3, H, W)
        self.which = torch.arange(len(frames)) if which is None else which
        actions = torch.from_numpy(actions[:, :frames.shape[1] - 1].astype(np.int64))
        self.actions = actions[self.which]             # (n, T-1)
        self.world, self.poses = world, poses

    def __len__(self):
        return len(self.which)

    @property
    def shape(self):
        return (len(self), *self.all.shape[1:])

    def __getitem__(self, at):
        """[n] or [n, t], as of an array (n, T, 3, H, W)."""
        n, *t = at if isinstance(at, tuple) else (at,)
        return self.all[(self.which[n], *t)]

    def few(self):
        """Two of them and two frames to imagine, for the rehearsal."""
        few = copy(self)
        few.all, few.which = self.all[:, :GIVEN + 2], self.which[:2]
        few.actions = self.actions[:2, :GIVEN + 1]
        return few

    def truth(self, actions):
        """The frames that the actions (n, T) really lead to, after the first GIVEN frames of the
        first n clips: rendered. None for your own clips: only the recorded future is known."""
        if self.world is None:
            return None
        poses = self.world.walk(self.poses[:len(actions), GIVEN - 1], actions.numpy())
        frames = self.world.render(poses, self.shape[-2])
        return torch.from_numpy(frames).permute(0, 1, 4, 2, 3)


class Data(NamedTuple):
    parts: dict          # "train", "valid", "test", in the demo "unseen": Clips
    names: list          # of the actions
    facts: dict          # what models and results depend on

    def few(self):
        """For the rehearsal. What "unseen" goes through "test" goes through as well."""
        return self._replace(parts={part: clips.few() for part, clips in self.parts.items()
                                    if part != "unseen"})


def make_data(parts, names):
    train = parts["train"]
    some = Stretches(train, train.actions, 1)          # a thousand of all frames
    some = some[torch.linspace(0, len(some) - 1, 1000).long()][0]
    facts = {"actions": list(names), "size": list(train.shape[-2:]), "digest": digest(train.all),
             "variance": to_unit(some).var().item()}   # of x, for eq. 3's first term
    if some.min() == some.max():
        raise ValueError("every pixel of the training frames has the same value: there is nothing "
                         "to learn")
    return Data(parts, list(names), facts)


def load_data(run):
    args = run.args
    if args.data is None:
        run.say(f"rendering {args.demo_clips} clips")
        data = make_data({p: demo_clips_of(args, p) for p in PARTS}, ACTIONS)
    else:
        data = load_clips(args.data)
    n, T = data.parts["train"].shape[:2]
    check_batch(n * T, args.batch_size, "stage vqvae", "--batch-size")
    check_batch(n * T, args.prior_batch_size, "stage prior", "--prior-batch-size")
    return data


def load_clips(path):
    """--data: see the top of this file. Of ten clips the fifth is for validation and the last for
    testing: whole clips, so that no frame has a near double among the training frames."""
    frames, actions = read_arrays(path)
    problem = problem_of(frames, actions)
    if problem:
        raise ValueError(f"--data {path}: {problem}")
    number = torch.arange(len(frames)) % 10
    which = {"train": (number != 4) & (number != 9), "valid": number == 4, "test": number == 9}
    return make_data({part: Clips(frames, actions, mask.nonzero().flatten())
                      for part, mask in which.items()},
                     [f"action {k}" for k in range(int(actions.max()) + 1)])


def read_arrays(path):
    """The arrays `frames` and `actions` of an .npz, or of a folder of two .npy files."""
    names = ("frames", "actions")
    with reading(f"--data {path}"):
        if os.path.isdir(path):                        # mode c: a memory map, never written back
            return [np.load(Path(path, f"{name}.npy"), "c", allow_pickle=False) for name in names]
        file = np.load(path, allow_pickle=False)
        arrays = [file[n] for n in names if n in getattr(file, "files", ())]
        if [type(a) for a in arrays] != [np.ndarray] * 2:  # other things in a zip are bytes
            raise ValueError("an .npz with two arrays, `frames` and `actions`, is needed")
        return arrays


def problem_of(frames, actions):
    """What is wrong with these arrays, in one line; None if nothing is."""
    if frames.ndim != 5 or frames.shape[-1] != 3:
        return f"frames {frames.shape}, must be (N, T, H, W, 3): in colour"
    if frames.dtype != np.uint8:
        return f"frames are {frames.dtype}, must be uint8 (0 .. 255)"
    N, T, H, W, _ = frames.shape
    if T < GIVEN + GENERATED:
        return f"clips of {T} frames; at least {GIVEN} + {GENERATED} are needed"
    if N < 10:
        return f"{N} clips; at least 10 are needed, of which one is for validation, one for testing"
    if H % FACTOR or W % FACTOR or min(H, W) < 4 * FACTOR:
        return (f"frames of {H} x {W}; both sides must be multiples of {FACTOR}, the product of "
                f"the encoder's strides, from {4 * FACTOR} up")
    if actions.shape not in ((N, T), (N, T - 1)):
        return f"actions are {actions.shape}, must be ({N}, {T}) or ({N}, {T - 1})"
    if actions.dtype.kind not in "iu" or not 0 <= actions.min() <= actions.max() < 256:
        return (f"actions must be integers from 0 to 255, found {actions.dtype} from "
                f"{actions.min()} to {actions.max()}")


def make_parser():
    parser = Parser("video", PRESETS, description=__doc__)
    parser.uses = ("play",)
    parser.free = parser.free | {"prior_batch_size", "prior_lr", "judge_steps", "temperature"}
    flag = parser.add_argument
    flag("--play", nargs="?", const="", metavar="ACTIONS", help="walk through the imagination of "
         "the finished run in --out: a window and arrow keys; with actions (left,left,forward) a "
         "GIF")
    flag("--warmup-steps", type=positive(int), help="steps as a plain autoencoder, before the "
         "codebook starts at its outputs (the paper has none)")
    flag("--prior-batch-size", type=positive(int), help="frames per step of the prior")
    flag("--prior-lr", type=positive(float), help="Adam's learning rate for the prior")
    flag("--judge-steps", type=positive(int), help="training steps of the network that judges "
         "which action imagined frames show")
    flag("--no-actions", action="store_true", help="a prior that is not conditioned on actions "
         "(the paper: \"similar results, not shown\")")
    flag("--res-hidden", type=positive(int), help="channels inside a residual block")
    flag("--prior-layers", type=positive(int), help="layers of its PixelCNN")
    flag("--temperature", type=positive(float), help="of the roll-outs: below 1 likely codes "
         "become likelier (default 1)")
    flag("--demo-clips", type=positive(int), default=3500, help="training clips of the demo")
    return parser


# ---------------------------------------------------------------------------------------------
# Demo world: a first-person ray-caster in textured mazes
# ---------------------------------------------------------------------------------------------

ACTIONS = ("forward", "left", "right")
PARTS = ("train", "valid", "test", "unseen")


def demo_clips_of(args, part):
    """One part of the demo's data. "unseen" walks through other mazes than the rest."""
    world = World(seed=mix(args.seed, "unseen") if part == "unseen" else args.seed)
    count = args.demo_clips if part == "train" else max(10, args.demo_clips // 10)
    frames, actions, poses = demo_clips(world, count, GIVEN + GENERATED, seed=mix(args.seed, part))
    return Clips(frames, actions, world=world, poses=poses)


STEP, TURN = 0.15, 10             # a step in widths of a corridor, a turn in degrees
RADIUS = 0.3                      # nearer than this the walker does not come to a wall
VIEW = np.deg2rad(60)             # half the field of view, to the sides
EYE, WALL = 0.6, 1.2              # height of the eye and of the walls


class World:
    """Some mazes, and a camera that walks in them. All is known: any future can be rendered.

    The camera's columns are equal angles, as on a panorama: of 48 columns for 120 degrees a turn
    moves the whole picture by 4, which is one code. It takes twelve turns to see nothing of what
    was seen before: most of what ten turns show can be known.

    A pose is (maze, x, y, turns): the maze's number, the place on its grid, and the heading in
    turns of TURN degrees to the left; poses are arrays (n, 4), moved and rendered together.
    """

    def __init__(self, count=2, seed=0, size=7):
        rng = np.random.default_rng(seed)
        self.wall = np.stack([dig(size, rng) for _ in range(count)])      # (count, size, size)
        self.color = palette(rng.integers(6, size=self.wall.shape) / 6, 0.65)
        self.pattern = rng.integers(len(PATTERNS), size=self.wall.shape)
        self.floor = 0.75 * palette(rng.permutation(count) / count, 0.35)
        self.ceiling = palette(rng.permutation(count) / count, 0.35)

    def start(self, count, rng):
        """Poses in the middle of free cells, with any heading."""
        cells = np.argwhere(~self.wall)[rng.integers((~self.wall).sum(), size=count)]
        turns = rng.integers(360 // TURN, size=(count, 1))
        return np.concatenate([cells + (0, 0.5, 0.5), turns], 1)

    def move(self, pose, action):
        """One action each. A wall stops the part of a step that goes into it, and no other."""
        maze, x, y, turns = pose.T
        turns = (turns + (action == 1) - (action == 2)) % (360 // TURN)
        angle, step = np.deg2rad(turns * TURN), STEP * (action == 0)
        x = np.where(self.free(maze, x + step * np.cos(angle), y), x + step * np.cos(angle), x)
        y = np.where(self.free(maze, x, y + step * np.sin(angle)), y + step * np.sin(angle), y)
        return np.stack([maze, x, y, turns], 1)

    def free(self, maze, x, y):
        corners = [self.wall[maze.astype(int), (x + i).astype(int), (y + j).astype(int)]
                   for i in (-RADIUS, RADIUS) for j in (-RADIUS, RADIUS)]
        return ~np.any(corners, 0)

    def walk(self, pose, actions):
        """The poses (n, T, 4) that the actions (n, T) lead through, `pose` (n, 4) not included."""
        poses = []
        for action in actions.T:
            pose = self.move(pose, action)
            poses.append(pose)
        return np.stack(poses, 1)

    def render(self, pose, size):
        """poses (..., 4) -> pictures (..., size, 2 * size, 3) uint8."""
        flat = pose.reshape(-1, 4)
        images = np.empty((len(flat), size, 2 * size, 3), np.uint8)

        def fill(k):  # few pictures at a time, for the cache
            images[k:k + 16] = self.look(flat[k:k + 16], size)

        with ThreadPoolExecutor() as pool:             # numpy works outside Python's lock
            list(pool.map(fill, range(0, len(flat), 16)))
        return images.reshape(*pose.shape[:-1], size, 2 * size, 3)

    def look(self, pose, size):
        """Two rays a pixel each way, averaged: smooth edges."""
        maze = pose[:, 0].astype(int)
        x, y, angle = (pose[:, i, None].astype(np.float32) for i in (1, 2, 3))
        across = ((np.arange(4 * size, dtype=np.float32) + 0.5) / (2 * size) - 1) * np.float32(VIEW)
        angle = np.deg2rad(angle * TURN) - across      # (n, columns)
        dx, dy = np.cos(angle), np.sin(angle)
        depth, through_y, i, j = self.cast(maze, x, y, dx, dy)
        along = np.where(through_y, x + depth * dx, y + depth * dy) % 1
        color = self.color[maze[:, None], i, j] * np.where(through_y, 0.8, 1)[..., None]

        up = -across[size:-size, None]                 # (rows, 1): half as far as to the sides
        height = (EYE + up * depth[:, None]) / WALL    # (n, rows, columns), 0 .. 1 on the wall
        wall = (height > 0) & (height < 1)
        flat = np.where(up < 0, EYE, WALL - EYE) / abs(up)               # to floor or ceiling
        depth = np.where(wall, depth[:, None], flat.astype(np.float32))
        texel = PATTERNS[self.pattern[maze[:, None], i, j][:, None],
                         (height.clip(0, 0.99) * 16).astype(np.int8),
                         (along * 16).astype(np.int8)[:, None]]
        tone = np.where(wall, texel, 1) * np.exp(depth * np.float32(-0.35))  # far away is dark
        image = np.where(wall[..., None], color[:, None].astype(np.float32), np.where(
            up[..., None] < 0, self.floor[maze, None, None], self.ceiling[maze, None, None]))
        image *= tone[..., None]                       # (n, rows, columns, 3)
        image = image.reshape(len(pose), size, 2, 2 * size, 2, 3).mean((2, 4))
        return (image * 255).round().astype(np.uint8)

    def cast(self, maze, x, y, dx, dy):
        """Follow rays from cell to cell up to a wall: distance (n, columns), whether the ray came
        through a side of constant y, and the wall's cell."""
        i, j = (np.broadcast_to(p, dx.shape).astype(int) for p in (x, y))
        # Distance between two sides of constant x (y), and to the next one.
        gap_x, gap_y = (1 / np.maximum(abs(d), 1e-6) for d in (dx, dy))
        next_x = np.where(dx < 0, x - i, i + 1 - x) * gap_x
        next_y = np.where(dy < 0, y - j, j + 1 - y) * gap_y
        step_x, step_y = np.where(dx < 0, -1, 1), np.where(dy < 0, -1, 1)
        depth, through_y = np.zeros_like(dx), np.zeros(dx.shape, bool)
        flying = np.ones(dx.shape, bool)
        while flying.any():
            by_x = flying & (next_x < next_y)
            by_y = flying & ~by_x
            depth = np.where(by_x, next_x, np.where(by_y, next_y, depth))
            through_y = np.where(flying, by_y, through_y)
            i, j = i + step_x * by_x, j + step_y * by_y
            next_x, next_y = next_x + gap_x * by_x, next_y + gap_y * by_y
            flying &= ~self.wall[maze[:, None], i, j]
        return depth.astype(np.float32), through_y, i, j


def dig(size, rng):
    """A maze (size, size): True is wall. Every odd cell is reached by a walk that turns back at
    dead ends; then half of the walls inside go, for loops and small rooms."""
    wall, path = np.ones((size, size), bool), [(1, 1)]
    wall[1, 1] = False
    while path:
        x, y = path[-1]
        ways = [(x + dx, y + dy) for dx, dy in ((2, 0), (-2, 0), (0, 2), (0, -2))
                if 0 < x + dx < size and 0 < y + dy < size and wall[x + dx, y + dy]]
        if not ways:
            path.pop()
            continue
        to = ways[rng.integers(len(ways))]
        wall[to] = wall[(x + to[0]) // 2, (y + to[1]) // 2] = False
        path.append(to)
    wall[1:-1, 1:-1] &= rng.random((size - 2, size - 2)) > 0.5
    return wall


def palette(hue, saturation):
    """Hue in [0, 1) -> RGB, by three shifted cosines: (...) -> (..., 3)."""
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (hue[..., None] - np.array([0, 1 / 3, 2 / 3])))
    return (1 - saturation * (1 - wave)).astype(np.float32)


# Brightness of the walls' textures, (pattern, height, along): checks, a stripe, a picture. Each
# has edges that run up the wall: from anywhere, a turn and a step can be told from standing.
height, along = np.meshgrid(*[(np.arange(16) + 0.5) / 16] * 2, indexing="ij")
PATTERNS = np.where([(height < 0.5) ^ (along < 0.5), along < 0.5, (abs(height - 0.5) < 0.25) &
                     (abs(along - 0.5) < 0.3)], 0.6, 1).astype(np.float32)


def demo_clips(world, count, length, size=24, seed=0):
    """Random walks: frames (count, length, size, 2 * size, 3) uint8, actions (count, length) int64,
    poses (count, length, 4). The walker likes to go on with what it does, and mostly turns at
    walls: what a step into one does has to be seen as well."""
    rng = np.random.default_rng(seed)
    pose, action = world.start(count, rng), rng.integers(3, size=count)
    poses, actions = [], []
    for _ in range(length):
        other = rng.choice(3, size=count, p=(0.4, 0.3, 0.3))
        action = np.where(rng.random(count) < 0.7, action, other)
        stuck = (world.move(pose, 0 * action) == pose).all(1) & (action == 0)
        turn = stuck & (rng.random(count) < 0.7)
        action = np.where(turn, rng.integers(1, 3, size=count), action)
        poses.append(pose)
        actions.append(action)
        pose = world.move(pose, action)
    poses = np.stack(poses, 1)
    return world.render(poses, size), np.stack(actions, 1), poses


if __name__ == "__main__":
    launch(make_parser(), load_data, main, use)
