"""VideoPrior (section 4 of prior.py) and train_video.py: its world, its data, the whole run."""

import argparse
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.backend_bases import KeyEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import train_video
from conftest import ROOT
from naive import sample_video
from prior import VideoPrior, draw, gumbel
from train_video import (GENERATED, GIVEN, Clips, Play, RollOut, Stretches, World,
                         action_accuracy, bits_per_code, demo_clips, demo_part, is_moving,
                         judge_accuracy, judge_loss, load, load_parts, make_judge, measure_codes,
                         measure_films, read_arrays, roll_outs)
from vqvae import launch, to_unit

FORWARD, LEFT, RIGHT = range(3)
QUARTER = 90 // train_video.TURN


# -- the prior: what it sees --------------------------------------------------------------------


def influence(T=4, H=3, W=5, context=2, actions=True):
    """Of which codes and actions do the logits at each code depend? By gradient, in float64.

    Every position of the clip has a code of its own, and every step an action of its own, so
    that the gradient of a row of an embedding is that of one position."""
    prior = VideoPrior(T * H * W, T - 1 if actions else 0, 16, num_layers=3, context=context)
    prior.double().move.weight.data.normal_()          # else nothing moves
    codes = torch.arange(T * H * W).view(1, T, H, W)
    logits = prior(codes, torch.arange(T - 1)[None] if actions else None)
    assert logits.shape == (1, prior.num_codes, T, H, W)
    mix = torch.randn(prior.num_codes, dtype=torch.float64)
    scores = torch.einsum("k,kn->n", mix, logits[0].flatten(1))
    tables = prior.embed.weight, prior.pixelcnn.embed.weight, prior.move.weight
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


def test_an_action_influences_the_frames_that_see_it_in_their_context_and_none_before():
    _, _, acts = influence(context=2)
    t = torch.arange(len(acts))[:, None] // 15         # a_s leads from frame s to frame s + 1
    s = torch.arange(acts.shape[1])[None]
    assert not (acts & (t <= s)).any(), "an action is seen before it is taken"
    assert acts[(t == s + 1).expand_as(acts)].all(), "an action misses the frame it leads to"
    assert torch.equal(acts, (t > s) & (t <= s + 2)), "not the actions after the last two frames"


def test_a_column_far_away_in_the_last_frame_is_seen():
    # A turn moves the picture by several columns: the left edge must be able to see the right.
    prior = VideoPrior(8, 2, 16, num_layers=1, context=1).double()
    codes = torch.zeros(1, 2, 9, 21, dtype=torch.long)
    codes[0, 0, 4, 20] = 1
    plain = prior(torch.zeros_like(codes), torch.tensor([[1]]))
    assert (prior(codes, torch.tensor([[1]])) - plain)[0, :, 1, 4, 9].abs().sum() > 0


def test_what_has_left_the_view_comes_back_with_a_turn():
    prior, W = VideoPrior(9, 3, 8, 1, context=4).double(), 8
    kernels = torch.zeros(4, 4, 3, 7, dtype=torch.float64)             # action, E, rows, columns
    for action, column in enumerate((3, 2, 4)):        # stay; left: all moves right; right
        kernels[1 + action, :, 1, column] = 1
    prior.move.weight.data = kernels.flatten(1)
    scene, plans = torch.randn(4, 5, 40).double(), torch.tensor([[2, 2, 1, 1], [1, 2, 0, 1],
                                                                 [2, 2, 2, 2], [1, 1, 1, 0]])
    turns = torch.tensor([0, -1, 1])[plans].cumsum(1)                  # (B, context)
    views = 16 + F.pad(turns, (1, 0))                  # the first column in view, (B, context + 1)
    e = torch.stack([torch.stack([scene[..., v:v + W] for v in view[:-1]]) for view in views], 1)
    found = prior.panorama(e, plans)                   # (B, E, H, W)
    for picture, view in zip(found, views):
        for i in range(W):
            column = view[-1] + i
            seen = any(v <= column < v + W for v in view[:-1])
            assert torch.allclose(picture[..., i], scene[..., column] * seen), (
                f"views {view.tolist()}, column {i}: {'lost' if seen else 'invented'}")


def test_nothing_moves_in_a_prior_that_has_learned_nothing():
    prior, e = VideoPrior(9, 3, 8, 1, context=2), torch.randn(2, 3, 4, 5, 8)
    assert torch.equal(prior.panorama(e, torch.randint(-1, 3, (3, 2))), e[-1])


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
    one, two = (f(codes, actions, frames=2, generator=torch.Generator().manual_seed(5))
                for f in (prior.sample, partial(sample_video, prior)))
    assert one.shape == (3, 2, 3, 5) and one.dtype == torch.long
    assert torch.equal(one, two)


