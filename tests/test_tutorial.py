"""tutorial.ipynb: its cells run, compute what its prose says, and point at tests that exist."""

import ast
import base64
import io
import math
import re
import wave
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

from conftest import unwritten  # noqa: E402

ROOT = Path(__file__).parent.parent
PATH = ROOT / "tutorial.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
CELLS = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
PROSE = "\n\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
SOURCE = "\n\n".join(cell.source for cell in CELLS)
PRINTED = "".join(output.text for cell in CELLS for output in cell.outputs
                  if output.output_type == "stream")
PARTS = re.split(r"^## (?=\d+\. )", PROSE, flags=re.M)[1:]
MODULES = ["vqvae.py", "prior.py", "train_image.py", "train_audio.py", "train_video.py"]
EQUATIONS = range(1, 9)


@pytest.fixture(scope="module")
def ran():
    """The notebook's variables after all its cells, in the QUICK setting: hardly trained.

    A later part may use a name of an earlier one again, so each part's are kept apart."""
    space, parts, part = {"__name__": "__main__"}, {}, 0
    with pytest.MonkeyPatch.context() as patch, plt.rc_context():
        patch.setenv("VQVAE_QUICK", "1")
        for number, cell in enumerate(NOTEBOOK.cells):
            if cell.cell_type == "markdown":
                heads = re.findall(r"^## (\d+)\. ", cell.source, re.M)
                part = int(heads[-1]) if heads else part
                continue
            exec(compile(cell.source, f"tutorial.ipynb, cell {number}", "exec"), space)
            parts[part] = dict(space)
            plt.close("all")
    return parts


# -- what the cells compute -----------------------------------------------------------------------


def test_the_rate_of_the_vqvae_is_log_k_and_that_of_a_vae_its_kl(ran):
    x = ran[1]["textures"](20)[0]
    for name, model in ran[1]["models"].items():
        z, _, rate = model.latent(x)
        assert z.shape == (20, 2, 1, 1), name
        if model.bottleneck == "codes":
            assert torch.allclose(rate, torch.tensor(math.log(16)))
            assert len(z.detach().flatten(1).unique(dim=0)) <= 16
        elif model.bottleneck == "gaussian":
            assert rate.shape == (20,) and (rate >= 0).all()


def test_the_entropy_of_the_textures_is_what_a_model_that_has_them_all_would_pay(ran):
    # -log2 of 1/8 sum_k prod_pixels p(pixel | texture k), for images of the generator.
    torch.manual_seed(0)
    x, _ = ran[1]["textures"](4000)
    wrong = (x[:, None] != ran[1]["clean_texture"](torch.arange(8))).sum((2, 3)).double()
    log_p = (wrong * math.log(0.05) + (64 - wrong) * math.log(0.95)).logsumexp(1) - math.log(8)
    assert -log_p.mean() / math.log(2) == pytest.approx(ran[1]["entropy"], abs=0.3)


def test_a_vector_is_not_what_lies_next_to_each_other_in_memory(ran):
    right, wrong = ran[2]["errors"].values()
    assert right < 0.5 * wrong


def test_the_copied_gradient_points_from_the_code_to_the_star(ran):
    to_star = ran[3]["star"] - ran[3]["e_k"]
    cosine = torch.cosine_similarity(-ran[3]["at_encoder"], to_star, dim=1)
    assert torch.allclose(cosine, torch.ones(4), atol=1e-5)


def test_every_term_of_eq_3_reaches_what_the_paper_says(ran):
    assert ran[4]["reached"] == {"encoder": [True, False, True], "codebook": [False, True, False],
                                 "decoder": [True, False, False]}


def test_the_answer_to_exercise_4_3_has_the_right_sign(ran):
    # (sg[z_e] - z_q)^2 with the straight-through z_q: descent moves z_e away from its code.
    vq = ran[0]["VectorQuantizer"](3, 2, data_init=False)
    z_e = torch.randn(5, 2, requires_grad=True)
    q = vq(z_e)
    (z_e.detach() - q.z_q).square().sum().backward()
    moved = z_e - 0.1 * z_e.grad
    e = vq.lookup(q.codes)
    assert ((moved - e).norm(dim=1) > (z_e - e).norm(dim=1)).all()
    assert vq.codebook.grad is None


