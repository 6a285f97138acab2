"""Section 7 of vqvae.py: data path, training loop, checkpoints, resume, rehearsal, bad flags."""

import csv
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from conftest import ROOT
from vqvae import (Decoder, Encoder, Parser, Run, VectorQuantizer, VectorQuantizerEMA, find_files,
                   in_batches, launch, prepare, read_run, reading, safe_name, schedule,
                   smallest_int, spread)

PRESETS = {"demo": dict(steps=6, prior_steps=6, batch_size=4, lr=0.01)}
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
INDEX = TensorDataset(torch.arange(20))                # a data set whose batches are their indices


@pytest.fixture
def make_run(monkeypatch, tmp_path):
    made = []

    def make(*flags, out=tmp_path / "out", alone=True):
        for run in made * alone:                       # one process stands in for several
            if getattr(run, "lock", None):
                os.close(run.lock)
                run.lock = None
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(out), "--device", "cpu", *flags])
        made.append(Run(Parser("test", PRESETS)))
        return made[-1]
    return make


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))  # draws random numbers


def train(run, model, at=lambda step: None, steps=None, stage="one"):
    """Fit model, calling at(step) in the loss of each step (1, 2, ...) of this process."""
    seen = []

    def loss(net, index):
        if net.training:                               # once more before a checkpoint, to confirm
            seen.append(index)
            at(len(seen))
        return net(X[index]).square().mean(), {}

    args = run.args
    run.fit(stage, model, loss, INDEX, steps or args.steps, args.batch_size, args.lr)
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


def checkpoint(run, stage="one"):
    return torch.load(run.out / f"checkpoint-{stage}.pt", weights_only=True)


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
        n = next(step, 0)
        used = 3 * F.one_hot(torch.tensor(n % 2), 5)
        return net(X[index]).sum(), {"number": torch.tensor(float(n)), "used": used}

    run.fit("one", nn.Linear(3, 1), loss, INDEX, 400, 4, 0.01)         # a line every 2 steps
    with open(run.out / "log.csv") as f:
        rows = list(csv.DictReader(f))
    assert [int(r["step"]) for r in rows] == list(range(2, 401, 2))
    assert [float(r["number"]) for r in rows] == [n + 0.5 for n in range(0, 400, 2)], (
        "a line of the log must average over all steps since the line before")
    assert {r["used"] for r in rows} == {"2"}, "two of the five were used since the line before"


def test_validation_runs_in_eval_mode_and_lands_in_the_log(make_run):
    run, model, modes = make_run(), network(), []

    def loss(net, index):
        modes.append(net.training)
        return net(X[index]).square().mean(), {"train": torch.tensor(float(net.training))}

    held_out = TensorDataset(torch.arange(10, 20))
    run.fit("one", model, loss, INDEX, 25, 4, 0.01, held_out)          # after 10, 20, 25
    assert modes.count(False) == 3 * 3 + 1, "ten examples by fours, three times; once to confirm"
    with open(run.out / "log.csv") as f:
        rows = list(csv.DictReader(f))
    assert [r["step"] for r in rows if r["valid_loss"]] == ["10", "20", "25"]
    assert {r["train"] for r in rows} == {"1.0"}, "training must continue in training mode"
    assert rows[-1]["valid_train"] == "0.0"
    assert not model.training, "a fitted model is handed back in eval mode"


def test_validation_loss_is_the_mean_over_its_examples(make_run):
    run, model = make_run("--keep", "last"), nn.Linear(3, 1)
    x = TensorDataset(X[:7])                           # batches of 4 and 3
    run.fit("one", model, lambda net, x: (net(x).square().mean(), {}), TensorDataset(X), 6, 4, 0.01,
            x)
    with torch.no_grad():
        assert run.rows["one"][-1]["valid_loss"] == pytest.approx(
            model(X[:7]).square().mean().item(), rel=1e-5), "the smaller last batch counts less"


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_weights_that_were_best_in_validation_are_kept(make_run, keep):
    run, model = make_run("--keep", keep, "--lr", "0.1"), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    # Training drives the weight up for ever; validation wants it at 2, and begins with a NaN.
    run.fit("one", model, lambda net, x: (-net.weight.sum() if net.training else torch.where(
        net.weight < 1, torch.nan, (net.weight - 2).square()).sum(), {}),
        TensorDataset(torch.zeros(8, 1)), 60, 4, 0.1, TensorDataset(torch.zeros(4, 1)))
    losses = [r["valid_loss"] for r in run.rows["one"] if "valid_loss" in r]
    assert not math.isfinite(losses.pop(0)), "the test needs a first NaN, which nothing is below"
    assert losses.index(min(losses)) < len(losses) - 1, "the test needs a best in the middle"
    kept = (model.weight - 2).square().item()
    assert kept == pytest.approx(min(losses) if keep == "best" else losses[-1], abs=1e-5)


