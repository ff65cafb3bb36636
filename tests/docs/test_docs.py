"""README and docs: code blocks are run, or listed with the reason why not, and links resolve. CPU, half a minute."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from accelerate.commands.launch import launch_command_parser
from comparison.arguments import CompareArguments
from comparison.plan import Plan

from trl_tinylora.__main__ import main
from trl_tinylora.storage.fingerprint import TOLERANCE
from trl_tinylora.vllm.fidelity import LOWEST_SHARE


ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

# Commands that no test here runs, by their beginning, and why. Those of the recipes are parsed here all the same.
NOT_RUN = {
    "pip install -c": "needs a package index; `make` installs in the same way",
    "pip install": "needs a package index or the repository's address",
    "hf upload": "needs an account",
    "make compare": "minutes; tests/recipes/test_compare.py does each kind of its runs",
    "make compare-full": "an hour; the same script as `make compare`",
    "make test": "this test is one of its tests",
    "make test-oldest": "this test is one of its tests",
    "make test-distributed": "an hour; tests/distributed/test_modes.py runs a part of it",
    "make test-vllm": "an environment of its own, with the real vLLM",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve": "a server; tests/with_vllm/test_server.py starts one",
    "python -m trl_tinylora run": "needs lm-evaluation-harness; tests/with_lm_eval/test_run.py runs the page's command",
    "llama-cli": "llama.cpp's program; tests/with_llama_cpp/test_gguf_adapter.py has llama.cpp read such a file",
    "llama-server": "llama.cpp's program, as llama-cli",
    "make bench": "half an hour; tests/recipes/test_benchmarks.py runs each script on small sizes",
    "make results": "writes into the repository; tests/recipes/test_benchmarks.py compares what it writes",
    "make quality": "a linter is no test; it has its own command",
    ".venv/bin/python -m pytest": "a test run within a test run",
    "python recipes/grpo.py": "minutes; tests/recipes/test_recipes.py runs it for two steps",
    "python recipes/sft.py": "minutes; tests/recipes/test_recipes.py runs it for two steps",
    "python recipes/es.py": "minutes; tests/recipes/test_es.py runs it for three steps",
    "python recipes/evaluate.py": "minutes, or a GPU; tests/recipes/test_evaluate.py runs it on a small model",
    "python recipes/compare.py": "minutes to an hour; tests/recipes/test_compare.py does each kind of its runs",
    "accelerate launch": "processes, or a GPU and hours; tests/distributed/test_recipes_launched.py launches both",
}

pytestmark = pytest.mark.xdist_group("docs")


def blocks_of(page, language):
    return [text for found, text in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def commands_of(page):
    """The commands of a page's bash blocks, without comments, continued lines joined."""
    lines = "\n".join(blocks_of(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def is_own(words):
    """Whether a command is one of the package's own; `run` runs another program's."""
    return words[:3] == ["python", "-m", "trl_tinylora"] and words[3] != "run"


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def prose_of(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def id_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder that looks like the repository's root to the code of the pages, in which they may write."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def run_blocks(page, names, folder):
    """Runs a page's Python blocks in order, with these names defined; returns all names after them."""
    names = dict(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, block in enumerate(blocks_of(page, "python"), start=1):
            exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def of_readme(workspace):
    """What the README's Python blocks define, once for all tests."""
    return run_blocks(README, {"__name__": "docs"}, workspace)


# Code


def test_the_readmes_code_trains_saves_loads_and_exports_as_it_stands(of_readme, workspace):
    first = blocks_of(README, "python")[0]
    assert len(first.splitlines()) <= 12
    values = [parameter for parameter in of_readme["trainer"].model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in values) == 13
    assert all(parameter.abs().sum() > 0 for parameter in values), "training moved nothing"
    assert (workspace / "results" / "thirteen" / "adapter_model.safetensors").stat().st_size < 1000
    fields = json.loads((workspace / "results" / "lora" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA" and fields["r"] == fields["lora_alpha"] == 2


@pytest.mark.parametrize("page", [page for page in PAGES if page != README and blocks_of(page, "python")], ids=id_of)
def test_the_code_of_a_page_runs_after_the_readmes(page, of_readme, workspace):
    if page.name == "bases.md":
        pytest.importorskip("bitsandbytes")
    names = run_blocks(page, of_readme, workspace)
    assert set(names) >= set(of_readme)


def test_code_that_is_wrong_is_found(tmp_path, workspace):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nfrom trl_tinylora import TinyLoraConfig\n```\n\n```python\nTinyLoraConfig(rank=2)\n```\n"
    )
    with pytest.raises(TypeError, match="rank"):
        run_blocks(page, {}, workspace)


def test_loading_without_the_import_says_what_the_readme_explains(of_readme, workspace):
    code = (
        "from peft import PeftConfig\n"
        "try:\n    PeftConfig.from_pretrained('results/thirteen')\n"
        "except KeyError as error:\n    print(repr(error))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workspace, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "KeyError('TRL_TINYLORA')", done.stderr
    assert "KeyError: 'TRL_TINYLORA'" in prose_of(README)


# Commands


def test_the_packages_own_commands_run(of_readme, workspace, monkeypatch, capsys):
    commands = [words for page in PAGES for words in commands_of(page) if is_own(words)]
    assert {words[3] for words in commands} == {"plan", "inspect", "verify", "export"}
    monkeypatch.chdir(workspace)
    for words in commands:
        assert main(words[3:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_every_other_command_is_listed_with_the_reason_why_it_is_not_run(page):
    for words in commands_of(page):
        line = " ".join(words)
        if not is_own(words):
            assert any(line == start or line.startswith(f"{start} ") for start in NOT_RUN), line


def test_the_list_of_commands_that_are_not_run_is_current():
    lines = [" ".join(words) for page in PAGES for words in commands_of(page)]
    unused = [start for start in NOT_RUN if not any(line == start or line.startswith(f"{start} ") for line in lines)]
    assert unused == []
    named = re.findall(r"tests/[\w/]+\.py", " ".join(NOT_RUN.values()))
    assert [name for name in named if not (ROOT / name).is_file()] == []


def script_arguments(words):
    """Parses a recipe's command line as its script does."""
    script = importlib.import_module(Path(words[0]).stem)
    arguments = script.ARGUMENTS if hasattr(script, "ARGUMENTS") else script.CompareArguments
    # A trainer refuses bfloat16 where there is neither a GPU nor this.
    without_gpu = script.__name__ in ("grpo", "sft") and not torch.cuda.is_available()
    return trl.TrlParser(arguments).parse_args_and_config([*words[1:], *(["--use_cpu", "true"] * without_gpu)])


@pytest.mark.parametrize("page", [page for page in PAGES if "recipes/" in str(commands_of(page))], ids=id_of)
def test_the_arguments_of_the_recipes_are_accepted_by_launcher_and_script(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands_of(page):
        words = [{"$RANK": "0", "$HEAD": "localhost"}.get(word, word) for word in words]
        if words[:2] == ["accelerate", "launch"]:
            launched = launch_command_parser().parse_args(words[2:])
            assert Path(launched.config_file).is_file()
            words = ["python", launched.training_script, *launched.training_script_args]
        if words[0] == "python" and words[1].startswith("recipes/"):
            assert script_arguments(words[1:])


def test_a_wrong_argument_is_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="lerning_rate"):
        script_arguments(shlex.split("recipes/sft.py --config recipes/toy/sft.yaml --lerning_rate 1"))


def test_the_targets_of_make_exist():
    targets = {words[1] for page in PAGES for words in commands_of(page) if words[0] == "make"}
    targets |= {name for page in PAGES for name in re.findall(r"`make ([\w-]+)`", page.read_text(encoding="utf-8"))}
    assert {"compare", "test", "bench", "results"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)] == []


# Pages


def test_a_readme_is_read_in_two_minutes():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_code_stands_in_fences_of_a_known_language(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(FENCE.findall(text))
    assert {language for language, _ in FENCE.findall(text)} <= {"python", "bash", "text", "bibtex"}
    indented = [line for line in prose_of(page).splitlines() if re.match(r" {4,}(?!-|\d)", line)]
    assert indented == [], "a block of code without a fence"


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for target in LINK.findall(prose_of(page)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            broken.append(target)
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", prose_of(path), flags=re.MULTILINE)
            broken += [] if anchor in map(slug, headings) else [target]
    assert broken == []


def test_every_page_is_linked_from_the_readme():
    linked = set(LINK.findall(README.read_text(encoding="utf-8")))
    assert {f"docs/{page.name}" for page in DOCS} | {"CONTRIBUTING.md", "recipes/README.md"} <= linked


def module_in_docs(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_count_of_bad_inputs_is_that_of_the_tests(request):
    bad_inputs = module_in_docs("bad_inputs")
    files = {path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.bad_input" in path.read_text()}
    if not files <= {item.path for item in request.session.items} | {Path(__file__)}:
        pytest.skip("not all tests were collected")
    page = bad_inputs.PAGE.read_text(encoding="utf-8")
    assert bad_inputs.table(request.session.items) in page, (
        "run `make results`, or `python docs/bad_inputs.py --update`"
    )


@pytest.mark.parametrize("section", ["trainers", "bases"])
def test_the_tables_of_what_was_tried_are_those_of_their_lists(section):
    tried = module_in_docs("tried")
    assert section in tried.TABLES and len(tried.TABLES) == 2
    page = tried.page_of(section).read_text(encoding="utf-8")
    assert tried.renewed(section) == page, "run `make results`, or `python docs/tried.py --update`"


def test_the_tree_of_files_is_the_files_own():
    tree = module_in_docs("tree")
    page = tree.PAGE.read_text(encoding="utf-8")
    assert tree.renewed(page) == page, "run `make results`, or `python docs/tree.py` alone"
    listed = set(re.findall(r"\]\(\.\./([\w/]+\.py)\)", page))
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trl_tinylora").rglob("*.py")}
    assert {name for name in ours if not name.endswith("__init__.py")} <= listed


def test_the_files_that_the_pages_name_exist():
    name_of_file = re.compile(r"`((?:trl_tinylora|recipes|tests|docs|tuner|storage|tasks)/[\w./-]*\.\w+)`")
    names = {(page, name) for page in PAGES for name in name_of_file.findall(prose_of(page))}
    assert names
    missing = [
        f"{id_of(page)}: {name}"
        for page, name in sorted(names)
        if not ((ROOT / name).is_file() or (ROOT / "trl_tinylora" / name).is_file())
    ]
    assert missing == []


# Numbers that stand outside of the generated tables


def test_the_readmes_memory_is_that_of_the_table():
    row = re.search(r"^\| 7B \|(.*)$", (ROOT / "docs" / "launchers.md").read_text(), flags=re.MULTILINE)[1].split("|")
    weights, whole = row[0].strip(), row[4].strip().strip("*")
    text = " ".join(prose_of(README).split())
    assert f"{whole} GB for training" in text and f"{float(weights):.0f} GB for the copy of the weights" in text


def test_make_compare_is_as_fast_as_the_readme_says(monkeypatch):
    (said,) = re.findall(r"make compare .*at most (\d+) minutes on two cores", README.read_text())
    monkeypatch.chdir(ROOT)
    parser = trl.TrlParser((CompareArguments,))
    plan = Plan(*parser.parse_args_and_config(["--config", "recipes/toy/compare_quick.yaml"]))
    names = [plan.untrained().name, *(run.name for run in plan.samples()), *plan.final_names(), *plan.control_names()]
    runs = [json.loads((ROOT / "recipes" / "toy" / "results" / "runs" / f"{name}.json").read_text()) for name in names]
    assert sum(run["wall_seconds"] for run in runs) / 2 <= 60 * int(said)


def test_the_bounds_that_the_pages_name_are_the_codes():
    assert f"less than {100 * TOLERANCE:.2f}% of its weights' size" in prose_of(ROOT / "docs" / "adapters.md")
    assert f"under {LOWEST_SHARE} it warns" in prose_of(ROOT / "docs" / "merging-and-vllm.md")
