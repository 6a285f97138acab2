"""train_audio.py: waveforms in and out, the demo's speech, and the script as a user runs it."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_audio as audio  # noqa: E402

ROOT = Path(__file__).parent.parent
TINY = ("--steps 3 --prior-steps 3 --batch-size 4 --clip 2048 --crop 512 "
        "--test-clips 2 --channels 4 --skip-channels 4 --layers 3 --cycle 3 --hidden 4 "
        "--prior-channels 4 "
        "--demo-utterances 40 --num-codes 8 --code-dim 4 --strides 2,2,2,2,2,2 "
        "--device cpu").split()


def run(*flags, out, tiny=TINY):
    """The script as a user runs it, small: (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, ROOT / "train_audio.py", *tiny, "--out", out, *flags],
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


def test_levels_come_back_as_the_waveform_but_for_its_loudness():
    x = torch.from_numpy(audio.demo_speech(4, seconds=1.0)[0][3])
    y = audio.to_wave(audio.to_levels(x), 8000)
    gain = (x * y).sum() / (x * x).sum()
    assert (y - gain * x).square().mean() < 0.01 * y.square().mean()
    louder = audio.to_levels(0.1 * x)
    assert (louder.float() - audio.to_levels(x).float()).abs().max() <= 1, "one loudness for all"
    half = torch.cat([x, torch.zeros(8000)])
    assert torch.equal(audio.to_levels(half)[:8000], audio.to_levels(x)), "pauses do not count"


def test_pre_emphasis_puts_the_noise_of_mu_law_below_the_speech_at_high_frequencies():
    t = torch.arange(8000) / 8000
    x = 0.3 * (2 * math.pi * 200 * t).sin()
    def noise(y):                                      # above 2 kHz, where x has nothing
        return torch.fft.rfft(y * torch.hann_window(8000)).abs()[2000:].square().sum()
    plain = audio.inverse_mu_law(audio.mu_law(x))
    y = audio.to_wave(audio.to_levels(x), 8000)
    gain = (x * y).sum() / (x * x).sum()
    assert noise(y / gain) < 0.5 * noise(plain)


def test_lower_undoes_the_pre_emphasis_and_leaves_out_what_is_below_60_hz():
    t = torch.arange(8000) / 8000
    for hz, least, most in ((10, 0, 1e-3), (40, 0, 0.05), (90, 0.95, 1), (1000, 0.999, 1.001)):
        x = (2 * math.pi * hz * t).sin()
        y = audio.lower(x - audio.EMPHASIS * F.pad(x, (1, 0))[:-1], 8000)
        found = (y * x)[2000:6000].sum() / x[2000:6000].square().sum()
        assert least - 1e-3 <= found <= most + 1e-3, f"{hz} Hz: {found:.4f} of it came back"


def test_speech_ends_without_an_echo_at_its_beginning():
    x = torch.zeros(1000)
    x[-50:] = 1.0
    assert audio.lower(x, 8000)[:500].abs().max() < 0.02 * audio.lower(x, 8000).abs().max()


def test_judge_is_trained_with_hiss_and_with_the_rumble_of_the_decoder(monkeypatch):
    heard, spectrum = [], audio.spectrum
    monkeypatch.setattr(audio, "spectrum", lambda x, step: heard.append(x) or spectrum(x, step))
    judge, silence = audio.Judge(2, 3, 8000), torch.full((400, 4000), 128, dtype=torch.uint8)
    judge(silence)
    judge.eval()(silence)
    noise, nothing = (torch.fft.rfft(x).abs().square() for x in heard)
    low, high = (noise[:, band].mean(1) for band in (slice(40, 200), slice(1000, 2000)))
    rumbles = low > 10 * high                          # de-emphasis: 0.15^-2 / 1.85^-2 = 150
    assert 0.4 < rumbles.float().mean() < 0.6, "half of the examples get each kind"
    assert (low[~rumbles] / high[~rumbles]).median() < 1.5, "hiss is white"
    hiss, rumble = (noise[rows].mean(1).sqrt().mean() for rows in (~rumbles, rumbles))
    assert 0.7 < rumble / hiss < 1.4, "one is as loud as the other"
    assert nothing[:, 40:].max() < 1e-3 * noise.mean(), "no noise outside training"


@pytest.mark.parametrize("old, new", [(48_000, 16_000), (44_100, 16_000), (16_000, 8000),
                                      (8000, 16_000), (22_050, 8000), (8000, 11_025)])
