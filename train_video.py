"""Video: frames -> VQ-VAE -> codes -> action-conditional prior -> imagined clips (sec. 4.4).

    python train_video.py                          demo world, no download, no GPU: minutes
    python train_video.py --play                   walk through what it has learned: arrow keys
    python train_video.py --play left,left,forward               the same walk as a GIF
    python train_video.py --data clips.npz --preset clips        first-person clips, on a laptop
    python train_video.py --data clips.npz --preset paper        the paper's sizes, on a GPU
    python train_video.py --resume                 resume runs/video where it stopped

A roll-out gets 6 frames and generates 10 "purely in the latent space"; the decoder makes pictures
of them at the end. --out (runs/video) receives rollout.png (the paper's fig. 7), rollout.gif,
rollout_long.png, metrics.json and checkpoints. For --data see .github/DATA.md.
"""

import itertools
import math
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from prior import VideoPrior
from vqvae import (VQVAE, Gaussian, Parser, check_batch, count_codes, depth, digest, fraction,
                   in_batches, launch, load_models, make_quantizer, mix, perplexity, positive,
                   reading, say, smallest_int, spread, to_unit, write_file)

GIVEN, GENERATED = 6, 10          # frames of a roll-out, as in fig. 7
FACTOR = 4                        # pixels per code, each way
PRESETS = {
    # 24 x 48 x 3 -> 6 x 12 codes, for a laptop.
    "demo": dict(steps=1100, prior_steps=7500, batch_size=32, prior_batch_size=48, lr=1e-3,
                 prior_lr=3e-3, lr_decay=0.5, codebook="ema", num_codes=128, code_dim=32, hidden=48,
                 res_hidden=32, prior_channels=32, prior_layers=2, temperature=0.7),
    # Walks of 84 x 84 x 3 -> 21 x 21 codes: two hours of one core in bf16, more in fp32.
    "clips": dict(steps=1200, prior_steps=21_000, batch_size=16, prior_batch_size=16, lr=1e-3,
                  prior_lr=2e-3, lr_decay=0.5, codebook="ema", num_codes=128, code_dim=64,
                  hidden=64, res_hidden=32, prior_channels=48, prior_layers=4, guidance=2.0),
    # DeepMind Lab, 84 x 84 x 3 -> 21 x 21, K = 512; rate and steps are those of CIFAR-10.
    "paper": dict(steps=250_000, prior_steps=250_000, batch_size=128, prior_batch_size=128, lr=2e-4,
                  prior_lr=2e-4, num_codes=512, code_dim=64, hidden=128, res_hidden=32,
                  prior_channels=128, prior_layers=10, guidance=1.0),
}


def main(run, data):
    """Sec. 4.4. (The models are made in here: a rehearsal on a few clips comes first.)"""
    args, model = run.args, make_model(run.args, data.facts)
    run.say("training clips: {} of {} frames, {}x{}x{}".format(*data.parts["train"].frames.shape))

    train, valid = data.stretches(1)                   # stage one: frames, uniform p(z)
    run.fit("vqvae", model.vqvae, lambda net, x, action: vqvae_loss(net, x[:, 0], args.num_codes),
            train, args.steps, args.batch_size, args.lr, valid)
    codes = {part: model.encode(clips.frames) for part, clips in data.parts.items()}

    train, valid = data.stretches(GIVEN + 1, codes, args.num_codes)    # stage two: p(z | actions)
    run.fit("prior", model.prior, lambda net, z, action: prior_loss(
        net, z, None if args.no_actions else action, 0.1 * (args.guidance != 1)),
        train, args.prior_steps, args.prior_batch_size, args.prior_lr, valid)

    train, valid = data.stretches(2)                   # of measurements, no part of the model
    judge = run.fit("judge", make_judge(len(model.names)), judge_loss, train,
                    min(args.steps, 5000), args.batch_size, args.lr, valid)
    if run.rank == 0:
        metrics, rows = measure(run, model, judge, data, codes)        # roll-outs
        draw(run, model, data.parts["test"], rows)     # fig. 7
        run.finish(metrics)


# -- The two stages -----------------------------------------------------------------------------