@pytest.mark.parametrize("guidance", [0.5, 1.5, 3.0])
def test_guided_sampling_weighs_the_action_against_no_action(guidance):
    prior = VideoPrior(7, 3, 16, 2, context=2).double()
    for p in prior.parameters():
        p.data *= 2
    prior.move.weight.data.normal_()                   # earlier actions matter too, and stay
    codes, actions = torch.randint(7, (3, 2, 3, 5)), torch.randint(3, (3, 3))
    one, two, plain = (f(codes, actions, 2, generator=torch.Generator().manual_seed(5),
                         guidance=w) for f, w in ((prior.sample, guidance),
                       (partial(sample_video, prior), guidance), (prior.sample, 1.0)))
    assert torch.equal(one, two), "p(z|action)^w p(z)^(1 - w): both terms see the same codes"
    assert not torch.equal(one, plain), "guidance changes nothing"


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
def test_guided_draws_have_the_distribution_they_should(guidance):
    given, without = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    n, tall = 20_000, torch.Generator().manual_seed(0)
    logits = torch.cat([given.log().expand(n, -1), without.log().expand(n, -1)])
    z = draw(logits if guidance != 1 else logits[:n], gumbel(n, 3, generator=tall), 1.0, guidance)
    wanted = given ** guidance * without ** (1 - guidance)
    found = z[:n].bincount(minlength=3) / n
    assert torch.allclose(found, wanted / wanted.sum(), atol=0.015), f"frequencies {found}"
    assert guidance == 1 or torch.equal(z[:n], z[n:]), "both halves must go on with the same codes"


@pytest.mark.parametrize("training", [True, False])
def test_a_share_of_the_actions_is_hidden_in_training_only(training):
    prior = VideoPrior(7, 3, 16, 1).train(training)
    seen = []
    prior.register_forward_pre_hook(lambda net, args: seen.append(args[1]))
    action = torch.randint(3, (2000, GIVEN + 1))
    train_video.prior_loss(prior, torch.randint(7, (2000, GIVEN + 1, 4, 4)), action, hidden=0.25)
    hidden = (seen[0] == -1).float().mean(0).tolist()
    assert hidden == pytest.approx([0.25 * training] * GIVEN, abs=0.04), f"{hidden} hidden, by step"
    known = seen[0] != -1
    assert torch.equal(seen[0][known], action[:, 1:][known]), "the other actions must stay"
    assert (known[:, :-1] == known[:, :1]).all(), "of the earlier ones all are known, or none"
    both = (~known[:, 0] & ~known[:, -1]).float().mean().item()
    assert both == pytest.approx(0.25 ** 2 * training, abs=0.03), "the last one is hidden by itself"


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
    return demo_clips(world, 12, 1, 24, 0)[2][:, 0]


def after(world, pose, *actions):
    return world.walk(pose, np.tile(actions, (len(pose), 1)))[:, -1]


def test_turning_left_then_right_returns_to_the_same_picture(world, poses):
    there = after(world, poses, LEFT)
    assert not np.array_equal(world.look(there, 16), world.look(poses, 16))
    back = after(world, poses, LEFT, RIGHT)
    assert np.array_equal(world.look(back, 16), world.look(poses, 16))


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
    # Slanted walks slide along a wall into a corner: at 10 degrees 5 cells take 192 steps.
    end = after(world, poses, *[FORWARD] * 200)
    assert np.array_equal(after(world, end, FORWARD), end)
    assert np.array_equal(world.look(after(world, end, FORWARD), 16), world.look(end, 16))
    assert not world.wall[end[:, 0].astype(int), end[:, 1].astype(int), end[:, 2].astype(int)].any()


def test_a_left_turn_moves_the_picture_to_the_right_by_one_code(world, poses):
    before, then = (world.look(p, 24).astype(int) for p in (poses, after(world, poses, LEFT)))
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
        image = world.look(np.array([[0, 20 - distance, 10.5, 0]]), 80)[0]
        rows = (image[:, 80, 0] > 0).sum()
        expected = train_video.WALL / distance / train_video.VIEW * 80
        assert abs(rows - min(80, expected)) <= 2


def test_demo_clips_are_a_function_of_the_seed(world):
    (frames, actions, poses), again, other = (demo_clips(world, 6, 5, 16, s) for s in (0, 0, 1))
    assert frames.shape == (6, 5, 3, 16, 32) and frames.dtype == torch.uint8
    assert all(np.array_equal(a, b) for a, b in zip((frames, actions, poses), again))
    assert not np.array_equal(frames, other[0])
    assert np.array_equal(World(seed=1).wall, world.wall)
    assert not np.array_equal(World(seed=2).wall, world.wall)


def test_recorded_actions_lead_to_the_recorded_frames():
    frames, actions, truth = demo_part(argparse.Namespace(seed=3, demo_clips=20), "train")
    assert set(actions.flatten().tolist()) == {FORWARD, LEFT, RIGHT}
    assert torch.equal(truth(actions[:7, GIVEN - 1:]), frames[:7])
    assert torch.equal(truth(actions[4:7, GIVEN - 1:], first=4), frames[4:7])


def test_unseen_mazes_are_not_those_of_training(monkeypatch):
    def make_world(seed):
        made.append(World(seed=seed))
        return made[-1]

    args, made = argparse.Namespace(seed=3, demo_clips=10, data=None), []
    monkeypatch.setattr(train_video, "World", make_world)
    parts, _ = load_parts(args)
    assert list(parts) == ["train", "valid", "test", "unseen"]
    walls = [world.wall.tobytes() for world in made]
    assert walls[0] == walls[1] == walls[2] != walls[3]
    for n, one in enumerate(parts):                    # nobody walks the same walk twice
        for other in list(parts)[:n]:
            same = (parts[one].frames[:10] == parts[other].frames[:10]).flatten(2).all(2)
            assert not same.all(1).any(), f"{one} and {other} share a clip"