def test_resampled_sine_is_the_sine_itself(old, new):
    tone = 1234.5
    y = audio.resample(np.sin(2 * np.pi * tone * np.arange(old) / old).astype(np.float32), old, new)
    assert len(y) == new
    middle = slice(new // 10, -new // 10)
    assert np.abs(y - np.sin(2 * np.pi * tone * np.arange(new) / new))[middle].max() < 2e-3


def test_long_recordings_are_resampled_block_by_block_without_seams():
    t = np.arange(12 * 48_000) / 48_000                # some four blocks
    y = audio.resample(np.sin(2 * np.pi * 1234.5 * t).astype(np.float32), 48_000, 16_000)
    wanted = np.sin(2 * np.pi * 1234.5 * np.arange(12 * 16_000) / 16_000)
    assert len(y) == len(wanted) and np.abs(y - wanted)[1600:-1600].max() < 2e-3


def test_resampling_removes_what_would_alias():
    x = np.sin(2 * np.pi * 5000 * np.arange(16_000) / 16_000).astype(np.float32)  # above 4 kHz
    assert np.abs(audio.resample(x, 16_000, 8000)[400:-400]).max() < 2e-3
    assert audio.resample(x[:0], 16_000, 8000).size == 0


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_reads_pcm_of_any_width(tmp_path, width, channels):
    x = np.sin(np.arange(500) / 7) * 0.8
    save(tmp_path / "x.wav", x, 11_025, width, channels)
    y, rate = audio.read_sound(tmp_path / "x.wav")
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
    assert np.allclose(audio.read_sound(tmp_path / "x.wav")[0], [0.5, -0.25, 0.1, 0.3], atol=1e-6)
    with wave.open(str(tmp_path / "y.wav"), "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.array([16384, 0, -16384, 16384], "<i2").tobytes())
    assert np.allclose(audio.read_sound(tmp_path / "y.wav")[0], [0.25, 0.0], atol=1e-6)


def test_sheet_writes_sounds_that_are_read_back_and_a_picture(tmp_path):
    x, y = torch.linspace(-1, 1, 4000), torch.zeros(4000)
    audio.sheet(tiny_run(tmp_path).write, "a", 16_000, [[("$one: x/y", x), ("two", y)]])
    z, rate = audio.read_sound(tmp_path / "a_0__one_x_y.wav")
    assert rate == 16_000 and np.abs(z - x.numpy()).max() < 1e-4
    assert not audio.read_sound(tmp_path / "a_0_two.wav")[0].any()
    assert (tmp_path / "a.png").stat().st_size > 0


def test_a_wave_outside_minus_one_to_one_is_clipped_when_written(tmp_path):
    audio.write_wav(str(tmp_path / "x.wav"), torch.tensor([-1.5, 0.5, 1.5]), 8000)
    x, rate = audio.read_sound(tmp_path / "x.wav")
    assert rate == 8000 and np.allclose(x, [-1, 0.5, 1], atol=1e-4), "16 bits wrap around"


# -- the demo's speech ----------------------------------------------------------------------------


def test_a_sheet_has_as_many_columns_as_its_longest_row(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *args, **kw: drawn.append(1) or plot(*args, **kw))
    one, x = ("unconditional", torch.zeros(800)), torch.zeros(800)
    audio.sheet(lambda name, write: write(io.BytesIO()), "new", 8000,
                [[one], [("original", x), ("decoded", x)]])
    assert len(drawn) == 3, "what is decoded is missing beside its original"


def test_demo_speech_is_deterministic_and_says_what_it_claims():
    waves, speakers, phones = audio.demo_speech(8, seed=3, seconds=1.0)
    again = audio.demo_speech(8, seed=3, seconds=1.0)
    assert np.array_equal(waves, again[0]) and np.array_equal(phones, again[2])
    assert not np.array_equal(waves, audio.demo_speech(8, seed=4, seconds=1.0)[0])
    assert waves.shape == phones.shape == (8, 8000) and np.abs(waves).max() <= 1
    names = list(audio.PHONES)
    vowel, pause = phones == names.index("a"), phones == names.index("pause")
    assert np.square(waves[vowel]).mean() > 100 * np.square(waves[pause][200:]).mean() > 0


def pitch(x, rate):
    """Hz of each x (B, T): the delay of the largest autocorrelation, from 1/400 to 1/60 s."""
    r = np.fft.irfft(np.abs(np.fft.rfft(x, 2 * x.shape[1])) ** 2)
    return rate / (rate // 400 + r[:, rate // 400:rate // 60].argmax(1))


def test_demo_voices_have_the_pitch_and_the_formants_they_should():
    rng, rate = np.random.default_rng(0), 8000
    speakers = np.arange(4)
    # The pitch of a hum: the resonances of vowels are as loud as the fundamental.
    hum, phones = (np.full((4, 8000), list(audio.PHONES).index(name), np.uint8) for name in "ma")
    waves = audio.synthesise(hum, speakers, rng, rate)
    wanted = np.array([v[0] for v in audio.VOICES.values()])
    assert np.abs(np.log2(pitch(waves, rate) / wanted)).max() < 0.08
    waves = audio.synthesise(phones, speakers, rng, rate)
    # The mean frequency below 2 kHz rises with shorter vocal tracts.
    power = np.abs(np.fft.rfft(waves))[:, 400:2000] ** 2
    centre = (power * np.arange(400, 2000)).sum(1) / power.sum(1)
    assert (np.diff(centre) > 20).all(), centre


# -- streams, windows, phones ---------------------------------------------------------------------


def test_windows_stay_within_one_speaker():
    windows = audio.Windows(torch.arange(100), [(10, 10), (40, 3), (50, 7)], 4, 2)
    cut, owners, starts = windows[torch.arange(len(windows))]
    assert starts.tolist() == [10, 12, 14, 16, 50, 52] and owners.tolist() == [0, 0, 0, 0, 2, 2]
    cut, owners, _ = windows[torch.tensor([5, 0])]
    assert cut.tolist() == [[52, 53, 54, 55], [10, 11, 12, 13]] and owners.tolist() == [2, 0]


def test_phone_map_takes_the_likeliest_phone_and_skips_what_has_no_label():
    codes = torch.tensor([0, 0, 0, 1, 1, 1])
    phones = torch.tensor([1, 1, 0, 0, audio.UNLABELLED, audio.UNLABELLED], dtype=torch.uint8)
    table = audio.phone_table(codes, phones, 3, 2)
    assert table.tolist() == [[1, 2], [1, 0], [0, 0]]
    assert audio.phone_accuracy(table, codes, phones) == pytest.approx(3 / 4)


def speech(levels, **changes):
    """A Speech of one speaker with a hop of 2, its first half for training."""
    half = len(levels) // 2
    found = audio.Speech(levels, parts=[[(0, half)], [(0, half)], [(half, half)]],
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
                           say=print, picture=lambda *args, **more: (tmp_path / "drawn").touch())


def test_phones_are_read_on_test_speech_by_the_table_of_training_speech(tmp_path):
    # The first and the last code of a stretch are neighbours and no more.
    codes = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0] + [0, 0, 1, 2, 2, 2, 2, 0])
    phones = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0] + [2, 1, 2, 2, 0, 255, 255, 2],
                          dtype=torch.uint8)
    # Two samples per code: the phone in the middle of a code is that of its second.
    data = speech(torch.zeros(32, dtype=torch.uint8), phones=["a", "b", "c"],
                  ends=torch.arange(32) + 1,
                  spoken=torch.stack([torch.zeros_like(phones), phones], 1).flatten())
    found = audio.read_phones(tiny_run(tmp_path), data, codes)
    assert found["phone_baseline"] == 2 / 4, "the most frequent phone of training speech is c"
    assert found["phone_accuracy"] == 1 / 4, "predicted: a, b, c, c"
    assert (tmp_path / "drawn").exists()


