"""Images: data -> VQ-VAE -> codes -> PixelCNN -> samples (secs. 4.2 and 3.3 of the paper).

    python train_image.py                          demo scenes, no download, no GPU: minutes
    python train_image.py --data photos/ --size 128 --preset paper       own images, on a GPU
    python train_image.py --resume                 go on with runs/image, as if never stopped
    torchrun --nproc_per_node=2 train_image.py     the same run over several processes
    python train_image.py --preset cifar10-small --model vae     bits/dim as in sec. 4.1, also for
                                                   vqvae and vimco; --preset cifar10 on a GPU
    python train_image.py --resume --second-stage  27 bits an image: a second VQ-VAE, on the codes

Stage one trains the VQ-VAE under a uniform prior. Then it is frozen, every image is encoded
once, and a PixelCNN learns the distribution of the codes; codes drawn from it are decoded to
images. --out (runs/image) receives reconstructions.png, samples.png, curves.png,
metrics.json, log.csv, config.json and checkpoint.pt; README explains every number. The models
that sec. 4.1 compares with, --model vae and vimco, have stage one only. --second-stage adds
second_stage.png, the paper's figure 5.
"""

import hashlib
import json
import math
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from prior import PixelCNN
from vqvae import (VAE, VIMCO, VQVAE, Categorical, Gaussian, GlobalVAE, GlobalVQVAE, Parser, Run,
                   VectorQuantizer, VectorQuantizerEMA, bits_per_dim, count_codes, likelihood_gap, mix,
                   perplexity, positive, stop, to_unit)

PRESETS = {
    # 32 x 32 x 3 -> 8 x 8 codes of 9 bits: the 42.6-fold compression of sec. 4.2, for a laptop.
    "demo": dict(warmup_steps=400, steps=1200, prior_steps=2500, batch_size=32,
                 lr=1e-3, prior_lr=3e-3, lr_decay=0.5, hidden=64,
                 res_hidden=32, prior_channels=64),
    # ImageNet 128 x 128 x 3 -> 32 x 32, K = 512. Widths, batch and rate from the authors' own
    # public notebook; the paper gives Adam 2e-4 and 250,000 steps for CIFAR-10 only.
    "paper": dict(warmup_steps=1000, steps=250_000, prior_steps=250_000, batch_size=128, lr=2e-4,
                  prior_lr=2e-4, hidden=128, res_hidden=32, size=128, prior_channels=256,
                  second_steps=250_000),
    # Sec. 4.1. K and D are not public. 640 latents cost 1.04 bits/dim at K = 32, 1.46 at 128, 1.88
    # at 512, which pays while a bit of rate takes more than a bit off the distortion. The best
    # public figure, 4.82 (bshall/VectorQuantizedVAE: 8 codebooks, K = 128), is 1.17 + 3.65: K =
    # 512 arrives at the paper's 4.67 if from there a bit of rate buys 1.2 of distortion. So 512,
    # as for the paper's other images; 128 is worth a try. D = 32: 320 numbers from 256 channels.
    "cifar10": dict(data="cifar10", likelihood="categorical", num_codebooks=10, code_dim=32,
                    warmup_steps=1000, steps=250_000, prior_steps=50_000, batch_size=128, lr=2e-4,
                    prior_lr=2e-4, hidden=256, res_hidden=256, prior_channels=128),
    # On a laptop: narrow, few steps, few samples. The rate is paid from the first step on, and the
    # distortion falls slowly: so K = 8, 0.63 bits/dim. (K = 32 has 1.04, and after 300 steps 0.02
    # less distortion.)
    "cifar10-small": dict(data="cifar10", likelihood="categorical", num_codebooks=10, code_dim=16,
                          num_codes=8, warmup_steps=100, steps=600, prior_steps=150, samples=4,
                          batch_size=8, lr=3e-3, prior_lr=3e-3, lr_decay=0.5, hidden=32,
                          res_hidden=32, prior_channels=32),
}

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"       # as published on that site
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()

# ---------------------------------------------------------------------------------------------
# Demo data: one solid in a coloured room, seen from slightly above
# ---------------------------------------------------------------------------------------------

SOLIDS = ("sphere", "cylinder", "cone", "cube", "octahedron")


