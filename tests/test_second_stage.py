"""Section 6 of vqvae.py, and train_image.py --second-stage: an image in 27 bits (sec. 4.2)."""

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train_image
from conftest import ROOT
from naive import sample_pixelcnn
from prior import PixelCNN
from test_images import SIGNAL_AT, TINY, checkpoint, main, start  # noqa: F401 (main: a fixture)
from test_run import python, same, stopped
from vqvae import VQVAE, GlobalEncoder, GlobalVAE, GlobalVQVAE, VectorQuantizer

K, D, C, FIELD = 16, 4, 6, (4, 5)  # codes, numbers in e_k of the second and the first stage, h x w


def pixelcnn():
    return PixelCNN(K, 8, PixelCNN.layers_for(*FIELD), cond_channels=3 * D)


@pytest.fixture
def vqvae():
    return GlobalVQVAE(VectorQuantizer(K, D, num_codebooks=3), pixelcnn(), C, FIELD, 8, 8)


@pytest.fixture
def maps():
    """Code maps, and the first stage's vectors for them."""
    codes = torch.randint(K, (7, *FIELD))
    return codes, torch.randn(K, C)[codes].permute(0, 3, 1, 2)


# -- the models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [(1, 1), (2, 3), (8, 8), (10, 10), (21, 21), (7, 20)])
def test_global_encoder_sees_every_position_of_any_field(field):
    encoder = GlobalEncoder(C, field, 32, 32, 12).double()
    e = torch.randn(2, C, *field, dtype=torch.double, requires_grad=True)
    out = encoder(e)
    assert out.shape == (2, 12, 1, 1), "one vector for the whole map"
    out[0].sum().backward()
    unseen = (e.grad[0].abs().sum(0) == 0).nonzero().tolist()
    assert not unseen, f"these positions of a field {field} are not looked at: {unseen}"
    assert not e.grad[1].any(), "a map's vector is about that map only"


def test_a_map_becomes_three_codes_and_logits_for_each_of_its_own(vqvae, maps):
    y = vqvae(*maps)
    assert y.codes.shape == (7, 3, 1, 1) and y.out.shape == (7, K, *FIELD)
    assert y.nll.shape == y.rate.shape == (7,) and y.loss.shape == ()
    assert torch.equal(vqvae.eval().encode(maps[1]), vqvae(*maps).codes)
    assert GlobalVAE(3 * D, pixelcnn(), C, FIELD, 8, 8).encode(maps[1])[0].shape == (7, 3 * D, 1, 1)


def test_maps_with_several_codes_a_position():
    codes, e = torch.randint(K, (3, 2, *FIELD)), torch.randn(3, 2 * C, *FIELD)
    decoder = PixelCNN(K, 8, 2, cond_channels=3 * D, num_codebooks=2)
    y = GlobalVQVAE(VectorQuantizer(K, D, num_codebooks=3), decoder, 2 * C, FIELD, 8, 8)(codes, e)
    assert y.codes.shape == (3, 3, 1, 1) and y.out.shape == (3, K, 2, *FIELD)
    nll = F.cross_entropy(y.out, codes, reduction="none").sum((1, 2, 3))
    assert y.nll.shape == (3,) and torch.allclose(y.nll, nll)


def test_three_codes_of_512_cost_27_bits(maps):
    model = GlobalVQVAE(VectorQuantizer(512, D, num_codebooks=3), pixelcnn(), C, FIELD, 8, 8)
    assert torch.allclose(model(*maps).rate / math.log(2), torch.tensor(27.0)), "3 x 9 bits"


def test_each_latent_has_a_codebook_of_its_own(vqvae, maps):
    before = vqvae(*maps).codes                        # and the codebooks start at this batch
    assert vqvae.quantizer.codebook.shape == (3 * K, D), "three embedding spaces of K vectors"
    same_index = vqvae.quantizer.lookup(torch.full((1, 3, 1, 1), 5)).view(3, D)
    assert len(torch.unique(same_index, dim=0)) == 3, "code 5 is another vector in each of them"
    with torch.no_grad():
        vqvae.quantizer.codebook[K:2 * K] = 1e3        # the second one out of reach, but for ..
        vqvae.quantizer.codebook[K + 9] = 0
    after = vqvae.eval()(*maps).codes
    assert (after[:, 1] == 9).all() and torch.equal(after[:, ::2], before[:, ::2]), (
        "the second codebook decides about the second latent, and no other")


def test_gradient_reaches_the_encoder_through_the_pixelcnn(vqvae, maps):
    vae = GlobalVAE(3 * D, pixelcnn(), C, FIELD, 8, 8)
    for model in (vqvae, vae):
        model(*maps).nll.sum().backward()              # the data term alone: no commitment, no KL
        deaf = [name for name, p in model.encoder.named_parameters() if not p.grad.any()]
        assert not deaf, f"{type(model).__name__}: p(codes|z) teaches {deaf} of the encoder nothing"


