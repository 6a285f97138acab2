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
def refused(tmp_path, monkeypatch, capsys):
    """Call the script's main with flags: one line on stderr, exit status 2. Returns the line."""
    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["train_audio.py", *TINY, "--out", str(tmp_path / "out"),
                                          *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            audio.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error
    return call


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
    starts, owners = audio.windows([10, 3, 7], 4, 2)
    assert starts.tolist() == [0, 2, 4, 6, 13, 15] and owners.tolist() == [0, 0, 0, 0, 2, 2]
    assert audio.cut(torch.arange(20), starts, 4)[-1].tolist() == [15, 16, 17, 18]


def test_phone_map_takes_the_likeliest_phone_and_skips_what_has_no_label():
    codes = torch.tensor([0, 0, 0, 1, 1, 1])
    phones = torch.tensor([1, 1, 0, 0, audio.UNLABELLED, audio.UNLABELLED], dtype=torch.uint8)
    table = audio.phone_table(codes, phones, 3, 2)
    assert table.tolist() == [[1, 2], [1, 0], [0, 0]]
    assert audio.phone_accuracy(table, codes, phones) == pytest.approx(3 / 4)


def test_phones_are_read_on_test_speech_by_the_table_of_training_speech(tmp_path):
    def part(codes, phones):                           # two samples a code, their phone the second's
        phones = torch.tensor(phones, dtype=torch.uint8)
        label = torch.stack([torch.zeros_like(phones), phones], 1).flatten()
        return audio.Speech(torch.zeros_like(label), label, [len(label)]), torch.tensor(codes)

    run = SimpleNamespace(args=SimpleNamespace(hop=2, num_codes=3), out=tmp_path)
    table, found = audio.read_phones(run, part([0, 1, 1, 1, 2, 2], [0, 1, 1, 2, 2, 2]),
                                     part([0, 1, 2, 2], [1, 2, 2, 0]), ["a", "b", "c"])
    assert table.tolist() == [[1, 0, 0], [0, 2, 1], [0, 0, 2]]
    assert found["phone_baseline"] == 2 / 4, "the commonest phone of training speech is c"
    assert found["phone_accuracy"] == 1 / 4, "read as a, b, c, c"


def test_conversions_are_judged_by_the_voice_asked_for():
    waves, who, _ = audio.demo_speech(8, seed=1, seconds=1.0)
    clips, who = audio.mu_law(torch.from_numpy(waves)), torch.from_numpy(who)
    wanted = torch.tensor([v[0] for v in audio.VOICES.values()])

    def accuracy(x, speaker):                          # in place of the classifier: by pitch
        heard = audio.pitch(audio.inverse_mu_law(x), 8000)
        nearest = (heard[:, None] / wanted).log2().abs().argmin(1)
        return (nearest == speaker).float().mean().item()

    def judge(drawn):
        return audio.judge(SimpleNamespace(accuracy=accuracy), clips[:4], who[:4], drawn,
                           list(audio.VOICES), 8000)

    perfect = judge(clips[4:].expand(4, 4, -1))        # each one speaks the voice asked for
    assert perfect["real_speaker_accuracy"] == perfect["converted_speaker_accuracy"] == 1
    assert perfect["converted_pitch_error"] < 1
    none = judge(clips[:4, None].expand(4, 4, -1))     # nothing was converted
    assert none["converted_speaker_accuracy"] == 0
    semitones = 12 * (wanted[:, None] / wanted).log2().abs().sum() / 12        # over 12 pairs
    assert none["converted_pitch_error"] == pytest.approx(semitones.item(), abs=1)
    assert none["pitch_soprano"] > 200 > none["pitch_as_soprano"]


def test_the_end_of_every_speaker_is_held_out(tmp_path):
    data = speakers(tmp_path / "data", files=12)
    args = audio.make_parser().parse_args([*TINY, "--data", str(data), "--sample-rate", "8000"])
    args.hop = 64
    train, test, names, phones = audio.load_data(args, SimpleNamespace(say=print))
    assert names == ["ann", "bob"] and phones == []
    assert train.lengths == [86_400 // 64 * 64] * 2 and test.lengths == [9600] * 2
    folder, _ = audio.read_folder(data, args, SimpleNamespace(say=print))
    for k, name in enumerate(names):
        whole = folder[name][0]
        assert torch.equal(train.wave.split(train.lengths)[k], whole[:train.lengths[k]])
        assert torch.equal(test.wave.split(test.lengths)[k], whole[-9600:])


def test_prior_sees_the_whole_chunk():
    for length in (2, 64, 125, 320, 640):
        layers, cycle = audio.prior_size(length)
        assert audio.WaveNet(4, 2, layers, cycle).receptive_field >= length - 1


def test_labels_in_both_forms(tmp_path):
    for text in ("0.25 a\n1.0 b\n", "0 0.25 a\n0.25 1.0 b\n"):
        (tmp_path / "x.lab").write_text(text)
        label, names = torch.full((100,), audio.UNLABELLED, dtype=torch.uint8), []
        audio.read_labels(tmp_path / "x.lab", label, names, 100)
        assert names == ["a", "b"] and label.tolist() == [0] * 25 + [1] * 75
    (tmp_path / "x.lab").write_text("0.1 0.25 a\n0.5 1.0 b\n")
    label = torch.full((100,), audio.UNLABELLED, dtype=torch.uint8)
    audio.read_labels(tmp_path / "x.lab", label, [], 100)
    unknown = [audio.UNLABELLED]
    assert label.tolist() == 10 * unknown + [0] * 15 + 25 * unknown + [1] * 50


# -- the model ------------------------------------------------------------------------------------


def tiny_model(codebook="loss"):
    args = audio.make_parser().parse_args([*TINY, "--codebook", codebook, "--channels", "16",
                                           "--skip-channels", "16"])
    torch.manual_seed(0)
    return audio.SpeechVQVAE(args, 3)


@pytest.mark.parametrize("codebook", ["loss", "ema"])
def test_codes_idle_for_long_move_onto_encoder_outputs_and_others_stay(codebook):
    model = tiny_model(codebook)
    vq = model.quantizer
    before = vq.codebook.detach().clone()
    z_e, codes = torch.randn(2, 4, 3), torch.tensor([[0, 0, 1], [1, 0, 0]])
    for _ in range(6):
        model.revive(z_e, codes, patience=5)
    after, vectors = vq.codebook.detach(), z_e.transpose(1, 2).reshape(-1, 4)
    assert torch.equal(after[:2], before[:2])          # in use
    assert all((row == vectors).all(1).any() for row in after[2:])
    if codebook == "ema":                              # eq. 8 must hold for the moved ones
        assert torch.allclose(vq.ema_sum / vq.ema_count[:, None], after)


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
