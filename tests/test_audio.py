"""train_audio.py: waveforms in and out, the demo's speech, and the script as a user runs it."""

import json
import math
import os
import subprocess
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_audio as audio  # noqa: E402

ROOT = Path(__file__).parent.parent
TINY = ("--steps 3 --prior-steps 3 --batch-size 4 --clip 2048 --crop 512 "
        "--test-clips 2 --channels 4 --skip-channels 4 --layers 3 --cycle 3 --hidden 4 "
        "--prior-channels 4 "
        "--demo-utterances 40 --num-codes 8 --code-dim 4 --strides 2,2,2,2,2,2 "
        "--device cpu").split()


def run(*flags, out):
    """The script as a user runs it, small: (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, ROOT / "train_audio.py", *TINY, "--out", out, *flags],
                          capture_output=True, text=True, cwd=out.parent, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The script with flags, in this process: its output and, where it left one, metrics.json."""
    def call(*flags, out=tmp_path / "out", tiny=TINY):
        monkeypatch.setattr(sys, "argv", ["train_audio.py", *tiny, "--out", str(out),
                                          *map(str, flags)])
        audio.launch(audio.make_parser(), audio.load_data, audio.main, audio.use)
        found = out / "metrics.json"
        return capsys.readouterr().out, json.loads(found.read_text()) if found.exists() else None
    return call


@pytest.fixture
def refused(call, capsys):
    """The script with flags: one line on stderr, exit status 2. Returns the line."""
    def refused(*flags, **kwargs):
        with pytest.raises(SystemExit) as stopped:
            call(*flags, **kwargs)
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error
    return refused


def save(path, x, rate=8000, width=2, channels=1):
    """x in [-1, 1] as PCM of `width` bytes, the same in all channels, by hand."""
    path.parent.mkdir(parents=True, exist_ok=True)
    top = 2 ** (8 * width - 1) - 1
    samples = np.repeat(np.round(np.clip(x, -1, 1) * top).astype(np.int64), channels)
    if width == 1:
        samples = samples + 128
    data = samples.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)