def test_a_resumed_run_still_knows_what_was_best(make_run):
    def fit(run, model):
        return run.fit("one", model, lambda net, x: (
            -net.weight.sum() if net.training else (net.weight - 2).square().sum(), {}),
            TensorDataset(torch.zeros(8, 1)), run.args.steps, 4, 0.1,
            TensorDataset(torch.zeros(4, 1)))

    whole = fit(make_run("--steps", "60"), nn.Linear(1, 1, bias=False))
    resumed = fit(make_run("--resume"), nn.Linear(1, 1, bias=False))
    assert torch.equal(whole.weight, resumed.weight)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_decides_about_autocast(make_run, precision):
    run, dtypes = make_run("--precision", precision), set()

    def loss(net, index):
        y = net(X[index])
        dtypes.add(y.dtype)
        return y.sum(), {}

    run.fit("one", nn.Linear(3, 1), loss, INDEX, 2, 4, 0.01)
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
    assert checkpoint(run)["step"] == 3
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
    assert same(*[{k: c[k] for k in ("model", "optimizer", "step")} for c in (one, two)]), (
        "weights or optimiser differ from those of a run that was never stopped: batches and "
        "noise must be functions of (seed, stage, step), and Adam's state must be restored")
    drop = [[{k: v for k, v in row.items() if k != "seconds"} for row in c["rows"]]
            for c in (one, two)]
    assert drop[0] == drop[1]


def test_the_log_of_a_resumed_run_averages_over_the_steps_before_the_stop_too(make_run, tmp_path):
    def fit(run, stop_at=None):
        def loss(net, x):
            if net.training and len(run.rows["one"]) == 1 and stop_at:
                os.kill(os.getpid(), signal.SIGINT)    # in the first step after a line of the log
            return net(x).square().mean(), {}
        run.fit("one", nn.Linear(3, 1), loss, TensorDataset(X), 600, 4, 0.01)      # lines of 3
        return [row["loss"] for row in run.rows["one"]]

    with pytest.raises(SystemExit):
        fit(make_run(), stop_at=4)
    assert fit(make_run("--resume")) == pytest.approx(fit(make_run(out=tmp_path / "whole")))


def test_a_finished_stage_is_not_trained_again(make_run):
    train(make_run(), network())
    resumed, model = make_run("--resume"), network()
    assert train(resumed, model) == []
    assert same(dict(model.state_dict()), checkpoint(resumed)["model"])


def test_a_stage_is_written_only_when_it_changed(make_run):
    run = make_run()
    train(run, network(), stage="one")
    before = (run.out / "checkpoint-one.pt").stat().st_mtime_ns
    train(run, network(), stage="two")
    assert (run.out / "checkpoint-one.pt").stat().st_mtime_ns == before


