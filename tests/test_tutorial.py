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
PRINTED = "".join(output.text for cell in CELLS for output in cell.outputs
                  if output.output_type == "stream")
PARTS = re.split(r"^## (?=\d+\. )", PROSE, flags=re.M)[1:]
MODULES = ["vqvae.py", "prior.py", "train_image.py", "train_audio.py", "train_video.py"]
EQUATIONS = range(1, 9)


@pytest.fixture(scope="module")
def ran():
    """The notebook's variables after all its cells: all of them, but hardly trained."""
    space = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch, plt.rc_context():
        patch.setenv("VQVAE_QUICK", "1")
        for number, cell in enumerate(CELLS, 1):
            exec(compile(cell.source, f"tutorial.ipynb, code cell {number}", "exec"), space)
            plt.close("all")
    return space


# -- what the cells compute -----------------------------------------------------------------------


def test_the_rate_of_the_vqvae_is_log_k_and_that_of_a_vae_its_kl(ran):
    x = ran["textures"](20)[0]
    for name, model in ran["models"].items():
        z, _, rate = model.latent(x)
        assert z.shape == (20, 2, 1, 1), name
        if model.bottleneck == "codes":
            assert torch.allclose(rate, torch.tensor(math.log(16)))
            assert len(z.detach().flatten(1).unique(dim=0)) <= 16
        elif model.bottleneck == "gaussian":
            assert rate.shape == (20,) and (rate >= 0).all()


def test_every_term_of_eq_3_is_heard_where_the_paper_says(ran):
    assert ran["listens"] == {"encoder": [True, False, True], "codebook": [False, True, False],
                            "decoder": [True, False, False]}


def test_the_bound_holds_in_the_enumerated_model_and_starts_log_16_too_low(ran):
    # The same sum over z by its definition, one decoder run at a time.
    model, x = ran["model"].eval(), ran["halves"](1)
    terms = [-model.likelihood.nll(model.decoder(model.quantizer.lookup(z[None])), x).item()
             - 2 * math.log(4) for z in ran["every_z"]]
    assert len({tuple(z.flatten().tolist()) for z in ran["every_z"]}) == 16
    assert ran["log_joints"](model, x)[0].tolist() == pytest.approx(terms, rel=1e-5)
    gaps = [a - b for a, b in zip(ran["exact"], ran["one_term"])]
    assert min(gaps) > -1e-3, "log p(x) is a sum of 16 positive terms, the bound one of them"
    assert gaps[0] == pytest.approx(math.log(16), abs=0.1), (
        "a decoder that hears nothing yet gives all 16 the same weight")
    for posterior in ran["posteriors"]:
        assert posterior.sum() == pytest.approx(1)


def test_each_term_of_eq_3_can_be_switched_off_alone(ran):
    assert list(ran["runs"]) == ["eq. 3", "no data term", "no codebook term", "no commitment"]
    start = ran["fit"](codebook=0)["vq"].codebook
    assert start.abs().max() <= 1 / 16, "without term 2 nothing moves the codebook"
    assert ran["runs"]["eq. 3"]["vq"].codebook.abs().max() > 1 / 16


def test_more_bits_leave_less_distortion_but_never_less_than_shannon_allows(ran):
    errors, bits = ran["errors_by_rate"], ran["bits"]
    assert all(a > b for a, b in zip(errors, errors[1:]))
    assert all(error > 2.0 ** -rate for error, rate in zip(errors, bits))


def test_the_ema_codebook_of_eqs_6_to_8_minimises_eq_5_as_lloyd_does(ran):
    assert ran["of_ema"][-1] < 1.05 * ran["of_lloyd"][-1]
    assert ran["of_lloyd"][-1] < 0.5 * ran["of_lloyd"][0]
    # Eq. 4 for the points at their nearest codes is eq. 5; at its minimum nothing pulls on e.
    points, lloyd = ran["points"], ran["lloyd"]
    e = lloyd.codebook.clone().requires_grad_()
    (points - e[lloyd.nearest(points[None])[0]]).square().sum(1).mean().backward()
    assert e.grad.abs().max() < 1e-3, "the mean of what chose it is where the gradient is 0"


def test_a_codebook_that_starts_on_the_first_batch_uses_more_codes(ran):
    for kind in ("VectorQuantizer", "VectorQuantizerEMA"):
        uniform, seeded = (ran["used"][kind, start][1][-1] for start in (False, True))
        assert seeded > uniform, kind