def test_each_term_of_eq_3_can_be_switched_off_alone(ran):
    assert list(ran[4]["FITS"]) == ["eq. 3", "no data term", "no codebook term", "no commitment"]
    start = ran[4]["fit"](codebook=0)[0]["vq"].codebook
    assert start.abs().max() <= 1 / 16, "without term 2 nothing moves the codebook"
    assert ran[4]["FITS"]["eq. 3"][0]["vq"].codebook.abs().max() > 1 / 16


def test_more_bits_leave_less_distortion_but_never_less_than_shannon_allows(ran):
    for D in ("vector", "scalar"):
        errors, bits = ran[5][f"errors_{D}"], ran[5][f"bits_{D}"]
        assert all(a > b for a, b in zip(errors, errors[1:]))
        assert all(error > 2.0 ** (-2 * rate) for error, rate in zip(errors, bits))


def test_the_bound_holds_in_the_enumerated_model_and_starts_log_16_too_low(ran):
    # The same sum over z by its definition, one decoder run at a time.
    model, x = ran[5]["model"].eval(), ran[5]["halves"](1)
    with torch.no_grad():
        terms = [-model.likelihood.nll(model.decoder(model.quantizer.lookup(z[None])), x).item()
                 - 2 * math.log(4) for z in ran[5]["every_z"]]
    assert len({tuple(z.flatten().tolist()) for z in ran[5]["every_z"]}) == 16
    assert ran[5]["log_joints"](model, x)[0].tolist() == pytest.approx(terms, rel=1e-5)
    gaps = ran[5]["gaps"]
    assert gaps.min() > -1e-2, "log p(x) is a sum of 16 positive terms, the bound one of them"
    assert gaps[0].mean() == pytest.approx(math.log(16), abs=0.1), (
        "a decoder that does not use z yet gives all 16 the same weight")


def test_the_ema_codebook_of_eqs_6_to_8_minimises_eq_5_as_lloyd_does(ran):
    points, lloyd = ran[6]["points"], ran[6]["start"].clone()
    for _ in range(40):
        lloyd = ran[6]["lloyd_by_hand"](lloyd, points)
    ema = ran[6]["quantiser"](0.95)
    for _ in range(15):
        for batch in points.split(100):
            ema(batch)
    of_lloyd, of_ema = ran[6]["distortion"](lloyd), ran[6]["distortion"](ema.codebook)
    assert of_ema < 1.05 * of_lloyd
    assert of_lloyd < 0.5 * ran[6]["distortion"](ran[6]["start"])
    # Eq. 4 for the points at their nearest codes is eq. 5; at its minimum its gradient is 0.
    e = lloyd.clone().requires_grad_()
    (points - e[torch.cdist(points, lloyd).argmin(1)]).square().sum(1).mean().backward()
    assert e.grad.abs().max() < 1e-3, "the mean of what chose it is where the gradient is 0"


def test_the_unrolled_weights_of_eqs_6_and_7_sum_to_1_minus_what_is_left_of_the_start(ran):
    weights = ran[6]["weights"]
    assert weights.sum() + ran[6]["rest"] == pytest.approx(1)
    assert (weights[1:] > weights[:-1]).all(), "newer batches weigh more"


def test_a_codebook_that_starts_on_data_or_restarts_dead_codes_uses_more_codes(ran):
    for kind in ("VectorQuantizer", "VectorQuantizerEMA"):
        uniform, first = (ran[7]["used"][kind, start][1][-1]
                          for start in ("uniform", "first batch"))
        assert first > uniform, kind


