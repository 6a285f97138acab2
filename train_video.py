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
rollout_long.png, reconstructions.png, curves.png, metrics.json, log.csv and the checkpoints.

--data: an .npz with `frames` (N, T, H, W, 3) uint8 and `actions` (N, T) or (N, T-1) integers
from 0; or a folder with frames.npy and actions.npy, which stay on the disk (a memory map).
actions[n, t] leads from frames[n, t] to frames[n, t + 1].
"""

import itertools
import math
import os
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
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

GIVEN, GENERATED = 6, 10          # frames of a roll-out, as in fig. 7
FACTOR = 4                        # pixels per code, each way

PRESETS = {
    # 24 x 48 x 3 -> 6 x 12 codes, for a laptop.
    "demo": dict(steps=1100, prior_steps=4600, judge_steps=500, batch_size=32, prior_batch_size=48,
                 lr=1e-3, prior_lr=3e-3, lr_decay=0.5, codebook="ema", num_codes=128, code_dim=32,
                 hidden=48, res_hidden=32, prior_channels=32, prior_layers=2),
    # DeepMind Lab, 84 x 84 x 3 -> 21 x 21, K = 512. The paper gives no more: Adam's rate and the
    # number of steps are those of its CIFAR-10 experiment.
    "paper": dict(steps=250_000, prior_steps=250_000, judge_steps=5000, batch_size=128,
                  prior_batch_size=128, lr=2e-4, prior_lr=2e-4, num_codes=512, code_dim=64,
                  hidden=128, res_hidden=32, prior_channels=128, prior_layers=10),
}


def main(run, data):
    """Sec. 4.4. (The models are made in here: a rehearsal on a few clips comes first.)"""
    args, model = run.args, make_model(run.args, data.facts)
    run.say("training clips: {} of {} frames, {}x{}x{}".format(*data.parts["train"].frames.shape))

    train, valid = data.stretches(1)                   # stage one: frames, uniform p(z)
    run.fit("vqvae", model.vqvae, lambda net, x, action: vqvae_loss(net, x[:, 0], args.num_codes),
            train, args.steps, args.batch_size, args.lr, valid)
    model.vqvae.requires_grad_(False)
    codes = {part: model.encode(clips.frames) for part, clips in data.parts.items()}

    train, valid = data.stretches(GIVEN + 1, codes, args.num_codes)    # stage two: p(z | actions)
    run.fit("prior", model.prior, lambda net, z, action: prior_loss(
        net, z, None if args.no_actions else action),
        train, args.prior_steps, args.prior_batch_size, args.prior_lr, valid)

    train, valid = data.stretches(2)                   # of measurements, no part of the model
    judge = run.fit("judge", make_judge(len(data.facts["actions"])), judge_loss, train,
                    args.judge_steps, args.batch_size, args.lr, valid)
    if run.rank == 0:
        metrics, rows = measure(run, model, judge, data, codes)        # roll-outs
        draw(run, model, data.parts["test"], rows)     # fig. 7
        run.finish(metrics)


# -- The two stages -----------------------------------------------------------------------------


class Model(NamedTuple):
    """What a run trains, and what `load` gives back."""

    vqvae: VQVAE
    prior: VideoPrior
    names: list          # of the actions
    args: object         # the run's flags

    @property
    def device(self):
        return next(self.vqvae.parameters()).device

    @torch.no_grad()
    def encode(self, frames, size=8):
        """Frames (N, T, 3, H, W) uint8 -> codes (N, T, h, w), on the CPU, in the smallest dtype."""
        dtype = smallest_int(self.args.num_codes + 1)  # K stands for "no frame"
        return torch.cat([self.vqvae.encode(x.flatten(0, 1).to(self.device)).to("cpu", dtype)
                          for x in frames.split(size)]).unflatten(0, frames.shape[:2])

    @torch.no_grad()
    def decode(self, codes, size=128):
        """The way back: codes (N, T, h, w) -> frames (N, T, 3, H, W) uint8, on the CPU."""
        return torch.cat([self.vqvae.decode(z.long()).cpu() for z in batches(
            codes.flatten(0, 1), size, self.device)]).unflatten(0, codes.shape[:2])

    def imagine(self, frames, actions, temperature=None, seed=0, size=50):
        """Frames (N, T, 3, H, W) uint8, T >= 1, and what follows if actions (N, n) int64 are taken
        next: (N, T + n, 3, H, W). All codes come first, "purely in the latent space"; pictures
        are made of them after that. A model without actions asks `actions` for n alone."""
        generator = torch.Generator(self.device).manual_seed(seed)
        codes = [self.continued(z, a, temperature or self.args.temperature, generator)
                 for z, a in zip(self.encode(frames).split(size), actions.split(size))]
        return torch.cat([frames, self.decode(torch.cat(codes))], 1)

    def continued(self, codes, actions, temperature, generator):
        """Codes (B, T, h, w), actions (B, n) -> the next n code maps (B, n, h, w)."""
        plan = F.pad(actions, (codes.shape[1] - 1, 0), value=-1)       # -1: not looked at
        return self.prior.sample(codes.to(self.device).long(), plan.to(self.device) if
                                 self.prior.num_actions else None, actions.shape[1], temperature,
                                 generator)


def make_model(args, facts):
    vqvae = VQVAE(make_quantizer(args), Gaussian(facts["variance"]), hidden=args.hidden,
                  res_hidden=args.res_hidden)
    prior = VideoPrior(args.num_codes, 0 if args.no_actions else len(facts["actions"]),
                       args.prior_channels, args.prior_layers, context=GIVEN)
    return Model(vqvae, prior.to(memory_format=torch.channels_last), facts["actions"], args)


def vqvae_loss(net, x, num_codes):
    y = net(x)
    mse = F.mse_loss(y.out.detach().float(), to_unit(x)) * 255 ** 2
    return y.loss, {"mse": mse, "codes_used": count_codes(y.codes, num_codes)}


def prior_loss(net, z, action):
    """-log p(z_t | z_<t, a_(t-1)), teacher-forced: the frames before, z[:, :-1], are recorded ones.
    z (B, GIVEN + 1, h, w); action (B,) leads to the last frame, or None."""
    z = z.long()
    if action is not None:  # of the earlier ones the prior sees what they did, in the frames
        action = F.pad(action[:, None], (GIVEN - 1, 0), value=-1)
    loss = F.cross_entropy(net(z, action, last=1), z[:, -1:])          # nats per code
    return loss, {"bits_per_code": loss.detach() / math.log(2)}


def make_judge(num_actions, width=32):
    """Inverse dynamics: which action leads from a frame to the next? (B, 2, 3, H, W) in
    [-0.5, 0.5] -> logits (B, actions). Trained on real frames, it is asked about imagined ones:
    after some steps two different futures may both be right, but a left turn must look like one."""
    layers = [nn.Flatten(1, 2)]
    for i, o in ((6, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv2d(i, o, 5, 2, 2), nn.GroupNorm(1, o), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((2, 4)), nn.Flatten(),
                         nn.Linear(16 * width, 4 * width), nn.ReLU(),
                         nn.Linear(4 * width, num_actions))


def judge_loss(net, pair, action):
    logits = net(to_unit(pair))
    right = (logits.detach().argmax(1) == action).float().mean()
    return F.cross_entropy(logits, action), {"accuracy": right}


# -- Measurements: metrics.json -----------------------------------------------------------------

# Clips that were imagined, and what really happens (None if it is not known): (N, T, 3, H, W), of
# which GIVEN frames were given; actions (N, T - GIVEN).
RollOut = namedtuple("RollOut", "name actions imagined truth")


def measure(run, model, judge, data, codes):
    """Settings are chosen by what is measured on "valid", nothing by "test" and "unseen" mazes."""
    metrics, rows = {}, {}
    for part in [part for part in codes if part != "train"]:
        run.say(f"imagining what follows {GIVEN} frames of {part} clips")
        clips, rows[part] = data.parts[part], roll_outs(run, model, data.parts[part])
        found = (measure_codes(model, clips, codes[part])
                 | measure_roll_outs(model, judge, rows[part]))
        metrics |= {k if part == "test" else f"{part}_{k}": x for k, x in found.items()}
    return metrics, rows["test"]


def roll_outs(run, model, clips):
    """Of up to 100 clips: for the recorded actions, and for each constant one."""
    T, length = clips.frames.shape[1], min(clips.frames.shape[1], GIVEN + GENERATED)
    frames, actions = (x[:100, :T // length * length].unflatten(1, (-1, length)).flatten(0, 1)[:100]
                       for x in (clips.frames, F.pad(clips.actions, (0, 1))))
    given, taken = frames[:, :GIVEN], actions[:, GIVEN - 1:-1]
    plans = {"recorded actions": taken} | {
        f"only {name}": torch.full_like(taken, k)
        for k, name in enumerate(model.names[:min(4, model.prior.num_actions)])}
    return [RollOut(name, plan, model.imagine(given, plan, seed=run.args.seed),
                    frames if plan is taken else clips.truth(plan)) for name, plan in plans.items()]


def measure_codes(model, clips, codes):
    error = sum((model.decode(z).float() - x).square().sum().item()
                for x, z in zip(clips.frames.split(8), codes.split(8))) / clips.frames.numel()
    counts = count_codes(codes.long(), model.args.num_codes)
    bits = codes[0, 0].numel() * math.log2(len(counts))
    metrics = {"psnr": 10 * math.log10(255 ** 2 / max(error, 1e-2)),
               "codes_used": int((counts > 0).sum()), "num_codes": len(counts),
               "perplexity": perplexity(counts).item(),
               "compression": clips.frames[0, 0].numel() * 8 / bits if bits else math.inf,
               "bits_per_code": bits_per_code(model.prior, codes, clips.actions)}
    if model.prior.num_actions:
        metrics["bits_per_code_shuffled_actions"] = bits_per_code(
            model.prior, codes, clips.actions.roll(1, 0))
    return metrics


@torch.no_grad()
def bits_per_code(prior, codes, actions, size=4):
    """-log2 p(z_t | z_<t, a_<t) of the frames after the first GIVEN."""
    device, nats = next(prior.parameters()).device, 0
    for z, a in zip(codes.split(size), actions.split(size)):
        z = z.to(device).long()
        logits = prior(z, a.to(device) if prior.num_actions else None, last=z.shape[1] - GIVEN)
        nats += F.cross_entropy(logits, z[:, GIVEN:], reduction="sum").item()
    return nats / codes[:, GIVEN:].numel() / math.log(2)


def measure_roll_outs(model, judge, rows):
    """Lists by step. PSNR is over moving clips: at a wall, copying the last frame is unbeatable."""
    (_, actions, imagined, truth), *constant = rows
    moving, since = is_moving(truth), slice(GIVEN - 1, None)           # from the last given frame
    decoded = model.decode(model.encode(truth[:, since]))
    metrics = {f"psnr_{name}": psnr(x[moving], truth[moving, GIVEN:]) for name, x in (
        ("generated", imagined[:, GIVEN:]), ("copy_last", truth[:, GIVEN - 1:GIVEN]),
        ("reconstruction", decoded[:, 1:]))}
    edges, of_real = (sum(x.float().diff(dim=d).abs().mean((0, 2, 3, 4)) for d in (-1, -2))
                      for x in (imagined[:, GIVEN:], decoded[:, 1:]))  # blur lowers them
    metrics["sharpness"] = (edges / of_real).tolist()
    metrics["judge_real"] = judge_accuracy(judge, truth[:, since], actions)
    metrics["judge_imagined"] = judge_accuracy(
        judge, torch.cat([decoded[:, :1], imagined[:, GIVEN:]], 1), actions)
    if constant and constant[0].truth is not None:
        metrics["action_accuracy"] = action_accuracy(constant)
    return metrics


def is_moving(truth):
    """Clips in which every frame differs from the last given one; all clips, if none does. (N,)"""
    error = (truth[:, GIVEN:].float() - truth[:, GIVEN - 1:GIVEN]).square().mean((2, 3, 4))
    moving = (error > 255 ** 2 / 10 ** 3).all(1)       # below 30 dB
    return moving | ~moving.any()


def psnr(a, b):
    """Clips (N, T, 3, H, W) -> 10 log10(255^2 / mean squared error) in dB, a list over T."""
    error = (a.float() - b.float()).square().mean((0, 2, 3, 4))
    return (10 * torch.log10(255 ** 2 / error.clamp(min=1e-2))).tolist()


def action_accuracy(rows):
    """Roll-outs of constant actions, a row each -> the share that is nearer to the ground truth of
    its own action than to that of any other."""
    error = torch.stack([torch.stack([
        (row.imagined.float() - other.truth.float()).square().mean((1, 2, 3, 4))
        for other in rows]) for row in rows])          # (actions, compared with, N)
    own = torch.eye(len(rows), dtype=torch.bool)
    return (error[own] < error.masked_fill(own[..., None], math.inf).amin(1)).float().mean().item()


@torch.no_grad()
def judge_accuracy(judge, film, actions):
    """Clips (N, n + 1, 3, H, W), actions (N, n): how often the judge names the action, by step."""
    pairs = film.unfold(1, 2, 1).movedim(-1, 2).flatten(0, 1)          # (N * n, 2, 3, H, W)
    guesses = [judge(to_unit(x)).argmax(1).cpu()
               for x in batches(pairs, 100, next(judge.parameters()).device)]
    return (torch.cat(guesses).view_as(actions) == actions).float().mean(0).tolist()


# -- Pictures -----------------------------------------------------------------------------------


def draw(run, model, clips, rows):
    frames = clips.frames[:8, -1:]                     # (8, 1, 3, H, W)
    run.picture("reconstructions", torch.cat([frames, model.decode(model.encode(frames))], 1)
                .transpose(0, 1), "test frames, each above its reconstruction")
    draw_films(run, "rollout", [row._replace(imagined=row.imagined[:2]) for row in rows])

    # 100 frames after those given to a few clips, for the recorded actions of many.
    first, n = rows[0], 5 if run.rehearsing else 100
    taken = first.actions.flatten().repeat(4 * n)[:4 * n].view(4, n)[:len(first.actions)]
    film = model.imagine(first.truth[:len(taken), :GIVEN], taken, seed=run.args.seed)
    draw_films(run, "rollout_long", [RollOut(first.name, taken, film, clips.truth(taken))], 5)

    # rollout.gif: one sequence of actions after the other, for the median of the moving test clips
    # by the error of the recorded actions' roll-out: neither a lucky nor an unlucky one.
    error = (first.imagined.float() - first.truth.float()).square().mean((1, 2, 3, 4))
    moving = is_moving(first.truth).nonzero().flatten()
    n = moving[error[moving].argsort()[len(moving) // 2]]
    truth = [0 * row.imagined[n] if row.truth is None else row.truth[n] for row in rows]
    run.write("rollout.gif", lambda file: save_film(
        file, torch.cat([row.imagined[n] for row in rows]), torch.cat(truth),
        [f"{row.name}, {t:+d}" for row in rows for t in range(1 - GIVEN, 1 + GENERATED)]))


def draw_films(run, name, rows, every=1):
    """As the paper's fig. 7: frames given, then imagined; the ground truth in the row below."""
    steps = range(1 - GIVEN if every == 1 else 0, rows[0].actions.shape[1] + 1, every)
    at, films = [t + GIVEN - 1 for t in steps], []
    for n in range(len(rows[0].imagined)):
        for row in rows:
            films.append((f"{row.name}: imagined", row.imagined[n, at]))
            if row.truth is not None:
                films.append(("ground truth", row.truth[n, at]))
    labels, films = zip(*films)
    run.picture(name, torch.stack(films), f"{GIVEN} frames are given, up to +0; the others are "
                "imagined, all codes before the first picture", [f"{t:+d}" for t in steps], labels)


