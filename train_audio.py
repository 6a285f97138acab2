"""Speech: waveform -> VQ-VAE with a WaveNet decoder -> codes -> prior (sec. 4.3 of the paper).

    python train_audio.py                          demo speech, no download, no GPU: minutes
    python train_audio.py --data wav48/ --preset paper            VCTK's layout, on a GPU
    python train_audio.py --data wav48/ --labels lab/ --preset paper-phonemes
    python train_audio.py --resume                 resume runs/audio where it stopped
    python train_audio.py --sample 4               with the finished run: unconditional speech,
    python train_audio.py --reconstruct me.wav     your recording through the codes,
    python train_audio.py --convert me.wav --to alto              and in another voice

(1) Reconstruction by sampling the decoder, (2) a prior and speech from it, (3) conversion by
another speaker's one-hot, (4) codes read as phones. --out (runs/audio): see .github/DATA.md.
"""

import math
import os
import random
import re
import struct
import wave
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from prior import WaveNet
from vqvae import (Encoder, Parser, check_batch, count_codes, depth, digest, find_files, fraction,
                   in_batches, launch, load_models, loss_per_latent, make_quantizer, number, path,
                   perplexity, pick_device, plain, positive, prepare, reading, safe_name, say,
                   smallest_int, spread, to_unit, write_file)

PAPER = dict(steps=500_000, prior_steps=250_000, batch_size=16, lr=2e-4, sample_rate=16_000,
             hidden=256, channels=64, skip_channels=256, layers=30, cycle=10, past_dropout=0.0,
             prior_channels=256, crop=10_240, clip=40_960, test_clips=10, temperature=0.8)
PRESETS = {
    # 8 kHz -> 125 codes of 6 bits per second. The decoder looks back 256 samples, less than half a
    # phone: it keeps up the pitch; what is said comes from the codes. Many short crops teach most.
    "demo": dict(steps=4000, prior_steps=250, batch_size=32, lr=4e-3, lr_decay=0.5, codebook="ema",
                 sample_rate=8000, strides=(2,) * 6, num_codes=64, code_dim=8, hidden=64,
                 channels=32, skip_channels=64, layers=8, cycle=8, past_dropout=0.1,
                 prior_channels=64, crop=256, clip=16_000, test_clips=40, temperature=0.65),
    # "6 strided convolutions with stride 2": 64x. Widths, batch, crop, steps are not in the paper.
    "paper": dict(PAPER, strides=(2,) * 6),
    # "128 times smaller", chunks of 40,960 samples: 320 codes.
    "paper-prior": dict(PAPER, strides=(2,) * 7),
    # "a 128-dimensional discrete space that runs at 25 Hz (encoder downsampling factor of 640)".
    "paper-phonemes": dict(PAPER, strides=(2,) * 7 + (5,), num_codes=128),
}
EMPHASIS = 0.85                                        # as in LPCNet (Valin and Skoglund, 2019)
UNLABELLED = 255                                       # stands where no phone is known

# Test speech for the experiments: levels (M, T), speaker (M,), where it begins (M,), codes (M, N).
Clips = namedtuple("Clips", "levels speaker start codes")


def main(run, data):
    """Sec. 4.3: a VQ-VAE of raw speech, and the paper's four experiments with it."""
    S = len(data.speakers)
    vqvae = fit_vqvae(run, data)                       # stage one: the prior is uniform
    codes = encode_all(run, vqvae, data)               # frozen from here on; all speech, once
    prior = fit_prior(run, data, codes)                # stage two, sec. 3.3: p(codes)
    judge = fit_judge(run, data)                       # not a part of the model
    if run.rank != 0:
        return
    test = data.windows(run.args.clip, run.args.clip)[2]
    some = test[spread(len(test), run.args.test_clips)]
    clips = Clips(*some, in_batches(vqvae.encode, run.device, 16, some[0]))
    metrics = rates(run, vqvae, prior, data, codes, clips)

    # Experiments 1 and 3, fig. 6: each clip's codes are decoded in its own voice, column 0, and in
    # others. "The reconstruction has the same content", and in another voice should have it still.
    voices = (clips.speaker[:, None] + torch.arange(min(8, S))) % S    # (M, V)
    drawn = draw(run, vqvae, clips.codes, voices)      # (M, V, T)
    names, rate = data.speakers, data.rate
    sheet(run.write, "reconstructions", rate, [
        [(f"original: {names[clips.speaker[i]]}", to_wave(clips.levels[i], rate))]
        + [(f"decoded as {names[s]}", to_wave(x, rate)) for s, x in zip(voices[i], drawn[i, :2])]
        for i in spread(len(voices), 4)])
    metrics |= judge_speech(run, judge, data, clips, voices, drawn)
    metrics |= draw_samples(run, vqvae, prior, judge, data, clips)     # experiment 2
    metrics |= read_phones(run, data, codes) if data.phones else {}    # experiment 4
    run.finish(metrics)


# -- The model, and its two stages ------------------------------------------------------------