def speakers(folder, files=2, seconds=1.0, rate=8000, names=("ann", "bob"), **kwargs):
    """A folder as --data wants it: noise of another colour for each speaker."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(names):
        for i in range(files):
            x = np.convolve(rng.standard_normal(int(seconds * rate)), np.ones(2 + 6 * k), "same")
            save(folder / name / f"{i}.wav", 0.1 * x, rate, **kwargs)
    return folder


# -- waveforms ------------------------------------------------------------------------------------


def test_mu_law_keeps_every_level_and_the_formula_of_the_standard():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(audio.mu_law(audio.inverse_mu_law(levels)), levels)
    x = torch.tensor([-2.0, -1.0, -0.5, 0.01, 0.5, 1.0, 2.0], dtype=torch.float64)
    by_hand = [math.copysign(math.log(1 + 255 * min(abs(v), 1), 256), v) for v in x.tolist()]
    assert audio.mu_law(x).tolist() == [round((v + 1) / 2 * 255) for v in by_hand]
    undone = [math.copysign(((1 + 255) ** abs(v) - 1) / 255, v)
              for v in (level / 255 * 2 - 1 for level in range(256))]
    assert torch.allclose(audio.inverse_mu_law(levels), torch.tensor(undone), atol=1e-6)


def test_mu_law_error_is_small_near_zero():
    x = torch.linspace(-1, 1, 10_001)
    error = (audio.inverse_mu_law(audio.mu_law(x)) - x).abs()
    assert error.max() < 0.025 and error[x.abs() < 0.01].max() < 3e-4


@pytest.mark.parametrize("old, new", [(48_000, 16_000), (44_100, 16_000), (16_000, 8000),
                                      (8000, 16_000), (22_050, 8000), (8000, 11_025)])
def test_resampled_sine_is_the_sine_itself(old, new):
    tone = 1234.5
    y = audio.resample(np.sin(2 * np.pi * tone * np.arange(old) / old).astype(np.float32), old, new)
    assert len(y) == new
    middle = slice(new // 10, -new // 10)
    assert np.abs(y - np.sin(2 * np.pi * tone * np.arange(new) / new))[middle].max() < 2e-3


def test_resampling_removes_what_would_alias():
    x = np.sin(2 * np.pi * 5000 * np.arange(16_000) / 16_000).astype(np.float32)  # above 4 kHz
    assert np.abs(audio.resample(x, 16_000, 8000)[400:-400]).max() < 2e-3
    assert audio.resample(x[:0], 16_000, 8000).size == 0


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_reads_pcm_of_any_width(tmp_path, width, channels):
    x = np.sin(np.arange(500) / 7) * 0.8
    save(tmp_path / "x.wav", x, 11_025, width, channels)
    y, rate = audio.read_wav(tmp_path / "x.wav")
    assert rate == 11_025 and y.dtype == np.float32
    assert np.abs(y - x).max() < 2 / 2 ** (8 * width - 1) + 1e-6


def test_stereo_is_mixed_and_extensible_24_bit_is_pcm(tmp_path):
    save(tmp_path / "x.wav", np.array([0.5, -0.25, 0.1, 0.3]), width=3, channels=1)
    data = (tmp_path / "x.wav").read_bytes()
    # What most programs write for 24 bits: tag 0xFFFE, and PCM as the sub-format.
    fmt = b"fmt " + (40).to_bytes(4, "little") + b"\xfe\xff" + data[22:36]
    fmt += (22).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(4) + b"\1\0"
    rest = b"WAVE" + fmt + bytes.fromhex("000000001000800000aa00389b71") + data[36:]
    (tmp_path / "x.wav").write_bytes(b"RIFF" + len(rest).to_bytes(4, "little") + rest)
    assert np.allclose(audio.read_wav(tmp_path / "x.wav")[0], [0.5, -0.25, 0.1, 0.3], atol=1e-6)
    with wave.open(str(tmp_path / "y.wav"), "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.array([16384, 0, -16384, 16384], "<i2").tobytes())
    assert np.allclose(audio.read_wav(tmp_path / "y.wav")[0], [0.25, 0.0], atol=1e-6)


def test_written_wav_is_read_back(tmp_path):
    x = torch.linspace(-1, 1, 999)
    audio.write_wav(tmp_path / "x.wav", x, 16_000)
    y, rate = audio.read_wav(tmp_path / "x.wav")
    assert rate == 16_000 and np.abs(y - x.numpy()).max() < 1e-4


# -- the demo's speech ----------------------------------------------------------------------------


def test_demo_speech_is_deterministic_and_says_what_it_claims():
    waves, speakers, phones = audio.demo_speech(8, seed=3, seconds=1.0)
    again = audio.demo_speech(8, seed=3, seconds=1.0)
    assert np.array_equal(waves, again[0]) and np.array_equal(phones, again[2])
    assert not np.array_equal(waves, audio.demo_speech(8, seed=4, seconds=1.0)[0])
    assert waves.shape == phones.shape == (8, 8000) and np.abs(waves).max() <= 1
    names = list(audio.PHONES)
    vowel, pause = phones == names.index("a"), phones == names.index("pause")
    assert np.square(waves[vowel]).mean() > 100 * np.square(waves[pause][200:]).mean() > 0


def test_demo_voices_have_the_pitch_and_the_formants_they_should():
    rng, rate = np.random.default_rng(0), 8000
    speakers = np.arange(4)
    phones = np.full((4, 8000), list(audio.PHONES).index("a"), np.uint8)
    waves = audio.synthesise(phones, speakers, rng, rate)
    wanted = np.array([v[0] for v in audio.VOICES.values()])
    assert np.abs(np.log2(audio.pitch(torch.tensor(waves), rate).numpy() / wanted)).max() < 0.05
    # The mean frequency below 2 kHz rises with shorter vocal tracts.
    power = np.abs(np.fft.rfft(waves))[:, 400:2000] ** 2
    centre = (power * np.arange(400, 2000)).sum(1) / power.sum(1)
    assert (np.diff(centre) > 20).all(), centre


def test_pitch_of_a_pulse_train_and_of_noise():
    rate, t = 16_000, np.arange(16_000)
    pulses = torch.tensor((t[None] % np.array([[100], [160]]) < 4).astype(np.float32))
    assert torch.allclose(audio.pitch(pulses, rate), torch.tensor([160.0, 100.0]), rtol=0.01)
    assert audio.pitch(torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0)),
                       rate).isnan().all()


# -- streams, windows, phones ---------------------------------------------------------------------


def test_windows_stay_within_one_speaker():
    windows = audio.Windows(torch.arange(100), [(10, 10), (40, 3), (50, 7)], 4, 2)
    index = torch.arange(len(windows))
    starts, owners = windows.start(index)
    assert starts.tolist() == [10, 12, 14, 16, 50, 52] and owners.tolist() == [0, 0, 0, 0, 2, 2]
    cut, whose = windows[index[[5, 0]]]
    assert cut.tolist() == [[52, 53, 54, 55], [10, 11, 12, 13]] and whose.tolist() == [2, 0]


def test_phone_map_takes_the_likeliest_phone_and_skips_what_has_no_label():
    codes = torch.tensor([0, 0, 0, 1, 1, 1])
    phones = torch.tensor([1, 1, 0, 0, audio.UNLABELLED, audio.UNLABELLED], dtype=torch.uint8)
    table = audio.phone_table(codes, phones, 3, 2)
    assert table.tolist() == [[1, 2], [1, 0], [0, 0]]
    assert audio.phone_accuracy(table, codes, phones) == pytest.approx(3 / 4)


def speech(levels, **changes):
    """A Speech of one speaker with a hop of 2, its first half for training."""
    half = len(levels) // 2
    found = audio.Speech(levels, train=[(0, half)], valid=[(0, half)], test=[(half, half)],
                         speakers=["ann"], phones=[], ends=torch.tensor([len(levels)]),
                         spoken=torch.tensor([audio.UNLABELLED], dtype=torch.uint8), rate=8000,
                         hop=2, longest=2)
    return found._replace(**changes)


def tiny_run(tmp_path, **args):
    """What functions of the script need of a Run."""
    def write(name, writer):
        with open(tmp_path / name, "wb") as f:
            writer(f)
    return SimpleNamespace(args=SimpleNamespace(**{"num_codes": 3, "temperature": 1.0, **args}),
                           out=tmp_path, device=torch.device("cpu"), rehearsing=False, write=write,
                           say=print)


def test_phones_are_read_on_test_speech_by_the_table_of_training_speech(tmp_path):
    codes = torch.tensor([0, 1, 1, 1, 2, 2] + [0, 1, 2, 2, 2, 2])
    phones = torch.tensor([0, 1, 1, 2, 2, 2] + [1, 2, 2, 0, 255, 255], dtype=torch.uint8)
    # Two samples per code: the phone in the middle of a code is that of its second.
    data = speech(torch.zeros(24, dtype=torch.uint8), phones=["a", "b", "c"],
                  ends=torch.arange(24) + 1,
                  spoken=torch.stack([torch.zeros_like(phones), phones], 1).flatten())
    nothing = torch.zeros(1, 1, 2, dtype=torch.uint8)
    clips = audio.Clips(nothing[0], torch.zeros(1), torch.zeros(1))
    found = audio.read_phones(tiny_run(tmp_path), None, data, codes, clips, nothing)
    assert found["phone_baseline"] == 2 / 4, "the most frequent phone of training speech is c"
    assert found["phone_accuracy"] == 1 / 4, "predicted: a, b, c, c"
    assert (tmp_path / "phones.png").stat().st_size > 0


def test_conversions_are_judged_by_the_target_speaker(tmp_path):
    waves, who, _ = audio.demo_speech(16, seed=1, seconds=1.0)
    levels, who = torch.stack([audio.to_levels(x) for x in torch.from_numpy(waves)]), torch.tensor(who)
    wanted = torch.tensor([v[0] for v in audio.VOICES.values()])
    order = who.argsort(stable=True)                   # four seconds of each speaker
    data = speech(levels[order].flatten(), train=[(k * 32_000, 32_000) for k in range(4)],
                  speakers=list(audio.VOICES))
    clips = audio.Clips(levels[:4], who[:4], None)
    voices = (who[:4, None] + torch.arange(4)) % 4

    def by_pitch(x):                                   # in place of the classifier
        found = audio.pitch(audio.to_wave(x), 8000)
        return -(found[:, None] / wanted).log2().abs()

    def judge(drawn):
        return audio.judge_conversions(tiny_run(tmp_path, clip=8000), by_pitch, data, clips, voices,
                                       drawn)

    perfect = judge(levels[4:8][voices])               # each one in the target's voice
    assert perfect["real_speaker_accuracy"] == perfect["converted_speaker_accuracy"] == 1
    assert perfect["converted_pitch_error"] < 1
    none = judge(levels[:4, None].expand(4, 4, -1))    # nothing was converted
    assert none["converted_speaker_accuracy"] == 0
    semitones = 12 * (wanted[:, None] / wanted).log2().abs().sum() / 12        # over 12 pairs
    assert none["converted_pitch_error"] == pytest.approx(semitones.item(), abs=1)
    assert none["pitch_soprano"] > 200 > none["pitch_as_soprano"]


def loaded(*flags, tmp_path, monkeypatch):
    """load_data of the script with these flags."""
    monkeypatch.setattr(sys, "argv", ["train_audio.py", *TINY, "--out", str(tmp_path / "out"),
                                      *map(str, flags)])
    return audio.load_data(audio.launch.__globals__["Run"](audio.make_parser()))


def test_each_speaker_has_its_own_stretches_and_they_do_not_overlap(tmp_path, monkeypatch):
    data = loaded("--data", speakers(tmp_path / "data", files=12), "--sample-rate", "8000",
                  tmp_path=tmp_path, monkeypatch=monkeypatch)
    assert data.speakers == ["ann", "bob"] and data.phones == [] and data.hop == 64
    assert len(data.levels) == 2 * 96_000
    for k in range(2):
        (a, n), (b, m), (c, l) = data.train[k], data.valid[k], data.test[k]
        assert a == 96_000 * k and a + n == b and b + m == c, "training, validation, test in order"
        assert 96_000 * (k + 1) - 64 < c + l <= 96_000 * (k + 1), "and nothing is left out"
        assert l == pytest.approx(9600, abs=128) and m == pytest.approx(4800, abs=128)
        assert all(x % 64 == 0 for x in (a, n, b, m, c, l)), "codes and stretches begin together"


def test_decoded_files_are_found_again_and_a_changed_one_is_noticed(tmp_path, monkeypatch):
    folder = speakers(tmp_path / "data")
    again = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    first = loaded("--data", folder, "--sample-rate", "8000", **again)
    with monkeypatch.context() as patch:               # nothing is decoded a second time
        patch.setattr(audio, "read_sound", None)
        second = loaded("--data", folder, "--sample-rate", "8000", **again)
    assert torch.equal(first.levels, second.levels) and first.facts == second.facts
    save(folder / "ann/0.wav", np.zeros(9000))
    third = loaded("--data", folder, "--sample-rate", "8000", **again)
    assert len(third.levels) == len(first.levels) + 1000


def test_prior_sees_the_whole_chunk():
    for length in (2, 64, 125, 320, 640):
        layers, cycle = audio.prior_size(length)
        assert audio.WaveNet(4, 2, layers, cycle).receptive_field >= length - 1


def test_labels_in_both_forms(tmp_path):
    for text in ("0.25 a\n1.0 b\n", "0 0.25 a\n0.25 1.0 b\n", "\ufeff0.25 a\r\n1.0 b"):
        (tmp_path / "x.lab").write_text(text, encoding="utf-8")
        assert audio.read_labels(tmp_path / "x.lab", 1.0) == [(0, 0.25, "a"), (0.25, 1.0, "b")], (
            "a byte-order mark is not part of the first number")
    (tmp_path / "x.lab").write_text("0.1 0.25 a\n0.5 1.0 b\n")
    assert audio.read_labels(tmp_path / "x.lab", 1.0) == [(0.1, 0.25, "a"), (0.5, 1.0, "b")]


def test_phone_of_every_sample_comes_from_intervals(tmp_path):
    for name, text in (("0", "0.1 0.25 a\n0.5 1.0 b\n"), ("2", "1.03 a\n")):
        (tmp_path / f"lab/ann/{name}.lab").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"lab/ann/{name}.lab").write_text(text)
    run, said = tiny_run(tmp_path, sample_rate=100, labels=tmp_path / "lab"), []
    run.say = said.append
    files = [tmp_path / f"wav/ann/{i}.wav" for i in range(3)]
    names, ends, spoken = audio.label_stream(run, tmp_path / "wav", files, [100, 50, 100])
    data = speech(torch.zeros(250, dtype=torch.uint8), phones=names, ends=ends, spoken=spoken)
    unknown = [audio.UNLABELLED]
    assert names == ["a", "b"]
    assert data.phone_at(torch.arange(250)).tolist() == (
        10 * unknown + [0] * 15 + 25 * unknown + [1] * 50 + 50 * unknown + [0] * 100)
    assert said == ["1 of 3 recordings have no .lab file and stay unlabelled"]


# -- the model ------------------------------------------------------------------------------------


def tiny_model(codebook="loss"):
    args = audio.make_parser().parse_args([*TINY, "--codebook", codebook, "--channels", "16",
                                           "--skip-channels", "16"])
    torch.manual_seed(0)
    return audio.SpeechVQVAE(args, 3)


def test_model_learns_through_codes_and_speaker():
    """Every parameter gets a gradient; another speaker and other codes change p(x|z, s)."""
    model = tiny_model().train()
    x = torch.randint(256, (4, 512), dtype=torch.uint8)
    loss, nll, codes = model(x, torch.tensor([0, 1, 2, 0]))
    assert codes.shape == (4, 8) and nll.shape == (4, 512)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    codes, who = model.encode(x), torch.zeros(4, dtype=torch.long)
    bits = model.bits(x, codes, who)
    assert not torch.equal(bits, model.bits(x, codes, who + 1))
    assert not torch.equal(bits, model.bits(x, (codes + 1) % 8, who))


def test_loss_is_eq_3_for_each_latent():
    model = tiny_model()
    x, who = torch.randint(256, (2, 512), dtype=torch.uint8), torch.tensor([1, 2])
    model(x, who)                                      # starts the codebook
    loss, nll, codes = model(x, who)
    z_e = model.encoder(x[:, None] / 255 - 0.5)
    z_q = model.quantizer.lookup(codes)
    logits = model.decoder(x.long(), model.context(z_q), who)
    nats = -logits.log_softmax(1).gather(1, x.long()[:, None])[:, 0]
    assert torch.allclose(nll, nats, rtol=1e-4)
    squares = (z_e - z_q).square().sum(1).mean()       # of the norm, over all 2 * 8 latents
    assert loss.item() == pytest.approx((nats.sum() / 16 + 1.25 * squares).item(), rel=1e-4)


def test_past_dropout_spoils_what_the_decoder_hears_and_not_what_it_must_say():
    model = tiny_model()
    x, z_q, who = torch.randint(256, (2, 512)), torch.randn(2, 4, 8), torch.tensor([1, 2])
    y = x.clone()
    y[:, 100] = (y[:, 100] + 99) % 256                 # another sample at one place

    def differs(share, train):
        """At what times -log p of the two waveforms differs, the same noise for both."""
        model.train(train).past_dropout, found = share, []
        for wave in (x, y):
            torch.manual_seed(0)
            found.append(model.nll(wave, z_q, who).detach())
        return (found[0] != found[1]).any(0).nonzero().flatten().tolist()

    later = differs(0.0, train=True)
    assert later[0] == 100 and len(later) > 3          # its own cost, and that of those after it
    assert differs(1.0, train=True) == [100], "all of the past replaced: only the target is left"
    assert differs(1.0, train=False) == later, "the dropout is for training only"


# -- the script -----------------------------------------------------------------------------------


def test_demo_runs_all_experiments_and_resumes(tmp_path):
    status, text, error = run(out=tmp_path / "a")
    assert status == 0, error
    metrics = json.loads((tmp_path / "a/metrics.json").read_text())
    for name in ("bits_per_sample bits_per_sample_other_codes bits_per_sample_wrong_speaker "
                 "converted_speaker_accuracy converted_phone_accuracy phone_accuracy "
                 "phone_baseline codes_used num_codes prior_bits_per_code unigram_bits_per_code "
                 "seconds real_speaker_accuracy").split():
        assert math.isfinite(metrics[name]), name
    assert metrics["num_codes"] == 8 and metrics["bits_per_sample"] > 0
    for name in ("reconstructions.png", "samples.png", "phones.png", "curves.png", "log.csv",
                 "config.json", "checkpoint.pt"):
        assert (tmp_path / "a" / name).stat().st_size > 0
    sounds = sorted((tmp_path / "a").glob("*.wav"))
    assert len(sounds) >= 2 * 3 + 4
    assert all(len(audio.read_wav(f)[0]) == 2048 and audio.read_wav(f)[1] == 8000 for f in sounds)
    status, text, error = run("--resume", out=tmp_path / "a")
    assert status == 0 and "vqvae 3/3" not in text
    again = json.loads((tmp_path / "a/metrics.json").read_text())
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}


def test_16_khz_folder_with_labels_runs_as_it_is(tmp_path):
    waves, who, phones = audio.demo_speech(24, seconds=0.5, rate=16_000)
    names = list(audio.PHONES)
    for i, (x, k, p) in enumerate(zip(waves, who, phones)):
        save(tmp_path / f"wav/p{k}/nested/{i}.wav", x, 16_000)
        ends = np.append(np.flatnonzero(np.diff(p.astype(int))) + 1, len(p))
        lab = tmp_path / f"lab/p{k}/nested/{i}.lab"
        lab.parent.mkdir(parents=True, exist_ok=True)
        lab.write_text("".join(f"{e / 16_000:.5f} {names[p[e - 1]]}\n" for e in ends))
    status, text, error = run("--data", tmp_path / "wav", "--labels", tmp_path / "lab",
                              "--sample-rate", "16000", "--strides", "2,2,2,2,2,2,2",
                              "--experiments", "reconstruction", "phonemes", out=tmp_path / "out")
    assert status == 0, error
    assert "24 WAV files of 4 speakers\n" in text      # nothing resampled
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    counts = np.bincount(phones.ravel())
    assert 0 < metrics["phone_baseline"] < 2 * counts.max() / counts.sum()
    assert metrics["phone_accuracy"] > 0 and "converted_speaker_accuracy" not in metrics


def test_odd_but_good_input_just_works(tmp_path):
    """Mixed rates, widths and channels, silence, clipping, one file, one-second files."""
    data = speakers(tmp_path / "data", files=12, names=("ann",))
    save(data / "bob/long.wav", 3 * np.sin(np.arange(80_000) / 9), 16_000, 3, 2)   # clipped
    save(data / "carl/silence.wav", np.zeros(20_000), width=1)
    status, text, error = run("--data", data, "--experiments", "reconstruction", "conversion",
                              out=tmp_path / "out")
    assert status == 0, error
    assert "resampled to 8000 Hz: 1 of 16000 Hz" in text
    assert json.loads((tmp_path / "out/metrics.json").read_text())["bits_per_sample"] > 0


def test_one_speaker_has_nobody_to_convert_to(tmp_path):
    status, text, error = run("--data", speakers(tmp_path / "data", names=("ann",)),
                              out=tmp_path / "out")
    assert status == 0, error
    assert "wrong_speaker" not in (tmp_path / "out/metrics.json").read_text()


def make(folder, kind):
    """Folders that must be refused, and a word the message has to contain."""
    if kind == "missing":
        return folder, "no such folder"
    folder.mkdir()
    if kind == "empty":
        return folder, "no WAV files"
    if kind == "flac":
        (folder / "ann").mkdir()
        (folder / "ann/a.flac").write_bytes(b"fLaC")
        return folder, "ffmpeg -i in.flac out.wav"
    speakers(folder)
    bad = folder / "bob/bad.wav"
    if kind == "torn":
        bad.write_bytes(b"RIFF????WAVE")
        return folder, str(bad)
    if kind == "float":
        data = bytearray((folder / "bob/0.wav").read_bytes())
        data[20:22] = b"\3\0"                          # IEEE float
        bad.write_bytes(data)
        return folder, "PCM"
    if kind == "loose":
        save(folder / "x.wav", np.zeros(9))
        return folder, "outside the speakers' folders"
    save(folder / "carl/short.wav", np.ones(900))
    return folder, "speaker carl: 0.1 s"


@pytest.mark.parametrize("kind", ["missing", "empty", "flac", "torn", "float", "loose", "short"])
def test_bad_data_gets_one_line(tmp_path, refused, kind):
    data, wanted = make(tmp_path / "data", kind)
    assert wanted in refused("--data", data)


def test_exit_status_of_the_script_itself(tmp_path):
    status, text, error = run("--data", tmp_path / "nowhere", out=tmp_path / "out")
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error


@pytest.mark.parametrize("text, wanted", [(None, "0.lab"), ("0.5 a\n0.4 b\n", "line 2"),
                                          ("0.5 a\n9.5 b\n", "lasts 1.00 s"), ("hello\n", "line 1"),
                                          ("x y a\n", "line 1")])
def test_bad_labels_get_one_line(tmp_path, refused, text, wanted):
    data = speakers(tmp_path / "data", names=("ann",))
    (tmp_path / "lab/ann").mkdir(parents=True)
    for i in range(2):
        if text is not None:
            (tmp_path / f"lab/ann/{i}.lab").write_text(text)
    assert wanted in refused("--data", data, "--labels", tmp_path / "lab")


@pytest.mark.parametrize("flags, wanted", [(("--crop", "100"), "multiple of 64"),
                                           (("--strides", "2,x"), "--strides"),
                                           (("--labels", "lab"), "--data")])
def test_bad_flags_get_one_line(refused, flags, wanted):
    assert wanted in refused(*flags)