def test_checkpoints_are_written_by_the_clock(make_run, monkeypatch):
    run, now, steps = make_run(), [0.0], []
    monkeypatch.setattr(time, "time", lambda: now[0])
    save = run.save
    monkeypatch.setattr(run, "save", lambda s, batch: (steps.append(s.step), save(s, batch)))
    train(run, network(), lambda step: now.__setitem__(0, now[0] + 25), steps=20000 // 2000)
    assert steps == [3, 6, 9, 10], "one a minute whatever the log does, and one at the end"


def test_resume_takes_the_flags_of_the_checkpoint_but_those_given_win(make_run):
    train(make_run("--lr", "0.5", "--seed", "3"), network())
    resumed = make_run("--resume", "--steps", "8")
    assert (resumed.args.lr, resumed.args.seed, resumed.args.steps) == (0.5, 3, 8)


def test_a_stage_fitted_to_one_that_is_trained_on_begins_anew(make_run):
    run = make_run()
    train(run, network(), stage="one", steps=4)
    train(run, network(), stage="two", steps=4)
    same_again = make_run("--resume")
    assert train(same_again, network(), stage="one", steps=4) == []
    assert train(same_again, network(), stage="two", steps=4) == [], "nothing changed: it is kept"
    longer = make_run("--resume")
    assert len(train(longer, network(), stage="one", steps=6)) == 2
    assert len(train(longer, network(), stage="two", steps=4)) == 4, (
        "stage two was fitted to what stage one was two steps ago: with --resume --steps 6 a prior "
        "would describe codes that are not there any more")


def test_seconds_count_what_was_before_the_resume(make_run):
    run = make_run()
    run.seconds_before = 1000
    train(run, network())
    resumed = make_run("--resume")
    train(resumed, network())
    assert 1000 <= resumed.seconds < 1100


def test_new_runs_keep_every_older_one(make_run):
    for seed in "123":
        run = make_run("--seed", seed)
        train(run, network())
    seeds = [torch.load(run.out / folder / "checkpoint.pt", weights_only=True)["args"]["seed"]
             for folder in ("old-1", "old-2", ".")]
    assert seeds == [1, 2, 3], "a forgotten --resume must not destroy a run, nor a second one"
    assert (run.out / "old-1" / "log.csv").exists() and (run.out / "old-1" / "config.json").exists()


def test_a_second_run_in_the_same_folder_is_refused(make_run, capsys):
    train(make_run(), network())
    assert "another run is writing" in stopped(
        capsys, train, make_run(alone=False), network())


KILLED_WHILE_SAVING = """
import io, os, signal, time
import torch
from test_run import PRESETS, network, train
from vqvae import Parser, Run
save, calls = torch.save, []

def save_half(state, file):
    calls.append(1)
    if len(calls) < 4:                                 # what is common, stage one, half of two
        return save(state, file)
    whole = io.BytesIO()
    save(state, whole)
    half = whole.getvalue()[:whole.tell() // 2]
    file.write(half), file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half
run = Run(Parser("test", PRESETS))
train(run, network(), stage="one")
now = [time.time()]
time.time = lambda: now[0]
train(run, network(), lambda step: now.__setitem__(0, now[0] + 21), stage="two")
"""


def python(*command, **kwargs):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path}, **kwargs)


def test_kill_9_while_saving_keeps_the_last_checkpoint(make_run, tmp_path):
    done = python("-c", KILLED_WHILE_SAVING, "--out", tmp_path / "out", "--device", "cpu")
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = make_run("--resume")
    assert train(resumed, network(), stage="one") == [], (
        "killed in the middle of a save, the checkpoint saved before must still be whole: write "
        "to another file, then os.replace")
    assert checkpoint(resumed, "two")["step"] == 3, "stage two was killed in its second save"
    assert len(train(resumed, network(), stage="two")) == 3


# -- what stops it ------------------------------------------------------------------------------


def test_nan_loss_stops_names_the_step_and_keeps_the_checkpoint(make_run, capsys):
    run = make_run()
    train(run, network(), stage="one")
    before, step = (run.out / "checkpoint-one.pt").read_bytes(), iter(range(1, 401))

    def loss(net, index):
        n = next(step)
        return net(X[index]).sum() * (float("nan") if n >= 3 else 1), {}

    line = stopped(capsys, run.fit, "two", network(), loss, INDEX, 400, 4, 0.01)
    assert "stage two" in line and "step 3" in line.split(":")[1] and "--lr" in line, (
        f"the message must name stage, first bad step and what to try: {line}")
    assert (run.out / "checkpoint-one.pt").read_bytes() == before
    assert not (run.out / "checkpoint-two.pt").exists(), (
        "a loss that is NaN must not reach a checkpoint")


def test_weights_that_the_last_step_spoilt_are_not_saved(make_run, capsys):
    run, model = make_run(), nn.Linear(3, 1)

    def loss(net, x):                                  # finite, but its gradient is not
        return (net(x).sum() * 0).sqrt() + 1, {}

    line = stopped(capsys, run.fit, "one", model, loss, TensorDataset(X), 1, 4, 0.01)
    assert "not finite at step 1" in line and not (run.out / "checkpoint-one.pt").exists()


def test_fewer_examples_than_a_batch(make_run, capsys):
    run = make_run("--batch-size", "32")
    line = stopped(capsys, train, run, network())
    assert "20 training examples" in line and "batch of 32" in line and "--batch-size" in line