def save_film(file, imagined, truth, captions, width=320):
    """A GIF of frames (T, 3, H, W) and, where it is known, the ground truth on the right."""
    from PIL import Image, ImageDraw, ImageFont
    scale, pictures = max(1, round(width / imagined.shape[3])), []
    films = [F.pad(film.repeat_interleave(scale, 2).repeat_interleave(scale, 3), (4, 4, 24, 4),
                   value=255) for film in (imagined, truth) if film is not None]
    for x, caption in zip(torch.cat(films, 3), captions):              # (3, height, width)
        pictures.append(Image.fromarray(x.permute(1, 2, 0).numpy()))
        text = f"imagined: {caption}" + "   (right: ground truth)" * (truth is not None)
        ImageDraw.Draw(pictures[-1]).text((4, 3), text, "black", ImageFont.load_default(15))
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=350, loop=0)


# -- Using a finished run: load, --play ---------------------------------------------------------


def load(folder="runs/video", device="auto"):
    """The trained Model of a finished run, in eval mode; ValueError if there is none."""
    args, facts, weights = read_run(folder, "video", ["vqvae", "prior"])
    with reading(folder):                              # a checkpoint of another version, say
        model = make_model(args, facts)
        for net, state in zip(model[:2], weights):
            net.load_state_dict(state)
            net.to(pick_device(device)).eval().requires_grad_(False)
    return model


