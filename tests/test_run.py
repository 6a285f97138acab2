"""Section 5 of vqvae.py: training loop, checkpoints, resume, several processes, bad flags."""

import csv
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from conftest import ROOT
from vqvae import (Decoder, Encoder, Parser, Run, VectorQuantizer, VectorQuantizerEMA, schedule)

PRESETS = {"demo": dict(steps=6, prior_steps=6, batch_size=4, lr=0.01)}
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_run(monkeypatch, tmp_path):
    def make(*flags, out=tmp_path / "out"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(out), "--device", "cpu", *flags])
        return Run(Parser("test", PRESETS))
    return make


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))  # draws random numbers


def train(run, model, at=lambda step: None, steps=None, stage="one"):
    """Fit model, calling at(step) in the loss of each step (1, 2, ...) of this process."""
    seen = []

    def loss(net, index):
        seen.append(index)
        at(len(seen))
        return net(X[index]).square().mean(), {}

    args = run.args
    run.fit(stage, model, loss, len(X), steps or args.steps, args.batch_size, args.lr)
    return seen


def stopped(capsys, call, *args, **kwargs):
    """The single line on stderr with which call() ends the program, exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        call(*args, **kwargs)
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2, "bad input must end with exit status 2"
    assert len(lines) == 1, f"bad input deserves one line, not {lines}"
    return lines[0]


def interrupt(signal_number=signal.SIGINT, at=3):
    return lambda step: os.kill(os.getpid(), signal_number) if step == at else None


def checkpoint(run):
    return torch.load(run.out / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Equal to the last bit: nested dicts and lists of tensors and numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# -- the loop -----------------------------------------------------------------------------------


def test_fit_is_adam_on_the_batches_it_shows(make_run):
    run, model = make_run("--lr-decay", "0.5"), nn.Linear(3, 1)
    oracle = nn.Linear(3, 1)
    oracle.load_state_dict(model.state_dict())
    batches = train(run, model)
    adam = torch.optim.Adam(oracle.parameters(), lr=0.01)
    for factor, index in zip((1 / 2, 1, 1, 1, 2 / 3, 1 / 3), batches, strict=True):
        adam.param_groups[0]["lr"] = 0.01 * factor
        adam.zero_grad()
        oracle(X[index]).square().mean().backward()
        adam.step()
    for mine, theirs in zip(model.parameters(), oracle.parameters()):
        assert torch.allclose(mine, theirs, atol=1e-6), "fit is not Adam with this learning rate"


def test_lr_decay_is_a_straight_line_to_zero():
    assert [schedule(s, 1000, 0.5) for s in (400, 500, 750, 1000)] == [1, 1, 0.5, 0]
    assert [schedule(s, 1000, 0.0) for s in (400, 500, 750, 1000)] == [1, 1, 1, 1]


def test_lr_begins_on_a_straight_line_up():
    assert [schedule(s, 1000, 0.5) for s in (0, 24, 49, 99, 100)] == [0.01, 0.25, 0.5, 1, 1]
    assert [schedule(s, 11, 0.0) for s in range(4)] == [1 / 3, 2 / 3, 1, 1], "or over a quarter"


def test_batches_differ_between_steps_stages_and_seeds(make_run, tmp_path):
    batches = {(seed, stage): train(make_run("--seed", seed, out=tmp_path / seed), nn.Linear(3, 1),
                                    stage=stage)
               for seed in "01" for stage in ("one", "two")}
    every = [tuple(index.tolist()) for part in batches.values() for index in part]
    assert len(set(every)) == len(every) == 24
    assert all(len(index) == 4 and 0 <= min(index) and max(index) < 20 for index in every)


def test_weights_are_a_function_of_the_seed(make_run):
    weights = []
    for seed in "334":
        torch.rand(3)                                  # what was drawn before must not matter
        make_run("--seed", seed)
        weights.append(nn.Linear(3, 1).weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_log_averages_scalars_and_counts_what_was_used(make_run):
    run, step = make_run(), iter(range(400))

    def loss(net, index):
        n = next(step)
        used = 3 * F.one_hot(torch.tensor(n % 2), 5)
        return net(X[index]).sum(), {"number": torch.tensor(float(n)), "used": used}

    run.fit("one", nn.Linear(3, 1), loss, len(X), 400, 4, 0.01)        # a line every 2 steps
    with open(run.out / "log.csv") as f:
        rows = list(csv.DictReader(f))
    assert [int(r["step"]) for r in rows] == list(range(2, 401, 2))
    assert [float(r["number"]) for r in rows] == [n + 0.5 for n in range(0, 400, 2)], (
        "a line of the log must average over all steps since the line before")
    assert {r["used"] for r in rows} == {"2"}, "two of the five were used since the line before"


def test_evaluation_runs_in_eval_mode_and_lands_in_the_log(make_run):
    run, model = make_run(), network()
    modes = []

    def evaluate():
        modes.append(model.training)
        return {"score": 5.0}

    run.fit("one", model, lambda net, index: (net(X[index]).sum(), {"train": torch.tensor(
        float(net.training))}), len(X), 25, 4, 0.01, evaluate)         # after 10, 20, 25
    assert modes == [False, False, False], "evaluate in eval mode, some times on the way"
    with open(run.out / "log.csv") as f:
        rows = list(csv.DictReader(f))
    assert rows[-1]["score"] == "5.0", "the last step must be evaluated"
    assert {r["train"] for r in rows} == {"1.0"}, "training must go on in training mode"
    assert not model.training, "a fitted model is handed back in eval mode"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_decides_about_autocast(make_run, precision):
    run, dtypes = make_run("--precision", precision), set()

    def loss(net, index):
        y = net(X[index])
        dtypes.add(y.dtype)
        return y.sum(), {}

    run.fit("one", nn.Linear(3, 1), loss, len(X), 2, 4, 0.01)
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_progress_is_plain_lines_in_a_log(make_run, capsys):
    train(make_run(), nn.Linear(3, 1))
    out = capsys.readouterr().out
    assert "one 6/6" in out and "steps/s" in out and "left" in out and "loss" in out
    assert "\r" not in out and "\x1b" not in out


def test_flags_given_beside_a_preset_win(make_run):
    run = make_run("--steps", "9")
    train(run, nn.Linear(3, 1))
    config = json.loads((run.out / "config.json").read_text())
    assert (run.args.steps, run.args.batch_size) == (9, 4)
    assert (config["steps"], config["batch_size"], config["processes"]) == (9, 4, 1)


# -- stop and go on -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(make_run, capsys, number):
    run = make_run()
    with pytest.raises(SystemExit) as exit:
        train(run, network(), interrupt(number))
    assert exit.value.code == 130
    assert checkpoint(run)["stages"]["one"]["step"] == 3
    assert f"python train.py --resume --out {run.out}" in capsys.readouterr().out


def test_second_ctrl_c_stops_at_once(make_run):
    seen = []

    def twice(step):
        seen.append(step)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it after &
    try:
        with pytest.raises(KeyboardInterrupt):
            train(make_run(), network(), twice)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [1]


def test_fit_gives_the_signal_handlers_back(make_run):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(make_run(), nn.Linear(3, 1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_resumed_fit_equals_uninterrupted_bit_for_bit(make_run, tmp_path):
    whole = make_run("--lr-decay", "0.5", out=tmp_path / "whole")
    train(whole, network())
    with pytest.raises(SystemExit):
        train(make_run("--lr-decay", "0.5"), network(), interrupt())
    torch.manual_seed(99), torch.rand(5)               # another process has other random numbers
    resumed = make_run("--resume")
    assert len(train(resumed, network())) == 3, "steps 1 to 3 are done, 4 to 6 are to do"
    one, two = checkpoint(whole), checkpoint(resumed)
    assert same(one["stages"], two["stages"]), (
        "weights or optimiser differ from those of a run that was never stopped: batches and "
        "noise must be functions of (seed, stage, step), and Adam's state must be restored")
    drop = [[{k: v for k, v in row.items() if k != "seconds"} for row in c["log"]]
            for c in (one, two)]
    assert drop[0] == drop[1]


def test_a_finished_stage_is_not_trained_again(make_run):
    train(make_run(), network())
    resumed, model = make_run("--resume"), network()
    assert train(resumed, model) == []
    assert resumed.fitted("one", 6) and not resumed.fitted("one", 7)
    assert same(dict(model.state_dict()), checkpoint(resumed)["stages"]["one"]["model"])


def test_a_later_stage_does_not_reach_into_the_checkpoint_of_an_earlier_one(make_run):
    run, model = make_run(), network()
    train(run, model, stage="one")
    before = checkpoint(run)["stages"]["one"]
    train(run, model, stage="two")                     # the same model: state_dict() is no copy
    assert same(checkpoint(run)["stages"]["one"], before)


def test_resume_takes_the_flags_of_the_checkpoint_but_those_given_win(make_run):
    train(make_run("--lr", "0.5", "--seed", "3"), network())
    resumed = make_run("--resume", "--steps", "8")
    assert (resumed.args.lr, resumed.args.seed, resumed.args.steps) == (0.5, 3, 8)


def test_seconds_count_what_was_before_the_resume(make_run):
    run = make_run()
    run.seconds_before = 1000
    train(run, network())
    assert make_run("--resume").seconds >= 1000


def test_a_new_run_keeps_the_old_checkpoint(make_run):
    first = make_run()
    train(first, network())
    before = (first.out / "checkpoint.pt").read_bytes()
    train(make_run("--seed", "5"), network())
    assert (first.out / "checkpoint.old.pt").read_bytes() == before, (
        "a second run into the same folder must not destroy the first one's checkpoint")


KILLED_WHILE_SAVING = """
import io, os, pathlib, signal, sys
import torch
from test_run import PRESETS, network, train
from vqvae import Parser, Run
save, calls = torch.save, []