def test_three_codes_read_a_phone_by_naive_bayes(tmp_path):
    rng = np.random.default_rng(3)
    spoken = rng.integers(3, size=100)
    codes = (spoken + rng.integers(2, size=100)) % 4   # a code fits two phones
    codes[1:] = np.where(spoken[:-1] == 2, 3, codes[1:])                  # and knows of the last
    data = speech(torch.zeros(200, dtype=torch.uint8), phones=["a", "b", "c"],
                  ends=torch.arange(200) + 1,
                  spoken=torch.tensor(spoken).repeat_interleave(2).byte())
    found = audio.read_phones(tiny_run(tmp_path, num_codes=4), data, torch.tensor(codes).byte())
    at, right = range(1, 49), 0
    for t in range(51, 99):                          # the second half is for testing
        score = [np.log(sum(spoken[s] == p for s in at)) + sum(
            np.log((sum(spoken[s] == p and codes[s + i] == codes[t + i] for s in at) + 1)
                   / (sum(spoken[s] == p for s in at) + 4)) for i in (-1, 0, 1)) for p in range(3)]
        right += np.argmax(score) == spoken[t]
    assert found["phone_accuracy_three_codes"] == pytest.approx(right / 48, abs=1e-3)
    assert found["phone_accuracy_three_codes"] > found["phone_accuracy"] + 0.05