def use(args):
    """--play: a list of actions, or a window with arrow keys; then the walk as a GIF."""
    model = load(args.out, args.device)
    play = Play(model, load_parts(model.args, ["test"])[0]["test"], args.temperature)
    for word in args.play.split(",") if args.play else []:
        if word.strip() not in play.words:
            raise ValueError(f"--play {word}: no such action; there are: {', '.join(play.words)}")
        play.act(play.words[word.strip()])
    if not args.play:
        import matplotlib.pyplot as plt
        figure = plt.figure("train_video.py --play", (11, 3))
        if figure.canvas.required_interactive_framework is None:
            raise ValueError("--play: no display for a window; --play left,left writes a GIF")
        play.open(figure)
        plt.show()                                     # until the window is closed
    with open(Path(args.out, "play.gif"), "wb") as file:
        save_film(file, play.film, play.truth(), ["given"] * GIVEN + [
            model.names[action] for action in play.actions])
    print(f"{len(play.film)} frames are in {file.name}")


class Play:
    """A walk through the imagination, from the given frames of a clip on: each action is one more
    code map, and the picture that the decoder makes of it."""

    def __init__(self, model, clips, temperature=None):
        self.model, self.clips = model, clips
        self.temperature = temperature or model.args.temperature
        n = len(model.names)                           # an action's words: name, number, key
        self.words = {str(word): k for words in (model.names, range(n), (
            "up", "left", "right", "down")[:n]) for k, word in enumerate(words)}
        self.restart(0)

    def restart(self, n):
        self.n, self.actions = n % len(self.clips.frames), []
        self.film = self.clips.frames[self.n, :GIVEN]                  # (T, 3, H, W)
        self.codes = self.model.encode(self.film[None])                # (1, T, h, w)
        self.generator = torch.Generator(self.model.device).manual_seed(0)

    def act(self, action):
        z = self.model.continued(self.codes[:, -GIVEN:], torch.tensor([[action]]),
                                 self.temperature, self.generator).to(self.codes)
        self.actions.append(action)
        self.codes = torch.cat([self.codes, z], 1)
        self.film = torch.cat([self.film, self.model.decode(z)[0]])

    def truth(self):
        film = self.clips.truth(torch.tensor([self.actions]).long(), self.n)
        return None if film is None else film[0]

    def open(self, figure):
        """Walk by the keyboard, in a matplotlib figure."""
        if figure.canvas.manager is not None:          # matplotlib's own keys: left is "back" there
            figure.canvas.mpl_disconnect(figure.canvas.manager.key_press_handler_id)
        figure.canvas.mpl_connect("key_press_event", self.on_key)
        figure.text(0.02, 0.02, f"arrows or numbers: {', '.join(self.model.names)}    n: another "
                    "clip    close the window: the walk is saved as play.gif")
        # A colour for each code: ranks along three random directions, so that similar ones match.
        e = self.model.vqvae.quantizer.codebook.cpu()  # (K, D)
        ranks = (e @ torch.randn(e.shape[1], 3)).argsort(0).argsort(0)
        self.colors, self.axis = (255 * ranks / len(e)).byte(), figure.add_subplot()
        self.show()

    def show(self):
        sheets = [self.film, self.colors[self.codes.long()][0].permute(0, 3, 1, 2)
                  .repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3), self.truth()]
        self.axis.clear()
        self.axis.axis("off")
        self.axis.set_title("imagined, its codes, and the ground truth where it is known")
        self.axis.imshow(torch.cat([x[-1] for x in sheets if x is not None], 2).permute(1, 2, 0))
        self.axis.figure.canvas.draw_idle()

    def on_key(self, event):
        if event.key in self.words:
            self.act(self.words[event.key])
        elif event.key == "n":
            self.restart(self.n + 1)
        self.show()


