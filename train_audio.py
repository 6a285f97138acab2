"""Speech: waveform -> VQ-VAE with a WaveNet decoder -> codes -> prior (sec. 4.3 of the paper).

    python train_audio.py                          demo speech, no download, no GPU: minutes
    python train_audio.py --data wav48/ --preset paper            VCTK's layout, on a GPU:
                                                   one folder of WAVs for each speaker
    python train_audio.py --data wav48/ --labels lab/ --preset paper-phonemes
    python train_audio.py --resume                 go on with runs/audio, as if never stopped

The paper's four experiments: (1) reconstruction by sampling the decoder, (2) speaker conversion,
decoding with another speaker's one-hot, (3) a prior over the codes and unconditional speech from
it, (4) each code read as its most likely phone. --out (runs/audio) receives *.wav,
reconstructions.png (the paper's fig. 6), samples.png, phones.png, curves.png, metrics.json,
log.csv, config.json and checkpoint.pt; README explains every number.
"""

import io
import json
import math
import random
import wave
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

from prior import WaveNet
from vqvae import (Encoder, Parser, Run, VectorQuantizer, VectorQuantizerEMA, count_codes,
                   fraction, perplexity, positive, stop, to_unit)

PAPER = dict(steps=500_000, prior_steps=250_000, batch_size=16, lr=2e-4,
             sample_rate=16_000, num_codes=512, code_dim=64, hidden=256, channels=64,
             skip_channels=256, layers=30, cycle=10, past_dropout=0.0, prior_channels=256,
             crop=10_240, clip=40_960, test_clips=10)
PRESETS = {
    # 8 kHz -> 62.5 codes of 7 bits a second, 146 times fewer bits than 8-bit speech. The decoder
    # looks back 256 samples, three periods of the deepest voice and less than half a phone: it
    # can keep up the pitch, but what is being said the codes have to tell it.
    "demo": dict(steps=3500, prior_steps=200, batch_size=8, lr=4e-3, lr_decay=0.5,
                 codebook="ema", sample_rate=8000, strides="2,2,2,2,2,2,2", num_codes=128,
                 code_dim=8, hidden=64, channels=32, skip_channels=64, layers=8, cycle=8,
                 past_dropout=0.1, prior_channels=64, crop=1024, clip=16_000, test_clips=40),
    # "6 strided convolutions with stride 2": 64x, K = 512. Widths, batch and crop are not in the
    # paper; steps and rate are those of its images.
    "paper": dict(PAPER, strides="2,2,2,2,2,2"),
    # "128 times smaller", chunks of 40,960 samples: 320 codes.
    "paper-prior": dict(PAPER, strides="2,2,2,2,2,2,2", experiments=["reconstruction", "prior"]),
    # "a 128-dimensional discrete space that runs at 25 Hz (downsampling factor of 640)".
    "paper-phonemes": dict(PAPER, strides="2,2,2,2,2,2,2,5", num_codes=128,
                           experiments=["reconstruction", "phonemes"]),
}
EXPERIMENTS = ["reconstruction", "conversion", "prior", "phonemes"]
UNLABELLED = 255                                       # stands where no phone is known

# ---------------------------------------------------------------------------------------------
# Demo data: a source-filter synthesiser. Who speaks, what and when is known exactly.
# ---------------------------------------------------------------------------------------------

# Pitch in Hz, formants relative to an average vocal tract (a short one: above 1), breathiness.
VOICES = {"bass": (92, 0.86, 0.02), "tenor": (128, 0.98, 0.05),
          "alto": (180, 1.11, 0.03), "soprano": (246, 1.26, 0.07)}

# Formants F1-F3 and their bandwidths in Hz, level of voice and of noise, mean length in ms.
# Vowels after Peterson and Barney (1952); fricatives are noise through high, wide resonances.
PHONES = {
    "pause": ((500, 1500, 2500), (100, 120, 150), 0.0, 0.0, 150),
    "a": ((730, 1090, 2440), (80, 90, 120), 1.0, 0.0, 150),
    "e": ((530, 1840, 2480), (60, 90, 120), 1.0, 0.0, 140),
    "i": ((270, 2290, 3010), (50, 90, 130), 0.7, 0.0, 130),
    "o": ((570, 840, 2410), (70, 80, 120), 0.9, 0.0, 150),
    "u": ((300, 870, 2240), (60, 80, 120), 0.7, 0.0, 130),
    "m": ((250, 950, 2200), (60, 120, 250), 0.5, 0.0, 110),
    "n": ((250, 1750, 2600), (60, 120, 250), 0.5, 0.0, 110),
    "r": ((350, 1150, 1500), (80, 120, 150), 0.7, 0.0, 100),
    "s": ((2700, 3300, 3700), (900, 500, 500), 0.0, 0.0007, 130),
    "c": ((1700, 2200, 2900), (500, 300, 400), 0.0, 0.01, 130),    # as in ship
    "f": ((900, 1700, 2900), (900, 900, 900), 0.0, 0.1, 120),
}
# The demo's language: with words, the prior has something to learn beyond single phones.
WORDS = ("mana sami reno cifu nosa fare mice rucan sono fimer cera numas eros ifan umico "
         "acen rafu sisom none marufi").split()


