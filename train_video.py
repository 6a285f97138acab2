"""Video: frames -> VQ-VAE -> codes -> action-conditional prior -> imagined clips (sec. 4.4).

    python train_video.py                          demo world, no download, no GPU: minutes
    python train_video.py --no-actions             the same, the prior never told what is done
    python train_video.py --data clips.npz --preset paper        own clips, on a GPU
    python train_video.py --resume                 go on with runs/video, as if never stopped
    torchrun --nproc_per_node=2 train_video.py     the same run over several processes

Stage one trains a VQ-VAE on single frames. Then it is frozen, every frame is encoded once, and
a VideoPrior learns p(z_1, .., z_T | actions). A roll-out gets 6 frames and generates 10 "purely
in the latent space"; the decoder makes pictures of them when all are there. --out (runs/video)
receives rollout.gif, rollout.png (the paper's fig. 7, with the truth beside the imagination),
rollout_long.png, reconstructions.png, curves.png, metrics.json, log.csv, config.json and
checkpoint.pt; README explains every number.

--data: an .npz with `frames` (N, T, H, W, 3) uint8 and `actions` (N, T) or (N, T-1) integers
from 0; actions[n, t] leads from frames[n, t] to frames[n, t + 1]. From any Gymnasium environment
with discrete actions and pictures of a fixed size (84 x 84, say):

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

import json
import math
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from prior import VideoPrior
from vqvae import (VQVAE, Gaussian, Parser, Run, VectorQuantizer, VectorQuantizerEMA,
                   count_codes, perplexity, positive, stop, to_unit)

GIVEN, GENERATED = 6, 10                               # frames of a roll-out, as in fig. 7
FACTOR = 4                                             # pixels a code, each way

PRESETS = {
    # 24 x 48 x 3 -> 6 x 12 codes, for a laptop.
    "demo": dict(warmup_steps=100, steps=1000, prior_steps=4600, batch_size=32,
                 prior_batch_size=48, lr=1e-3, prior_lr=3e-3, lr_decay=0.5, codebook="ema",
                 num_codes=128, code_dim=32, hidden=48, res_hidden=32, prior_channels=32,
                 prior_layers=2),
    # DeepMind Lab, 84 x 84 x 3 -> 21 x 21, K = 512. The paper gives no more: Adam's rate and the
    # number of steps are those of its CIFAR-10 experiment.
    "paper": dict(warmup_steps=1000, steps=250_000, prior_steps=250_000, batch_size=128,
                  prior_batch_size=128, lr=2e-4, prior_lr=2e-4, num_codes=512, code_dim=64,
                  hidden=128, res_hidden=32, prior_channels=128, prior_layers=10),
}

# ---------------------------------------------------------------------------------------------
# Demo world: a first-person ray-caster in textured mazes
# ---------------------------------------------------------------------------------------------

ACTIONS = ("forward", "left", "right")
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


# ---------------------------------------------------------------------------------------------
# Own data
# ---------------------------------------------------------------------------------------------


class Data:
    """Clips as bytes: train and test (N, T, 3, H, W), actions (N, T-1), the actions' names, and
    for the demo its world and the poses of the test clips."""

    def __init__(self, train, test, train_actions, test_actions, names, world=None, poses=None):
        self.train, self.test = (torch.from_numpy(a).permute(0, 1, 4, 2, 3) for a in (train, test))
        self.train_actions, self.test_actions = (
            torch.from_numpy(a[:, :train.shape[1] - 1].astype(np.int64))
            for a in (train_actions, test_actions))
        self.names, self.world, self.poses = names, world, poses

    def truth(self, actions):
        """The real frames that the actions (n, T) lead to, after the first GIVEN frames of the
        first n test clips. None for own clips: they know what was recorded, and no more."""
        if self.world is None:
            return None
        poses = self.world.walk(self.poses[:len(actions), GIVEN - 1], actions.cpu().numpy())
        frames = self.world.render(poses, self.test.shape[-2])
        return torch.from_numpy(frames).permute(0, 1, 4, 2, 3)


def load_data(args):
    if args.data is not None:
        return load_clips(args.data)
    world, length = World(seed=args.seed), GIVEN + GENERATED
    n = args.demo_clips
    frames, actions, poses = demo_clips(world, n + max(10, n // 10), length, seed=args.seed)
    return Data(frames[:n], frames[n:], actions[:n], actions[n:], ACTIONS, world, poses[n:])


def load_clips(path):
    """--data: see the top of this file. Every tenth clip is held out for testing."""
    try:
        file = np.load(path, allow_pickle=False)
        frames, actions = (file[k] if k in file.files else None for k in ("frames", "actions"))
    except FileNotFoundError:
        stop(f"--data {path}: no such file")
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as e:
        stop(f"--data {path}: not a readable .npz file ({' '.join(str(e).split())[:120]})")
    if frames is None or actions is None:
        stop(f"--data {path}: needs two arrays, `frames` and `actions`")
    if frames.ndim != 5 or frames.shape[-1] != 3:
        stop(f"--data {path}: frames {frames.shape}, must be (N, T, H, W, 3): in colour")
    if frames.dtype != np.uint8:
        stop(f"--data {path}: frames are {frames.dtype}, must be uint8 (0 .. 255)")
    N, T, H, W, _ = frames.shape
    if T < GIVEN + GENERATED:
        stop(f"--data {path}: clips of {T} frames; at least {GIVEN} + {GENERATED} are needed")
    if N < 10:
        stop(f"--data {path}: {N} clips; at least 10 are needed, every tenth is held out")
    if H % FACTOR or W % FACTOR or min(H, W) < 4 * FACTOR:
        stop(f"--data {path}: frames of {H} x {W}; both sides must be multiples of {FACTOR}, the "
             f"product of the encoder's strides, from {4 * FACTOR} up")
    if actions.shape not in ((N, T), (N, T - 1)):
        stop(f"--data {path}: actions are {actions.shape}; {N} clips of {T} frames need ({N}, {T})"
             f" or ({N}, {T - 1})")
    if actions.dtype.kind not in "iu" or not 0 <= actions.min() <= actions.max() < 256:
        stop(f"--data {path}: actions must be integers from 0 to 255, found {actions.dtype} from "
             f"{actions.min()} to {actions.max()}")
    test = np.arange(N) % 10 == 9
    return Data(frames[~test], frames[test], actions[~test], actions[test],
                [f"action {k}" for k in range(actions.max() + 1)])


# ---------------------------------------------------------------------------------------------
# The experiment
# ---------------------------------------------------------------------------------------------


def make_parser():
    parser = Parser("video", PRESETS, description=__doc__)
    flag = parser.add_argument
    flag("--warmup-steps", type=positive(int), help="steps as a plain autoencoder, before the "
         "codebook starts at its outputs (the paper has none)")
    flag("--prior-batch-size", type=positive(int), help="clips a step of the prior")
    flag("--prior-lr", type=positive(float), help="Adam's learning rate for the prior")
    flag("--no-actions", action="store_true", help="a prior that is not told the actions (the "
         "paper: \"similar results, not shown\")")
    flag("--res-hidden", type=positive(int), help="channels inside a residual block")
    flag("--prior-layers", type=positive(int), help="layers of its PixelCNN")
    flag("--temperature", type=positive(float), default=1.0, help="of the roll-outs: below 1 the "
         "likely codes get likelier (default 1)")
    flag("--demo-clips", type=positive(int), default=3500, help="training clips of the demo")
    return parser


def main():
    run = Run(make_parser())
    args = run.args
    if args.data is None:
        run.say(f"rendering {args.demo_clips} clips")
    data = load_data(args)
    train, test = data.train.to(run.device), data.test.to(run.device)    # (N, T, 3, H, W)
    variance = float(to_unit(train[::max(1, len(train) // 100), 0]).var())
    Quantizer = {"loss": VectorQuantizer, "ema": VectorQuantizerEMA}[args.codebook]
    model = VQVAE(Quantizer(args.num_codes, args.code_dim, beta=args.beta), Gaussian(variance),
                  hidden=args.hidden, res_hidden=args.res_hidden).to(run.device)
    prior = VideoPrior(args.num_codes, 0 if args.no_actions else len(data.names),
                       args.prior_channels, args.prior_layers, context=GIVEN)
    prior.to(run.device, memory_format=torch.channels_last)
    weights = [sum(p.numel() for p in net.parameters()) for net in (model, prior)]
    run.say("{} clips of {} frames of {}x{}x{} for training, {} for testing; ".format(
        *train.shape, len(test)) + "weights: VQ-VAE {:,}, prior {:,}".format(*weights))

    # Stage one: the VQ-VAE of single frames. The codebook starts at encoder outputs; those of a
    # random encoder are no good place, so it learns for a moment without a codebook.
    frames = train.flatten(0, 1)                       # (N*T, 3, H, W)
    model.quantizer.requires_grad_(False)
    run.fit("autoencoder", model, lambda net, index: (net(frames[index], quantize=False).loss, {}),
            len(frames), args.warmup_steps, args.batch_size, args.lr)
    model.quantizer.requires_grad_(True)
    run.fit("vqvae", model, lambda net, index: vqvae_loss(net, frames[index], args),
            len(frames), args.steps, args.batch_size, args.lr)
    model.requires_grad_(False)                        # stage one is over
    # Stage two: the codes of all frames, once, and the prior on them.
    codes, test_codes = encode_all(model, train), encode_all(model, test)
    actions = None if args.no_actions else data.train_actions.to(run.device)
    run.fit("prior", prior, lambda net, index: prior_loss(
        net, codes[index], None if actions is None else actions[index]),
        len(codes), args.prior_steps, args.prior_batch_size, args.prior_lr)
    if run.rank == 0:
        report(run, model, prior, data, test, test_codes)


def vqvae_loss(net, x, args):
    y = net(x)
    mse = F.mse_loss(y.out.detach().float(), to_unit(x)) * 255 ** 2
    return y.loss, {"mse": mse, "codes_used": count_codes(y.codes, args.num_codes)}


def prior_loss(net, codes, actions):
    """Teacher forcing: frame t of each clip is predicted from what was recorded before it. One t
    and many clips a step tell more than many t of a few clips, whose frames are much the same.
    One clip in ten is seen without its actions, so that the same prior also knows p(z) without."""
    t = int(torch.randint(codes.shape[1], ()))
    first = max(0, t - GIVEN)                          # the prior looks back no further
    codes = codes[:, first:t + 1]
    if actions is not None:
        actions = actions[:, first:t]
        unknown = torch.rand(len(actions), 1, device=actions.device) < 0.1
        actions = actions.masked_fill(unknown, -1)
    loss = F.cross_entropy(net(codes, actions, last=1), codes[:, -1:])         # nats a code
    return loss, {"bits_per_code": loss.detach() / math.log(2)}


@torch.no_grad()
def encode_all(model, clips, batch=128):
    """Codes (N, T, h, w) of all clips (N, T, 3, H, W), the last, smaller batch included."""
    return torch.cat([model.encode(x) for x in clips.flatten(0, 1).split(batch)]
                     ).unflatten(0, clips.shape[:2])


@torch.no_grad()
def decode_all(model, codes, batch=128):
    """The way back, when all codes are there: (N, T, h, w) -> (N, T, 3, H, W) uint8."""
    return torch.cat([model.decode(z) for z in codes.flatten(0, 1).split(batch)]
                     ).unflatten(0, codes.shape[:2])


@torch.no_grad()
def measure(model, prior, data, test, codes, args):
    """What can be measured without rolling out: reconstructions, codes, the prior's bits."""
    error = sum((decode_all(model, z).float() - x).square().sum().item()
                for x, z in zip(test.split(8), codes.split(8))) / test.numel()
    counts = count_codes(codes, args.num_codes)
    metrics = {"psnr": 10 * math.log10(255 ** 2 / max(error, 1e-2)),
               "codes_used": int((counts > 0).sum()), "num_codes": args.num_codes,
               "perplexity": perplexity(counts).item(),
               "compression": test[0, 0].numel() * 8 / (codes[0, 0].numel() *
                                                        math.log2(args.num_codes))}
    if args.no_actions:
        return {**metrics, "bits_per_code": bits_per_code(prior, codes, None)}
    actions = data.test_actions.to(codes.device)       # shuffled: those of the clip before
    return {**metrics, "bits_per_code": bits_per_code(prior, codes, actions),
            "bits_per_code_shuffled_actions": bits_per_code(prior, codes, actions.roll(1, 0)),
            "bits_per_code_without_actions": bits_per_code(prior, codes, None)}