# -- own data -----------------------------------------------------------------------------------


def clips(n=12, t=17, size=16):
    rng = np.random.default_rng(0)
    return (rng.integers(0, 256, (n, t, size, size, 3), dtype=np.uint8),
            rng.integers(0, 3, (n, t)))


def save(path, frames, actions):
    np.savez(path, frames=frames, actions=actions)
    return str(path)


def test_an_action_is_a_value_that_occurs(tmp_path):
    frames, actions = clips(20)
    actions[:] = np.array([3, 10, 12])[actions]
    parts, names = load_parts(argparse.Namespace(data=save(tmp_path / "a.npz", frames, actions)))
    assert names == ["action 3", "action 10", "action 12"], "others could only be imagined untrained"
    assert torch.equal(parts["test"].actions, torch.from_numpy(
        np.searchsorted([3, 10, 12], actions[18:, :16])))


@pytest.mark.parametrize("last", [0, 1])
def test_clips_are_read_and_cut_into_training_validation_and_test(tmp_path, last):
    frames, actions = clips(20)
    path = save(tmp_path / "a.npz", frames, actions[:, :17 - last].astype(np.uint8))
    parts, names = load_parts(argparse.Namespace(data=path))
    assert names == ["action 0", "action 1", "action 2"]
    for part, n in (("train", slice(16)), ("valid", slice(16, 18)), ("test", slice(18, 20))):
        same = torch.from_numpy(frames[n]).permute(0, 1, 4, 2, 3)
        assert torch.equal(parts[part].frames, same) and same.dtype == torch.uint8
        assert torch.equal(parts[part].actions, torch.from_numpy(actions[n, :16]))
        assert parts[part].truth(parts[part].actions) is None, "nobody knows another future"


def test_a_folder_of_arrays_stays_on_the_disk(tmp_path):
    frames, actions = clips(20)
    for name, array in (("frames", frames), ("actions", actions)):
        np.save(tmp_path / f"{name}.npy", array)
    parts, _ = load_parts(argparse.Namespace(data=str(tmp_path)))
    assert torch.equal(parts["train"].frames, torch.from_numpy(frames[:16]).permute(0, 1, 4, 2, 3))
    with open("/proc/self/maps") as maps:
        assert str(tmp_path / "frames.npy") in maps.read(), "not a memory map"
    mapped = parts["train"].frames.untyped_storage().nbytes()
    assert mapped >= 16 * 17 * 16 * 16 * 3
    x = Stretches(parts["train"].frames, parts["train"].actions, 2).x
    assert x.untyped_storage().data_ptr() == parts["train"].frames.untyped_storage().data_ptr()


def test_another_frame_or_action_is_noticed(tmp_path):
    frames, actions = clips(20)
    flags = argparse.Namespace(batch_size=1, prior_batch_size=1)
    def facts(name, frames, actions):
        flags.data = save(tmp_path / name, frames, actions)
        return train_video.load_data(argparse.Namespace(args=flags)).facts
    first = facts("a.npz", frames, actions)
    assert facts("b.npz", frames, actions) == first
    changed = actions.copy()
    changed[3, 3] = (changed[3, 3] + 1) % 3
    assert facts("c.npz", frames, changed)["digest"] != first["digest"]
    changed = frames.copy()
    changed[3, 3, 3, 3] ^= 1
    assert facts("d.npz", changed, actions)["digest"] != first["digest"]


