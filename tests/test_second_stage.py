"""Section 6 of vqvae.py, and train_image.py --second-stage: an image in 27 bits (sec. 4.2)."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train_image
from conftest import ROOT
from prior import PixelCNN
from test_images import SIGNAL_AT, TINY, checkpoint, main  # noqa: F401 (main is a fixture)
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
                     for sample in (vqvae.decoder.sample, vqvae.decoder.sample_naive))
    assert torch.equal(cached, naive)


def test_codebooks_start_after_the_warm_up_at_outputs_for_k_maps(vqvae):
    codes, book = torch.randint(K, (40, *FIELD)), torch.randn(K, C)
    initialised, start = {}, []

    class Run:
        args, rank, world = train_image.make_parser().parse_args([]), 0, 1
        args.second_steps, args.num_codes, args.batch_size = 4, K, 8

        def fit(self, stage, net, loss, *sizes):
            if net is vqvae:
                start[:] = [net.quantizer.codebook.detach().clone()]
                loss(net.train(), torch.arange(8))
                initialised[stage] = bool(net.eval().quantizer.initialized)

    def vectors(codes):
        return book[codes].permute(0, 3, 1, 2)

    train_image.fit_second(Run(), vqvae, None, None, codes, vectors)
    assert initialised == {"second-autoencoder": False, "second-vqvae": True}, (
        "the warm-up leaves the codebooks out")
    z = vqvae.quantizer.to_vectors(vqvae.encoder(vectors(codes)))      # (3, 40, D)
    distance = (start[0].view(3, K, 1, D) - z.unsqueeze(1)).abs().amax(3)
    assert distance.amin(2).max() < 1e-6, "each code starts where the encoder puts some map"
    assert all(len(set(row.tolist())) == K for row in distance.argmin(2)), (
        "from K maps: with a batch of 8 all others would be copies of these")


# -- the numbers --------------------------------------------------------------------------------


class Oracle:
    """A decoder that knows a constant map if it is told the constant, z (N, 1, 1, 1)."""

    def __call__(self, codes, labels=None, cond=None):
        row = 20.0 * F.one_hot(cond.view(-1).long(), K)
        return row[:, :, None, None].expand(-1, -1, *codes.shape[1:])

    def sample(self, batch, height, width, cond, generator):
        return cond.long().view(-1, 1, 1).expand(batch, height, width)


def test_own_and_other_are_told_their_own_and_anothers_global_code():
    codes = torch.arange(10).view(-1, 1, 1).expand(10, *FIELD)
    bits = train_image.told("a", Oracle(), codes, torch.arange(10.0).view(-1, 1, 1, 1))
    assert bits["a_bits_own"] < 0.01 and bits["a_bits_other"] > 10


def test_other_is_not_the_next_frame_of_the_clip():
    codes = (torch.arange(20) // 5).view(-1, 1, 1).expand(20, *FIELD)  # clips of five equal frames
    z = codes[:, :1, :1].unsqueeze(1).float()
    assert train_image.told("a", Oracle(), codes, z)["a_bits_other"] > 28, (
        "20 nats a code, 28.9 bits, if no image gets the code of a frame of its own clip")


def test_read_out_is_naive_bayes_over_the_three_tables():
    generator = torch.Generator().manual_seed(0)
    three = torch.randint(4, (300, 3), generator=generator)
    values = (three[:, 1] + torch.randint(2, (300,), generator=generator)) % 3
    asked = torch.cartesian_prod(*[torch.arange(4)] * 3)
    got = train_image.read_out(three, values, asked, 4)
    for codes, guess in zip(asked.tolist(), got.tolist()):
        p = []
        for v in range(3):
            of_v = three[values == v]
            p.append(len(of_v) * math.prod(
                ((of_v[:, g] == codes[g]).sum().item() + 1) / (len(of_v) + 4) for g in range(3)))
        assert guess == int(np.argmax(p)), codes


def test_read_out_tells_what_only_one_of_the_three_knows():
    three = torch.randint(8, (400, 3))
    for g in range(3):
        guess = train_image.read_out(three[:300], three[:300, g] // 2, three[300:], 8)
        assert torch.equal(guess, three[300:, g] // 2), f"codebook {g} is not looked at"


# -- figure 5 -----------------------------------------------------------------------------------


def test_each_column_of_figure_5_is_about_the_image_at_its_top(monkeypatch, tmp_path):
    shown = {}
    monkeypatch.setattr(train_image, "picture", lambda path, images, title, **names: shown.update(
        images=images, **names))

    class Fake:
        args, out, device = train_image.make_parser().parse_args([]), tmp_path, "cpu"
        args.num_codes = 512

        def decode(self, codes):                       # an image as bright as its code
            return codes[:, :1, :1].unsqueeze(1).expand(-1, 3, 8, 8)

        def sample(self, batch, height, width, generator):
            return torch.arange(50, 50 + batch).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)

        def lookup(self, three):
            return three[:, :1].float()

    test = torch.arange(20).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    z, fake = torch.arange(20.0).view(-1, 1, 1, 1), Fake()
    fake.quantizer, fake.decoder = fake, Oracle()
    train_image.figure_5(fake, fake, fake, fake, fake, test, z, z + 20)
    images = shown["images"][:, :, 0, 0, 0].tolist()
    assert len(images) == len(shown["names"]) and "27 bits" in shown["names"][1]
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
        patch.setattr(sys, "argv", ["train_image.py", *SECOND, "--out", str(folder / "whole")])
        patch.setattr(train_image, "VQVAE", lambda *args, **kwargs: models.append(
            VQVAE(*args, **kwargs)) or models[-1])
        train_image.main()
    torch.save(models[0].state_dict(), folder / "model after the run.pt")
    flags = [flag for flag in SECOND if flag != "--second-stage"]
    done = python(ROOT / "train_image.py", *flags, "--out", folder / "parts", cwd=folder)
    assert done.returncode == 0, done.stderr
    shutil.copy(folder / "parts" / "checkpoint.pt", folder / "first.pt")
    for more, at in ((["--second-stage"], 3), ([], 0)):
        done = python("-c", SIGNAL_AT, "--resume", *more, "--out", folder / "parts", at, cwd=folder)
        assert done.returncode == (130 if at else 0), done.stderr
    return folder


def stages(path):
    return checkpoint(path)["stages"]


def test_script_writes_figure_and_numbers(runs):
    picture = np.asarray(Image.open(runs / "whole" / "second_stage.png").convert("L"))
    assert picture.std() > 5, "second_stage.png is blank"
    metrics = json.loads((runs / "whole" / "metrics.json").read_text())
    names = [f"second_{k}" for k in (
        "bits_own", "bits_other", "bits_alone", "vae_bits_own", "vae_bits_other", "vae_kl_bits",
        "prior_bits", "codes_used_1", "codes_used_2", "codes_used_3", "read_solid", "chance_solid")]
    assert not [name for name in names if not math.isfinite(metrics[name])]
    assert all(1 <= metrics[f"second_codes_used_{g}"] <= 16 for g in (1, 2, 3))
    readme = (ROOT / "README.md").read_text()
    missing = [name for name in names if f"`{name}`" not in readme]
    assert not missing, f"README does not explain {missing}"


def test_stopped_and_resumed_second_stage_equals_uninterrupted(runs):
    one, two = stages(runs / "whole" / "checkpoint.pt"), stages(runs / "parts" / "checkpoint.pt")
    assert list(one) == list(two), "the same stages in the same order"
    assert [name for name in one if not same(one[name], two[name])] == [], (
        "--second-stage given later, or stopped and resumed, ends with other weights")
    metrics = [json.loads((runs / folder / "metrics.json").read_text())
               for folder in ("whole", "parts")]
    assert {**metrics[0], "seconds": 0} == {**metrics[1], "seconds": 0}
    pictures = [np.asarray(Image.open(runs / folder / "second_stage.png"))
                for folder in ("whole", "parts")]
    assert np.array_equal(*pictures)


def test_first_stage_and_its_codebook_do_not_move_in_the_second(runs):
    before = stages(runs / "first.pt")["vqvae"]["model"]
    after = checkpoint(runs / "model after the run.pt")
    changed = [k for k in before if not same(before[k], after[k])]
    assert not changed, f"the second stage has moved {changed} of the first: its codes have changed"


def test_second_stage_needs_the_codes_of_a_vqvae(main, capsys):  # noqa: F811
    line = stopped(capsys, main, "--second-stage", "--model", "vae")
    assert "--second-stage" in line and "--model vae" in line