class SpeechVQVAE(nn.Module):
    """Encoder (strided convolutions), quantiser, and WaveNet decoder p(x | z_q, speaker):
    x (B, T) uint8 levels, T a multiple of the product of the strides; speaker (B,) int64."""

    def __init__(self, args, speakers):
        super().__init__()
        self.hop = math.prod(args.strides)             # samples that share a code
        D, C = args.code_dim, args.channels
        self.encoder = Encoder(1, args.hidden, max(1, args.hidden // 2), D, args.strides, ndim=1)
        self.quantizer = make_quantizer(args)
        self.past_dropout = args.past_dropout
        # The decoder may look at the codes before and after: all of them are known to it.
        self.context = nn.Sequential(nn.Conv1d(D, C, 3, padding=1), nn.ReLU())
        self.decoder = WaveNet(256, C, args.layers, args.cycle, args.skip_channels,
                               cond_channels=C, num_speakers=speakers)
        # torch's own initialisation loses two thirds of the variance in each convolution: little
        # of x gets through the encoder, the decoder learns to do without, all codes die.
        for layer in (m for m in self.modules() if isinstance(m, nn.Conv1d)):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        # Levels have an order, which an embedding would have to learn: initialise it, and the
        # logits, as smooth functions of the level (5.35 bits per sample after 500 steps, not 5.72).
        level = (torch.arange(256) + 0.5) / 256
        for weight, size in ((self.decoder.embed.weight, 1.4), (self.decoder.head[-1].weight, 0.3)):
            k = torch.arange(weight.shape[1])
            smooth = size * (math.pi * level[:, None] * k).cos() / (1 + k / 4)   # (256, channels)
            weight.data.copy_(smooth.view_as(weight))

    def forward(self, x, speaker):
        """-> loss, nll (B, T) = -log p(x_t | x_<t, z_q, speaker) in nats, codes (B, N)."""
        q = self.quantizer(self.encoder(to_unit(x).unsqueeze(1)))      # z_q (B, D, N)
        nll = self.nll(x, q.z_q, speaker)
        return loss_per_latent(nll, q), nll, q.codes                   # eq. 3

    def nll(self, x, z_q, speaker):
        past = x.long()
        if self.training and self.past_dropout:
            # Not in the paper (Bowman et al. 2016 did it to words): with random samples in the past
            # small errors do not carry the sampler away, and the decoder depends on the codes.
            wrong = torch.rand(x.shape, device=x.device) < self.past_dropout
            past = torch.where(wrong, torch.randint_like(past, 256), past)
        logits = self.decoder(past, self.context(z_q), speaker)        # (B, 256, T)
        return F.cross_entropy(logits.float(), x.long(), reduction="none")

    def encode(self, x):
        """(B, T) uint8 -> codes (B, N)."""
        return self.quantizer(self.encoder(to_unit(x).unsqueeze(1))).codes

    def bits(self, x, codes, speaker):
        """-log2 p(x | codes, speaker) per sample, teacher-forced: (B,)."""
        return self.nll(x, self.quantizer.lookup(codes), speaker).mean(1) / math.log(2)

    def sample(self, codes, speaker, temperature=1.0, generator=None):
        """Draw x ~ p(x | codes, speaker): codes (B, N) -> (B, N * hop) uint8."""
        cond = self.context(self.quantizer.lookup(codes))
        return self.decoder.sample(len(codes), codes.shape[1] * self.hop, cond, speaker,
                                   temperature, generator).to(torch.uint8)


def fit_vqvae(run, data):
    """Stage one. While the VQ-VAE is trained, the prior is "kept constant and uniform"."""
    args, model = run.args, SpeechVQVAE(run.args, len(data.speakers))

    def loss(net, x, speaker, start):
        loss, nll, codes = net(x, speaker)
        return loss, {"bits_per_sample": nll.detach().mean() / math.log(2),
                      "codes_used": count_codes(codes, args.num_codes)}
    train, valid, _ = data.windows(args.crop, max(1, data.hop // 4))
    return run.fit("vqvae", model, loss, train, args.steps, args.batch_size, args.lr, valid)


def encode_all(run, vqvae, data):
    """The code of every hop of data.levels (zeros where it is in no part): (samples / hop,)."""
    hop, size = data.hop, max(1, 2 ** 16 // data.hop) * data.hop       # so many samples at a time
    codes = torch.zeros(len(data.levels) // hop, dtype=smallest_int(run.args.num_codes))
    for first, length in sum(data.parts, []):
        codes[first // hop:(first + length) // hop] = in_batches(
            lambda x: vqvae.encode(x[None])[0], run.device, size, data.levels[first:first + length])
    return codes


def fit_prior(run, data, codes):
    """Stage two: an autoregressive p(codes), "on chunks of 40960 timesteps"."""
    args, N = run.args, run.args.clip // data.hop

    def loss(net, codes, *_):
        loss = F.cross_entropy(net(codes.long()), codes.long())        # nats per code
        return loss, {"bits_per_code": loss.detach() / math.log(2)}
    train, valid, _ = data.windows(N, 1, codes)
    return run.fit("prior", make_prior(args, N), loss, train, args.prior_steps,
                   args.batch_size, args.lr, valid)


def make_prior(args, length):
    """A WaveNet whose two cycles of dilations see `length` codes."""
    cycle, C = max(1, math.ceil(math.log2(length / 2))), args.prior_channels
    return WaveNet(args.num_codes, C, 2 * cycle, cycle, skip_channels=2 * C)


# -- The experiments, what is measured of them, and their pictures ----------------------------

def draw(run, vqvae, codes, voices):
    """Speech for codes (M, N), each in V voices (M, V): (M, V, T) uint8."""
    (M, V), codes = voices.shape, codes[:, :2 if run.rehearsing else None]
    run.say(f"drawing {M * V} x {codes.shape[1] * vqvae.hop} samples of speech")
    generator = torch.Generator(run.device).manual_seed(run.args.seed)
    return in_batches(lambda z, s: vqvae.sample(z, s, run.args.temperature, generator), run.device,
                      256, codes.repeat_interleave(V, 0), voices.flatten()).view(M, V, -1)


def draw_samples(run, vqvae, prior, judge, data, clips):
    """Experiment 2: codes from the prior, x ~ p(x | codes, speaker); the demo's words counted."""
    generator, who = torch.Generator(run.device).manual_seed(run.args.seed), clips.speaker
    codes = prior.sample(len(who), clips.codes.shape[1], generator=generator).cpu()
    drawn = draw(run, vqvae, codes, who[:, None])[:, 0]                # (M, T)
    sheet(run.write, "samples", data.rate, [[(f"voice {data.speakers[who[i]]}", to_wave(
        drawn[i], data.rate))] for i in spread(len(who), 4)])
    return {} if run.args.data else {"word_share_samples": word_share(run, judge, drawn),
                                     "word_share_original": word_share(run, judge, clips.levels)}


def word_share(run, judge, x):
    """Share of the phones recognised in x (M, T) that lie in words of the demo's language."""
    text, letters = "", [" ", *list(PHONES)[1:]]
    for found in in_batches(lambda x: judge(x)[1].argmax(1), run.device, 64, x):       # (frames,)
        phones, frames = found.unique_consecutive(return_counts=True)
        text += "".join(letters[p] for p in phones[frames > 3]) + " "
    text = re.sub(r"(.)\1+", r"\1", text)               # where a short one was left out
    words = re.findall("|".join(sorted(WORDS, key=len, reverse=True)), text)
    return sum(map(len, words)) / max(1, len(text.replace(" ", "")))


def rates(run, vqvae, prior, data, codes, clips):
    """What test speech costs in bits, and how many of the K codes it uses. Teacher-forced: if the
    decoder depends on codes and speaker, another utterance's codes or another voice cost more."""
    def bits(z, speaker):
        return in_batches(vqvae.bits, run.device, 4, clips.levels, z, speaker).mean().item()

    def prior_nats(z):
        return F.cross_entropy(prior(z.long()), z.long(), reduction="none")
    S, N = len(data.speakers), clips.codes.shape[1]
    counts = count_codes(data.windows(1, 1, codes)[2].all()[0].long(), run.args.num_codes)
    found = {"bits_per_sample": bits(clips.codes, clips.speaker),
             "bits_per_sample_other_codes": bits(clips.codes.roll(3 * N // 2), clips.speaker),
             "codes_used": int((counts > 0).sum()), "num_codes": run.args.num_codes,
             "perplexity": perplexity(counts).item(),
             "prior_bits_per_code": in_batches(prior_nats, run.device, 64, data.windows(
                 N, N, codes)[2].all()[0]).mean().item() / math.log(2)}
    return found if S == 1 else found | {
        "bits_per_sample_wrong_speaker": bits(clips.codes, (clips.speaker + 1) % S)}


def read_phones(run, data, codes):
    """Experiment 4: how codes and phones co-occur in training speech, accuracies on test speech."""
    def aligned(windows):  # three codes in a row; a code stands for the phone in its middle
        z, _, at = windows.all()
        return z.long(), data.phone_at((at + 1) * data.hop + data.hop // 2)
    (train, phones), _, (z, spoken) = map(aligned, data.windows(3, 1, codes))
    tables = [phone_table(c, phones, run.args.num_codes, len(data.phones)) for c in train.t()]
    table = tables[1]                                  # of the code in the middle
    # Three codes say more. Naive Bayes: p(phone | codes) ~ p(phone) prod_i p(code_i | phone).
    scores = table.sum(0).log() + sum(((t + 1) / (t.sum(0) + len(t))).log()[c]
                                      for t, c in zip(tables, z.t()))  # (n, phones)
    p = F.normalize(table[table.sum(1) > 0], p=1, dim=1)
    p = p[(p.argmax(1) - p.amax(1)).argsort()]         # by their most likely phone
    bars = (255 * (1 - p.t())).byte()[:, None, None, None].expand(-1, 1, 3, 6, -1)
    run.picture("phones", bars.repeat_interleave(3, 4), "p(phone | code) on training speech, codes "
                "sorted by their most likely phone", rows=data.phones)
    return {"phone_accuracy": phone_accuracy(table, z[:, 1], spoken),
            "phone_accuracy_three_codes": phone_accuracy(scores, torch.arange(len(z)), spoken),
            "phone_baseline": phone_accuracy(table.sum(0).expand_as(table), z[:, 1], spoken)}


def phone_table(codes, phones, num_codes, num_phones):
    """How often each code occurs with each phone: (K, phones)."""
    known, table = phones != UNLABELLED, torch.zeros(num_codes, num_phones)
    return table.index_put_((codes[known].long(), phones[known].long()), torch.ones(()),
                            accumulate=True)


def phone_accuracy(table, codes, phones):
    """Share of labelled phones that are "the conditionally most likely phoneme" of their code."""
    right = table.argmax(1)[codes.long()] == phones
    return right[phones != UNLABELLED].float().mean().item()


class Judge(nn.Sequential):
    """Who speaks, and which phone, 100 times a second: a small network on the log-mel spectrogram,
    trained on real utterances. It is not part of the model, and judges what it draws."""

    def __init__(self, speakers, phones, rate, hidden=96):
        super().__init__(*(layer for width in (32, hidden, hidden) for layer in (
            nn.Conv1d(width, hidden, 5, padding=2), nn.ReLU())),
            nn.Conv1d(hidden, speakers + phones, 1))
        self.speakers, self.rate, self.step = speakers, rate, rate // 100
        top, f = 2595 * math.log10(1 + rate / 1400), torch.linspace(0, rate / 2, 129)
        edges = 700 * (10 ** (torch.linspace(0, top, 34) / 2595) - 1)  # Hz, even on the mel scale
        rise = (f - edges[:-1, None]) / edges.diff()[:, None]          # from each to the next
        self.register_buffer("mel", torch.minimum(rise[:-1], 1 - rise[1:]).clamp(min=0), False)

    def forward(self, x):
        """(B, T) levels -> logits of the speakers (B, S) and of the phones (B, P, frames)."""
        x = to_wave(x, self.rate)
        if self.training:  # else hiss would pass for a fricative, and a rumble for the bass
            hiss, share, kind = torch.randn_like(x), *torch.rand(2, len(x), 1, device=x.device)
            x = x + 0.06 * share ** 2 * torch.where(kind < 0.5, hiss, lower(hiss, self.rate) / 2)
        out = super().forward((self.mel @ spectrum(x, self.step) + 0.03).log())
        return out[:, :self.speakers].mean(2), out[:, self.speakers:]


def fit_judge(run, data):
    args, S = run.args, len(data.speakers)
    judge = Judge(S, max(1, len(data.phones)), data.rate)

    def loss(net, x, speaker, start):
        who, phones = net(x)
        spoken = data.phone_at(start.cpu()[:, None] + torch.arange(0, x.shape[1], judge.step))
        spoken, known = spoken.long().to(x.device), (spoken != UNLABELLED).sum()
        nats = F.cross_entropy(phones[..., :spoken.shape[1]], spoken, ignore_index=UNLABELLED,
                               reduction="sum") / max(1, known)
        return nats + F.cross_entropy(who, speaker), {}
    train, valid, _ = data.windows(args.clip, data.hop)
    return run.fit("judge", judge, loss, train, min(args.steps, 3000, 300 + 25 * S),
                   args.batch_size, 2e-3, valid)


def judge_speech(run, judge, data, clips, voices, drawn):
    """What the judge finds in originals, in reconstructions (column 0 of drawn (M, V, T)) and in
    conversions: the share in the right voice, and of frames with another phone than was spoken."""
    found, (_, V, T) = {}, drawn.shape                 # V = 1: nobody to convert to
    spoken = data.phone_at(clips.start[:, None] + torch.arange(0, T, judge.step))
    for name, x, speaker in (("original", clips.levels[:, None, :T], clips.speaker[:, None]),
                             ("reconstructed", drawn[:, :1], voices[:, :1]),
                             ("converted", drawn[:, 1:], voices[:, 1:]))[:1 + V]:
        who, phones = (in_batches(lambda x: judge(x)[k].argmax(1), run.device, 64,
                                  x.flatten(0, 1)) for k in (0, 1))
        found[f"{name}_speaker_accuracy"] = (who == speaker.flatten()).float().mean().item()
        if data.phones:
            wanted = spoken.repeat_interleave(x.shape[1], 0)
            wrong = (phones[:, :wanted.shape[1]] != wanted)[wanted != UNLABELLED]
            found[f"phone_error_{name}"] = wrong.float().mean().item()
    return found


def spectrum(x, step):
    """(B, T) -> magnitudes (B, 129, frames) of windows of 256 samples."""
    return torch.stft(x, 256, step, window=torch.hann_window(256, device=x.device),
                      pad_mode="constant", return_complex=True).abs()


def sheet(write, name, rate, rows):
    """Rows of (title, x (T,)) as WAV files, and waveforms, as in fig. 6, above spectrograms."""
    from matplotlib.figure import Figure
    for i, row in enumerate(rows):
        for title, x in row:
            write(f"{name}_{i}_{safe_name(title)}.wav", partial(write_wav, x=x, rate=rate))
    rows, columns, n = rows[:8], max(map(len, rows)), min(8, len(rows))
    figure = Figure((4.5 * columns, 3 * n), layout="constrained")
    axes = figure.subplots(2 * n, columns, squeeze=False, height_ratios=[1, 2.4] * n)
    for lines, images, row in zip(axes[::2], axes[1::2], rows):
        for line, image, (title, x) in zip(lines, images, row):
            line.plot(x.numpy(), linewidth=0.3)
            line.set(title=plain(title), xlim=(0, len(x)), ylim=(-1, 1), xticks=[], yticks=[])
            image.imshow((spectrum(x, 64) + 1e-3).log().numpy(), origin="lower", aspect="auto",
                         cmap="magma", vmin=-5, vmax=3.5, extent=(0, len(x) / rate, 0, rate / 2000))
            image.set(ylabel="kHz", xlabel="seconds" if row is rows[-1] else "")
    write(f"{name}.png", lambda f: figure.savefig(f, format="png", dpi=80))


# -- A trained model in use -------------------------------------------------------------------

class Trained(namedtuple("Trained", "vqvae prior speakers args device")):
    """What `load` returns. Waves are float tensors (T,) in [-1, 1] at args.sample_rate."""

    def encode(self, x, rate):
        """A recording (T,) at any rate -> the levels it is encoded from (N * hop,), codes (N,)."""
        if not len(x):
            raise ValueError("a recording without any sound in it")
        x = torch.from_numpy(resample(np.asarray(x, np.float32), rate, self.args.sample_rate))
        x = to_levels(F.pad(x, (0, -len(x) % self.vqvae.hop))).to(self.device)
        return x, self.vqvae.encode(x[None])[0]

    def decode(self, codes, speaker, temperature=None, generator=None):
        """Codes (B, N) -> waves (B, T) in the voice of that speaker, or of each of B speakers."""
        names = [speaker] * len(codes) if isinstance(speaker, str) else speaker
        for name in {*names} - {*self.speakers}:
            raise ValueError(f"no speaker {name} in this run, but {', '.join(self.speakers[:20])}")
        who = torch.tensor([self.speakers.index(name) for name in names], device=self.device)
        x = self.vqvae.sample(codes.to(self.device), who, temperature or self.args.temperature,
                              generator)
        return to_wave(x.cpu(), self.args.sample_rate)

    def sample(self, n, speaker=None, seconds=2.0, temperature=None, generator=None):
        """n waves (n, T): codes from the prior, decoded in that voice or in all in turn."""
        N = max(1, round(seconds * self.args.sample_rate / self.vqvae.hop))
        names = [speaker or self.speakers[i % len(self.speakers)] for i in range(n)]
        return self.decode(self.prior.sample(n, N, generator=generator), names, temperature,
                           generator)

    def likeliest_voice(self, x, codes):
        """The speaker under whom p(x | codes, speaker) is largest, over a few seconds."""
        N = 1 + 4 * self.args.sample_rate // self.vqvae.hop
        x, z = x[None, :N * self.vqvae.hop], codes[None, :N]
        return min(self.speakers, key=lambda name: self.vqvae.bits(
            x, z, torch.tensor([self.speakers.index(name)], device=self.device)).item())


def load(folder="runs/audio", device="auto"):
    """The models of a finished run, in eval mode; ValueError with one line if it is none."""
    def make(args, facts):
        vqvae = SpeechVQVAE(args, len(facts["speakers"]))
        return vqvae, make_prior(args, args.clip // vqvae.hop)
    models, args, facts = load_models(folder, "audio", device, make)
    return Trained(*models, facts["speakers"], args, pick_device(device))


def use(args):
    """--sample, --reconstruct, --convert: sounds and a picture from the run in --out."""
    model, rows = load(args.out, args.device), []
    rate, generator = model.args.sample_rate, torch.Generator(model.device).manual_seed(args.seed)
    if args.convert and not args.to:
        raise ValueError(f"--convert needs --to, one of {', '.join(model.speakers[:20])}")
    if args.sample:
        rows = [[("unconditional", x)] for x in model.sample(
            args.sample, args.to, model.args.clip / rate, args.temperature, generator)]
    for file in filter(None, (args.reconstruct, args.convert)):
        x, codes = model.encode(*read_sound(file))
        name = args.to or model.likeliest_voice(x, codes)
        y = model.decode(codes[None], name, args.temperature, generator)[0]
        rows.append([(f"original: {Path(file).stem}", to_wave(x.cpu(), rate)),
                     (f"decoded as {name}", y)])
    sheet(lambda name, writer: write_file(Path(args.out, name), writer), "new", rate, rows)
    say(f"in {args.out}: new.png and {sum(map(len, rows))} sounds, new_*.wav")


# -- Waveforms: levels, resampling, reading and writing recordings ----------------------------

def to_levels(x):
    """A recording (T,) in [-1, 1] -> what the model works on, (T,) uint8: high frequencies raised,
    one loudness for all, mu-law. Mu-law is WaveNet's [37], the rest is ours. Its noise, and that of
    sampling, is heard at high frequencies, where speech is weak; `to_wave` lowers both there."""
    y = x - EMPHASIS * F.pad(x, (1, 0))[:-1]
    power = F.pad(y, (0, -len(y) % 256)).view(-1, 256).square().mean(1)
    loud = power[power >= power.amax() / 100] if len(y) else power     # pauses do not count
    return mu_law(y * 0.12 / loud.mean().sqrt().clamp(min=1e-3))


def to_wave(levels, rate):
    """Levels (..., T) -> float32 (..., T) in [-1, 1], high frequencies lowered again."""
    return (0.3 * lower(inverse_mu_law(levels), rate)).clamp(-1, 1)


def lower(y, rate):
    """Undo the pre-emphasis of y (..., T). Below 60 Hz, where only noise rumbles, 0 is left."""
    n = y.shape[-1] + 256                              # echoes of the end fade in silence
    f = torch.fft.rfftfreq(n, 1 / rate, device=y.device)
    gain = 1 / (1 + (60 / f) ** 8) / (1 - EMPHASIS * torch.exp(-2j * math.pi * f / rate))
    return torch.fft.irfft(torch.fft.rfft(y, n) * gain, n)[..., :y.shape[-1]]


def mu_law(x):
    """x in [-1, 1] -> 256 levels, fine near zero and coarse near one, as uint8 (like WaveNet's)."""
    y = x.sign() * (255 * x.clamp(-1, 1).abs()).log1p() / math.log(256)
    return ((y + 1) / 2 * 255).round().to(torch.uint8)


def inverse_mu_law(levels):
    """0 .. 255 -> float32 in [-1, 1]."""
    y = levels.float() / 255 * 2 - 1
    return y.sign() * (256 ** y.abs() - 1) / 255


def resample(x, old, new):
    """x (T,) at `old` Hz -> (ceil(T * new / old),) at `new`: its spectrum, cut or zero-padded."""
    M, L = (rate // math.gcd(old, new) for rate in (old, new))         # M samples become L
    if M == L or not len(x):
        return x
    n = -(-len(x) // M) + 8                            # whole groups, and silence to fade out in
    spectrum = np.fft.rfft(np.pad(x, (0, n * M - len(x))))[:n * L // 2 + 1]
    return (np.fft.irfft(spectrum, n * L)[:-(-len(x) * L // M)] * (L / M)).astype(np.float32)


def write_wav(file, x, rate):
    """x (T,) in [-1, 1] -> 16-bit mono WAV; file: its name (str), or one open for writing."""
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        out.writeframes((x.clamp(-1, 1) * 32767).round().short().numpy().tobytes())


def read_sound(path):
    """A WAV or FLAC file -> (T,) float32 in [-1, 1], the mean of all channels, and its rate."""
    with reading(path):
        if str(path).lower().endswith(".flac"):
            import soundfile                           # not among the packages that are required
            x, rate = soundfile.read(path, dtype="float32", always_2d=True)
        else:
            x, rate = read_wav(Path(path).read_bytes())
        if not 1000 <= rate <= 384_000:
            raise ValueError(f"{rate} samples per second; reads 1,000 to 384,000")
    return x.mean(1), rate


def read_wav(data):
    """The bytes of a WAV file, PCM of any width -> (T, channels) float32 in [-1, 1], rate in Hz."""
    if not (data[:4] == b"RIFF" and b"fmt " in data and b"data" in data):
        raise ValueError("not a RIFF WAV file, or cut off")
    at, found = 12, {}
    while b"data" not in found:                        # chunks: name, size, content
        name, size = struct.unpack_from("<4sI", data, at)
        found[name], at = at + 8, at + 8 + size + size % 2
    tag, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", data, found[b"fmt "])
    if tag == 0xfffe:  # "extensible", what 24-bit files usually are: the true tag comes later
        tag, = struct.unpack_from("<H", data, found[b"fmt "] + 24)
    width = frame // max(1, channels)
    if tag != 1 or not 1 <= width <= 4 or width * channels != frame:
        raise ValueError(f"{channels} channels of {bits} bits, format {tag}; needs PCM, as "
                         "ffmpeg -i in.wav -c:a pcm_s16le out.wav makes it")
    # Whoever streams does not know the size when the header is written: 0 means up to the end.
    raw = np.frombuffer(data, np.uint8)[found[b"data"]:][:size or None]
    raw = raw[:len(raw) // frame * frame].reshape(-1, channels, width)
    # Little-endian: put the bytes on top of an int32. 8 bits are unsigned, the others signed.
    full = np.zeros((*raw.shape[:2], 4), np.uint8)
    full[..., 4 - width:] = raw ^ 128 if width == 1 else raw
    return full.view("<i4")[..., 0].astype(np.float32) / 2 ** 31, rate


# -- The data: one stream of speech, of each speaker a stretch for each part ------------------

class Speech(NamedTuple):
    """All recordings joined end to end: an utterance's length does not matter then."""

    levels: torch.Tensor  # (samples,) uint8, memory-mapped where it comes from files
    parts: list           # training, validation, test: a stretch (first, length) of each speaker
    speakers: list        # names
    phones: list          # names, [] without labels
    ends: torch.Tensor    # (L,) where each phone ends in the stream
    spoken: torch.Tensor  # (L,) uint8 which phone that is, or UNLABELLED
    rate: int             # Hz
    hop: int              # samples that share a code; stretches are multiples of it
    longest: int          # the longest window that will be cut

    @property
    def facts(self):
        return {"speakers": self.speakers, "phones": self.phones, "samples": len(self.levels),
                "digest": digest(self.levels, self.ends, self.spoken)}

    def few(self):
        """For the rehearsal: a little of three speakers."""
        return self._replace(parts=[[(first, min(length, self.longest + 2 * self.hop))
                                     for first, length in part[:3]] for part in self.parts])

    def windows(self, size, step, codes=None):
        """Windows of the levels, or of their codes, for training, validation and testing."""
        unit, stream = (1, self.levels) if codes is None else (self.hop, codes)
        return [Windows(stream, torch.tensor(part) // unit, size, step) for part in self.parts]

    def phone_at(self, samples):
        return self.spoken[torch.searchsorted(self.ends, samples, right=True)]


class Windows(torch.utils.data.Dataset):
    """Every window of `size`, `step` apart, within stretches (first, length) of a stream:
    windows[index] -> (B, size), the stretch (the speaker) of each (B,), where it starts (B,)."""

    def __init__(self, stream, stretches, size, step):
        self.stream, self.size, self.step = stream, size, step
        self.first, length = torch.as_tensor(stretches).t()
        self.counts = ((length - size) // step + 1).clamp(min=0)
        self.ends = self.counts.cumsum(0)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index):
        owner = torch.searchsorted(self.ends, index, right=True)
        start = self.first[owner] + (index - self.ends[owner] + self.counts[owner]) * self.step
        return self.stream[start[:, None] + torch.arange(self.size)], owner, start

    def all(self):
        return self[torch.arange(len(self))]


def load_data(run):
    """The demo's speech or a folder's, cut into training, validation and test stretches."""
    args, hop, at = run.args, math.prod(run.args.strides), 0
    if args.labels and not args.data or args.to:
        raise ValueError("--to needs --convert, --reconstruct or --sample; --labels needs --data")
    if args.crop % hop or args.clip % hop:
        raise ValueError(f"--crop and --clip must be multiples of {hop}, the product of --strides")
    levels, lengths, names, *labels = (read_folder if args.data else demo_data)(run)
    parts, longest = ([], [], []), max(args.crop, args.clip)
    for name, n in zip(names, lengths):                # the end of each speaker is for testing
        testing, validating = (max(longest + hop, n // part) for part in (10, 20))
        needed = testing + validating + longest + 2 * hop
        if n < needed:
            raise ValueError(f"speaker {name}: {n / args.sample_rate:.1f} s of speech; training, "
                             f"validation and test need {needed / args.sample_rate:.1f} s")
        cuts = [-(-(at + n - held) // hop) * hop for held in (n, testing + validating, testing)]
        at += n
        for part, first, last in zip(parts, cuts, [*cuts[1:], at // hop * hop]):
            part.append((first, last - first))
    speech = Speech(levels, parts, names, *labels, args.sample_rate, hop, longest)
    known = speech.ends[speech.spoken != UNLABELLED]   # where phones end
    if args.labels and not any(((known > a) & (known < a + n)).any() for a, n in parts[0]):
        raise ValueError(f"--labels {args.labels}: no phone in the training part")
    check_batch(len(speech.windows(args.clip, hop)[0]), args.batch_size, "clips", "--batch-size")
    return speech


def read_folder(run):
    """DIR/<speaker>/**/*.wav -> levels, how many of each speaker, speakers, phones, labels."""
    root, rate = run.args.data, run.args.sample_rate
    files = find_files(root, (".wav", ".flac"))
    if not files or any(os.sep not in name for name, *_ in files):
        raise ValueError(f"--data {root}: needs a folder per speaker, <speaker>/*.wav or *.flac")
    random.Random(0).shuffle(files)                    # else the last sentences would be tested
    files.sort(key=lambda file: file[0].split(os.sep)[0])
    names = [name for name, *_ in files]
    levels, sizes = prepare(run, f"recordings in {root}", repr((files, rate, EMPHASIS)),
                            partial(read_levels, rate), [Path(root, name) for name in names], ())
    lengths = {name.split(os.sep)[0]: 0 for name in names}
    for name, size in zip(names, sizes):
        lengths[name.split(os.sep)[0]] += size
    run.say(f"{len(files)} recordings of {len(lengths)} speakers, {len(levels) / rate:.0f} seconds")
    return levels, lengths.values(), [*lengths], *read_labels(run, names, sizes)


def read_levels(rate, file):
    return to_levels(torch.from_numpy(resample(*read_sound(file), rate))).numpy()


def read_labels(run, recordings, lengths):
    """The .lab files of all recordings -> phones' names, and ends and phones as in Speech."""
    rate, folder, phones, ends, spoken, at = run.args.sample_rate, run.args.labels, {}, [], [], 0
    labs = [Path(folder, name).with_suffix(".lab") for name in recordings] if folder else []
    missing = [lab for lab in labs if not lab.exists()]
    if missing:
        run.say(f"{len(missing)} of {len(labs)} recordings have no labels, such as {missing[0]}")
    for lab, length in zip(labs, lengths):
        last, seconds = 0.0, length / rate
        with reading(lab):
            text = lab.read_text(encoding="utf-8-sig") if lab.exists() else ""
            for line in filter(str.strip, text.splitlines()):
                *times, phone = line.split()
                start, end = (last, last, *map(float, times))[-2:]
                if not (0 < len(times) < 3 and last - 1e-3 <= start <= end <= seconds + 0.05):
                    raise ValueError(f"'{line.strip()}'; needs 'end phone' or 'start end phone', "
                                     f"in seconds, in order, up to {seconds:.2f}")
                start, last = (min(max(last, t), seconds) for t in (start, end))
                ends += [at + round(start * rate), at + round(last * rate)]
                spoken += [UNLABELLED, phones.setdefault(phone, len(phones))]
        at += length
    if folder and not 0 < len(phones) <= UNLABELLED:
        raise ValueError(f"--labels {folder}: {len(phones)} different phones; needs 1 to 255")
    spoken = torch.tensor(spoken + [UNLABELLED], dtype=torch.uint8)
    return [*phones], torch.tensor(ends + [sum(lengths)]), spoken


def make_parser():
    def strides(text):
        return tuple(positive(int)(s) for s in text.strip("(),").split(","))  # as resume has them
    parser = Parser("audio", PRESETS, description=__doc__)
    parser.uses = ("sample", "reconstruct", "convert")
    parser.free = parser.free | {"labels", "temperature", "test_clips", "to"}
    parser.set_defaults(demo_utterances=900)
    count, rate = positive(int), number(int, "rate", lambda hz: 1000 <= hz <= 384_000)
    for name, kind, text in (
            ("labels", path, "folder of <speaker>/.../<name>.lab; lines: [start] end phone, in s"),
            ("sample-rate", rate, "Hz; files of another rate are resampled"),
            ("strides", strides, "of the encoder (paper 2,2,2,2,2,2); their product is the hop"),
            ("channels", count, "residual channels of the decoder"),
            ("skip-channels", count, "skip channels of the decoder"),
            ("layers", depth, "layers of the decoder"),
            ("cycle", number(int, "integer from 1 to 20", lambda n: 0 < n <= 20),
             "its dilations are 1, 2 .. 2^(CYCLE-1), and again"),
            ("past-dropout", fraction, "share of past samples replaced in training (paper 0)"),
            ("crop", count, "samples of a training example"),
            ("clip", count, "samples of a test clip and of the prior's examples (paper 40,960)"),
            ("test-clips", count, "clips that are reconstructed and converted"),
            ("temperature", positive(float), "of the decoder's samples"),
            ("demo-utterances", count, "utterances of the demo, as long as a clip, at least 1 s"),
            ("sample", count, "draw this many clips from the run in --out"),
            ("reconstruct", path, "a recording through its codes, in voice --to or the likeliest"),
            ("convert", path, "a recording through its codes, in the voice --to"),
            ("to", path, "a speaker of the run in --out, for the three above")):
        parser.add_argument(f"--{name}", type=kind, help=text)
    return parser


# -- Demo data: a source-filter synthesiser. Who speaks, what and when is known exactly ------

# Pitch in Hz, formants relative to an average vocal tract (a short one: above 1), breathiness.
VOICES = {"bass": (92, 0.90, 0.02), "tenor": (128, 1.00, 0.05),
          "alto": (180, 1.10, 0.03), "soprano": (246, 1.18, 0.07)}

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


def demo_data(run):
    """What read_folder returns, of the demo's voices, utterances of at least a second."""
    args, rate = run.args, run.args.sample_rate
    waves, owners, spoken = map(torch.from_numpy, demo_speech(
        args.demo_utterances, args.seed, max(1.0, args.clip / rate), rate))
    order = owners.argsort(stable=True)                # speaker by speaker
    phones, frames = spoken[order].flatten().unique_consecutive(return_counts=True)
    lengths = (owners.bincount(minlength=len(VOICES)) * waves.shape[1]).tolist()
    return (torch.cat([to_levels(x) for x in waves[order]]), lengths, list(VOICES), list(PHONES),
            frames.cumsum(0), phones)


def demo_speech(count, seed=0, seconds=2.0, rate=8000):
    """`count` utterances, voices in turn: waves (count, T) float32 in [-1, 1], speakers (count,)
    int64, and what phone is spoken at each sample, (count, T) uint8 index into PHONES."""
    rng, names = np.random.default_rng(seed), list(PHONES)
    speakers = np.arange(count) % len(VOICES)
    phones = np.zeros((count, int(seconds * rate)), np.uint8)
    for row in phones:
        at = int(rng.uniform(0.05, 0.15) * rate)       # starts with a pause
        while at < len(row) - 0.15 * rate:
            word = WORDS[rng.integers(len(WORDS))]
            for name in [*word] + ["pause"] * (rng.random() < 0.4):
                n = int(PHONES[name][4] / 1000 * rate * rng.uniform(0.75, 1.25))
                row[at:at + n] = names.index(name)
                at += n
        row[len(row) - int(0.05 * rate):] = 0
    return synthesise(phones, speakers, rng, rate), speakers, phones


def synthesise(phones, speakers, rng, rate, frame=8):
    """Phone at each sample (B, T), speakers (B,) -> waves (B, T)."""
    (B, T), fps = phones.shape, rate / frame
    table = np.array([[*f, *w, v, n] for f, w, v, n, _ in PHONES.values()], np.float32)
    pitch, tract, breath = np.array(list(VOICES.values()), np.float32)[speakers].T[..., None]
    # Coarticulation: the tract glides from target to target, for some 60 ms; the voice is faster.
    track = table[phones[:, ::frame]]                  # (B, frames, 8): 1 ms per frame at 8 kHz
    tuning = smooth(track[..., :6], 0.06 * fps) * tract[..., None]
    voiced, hiss = smooth(track[..., 6:], 0.025 * fps).repeat(frame, 1)[:, :T].transpose(2, 0, 1)

    # Source: a saw tooth (glottal pulse and radiation together fall by 6 dB per octave) whose
    # pitch sinks through the utterance and wanders a little, and noise.
    wander = smooth(rng.standard_normal((*track.shape[:2], 1)), 0.25 * fps)[..., 0]
    wander = np.sqrt(0.25 * fps) * wander.repeat(frame, 1)[:, :T]
    step = pitch * (np.linspace(1.05, 0.95, T) + 0.02 * wander) / rate         # cycles per sample
    phase = (np.cumsum(step, 1) + rng.random((B, 1))) % 1
    # Its jump is rounded over two samples, the last and the next one, so that it does not alias.
    after, before = (1 - phase / step).clip(0), (1 - (1 - phase) / step).clip(0)
    saw = 1 - 2 * phase - after ** 2 + before ** 2
    noise = rng.standard_normal((B, T), np.float32)
    source = np.ascontiguousarray((voiced * (saw + breath * noise) + hiss * noise).T, np.float32)

    # A little noise of the room, and the same loudness for all.
    wave = resonate(source, tuning, rate, frame).T
    wave *= 0.09 / np.sqrt((wave ** 2).mean(1, keepdims=True).clip(1e-9))
    return (wave + 5e-4 * noise[::-1]).clip(-1, 1)


def resonate(source, tuning, rate, frame):
    """source (T, B) through resonators: F1-F3 and bandwidths in Hz (B, frames, 6) -> (T, B)."""
    r = np.exp(-np.pi * tuning[..., 3:] / rate)
    b, c = 2 * r * np.cos(2 * np.pi * np.minimum(tuning[..., :3] / rate, 0.47)), -r * r
    resonators = np.ascontiguousarray(np.stack([1 - b - c, b, c]).transpose(2, 3, 0, 1))
    (last, older), wave = np.zeros((2, 3, source.shape[1]), np.float32), np.empty_like(source)
    for t, x in enumerate(source):                     # all utterances take a step together
        for k, (gain, b, c) in enumerate(resonators[t // frame]):
            x = gain * x + b * last[k] + c * older[k]
            older[k], last[k] = last[k], x
        wave[t] = x
    return wave


def smooth(x, width):
    """Mean over some `width` samples around each one, twice: (B, T, C) -> (B, T, C)."""
    x, half = torch.as_tensor(x, dtype=torch.float32).transpose(1, 2), int(width) // 4 + 1
    for _ in range(2):
        x = F.avg_pool1d(F.pad(x, (half, half), "replicate"), 2 * half + 1, 1)
    return x.transpose(1, 2).numpy()


if __name__ == "__main__":
    launch(make_parser(), load_data, main, use)