@pytest.mark.parametrize("flags, named", [
    (["--steps", "0"], "--steps"), (["--steps", "many"], "--steps"),
    (["--batch-size", "2.5"], "--batch-size"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--lr", "inf"], "--lr"), (["--lr", "2147483648"], "--lr"),
    (["--lr-decay", "1.5"], "--lr-decay"), (["--seed", "x"], "--seed"),
    (["--preset", "huge"], "--preset"), (["--device", "abacus"], "--device"),
    (["--precision", "int4"], "--precision"), (["--nonsense"], "--nonsense"),
    (["--seed", "-1"], "--seed"), (["--seed", str(2 ** 70)], "--seed"), (["--data", ""], "--data"),
    (["--ste", "3"], "--ste"), (["--keep", "all"], "--keep")])
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


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint-one.pt"])
@pytest.mark.parametrize("content", ["half", "empty", "text", "other", "list", "tensor", "kinds"])
def test_corrupt_or_foreign_checkpoint_is_refused_and_left_alone(make_run, capsys, name, content):
    run, other = make_run(), io.BytesIO()
    train(run, network())
    file = run.out / name
    whole = torch.load(file, weights_only=True)
    torch.save({"other": {"weights": torch.zeros(3)}, "list": [1, 2], "tensor": torch.zeros(3),
                "kinds": {k: "x" for k in whole}}.get(content, 0), other)
    broken = {"half": file.read_bytes()[:1000], "empty": b"", "text": b"not a checkpoint\n"}
    file.write_bytes(broken.get(content, other.getvalue()))
    before = contents(run.out)
    line = stopped(capsys, lambda: train(make_run("--resume"), network()))
    assert "--resume" in line and str(file) in line
    assert contents(run.out) == before or name != "checkpoint.pt"
    assert file.read_bytes() == before[name]


@pytest.mark.parametrize("name, value", [("steps", -1.5), ("steps", [1]), ("prior_steps", "x"),
                                         ("batch_size", {}), ("lr", 1e9), ("lr_decay", "x")])
def test_a_saved_flag_is_checked_as_a_typed_one_is(make_run, capsys, name, value):
    run = make_run()
    train(run, network())
    state = torch.load(run.out / "checkpoint.pt", weights_only=True)
    torch.save({**state, "args": {**state["args"], name: value}}, run.out / "checkpoint.pt")
    before = contents(run.out)
    line = stopped(capsys, make_run, "--resume")
    assert name.replace("_", "-") in line and str(value) in line
    assert contents(run.out) == before


def test_a_checkpoint_that_would_run_code_is_refused(make_run, capsys, tmp_path):
    run = make_run()
    run.out.mkdir()
    torch.save({"script": "test", "args": Trap(str(tmp_path / "sprung")), "facts": {}},
               run.out / "checkpoint.pt")
    stopped(capsys, make_run, "--resume")
    assert not (tmp_path / "sprung").exists(), "torch.load needs weights_only=True"
    with pytest.raises(pickle.UnpicklingError):        # the trap itself works: torch sees it
        torch.load(run.out / "checkpoint.pt", weights_only=True)


def test_checkpoint_of_another_model_is_refused(make_run, capsys):
    run = make_run()
    train(run, network())
    before = (run.out / "checkpoint-one.pt").read_bytes()
    line = stopped(capsys, train, make_run("--resume"), nn.Linear(3, 1))
    assert "another model" in line and "checkpoint-one.pt" in line
    assert (run.out / "checkpoint-one.pt").read_bytes() == before


# -- launch: rehearsal, resume with other flags or data, errors in one line ------------------------


@pytest.fixture
def launched(monkeypatch, tmp_path, capsys):
    """launch() with a tiny experiment; main and the data can be replaced."""
    made = []

    def main(run, data):
        made.append(run)
        run.fit("one", network(), lambda net, x: (net(x).square().mean(), {}),
                TensorDataset(data.x), run.args.steps, run.args.batch_size, run.args.lr)
        run.finish({"score": 1.0})

    def go(*flags, main=main, x=X, use=None, load_data=None):
        for run in made:
            if getattr(run, "lock", None):
                os.close(run.lock)
                run.lock = None
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "out"), *flags])
        parser = Parser("test", PRESETS)
        parser.uses = ("play",)
        parser.add_argument("--play")
        parser.add_argument("--width", type=int, default=8)

        class Data:
            facts = {"size": list(x.shape), "sum": float(x.sum())}

            def __init__(self, x):
                self.x = x

            def few(self):
                return Data(self.x[:2])

        launch(parser, load_data or (lambda run: Data(x)), main, use)
        return made[-1]

    go.main, go.made = main, made
    go.out, go.err = tmp_path / "out", lambda: capsys.readouterr().err
    return go