def demo_images(count, seed=0, size=64):
    """Render `count` scenes: images (count, size, size, 3) uint8, labels (count,) int64, and the
    scenes' factors as {name: (count,) int64} (for what a code can tell about its image)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(SOLIDS), size=count)
    # Six paints and six rooms: a prior trained for minutes must learn how colours go together.
    hue, room = rng.integers(6, size=count), rng.integers(6, size=count)
    scene = {"hue": hue / 6, "wall_hue": room / 6, "floor_hue": (room + 2) / 6,
             "x": rng.uniform(-0.7, 0.7, count), "z": rng.uniform(-0.3, 0.3, count),
             "scale": rng.uniform(1.4, 1.7, count), "turn": rng.uniform(0, np.pi / 2, count),
             "light": rng.choice((-0.8, 0.8), count)}
    images = np.empty((count, size, size, 3), np.uint8)

    def fill(part):  # images of one solid, few enough for the cache
        images[part] = render(labels[part[0]], {k: v[part] for k, v in scene.items()}, size)

    parts = [part for label in range(len(SOLIDS)) for part in
             np.split(np.flatnonzero(labels == label), range(16, count, 16)) if len(part)]
    with ThreadPoolExecutor() as pool:                 # numpy works outside Python's lock
        list(pool.map(fill, parts))
    factors = {"solid": labels, "hue": hue, "room": room,
               "position": np.digitize(scene["x"], (-0.25, 0.25))}
    return images, labels, factors


def render(label, scene, size):
    """Ray-trace scenes with one kind of solid: two rays a pixel each way, one light, shadows."""
    n, rays = len(scene["x"]), 2 * size
    s = {k: v.astype(np.float32)[:, None] for k, v in scene.items()}       # (n, 1)
    u = (np.arange(rays, dtype=np.float32) + 0.5) / rays * 2 - 1
    across, upward = (a.ravel()[None] for a in np.meshgrid(u, -u))         # (1, rays^2)
    eye = np.array([0, 1.7, -3.6], np.float32)
    view = np.stack(np.broadcast_arrays(across * 0.5, upward * 0.5 - 0.27, 1.0), -1)
    view = np.repeat(view.astype(np.float32), n, 0)                        # (n, rays^2, 3)

    t, normal = hit_solid(label, s, eye, view)
    floor = np.where(view[..., 1] < 0, -eye[1] / np.minimum(view[..., 1], -1e-6), np.inf)
    wall = (2.2 - eye[2]) / view[..., 2]
    behind = np.minimum(floor, wall)                   # distance to the room behind the solid
    solid = t < behind
    point = eye + np.where(solid, t, behind)[..., None] * view
    normal = np.where(solid[..., None], normal, 0)
    normal[..., 1] += ~solid & (floor < wall)          # the floor looks up
    normal[..., 2] -= ~solid & (floor >= wall)         # the wall looks at us

    tiles = (np.floor(point[..., 0] * 1.2) + np.floor(point[..., 2] * 1.2)) % 2
    colour = np.where(solid[..., None], palette(s["hue"], 0.9),
                      np.where((floor < wall)[..., None],
                               palette(s["floor_hue"], 0.45) * (0.82 + 0.18 * tiles[..., None]),
                               palette(s["wall_hue"], 0.45)))
    light = np.stack(np.broadcast_arrays(s["light"], np.float32(1.3), np.float32(-0.9)), -1)
    light = light / np.linalg.norm(light, axis=-1, keepdims=True)          # (n, 1, 3)
    lit = np.maximum((normal * light).sum(-1), 0)
    shade, _ = hit_solid(label, s, point + 1e-3 * normal, np.broadcast_to(light, view.shape))
    lit = np.where(np.isfinite(shade) & ~solid, 0, lit)                    # in the solid's shadow
    colour = colour * (0.40 + 0.60 * lit[..., None])
    image = colour.reshape(n, size, 2, size, 2, 3).mean((2, 4))            # smooth edges
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def palette(hue, saturation):
    """Hue in [0, 1) -> RGB, by three shifted cosines: (n, 1) -> (n, 1, 3)."""
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (hue[..., None] - np.array([0, 1 / 3, 2 / 3])))
    return (1 - saturation * (1 - wave)).astype(np.float32)


def hit_solid(label, s, start, direction):
    """Where rays meet the solid: distance t (inf: never) and outward normal there.

    Every solid is convex: an intersection of half-spaces a.p <= b and, for the round ones, of
    one quadric x^2 + q y^2 + z^2 <= w around a centre. A ray is inside each of them for an
    interval of t; it is inside the solid in the intersection of these intervals.
    """
    # Into the solid's own coordinates: stands on the floor at 0, radius 1/2, height 1.
    c, o = np.cos(s["turn"]), np.sin(s["turn"])
    shift = np.stack([s["x"], np.zeros_like(s["x"]), s["z"]], -1)
    p, d = ((a[..., 0] * c + a[..., 2] * o, a[..., 1] + 0 * c, a[..., 2] * c - a[..., 0] * o)
            for a in ((start - shift) / s["scale"][..., None], direction / s["scale"][..., None]))
    planes = [((0, 1, 0), 1.0), ((0, -1, 0), 0.0)]                         # 0 <= y <= 1
    if SOLIDS[label] == "cube":
        planes += [((x, 0, z), 0.5) for x, z in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    if SOLIDS[label] == "octahedron":
        planes = [((x, y, z), 0.5 + 0.5 * y) for x in (-0.7, 0.7) for y in (-1, 1)
                  for z in (-0.7, 0.7)]
    near = np.full(d[0].shape, -np.inf, np.float32)
    far = -near
    normal = np.zeros((*d[0].shape, 3), np.float32)
    for (ax, ay, az), b in planes:
        speed = ax * d[0] + ay * d[1] + az * d[2]      # of the ray against the plane
        t = (b - ax * p[0] - ay * p[1] - az * p[2]) / np.where(speed == 0, 1e-9, speed)
        enters = (speed < 0) & (t > near)
        near = np.where(enters, t, near)
        far = np.where(speed > 0, np.minimum(far, t), far)
        normal[enters] = (ax, ay, az)
    quadric = {"sphere": (0.5, 1.0, 0.25), "cylinder": (0.0, 0.0, 0.11),
               "cone": (1.0, -0.25, 0.0)}.get(SOLIDS[label])               # centre y, q, w
    if quadric:
        cy, q, w = quadric
        y = p[1] - cy
        A = d[0] ** 2 + q * d[1] ** 2 + d[2] ** 2
        B = d[0] * p[0] + q * d[1] * y + d[2] * p[2]
        root = B * B - A * (p[0] ** 2 + q * y * y + p[2] ** 2 - w)
        t = (-B - np.sqrt(np.maximum(root, 0))) / A
        far = np.where(root > 0, np.minimum(far, (-B + np.sqrt(np.maximum(root, 0))) / A), -np.inf)
        enters = t > near
        near = np.where(enters, t, near)
        round_normal = np.stack([p[0] + t * d[0], q * (y + t * d[1]), p[2] + t * d[2]], -1)
        normal = np.where(enters[..., None], round_normal, normal)
    t = np.where((near < far) & (near > 1e-3), near, np.inf)
    normal = np.stack([normal[..., 0] * c - normal[..., 2] * o, normal[..., 1],
                       normal[..., 2] * c + normal[..., 0] * o], -1)       # back to the room
    return t, normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)


# ---------------------------------------------------------------------------------------------
# Own data
# ---------------------------------------------------------------------------------------------


class Data:
    """Images as bytes: train and test (N, H, W, 3) uint8, labels (N,) int64 or None, classes.
    Of the demo's scenes also what is in them: factors, {name: int64 of train and test}."""

    def __init__(self, train, test, train_labels=None, test_labels=None, classes=(), factors=None):
        self.train, self.test = torch.from_numpy(train), torch.from_numpy(test)
        self.train_labels, self.test_labels = (
            None if a is None else torch.from_numpy(np.asarray(a, np.int64))
            for a in (train_labels, test_labels))
        self.classes = list(classes)
        self.factors = {k: torch.from_numpy(v) for k, v in (factors or {}).items()}