def save_half(state, file):
    calls.append(1)
    if len(calls) == 1:
        return save(state, file)
    whole = io.BytesIO()
    save(state, whole)
    half = whole.getvalue()[:whole.tell() // 2]
    if hasattr(file, "write"):
        file.write(half), file.flush()
    else:
        pathlib.Path(file).write_bytes(half)
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half
run = Run(Parser("test", PRESETS))
train(run, network(), stage="one")
train(run, network(), stage="two")
"""


def python(*command, **kwargs):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path}, **kwargs)


def test_kill_9_while_saving_keeps_the_last_checkpoint(make_run, tmp_path):
    done = python("-c", KILLED_WHILE_SAVING, "--out", tmp_path / "out", "--device", "cpu")
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = make_run("--resume")
    assert set(resumed.stages) == {"one"} and resumed.fitted("one", 6), (
        "killed in the middle of a save, the checkpoint saved before must still be whole: write "
        "to another file, then os.replace")
    assert len(train(resumed, network(), stage="two")) == 6


# -- what stops it ------------------------------------------------------------------------------


def test_nan_loss_stops_names_the_step_and_keeps_the_checkpoint(make_run, capsys):
    run = make_run()
    train(run, network(), stage="one")
    before, step = (run.out / "checkpoint.pt").read_bytes(), iter(range(1, 401))

    def loss(net, index):
        n = next(step)
        return net(X[index]).sum() * (float("nan") if n >= 3 else 1), {}

    line = stopped(capsys, run.fit, "two", network(), loss, len(X), 400, 4, 0.01)
    assert "stage two" in line and "step 3" in line.split(":")[1] and "--lr" in line, (
        f"the message must name stage, first bad step and what to try: {line}")
    assert (run.out / "checkpoint.pt").read_bytes() == before, (
        "a loss that is NaN must not reach the checkpoint")


def test_fewer_examples_than_a_batch(make_run, capsys):
    run = make_run("--batch-size", "32")
    line = stopped(capsys, train, run, network())
    assert "20 training examples" in line and "batch of 32" in line and "--batch-size" in line


@pytest.mark.parametrize("flags, named", [
    (["--steps", "0"], "--steps"), (["--steps", "many"], "--steps"),
    (["--batch-size", "2.5"], "--batch-size"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--lr", "inf"], "--lr"), (["--lr-decay", "1.5"], "--lr-decay"), (["--seed", "x"], "--seed"),
    (["--preset", "huge"], "--preset"), (["--device", "abacus"], "--device"),
    (["--precision", "int4"], "--precision"), (["--nonsense"], "--nonsense")])
def test_bad_flag_is_named(make_run, capsys, tmp_path, flags, named):
    line = stopped(capsys, make_run, *flags)
    assert line.startswith("error: ") and named in line
    assert not (tmp_path / "out").exists(), "a mistyped flag must leave no folder behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test asks for")
def test_device_that_is_not_there(make_run, capsys):
    assert "--device cuda" in stopped(capsys, make_run, "--device", "cuda")


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_out_that_cannot_be_written(make_run, capsys, tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / below

    def begin():
        train(make_run(out=out), network())

    line = stopped(capsys, begin)
    assert "--out" in line and str(out) in line
    assert (tmp_path / "file").read_text() == "in the way"


def test_resume_without_a_checkpoint(make_run, capsys, tmp_path):
    line = stopped(capsys, make_run, "--resume")
    assert "--resume" in line and "there is no" in line and "checkpoint.pt" in line
    assert not (tmp_path / "out").exists()


class Trap:
    """Unpickled, it would make the folder `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("content", ["half", "empty", "text", "other", "list"])
def test_torn_or_foreign_checkpoint_is_refused_and_left_alone(make_run, capsys, content):
    run, other = make_run(), io.BytesIO()
    train(run, network())
    whole = run.checkpoint.read_bytes()
    torch.save([1, 2] if content == "list" else {"weights": torch.zeros(3)}, other)
    torn = {"half": whole[:len(whole) // 2], "empty": b"", "text": b"not a checkpoint\n",
            "other": other.getvalue(), "list": other.getvalue()}[content]
    run.checkpoint.write_bytes(torn)
    line = stopped(capsys, make_run, "--resume")
    assert "--resume" in line and str(run.checkpoint) in line
    assert run.checkpoint.read_bytes() == torn


def test_a_checkpoint_that_would_run_code_is_refused(make_run, capsys, tmp_path):
    run = make_run()
    run.out.mkdir()
    torch.save({"args": Trap(str(tmp_path / "sprung")), "stages": {}, "log": [], "seconds": 0},
               run.checkpoint)
    stopped(capsys, make_run, "--resume")
    assert not (tmp_path / "sprung").exists(), "torch.load needs weights_only=True"
    with pytest.raises(pickle.UnpicklingError):        # the trap itself works: torch sees it
        torch.load(run.checkpoint, weights_only=True)


def test_checkpoint_of_another_model_is_refused(make_run, capsys):
    run = make_run()
    train(run, network())
    before = run.checkpoint.read_bytes()
    line = stopped(capsys, train, make_run("--resume"), nn.Linear(3, 1))
    assert "another model" in line and str(run.checkpoint) in line and "one" in line
    assert run.checkpoint.read_bytes() == before


# -- several processes --------------------------------------------------------------------------


def test_batch_that_does_not_divide_among_the_processes(make_run, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    line = stopped(capsys, train, make_run(), nn.Linear(3, 1))
    assert "--batch-size 4" in line and "3 processes" in line


class Small(nn.Module):
    """Encoder, quantiser, decoder in float64, in which the order of a sum hardly shows."""

    def __init__(self, kind):
        super().__init__()
        self.encoder, self.decoder = Encoder(3, 8, 4, 4), Decoder(4, 8, 4, 3)
        self.quantizer = kind(16, 4)
        self.double()

    def forward(self, x):
        q = self.quantizer(self.encoder(x))
        return F.mse_loss(self.decoder(q.z_q), x) + q.loss


def joint_batch(file):
    """Let this process do its share of some batches; the first one saves what came out."""
    run, result = Run(Parser("test", PRESETS)), {}
    draw = torch.Generator().manual_seed(0)
    z_e = torch.randn(8, 4, 2, 3, dtype=torch.float64, generator=draw)
    x = torch.randn(20, 3, 8, 8, dtype=torch.float64, generator=draw)
    for kind in (VectorQuantizer, VectorQuantizerEMA):
        torch.manual_seed(run.rank)                    # processes do not share their random numbers
        vq = kind(16, 4).double()
        vq(z_e.chunk(run.world)[run.rank])
        torch.manual_seed(0)
        model = Small(kind)
        run.fit(kind.__name__, model, lambda net, index: (net(x[index]), {}), len(x), 3, 4, 0.01)
        result[kind.__name__] = {
            "first": {k: v for k, v in vq.state_dict().items() if torch.is_tensor(v)},
            "gradients": {k: p.grad for k, p in model.named_parameters()},
            "fitted": {k: v for k, v in model.state_dict().items() if torch.is_tensor(v)}}
    if run.rank == 0:
        torch.save(result, file)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """joint_batch by one process, and by two under torchrun."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "script.py"
    script.write_text("import sys\nfrom test_run import joint_batch\njoint_batch(sys.argv.pop())\n")
    flags = ["--device", "cpu", "--out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags, str(folder / "out1")])
        joint_batch(folder / "1.pt")
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script,
                  *flags, folder / "out2", folder / "2.pt", timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{n}.pt", weights_only=True) for n in (1, 2)]


def worst(one, two):
    assert one.keys() == two.keys()
    return max((one[k] - two[k]).abs().max().item() for k in one)


def test_two_processes_seed_the_codebook_like_one_with_the_joint_batch(processes):
    one, two = (r["VectorQuantizer"]["first"] for r in processes)
    assert torch.equal(one["codebook"], two["codebook"]), (
        "seed from the latents of all processes, and with the same random rows in each")


def test_two_processes_sum_their_ema_statistics(processes):
    one, two = (r["VectorQuantizerEMA"]["first"] for r in processes)
    assert worst(one, two) < 1e-12, (
        "n_i and sum_j z_ij of eqs. 6 and 7 are those of the joint batch: all_reduce both")
    for count in (one["ema_count"], two["ema_count"]):
        assert count.sum().item() == pytest.approx(0.99 * 16 + 0.01 * 48)  # N = 48 latents in all


@pytest.mark.parametrize("kind", ["VectorQuantizer", "VectorQuantizerEMA"])
def test_two_processes_equal_one_with_the_joint_batch(processes, kind):
    one, two = (r[kind] for r in processes)
    assert worst(one["gradients"], two["gradients"]) < 1e-10, (
        "gradients differ: processes must take disjoint shares of one joint batch")
    assert worst(one["fitted"], two["fitted"]) < 1e-10, "weights differ after three steps"