class Model(namedtuple("Model", "vqvae prior names args")):
    """What a run trains, and what `load` gives back; names: of the actions, args: the flags."""

    @property
    def device(self):
        return next(self.vqvae.parameters()).device

    def encode(self, frames, size=128):
        """Frames (N, T, 3, H, W) uint8 -> codes (N, T, h, w), on the CPU, in the smallest dtype."""
        dtype = smallest_int(self.args.num_codes + 1)  # K stands for "no frame"
        return in_batches(lambda x: self.vqvae.encode(x).to(dtype), self.device, size,
                          frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def decode(self, codes, size=128):
        """The way back: codes (N, T, h, w) -> frames (N, T, 3, H, W) uint8, on the CPU."""
        return in_batches(self.vqvae.decode, self.device, size, codes.flatten(0, 1)).unflatten(
            0, codes.shape[:2])

    def imagine(self, frames, actions, before=None, temperature=None, seed=0):
        """Frames (N, T, 3, H, W) uint8, T >= 1, and n more if actions (N, n) int64 are taken next
        (of a model without actions only n counts): (N, T + n, 3, H, W). before: what was done
        between the frames, (N, T-1). All codes come first, "purely in the latent space"."""
        generator = torch.Generator(self.device).manual_seed(seed)
        codes = self.continued(self.encode(frames), actions, before, temperature, generator)
        return torch.cat([frames, self.decode(codes)], 1)

    def continued(self, codes, actions, before, temperature, generator):
        """Codes (B, T, h, w), actions (B, n), those before (B, T-1) or None -> the next n maps."""
        plan = (F.pad(actions, (codes.shape[1] - 1, 0), value=-1) if before is None else
                torch.cat([before, actions], 1))
        return self.prior.sample(
            codes.to(self.device).long(), plan.to(self.device) if self.prior.num_actions else None,
            actions.shape[1], temperature or self.args.temperature or 1.0, generator,
            self.args.guidance if self.prior.num_actions else 1.0)


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


def prior_loss(net, z, action, hidden=0.0):
    """-log p(z_t | z_<t, a_(t-1)), teacher-forced: the frames before, z[:, :-1], are recorded.
    z (B, GIVEN + 1, h, w); action (B, GIVEN + 1) leads to each frame, or None. A share `hidden` of
    the examples lacks the last one (guidance needs p(z_t | z_<t)), an equal share those before."""
    z = z.long()
    if action is not None:
        seen = torch.rand(len(z), 2, device=z.device) >= hidden * net.training
        action = torch.where(seen[:, [0] * (GIVEN - 1) + [1]], action[:, 1:], -1)
    loss = F.cross_entropy(net(z, action, last=1), z[:, -1:])          # nats per code
    return loss, {"bits_per_code": loss.detach() / math.log(2)}


def make_judge(num_actions):
    """Inverse dynamics: which action leads from a frame to the next? (B, 2, 3, H, W) in [-0.5, 0.5]
    -> logits (B, actions). Of two futures both may be right, but a left turn must look like one."""
    layers = [nn.Flatten(1, 2)]
    for i, o in ((6, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(i, o, 5, 2, 2), nn.GroupNorm(1, o), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((2, 4)), nn.Flatten(), nn.Linear(512, 128),
                         nn.ReLU(), nn.Linear(128, num_actions))


def judge_loss(net, pair, action):
    logits, action = net(to_unit(pair)), action[:, 1]
    right = (logits.detach().argmax(1) == action).float().mean()
    return F.cross_entropy(logits, action), {"accuracy": right}


# -- Measurements: metrics.json -----------------------------------------------------------------

# Clips that were imagined, and what really happens (None if it is not known): (N, T, 3, H, W), of
# which GIVEN frames were given; actions (N, T - GIVEN), those before (N, GIVEN - 1).
RollOut = namedtuple("RollOut", "name actions imagined truth before", defaults=[None])


def measure(run, model, judge, data, codes):
    """Settings are chosen by what is measured on "valid", nothing by "test" and "unseen" mazes."""
    metrics, rows = {}, {}
    for part, clips in list(data.parts.items())[1:]:
        run.say(f"imagining what follows {GIVEN} frames of {part} clips")
        rows[part] = roll_outs(run, model, clips)
        found = measure_codes(model, clips, codes[part]) | measure_films(model, judge, rows[part])
        metrics |= {k if part == "test" else f"{part}_{k}": x for k, x in found.items()}
    return metrics, rows["test"]


def roll_outs(run, model, clips):
    """Of up to 100 clips: for the recorded actions, and for each constant one."""
    T, length = clips.frames.shape[1], min(clips.frames.shape[1], GIVEN + GENERATED)
    frames, actions = (x[:100, :T // length * length].unflatten(1, (-1, length)).flatten(0, 1)[:100]
                       for x in (clips.frames, F.pad(clips.actions, (0, 1))))
    given, before, taken = frames[:, :GIVEN], actions[:, :GIVEN - 1], actions[:, GIVEN - 1:-1]
    plans = {"recorded actions": taken} | {f"only {name}": torch.full_like(taken, k) for k, name in
                                           enumerate(model.names[:min(4, model.prior.num_actions)])}
    return [RollOut(name, plan, model.imagine(given, plan, before, seed=run.args.seed), frames if
                    plan is taken else clips.truth(plan), before) for name, plan in plans.items()]


def measure_codes(model, clips, codes):
    counts = count_codes(codes.long(), model.args.num_codes)
    bits = codes[0, 0].numel() * math.log2(max(2, len(counts)))        # of a frame
    bits_of = {"": clips.actions, "_shuffled_actions": clips.actions.roll((1, 1), (0, 1)),
               "_unknown_actions": torch.full_like(clips.actions, -1)}
    return {"codes_used": (counts > 0).sum().item(), "num_codes": len(counts),
            "perplexity": perplexity(counts).item(),
            "compression": clips.frames[0, 0].numel() * 8 / bits} | {
        f"bits_per_code{name}": bits_per_code(model.prior, codes, actions)
        for name, actions in bits_of.items() if model.prior.num_actions or not name}


def bits_per_code(prior, codes, actions, size=100, most=3000):
    """-log2 p(z_t | z_<t, a_<t) of frames after the first GIVEN, of evenly spread ones."""
    data, nats, device = Stretches(codes, actions, GIVEN + 1), 0, next(prior.parameters()).device
    chosen = spread(len(data), most)
    for index in chosen.split(size):
        z, action = (x.to(device) for x in data[index])
        nats += len(z) * prior_loss(prior, z, action if prior.num_actions else None)[0].item()
    return nats / len(chosen) / math.log(2)


def measure_films(model, judge, rows):
    """By step: PSNR in dB, over moving clips, as copying is unbeatable at a wall; sharpness: edges,
    relative to those of decoded frames; the judge's accuracy."""
    (_, actions, imagined, truth, _), *constant = rows
    moving, decoded = is_moving(truth), model.decode(model.encode(truth))
    later, metrics = slice(GIVEN, None), {}
    for name, x in (("generated", imagined), ("reconstruction", decoded),
                    ("copy_last", truth[:, GIVEN - 1:GIVEN].expand_as(truth))):
        error = (x[moving, later].float() - truth[moving, later]).square().mean((0, 2, 3, 4))
        metrics[f"psnr_{name}"] = (10 * torch.log10(255 ** 2 / error.clamp(min=1e-2))).tolist()
    edges, of_real = (sum(x[:, later].float().diff(dim=d).abs().mean((0, 2, 3, 4))
                          for d in (-1, -2)) for x in (imagined, decoded))
    metrics["sharpness"] = (edges / of_real).tolist()
    film = torch.cat([decoded[:, :GIVEN], imagined[:, later]], 1)      # all of it decoded
    for name, x in (("real", truth), ("imagined", film)):
        metrics[f"judge_{name}"] = judge_accuracy(judge, x[:, GIVEN - 1:], actions)
    if constant and constant[0].truth is not None:
        metrics["action_accuracy"] = action_accuracy(constant)
    return metrics


def is_moving(truth):
    """Clips in which every frame differs from the last given one; all clips, if none does. (N,)"""
    error = (truth[:, GIVEN:].float() - truth[:, GIVEN - 1:GIVEN]).square().mean((2, 3, 4))
    moving = (error > 255 ** 2 / 10 ** 3).all(1)       # below 30 dB
    return moving | ~moving.any()


def action_accuracy(rows):
    """Roll-outs of constant actions, a row each -> the share that is nearer to the ground truth of
    its own action than to that of any other."""
    error = torch.stack([(row.imagined.float() - other.truth.float()).square().mean((1, 2, 3, 4))
                         for row in rows for other in rows]).unflatten(0, (len(rows), -1))
    own = torch.eye(len(rows), dtype=torch.bool)       # error: (actions, compared with, N)
    return (error[own] < error.masked_fill(own[..., None], math.inf).amin(1)).float().mean().item()


def judge_accuracy(judge, film, actions):
    """Clips (N, n + 1, 3, H, W), actions (N, n): how often the judge names the action, by step."""
    pairs = film.unfold(1, 2, 1).movedim(-1, 2).flatten(0, 1)          # (N * n, 2, 3, H, W)
    guesses = in_batches(lambda x: judge(to_unit(x)).argmax(1), next(judge.parameters()).device,
                         100, pairs)
    return (guesses.view_as(actions) == actions).float().mean(0).tolist()


# -- Pictures -----------------------------------------------------------------------------------

def draw(run, model, clips, rows):
    first, x = rows[0], clips.frames[:8, -1:]          # (8, 1, 3, H, W)
    run.picture("reconstructions", torch.cat([x, model.decode(model.encode(x))], 1).transpose(0, 1),
                "test frames, each above its reconstruction")
    draw_films(run, "rollout", rows, 2)
    # 100 frames after those given to four clips, for the recorded actions of forty.
    count, k = min(4, len(first.actions)), 1 if run.rehearsing else 10
    taken = first.actions[torch.arange(count * k) % len(first.actions)].view(count, -1)
    film = model.imagine(first.truth[:count, :GIVEN], taken, first.before[:count],
                         seed=run.args.seed)
    draw_films(run, "rollout_long", [RollOut(first.name, taken, film, clips.truth(taken))], 4, 5)
    # rollout.gif: one sequence of actions after the other, for a clip that moves and has more edges
    # than most; of these the median by error: neither a lucky nor an unlucky one.
    error = (first.imagined.float() - first.truth.float()).square().mean((1, 2, 3, 4))
    some = is_moving(first.truth).nonzero().flatten()
    edges = first.truth[some, GIVEN - 1].float().diff(dim=3).abs().mean((1, 2, 3))
    some = some[edges >= edges.median()]
    n = some[error[some].argsort()[len(some) // 2]]
    film, truth = ([0 * row.imagined[n] if row[k] is None else row[k][n] for row in rows]
                   for k in (2, 3))
    captions = [f"{row.name}, {t - GIVEN:+d}" for row in rows for t in range(1, 1 + len(film[0]))]
    run.write("rollout.gif", lambda f: save_film(f, torch.cat(film), torch.cat(truth), captions))


def draw_films(run, name, rows, count, every=1):
    """As the paper's fig. 7: frames given, then imagined; the ground truth in the row below."""
    at = range(0 if every == 1 else GIVEN - 1, rows[0].imagined.shape[1], every)
    labels, films = zip(*[
        (what, film[n, at]) for n in range(min(count, len(rows[0].imagined))) for row in rows
        for what, film in ((f"{row.name}: imagined", row.imagined), ("ground truth", row.truth))
        if film is not None])
    run.picture(name, torch.stack(films), f"{GIVEN} frames, to +0, are given; all later codes "
                "are sampled before one is decoded", [f"{t + 1 - GIVEN:+d}" for t in at], labels)


def save_film(file, imagined, truth, captions, width=320):
    """A GIF of frames (T, 3, H, W) and, where it is known, the ground truth on the right."""
    from PIL import Image, ImageDraw, ImageFont
    scale, pictures = max(1, round(width / imagined.shape[3])), []
    films = [F.pad(film.repeat_interleave(scale, 2).repeat_interleave(scale, 3), (4, 4, 24, 4),
                   value=255) for film in (imagined, truth) if film is not None]
    for x, caption in zip(torch.cat(films, 3), captions):              # (3, height, width)
        pictures.append(Image.fromarray(x.permute(1, 2, 0).numpy()))
        text = f"imagined: {caption}" + "   (right: ground truth, if known)" * (truth is not None)
        ImageDraw.Draw(pictures[-1]).text((4, 3), text, "black", ImageFont.load_default(15))
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=350, loop=0)


# -- Using a finished run: load, --play ---------------------------------------------------------

def load(folder="runs/video", device="auto"):
    """The trained Model of a finished run, in eval mode; ValueError if there is none."""
    return load_models(folder, "video", device, make_model)[0]


def use(args):
    """--play: a list of actions, or a window with arrow keys; then the walk as a GIF."""
    model = load(args.out, args.device)
    model.args.data = args.data or model.args.data     # it may have moved
    if not model.prior.num_actions:
        raise ValueError(f"--play: the run in {args.out} was trained without actions")
    play = Play(model, load_parts(model.args, ["test"])[0]["test"], args.temperature)
    for word in args.play.split(",") if args.play else []:
        if word.strip() not in play.words:
            raise ValueError(f"--play {word}: no such action; there are: {', '.join(play.words)}")
        play.act(play.words[word.strip()])
    if not args.play:
        import matplotlib.pyplot as plt
        play.open(plt.figure("train_video.py --play", (11, 3)))
        if play.axis.figure.canvas.required_interactive_framework is None:
            raise ValueError("--play: no display for a window; --play left,left writes a GIF")
        plt.show()                                     # until the window is closed
    file, captions = Path(args.out, "play.gif"), [model.names[action] for action in play.actions]
    write_file(file, lambda f: save_film(f, play.film, play.truth(), ["given"] * GIVEN + captions))
    say(f"{len(play.film)} frames are in {file}")


class Play:
    """A walk through the imagination, from the given frames of a clip on: each action is one more
    code map, and the picture that the decoder makes of it."""

    def __init__(self, model, clips, temperature=None):
        self.model, self.clips, self.temperature = model, clips, temperature
        words = model.names, map(str, itertools.count()), ("up", "left", "right", "down")
        self.words = {word: k for some in words for k, word in zip(range(len(model.names)), some)}
        self.restart(0)

    def restart(self, n):
        self.n, self.actions = n % len(self.clips.frames), []
        self.film = self.clips.frames[self.n, :GIVEN]                  # (T, 3, H, W)
        self.codes = self.model.encode(self.film[None])                # (1, T, h, w)
        self.generator = torch.Generator(self.model.device).manual_seed(0)

    def act(self, action):
        taken = [*self.clips.actions[self.n, :GIVEN - 1].tolist(), *self.actions][1 - GIVEN:]
        z = self.model.continued(self.codes[:, -GIVEN:], torch.tensor([[action]]), torch.tensor(
            [taken]), self.temperature, self.generator).to(self.codes)
        self.actions.append(action)
        self.codes = torch.cat([self.codes, z], 1)
        self.film = torch.cat([self.film, self.model.decode(z)[0]])

    def truth(self):
        films = self.clips.truth(torch.tensor([self.actions]).long(), self.n)
        return films if films is None else films[0]

    def open(self, figure):
        """Walk by the keyboard, in a matplotlib figure."""
        if figure.canvas.manager is not None:          # matplotlib's own keys: left is "back" there
            figure.canvas.mpl_disconnect(figure.canvas.manager.key_press_handler_id)
        figure.canvas.mpl_connect("key_press_event", self.on_key)
        figure.text(0.02, 0.02, f"arrows or numbers: {', '.join(self.model.names)}    n: another "
                    "clip    when the window is closed, the walk is saved as play.gif")
        # A colour for each code: ranks along three random directions, so that similar ones match.
        e = self.model.vqvae.quantizer.codebook.cpu()  # (K, D)
        ranks = (e @ torch.randn(e.shape[1], 3)).argsort(0).argsort(0)
        self.colors, self.axis = (255 * ranks / len(e)).byte(), figure.add_subplot()
        self.show()

    def show(self):
        codes = self.colors[self.codes[:, -1].long()].permute(0, 3, 1, 2)
        codes = codes.repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)
        sheets = [x[-1] for x in (self.film, codes, self.truth()) if x is not None]
        self.axis.clear()
        self.axis.set(title="imagined, its codes, ground truth if known", xticks=[], yticks=[])
        self.axis.imshow(torch.cat(sheets, 2).permute(1, 2, 0).numpy())
        self.axis.figure.canvas.draw_idle()

    def on_key(self, event):
        if event.key in self.words:
            self.act(self.words[event.key])
        elif event.key == "n":
            self.restart(self.n + 1)
        self.show()


# -- Data ---------------------------------------------------------------------------------------

# A part of the data: frames (N, T, 3, H, W) uint8, in memory or mapped; actions (N, T-1) int64:
# actions[:, t] leads from frames[:, t] to the next; truth: see demo_part.
Clips = namedtuple("Clips", "frames actions truth", defaults=[lambda actions, first=0: None])


class Stretches(torch.utils.data.Dataset):
    """All stretches of `length` consecutive frames (or code maps) x (N, T, ...), each with the
    actions that lead to each of its frames; -1, "none", leads to the first of a clip.
    For Run.fit: self[index (B,)] -> stretches (B, length, ...), actions (B, length)."""

    def __init__(self, x, actions, length):
        none = x.shape[1] - actions.shape[1]
        self.x = x.unfold(1, length, 1)                # a view (N, T', ..., length)
        self.actions = F.pad(actions, (none, 0), value=-1).unfold(1, length, 1)

    def __len__(self):
        return self.actions[..., 0].numel()

    def __getitem__(self, index):
        n, t = index // self.x.shape[1], index % self.x.shape[1]
        return self.x[n, t].movedim(-1, 1), self.actions[n, t]


class Data(namedtuple("Data", "parts facts")):
    """parts: Clips by name. facts: what models and results depend on."""

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
    x, batch_size = parts["train"].frames, max(run.args.batch_size, run.args.prior_batch_size)
    check_batch(len(x) * (x.shape[1] - 1), batch_size, "frames", "--batch-size, --prior-batch-size")
    frames = x.flatten(0, 1)
    some = to_unit(frames[spread(len(frames), 1000)])  # variance: eq. 3, term 1
    return Data(parts, {"actions": names, "size": list(x.shape[-2:]),
                        "digest": digest(frames, parts["train"].actions),
                        "variance": max(some.var().item(), 1 / 255 ** 2)})


def load_parts(args, wanted=("train", "valid", "test", "unseen")):
    """Clips by part, and the names of their actions. The last tenth of your own clips is for
    testing, the one before for validation: neighbours in a recording may be near doubles."""
    if args.data is None:
        return {part: demo_part(args, part) for part in wanted}, list(ACTIONS)
    frames, actions = read_arrays(args.data)
    values, actions = actions.unique(return_inverse=True)  # an action is a value that occurs
    n = len(frames) // 10
    cut = {"train": slice(-2 * n), "valid": slice(-2 * n, -n), "test": slice(-n, None)}
    return ({part: Clips(frames[rows], actions[rows]) for part, rows in cut.items()},
            [f"action {k}" for k in values.tolist()])


def read_arrays(path):
    """--data, .npz or a folder of .npy -> frames (N, T, 3, H, W), actions (N, T-1)."""
    with reading(f"--data {path}, frames and actions"):    # mode c: mapped, never written back
        file = {name: np.load(Path(path, f"{name}.npy"), "c", allow_pickle=False) for name in (
            "frames", "actions")} if Path(path).is_dir() else np.load(path, allow_pickle=False)
        frames, actions = np.asarray(file["frames"]), np.asarray(file["actions"])
    N, T, H, W, C = frames.shape if frames.ndim == 5 else [0] * 5
    if not (frames.dtype == np.uint8 and C == 3 and N >= 10 and T >= GIVEN + GENERATED
            and H % FACTOR == W % FACTOR == 0 and min(H, W) >= 4 * FACTOR
            and actions.shape in ((N, T), (N, T - 1)) and actions.dtype.kind in "iu"
            and 0 <= actions.min() <= actions.max() < 256):
        raise ValueError(
            f"--data {path}: frames {frames.shape} {frames.dtype}, actions {actions.shape} "
            f"{actions.dtype}; needed: frames (N >= 10, T >= {GIVEN + GENERATED}, H, W, 3) uint8, "
            f"H, W multiples of {FACTOR} from {4 * FACTOR}; actions (N, T) or (N, T-1), 0 to 255")
    return (torch.from_numpy(np.moveaxis(frames, 4, 2)),
            torch.from_numpy(actions[:, :T - 1].astype(np.int64)))


def make_parser():
    parser = Parser("video", PRESETS, description=__doc__)
    parser.uses = ("play",)
    parser.free = parser.free | {"prior_batch_size", "prior_lr", "temperature"}
    flag = parser.add_argument
    flag("--play", nargs="?", const="", metavar="ACTIONS", help="walk through the imagination of "
         "the run in --out: by the keyboard, in a window, or by a list: left,left,forward")
    flag("--prior-batch-size", type=positive(int), help="frames per step of the prior")
    flag("--prior-lr", type=fraction, help="Adam's learning rate for the prior")
    flag("--no-actions", action="store_true", help="a prior that is not conditioned on actions")
    flag("--res-hidden", type=positive(int), help="channels inside a residual block")
    flag("--prior-layers", type=depth, help="layers of its PixelCNN")
    flag("--temperature", type=positive(float), help="of roll-outs; below 1: likelier codes")
    flag("--guidance", type=positive(float), default=1.5, help="weight of actions (1: the paper)")
    flag("--demo-clips", type=positive(int), default=3500, help="training clips of the demo")
    return parser


# -- Demo world: a first-person ray-caster in textured mazes ------------------------------------

ACTIONS = ("forward", "left", "right")
STEP, TURN = 0.15, 10             # a step in widths of a corridor, a turn in degrees
RADIUS = 0.3                      # the walker keeps at least this far from a wall
MAZES = 100                       # with two, the prior memorises them: unseen ones suffer
VIEW = np.deg2rad(60)             # half the field of view, to the sides
EYE, WALL = 0.6, 1.2              # height of the eye and of the walls


def demo_part(args, part):
    """One part of the demo's data. "unseen" walks through other mazes than the rest."""
    world = World(seed=mix(args.seed, "unseen") if part == "unseen" else args.seed)
    count = args.demo_clips if part == "train" else max(10, args.demo_clips // 10)
    frames, actions, poses = demo_clips(world, count, GIVEN + GENERATED, seed=mix(args.seed, part))

    def truth(actions, first=0):
        """The GIVEN frames of clips number first, .., and those that actions (n, T) lead to."""
        given = poses[first:first + len(actions), :GIVEN]
        later = world.walk(given[:, -1], actions.numpy())[:, 1:]
        return world.render(np.concatenate([given, later], 1), frames.shape[3])
    return Clips(frames, torch.from_numpy(actions[:, :-1]), truth)


class World:
    """Some mazes, and a camera that walks in them. All is known: any future can be rendered.

    The camera's columns are equal angles, as on a panorama: of 48 columns for 120 degrees a turn
    moves the whole picture by 4, which is one code; after ten turns some of it is still in view.
    Poses (n, 4): the maze's number, x and y on its grid, the heading in turns of TURN degrees."""

    def __init__(self, count=MAZES, seed=0, size=7):
        rng = np.random.default_rng(seed)
        self.wall = np.ones((count, size, size), bool)
        self.wall[:, 1:-1, 1:-1] = rng.random((count, size - 2, size - 2)) < 0.2
        self.color = COLORS[rng.integers(len(COLORS), size=self.wall.shape)]
        self.pattern = rng.integers(len(PATTERNS), size=self.wall.shape)
        self.floor, self.ceiling = np.float32([[0.25, 0.22, 0.2], [0.55, 0.6, 0.7]])

    def move(self, pose, action):
        """One action each. A wall stops only the component of a step towards it."""
        maze, x, y, turns = pose.T
        turns = (turns + (action == 1) - (action == 2)) % (360 // TURN)
        dx, dy = (STEP * (action == 0) * f(np.deg2rad(turns * TURN)) for f in (np.cos, np.sin))
        x = np.where(self.free(maze, x + dx, y), x + dx, x)
        y = np.where(self.free(maze, x, y + dy), y + dy, y)
        return np.stack([maze, x, y, turns], 1)

    def free(self, maze, x, y):
        return ~np.any([self.wall[maze.astype(int), (x + i).astype(int), (y + j).astype(int)]
                        for i in (-RADIUS, RADIUS) for j in (-RADIUS, RADIUS)], 0)

    def walk(self, pose, actions):
        """The poses (n, 1 + T, 4) that the actions (n, T) lead through, from `pose` (n, 4) on."""
        return np.stack(list(itertools.accumulate(actions.T, self.move, initial=pose)), 1)

    def render(self, poses, size):
        """Poses (n, T, 4) -> frames (n, T, 3, size, 2 * size) uint8."""
        with ThreadPoolExecutor() as pool:             # numpy works outside Python's lock
            frames = np.stack(list(pool.map(lambda pose: self.look(pose, size), poses)))
        return torch.from_numpy(frames).permute(0, 1, 4, 2, 3)

    def look(self, pose, size):
        """Poses (n, 4) -> (n, size, 2 * size, 3). Two rays per pixel each way are averaged."""
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
        depth = np.where(wall, depth[:, None], np.where(up < 0, EYE, WALL - EYE) / abs(up))
        texel = PATTERNS[self.pattern[maze[:, None], i, j][:, None],
                         (height.clip(0, 0.99) * 16).astype(np.int8),
                         (along * 16).astype(np.int8)[:, None]]
        tone = np.where(wall, texel, 1) * np.exp(-0.15 * depth.astype(np.float32))     # far is dark
        image = np.where(wall[..., None], color[:, None].astype(np.float32),
                         np.where(up[..., None] < 0, self.floor, self.ceiling))
        image = (image * tone[..., None]).reshape(len(pose), size, 2, 2 * size, 2, 3).mean((2, 4))
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


COLORS = np.float32([(1, 0.51, 0.51), (0.68, 0.96, 0.39), (0.35, 0.84, 0.84), (0.68, 0.39, 0.96)])
# Brightness of the walls' textures, (pattern, height, along): plain, halves, a picture.
height, along = np.meshgrid(*[(np.arange(16) + 0.5) / 16] * 2, indexing="ij")
PATTERNS = np.where([along < 0, along < 0.5, (abs(height - 0.5) < 0.3) & (abs(along - 0.5) < 0.3)],
                    0.6, 1).astype(np.float32)


def demo_clips(world, count, length, size=24, seed=0):
    """Random walks: frames (count, length, 3, size, 2 * size) uint8, actions (count, length) int64,
    poses (count, length, 4). Walkers like to go on with what they do, and mostly turn at walls."""
    rng, action, walk, free = np.random.default_rng(seed), np.zeros(count, int), [], ~world.wall
    cells = np.argwhere(free)[rng.integers(free.sum(), size=count)] + (0, 0.5, 0.5)    # the middle
    pose = np.column_stack([cells, rng.integers(360 // TURN, size=count)])
    for t in range(length):
        other = rng.choice(3, size=count, p=(0.4, 0.3, 0.3))
        action = np.where(rng.random(count) < 0.7 * (t > 0), action, other)
        stuck = (world.move(pose, 0 * action) == pose).all(1) & (rng.random(count) < 0.7)
        action = np.where(stuck & (action == 0), rng.integers(1, 3, size=count), action)
        walk.append((pose, action))
        pose = world.move(pose, action)
    poses, actions = (np.stack(x, 1) for x in zip(*walk))
    return world.render(poses, size), actions, poses


if __name__ == "__main__":
    launch(make_parser(), load_data, main, use)
