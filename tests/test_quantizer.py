"""Section 1 of vqvae.py: the quantisers, eqs. 1-8. The oracles are loops in numpy."""

import io
import json
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from vqvae import VectorQuantizer, VectorQuantizerEMA, count_codes, perplexity

BOTH = pytest.mark.parametrize("kind", [VectorQuantizer, VectorQuantizerEMA])
FIELDS = pytest.mark.parametrize("field", [(5,), (3, 4), (2, 3, 4)], ids=["1-D", "2-D", "3-D"])
CODEBOOKS = pytest.mark.parametrize("G", [1, 3], ids=["one codebook", "three codebooks"])


def quantizer(kind, K=7, D=3, G=1, **options):
    """A quantiser in float64 whose codebook is random and not waiting for a first batch."""
    vq = kind(K, D, num_codebooks=G, data_init=False, **options).double()
    with torch.no_grad():
        vq.codebook.normal_()
        if kind is VectorQuantizerEMA:
            vq.ema_sum.copy_(vq.codebook)
    return vq


def latents(field, D=3, G=1, B=2):
    return torch.randn(B, G * D, *field, dtype=torch.float64, requires_grad=True)


def vectors(z_e, G=1):
    """(B, G*D, ...) -> (G, N, D), position by position."""
    z_e = z_e.detach().cpu().numpy()
    D = z_e.shape[1] // G
    positions = [(b, *p) for b in range(len(z_e)) for p in np.ndindex(*z_e.shape[2:])]
    return np.array([[z_e[(b, slice(g * D, (g + 1) * D), *p)] for b, *p in positions]
                     for g in range(G)])