def load_data(args):
    """--data: nothing, "cifar10", a folder of images, or an .npy / .npz file."""
    if args.data is None:
        images, labels, factors = demo_images(args.demo_images + args.demo_images // 10,
                                              args.seed, args.size or 32)
        k = args.demo_images
        data = Data(images[:k], images[k:], labels[:k], labels[k:], SOLIDS, factors)
        source = f"--size {args.size}"
    elif args.data == "cifar10":
        data, source = load_cifar10(Path(args.data_dir)), "--data cifar10"
    else:
        path = Path(args.data)
        if not path.exists():
            stop(f"--data {path}: no such file or folder")
        data = load_folder(path, args) if path.is_dir() else load_array(path, args)
        source = f"--data {path}"
    factor = 4
    height, width = data.train.shape[1:3]
    if height % factor or width % factor:
        stop(f"{source}: images of {height} x {width}; both sides must be multiples of "
             f"{factor}, the product of the encoder's strides (--size S crops and scales)")
    return data


def load_cifar10(folder):
    """The binary version of CIFAR-10: extracted or packed in `folder`, or else downloaded."""
    extracted, packed = folder / "cifar-10-batches-bin", folder / "cifar-10-binary.tar.gz"
    try:
        if not extracted.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:   # until whole and genuine
                found = packed if packed.exists() else Path(scratch) / packed.name
                if found != packed:
                    print(f"downloading {CIFAR10_URL} (170 MB) to {packed}", flush=True)
                    with urllib.request.urlopen(CIFAR10_URL, timeout=60) as web:
                        with open(found, "wb") as f:
                            shutil.copyfileobj(web, f)
                with open(found, "rb") as f:
                    digest = hashlib.file_digest(f, "md5").hexdigest()
                if digest != CIFAR10_MD5:
                    raise OSError(f"its MD5 is {digest}, must be {CIFAR10_MD5}")
                found.replace(packed)
                with tarfile.open(packed) as archive:
                    archive.extractall(scratch, filter="data")         # nothing outside scratch
                (Path(scratch) / extracted.name).rename(extracted)
        parts = [read_cifar10(extracted / f"data_batch_{i}.bin") for i in range(1, 6)]
        test, test_labels = read_cifar10(extracted / "test_batch.bin")
    except (OSError, tarfile.TarError) as e:
        stop(f"--data cifar10: {packed} is not usable ({' '.join(str(e).split())}): put "
             f"{CIFAR10_URL} there, or say with --data-dir where it is")
    images, labels = (np.concatenate(a) for a in zip(*parts))
    return Data(images, test, labels, test_labels, CIFAR10_CLASSES)


def read_cifar10(path):
    """Records of one byte of label and 3 x 32 x 32 of image."""
    records = np.fromfile(path, np.uint8)
    if len(records) % 3073 or not len(records) or records[::3073].max() > 9:
        raise OSError(f"{path}: {len(records)} bytes; must be records of 3073, first a label 0-9")
    records = records.reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int64)


IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff")


def load_folder(path, args):
    """Images in a folder; subfolders are classes. With train/ and test/ inside, that is the split;
    otherwise every tenth image is held out."""
    if (path / "train").is_dir() and (path / "test").is_dir():
        classes = class_names(path / "train")
        train, train_labels = read_images(path / "train", classes, args.size)
        test, test_labels = read_images(path / "test", classes, args.size)
        if train.shape[1:] != test.shape[1:]:
            stop(f"--data {path}: train/ has images of {train.shape[1]} x {train.shape[2]}, "
                 f"test/ of {test.shape[1]} x {test.shape[2]}; --size S crops and scales")
        return Data(train, test, train_labels, test_labels, classes)
    classes = class_names(path)
    images, labels = read_images(path, classes, args.size)
    return hold_out(images, labels, classes, path)