def test_vimco_has_the_mean_of_reinforce_and_less_variance(ran):
    for S, (plain, better) in ran["variance"].items():
        assert better < 0.05 * plain, f"S = {S}"
    means = [ran["moments"](estimator, 3)[0] for estimator in (ran["reinforce"], ran["vimco"])]
    assert torch.allclose(*means)


def test_masked_convolutions_have_a_blind_spot_and_the_pixelcnn_has_none(ran):
    before = ran["before"]
    shallow, deep, ours = ran["pictures"].values()
    assert (before & ~deep).sum() > 0 and not (deep & ~before).any()
    assert torch.equal(ours, before)
    assert ((~deep & before) <= (~shallow & before)).all(), "depth does not hide what was seen"


def test_residual_vq_leaves_less_at_every_stage(ran):
    assert all(a > b for a, b in zip(ran["errors"], ran["errors"][1:]))


def test_sounds_are_wav_files_that_a_browser_plays(ran):
    page = ran["Sounds"]({"a": torch.linspace(-1, 1, 800)})._repr_html_()
    data = base64.b64decode(re.search(r'base64,([^"]+)"', page)[1])
    with wave.open(io.BytesIO(data)) as file:
        assert file.getparams()[:4] == (1, 2, 8000, 800)


def test_end_to_end_models_draw_codes_that_they_can_decode(ran):
    assert ran["sampled"].shape == (10, 8, 8)
    assert ran["drawn"].dtype == torch.uint8 and ran["drawn"].shape[1] % 128 == 0
    assert ran["imagined"].shape == (20, 8, 8, 8)
    table = ran["table"]
    assert table.sum() == 108 * 125, "every code of the training speech meets one phone"


def test_imagined_frames_are_compared_with_the_true_future(ran):
    imagined, true, *_ = ran["rows"]
    assert imagined.shape == true.shape == (10, 3, 32, 32) and imagined.dtype == torch.uint8
    assert torch.equal(imagined[:2], true[:2]), "both rows begin with the frames that were given"
    assert ran["push"](np.array([3]), np.array([[1, 1, 0]])).tolist() == [[3, 4, 4, 3]], "walls"


# -- the notebook as it is stored: what its prose says, its cells have shown ----------------------


def numbers(line):
    """The numbers in the stored lines that this pattern begins; a list for each such line."""
    rests = re.findall(f"^{line}(.*)$", PRINTED, re.M)
    assert rests, f"no cell has printed a line '{line} ..'"
    return [[float(n) for n in re.findall(r"-?\d+\.?\d*", rest)] for rest in rests]


def test_stored_vae_has_collapsed_and_the_vqvae_has_not():
    (_, kl, wrong), = numbers(r"VAE, PixelCNN decoder\s.*?x\|z\)")
    assert kl < 0.2 and abs(wrong) < 0.5, "bits: its z says nothing, and no z is missed"
    (_, kl, wrong), = numbers(r"VQ-VAE, PixelCNN decoder\s.*?x\|z\)")
    assert kl == 4 and wrong > 3, "log2 16 bits, and the decoder hears them"
    (_, kl, wrong), = numbers(r"VAE\s.*?x\|z\)")
    assert kl > 2 and wrong > 3, "the same VAE without a powerful decoder uses its z"


def test_stored_runs_show_what_each_term_of_eq_3_is_for():
    (error, used, apart, size), = numbers(r"eq\. 3\s")
    others = {name: numbers(name)[0] for name in ("no data term", "no codebook term",
                                                  "no commitment")}
    assert all(row[0] > 2 * error and row[1] < used for row in others.values())
    assert others["no data term"][3] < 0.1 * size, "all outputs in one place"
    assert others["no codebook term"][2] > 5 * apart, "the encoder does not come far enough"
    assert others["no commitment"][3] > 100 * size, "the outputs grow without end"


def test_stored_bound_is_nearly_tight_at_the_end():
    first, _, log16, last = numbers(r"log p\(x\) - bound:")[0]        # ".. (log 16 = 2.77), .."
    assert first == pytest.approx(log16, abs=0.1) and last < 0.5