# -- Data ---------------------------------------------------------------------------------------

# A part of the data: frames (N, T, 3, H, W) uint8, perhaps a view of a memory map; actions (N, T-1)
# int64: actions[:, t] leads from frames[:, t] to the next; truth: see demo_part.
Clips = namedtuple("Clips", "frames actions truth", defaults=[lambda actions, first=0: None])


class Stretches(torch.utils.data.Dataset):
    """All stretches of `length` consecutive frames (or code maps) x (N, T, ...), each with the
    action that leads to its last one; -1, "none", leads to the first of a clip.
    For Run.fit: self[index (B,)] -> stretches (B, length, ...), actions (B,)."""

    def __init__(self, x, actions, length):
        self.x = x.unfold(1, length, 1)                # a view (N, T', ..., length)
        self.actions = F.pad(actions, (1, 0), value=-1)[:, -self.x.shape[1]:]

    def __len__(self):
        return self.actions.numel()

    def __getitem__(self, index):
        n, t = index // self.x.shape[1], index % self.x.shape[1]
        return self.x[n, t].movedim(-1, 1), self.actions[n, t]


class Data(namedtuple("Data", "parts facts")):
    """parts: Clips by name ("train", "valid", "test", in the demo "unseen"). facts: what models and
    results depend on."""

    def few(self):
        """For the rehearsal: two clips, two frames to imagine. "unseen" is the same as "test"."""
        return self._replace(parts={
            part: Clips(frames[:2, :GIVEN + 2], actions[:2, :GIVEN + 1], truth)
            for part, (frames, actions, truth) in self.parts.items() if part != "unseen"})

    def stretches(self, length, codes=None, num_codes=0):
        """Training and validation sets of frames, or of codes. Those of codes begin before their
        clip, with the code K, "no frame": the first frame is learned as well."""
        return [Stretches(self.parts[part].frames if codes is None else
                          F.pad(codes[part], (0, 0, 0, 0, length - 1, 0), value=num_codes),
                          self.parts[part].actions, length) for part in ("train", "valid")]