def test_vimco_has_the_mean_of_reinforce_and_less_variance(ran):
    for S in range(2, 7):
        plain, baseline, ours = (values[S] for values in ran[8]["variance"].values())
        assert ours < baseline * (1 + 1e-9) < 0.05 * plain, f"S = {S}"
    means = [ran[8]["moments"](estimator, 3)[0] for estimator in ran[8]["ESTIMATORS"].values()]
    assert torch.allclose(means[0], means[1]) and torch.allclose(means[0], means[2])


def test_masked_convolutions_have_a_blind_spot_and_the_pixelcnn_has_none(ran):
    earlier = ran[9]["earlier"]
    shallow, deep, ours = ran[9]["seen"].values()
    assert (earlier & ~deep).sum() > 0 and not (deep & ~earlier).any()
    assert torch.equal(ours, earlier)
    assert ((~deep & earlier) <= (~shallow & earlier)).all(), "depth does not hide what was seen"


def test_the_cone_is_what_the_network_sees(ran):
    reached = ran[10]["reached"][0]
    assert len(reached) == 16 == 2 ** len(ran[10]["dilations"])
    assert ran[10]["depends_on"].tolist() == list(range(19, 50))
    assert len(ran[10]["depends_on"]) == 31


def test_sounds_are_wav_files_that_a_browser_plays(ran):
    page = ran[0]["Sounds"]({"a": torch.linspace(-1, 1, 800)})._repr_html_()
    data = base64.b64decode(re.search(r'base64,([^"]+)"', page)[1])
    with wave.open(io.BytesIO(data)) as file:
        assert file.getparams()[:4] == (1, 2, 8000, 800)


def test_end_to_end_models_draw_codes_that_they_can_decode(ran):
    assert ran[11]["sampled"].shape == (8, 8, 8)
    assert ran[11]["on_its_way"].shape == (65, 3, 32, 32)
    assert ran[11]["three"].shape == (200, 3, 1, 1)
    assert ran[11]["drawn"].dtype == torch.uint8 and ran[11]["drawn"].shape[1] % 128 == 0
    codes = ran[11]["speech_codes"][:ran[11]["utterances"]]
    assert ran[11]["table"].sum() == codes.numel(), "every code of training speech meets one phone"


def test_imagined_frames_are_compared_with_what_would_really_be_seen(ran):
    clip = ran[11]["walks"]
    imagined, codec, true = ran[11]["imagine"](clip, 1, count=2)
    assert imagined.shape == codec.shape == true.shape == (4, 3, 24, 48)
    assert torch.equal(imagined[:2], codec[:2]), "both rows begin with the frames that were given"
    # Recorded actions, rendered again, are the recorded frames.
    world, poses, actions = (ran[11][name] for name in ("world", "poses", "actions"))
    path = world.walk(poses[:3, 0], np.asarray(actions[:3]))
    assert torch.equal(torch.as_tensor(world.render(path, 24)), ran[11]["films"][:3])


def test_fsq_and_lfq_number_every_combination(ran):
    with torch.no_grad():
        for quantiser, K in ((ran[12]["FSQ"](8), 125), (ran[12]["LFQ"](8), 128)):
            q = quantiser(20 * torch.randn(64, 8, 16, 16))
            assert quantiser.num_codes == K and 0 <= q.codes.min() and q.codes.max() < K
            values = q.z_q.movedim(1, -1).flatten(0, -2)
            for k in q.codes.unique()[:20]:            # equal codes, equal vectors
                chosen = values[q.codes.flatten() == k]
                assert torch.allclose(chosen, chosen[:1].expand_as(chosen), atol=1e-4)


def test_the_rotation_trick_turns_the_gradient_with_z_e(ran):
    # z_q = c R z with R orthogonal: the gradient at z is c R^T g, of length c |g|.
    vq = ran[12]["RotationVQ"](10, 4).eval()
    z = torch.randn(50, 4, requires_grad=True)
    q, g = vq(z), torch.randn(50, 4)
    q.z_q.backward(g)
    stretch = vq.lookup(q.codes).norm(dim=1) / z.norm(dim=1)
    assert torch.allclose(z.grad.norm(dim=1), stretch * g.norm(dim=1), rtol=1e-4)