class Listener:
    """In place of a Judge: levels below 9 are phones, a frame is two samples; the speaker is the
    first level over 9."""

    step = 2

    def __call__(self, x):
        return (F.one_hot(x[:, 0].long() // 10, 3).float(),
                F.one_hot(x[:, ::2].long() % 10, 3).transpose(1, 2))


def test_conversions_are_judged_by_the_target_speaker_and_by_the_labelled_frames(tmp_path):
    levels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 0], dtype=torch.uint8)
    data = speech(levels, phones=["a", "b", "c"], ends=torch.tensor([2, 6, 8]),
                  spoken=torch.tensor([0, 1, 255], dtype=torch.uint8))
    clips = audio.Clips(levels[None], torch.tensor([0]), torch.tensor([0]), None)
    own, other = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2]), torch.tensor([1, 1, 2, 2, 2, 2, 2, 2])
    drawn = torch.stack([own, 10 + other, 20 + 0 * own])[None].to(torch.uint8)

    def heard(voices):
        found = audio.judge_speech(tiny_run(tmp_path), Listener(), data, clips,
                                   torch.tensor([voices]), drawn[:, :len(voices)])
        return [found.get(f"{what}{name}{rest}") for what, rest in (
            ("", "_speaker_accuracy"), ("phone_error_", "")) for name in (
                "original", "reconstructed", "converted")]

    thirds = pytest.approx(1 / 3)
    assert heard([0, 1, 2]) == [1, 1, 1, thirds, 0, pytest.approx((3 + 2) / 6)]
    assert heard([0, 1, 1]) == [1, 1, 0.5, thirds, 0, pytest.approx((3 + 2) / 6)]
    assert heard([0]) == [1, 1, None, thirds, 0, None], "one speaker: nobody to convert to"


def test_word_share_counts_the_phones_that_lie_in_words_of_the_language(tmp_path):
    names, frames = list(audio.PHONES), 8

    class Reader:                                      # hears phone k where the levels are k
        def __call__(self, x):
            return None, F.one_hot(x.long(), len(names)).transpose(1, 2)

    def share(*texts):
        x = [[names.index("pause" if c == " " else c) for c in text for _ in range(frames)]
             for text in texts]
        return audio.word_share(tiny_run(tmp_path), Reader(), torch.tensor(x).to(torch.uint8))

    assert share(" mana eros ") == 1, "two words of the language, and pauses, which do not count"
    assert share("manaeros") == 1, "words need no pause between them"
    assert share("manas") == pytest.approx(4 / 5), "mana, and an s that belongs to no word"
    assert share("anam") == 0 and share(" ") == 0
    assert share("ma", "na") == 0, "a word does not go on in the next clip"
    frames = 3
    assert share("mana") == 0, "a phone of less than 40 ms is not a phone"
    assert share("m" * 9 + "a" * 9 + "sn" * 1 + "n" * 9 + "a" * 9) == 1, "a click changes no word"


def test_judge_learns_speakers_and_the_phones_of_labelled_frames_only(tmp_path):
    run, caught = tiny_run(tmp_path, seed=0, steps=9, batch_size=2, clip=800), []

    def fit(stage, net, loss, *_):
        caught.append(loss)
        return net.eval()

    run.fit = fit
    data = speech(torch.randint(256, (8000,), dtype=torch.uint8), phones=["a", "b", "c"],
                  ends=torch.tensor([81, 161, 241, 8000]), speakers=["ann", "bob"],
                  spoken=torch.tensor([0, 1, 2, 255], dtype=torch.uint8))
    net = audio.fit_judge(run, data)
    x, speaker = data.levels[:1600].view(2, 800), torch.tensor([0, 1])
    start = torch.tensor([0, 800])
    who, phones = net(x)
    p = phones[0, :, [0, 1, 2, 3]].softmax(0)          # frames at 0, 80, 160, 240
    nats = -(p[0, :2].log().sum() + p[1, 2].log() + p[2, 3].log()) / 4
    both = F.cross_entropy(who, speaker)
    assert caught[0](net, x, speaker, start)[0].item() == pytest.approx((nats + both).item())
    unlabelled = caught[0](net, x[1:], speaker[1:], start[1:])[0]
    assert unlabelled.item() == pytest.approx(F.cross_entropy(who[1:], speaker[1:]).item()), (
        "a batch without labels must not make the loss NaN")


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
        (a, n), (b, m), (c, l) = (part[k] for part in data.parts)
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
    save(folder / "ann/0.wav", np.ones(8000))          # as long as before
    third = loaded("--data", folder, "--sample-rate", "8000", **again)
    assert third.facts["samples"] == first.facts["samples"] and third.facts != first.facts


def test_a_phone_that_moved_is_noticed(tmp_path, monkeypatch):
    folder, facts = speakers(tmp_path / "data"), []
    for end in (0.1, 0.2):
        lab = tmp_path / "lab/ann/0.lab"
        lab.parent.mkdir(parents=True, exist_ok=True)
        lab.write_text(f"{end} a\n0.3 b\n")
        facts.append(loaded("--data", folder, "--labels", tmp_path / "lab", tmp_path=tmp_path,
                            monkeypatch=monkeypatch).facts)
    assert facts[0]["phones"] == facts[1]["phones"] and facts[0] != facts[1]


def test_prior_sees_the_whole_chunk():
    for length in (2, 64, 125, 320, 640):
        args = SimpleNamespace(num_codes=4, prior_channels=2)
        assert audio.make_prior(args, length).receptive_field >= length - 1