def test_loss_is_eq_3_for_each_of_the_three_latents(vqvae, maps):
    codes, e = maps
    vqvae(codes, e)                                    # starts the codebooks
    y, q = vqvae(codes, e), vqvae.quantizer(vqvae.encoder(e))
    p = vqvae.decoder(codes, cond=q.z_q).softmax(1).gather(1, codes.unsqueeze(1))
    nll = -p.log().flatten(1).sum(1)
    assert torch.allclose(y.nll, nll, rtol=1e-4)
    assert torch.allclose(y.loss, nll.mean() / 3 + q.loss, rtol=1e-4)


def test_vae_bound_is_nll_plus_kl(maps):
    codes, e = maps
    vae = GlobalVAE(3 * D, pixelcnn(), C, FIELD, 8, 8)
    y = vae(codes, e)
    mean, log_var = vae.encoder(e).flatten(1).chunk(2, 1)
    q = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(y.rate, kl, rtol=1e-4)
    assert torch.allclose(y.loss, (y.nll + kl).mean(), rtol=1e-4)
    z = torch.stack([vae.encode(e)[0].flatten(1) for _ in range(2000)])
    assert torch.allclose(z.mean(0), mean, atol=0.15) and torch.allclose(
        z.std(0), (0.5 * log_var).exp(), atol=0.1), "z is drawn from q(z|x)"


def test_sampling_honours_the_global_code(vqvae):
    z = vqvae.quantizer.lookup(torch.tensor([[1, 2, 3], [1, 9, 3]]).view(2, 3, 1, 1)) * 100
    with torch.no_grad():
        vqvae.decoder.head.weight *= 100               # untrained logits are all about the same

    def sample(z):
        return vqvae.decoder.sample(8, *FIELD, cond=z.expand(8, -1, 1, 1),
                                    generator=torch.Generator().manual_seed(0))

    assert not torch.equal(sample(z[:1]), sample(z[1:])), (
        "two global codes, the same random numbers, the same maps: the decoder ignores its z")
    for layer in vqvae.decoder.layers:
        torch.nn.init.zeros_(layer.cond.weight)
    assert torch.equal(sample(z[:1]), sample(z[1:])), "without z nothing else may tell them apart"


def test_cached_sampling_given_a_global_code_equals_naive(vqvae):
    z = vqvae.quantizer.lookup(torch.tensor([[1, 2, 3], [1, 9, 3]]).view(2, 3, 1, 1)) * 100
    vqvae.decoder.head.weight.data *= 100              # sure of itself: small errors change codes
    cached, naive = (sample(2, *FIELD, cond=z, generator=torch.Generator().manual_seed(0))
                     for sample in (vqvae.decoder.sample, partial(sample_pixelcnn, vqvae.decoder)))
    assert torch.equal(cached, naive)


# -- the numbers --------------------------------------------------------------------------------


class Oracle:
    """A decoder that knows a constant map if it is told the constant, z (N, 1, 1, 1)."""

    def __call__(self, codes, labels=None, cond=None):
        row = 20.0 * F.one_hot(cond.view(-1).long(), K)
        return row[:, :, None, None].expand(-1, -1, *codes.shape[1:])

    def sample(self, batch, height, width, cond, generator, **_):
        return cond.long().view(-1, 1, 1).expand(batch, height, width)


def test_own_and_other_are_told_their_own_and_anothers_global_code():
    codes = torch.arange(10).view(-1, 1, 1).expand(10, *FIELD)
    bits = train_image.conditional_bits("a", Oracle(), codes, torch.arange(10.0).view(-1, 1, 1, 1),
                                        6.0)
    assert bits["a_bits_own"] < 0.01 and bits["a_bits_other"] > 10


def test_other_is_not_the_next_frame_of_the_clip():
    codes = (torch.arange(20) // 5).view(-1, 1, 1).expand(20, *FIELD)  # clips of five equal frames
    z = codes[:, :1, :1].unsqueeze(1).float()
    assert train_image.conditional_bits("a", Oracle(), codes, z, 6.0)["a_bits_other"] > 28, (
        "20 nats a code, 28.9 bits, if no image gets the code of a frame of its own clip")


# -- figure 5 -----------------------------------------------------------------------------------


def test_each_column_of_figure_5_is_about_the_image_at_its_top():
    shown = {}

    class Fake:
        args, device, rank, rehearsing = train_image.make_parser().parse_args([]), "cpu", 0, False
        args.num_codes = 512

        def picture(self, name, images, title, columns=(), rows=()):
            shown.update(images=images, rows=rows)

        def decode(self, codes):                       # an image as bright as its code
            return codes[:, :1, :1].unsqueeze(1).expand(-1, 3, 8, 8)

        def sample(self, batch, height, width, generator):
            return torch.arange(50, 50 + batch).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)

        def lookup(self, three):
            return three[:, :1].float()

    images = torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 3)
    data = SimpleNamespace(test=train_image.Images(images, torch.arange(20)),
                           facts={"size": [8, 8, 3]})
    z, fake = torch.arange(20.0).view(-1, 1, 1, 1), Fake()
    fake.quantizer, fake.decoder = fake, Oracle()
    train_image.draw_figure_5(fake, fake, fake, fake, fake, data, z, z + 20)
    images = shown["images"][:, :, 0, 0, 0].tolist()
    assert len(images) == len(shown["rows"]) and "27 bits" in shown["rows"][1]
    assert images[1:5] == [images[0]] * 4, "several samples given the code of the image above them"
    assert images[5] == [i + 20 for i in images[0]], "the VAE's given its z"
    assert images[6:] == [list(range(50, 58))] * 2, "samples from the prior of the three codes"


