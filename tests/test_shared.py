"""What is the same in all scripts stands in each of them word for word; documents point at things that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [name for name in ("dac", "diffusion_dice", "swg", "dydiff") if (ROOT / f"{name}.py").exists()]
OWN = """Args resolve Heads ValueNet Block diffuse value_loss critic_target critic_loss sample make_act Agent make_agent
         make_update exact_samples main toy_figure""".split()  # the methods
CLIPS = {("dydiff", "descend")}  # each of the networks that one optimiser has, by itself
COMMON_ARGS = """env data_path data_url eval_env seed device run_dir resume overwrite eval_only video log_every
                 eval_every eval_episodes final_episodes save_every compile graph""".split()


def pieces(script: str) -> dict[str, str]:
    source = (ROOT / f"{script}.py").read_text()
    tree = ast.parse(source)
    named = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(source, node) for node in named}


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_has_one_name_has_one_text(script):
    """Functions and classes of several scripts, but for what the papers differ in, and the end of the file."""
    ours = pieces(script)
    for other in SCRIPTS:
        for name, text in pieces(other).items():
            if name in ours and name not in OWN and not {(script, name), (other, name)} & CLIPS:
                assert ours[name] == text, f"{name} differs between {script}.py and {other}.py"
    shared = [name for name in pieces("dac") if name in ours and name not in OWN]
    assert len(shared) > 25, shared
    assert script_end(script) == script_end("dac")


def script_end(script: str) -> str:
    return (ROOT / f"{script}.py").read_text().split("\nif __name__ ==")[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_begin_with_the_common_ones_in_the_same_order(script):
    body = ast.parse(pieces(script)["Args"]).body[0].body
    fields = [node.target.id for node in body if isinstance(node, ast.AnnAssign)]
    assert fields[: len(COMMON_ARGS)] == COMMON_ARGS


@pytest.mark.parametrize("script", SCRIPTS)
def test_common_arguments_have_one_help_text(script):
    """But for the method's name and its presets."""

    def helps(name: str) -> list[str]:
        texts = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""$', pieces(name)["Args"], re.M | re.S)
        texts = [(k, re.sub(r" \(preset: .*\)", "", text).replace(name, "METHOD")) for k, text in texts]
        return texts[: len(COMMON_ARGS)]

    assert helps(script) == helps("dac") and [k for k, _ in helps(script)] == COMMON_ARGS


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_order_of_a_file_is_that_of_the_design(script):
    """A reader finds the same thing in the same place."""
    source = (ROOT / f"{script}.py").read_text()
    marks = ["class Args", "PRESETS = ", "def resolve", "# --- networks", "# --- losses", "# --- sampler"]
    marks += ["def make_update", "class Graphed", "def evaluate", "def save", "def load", "class Run", "def main"]
    places = [source.index(mark) for mark in marks]
    assert places == sorted(places)


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_relative_link_of_a_page_leads_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


MAPPED = {
    "dac": "actor_loss critic_target dual_step sample vp_schedule",
    "diffusion_dice": "ratio value_loss igl_loss sample dpm_solver VPSDE",
    "swg": "value_loss critic_loss weight joint_loss sample guide vp_schedule",
    "dydiff": "edm_loss denoise edm_sample autoregress correct keep ensemble_loss edm_sigmas",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_map_of_equations_names_functions_that_exist(script):
    page = (ROOT / "docs" / f"{script}.md").read_text()
    rows = re.findall(r"^\| .* \| (`\w+`(?:, `\w+`)*)(?: in `common.py`)? \|$", page, re.M)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(MAPPED[script].split()) <= names
    common = (ROOT / "common.py").read_text()
    for name in names:
        where = name in pieces(script) or re.search(rf"^(def|class) {name}\b", common, re.M)
        assert where, f"docs/{script}.md maps an equation to {name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_difference_is_tagged_in_the_code_and_listed_in_the_docs(script):
    code = (ROOT / f"{script}.py").read_text() + (ROOT / "common.py").read_text()
    head = set(re.findall(r"^  (\[D\d+\])", (ROOT / f"{script}.py").read_text(), re.M))
    listed = set(re.findall(r"^\| (\[D\d+\])", (ROOT / "docs" / f"{script}.md").read_text(), re.M))
    assert head == listed and head
    for tag in head:
        assert code.count(tag) >= 2, f"{tag} is announced but no line carries it"