@torch.no_grad()
def bits_per_code(prior, codes, actions, batch=4):
    """-log2 p(z_t | z_<t, a_<t) / number of codes, for the frames after the first GIVEN."""
    bits = 0
    for i in range(0, len(codes), batch):
        z = codes[i:i + batch]
        logits = prior(z, None if actions is None else actions[i:i + batch])
        bits += F.cross_entropy(logits[:, :, GIVEN:], z[:, GIVEN:], reduction="sum").item()
    return bits / codes[:, GIVEN:].numel() / math.log(2)


def psnr(a, b):
    """Clips (N, T, 3, H, W) -> 10 log10(255^2 / mean squared error) in dB, a list over T."""
    error = (a.float() - b.float()).square().mean((0, 2, 3, 4))
    return (10 * torch.log10(255 ** 2 / error.clamp(min=1e-2))).tolist()


def edges(frames):
    """Gradient energy of frames (N, T, 3, H, W) by step: (T,). Blur lowers it."""
    x = frames.float()
    return x.diff(dim=-1).abs().mean((0, 2, 3, 4)) + x.diff(dim=-2).abs().mean((0, 2, 3, 4))


def roll_out(model, prior, codes, actions, frames, args, seed, batch=50):
    """Codes (N, T, h, w), actions (N, T + frames - 1) -> `frames` more frames of each clip,
    (N, frames, 3, H, W). All codes come first; the pictures are decoded after that."""
    generator = torch.Generator(codes.device).manual_seed(seed)
    imagined = [prior.sample(codes[i:i + batch], None if args.no_actions else actions[i:i + batch],
                             frames, args.temperature, generator)
                for i in range(0, len(codes), batch)]
    return decode_all(model, torch.cat(imagined))


