"""VideoPrior (section 4 of prior.py) and train_video.py: its world, its data, the whole run."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train_video
from conftest import ROOT
from prior import VideoPrior
from train_video import (ACTIONS, GENERATED, GIVEN, Data, World, action_accuracy, bits_per_code,
                         compare, demo_clips, edges, load_clips, pieces, psnr)

FORWARD, LEFT, RIGHT = range(3)
QUARTER = 90 // train_video.TURN


# -- the prior: what it sees --------------------------------------------------------------------


def influence(T=4, H=3, W=5, context=2, actions=True):
    """Of which codes and actions do the logits at each code depend? By gradient, in float64.

    Every position of the clip has a code of its own, and every step an action of its own, so
    that the gradient of a row of an embedding is that of one position."""
    prior = VideoPrior(T * H * W, T - 1 if actions else 0, 16, num_layers=3, context=context)
    prior.double()
    codes = torch.arange(T * H * W).view(1, T, H, W)
    logits = prior(codes, torch.arange(T - 1)[None] if actions else None)
    assert logits.shape == (1, prior.num_codes, T, H, W)
    mix = torch.randn(prior.num_codes, dtype=torch.float64)
    scores = torch.einsum("k,kn->n", mix, logits[0].flatten(1))
    tables = prior.embed.weight, prior.pixelcnn.embed.weight, prior.action_conv.weight
    rows = [[g.abs().sum(1) > 0 for g in torch.autograd.grad(score, tables, retain_graph=True)]
            for score in scores]
    before = torch.stack([r[0][:-1] for r in rows])    # (T*H*W, T*H*W): through the context
    inside = torch.stack([r[1] for r in rows])         # the same, through the PixelCNN
    acts = torch.stack([r[2][1:] for r in rows])       # (T*H*W, T-1)
    return before, inside, acts


def test_a_code_sees_no_code_of_its_future():
    before, inside, _ = influence()
    n = torch.arange(len(before))
    future = n[None, :] >= n[:, None]                  # raster order inside frames, frame by frame
    assert not ((before | inside) & future).any(), "a code sees itself or a later one"
    t = n // 15
    assert not (before & (t[None, :] >= t[:, None])).any(), "the context has its own frame in it"
    assert not (inside & (t[None, :] != t[:, None])).any(), "the PixelCNN mixes the frames"


def test_a_code_sees_its_own_frame_so_far_and_all_of_the_frames_before():
    before, inside, _ = influence(context=2)
    n = torch.arange(len(before))
    t = n // 15
    gap = t[:, None] - t[None, :]
    assert torch.equal(inside, (gap == 0) & (n[None, :] < n[:, None]))
    assert torch.equal(before, (gap == 1) | (gap == 2)), "not the whole of the last two frames"


def test_an_action_influences_the_next_frame_and_none_before():
    _, _, acts = influence(context=2)
    t = torch.arange(len(acts))[:, None] // 15         # a_s leads from frame s to frame s + 1
    s = torch.arange(acts.shape[1])[None]
    assert not (acts & (t <= s)).any(), "an action is seen before it is taken"
    assert acts[(t == s + 1).expand_as(acts)].all(), "an action misses the frame it leads to"
    assert torch.equal(acts, t == s + 1), "earlier actions are seen, though their frames are"


def test_a_column_far_away_in_the_last_frame_is_seen():
    # A turn moves the picture by several columns: the left edge must be able to see the right.
    prior = VideoPrior(8, 2, 16, num_layers=1, context=1).double()
    codes = torch.zeros(1, 2, 9, 21, dtype=torch.long)
    codes[0, 0, 4, 20] = 1
    plain = prior(torch.zeros_like(codes), torch.tensor([[1]]))
    assert (prior(codes, torch.tensor([[1]])) - plain)[0, :, 1, 4, 9].abs().sum() > 0


def test_without_actions_is_all_actions_unknown():
    prior, codes = VideoPrior(8, 3, 16, 2).double(), torch.randint(8, (2, 3, 4, 4))
    unknown = torch.full((2, 2), -1)
    assert torch.equal(prior(codes), prior(codes, unknown))
    assert not torch.equal(prior(codes), prior(codes, 1 + unknown))


# -- the prior: sampling ------------------------------------------------------------------------


def test_the_last_frames_alone_get_the_same_logits():
    prior = VideoPrior(7, 2, 8, num_layers=1, context=2).double()
    codes, actions = torch.randint(7, (2, 5, 4, 3)), torch.randint(2, (2, 4))
    whole = prior(codes, actions)
    for last in (1, 3, 5):
        assert torch.allclose(prior(codes, actions, last=last), whole[:, :, 5 - last:]), last


@pytest.mark.parametrize("given, num_actions", [(0, 2), (1, 2), (3, 2), (3, 0)])
def test_cached_sampler_equals_naive(given, num_actions):
    prior = VideoPrior(7, num_actions, 16, num_layers=2, context=2).double()
    for p in prior.parameters():                       # far from uniform: the codes must matter
        p.data *= 2
    codes = torch.randint(7, (3, given, 3, 5))
    actions = torch.randint(num_actions, (3, given + 1)) if num_actions else None
    one, two = (f(codes, actions, 2, generator=torch.Generator().manual_seed(5))
                for f in (prior.sample, prior.sample_naive))
    assert one.shape == (3, 2, 3, 5) and one.dtype == torch.long
    assert torch.equal(one, two)


def test_same_seed_same_roll_out():
    prior, codes = VideoPrior(50, 2, 16, 2), torch.randint(50, (2, 2, 4, 4))
    actions = torch.randint(2, (2, 4))
    one, again, other = (prior.sample(codes, actions, 3, generator=torch.Generator().manual_seed(s))
                         for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_longer_roll_out_begins_with_the_shorter():
    prior, codes = VideoPrior(50, 2, 16, 2), torch.randint(50, (2, 2, 4, 4))
    actions = torch.randint(2, (2, 6))
    short, long = (prior.sample(codes, actions[:, :n + 1], n,
                                generator=torch.Generator().manual_seed(1)) for n in (2, 5))
    assert torch.equal(short, long[:, :2])


def test_temperature_near_zero_is_the_argmax():
    prior, codes = VideoPrior(9, 0, 16, 2), torch.randint(9, (2, 2, 3, 3))
    z = prior.sample(codes, frames=1, temperature=1e-6)
    logits = prior(torch.cat([codes, z], 1))[:, :, 2]
    assert torch.equal(z[:, 0], logits.argmax(1))


def moving_maps(count, frames, size=4):
    """Clips of random maps that move one column to the left (action 0) or right (1)."""
    clip = [torch.randint(1, 4, (count, size, size))]
    actions = torch.randint(2, (count, frames - 1))
    for action in actions.T:
        left, right = F.pad(clip[-1], (-1, 1)), F.pad(clip[-1], (1, -1))
        clip.append(torch.where(action[:, None, None] == 0, left, right))
    return torch.stack(clip, 1), actions


def test_it_learns_to_move_the_picture_as_the_action_says():
    prior = VideoPrior(4, 2, 24, num_layers=1, context=1)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    for _ in range(80):
        codes, actions = moving_maps(16, 3)
        loss = F.cross_entropy(prior(codes, actions)[:, :, 1:], codes[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codes, actions = moving_maps(16, 3)
    right = (prior.sample(codes[:, :1], actions, 2) == codes[:, 1:]).float().mean((0, 2, 3))
    wrong = (prior.sample(codes[:, :1], 1 - actions[:, :1], 1) == codes[:, 1:2]).float().mean()
    assert right.min() > 0.9, f"codes right one and two frames ahead: {right.tolist()}"
    assert wrong < 0.4, "the other action should move the other way"


@pytest.mark.parametrize("codes, actions, named", [
    ((2, 3, 4), (2, 2), "B, T, H, W"), ((2, 3, 4, 4), (2, 3), r"\(2, 2\)"),
    ((2, 3, 4, 4), (1, 2), r"\(2, 2\)")])
def test_prior_refuses_shapes_that_do_not_match(codes, actions, named):
    prior = VideoPrior(5, 2, 16, 1)
    with pytest.raises(ValueError, match=named):
        prior(torch.zeros(codes, dtype=torch.long), torch.zeros(actions, dtype=torch.long))


def test_prior_refuses_actions_that_it_does_not_have():
    codes, actions = torch.zeros(1, 2, 4, 4, dtype=torch.long), torch.tensor([[0, 2]])
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        VideoPrior(5, 2, 16, 1).sample(codes, actions, 1)
    with pytest.raises(ValueError, match="without actions"):
        VideoPrior(5, 0, 16, 1).sample(codes, actions, 1)


# -- the demo world -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return World(seed=1)


@pytest.fixture(scope="module")
def poses(world):
    return world.start(12, np.random.default_rng(0))


def after(world, pose, *actions):
    return world.walk(pose, np.tile(actions, (len(pose), 1)))[:, -1]


def test_turning_left_then_right_returns_to_the_same_picture(world, poses):
    there = after(world, poses, LEFT)
    assert not np.array_equal(world.render(there, 16), world.render(poses, 16))
    back = after(world, poses, LEFT, RIGHT)
    assert np.array_equal(world.render(back, 16), world.render(poses, 16))


@pytest.mark.parametrize("turn", [LEFT, RIGHT])
def test_four_quarter_turns_are_none(world, poses, turn):
    once = after(world, poses, *[turn] * QUARTER)
    assert np.array_equal((once[:, 3] - poses[:, 3]) * train_video.TURN % 360,
                          np.full(len(poses), {LEFT: 90, RIGHT: 270}[turn]))
    assert np.array_equal(after(world, poses, *[turn] * 4 * QUARTER), poses)


def test_forward_goes_where_one_looks_and_back_after_half_a_turn(world):
    pose = np.array([[0, 0, 0, k] for k in range(4 * QUARTER)], float)
    world = World(seed=1, size=21)
    world.wall[:, 1:-1, 1:-1] = False                  # an empty hall
    pose[:, 1:3] = 10.5
    step = after(world, pose, FORWARD)
    angle = np.deg2rad(pose[:, 3] * train_video.TURN)
    assert np.allclose(step[:, 1] - 10.5, train_video.STEP * np.cos(angle))
    assert np.allclose(step[:, 2] - 10.5, train_video.STEP * np.sin(angle))
    back = after(world, pose, FORWARD, *[LEFT] * 2 * QUARTER, FORWARD)
    assert np.allclose(back[:, 1:3], pose[:, 1:3])


def test_forward_into_a_wall_stops(world, poses):
    # Slanted walks slide along a wall into a corner; 100 steps are longer than any way there.
    end = after(world, poses, *[FORWARD] * 100)
    assert np.array_equal(after(world, end, FORWARD), end)
    assert np.array_equal(world.render(after(world, end, FORWARD), 16), world.render(end, 16))
    assert not world.wall[end[:, 0].astype(int), end[:, 1].astype(int), end[:, 2].astype(int)].any()


def test_a_left_turn_moves_the_picture_to_the_right_by_one_code(world, poses):
    before, then = (world.render(p, 24).astype(int) for p in (poses, after(world, poses, LEFT)))
    error = np.abs(then[:, :, train_video.FACTOR:] - before[:, :, :-train_video.FACTOR]).max(-1)
    assert (error <= 1).mean() > 0.98                  # rounding moves an edge here and there


def test_rays_end_where_small_steps_find_the_wall(world, poses):
    maze, x, y = poses[:, 0].astype(int), *(poses[:, i, None].astype(np.float32) for i in (1, 2))
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, (len(poses), 30)).astype(np.float32)
    depth, _, i, j = world.cast(maze, x, y, np.cos(angle), np.sin(angle))
    for d in np.arange(0, 10, 0.01):
        far = d < depth - 0.02
        inside = world.wall[maze[:, None], (x + d * np.cos(angle)).astype(int).clip(0, 6),
                            (y + d * np.sin(angle)).astype(int).clip(0, 6)]
        assert not (inside & far).any(), "a ray went through a wall"
    assert world.wall[maze[:, None], i, j].all()
    hit = np.stack([x + depth * np.cos(angle), y + depth * np.sin(angle)], -1)
    outside = np.maximum(np.abs(hit - np.stack([i, j], -1) - 0.5) - 0.5, 0).max()
    assert outside < 1e-4, "a ray ends beside the cell it is said to hit"


def test_walls_get_taller_as_one_comes_nearer():
    world = World(count=1, seed=0, size=21)
    world.wall[:, 1:-1, 1:-1] = False
    world.color[:], world.pattern[:] = (1, 0, 0), 0    # red walls, floor and ceiling black
    world.floor[:], world.ceiling[:] = 0, 0
    for distance in (1.0, 2.0, 4.0):
        image = world.render(np.array([[0, 20 - distance, 10.5, 0]]), 80)[0]
        rows = (image[:, 80, 0] > 0).sum()
        expected = train_video.WALL / distance / train_video.VIEW * 80
        assert abs(rows - min(80, expected)) <= 2


def test_demo_clips_are_a_function_of_the_seed(world):
    (frames, actions, poses), again, other = (demo_clips(world, 6, 5, 16, s) for s in (0, 0, 1))
    assert frames.shape == (6, 5, 16, 32, 3) and frames.dtype == np.uint8
    assert all(np.array_equal(a, b) for a, b in zip((frames, actions, poses), again))
    assert not np.array_equal(frames, other[0])
    assert np.array_equal(World(seed=1).wall, world.wall)
    assert not np.array_equal(World(seed=2).wall, world.wall)


def test_recorded_actions_lead_to_the_recorded_frames(world):
    frames, actions, poses = demo_clips(world, 20, GIVEN + GENERATED, 16, 0)
    assert set(actions.ravel()) == {FORWARD, LEFT, RIGHT}
    data = Data(frames, frames, actions, actions, ACTIONS, world, poses)
    truth = data.truth(data.test_actions[:7, GIVEN - 1:])
    assert torch.equal(truth, data.test[:7, GIVEN:])


# -- own data -----------------------------------------------------------------------------------


def clips(n=12, t=17, size=16):
    rng = np.random.default_rng(0)
    return (rng.integers(0, 256, (n, t, size, size, 3), dtype=np.uint8),
            rng.integers(0, 3, (n, t)))


def save(path, frames, actions):
    np.savez(path, frames=frames, actions=actions)
    return str(path)


@pytest.mark.parametrize("last", [0, 1])
def test_clips_are_read_and_every_tenth_is_held_out(tmp_path, last):
    frames, actions = clips(20)
    data = load_clips(save(tmp_path / "a.npz", frames, actions[:, :17 - last].astype(np.uint8)))
    assert data.train.shape == (18, 17, 3, 16, 16) and data.train.dtype == torch.uint8
    assert torch.equal(data.test, torch.from_numpy(frames[[9, 19]]).permute(0, 1, 4, 2, 3))
    assert torch.equal(data.test_actions, torch.from_numpy(actions[[9, 19], :16]))
    assert len(data.train_actions) == 18 and data.names == ["action 0", "action 1", "action 2"]


FRAMES, TAKEN = clips()
BAD = {
    "negative action": (FRAMES, TAKEN - 1, "from -1 to 1"),
    "huge action": (FRAMES, TAKEN + 1000, "0 to 255"),
    "actions as floats": (FRAMES, TAKEN / 1, "float64"),
    "too few actions": (FRAMES, TAKEN[:, :10], "(12, 10)"),
    "actions of other clips": (FRAMES, TAKEN[:11], "(11, 17)"),
    "short clips": (FRAMES[:, :15], TAKEN[:, :15], "clips of 15 frames"),
    "grey frames": (FRAMES[..., :1], TAKEN, "in colour"),
    "frames without colour axis": (FRAMES[..., 0], TAKEN, "in colour"),
    "float frames": (FRAMES / 255, TAKEN, "float64"),
    "few clips": (FRAMES[:9], TAKEN[:9], "9 clips"),
    "odd size": (FRAMES[:, :, :15], TAKEN, "15 x 16"),
    "tiny size": (FRAMES[:, :, :8, :8], TAKEN, "8 x 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_clips_get_one_clear_line(tmp_path, capsys, case):
    frames, actions, named = BAD[case]
    path = save(tmp_path / "bad.npz", frames, actions)
    with pytest.raises(SystemExit) as end:
        load_clips(path)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1
    assert "bad.npz" in lines[0] and named in lines[0]


@pytest.mark.parametrize("content, named", [
    (None, "no such file"), (b"", "not a readable"), (b"PK\3\4 and no more", "not a readable"),
    ("npy", "not a readable"), ("other names", "`frames` and `actions`"),
    ("pickle", "not a readable")])
def test_bad_files_get_one_clear_line(tmp_path, capsys, content, named):
    path = tmp_path / "bad.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "npy":
        with open(path, "wb") as f:
            np.save(f, FRAMES)
    elif content == "other names":
        np.savez(path, images=FRAMES)
    elif content == "pickle":
        np.savez(path, frames=np.array([{}]), actions=TAKEN)
    with pytest.raises(SystemExit) as end:
        load_clips(str(path))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and named in lines[0]


# -- measurements -------------------------------------------------------------------------------


def test_psnr_by_hand():
    a = torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8)
    b = a.clone()
    b[:, 1] = 255                                      # as wrong as can be: 0 dB
    b[:, 2] = 51                                       # a fifth of it: 20 log10(5) dB
    assert psnr(a, b) == pytest.approx([10 * np.log10(255 ** 2 / 1e-2), 0, 13.979], abs=1e-2)
    b[0, 1] = 0                                        # one of two clips: half the error, 3 dB
    assert psnr(a, b)[1] == pytest.approx(3.0103, abs=1e-3)


def test_compare_tells_good_imagination_from_copies_and_blur():
    frames = torch.from_numpy(FRAMES[:, 1:17]).permute(0, 1, 4, 2, 3)
    truth, last = frames[:, GIVEN:], frames[:, GIVEN - 1:GIVEN]
    still = truth.clone()
    still[:3] = last[:3]                               # three clips in which nothing happens
    perfect = compare(still, still, still, last)
    assert perfect["moving_clips"] == 0.75
    assert min(perfect["psnr_generated"]) > 60 > max(perfect["psnr_copy_last"])
    assert perfect["sharpness"] == [1.0] * GENERATED
    blurred = F.avg_pool2d(truth.flatten(0, 1).float(), 3, 1, 1).byte().view_as(truth)
    assert max(compare(blurred, truth, truth, last)["sharpness"]) < 0.5


def test_long_clips_are_cut_into_roll_outs():
    clip = torch.arange(2 * 40).view(2, 40)
    assert torch.equal(pieces(clip), torch.stack([clip[0, :16], clip[0, 16:32],
                                                  clip[1, :16], clip[1, 16:32]]))
    assert torch.equal(pieces(clip, most=3), pieces(clip)[:3])


def test_action_accuracy_counts_roll_outs_nearest_to_their_own_action():
    truths = list(torch.randint(256, (3, 4, 2, 3, 8, 8), dtype=torch.uint8))
    assert action_accuracy(truths, truths) == 1
    assert action_accuracy(truths[1:] + truths[:1], truths) == 0
    mixed = [truths[0], truths[1].clone(), truths[2]]
    mixed[1][0] = truths[0][0]                         # one of twelve does something else
    assert action_accuracy(mixed, truths) == pytest.approx(11 / 12)


def test_training_asks_what_a_roll_out_asks():
    """Over the steps, all frames of a clip are predicted, each as in the whole clip's forward
    pass."""
    torch.manual_seed(0)
    prior = VideoPrior(5, 0, 8, num_layers=1, context=GIVEN).double()
    codes = torch.randint(5, (3, 9, 4, 4))
    each = F.cross_entropy(prior(codes), codes, reduction="none").mean((0, 2, 3))      # (T,)
    losses = {round(train_video.prior_loss(prior, codes, None)[0].item(), 9) for _ in range(80)}
    assert losses == {round(x, 9) for x in each.tolist()}


def test_bits_per_code_of_a_uniform_prior():
    prior = VideoPrior(32, 2, 8, 1)
    for p in prior.pixelcnn.head.parameters():
        torch.nn.init.zeros_(p)
    codes, actions = torch.randint(32, (11, 8, 4, 4)), torch.randint(2, (11, 7))
    assert bits_per_code(prior, codes, actions) == pytest.approx(5, abs=1e-5)


# -- the whole run ------------------------------------------------------------------------------

TINY = ("--warmup-steps 2 --steps 3 --prior-steps 2 --hidden 8 --res-hidden 8 --prior-channels 8 "
        "--prior-layers 1 --num-codes 16 --code-dim 8 --batch-size 8 --prior-batch-size 2 "
        "--device cpu").split()


def script(*flags):
    return subprocess.run([sys.executable, str(ROOT / "train_video.py"), *map(str, flags)],
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def read(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    with Image.open(folder / "rollout.gif") as gif:
        assert gif.n_frames == GIVEN + GENERATED
    for name in ("rollout", "rollout_long", "reconstructions", "curves"):
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 100 and sum(n > 0 for n in image.convert("L").histogram()) > 10
    with open(folder / "log.csv") as f:
        assert [row["stage"] for row in csv.DictReader(f)][-1] == "prior"
    for name in ("psnr_generated", "psnr_copy_last", "psnr_reconstruction", "sharpness"):
        assert len(metrics[name]) == GENERATED
    assert metrics["frames_per_second_cached"] > 0 and metrics["frames_per_second_naive"] > 0
    assert 0 < metrics["bits_per_code"] < 20
    return metrics


def test_demo_from_nothing_to_roll_outs(tmp_path):
    result = script(*TINY, "--demo-clips", 10, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = read(tmp_path)
    assert 0 <= metrics["action_accuracy"] <= 1
    assert {"bits_per_code_shuffled_actions", "bits_per_code_without_actions"} <= set(metrics)


def test_own_clips_and_the_same_numbers_after_resume(tmp_path):
    data = save(tmp_path / "clips.npz", *clips(20))
    result = script(*TINY, "--data", data, "--out", tmp_path / "one")
    assert result.returncode == 0, result.stderr
    first = read(tmp_path / "one")
    assert "action_accuracy" not in first, "nobody knows what would have happened"
    result = script("--resume", "--out", tmp_path / "one")
    assert result.returncode == 0, result.stderr
    again = read(tmp_path / "one")
    for name in ("bits_per_code", "psnr_generated", "sharpness_long"):
        assert again[name] == first[name], f"{name} is another after --resume"


def test_no_actions(tmp_path):
    data = save(tmp_path / "clips.npz", *clips(20))
    result = script(*TINY, "--data", data, "--out", tmp_path / "out", "--no-actions")
    assert result.returncode == 0, result.stderr
    assert "bits_per_code_shuffled_actions" not in read(tmp_path / "out")


def test_bad_clips_end_the_script_with_status_2(tmp_path):
    data = save(tmp_path / "clips.npz", FRAMES, TAKEN[:, :10])
    result = script(*TINY, "--data", data, "--out", tmp_path / "out")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