def test_stored_codebooks_start_dead_or_alive():
    for kind in ("VectorQuantizer ", "VectorQuantizerEMA"):
        uniform, first = numbers(rf"{kind}\s+start (?:uniform|first batch)\s")
        assert uniform[0] < 0.2 * uniform[1] and first[0] > 0.9 * first[1]


def test_stored_end_to_end_models_have_learnt():
    assert numbers(r"prior:")[0][0] < 2, "bits a code, of 7"
    own, = numbers("own codes")[0]
    assert own < numbers("codes of another utterance")[0][0], "the decoder hears the codes"
    assert own < numbers("wrong speaker")[0][0], "the decoder hears the speaker"
    *_, accuracy, most_frequent = numbers(r"\d+ of \d+ codes in use; phone")[0]
    assert accuracy > 2 * most_frequent
    told, lied = numbers("bits a code, test clips:")[0]
    assert told < 0.9 * lied, "the actions say what comes next"



def test_stored_notebook_is_valid_and_small_enough_for_a_web_page():
    nbformat.validate(NOTEBOOK)
    assert PATH.stat().st_size < 4e6


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
        if top & {"subplots", "show"}:
            assert "image/png" in kinds, f"code cell {number} draws, and no picture is stored"
        if "print" in top:
            assert "stream" in kinds, f"code cell {number} prints, and nothing is stored"
        if "Sounds" in top:
            assert "text/html" in kinds, f"code cell {number} has no sound stored"


def test_the_notebook_defines_nothing_that_the_modules_have():
    def defined(source):
        return {node.name for node in ast.parse(source).body
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    modules = set().union(*(defined((ROOT / name).read_text()) for name in MODULES))
    notebook = set().union(*(defined(cell.source) for cell in CELLS))
    assert not modules & notebook, "import it; the notebook has no second implementation"


def test_the_course_table_names_functions_that_exist_and_tests_that_exist():
    table = (ROOT / "README.md").read_text().split("## For courses\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    functions = set()
    for name in MODULES:
        for node in ast.parse((ROOT / name).read_text()).body:
            inside = getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []
            functions |= {getattr(node, "name", "")} | {
                f"{node.name}.{f.name}" for f in inside if isinstance(f, ast.FunctionDef)}
    lessons = [int(row[0].split(".")[0]) for row in rows]
    assert lessons == list(range(1, len(rows) + 1)) and len(rows) >= 11
    for lesson, bodies, guides in rows:
        for name in re.findall(r"`([\w.]+)`", bodies):
            assert name in functions, f"lesson {lesson}: there is no {name}"
        for name in re.findall(r"`(\w+)`", guides):
            assert f"def {name}(" in tests, f"lesson {lesson}: there is no {name}"


def test_an_empty_body_is_named_with_what_it_should_do(tmp_path):
    (tmp_path / "m.py").write_text(
        'class A:\n    """Of A."""\n    def f(self):\n        """Eq. 1: k."""\n'
        '    def g(self):\n        return 1\n    def h(self):\n        ...\n'
        'def i():\n    pass\ndef j():\n    """Said."""\n    return 2\n')
    assert unwritten(tmp_path / "m.py") == {
        "A.f": "line 3: Eq. 1: k.", "A.h": "line 7: Of A.", "i": "line 9: "}


def test_every_part_ends_with_exercises_whose_tests_exist():
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    assert [int(part.split(".")[0]) for part in PARTS] == list(range(1, 13))
    for part in PARTS:
        title, exercises = part.splitlines()[0], part.split("**Exercises**")[-1]
        for exercise in re.split(r"^\d\. ", exercises, flags=re.M)[1:]:
            names = re.findall(r"`(test_\w+)`", exercise)
            assert names, f"{title}: which test checks '{exercise.split('.')[0]}'?"
            for name in names:
                assert f"def {name}(" in tests, f"{title}: there is no {name}"


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


def test_the_unnumbered_equations_are_there_too():
    for formula in (r"\log p(x) = \log \sum_k p(x|z_k)\,p(z_k)",
                    r"\log p(x) \ge \log p(x|z_q(x))\,p(z_q(x))",
                    r"\frac{128 \times 128 \times 3 \times 8}{32 \times 32 \times 9} \approx 42.6",
                    r"e_i = \frac{1}{n_i} \sum_j^{n_i} z_{i,j}"):
        assert formula in PROSE, formula
