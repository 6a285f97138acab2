"""Speech: waveform -> VQ-VAE with a WaveNet decoder -> codes -> prior (sec. 4.3 of the paper).

    python train_audio.py                          demo speech, no download, no GPU: minutes
    python train_audio.py --data wav48/ --preset paper            VCTK's layout, on a GPU:
                                                   one folder of recordings for each speaker
    python train_audio.py --data wav48/ --labels lab/ --preset paper-phonemes
    python train_audio.py --resume                 continue runs/audio, as if never stopped
    python train_audio.py --sample 4               with the finished run: speech from nothing,
    python train_audio.py --reconstruct me.wav     your recording through the codes,
    python train_audio.py --convert me.wav --to alto              and in another voice

The paper's four experiments: (1) reconstruction by sampling the decoder, (2) a prior over the
codes and unconditional speech from it, (3) conversion by another speaker's one-hot, (4) each code
read as its most likely phone. --out (runs/audio) receives *.wav, reconstructions.png (the paper's
fig. 6), samples.png, phones.png, curves.png, metrics.json, log.csv, config.json and checkpoints.
"""

import math
import os
import random
import struct
import wave
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

from prior import WaveNet
from vqvae import (Encoder, Parser, count_codes, digest, fraction, launch, loss_per_latent,
                   make_quantizer, number, path, perplexity, pick_device, plain, positive, prepare,
                   read_run, reading, safe_name, smallest_int, to_unit)

PAPER = dict(steps=500_000, prior_steps=250_000, batch_size=16, lr=2e-4,
             sample_rate=16_000, num_codes=512, code_dim=64, hidden=256, channels=64,
             skip_channels=256, layers=30, cycle=10, past_dropout=0.0, prior_channels=256,
             crop=10_240, clip=40_960, test_clips=10, temperature=0.8)
PRESETS = {
    # 8 kHz -> 62.5 codes of 7 bits a second, 146 times fewer bits than 8-bit speech. The decoder
    # looks back 256 samples, three periods of the deepest voice and less than half a phone: it
    # can keep up the pitch, but what is being said has to come from the codes.
    "demo": dict(steps=3500, prior_steps=200, batch_size=8, lr=4e-3, lr_decay=0.5,
                 codebook="ema", sample_rate=8000, strides=(2,) * 7, num_codes=128,
                 code_dim=8, hidden=64, channels=32, skip_channels=64, layers=8, cycle=8,
                 past_dropout=0.1, prior_channels=64, crop=1024, clip=16_000, test_clips=40,
                 temperature=0.8),
    # "6 strided convolutions with stride 2": 64x, K = 512. Widths, batch and crop are not in the
    # paper; neither are the steps.
    "paper": dict(PAPER, strides=(2,) * 6),
    # "128 times smaller", chunks of 40,960 samples: 320 codes.
    "paper-prior": dict(PAPER, strides=(2,) * 7, experiments=["reconstruction", "prior"]),
    # "a 128-dimensional discrete space that runs at 25 Hz (downsampling factor of 640)".
    "paper-phonemes": dict(PAPER, strides=(2,) * 7 + (5,), num_codes=128,
                           experiments=["reconstruction", "phonemes"]),
}
EXPERIMENTS = ["reconstruction", "prior", "conversion", "phonemes"]
EMPHASIS = 0.85                                        # as in LPCNet (Valin and Skoglund, 2019)
UNLABELLED = 255                                       # stands where no phone is known


def main(run, data):
    """Sec. 4.3: a VQ-VAE of raw speech, and the paper's four experiments with it."""
    vqvae = fit_vqvae(run, data)                       # stage one: the prior is uniform
    codes = encode_all(run, vqvae, data)               # frozen from here on; all speech, once
    prior = fit_prior(run, data, codes)                # stage two, sec. 3.3: p(codes)
    judge = fit_speaker_classifier(run, data)          # neither is a part of the model
    recogniser = fit_phone_recogniser(run, data)
    if run.rank != 0:
        return
    clips = pick_clips(run, data, data.test)
    metrics = rates(run, vqvae, prior, data, codes, clips)

    # Experiments 1 and 3: each clip is decoded in its own voice, column 0, and in others.
    others = few(run, min(8, len(data.speakers))) if judge else 1
    voices = (clips.speaker[:, None] + torch.arange(others)) % len(data.speakers)      # (M, V)
    drawn = decode_clips(run, vqvae, clips, voices)    # (M, V, T)
    save_reconstructions(run, data, clips, voices, drawn)
    if judge:
        metrics |= judge_conversions(run, judge, data, clips, voices, drawn)
    if prior:                                          # experiment 2
        metrics |= sample_unconditional(run, vqvae, prior, data, clips, recogniser)
    if recogniser:                                     # experiment 4
        metrics |= read_phones(run, data, codes)
        metrics |= phone_errors(run, recogniser, data, clips, drawn)
    run.finish(metrics)


# ---------------------------------------------------------------------------------------------
# The model, and its two stages
# ---------------------------------------------------------------------------------------------