def class_names(path):
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def read_images(path, classes, size):
    """All images below path, by name: (N, H, W, 3) uint8, and labels if there are classes."""
    from PIL import Image
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())
    if not files:
        stop(f"{path}: no images ({' '.join(IMAGE_ENDINGS)})")
    images = None
    for i, file in enumerate(files):
        try:
            with Image.open(file) as image:
                image = image.convert("RGB")
                image = np.asarray(crop_and_scale(image, size) if size else image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            stop(f"{file}: not a readable image ({' '.join(str(e).split())})")
        if images is None:
            images = np.empty((len(files), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            stop(f"{file}: {image.shape[0]} x {image.shape[1]}, but {files[0]} is "
                 f"{images.shape[1]} x {images.shape[2]}; --size S crops and scales all to S x S")
        images[i] = image
    if not classes:
        return images, None
    index = {name: i for i, name in enumerate(classes)}
    labels = [index.get(file.relative_to(path).parts[0], -1) for file in files]
    if -1 in labels:
        stop(f"{files[labels.index(-1)]}: lies outside the class folders of {path} "
             f"({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})")
    return images, np.array(labels)


def crop_and_scale(image, size):
    """The largest square in the middle, scaled to size x size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), box=(left, top, left + side, top + side),
                        resample=3, reducing_gap=3.0)  # 3: bicubic


def load_array(path, args):
    """.npy or .npz with uint8 images (N, H, W, 3) or clips (N, T, H, W, 3). An .npz may hold
    `labels` (N,) and `split` (N,) of "train" / "test" beside them."""
    try:
        file = np.load(path, allow_pickle=False)
        arrays = {k: file[k] for k in file.files} if hasattr(file, "files") else {"images": file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        stop(f"{path}: not a readable .npy or .npz array ({' '.join(str(e).split())[:120]})")
    pictures = [k for k, a in arrays.items() if a.ndim in (4, 5) and a.shape[-1] == 3]
    if len(pictures) != 1:
        found = ", ".join(f"{k} {a.dtype}{a.shape}" for k, a in arrays.items())
        stop(f"{path}: needs one array of images (N, H, W, 3) or clips (N, T, H, W, 3), found "
             f"{found}")
    images = arrays[pictures[0]]
    if images.dtype != np.uint8:
        stop(f"{path}: {pictures[0]} is {images.dtype}, must be uint8 (0 .. 255)")
    if not len(images):
        stop(f"{path}: {pictures[0]} has shape {images.shape}: no images in it")
    labels, split = arrays.get("labels"), arrays.get("split")
    for name, a in (("labels", labels), ("split", split)):
        if a is not None and a.shape != images.shape[:1]:
            stop(f"{path}: {name} has shape {a.shape}, must be ({len(images)},): one for each of "
                 f"{pictures[0]}")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.min() < 0):
        stop(f"{path}: labels must be integers from 0 up")
    classes = [] if labels is None else [str(k) for k in range(int(labels.max()) + 1)]
    if images.ndim == 5:                               # a clip is held out whole, or not at all
        clips = images.shape[1]
        labels = labels if labels is None else labels.repeat(clips)
        split = split if split is None else split.repeat(clips)
        images = images.reshape(-1, *images.shape[2:])
        test = np.arange(len(images)) // clips % 10 == 9
    else:
        test = None
    if split is not None:
        test = np.char.startswith(split.astype(str), "test")
    return hold_out(images, labels, classes, path, test)


def hold_out(images, labels, classes, path, test=None):
    """Split off `test`, by default every tenth image."""
    test = np.arange(len(images)) % 10 == 9 if test is None else test
    if test.all() or not test.any():
        stop(f"{path}: {len(images)} images, of which {int(test.sum())} held out for testing: "
             "needs at least one in each part (ten without a split of its own)")
    pick = (lambda a, m: None if a is None else a[m])
    return Data(images[~test], images[test], pick(labels, ~test), pick(labels, test), classes)


# ---------------------------------------------------------------------------------------------
# The experiment
# ---------------------------------------------------------------------------------------------


def make_parser():
    parser = Parser("image", PRESETS, description=__doc__)
    flag = parser.add_argument
    flag("--model", choices=["vqvae", "vae", "vimco"], default="vqvae", help="vae and vimco: what "
         "sec. 4.1 compares with")
    flag("--likelihood", choices=["mse", "categorical"], default="mse", help="p(x|z): a Gaussian "
         "(default), or a softmax over 256 intensities (bits/dim; sec. 4.1)")
    flag("--data-dir", default="data", help="where --data cifar10 looks for the binary version, "
         "extracted or packed, and keeps what it downloads (default data)")
    flag("--num-codebooks", type=positive(int), default=1, help="G codes a position (sec. 4.1: 10)")
    flag("--latents", type=positive(int), default=32, help="numbers a position, for --model vae")
    flag("--samples", type=positive(int), default=50, help="S >= 2 of --model vimco (paper 50)")
    flag("--vimco-prior", choices=["uniform", "learned", "gaussian"], default="uniform",
         help="p(z) of --model vimco (default uniform, as the VQ-VAE's)")
    flag("--warmup-steps", type=positive(int), help="steps as a plain autoencoder, before the "
         "codebook starts at its outputs (the paper has none)")
    flag("--res-hidden", type=positive(int), help="channels inside a residual block")
    flag("--prior-batch-size", type=positive(int), help="examples a step for the prior (default "
         "--batch-size)")
    flag("--prior-lr", type=positive(float), help="Adam's learning rate for the prior")
    flag("--second-stage", action="store_true", help="after the prior: a second VQ-VAE that says "
         "a whole image in three codes (sec. 4.2, figure 5), and a VAE for comparison")
    flag("--second-steps", type=positive(int), default=1000, help="training steps of each of its "
         "models (default %(default)s)")
    flag("--size", type=positive(int), help="crop all images to squares and scale them to "
         "SIZE x SIZE")
    flag("--classifier-steps", type=positive(int), default=800, help="training steps of the "
         "classifier that judges samples, where there are classes (default %(default)s)")
    flag("--demo-images", type=positive(int), default=16000, help="training images of the demo")
    return parser


def main():
    run = Run(make_parser())
    args = run.args
    if args.num_codes < 2:
        stop(f"--num-codes {args.num_codes}: a latent that has one value says nothing; at least 2")
    if args.model == "vimco" and args.samples < 2:
        stop("--samples 1: VIMCO judges each sample by the others, so it needs at least 2")
    if args.second_stage and args.model != "vqvae":
        stop(f"--second-stage works on the codes of --model vqvae; --model {args.model} has none")
    if args.data is None:
        run.say(f"rendering {args.demo_images} scenes")
    data = load_data(args)
    train, test = (x.permute(0, 3, 1, 2).to(run.device)                # (N, 3, H, W), in place
                   for x in (data.train, data.test))
    variance = float(to_unit(train[::max(1, len(train) // 1000)]).var())

    model = make_model(args, variance).to(run.device, memory_format=torch.channels_last)
    height, width = train.shape[2] // 4, train.shape[3] // 4
    run.say(f"{len(train)} training and {len(test)} test images of {train.shape[2]} x "
            f"{train.shape[3]}, {height} x {width} positions each; "
            f"{sum(p.numel() for p in model.parameters()):,} weights in the model")
    some = test[:: -(-len(test) // 100)]               # for the curve; the set may be sorted
    evaluate = (lambda: {f"test_{k}": v for k, v in bits_per_dim(model, some).items()}
                if args.likelihood == "categorical" else {})
    if args.model == "vqvae":
        prior = PixelCNN(args.num_codes, args.prior_channels, PixelCNN.layers_for(height, width),
                         len(data.classes), num_codebooks=args.num_codebooks).to(run.device)
        classifier = Classifier(len(data.classes)).to(run.device) if len(data.classes) > 1 else None
        # The codebook starts at encoder outputs; those of a random encoder are no good place. So
        # the encoder and decoder learn for a moment without it.
        model.quantizer.requires_grad_(False)
        run.fit("autoencoder", model, lambda net, index: (
            net(train[index], quantize=False).loss, {}), len(train), args.warmup_steps,
            args.batch_size, args.lr)
        model.quantizer.requires_grad_(True)
    # Stage one. For the VQ-VAE the prior is "kept constant and uniform".
    run.fit(args.model, model, lambda net, index: model_loss(net, train[index], args), len(train),
            args.steps, args.batch_size, args.lr, evaluate)
    model.requires_grad_(False)                        # stage one is over
    if args.model == "vqvae":
        fit_prior(run, model, prior, classifier, data, train, test)
    else:
        finish(run, model, test, measure(model, test, None, args))


def fit_prior(run, model, prior, classifier, data, train, test):
    """The codes, once, and the prior on them."""
    args = run.args
    codes, test_codes = encode_all(model, train), encode_all(model, test)
    metrics = measure(model, test, test_codes, args)
    if metrics["codes_used"] < 0.1 * metrics["num_codes"]:
        run.say(f"warning: only {metrics['codes_used']} of {metrics['num_codes']} codes are in use:"
                " the prior will look very good, and mean little")
    labels, test_labels = (None if y is None else y.to(run.device)
                           for y in (data.train_labels, data.test_labels))
    run.fit("prior", prior, lambda net, index: prior_loss(
        net, codes[index], None if labels is None else labels[index]), len(codes),
        args.prior_steps, args.prior_batch_size or args.batch_size, args.prior_lr)
    metrics["prior_bits_per_code"] = bits_per_code(prior, test_codes, test_labels)
    if args.likelihood == "categorical":
        metrics.update(fitted_prior(metrics, test, test_codes, data.classes))
    if classifier:
        run.fit("classifier", classifier, lambda net, index: (
            F.cross_entropy(net(train[index]), labels[index]), {}), len(train),
            args.classifier_steps, args.batch_size, 2e-3)
    if args.second_stage:
        metrics.update(second_stage(run, model, codes, test_codes, test, data.factors))
    if run.rank == 0:
        report(run, model, prior, classifier, test, test_labels, data, metrics)


def make_model(args, variance):
    """All three "using the same standard VAE architecture", sec. 4.1."""
    likelihood = Categorical() if args.likelihood == "categorical" else Gaussian(variance)
    widths = dict(hidden=args.hidden, res_hidden=args.res_hidden)
    if args.model == "vae":
        model = VAE(likelihood, args.latents, **widths)
    elif args.model == "vimco":
        model = VIMCO(likelihood, args.num_codes, args.num_codebooks, args.code_dim, args.samples,
                      args.vimco_prior, **widths)
    else:
        model = VQVAE(make_quantizer(args, args.num_codebooks), likelihood, **widths)
    if args.likelihood == "categorical":
        likelihood.init_logits(model.decoder[-1])
    return model


def make_quantizer(args, num_codebooks):
    Quantizer = {"loss": VectorQuantizer, "ema": VectorQuantizerEMA}[args.codebook]
    return Quantizer(args.num_codes, args.code_dim, args.beta, num_codebooks=num_codebooks)


def model_loss(net, x, args):
    y = net(x)
    if args.likelihood == "mse":
        stats = {"mse": F.mse_loss(y.out.detach().float(), to_unit(x)) * 255 ** 2}
    else:
        scale = 1 / (x[0].numel() * math.log(2))       # nats an image -> bits/dim
        stats = {"rate": y.rate.mean() * scale, "distortion": y.nll.mean() * scale}
    if y.codes is not None:
        stats["codes_used"] = count_codes(y.codes, args.num_codes, args.num_codebooks)
    return y.loss, stats


def prior_loss(net, codes, labels):
    loss = F.cross_entropy(net(codes, labels), codes)  # nats a code
    return loss, {"bits_per_code": loss.detach() / math.log(2)}


@torch.no_grad()
def encode_all(model, images, batch=128):
    """Codes (N, h, w) of all images, the last, smaller batch included."""
    return torch.cat([model.encode(x) for x in images.split(batch)])


@torch.no_grad()
def measure(model, images, codes, args, batch=128):
    """All that can be said without a prior, over a whole set of images: reconstruction error, code
    usage (codes None: a model without), bits/dim (categorical likelihood)."""
    decoded = (map(model.decode, codes.split(batch)) if codes is not None else
               map(model.reconstruct, images.split(batch)))
    error = sum(((y.float() - x) ** 2).sum().item()
                for y, x in zip(decoded, images.split(batch))) / images.numel()
    metrics = {"mse": error, "psnr": 10 * math.log10(255 ** 2 / max(error, 1e-9))}
    if codes is not None:
        G = codes.shape[1] if codes.ndim == 4 else 1
        counts = count_codes(codes, args.num_codes, G)
        metrics.update({
            "codes_used": int((counts > 0).sum()), "num_codes": G * args.num_codes,
            # Over all G * K rows the entropy is log G more than the mean of the G codebooks'.
            "perplexity": perplexity(counts).item() / G,
            "compression": images[0].numel() * 8 / (codes[0].numel() * math.log2(args.num_codes))})
    if isinstance(model.likelihood, Categorical):
        torch.manual_seed(args.seed)                   # VAE and VIMCO draw z
        metrics.update(bits_per_dim(model, images))
        if codes is not None:                          # sec. 3.2: is one term of the sum enough?
            gaps = [likelihood_gap(model, x).item() for x in images[:: -(-len(images) // 4)]]
            metrics["likelihood_gap_bits_per_dim"] = np.mean(gaps) / images[0].numel() / math.log(2)
    return metrics


def fitted_prior(metrics, images, codes, classes):
    """Bits/dim with the PixelCNN in place of the uniform prior ("after training", sec. 3.3)."""
    # The PixelCNN knows the class. That is one more latent, and has its price: log2 10 bits.
    bits = metrics["prior_bits_per_code"] * codes[0].numel() + math.log2(max(1, len(classes)))
    rate = bits / images[0].numel()
    return {"bits_per_dim_fitted_prior": rate + metrics["distortion"], "rate_fitted_prior": rate}


@torch.no_grad()
def bits_per_code(prior, codes, labels=None, cond=None, batch=64):
    """-log2 p(codes | labels, cond) / number of codes, under a fitted PixelCNN."""
    labels, cond = ([None] * len(codes) if given is None else given.split(batch)
                    for given in (labels, cond))
    nats = sum(F.cross_entropy(prior(c, y, z), c, reduction="sum").item()
               for c, y, z in zip(codes.split(batch), labels, cond))
    return nats / codes.numel() / math.log(2)


class Classifier(nn.Sequential):
    """A small network that learns the classes from real images, to judge sampled ones by."""

    def __init__(self, classes):
        def block(c_in, c_out):
            return [nn.Conv2d(c_in, c_out, 3, 2, 1), nn.BatchNorm2d(c_out), nn.ReLU()]
        super().__init__(*block(3, 32), *block(32, 64), *block(64, 64), nn.AdaptiveAvgPool2d(4),
                         nn.Flatten(), nn.Linear(64 * 16, classes))

    def forward(self, x):
        return super().forward(to_unit(x))

    @torch.no_grad()
    def accuracy(self, images, labels, batch=128):
        right = sum((self(x).argmax(1) == y).sum().item()
                    for x, y in zip(images.split(batch), labels.split(batch)))
        return right / len(labels)


def report(run, model, prior, classifier, test, test_labels, data, metrics):
    """Samples, pictures and metrics.json."""
    field = test.shape[2] // 4, test.shape[3] // 4
    generator = torch.Generator(run.device).manual_seed(run.args.seed)
    shown = min(10, len(data.classes)) or 8            # columns: a class each
    per_class = 200 // shown if classifier else 8
    wanted = torch.arange(shown, device=run.device).repeat(per_class)
    run.say(f"drawing {len(wanted)} samples from the prior")
    sampled = torch.cat([prior.sample(len(w), *field, labels=w if data.classes else None,
                                      generator=generator) for w in wanted.split(50)])
    samples = torch.cat([model.decode(c) for c in sampled.split(64)])
    if classifier:
        metrics["sample_class_accuracy"] = classifier.accuracy(samples, wanted)
        metrics["real_class_accuracy"] = classifier.accuracy(test, test_labels)
    picture(run.out / "samples.png", samples[:8 * shown].unflatten(0, (8, shown)),
            "samples: codes from the PixelCNN, decoded", data.classes[:shown])
    finish(run, model, test, metrics)


def finish(run, model, test, metrics):
    """What every model leaves: reconstructions, curves, metrics.json."""
    if run.rank != 0:
        return
    metrics["seconds"] = round(run.seconds, 1)
    run.write("metrics.json", json.dumps(metrics, indent=1))
    run.write_curves()
    some = test[:: max(1, len(test) // 16)][:16]
    half = 8 if len(some) == 16 else len(some)
    rows = [images for part in some.split(half) for images in (part, model.reconstruct(part))]
    bits = f" ({metrics['compression']:.1f} times fewer bits)" if "compression" in metrics else ""
    picture(run.out / "reconstructions.png", torch.stack(rows),
            f"test images, and below each its reconstruction{bits}")
    for name, value in metrics.items():
        run.say(f"{name:26} {value:.4g}" if isinstance(value, float) else f"{name:26} {value}")
    run.say(f"pictures and numbers are in {run.out}")


def picture(path, images, title, columns=(), names=()):
    """Save a grid of images (rows, columns, 3, H, W) uint8; names of columns and of rows."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows, cols, _, height, width = images.shape
    sheet = images.permute(0, 3, 1, 4, 2)              # (rows, H, cols, W, 3)
    sheet = F.pad(sheet, (0, 0, 1, 1, 0, 0, 1, 1), value=255).flatten(2, 3).flatten(0, 1)
    figure = plt.figure(figsize=(10, 10 * sheet.shape[0] / sheet.shape[1] + 0.6),
                        layout="constrained")
    axis = figure.add_subplot(title=title)
    axis.imshow(sheet.cpu().numpy())
    axis.set_xticks([(k + 0.5) * (width + 2) for k in range(len(columns))], columns)
    axis.set_yticks([(k + 0.5) * (height + 2) for k in range(len(names))], names)
    axis.tick_params(length=0)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# The second stage: a whole image in 27 bits (sec. 4.2, figure 5)
# ---------------------------------------------------------------------------------------------

LATENTS = 3  # "We use only three latent variables (each with K=512 and their own embedding space"


def second_stage(run, model, codes, test_codes, test, factors):
    """Train the second stage on the code maps of the first, draw figure 5 and return the numbers
    that tell whether the latents are used."""
    args, vectors = run.args, model.quantizer.lookup   # codes -> e_k, what the encoders take
    vqvae, vae, alone = second_models(run, codes.shape[-2:])
    fit_second(run, vqvae, vae, alone, codes, vectors)
    three, test_three = (torch.cat([vqvae.encode(vectors(x)) for x in c.split(128)])
                         for c in (codes, test_codes))                 # (N, 3, 1, 1)
    # So that images come from nothing: p(k_1) p(k_2|k_1) p(k_3|k_1,k_2), a field of one position.
    torch.manual_seed(mix(args.seed, "prior of three"))
    prior = PixelCNN(args.num_codes, args.prior_channels, 1, num_codebooks=LATENTS)
    run.fit("second-prior", prior, lambda net, index: prior_loss(net, three[index], None),
            len(three), args.second_steps, args.prior_batch_size or args.batch_size, args.prior_lr)

    torch.manual_seed(args.seed)                       # the VAE draws z
    with torch.no_grad():
        z = vqvae.quantizer.lookup(test_three)         # (N, 3 * D, 1, 1)
        z_vae, kl = (torch.cat(a) for a in zip(*(vae.encode(vectors(x))
                                                 for x in test_codes.split(128))))
    if run.rank == 0:
        figure_5(run, model, vqvae, vae, prior, test, z, z_vae)
    used = count_codes(test_three, args.num_codes, LATENTS).view(LATENTS, -1).count_nonzero(1)
    metrics = {f"second_codes_used_{g + 1}": n for g, n in enumerate(used.tolist())}
    metrics.update(told("second", vqvae.decoder, test_codes, z))
    metrics.update(told("second_vae", vae.decoder, test_codes, z_vae))
    metrics.update({"second_bits_alone": bits_per_code(alone, test_codes),
                    "second_vae_kl_bits": kl.mean().item() / math.log(2),
                    "second_prior_bits": LATENTS * bits_per_code(prior, test_three)})
    for name, values in factors.items():               # how much of the scene is in the 27 bits
        known, asked = values.to(run.device).split([len(three), len(test_three)])
        guess = read_out(three.flatten(1), known, test_three.flatten(1), args.num_codes)
        metrics[f"second_read_{name}"] = (guess == asked).float().mean().item()
        metrics[f"second_chance_{name}"] = asked.bincount().max().item() / len(asked)
    return metrics


def second_models(run, field):
    """The second VQ-VAE; a VAE with as many numbers and the very same decoder; and that PixelCNN
    alone, told nothing but the codes before."""
    args, latent = run.args, LATENTS * run.args.code_dim
    torch.manual_seed(mix(args.seed, "second stage"))  # the same start whatever was resumed

    def pixelcnn(cond_channels=0):
        return PixelCNN(args.num_codes, args.prior_channels, PixelCNN.layers_for(*field),
                        cond_channels=cond_channels, num_codebooks=args.num_codebooks)

    sizes = dict(in_channels=args.num_codebooks * args.code_dim, field=field, hidden=args.hidden,
                 res_hidden=args.res_hidden)
    return (GlobalVQVAE(make_quantizer(args, LATENTS), pixelcnn(latent), **sizes).to(run.device),
            GlobalVAE(latent, pixelcnn(latent), **sizes).to(run.device), pixelcnn().to(run.device))


def fit_second(run, vqvae, vae, alone, codes, vectors):
    """As many steps for each of the three."""
    args, steps = run.args, run.args.second_steps

    def fit(stage, net, loss, steps):
        run.fit(stage, net, lambda net, index: loss(net, codes[index]), len(codes), steps,
                args.prior_batch_size or args.batch_size, args.prior_lr)

    def loss(net, x):
        y = net(x, vectors(x))
        bits = y.nll.mean() / x[0].numel() / math.log(2)
        if y.codes is None:
            return y.loss, {"bits_per_code": bits, "kl_bits": y.rate.mean() / math.log(2)}
        return y.loss, {"bits_per_code": bits,
                        "codes_used": count_codes(y.codes, args.num_codes, LATENTS)}

    # A warm-up as in the first stage, but half of all steps: codebooks that start before the
    # encoder has learnt what the PixelCNN wants to know lose most of their codes.
    vqvae.quantizer.requires_grad_(False)
    fit("second-autoencoder", vqvae, lambda net, x: (
        net(x, vectors(x), quantize=False).loss, {}), steps // 2)
    vqvae.quantizer.requires_grad_(True)
    # A batch has fewer maps than a codebook has codes, so the codebooks start at K maps' outputs.
    share = min(len(codes), args.num_codes) // run.world
    with torch.no_grad():
        z_e = vqvae.encoder(vectors(codes[run.rank::run.world][:share]))
    vqvae.quantizer.init_codebook(vqvae.quantizer.to_vectors(z_e))
    fit("second-vqvae", vqvae, loss, steps - steps // 2)
    fit("second-vae", vae, loss, steps)
    fit("second-alone", alone, lambda net, x: prior_loss(net, x, None), steps)


def told(name, decoder, codes, z):
    """Bits a code with an image's own z, and with that of another image."""
    # Half the set away: neighbours may be frames of one clip, and nearly the same.
    return {f"{name}_bits_own": bits_per_code(decoder, codes, cond=z),
            f"{name}_bits_other": bits_per_code(decoder, codes, cond=z.roll(len(z) // 2, 0))}


def read_out(three, values, test_three, num_codes):
    """Guess a factor of the scene, `values` (N,) from 0 up, from the three codes (N, 3) of an
    image: a guess for each of test_three. A table for each codebook tells how often code and value
    met in training; they are combined as if independent given the value (naive Bayes).
    """
    score = values.bincount().log()                    # log p(value)
    for g in range(three.shape[1]):
        met = torch.ones(num_codes, score.shape[-1], device=values.device)     # add-one smoothing
        met.index_put_((three[:, g], values), met.new_ones(()), accumulate=True)
        score = score + (met / met.sum(0)).log()[test_three[:, g]]     # + log p(code|value)
    return score.argmax(1)


def figure_5(run, model, vqvae, vae, prior, test, z, z_vae):
    """second_stage.png: images, and samples given what the global codes say of them."""
    field, every = (test.shape[2] // 4, test.shape[3] // 4), max(1, len(test) // 8)
    generator = torch.Generator(run.device).manual_seed(run.args.seed)
    test, z, z_vae = (a[::every][:8] for a in (test, z, z_vae))

    def sample(decoder, z):
        return model.decode(decoder.sample(len(z), *field, cond=z, generator=generator))

    bits = f"{LATENTS * math.log2(run.args.num_codes):.0f} bits"
    rows = [test, *(sample(vqvae.decoder, z) for _ in range(4)), sample(vae.decoder, z_vae)]
    for _ in range(2):
        three = prior.sample(len(z), 1, 1, generator=generator)
        rows.append(sample(vqvae.decoder, vqvae.quantizer.lookup(three)))
    picture(run.out / "second_stage.png", torch.stack(rows), f"test images, and samples given the "
            f"{bits} that a second VQ-VAE keeps of each",
            names=["test image", f"its {bits}", "again", "again", "again", "VAE, its z",
                   f"new {bits}", "new"])


if __name__ == "__main__":
    main()