def test_labels_in_both_forms(tmp_path):
    run = tiny_run(tmp_path, sample_rate=100, labels=tmp_path)
    for text in ("0.25 a\n1.0 b\n", "0 0.25 a\n\n0.25 1.0 b\n", "\ufeff0.25 a\r\n1.0 b"):
        (tmp_path / "x.lab").write_text(text, encoding="utf-8")
        names, ends, spoken = audio.read_labels(run, ["x.wav"], [100])
        assert names == ["a", "b"], "a byte-order mark is not part of the first number"
        known = spoken != audio.UNLABELLED
        assert ends[known].tolist() == [25, 100] and spoken[known].tolist() == [0, 1]


def test_labels_that_end_after_their_recording_end_with_it(tmp_path):
    run = tiny_run(tmp_path, sample_rate=100, labels=tmp_path)
    (tmp_path / "x.lab").write_text("1.0 a\n1.03 1.04 b\n")
    (tmp_path / "y.lab").write_text("1.0 c\n")
    names, ends, spoken = audio.read_labels(run, ["x.wav", "y.wav"], [100, 100])
    assert ends.tolist() == sorted(ends.tolist())
    phone = speech(torch.zeros(200), ends=ends, spoken=spoken).phone_at(torch.arange(200))
    assert phone.tolist() == 100 * [0] + 100 * [2]


def test_phone_of_every_sample_comes_from_intervals(tmp_path):
    for name, text in (("0", "0.1 0.25 a\n0.5 1.0 b\n"), ("2", "1.03 a\n")):
        (tmp_path / f"lab/ann/{name}.lab").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"lab/ann/{name}.lab").write_text(text)
    run, said = tiny_run(tmp_path, sample_rate=100, labels=tmp_path / "lab"), []
    run.say = said.append
    files = [Path(f"ann/{i}.wav") for i in range(3)]
    names, ends, spoken = audio.read_labels(run, files, [100, 50, 100])
    data = speech(torch.zeros(250, dtype=torch.uint8), phones=names, ends=ends, spoken=spoken)
    unknown = [audio.UNLABELLED]
    assert names == ["a", "b"]
    assert data.phone_at(torch.arange(250)).tolist() == (
        10 * unknown + [0] * 15 + 25 * unknown + [1] * 50 + 50 * unknown + [0] * 100)
    assert len(said) == 1 and said[0].startswith("1 of 3 recordings have no labels")


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
                 "original_speaker_accuracy reconstructed_speaker_accuracy "
                 "converted_speaker_accuracy phone_error_original phone_error_reconstructed "
                 "phone_error_converted phone_accuracy phone_accuracy_three_codes phone_baseline "
                 "codes_used num_codes word_share_samples word_share_original perplexity "
                 "prior_bits_per_code seconds").split():
        assert math.isfinite(metrics[name]), name
    assert metrics["num_codes"] == 8 and metrics["bits_per_sample"] > 0
    for name in ("reconstructions.png", "samples.png", "phones.png", "curves.png", "log.csv",
                 "config.json", "checkpoint.pt"):
        assert (tmp_path / "a" / name).stat().st_size > 0
    assert "valid_bits_per_sample" in (tmp_path / "a/log.csv").read_text().partition("\n")[0]
    sounds = sorted((tmp_path / "a").glob("*.wav"))
    assert len(sounds) >= 2 * 3 + 2
    for x, rate in map(audio.read_sound, sounds):
        assert len(x) == 2048 and rate == 8000
    status, text, error = run("--resume", out=tmp_path / "a", tiny=["--device", "cpu"])
    assert status == 0 and "vqvae 3/3" not in text, f"--resume must know its flags: {error}"
    again = json.loads((tmp_path / "a/metrics.json").read_text())
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}


def test_16_khz_folder_with_labels_runs_as_it_is(tmp_path, call):
    waves, who, phones = audio.demo_speech(24, seconds=0.5, rate=16_000)
    names = list(audio.PHONES)
    for i, (x, k, p) in enumerate(zip(waves, who, phones)):
        save(tmp_path / f"wav/p{k}/nested/{i}.wav", x, 16_000)
        ends = np.append(np.flatnonzero(np.diff(p.astype(int))) + 1, len(p))
        lab = tmp_path / f"lab/p{k}/nested/{i}.lab"
        lab.parent.mkdir(parents=True, exist_ok=True)
        lab.write_text("".join(f"{e / 16_000:.5f} {names[p[e - 1]]}\n" for e in ends))
    text, metrics = call("--data", tmp_path / "wav", "--labels", tmp_path / "lab",
                         "--sample-rate", "16000", "--strides", "2,2,2,2,2,2,2")
    assert "24 recordings of 4 speakers, 12 seconds" in text
    counts = np.bincount(phones.ravel())
    assert 0 < metrics["phone_baseline"] < 2 * counts.max() / counts.sum()
    assert metrics["phone_accuracy"] > 0 and metrics["phone_error_converted"] > 0


