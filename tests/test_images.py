"""train_image.py: its data, its numbers, and the whole run from nothing to samples."""

import io
import json
import math
import os
import shutil
import sys
import tracemalloc
import zipfile
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import train_image
import vqvae
from prior import PixelCNN
from test_run import Trap, python, same, stopped
from train_image import (Data, Images, bits_per_code, code_usage, demo_images, encode_all,
                         measure)
from vqvae import VQVAE, Gaussian, VectorQuantizer, launch

TINY = ("--steps 4 --prior-steps 3 --hidden 8 --res-hidden 8 --prior-channels 8 "
        "--num-codes 16 --code-dim 8 --batch-size 8 --demo-images 60 "
        "--device cpu").split()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder, images, ending="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.{ending}")


def load(path, *flags, folder=None):
    """What the script makes of --data: a Data, as in a run whose --out lies beside the data."""
    args = train_image.make_parser().parse_args(["--data", str(path), *flags])
    args.batch_size = 4
    home = (folder or path.parent) / "runs" / "out"
    run = SimpleNamespace(args=args, home=home, local_rank=0, say=lambda text: None)
    return train_image.load_data(run)


def pixels(part):
    """All images of a part of the data, (N, H, W, C)."""
    return part[torch.arange(len(part))][0].permute(0, 2, 3, 1).numpy()


def labels(part):
    return part.labels[0].tolist()


def start(patch, *flags):
    """The script, called in this process."""
    made, make = [], vqvae.Run
    patch.setattr(vqvae, "Run", lambda parser: made.append(make(parser)) or made[-1])
    patch.setattr(sys, "argv", ["train_image.py", *map(str, flags)])
    try:
        launch(train_image.make_parser(), train_image.load_data, train_image.main, train_image.use)
    finally:
        patch.setattr(vqvae, "Run", make)
        for run in made:                               # as when the process ends
            if getattr(run, "lock", None):
                os.close(run.lock)


@pytest.fixture
def main(monkeypatch, tmp_path):
    return lambda *flags: start(monkeypatch, "--out", tmp_path / "out", *TINY, *flags)


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


def test_npy_bytes_arrive_as_they_are_in_three_parts(tmp_path):
    images = noise(25, 8, 12, 3)
    np.save(tmp_path / "a.npy", images)
    data = load(tmp_path / "a.npy")
    test, valid = np.isin(np.arange(25), [9, 19]), np.isin(np.arange(25), [5, 16])
    assert np.array_equal(pixels(data.test), images[test]), "every tenth image is for testing"
    assert np.array_equal(pixels(data.valid), images[valid]), "every tenth of the rest, validation"
    assert np.array_equal(pixels(data.train), images[~test & ~valid])
    assert data.train.labels == () and data.classes == []


def test_npz_labels_and_split_are_used(tmp_path):
    images, each = noise(12, 8, 8, 3), np.arange(12) % 3
    split = np.array(["test"] * 5 + ["valid"] * 2 + ["Train"] * 5)
    np.savez(tmp_path / "a.npz", images=images, labels=each, split=split)
    data = load(tmp_path / "a.npz")
    for part, rows in ((data.test, slice(5)), (data.valid, slice(5, 7)),
                       (data.train, slice(7, 12))):
        assert np.array_equal(pixels(part), images[rows]) and labels(part) == each[rows].tolist()
    assert data.classes == ["0", "1", "2"]


def test_clips_are_held_out_whole(tmp_path):
    clips = noise(20, 3, 8, 8, 3)
    np.savez(tmp_path / "a.npz", clips=clips, labels=np.arange(20))
    data = load(tmp_path / "a.npz")
    assert np.array_equal(pixels(data.test), clips[9::10].reshape(-1, 8, 8, 3)), (
        "frames of one clip look alike: none may be in both training and test data")
    assert labels(data.test) == [9] * 3 + [19] * 3 and labels(data.valid) == [5] * 3 + [16] * 3
    assert len(data.train) == 48, "nor in both training and validation"


def test_folder_of_images(tmp_path):
    images = noise(10, 8, 8, 3)
    write_images(tmp_path / "d", images)
    data = load(tmp_path / "d")
    assert np.array_equal(pixels(data.test), images[9:])
    assert np.array_equal(pixels(data.train), np.delete(images, (4, 9), 0))
    assert data.train.labels == ()


def test_subfolders_are_classes(tmp_path):
    cats, dogs = noise(10, 8, 8, 3), 255 - noise(10, 8, 8, 3)
    write_images(tmp_path / "d" / "dog", dogs), write_images(tmp_path / "d" / "cat", cats)
    data = load(tmp_path / "d")
    assert data.classes == ["cat", "dog"]
    assert np.array_equal(pixels(data.test), np.stack([cats[9], dogs[9]]))
    train = [i for i in range(20) if i % 10 != 9 and i not in (5, 16)]
    assert np.array_equal(pixels(data.train), np.concatenate([cats, dogs])[train])
    assert labels(data.train) == [0] * 8 + [1] * 8 and labels(data.test) == [0, 1]


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_folders_train_val_and_test_are_the_split(tmp_path, name):
    for part, n in (("train", 4), (name, 3), ("test", 2)):
        for k, kind in enumerate(("cat", "dog")):
            write_images(tmp_path / "d" / part / kind, noise(n + k, 8, 8, 3))
    data = load(tmp_path / "d")
    assert data.classes == ["cat", "dog"], "train/ and val/ are parts, not two classes"
    for part, n in ((data.train, 4), (data.valid, 3), (data.test, 2)):
        assert labels(part) == [0] * n + [1] * (n + 1)