def refused(launched, *flags, **kwargs):
    """launch() must end with one line and status 2, and change nothing: the line."""
    before = contents(launched.out)
    launched.err()
    with pytest.raises(SystemExit) as exit:
        launched(*flags, **kwargs)
    lines = launched.err().splitlines()
    assert exit.value.code == 2 and len(lines) == 1, lines
    assert contents(launched.out) == before, "a refused run must not change what is there"
    return lines[0]


def test_what_would_fail_late_fails_in_the_rehearsal(launched):
    def main(run, data):
        run.fit("one", network(), lambda net, x: (net(x).sum(), {}), TensorDataset(data.x), 6, 4,
                0.1)
        (run.out / "picture.png").write_text("half done")
        raise KeyError("$ in a class name")

    line = refused(launched, main=main)
    assert "KeyError" in line and "$ in a class name" in line and "rehearsal" in line
    assert "test_run.py, line" in line, "say where"
    assert not launched.out.exists()


def test_the_rehearsal_moves_no_random_number(launched):
    states = []

    def main(run, data):
        states.append(torch.rand(3))
        run.out.mkdir(parents=True, exist_ok=True)
        return launched.main(run, data)

    launched(main=main)
    assert torch.equal(*states), "the experiment must find what the rehearsal has found"


def test_the_rehearsal_leaves_nothing(launched, monkeypatch, tmp_path):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    launched()
    assert list((tmp_path / "tmp").iterdir()) == []
    with open(launched.out / "log.csv") as f:
        assert [r["step"] for r in csv.DictReader(f)] == list("123456")


def test_the_log_begins_without_the_rehearsal(launched):
    logs = []

    def main(run, data):
        for stage in ("first", "next"):
            run.fit(stage, network(), lambda net, x: (net(x).sum(), {}), TensorDataset(data.x), 2,
                    4, 0.01)
            logs.append("" if run.rehearsing else (run.out / "log.csv").read_text())

    with pytest.raises(IndexError):                    # main did not tell what it made
        launched(main=main)
    assert "next" not in logs[2] and "next" in logs[3], "stage two was not begun yet"


def test_a_fresh_run_does_not_look_at_the_checkpoint_that_it_moves_aside(launched):
    def main(run, data):
        run.fit("one", nn.Linear(3, 1), lambda net, x: (net(x).sum(), {}), TensorDataset(data.x), 2,
                4, 0.01)

    launched()
    launched(main=main)                                # another model under the same name: fine


@pytest.mark.parametrize("flags, named", [
    (["--width", "9"], "--width 9 differs from 8"), (["--beta", "0.5"], "--beta"),
    (["--num-codes", "4"], "--num-codes"), (["--seed", "7"], "--seed"),
    (["--codebook", "ema"], "--codebook")])
def test_resume_with_other_flags_is_refused_before_a_byte_is_written(launched, flags, named):
    launched()
    assert named in refused(launched, "--resume", *flags)


def test_resume_with_other_data_is_refused(launched):
    launched()
    assert "the data is not that of this run: size" in refused(launched, "--resume", x=X[:19])


def test_resume_of_another_scripts_run_is_refused(launched):
    launched()
    common = torch.load(launched.out / "checkpoint.pt", weights_only=True)
    torch.save({**common, "script": "audio"}, launched.out / "checkpoint.pt")
    assert "train_audio.py" in refused(launched, "--resume")


def test_resume_of_a_corrupt_stage_is_refused_before_a_byte_is_written(launched):
    launched()
    (launched.out / "checkpoint-one.pt").write_bytes(b"half a checkp")
    assert "checkpoint-one.pt is corrupt" in refused(launched, "--resume")


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device", "x.npy"), "x.npy: No space left on device"),
    (ValueError("photos: no images"), "photos: no images"), (MemoryError(), "MemoryError"),
    (TypeError("'<' not supported"), "TypeError"), (KeyError("steps"), "KeyError('steps')"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "can't allocate memory")])
def test_errors_while_reading_data_are_one_line(launched, error, said):
    def load_data(run):
        raise error

    assert said in refused(launched, load_data=load_data)


def test_a_fault_of_the_program_keeps_its_traceback(launched):
    def main(run, data):
        launched.main(run, data)
        if not run.rehearsing:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError):
        launched(main=main)