def load_data(run):
    parts, names = load_parts(run.args)
    train = parts["train"].frames
    check_batch(len(train) * (train.shape[1] - 1), max(
        run.args.batch_size, run.args.prior_batch_size), "frames",
        "--batch-size or --prior-batch-size")
    some = to_unit(train[torch.linspace(0, len(train) - 1, 200).long(), ::4])
    return Data(parts, {"actions": names, "size": list(train.shape[-2:]), "digest": digest(train),
                        "variance": some.var().item()})                # of x, for eq. 3's first term


def load_parts(args, wanted=("train", "valid", "test", "unseen")):
    """Clips by part, and the names of their actions. The last tenth of your own clips is for
    testing, the one before for validation: neighbours in a recording may be near doubles."""
    if args.data is None:
        return {part: demo_part(args, part) for part in wanted}, list(ACTIONS)
    frames, actions = read_arrays(args.data)
    a, b = -2 * (len(frames) // 10), -(len(frames) // 10)
    cut = {"train": slice(a), "valid": slice(a, b), "test": slice(b, None)}
    return ({part: Clips(frames[n], actions[n]) for part, n in cut.items()},
            [f"action {k}" for k in range(int(actions.max()) + 1)])


def read_arrays(path):
    """--data (see the top of this file) -> frames (N, T, 3, H, W), actions (N, T-1)."""
    with reading(f"--data {path}"):
        if os.path.isdir(path):                        # mode c: mapped, and never written back
            frames, actions = (np.load(Path(path, f"{name}.npy"), "c", allow_pickle=False)
                               for name in ("frames", "actions"))
        else:
            with np.load(path, allow_pickle=False) as file:
                frames, actions = (np.asarray(file[name]) for name in ("frames", "actions"))
    N, T, H, W, C = frames.shape if frames.ndim == 5 else [0] * 5
    if not (frames.dtype == np.uint8 and C == 3 and N >= 10 and T >= GIVEN + GENERATED
            and H % FACTOR == W % FACTOR == 0 and min(H, W) >= 4 * FACTOR
            and actions.shape in ((N, T), (N, T - 1)) and actions.dtype.kind in "iu"
            and 0 <= actions.min() <= actions.max() < 256):
        raise ValueError(
            f"--data {path}: frames {frames.shape} {frames.dtype}, actions {actions.shape} "
            f"{actions.dtype}; needed are frames (N, T, H, W, 3) uint8, N >= 10, T >= "
            f"{GIVEN + GENERATED}, H and W multiples of {FACTOR} from {4 * FACTOR} up, and actions "
            "(N, T) or (N, T-1), integers from 0 to 255")
    return to_frames(frames), torch.from_numpy(actions[:, :T - 1].astype(np.int64))


def to_frames(array):
    return torch.from_numpy(array).permute(0, 1, 4, 2, 3)              # (N, T, 3, H, W), no copy


def make_parser():
    parser = Parser("video", PRESETS, description=__doc__)
    parser.uses = ("play",)
    parser.free = parser.free | {"prior_batch_size", "prior_lr", "judge_steps", "temperature"}
    flag = parser.add_argument
    flag("--play", nargs="?", const="", metavar="ACTIONS", help="walk through the imagination of "
         "the finished run in --out, by arrow keys in a window, or by a list: left,left,forward")
    flag("--prior-batch-size", type=positive(int), help="frames per step of the prior")
    flag("--prior-lr", type=positive(float), help="Adam's learning rate for the prior")
    flag("--judge-steps", type=positive(int), help="training steps of the network that judges "
         "which action imagined frames show")
    flag("--no-actions", action="store_true", help="a prior that is not conditioned on actions "
         "(the paper: \"similar results, not shown\")")
    flag("--res-hidden", type=positive(int), help="channels inside a residual block")
    flag("--prior-layers", type=positive(int), help="layers of its PixelCNN")
    flag("--temperature", type=positive(float), default=1.0, help="of the roll-outs: below 1 "
         "likely codes become likelier")
    flag("--demo-clips", type=positive(int), default=3500, help="training clips of the demo")
    return parser


# -- Demo world: a first-person ray-caster in textured mazes ------------------------------------

ACTIONS = ("forward", "left", "right")
STEP, TURN = 0.15, 10             # a step in widths of a corridor, a turn in degrees
RADIUS = 0.3                      # nearer than this the walker does not come to a wall
VIEW = np.deg2rad(60)             # half the field of view, to the sides
EYE, WALL = 0.6, 1.2              # height of the eye and of the walls


def demo_part(args, part):
    """One part of the demo's data. "unseen" walks through other mazes than the rest."""
    world = World(seed=mix(args.seed, "unseen") if part == "unseen" else args.seed)
    count = args.demo_clips if part == "train" else max(10, args.demo_clips // 10)
    frames, actions, poses = demo_clips(world, count, GIVEN + GENERATED, seed=mix(args.seed, part))

    def truth(actions, first=0):
        """GIVEN frames of clips first, .., and those that actions (n, T) really lead to then."""
        given = poses[first:first + len(actions), :GIVEN]
        later = world.walk(given[:, -1], actions.numpy())[:, 1:]
        return to_frames(world.render(np.concatenate([given, later], 1), frames.shape[2]))

    return Clips(to_frames(frames), torch.from_numpy(actions[:, :-1]), truth)


class World:
    """Some mazes, and a camera that walks in them. All is known: any future can be rendered.

    The camera's columns are equal angles, as on a panorama: of 48 columns for 120 degrees a turn
    moves the whole picture by 4, which is one code. It takes twelve turns to see nothing of what
    was seen before: most of what ten turns show can be known.

    Poses (n, 4) are moved and looked from together: the maze's number, x, y on its grid, and the
    heading in turns of TURN degrees to the left.
    """

    def __init__(self, count=2, seed=0, size=7):
        rng = np.random.default_rng(seed)
        self.wall = np.stack([dig(size, rng) for _ in range(count)])   # (count, size, size)
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
        return ~np.any([self.wall[maze.astype(int), (x + i).astype(int), (y + j).astype(int)]
                        for i in (-RADIUS, RADIUS) for j in (-RADIUS, RADIUS)], 0)

    def walk(self, pose, actions):
        """The poses (n, 1 + T, 4) that the actions (n, T) lead through, from `pose` (n, 4) on."""
        return np.stack(list(itertools.accumulate(actions.T, self.move, initial=pose)), 1)

    def render(self, poses, size):
        """Poses (n, T, 4) -> pictures (n, T, size, 2 * size, 3) uint8."""
        with ThreadPoolExecutor() as pool:             # numpy works outside Python's lock
            return np.stack(list(pool.map(lambda pose: self.look(pose, size), poses)))

    def look(self, pose, size):
        """Poses (n, 4) -> pictures. Two rays per pixel each way, averaged: smooth edges."""
        maze = pose[:, 0].astype(int)
        x, y, turns = (pose[:, i, None].astype(np.float32) for i in (1, 2, 3))
        across = ((np.arange(4 * size, dtype=np.float32) + 0.5) / (2 * size) - 1) * np.float32(VIEW)
        angle = np.deg2rad(turns * TURN) - across      # (n, columns)
        dx, dy = np.cos(angle), np.sin(angle)
        depth, through_y, i, j = self.cast(maze, x, y, dx, dy)
        along = np.where(through_y, x + depth * dx, y + depth * dy) % 1
        color = self.color[maze[:, None], i, j] * np.where(through_y, 0.8, 1)[..., None]

        up = -across[size:-size, None]                 # (rows, 1): half as far as to the sides
        height = (EYE + up * depth[:, None]) / WALL    # (n, rows, columns), 0 .. 1 on the wall
        wall = (height > 0) & (height < 1)
        flat = np.where(up < 0, EYE, WALL - EYE) / abs(up)             # to floor or ceiling
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
        depth, through_y = np.zeros_like(dx), np.zeros(dx.shape, bool)
        flying = np.ones(dx.shape, bool)
        while flying.any():
            by_x, by_y = flying & (next_x < next_y), flying & (next_x >= next_y)
            depth = np.where(by_x, next_x, np.where(by_y, next_y, depth))
            through_y = np.where(flying, by_y, through_y)
            i, j = i + np.where(dx < 0, -1, 1) * by_x, j + np.where(dy < 0, -1, 1) * by_y
            next_x, next_y = next_x + gap_x * by_x, next_y + gap_y * by_y
            flying &= ~self.wall[maze[:, None], i, j]
        return depth.astype(np.float32), through_y, i, j


def dig(size, rng):
    """A maze (size, size): True is wall. Every odd cell opens up or to the left, so that a way leads
    to each; then half of the other walls inside go, for loops and small rooms."""
    wall = np.ones((size, size), bool)
    wall[1::2, 1::2] = False
    for x, y in np.argwhere(~wall)[1:]:
        up = y == 1 or x > 1 and rng.random() < 0.5
        wall[(x - 1, y) if up else (x, y - 1)] = False
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
    pose, action, poses, actions = world.start(count, rng), rng.integers(3, size=count), [], []
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