# -- the notebook as it is stored: what its prose says, its cells have shown ----------------------


def numbers(line):
    """The numbers in the stored lines that this pattern begins; a list for each such line."""
    rests = re.findall(f"^{line}(.*)$", PRINTED, re.M)
    assert rests, f"no cell has printed a line '{line} ..'"
    return [[float(n) for n in re.findall(r"-?\d+\.?\d*", rest)] for rest in rests]


# Decimals of the prose that no cell prints: derived in the text, read from a picture (3.5, 0.75),
# or the answer to an exercise.
DERIVED = {"1.44", "0.2864", "18.33", "22.2", "2.72", "4.35", "2.43", "62.5", "3.5", "0.75"}


def test_decimals_in_the_prose_are_printed_by_a_cell_or_stand_in_readme():
    prose = re.sub(r"\]\([^)]*\)|\[arXiv[^]]*\]", "", PROSE)            # no addresses
    quoted = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", prose))
    known = PRINTED + SOURCE + (ROOT / "README.md").read_text()
    missing = {n for n in quoted - DERIVED if not re.search(rf"(?<![\d.]){n}(?!\d)", known)}
    assert not missing, f"run the notebook again, or mend its text: {sorted(missing)}"


def test_stored_vae_has_collapsed_and_the_vqvae_has_not():
    _, kl, total, wrong = numbers(r"VAE, PixelCNN decoder   ")[0]
    entropy, = numbers("entropy of the data")[0]
    assert kl < 0.2 and abs(wrong) < 0.5, "bits: its z carries nothing, and no z is missed"
    assert total < entropy + 0.5, "collapse is nearly optimal for the bound"
    (_, free_kl, free_total, _), = numbers("the same, z free until step 240")
    assert 0.2 < free_kl < 1 and free_total > total, "what is left of z does not pay"
    nll, rate, vq_total, wrong = numbers(r"VQ-VAE, PixelCNN decoder   ")[0]
    assert rate == 4 and wrong > 3 and nll < 18.33 + 0.5, "log2 16 bits, and the decoder uses them"
    assert entropy + 0.8 < vq_total < entropy + 1.7, "a fee of 4 bits where 3 would do"
    (_, kl, _, wrong), = numbers(r"VAE   ")
    assert 3 < kl < 4 and wrong > 3, "the same VAE without a powerful decoder uses its z"
    (_, before, after, end), = numbers("KL of the fourth: at step")
    assert before > 24 and after < 2 and end < 1, "collapse as it happens"
    (vae, *_), = numbers(r"VAE, PixelCNN decoder\s+draws")
    (vq, *_), = numbers(r"VQ-VAE, PixelCNN decoder\s+draws")
    assert vae < 25 and vq > 80


def test_stored_walk_alternates_between_two_codes_at_last():
    codes = re.search(r"^its codes: (\d+)$", PRINTED, re.M)[1]
    assert codes[0] == "0" and len(set(codes[-15:])) == 2


def test_stored_runs_show_what_each_term_of_eq_3_is_for():
    (error, used, apart, size), = numbers(r"eq\. 3  ")
    others = {name: numbers(name)[0] for name in ("no data term", "no codebook term",
                                                  "no commitment")}
    assert all(row[0] > 2 * error and row[1] < used for row in others.values())
    assert others["no data term"][3] < 0.1 * size, "all outputs near one place"
    assert others["no codebook term"][2] > 5 * apart and 4 < others["no codebook term"][3] < 7
    assert others["no commitment"][3] > 100 * size, "the outputs grow without end"


def test_stored_quantisers_lie_between_shannon_and_panter_and_dite():
    (_, scalar), (_, vector) = numbers("4 bits per number, D")
    assert 1 < vector < scalar < math.pi * math.sqrt(3) / 2 * 1.02


def test_stored_bound_becomes_tight():
    (first, _, log16, last, worst, _), = numbers(r"log p\(x\) - bound: mean")
    assert first == pytest.approx(log16, abs=0.1) and last < 0.01 and worst > 10
    (_, exact, least), = numbers("mean gap at step")
    assert 0 < least <= exact + 1e-3