def compare(frames, truth, reconstruction, last):
    """Imagined frames (N, GENERATED, 3, H, W) against what really happened, step by step."""
    # A walker that stands at a wall makes copying unbeatable: moving clips only, those in which
    # at every step the picture is another than the last given one.
    error = (truth.float() - last.float()).square().mean((2, 3, 4))
    moving = (error > 255 ** 2 / 10 ** 3).all(1)       # below 30 dB
    moving = moving | ~moving.any()                    # all of them, if none is
    ratio = edges(frames) / edges(reconstruction)
    return {"moving_clips": moving.float().mean().item(),
            "psnr_generated": psnr(frames[moving], truth[moving]),
            "psnr_copy_last": psnr(last[moving], truth[moving]),
            "psnr_reconstruction": psnr(reconstruction[moving], truth[moving]),
            "sharpness": ratio.tolist(), "sharpness_last_to_first": (ratio[-1] / ratio[0]).item()}


def action_accuracy(imagined, truths):
    """imagined, truths: an (N, GENERATED, 3, H, W) for each action -> the share of roll-outs that
    are nearer to the true frames of their own action than to those of another one."""
    right = total = 0
    for k, frames in enumerate(imagined):
        error = torch.stack([(frames.float() - t.float()).square().mean((1, 2, 3, 4))
                             for t in truths])         # (actions, N)
        other = torch.cat([error[:k], error[k + 1:]]).amin(0)
        right, total = right + (error[k] < other).sum().item(), total + len(frames)
    return right / total