def brute_force(z_e, codebook, G=1):
    """Eq. 1 by trying every code for every vector: (G, N)."""
    books = codebook.detach().cpu().numpy().reshape(G, -1, z_e.shape[1] // G)
    return np.array([[((z - book) ** 2).sum(1).argmin() for z in part]
                     for part, book in zip(vectors(z_e, G), books)])


def flat(codes, G=1):
    """codes as the quantiser returns them -> (G, N)."""
    codes = codes.cpu().numpy()
    return np.moveaxis(codes, 1, 0).reshape(G, -1) if G > 1 else codes.reshape(1, -1)


def chosen(vq, z_e):
    """The vectors (G, N, D), the codes (G, N) and the code vectors e_k (G, N, D), all in numpy."""
    G = vq.num_codebooks
    z, k = vectors(z_e, G), brute_force(z_e, vq.codebook, G)
    books = vq.codebook.detach().cpu().numpy().reshape(G, vq.num_codes, -1)
    return z, k, np.array([book[row] for book, row in zip(books, k)])


# -- eqs. 1 and 2 -------------------------------------------------------------------------------


@BOTH
@FIELDS
@CODEBOOKS
def test_eq1_matches_brute_force(kind, field, G, device):
    vq, z_e = quantizer(kind, G=G).to(device), latents(field, G=G).to(device)
    expected = brute_force(z_e, vq.codebook, G)
    assert np.array_equal(flat(vq(z_e).codes, G), expected), (
        "eq. 1: k is the index of the code with the least ||z_e - e_j||, for every position")


def test_search_in_tiles_finds_the_same_codes():
    vq, z_e = quantizer(VectorQuantizer, G=2), latents((3, 7), G=2)
    z = torch.from_numpy(vectors(z_e, 2))              # N = 42: tiles of 16, 16 and 10
    assert np.array_equal(vq.nearest(z, tile=16), brute_force(z_e, vq.codebook, 2)), (
        "the search in blocks of rows must give every row its nearest code, in order")


def test_code_vectors_are_the_channels_of_one_position():
    vq = quantizer(VectorQuantizer, K=9, D=4)
    wanted = torch.randint(9, (4, 4, 4))               # B = D = H = W: a wrong view would fit too
    z_e = torch.empty(4, 4, 4, 4, dtype=torch.float64)
    for b, i, j in np.ndindex(4, 4, 4):
        z_e[b, :, i, j] = vq.codebook[wanted[b, i, j]].detach()
    assert torch.equal(vq(z_e).codes, wanted), (
        "z_e[b, :, i, j] is the vector of position (i, j): move the channels last before you "
        "flatten, a plain view mixes positions")


@BOTH
@FIELDS
@CODEBOOKS
def test_lookup_gives_the_vectors_that_training_gave(kind, field, G):
    vq, z_e = quantizer(kind, G=G).eval(), latents(field, G=G)
    q = vq(z_e)
    assert torch.equal(vq.lookup(q.codes), q.z_q), (
        "lookup(codes) is the decoder's input for sampled codes: it must be the z_q of training")


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_result_does_not_depend_on_the_memory_layout(memory):
    vq, z_e = quantizer(VectorQuantizer), latents((3, 4))
    q = vq(z_e.detach().to(memory_format=memory))
    assert np.array_equal(flat(q.codes), brute_force(z_e, vq.codebook))
    assert q.z_q.is_contiguous(memory_format=memory), "z_q should keep the memory format of z_e"


@FIELDS
def test_shapes_of_codes_with_one_and_with_several_codebooks(field):
    one = quantizer(VectorQuantizer)(latents(field))
    three = quantizer(VectorQuantizer, G=3)(latents(field, G=3))
    assert one.codes.shape == (2, *field) and one.codes.dtype == torch.int64
    assert three.codes.shape == (2, 3, *field) and three.codes.dtype == torch.int64
    assert one.z_q.shape == (2, 3, *field) and three.z_q.shape == (2, 9, *field)
    assert one.loss.shape == three.loss.shape == ()


@BOTH
def test_wrong_channel_count_is_a_value_error(kind):
    with pytest.raises(ValueError, match=r"6.*got \(2, 5, 4\)"):
        kind(8, 3, num_codebooks=2)(torch.zeros(2, 5, 4))


# -- the straight-through estimator -------------------------------------------------------------


@BOTH
def test_straight_through_value_is_exactly_e_k(kind):
    vq = quantizer(kind).float().eval()
    z_e = 1e3 * torch.randn(2, 3, 4, 5)                # z_e + (e_k - z_e) would lose digits here
    q = vq(z_e)
    expected = vq.codebook[q.codes].movedim(-1, 1)
    assert torch.equal(q.z_q, expected), (
        "sec. 3.2: the forward value of z_q is e_k itself, to the last bit")


@BOTH
@FIELDS
@CODEBOOKS
def test_gradient_is_copied_exactly(kind, field, G):
    vq, z_e = quantizer(kind, G=G), latents(field, G=G)
    grad = torch.randn(z_e.shape, dtype=z_e.dtype)
    vq(z_e).z_q.backward(grad)
    assert z_e.grad is not None and torch.equal(z_e.grad, grad), (
        "sec. 3.2: the gradient of z_q is passed unaltered to the encoder")


def test_reconstruction_gradient_never_reaches_the_codebook():
    vq = quantizer(VectorQuantizer)
    z_q = vq(latents((4, 4))).z_q
    z_q.square().sum().backward()
    assert vq.codebook.grad is None or not vq.codebook.grad.any(), (
        "sec. 3.2: 'the embeddings receive no gradients from the reconstruction loss': "
        "detach e_k before it goes to the decoder")


# -- eq. 3 --------------------------------------------------------------------------------------


@FIELDS
@CODEBOOKS
def test_codebook_gradient_is_eq3_term_2(field, G):
    vq, z_e = quantizer(VectorQuantizer, G=G), latents(field, G=G)
    vq(z_e).loss.backward()
    z, k, e = chosen(vq, z_e)
    expected = np.zeros((G, vq.num_codes, vq.code_dim))
    for g, i in np.ndindex(k.shape):                   # d/de_k of ||z - e_k||^2, averaged over N
        expected[g, k[g, i]] += 2 * (e[g, i] - z[g, i]) / k.size
    assert vq.codebook.grad is not None, (
        "eq. 3, term 2 trains nothing: take it between sg[z_e] and e_k, before straight-through")
    assert np.allclose(vq.codebook.grad.numpy(), expected.reshape(-1, vq.code_dim)), (
        "eq. 3, term 2: the gradient of code k is the sum of 2 (e_k - z_e) over the latents that "
        "chose it, divided by N")


@BOTH
@FIELDS
@CODEBOOKS
def test_encoder_gradient_is_eq3_term_3(kind, field, G):
    vq, z_e = quantizer(kind, G=G, beta=0.7), latents(field, G=G)
    z, k, e = chosen(vq, z_e)
    vq(z_e).loss.backward()
    got = vectors(z_e.grad, G)
    assert np.allclose(got, 0.7 * 2 * (z - e) / k.size), (
        "eq. 3, term 3: the encoder's gradient is beta * 2 (z_e - e_k) / N, and nothing of term 2")


def test_beta_scales_the_encoder_gradient_only():
    grads = {}
    for beta in (0.25, 2.0):
        torch.manual_seed(0)
        vq, z_e = quantizer(VectorQuantizer, beta=beta), latents((4, 4))
        vq(z_e).loss.backward()
        grads[beta] = z_e.grad, vq.codebook.grad
    assert torch.allclose(grads[2.0][0], 8 * grads[0.25][0]), (
        "eq. 3: beta weighs term 3, the one that moves the encoder")
    assert torch.equal(grads[2.0][1], grads[0.25][1]), (
        "eq. 3: beta must not weigh term 2, the one that moves the codebook")


@pytest.mark.parametrize("kind, weight", [(VectorQuantizer, 1 + 0.7), (VectorQuantizerEMA, 0.7)])
def test_loss_is_an_average_over_the_latents(kind, weight):
    vq, z_e = quantizer(kind, G=3, beta=0.7), latents((3, 4), G=3)
    z, _, e = chosen(vq, z_e)
    distance = ((z - e) ** 2).sum(-1).mean()           # ||.||^2 of each latent, averaged
    assert vq(z_e).loss.item() == pytest.approx(weight * distance, rel=1e-12), (
        "eq. 3: squared norms (sums over D), averaged over the N latents; terms 2 + 3 with the "
        "loss codebook, term 3 alone with the EMA codebook")


# -- eqs. 6-8 -----------------------------------------------------------------------------------


@CODEBOOKS
def test_ema_matches_eqs_6_to_8_by_hand(G, device):
    gamma, K, D = 0.8, 5, 3
    vq = quantizer(VectorQuantizerEMA, K=K, D=D, G=G, gamma=gamma).to(device)
    count = np.ones((G, K))
    total = vq.codebook.cpu().numpy().reshape(G, K, D).copy()
    for _ in range(5):
        z_e = latents((3, 4), G=G).to(device)
        z, k, _ = chosen(vq, z_e)
        vq(z_e)
        for g, i in np.ndindex(G, K):
            mine = z[g][k[g] == i]
            count[g, i] = count[g, i] * gamma + len(mine) * (1 - gamma)            # eq. 6
            total[g, i] = total[g, i] * gamma + mine.sum(0) * (1 - gamma)          # eq. 7
        got = vq.ema_count.cpu().numpy(), vq.ema_sum.cpu().numpy(), vq.codebook.cpu().numpy()
        assert np.allclose(got[0], count.ravel()), "eq. 6: N_i := gamma N_i + (1 - gamma) n_i"
        assert np.allclose(got[1], total.reshape(-1, D)), (
            "eq. 7: m_i := gamma m_i + (1 - gamma) sum_j z_ij")
        assert np.allclose(got[2], (total / count[..., None]).reshape(-1, D)), (
            "eq. 8: e_i := m_i / N_i")


def test_codes_that_nobody_hits_stay_where_they_are():
    vq = quantizer(VectorQuantizerEMA, K=6, gamma=0.5, restart_after=0).float()
    vq.codebook[3:] += 100                             # out of reach
    vq.ema_sum.copy_(vq.codebook)
    before = vq.codebook.clone()
    for _ in range(300):                               # gamma^300 is 0 in float32
        vq(torch.randn(4, 3, 5))
    assert torch.equal(vq.codebook[3:], before[3:]), (
        "a code that no latent chose must not move: let N_i and m_i start consistently (1 and "
        "e_i) and beware of 0/0 when N_i has faded away")
    assert not torch.equal(vq.codebook[:3], before[:3])


def test_codes_that_nobody_hits_get_no_gradient():
    vq = quantizer(VectorQuantizer, K=6)
    with torch.no_grad():
        vq.codebook[3:] += 100
    vq(latents((4, 4))).loss.backward()
    assert not vq.codebook.grad[3:].any() and vq.codebook.grad[:3].any()


def test_ema_codebook_is_no_parameter():
    vq = VectorQuantizerEMA(8, 4)
    assert not list(vq.parameters()), "the optimiser must not see a codebook that averages move"
    assert {"codebook", "ema_count", "ema_sum"} <= set(vq.state_dict())


@BOTH
def test_eval_mode_changes_nothing(kind):
    for vq in (quantizer(kind).eval(), kind(7, 3).double().eval()):    # the second: no batch yet
        before = {k: v.clone() for k, v in vq.state_dict().items()}
        assert "initialized" in before
        for _ in range(200):                           # and long enough for a code to be dead
            vq(latents((4, 4)))
        after = vq.state_dict()
        changed = [k for k, v in before.items() if not torch.equal(v, after[k])]
        assert not changed, (
            f"in eval mode the quantiser changed its {changed}: only training batches may "
            "initialise a codebook, move a code or count as use")


# -- where the codebook starts ------------------------------------------------------------------


@BOTH
@CODEBOOKS
def test_codebook_is_initialised_from_the_first_batch(kind, G):
    vq = kind(8, 3, num_codebooks=G, gamma=1.0) if kind is VectorQuantizerEMA else kind(
        8, 3, num_codebooks=G)
    z_e = torch.randn(2, 3 * G, 5, 5)
    vq(z_e)
    for book, z in zip(vq.codebook.detach().view(G, 8, 3), torch.from_numpy(vectors(z_e, G))):
        source = torch.cdist(book, z).argmin(1)
        assert torch.allclose(book, z[source]), "each code starts at an encoder output of its slice"
        assert len(set(source.tolist())) == 8, "K different encoder outputs: no code twice"


def test_rare_vectors_get_a_code_too():
    wall = 1e-3 * torch.randn(990, 3)
    edges = 10 * torch.eye(3).repeat(3, 1) + torch.arange(9)[:, None]  # 9 points apart
    vq = VectorQuantizer(12, 3)
    vq(torch.cat([wall, edges]).t().unsqueeze(0))      # (1, 3, 999)
    far = torch.cdist(edges, vq.codebook.detach()).amin(1)
    assert far.max() < 1e-4, (
        "initialise as k-means++ does: of uniform picks nearly all would lie on the wall "
        "that fills most of the picture, and stay unused")


def test_codebook_is_initialised_once():
    vq = VectorQuantizer(8, 3)
    vq(torch.randn(2, 3, 5, 5))
    before = vq.codebook.detach().clone()
    vq(10 + torch.randn(2, 3, 5, 5))
    assert torch.equal(vq.codebook, before), "the second batch initialised the codebook again"


@BOTH
def test_codebook_is_not_initialised_again_after_load(kind):
    trained, file = kind(8, 3), io.BytesIO()
    trained(torch.randn(2, 3, 5, 5))
    torch.save(trained.state_dict(), file)
    file.seek(0)
    loaded = kind(8, 3)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    far = 10 + torch.randn(2, 3, 5, 5)
    loaded(far), trained(far)
    assert torch.equal(loaded.codebook, trained.codebook), (
        "`initialized` must be in the state dict: this codebook was initialised again after it was "
        "loaded, and what it had learned is lost")


@pytest.mark.parametrize("N", [1, 5])
def test_fewer_vectors_than_codes_still_give_different_codes(N):
    vq = VectorQuantizer(16, 3, num_codebooks=2)
    vq(torch.randn(1, 6, N))
    for book in vq.codebook.detach().view(2, 16, 3):
        assert book.isfinite().all()
        assert len(book.unique(dim=0)) == 16, (
            "two equal codes tie for ever: if vectors are fewer than codes, shift the copies a bit")


@BOTH
def test_initialisation_leaves_the_random_numbers_of_others_alone(kind):
    before = torch.get_rng_state()
    z_e, vq = torch.zeros(2, 3, 5, 5), kind(8, 3)
    torch.set_rng_state(before)
    vq(z_e)
    assert torch.equal(torch.get_rng_state(), before), (
        "init_codebook must draw from a generator of its own, so that all processes pick the same "
        "rows")


@BOTH
def test_plain_start_is_uniform_and_ignores_the_first_batch(kind):
    vq = kind(50, 3, data_init=False)
    start = vq.codebook.detach().clone()
    assert start.abs().max() <= 1 / 50 and start.abs().max() > 0.8 / 50
    vq(100 + torch.randn(2, 3, 5, 5))
    assert (vq.codebook == start).all(1).sum() >= 40, "data_init=False: no initialisation"


@BOTH
def test_state_dict_round_trip(kind):
    one, two, file = kind(8, 3), kind(8, 3), io.BytesIO()
    for _ in range(3):
        one(torch.randn(2, 3, 5, 5))
    torch.save(one.state_dict(), file)
    file.seek(0)
    two.load_state_dict(torch.load(file, weights_only=True))
    z_e = torch.randn(2, 3, 5, 5)
    for a, b in zip(one(z_e), two(z_e)):               # in training mode: the statistics count too
        assert torch.equal(a, b)
    for name, value in one.state_dict().items():
        assert torch.is_tensor(value), f"{name}: safetensors and averages of weights want tensors"
        assert torch.equal(value, two.state_dict()[name]), (
            f"{name} differs after one more batch: it did not come through the state dict")


# -- dead codes ---------------------------------------------------------------------------------


def with_dead_codes(kind, K=8, D=3, G=1, dead=(5, 6), restart_after=1):
    """A quantiser with some codes out of reach, and batches (B=2, 4 x 4) for it: 32 latents, so
    that restart_after batches in a row make a code dead."""
    vq = quantizer(kind, K, D, G, restart_after=restart_after)
    with torch.no_grad():
        vq.codebook[list(dead)] += 1000
        if kind is VectorQuantizerEMA:
            vq.ema_sum.copy_(vq.codebook)
    return vq, latents((4, 4), D, G)


@BOTH
@CODEBOOKS
def test_dead_codes_move_to_latents_of_the_batch(kind, G):
    dead = [5, 6] if G == 1 else [1, 9, 10, 23]        # in the first, the second and the third
    vq, z_e = with_dead_codes(kind, G=G, dead=dead)
    vq(z_e)
    z = torch.from_numpy(vectors(z_e, G))              # (G, N, D)
    for row in dead:
        distance = (z[row // 8] - vq.codebook[row]).abs().amax(1)
        assert distance.min() == 0, f"row {row} is dead: it moves to a vector of its own slice"
    assert len(vq.codebook.detach().unique(dim=0)) == 8 * G, "two codes at one place would tie"
    codes = vq.eval()(z_e).codes
    used = count_codes(codes, 8, G)
    assert (used[dead] > 0).all(), "the latent that a code was moved to chooses it"


def batches_until_moved(kind, batch, **options):
    vq, z_e = with_dead_codes(kind, dead=(1, 2), **options)
    for count in range(1, 20):
        vq(batch(z_e))
        if (vq.codebook[1:3] < 500).all():
            return count


@BOTH
def test_a_code_is_dead_after_restart_after_times_k_latents_without_it(kind):
    count = batches_until_moved(kind, lambda z_e: z_e[:1, :, :2, :3], restart_after=2)
    assert count == 3, "6 latents a batch, dead after 2 * K = 16 of them"


@BOTH
def test_a_batch_counts_as_4_k_latents_at_most(kind):
    count = batches_until_moved(kind, lambda z_e: z_e, K=3, restart_after=12)
    assert count == 3, ("12 of the 32 latents of a batch count, dead after 36: what the images of "
                        "one batch do not show is not dead, it is rare")


@BOTH
def test_a_code_in_use_is_never_moved(kind):
    vq, z_e = with_dead_codes(kind, dead=(), restart_after=1)
    with torch.no_grad():
        z = vq.to_vectors(z_e)[0]
        vq.codebook.copy_(z[:8])                       # each chosen at least once, in every batch
    before = vq.codebook.detach().clone()
    for _ in range(20):
        vq(z_e)
        if kind is VectorQuantizerEMA:
            vq.codebook.copy_(before)                  # where eq. 8 would take them is another test
    assert torch.equal(vq.codebook, before) and not vq.unused.any()


@BOTH
@CODEBOOKS
def test_a_lone_dead_code_moves_to_other_places_in_other_batches(kind, G):
    places = set()
    for _ in range(12):                                # the batches differ: latents are random
        vq, z_e = with_dead_codes(kind, G=G, dead=[8 * G - 1])
        vq(z_e)
        z = torch.from_numpy(vectors(z_e, G))[-1]      # (N, D)
        places.add(int((z - vq.codebook[8 * G - 1]).abs().amax(1).argmin()) % 16)
    assert len(places) > 4, (
        f"places {places} in maps of 4 x 4: always the first one would be a corner of an image")


@BOTH
def test_restart_after_0_is_the_papers_rule(kind):
    vq, z_e = with_dead_codes(kind, restart_after=0)
    far = vq.codebook[5:7].clone()
    for _ in range(100):
        vq(z_e)
    assert torch.equal(vq.codebook[5:7], far), "restart_after=0: dead codes stay where they are"


def test_more_dead_codes_than_latents_move_to_different_vectors():
    vq = quantizer(VectorQuantizer, K=50, restart_after=1)
    with torch.no_grad():
        vq.codebook.copy_(1000 + torch.arange(50.0)[:, None])
    for _ in range(12):
        vq(latents((3, 2)))                            # 12 latents for 50 codes
    assert (vq.codebook < 500).all(), "those that found no vector move at the next batch"
    assert len(vq.codebook.detach().unique(dim=0)) == 50, "two codes at one place would tie"


def test_moved_ema_codes_start_with_a_count_of_1_at_their_new_place():
    vq, z_e = with_dead_codes(VectorQuantizerEMA)
    vq(z_e)
    assert vq.ema_count[5:7].tolist() == [1, 1], "N_i starts at 1 again"
    assert torch.equal(vq.ema_sum[5:7], vq.codebook[5:7]), (
        "N_i and m_i of a moved code belong to its new place: otherwise eq. 8 takes it back")


class Waits(TorchDispatchMode):
    """Fails where a GPU would have to finish before Python can go on."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.overloadpacket not in (torch.ops.aten._local_scalar_dense,
                                         torch.ops.aten.nonzero, torch.ops.aten.masked_select), (
            f"{op} needs a number from the device: a GPU would stand still in every step")
        return op(*args, **kwargs or {})


@BOTH
def test_training_never_waits_for_a_gpu(kind):
    vq, z_e = with_dead_codes(kind, G=2, dead=(1, 9, 10))
    adam = torch.optim.SGD([z_e, *vq.parameters()], lr=0.1)
    vq.reset_moments(adam)
    with Waits():
        q = vq(z_e)
        (q.z_q.sum() + q.loss).backward()
    adam.step()
    assert (vq.codebook < 500).all()


@BOTH
def test_restarts_draw_no_random_numbers(kind):
    vq, z_e = with_dead_codes(kind)
    before = torch.get_rng_state()
    vq(z_e)
    assert (vq.codebook < 500).all() and torch.equal(torch.get_rng_state(), before)


def test_adams_moments_of_moved_codes_are_reset():
    vq, z_e = with_dead_codes(VectorQuantizer, restart_after=10)
    adam = torch.optim.Adam(vq.parameters(), lr=0.0)
    vq.reset_moments(adam)

    def step():
        adam.zero_grad()
        (vq(z_e).loss + vq.codebook.sum()).backward()  # a gradient for every code, the dead too
        adam.step()
        return [adam.state[vq.codebook][name] for name in ("exp_avg", "exp_avg_sq")]

    step(), step()
    m, v = step()                                      # the third batch: codes 5 and 6 are moved
    assert m[5:7] == pytest.approx(0.1) and v[5:7] == pytest.approx(0.001), (
        "what Adam remembers of a moved code's gradients belongs to the place it has left")
    others = [k for k in range(8) if k not in (5, 6)]
    assert (v[others].abs() > 0.0011).any(), "the moments of the others stay"
    m, v = step()
    assert (m[5:7].abs() > 0.1001).all(), "reset once, when it is moved, not at every step"


@BOTH
def test_stopped_and_resumed_restarts_equal_uninterrupted(kind):
    def train(vq, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            vq(torch.randn(1, 3, 2, 4) + step / 5)     # drifts: leaves its codes behind
        return vq

    whole = train(kind(16, 3, restart_after=4), 0, 60)
    half, file = train(kind(16, 3, restart_after=4), 0, 33), io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    rest = kind(16, 3, restart_after=4)
    rest.load_state_dict(torch.load(file, weights_only=True))
    rest = train(rest, 33, 60).state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest[name]), f"{name}: how long a code is unused must be saved"


def share_of_a_process(rank, folder, kind):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    vq, z_e = with_dead_codes(kind, K=32, G=2, dead=(1, 5, 33, 34, 63))
    vq(z_e[rank:rank + 1])                               # each process: one of the two examples
    torch.save(vq.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@BOTH
def test_two_processes_move_the_same_codes_to_the_same_vectors_as_one(kind, tmp_path):
    spawn(share_of_a_process, (str(tmp_path), kind), nprocs=2)
    torch.manual_seed(0)
    vq, z_e = with_dead_codes(kind, K=32, G=2, dead=(1, 5, 33, 34, 63))
    vq(z_e)
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"{rank}.pt").items():
            assert torch.allclose(value, vq.state_dict()[name]), (
                f"{name} in process {rank}: use counts over all processes, and all must move the "
                "same codes to the same vectors of the joint batch")


# -- precision ----------------------------------------------------------------------------------


@BOTH
def test_float64_is_float64_all_the_way(kind):
    vq = quantizer(kind, K=10, D=1).eval()
    close = 1 + 1e-6 * torch.arange(10, dtype=torch.float64)   # mixed up in float32
    with torch.no_grad():
        vq.codebook.copy_(close.unsqueeze(1))
    q = vq(close.view(1, 1, 10))
    assert q.codes.tolist() == [list(range(10))]
    assert q.z_q.dtype == q.loss.dtype == torch.float64


def test_search_stays_float32_under_bf16_autocast():
    vq = quantizer(VectorQuantizer, K=256, D=8).float().eval()
    z_e = torch.randn(4, 8, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        codes = vq(z_e).codes
    assert np.array_equal(flat(codes), brute_force(z_e.double(), vq.codebook.double())), (
        "under autocast the search ran in bfloat16, where near neighbours change places")


def test_bf16_latents_keep_their_dtype_and_a_float32_loss():
    vq = quantizer(VectorQuantizer, K=64, D=8).float()
    z_e = torch.randn(2, 8, 5, 5).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        q = vq(z_e)
    q.loss.backward()
    assert q.z_q.dtype == z_e.grad.dtype == torch.bfloat16
    assert q.loss.dtype == vq.codebook.grad.dtype == torch.float32
    assert np.array_equal(flat(q.codes), brute_force(z_e.double(), vq.codebook.double()))


@BOTH
def test_the_loss_of_half_precision_latents_is_that_of_float32(kind):
    vq = quantizer(kind, K=64, D=8).float().eval()
    z_e = torch.randn(16, 8, 32, 32).half()            # squares add up to more than 65,504
    assert vq(z_e).loss.item() == pytest.approx(vq(z_e.float()).loss.item(), rel=1e-3), (
        "a sum in float16 overflows")


# -- code usage ---------------------------------------------------------------------------------


@CODEBOOKS
def test_count_codes_counts_each_codebook_by_itself(G):
    codes = torch.randint(5, (4, G, 3, 3))
    expected = [(codes[:, g] == k).sum().item() for g in range(G) for k in range(5)]
    got = count_codes(codes.squeeze(1) if G == 1 else codes, 5, G)
    assert got.tolist() == expected


def test_perplexity_is_the_number_of_codes_in_equal_use():
    assert perplexity(torch.tensor([3.0, 3, 3, 3, 0, 0])).item() == pytest.approx(4)
    assert perplexity(torch.tensor([0.0, 7, 0])).item() == pytest.approx(1)
    p = np.array([0.5, 0.25, 0.25])
    assert perplexity(torch.tensor([2.0, 1, 1])).item() == pytest.approx(
        np.exp(-(p * np.log(p)).sum())), "perplexity is exp(entropy), with the entropy in nats"


# -- cost ---------------------------------------------------------------------------------------


def one_hot_quantizer(z_e, codebook, count=None, total=None, gamma=0.99, beta=0.25):
    """The textbook version: all distances, one-hot rows, matrix products."""
    z = z_e.movedim(1, -1).reshape(-1, z_e.shape[1])
    distance = z.square().sum(1, keepdim=True) - 2 * z @ codebook.t() + codebook.square().sum(1)
    one_hot = F.one_hot(distance.argmin(1), len(codebook)).to(z.dtype)             # (N, K)
    z_q = (one_hot @ codebook).view(z_e.movedim(1, -1).shape).movedim(-1, 1)
    loss = beta * F.mse_loss(z_e, z_q.detach())
    if count is None:
        loss = loss + F.mse_loss(z_q, z_e.detach())
    else:
        with torch.no_grad():
            count.mul_(gamma).add_(one_hot.sum(0), alpha=1 - gamma)
            total.mul_(gamma).add_(one_hot.t() @ z, alpha=1 - gamma)
            codebook.copy_(total / count.unsqueeze(1))
    return z_e + (z_q - z_e).detach(), loss


def step(forward, z_e):
    z_e.grad = None
    z_q, loss = forward(z_e)
    (z_q.sum() + loss).backward()


@BOTH
def test_quantizer_takes_at_most_0_4_of_the_time_of_a_one_hot_version(kind):
    N, D, K = 32768, 64, 512
    vq = kind(K, D)
    z_e = torch.randn(N // 1024, D, 32, 32, requires_grad=True)
    vq(z_e)                                            # initialise
    codebook = vq.codebook.detach().clone()
    if kind is VectorQuantizer:
        def textbook(z_e, codebook=codebook.requires_grad_()):
            return one_hot_quantizer(z_e, codebook)
    else:
        def textbook(z_e, count=torch.ones(K), total=codebook.clone()):
            return one_hot_quantizer(z_e, codebook, count, total)
    times = {lambda z_e: vq(z_e)[::2]: [], textbook: []}
    for _ in range(5):                                 # in turns, so that a busy machine hits both
        for forward, seconds in times.items():
            begun = time.perf_counter()
            step(forward, z_e)
            seconds.append(time.perf_counter() - begun)
    ours, theirs = map(min, times.values())
    ratio = ours / theirs
    assert ratio <= 0.4, (
        f"{ratio:.2f} of a textbook one-hot quantiser's time: search in tiles that stay in cache, "
        "fetch by index, and sum by index_add_; never build one-hot rows")


@BOTH
def test_no_table_of_all_distances_is_kept(kind, tmp_path):
    N, D, K = 32768, 64, 512                           # the N x K table would be 8 times z_e
    vq = kind(K, D)
    z_e = torch.randn(N // 1024, D, 32, 32, requires_grad=True)
    step(lambda z_e: vq(z_e)[::2], z_e)
    z_e.grad = None
    with torch.profiler.profile(profile_memory=True) as profile:
        step(lambda z_e: vq(z_e)[::2], z_e)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = [e["args"]["Bytes"] for e in sorted(
        (e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])]
    assert changes, "the profiler reported no memory events"
    peak = np.cumsum(changes).max() / (z_e.numel() * 4)
    assert peak <= 5, (
        f"forward and backward held {peak:.1f} times the bytes of z_e: keep no N x K tensor, "
        "neither distances nor one-hot rows")