def test_stored_ways_to_a_codebook_end_alike():
    (*values,), = numbers("distortion: ")
    lloyd, ema, _, eq3 = values                        # "Lloyd .., EMA .., eq. 3 .."
    assert ema < 1.02 * lloyd and eq3 < 1.02 * lloyd


def test_stored_codebooks_lose_codes_or_keep_them():
    for kind in ("VectorQuantizer ", "VectorQuantizerEMA"):
        (uniform, K), = numbers(rf"{kind}\s+start uniform  ")
        assert uniform < 0.85 * K
        for start in ("uniform, restarts", "first batch"):
            (used, _), = numbers(rf"{kind}\s+start {start}")
            assert used > 0.97 * K


def test_stored_variances_fall_from_reinforce_to_vimco():
    (_, _, *plain), = numbers("REINFORCE ")
    (_, _, *baseline), = numbers("with a mean baseline")
    (_, _, *ours), = numbers("VIMCO")
    assert plain == sorted(plain), "more samples make plain REINFORCE worse"
    assert all(a > 100 * b >= 100 * c for a, b, c in zip(plain, baseline, ours))


def test_stored_end_to_end_models_have_learned():
    assert numbers("prior:")[0][0] < 2, "bits per code, of 7"
    (psnr, used, _), = numbers(r"54\.9 times fewer bits")
    assert psnr > 24 and used > 100
    own, = numbers("own codes")[0]
    assert own < numbers("codes of another utterance")[0][0], "the decoder uses the codes"
    assert own < numbers("wrong speaker")[0][0], "the decoder uses the speaker"
    *_, accuracy, majority = numbers(r"\d+ of \d+ codes in use; phone")[0]
    assert accuracy > 2 * majority
    told, lied = numbers("bits per code, test clips:")[0]
    assert told < 0.95 * lied, "the actions predict what comes next"


def test_stored_second_stage_uses_its_latents_where_the_vae_collapses():
    (_, own, other), = [row[-3:] for row in numbers("second stage, VQ-VAE")]
    assert other > own + 15, "more bits than the three codes cost"
    (kl, own_vae, other_vae), = [row[-3:] for row in numbers("second stage, VAE")]
    assert kl < 3 and other_vae < own_vae + 3


def test_stored_imagination_beats_the_last_frame_at_the_end():
    (_, _, _, imagined), = numbers("imagined  ")
    (_, _, _, still), = numbers("last given frame")
    (_, _, _, codec), = numbers("truth through the codec")
    assert still < imagined < codec


def test_stored_later_quantisers_help():
    stages = [row[-1] for row in numbers("residual VQ,")]
    assert len(stages) == 4 and stages == sorted(stages) and stages[-1] > stages[0] + 0.9
    one, two = numbers("transformer:")[0][0], numbers("prior:")[0][0]
    assert one < 2 * two


def test_stored_notebook_is_valid_and_small_enough_for_a_web_page():
    nbformat.validate(NOTEBOOK)
    assert PATH.stat().st_size < 6e6


def test_stored_outputs_are_there_and_none_is_an_error():
    for number, cell in enumerate(CELLS, 1):
        assert cell.execution_count == number, f"code cell {number} was not run, or out of order"
        kinds = {kind for output in cell.outputs for kind in
                 [output.output_type, *output.get("data", {})]}
        assert "error" not in kinds, f"code cell {number} ends in an error"
        top = {node.func.id if isinstance(node.func, ast.Name) else node.func.attr
               for statement in ast.parse(cell.source).body
               if not isinstance(statement, (ast.FunctionDef, ast.ClassDef))
               for node in ast.walk(statement) if isinstance(node, ast.Call)
               and isinstance(node.func, (ast.Name, ast.Attribute))}
        if top & {"subplots", "show", "pipeline", "arrows"}:
            assert "image/png" in kinds, f"code cell {number} draws, and no picture is stored"
        if "print" in top:
            assert "stream" in kinds, f"code cell {number} prints, and nothing is stored"
        if top & {"Sounds", "Play"}:
            assert "text/html" in kinds, f"code cell {number} has no sound or drawing stored"