def test_validation_is_cut_from_training_where_there_is_none(tmp_path):
    for part, n in (("train", 20), ("test", 3)):
        write_images(tmp_path / "d" / part / "cat", noise(n, 8, 8, 3))
    data = load(tmp_path / "d")
    assert (len(data.train), len(data.valid), len(data.test)) == (18, 2, 3)
    together = np.concatenate([pixels(data.train), pixels(data.valid)])
    assert len(np.unique(together, axis=0)) == 20, "no image is in both"


def test_frames_in_a_folder_below_the_class_stay_together(tmp_path):
    for clip in range(12):
        write_images(tmp_path / "d" / "cat" / f"clip{clip:02}", noise(3, 8, 8, 3) // 16 + clip * 20)
    data = load(tmp_path / "d")
    clips = [set((pixels(part).mean((1, 2, 3)) // 20).astype(int).tolist())
             for part in (data.train, data.valid, data.test)]
    assert sum(map(len, clips)) == 12 and len(set.union(*clips)) == 12, (
        f"clips {clips} of training, validation and test overlap: their frames are nearly equal")


def test_links_to_class_folders_are_followed_and_hidden_files_are_not_images(tmp_path):
    write_images(tmp_path / "d" / "cat", noise(10, 8, 8, 3))
    write_images(tmp_path / "elsewhere", noise(10, 8, 8, 3))
    (tmp_path / "d" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "cat" / "loop").symlink_to(tmp_path / "d")       # and this one never ends
    (tmp_path / "d" / "cat" / "._000.png").write_bytes(b"resource fork")
    (tmp_path / "d" / ".thumbnails").mkdir()
    data = load(tmp_path / "d")
    assert data.classes == ["cat", "dog"] and sum(data.facts["images"]) == 20


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write_images(tmp_path / "d" / "cat", noise(10, 8, 8, 3))
    (tmp_path / "d" / "dog").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="dog"):
        load(tmp_path / "d")


def test_folders_are_decoded_once_and_changes_are_noticed(tmp_path, monkeypatch):
    write_images(tmp_path / "d", noise(12, 8, 8, 3))
    first, decoded, read = load(tmp_path / "d"), [], train_image.read_image
    monkeypatch.setattr(train_image, "read_image", lambda file, *rest: (
        decoded.append(file), read(file, *rest))[1])
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda items, **kwargs: (
        torch.from_numpy(items[i]) for i in range(len(items))))        # here, where it can be seen
    again = load(tmp_path / "d")
    assert np.array_equal(pixels(again.train), pixels(first.train))
    assert len(decoded) == 1, "the second start decodes one image, for its size, and no more"
    write_images(tmp_path / "d", 255 - noise(1, 8, 8, 3))
    changed = load(tmp_path / "d")
    assert np.array_equal(pixels(changed.train)[0], 255 - pixels(first.train)[0])


LAYOUTS = {
    "(N, H, W)": lambda x: x[..., 0],
    "(N, H, W, 1)": lambda x: x[..., :1],
    "(N, 1, H, W)": lambda x: x[..., :1].transpose(0, 3, 1, 2),
    "(N, 3, H, W)": lambda x: x.transpose(0, 3, 1, 2),
    "(N, T, H, W, 1)": lambda x: x[..., :1].reshape(10, 2, 8, 12, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greyscale_and_channels_first_arrays(tmp_path, layout):
    images = noise(20, 8, 12, 3)
    np.save(tmp_path / "a.npy", LAYOUTS[layout](images))
    expected = images if "3" in layout else images[..., :1]
    assert np.array_equal(pixels(load(tmp_path / "a.npy").train)[:4], expected[:4])


def test_a_label_of_a_billion_is_one_class(tmp_path):
    np.savez(tmp_path / "a.npz", images=noise(20, 8, 8, 3), labels=np.arange(20) % 2 * 10 ** 9)
    data = load(tmp_path / "a.npz")
    assert data.classes == ["0", "1000000000"] and set(labels(data.train)) == {0, 1}


def test_a_large_npy_is_mapped_and_not_read(tmp_path):
    file = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (4000, 64, 64, 3))
    file[::7] = 9
    del file
    tracemalloc.start()
    data = load(tmp_path / "a.npy")
    some = data.train[torch.arange(32)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert some[0].shape == (32, 3, 64, 64) and peak < 30e6, (
        f"{peak / 1e6:.0f} MB of Python's memory for a file of 49 MB")


def test_size_cuts_the_middle_square_and_scales_it(tmp_path):
    (tmp_path / "d").mkdir()
    red, green, blue = (np.broadcast_to(np.uint8(np.eye(3) * 200)[k], (8, 8, 3)) for k in range(3))
    for i in range(10):
        wide = np.concatenate([red, green, blue], i % 2)               # beside or below each other
        Image.fromarray(wide).save(tmp_path / "d" / f"{i}.png")
    data = load(tmp_path / "d", "--size", "4")
    assert pixels(data.train).shape == (8, 4, 4, 3)
    r, g, b = np.moveaxis(pixels(data.train), -1, 0)
    assert g.min() > 180 and r.max() < 20 and b.max() < 20, "the middle of each image is green"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    (tmp_path / "d").mkdir()
    for i in range(10):
        image = Image.new("RGB", (8, 8), (90, 90, 90))
        image = image.quantize() if mode == "P" else image.convert(mode)
        image.save(tmp_path / "d" / f"{i}.png")
    assert (pixels(load(tmp_path / "d").train) == 90).all()


@pytest.mark.parametrize("size", [None, (8, 8)])
def test_a_photo_is_turned_as_the_camera_was_held(tmp_path, size):
    image = Image.fromarray(np.uint8([[255] * 8] * 4 + [[0] * 8] * 4))  # light above
    exif = image.getexif()
    exif[0x112] = 6                                    # a quarter clockwise to be upright
    image.save(tmp_path / "a.jpg", exif=exif)
    x = train_image.read_image(tmp_path / "a.jpg", size, "L").astype(int)
    assert x[:, 5:].min() > 200 and x[:, :3].max() < 50, "its light side belongs on the right"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white_and_not_what_it_hides(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (200, 30, 90, 0)).convert(mode)
    image.save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    assert (train_image.read_image(tmp_path / "a.png") == 255).all()


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_a_pixel_are_refused_and_not_cut_off(tmp_path, kind):
    Image.fromarray(np.linspace(0, 1, 64).reshape(8, 8).astype(kind)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif.*8 bits"):
        train_image.read_image(tmp_path / "a.tif")


def test_jpegs_scaled_while_decoding_look_like_those_scaled_after(tmp_path):
    x, y = np.meshgrid(np.linspace(0, 3, 200), np.linspace(0, 2, 160))
    image = np.stack([np.sin(x + k) * np.cos(y * k) for k in range(3)], -1) * 120 + 128
    Image.fromarray(image.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    fast = train_image.read_image(tmp_path / "a.jpg", (16, 16)).astype(int)
    Image.fromarray(image.astype(np.uint8)).save(tmp_path / "a.png")
    plain = train_image.read_image(tmp_path / "a.png", (16, 16)).astype(int)
    assert np.abs(fast - plain).max() < 12, "the same middle square, at the same scale"


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


def members(**files):
    """An .npz whose members are these bytes."""
    def write(folder):
        with zipfile.ZipFile(folder / "a.npz", "w") as archive:
            for name, content in files.items():
                archive.writestr(name.replace("_npy", ".npy"), content)
        return folder / "a.npz"
    return write


def header(shape):
    """The first bytes of a .npy that claims this shape, and 10 bytes of data."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False,
                                                "shape": shape})
    return file.getvalue() + bytes(10)


def renamed(write, name):
    return lambda folder: write(folder).rename(folder / name)


def floats(folder):
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "x.tif")


FINE = noise(20, 8, 8, 3)
BAD = {
    "nothing there": (lambda folder: folder / "d", ["/d:", "No such file"]),
    "empty folder": (pictures(count=0), ["d", "no images"]),
    "mixed sizes": (pictures(lambda d: Image.fromarray(noise(8, 12, 3)).save(d / "x.png")),
                    ["x.png", "8 x 12", "8 x 8", "--size"]),
    "not an image": (pictures(lambda d: (d / "004.png").write_text("hello")), ["004.png"]),
    "torn image": (pictures(lambda d: halve(d / "007.png")), ["007.png"]),
    "sides not divisible": (pictures(size=10), ["10 x 10", "4"]),
    "stray image": (pictures(classes_with_a_stray), ["000.png", "cat"]),
    "unequal parts": (pictures(unequal_parts, 0), ["8 x 8", "12 x 12"]),
    "new class in test": (pictures(new_class_in_test, 0), ["dog", "000.png", "cat"]),
    "too few": (pictures(count=5), ["5 images"]),
    "floats": (array("a.npy", images=FINE / 255), ["a.npy", "float64", "(images * 255).round()"]),
    "two channels": (array("a.npy", images=FINE[..., :2]), ["a.npy", "(20, 8, 8, 2)"]),
    "no rows": (array("a.npy", images=np.zeros((20, 0, 8, 3), np.uint8)), ["(20, 0, 8, 3)"]),
    "four by four hundred": (array("a.npy", images=FINE.reshape(1, 20, 192, 1)), ["1 images"]),
    "array too small": (array("a.npy", images=FINE[:3]), ["a.npy", "3 images"]),
    "no images": (array("a.npz", images=FINE[:0], labels=np.zeros(0, int)), ["(0, 8, 8, 3)"]),
    "objects": (array("a.npy", images=np.array([{}, None])), ["a.npy"]),
    "two arrays": (array("a.npz", a=FINE, b=FINE), ["a.npz", "a uint8", "b uint8"]),
    "no array": (members(readme=b"hello", more=b""), ["a.npz", "found none"]),
    "zip of photos": (renamed(members(x=b"hello"), "photos.zip"), ["photos.zip", "found none"]),
    "huge header": (file("a.npy", header((10 ** 12, 8, 8, 3))), ["a.npy"]),
    "huge header in a zip": (members(images_npy=header((10 ** 12, 8, 8, 3))), ["a.npz"]),
    "cut in a zip": (members(images_npy=header((20, 8, 8, 3))), ["a.npz"]),
    "header of nonsense": (file("a.npy", header((8,)).replace(b"'shape'", b"'sh(pe'")), ["a.npy"]),
    "an image": (file("a.png", b"\x89PNG"), ["a.png"]),
    "float TIFF": (pictures(floats), ["x.tif", "8 bits"]),
    "beside the parts": (pictures(lambda d: (write_images(d / "train", noise(4, 8, 8, 3)),
                                             write_images(d / "extra", noise(4, 8, 8, 3))), 0),
                         ["extra", "000.png", "train"]),
    "test without train": (pictures(lambda d: (write_images(d / "test", noise(12, 8, 8, 3)),
                                               write_images(d / "val", noise(12, 8, 8, 3))), 0),
                           ["24 held out"]),
    "split of bytes": (array("a.npz", images=FINE, split=np.array([b"\xe9"] * 20)), ["split"]),
    "split of numbers": (array("a.npz", images=FINE, split=np.arange(20)), ["split", "train"]),
    "no path": (lambda folder: "", ["--data"]),
    "a newline in a name": (lambda folder: "d\ne", ["d e: "]),
    "a name of 5,000 letters": (lambda folder: "d" * 5000, ["ddd"]),
    "short labels": (array("a.npz", images=FINE, labels=np.arange(4)), ["labels", "(4,)", "(20,)"]),
    "labels in rows": (array("a.npz", images=FINE, labels=np.zeros((20, 2), int)), ["(20, 2)"]),
    "fractional labels": (array("a.npz", images=FINE, labels=np.ones(20)), ["labels", "integers"]),
    "short split": (array("a.npz", images=FINE, split=np.array(["test"])), ["split", "(20,)"]),
    "split without training": (array("a.npz", images=FINE, split=np.array(["test"] * 20)),
                               ["20 held out"]),
    "unknown word in split": (array("a.npz", images=FINE, split=np.array(["exam"] * 20)),
                              ["a.npz", "split", "exam", "train, "]),
    "text": (file("a.npy", b"hello"), ["a.npy"]),
    "torn zip": (file("a.npz", b"PK\x03\x04 and then nothing"), ["a.npz"]),
}


def test_what_pillow_thinks_of_a_torn_image_does_not_hide_the_one_line(tmp_path):
    write_images(tmp_path / "d", noise(12, 8, 8, 3), "tif")
    torn = bytearray((tmp_path / "d/000.tif").read_bytes())
    at = int.from_bytes(torn[4:8], "little")           # of the directory: its tags, 12 bytes each
    torn[at + 6:at + 10] = (2 ** 20).to_bytes(4, "little")             # "a million values follow"
    (tmp_path / "d/000.tif").write_bytes(torn)
    done = python(train_image.__file__, "--data", tmp_path / "d", "--out", tmp_path / "out")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "000.tif: not readable" in done.stderr


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
    assert "16 training examples" in line and "batch of 19" in line and "--batch-size" in line
    line = stopped(capsys, main, "--data", tmp_path / "a.npy", "--prior-batch-size", "19")
    assert "batch of 19" in line and "--prior-batch-size" in line
    assert not (tmp_path / "out").exists(), "before the first stage is trained"


def test_size_for_an_array_is_refused_unless_it_has_it(main, capsys, tmp_path):
    np.save(tmp_path / "a.npy", noise(20, 8, 8, 3))
    assert "8 x 8" in stopped(capsys, main, "--data", tmp_path / "a.npy", "--size", "16")
    assert load(tmp_path / "a.npy", "--size", "8").facts["size"] == [8, 8, 3]


def test_size_of_the_demo_that_the_strides_do_not_divide(main, capsys):
    line = stopped(capsys, main, "--size", "18")
    assert "--size" in line and "multiple of 4" in line and "18" in line


def test_label_without_sample_starts_no_training(main, capsys):
    assert "--label needs --sample" in stopped(capsys, main, "--label", "cone")


@pytest.mark.parametrize("flags", [["--num-codes", "0"], ["--beta", "-1"],
                                   ["--codebook", "k-means"], ["--code-dim", "0"], ["--size", "0"],
                                   ["--sampl", "6"], ["--temperature", "0"]])
def test_bad_flag_of_this_script_is_named(main, capsys, flags):
    assert flags[0] in stopped(capsys, main, *flags)


# -- the numbers --------------------------------------------------------------------------------


def fake_run(**args):
    return SimpleNamespace(args=SimpleNamespace(seed=0, model="vqvae", num_codebooks=1, **args),
                           device="cpu", say=lambda text: None, rehearsing=False, rank=1,
                           picture=lambda *args, **kwargs: None)


@pytest.fixture
def small():
    model = VQVAE(VectorQuantizer(16, 4), Gaussian(), hidden=8, res_hidden=8).eval()
    images = torch.from_numpy(noise(7, 8, 12, 3)).permute(0, 3, 1, 2)
    with torch.no_grad():                              # codes that all get used
        z_e = model.quantizer.to_vectors(model.encoder(images.float() / 255 - 0.5))[0]
        model.quantizer.codebook.copy_(z_e[:: len(z_e) // 16][:16])
    part = Images(images.permute(0, 2, 3, 1), torch.arange(7))
    return model, part, torch.cat([model.encode(x[None]) for x in images])


def test_every_image_is_encoded_once_and_keeps_its_label(small):
    model, part, codes = small
    data = Data(noise(300, 8, 8, 3), np.arange(300) % 3, np.arange(300))
    got = encode_all(fake_run(num_codes=16), model, data)
    for part, images in zip(got, (data.train, data.valid, data.test)):
        x = images[torch.arange(len(images))][0]
        one_by_one = torch.cat([model.encode(a[None]) for a in x])
        assert part.tensors[0].shape == one_by_one.shape, "the last, smaller batch too"
        assert (part.tensors[0] == one_by_one).float().mean() > 0.99, "but for ties"
        assert torch.equal(part.tensors[1], images.rows)
        assert part.tensors[0].dtype == torch.uint8, "K = 16: eight times less than int64"


def test_mse_and_psnr_are_over_the_whole_test_set(small, monkeypatch):
    model, part, codes = small
    monkeypatch.setattr(part, "batches", partial(part.batches, size=3))
    decoded = np.concatenate([model.decode(c[None]).numpy() for c in codes]).astype(float)
    mse = ((decoded - pixels(part).transpose(0, 3, 1, 2)) ** 2).mean()
    got = measure(fake_run(), model, SimpleNamespace(test=part, valid=part))
    assert got["mse"] == pytest.approx(mse), "7 images in batches of 3: the last one counts too"
    assert got["psnr"] == pytest.approx(10 * math.log10(255 ** 2 / mse))


@pytest.mark.parametrize("side, most", [(32, 128), (256, 22), (1024, 2)])
def test_large_images_come_in_small_batches(side, most):
    images = train_image.Images(torch.zeros(1, side, side, 3, dtype=torch.uint8).expand(
        300, -1, -1, -1), torch.arange(300))
    x = next(images.batches("cpu"))
    assert len(x) == most, "what fits in memory with 32 x 32 pixels need not fit with 1024 x 1024"


def test_code_usage_is_over_the_whole_test_set(small):
    model, part, codes = small
    used, n = np.unique(codes.numpy(), return_counts=True)
    p = n / n.sum()
    got = code_usage(fake_run(num_codes=16), TensorDataset(codes.to(torch.uint8)), part)
    assert got["codes_used"] == len(used) > 8 and got["num_codes"] == 16
    assert got["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5), (
        "perplexity of all codes of the test set, not of a batch and not a mean over batches")


def test_compression_of_the_paper_is_42_6():
    part = Images(torch.zeros(1, 128, 128, 3, dtype=torch.uint8), torch.arange(1))
    codes = TensorDataset(torch.zeros(1, 32, 32, dtype=torch.int16))
    got = code_usage(fake_run(num_codes=512), codes, part)["compression"]
    assert got == pytest.approx(128 * 128 * 3 * 8 / (32 * 32 * 9)), "sec. 4.2: about 42.6"


def test_variance_of_the_data_is_that_of_the_training_part():
    images = noise(60, 8, 8, 3)
    images[40:] = 255
    data = Data(images, np.repeat([0, 1, 2], [40, 10, 10]))
    assert data.facts["variance"] == pytest.approx((images[:40] / 255).var(), rel=1e-9)


def test_another_image_label_or_part_is_noticed():
    images, part, labels = noise(30, 8, 8, 3), np.repeat([0, 1, 2], 10), np.arange(30) % 2
    facts = Data(images, part, labels, "ab").facts
    changed = images.copy()
    changed[25, 3, 3] ^= 1
    assert Data(images.copy(), part, labels, "ab").facts == facts
    assert Data(changed, part, labels, "ab").facts != facts
    assert Data(images, np.roll(part, 1), labels, "ab").facts["digest"] != facts["digest"]
    assert Data(images, part, 1 - labels, "ab").facts != facts


def test_flips_mirror_half_of_the_training_images_and_no_validation_image(monkeypatch):
    caught, seen = [], []
    model = VQVAE(VectorQuantizer(16, 4), Gaussian(), hidden=8, res_hidden=8)
    monkeypatch.setattr(train_image, "make_model", lambda args, facts: model)
    run = fake_run(likelihood="mse", flips=True, steps=1, batch_size=1, lr=1.0, num_codes=16)
    run.fit = lambda stage, model, loss, *_: caught.append(loss)
    train_image.fit_model(run, SimpleNamespace(facts=None, train=None, valid=None))

    def net(x):
        seen.append(x)
        return model(x)
    x = torch.from_numpy(noise(200, 3, 8, 8))
    for training in (True, False):
        model.train(training)
        caught[0](net, x)
    same, mirrored = ((seen[0] == a).flatten(1).all(1) for a in (x, x.flip(3)))
    assert (same ^ mirrored).all(), "an image is itself or its mirror image, left and right changed"
    assert 60 < mirrored.sum() < 140, f"{mirrored.sum()} of 200 mirrored: about half should be"
    assert torch.equal(seen[1], x), "validation is of the images as they are"


class Wheel:
    """A prior and a model: codes are the label, and images as bright as their code."""

    num_classes, quantizer = 1, SimpleNamespace(codebook=torch.zeros(1))

    def sample(self, count, height, width, labels, generator, temperature):
        return labels.view(-1, 1, 1).expand(-1, height, width)

    def decode(self, codes):
        return codes[:, :1, :1].unsqueeze(1).expand(-1, 3, 8, 8).to(torch.uint8)


@pytest.mark.parametrize("classes, each", [(2, 100), (13, 15), (250, 1)])
def test_samples_cover_all_classes(classes, each):
    data = SimpleNamespace(classes=list(range(classes)), facts={"size": [8, 8, 3]},
                           train=SimpleNamespace(labels=(torch.arange(classes),)))
    y, images = train_image.sample_images(fake_run(temperature=1.0), Wheel(), Wheel(), data)
    assert y.bincount(minlength=classes).tolist() == [each] * classes
    assert torch.equal(images[:, 0, 0, 0].long(), y), "each sample beside its own label"


def test_classes_without_training_images_are_not_drawn():
    data = SimpleNamespace(classes=["a", "b", "c"], facts={"size": [8, 8, 3]},
                           train=SimpleNamespace(labels=(torch.tensor([2, 0, 2]),)))
    run = fake_run(temperature=1.0)
    run.picture = lambda *args, columns: titles.extend(columns)
    titles = []
    y, _ = train_image.sample_images(run, Wheel(), Wheel(), data)
    assert y.bincount().tolist() == [100, 0, 100], "nothing was learned of the class b"
    assert titles == ["a", "c"]


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
import os, signal, sys, train_image, vqvae
train, calls, wanted = vqvae.Run.train, [], int(sys.argv.pop())

def counted(self, *args):
    if not self.rehearsing:
        calls.append(1)
    if not self.rehearsing and len(calls) == wanted:
        os.kill(os.getpid(), signal.SIGINT)
    return train(self, *args)

vqvae.Run.train = counted
vqvae.launch(train_image.make_parser(), train_image.load_data, train_image.main, train_image.use)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run as it is, in this process: whole/ and 0/. One stopped by Ctrl-C in stage one (1/)
    and in the prior (2/) and then ended (3/), a process each: parts/."""
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "a.npy", demo_images(60, 0, 16)[0])
    flags = ["--data", folder / "a.npy", "--codebook", "ema", "--lr-decay", "0.5", *TINY]
    models = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_image, "VQVAE", lambda *args, **kwargs: models.append(
            VQVAE(*args, **kwargs)) or models[-1])     # one for the rehearsal, one for the run
        start(patch, *flags, "--out", folder / "whole")
    torch.save(models[-1].state_dict(), folder / "model after the run.pt")
    shutil.copytree(folder / "whole", folder / "0")
    for n, begin, at in ((1, flags, 2), (2, ["--resume"], 4), (3, ["--resume"], 0)):
        done = python("-c", SIGNAL_AT, *begin, "--out", folder / "parts", at, cwd=folder)
        assert done.returncode == (130 if at else 0), done.stderr
        shutil.copytree(folder / "parts", folder / str(n))
    steps = [{stage: checkpoint(folder / str(n), stage)["step"] for stage in ("vqvae", "prior")
              if (folder / str(n) / f"checkpoint-{stage}.pt").exists()} for n in (1, 2)]
    assert steps == [{"vqvae": 2}, {"vqvae": 4, "prior": 2}], "stopped elsewhere than planned"
    return folder


def checkpoint(folder, stage):
    return torch.load(folder / f"checkpoint-{stage}.pt", weights_only=True)


@pytest.mark.parametrize("stage", ["vqvae", "prior"])
def test_resumed_weights_and_optimiser_equal_uninterrupted_bit_for_bit(runs, stage):
    one, two = ({k: v for k, v in checkpoint(runs / n, stage).items()
                 if k in ("model", "optimizer", "best", "step")} for n in "03")
    assert same(one, two), (
        "stopped by Ctrl-C in stage one and in the prior and resumed, the run ends with other "
        "weights than one that was never stopped")


def test_resumed_numbers_equal_uninterrupted(runs):
    one, two = (json.loads((runs / folder / "metrics.json").read_text())
                for folder in ("whole", "parts"))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    for stage in ("vqvae", "prior"):
        logs = [[{**row, "seconds": 0} for row in checkpoint(runs / n, stage)["rows"]]
                for n in "03"]
        assert logs[0] == logs[1]


@pytest.mark.parametrize("name", ["samples.png", "reconstructions.png"])
def test_resumed_pictures_equal_uninterrupted(runs, name):
    one, two = (np.asarray(Image.open(runs / folder / name)) for folder in ("whole", "parts"))
    assert np.array_equal(one, two)


def test_stage_one_is_frozen_while_the_prior_is_fitted(runs):
    before = checkpoint(runs / "0", "vqvae")
    before = before["best"]["model"] if before["best"] else before["model"]
    after = torch.load(runs / "model after the run.pt", weights_only=True)
    changed = [k for k in before if not same(before[k], after[k])]
    assert not changed, (
        f"{changed[:3]} moved while the prior was fitted: its codes no longer mean what they did "
        "(sec. 3.3: the prior is fitted after training)")


def test_a_run_leaves_what_design_promises(runs):
    for name in ("config.json", "log.csv", "checkpoint.pt", "checkpoint-vqvae.pt",
                 "checkpoint-prior.pt", "metrics.json", "reconstructions.png", "samples.png",
                 "curves.png"):
        assert (runs / "whole" / name).stat().st_size > 0, name
    for picture in (runs / "whole").glob("*.png"):
        assert np.asarray(Image.open(picture).convert("L")).std() > 5, f"{picture.name} is blank"
    left = [p.name for p in (runs / "whole").iterdir() if "tmp" in p.name]
    assert not left, f"temporary files were left behind: {left}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        start(patch, "--out", folder, *TINY, "--size", "16")
    return folder


def test_demo_with_classes_reports_every_number(demo):
    metrics = json.loads((demo / "metrics.json").read_text())
    for name in ("psnr", "mse", "codes_used", "num_codes", "perplexity", "prior_bits_per_code",
                 "sample_class_accuracy", "real_class_accuracy", "valid_psnr",
                 "valid_prior_bits_per_code", "seconds"):
        assert math.isfinite(metrics[name]), name
    model, prior = (checkpoint(demo, stage)["model"] for stage in ("vqvae", "prior"))
    assert "layers.0.label.weight" in prior and "quantizer.codebook" in model


def test_nan_in_the_prior_keeps_stage_one(main, capsys, monkeypatch, tmp_path):
    np.save(tmp_path / "a.npy", noise(20, 8, 8, 3))
    loss, calls = train_image.prior_loss, []

    def spoilt(*args):
        value, stats = loss(*args)
        calls.extend([1] * args[0].training)           # the first one is the rehearsal's
        return value * (math.nan if len(calls) == 3 else 1), stats

    monkeypatch.setattr(train_image, "prior_loss", spoilt)
    line = stopped(capsys, main, "--data", tmp_path / "a.npy")
    assert "prior" in line and "step 2" in line and "--lr" in line
    assert checkpoint(tmp_path / "out", "vqvae")["step"] == 4
    assert not (tmp_path / "out" / "checkpoint-prior.pt").exists()


RUN_ANYWAY = {
    "all white": (np.full((20, 8, 8, 3), 255, np.uint8), []),
    "400 x 4": (noise(20, 400, 4, 3), []),
    "one image a batch, classes": (noise(20, 8, 8, 3), ["--batch-size", "1"]),
    "greyscale": (noise(20, 8, 8), ["--likelihood", "logistics"]),
}


@pytest.mark.parametrize("case", RUN_ANYWAY)
def test_unusual_data_trains_to_the_end(main, tmp_path, case):
    images, flags = RUN_ANYWAY[case]
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(20) % 2)
    main("--data", tmp_path / "a.npz", *flags)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert math.isfinite(metrics["mse"]) and math.isfinite(metrics["sample_class_accuracy"])
    assert (metrics.get("bits_per_dim", 0) > 0) == (case == "greyscale")
    height, width = np.asarray(Image.open(tmp_path / "out" / "samples.png")).shape[:2]
    assert height * width < 1e7, "a picture to look at, whatever the shape of the data"


# -- a finished run -----------------------------------------------------------------------------


def test_load_gives_the_models_that_were_kept(demo):
    run = train_image.load(demo, "cpu")
    state = checkpoint(demo, "vqvae")
    kept = state["best"]["model"] if state["best"] else state["model"]
    assert same(dict(run.vqvae.state_dict()), kept)
    assert run.classes == list(train_image.SOLIDS) and run.size == (16, 16, 3)
    assert not run.vqvae.training and not run.prior.training
    assert not any(p.requires_grad for net in (run.vqvae, run.prior) for p in net.parameters())


def test_sampling_follows_label_temperature_and_seed(demo):
    run = train_image.load(demo, "cpu")
    codes = []
    run = run._replace(vqvae=SimpleNamespace(
        quantizer=run.vqvae.quantizer, decode=lambda c: codes.append(c) or torch.zeros(len(c))))
    wanted = dict(labels=torch.tensor([2, 2, 2]), temperature=0.5)
    expected = run.prior.sample(3, 4, 4, **wanted, generator=torch.Generator().manual_seed(7))
    run.sample(3, "cone", temperature=0.5, seed=7)
    assert torch.equal(codes[-1], expected)
    expected = run.prior.sample(7, 4, 4, labels=torch.arange(7) % 5,
                                generator=torch.Generator().manual_seed(0))
    run.sample(7)
    assert torch.equal(codes[-1], expected), "without a label all classes in turn"
    with pytest.raises(ValueError, match="teapot.*cone"):
        run.sample(1, "teapot")


def test_pictures_go_through_the_codes_of_a_run(demo, monkeypatch, tmp_path):
    run = train_image.load(demo, "cpu")
    Image.fromarray(demo_images(1, 5, 16)[0][0]).save(tmp_path / "a.png")
    x = run.read(tmp_path / "a.png")
    codes = run.vqvae.encode(x)
    assert codes.shape == (1, 4, 4) and x.dtype == torch.uint8
    (tmp_path / "b").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "b" / "a.png")          # the same name elsewhere
    start(monkeypatch, "--out", demo, "--reconstruct", tmp_path / "a.png", tmp_path / "b" / "a.png")
    written = [np.asarray(Image.open(demo / "used" / f"{i}-a.png")) for i in range(2)]
    assert np.array_equal(written[0], run.vqvae.decode(codes)[0].permute(1, 2, 0))
    assert not np.array_equal(*written), "two pictures of one name: the first is lost"


def test_sample_writes_as_many_pictures_as_asked_for_and_trains_nothing(demo, monkeypatch):
    before = (demo / "checkpoint-prior.pt").read_bytes()
    start(monkeypatch, "--out", demo, "--sample", "3", "--label", "cube")
    assert sorted(p.name for p in (demo / "used").glob("sample-*")) == [
        "sample-0000.png", "sample-0001.png", "sample-0002.png"]
    assert Image.open(demo / "used" / "sample-0000.png").size == (16, 16)
    assert (demo / "checkpoint-prior.pt").read_bytes() == before


def test_use_takes_the_temperature_of_the_run_unless_it_is_given(demo, monkeypatch, tmp_path):
    shutil.copytree(demo, tmp_path / "run")
    common = torch.load(demo / "checkpoint.pt", weights_only=True)
    common["args"]["temperature"] = 0.3
    torch.save(common, tmp_path / "run" / "checkpoint.pt")
    used, sample = [], train_image.Trained.sample
    monkeypatch.setattr(train_image.Trained, "sample", lambda run, *args: (
        used.append(args[2]) or sample(run, *args)))
    for flags in ((), ("--temperature", "0.6")):
        start(monkeypatch, "--out", tmp_path / "run", "--sample", "1", *flags)
    assert used == [0.3, 0.6]


def test_a_full_disk_in_use_is_one_line_and_leaves_no_torn_picture(demo, monkeypatch, capsys):
    def full(self, file, format=None):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    start(monkeypatch, "--out", demo, "--sample", "1")
    before = (demo / "used" / "sample-0000.png").read_bytes()
    monkeypatch.setattr(Image.Image, "save", full)
    line = stopped(capsys, start, monkeypatch, "--out", demo, "--sample", "1")
    assert "sample-0000.png" in line and "No space left" in line
    assert (demo / "used" / "sample-0000.png").read_bytes() == before
    assert not list(demo.rglob("*.tmp"))


@pytest.mark.parametrize("flags, words", [
    (["--sample", "2", "--label", "teapot"], ["teapot", "cone"]),
    (["--reconstruct", "{}/missing.png"], ["missing.png"]),
    (["--reconstruct", "{}/text.png"], ["text.png"])])
def test_bad_input_to_a_finished_run_is_one_line(demo, monkeypatch, capsys, tmp_path, flags, words):
    (tmp_path / "text.png").write_text("hello")
    flags = [flag.format(tmp_path) for flag in flags]
    line = stopped(capsys, start, monkeypatch, "--out", demo, *flags)
    assert not [word for word in words if word not in line], line


@pytest.mark.parametrize("use", [["--sample", "2"], ["--reconstruct", "a.png"]])
def test_a_run_that_is_not_finished_is_refused(runs, monkeypatch, capsys, use):
    assert "step 2 of 4" in stopped(capsys, start, monkeypatch, "--out", runs / "1", *use)
    with pytest.raises(ValueError, match="step 2 of 4"):
        train_image.load(runs / "1", "cpu")