def test_odd_but_good_recordings_just_work(tmp_path, call):
    """Mixed rates, widths and channels, silence, clipping, one file; names that matplotlib, file
    systems or terminals trip over; links; a size that the header leaves open."""
    data, far = speakers(tmp_path / "data", files=12, names=("$a_1$",)), tmp_path / "far"
    save(data / "bob/long.wav", 3 * np.sin(np.arange(80_000) / 9), 16_000, 3, 2)   # clipped
    save(data / f"{'c' * 130}/silence.wav", np.zeros(20_000), width=1)
    save(data / "bob/empty.wav", np.zeros(0))
    latin = Path(os.fsdecode(bytes(data) + b"/caf\xe9"))
    speakers(far, files=12, names=("x",))
    latin.symlink_to(far / "x")                        # a link, its name not in UTF-8
    (data / "bob/up").symlink_to(data)                 # leads back to where we are
    streamed = bytearray((far / "x/0.wav").read_bytes())
    streamed[4:8] = streamed[40:44] = bytes(4)
    (far / "x/0.wav").write_bytes(streamed)
    for file, text in ((data / "$a_1$/0.wav", "\ufeff0.3 $x_1$\n1.0 $y$\n"),
                       (data / "bob/long.wav", "1 5 \u00e9\n")):
        lab = tmp_path / "lab" / file.relative_to(data).with_suffix(".lab")
        lab.parent.mkdir(parents=True)
        lab.write_text(text, encoding="utf-8")
    text, metrics = call("--data", data, "--labels", tmp_path / "lab", "--test-clips", "40")
    assert "27 recordings of 4 speakers" in text
    assert "25 of 27 recordings have no labels" in text
    assert metrics["bits_per_sample"] > 0 and metrics["phone_baseline"] >= 0
    facts = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["facts"]
    assert facts["speakers"] == ["$a_1$", "bob", latin.name, "c" * 130]
    assert len([*(tmp_path / "out").glob("reconstructions_*_original_*.wav")]) == 4


def test_one_speaker_has_nobody_to_convert_to(tmp_path, call):
    _, metrics = call("--data", speakers(tmp_path / "data", names=("ann",)))
    assert not {name for name in metrics if "wrong_speaker" in name or "convert" in name}


@pytest.mark.parametrize("flags", [
    "--batch-size 1 --hidden 1 --channels 1 --prior-channels 1",
    "--clip 128 --crop 128 --num-codes 1",
    "--strides 3,1,5 --clip 2040 --crop 510 --codebook ema --layers 1 --cycle 1",
    "--sample-rate 1000 --strides 2 --test-clips 1 --clip 512"])
def test_small_settings_run_to_the_end(call, flags):
    _, metrics = call(*flags.split())
    assert metrics["bits_per_sample"] > 0 and metrics["original_speaker_accuracy"] >= 0
    if "--test-clips 1" in flags:
        assert metrics["bits_per_sample_other_codes"] != metrics["bits_per_sample"], (
            "the other codes must be others, even if there is one clip")


def make(folder, kind):
    """Folders that must be refused, and a word the message has to contain."""
    if kind == "missing":
        return folder, "No such file or directory"
    folder.mkdir()
    if kind == "empty":
        return folder, "needs a folder per speaker"
    if kind == "flac":
        (folder / "ann").mkdir()
        (folder / "ann/a.flac").write_bytes(b"fLaC")
        return folder, "soundfile"
    speakers(folder)
    bad = folder / "bob/bad.wav"
    data = bytearray((folder / "bob/0.wav").read_bytes())
    patches = {"float": (20, b"\3\0", "PCM"),          # IEEE float
               "fast": (24, b"\xff" * 4, "4294967295 samples per second"),
               "slow": (24, b"\1\0\0\0", "1 samples per second"),
               "channels": (22, b"\0\0", "0 channels")}
    if kind in patches:
        at, new, word = patches[kind]
        data[at:at + len(new)] = new
        bad.write_bytes(data)
        return folder, word
    if kind == "torn":
        bad.write_bytes(b"RIFF????WAVE")
        return folder, str(bad)
    if kind == "mp3":
        bad.write_bytes(b"ID3\3" + bytes(range(256)))
        return folder, "not a RIFF WAV file"
    if kind == "link":                                 # that leads nowhere
        bad.symlink_to(folder / "nowhere")
        return folder, str(bad)
    if kind == "loose":
        save(folder / "x.wav", np.zeros(9))
        return folder, "needs a folder per speaker"
    save(folder / "carl/short.wav", np.ones(900))
    return folder, "speaker carl: 0.1 s"


@pytest.mark.parametrize("kind", ["missing", "empty", "flac", "torn", "mp3", "link", "float",
                                  "fast", "slow", "channels", "loose", "short"])