def test_what_moves_has_a_picture_beside_it_and_needs_no_other_package():
    moving = [i for i, cell in enumerate(CELLS) if "\nPlay(" in "\n" + cell.source]
    assert len(moving) >= 4
    for i in moving:                                   # a still one in this cell or just before
        kinds = {kind for cell in CELLS[max(0, i - 2):i + 1] for output in cell.outputs
                 for kind in output.get("data", {})}
        assert "image/png" in kinds
        page = "".join(output.data["text/html"] for output in CELLS[i].outputs
                       if "text/html" in output.get("data", {}))
        assert "<canvas" in page and not re.search(r"https?://", page)


def test_what_is_built_by_hand_is_compared_with_the_module():
    """The notebook builds each idea in a few lines, and asserts that the module does the same."""
    functions = {node.name: node for cell in CELLS for node in ast.parse(cell.source).body
                 if isinstance(node, ast.FunctionDef) and "_by_hand" in node.name}
    assert len(functions) >= 20
    asserts = "\n".join(
        cell.source for cell in CELLS if any(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(
            cell.source))) or "_by_hand" in cell.source)
    for name, node in functions.items():
        assert node.end_lineno - node.lineno < 30, f"{name}: no more than 30 lines"
        uses = len(re.findall(rf"\b{name}\(", asserts))
        assert uses >= 2, f"{name} is defined and never compared with anything"