def test_a_full_disk_in_the_middle_is_one_line_and_leaves_the_last_checkpoint(
        launched, monkeypatch):
    launched()
    before, save = contents(launched.out), torch.save

    def full(state, file):
        if "rows" in state:
            raise RuntimeError("[enforce fail] unexpected pos")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as exit:
        launched("--resume", "--steps", "8")
    assert exit.value.code == 2 and "cannot be written" in launched.err()
    after = contents(launched.out)
    assert after["checkpoint-one.pt"] == before["checkpoint-one.pt"]
    assert not [name for name in after if name.endswith(".tmp")]


def test_flags_for_use_train_nothing(launched):
    played = []
    with pytest.raises(IndexError):                    # nothing was made
        launched("--play", "left", use=lambda args: played.append(args.play))
    assert played == ["left"] and not launched.out.exists()


def test_metrics_are_valid_json_whatever_was_measured(make_run):
    run = make_run()
    train(run, network())
    run.finish({"a": math.nan, "b": [1.0, math.inf], "c": 3, "d": "x"})
    text = (run.out / "metrics.json").read_text()
    found = json.loads(text, parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
    assert found["a"] is None and found["b"] == [1.0, None] and found["c"] == 3
    assert found["seconds"] >= 0


def test_finetune_starts_from_the_weights_of_another_run(make_run, tmp_path):
    train(make_run(), network())
    weights = checkpoint(make_run())["model"]
    model = network()
    nn.init.zeros_(model[0].weight)
    at_start = []
    run = make_run("--finetune", str(tmp_path / "out"), out=tmp_path / "second")
    train(run, model, lambda step: at_start.append(
        {k: v.clone() for k, v in model.state_dict().items()}))
    assert same(at_start[0], dict(weights)) and run.rows["one"][0]["step"] == 1


@pytest.mark.parametrize("spoil, said", [
    (lambda out: (out / "checkpoint.pt").unlink(), "there is no"),
    (lambda out: (out / "checkpoint-one.pt").write_bytes(b"x"), "corrupt"),
    (lambda out: (out / "checkpoint-one.pt").unlink() or (out / "checkpoint-one.pt").mkdir(),
     "Is a directory"),
    (lambda out: torch.save({**torch.load(out / "checkpoint-one.pt"), "steps": 9},
                            out / "checkpoint-one.pt"), "step 6 of 9"),
    (lambda out: torch.save({**torch.load(out / "checkpoint.pt"), "script": "video"},
                            out / "checkpoint.pt"), "train_video.py")])
def test_only_a_finished_run_of_the_script_is_read(make_run, spoil, said):
    run = make_run()
    train(run, network())
    args, facts, (weights,) = read_run(run.out, "test", ["one"])
    assert args.batch_size == 4 and same(dict(weights), checkpoint(run)["model"])
    best = {"loss": 0.0, "step": 3, "model": {"a": torch.ones(2)}}
    torch.save({**checkpoint(run), "best": best}, run.out / "checkpoint-one.pt")
    assert same(read_run(run.out, "test", ["one"])[2], [best["model"]]), "the default is best"
    spoil(run.out)
    with pytest.raises(ValueError, match=said) as error:
        read_run(run.out, "test", ["one"])
    assert "\n" not in str(error.value)


# -- data ---------------------------------------------------------------------------------------


class Reader:
    """Decodes number i to n_i x 2 bytes, and logs that it did."""

    def __init__(self, log, broken=()):
        self.log, self.broken = log, broken

    def __call__(self, i):
        with open(self.log, "a") as f:                 # in a worker process
            print(i, file=f)
        if i in self.broken:
            raise ValueError(f"item {i} is not readable")
        return np.full((i + 1, 2), i, np.uint8)


def decoded(log):
    return sorted(map(int, log.read_text().split())) if log.exists() else []


def test_prepared_data_is_decoded_once_and_found_again(make_run, tmp_path):
    run, log = make_run(), tmp_path / "log"
    x, lengths = prepare(run, "photos", "three files", Reader(log), range(5), (2,))
    assert x.dtype == torch.uint8 and lengths == [1, 2, 3, 4, 5]
    assert x.tolist() == [[i, i] for i in range(5) for _ in range(i + 1)]
    again, _ = prepare(run, "photos", "three files", Reader(log), range(5), (2,))
    assert torch.equal(x, again) and decoded(log) == [0, 1, 2, 3, 4], "decoded a second time"
    prepare(run, "photos", "one file has changed", Reader(log), range(5), (2,))
    assert len(decoded(log)) == 10, "other files, sizes or flags: decode anew"
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 1, "the old file must not pile up"


def convolved(i):
    """An item that torch computes with as many threads as it likes."""
    x = torch.nn.functional.conv1d(torch.ones(1, 8, 100_000), torch.ones(8, 8, 9))
    return np.full((1, 1), torch.get_num_threads() + 0 * int(x.sum()), np.uint8)


def test_items_may_use_torch_however_many_threads_it_has(make_run):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(10 ** 6).exp().sum()                # the threads exist from now on
        x, _ = prepare(make_run(), "waves", "key", convolved, [0, 1], (1,))
    finally:
        torch.set_num_threads(before)
    assert x.flatten().tolist() == [1, 1], (
        "a forked process has none of its parent's threads, and would wait for them without end")


def test_preparation_that_was_killed_starts_anew(make_run, tmp_path):
    run, log = make_run(), tmp_path / "log"
    prepare(run, "photos", "key", Reader(log), range(5), (2,))
    (file,) = (tmp_path / "cache").iterdir()
    torn = file.rename(file.with_suffix(".123.tmp"))   # killed before it was whole
    os.utime(torn, (0, time.time() - 4000))            # more than an hour ago
    x, lengths = prepare(run, "photos", "key", Reader(log), range(5), (2,))
    assert x[:, 0].tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4]
    assert len(decoded(log)) == 10
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".bin"], "the torn one is gone"