@torch.no_grad()
def speed(prior, codes, actions):
    """Frames a second, batch 1, of the cached sampler and of the plain one."""
    codes, rates = codes[:1, :GIVEN], {}
    actions = actions if actions is None else actions[:1, :GIVEN]
    for name, sampler in (("cached", prior.sample), ("naive", prior.sample_naive)):
        begun = time.perf_counter()
        sampler(codes, actions, 1).sum().item()        # .item() waits for a GPU
        rates[f"frames_per_second_{name}"] = 1 / (time.perf_counter() - begun)
    return rates


def pieces(x, most=100):
    """Clips (N, T, ...), cut to the length of a roll-out: (n, GIVEN + GENERATED, ...)."""
    length = GIVEN + GENERATED
    return x[:, :x.shape[1] // length * length].unflatten(1, (-1, length)).flatten(0, 1)[:most]


def report(run, model, prior, data, test, codes):
    """Measurements, roll-outs, pictures and metrics.json."""
    args, device = run.args, run.device
    metrics = measure(model, prior, data, test, codes, args)
    test, codes = pieces(test), pieces(codes)
    actions = pieces(F.pad(data.test_actions, (0, 1)))[:, :-1].to(device)
    given = codes[:, :GIVEN]
    run.say(f"imagining {GENERATED} frames of {len(test)} clips")
    recorded = roll_out(model, prior, given, actions, GENERATED, args, args.seed)
    decoded = decode_all(model, codes)
    metrics |= compare(recorded, test[:, GIVEN:], decoded[:, GIVEN:], test[:, GIVEN - 1:GIVEN])
    # Rows of the picture: what is given and imagined, and below it what really happens.
    rows = [("recorded actions", recorded, test[:, GIVEN:])]
    if not args.no_actions:
        imagined, truths = [], []
        for k in range(min(4, len(data.names))):
            constant = actions.clone()
            constant[:, GIVEN - 1:] = k                # those between given frames stay
            imagined.append(roll_out(model, prior, given, constant, GENERATED, args, args.seed))
            truths.append(data.truth(constant[:, GIVEN - 1:]))
        if data.world:
            metrics["action_accuracy"] = action_accuracy(imagined, [t.to(device) for t in truths])
        rows += [(f"all {name}", *pair) for name, *pair in zip(data.names, imagined, truths)]
    metrics |= speed(prior, codes, None if args.no_actions else actions)
    metrics |= long_roll_out(run, model, prior, data, given, actions)
    metrics["seconds"] = round(run.seconds, 1)
    run.write("metrics.json", json.dumps(metrics, indent=1))
    run.write_curves()
    fig7(run.out / "rollout.png", test[:, :GIVEN], rows)
    animate(run.out / "rollout.gif", test[:, :GIVEN], rows)
    picture(run.out / "reconstructions.png", torch.stack([test[:8, -1], decoded[:8, -1]]),
            f"test frames; below, from {metrics['compression']:.1f} times fewer bits")
    for name, value in metrics.items():
        value = value if isinstance(value, list) else [value]
        run.say(f"{name:32} {' '.join(f'{v:.4g}' for v in value)}")
    run.say(f"pictures and numbers are in {run.out}")


def long_roll_out(run, model, prior, data, given, actions, clips=4, frames=100, every=5):
    """rollout_long.png: 100 frames imagined from GIVEN real ones, for the recorded actions of
    clip after clip. Returns the sharpness of the last ten against that of the first ten."""
    clips = min(clips, len(given))
    later = actions.flatten().repeat(clips * frames)[:clips * frames].view(clips, frames)
    plan = torch.cat([actions[:clips, :GIVEN - 1], later], 1)
    imagined = roll_out(model, prior, given[:clips], plan, frames, run.args, run.args.seed)
    truth = None if run.args.no_actions else data.truth(later.cpu())
    rows = [x[n, every - 1::every].cpu() for n in range(clips) for x in (imagined, truth)
            if x is not None]
    picture(run.out / "rollout_long.png", torch.stack(rows), f"{frames} frames imagined from "
            f"{GIVEN} given ones, every {every}th shown" + ("; below each row the truth" if
            truth is not None else ""), range(every, frames + 1, every))
    by_step = edges(imagined)
    return {"sharpness_long": (by_step[-10:].mean() / by_step[:10].mean()).item()}


def fig7(path, given, rows):
    """As the paper's fig. 7: frames given, then imagined; the truth in the row below."""
    sheet, labels = [], []
    for n in range(min(2, len(given))):
        for name, imagined, truth in rows:
            for label, film in ((f"{name}\nimagined", imagined), ("truth", truth)):
                if film is not None:
                    sheet.append(torch.cat([given[n].cpu(), film[n].cpu()]))
                    labels.append(label)
    steps = [f"given {t + 1}" for t in range(GIVEN)] + [f"+{t + 1}" for t in range(GENERATED)]
    picture(path, torch.stack(sheet), f"{GIVEN} frames are given, {GENERATED} imagined: all codes "
            "first, pictures after that", steps, labels)


def animate(path, given, rows, clips=4, scale=2):
    """rollout.gif: four clips side by side, the imagined frames above the true ones, a pair of
    rows for each sequence of actions. White edges while the frames are given ones."""
    from PIL import Image
    clips, pictures = min(clips, len(given)), []
    for t in range(GIVEN + GENERATED):
        sheet = []
        for film in (film for _, *pair in rows for film in pair if film is not None):
            x = given[:clips, t] if t < GIVEN else film[:clips, t - GIVEN]
            x = F.pad(x.cpu(), (2, 2, 2, 2), value=255 if t < GIVEN else 0)
            sheet.append(x.permute(2, 0, 3, 1).flatten(1, 2))            # (H, clips * W, 3)
        sheet = torch.cat(sheet).numpy().repeat(scale, 0).repeat(scale, 1)
        pictures.append(Image.fromarray(sheet))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=250, loop=0)


def picture(path, images, title, columns=(), labels=()):
    """Save a grid of images (rows, columns, 3, H, W) uint8, with the names of columns and rows."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows, _, _, height, width = images.shape
    sheet = F.pad(images.permute(0, 3, 1, 4, 2), (0, 0, 1, 1, 0, 0, 1, 1), value=255)
    sheet = sheet.flatten(2, 3).flatten(0, 1)          # (rows * (H + 2), columns * (W + 2), 3)
    figure = plt.figure(figsize=(14, 14 * sheet.shape[0] / sheet.shape[1] + 0.6),
                        layout="constrained")
    axis = figure.add_subplot(title=title)
    axis.imshow(sheet.cpu().numpy())
    axis.set_xticks([(k + 0.5) * (width + 2) for k in range(len(columns))], columns, fontsize=8)
    axis.set_yticks([(k + 0.5) * (height + 2) for k in range(len(labels))], labels, fontsize=8)
    axis.tick_params(length=0)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