def test_the_notebook_defines_nothing_that_the_modules_have():
    def defined(source):
        return {node.name for node in ast.parse(source).body
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    modules = set().union(*(defined((ROOT / name).read_text()) for name in MODULES[:2]))
    notebook = set().union(*(defined(cell.source) for cell in CELLS))
    assert not modules & notebook, "import it; what is built by hand is called ..._by_hand"


def test_the_course_table_names_functions_that_exist_and_tests_that_exist():
    table = (ROOT / ".github" / "COURSES.md").read_text()
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    functions = functions_of_the_modules()
    lessons = [int(row[0].split(".")[0]) for row in rows]
    assert lessons == list(range(1, len(rows) + 1)) and len(rows) >= 11
    for lesson, bodies, guides in rows:
        for name in re.findall(r"`([\w.]+)`", bodies):
            assert name in functions, f"lesson {lesson}: there is no {name}"
        for name in re.findall(r"`(\w+)`", guides):
            assert f"def {name}(" in sources_of_the_tests(), f"lesson {lesson}: there is no {name}"


def functions_of_the_modules():
    found = set()
    for name in MODULES:
        for node in ast.parse((ROOT / name).read_text()).body:
            inside = getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []
            found |= {getattr(node, "name", "")} | {
                f"{node.name}.{f.name}" for f in inside if isinstance(f, ast.FunctionDef)}
    return found


def sources_of_the_tests():
    return "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))


def test_an_empty_body_is_named_with_what_it_should_do(tmp_path):
    (tmp_path / "m.py").write_text(
        'class A:\n    """Of A."""\n    def f(self):\n        """Eq. 1: k."""\n'
        '    def g(self):\n        return 1\n    def h(self):\n        ...\n'
        'def i():\n    pass\ndef j():\n    """Said."""\n    return 2\n')
    assert unwritten(tmp_path / "m.py") == {
        "A.f": "line 3: Eq. 1: k.", "A.h": "line 7: Of A.", "i": "line 9: "}


def test_every_part_has_questions_a_summary_its_time_and_exercises_whose_tests_exist():
    functions, tests = functions_of_the_modules(), sources_of_the_tests()
    assert [int(part.split(".")[0]) for part in PARTS] == list(range(1, 13))
    for part in PARTS:
        title, exercises = part.splitlines()[0], part.split("**Exercises**")[-1]
        assert "**Predict" in part, f"{title}: no question before an experiment"
        assert "**In three lines.**" in part and "*(Time: about" in part, title
        exercises = re.split(r"<details>|^## ", exercises, flags=re.M)[0]
        for exercise in re.split(r"^\d\. ", exercises, flags=re.M)[1:]:
            assert re.match("★+ ", exercise), f"{title}: how difficult is '{exercise[:40]}'?"
            if "*On this page:*" in exercise:
                assert "Expect" in exercise, f"{title}: what is to be seen in '{exercise[:40]}'?"
                continue
            names = re.findall(r"`(test_\w+)`", exercise)
            assert names, f"{title}: which test checks '{exercise[:40]}'?"
            for name in names:
                assert f"def {name}(" in tests, f"{title}: there is no {name}"
            written = [name for name in re.findall(r"`([\w.]+)`", exercise) if name in functions]
            assert written, f"{title}: which function is to be written in '{exercise[:40]}'?"


def test_no_placeholder_and_no_path_of_a_machine_is_left():
    assert "@@" not in PROSE + SOURCE
    assert not re.search(r"/root/|/home/|/tmp/", PROSE + SOURCE + PRINTED)


def mentioned(text):
    """The numbers of the equations that a text names: 'eq. 3', 'eqs. 1 and 2', 'eqs. 4-8'."""
    found = set()
    for first, joint, last in re.findall(
            r"\beqs?[._]? ?(\d)(?:(-|_to_| to | and |, )(\d)\b)?", text, re.I):
        first, last = int(first), int(last or first)
        found |= {first, last} if joint in (" and ", ", ") else set(range(first, last + 1))
    return found


@pytest.mark.parametrize("number", EQUATIONS)
def test_every_equation_is_in_the_notebook_in_the_code_and_in_a_test(number):
    assert f"\\tag{{{number}}}" in PROSE, f"eq. {number} is not in the notebook"
    assert number in mentioned("\n".join((ROOT / name).read_text() for name in MODULES)), (
        f"no line of the code is tagged eq. {number}")
    others = [p for p in (ROOT / "tests").glob("test_*.py") if p.name != Path(__file__).name]
    assert number in mentioned("\n".join(p.read_text() for p in others)), (
        f"no test names eq. {number}")


@pytest.mark.parametrize("formula", [
    r"\log p(x) = \log \sum_k p(x|z_k)\,p(z_k)",
    r"\log p(x) \ge \log p(x|z_q(x))\,p(z_q(x))",
    r"\frac{128 \times 128 \times 3 \times 8}{32 \times 32 \times 9} \approx 42.6",
    r"e_i = \frac{1}{n_i} \sum_j^{n_i} z_{i,j}",
    r"\frac{\partial z_q}{\partial z_e} := I",
    r"\log p(x) - \mathrm{ELBO} = \mathrm{KL}(q(z|x)\,\|\,p(z|x))",
    r"\mathrm{KL} = \tfrac12 (\mu^2 + \sigma^2 - 1 - \log \sigma^2)",
    r"\frac{1}{2\sigma^2} \|x - \hat x\|^2",
    r"= N \log K",
    r"-\log p(z_q|x) = \mathrm{KL}(q(z|x)\,\|\,p(z|x))",
    r"\mathrm{bits/dim} = \frac{-\log p(x|z_q(x)) + N \log K}{d \log 2}",
    r"(1 - \gamma) \gamma^{t-s} n_i^{(s)}",
    r"(1 - \gamma)\,\frac{n_i^{(t)}}{N_i^{(t)}}\,\big(\bar z_i^{(t)} - e_i^{(t-1)}\big)",
    r"\Delta(R) = 2^{-2R}",
    r"\nabla E[L] = E\Big[\sum_s L \, \nabla \log q(z_s|x) + \nabla L\Big]",
    r"\tanh(a) \odot \sigma(b)",
    r"p(z_1, \dots, z_T | a) = \prod_{t=1}^{T} p(z_t | z_{<t}, a_{<t})"])
def test_the_unnumbered_equations_are_there_too(formula):
    assert formula in PROSE