def test_bad_data_gets_one_line(tmp_path, refused, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)                # as if not installed
    data, wanted = make(tmp_path / "data", kind)
    assert wanted in refused("--data", data)
    assert not (tmp_path / "out").exists()


def test_folder_that_may_not_be_read_is_not_skipped(tmp_path, refused, monkeypatch):
    data, scan = speakers(tmp_path / "data"), os.scandir

    def scandir(folder):
        if str(folder).endswith("bob"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"{data / 'bob'}: Permission denied" in refused("--data", data)


def test_flac_is_read_where_soundfile_is_installed(tmp_path, monkeypatch):
    """By a stand-in for the package, which takes the bytes for a WAV's."""
    folder = speakers(tmp_path / "data")
    for file in folder.rglob("*.wav"):
        file.rename(file.with_suffix(".flac"))

    def read(path, dtype, always_2d):
        x, rate = audio.read_wav(Path(path).read_bytes())
        return np.concatenate([x, 0 * x], 1), rate

    monkeypatch.setitem(sys.modules, "soundfile", SimpleNamespace(read=read))
    file = folder / "ann/0.flac"
    x, rate = audio.read_sound(file)
    wanted, _ = audio.read_wav(file.read_bytes())
    assert rate == 8000 and np.allclose(2 * x, wanted[:, 0], atol=1e-6), "the mean of two channels"


def test_exit_status_of_the_script_itself(tmp_path):
    status, text, error = run("--data", tmp_path / "nowhere", out=tmp_path / "out")
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error


@pytest.mark.parametrize("text, wanted", [
    (None, "0 different phones"), ("0.5 a\n0.4 b\n", "'0.4 b'"), ("nan a\n", "'nan a'"),
    ("0.5 a\n9.5 b\n", "up to 1.00"), ("hello\n", "'hello'"), ("x y a\n", "float: 'x'"),
    (b"\xe9", "0.lab: not readable"), ("".join(f"{i / 300} {i}\n" for i in range(300)), "255")])
def test_bad_labels_get_one_line(tmp_path, refused, text, wanted):
    data = speakers(tmp_path / "data", names=("ann",))
    (tmp_path / "lab/ann").mkdir(parents=True)
    if text is not None:
        text = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "lab/ann/0.lab").write_bytes(text)
    assert wanted in refused("--data", data, "--labels", tmp_path / "lab")


def test_labels_of_test_speech_alone_are_refused(tmp_path, refused, monkeypatch):
    data = speakers(tmp_path / "data", files=12, names=("ann",))
    heard = loaded("--data", data, "--sample-rate", "8000", tmp_path=tmp_path,
                   monkeypatch=monkeypatch)
    last = next(file for file in sorted(data.rglob("*.wav")) if np.array_equal(
        audio.read_levels(8000, file), heard.levels[-8000:]))
    (tmp_path / "lab/ann").mkdir(parents=True)
    (tmp_path / f"lab/ann/{last.stem}.lab").write_text("0.5 a\n1.0 b\n")
    assert "no phone in the training part" in refused(
        "--data", data, "--labels", tmp_path / "lab", "--sample-rate", "8000"), (
        "a table of no phones would call every code by the first of them")


@pytest.mark.parametrize("flags, wanted", [(("--crop", "100"), "multiples of 64"),
                                           (("--strides", "2,x"), "--strides"),
                                           (("--sample-rate", "5"), "--sample-rate"),
                                           (("--demo-utterances", "3"), "speaker soprano: 0.0 s"),
                                           (("--batch-size", "5000"), "--batch-size"),
                                           (("--layers", "1000000000"), "--layers"),
                                           (("--cycle", "70"), "--cycle"),
                                           (("--labels", "lab"), "--data"),
                                           (("--to", "alto"), "--to needs")])
def test_bad_flags_get_one_line(refused, flags, wanted):
    assert wanted in refused(*flags)


# -- a trained model in use -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished demo run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_audio.py", *TINY, "--out", str(folder)])
        audio.launch(audio.make_parser(), audio.load_data, audio.main, audio.use)
    return folder


