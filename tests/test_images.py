"""train_image.py: its data, its numbers, and the whole run from nothing to samples."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import train_image
from prior import PixelCNN
from conftest import ROOT
from test_run import Trap, python, same, stopped
from train_image import bits_per_code, demo_images, encode_all, measure
from vqvae import VQVAE, Gaussian, VectorQuantizer

TINY = ("--warmup-steps 1 --steps 4 --prior-steps 3 --hidden 8 --res-hidden 8 --prior-channels 8 "
        "--num-codes 16 --code-dim 8 --batch-size 8 --classifier-steps 20 --demo-images 60 "
        "--device cpu").split()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder, images, ending="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.{ending}")


def load(path, *flags):
    args = train_image.make_parser().parse_args(["--data", str(path), *flags])
    return train_image.load_data(args)


@pytest.fixture
def main(monkeypatch, tmp_path):
    """The script, called in this process: main("--flag", value, ...)."""
    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["train_image.py", "--out", str(tmp_path / "out"), *TINY,
                                          *map(str, flags)])
        train_image.main()
    return call


# -- demo data ----------------------------------------------------------------------------------


def test_demo_images_are_a_function_of_the_seed():
    (one, labels, factors), again, other = (demo_images(24, seed, 16) for seed in (3, 3, 4))
    assert np.array_equal(one, again[0]) and np.array_equal(labels, again[1])
    assert not np.array_equal(one, other[0])
    assert one.shape == (24, 16, 16, 3) and one.dtype == np.uint8
    assert all(len(f) == 24 for f in factors.values())


def test_demo_images_all_differ():
    images, labels, _ = demo_images(60, 0, 16)
    assert len(np.unique(images.reshape(60, -1), axis=0)) == 60, "a test image was trained on"
    assert set(labels) == set(range(len(train_image.SOLIDS)))


def test_demo_label_decides_what_stands_in_the_room():
    scene = {"hue": 0.1, "wall_hue": 0.5, "floor_hue": 0.8, "x": 0.0, "z": 0.0, "scale": 1.5,
             "turn": 0.3, "light": 0.5}
    scene = {k: np.array([v]) for k, v in scene.items()}
    pictures = [train_image.render(label, scene, 32)[0].astype(float)
                for label in range(len(train_image.SOLIDS))]
    for i, one in enumerate(pictures):
        for two in pictures[:i]:
            assert (np.abs(one - two).max(-1) > 40).mean() > 0.01


# -- own data -----------------------------------------------------------------------------------


def test_npy_bytes_arrive_as_they_are_and_every_tenth_is_held_out(tmp_path):
    images = noise(25, 8, 12, 3)
    np.save(tmp_path / "a.npy", images)
    data = load(tmp_path / "a.npy")
    held = np.arange(25) % 10 == 9
    assert np.array_equal(data.train, images[~held]) and np.array_equal(data.test, images[held])
    assert data.train_labels is None and data.classes == []


def test_npz_labels_and_split_are_used(tmp_path):
    images, labels = noise(12, 8, 8, 3), np.arange(12) % 3
    split = np.where(np.arange(12) < 5, "test", "train")
    np.savez(tmp_path / "a.npz", images=images, labels=labels, split=split)
    data = load(tmp_path / "a.npz")
    assert np.array_equal(data.test, images[:5]) and np.array_equal(data.train, images[5:])
    assert np.array_equal(data.test_labels, labels[:5])
    assert np.array_equal(data.train_labels, labels[5:]) and len(data.classes) == 3


def test_clips_are_held_out_whole(tmp_path):
    clips, labels = noise(20, 3, 8, 8, 3), np.arange(20)
    np.savez(tmp_path / "a.npz", clips=clips, labels=labels)
    data = load(tmp_path / "a.npz")
    assert np.array_equal(data.test, clips[9::10].reshape(-1, 8, 8, 3)), (
        "frames of one clip look alike: none may be in both training and test data")
    assert data.test_labels.tolist() == [9] * 3 + [19] * 3 and len(data.train) == 54


def test_folder_of_images(tmp_path):
    images = noise(10, 8, 8, 3)
    write_images(tmp_path / "d", images)
    data = load(tmp_path / "d")
    assert np.array_equal(data.train, images[:9]) and np.array_equal(data.test, images[9:])
    assert data.train_labels is None


def test_subfolders_are_classes(tmp_path):
    cats, dogs = noise(10, 8, 8, 3), 255 - noise(10, 8, 8, 3)
    write_images(tmp_path / "d" / "dog", dogs), write_images(tmp_path / "d" / "cat", cats)
    data = load(tmp_path / "d")
    assert data.classes == ["cat", "dog"]
    assert np.array_equal(data.train, np.concatenate([cats[:9], dogs[:9]]))
    assert data.train_labels.tolist() == [0] * 9 + [1] * 9 and data.test_labels.tolist() == [0, 1]


def test_train_and_test_folders_are_the_split(tmp_path):
    for part, n in (("train", 4), ("test", 2)):
        for k, name in enumerate(("cat", "dog")):
            write_images(tmp_path / "d" / part / name, noise(n + k, 8, 8, 3))
    data = load(tmp_path / "d")
    assert data.classes == ["cat", "dog"]
    assert data.train_labels.tolist() == [0] * 4 + [1] * 5
    assert data.test_labels.tolist() == [0] * 2 + [1] * 3 and len(data.test) == 5


def test_size_cuts_the_middle_square_and_scales_it(tmp_path):
    (tmp_path / "d").mkdir()
    red, green, blue = (np.broadcast_to(np.uint8(np.eye(3) * 200)[k], (8, 8, 3)) for k in range(3))
    for i in range(10):
        wide = np.concatenate([red, green, blue], i % 2)               # beside or below each other
        Image.fromarray(wide).save(tmp_path / "d" / f"{i}.png")
    data = load(tmp_path / "d", "--size", "4")
    assert data.train.shape == (9, 4, 4, 3)
    r, g, b = data.train.unbind(-1)
    assert g.min() > 180 and r.max() < 20 and b.max() < 20, "the middle of each image is green"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    (tmp_path / "d").mkdir()
    for i in range(10):
        image = Image.new("RGB", (8, 8), (90, 90, 90))
        image = image.quantize() if mode == "P" else image.convert(mode)
        image.save(tmp_path / "d" / f"{i}.png")
    assert (load(tmp_path / "d").train == 90).all()


# -- bad data -----------------------------------------------------------------------------------


def array(name, **arrays):
    def write(folder):
        (np.save if "images" in arrays and name.endswith(".npy") else np.savez)(
            folder / name, *([arrays["images"]] if name.endswith(".npy") else []),
            **({} if name.endswith(".npy") else arrays))
        return folder / name
    return write


def file(name, content):
    def write(folder):
        (folder / name).write_bytes(content)
        return folder / name
    return write


def pictures(spoil=lambda folder: None, count=12, size=8):
    def write(folder):
        write_images(folder / "d", noise(count, size, size, 3))
        spoil(folder / "d")
        return folder / "d"
    return write


def halve(path):
    path.write_bytes(path.read_bytes()[:-60])


def classes_with_a_stray(folder):
    write_images(folder / "cat", noise(3, 8, 8, 3))


def unequal_parts(folder):
    write_images(folder / "train", noise(4, 8, 8, 3))
    write_images(folder / "test", noise(4, 12, 12, 3))


def new_class_in_test(folder):
    write_images(folder / "train" / "cat", noise(4, 8, 8, 3))
    write_images(folder / "test" / "dog", noise(4, 8, 8, 3))


FINE = noise(20, 8, 8, 3)
BAD = {
    "nothing there": (lambda folder: folder / "d", ["--data", "d"]),
    "empty folder": (pictures(count=0), ["d", "no images"]),
    "mixed sizes": (pictures(lambda d: write_images(d / "x", noise(1, 8, 12, 3))),
                    ["8 x 12", "8 x 8", "--size"]),
    "not an image": (pictures(lambda d: (d / "004.png").write_text("hello")), ["004.png"]),
    "torn image": (pictures(lambda d: halve(d / "007.png")), ["007.png"]),
    "sides not divisible": (pictures(size=10), ["10 x 10", "4"]),
    "stray image": (pictures(classes_with_a_stray), ["000.png", "cat"]),
    "unequal parts": (pictures(unequal_parts, 0), ["8 x 8", "12 x 12"]),
    "new class in test": (pictures(new_class_in_test, 0), ["dog", "000.png", "cat"]),
    "too few": (pictures(count=5), ["5 images"]),
    "floats": (array("a.npy", images=FINE / 255), ["a.npy", "float64", "uint8"]),
    "one channel": (array("a.npy", images=FINE[..., :1]), ["a.npy", "(20, 8, 8, 1)"]),
    "no channels": (array("a.npy", images=FINE[..., 0]), ["a.npy", "(20, 8, 8)"]),
    "channels first": (array("a.npy", images=FINE.transpose(0, 3, 1, 2)), ["(20, 3, 8, 8)"]),
    "array too small": (array("a.npy", images=FINE[:3]), ["a.npy", "3 images"]),
    "no images": (array("a.npz", images=FINE[:0], labels=np.zeros(0, int)), ["(0, 8, 8, 3)"]),
    "objects": (array("a.npy", images=np.array([{}, None])), ["a.npy"]),
    "two arrays": (array("a.npz", a=FINE, b=FINE), ["a.npz", "a uint8", "b uint8"]),
    "short labels": (array("a.npz", images=FINE, labels=np.arange(4)), ["labels", "(4,)", "(20,)"]),
    "negative labels": (array("a.npz", images=FINE, labels=np.arange(20) - 1), ["labels"]),
    "fractional labels": (array("a.npz", images=FINE, labels=np.ones(20)), ["labels", "integers"]),
    "short split": (array("a.npz", images=FINE, split=np.array(["test"])), ["split", "(20,)"]),
    "split without training": (array("a.npz", images=FINE, split=np.array(["test"] * 20)),
                               ["20 held out"]),
    "text": (file("a.npy", b"hello"), ["a.npy"]),
    "torn zip": (file("a.npz", b"PK\x03\x04 and then nothing"), ["a.npz"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named_in_one_line_and_touches_nothing(main, capsys, tmp_path, case):
    write, words = BAD[case]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"an older run")
    line = stopped(capsys, main, "--data", write(tmp_path))
    missing = [word for word in words if word not in line]
    assert line.startswith("error: ") and not missing, f"{missing} not in: {line}"
    left = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert left == {"checkpoint.pt": b"an older run"}, (
        "a slip in --data must leave the folder of an older run as it was")


def test_an_array_that_would_run_code_is_refused(main, capsys, tmp_path):
    np.save(tmp_path / "a.npy", np.array([Trap(str(tmp_path / "sprung"))]), allow_pickle=True)
    stopped(capsys, main, "--data", tmp_path / "a.npy")
    assert not (tmp_path / "sprung").exists(), "numpy.load needs allow_pickle=False"


def test_fewer_images_than_a_batch(main, capsys, tmp_path):
    np.save(tmp_path / "a.npy", noise(20, 8, 8, 3))
    line = stopped(capsys, main, "--data", tmp_path / "a.npy", "--batch-size", "19")
    assert "18 training examples" in line and "batch of 19" in line and "--batch-size" in line


def test_size_of_the_demo_that_the_strides_do_not_divide(main, capsys):
    line = stopped(capsys, main, "--size", "18")
    assert "18 x 18" in line and "4" in line


@pytest.mark.parametrize("flags", [["--num-codes", "1"], ["--num-codes", "0"], ["--beta", "-1"],
                                   ["--codebook", "k-means"], ["--code-dim", "0"], ["--size", "0"]])
def test_bad_flag_of_this_script_is_named(main, capsys, flags):
    assert flags[0] in stopped(capsys, main, *flags)


# -- the numbers --------------------------------------------------------------------------------


class Args:
    num_codes = 16


@pytest.fixture
def small():
    model = VQVAE(VectorQuantizer(16, 4), Gaussian(), hidden=8, res_hidden=8).eval()
    images = torch.from_numpy(noise(7, 8, 12, 3)).permute(0, 3, 1, 2)
    with torch.no_grad():                              # codes that all get used
        z_e = model.quantizer.to_vectors(model.encoder(images.float() / 255 - 0.5))[0]
        model.quantizer.codebook.copy_(z_e[:: len(z_e) // 16][:16])
    return model, images, torch.cat([model.encode(x[None]) for x in images])


def test_every_image_is_encoded_the_last_small_batch_too(small):
    model, images, codes = small
    assert torch.equal(encode_all(model, images, batch=3), codes)


def test_mse_and_psnr_are_over_the_whole_test_set(small):
    model, images, codes = small
    decoded = np.concatenate([model.decode(c[None]).numpy() for c in codes]).astype(float)
    mse = ((decoded - images.numpy()) ** 2).mean()
    got = measure(model, images, codes, Args, batch=3)
    assert got["mse"] == pytest.approx(mse), "7 images in batches of 3: the last one counts too"
    assert got["psnr"] == pytest.approx(10 * math.log10(255 ** 2 / mse))


def test_code_usage_is_over_the_whole_test_set(small):
    model, images, codes = small
    used, n = np.unique(codes.numpy(), return_counts=True)
    p = n / n.sum()
    got = measure(model, images, codes, Args, batch=1)
    assert got["codes_used"] == len(used) > 8 and got["num_codes"] == 16
    assert got["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5), (
        "perplexity of all codes of the test set, not of a batch and not a mean over batches")


def test_compression_of_the_paper_is_42_6():
    images = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    codes = torch.zeros(1, 32, 32, dtype=torch.long)

    class Model:
        likelihood = None

        def decode(self, codes):
            return images

    class Args:
        num_codes = 512

    got = measure(Model(), images, codes, Args)["compression"]
    assert got == pytest.approx(128 * 128 * 3 * 8 / (32 * 32 * 9)), "sec. 4.2: about 42.6"


def test_a_prior_that_knows_nothing_pays_log2_k_bits():
    prior, codes = PixelCNN(16, 8, 2), torch.randint(16, (5, 3, 4))
    torch.nn.init.zeros_(prior.head.weight)            # its bias is zero from the start
    assert bits_per_code(prior, codes, None) == pytest.approx(4)


def test_prior_bits_are_the_mean_over_all_test_codes():
    prior, codes = PixelCNN(16, 8, 2, num_classes=3), torch.randint(16, (5, 3, 4))
    labels = torch.tensor([0, 1, 2, 1, 0])
    bits = []
    for c, y in zip(codes, labels):
        p = prior(c[None], y[None])[0].softmax(0).detach().numpy()
        bits += [-math.log2(p[c[i, j], i, j]) for i in range(3) for j in range(4)]
    assert bits_per_code(prior, codes, labels, batch=2) == pytest.approx(np.mean(bits), rel=1e-5)


# -- the whole run ------------------------------------------------------------------------------

SIGNAL_AT = """
import os, signal, sys, torch, train_image
backward, calls, wanted = torch.Tensor.backward, [], int(sys.argv.pop())