def test_an_unreadable_item_is_named_and_nothing_is_kept(make_run, tmp_path):
    with pytest.raises(ValueError, match="^item 3 is not readable$"):
        prepare(make_run(), "photos", "key", Reader(tmp_path / "log", {3}), range(5), (2,))
    assert not list((tmp_path / "cache").glob("*.bin"))


def test_files_are_found_through_links_but_not_in_circles(tmp_path):
    for name in ("a/1.png", "b/deep/2.PNG", ".hidden/3.png", "a/.4.png", "a/5.txt", "0.png"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(b"12")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "root" / "b")         # a class of its own
    (tmp_path / "root" / "a" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "b" / "self").symlink_to(tmp_path / "root" / "b")
    found = find_files(tmp_path / "root", (".png", ".bmp"))
    assert [name for name, *_ in found] == ["0.png", "a/1.png", "b/deep/2.PNG", "linked/deep/2.PNG"]
    assert found[0][1] == 2 and found[0][2] == (tmp_path / "root" / "0.png").stat().st_mtime_ns


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(PermissionError, match="locked"):
        find_files(tmp_path, (".png",))


def test_reading_turns_anything_into_one_line():
    with pytest.raises(ValueError, match="^photo.png: not readable .*odd"):
        with reading("photo.png"):
            raise ArithmeticError("odd\nbytes")


@pytest.mark.parametrize("K, dtype", [(2, torch.uint8), (256, torch.uint8), (257, torch.int16),
                                      (2 ** 15, torch.int16), (2 ** 15 + 1, torch.int32)])
def test_codes_are_kept_in_the_smallest_type_that_holds_them(K, dtype):
    assert smallest_int(K) == dtype
    assert torch.tensor([K - 1]).to(dtype).item() == K - 1


def test_in_batches_covers_everything_the_small_last_one_too():
    sizes = []
    total = in_batches(lambda x, i: sizes.append(len(x)) or x + i, "cpu", 8, X,
                       INDEX.tensors[0][:, None])
    assert sizes == [8, 8, 4] and torch.equal(total, X + torch.arange(20)[:, None])


def test_different_names_are_different_files():
    names = ["\u4f0a", "\u85e4", "a" * 50 + "b", "a" * 50 + "c", "x y"]
    files = [safe_name(name) for name in names]
    assert len(set(files)) == len(names) and all(f.isascii() and " " not in f for f in files)