# -- the whole run ------------------------------------------------------------------------------

SECOND = [*TINY, "--size", "16", "--lr-decay", "0.5", "--second-stage", "--second-steps", "4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run as it is, in this process: whole/. One without a second stage (first.pt), then
    resumed with it, stopped by Ctrl-C in the second VQ-VAE and ended, a process each: parts/."""
    folder = tmp_path_factory.mktemp("runs")
    models = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_image, "VQVAE", lambda *args, **kwargs: models.append(
            VQVAE(*args, **kwargs)) or models[-1])     # one for the rehearsal, one for the run
        start(patch, *SECOND, "--out", folder / "whole")
    torch.save(models[-1].state_dict(), folder / "model after the run.pt")
    flags = [flag for flag in SECOND if flag != "--second-stage"]
    done = python(ROOT / "train_image.py", *flags, "--out", folder / "parts", cwd=folder)
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "parts", folder / "first")
    for more, at in ((["--second-stage"], 3), ([], 0)):
        done = python("-c", SIGNAL_AT, "--resume", *more, "--out", folder / "parts", at, cwd=folder)
        assert done.returncode == (130 if at else 0), done.stderr
    return folder


def test_script_writes_figure_and_numbers(runs):
    picture = np.asarray(Image.open(runs / "whole" / "second_stage.png").convert("L"))
    assert picture.std() > 5, "second_stage.png is blank"
    metrics = json.loads((runs / "whole" / "metrics.json").read_text())
    names = [f"second_{k}" for k in (
        "bits_own", "bits_other", "bits_alone", "vae_bits_own", "vae_bits_other", "vae_kl_bits",
        "prior_bits", "bits_total", "vae_bits_total", "codes_used_1", "codes_used_2",
        "codes_used_3")]
    assert not [name for name in names if not math.isfinite(metrics[name])]
    assert all(1 <= metrics[f"second_codes_used_{g}"] <= 16 for g in (1, 2, 3))
    assert metrics["second_bits_total"] == pytest.approx(
        metrics["second_bits_own"] + 3 * math.log2(16) / 16), (
        "the latents cost 12 bits for the 16 codes of a map: without them it is no code length")
    assert metrics["second_vae_bits_total"] == pytest.approx(
        metrics["second_vae_bits_own"] + metrics["second_vae_kl_bits"] / 16)


def test_stopped_and_resumed_second_stage_equals_uninterrupted(runs):
    names = [{p.name for p in (runs / folder).glob("checkpoint-*.pt")}
             for folder in ("whole", "parts")]
    assert names[0] == names[1] and len(names[0]) == 7, "the same stages"
    changed = [name for name in names[0] if not same(*(
        {k: v for k, v in torch.load(runs / folder / name, weights_only=True).items()
         if k in ("model", "optimizer", "best", "step")} for folder in ("whole", "parts")))]
    assert changed == [], "--second-stage given later, or stopped and resumed: other weights"
    metrics = [json.loads((runs / folder / "metrics.json").read_text())
               for folder in ("whole", "parts")]
    assert {**metrics[0], "seconds": 0} == {**metrics[1], "seconds": 0}
    pictures = [np.asarray(Image.open(runs / folder / "second_stage.png"))
                for folder in ("whole", "parts")]
    assert np.array_equal(*pictures)


def test_first_stage_and_its_codebook_do_not_move_in_the_second(runs):
    before = checkpoint(runs / "first", "vqvae")
    before = before["best"]["model"] if before["best"] else before["model"]
    after = torch.load(runs / "model after the run.pt", weights_only=True)
    changed = [k for k in before if not same(before[k], after[k])]
    assert not changed, f"the second stage has moved {changed} of the first: its codes have changed"


def test_second_stage_needs_the_codes_of_a_vqvae(main, capsys):  # noqa: F811
    line = stopped(capsys, main, "--second-stage", "--model", "vae")
    assert "--second-stage" in line and "--model vae" in line