def counted(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == wanted:
        os.kill(os.getpid(), signal.SIGINT)
    return backward(self, *args, **kwargs)

torch.Tensor.backward = counted
train_image.main()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run as it is, in this process: whole/ and 0.pt. One stopped by Ctrl-C in stage one (1.pt)
    and in the prior (2.pt) and then ended (3.pt), a process each: parts/."""
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "a.npy", demo_images(60, 0, 16)[0])
    flags = ["--data", folder / "a.npy", "--codebook", "ema", "--lr-decay", "0.5", *TINY]
    models = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_image.py", *map(str, flags), "--out",
                                    str(folder / "whole")])
        patch.setattr(train_image, "VQVAE", lambda *args, **kwargs: models.append(
            VQVAE(*args, **kwargs)) or models[-1])
        train_image.main()
    torch.save(models[0].state_dict(), folder / "model after the run.pt")
    shutil.copy(folder / "whole" / "checkpoint.pt", folder / "0.pt")
    for n, begin, at in ((1, flags, 3), (2, ["--resume"], 4), (3, ["--resume"], 0)):
        done = python("-c", SIGNAL_AT, *begin, "--out", folder / "parts", at, cwd=folder)
        assert done.returncode == (130 if at else 0), done.stderr
        shutil.copy(folder / "parts" / "checkpoint.pt", folder / f"{n}.pt")
    steps = [{stage: saved["step"] for stage, saved in checkpoint(folder / f"{n}.pt")[
        "stages"].items()} for n in (1, 2)]
    assert steps == [{"autoencoder": 1, "vqvae": 2}, {"autoencoder": 1, "vqvae": 4, "prior": 2}], (
        "stopped elsewhere than planned")
    return folder


def checkpoint(path):
    return torch.load(path, weights_only=True)


def test_resumed_weights_and_optimiser_equal_uninterrupted_bit_for_bit(runs):
    assert same(checkpoint(runs / "0.pt")["stages"], checkpoint(runs / "3.pt")["stages"]), (
        "stopped by Ctrl-C in stage one and in the prior and resumed, the run ends with other "
        "weights than one that was never stopped")


def test_resumed_numbers_equal_uninterrupted(runs):
    one, two = (json.loads((runs / folder / "metrics.json").read_text())
                for folder in ("whole", "parts"))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    logs = [[{**row, "seconds": 0} for row in checkpoint(runs / f"{n}.pt")["log"]] for n in (0, 3)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("name", ["samples.png", "reconstructions.png"])
def test_resumed_pictures_equal_uninterrupted(runs, name):
    one, two = (np.asarray(Image.open(runs / folder / name)) for folder in ("whole", "parts"))
    assert np.array_equal(one, two)


def test_stage_one_is_frozen_while_the_prior_is_fitted(runs):
    before = checkpoint(runs / "0.pt")["stages"]["vqvae"]["model"]
    after = checkpoint(runs / "model after the run.pt")
    changed = [k for k in before if not same(before[k], after[k])]
    assert not changed, (
        f"{changed[:3]} moved while the prior was fitted: its codes no longer mean what they did "
        "(sec. 3.3: the prior is fitted after training)")


def test_a_run_leaves_what_design_promises(runs):
    for name in ("config.json", "log.csv", "checkpoint.pt", "metrics.json", "reconstructions.png",
                 "samples.png", "curves.png"):
        assert (runs / "whole" / name).stat().st_size > 0, name
    for picture in (runs / "whole").glob("*.png"):
        assert np.asarray(Image.open(picture).convert("L")).std() > 5, f"{picture.name} is blank"
    left = [p.name for p in (runs / "whole").iterdir() if "tmp" in p.name]
    assert not left, f"temporary files were left behind: {left}"


def test_demo_with_classes_reports_every_number(main, tmp_path):
    main("--size", "16")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for name in ("psnr", "mse", "codes_used", "num_codes", "perplexity", "prior_bits_per_code",
                 "sample_class_accuracy", "seconds"):
        assert math.isfinite(metrics[name]), name
    readme = (ROOT / "README.md").read_text()
    assert not [name for name in metrics if f"`{name}`" not in readme], "README explains every key"
    model, prior = (checkpoint(tmp_path / "out" / "checkpoint.pt")["stages"][stage]["model"]
                    for stage in ("vqvae", "prior"))
    assert "layers.0.label.weight" in prior and "quantizer.codebook" in model


def test_nan_in_the_prior_keeps_stage_one(main, capsys, monkeypatch, tmp_path):
    np.save(tmp_path / "a.npy", noise(20, 8, 8, 3))
    loss, calls = train_image.F.cross_entropy, []

    def spoilt(*args, **kwargs):
        calls.append(1)
        return loss(*args, **kwargs) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(train_image.F, "cross_entropy", spoilt)
    line = stopped(capsys, main, "--data", tmp_path / "a.npy")
    stages = checkpoint(tmp_path / "out" / "checkpoint.pt")["stages"]
    assert "prior" in line and "step 2" in line and "--lr" in line
    assert stages["vqvae"]["step"] == 4 and "prior" not in stages