def test_loaded_model_is_the_trained_one_and_decodes_what_it_encodes(trained):
    model = audio.load(trained, device="cpu")
    assert model.speakers == list(audio.VOICES) and not model.vqvae.training
    assert not any(p.requires_grad for p in [*model.vqvae.parameters(), *model.prior.parameters()])
    saved = torch.load(trained / "checkpoint-vqvae.pt", weights_only=True)
    best = (saved["best"] or saved)["model"]
    assert all(torch.equal(v, best[k]) for k, v in model.vqvae.state_dict().items())
    x = audio.demo_speech(4, seed=9, seconds=0.5, rate=16_000)[0][2]           # alto, another rate
    levels, codes = model.encode(x, 16_000)
    assert codes.shape == (63,), "4,000 samples at 8 kHz, filled up to 63 hops of 64"
    assert levels.shape == (63 * 64,) and levels.dtype == torch.uint8
    one = model.decode(codes[None], "bass", generator=torch.Generator().manual_seed(1))
    assert one.shape == (1, 63 * 64) and one.abs().max() <= 1
    two = model.decode(torch.stack([codes, codes]), ["bass", "alto"], temperature=1e-9)
    again = model.decode(codes[None], "alto", temperature=1e-9)
    assert torch.allclose(two[1], again[0], atol=1e-3), (
        "a voice for each row; near 0 the most likely sample")
    assert not torch.allclose(two[0], two[1], atol=1e-3)
    assert model.sample(3, seconds=0.1).shape == (3, 12 * 64)
    with pytest.raises(ValueError, match="no speaker bob.*bass, tenor, alto, soprano"):
        model.decode(codes[None], "bob")


def test_temperature_is_that_of_the_run_unless_it_is_given(tmp_path, monkeypatch, trained):
    """The run was made at another temperature than the preset's."""
    shutil.copytree(trained, tmp_path / "run")
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    state["args"]["temperature"] = 0.3
    torch.save(state, tmp_path / "run/checkpoint.pt")
    used = []
    monkeypatch.setattr(audio.SpeechVQVAE, "sample", lambda self, codes, who, temperature, _: (
        used.append(temperature) or torch.zeros(len(codes), 64, dtype=torch.uint8)))
    for flags in ((), ("--temperature", "0.6")):
        audio.use(audio.make_parser().parse_args(
            ["--out", str(tmp_path / "run"), "--sample", "1", "--device", "cpu", *flags]))
    assert used == [0.3, 0.6]


def test_likeliest_voice_is_the_one_of_fewest_bits(trained, monkeypatch):
    model = audio.load(trained, device="cpu")
    monkeypatch.setattr(model.vqvae, "bits", lambda x, codes, s: (s - 2.0).abs())
    assert model.likeliest_voice(*model.encode(np.zeros(9000, np.float32), 8000)) == "alto"


def test_finished_run_samples_reconstructs_and_converts(tmp_path, call, refused, trained):
    run_files = {f.name: f.read_bytes() for f in trained.iterdir()}
    save(tmp_path / "my voice.wav", np.sin(np.arange(9000) / 9), 16_000)
    text, _ = call("--sample", "5", "--temperature", "0.5", out=trained, tiny=())
    assert f"in {trained}: new.png and 5 sounds, new_*.wav" in text
    text, _ = call("--convert", tmp_path / "my voice.wav", "--to", "alto", out=trained, tiny=())
    call("--reconstruct", tmp_path / "my voice.wav", out=trained, tiny=())
    sounds = {f.name: len(audio.read_sound(f)[0]) for f in trained.glob("*.wav")
              if f.name not in run_files}
    assert {sounds.pop(f"new_{i}_unconditional.wav") for i in range(5)} == {2048}
    assert sounds.pop("new_0_decoded_as_alto.wav") == 4544
    assert sounds.pop("new_0_original_my_voice.wav") == 4544
    assert (trained / "new.png").stat().st_size > 0
    assert all((trained / name).read_bytes() == data for name, data in run_files.items()), (
        "using a run must not change it")
    for flags, wanted in ((("--convert", tmp_path / "my voice.wav"), "--to"),
                          (("--convert", tmp_path / "x.wav", "--to", "alto"), "x.wav"),
                          (("--convert", tmp_path / "my voice.wav", "--to", "bob"), "bass, tenor"),
                          (("--sample", "0"), "--sample"), (("--sampl", "2"), "--sampl")):
        assert wanted in refused(*flags, out=trained, tiny=())


def test_what_is_not_a_finished_run_cannot_be_used(tmp_path, refused, trained):
    for name, change, wanted in (
            ("missing", lambda d: [f.unlink() for f in d.glob("*.pt")], "checkpoint.pt"),
            ("cut", lambda d: (d / "checkpoint-vqvae.pt").write_bytes(
                (trained / "checkpoint-vqvae.pt").read_bytes()[:999]), "checkpoint-vqvae.pt"),
            ("stopped", lambda d: torch.save(
                {**torch.load(d / "checkpoint-prior.pt"), "step": 2}, d / "checkpoint-prior.pt"),
             "step 2 of 3"),
            ("other", lambda d: torch.save({**torch.load(d / "checkpoint.pt"), "script": "image"},
                                           d / "checkpoint.pt"), "train_image.py")):
        folder = tmp_path / name
        shutil.copytree(trained, folder)
        change(folder)
        assert wanted in refused("--sample", "1", out=folder, tiny=())
        with pytest.raises(ValueError, match=wanted):
            audio.load(folder)