NOBODY_LISTENS = """
import os, sys
from test_run import *
pipe = os.pipe()
os.close(pipe[0])
full = os.open("/dev/full", os.O_WRONLY)
for name, where in (("pipe", pipe[1]), ("full", full), ("closed", None)):
    if not (child := os.fork()):
        os.dup2(where, 1) if where else os.close(1)
        sys.stdout = sys.stdout if where else None
        sys.argv = ["train.py", "--device", "cpu", "--out", f"{OUT}/{name}"]
        run = Run(Parser("test", PRESETS))
        train(run, network(), steps=20)
        run.finish({})
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def test_training_continues_when_nobody_listens_any_more(tmp_path):
    done = python("-c", f"OUT = {str(tmp_path)!r}\n" + NOBODY_LISTENS)
    assert done.returncode == 0, done.stderr
    for name in ("pipe", "full", "closed"):            # | head -1, a full disk, >&-
        assert (tmp_path / name / "metrics.json").exists()


# -- several processes --------------------------------------------------------------------------


def test_batch_that_does_not_divide_among_the_processes(make_run, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    line = stopped(capsys, make_run)
    assert "--batch-size 4" in line and "3 processes" in line


@pytest.mark.parametrize("rank, world", [("0", "0"), ("0", "-1"), ("2", "2"), ("-1", "2"),
                                         ("a", "1")])
def test_processes_that_cannot_be(make_run, monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match="WORLD_SIZE"):
        make_run()


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
        run.fit(kind.__name__, model, lambda net, x: (net(x), {}), TensorDataset(x), 3, 4, 0.01)
        result[kind.__name__] = {
            "first": {k: v for k, v in vq.state_dict().items() if torch.is_tensor(v)},
            "gradients": {k: p.grad for k, p in model.named_parameters()},
            "fitted": {k: v for k, v in model.state_dict().items() if torch.is_tensor(v)}}
    def interrupted(net, x):                           # Ctrl-C reaches the last process only
        if run.rank == run.world - 1 and net.training:
            signal.raise_signal(signal.SIGINT)
        return net(x).sum(), {"rank": torch.tensor(float(run.rank))}

    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)             # a second one stops at once
    with pytest.raises(SystemExit):
        run.fit("stopped", nn.Linear(3, 1), interrupted, TensorDataset(X), 40, 4, 0.01)
    signal.signal(signal.SIGINT, handler)
    if run.rank == 0:
        result["stopped"] = {k: checkpoint(run, "stopped")[k] for k in ("step", "rows")}
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


def test_processes_agree_on_the_step_at_which_ctrl_c_stops_them(processes):
    assert [r["stopped"]["step"] for r in processes] == [1, 10], (
        "one process alone stops at once; several tell each other first, every ten steps, or the "
        "others would wait for one that has left, and no checkpoint would be written")


def test_the_log_is_over_all_processes(processes):
    assert processes[1]["stopped"]["rows"][0]["rank"] == 0.5, "the mean of ranks 0 and 1"


def worst(one, two):
    assert one.keys() == two.keys()
    return max((one[k].double() - two[k].double()).abs().max().item() for k in one)


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


def test_indices_spread_over_a_long_stream_stay_inside_it():
    for n in (1, 7, 999, 1000, 28_800_000, 2 ** 26 + 1):      # float32 would round 28,799,999 up
        index = spread(n, 1000)
        assert index[0] == 0 and index[-1] == n - 1 and len(index) == min(n, 1000), (
            f"of {n} examples indices {index[0]} .. {index[-1]} were picked")
        assert (index.diff() > 0).all(), "an example was picked twice"


def test_one_run_that_prepares_a_folder_leaves_the_half_written_file_of_another(make_run, tmp_path):
    run, log = make_run(), tmp_path / "log"
    prepare(run, "photos", "key", Reader(log), range(5), (2,))
    (file,) = (tmp_path / "cache").iterdir()
    other = file.with_name(file.name.replace(".bin", ".123.tmp"))
    other.write_bytes(b"half")                         # another run is at it just now
    prepare(run, "photos", "one file has changed", Reader(log), range(5), (2,))
    assert other.exists(), "what another run was still writing is gone: its work is lost"
    assert not file.exists(), "what was decoded before a file changed should be gone"


def test_a_run_of_two_processes_is_resumed_by_two(tmp_path):
    tiny = ("--demo-images 40 --size 16 --steps 2 --prior-steps 2 --batch-size 4 --hidden 8 "
            "--res-hidden 4 --prior-channels 8 --num-codes 16 --code-dim 8 --device cpu").split()
    for flags in tiny, ["--resume"]:
        try:
            done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                          ROOT / "train_image.py", *flags, "--out", tmp_path / "out", timeout=90)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{flags[0]}: one process waits for what the other does not do: in the "
                        "rehearsal, too, both must find the checkpoint or neither")
        assert done.returncode == 0, done.stderr