def test_stretches_are_all_of_them_with_the_actions_that_lead_to_their_frames():
    clip = torch.arange(3 * 5).view(3, 5)              # frame t of clip n is the number 5 n + t
    actions = 100 + torch.arange(3 * 4).view(3, 4)     # from t to t + 1 of clip n: 100 + 4 n + t
    data = Stretches(clip, actions, 2)
    pairs, action = data[torch.arange(len(data))]
    assert len(data) == 12 and torch.equal(pairs[:, 0] + 1, pairs[:, 1])
    assert torch.equal(action[:, 1], 100 + pairs[:, 0] // 5 * 4 + pairs[:, 0] % 5)
    assert torch.equal(action[:, 0], torch.where(pairs[:, 0] % 5 == 0, -1, action[:, 1] - 1))


def test_stretches_of_codes_also_end_at_the_first_frames():
    codes = torch.arange(3 * 5, dtype=torch.uint8).view(3, 5, 1, 1)
    actions = 100 + torch.arange(3 * 4).view(3, 4)
    part = Clips(torch.zeros(3, 5, 3, 4, 4), actions)
    data = train_video.Data({"train": part, "valid": part}, {})
    for set in data.stretches(3, {"train": codes, "valid": codes}, 99):
        windows, action = set[torch.tensor([0, 1, 7, 14])]
        assert windows.flatten(1).tolist() == [[99, 99, 0], [99, 0, 1], [5, 6, 7], [12, 13, 14]]
        assert len(set) == 15 and action.tolist() == [
            [-1, -1, -1], [-1, -1, 100], [-1, 104, 105], [109, 110, 111]]


FRAMES, TAKEN = clips()
BAD = {
    "negative action": (FRAMES, TAKEN - 1, "0 to 255"),
    "huge action": (FRAMES, TAKEN + 1000, "0 to 255"),
    "actions as floats": (FRAMES, TAKEN / 1, "float64"),
    "too few actions": (FRAMES, TAKEN[:, :10], "(12, 10)"),
    "actions of other clips": (FRAMES, TAKEN[:11], "(11, 17)"),
    "short clips": (FRAMES[:, :15], TAKEN[:, :15], "(12, 15, 16, 16, 3)"),
    "grey frames": (FRAMES[..., :1], TAKEN, "(12, 17, 16, 16, 1)"),
    "frames without colour axis": (FRAMES[..., 0], TAKEN, "(12, 17, 16, 16)"),
    "float frames": (FRAMES / 255, TAKEN, "float64"),
    "few clips": (FRAMES[:9], TAKEN[:9], "(9, 17, 16, 16, 3)"),
    "odd size": (FRAMES[:, :, :15], TAKEN, "(12, 17, 15, 16, 3)"),
    "tiny size": (FRAMES[:, :, :8, :8], TAKEN, "(12, 17, 8, 8, 3)"),
}


def refused(path):
    """The one line of the ValueError with which a file is refused."""
    with pytest.raises(ValueError) as error:
        read_arrays(str(path))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("case", BAD)
def test_bad_clips_get_one_clear_line(tmp_path, case):
    frames, actions, named = BAD[case]
    line = refused(save(tmp_path / "bad.npz", frames, actions))
    assert "bad.npz" in line and named in line


def header(shape):
    """The first bytes of an .npy of bytes: what follows is missing."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False,
                                                "shape": shape})
    return file.getvalue()


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        for name, content in members.items():
            z.writestr(name.replace("_", "."), content)
    return file.getvalue()


def pickled():
    file = io.BytesIO()
    np.savez(file, frames=np.array([{}]), actions=TAKEN)
    return file.getvalue()


@pytest.mark.parametrize("content, named", {
    "no file": (None, "No such file"),
    "an empty one": (b"", "not readable"),
    "the beginning of an npz": (b"PK\3\4 and no more", "not readable"),
    "an npy": (header((2,)) + b"ab", "not readable"),
    "photographs": (zipped(a_jpg=b"\xff\xd8", b_jpg=b"\xff\xd8"), "not readable"),
    "text with these names": (zipped(frames_npy=b"hello", actions_npy=b""), "|S5"),
    "pickles": (pickled(), "not readable"),
    "more than memory holds": (zipped(frames_npy=header((2 ** 20, 2 ** 20, 2 ** 20)),
                                      actions_npy=header((1,))), "not readable"),
    "a size below zero": (zipped(frames_npy=header((-1, 16)), actions_npy=header((1,))), "bad.npz"),
}.values())
def test_bad_files_get_one_clear_line(tmp_path, content, named):
    if content is not None:
        (tmp_path / "bad.npz").write_bytes(content)
    assert named in refused(tmp_path / "bad.npz")


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_corrupt_file_is_refused_in_one_line_or_read(tmp_path, write):
    """Whatever is wrong with it: bytes changed here and there, or its end missing."""
    write(tmp_path / "good.npz", frames=FRAMES[:10] // 64 * 64, actions=TAKEN[:10])
    good, rng, read = (tmp_path / "good.npz").read_bytes(), np.random.default_rng(0), 0
    for n in range(150):
        bad = bytearray(good)
        at = rng.integers(3) * (len(bad) - 700) // 2   # headers are at the beginning and the end
        for _ in range(rng.integers(1, 8)):
            bad[at + rng.integers(700)] = rng.integers(256)
        (tmp_path / "bad.npz").write_bytes(bad[:rng.integers(len(bad))] if n % 5 == 0 else bad)
        try:
            read_arrays(str(tmp_path / "bad.npz"))
            read += 1
        except ValueError as e:
            assert len(str(e).splitlines()) == 1 and "bad.npz" in str(e)
    assert read < 150, "no corruption was noticed"


# -- measurements -------------------------------------------------------------------------------


def film(n=12):
    return torch.from_numpy(FRAMES[:n, :GIVEN + GENERATED]).permute(0, 1, 4, 2, 3).clone()


class Perfect:
    """A model whose codes lose nothing."""

    encode = decode = staticmethod(lambda x: x)


def measured(imagined, truth):
    actions = torch.zeros(len(truth), GENERATED, dtype=torch.long)
    return measure_films(Perfect, make_judge(3), [RollOut("", actions, imagined, truth)])


def test_psnr_by_hand():
    truth = film()
    truth[:, GIVEN:] = 0
    imagined = truth.clone()
    imagined[:, GIVEN + 1] = 255                       # as wrong as can be: 0 dB
    imagined[:, GIVEN + 2] = 51                        # a fifth of it: 20 log10(5) dB
    found = measured(imagined, truth)["psnr_generated"]
    assert found[:3] == pytest.approx([10 * np.log10(255 ** 2 / 1e-2), 0, 13.979], abs=1e-2)
    imagined[:6, GIVEN + 1] = 0                        # half of the clips: half the error, 3 dB
    assert measured(imagined, truth)["psnr_generated"][1] == pytest.approx(3.0103, abs=1e-3)


def test_psnr_is_of_the_clips_in_which_something_happens():
    truth = film()
    truth[:3, GIVEN:] = truth[:3, GIVEN - 1:GIVEN]     # three clips in which nothing happens
    assert is_moving(truth).tolist() == [False] * 3 + [True] * 9
    found = measured(truth, truth)
    assert min(found["psnr_generated"]) > 60 > max(found["psnr_copy_last"])
    assert found["sharpness"] == [1.0] * GENERATED
    imagined = truth.clone()
    imagined[:3] = 0
    assert min(measured(imagined, truth)["psnr_generated"]) > 60, "a still clip was counted"


def test_blur_lowers_sharpness():
    truth = film()
    blurred = F.avg_pool2d(truth.flatten(0, 1).float(), 3, 1, 1).byte().view_as(truth)
    assert max(measured(blurred, truth)["sharpness"]) < 0.5


def test_long_clips_are_cut_into_roll_outs():
    frames, actions = torch.arange(2 * 40).view(2, 40, 1, 1, 1), torch.arange(2 * 39).view(2, 39)

    class Copy(Perfect):
        names, prior = [], argparse.Namespace(num_actions=0)

        @staticmethod
        def imagine(given, actions, before, seed):
            assert torch.equal(before[:, -1] + 1, actions[:, 0]), "not the actions just before"
            return given

    run = argparse.Namespace(args=argparse.Namespace(seed=0))
    [row] = roll_outs(run, Copy, Clips(frames, actions))
    starts = torch.tensor([0, 16, 40, 56])
    assert torch.equal(row.truth.flatten(1), starts[:, None] + torch.arange(16))
    assert torch.equal(row.imagined, row.truth[:, :GIVEN])
    first = torch.tensor([0, 16, 39, 55])              # the number of a clip's first action
    assert torch.equal(row.actions, first[:, None] + torch.arange(GIVEN - 1, 15))
    assert torch.equal(row.before, first[:, None] + torch.arange(GIVEN - 1))


def test_the_long_roll_out_is_told_the_actions_before_its_first():
    told = []

    class Recorder(Perfect):
        @staticmethod
        def imagine(given, actions, before, seed):
            told.append((before, actions))
            return torch.cat([given, given[:, :1].expand(-1, actions.shape[1], -1, -1, -1)], 1)

    truth = torch.randint(256, (5, 16, 3, 8, 8), dtype=torch.uint8)
    taken, before = torch.randint(9, (5, 10)), torch.randint(9, (5, GIVEN - 1))
    run = argparse.Namespace(args=argparse.Namespace(seed=0), rehearsing=False,
                             picture=lambda *args: None, write=lambda *args: None)
    train_video.draw(run, Recorder, Clips(truth, None), [RollOut("", taken, truth, truth, before)])
    [(first, actions)] = told
    assert actions.shape == (4, 100) and torch.equal(actions[:, :10], taken[[0, 0, 0, 0]])
    assert torch.equal(first, before[:4]), "not the actions between the given frames"


def test_action_accuracy_counts_roll_outs_nearest_to_their_own_action():
    truths = list(torch.randint(256, (3, 4, 2, 3, 8, 8), dtype=torch.uint8))

    def accuracy(imagined):
        return action_accuracy([RollOut("", None, *pair) for pair in zip(imagined, truths)])

    assert accuracy(truths) == 1
    assert accuracy(truths[1:] + truths[:1]) == 0
    mixed = [truths[0], truths[1].clone(), truths[2]]
    mixed[1][0] = truths[0][0]                         # one of twelve does something else
    assert accuracy(mixed) == pytest.approx(11 / 12)


def test_training_asks_what_a_roll_out_asks():
    """Every frame of a clip is predicted in training, each as in the whole clip's forward pass."""
    torch.manual_seed(0)
    prior = VideoPrior(5, 2, 8, num_layers=1, context=GIVEN).double()
    codes, actions = torch.randint(5, (3, 9, 4, 4), dtype=torch.uint8), torch.randint(2, (3, 8))
    whole = F.cross_entropy(prior(codes.long(), actions), codes.long(), reduction="none")
    data = Stretches(F.pad(codes, (0, 0, 0, 0, GIVEN, 0), value=5), actions, GIVEN + 1)
    for k in range(len(data)):
        loss, stats = train_video.prior_loss(prior, *data[torch.tensor([k])])
        assert loss.item() == pytest.approx(whole.flatten(0, 1)[k].mean().item(), abs=1e-9), k
        assert stats["bits_per_code"].item() == pytest.approx(loss.item() / np.log(2))
    alone = train_video.prior_loss(prior, data[torch.arange(9)][0], None)[0].item()
    unknown = F.cross_entropy(prior(codes[:1].long()), codes[:1].long()).item()
    assert alone == pytest.approx(unknown, abs=1e-9)


def test_bits_of_a_uniform_prior():
    prior = VideoPrior(32, 2, 8, 1)
    for p in prior.pixelcnn.head.parameters():
        torch.nn.init.zeros_(p)
    codes = torch.randint(32, (11, 8, 4, 4), dtype=torch.uint8)
    actions = torch.randint(2, (11, 7))
    assert bits_per_code(prior, codes, actions) == pytest.approx(5.0)


def test_bits_are_of_the_frames_that_are_not_given():
    prior = VideoPrior(6, 3, 8, 1).double()
    codes, actions = torch.randint(6, (5, 8, 3, 3)), torch.randint(3, (5, 7))
    nats = F.cross_entropy(prior(codes, actions)[:, :, GIVEN:], codes[:, GIVEN:])
    assert bits_per_code(prior, codes, actions) == pytest.approx(nats.item() / np.log(2))


def test_bits_of_many_frames_are_those_of_evenly_spread_ones():
    prior = VideoPrior(6, 3, 8, 1).double()
    codes, actions = torch.randint(6, (5, GIVEN + 1, 3, 3)), torch.randint(3, (5, GIVEN))
    every = [bits_per_code(prior, codes[k:k + 1], actions[k:k + 1]) for k in (0, 2, 4)]
    assert bits_per_code(prior, codes, actions, most=3) == pytest.approx(np.mean(every))


def test_the_judge_learns_what_a_turn_and_a_step_look_like(world):
    frames, actions, _ = demo_clips(world, 60, 8, 24, 0)
    pairs = Stretches(frames, torch.from_numpy(actions[:, :-1]), 2)
    judge, index = make_judge(3), torch.randperm(len(pairs))
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-3)
    for _ in range(120):
        loss, stats = judge_loss(judge, *pairs[index[:360][torch.randint(360, (32,))]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pair, action = pairs[index[360:]]
    assert judge_accuracy(judge, pair, action[:, 1:])[0] > 0.8
    assert judge_accuracy(judge, pair.flip(1), action[:, 1:])[0] < 0.5, "backwards, left is right"


def test_the_judge_is_asked_about_each_step_and_its_own_action():
    film = torch.randint(256, (5, 4, 3, 16, 16), dtype=torch.uint8)
    actions = torch.randint(9, (5, 3))
    key = {to_unit(film[n, t:t + 2]).sum().item(): actions[n, t].clone()
           for n in range(5) for t in range(3)}

    class Oracle(torch.nn.Linear):
        def forward(self, pairs):
            return F.one_hot(torch.stack([key[pair.sum().item()] for pair in pairs]), 9)

    assert judge_accuracy(Oracle(1, 1), film, actions) == [1, 1, 1]
    actions[:2, 1] += 1                                # two of five do something else in step 1
    assert judge_accuracy(Oracle(1, 1), film, actions) == pytest.approx([1, 0.6, 1])


# -- the whole run ------------------------------------------------------------------------------

TINY = ("--steps 3 --prior-steps 2 --hidden 8 --res-hidden 8 "
        "--prior-channels 8 --prior-layers 1 --num-codes 16 --code-dim 8 --batch-size 8 "
        "--prior-batch-size 2 --device cpu").split()


@pytest.fixture
def script(monkeypatch, capsys):
    """python train_video.py FLAGS, in this process -> exit status, standard output and error."""
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["train_video.py", *map(str, flags)])
        threads, status, runs = torch.get_num_threads(), 0, []

        def main(run, data):
            runs.append(run)
            train_video.main(run, data)

        try:
            launch(train_video.make_parser(), train_video.load_data, main, train_video.use)
        except SystemExit as e:
            status = e.code
        for one in runs:                               # what the end of a process does
            if getattr(one, "lock", None):
                os.close(one.lock)
        torch.set_num_threads(threads)
        return status, *capsys.readouterr()
    return run


def read(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    with Image.open(folder / "rollout.gif") as gif:
        films = gif.n_frames / (GIVEN + GENERATED)
        assert films == int(films) > 0
    for name in ("rollout", "rollout_long", "reconstructions", "curves"):
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 100 and sum(n > 0 for n in image.convert("L").histogram()) > 10
    with open(folder / "log.csv") as f:
        log = list(csv.DictReader(f))
    assert "prior" in [row["stage"] for row in log] and log[-1]["valid_loss"]
    for name in ("psnr_generated", "psnr_copy_last", "psnr_reconstruction", "sharpness"):
        assert len(metrics[name]) == GENERATED
    assert 0 < metrics["bits_per_code"] < 20 and 0 < metrics["valid_bits_per_code"] < 20
    return metrics


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A whole run of the demo, through the command line."""
    out = tmp_path_factory.mktemp("demo")
    result = subprocess.run([sys.executable, str(ROOT / "train_video.py"), *TINY, "--demo-clips",
                             "10", "--out", str(out)], capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return out


def test_demo_from_nothing_to_roll_outs(demo):
    metrics = read(demo)
    assert 0 <= metrics["action_accuracy"] <= 1
    assert {"bits_per_code_shuffled_actions", "bits_per_code_unknown_actions"} <= metrics.keys()
    assert {"unseen_action_accuracy", "unseen_psnr_generated", "unseen_bits_per_code",
            "unseen_judge_imagined"} <= set(metrics), "the second row: mazes never seen"
    assert all(len(metrics[f"judge_{k}"]) == GENERATED for k in ("real", "imagined"))


@pytest.mark.parametrize("guidance, hidden", [(1, 0), (1.5, 0.1)])
def test_with_guidance_1_no_action_is_hidden(script, tmp_path, monkeypatch, guidance, hidden):
    loss, seen = train_video.prior_loss, set()

    def spy(net, z, action, share=0.0):
        seen.update([share] * net.training)
        return loss(net, z, action, share)
    monkeypatch.setattr(train_video, "prior_loss", spy)
    data = save(tmp_path / "clips.npz", *clips(20))
    status, _, error = script(*TINY, "--data", data, "--out", tmp_path / "one", "--guidance",
                              guidance)
    assert status == 0, error
    assert seen == {hidden}, "--guidance 1 is the paper's model; others need the prior without"


def test_own_clips_and_the_same_numbers_after_resume(script, tmp_path):
    data = save(tmp_path / "clips.npz", *clips(20))
    status, _, error = script(*TINY, "--data", data, "--out", tmp_path / "one")
    assert status == 0, error
    first = read(tmp_path / "one")
    assert "action_accuracy" not in first, "nobody knows what would have happened"
    assert not [name for name in first if name.startswith("unseen")]
    status, _, error = script("--resume", "--out", tmp_path / "one")
    assert status == 0, error
    again = read(tmp_path / "one")
    for name in ("bits_per_code", "psnr_generated", "judge_imagined"):
        assert again[name] == first[name], f"{name} is another after --resume"


def test_no_actions_one_code_and_black_first_frames_are_no_obstacle(script, tmp_path):
    frames, actions = clips(20)
    frames[:, 0] = 0
    data = save(tmp_path / "clips.npz", frames, actions)
    status, _, error = script(*TINY, "--data", data, "--out", tmp_path / "out", "--no-actions",
                              "--num-codes", 1)
    assert status == 0, error
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "bits_per_code_shuffled_actions" not in metrics
    assert metrics["bits_per_code"] == pytest.approx(0, abs=1e-6)
    status, _, error = script("--play", "left", "--out", tmp_path / "out")
    assert status == 2 and "without actions" in error


def test_one_test_clip_still_has_other_actions(model):
    codes = torch.randint(model.args.num_codes, (1, GIVEN + 4, 6, 12))
    found = measure_codes(model, Clips(torch.zeros(1, GIVEN + 4, 3, 24, 48, dtype=torch.uint8),
                                       torch.arange(GIVEN + 3)[None] % 3), codes)
    assert found["bits_per_code_shuffled_actions"] != found["bits_per_code"], (
        "its own actions in their place: the number would say that actions do not count")


def test_a_walk_whose_data_has_moved_is_played(script, tmp_path):
    data = save(tmp_path / "clips.npz", *clips(20))
    assert script(*TINY, "--data", data, "--out", tmp_path / "out")[0] == 0
    moved = os.rename(data, tmp_path / "moved.npz") or tmp_path / "moved.npz"
    assert script("--play", "0", "--out", tmp_path / "out")[0] == 2
    status, _, error = script("--play", "0", "--out", tmp_path / "out", "--data", moved)
    assert status == 0, error


def test_long_clips_are_encoded_in_pieces(model, monkeypatch):
    sizes = []
    monkeypatch.setattr(model.vqvae, "encode", lambda x: sizes.append(len(x)) or x[:, 0])
    x = torch.randint(16, (2, 300, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(model.encode(x), x[:, :, 0]), "each code at its place"
    assert max(sizes) <= 128, f"{max(sizes)} frames at once: memory must not grow with a clip"


def test_what_cannot_work_is_one_line_and_leaves_nothing(script, demo, tmp_path):
    good, bad = save(tmp_path / "good.npz", FRAMES, TAKEN), tmp_path / "bad.npz"
    save(bad, FRAMES, TAKEN[:, :10])
    before = {file: file.read_bytes() for file in demo.rglob("*") if file.is_file()}
    for flags, named in (
            (["--data", bad], "(12, 10)"),
            (["--data", good, "--prior-batch-size", 10 ** 6], "--prior-batch-size"),
            (["--data", good, "--batch-size", 10 ** 6], "--batch-size"),
            (["--data", good, "--prior-channels", 10 ** 9], "memory"),
            (["--data", tmp_path / "no\nsuch.npz"], "No such file"),
            (["--resume", "--out", demo, "--data", good], "the data is not that of this run"),
            (["--resume", "--out", demo, "--prior-channels", 16], "--prior-channels 16"),
            (["--play", "left", "--out", tmp_path / "out"], "there is no"),
            (["--play", "left,hop", "--out", demo], "forward, left, right"),
            (["--play", "--out", demo], "no display"),
            (["--play", "left", "--out", demo, "--temperature", -1], "--temperature")):
        flags = flags if "--out" in flags else [*TINY, "--out", tmp_path / "out", *flags]
        status, _, error = script(*flags)
        assert status == 2 and len(error.splitlines()) == 1 and named in error, (flags, error)
        assert not (tmp_path / "out").exists(), flags
    assert before == {file: file.read_bytes() for file in demo.rglob("*") if file.is_file()}


# -- using a finished run -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(demo):
    return load(demo, "cpu")


@pytest.fixture(scope="module")
def clips_of_test(model):
    return load_parts(model.args, ["test"])[0]["test"]


def test_load_gives_the_model_that_was_measured(demo, model, clips_of_test):
    metrics = json.loads((demo / "metrics.json").read_text())
    codes = model.encode(clips_of_test.frames)
    found = train_video.measure_codes(model, clips_of_test, codes)
    assert {k: metrics[k] for k in found} == pytest.approx(found, rel=1e-4)
    assert not any(net.training for net in model[:2])
    assert not any(p.requires_grad for net in model[:2] for p in net.parameters())


def test_imagine_goes_from_frames_to_frames(model, clips_of_test):
    actions = torch.tensor([[1, 1, 0], [2, 0, 0]])
    given = clips_of_test.frames[:2, :GIVEN]
    film = model.imagine(given, actions, seed=4)
    assert film.shape == (2, GIVEN + 3, 3, 24, 48) and film.dtype == torch.uint8
    assert torch.equal(film[:, :GIVEN], given)
    plan = torch.cat([torch.full((2, GIVEN - 1), -1), actions], 1)
    z = model.encode(given).long()
    z = model.prior.sample(z, plan, 3, model.args.temperature,
                           torch.Generator().manual_seed(4), model.args.guidance)
    assert torch.equal(film[:, GIVEN:], model.decode(z)), "not what the prior samples"
    assert torch.equal(film[:, :GIVEN + 2], model.imagine(given, actions[:, :2], seed=4))
    z = model.encode(given).long()
    z = model.prior.sample(z, 0 * plan, 3, model.args.temperature,
                           torch.Generator().manual_seed(4), model.args.guidance)
    film = model.imagine(given, 0 * actions, 0 * plan[:, :GIVEN - 1], seed=4)
    assert torch.equal(film[:, GIVEN:], model.decode(z)), "the actions before are not used"


@pytest.mark.parametrize("spoil, said", [
    (lambda file: file.unlink(), "there is no"), (lambda file: file.write_bytes(b"PK"), "corrupt"),
    (lambda file: torch.save({**torch.load(file), "step": 1}, file), "step 1 of 2"),
    (lambda file: torch.save({**torch.load(file), "best": None, "model": {}}, file),
     "not readable")])
def test_load_refuses_what_is_no_finished_run(demo, tmp_path, spoil, said):
    shutil.copytree(demo, tmp_path / "run")
    spoil(tmp_path / "run" / "checkpoint-prior.pt")
    with pytest.raises(ValueError, match=said) as error:
        load(tmp_path / "run")
    assert len(str(error.value).splitlines()) == 1


def test_actions_have_names_numbers_and_arrow_keys(play):
    found = [play.words.get(w) for w in ("forward", "left", "2", "up", "right")]
    assert found == [0, 1, 2, 0, 2]
    assert [play.words.get(w) for w in ("3", "down", "", "-1", None)] == [None] * 5


def press(play, *keys):
    canvas = play.axis.figure.canvas
    for key in keys:
        canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", canvas, key))


@pytest.fixture
def play(model, clips_of_test):
    figure = Figure()
    FigureCanvasAgg(figure)
    play = Play(model, clips_of_test, temperature=0.8)
    play.open(figure)
    return play


def shown(play):
    """The picture, its codes in colour and the ground truth: (3, 24, 48, 3)."""
    return np.stack(np.split(np.asarray(play.axis.images[0].get_array()), 3, axis=1))


def test_arrow_keys_imagine_one_frame_each(play, model, clips_of_test):
    press(play, "left", "left", "up", "right", "x", "f5")
    actions = torch.tensor([[LEFT, LEFT, FORWARD, RIGHT]])
    before = clips_of_test.actions[:1, :GIVEN - 1]
    expected = model.imagine(clips_of_test.frames[:1, :GIVEN], actions, before, 0.8)[0]
    assert torch.equal(play.film, expected), "not what a roll-out of the same actions gives"
    assert np.array_equal(shown(play)[0], expected[-1].permute(1, 2, 0)), "shows another frame"
    truth = clips_of_test.truth(actions)[0]
    assert torch.equal(play.truth(), truth)
    assert np.array_equal(shown(play)[2], truth[-1].permute(1, 2, 0))


def test_codes_are_shown_as_colours_a_colour_for_each(play):
    press(play, "left")
    codes, sheet = play.codes[0, -1], shown(play)[1][::train_video.FACTOR, ::train_video.FACTOR]
    assert sheet.shape == (6, 12, 3)
    for code in codes.unique():
        assert len(np.unique(sheet[codes == code], axis=0)) == 1, "two colours for one code"
    assert len(np.unique(play.colors, axis=0)) == len(play.colors), "one colour for two codes"


def test_the_key_n_shows_the_next_clip(play, clips_of_test):
    press(play, "left", "n")
    assert len(play.film) == GIVEN and play.n == 1 and play.actions == []
    assert np.array_equal(shown(play)[0], clips_of_test.frames[1, GIVEN - 1].permute(1, 2, 0))
    press(play, *"n" * (len(clips_of_test.frames) - 1))
    assert play.n == 0, "after the last clip comes the first"


def test_play_writes_the_walk_as_a_gif(script, demo):
    status, out, error = script("--play", "left, 1,up,forward", "--out", demo)
    assert status == 0 and "play.gif" in out, error
    with Image.open(demo / "play.gif") as gif:
        assert gif.n_frames == GIVEN + 4
    (demo / "play.gif").unlink()