class SpeechVQVAE(nn.Module):
    """Encoder (strided convolutions), quantiser, and WaveNet decoder p(x | z_q, speaker).

    x (B, T) uint8 mu-law levels, T a multiple of the product of the strides; speaker (B,) int64.
    """

    def __init__(self, args, speakers):
        super().__init__()
        self.hop = math.prod(args.strides)             # samples that share a code
        self.encoder = Encoder(1, args.hidden, max(1, args.hidden // 2), args.code_dim,
                               args.strides, ndim=1)
        self.quantizer = make_quantizer(args)
        self.past_dropout = args.past_dropout
        # The decoder may look at the codes before and after: all of them are known to it.
        self.context = nn.Sequential(nn.Conv1d(args.code_dim, args.channels, 3, padding=1),
                                     nn.ReLU())
        self.decoder = WaveNet(256, args.channels, args.layers, args.cycle,
                               skip_channels=args.skip_channels, cond_channels=args.channels,
                               num_speakers=speakers)
        # torch's own initialisation loses two thirds of the variance in each convolution: next to
        # nothing of x gets through the encoder, the decoder learns to do without, all codes die.
        for layer in self.modules():
            if isinstance(layer, nn.Conv1d):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        # Levels have an order, which an embedding would have to learn: initialise it, and the
        # logits, as smooth functions of the level (cosines, the fast ones small).
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
        """-log2 p(x | codes, speaker) per sample, teacher-forced: (B,)."""
        return self.nll(x, self.quantizer.lookup(codes.long()), speaker).mean(1) / math.log(2)

    @torch.no_grad()
    def sample(self, codes, speaker, temperature=1.0, generator=None):
        """Draw x ~ p(x | codes, speaker): codes (B, N) -> (B, N * hop) uint8."""
        cond = self.context(self.quantizer.lookup(codes.long()))
        return self.decoder.sample(len(codes), codes.shape[1] * self.hop, cond, speaker,
                                   temperature, generator).to(torch.uint8)


def fit_vqvae(run, data):
    """Stage one. While the VQ-VAE is trained, the prior is "kept constant and uniform"."""
    args, model = run.args, SpeechVQVAE(run.args, len(data.speakers))
    minutes = [sum(length for _, length in part) / data.rate / 60
               for part in (data.train, data.valid, data.test)]
    run.say(f"{len(data.speakers)} speakers, {minutes[0]:.1f} minutes for training, "
            f"{minutes[1]:.1f} for validation, {minutes[2]:.1f} for testing; "
            f"{data.rate / data.hop:g} codes per second; "
            f"{sum(p.numel() for p in model.parameters()):,} parameters in the VQ-VAE, whose "
            f"decoder sees the last {model.decoder.receptive_field} samples")

    def loss(net, x, speaker, start):
        loss, nll, codes = net(x, speaker)
        return loss, {"bits_per_sample": nll.detach().mean() / math.log(2),
                      "codes_used": count_codes(codes, args.num_codes)}

    train, valid = (Windows(data.levels, part, args.crop, max(1, data.hop // 4))
                    for part in (data.train, data.valid))
    return run.fit("vqvae", model, loss, train, args.steps, args.batch_size, args.lr,
                   valid).requires_grad_(False)


def encode_all(run, vqvae, data):
    """The code of every hop of data.levels, zeros where that belongs to no part: (S / hop,)."""
    hop, codes = data.hop, torch.zeros(len(data.levels) // data.hop,
                                       dtype=smallest_int(run.args.num_codes))
    piece = max(1, 2 ** 16 // hop) * hop               # a piece at a time, to bound the memory
    for first, length in data.train + data.valid + data.test:
        for at in range(first, first + length, piece):
            x = data.levels[at:min(at + piece, first + length)]
            codes[at // hop:(at + len(x)) // hop] = vqvae.encode(x[None].to(run.device))[0].cpu()
    return codes


def fit_prior(run, data, codes):
    """Stage two: an autoregressive p(codes), "on chunks of 40960 timesteps"."""
    args, N = run.args, run.args.clip // data.hop
    if "prior" not in args.experiments:
        return None
    train, valid = (Windows(codes, data.in_codes(part), N, 1) for part in (data.train, data.valid))
    return run.fit("prior", make_prior(args, N), prior_loss, train, args.prior_steps,
                   args.batch_size, args.lr, valid).requires_grad_(False)


def make_prior(args, length):
    """A WaveNet whose two cycles of dilations see `length` codes."""
    cycle, C = max(1, math.ceil(math.log2(length / 2))), args.prior_channels
    return WaveNet(args.num_codes, C, 2 * cycle, cycle, skip_channels=2 * C)


def prior_loss(net, codes, *_):
    loss = F.cross_entropy(net(codes.long()), codes.long())            # nats per code
    return loss, {"bits_per_code": loss.detach() / math.log(2)}


# ---------------------------------------------------------------------------------------------
# The experiments, what is measured of them, and their pictures
# ---------------------------------------------------------------------------------------------


class Clips(NamedTuple):
    levels: torch.Tensor   # (M, T) uint8
    speaker: torch.Tensor  # (M,)
    start: torch.Tensor    # (M,) where each one begins in the stream


def pick_clips(run, data, part):
    """--test-clips of a part, evenly spread."""
    windows = Windows(data.levels, part, run.args.clip, run.args.clip)
    count = few(run, min(run.args.test_clips, len(windows)))
    return Clips(*windows[torch.linspace(0, len(windows) - 1, count).long()])


def few(run, n):
    return min(n, 2) if run.rehearsing else n


def in_batches(function, device, size, *tensors):
    """torch.cat of function over CPU tensors, `size` rows at a time on the device."""
    return torch.cat([function(*(x.to(device) for x in part)).cpu()
                      for part in zip(*(x.split(size) for x in tensors))])


def draw(run, vqvae, codes, speaker):
    """Speech for codes (B, N) in the voices (B,): (B, T) uint8."""
    codes = codes[:, :few(run, codes.shape[1])]
    run.say(f"drawing {len(codes)} x {codes.shape[1] * vqvae.hop} samples of speech")
    generator = torch.Generator(run.device).manual_seed(run.args.seed)
    return in_batches(lambda c, s: vqvae.sample(c, s, run.args.temperature, generator),
                      run.device, 256, codes, speaker)


def decode_clips(run, vqvae, clips, voices):
    """Encode each clip and draw it in each of its voices (M, V): (M, V, T).

    "The reconstruction has the same content", and in another voice it should have it still.
    """
    codes = in_batches(vqvae.encode, run.device, 16, clips.levels)
    M, V = voices.shape
    return draw(run, vqvae, codes.repeat_interleave(V, 0), voices.flatten()).view(M, V, -1)


def save_reconstructions(run, data, clips, voices, drawn):
    """The paper's fig. 6, for a clip of each of up to four speakers."""
    rows, files = [], file_names(data.speakers)
    for s in clips.speaker.unique()[:4].tolist():
        i = int((clips.speaker == s).nonzero()[0])
        rows.append([(f"original: {data.speakers[s]}", f"{files[s]}_original",
                      to_wave(clips.levels[i]))])
        for k, x in zip(voices[i].tolist(), to_wave(drawn[i, :2])):
            rows[-1].append((f"decoded as {data.speakers[k]}", f"{files[s]}_as_{files[k]}", x))
    sheet(run.write, "reconstructions", data.rate, rows)


def sample_unconditional(run, vqvae, prior, data, clips, recogniser):
    """Experiment 2, speech from nothing: codes from the prior, then x ~ p(x | codes, speaker).

    "While samples drawn from even the best speech models like the original WaveNet sound like
    babbling, samples from VQ-VAE contain clear words": in the demo's language that is counted.
    """
    N, generator = run.args.clip // data.hop, torch.Generator(run.device)
    codes = prior.sample(len(clips.levels), few(run, N),
                         generator=generator.manual_seed(run.args.seed)).cpu()
    drawn, files = draw(run, vqvae, codes, clips.speaker), file_names(data.speakers)
    of_speaker = {s: i for i, s in enumerate(clips.speaker.tolist())}
    sheet(run.write, "samples", data.rate, [
        [(f"codes from the prior, voice {data.speakers[s]}", f"sample_{files[s]}",
          to_wave(drawn[i]))] for s, i in [*of_speaker.items()][:4]])
    if not recogniser or run.args.data:
        return {}
    return {f"in_words_{name}": share_in_words(recognise(run, recogniser, x), data.phones)
            for name, x in (("real", clips.levels), ("sampled", drawn))}


def read_phones(run, data, codes):
    """Experiment 4: how codes and phones meet on training speech, accuracies on test speech."""
    def aligned(part):  # a code stands for the phone in its middle
        at = data.positions(part)
        return codes[at], data.phone_at(at * data.hop + data.hop // 2)

    table = phone_table(*aligned(data.train), run.args.num_codes, len(data.phones))
    most_likely = torch.zeros_like(table).index_fill_(1, table.sum(0).argmax(), 1)
    phone_picture(run, table, data.phones)
    return {"phone_accuracy": phone_accuracy(table, *aligned(data.test)),
            "phone_baseline": phone_accuracy(most_likely, *aligned(data.test))}


def phone_table(codes, phones, num_codes, num_phones):
    """How often each code meets each phone: (K, phones). Experiment 4 maps a code to its largest
    entry, "the conditionally most likely phoneme"."""
    known, table = phones != UNLABELLED, torch.zeros(num_codes, num_phones)
    return table.index_put_((codes[known].long(), phones[known].long()), torch.ones(()),
                            accumulate=True)


def phone_accuracy(table, codes, phones):
    """Share of the phones with a label that the codes predict."""
    right = table.argmax(1)[codes.long()] == phones
    return right[phones != UNLABELLED].float().mean().item()


def rates(run, vqvae, prior, data, codes, clips):
    """What codes and samples of test speech cost in bits, and how many of the K codes it uses.

    Teacher-forced. If the decoder depends on its codes and on its speaker, those of another
    utterance, or of another voice, cost more.
    """
    z, S = in_batches(vqvae.encode, run.device, 16, clips.levels), len(data.speakers)

    def bits(z, speaker):
        return in_batches(vqvae.bits, run.device, 4, clips.levels, z, speaker).mean().item()

    counts = count_codes(codes[data.positions(data.test)].long(), run.args.num_codes)
    found = {"bits_per_sample": bits(z, clips.speaker),
             "bits_per_sample_other_codes": bits(z.roll(1, 0), clips.speaker),
             "codes_used": int((counts > 0).sum()), "num_codes": run.args.num_codes,
             "perplexity": perplexity(counts).item(),
             "unigram_bits_per_code": perplexity(counts).log2().item()}
    if S > 1:
        found["bits_per_sample_wrong_speaker"] = bits(z, (clips.speaker + 1) % S)
    if prior:
        N = run.args.clip // data.hop
        windows = Windows(codes, data.in_codes(data.test), N, N)
        found["prior_bits_per_code"] = in_batches(
            lambda z: prior_loss(prior, z)[1]["bits_per_code"].expand(len(z)), run.device, 64,
            windows[torch.arange(len(windows))][0]).mean().item()
    return found


def spectrum(x, step):
    """(B, T) -> magnitudes (B, 129, frames) of windows of 256 samples."""
    return torch.stft(x, 256, step, window=torch.hann_window(256, device=x.device),
                      pad_mode="constant", return_complex=True).abs()


def mel(rate, bands=32):
    """Triangular filters, evenly spaced on the mel scale, for `spectrum`: (bands, 129)."""
    top = 2595 * math.log10(1 + rate / 1400)           # of rate / 2
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2) / 2595) - 1)       # Hz
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    f = torch.linspace(0, rate / 2, 129)
    return torch.minimum((f - left) / (middle - left), (right - f) / (right - middle)).clamp(min=0)


def pitch(x, rate):
    """Median pitch in Hz of the voiced frames of each x (B, T) in [-1, 1]: (B,), NaN if none.

    By autocorrelation: a frame is voiced if some delay of 1/400 to 1/60 s repeats it well.
    """
    size, first = rate // 16, rate // 400              # 62 ms: four periods at 64 Hz
    x = F.pad(x, (0, max(0, size - x.shape[1])))
    frames = x.unfold(1, size, size // 4)              # (B, frames, size)
    power = torch.fft.rfft(frames - frames.mean(2, keepdim=True), 2 * size).abs().square()
    r = torch.fft.irfft(power)[..., :size]             # (B, frames, delays)
    peak, delay = r[..., first:rate // 60].max(2)
    voiced = (r[..., 0] > 0.05 * r[..., 0].amax(1, keepdim=True)) & (peak > 0.5 * r[..., 0])
    return torch.where(voiced, rate / (delay + first), math.nan).nanmedian(1).values


class Judge(nn.Sequential):
    """Which phone is spoken, or who speaks, 100 times a second: a small network on the log-mel
    spectrogram, trained on real utterances. It is no part of the model, and judges what is drawn."""

    def __init__(self, outputs, rate, hidden=96):
        super().__init__(nn.Conv1d(32, hidden, 5, padding=2), nn.ReLU(),
                         nn.Conv1d(hidden, hidden, 5, padding=2), nn.ReLU(),
                         nn.Conv1d(hidden, hidden, 5, padding=2), nn.ReLU(),
                         nn.Conv1d(hidden, outputs, 1))
        self.step = rate // 100
        self.register_buffer("filters", mel(rate), persistent=False)

    def forward(self, x):                              # (B, T) levels -> (B, outputs, frames)
        x = to_wave(x)
        if self.training:                              # else hiss would pass for a fricative
            x = x + 0.02 * torch.rand(len(x), 1, device=x.device) ** 2 * torch.randn_like(x)
        return super().forward((self.filters @ spectrum(x, self.step) + 0.03).log())


def fit_judge(run, data, stage, outputs, loss, steps):
    args, net = run.args, Judge(outputs, data.rate)
    train, valid = (Windows(data.levels, part, args.clip, data.hop)
                    for part in (data.train, data.valid))
    return run.fit(stage, net, loss, train, min(args.steps, steps), args.batch_size, 2e-3,
                   valid).requires_grad_(False)


def fit_speaker_classifier(run, data):
    S = len(data.speakers)
    if S == 1 or "conversion" not in run.args.experiments:
        return None
    return fit_judge(run, data, "speakers", S, lambda net, x, speaker, start: (
        F.cross_entropy(net(x).mean(2), speaker), {}), min(3000, 100 + 25 * S))


def fit_phone_recogniser(run, data):
    if not data.phones or "phonemes" not in run.args.experiments:
        return None

    def loss(net, x, speaker, start):
        phones = data.phones_of(start.cpu(), x.shape[1], data.rate // 100)
        return recogniser_loss(net(x), phones.to(x.device))

    return fit_judge(run, data, "phones", len(data.phones), loss, 400)


def recogniser_loss(logits, phones):
    logits, known = logits[..., :phones.shape[1]], phones != UNLABELLED
    nats = F.cross_entropy(logits, phones.long(), ignore_index=UNLABELLED, reduction="sum")
    right = (logits.argmax(1) == phones) & known
    return nats / known.sum().clamp(min=1), {"accuracy": right.sum() / known.sum().clamp(min=1)}


def recognise(run, recogniser, x):
    """(M, T) levels -> the phone of each frame (M, frames)."""
    return in_batches(lambda x: recogniser(x).argmax(1), run.device, 64, x)


def phone_errors(run, recogniser, data, clips, drawn):
    """Share of frames, of those with a label, in which the recogniser finds another phone: in
    originals, in reconstructions and in conversions drawn (M, V, T)."""
    M, V, T = drawn.shape
    spoken = data.phones_of(clips.start, T, recogniser.step)

    def error(x, phones):
        wrong = recognise(run, recogniser, x)[:, :phones.shape[1]] != phones
        return wrong[phones != UNLABELLED].float().mean().item()

    found = {"phone_error_original": error(clips.levels[:, :T], spoken),
             "phone_error_reconstructed": error(drawn[:, 0], spoken)}
    return found if V == 1 else found | {"phone_error_converted": error(
        drawn[:, 1:].flatten(0, 1), spoken.repeat_interleave(V - 1, 0))}


def share_in_words(found, names, shortest=3):
    """The share of the phones found (M, frames) that lie in words of the demo's language, where
    words may follow each other without a pause; a phone lasts `shortest` frames at least."""
    inside = total = 0
    for row in found.tolist():
        said = [names[k] for k, frames in groupby(row) if len([*frames]) >= shortest]
        said = [phone for phone, _ in groupby(said)]
        most = [0]                                     # phones in words, of the first 0, 1, 2 ..
        for end in range(1, len(said) + 1):
            most.append(max([most[-1]] + [most[end - len(word)] + len(word) for word in WORDS
                                          if said[max(0, end - len(word)):end] == [*word]]))
        inside, total = inside + most[-1], total + sum(phone != "pause" for phone in said)
    return inside / max(1, total)


def judge_conversions(run, judge, data, clips, voices, drawn):
    """Is the voice that of the target speaker? drawn (M, V, T) in the voices (M, V), of which
    column 0 is the clip's own."""
    def accuracy(x, speaker):
        found = in_batches(lambda x: judge(x).mean(2).argmax(1), run.device, 64, x)
        return (found == speaker).float().mean().item()

    target, converted = voices[:, 1:].flatten(), drawn[:, 1:].flatten(0, 1)
    got, real = (pitch(to_wave(x), data.rate) for x in (converted, clips.levels))
    typical = torch.stack([real[clips.speaker == s].nanmedian() if (clips.speaker == s).any()
                           else torch.tensor(math.nan) for s in range(len(data.speakers))])
    off = 12 * (got / typical[target]).log2().abs()    # semitones
    return {"real_speaker_accuracy": accuracy(clips.levels, clips.speaker),
            "converted_speaker_accuracy": accuracy(converted, target),
            "converted_pitch_error": off.nanmean().item()}


def sheet(write, name, rate, rows):
    """Waveforms above spectrograms, as the paper's fig. 6, and each as a WAV file: rows of
    (title, file name, x (T,)). write(name, writer) puts a file in its place."""
    for _, file, x in sum(rows, []):
        write(f"{file}.wav", lambda f: write_wav(f, x, rate))
    rows, columns = rows[:8], len(rows[0])
    figure = Figure((4.5 * columns, 3 * len(rows)), layout="constrained")
    axes = figure.subplots(2 * len(rows), columns, squeeze=False,
                           height_ratios=[1, 2.4] * len(rows))
    for i, row in enumerate(rows):
        for (title, _, x), line, image in zip(row, axes[2 * i], axes[2 * i + 1]):
            line.plot(x.numpy(), linewidth=0.3)
            line.set(title=plain(title), xlim=(0, len(x)), ylim=(-1, 1), xticks=[], yticks=[])
            image.imshow((spectrum(x, 64) + 1e-3).log().numpy(), origin="lower", aspect="auto",
                         cmap="magma", vmin=-5, vmax=3.5,
                         extent=(0, len(x) / rate, 0, rate / 2000))
            image.set(ylabel="kHz", xlabel="seconds" if row is rows[-1] else "")
    write(f"{name}.png", lambda f: figure.savefig(f, format="png", dpi=80))


def phone_picture(run, table, phones):
    """p(phone | code), the codes ordered by their most likely phone."""
    table = table[table.sum(1) > 0]
    p = table / table.sum(1, keepdim=True)
    p = p[(p.argmax(1) - p.amax(1)).argsort()]
    figure = Figure((8, 1.5 + 0.22 * len(phones)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(p.t().numpy(), aspect="auto", vmin=0, vmax=1)
    axis.set_yticks(range(len(phones)), map(plain, phones))
    axis.set(xlabel="code in use, sorted", title="p(phone | code) on training data")
    run.write("phones.png", lambda f: figure.savefig(f, format="png", dpi=100))


def file_names(names):
    """A different file name for each."""
    short = [safe_name(name) for name in names]
    return short if len({*short}) == len(short) else [f"{i}_{s}" for i, s in enumerate(short)]


# ---------------------------------------------------------------------------------------------
# A trained model in use
# ---------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """What `load` returns. Waves are float tensors (T,) in [-1, 1] at args.sample_rate."""

    vqvae: nn.Module
    prior: nn.Module       # None if the run had no such experiment
    speakers: list
    args: object
    device: torch.device

    def encode(self, x, rate):
        """A recording (T,) at any rate -> its codes (N,), a code for every hop of samples."""
        return self.vqvae.encode(self.levels(x, rate))[0]

    def decode(self, codes, speaker, temperature=None, generator=None):
        """Codes (N,) or (B, N) -> waves (T,) or (B, T) in the voice of a speaker, or of B of
        them, by name."""
        batch = torch.as_tensor(codes, device=self.device).view(-1, codes.shape[-1])
        names = [speaker] * len(batch) if isinstance(speaker, str) else speaker
        for name in {*names} - {*self.speakers}:
            raise ValueError(f"no speaker {name} in this run, but {', '.join(self.speakers[:20])}")
        who = torch.tensor([self.speakers.index(name) for name in names], device=self.device)
        x = self.vqvae.sample(batch, who, temperature or self.args.temperature, generator)
        return to_wave(x.cpu()).view(*codes.shape[:-1], -1)

    def sample(self, n, speaker=None, seconds=2.0, temperature=None, generator=None):
        """n waves (n, T) from nothing: codes from the prior, in that voice or in all in turn."""
        if self.prior is None:
            raise ValueError("this run has no prior: it was not among its --experiments")
        N = max(1, round(seconds * self.args.sample_rate / self.vqvae.hop))
        names = [speaker or self.speakers[i % len(self.speakers)] for i in range(n)]
        return self.decode(self.prior.sample(n, N, generator=generator), names, temperature,
                           generator)

    def likeliest_voice(self, x, rate):
        """The speaker under whom p(x | codes, speaker) is largest, over the first four seconds."""
        x = self.levels(x[:4 * rate], rate)
        codes = self.vqvae.encode(x)
        return min(self.speakers, key=lambda name: self.vqvae.bits(
            x, codes, torch.tensor([self.speakers.index(name)], device=self.device)).item())

    def levels(self, x, rate):                         # (T,) at `rate` -> (1, N * hop)
        if not len(x):
            raise ValueError("a recording without any sound in it")
        x = torch.from_numpy(resample(np.asarray(x, np.float32), rate, self.args.sample_rate))
        return to_levels(F.pad(x, (0, -len(x) % self.vqvae.hop)))[None].to(self.device)


def load(folder="runs/audio", device="auto"):
    """The models of a finished run, in eval mode; ValueError with one line if it is none."""
    args, facts, _ = read_run(folder, "audio", [])
    stages, device = ["vqvae"] + ["prior"] * ("prior" in args.experiments), pick_device(device)
    _, _, weights = read_run(folder, "audio", stages)
    with reading(folder):
        vqvae = SpeechVQVAE(args, len(facts["speakers"]))
        models = [vqvae, make_prior(args, args.clip // vqvae.hop)][:len(stages)]
        for model, state in zip(models, weights):
            model.load_state_dict(state)
            model.to(device).eval().requires_grad_(False)
    return Trained(*(models + [None])[:2], facts["speakers"], args, device)


def use(args):
    """--sample, --reconstruct, --convert: sounds and a picture from the run in --out."""
    model, rows = load(args.out, args.device), []
    rate, generator = model.args.sample_rate, torch.Generator(model.device).manual_seed(args.seed)
    if args.convert and args.to is None:
        raise ValueError(f"--convert needs --to, one of {', '.join(model.speakers[:20])}")
    if args.sample:
        for i, x in enumerate(model.sample(args.sample, args.to, model.args.clip / rate,
                                           args.temperature, generator)):
            name = args.to or model.speakers[i % len(model.speakers)]
            rows.append([(f"codes from the prior, voice {name}", f"new_{i}", x)])
    for file in map(Path, (args.reconstruct or []) + (args.convert or [])):
        x, old = read_sound(file)
        name = args.to or model.likeliest_voice(x, old)
        print(f"{file}: {len(x) / old:.1f} s, in the voice {name}", flush=True)
        y = model.decode(model.encode(x, old), name, args.temperature, generator)
        rows.append([(f"original: {file.name}", f"{safe_name(file.stem)}_original",
                      to_wave(model.levels(x, old)[0].cpu())),
                     (f"decoded as {name}", f"{safe_name(file.stem)}_as_{safe_name(name)}", y)])

    def write(name, writer):
        with open(Path(args.out, name), "wb") as f:
            writer(f)

    sheet(write, "new", rate, rows)
    print(f"{len(sum(rows, []))} sounds and new.png are in {args.out}")


# ---------------------------------------------------------------------------------------------
# Waveforms: levels, resampling, reading and writing recordings
# ---------------------------------------------------------------------------------------------


def to_levels(x):
    """A recording (T,) in [-1, 1] -> what the model works on, (T,) uint8: high frequencies raised,
    one loudness for all, mu-law.

    Only mu-law is in the paper. Speech falls by some 6 dB per octave, but the noise of mu-law and
    of sampling does not: at high frequencies one hears it. If they are raised before and lowered
    after, the noise falls as speech does.
    """
    y = x - EMPHASIS * F.pad(x, (1, -1))
    power = F.pad(y, (0, -len(y) % 256)).view(-1, 256).square().mean(1)
    loud = power[power >= power.amax() / 100] if len(y) else power     # pauses do not count
    return mu_law(y * 0.12 / loud.mean().sqrt().clamp(min=1e-3))


def to_wave(levels):
    """Levels (..., T) -> float32 (..., T) in [-1, 1], the frequencies as they were."""
    y = inverse_mu_law(levels)
    echo = EMPHASIS ** torch.arange(127, -1, -1, device=y.device).float()
    x = F.conv1d(F.pad(y.reshape(-1, 1, y.shape[-1]), (127, 0)), echo.view(1, 1, -1))
    return (0.3 * x).clamp(-1, 1).view(y.shape)


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
    off at the new rate's half or filled up to it with zeros. Long recordings block by block."""
    M, L = (rate // math.gcd(old, new) for rate in (old, new))         # M samples become L
    if M == L or not len(x):
        return x
    # Blocks of n * M samples, of which an eighth at both ends is thrown away.
    n = 2 ** max(3, math.ceil(math.log2(min(1.5 * len(x) + 8 * M, 2 ** 18) / M)))
    edge, step, length = n // 8, (n - n // 8 * 2) * M, -(-len(x) * L // M)
    x, blocks = np.pad(x, (edge * M, step + edge * M)), []
    for at in range(0, len(x) - n * M + 1, step):
        spectrum = np.fft.rfft(x[at:at + n * M])[:n * L // 2 + 1]
        blocks.append(np.fft.irfft(spectrum, n * L)[edge * L:-edge * L].astype(np.float32))
    return np.concatenate(blocks)[:length] * np.float32(L / M)


def read_sound(path):
    """A WAV or FLAC file -> (T,) float32 in [-1, 1], the mean of all channels, and its rate."""
    if Path(path).suffix.lower() == ".flac":
        try:
            import soundfile
        except (ImportError, OSError):                 # OSError: without its C library
            raise ValueError(f"{path}: FLAC needs pip install soundfile; or convert each file with "
                             "ffmpeg -i in.flac out.wav") from None
        with reading(path):
            x, rate = soundfile.read(path, dtype="float32", always_2d=True)
        x = x.mean(1)
    else:
        x, rate = read_wav(path)
    if not 1000 <= rate <= 384_000:
        raise ValueError(f"{path}: {rate} samples per second; reads 1,000 to 384,000")
    return x, rate


def read_wav(path):
    """PCM of any width -> (T,) float32 in [-1, 1], the mean of all channels, and the rate in Hz."""
    with reading(path):
        data = Path(path).read_bytes()
    at, found = 12, {}                                 # chunks: name, size, content
    while at + 8 <= len(data) and b"data" not in found:
        name, size = struct.unpack_from("<4sI", data, at)
        found[name] = at + 8
        at += 8 + size + size % 2
    fmt = data[found.get(b"fmt ", len(data)):]
    if data[:4] + data[8:12] != b"RIFFWAVE" or b"data" not in found or len(fmt) < 26:
        raise ValueError(f"{path}: not a readable PCM WAV file (its header is incomplete); "
                         "ffmpeg -i in.wav -c:a pcm_s16le out.wav makes one")
    tag, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", fmt)
    # "Extensible" PCM, what 24-bit files usually are: the same samples under another tag.
    tag = struct.unpack_from("<H", fmt, 24)[0] if tag == 0xfffe else tag
    width = frame // max(1, channels)
    if tag != 1 or not 1 <= width <= 4 or width * channels != frame:
        raise ValueError(f"{path}: {channels} channels of {bits} bits, format {tag}; reads PCM "
                         "(format 1) of 8, 16, 24 and 32 bits")
    # Whoever streams does not know the size yet when the header is written: 0 means up to the end.
    first = found[b"data"]
    size = struct.unpack_from("<I", data, first - 4)[0] or len(data)
    raw = np.frombuffer(data, np.uint8)[first:first + size]
    raw = raw[:len(raw) // frame * frame].reshape(-1, channels, width)
    # Little-endian: put the bytes on top of an int32. 8 bits are unsigned, the others signed.
    full = np.zeros((*raw.shape[:2], 4), np.uint8)
    full[..., 4 - width:] = raw ^ 128 if width == 1 else raw
    return full.view("<i4")[..., 0].mean(1, dtype=np.float32) / 2 ** 31, rate


def write_wav(file, x, rate):
    """x (T,) in [-1, 1] as 16 bits."""
    with wave.open(file if hasattr(file, "write") else str(file), "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        out.writeframes((x.clamp(-1, 1) * 32767).round().short().cpu().numpy().tobytes())


# ---------------------------------------------------------------------------------------------
# The data: one stream of speech, of each speaker a stretch for training, validation, testing
# ---------------------------------------------------------------------------------------------


class Speech(NamedTuple):
    """All recordings joined end to end. An utterance's length does not matter then: windows are
    cut anywhere within a stretch (first, length), of which each speaker has one in each part."""

    levels: torch.Tensor  # (S,) uint8, memory-mapped where it comes from files
    train: list
    valid: list
    test: list
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
                "digest": digest(self.levels)}

    def few(self):
        """A little of three speakers."""
        most = self.longest + 2 * self.hop
        return self._replace(**{part: [(first, min(length, most) if speaker < 3 else 0)
                                       for speaker, (first, length) in enumerate(stretches)]
                                for part, stretches in zip(self._fields[1:4], self[1:4])})

    def in_codes(self, part):
        """The same stretches in the stream of codes."""
        return [(first // self.hop, length // self.hop) for first, length in part]

    def positions(self, part):
        """Where the codes of a part are."""
        return torch.cat([torch.arange(first, first + n) for first, n in self.in_codes(part)])

    def phone_at(self, samples):
        return self.spoken[torch.searchsorted(self.ends, samples, right=True)]

    def phones_of(self, start, size, step):
        """The phones at every step-th sample of windows: (B,) -> (B, ceil(size / step))."""
        return self.phone_at(start[:, None] + torch.arange(0, size, step))


class Windows(torch.utils.data.Dataset):
    """Every window of `size`, `step` apart, within stretches (first, length) of a stream:
    windows[index] -> (B, size), the stretch (the speaker) of each (B,), where it starts (B,)."""

    def __init__(self, stream, stretches, size, step):
        self.stream, self.size, self.step = stream, size, step
        self.first, length = torch.tensor(stretches).t()
        self.counts = ((length - size) // step + 1).clamp(min=0)
        self.ends = self.counts.cumsum(0)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index):
        owner = torch.searchsorted(self.ends, index, right=True)
        start = self.first[owner] + (index - self.ends[owner] + self.counts[owner]) * self.step
        return self.stream[start[:, None] + torch.arange(self.size)], owner, start


def load_data(run):
    """The demo's speech or a folder's, cut into training, validation and test stretches."""
    args, hop, at = run.args, math.prod(run.args.strides), 0
    for name in ("crop", "clip"):
        if getattr(args, name) % hop:
            raise ValueError(f"--{name} {getattr(args, name)} is not a multiple of {hop}, the "
                             "product of --strides")
    if args.labels and not args.data:
        raise ValueError("--labels belongs to --data; the demo has labels of its own")
    levels, lengths, names, *labels = (read_folder if args.data else demo_data)(run)
    train, valid, test, longest = [], [], [], max(args.crop, args.clip)
    for name, n in zip(names, lengths):                # the end of each speaker is for testing
        testing, validating = (max(args.clip + hop, n // part) for part in (10, 20))
        needed = testing + validating + longest + 2 * hop
        if n < needed:
            raise ValueError(f"speaker {name}: {n / args.sample_rate:.1f} s of speech, needs "
                             f"{needed / args.sample_rate:.1f} s: one --clip each for testing and "
                             "validation, and one (or one --crop) for training")
        cuts = [-(-(at + n - held) // hop) * hop for held in (n, testing + validating, testing)]
        at += n
        for part, first, last in zip((train, valid, test), cuts, [*cuts[1:], at // hop * hop]):
            part.append((first, last - first))
    return Speech(levels, train, valid, test, names, *labels, args.sample_rate, hop, longest)


def read_folder(run):
    """DIR/<speaker>/**/*.wav -> levels, how many of each speaker, speakers, phones, labels."""
    root, rate, lengths = Path(run.args.data), run.args.sample_rate, Counter()
    files = find_recordings(root)
    random.Random(0).shuffle(files)                    # else the test part would be the last words
    files.sort(key=lambda file: file.relative_to(root).parts[0])
    key = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    levels, sizes = prepare(run, f"recordings in {root}", repr((key, rate, EMPHASIS)),
                            Recordings(files, rate), ())
    for file, size in zip(files, sizes):
        lengths[file.relative_to(root).parts[0]] += size
    run.say(f"{len(files)} recordings of {len(lengths)} speakers, at {rate} Hz (resampled where "
            "they were not)")
    return levels, lengths.values(), [*lengths], *label_stream(run, root, files, sizes)


class Recordings:
    """The files decoded: recordings[i] -> levels (T,)."""

    def __init__(self, files, rate):
        self.files, self.rate = files, rate

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return to_levels(torch.from_numpy(resample(*read_sound(self.files[i]), self.rate))).numpy()


def find_recordings(root):
    """All WAV files below the speakers' folders, or all FLAC files; links are followed."""
    def fail(error):  # os.walk would skip a folder that it may not read
        raise error

    if not root.is_dir():
        raise ValueError(f"--data {root}: no such folder")
    found, seen, top = [], set(), os.path.realpath(root)
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        inside, real = Path(folder).relative_to(root).parts, os.path.realpath(folder)
        if (inside[:1], real) in seen or inside and os.path.commonpath([real, top]) == real:
            folders.clear()                            # a link has led back up
        else:
            found += [Path(folder, name) for name in names]
        seen.add((inside[:1], real))
    for kind in (".wav", ".flac"):
        files = sorted(file for file in found if file.suffix.lower() == kind)
        for loose in (file for file in files if file.parent == root):
            raise ValueError(f"{loose}: lies outside the speakers' folders; needs "
                             f"{root}/<speaker>/*.wav")
        if files:
            return files
    raise ValueError(f"--data {root}: no WAV files; needs a folder of them for each speaker")


def label_stream(run, root, files, lengths):
    """The .lab files of all recordings -> phones' names, and ends and phones as in Speech."""
    names, ends, spoken, missing, at = [], [], [], 0, 0
    rate, folder = run.args.sample_rate, run.args.labels
    for file, length in zip(files, lengths):
        lab = Path(folder, file.relative_to(root).with_suffix(".lab")) if folder else None
        known = lab and lab.exists()
        missing += not known
        for start, end, phone in read_labels(lab, length / rate) if known else ():
            if phone not in names:
                names.append(phone)
            if len(names) > UNLABELLED:
                raise ValueError(f"{lab}: more than {UNLABELLED} different phones")
            ends += [at + round(start * rate), at + min(length, round(end * rate))]
            spoken += [UNLABELLED, names.index(phone)]
        at += length
        ends.append(at)
        spoken.append(UNLABELLED)
    if folder and missing == len(files):
        raise ValueError(f"--labels {folder}: none of the {missing} recordings has any, such as "
                         f"{lab}")
    if folder and missing:
        run.say(f"{missing} of {len(files)} recordings have no .lab file and stay unlabelled")
    return names, torch.tensor(ends), torch.tensor(spoken, dtype=torch.uint8)


def read_labels(lab, seconds):
    """Lines of `end phone` or `start end phone`, in seconds -> (start, end, phone) each."""
    with reading(lab):
        lines = lab.read_text(encoding="utf-8-sig").splitlines()
    found, last = [], 0.0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            *times, phone = line.split()
            start, end = (last, *map(float, times))[-2:]
            if not (len(times) in (1, 2) and last - 1e-3 <= start <= end <= seconds + 0.05):
                raise ValueError
        except ValueError:
            raise ValueError(f"{lab}, line {number}: '{line.strip()}'; needs 'end phone' or 'start "
                             f"end phone', in seconds, in order, and its recording lasts "
                             f"{seconds:.2f} s") from None
        start, last = max(last, start), max(last, end)
        found.append((start, last, phone))
    return found


def strides(text):
    return tuple(positive(int)(s) for s in text.split(","))


def make_parser():
    parser = Parser("audio", PRESETS, description=__doc__)
    parser.uses = ("sample", "reconstruct", "convert")
    parser.free = parser.free | {"labels", "experiments", "temperature", "test_clips", "to"}
    flag = parser.add_argument
    flag("--labels", type=path, metavar="DIR", help="phone alignments of --data: "
         "<speaker>/../<name>.lab with lines 'end phone' or 'start end phone', in seconds")
    flag("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, help="default: all")
    flag("--sample-rate", type=number(int, "rate from 1000 to 384000", lambda hz:
                                      1000 <= hz <= 384_000), help="Hz; files of another rate are resampled")
    flag("--strides", type=strides, help="of the encoder's convolutions (paper 2,2,2,2,2,2); their "
         "product is the hop, the samples that share a code")
    flag("--channels", type=positive(int), help="residual channels of the decoder")
    flag("--skip-channels", type=positive(int), help="skip channels of the decoder")
    flag("--layers", type=positive(int), help="layers of the decoder")
    flag("--cycle", type=positive(int), help="its dilations are 1, 2 .. 2^(CYCLE-1), and again")
    flag("--past-dropout", type=fraction, help="share of the decoder's past samples that are "
         "replaced by random ones in training (paper 0)")
    flag("--crop", type=positive(int), help="samples of a training example")
    flag("--clip", type=positive(int), help="samples of a test clip and of the prior's examples "
         "(paper 40,960)")
    flag("--test-clips", type=positive(int), help="clips that are reconstructed and converted")
    flag("--temperature", type=positive(float), help="of the decoder's samples")
    flag("--demo-utterances", type=positive(int), default=300, help="each as long as a clip; a "
         "tenth for testing, a twentieth for validation")
    flag("--sample", type=positive(int), metavar="N", help="draw N clips from the run in --out")
    flag("--reconstruct", nargs="+", metavar="FILE", help="send recordings through the codes of "
         "the run in --out, in the voice that fits them best")
    flag("--convert", nargs="+", metavar="FILE", help="the same, in the voice --to")
    flag("--to", metavar="SPEAKER", help="a speaker of the run in --out")
    return parser


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


def demo_data(run):
    """What read_folder returns, of the demo's voices, utterances of at least a second."""
    args = run.args
    waves, owners, spoken = map(torch.from_numpy, demo_speech(
        args.demo_utterances, args.seed, max(1.0, args.clip / args.sample_rate),
        args.sample_rate))
    order = owners.argsort(stable=True)                # speaker by speaker
    spoken = spoken[order].flatten()
    last = torch.cat([(spoken[1:] != spoken[:-1]).nonzero()[:, 0], torch.tensor([len(spoken) - 1])])
    lengths = (owners.bincount(minlength=len(VOICES)) * waves.shape[1]).tolist()
    return (torch.cat([to_levels(x) for x in waves[order]]), lengths, list(VOICES), list(PHONES),
            last + 1, spoken[last])


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

    # A little noise of the room, and the same loudness for all.
    wave = resonate(source, tuning, rate, frame).T
    wave *= 0.09 / np.sqrt((wave ** 2).mean(1, keepdims=True).clip(1e-9))
    return (wave + 5e-4 * noise[::-1]).clip(-1, 1)


def resonate(source, tuning, rate, frame):
    """Three resonators in a row: source (T, B); F1-F3 and bandwidths in Hz (B, frames, 6), each
    for `frame` samples -> (T, B)."""
    T, B = source.shape
    r = np.exp(-np.pi * tuning[..., 3:] / rate)
    b = 2 * r * np.cos(2 * np.pi * np.minimum(tuning[..., :3] / rate, 0.47))
    c = -r * r
    resonators = np.ascontiguousarray(np.stack([1 - b - c, b, c]).transpose(2, 3, 0, 1))
    last, older = np.zeros((2, 3, B), np.float32)
    wave = np.empty((T, B), np.float32)
    for t in range(T):                                 # all utterances take a step together
        x = source[t]
        for k, (gain, b, c) in enumerate(resonators[t // frame]):
            x = gain * x + b * last[k] + c * older[k]
            older[k], last[k] = last[k], x
        wave[t] = x
    return wave


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


if __name__ == "__main__":
    launch(make_parser(), load_data, main, use)