def demo_speech(count, seed=0, seconds=2.0, rate=8000):
    """`count` utterances, voices in turn: waves (count, T) float32 in [-1, 1], speakers (count,)
    int64, and what phone is spoken at each sample, (count, T) uint8 index into PHONES."""
    rng = np.random.default_rng(seed)
    length, names = int(seconds * rate), list(PHONES)
    speakers = np.arange(count) % len(VOICES)
    phones = np.zeros((count, length), np.uint8)
    for row in phones:
        at = int(rng.uniform(0.05, 0.15) * rate)       # starts with a pause
        while at < length - 0.15 * rate:
            word = WORDS[rng.integers(len(WORDS))]
            for name in [*word] + ["pause"] * (rng.random() < 0.4):
                n = int(PHONES[name][4] / 1000 * rate * rng.uniform(0.75, 1.25))
                row[at:at + n] = names.index(name)
                at += n
        row[length - int(0.05 * rate):] = 0
    return synthesise(phones, speakers, rng, rate), speakers, phones


def synthesise(phones, speakers, rng, rate, frame=8):
    """Phone at each sample (B, T), speakers (B,) -> waves (B, T)."""
    B, T = phones.shape
    table = np.array([[*f, *w, v, n] for f, w, v, n, _ in PHONES.values()], np.float32)
    pitch, tract, breath = np.array(list(VOICES.values()), np.float32)[speakers].T[..., None]
    # Coarticulation: the tract glides from target to target, for some 60 ms; the voice is faster.
    track = table[phones[:, ::frame]]                  # (B, frames, 8): 1 ms a frame at 8 kHz
    fps = rate / frame
    tuning = smooth(track[..., :6], 0.06 * fps) * tract[..., None]
    voiced, hiss = smooth(track[..., 6:], 0.025 * fps).repeat(frame, 1)[:, :T].transpose(2, 0, 1)

    # Source: a saw tooth (glottal pulse and radiation together fall by 6 dB an octave) whose
    # pitch sinks through the utterance and wanders a little, and noise.
    wander = smooth(rng.standard_normal((*track.shape[:2], 1)), 0.25 * fps)[..., 0]
    wander = wander.repeat(frame, 1)[:, :T]
    fall = np.linspace(1.05, 0.95, T)
    step = pitch * (fall + 0.02 * wander * np.sqrt(0.25 * fps)) / rate         # turns a sample
    phase = (np.cumsum(step, 1) + rng.random((B, 1))) % 1
    noise = rng.standard_normal((B, T), np.float32)
    source = voiced * (saw(phase, step) + breath * noise) + hiss * noise
    source = np.ascontiguousarray(source.T, np.float32)                        # (T, B)

    # Filter: three resonators in a row. All utterances take a step together.
    r = np.exp(-np.pi * tuning[..., 3:] / rate)
    b = 2 * r * np.cos(2 * np.pi * np.minimum(tuning[..., :3] / rate, 0.47))
    c = -r * r
    resonators = np.ascontiguousarray(np.stack([1 - b - c, b, c]).transpose(2, 3, 0, 1))
    last, older = np.zeros((2, 3, B), np.float32)
    wave = np.empty((T, B), np.float32)
    for t in range(T):
        x = source[t]
        for k, (gain, b, c) in enumerate(resonators[t // frame]):
            x = gain * x + b * last[k] + c * older[k]
            older[k], last[k] = last[k], x
        wave[t] = x
    # Pre-emphasis, usual in speech processing: else F1 is nearly all there is of the waveform.
    wave[1:] -= 0.7 * wave[:-1]
    wave = wave.T * (0.09 / np.sqrt((wave.T ** 2).mean(1, keepdims=True).clip(1e-9)))
    return (wave + 5e-4 * noise[::-1]).clip(-1, 1)     # a little noise of the room


def saw(phase, step):
    """A falling saw tooth, its jump rounded over two samples so that it does not alias."""
    wave = 1 - 2 * phase
    after, before = phase / step, (1 - phase) / step   # samples since, and until, the jump
    wave -= np.where(after < 1, (1 - after) ** 2, 0)
    return wave + np.where(before < 1, (1 - before) ** 2, 0)


def smooth(x, width):
    """Mean over some `width` samples around each one, twice: (B, T, C) -> (B, T, C)."""
    x, half = torch.as_tensor(x, dtype=torch.float32).transpose(1, 2), int(width) // 4 + 1
    for _ in range(2):
        x = F.avg_pool1d(F.pad(x, (half, half), "replicate"), 2 * half + 1, 1)
    return x.transpose(1, 2).numpy()


# ---------------------------------------------------------------------------------------------
# Waveforms: mu-law, resampling, reading and writing WAV files
# ---------------------------------------------------------------------------------------------


def mu_law(x):
    """x in [-1, 1] -> 256 levels, fine near zero and coarse near one, as uint8 (like WaveNet's)."""
    y = x.sign() * (255 * x.clamp(-1, 1).abs()).log1p() / math.log(256)
    return ((y + 1) / 2 * 255).round().to(torch.uint8)


def inverse_mu_law(levels):
    """0 .. 255 -> float32 in [-1, 1]."""
    y = levels.float() / 255 * 2 - 1
    return y.sign() * (256 ** y.abs() - 1) / 255


def resample(x, old, new):
    """x (T,) at `old` Hz -> (ceil(T * new / old),) at `new` Hz, both float32: its spectrum, cut
    off at the new rate's half or filled up to it with zeros."""
    g = math.gcd(old, new)
    M, L = old // g, new // g
    blocks = -(-len(x) // M) + 1000 // M + 1           # whole blocks of M, and silence at the end
    y = np.fft.irfft(np.fft.rfft(x, blocks * M)[:blocks * L // 2 + 1], blocks * L) * (L / M)
    return y[:-(-len(x) * L // M)].astype(np.float32)


def read_wav(path):
    """-> (T,) float32 in [-1, 1], the mean of all channels, and the rate in Hz."""
    try:
        data = bytearray(path.read_bytes())
        # "Extensible" PCM, what 24-bit files usually are: the same samples under another tag,
        # which Python's reader knows from 3.12 on only.
        at = data.find(b"fmt ", 0, 100)
        if at > 0 and data[at + 8:at + 10] == b"\xfe\xff" and data[at + 32:at + 34] == b"\1\0":
            data[at + 8:at + 10] = b"\1\0"
        with wave.open(io.BytesIO(data)) as file:
            channels, width, rate = file.getparams()[:3]
            raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    except (wave.Error, OSError, EOFError, RuntimeError) as e:
        stop(f"{path}: not a readable PCM WAV file ({str(e) or 'it ends early'}); "
             "ffmpeg -i in.wav -c:a pcm_s16le out.wav makes one")
    if not 1 <= width <= 4 or not channels or not rate:
        stop(f"{path}: {channels} channels of {8 * width} bits at {rate} Hz; reads PCM of 8, 16, "
             "24 and 32 bits")
    raw = raw[:len(raw) // (width * channels) * width * channels].reshape(-1, channels, width)
    # Little-endian: put the bytes on top of an int32. 8 bits are unsigned, the others signed.
    full = np.zeros((*raw.shape[:2], 4), np.uint8)
    full[..., 4 - width:] = raw ^ 128 if width == 1 else raw
    return full.view("<i4")[..., 0].mean(1, dtype=np.float32) / 2 ** 31, rate


def write_wav(path, x, rate):
    """x (T,) in [-1, 1] as 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((x.clamp(-1, 1) * 32767).round().short().cpu().numpy().tobytes())


# ---------------------------------------------------------------------------------------------
# The data: one stream of speech for each speaker
# ---------------------------------------------------------------------------------------------


class Speech(NamedTuple):
    """What one part, training or test, has of every speaker, joined end to end: an utterance's
    length does not matter then, windows are cut anywhere within a speaker."""

    wave: torch.Tensor    # (S,) uint8: mu-law levels
    phones: torch.Tensor  # (S,) uint8: an index into the phones' names, or UNLABELLED
    lengths: list         # each speaker's share of S, a multiple of the hop


def windows(lengths, size, step, device="cpu"):
    """Where windows of that size start in streams joined end to end, and in which stream each one
    lies: two (N,) int64."""
    starts, first = [], 0
    for length in lengths:
        starts.append(torch.arange(first, first + length - size + 1, step))
        first += length
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor([len(s) for s in starts]))
    return torch.cat(starts).to(device), owners.to(device)


def cut(stream, starts, size):
    """The windows themselves: (N, size)."""
    return stream[starts[:, None] + torch.arange(size, device=stream.device)]


def load_data(args, run):
    """-> training and test Speech, the speakers' names, the phones' names ([] without labels)."""
    if args.data is None:
        waves, owners, spoken = map(torch.from_numpy, demo_speech(
            args.demo_utterances, args.seed, args.clip / args.sample_rate, args.sample_rate))
        speakers = {name: (mu_law(waves[owners == s]).flatten(), spoken[owners == s].flatten())
                    for s, name in enumerate(VOICES)}
        phones = list(PHONES)
    else:
        speakers, phones = read_folder(Path(args.data), args, run)
    streams = []                                       # (training, test) of each speaker
    for name, (wave, spoken) in speakers.items():
        held = max(args.clip, len(wave) // 10)         # the end is for testing
        needed = held + max(args.crop, args.clip)
        if len(wave) < needed:
            stop(f"speaker {name}: {len(wave) / args.sample_rate:.1f} s of speech, needs "
                 f"{needed / args.sample_rate:.1f} s: one --clip for testing, and one (or one "
                 "--crop) for training")
        streams.append([[x[part] for x in (wave, spoken)]
                        for part in (slice(-held), slice(-held, None))])
    train, test = (join(part, args.hop) for part in zip(*streams))
    return train, test, list(speakers), phones


def join(streams, hop):
    lengths = [len(wave) // hop * hop for wave, _ in streams]
    return Speech(*(torch.cat([x[:n] for x, n in zip(part, lengths)]) for part in zip(*streams)),
                  lengths)


def read_folder(path, args, run):
    """DIR/<speaker>/**/*.wav -> {speaker: (levels, phones)} and the phones' names."""
    if not path.is_dir():
        stop(f"--data {path}: no such folder")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() == ".wav" and p.is_file())
    if not found:
        flac = next((p for p in path.rglob("*") if p.suffix.lower() == ".flac"), None)
        if flac:
            stop(f"--data {path}: FLAC files only, such as {flac}; convert each with "
                 "ffmpeg -i in.flac out.wav")
        stop(f"--data {path}: no WAV files; needs a folder of them for each speaker")
    loose = [p for p in found if p.parent == path]
    if loose:
        stop(f"{loose[0]}: lies outside the speakers' folders; needs {path}/<speaker>/*.wav")
    speakers, names, rates = {}, [], Counter()
    for speaker, files in groupby(found, lambda p: p.relative_to(path).parts[0]):
        files, waves, labels = list(files), [], []
        random.Random(0).shuffle(files)                # else the test part would be the last words
        for file in files:
            x, rate = read_wav(file)
            rates[rate] += 1
            x = x if rate == args.sample_rate else resample(x, rate, args.sample_rate)
            waves.append(torch.as_tensor(x))
            labels.append(torch.full(waves[-1].shape, UNLABELLED, dtype=torch.uint8))
            if args.labels:
                lab = Path(args.labels) / file.relative_to(path).with_suffix(".lab")
                read_labels(lab, labels[-1], names, args.sample_rate)
        wave = torch.cat(waves)
        # Recordings differ in level: bring every speaker to the same one, 0.09 on average.
        level = wave.square().mean().sqrt().clamp(min=1e-4)
        speakers[speaker] = mu_law(wave * 0.09 / level), torch.cat(labels)
    other = ", ".join(f"{n} of {r} Hz" for r, n in sorted(rates.items()) if r != args.sample_rate)
    run.say(f"{len(found)} WAV files of {len(speakers)} speakers"
            + (f"; resampled to {args.sample_rate} Hz: {other}" if other else ""))
    return speakers, names


def read_labels(lab, label, names, rate):
    """Fill `label` (T,) from lines of `end phone` or `start end phone`, in seconds."""
    try:
        lines = lab.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        stop(f"{lab}: no readable labels ({getattr(e, 'strerror', None) or 'not a text file'})")
    last = 0.0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            *times, phone = line.split()
            start, end = (last, *map(float, times))[-2:]
            if not (len(times) in (1, 2) and last - 1e-3 <= start <= end):
                raise ValueError
        except ValueError:
            stop(f"{lab}, line {number}: '{line.strip()}'; needs 'end phone' or 'start end phone', "
                 "in seconds, in order")
        if end > len(label) / rate + 0.05:
            stop(f"{lab}, line {number}: ends at {end:g} s, but its WAV lasts "
                 f"{len(label) / rate:.2f} s")
        if phone not in names:
            names.append(phone)
        if len(names) > UNLABELLED:
            stop(f"{lab}, line {number}: more than {UNLABELLED} different phones")
        label[round(max(0, start) * rate):round(end * rate)] = names.index(phone)
        last = end


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


class SpeechVQVAE(nn.Module):
    """Encoder (strided convolutions), quantiser, and WaveNet decoder p(x | z_q, speaker).

    x (B, T) uint8 mu-law levels, T a multiple of the product of the strides; speaker (B,) int64.
    """

    def __init__(self, args, speakers):
        super().__init__()
        Quantizer = {"loss": VectorQuantizer, "ema": VectorQuantizerEMA}[args.codebook]
        self.encoder = Encoder(1, args.hidden, args.hidden // 2, args.code_dim, args.strides,
                               ndim=1)
        self.quantizer = Quantizer(args.num_codes, args.code_dim, beta=args.beta)
        self.past_dropout = args.past_dropout
        self.register_buffer("idle", torch.zeros(args.num_codes, dtype=torch.long))
        # The decoder may look at the codes before and after: all of them are known to it.
        self.context = nn.Sequential(nn.Conv1d(args.code_dim, args.channels, 3, padding=1),
                                     nn.ReLU())
        self.decoder = WaveNet(256, args.channels, args.layers, args.cycle,
                               skip_channels=args.skip_channels, cond_channels=args.channels,
                               num_speakers=speakers)
        # torch's own start loses two thirds of the variance in each convolution: next to nothing
        # of x gets through the encoder, the decoder learns to do without, and all codes die.
        for layer in self.modules():
            if isinstance(layer, nn.Conv1d):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        # Levels have an order, which an embedding would have to learn: start it, and the logits,
        # as smooth functions of the level (cosines, the fast ones small).
        level = (torch.arange(256) + 0.5) / 256
        for weight, size in ((self.decoder.embed.weight, 1.4), (self.decoder.head[-1].weight, 0.3)):
            k = torch.arange(weight.shape[1])
            smooth = size * (math.pi * level[:, None] * k).cos() / (1 + k / 4)   # (256, channels)
            weight.data.copy_(smooth.view_as(weight))

    def forward(self, x, speaker):
        """-> loss, nll (B, T) = -log p(x_t | x_<t, z_q, speaker) in nats, codes (B, N)."""
        z_e = self.encoder(to_unit(x).unsqueeze(1))                    # (B, D, N)
        q = self.quantizer(z_e)
        if self.training:
            self.revive(z_e.detach(), q.codes)
        nll = self.nll(x, q.z_q, speaker)
        # All three terms of eq. 3 for each latent: the data term is what its samples cost.
        return nll.sum() / q.codes.numel() + q.loss, nll, q.codes

    @torch.no_grad()
    def revive(self, z_e, codes, patience=50):
        """Move codes that nobody chose for `patience` steps onto encoder outputs of this batch.

        Not in the paper. The encoder starts out so vague that a dozen codes do for all it says;
        the others would be far away when it has learnt to say more.
        """
        vq, z = self.quantizer, z_e.transpose(1, 2).flatten(0, 1).float()      # (B*N, D)
        self.idle += 1
        self.idle[codes.flatten()] = 0
        dead = (self.idle > patience).nonzero()[:len(z), 0]
        vq.codebook.data[dead] = new = z[torch.randperm(len(z), device=z.device)[:len(dead)]]
        self.idle[dead] = 0
        if isinstance(vq, VectorQuantizerEMA):
            vq.ema_sum[dead], vq.ema_count[dead] = new, 1.0
        if dist.is_initialized():                      # what the first process moved, all move
            for table in (vq.codebook.data, self.idle, *vq.buffers()):
                dist.broadcast(table, 0)

    def nll(self, x, z_q, speaker):
        past = x.long()
        if self.training and self.past_dropout:
            # Not in the paper (Bowman et al. 2016 did it to words): some samples of the past are
            # replaced by random ones. What was drawn a little wrong then does not carry the
            # sampler away, and a past that may lie makes the decoder listen to the codes.
            wrong = torch.rand(x.shape, device=x.device) < self.past_dropout
            past = torch.where(wrong, torch.randint_like(past, 256), past)
        logits = self.decoder(past, self.context(z_q), speaker)        # (B, 256, T)
        return F.cross_entropy(logits.float(), x.long(), reduction="none")

    @torch.no_grad()
    def encode(self, x):
        """(B, T) uint8 -> codes (B, N)."""
        return self.quantizer(self.encoder(to_unit(x).unsqueeze(1))).codes

    @torch.no_grad()
    def bits(self, x, codes, speaker):
        """-log2 p(x | codes, speaker) a sample, with the true past as input: (B,)."""
        return self.nll(x, self.quantizer.lookup(codes), speaker).mean(1) / math.log(2)

    @torch.no_grad()
    def sample(self, codes, speaker, length, generator):
        """Draw x ~ p(x | codes, speaker): (B, length) uint8."""
        cond = self.context(self.quantizer.lookup(codes))
        return self.decoder.sample(len(codes), length, cond, speaker,
                                   generator=generator).to(torch.uint8)


class SpeakerClassifier(nn.Sequential):
    """A small network on the log spectrogram, taught who speaks by real utterances, to judge
    converted ones."""

    def __init__(self, speakers):
        super().__init__(nn.Conv1d(129, 64, 3, 2), nn.BatchNorm1d(64), nn.ReLU(),
                         nn.Conv1d(64, 64, 3, 2), nn.BatchNorm1d(64), nn.ReLU(),
                         nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, speakers))

    def forward(self, x):                              # (B, T) levels -> (B, speakers)
        window = torch.hann_window(256, device=x.device)
        power = torch.stft(inverse_mu_law(x), 256, 128, window=window, return_complex=True)
        # What is 20 dB below speech counts for little: not the voice, but the hiss of sampling.
        return super().forward((power.abs() + 0.1).log())

    @torch.no_grad()
    def accuracy(self, x, speaker):
        right = [(self(a).argmax(1) == s) for a, s in zip(x.split(64), speaker.split(64))]
        return torch.cat(right).float().mean().item()


# ---------------------------------------------------------------------------------------------
# The experiments
# ---------------------------------------------------------------------------------------------


def strides(text):
    return tuple(positive(int)(s) for s in text.split(","))


def make_parser():
    parser = Parser("audio", PRESETS, description=__doc__)
    flag = parser.add_argument
    flag("--labels", metavar="DIR", help="phone alignments of --data: <speaker>/../<name>.lab with "
         "lines 'end phone' or 'start end phone', in seconds")
    flag("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, help="default: all")
    flag("--sample-rate", type=positive(int), help="Hz; files of another rate are resampled")
    flag("--strides", type=strides, help="of the encoder's convolutions (paper 2,2,2,2,2,2); their "
         "product is the hop, the samples that share a code")
    flag("--channels", type=positive(int), help="residual channels of the decoder")
    flag("--skip-channels", type=positive(int), help="skip channels of the decoder")
    flag("--layers", type=positive(int), help="layers of the decoder")
    flag("--cycle", type=positive(int), help="its dilations are 1, 2 .. 2^(CYCLE-1), and again")
    flag("--past-dropout", type=fraction, help="share of the past's samples that the decoder is "
         "shown wrong in training (paper 0)")
    flag("--crop", type=positive(int), help="samples of a training example")
    flag("--clip", type=positive(int), help="samples of a test clip and of the prior's examples "
         "(paper 40,960)")
    flag("--test-clips", type=positive(int), help="clips that are reconstructed and converted")
    flag("--demo-utterances", type=positive(int), default=280, help="each as long as a clip; a "
         "tenth for testing")
    return parser


def main():
    run = Run(make_parser())
    args = run.args
    args.hop = math.prod(args.strides)
    for name in ("crop", "clip"):
        if getattr(args, name) % args.hop:
            stop(f"--{name} {getattr(args, name)} is no multiple of {args.hop}, the product of "
                 "--strides")
    if args.labels and not args.data:
        stop("--labels belongs to --data; the demo has labels of its own")
    train, test, speakers, phones = load_data(args, run)
    speech, N = train.wave.to(run.device), args.clip // args.hop       # N: codes of a clip
    model = SpeechVQVAE(args, len(speakers)).to(run.device)
    prior = WaveNet(args.num_codes, args.prior_channels, *prior_size(N),
                    skip_channels=2 * args.prior_channels).to(run.device)
    classifier = SpeakerClassifier(len(speakers)).to(run.device)
    minutes = [len(part.wave) / args.sample_rate / 60 for part in (train, test)]
    run.say(f"{minutes[0]:.1f} minutes of training speech and {minutes[1]:.1f} for testing, "
            f"{len(speakers)} speakers, {args.sample_rate / args.hop:g} codes a second; "
            f"{sum(p.numel() for p in model.parameters()):,} weights in the VQ-VAE, whose decoder "
            f"looks back {model.decoder.receptive_field} samples")

    # Stage one: the VQ-VAE, with the prior "kept constant and uniform".
    starts, owners = windows(train.lengths, args.crop, max(1, args.hop // 4), run.device)
    run.fit("vqvae", model, lambda net, i: vqvae_loss(
        net, cut(speech, starts[i], args.crop), owners[i], args.num_codes), len(starts),
        args.steps, args.batch_size, args.lr)
    model.requires_grad_(False)                        # stage one is over
    # Stage two: the codes, once, and the prior on them.
    codes, test_codes = (encode_all(model, part, args) for part in (train, test))
    if "prior" in args.experiments:
        pieces, _ = windows([n // args.hop for n in train.lengths], N, 1, run.device)
        run.fit("prior", prior, lambda net, i: prior_loss(net, cut(codes, pieces[i], N)),
                len(pieces), args.prior_steps, args.batch_size, args.lr)
    if "conversion" in args.experiments and len(speakers) > 1:
        longer, who = windows(train.lengths, args.clip, args.hop, run.device)
        run.fit("classifier", classifier, lambda net, i: (
            F.cross_entropy(net(cut(speech, longer[i], args.clip)), who[i]), {}), len(longer), 200,
            args.batch_size, 1e-3)
    if run.rank == 0:
        report(run, model, prior, classifier, (train, codes), (test, test_codes), speakers, phones)


def prior_size(length):
    """Layers and cycle of a prior whose two cycles of dilations see `length` codes."""
    cycle = max(1, math.ceil(math.log2(length / 2)))
    return 2 * cycle, cycle


def vqvae_loss(net, x, speaker, num_codes):
    loss, nll, codes = net(x, speaker)
    return loss, {"bits_per_sample": nll.detach().mean() / math.log(2),
                  "codes_used": count_codes(codes, num_codes)}


def prior_loss(net, codes):
    loss = F.cross_entropy(net(codes), codes)          # nats a code
    return loss, {"bits_per_code": loss.detach() / math.log(2)}


@torch.no_grad()
def encode_all(model, speech, args):
    """The codes of every stream, joined like the streams: (S / hop,)."""
    device = next(model.parameters()).device
    piece = max(1, 2 ** 16 // args.hop) * args.hop     # a piece at a time, to bound the memory
    return torch.cat([model.encode(x.to(device)[None])[0]
                      for stream in speech.wave.split(speech.lengths) for x in stream.split(piece)])


# ---------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------


def phone_table(codes, phones, num_codes, num_phones):
    """How often each code meets each phone: (K, phones). Experiment 4 maps a code to its largest
    entry, "the conditionally most likely phoneme"."""
    known = phones != UNLABELLED
    table = torch.zeros(num_codes, num_phones)
    return table.index_put_((codes.cpu()[known], phones.long()[known]), torch.ones(()),
                            accumulate=True)


def phone_accuracy(table, codes, phones):
    """Share of right phones, read off the codes, among those that have a label."""
    right = table.argmax(1)[codes.cpu()] == phones
    return right[phones != UNLABELLED].float().mean().item()


def pitch(x, rate):
    """Median pitch in Hz of the voiced frames of each x (B, T) in [-1, 1]: (B,), NaN if none.

    By autocorrelation: a frame is voiced if some delay of 1/400 to 1/60 s repeats it well.
    """
    size, first = rate // 16, rate // 400              # 62 ms: four periods at 64 Hz
    frames = x.unfold(1, size, size // 4)              # (B, frames, size)
    power = torch.fft.rfft(frames - frames.mean(2, keepdim=True), 2 * size).abs().square()
    r = torch.fft.irfft(power)[..., :size]             # (B, frames, delays)
    peak, delay = r[..., first:rate // 60].max(2)
    voiced = (r[..., 0] > 0.05 * r[..., 0].amax(1, keepdim=True)) & (peak > 0.5 * r[..., 0])
    return torch.where(voiced, rate / (delay + first), math.nan).nanmedian(1).values


@torch.no_grad()
def report(run, model, prior, classifier, train, test, speakers, phones):
    """All measurements, sounds and pictures; train and test are (Speech, codes)."""
    args, S = run.args, len(speakers)
    generator = torch.Generator(run.device).manual_seed(args.seed)
    starts, owners = windows(test[0].lengths, args.clip, args.clip)    # clips, of all speakers
    pick = torch.linspace(0, len(starts) - 1, min(args.test_clips, len(starts))).long()
    starts, owners = starts[pick], owners[pick].to(run.device)
    clips = cut(test[0].wave, starts, args.clip).to(run.device)        # (M, T)
    codes = model.encode(clips)
    metrics = likelihoods(model, clips, codes, owners, S)
    counts = count_codes(test[1], args.num_codes)
    metrics.update(codes_used=int((counts > 0).sum()), num_codes=args.num_codes,
                   perplexity=perplexity(counts).item(),
                   unigram_bits_per_code=perplexity(counts).log2().item())
    # Experiments 1 and 2: each clip drawn in its own voice, and in every other.
    convert = "conversion" in args.experiments and S > 1
    voices = torch.arange(S, device=run.device).repeat(len(clips), 1)
    voices = voices if convert else owners[:, None]                    # (M, V)
    V = voices.shape[1]
    drawn = draw(run, model, codes.repeat_interleave(V, 0), voices.flatten(), generator)
    drawn = drawn.view(len(clips), V, -1)
    if convert:
        metrics.update(judge(classifier, clips, owners, drawn, speakers, args.sample_rate))
    if "prior" in args.experiments:
        metrics["prior_bits_per_code"] = babble(run, model, prior, test, speakers, generator)
    if "phonemes" in args.experiments and phones:
        table, found = read_phones(run, train, test, phones)
        metrics.update(found)
        if convert:
            asked = cut(test[0].phones, starts, args.clip)[:, args.hop // 2::args.hop]
            metrics["converted_phone_accuracy"] = phone_accuracy(
                table, model.encode(drawn[owners[:, None] != voices]),
                asked.repeat_interleave(S - 1, 0))
    rows = []
    for s in owners.unique()[:4].tolist():             # a clip of each speaker
        i = int((owners == s).nonzero()[0])
        rows.append([(f"original: {speakers[s]}", f"{speakers[s]}_original", clips[i])])
        for k in ([s, (s + 1) % S] if convert else [0]):
            name = speakers[int(voices[i, k])]
            rows[-1].append((f"decoded as {name}", f"{speakers[s]}_as_{name}", drawn[i, k]))
    sheet(run, "reconstructions", rows)
    finish(run, metrics)


def finish(run, metrics):
    """metrics.json, curves.png, and the last words."""
    metrics["seconds"] = round(run.seconds, 1)
    metrics = {k: None if v != v else v for k, v in metrics.items()}   # JSON has no NaN
    run.write("metrics.json", json.dumps(metrics, indent=1))
    run.write_curves()
    for name, value in metrics.items():
        run.say(f"{name:30} {value:.4g}" if isinstance(value, float) else f"{name:30} {value}")
    run.say(f"sounds, pictures and numbers are in {run.out}")


def likelihoods(model, clips, codes, owners, S):
    """Bits a sample with the true past as input. If the decoder heeds its codes and its speaker,
    those of another utterance, or of another voice, cost more."""
    def bits(codes, speaker):
        return torch.cat([model.bits(*a) for a in zip(clips.split(4), codes.split(4),
                                                      speaker.split(4))]).mean().item()
    found = {"bits_per_sample": bits(codes, owners),
             "bits_per_sample_other_codes": bits(codes.roll(1, 0), owners)}
    if S > 1:
        found["bits_per_sample_wrong_speaker"] = bits(codes, (owners + 1) % S)
    return found


def read_phones(run, train, test, phones):
    """Experiment 4: how codes and phones meet on training speech, accuracies on test speech."""
    hop = run.args.hop                                 # a code stands for the phone in its middle
    told, spoken = (speech.phones[hop // 2::hop] for speech, _ in (train, test))
    table = phone_table(train[1], told, run.args.num_codes, len(phones))
    likeliest = torch.zeros_like(table).index_fill_(1, table.sum(0).argmax(), 1)
    phone_picture(run.out / "phones.png", table, phones)
    return table, {"phone_accuracy": phone_accuracy(table, test[1], spoken),
                   "phone_baseline": phone_accuracy(likeliest, test[1], spoken)}


def babble(run, model, prior, test, speakers, generator):
    """Experiment 3: speech from nothing, and the prior's bits a code on test speech."""
    N = run.args.clip // run.args.hop
    sampled = prior.sample(min(len(speakers), 4), N, generator=generator)
    sounds = draw(run, model, sampled, torch.arange(len(sampled), device=run.device), generator)
    sheet(run, "samples", [[(f"codes from the prior, voice {name}", f"sample_{name}", x)]
                           for name, x in zip(speakers, sounds)])
    starts, _ = windows([n // run.args.hop for n in test[0].lengths], N, N, run.device)
    bits = [prior_loss(prior, piece)[1]["bits_per_code"] * len(piece)
            for piece in cut(test[1], starts, N).split(64)]
    return sum(bits).item() / len(starts)


def draw(run, model, codes, speaker, generator, batch=256):
    """Sample speech for codes (B, N), 256 at a time: (B, T) uint8."""
    run.say(f"drawing {len(codes)} x {codes.shape[1] * run.args.hop} samples of speech")
    return torch.cat([model.sample(c, s, c.shape[1] * run.args.hop, generator)
                      for c, s in zip(codes.split(batch), speaker.split(batch))])


def judge(classifier, clips, owners, drawn, speakers, rate):
    """How well each clip took on every other voice: drawn (clips, S, T)."""
    S = len(speakers)
    voices = torch.arange(S, device=clips.device).repeat(len(clips), 1)
    other = owners[:, None] != voices                  # (clips, S)
    real = pitch(inverse_mu_law(clips), rate)          # (clips,)
    typical = torch.stack([real[owners == s].nanmedian() for s in range(S)])
    got = pitch(inverse_mu_law(drawn.flatten(0, 1)), rate).view(-1, S)
    off = 12 * (got / typical).log2().abs()            # semitones, from the voice asked for
    found = {"real_speaker_accuracy": classifier.accuracy(clips, owners),
             "converted_speaker_accuracy": classifier.accuracy(drawn[other], voices[other]),
             "converted_pitch_error": off[other].nanmean().item()}
    for s, name in enumerate(speakers):
        found[f"pitch_{name}"] = typical[s].item()
        found[f"pitch_as_{name}"] = got[other[:, s], s].nanmedian().item()
    return found


def sheet(run, name, rows):
    """Waveforms above spectrograms, as the paper's fig. 6, and each as a WAV file: rows of
    (title, file name, levels (T,))."""
    rate, columns = run.args.sample_rate, len(rows[0])
    figure = Figure((4.5 * columns, 3 * len(rows)), layout="constrained")
    axes = figure.subplots(2 * len(rows), columns, squeeze=False,
                           height_ratios=[1, 2.4] * len(rows))
    for i, row in enumerate(rows):
        for (title, file, levels), line, image in zip(row, axes[2 * i], axes[2 * i + 1]):
            x = inverse_mu_law(levels).cpu()
            write_wav(run.out / f"{file}.wav", x, rate)
            line.plot(x, linewidth=0.3)
            line.set(title=title, xlim=(0, len(x)), ylim=(-1, 1), xticks=[], yticks=[])
            power = torch.stft(x, 256, 64, window=torch.hann_window(256), return_complex=True)
            image.imshow((power.abs() + 1e-3).log(), origin="lower", aspect="auto", cmap="magma",
                         vmin=-5, vmax=3.5, extent=(0, len(x) / rate, 0, rate / 2000))
            image.set(ylabel="kHz", xlabel="seconds" if row is rows[-1] else "")
    figure.savefig(run.out / f"{name}.png", dpi=80)


def phone_picture(path, table, phones):
    """p(phone | code), the codes ordered by their most likely phone."""
    table = table[table.sum(1) > 0]
    p = table / table.sum(1, keepdim=True)
    p = p[(p.argmax(1) - p.amax(1)).argsort()]
    figure = Figure((8, 1.5 + 0.22 * len(phones)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(p.t(), aspect="auto", vmin=0, vmax=1)
    axis.set(yticks=range(len(phones)), yticklabels=phones, xlabel="code in use, sorted",
             title="p(phone | code) on training data")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
